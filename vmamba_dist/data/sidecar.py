"""The index of a set of very many shards, as a file that is mapped and not parsed.

Law: it says what `_info.json` says of a split, and belongs to it: whoever finds another `_info.json` beside it reads
that instead. Opening it costs a few numbers a shard, whatever the number of samples, and its tars are not looked at:
a missing one is an error, and a short one counts as bad samples, when they are read.

`_index-SPLIT.bin`, little-endian, for S shards and N samples:
    8 bytes `VMINDX01` · u64 S · u64 N · u64 length of the text · u64 length of the names · 32 bytes fingerprint
    the text: JSON with name, num_classes, classes, warnings of the index, and info_bytes, the length of `_info.json`;
    padded to 8 bytes
    u64 × S   bytes a shard
    u32 × S   samples a shard
    u32 × S   where each shard's name ends among the names
    32 bytes × S   sha256 a shard, zeros where there is none
    the names, UTF-8, one behind the other
Where samples start stands in `_offsets-SPLIT.bin` (shards.Offsets), which is read a block at a time.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.index import (
    EVAL_SPLITS,
    INFO,
    Column,
    Index,
    Offsets,
    Shard,
    TarScan,
    inside,
    read_index,
    scan_tars,
)
from vmamba_dist.data.sources import BLOCK, LocalSource, local_path

log = logging.getLogger(__name__)

MAGIC = b"VMINDX01"
LARGE = 10_000  # shards: from here on `shards pack` writes sidecars
_HEADER = 72
_TICK_NS = 20_000_000  # by which a file's times may lag behind the clock


def path_of(root: Path, split: str) -> Path:
    return root / f"_index-{split}.bin"


def write(index: Index) -> Path:
    """Write the sidecar of a split, and its offsets where they are not there; whole, or not at all."""
    offsets = index.root / f"_offsets-{index.split}.bin"
    if Offsets.read(offsets, index.fingerprint()) is None:
        index.offsets.write(offsets, index.fingerprint())
    names = [shard.filename.encode() for shard in index.shards]
    text = {
        "name": index.name,
        "num_classes": index.num_classes,
        "classes": list(index.class_names),
        "warnings": list(index.warnings),
        "info_bytes": (index.root / INFO).stat().st_size,
    }
    words = json.dumps(text).encode()
    words += b" " * (-len(words) % 8)
    blob = b"".join(names)
    counts = np.array([len(names), index.num_samples, len(words), len(blob)], dtype="<u8")
    parts = (
        MAGIC + counts.tobytes() + bytes.fromhex(index.fingerprint()),
        words,
        np.array([shard.num_bytes or 0 for shard in index.shards], dtype="<u8").tobytes(),
        np.array([shard.num_samples for shard in index.shards], dtype="<u4").tobytes(),
        np.cumsum([len(name) for name in names], dtype="<u4").tobytes(),
        b"".join(bytes.fromhex(shard.sha256) if shard.sha256 else bytes(32) for shard in index.shards),
        blob,
    )
    path = path_of(index.root, index.split)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return path


def write_all(folder: str | Path, *, at_least: int = 0) -> list[Path]:
    """Write the sidecars of a set, one a split, where one of its splits has `at_least` shards or more."""
    root = local_path(str(folder))
    splits = json.loads((root / INFO).read_text())["splits"]
    if max((len(entry["filenames"]) for entry in splits.values()), default=0) < at_least:
        return []
    return [write(read_index(root, split, key="folder")) for split in splits]


def open_index(
    folder: str | Path, split: str = "train", *, key: str = "data.train", scan: TarScan = scan_tars
) -> Index:
    """Open a split by its sidecar where it has one, else as read_index does. Raises ConfigError as that does."""
    root = local_path(str(folder))
    named = EVAL_SPLITS if split == "auto" else (split,)
    found = next((name for name in named if path_of(root, name).is_file()), None)
    if found is None or not (root / INFO).is_file():
        return read_index(folder, split, key=key, scan=scan)
    index = _read(root, path_of(root, found), found)
    if index is None:
        log.warning(
            "%s belongs to another %s, or its offsets are gone: it is left alone", path_of(root, found), INFO
        )
        return read_index(folder, split, key=key, scan=scan)
    for warning in index.warnings:
        log.warning("%s", warning)
    return index


def _read(root: Path, path: Path, split: str) -> LargeIndex | None:
    """Map a sidecar; None where it belongs to another index. Raises ConfigError where it is damaged."""
    damaged = ConfigError(
        f"{path} is not whole: remove it, and write it with: vmamba shards verify --sidecar"
    )
    with path.open("rb") as file:
        header = file.read(_HEADER)
        if len(header) < _HEADER or header[:8] != MAGIC:
            raise damaged
        num_shards, num_samples, text_bytes, name_bytes = (
            int(n) for n in np.frombuffer(header[8:40], dtype="<u8")
        )
        try:
            text: dict[str, Any] = json.loads(file.read(text_bytes))
        except ValueError as error:
            raise damaged from error
    if path.stat().st_size != _HEADER + text_bytes + 48 * num_shards + name_bytes:
        raise damaged
    if text["info_bytes"] != (root / INFO).stat().st_size:
        return None
    data = np.memmap(path, dtype=np.uint8, mode="r")
    at = _HEADER + text_bytes
    columns = []
    for width, dtype in ((8, "<u8"), (4, "<u4"), (4, "<u4"), (32, "V32")):
        columns.append(data[at : at + width * num_shards].view(dtype))
        at += width * num_shards
    sizes, lengths, ends, hashes = columns
    table = ShardTable(lengths, sizes, ends, hashes, data[at:])
    fingerprint = header[40:].hex()
    offsets = root / f"_offsets-{split}.bin"
    if int(lengths.sum(dtype=np.int64)) != num_samples or (num_shards and int(ends[-1]) != name_bytes):
        raise damaged
    bounds = Bounds.read_for(offsets, fingerprint, lengths)
    if bounds is None:
        return None
    return LargeIndex(
        root=root,
        name=text["name"],
        split=split,
        shards=table,
        num_classes=text["num_classes"],
        class_names=tuple(text["classes"]),
        offsets=bounds,
        warnings=tuple(text["warnings"]),
        hashed=fingerprint,
    )


class ShardTable(Sequence[Shard]):
    """The shards of a mapped sidecar; a Shard is made when it is asked for."""

    def __init__(
        self,
        lengths: NDArray[np.uint32],
        sizes: NDArray[np.uint64],
        ends: NDArray[np.uint32],
        hashes: NDArray[np.void],
        names: NDArray[np.uint8],
    ) -> None:
        self.lengths, self.sizes = lengths, sizes
        self._ends, self._hashes, self._names = ends, hashes, names

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> Shard: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Shard]: ...

    def __getitem__(self, i: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return Shard(self.filename(i), int(self.lengths[i]), int(self.sizes[i]), self.sha256(i))

    def sha256(self, i: int) -> str:
        """Return a shard's sha256 in hex, "" where it has none."""
        found = self._hashes[i].tobytes()
        return found.hex() if any(found) else ""

    def filename(self, i: int) -> str:
        """Return a shard's name. Raises ConfigError for one that leads out of the set's folder."""
        begin = int(self._ends[i - 1]) if i else 0
        name = self._names[begin : int(self._ends[i])].tobytes().decode()
        if not inside(name):
            raise ConfigError(f"a sidecar names a shard outside its folder: {name!r}")
        return name


