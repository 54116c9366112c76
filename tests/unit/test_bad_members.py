"""Whatever is in a tar, an image, a label or an index: a counted, named skip or a clear error.

Never a crash, a hang, more memory than an image may have, or a write outside the folder; and no code of data runs.
The fuzzer is tests/badtars.py: each case is a function of its kind and seed, so a failure names what to run again.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import badtars
from badtars import BOMBS, LABELS, MUTATIONS, NUM_CLASSES, NUM_SAMPLES, mutant, sound, tar_of
from shardsets import make_set
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig, UserError
from vmamba_dist.data import sources
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.decode import DecodeError, check_header, decode
from vmamba_dist.data.shards import PackReport, describe, pack, read_index, verify
from vmamba_dist.data.sources import Fault, Raw, parse_label
from vmamba_dist.data.stream import TrainStream

Result = TypeVar("Result")

SEEDS = 18  # × 14 kinds = 252 tars
MOST_MIB = (
    600  # an image of the most pixels that are allowed takes 256 MiB, and once more while it is converted
)
MOST_S = 20.0  # a hang; the machine may be busy


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """Hold a test to its memory, which the kernel counts."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    yield
    assert _peak_mib() - before < MOST_MIB


def _peak_mib() -> float:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def attempt(act: Callable[[], Result], refusal: type[Exception]) -> tuple[Result | None, str]:
    """(what came out, "") or (None, the message of the refusal); any other exception is a failure."""
    try:
        return act(), ""
    except refusal as error:
        return None, str(error)


def as_set(folder: Path, tar: bytes) -> Path:
    """A set whose index believes that the tar is sound."""
    folder.mkdir(parents=True)
    (folder / "x-train-000000.tar").write_bytes(tar)
    entry = {
        "name": "train",
        "filenames": ["x-train-000000.tar"],
        "shard_lengths": [NUM_SAMPLES],
        "num_samples": NUM_SAMPLES,
    }
    info = {"name": "x", "num_classes": NUM_CLASSES, "splits": {"train": entry}}
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def packed(folder: Path, tar: bytes) -> PackReport | None:
    """Pack the tar as a loose one; what comes out is sound, and what is missing is named."""
    (folder / "loose").mkdir()
    (folder / "loose/a.tar").write_bytes(tar)
    before = everything(folder)
    report, refused = attempt(
        lambda: pack(folder / "loose", folder / "out", workers=1, check="decode"), ConfigError
    )
    if report is None:
        assert "has no images" in refused
        assert everything(folder) == before
        return None
    left = {name for name in everything(folder) - before if not name.startswith("out")}
    assert left == set()
    assert report.samples["train"] + len(report.unreadable) >= 1
    found = verify(folder / "out")
    assert found.ok, str(found)
    assert found.samples == report.samples["train"]
    assert all(": " in text for text in report.unreadable)
    return report


