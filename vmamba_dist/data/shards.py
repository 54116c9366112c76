"""Sets of shards: packed, indexed, verified, shown.

Law: a folder is a set when it has an `_info.json`, which is written last and whole; a pack that was killed
leaves none. The same source, seed and options give the same bytes.

A set is
    NAME-SPLIT-000000.tar …   members `key.jpg|png|webp` and `key.cls` (or `key.json` with an integer `label`)
    _info.json                timm's form: splits → {name, filenames, shard_lengths, num_samples}, with `bytes` and
                              `sha256`, one a shard; num_classes and classes beside `splits`
    sizes.json                open_clip's form: file name → number of samples
    _offsets-SPLIT.bin        where each sample starts (see Offsets); rebuilt in memory where it is missing
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import sources
from vmamba_dist.data.datasets import digits
from vmamba_dist.data.decode import DecodeError, check_header, decode
from vmamba_dist.data.sources import BLOCK, Fault, LocalSource, local_path

log = logging.getLogger(__name__)

INFO = "_info.json"
SIZES = "sizes.json"
_PACKING = "_packing"  # there while a pack is under way, or was killed
EVAL_SPLITS = ("val", "validation", "test")
_MIB = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One tar as the index has it; num_bytes and sha256 are None and "" in an index that lacks them."""

    filename: str
    num_samples: int
    num_bytes: int | None
    sha256: str


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

    @property
    def lengths(self) -> NDArray[np.uint32]:
        return self._lengths

    def of_shard(self, shard: int) -> NDArray[np.uint32]:
        patch = self._patches.get(shard)
        return self._blocks[self._first[shard] : self._first[shard + 1]] if patch is None else patch

    def patch(self, shard: int, bounds: Sequence[int], num_samples: int) -> None:
        """Replace a damaged shard's bounds by those found in it; samples beyond them are MISSING."""
        blocks = np.full(num_samples + 1, self.MISSING, dtype="<u4")
        blocks[: len(bounds)] = np.asarray(bounds, dtype=np.int64) // BLOCK
        self._patches[shard] = blocks

    def bounds(self, shard: int, first: int, count: int) -> list[int]:
        """Return the starts of `count` samples and the end of the last, in bytes."""
        return (self.of_shard(shard)[first : first + count + 1].astype(np.int64) * BLOCK).tolist()  # type: ignore[no-any-return]

    def write(self, path: Path, fingerprint: str) -> None:
        header = self.MAGIC + bytes.fromhex(fingerprint)
        counts = np.array([len(self._lengths), self._lengths.sum()], dtype="<u8").tobytes()
        _write_whole(path, header + counts + self._lengths.tobytes() + self._blocks.tobytes())

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
    warnings: tuple[str, ...] = ()  # damage found at the start: those samples will count as bad

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
        return _fingerprint(self.shards)

    def source(self) -> LocalSource:
        return LocalSource([self.root / shard.filename for shard in self.shards])


