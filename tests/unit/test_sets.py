"""A set is the same set by every address; its index is made once; its faults are errors, the same on every rank."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path

import boto3
import pytest
import torch
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import ClientError

from servers import BUCKET, KEY_ID, SECRET, Shelf, s3, shelf, upload
from shardsets import make_set, members, picture, write_images
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig, EvalConfig, S3Config
from vmamba_dist.data import remote, sets, sidecar
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.s3 import S3
from vmamba_dist.data.sets import Places, open_set, split_of
from vmamba_dist.data.shards import Index, pack, read_index, verify
from vmamba_dist.data.sources import SourceError
from vmamba_dist.data.stream import TrainStream, eval_batches
from vmamba_dist.data.tarscan import RangeFile, scan_shard
from vmamba_dist.data.workers import WorkerError

SIZE = 8
PATTERN = "odd-train-{000000..000007}.tar"
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 samples in 8 shards, with an index, and beside it the same without one."""
    made = make_set(tmp_path_factory.mktemp("sets"), 97)
    bare = made.parent / "bare"
    bare.mkdir()
    for path in made.glob("*.tar"):
        (bare / path.name).write_bytes(path.read_bytes())
    return made


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """Serves /set and /bare; waits between attempts are a tenth as long."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.025)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.2)
    with shelf(folder.parent) as made:
        yield made


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[str]:
    with s3() as url:
        upload(url, folder, "some/set")
        upload(url, folder.parent / "bare", "some/bare")
        yield url


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)


def data(**fields: object) -> DataConfig:
    known = {"image_size": SIZE, "global_batch": 12, "workers": 0, "block": 4, "read_timeout_s": 5.0}
    return DataConfig(**known | fields)  # type: ignore[arg-type]


def stream(index: Index, workers: int = 0, **options: object) -> TrainStream:
    return TrainStream(index, data(workers=workers), AugmentConfig(), seed=5, lanes=6, **options)  # type: ignore[arg-type]


def take(count: int, made: TrainStream, *begin: object) -> list[Batch]:
    try:
        return list(islice(made.batches(*begin), count))  # type: ignore[arg-type]
    finally:
        made.close()


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert (a.step, a.epoch, a.keys, a.bad) == (b.step, b.epoch, b.keys, b.bad)
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


def assert_the_set(index: Index, folder: Path) -> None:
    """The same samples at the same bytes, and the same batches."""
    own = read_index(folder)
    assert [s.filename for s in index.shards] == [s.filename for s in own.shards]
    assert (index.lengths, index.num_classes) == (own.lengths, own.num_classes)
    for i, count in enumerate(own.lengths):
        assert index.offsets.bounds(i, 0, count) == own.offsets.bounds(i, 0, count)
    assert_same(take(9, stream(index)), take(9, stream(own)))


def test_a_web_address_with_an_index_is_the_set(folder: Path, server: Shelf, tmp_path: Path) -> None:
    index = open_set(f"{server.url}/set/", "train", data=data(), keep=tmp_path)
    assert index.fingerprint() == read_index(folder).fingerprint()
    assert_the_set(index, folder)
    assert_same(take(9, stream(index, 2)), take(9, stream(read_index(folder))))
    asked = len(server.asked)
    again = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    assert (again, len(server.asked)) == (
        index,
        asked + 1,
    )  # only whether the index is still the one that is kept


def test_offsets_are_made_where_a_set_has_none(folder: Path, server: Shelf, tmp_path: Path) -> None:
    sidecar = folder / "_offsets-train.bin"
    sidecar.rename(folder.parent / "away")
    try:
        index = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    finally:
        (folder.parent / "away").rename(sidecar)
    assert_the_set(index, folder)


@pytest.fixture
def timms(folder: Path, tmp_path: Path) -> Path:
    """The set as timm writes one: names, lengths, counts."""
    made = copied(folder, tmp_path / "timms")
    info = json.loads((made / "_info.json").read_text())
    entry = {k: v for k, v in info["splits"]["train"].items() if k not in ("bytes", "sha256")}
    (made / "_info.json").write_text(json.dumps({"name": "odd", "splits": {"train": entry}}))
    (made / "_offsets-train.bin").unlink()
    return made


@pytest.mark.parametrize("cached", [False, True])
def test_a_set_of_timms_is_the_set(folder: Path, timms: Path, tmp_path: Path, cached: bool) -> None:
    """By every address, with the classes of its labels; once it was refused, or asked each rank to scan it."""
    known = data(cache_dir=str(tmp_path / "cache")) if cached else data()
    with shelf(tmp_path) as up:
        index = open_set(f"{up.url}/timms", "train", data=known, keep=tmp_path / "k")
        own = open_set(str(timms), "train", data=known, keep=tmp_path / "k")
        assert index.fingerprint() == own.fingerprint() == read_index(timms).fingerprint()
        assert_the_set(index, folder)
        assert_the_set(own, folder)


def test_a_local_sets_tars_are_scanned_once_and_that_is_kept(
    folder: Path, timms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once each rank read every header, one tar after the other, at every start."""
    caplog.set_level(logging.INFO)

    def scanned() -> bool:
        caplog.clear()
        assert_the_set(open_set(str(timms), "train", data=data(), keep=tmp_path / "k"), folder)
        return "reading the headers of 8 tars" in caplog.text

    assert [scanned(), scanned()] == [True, False]
    os.utime(timms / "odd-train-000002.tar", (1, 1))  # another file, for all that is known
    assert [scanned(), scanned()] == [True, False]
    path = timms / "odd-train-000001.tar"
    os.truncate(path, read_index(folder).offsets.bounds(1, 0, 13)[4] + 300)
    for _ in range(2):  # what is lost is told at every start, and never takes other samples along
        index = open_set(str(timms), "train", data=data(), keep=tmp_path / "k")
        assert "4 samples of 13; what is lost counts as bad samples" in "".join(index.warnings)
        batches = take(8, stream(index))
        assert {bad.index for batch in batches for bad in batch.bad} <= set(range(4, 13))