def streamed(folder: Path, workers: int = 0) -> list[str] | None:
    """Read an epoch of a set as training does; what was bad and what took its place, None where the run is refused."""

    def run() -> list[Batch]:
        made = TrainStream(
            read_index(folder),
            DataConfig(image_size=8, global_batch=2, workers=workers, block=2),
            AugmentConfig(),
            seed=0,
            lanes=2,
        )
        batches = list(islice(made.batches(), NUM_SAMPLES // 2))
        made.close()
        return batches

    batches, refused = attempt(run, UserError)
    if batches is None:
        assert str(folder) in refused or "lane" in refused
        return None
    assert len(batches) == NUM_SAMPLES // 2
    for batch in batches:
        assert batch.images.shape == (2, 3, 8, 8)
        assert all(0 <= label < NUM_CLASSES for label in batch.labels.tolist())
        assert all(bad.reason and len(bad.reason) < 500 for bad in batch.bad)
    return [str(bad) for batch in batches for bad in batch.bad]


@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutated_tars_are_packed_verified_and_streamed_or_refused(tmp_path: Path, kind: str) -> None:
    packs, streams = 0, 0
    for seed in range(SEEDS):
        begin = time.monotonic()
        tar = mutant(kind, seed)
        here = tmp_path / str(seed)
        folder = as_set(here / "set", tar)
        packs += packed(here, tar) is not None
        assert isinstance(str(verify(folder)), str)
        streams += streamed(folder) is not None
        assert everything(here) - {"out"} >= {"set", "set/_info.json", "set/x-train-000000.tar"}
        assert time.monotonic() - begin < MOST_S, f"{kind} {seed}"
        shutil.rmtree(here)
    assert everything(tmp_path) == set()
    assert not any(Path("/tmp").glob("escaped*"))
    assert packs > 0, "the mutations of this kind leave nothing to be packed: they test only the door"


@pytest.mark.parametrize(("kind", "seed"), [("labels", 0), ("images", 1), ("bits", 2), ("bombs", 3)])
def test_what_takes_a_bad_sample_s_place_is_the_same_for_every_number_of_workers(
    tmp_path: Path, kind: str, seed: int
) -> None:
    folder = as_set(tmp_path / "set", mutant(kind, seed))
    assert streamed(folder, workers=0) == streamed(folder, workers=1)


def test_a_sound_tar_passes_both_levels(tmp_path: Path) -> None:
    report = packed(tmp_path, tar_of(sound()))
    assert report is not None
    assert report.samples == {"train": NUM_SAMPLES}
    assert streamed(as_set(tmp_path / "set", tar_of(sound()))) == []
    assert verify(tmp_path / "set").ok


def test_every_odd_label_is_a_named_fault() -> None:
    for suffix in ("cls", "json"):
        for data in LABELS:
            found = parse_label(Raw("k", b"", data, suffix), 5)
            if isinstance(found, Fault):
                assert found.key == "k"
                assert 0 < len(found.reason) < 300
            else:
                assert (suffix, data, found) == ("json", b"1\x00", 1)  # UTF-16


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_bombs_are_decode_errors_or_small_images(number: int) -> None:
    data = BOMBS[number]()
    begin = time.monotonic()
    image, refused = attempt(lambda: decode(data), DecodeError)
    if image is None:
        assert 0 < len(refused) < 300
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 81_000_000
    assert time.monotonic() - begin < MOST_S


def test_what_unpacks_to_any_size_is_refused(tmp_path: Path) -> None:
    """A sparse member of 64 GiB, and a tar header that is a gzip stream of 300 MiB as well."""
    for name, tar in (("sparse", badtars.sparse_bomb()), ("gzip", badtars.gzip_bomb())):
        folder = as_set(tmp_path / name / "set", tar)
        index = read_index(folder)
        read = [
            sample
            for first in range(NUM_SAMPLES)
            for sample in sources.samples(
                (folder / index.shards[0].filename).read_bytes()[slice(*index.offsets.bounds(0, first, 1))],
                [0, int(np.diff(index.offsets.bounds(0, first, 1))[0])],
            )
        ]
        if name == "sparse":
            assert any(isinstance(sample, Fault) for sample in read)
        else:
            assert sum(len(sample.image) for sample in read if isinstance(sample, Raw)) < len(tar)
        packed(tmp_path / name, tar)


def test_a_tar_that_turns_its_reader_back_ends(tmp_path: Path) -> None:
    """A member of -512 bytes ends where its own header begins: read again and again, for ever."""
    for number in (0, 3, 2 * NUM_SAMPLES - 2, 2 * NUM_SAMPLES - 1):
        tar = bytearray(tar_of(sound()))
        header = badtars.headers(bytes(tar))[number]
        badtars.set_field(tar, header, 124, b"\xff" + (2**88 - 512).to_bytes(11, "big"))
        here = tmp_path / str(number)
        folder = as_set(here / "set", bytes(tar))
        packed(here, bytes(tar))
        assert not verify(folder).ok
        assert read_index(folder).warnings
        streamed(folder)


def test_deep_chains_of_extended_headers_end(tmp_path: Path) -> None:
    """Each extended header asks for the next member: three thousand of them exceed the stack."""
    tar = bytearray(tar_of([("x", b"")] * 3000))
    for header in range(0, 3000 * 512, 512):
        badtars.set_field(tar, header, 156, b"L")
    (tmp_path / "x.tar").write_bytes(tar)
    assert sources.scan(tmp_path / "x.tar") == sources.Scan([0], [], whole=False)
    assert all(isinstance(sample, Fault) for sample in sources.samples(bytes(tar), [0, len(tar)]))


def test_no_code_of_data_runs(tmp_path: Path) -> None:
    """A pickle that would make a folder lies in every place that a reader looks at."""
    target = tmp_path / "ran"
    code = f"cos\nmkdir\n(V{target}\ntR.".encode()
    members = sound()
    for i, suffix in ((0, "jpg"), (3, "cls"), (4, "pkl"), (6, "pth"), (9, "json"), (12, "pyd")):
        members[i] = (f"{members[i][0].split('.')[0]}.{suffix}", code)
    tar = tar_of(members)
    packed(tmp_path, tar)
    folder = as_set(tmp_path / "set", tar)
    (folder / "_offsets-train.bin").write_bytes(code)
    verify(folder)
    streamed(folder)
    assert not target.exists()


def test_a_hostile_sidecar_costs_no_memory(tmp_path: Path) -> None:
    """Offsets that belong to the index but lead anywhere: 2 TiB from here, or backwards."""
    made = make_set(tmp_path, 97)
    path = made / "_offsets-train.bin"
    whole = np.fromfile(path, dtype="<u4")
    for seed in range(6):
        rng = np.random.default_rng(seed)
        words = whole.copy()
        some = rng.integers(14 + 8, len(words), 5)
        words[some] = rng.choice([0, 2**32 - 1, 2**32 - 2, 2**31, 1], 5)
        words.tofile(path)
        index = read_index(made)
        made_stream = TrainStream(
            index, DataConfig(image_size=8, global_batch=12, block=4), AugmentConfig(), seed=0, lanes=2
        )
        batches = list(islice(made_stream.batches(), 8))
        made_stream.close()
        assert all(0 <= label < 5 for batch in batches for label in batch.labels.tolist())
        assert verify(made).ok  # which does not read it


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    "",
    "x",
    "../x.tar",
    "/etc/x.tar",
    [],
    {},
    [None],
    {"a": 1},
)


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested JSON."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def test_an_index_with_any_wrong_value_is_refused_or_reported(tmp_path: Path) -> None:
    made = make_set(tmp_path, 20, samples_per_shard=8)
    whole = json.loads((made / "_info.json").read_text())
    outside = tmp_path / "x.tar"
    outside.write_bytes(b"mine")
    done = 0
    for path in places(whole):
        for wrong in WRONG:
            info = copy.deepcopy(whole)
            if path:
                parent = info
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = wrong
            else:
                info = wrong
            (made / "_info.json").write_text(json.dumps(info))
            for act in (lambda: str(verify(made)), lambda: describe(made), lambda: read_index(made)):
                _, refused = attempt(act, UserError)
                assert refused == "" or 10 < len(refused) < 1000
            done += 1
    (made / "_info.json").write_text(json.dumps(whole))
    assert verify(made).ok
    assert outside.read_bytes() == b"mine"
    assert done > 300


def test_an_index_of_absurd_counts_costs_no_memory(tmp_path: Path) -> None:
    made = make_set(tmp_path, 20, samples_per_shard=8)
    info = json.loads((made / "_info.json").read_text())
    info["splits"]["train"].update(shard_lengths=[10**11, 8, 4], num_samples=10**11 + 12)
    (made / "_info.json").write_text(json.dumps(info))
    (made / "_offsets-train.bin").unlink()
    with pytest.raises(ConfigError, match=r"000000\.tar has \d+ bytes, too few for the 100000000000 samples"):
        read_index(made)
    assert not verify(made).ok


def test_an_index_leads_an_overwrite_nowhere_else(tmp_path: Path) -> None:
    made = make_set(tmp_path, 20)
    (tmp_path / "x.tar").write_bytes(b"mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y.tar").write_bytes(b"mine")
    (made / "link").symlink_to(tmp_path / "elsewhere")
    info = json.loads((made / "_info.json").read_text())
    names = ["../x.tar", str(tmp_path / "x.tar"), "link/y.tar", "images/../../x.tar"]
    info["splits"]["train"]["filenames"] = names
    (made / "_info.json").write_text(json.dumps(info))
    pack("digits", made, overwrite=True)
    assert (tmp_path / "x.tar").read_bytes() == b"mine"
    assert (tmp_path / "elsewhere/y.tar").read_bytes() == b"mine"


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=700),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP"]),
)
def test_any_bytes_are_an_image_or_a_decode_error(data: bytes, magic: bytes) -> None:
    for read in (decode, check_header):
        found, refused = attempt(lambda read=read: read(magic + data), DecodeError)  # type: ignore[misc]
        assert (found is None) == bool(refused)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.just("label"), x))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64) | st.text().map(str.encode) | JSON.map(lambda x: json.dumps(x).encode()))