def _fingerprint(shards: Sequence[Shard]) -> str:
    lines = (f"{s.num_samples} {s.sha256 or f'{s.filename} {s.num_bytes}'}\n" for s in shards)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_index(folder: str | Path, split: str = "train", *, key: str = "data.train") -> Index:
    """Read one split of a set and check it against its tars. `key` is the config key that named the folder.

    split="auto" is the first of val, validation and test that the set has. A tar shorter than its index says
    is warned of: its lost samples count as bad. Raises ConfigError for what no run could be right about: no
    set, an unknown split, a missing tar, one longer than its index says, another number of samples.
    """
    root = local_path(str(folder))
    info = _read_info(root, key)
    splits = info["splits"]
    if split == "auto":
        split = next((name for name in EVAL_SPLITS if name in splits), "")
        if not split:
            raise ConfigError(
                f"{key}={str(folder)!r} has the splits {', '.join(splits)}, and none of {', '.join(EVAL_SPLITS)}; "
                "name one with eval.split"
            )
    if split not in splits:
        raise ConfigError(f"{key}={str(folder)!r} has no split {split!r}; it has {', '.join(splits)}")
    entry = splits[split]
    try:
        filenames, lengths = list(entry["filenames"]), [int(n) for n in entry["shard_lengths"]]
        if not len(filenames) == len(lengths) == len(entry.get("bytes", filenames)):
            raise ConfigError(
                f"{root / INFO}: split {split!r} lists {len(filenames)} files, {len(lengths)} lengths"
            )
        if sum(lengths) != int(entry["num_samples"]) or min(lengths, default=0) < 0:
            raise ConfigError(
                f"{root / INFO}: split {split!r} says {entry['num_samples']} samples, its shard_lengths sum to "
                f"{sum(lengths)}; pack the set again"
            )
        classes = tuple(str(c) for c in info.get("classes", ()))
        num_classes = int(info.get("num_classes", len(classes)))
        recorded = [int(n) for n in entry.get("bytes", [])]
        hashes = [str(h) for h in entry.get("sha256", [""] * len(filenames))]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{root / INFO}: split {split!r} is not in timm's form: {error!r}") from error
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in filenames):
        raise ConfigError(f"{root / INFO}: split {split!r} names files outside its folder")
    missing = [name for name in filenames if not (root / name).is_file()]
    if missing:
        raise ConfigError(
            f"{key}={str(folder)!r}: {len(missing)} of the {len(filenames)} shards of split {split!r} are missing, "
            f"first {missing[0]}; copy them, or pack the set again"
        )
    sizes = recorded or [(root / name).stat().st_size for name in filenames]
    shards = tuple(Shard(*fields) for fields in zip(filenames, lengths, sizes, hashes, strict=True))
    offsets, warnings = _check_tars(root, split, shards)
    for warning in warnings:
        log.warning("%s", warning)
    if num_classes < 1:
        raise ConfigError(
            f'{root / INFO} does not say how many classes there are; add "num_classes": K beside "splits", for '
            "labels 0 … K - 1"
        )
    return Index(
        root, str(info.get("name", root.name)), split, shards, num_classes, classes, offsets, warnings
    )


def _read_info(root: Path, key: str) -> dict[str, Any]:
    if not (root / INFO).is_file():
        why = "a pack was interrupted there; pack again" if (root / _PACKING).exists() else "no set of shards"
        raise ConfigError(f"{key}={str(root)!r} has no {INFO} ({why}); make one with: vmamba shards pack")
    try:
        info = json.loads((root / INFO).read_text())
        if not isinstance(info["splits"], dict):
            raise TypeError("splits is not an object")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{root / INFO} is not a set's index: {error!r}; pack the set again") from error
    return info  # type: ignore[no-any-return]


def _check_tars(root: Path, split: str, shards: Sequence[Shard]) -> tuple[Offsets, tuple[str, ...]]:
    """Return where the samples are, and warnings. A few small reads a shard where the sidecar is there."""
    offsets = Offsets.read(root / f"_offsets-{split}.bin", _fingerprint(shards))
    if offsets is not None and offsets.lengths.tolist() != [s.num_samples for s in shards]:
        offsets = None
    rebuild = offsets is None
    if offsets is None:
        log.info("%s has no offsets for split %s: reading the headers of %d tars", root, split, len(shards))
        offsets = Offsets.of([[0] * (shard.num_samples + 1) for shard in shards])
    warnings = []
    for i, shard in enumerate(shards):
        path = root / shard.filename
        size = path.stat().st_size
        if shard.num_bytes is not None and size > shard.num_bytes:
            raise ConfigError(
                f"{path} has {size} bytes, its index says {shard.num_bytes}: they are not of one set; pack again"
            )
        if not rebuild and size == shard.num_bytes and _looks_whole(path, offsets, i):
            continue
        found = sources.scan(path)
        num_found = len(found.keys)
        if num_found > shard.num_samples or (found.whole and num_found != shard.num_samples):
            raise ConfigError(
                f"{path} holds {num_found} samples, its index says {shard.num_samples}: they are not of one set; "
                "pack again"
            )
        offsets.patch(i, found.bounds, shard.num_samples)
        if not found.whole or size != shard.num_bytes:
            warnings.append(
                f"DAMAGED SHARD {path}: {size} bytes of {shard.num_bytes}, {num_found} samples of "
                f"{shard.num_samples}; what is lost counts as bad samples"
            )
    return offsets, tuple(warnings)


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
            except tarfile.TarError:
                return False
            at += BLOCK - -member.size // BLOCK * BLOCK
        file.seek(end)
        return at == end and file.read(BLOCK) == bytes(BLOCK)


