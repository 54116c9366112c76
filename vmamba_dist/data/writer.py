"""A plan of samples → a set of shards, written by several processes, and gone on with after a kill.

Law: a shard's bytes are a function of the plan and of its number, whoever writes it; the plan is made before
the first one. A shard that was finished stays finished: its record lies in `_packing/`, written after the tar was
whole on disk, and a start with the same plan writes only what has none. `_info.json` comes last, so that half a
set is never one. What cannot be written is left out and named, and nothing else changes its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError, UserError
from vmamba_dist.data.index import (
    INFO,
    PACKING,
    SIZES,
    Offsets,
    Shard,
    fingerprint_of,
    read_info,
    write_whole,
)
from vmamba_dist.data.sources import BLOCK, Fault
from vmamba_dist.data.workers import Room, Workers

log = logging.getLogger(__name__)

LEFT_OUT = "left_out.txt"  # a line for each sample that could not be packed, where there are any
PROBES = 32  # samples, and at most one of 64, that say how large the others will be
SHARD_PATIENCE_S = 24 * 3600.0  # a shard may be large and its disk slow; a worker that dies is seen at once
WORTH_A_PROCESS = 2000  # samples
_MIB = 1 << 20
_AHEAD = 4  # shards that a process may be ahead of the others

Progress = Callable[[int, int], None]  # (shards done, of all)


class WriteError(UserError, OSError):
    """A set cannot be written: a full disk, a folder that is none; what is finished is kept."""


@dataclass(frozen=True)
class Sample:
    """What becomes the members `key.suffix` and `key.cls`."""

    key: str
    suffix: str  # jpg | png | webp
    image: bytes
    label: int


@dataclass(frozen=True)
class Plan:
    """All that decides a set: who comes where, and how each sample is made."""

    name: str
    splits: Mapping[str, NDArray[np.int64]]  # the samples' numbers, in the order of writing
    weights: NDArray[np.float64]  # relative sizes, by the samples' numbers
    make: Callable[[int], Sample | Fault]
    digest: str  # of all that decides the samples' bytes, beside their order
    samples_per_shard: int | None
    shard_bytes: int  # closes a shard where samples_per_shard does not


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard."""

    filename: str
    split: str
    num_bytes: int
    sha256: str
    bounds: list[int]  # byte offset of each sample, and the end of the last
    label_pairs: int  # neighbours with the same label
    labels: list[tuple[int, int]]  # (label, how many)
    left_out: list[str]  # "key: reason"

    @property
    def num_samples(self) -> int:
        return len(self.bounds) - 1


@dataclass(frozen=True)
class _Task:
    filename: str
    split: str
    numbers: NDArray[np.int64]


def check_limits(samples_per_shard: int | None, shard_mib: float, workers: int | None) -> int:
    """Return the bytes of a shard. Raises ConfigError for what no set can be written with."""
    if samples_per_shard is not None and samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard}: use 1 or more")
    if not 0 < shard_mib <= 1 << 20:
        raise ConfigError(f"shard_mib={shard_mib}: use more than 0 MiB, and at most {1 << 20}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: use 1 or more processes")
    return int(shard_mib * _MIB)


