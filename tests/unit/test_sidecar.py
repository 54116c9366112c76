"""A set's sidecar says what its index says, belongs to it, and is refused where it is damaged."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shardsets import make_set
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig
from vmamba_dist.data import sidecar
from vmamba_dist.data.command import main
from vmamba_dist.data.mixture import Mixture
from vmamba_dist.data.reader import LaneReader
from vmamba_dist.data.sets import open_set
from vmamba_dist.data.shards import Index, Shard, read_index, read_samples
from vmamba_dist.data.sidecar import LargeIndex, ShardTable, open_index, path_of, write, write_all
from vmamba_dist.data.sources import Raw, SourceError
from vmamba_dist.data.stream import TrainStream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_set(tmp_path, 97)
    write_all(made)
    return made


def test_it_says_what_the_index_says(folder: Path) -> None:
    plain, large = read_index(folder), open_index(folder)
    assert isinstance(large, LargeIndex)
    assert list(large.shards) == list(plain.shards)
    assert large.shards[-1] == plain.shards[-1]
    assert list(large.lengths) == list(plain.lengths)
    for name in (
        "root",
        "name",
        "split",
        "num_samples",
        "num_classes",
        "class_names",
        "mean_bytes",
        "warnings",
    ):
        assert getattr(large, name) == getattr(plain, name), name
    assert large.fingerprint() == plain.fingerprint()
    for shard, length in enumerate(plain.lengths):
        for first, count in ((0, length), (length - 1, 1), (3, 0), (2, 4)):
            assert large.offsets.bounds(shard, first, count) == plain.offsets.bounds(shard, first, count)
        assert np.array_equal(large.offsets.of_shard(shard), plain.offsets.of_shard(shard))
        samples = read_samples(large.source(), large.offsets, shard, 0, length)
        assert samples == read_samples(plain.source(), plain.offsets, shard, 0, length)
        assert all(isinstance(sample, Raw) for sample in samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same(folder: Path, workers: int) -> None:
    def batches(index: object) -> list[torch.Tensor]:
        data = DataConfig(image_size=8, global_batch=12, workers=workers, block=4)
        stream = TrainStream(index, data, AugmentConfig(), seed=5, lanes=6)  # type: ignore[arg-type]
        taken = [batch.images for batch in islice(stream.batches(), 17)]  # into a third epoch
        stream.close()
        return taken

    for a, b in zip(batches(read_index(folder)), batches(open_index(folder)), strict=True):
        assert torch.equal(a, b)


def test_a_cache_and_a_mixture_make_no_object_of_each_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 200,000 shards those took more than a hundred MB and five seconds."""
    made: list[object] = []
    get = ShardTable.__getitem__

    def counted(table: ShardTable, i: int) -> Shard:
        made.append(i)
        return get(table, i)

    monkeypatch.setattr(ShardTable, "__getitem__", counted)
    data = DataConfig(image_size=8, global_batch=12, workers=0, block=4)
    known = replace(data, cache_dir=str(tmp_path / "cache"))
    large, plain = open_set(str(folder), "train", data=known, keep=tmp_path / "k"), read_index(folder)

    def stream(index: Index) -> TrainStream:
        return TrainStream(Mixture((index, index), (2.0, 1.0), 12), data, AugmentConfig(), seed=5, lanes=6)

    one, other = stream(large), stream(plain)
    batches = one.batches()
    assert made == []
    for a, b in zip(islice(batches, 9), islice(other.batches(), 9), strict=True):
        assert torch.equal(a.images, b.images)
    assert set(made) <= set(range(8))
    one.close()
    other.close()
    mixed = one.index.shards
    assert [shard.filename for shard in mixed] == [f"{i}:{s.filename}" for i in (0, 1) for s in plain.shards]
    assert mixed[-1].num_samples == plain.shards[-1].num_samples


def test_a_sidecar_of_another_index_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = folder / "_info.json"
    info.write_text(info.read_text() + " ")
    assert not isinstance(open_index(folder), LargeIndex)
    assert "belongs to another _info.json" in caplog.text
    write(read_index(folder))
    plain = read_index(folder)
    bounds = [plain.offsets.bounds(shard, 0, length) for shard, length in enumerate(plain.lengths)]
    (folder / "_offsets-train.bin").write_bytes(b"x" * 1000)
    assert not isinstance(open_index(folder), LargeIndex)
    write(read_index(folder))  # makes the offsets again
    large = open_index(folder)
    assert isinstance(large, LargeIndex)
    # Once they were all zeros.
    assert [large.offsets.bounds(shard, 0, length) for shard, length in enumerate(plain.lengths)] == bounds


