"""What a set of shards holds and where: its index, read and checked against its tars.

Law: a folder is a set when it has an `_info.json`, which is written last and whole. What an index says is
believed only as far as the tars bear it out: names outside the folder, counts that no tar of that size can
hold, and labels beyond its classes are refused by name.

A set is
    NAME-SPLIT-000000.tar …   members `key.jpg|png|webp` and `key.cls` (or `key.json` with an integer `label`)
    _info.json                timm's form: splits → {name, filenames, shard_lengths, num_samples}, with `bytes` and
                              `sha256`, one a shard; num_classes and classes beside `splits`, else the labels are
                              read
    sizes.json                open_clip's form: file name → number of samples
    _offsets-SPLIT.bin        where each sample starts (see Offsets); where it is missing the tars' headers are read
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import sources
from vmamba_dist.data.order import EpochOrder, check_lanes
from vmamba_dist.data.sources import BLOCK, Fault, LocalSource, local_path
from vmamba_dist.data.tarscan import Contents, scan_shard

log = logging.getLogger(__name__)

INFO = "_info.json"
SIZES = "sizes.json"
PACKING = "_packing"  # there while a set is being written, or was when its writer was killed
MAX_CLASSES = 1_000_000  # a label beyond is a mistake, not a class
EVAL_SPLITS = ("val", "validation", "test")
_MIB = 1 << 20
_Value = TypeVar("_Value")
_THREADS = 8  # reading headers waits for a network file system, and takes the interpreter's lock else


@dataclass(frozen=True)
class Shard:
    """One tar as the index has it; num_bytes and sha256 are None and "" in an index that lacks them."""

    filename: str
    num_samples: int
    num_bytes: int | None
    sha256: str

    def of_size(self, num_bytes: int | None) -> Shard:
        """Return it with its file's size, where its index has none."""
        return self if self.num_bytes is not None else replace(self, num_bytes=num_bytes)


class Column(Sequence[_Value]):
    """Values that are made when asked for: a million objects would take hundreds of MB."""

    def __init__(self, count: int, value: Callable[[int], _Value]) -> None:
        self._count, self._value = count, value

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._value(j) for j in range(*i.indices(self._count))]
        return self._value(range(self._count)[i])


class Bounds(Protocol):
    """Where samples start and end."""

    def bounds(self, shard: int, first: int, count: int) -> list[int]:
        """Return the starts of `count` samples and the end of the last, in bytes."""