def read_samples(
    source: sources.Source, offsets: Offsets, shard: int, first: int, count: int
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


def _read(source: sources.Source, offsets: Offsets, shard: int, count: int) -> Iterator[sources.Raw | Fault]:
    for first in range(0, count, 64):
        yield from read_samples(source, offsets, shard, first, min(64, count - first))


@dataclass(frozen=True)
class Record:
    """A sample to be packed; load() gives the bytes of its image file."""

    key: str
    suffix: str  # jpg | png | webp
    label: int
    split: str
    load: Callable[[], bytes]


@dataclass(frozen=True)
class PackReport:
    """What a pack wrote, and what it left out."""

    out: Path
    shards: int
    samples: Mapping[str, int]  # by split
    num_bytes: int
    num_classes: int
    ignored: tuple[str, ...]  # files that are no JPEG, PNG or WebP by name
    unreadable: tuple[str, ...]  # images whose header cannot be read, with the reason

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.samples.items())
        mib = self.num_bytes / _MIB
        text = f"{self.out}: {counts}; {self.num_classes} classes, {self.shards} shards, {mib:.1f} MiB"
        for what, names in (
            ("ignored (no image by name)", self.ignored),
            ("left out (unreadable)", self.unreadable),
        ):
            if names:
                text += f"\n{len(names)} {what}, first: {names[0]}"
        return text


def pack(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    holdout: float | None = None,
    shuffle: bool = True,
    seed: int = 0,
    samples_per_shard: int | None = None,
    shard_mib: float = 128.0,
    overwrite: bool = False,
) -> PackReport:
    """Pack images into a set of shards at `out`.

    `source` is one of
        "digits"      scikit-learn's digits; holdout is .2
        a folder      one folder a class, class numbers in the sorted order of their names; where the folders
                      at the top are splits (train, val, validation, test), classes are one level deeper
        a CSV file    columns path,label and optionally split; paths relative to the file's folder; labels are
                      integers from 0, or names that are numbered in sorted order
    Samples without a split of their own go to `split`, but a share `holdout` of them, by a hash of the sample's
    id, to "test". They are shuffled within their split by `seed`. A shard closes at samples_per_shard, or at
    shard_mib where that is not given. Image files are copied as they are; one whose header cannot be read is
    left out and named in the report. Raises ConfigError where there is nothing to pack, or `out` has a set
    already and overwrite is not given.
    """
    if samples_per_shard is not None and samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard}: use 1 or more")
    if not shard_mib > 0:
        raise ConfigError(f"shard_mib={shard_mib}: use more than 0 MiB")
    if holdout is not None and not 0 <= holdout < 1:
        raise ConfigError(f"holdout={holdout}: a share: use 0 … below 1")
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ConfigError(f"split={split!r}: use letters, digits and _")
    content = _open_source(source, split, holdout)
    name = _clean(name or content.name)
    root = local_path(str(out))
    _take_folder(root, name, overwrite)
    writer_limits = (samples_per_shard, int(shard_mib * _MIB))
    splits: dict[str, Any] = {}
    unreadable: list[str] = []
    by_split: dict[str, list[Record]] = {}
    for record in content.records:
        by_split.setdefault(record.split, []).append(record)
    for split_name, records in by_split.items():
        if shuffle:
            order = np.random.default_rng([seed, len(records)]).permutation(len(records))
            records = [records[i] for i in order]
        shards, offsets = _write_shards(root, f"{name}-{split_name}", records, *writer_limits, unreadable)
        splits[split_name] = {
            "name": split_name,
            "filenames": [s.filename for s in shards],
            "shard_lengths": [s.num_samples for s in shards],
            "num_samples": sum(s.num_samples for s in shards),
            "bytes": [s.num_bytes for s in shards],
            "sha256": [s.sha256 for s in shards],
        }
        offsets.write(root / f"_offsets-{split_name}.bin", _fingerprint(shards))
    info = {
        "name": name,
        "num_classes": len(content.classes),
        "classes": list(content.classes),
        "shuffled": shuffle,
        "seed": seed,
        "splits": splits,
    }
    sizes = {f: n for s in splits.values() for f, n in zip(s["filenames"], s["shard_lengths"], strict=True)}
    _write_whole(root / SIZES, json.dumps(sizes, indent=1).encode())
    _write_whole(root / INFO, json.dumps(info, indent=1).encode())
    (root / _PACKING).unlink()
    return PackReport(
        out=root,
        shards=len(sizes),
        samples={split_name: s["num_samples"] for split_name, s in splits.items()},
        num_bytes=sum(sum(s["bytes"]) for s in splits.values()),
        num_classes=len(content.classes),
        ignored=tuple(content.ignored),
        unreadable=tuple(unreadable),
    )