@pytest.mark.parametrize("keep", [0, 7, 60, 90, -1])
def test_a_damaged_sidecar_is_an_error_with_its_fix(folder: Path, keep: int) -> None:
    path = path_of(folder, "train")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ConfigError, match="is not whole: remove it, and write it with: vmamba shards verify --sidecar"
    ):
        open_index(folder)


def test_a_name_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    path = path_of(folder, "train")
    name = read_index(folder).shards[2].filename.encode()
    path.write_bytes(path.read_bytes().replace(name, b"../" + name[3:]))
    with pytest.raises(ConfigError, match="outside its folder"):
        open_index(folder).source().read(2, 0, 512)


def test_a_missing_shard_is_an_error_when_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmamba_dist.data.sources.RETRY_AFTER_S", (0.0,))
    index = open_index(folder)
    missing = folder / index.shards[3].filename
    missing.unlink()
    assert isinstance(open_index(folder), LargeIndex)  # a million tars are not looked at
    with pytest.raises(SourceError, match=missing.name):
        read_samples(index.source(), index.offsets, 3, 0, 2)


def test_what_a_short_shard_has_lost_counts_as_bad(folder: Path) -> None:
    index = open_index(folder)
    tar = folder / index.shards[1].filename
    with tar.open("r+b") as file:
        file.truncate(index.offsets.bounds(1, 5, 0)[0] + 300)
    os.utime(tar, (1, 1))  # long before the run began
    images = torch.empty((97, 3, 8, 8), dtype=torch.uint8)

    def prepare(data: bytes, seed: int) -> torch.Tensor:
        return torch.zeros((3, 8, 8), dtype=torch.uint8)

    reader = LaneReader(open_index(folder), prepare, seed=0, lanes=6, block=4)
    rows = reader.read(0, range(97), images)
    reader.close()
    assert {(bad.shard, bad.index) for bad in rows.bad} == {(tar.name, i) for i in range(5, 13)}


def test_pack_writes_sidecars_of_a_large_set_and_removes_them_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path, 30)
    words = ["pack", str(tmp_path / "images" / "list.csv"), str(tmp_path / "out"), "--samples-per-shard=5"]
    words += ["--holdout=0.3", "--overwrite"]
    for large, expected in ((3, {"_index-train.bin", "_index-test.bin"}), (10, set())):
        monkeypatch.setattr(sidecar, "LARGE", large)
        assert main(words) == 0
        assert {path.name for path in (tmp_path / "out").glob("_index-*")} == expected
        assert isinstance(open_index(tmp_path / "out", "auto"), LargeIndex) == bool(expected)
    assert main(["verify", str(tmp_path / "out"), "--sidecar"]) == 0
    assert "wrote " in capsys.readouterr().out
    assert open_index(tmp_path / "out", "auto").split == "test"
    assert isinstance(open_index(tmp_path / "out"), LargeIndex)


def test_no_sidecar_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert not isinstance(open_index(make_set(tmp_path, 20)), LargeIndex)
    assert caplog.text == ""
    with pytest.raises(ConfigError, match=r"has no _info\.json"):
        open_index(tmp_path)


def test_a_shard_that_changes_before_it_was_read_is_an_error(folder: Path) -> None:
    """Its tars are not looked at when the run begins; one that is written after that is held to its sha256."""
    index = open_index(folder)
    first, second = (folder / index.shards[i].filename for i in (1, 2))
    whole = first.read_bytes()
    first.write_bytes(whole)  # copied again
    content = second.read_bytes()
    second.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    source = index.source()
    assert source.read(1, 0, 1024) == whole[:1024]
    with pytest.raises(SourceError, match="has changed: its sha256 is not its index's any more"):
        source.read(2, 0, 1024)
    source.close()


def test_a_shard_that_changes_after_it_was_read_is_an_error(folder: Path) -> None:
    """A sidecar's set has looked at no tar when the run begins; each reader holds a tar to what it first saw."""
    index = open_index(folder)
    source = index.source()
    path = folder / index.shards[2].filename
    whole = path.read_bytes()
    read = source.read(2, 0, 1024)
    path.write_bytes(whole)
    os.utime(path, ns=(1, 1))
    assert source.read(2, 0, 1024) == read  # the same bytes, by their sha256
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(SourceError, match="has changed: its sha256 is not its index's any more"):
        source.read(2, 0, 1024)
    path.write_bytes(whole[:-512])
    with pytest.raises(SourceError, match=f"it has {len(whole) - 512} bytes, and had {len(whole)}"):
        source.read(2, 0, 1024)
    source.close()