def write_set(
    root: Path,
    plan: Plan,
    extra: Callable[[Sequence[ShardRecord]], Mapping[str, Any]],
    *,
    workers: int | None,
    overwrite: bool,
    progress: Progress | None = None,
) -> list[ShardRecord]:
    """Write the plan's set at `root`; what an earlier start of the same plan has finished is kept.

    `workers` processes write; None: one a core, as far as each has thousands of samples. extra(records) is what
    `_info.json` says beside name and splits. Raises ConfigError where `root` has a set already and overwrite is not
    given, or another process writes there.
    """
    if workers is None:
        num_samples = sum(map(len, plan.splits.values()))
        workers = min(len(os.sched_getaffinity(0)), 1 + num_samples // WORTH_A_PROCESS)
    with _writable(root), _take_folder(root, plan, overwrite):
        tasks = _tasks(plan)
        done = {task.filename: record for task in tasks if (record := _finished(root, task)) is not None}
        _remove_others(root, plan.name, keep=done)
        if done:
            log.info("%s: going on; %d of %d shards are finished", root, len(done), len(tasks))
        left = [task for task in tasks if task.filename not in done]
        for record in _write_all(root, plan, left, workers):
            done[record.filename] = record
            if progress is not None:
                progress(len(done), len(tasks))
        records = [done[task.filename] for task in tasks]
        _publish(root, plan, records, extra(records))
        return records


def _publish(root: Path, plan: Plan, records: Sequence[ShardRecord], extra: Mapping[str, Any]) -> None:
    """Make a set of written shards: the small files, `_info.json` last."""
    entries: dict[str, Any] = {}
    for split in plan.splits:
        own = [record for record in records if record.split == split and record.num_samples]
        shards = [Shard(r.filename, r.num_samples, r.num_bytes, r.sha256) for r in own]
        entries[split] = {
            "name": split,
            "filenames": [s.filename for s in shards],
            "shard_lengths": [s.num_samples for s in shards],
            "num_samples": sum(s.num_samples for s in shards),
            "bytes": [s.num_bytes for s in shards],
            "sha256": [s.sha256 for s in shards],
        }
        Offsets.of([r.bounds for r in own]).write(root / f"_offsets-{split}.bin", fingerprint_of(shards))
    left_out = [line for record in records for line in record.left_out]
    if left_out:
        write_whole(root / LEFT_OUT, ("\n".join(left_out) + "\n").encode())
    for record in records:
        if not record.num_samples:
            (root / record.filename).unlink(missing_ok=True)
    sizes = {record.filename: record.num_samples for record in records if record.num_samples}
    write_whole(root / SIZES, json.dumps(sizes, indent=1).encode())
    write_whole(root / INFO, json.dumps({"name": plan.name, **extra, "splits": entries}, indent=1).encode())
    shutil.rmtree(root / PACKING)


def labels_cluster(same: int, pairs: int, counts: Mapping[int, int]) -> bool:
    """Tell whether neighbours share a label much more often than in a shuffled set."""
    if pairs < 16:
        return False
    number = np.array(list(counts.values()))
    chance = float(((number / number.sum()) ** 2).sum())
    deviation = (chance * (1 - chance) / pairs) ** 0.5
    return chance < 0.9 and same / pairs > max(1.5 * chance, chance + 6 * deviation)


def split_clusters(records: Sequence[ShardRecord], split: str) -> bool:
    """Tell whether the labels of a written split lie in clusters."""
    own = [record for record in records if record.split == split and record.num_samples]
    counts: Counter[int] = Counter()
    for record in own:
        counts.update(dict(record.labels))
    return labels_cluster(sum(r.label_pairs for r in own), sum(r.num_samples - 1 for r in own), counts)


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    """Tell what the operating system refuses as the user's own matter; samples that cannot be read are told already."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise WriteError(
            f"{root} cannot be written: {error}; what is finished is kept for the next start"
        ) from error


def _tasks(plan: Plan) -> list[_Task]:
    """Cut each split's order into shards, by the samples' number or by their size in the tar."""
    scale = None if plan.samples_per_shard else _bytes_a_weight(plan)
    tasks = []
    for split, numbers in plan.splits.items():
        if plan.samples_per_shard:
            cuts = np.arange(plan.samples_per_shard, len(numbers), plan.samples_per_shard)
        else:
            assert scale is not None
            sizes = np.ceil(plan.weights[numbers] * scale / BLOCK) * BLOCK + 3 * BLOCK
            cuts = np.array(list(_cuts(sizes.tolist(), plan.shard_bytes)), dtype=np.int64)
        for i, part in enumerate(np.split(numbers, cuts)):
            if len(part):
                tasks.append(_Task(f"{plan.name}-{split}-{i:06d}.tar", split, part))
    return tasks


def _cuts(sizes: Sequence[float], limit: int) -> Iterator[int]:
    filled = 0.0
    for i, size in enumerate(sizes):
        if filled >= limit:
            yield i
            filled = 0.0
        filled += size


def _bytes_a_weight(plan: Plan) -> float:
    """Make some samples, spread over all, to see how many bytes a unit of weight becomes."""
    numbers = np.concatenate([*plan.splits.values(), np.empty(0, np.int64)])
    count = min(PROBES, -(-len(numbers) // 64))
    some = numbers[np.linspace(0, len(numbers), count, endpoint=False).astype(np.int64)]
    made = [(float(plan.weights[n]), sample) for n in some if isinstance(sample := plan.make(int(n)), Sample)]
    weight = sum(w for w, _ in made)
    return sum(len(sample.image) for _, sample in made) / weight if weight else 1.0


def _write_all(root: Path, plan: Plan, tasks: Sequence[_Task], workers: int) -> Iterator[ShardRecord]:
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from (_write_shard(root, plan, task) for task in tasks)
        return

    def produce(worker: int, order: None, room: Room) -> Iterator[tuple[int, ShardRecord]]:
        for task in tasks[worker::workers]:
            room()
            yield 0, _write_shard(root, plan, task)

    processes = Workers(produce, workers, _AHEAD, (0,), patience_s=SHARD_PATIENCE_S)
    try:
        processes.begin(None)
        yield from (record for _, record in processes)
    finally:
        processes.close()


def _write_shard(root: Path, plan: Plan, task: _Task) -> ShardRecord:
    path = root / task.filename
    temporary = path.with_name(path.name + ".tmp")
    bounds: list[int] = []
    labels: list[int] = []
    left_out: list[str] = []
    with _HashedFile(temporary) as file, _tar_writer(file) as tar:
        for number in task.numbers:
            sample = plan.make(int(number))
            if isinstance(sample, Fault):
                left_out.append(f"{sample.key}: {sample.reason}")
                continue
            bounds.append(tar.offset)
            labels.append(sample.label)
            _add(tar, f"{sample.key}.{sample.suffix}", sample.image)
            _add(tar, f"{sample.key}.cls", str(sample.label).encode())
        bounds.append(tar.offset)
    temporary.rename(path)
    record = ShardRecord(
        filename=task.filename,
        split=task.split,
        num_bytes=file.size,
        sha256=file.sha256.hexdigest(),
        bounds=bounds,
        label_pairs=sum(a == b for a, b in itertools.pairwise(labels)),
        labels=sorted(Counter(labels).items()),
        left_out=left_out,
    )
    write_whole(root / PACKING / f"{task.filename}.json", json.dumps(asdict(record)).encode())
    return record


def _finished(root: Path, task: _Task) -> ShardRecord | None:
    path = root / PACKING / f"{task.filename}.json"
    if not path.is_file():
        return None
    record = ShardRecord(**json.loads(path.read_text()))
    tar = root / task.filename
    return record if tar.is_file() and tar.stat().st_size == record.num_bytes else None


@contextmanager
def _take_folder(root: Path, plan: Plan, overwrite: bool) -> Iterator[None]:
    """Make the folder ready for this plan, and hold it. An old set goes only when told, its index first."""
    root.mkdir(parents=True, exist_ok=True)
    packing = root / PACKING
    old: list[str] = []
    if (root / INFO).exists():
        if not overwrite:
            raise ConfigError(
                f"{root} has a set of shards already; give another folder, or overwrite (--overwrite)"
            )
        entries = read_info(root, "out")["splits"].values()
        old = [str(name) for entry in entries for name in entry.get("filenames", ())]
    elif not packing.exists() and any(root.glob("*.tar")):
        raise ConfigError(f"{root} holds tars that no {INFO} lists; give another folder")
    packing.mkdir(exist_ok=True)
    with (packing / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{root}: another process writes a set there; let it end, or give another folder"
            ) from error
        if not (packing / "lock").exists():
            raise ConfigError(f"{root}: another process has just finished a set there; give another folder")
        _begin(root, plan, old)
        yield


def _begin(root: Path, plan: Plan, old: Sequence[str]) -> None:
    """Write down the plan; where it is not the one that was begun here, take away what that one left."""
    path = root / PACKING / "plan.json"
    digest = _digest(plan)
    begun = json.loads(path.read_text()) if path.exists() else {"digest": None, "name": plan.name, "old": []}
    if begun == {"digest": digest, "name": plan.name, "old": []} and not old:
        return
    for record in (root / PACKING).glob("*.tar.json"):
        record.unlink()
    _remove_others(root, begun["name"], keep=())
    old = [*old, *begun["old"]]  # not empty: killed while it took these away
    write_whole(path, json.dumps({"digest": digest, "name": plan.name, "old": old}).encode())
    for stale in (INFO, SIZES, LEFT_OUT):
        (root / stale).unlink(missing_ok=True)
    for sidecar in (*root.glob("_offsets-*.bin"), *root.glob("_index-*.bin")):
        sidecar.unlink()
    _remove(root, old)
    write_whole(path, json.dumps({"digest": digest, "name": plan.name, "old": []}).encode())


def _remove(root: Path, filenames: Sequence[str]) -> None:
    """Delete an old set's tars; a name that leads out of the folder is none of them."""
    home = root.resolve()
    for filename in filenames:
        path = root / filename
        if path.parent.resolve().is_relative_to(home) and path.suffix == ".tar":
            path.unlink(missing_ok=True)


def _remove_others(root: Path, name: str, keep: Any) -> None:
    """Delete shards of this name that are not finished."""
    for left in root.glob("*.tar*"):
        if re.fullmatch(re.escape(name) + r"-\w+-\d{6,}\.tar(\.tmp)?", left.name) and left.name not in keep:
            left.unlink()


def _digest(plan: Plan) -> str:
    said = hashlib.sha256(f"1 {plan.digest} {plan.name} {plan.samples_per_shard} {plan.shard_bytes}".encode())
    for split, numbers in plan.splits.items():
        said.update(f" {split} {len(numbers)} ".encode() + numbers.astype("<i8").tobytes())
    return said.hexdigest()


class _HashedFile(io.RawIOBase):
    """A file that knows the sha256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self._file:  # closed even where the disk is full and what is buffered cannot be written
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            super().close()


def _tar_writer(file: _HashedFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, no time: the same bytes for ever
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