def _take_folder(root: Path, name: str, overwrite: bool) -> None:
    """Make the folder ready for a new set. An old set goes only when told, its index first."""
    root.mkdir(parents=True, exist_ok=True)
    if (root / INFO).exists():
        if not overwrite:
            raise ConfigError(
                f"{root} has a set of shards already; give another folder, or overwrite (--overwrite)"
            )
        old = _read_info(root, "out")
        (root / _PACKING).write_text(str(old.get("name", "")))
        (root / INFO).unlink()
        for entry in old["splits"].values():
            for filename in entry["filenames"]:
                (root / Path(filename).name).unlink(missing_ok=True)
        for sidecar in (*root.glob("_offsets-*.bin"), *root.glob("_index-*.bin")):
            sidecar.unlink()
    elif (root / _PACKING).exists():
        killed = (root / _PACKING).read_text()
        for left in root.glob("*.tar*"):
            if re.fullmatch(re.escape(killed) + r"-\w+-\d{6}\.tar(\.tmp)?", left.name):
                left.unlink()
    elif any(root.glob("*.tar")):
        raise ConfigError(f"{root} holds tars that no {INFO} lists; give another folder")
    (root / _PACKING).write_text(name)


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
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


def _write_shards(
    root: Path,
    stem: str,
    records: Sequence[Record],
    max_samples: int | None,
    max_bytes: int,
    unreadable: list[str],
) -> tuple[list[Shard], Offsets]:
    shards: list[Shard] = []
    bounds: list[list[int]] = []
    at = 0
    while at < len(records):
        path = root / f"{stem}-{len(shards):06d}.tar"
        temporary = path.with_name(path.name + ".tmp")
        starts: list[int] = []
        with _HashedFile(temporary) as file, _tar_writer(file) as tar:
            while at < len(records):
                full = len(starts) == max_samples if max_samples else tar.offset >= max_bytes
                if full and starts:
                    break
                record = records[at]
                at += 1
                image = record.load()
                fault = _header_fault(image)
                if fault:
                    unreadable.append(f"{record.key}.{record.suffix}: {fault}")
                    continue
                starts.append(tar.offset)
                _add(tar, f"{record.key}.{record.suffix}", image)
                _add(tar, f"{record.key}.cls", str(record.label).encode())
            end = tar.offset
        if not starts:
            temporary.unlink()
            break
        temporary.rename(path)
        shards.append(Shard(path.name, len(starts), file.size, file.sha256.hexdigest()))
        bounds.append([*starts, end])
    return shards, Offsets.of(bounds)


