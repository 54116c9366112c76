"""Every byte of a set, read: hashes, counts, labels, and each image decoded.

Law: a set is sound when verify() names no fault; whatever is in the files, the answer is a report, never a
crash, and nothing outside the folder is read.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba_dist.data import sources
from vmamba_dist.data.decode import DecodeError, decode
from vmamba_dist.data.index import INFO, MAX_CLASSES, Offsets, Shard, inside, read_all, read_info
from vmamba_dist.data.sources import Fault, LocalSource, local_path
from vmamba_dist.data.writer import labels_cluster


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
    info = read_info(root, "folder")
    faults: list[ShardFault] = []
    warnings: list[str] = []
    num_classes = info.get("num_classes", MAX_CLASSES)
    if not isinstance(num_classes, int) or not 0 < num_classes <= MAX_CLASSES:
        faults.append(ShardFault(INFO, -1, "", f"num_classes is {num_classes!r}"))
        num_classes = MAX_CLASSES
    splits = {split: _rows(root, split, entry, faults) for split, entry in info["splits"].items()}
    num_samples = 0
    done, total = 0, sum(map(len, splits.values()))
    for split, shards in splits.items():
        labels: list[int] = []
        keys: Counter[str] = Counter()
        for shard in shards:
            num_samples += _verify_shard(root, shard, num_classes, faults, labels, keys)
            done += 1
            if progress is not None:
                progress(done, total)
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            warnings.append(f"split {split}: {len(twice)} keys occur more than once, first {twice[0]}")
        same = sum(a == b for a, b in itertools.pairwise(labels))
        if labels_cluster(same, len(labels) - 1, Counter(labels)):
            warnings.append(
                f"split {split}: neighbours have the same label far more often than by chance; blocks and lanes "
                "mix only near samples: pack the set again with shuffling"
            )
    return VerifyReport(num_samples, total, tuple(faults), tuple(warnings))


def _rows(root: Path, split: str, entry: Any, faults: list[ShardFault]) -> list[Shard]:
    """Read a split's shards; what is wrong with its entry is a fault."""
    try:
        names = entry["filenames"]
        rows = zip(
            names,
            entry["shard_lengths"],
            entry.get("bytes", [None] * len(names)),
            entry.get("sha256", [""] * len(names)),
            strict=True,
        )
        shards = [Shard(str(n), int(m), None if b is None else int(b), str(h)) for n, m, b, h in rows]
        if sum(shard.num_samples for shard in shards) != entry["num_samples"]:
            faults.append(ShardFault(INFO, -1, split, "num_samples is not the sum of shard_lengths"))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        faults.append(ShardFault(INFO, -1, split, f"not in timm's form: {error!r}"))
        return []
    outside = [s for s in shards if not inside(s.filename)]
    faults += [ShardFault(INFO, -1, split, f"names {s.filename!r}, outside its folder") for s in outside]
    return [shard for shard in shards if shard not in outside]


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
    for i, sample in enumerate(read_all(source, Offsets.of([found.bounds]), 0, len(found.keys))):
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