def test_training_and_evaluation_look_at_a_place_once(folder: Path, tmp_path: Path) -> None:
    names = [path.stem for path in make_set(tmp_path, 97, holdout=0.3).glob("*.tar")]
    with shelf(tmp_path) as up:
        places = Places(data(), tmp_path / "k")
        address = f"{up.url}/set/{{{','.join(names)}}}.tar"
        train, test = places.open(address, "train"), places.open(address, "auto", key="eval.data")
        assert (train.split, test.split, train.num_samples + test.num_samples) == ("train", "test", 97)
        assert sorted(up.ranges()).count("bytes=0-0") == len(names)
        del up.asked[:]
        for split in ("train", "auto"):
            places.open(f"{up.url}/set", split)
        assert [path for path, *_ in up.asked if path == "/set/_info.json"] == ["/set/_info.json"] * 3


@pytest.mark.parametrize("where", ["bare", "set", "web"])
def test_tars_without_an_index_get_one(folder: Path, server: Shelf, tmp_path: Path, where: str) -> None:
    """A folder of tars, a pattern of local ones, and a pattern behind a web server."""
    bare = folder.parent / "bare"
    address = {"bare": f"{bare}", "set": f"{folder}/{PATTERN}", "web": f"{server.url}/bare/{PATTERN}"}[where]
    index = open_set(address, "train", data=data(), keep=tmp_path)
    assert_the_set(index, folder)
    same = open_set(f"{bare}", "train", data=data(), keep=tmp_path / "other")
    assert index.fingerprint() == same.fingerprint()  # its content and not its place