def _tar_writer(file: _HashedFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner, no time: the same bytes for ever
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _header_fault(image: bytes) -> str:
    try:
        check_header(image)
        return ""
    except DecodeError as error:
        return str(error)


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


@dataclass(frozen=True)
class _Content:
    name: str
    classes: Sequence[str]
    records: Sequence[Record]
    ignored: Sequence[str] = ()


def _open_source(source: str | Path, split: str, holdout: float | None) -> _Content:
    if str(source) == "digits":
        return _digits(split, 0.2 if holdout is None else holdout)
    path = local_path(str(source))
    if path.is_dir():
        content = _folder(path, split, holdout or 0.0)
    elif path.suffix.lower() == ".csv" and path.is_file():
        content = _csv(path, split, holdout or 0.0)
    else:
        raise ConfigError(f"source={str(source)!r} is neither an image folder, nor a CSV file, nor `digits`")
    if not content.records:
        raise ConfigError(f"source={str(source)!r} has no images (.jpg, .jpeg, .png, .webp)")
    return content


def share_of(sample_id: str) -> float:
    """Hash a sample's id to [0, 1), by CRC-32: the same everywhere, whatever else is in the set."""
    return zlib.crc32(sample_id.encode()) / 2**32


def _split_of(key: str, split: str, holdout: float) -> str:
    return "test" if share_of(key) < holdout else split


def _digits(split: str, holdout: float) -> _Content:
    records = [
        Record(key, "png", label, _split_of(key, split, holdout), lambda png=png: png)  # type: ignore[misc]
        for key, png, label in digits.digits()
    ]
    return _Content("digits", [str(n) for n in range(digits.NUM_CLASSES)], records)


def _folder(root: Path, split: str, holdout: float) -> _Content:
    tops = _folders(root)
    splits = ("train", *EVAL_SPLITS)
    has_splits = bool(tops) and all(top.name in splits for top in tops)
    groups = {top.name: _folders(top) for top in tops} if has_splits else {"": tops}
    classes = sorted({folder.name for folders in groups.values() for folder in folders})
    number = {name: i for i, name in enumerate(classes)}
    records: list[Record] = []
    ignored: list[str] = []
    keys = _Keys()
    for group, folders in groups.items():
        for folder in folders:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                suffix = _suffix(path)
                if suffix is None:
                    ignored.append(str(path.relative_to(root)))
                    continue
                key = keys.new(str(path.relative_to(root).with_suffix("")))
                where = group or _split_of(key, split, holdout)
                records.append(Record(key, suffix, number[folder.name], where, path.read_bytes))
    return _Content(root.resolve().name, classes, records, ignored)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _csv(path: Path, split: str, holdout: float) -> _Content:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise ConfigError(
                f"{path}: needs the columns path and label, has {', '.join(reader.fieldnames or ())}"
            )
        rows = list(reader)
    names = sorted({row["label"] for row in rows})
    if all(re.fullmatch(r"[0-9]{1,9}", label) for label in names):
        number = {label: int(label) for label in names}
        classes = [str(n) for n in range(1 + max(number.values(), default=0))]
    else:
        number = {label: i for i, label in enumerate(names)}
        classes = names
    records: list[Record] = []
    ignored: list[str] = []
    keys = _Keys()
    for line, row in enumerate(rows, start=2):
        image = path.parent / row["path"]
        suffix = _suffix(image)
        if suffix is None:
            ignored.append(row["path"])
            continue
        if not image.is_file():
            raise ConfigError(f"{path}, line {line}: no file {row['path']!r}")
        key = keys.new(str(Path(row["path"]).with_suffix("")))
        own = row.get("split") or ""
        if own and not re.fullmatch(r"[A-Za-z0-9_]+", own):
            raise ConfigError(f"{path}, line {line}: split {own!r}: use letters, digits and _")
        records.append(
            Record(key, suffix, number[row["label"]], own or _split_of(key, split, holdout), image.read_bytes)
        )
    return _Content(path.stem, classes, records, ignored)


def _suffix(path: Path) -> Literal["jpg", "png", "webp"] | None:
    match path.suffix.lower():
        case ".jpg" | ".jpeg":
            return "jpg"
        case ".png":
            return "png"
        case ".webp":
            return "webp"
    return None


def _clean(text: str) -> str:
    """Keep what is safe in a member's name: no dots (they start the suffix), no folders."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "x"


class _Keys:
    """Unique member names of at most 90 characters."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def new(self, path: str) -> str:
        key = _clean(path)
        if len(key) > 80 or key in self._seen:
            key = f"{key[:70]}-{hashlib.blake2b(path.encode(), digest_size=6).hexdigest()}"
        while key in self._seen:
            key += "x"
        self._seen.add(key)
        return key


@dataclass(frozen=True)
class ShardFault:
    """What is wrong, and where; index -1 is the shard itself."""

    shard: str
    index: int
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.shard}[{self.index}]" if self.index >= 0 else self.shard
        return f"{where}{' ' + self.key if self.key else ''}: {self.reason}"


@dataclass(frozen=True)
class VerifyReport:
    """Every fault of a set, by name."""

    samples: int
    shards: int
    faults: tuple[ShardFault, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"FAULT {fault}" for fault in self.faults] + [f"warning: {text}" for text in self.warnings]
        verdict = "ok" if self.ok else f"{len(self.faults)} faults"
        return "\n".join([*lines, f"{self.samples} samples in {self.shards} shards read: {verdict}"])