def test_any_label_is_a_class_or_a_fault(data: bytes) -> None:
    for suffix in ("cls", "json"):
        found = parse_label(Raw("k", b"", data, suffix), 7)
        assert isinstance(found, Fault) or 0 <= found < 7


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2 * NUM_SAMPLES - 1),
            st.integers(0, 511),
            st.binary(min_size=1, max_size=12),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_any_header_bytes_are_samples_or_faults(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes, bool]]
) -> None:
    """Bytes of headers replaced, with their checksum mended or not: as many answers as samples were asked for."""
    tar = bytearray(tar_of(sound()))
    starts = badtars.headers(bytes(tar))
    for number, at, data, mended in edits:
        if mended:
            badtars.set_field(tar, starts[number], at, data[: 512 - at])
        else:
            tar[starts[number] + at : starts[number] + at + len(data)] = data
    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(tar)
    found = sources.scan(path)
    assert len(found.bounds) == len(found.keys) + 1
    assert found.bounds == sorted(found.bounds)
    for bounds in (found.bounds, [*starts[::2], starts[-1] + 1024]):
        read = sources.samples(bytes(tar), bounds)
        assert len(read) == len(bounds) - 1
        assert all(isinstance(sample, Raw | Fault) for sample in read)


ARROW = """
import random, shutil, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.shards import pack

saved, here = Path(sys.argv[1]), Path(sys.argv[2])
refused = packed = 0
for seed in range(40):
    rng = random.Random(seed)
    folder = here / str(seed)
    shutil.copytree(saved, folder / "set")
    pq.write_table(pa.table({"path": ["a.png", "b.png"] * 20, "label": [0, 1] * 20}), folder / "list.parquet")
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"x")
    for path in (folder / "set/train/data-00000-of-00002.arrow", folder / "list.parquet"):
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 4, 40))):
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(1024, len(data)))
            data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
    for source in (folder / "set", folder / "list.parquet"):
        try:
            pack(source, folder / ("out" + source.stem), workers=1)
            packed += 1
        except ConfigError as error:
            assert 10 < len(str(error)) < 3000
            refused += 1
    shutil.rmtree(folder)
print(refused, packed)
"""


def test_damaged_arrow_and_parquet_files_are_refused_or_read(tmp_path: Path) -> None:
    """In a process of its own: what reads them is C++, where a wrong offset would end the process."""
    saved = Path(__file__).parents[1] / "golden" / "hf_saved"
    ended = subprocess.run(
        [sys.executable, "-c", ARROW, str(saved), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    refused, read = map(int, ended.stdout.split())
    assert refused >= 10
    assert read >= 10


def test_a_random_file_in_a_tars_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, data in enumerate(
        (b"", b"x", random.Random(0).randbytes(5000), bytes(10_240), b"\x1f\x8b\x08" + bytes(600))
    ):
        (tmp_path / "in/a.tar").write_bytes(data)
        with pytest.raises(ConfigError, match="has no images"):
            pack(tmp_path / "in", tmp_path / f"out{i}")