def test_a_kept_index_is_of_the_shards_that_are_there(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sorted(folder.glob("*.tar"))[:3]:
        (bare / path.name).write_bytes(path.read_bytes())
    assert open_set(str(bare), "train", data=data(), keep=tmp_path / "k").num_samples == 39
    path = folder / "odd-train-000003.tar"
    (bare / path.name).write_bytes(path.read_bytes())
    assert open_set(str(bare), "train", data=data(), keep=tmp_path / "k").num_samples == 52
    assert not (bare / "_info.json").exists()


def test_an_index_is_kept_beside_the_shards_when_asked(folder: Path, server: Shelf, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.glob("*.tar"):
        (bare / path.name).write_bytes(path.read_bytes())
    asked = data(keep_index="beside")
    index = open_set(str(bare), "train", data=asked, keep=tmp_path / "k")
    assert verify(bare).ok
    assert read_index(bare).fingerprint() == index.fingerprint()
    assert "tags" not in json.loads((bare / "_info.json").read_text())  # they would be wrong of a copy
    assert open_set(str(bare), "train", data=data(), keep=tmp_path / "k2").lengths == index.lengths
    for address in (f"{bare}/{PATTERN}", f"{server.url}/bare/{PATTERN}"):
        with pytest.raises(
            ConfigError, match=r"data\.keep_index=beside needs a folder or s3://bucket/prefix"
        ):
            open_set(address, "train", data=asked, keep=tmp_path / "k3")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("way", ["folder", "sidecar", "web", "pattern", "bare"])
def test_a_set_that_is_sorted_by_class_is_told_by_every_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str, shuffle: bool
) -> None:
    """A sidecar and a store told nothing once, and tars without an index never had."""
    lines = [f"{i:05d}{('.jpg', '.png', '.webp')[i % 3]},{i // 20}" for i in range(60)]
    write_images(tmp_path / "images", 60, 3).write_text("path,label\n" + "\n".join(lines))
    pack(tmp_path / "images/list.csv", tmp_path / "set", name="odd", shuffle=shuffle, samples_per_shard=20)
    if way == "sidecar":
        sidecar.write_all(tmp_path / "set")
    if way == "bare":
        (tmp_path / "set/_info.json").unlink()
    caplog.clear()
    with shelf(tmp_path) as made:
        place = {"web": f"{made.url}/set", "pattern": f"{made.url}/set/odd-train-{{000000..000002}}.tar"}
        address = place.get(way, str(tmp_path / "set"))
        for _ in range(2):  # made or fetched, and kept
            caplog.clear()
            index = open_set(address, "train", data=data(), keep=tmp_path / "kept")
            assert ("neighbours in split train have the same label" in caplog.text) is not shuffle
            assert bool(index.warnings) is not shuffle


@forks
def test_many_ranks_make_an_index_once(folder: Path, server: Shelf, tmp_path: Path) -> None:
    """Six processes start together: one makes it, the others wait for it."""
    address = f"{server.url}/bare/{PATTERN}"
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            status = 2
            try:
                status = 0 if open_set(address, "train", data=data(), keep=tmp_path).num_samples == 97 else 1
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    tars = [path for path, asked, _ in server.asked if asked != "bytes=0-0"]
    assert len(tars) == 8  # 40 kB each: one request
    assert not list(tmp_path.glob("*.tmp"))


@forks
def test_where_locks_do_not_hold_ranks_leave_each_other_at_work(
    folder: Path, server: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes the index for itself, at the same time, and the first is kept; once the second removed the first's."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    address = f"{server.url}/bare/{PATTERN}"
    server.wait_s = 0.1
    children = []
    for rank in range(4):
        child = os.fork()
        if not child:
            status = 2
            try:
                time.sleep(0.05 * rank)
                status = 0 if open_set(address, "train", data=data(), keep=tmp_path).num_samples == 97 else 1
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not list(tmp_path.glob("*.tmp"))


@forks
def test_a_rank_that_is_killed_at_it_leaves_no_half_index(
    folder: Path, server: Shelf, tmp_path: Path
) -> None:
    address = f"{server.url}/bare/{PATTERN}"
    server.faults.extend([""] * 8)  # they are looked at, then stall
    server.always = "stall"
    child = os.fork()
    if not child:
        open_set(address, "train", data=data(read_timeout_s=60.0), keep=tmp_path)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not any(fault == "stall" for *_, fault in server.asked) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.glob("*.tmp")
    server.always = ""
    assert open_set(address, "train", data=data(), keep=tmp_path).num_samples == 97
    (kept,) = [path for path in tmp_path.iterdir() if path.is_dir() and path != left]
    for age, stays in ((3600, True), (2 * 24 * 3600, False)):  # a young one may be another rank's at work
        shutil.rmtree(kept)
        os.utime(left, (time.time() - age,) * 2)
        assert open_set(address, "train", data=data(), keep=tmp_path).num_samples == 97
        assert list(tmp_path.glob("*.tmp")) == [left] * stays


def test_a_folder_that_cannot_be_written_keeps_it_elsewhere(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    index = open_set(f"{folder}/{PATTERN}", "train", data=data(), keep=tmp_path / "file" / "index")
    assert index.num_samples == 97
    assert "the index cannot be kept in its folder" in caplog.text


def test_headers_are_read_and_not_what_lies_between(tmp_path: Path) -> None:
    """Large members are jumped, small ones read through; labels and offsets are those of a plain scan."""
    for side, most in ((1200, 0.1), (40, 1.01)):
        images = tmp_path / f"images-{side}"
        images.mkdir()
        for i in range(4):
            picture(i).resize((side, side)).save(images / f"{i}.png", compress_level=0)
        (images / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,{i}\n" for i in range(4)))
        pack(images / "list.csv", tmp_path / f"set-{side}", name="x")
        content = (tmp_path / f"set-{side}" / "x-train-000000.tar").read_bytes()
        read: list[int] = []

        def ranged(start: int, end: int, content: bytes = content, read: list[int] = read) -> bytes:
            read.append(end - start)
            return content[start:end]

        found = scan_shard(RangeFile(ranged, len(content)).as_file(), len(content))
        index = read_index(tmp_path / f"set-{side}")
        assert (found.bounds, found.num_classes, found.whole) == (index.offsets.bounds(0, 0, 4), 4, True)
        assert sum(read) <= most * len(content)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "{root}/bare/odd-train-{{000000..000009}}.tar",
            "2 of its 10 shards are missing, first odd-train-000008.tar",
        ),
        ("{root}/bare/odd-{{1..3.tar", "Unbalanced braces"),
        ("{root}/bare/odd-{{0..99999999999}}.tar", "names more than 10000000 shards"),
        ("{root}/bare/{{a,b}}.zip", "a pattern names tars"),
        ("{root}/bare/{{a,a}}.tar", "names a shard twice"),
        (
            "{url}/bare/odd-train-{{000007..000008}}.tar",
            "1 of its 2 shards are missing, first odd-train-000008.tar",
        ),
        (
            "{url}/bare",
            "has no _info.json, and a web server cannot be asked what else it has: give a pattern",
        ),
        ("gs://bucket/x", "gs:// addresses cannot be read; use a folder, https:// or s3://"),
        ("pipe:cat x.tar", "pipe: addresses run a shell command and are refused"),
        ("{root}", "has no _info.json"),
    ],
)
def test_what_is_no_set_is_named(
    folder: Path, server: Shelf, tmp_path: Path, address: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_set(address.format(root=folder.parent, url=server.url), "train", data=data(), keep=tmp_path)


def test_splits_are_told_by_the_names_of_shards() -> None:
    names = {
        "imagenet1k-train-0001.tar": "train",
        "imagenet1k-validation-01.tar": "validation",
        "val/shard_0.tar": "val",
        "trains-0.tar": "train",
        "x.tar": "train",
        "train/test_3.tar": "test",
    }
    assert {name: split_of(name) for name in names} == names


def test_a_set_behind_faults_gives_the_same_batches(folder: Path, server: Shelf, tmp_path: Path) -> None:
    """Every second request fails, each in another way; no sample is replaced, whoever reads."""
    index = open_set(f"{server.url}/set", "train", data=data(read_timeout_s=0.4), keep=tmp_path)
    alone = take(8, stream(read_index(folder)))
    for workers in (0, 2):
        for fault in ("cut", "503", "range", "500", "length", "whole", "hang", "429") * 2:
            server.faults.extend([fault, ""])
        batches = take(8, stream(index, workers))
        assert_same(batches, alone)
        assert not any(batch.bad for batch in batches)
        server.faults.clear()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_stays_away_is_an_error_naming_it(server: Shelf, tmp_path: Path, workers: int) -> None:
    index = open_set(f"{server.url}/set", "train", data=data(read_attempts=3), keep=tmp_path)
    server.always = "500"
    words = r"http://127\.0\.0\.1:\d+/set/odd-train-00000\d\.tar: bytes .* in 3 attempts .*HTTP 500"
    with pytest.raises(SourceError, match=words):
        take(1, stream(index, workers))


def test_a_shard_that_changes_during_the_run_is_an_error(folder: Path, server: Shelf, tmp_path: Path) -> None:
    index = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    made = stream(index)
    batches = made.batches()
    next(batches)
    server.tag = '"another"'
    with pytest.raises(SourceError, match=r'has changed: its tag is "another"'):
        list(islice(batches, 8))
    made.close()
    shorter = [dataclasses.replace(shard, num_bytes=7) for shard in index.shards]
    with pytest.raises(SourceError, match=r"size"):
        take(1, stream(dataclasses.replace(index, shards=tuple(shorter), opener=_of(server, shorter))))


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def change(folder: Path) -> None:
    """Another byte in each shard, at the same size."""
    for path in folder.glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["folder", "bare", "pattern", "web", "web pattern"])
def test_a_shard_that_changes_before_the_first_batch_is_an_error(
    folder: Path, tmp_path: Path, way: str, cached: bool
) -> None:
    """At the same size: once each reader took for granted what it first saw."""
    made = copied(folder if way in ("folder", "web") else folder.parent / "bare", tmp_path / "made")
    known = data(cache_dir=str(tmp_path / "cache")) if cached else data()
    with shelf(tmp_path) as up:
        address = f"{up.url}/made" if way.startswith("web") else f"{made}"
        address += f"/{PATTERN}" if way.endswith("pattern") else ""
        index = open_set(address, "train", data=known, keep=tmp_path / "k")
        change(made)
        what = {"folder": "its sha256 is not", "web": "its tag is", "web pattern": "its tag is"}
        with pytest.raises(SourceError, match=f"has changed: {what.get(way, 'it was written again')}"):
            take(1, stream(index))


def test_a_local_shard_that_is_written_again_alike_is_the_same(folder: Path, tmp_path: Path) -> None:
    made = copied(folder, tmp_path / "made")
    index = open_set(str(made), "train", data=data(), keep=tmp_path / "k")
    for path in made.glob("*.tar"):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
    assert_same(take(3, stream(index)), take(3, stream(read_index(folder))))


def test_a_resume_knows_a_stores_shards_by_what_the_first_start_saw(folder: Path, tmp_path: Path) -> None:
    made = copied(folder, tmp_path / "made")
    with shelf(tmp_path) as up:
        open_set(f"{up.url}/made", "train", data=data(), keep=tmp_path / "k")
        change(made)
        index = open_set(f"{up.url}/made", "train", data=data(), keep=tmp_path / "k")
        with pytest.raises(SourceError, match="has changed: its tag is"):
            take(1, stream(index))


def test_too_many_shards_of_a_web_server_are_not_looked_at(
    folder: Path, server: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its readers holds them to what it first sees, and all of them to the index's sizes."""
    monkeypatch.setattr(sets, "_MOST_LOOKS", 7)
    index = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    assert server.ranges() == []
    assert_same(take(3, stream(index)), take(3, stream(read_index(folder))))
    server.tag = '"another"'
    made = stream(index)
    assert len(list(islice(made.batches(), 3))) == 3
    made.close()


def _of(server: Shelf, shards: list) -> object:  # type: ignore[type-arg]
    items = [remote.Item(f"{server.url}/set/{shard.filename}", shard.num_bytes) for shard in shards]
    return lambda: remote.RemoteSource(items, remote.Web(), remote.Patience())


def test_an_early_stop_leaves_no_thread_no_socket_and_no_process(server: Shelf, tmp_path: Path) -> None:
    index = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    threads, files = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    for workers in (0, 2):
        made = stream(index, workers)
        next(made.batches())
        made.close()
        deadline = time.monotonic() + 10
        while server.open_sockets and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.open_sockets == 0
        while set(threading.enumerate()) - threads and time.monotonic() < deadline:
            time.sleep(0.02)
        assert set(threading.enumerate()) <= threads
        assert multiprocessing.active_children() == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= files


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_reader_is_an_error_within_seconds_and_no_zombie(
    server: Shelf, tmp_path: Path, victim: int
) -> None:
    """Killed while it waits for a server that says nothing; the other reader, whose turn it may be, waits too."""
    index = open_set(f"{server.url}/set", "train", data=data(read_timeout_s=120.0), keep=tmp_path)
    made = stream(index, 2)
    server.always = "stall"
    batches = made.batches()
    readers = {process.name: process.pid for process in multiprocessing.active_children()}
    deadline = time.monotonic() + 20
    while not any(fault == "stall" for *_, fault in server.asked) and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = time.monotonic()
    os.kill(readers[f"reader-{victim}"] or 0, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"reader-{victim} \(pid \d+\) was killed by signal 9"):
        next(batches)
    made.close()
    assert time.monotonic() - begun < 30
    assert multiprocessing.active_children() == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers.values())


def test_a_lane_starts_inside_a_shard(folder: Path, server: Shelf, tmp_path: Path) -> None:
    """A resume in the middle of an epoch reads at most two blocks for each lane of its first batch."""
    index = open_set(f"{server.url}/set", "train", data=data(), keep=tmp_path)
    bounds = [index.offsets.bounds(i, 0, count) for i, count in enumerate(index.lengths)]
    largest = max(b - a for own in bounds for a, b in pairwise(own))
    server.sent = 0
    (batch,) = take(1, stream(index), 0, 48)
    assert_same([batch], take(1, stream(read_index(folder)), 0, 48))
    assert 0 < server.sent <= 6 * 2 * 4 * largest


def test_a_cache_serves_the_set_when_the_server_is_down(folder: Path, tmp_path: Path) -> None:
    with shelf(folder.parent) as up:
        cached = data(cache_dir=str(tmp_path / "cache"))
        index = open_set(f"{up.url}/set", "train", data=cached, keep=tmp_path / "k")
        first = take(8, stream(index, 2))
        asked = len(up.asked)
        assert_same(take(8, stream(index)), first)
        assert len(up.asked) - asked < 4  # a block beyond the last batch, at most
    whole = read_index(folder)
    assert_same(first, take(8, stream(whole)))
    local = open_set(str(folder), "train", data=cached, keep=tmp_path / "k")
    assert_same(take(8, stream(local)), first)  # of the same content: read from the same pieces


@pytest.mark.usefixtures("account")
def test_a_bucket_is_the_set(folder: Path, endpoint: str, tmp_path: Path) -> None:
    """With its index, without one, and by a pattern; lists, ranges and writes are signed by the environment's keys."""
    own = data(s3=S3Config(endpoint))
    index = open_set(f"s3://{BUCKET}/some/set", "train", data=own, keep=tmp_path)
    assert index.fingerprint() == read_index(folder).fingerprint()
    assert_the_set(index, folder)
    bare = open_set(f"s3://{BUCKET}/some/bare/", "train", data=own, keep=tmp_path)
    assert_the_set(bare, folder)
    assert_same(take(9, stream(bare, 2)), take(9, stream(read_index(folder))))
    pattern = open_set(f"s3://{BUCKET}/some/bare/{PATTERN}", "train", data=own, keep=tmp_path)
    assert pattern.fingerprint() == bare.fingerprint()
    beside = open_set(
        f"s3://{BUCKET}/some/bare",
        "train",
        data=dataclasses.replace(own, keep_index="beside"),
        keep=tmp_path / "b",
    )
    assert beside.fingerprint() == bare.fingerprint()
    kept = open_set(f"s3://{BUCKET}/some/bare", "train", data=own, keep=tmp_path / "c")
    assert json.loads((kept.root / "_info.json").read_text())["splits"]["train"]["num_samples"] == 97
    with pytest.raises(ConfigError, match=r"has neither an _info\.json nor tars"):
        open_set(f"s3://{BUCKET}/nothing", "train", data=own, keep=tmp_path)
    with pytest.raises(SourceError, match=r"cannot be listed|HTTP 404"):
        open_set("s3://no-such-bucket/x", "train", data=own, keep=tmp_path)


@pytest.mark.usefixtures("account")
def test_a_bucket_is_evaluated_on(folder: Path, endpoint: str, tmp_path: Path) -> None:
    own = data(s3=S3Config(endpoint))
    index = open_set(f"s3://{BUCKET}/some/set", "train", data=own, keep=tmp_path)
    for workers in (0, 2):
        here, there = (
            list(eval_batches(found, EvalConfig(batch=32), SIZE, workers=workers))
            for found in (read_index(folder), index)
        )
        assert [b.keys for b in here] == [b.keys for b in there]
        assert all(torch.equal(a.images, b.images) for a, b in zip(here, there, strict=True))


@pytest.mark.usefixtures("account")
def test_a_bucket_that_changes_is_an_error(folder: Path, endpoint: str, tmp_path: Path) -> None:
    """One of the same size, by its ETag, against the index that was made at the start."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("*.tar"):
        (copy / path.name).write_bytes(path.read_bytes())
    upload(endpoint, copy, "changing")
    index = open_set(
        f"s3://{BUCKET}/changing", "train", data=data(s3=S3Config(endpoint)), keep=tmp_path / "k"
    )
    for path in copy.iterdir():
        content = bytearray(path.read_bytes())
        content[600] ^= 1
        path.write_bytes(content)
    upload(endpoint, copy, "changing")
    with pytest.raises(
        SourceError, match=rf"s3://{BUCKET}/changing/odd-train-00000\d\.tar has changed: its tag is"
    ):
        take(1, stream(index))


@pytest.mark.usefixtures("account")
def test_many_shards_of_a_bucket_are_found_by_one_list(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an index and by a pattern; so a change before the first batch is seen by their ETags. Who may not list looks
    at each."""
    made = make_set(tmp_path, 97, samples_per_shard=4)
    upload(endpoint, made, "many")
    asked: list[str] = []
    listed, looked = S3.list, remote.Fetcher.look

    def lists(store: S3, address: str, beginning: str = "") -> Iterator[remote.Item]:
        asked.append(f"list {address}/{beginning}")
        return listed(store, address, beginning)

    def looks(fetcher: remote.Fetcher, address: str) -> remote.Item | None:
        asked.append(f"look at {address.rpartition('/')[2]}")
        return looked(fetcher, address)

    monkeypatch.setattr(S3, "list", lists)
    monkeypatch.setattr(remote.Fetcher, "look", looks)
    own = data(s3=S3Config(endpoint))
    pattern = "odd-train-{000000..000024}.tar"
    index = open_set(f"s3://{BUCKET}/many", "train", data=own, keep=tmp_path / "k")
    at = f"list s3://{BUCKET}/many/odd-train-0000"
    assert asked == ["look at _info.json", at, "look at _offsets-train.bin"]
    del asked[:]
    same = open_set(f"s3://{BUCKET}/many/{pattern}", "train", data=own, keep=tmp_path / "k")
    assert asked == [at]
    assert index.lengths == same.lengths == read_index(made).lengths
    with pytest.raises(ConfigError, match=r"1 of its 26 shards are missing, first odd-train-000025\.tar"):
        open_set(f"s3://{BUCKET}/many/{pattern.replace('24', '25')}", "train", data=own, keep=tmp_path / "k")
    change(made)
    upload(endpoint, made, "many")
    with pytest.raises(SourceError, match="has changed: its tag is"):
        take(1, stream(index))
    del asked[:]
    with shelf(tmp_path) as up:
        found = open_set(f"s3://set/{pattern}", "train", data=data(s3=S3Config(up.url)), keep=tmp_path / "k")
    assert (found.lengths, len(asked)) == (index.lengths, 26)


@pytest.mark.usefixtures("account")
def test_no_secret_is_told(endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a bucket that fails, at the most detailed level of our own log."""
    caplog.set_level(logging.DEBUG, "vmamba_dist")
    own = data(s3=S3Config(endpoint), read_attempts=2)
    index = open_set(f"s3://{BUCKET}/some/set", "train", data=own, keep=tmp_path)
    gone = [
        remote.Item(f"s3://{BUCKET}/some/gone.tar", 10),
        remote.Item(f"s3://{BUCKET}/some/set/_info.json", 10),
    ]
    source = remote.RemoteSource(gone, sets.open_s3(endpoint, 5.0), remote.Patience())
    told = ""
    for i in range(2):
        with pytest.raises(SourceError) as caught:
            source.read(i, 0, 10)
        error: BaseException | None = caught.value
        while error is not None:
            told += f"{error} {error!r}"
            error = error.__cause__
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for secret in (SECRET, KEY_ID, "Signature"):
        assert secret not in told + caplog.text + kept + repr(index)


@pytest.mark.usefixtures("account")
def test_a_bucket_holds_against_faults_like_any_server(folder: Path, server: Shelf, tmp_path: Path) -> None:
    """The failing web server in the place of S3: its folder `set` is the bucket."""
    index = open_set(f"s3://set/{PATTERN}", "train", data=data(s3=S3Config(server.url)), keep=tmp_path)
    for fault in ("cut", "503", "range", "500"):
        server.faults.extend([fault, ""])
    batches = take(8, stream(index))
    assert not server.faults
    assert_same(batches, take(8, stream(read_index(folder))))
    server.always = "403"
    with pytest.raises(
        SourceError, match=r"s3://set/odd-train-00000\d\.tar: .*HTTP 403.*credentials come from"
    ):
        take(1, stream(index))
    assert not any("?" in path for path, *_ in server.asked)  # what signs a request is in its headers


def test_without_credentials_a_public_bucket_is_asked_unsigned(
    account: None, server: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = sets.open_s3(server.url, 5.0).request("s3://set/a b/ü.tar")
    assert signed[0] == f"{server.url}/set/a%20b/%C3%BC.tar"
    assert KEY_ID in signed[1]["Authorization"]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    url, headers = sets.open_s3(server.url, 5.0).request("s3://set/a.tar")
    assert (url, "Authorization" in headers) == (f"{server.url}/set/a.tar", False)


@pytest.mark.usefixtures("account")
def test_a_request_is_signed_with_a_key_and_a_token_of_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role's credentials may be renewed at any look: key n with token n + 1 would be refused, and end the run."""
    times = itertools.count()

    def renew() -> dict[str, str]:
        n = next(times)
        soon = datetime.now(UTC) + timedelta(minutes=5)  # so soon that each look renews them
        return {"access_key": f"key{n}", "secret_key": "hush", "token": f"token{n}"} | {
            "expiry_time": soon.isoformat()
        }

    role = RefreshableCredentials.create_from_metadata(renew(), renew, "a role")
    monkeypatch.setattr(boto3.Session, "get_credentials", lambda session: role)
    _, headers = S3("http://127.0.0.1:1").request("s3://shelf/some/set/x.tar")
    key = re.search(r"Credential=key(\d+)/", headers["Authorization"])
    assert key is not None
    assert headers["X-Amz-Security-Token"] == f"token{key[1]}"


@pytest.mark.usefixtures("account")
@pytest.mark.parametrize("fault", ["nothing", "expired", "no file", "refused"])
def test_credentials_that_cannot_be_renewed_are_asked_for_again(
    folder: Path, server: Shelf, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A role 14 minutes before its expiry, whose service misses one answer: once that error ended the run, raw."""

    def given(minutes: float) -> dict[str, str]:
        expiry = datetime.now(UTC) + timedelta(minutes=minutes)
        return {"access_key": KEY_ID, "secret_key": SECRET, "token": "t", "expiry_time": expiry.isoformat()}

    def fail() -> dict[str, str]:
        if fault == "no file":
            raise FileNotFoundError(2, "No such file or directory", "/token")
        if fault == "refused":
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "AssumeRole")
        return given(-1) if fault == "expired" else {}  # {}: what botocore has of a time-out

    answers = [fail, fail]
    # botocore goes on with what it has where renewing itself fails early; here it is due.
    begin = given(14) if fault == "nothing" else given(4)
    role = RefreshableCredentials.create_from_metadata(
        begin, lambda: answers.pop()() if answers else given(60), "a role"
    )
    monkeypatch.setattr(boto3.Session, "get_credentials", lambda session: role)
    item = remote.Item("s3://set/odd-train-000000.tar")
    content = (folder / "odd-train-000000.tar").read_bytes()
    fetcher = remote.Fetcher(S3(server.url), remote.Patience(timeout_s=5, attempts=3))
    assert fetcher.read(item, 0, 1000) == content[:1000]
    assert not answers
    role = RefreshableCredentials.create_from_metadata(begin, fail, "a role")
    fetcher = remote.Fetcher(S3(server.url), remote.Patience(timeout_s=5, attempts=3))
    words = r"s3://set/odd-train-000000\.tar: bytes 0 … 1000 could not be read in 3 attempts .*credentials cannot be "
    with pytest.raises(SourceError, match=words + "renewed: .*"):
        fetcher.read(item, 0, 1000)


def test_without_boto3_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "vmamba_dist.data.s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3:// addresses need boto3 .*pip install 'vmamba-dist\[s3\]'"):
        open_set("s3://bucket/x", "train", data=data(), keep=tmp_path)


def test_what_a_tar_holds_is_found_by_members_too(folder: Path) -> None:
    path = folder / "odd-train-000000.tar"
    with path.open("rb") as file:
        found = scan_shard(file, path.stat().st_size)
    assert found.num_samples == sum(member.name.endswith(".cls") for member, _ in members(path))