class Bounds(Offsets):
    """The offsets of a set, read from their file when asked for: what was read is not kept, so memory stays flat."""

    def __init__(self, file: int, lengths: NDArray[np.uint32]) -> None:
        self._file = file
        self._lengths = lengths
        self._first = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._begin = 4 * (14 + len(lengths))
        self._patches = {}

    @classmethod
    def read_for(cls, path: Path, fingerprint: str, lengths: NDArray[np.uint32]) -> Bounds | None:
        """Open the file; None where there is none that belongs to this index."""
        if not path.is_file():
            return None
        size = 4 * (14 + 2 * len(lengths) + int(lengths.sum(dtype=np.int64)))
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.pread(file, 40, 0) != cls.MAGIC + bytes.fromhex(fingerprint) or os.fstat(file).st_size != size:
            os.close(file)
            return None
        return cls(file, lengths)

    def __del__(self) -> None:
        os.close(self._file)

    def of_shard(self, shard: int) -> NDArray[np.uint32]:
        return self._words(shard, 0, int(self._lengths[shard]) + 1)

    def bounds(self, shard: int, first: int, count: int) -> list[int]:
        return (self._words(shard, first, count + 1).astype(np.int64) * BLOCK).tolist()  # type: ignore[no-any-return]

    def _words(self, shard: int, first: int, count: int) -> NDArray[np.uint32]:
        at = self._begin + 4 * (int(self._first[shard]) + shard + first)
        return np.frombuffer(os.pread(self._file, 4 * count, at), dtype="<u4")


@dataclass(frozen=True)
class LargeIndex(Index):
    """An index whose shards stay in the mapped file."""

    hashed: str = field(default="", compare=False)  # its fingerprint
    opened: int = field(default_factory=time.time_ns, compare=False)  # its tars are not looked at by then

    @property
    def table(self) -> ShardTable:
        assert isinstance(self.shards, ShardTable)
        return self.shards

    @property
    def num_samples(self) -> int:
        return int(self.table.lengths.sum(dtype=np.int64))

    @property
    def lengths(self) -> Sequence[int]:
        return cast(
            Sequence[int], self.table.lengths
        )  # an array: as a list a million of them would take 40 MB

    @property
    def mean_bytes(self) -> float:
        return float(self.table.sizes.sum(dtype=np.float64)) / max(1, self.num_samples)

    def fingerprint(self) -> str:
        return self.hashed

    def local_source(self) -> LocalSource:
        table, root = self.table, self.root
        paths = Column(len(table), lambda i: root / table.filename(i))
        return LocalSource(paths, since=self.opened - _TICK_NS, sha256=Column(len(table), table.sha256))