def verify(folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read a whole set: sha256, sizes, counts, labels, and every image decoded. progress(shards done, of all).

    Raises ConfigError where there is no set at all; everything else is a fault in the report.
    """
    root = local_path(str(folder))
    info = _read_info(root, "folder")
    num_classes = int(info.get("num_classes", 2**31))
    faults: list[ShardFault] = []
    warnings: list[str] = []
    num_samples = 0
    done, total = 0, sum(len(entry.get("filenames", ())) for entry in info["splits"].values())
    for split, entry in info["splits"].items():
        labels: list[int] = []
        keys: Counter[str] = Counter()
        try:
            rows = list(
                zip(
                    entry["filenames"],
                    entry["shard_lengths"],
                    entry.get("bytes", [None] * len(entry["filenames"])),
                    entry.get("sha256", [""] * len(entry["filenames"])),
                    strict=True,
                )
            )
            if sum(entry["shard_lengths"]) != entry["num_samples"]:
                faults.append(ShardFault(INFO, -1, split, "num_samples is not the sum of shard_lengths"))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(ShardFault(INFO, -1, split, f"not in timm's form: {error!r}"))
            continue
        for row in rows:
            shard = Shard(*row)
            num_samples += _verify_shard(root, shard, num_classes, faults, labels, keys)
            done += 1
            if progress is not None:
                progress(done, total)
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            warnings.append(f"split {split}: {len(twice)} keys occur more than once, first {twice[0]}")
        if _labels_cluster(labels):
            warnings.append(
                f"split {split}: neighbours have the same label far more often than by chance; blocks and lanes "
                "mix only near samples: pack the set again with shuffling"
            )
    return VerifyReport(num_samples, total, tuple(faults), tuple(warnings))


def _verify_shard(
    root: Path,
    shard: Shard,
    num_classes: int,
    faults: list[ShardFault],
    labels: list[int],
    keys: Counter[str],
) -> int:
    def fault(reason: str, index: int = -1, key: str = "") -> None:
        faults.append(ShardFault(shard.filename, index, key, reason))

    path = root / shard.filename
    if not path.is_file():
        fault("missing")
        return 0
    size = path.stat().st_size
    if shard.num_bytes is not None and size != shard.num_bytes:
        fault(f"{size} bytes, the index says {shard.num_bytes}")
    if shard.sha256:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            fault(f"sha256 is {digest[:12]}…, the index says {shard.sha256[:12]}…")
    found = sources.scan(path)
    if not found.whole:
        fault("the tar breaks off, or has an unreadable header")
    if len(found.keys) != shard.num_samples:
        fault(f"{len(found.keys)} samples, the index says {shard.num_samples}")
    source = LocalSource([path])
    for i, sample in enumerate(_read(source, Offsets.of([found.bounds]), 0, len(found.keys))):
        keys[found.keys[i]] += 1
        if isinstance(sample, Fault):
            fault(sample.reason, i, found.keys[i])
            continue
        label = sources.parse_label(sample, num_classes)
        if isinstance(label, Fault):
            fault(label.reason, i, sample.key)
        else:
            labels.append(label)
        try:
            decode(sample.image)
        except DecodeError as error:
            fault(str(error), i, sample.key)
    source.close()
    return len(found.keys)


def _labels_cluster(labels: Sequence[int]) -> bool:
    """Tell whether neighbours share a label much more often than in a shuffled set."""
    pairs = len(labels) - 1
    if pairs < 16:
        return False
    counts = np.array(list(Counter(labels).values()))
    chance = float(((counts / counts.sum()) ** 2).sum())
    same = sum(a == b for a, b in itertools.pairwise(labels)) / pairs
    deviation = (chance * (1 - chance) / pairs) ** 0.5
    return chance < 0.9 and same > max(1.5 * chance, chance + 6 * deviation)


def describe(folder: str | Path) -> str:
    """Summarise a set as its index has it. Raises ConfigError where there is none."""
    root = local_path(str(folder))
    info = _read_info(root, "folder")
    lines = [f"{info.get('name', root.name)}: {info.get('num_classes', '?')} classes, in {root}"]
    for split in info["splits"]:
        index = read_index(root, split, key="folder")
        total = sum(shard.num_bytes or 0 for shard in index.shards)
        lengths = index.lengths
        lines.append(
            f"  {split}: {index.num_samples} samples in {len(lengths)} shards of {min(lengths, default=0)} … "
            f"{max(lengths, default=0)}, {total / _MIB:.1f} MiB, {index.mean_bytes / 1024:.1f} KiB a sample, "
            f"content {index.fingerprint()[:12]}"
        )
        lines += [f"    {warning}" for warning in index.warnings]
    return "\n".join(lines)