class Offsets:
    """Where each sample of a set starts and ends, in bytes.

    The file `_offsets-SPLIT.bin`, little-endian: 8 bytes `VMOFFS01`; 32 bytes fingerprint of the index it
    belongs to; u64 number of shards S; u64 number of samples N; u32 × S samples a shard; then u32 × (N + S):
    for each shard the starts of its samples and the end of its last one, in units of 512 bytes (tar's
    alignment; a shard may have 2 TiB). MISSING is the start of a sample that a damaged shard no longer has.
    """

    MAGIC = b"VMOFFS01"
    MISSING = 2**32 - 1

    def __init__(self, lengths: NDArray[np.uint32], blocks: NDArray[np.uint32]) -> None:
        self._lengths = lengths
        self._blocks = blocks
        self._first = np.concatenate([[0], np.cumsum(lengths.astype(np.int64) + 1)])
        self._patches: dict[int, NDArray[np.uint32]] = {}

    @classmethod
    def of(cls, bounds: Sequence[Sequence[int]]) -> Offsets:
        """Build from each shard's bounds in bytes."""
        lengths = np.array([len(b) - 1 for b in bounds], dtype="<u4")
        flat = [np.asarray(b, dtype=np.int64) // BLOCK for b in bounds]
        return cls(lengths, (np.concatenate(flat) if flat else np.empty(0)).astype("<u4"))

    @classmethod
    def fitted(cls, bounds: Sequence[Sequence[int]], lengths: Sequence[int]) -> Offsets:
        """Build from bounds that may be too few or too many for the numbers of samples; what lacks one is MISSING."""
        blocks = [_fitted(own, length) for own, length in zip(bounds, lengths, strict=True)]
        return cls(np.array(lengths, dtype="<u4"), np.concatenate([np.empty(0, dtype="<u4"), *blocks]))

    @property
    def lengths(self) -> NDArray[np.uint32]:
        return self._lengths

    def of_shard(self, shard: int) -> NDArray[np.uint32]:
        patch = self._patches.get(shard)
        return self._blocks[self._first[shard] : self._first[shard + 1]] if patch is None else patch

    def patch(self, shard: int, bounds: Sequence[int], num_samples: int) -> None:
        """Replace a damaged shard's bounds by those found in it; samples beyond them are MISSING."""
        self._patches[shard] = _fitted(bounds, num_samples)

    def bounds(self, shard: int, first: int, count: int) -> list[int]:
        """Return the starts of `count` samples and the end of the last, in bytes."""
        return (self.of_shard(shard)[first : first + count + 1].astype(np.int64) * BLOCK).tolist()  # type: ignore[no-any-return]

    def write(self, path: Path, fingerprint: str) -> None:
        header = self.MAGIC + bytes.fromhex(fingerprint)
        counts = np.array([len(self._lengths), self._lengths.sum()], dtype="<u8").tobytes()
        blocks = self._blocks
        if self._patches:
            blocks = blocks.copy()
            for shard, patch in self._patches.items():
                blocks[self._first[shard] : self._first[shard + 1]] = patch
        write_whole(path, header + counts + self._lengths.tobytes() + blocks.tobytes())

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> Offsets | None:
        """Map the file; None where there is none that belongs to this index."""
        if not path.is_file() or path.stat().st_size < 56:
            return None
        words = np.memmap(path, dtype="<u4", mode="r", shape=(path.stat().st_size // 4,))
        if words[:10].tobytes() != cls.MAGIC + bytes.fromhex(fingerprint):
            return None
        num_shards, num_samples = (int(n) for n in np.frombuffer(words[10:14].tobytes(), dtype="<u8"))
        if len(words) != 14 + 2 * num_shards + num_samples:
            return None
        return cls(words[14 : 14 + num_shards], words[14 + num_shards :])


def _fitted(bounds: Sequence[int], num_samples: int) -> NDArray[np.uint32]:
    blocks = np.full(num_samples + 1, Offsets.MISSING, dtype="<u4")
    found = np.asarray(bounds[: num_samples + 1], dtype=np.int64)
    blocks[: len(found)] = found // BLOCK
    return blocks


@dataclass(frozen=True)
class Index:
    """One split of a set, checked against its tars."""

    root: Path
    name: str
    split: str
    shards: Sequence[Shard]
    num_classes: int
    class_names: tuple[str, ...]
    offsets: Offsets = field(repr=False, compare=False)
    warnings: tuple[
        str, ...
    ] = ()  # told at the start: clustered labels, and damage that will count as bad samples
    # Of the files, found at the start: bytes, and when they were written in ns.
    sizes: tuple[int, ...] = field(default=(), repr=False, compare=False)
    written: tuple[int, ...] = field(default=(), repr=False, compare=False)
    address: str = ""  # where the set lies, where that is not `root`: that has its kept index
    opener: Callable[[], sources.Source] | None = field(default=None, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def lengths(self) -> Sequence[int]:
        return [shard.num_samples for shard in self.shards]

    @property
    def mean_bytes(self) -> float:
        """Mean bytes a sample, tar headers included."""
        return sum(shard.num_bytes or 0 for shard in self.shards) / max(1, self.num_samples)

    def fingerprint(self) -> str:
        """Hash what the shards hold, in order: their content and not their place. Hex, 64 digits."""
        return fingerprint_of(self.shards)

    @property
    def place(self) -> str:
        """Where the set lies, to be told."""
        return self.address or str(self.root)

    def source(self) -> sources.Source:
        """Return a reader of the shards' bytes, for one process."""
        return self.opener() if self.opener is not None else self.local_source()

    def local_source(self) -> LocalSource:
        return LocalSource(
            [self.root / shard.filename for shard in self.shards],
            sizes=self.sizes or None,
            written=self.written or None,
            sha256=[shard.sha256 for shard in self.shards],
        )

    def order(self, seed: int, epoch: int, lanes: int, block: int) -> EpochOrder:
        """Return the order of an epoch."""
        return EpochOrder(seed, epoch, np.asarray(self.lengths, dtype=np.int64), lanes, block)

    def check_lanes(self, lanes: int) -> None:
        """Refuse lanes that the set cannot fill. Raises ConfigError."""
        check_lanes(self.num_samples, lanes)


def fingerprint_of(shards: Sequence[Shard]) -> str:
    lines = (f"{s.num_samples} {s.sha256 or f'{s.filename} {s.num_bytes}'}\n" for s in shards)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class TarScan(Protocol):
    """How the tars of a set are read that lacks offsets, or the number of its classes."""

    def __call__(
        self, root: Path, split: str, shards: Sequence[Shard], found: Sequence[tuple[int, int]]
    ) -> tuple[Offsets, int]:
        """Return where the samples lie, and how many classes their labels tell; 0 where no label does.

        `found` are the files' bytes, and when they were written. Whether a tar may hold less or more than its index
        says is for the caller to tell.
        """


def scan_tars(
    root: Path, split: str, shards: Sequence[Shard], found: Sequence[tuple[int, int]]
) -> tuple[Offsets, int]:
    """Read the headers and labels of local tars; a TarScan."""
    log.info(
        "%s lacks offsets or classes for split %s: reading the headers of %d tars", root, split, len(shards)
    )

    def scan(shard: Shard) -> Contents:
        path = root / shard.filename
        with path.open("rb") as file:
            return scan_shard(file, os.fstat(file.fileno()).st_size)

    with ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(scan, shards))
    offsets = Offsets.fitted([own.bounds for own in contents], [shard.num_samples for shard in shards])
    return offsets, max((own.num_classes for own in contents), default=0)


def read_index(
    folder: str | Path, split: str = "train", *, key: str = "data.train", scan: TarScan = scan_tars
) -> Index:
    """Read one split of a set and check it against its tars. `key` is the config key that named the folder.

    split="auto" is the first of val, validation and test that the set has. A tar shorter than its index says
    is warned of: its lost samples count as bad. Raises ConfigError for what no run could be right about: no
    set, an unknown split, a missing tar, one longer than its index says, another number of samples.
    """
    root = local_path(str(folder))
    info = read_info(root, key)
    listed = read_split(info, split, named=f"{key}={str(folder)!r}", file=str(root / INFO))
    filenames = [shard.filename for shard in listed.shards]
    looked = [look_at(root / name) for name in filenames]
    missing = [name for name, file in zip(filenames, looked, strict=True) if file is None]
    if missing:
        raise ConfigError(
            f"{key}={str(folder)!r}: {len(missing)} of the {len(filenames)} shards of split {listed.split!r} are "
            f"missing, first {missing[0]}; copy them, or pack the set again"
        )
    found = [file for file in looked if file is not None]
    shards = tuple(shard.of_size(size) for shard, (size, _) in zip(listed.shards, found, strict=True))
    for shard, (size, _), told in zip(shards, found, listed.shards, strict=True):
        # Where no size was recorded the tar may have been cut since: then only what memory would not hold.
        most = told.num_bytes if told.num_bytes is not None else max(size, 1 << 32)
        if shard.num_samples * 2 * BLOCK > most:
            raise ConfigError(
                f"{root / shard.filename} has {most} bytes, too few for the {shard.num_samples} samples that {INFO} "
                "tells; pack the set again"
            )
    offsets, num_classes, damage = _check_tars(root, listed, shards, found, scan)
    warnings = (*damage, *listed.warnings)
    for warning in warnings:
        log.warning("%s", warning)
    return Index(
        root=root,
        name=listed.name or root.name,
        split=listed.split,
        shards=shards,
        num_classes=num_classes,
        class_names=listed.class_names,
        offsets=offsets,
        warnings=warnings,
        sizes=tuple(size for size, _ in found),
        written=tuple(written for _, written in found),
    )


def look_at(path: Path) -> tuple[int, int] | None:
    """A file's bytes, and when it was written in ns; None where there is none."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True)
class Listed:
    """One split as an `_info.json` lists it."""

    name: str
    split: str
    shards: tuple[Shard, ...]
    num_classes: int  # 0: it does not say, as timm's do not
    class_names: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Hash what the shards hold, as Index does."""
        return fingerprint_of(self.shards)


def read_split(info: Mapping[str, Any], split: str, *, named: str, file: str) -> Listed:
    """Read a split of an index's content. `named` is the config's key and value, `file` the index's address.

    Raises ConfigError for an unknown split, and for what is not in timm's form.
    """
    splits = info["splits"]
    if split == "auto":
        split = next((name for name in EVAL_SPLITS if name in splits), "")
        if not split:
            raise ConfigError(
                f"{named} has the splits {', '.join(splits)}, and none of {', '.join(EVAL_SPLITS)}; "
                "name one with eval.split"
            )
    if split not in splits:
        raise ConfigError(f"{named} has no split {split!r}; it has {', '.join(splits)}")
    entry = splits[split]
    try:
        filenames, lengths = list(entry["filenames"]), [int(n) for n in entry["shard_lengths"]]
        beside = [entry.get("bytes", filenames), entry.get("sha256", filenames)]
        if {len(filenames)} != {len(lengths), *map(len, beside)}:
            raise ConfigError(f"{file}: split {split!r} lists {len(filenames)} files, {len(lengths)} lengths")
        if sum(lengths) != int(entry["num_samples"]) or min(lengths, default=0) < 0:
            raise ConfigError(
                f"{file}: split {split!r} says {entry['num_samples']} samples, its shard_lengths sum to "
                f"{sum(lengths)}; pack the set again"
            )
        classes = tuple(str(c) for c in info.get("classes", ()))
        num_classes = int(info.get("num_classes", len(classes)))
        recorded = [int(n) for n in entry.get("bytes", [])]
        hashes = [str(h) for h in entry.get("sha256", [""] * len(filenames))]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: split {split!r} is not in timm's form: {error!r}") from error
    if not all(isinstance(name, str) and inside(name) for name in filenames):
        raise ConfigError(f"{file}: split {split!r} names files outside its folder")
    if num_classes > MAX_CLASSES:
        raise ConfigError(
            f"{file}: num_classes is {num_classes}, more than {MAX_CLASSES}; pack the set again"
        )
    if num_classes < 0:
        raise ConfigError(f"{file}: num_classes is {num_classes}; leave it out, and the labels are counted")
    known: list[int | None] = [*recorded] or [None] * len(filenames)
    shards = tuple(Shard(*fields) for fields in zip(filenames, lengths, known, hashes, strict=True))
    clustered = info.get("clustered")
    warnings = (
        (
            f"{named}: neighbours in split {split} have the same label far more often than by chance, and a run mixes "
            "only near samples: pack again with shuffling",
        )
        if isinstance(clustered, list) and split in clustered
        else ()
    )
    return Listed(str(info.get("name", "")), split, shards, num_classes, classes, warnings)


def known_classes(num_classes: int, file: str) -> int:
    """Return the number of classes. Raises ConfigError where neither the index nor any label has told it."""
    if num_classes < 1:
        raise ConfigError(
            f"{file} does not say how many classes there are, and no sample has a label (.cls, or .json with an "
            'integer `label`); add "num_classes": K beside "splits", for labels 0 … K - 1'
        )
    if num_classes > MAX_CLASSES:
        raise ConfigError(
            f"{file} does not say how many classes there are, and a label is {num_classes - 1}, more than "
            f'{MAX_CLASSES} classes have; add "num_classes": K beside "splits", for labels 0 … K - 1'
        )
    return num_classes


def inside(name: str) -> bool:
    """Tell whether a file name from an index stays in the set's folder."""
    return (
        name not in ("", ".")
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        and "\0" not in name
    )


def read_info(root: Path, key: str) -> dict[str, Any]:
    if not (root / INFO).is_file():
        why = "a pack was interrupted there; pack again" if (root / PACKING).exists() else "no set of shards"
        raise ConfigError(f"{key}={str(root)!r} has no {INFO} ({why}); make one with: vmamba shards pack")
    return parse_info((root / INFO).read_bytes(), str(root / INFO))


def parse_info(content: bytes, address: str) -> dict[str, Any]:
    """Read an index's content. Raises ConfigError where it is none."""
    try:
        info = json.loads(content)
        if not isinstance(info["splits"], dict):
            raise TypeError("splits is not an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{redact(address)} is not a set's index: {error!r}; pack the set again") from error
    return info  # type: ignore[no-any-return]


def _check_tars(
    root: Path, listed: Listed, shards: Sequence[Shard], found: Sequence[tuple[int, int]], scan: TarScan
) -> tuple[Offsets, int, tuple[str, ...]]:
    """Return where the samples are, how many classes they have, and warnings.

    A few small reads a shard where the index is whole.
    """
    offsets = Offsets.read(root / f"_offsets-{listed.split}.bin", fingerprint_of(shards))
    num_classes = listed.num_classes
    if offsets is None or offsets.lengths.tolist() != [s.num_samples for s in shards] or not num_classes:
        offsets, counted = scan(root, listed.split, shards, found)
        num_classes = known_classes(num_classes or counted, str(root / INFO))
    warnings = []
    for i, (shard, (size, _)) in enumerate(zip(shards, found, strict=True)):
        path = root / shard.filename
        if shard.num_bytes is not None and size > shard.num_bytes:
            raise ConfigError(
                f"{path} has {size} bytes, its index says {shard.num_bytes}: they are not of one set; pack again"
            )
        if size == shard.num_bytes and _looks_whole(path, offsets, i):
            continue
        content = sources.scan(path)
        num_found = len(content.keys)
        if num_found > shard.num_samples or (content.whole and num_found != shard.num_samples):
            raise ConfigError(
                f"{path} holds {num_found} samples, its index says {shard.num_samples}: they are not of one set; "
                "pack again"
            )
        offsets.patch(i, content.bounds, shard.num_samples)
        if not content.whole or size != shard.num_bytes:
            warnings.append(
                f"DAMAGED SHARD {path}: {size} bytes of {shard.num_bytes}, {num_found} samples of "
                f"{shard.num_samples}; what is lost counts as bad samples"
            )
    return offsets, num_classes, tuple(warnings)


def _looks_whole(path: Path, offsets: Offsets, shard: int) -> bool:
    """Tell whether the members of the last sample lie, and the tar ends, exactly where the offsets say."""
    num_samples = int(offsets.lengths[shard])
    if num_samples == 0:
        return True
    at, end = offsets.bounds(shard, num_samples - 1, 1)
    with path.open("rb", buffering=0) as file:
        while at < end:
            file.seek(at)
            try:
                member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError):
                return False
            if member.size < 0:
                return False
            at += BLOCK - -member.size // BLOCK * BLOCK
        file.seek(end)
        return at == end and file.read(BLOCK) == bytes(BLOCK)


def read_samples(
    source: sources.Source, offsets: Bounds, shard: int, first: int, count: int
) -> list[sources.Raw | Fault]:
    """Read `count` samples of a shard that lie behind one another, with one read."""
    bounds = offsets.bounds(shard, first, count)
    lost = Offsets.MISSING * BLOCK
    have = next((i for i, bound in enumerate(bounds) if bound == lost), count + 1) - 1
    found: list[sources.Raw | Fault] = []
    if have > 0:
        relative = [bound - bounds[0] for bound in bounds[: have + 1]]
        found = sources.samples(source.read(shard, bounds[0], bounds[have]), relative)
    return found + [Fault("its shard ends before it")] * (count - len(found))


def read_all(
    source: sources.Source, offsets: Offsets, shard: int, count: int
) -> Iterator[sources.Raw | Fault]:
    for first in range(0, count, 64):
        yield from read_samples(source, offsets, shard, first, min(64, count - first))


def describe(folder: str | Path) -> str:
    """Summarise a set as its index has it. Raises ConfigError where there is none."""
    root = local_path(str(folder))
    info = read_info(root, "folder")
    indices = {split: read_index(root, split, key="folder") for split in info["splits"]}
    num_classes = max((index.num_classes for index in indices.values()), default=0)
    lines = [f"{info.get('name', root.name)}: {num_classes} classes, in {root}"]
    for split, index in indices.items():
        total = sum(shard.num_bytes or 0 for shard in index.shards)
        lengths = index.lengths
        lines.append(
            f"  {split}: {index.num_samples} samples in {len(lengths)} shards of {min(lengths, default=0)} … "
            f"{max(lengths, default=0)}, {total / _MIB:.1f} MiB, {index.mean_bytes / 1024:.1f} KiB a sample, "
            f"content {index.fingerprint()[:12]}"
        )
        lines += [f"    {warning}" for warning in index.warnings]
    return "\n".join(lines)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
