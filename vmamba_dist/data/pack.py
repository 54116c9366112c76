"""Images of any origin → a set of shards.

Law: the same source, seed and options give the same bytes, for any number of processes and however often the
pack was killed in between. Images that need not change are copied as they are. A sample that cannot be used is
left out, counted and named; nothing else is.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import origins
from vmamba_dist.data.encode import FORMATS, DecodeError, Format, convert
from vmamba_dist.data.origins import Content
from vmamba_dist.data.sources import Fault, SourceError, local_path
from vmamba_dist.data.writer import (
    Plan,
    Progress,
    Sample,
    ShardRecord,
    check_limits,
    labels_cluster,
    split_clusters,
    write_set,
)

_MIB = 1 << 20


@dataclass(frozen=True)
class PackReport:
    """What a pack wrote, and what it left out."""

    out: Path
    shards: int
    samples: Mapping[str, int]  # by split
    num_bytes: int
    num_classes: int
    ignored: tuple[str, ...] = ()  # files that are no JPEG, PNG or WebP by name
    unreadable: tuple[str, ...] = ()  # samples that cannot be used, with the reason
    warnings: tuple[str, ...] = ()

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
        return "\n".join([text, *(f"warning: {warning}" for warning in self.warnings)])


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
    check: Literal["header", "decode"] = "header",
    max_side: int | None = None,
    encode: Format | None = None,
    quality: int = 90,
    image_column: str | None = None,
    label_column: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Pack images into a set of shards at `out`.

    `source` is one of
        "digits"       scikit-learn's digits; holdout is .2
        a folder       one folder a class, class numbers in the sorted order of their names; where the folders
                       at the top are splits (train, val, validation, test), classes are one level deeper
        a CSV or Parquet file
                       columns path,label and optionally split; paths relative to the file's folder; labels are
                       integers from 0, or names that are numbered in sorted order
        a saved dataset
                       a folder that `save_to_disk` of Hugging Face's datasets wrote, with its splits and classes
        tars           a .tar, a folder of them, or a set of shards, whose splits and classes stay
    Samples without a split of their own go to `split`, but a share `holdout` of them, by a hash of the sample's
    id, to "test". They are shuffled within their split by `seed`. A shard closes at samples_per_shard, or at
    about shard_mib where that is not given. Image files are copied as they are, unless their longer side has more
    than max_side px, or `encode` names a format: then they are decoded, resized and encoded (`quality` is JPEG's
    and WebP's). One whose header cannot be read, or with check="decode" its pixels, is left out and named in the
    report and in left_out.txt. `workers` processes write (None: one a core for large sources); a pack that was
    killed goes on when it is started again. Raises ConfigError where there is nothing to pack, or `out` has a set
    already and overwrite is not given.
    """
    shard_bytes = check_limits(samples_per_shard, shard_mib, workers)
    if holdout is not None and not 0 <= holdout < 1:
        raise ConfigError(f"holdout={holdout}: a share: use 0 … below 1")
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ConfigError(f"split={split!r}: use letters, digits and _")
    if check not in ("header", "decode"):
        raise ConfigError(f"check={check!r}: use header or decode")
    if max_side is not None and max_side < 1:
        raise ConfigError(f"max_side={max_side}: use 1 px or more")
    if encode is not None and encode not in FORMATS:
        raise ConfigError(f"encode={encode!r}: use {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality={quality}: use 1 … 100")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed}: use 0 or more")
    root = local_path(str(out))
    content = _open(source, root, image_column, label_column)
    if str(source) == "digits" and holdout is None:
        holdout = 0.2

    def make(number: int) -> Sample | Fault:
        name = (content.names or content.keys)[number]
        try:
            found = content.load(number)
            if isinstance(found, Fault):
                return Fault(found.reason, name)
            data, label = found
            image, suffix = convert(data, check=check, max_side=max_side, format=encode, quality=quality)
        except DecodeError as error:
            return Fault(str(error), name)
        except SourceError:
            raise
        except OSError as error:
            raise SourceError(f"source={str(source)!r}: {name} cannot be read: {error}") from error
        return Sample(content.keys[number], suffix, image, label)

    pillow = PIL.__version__ if max_side is not None or encode else ""
    plan = Plan(
        name=origins.clean(name or content.name),
        splits=_orders(content, split, holdout or 0.0, seed if shuffle else None),
        weights=np.asarray(content.sizes, dtype=np.float64),
        make=make,
        digest=_digest(content, [check, max_side, encode, quality, pillow, shuffle, seed]),
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
    )

    def extra(records: Sequence[ShardRecord]) -> dict[str, Any]:
        classes = content.classes
        return {
            "num_classes": len(classes) or content.num_classes or 1 + _largest_label(records),
            "classes": list(classes),
            "shuffled": shuffle,
            "clustered": [name for name in plan.splits if split_clusters(records, name)],
            "seed": seed,
        }

    records = write_set(root, plan, extra, workers=workers, overwrite=overwrite, progress=progress)
    return report(
        root,
        plan,
        records,
        num_classes=extra(records)["num_classes"],
        ignored=content.ignored,
        lost=content.damaged,
        warnings=_cluster_warnings(content, plan, records, shuffle),
    )


def report(
    root: Path,
    plan: Plan,
    records: Sequence[ShardRecord],
    *,
    num_classes: int,
    ignored: Sequence[str] = (),
    lost: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> PackReport:
    """Sum up what was written."""
    full = [record for record in records if record.num_samples]
    return PackReport(
        out=root,
        shards=len(full),
        samples={s: sum(r.num_samples for r in full if r.split == s) for s in plan.splits},
        num_bytes=sum(record.num_bytes for record in full),
        num_classes=num_classes,
        ignored=tuple(ignored),
        unreadable=(*lost, *(line for record in records for line in record.left_out)),
        warnings=tuple(warnings),
    )


def share_of(sample_id: str) -> float:
    """Hash a sample's id to [0, 1), by CRC-32: the same everywhere, whatever else is in the set."""
    return zlib.crc32(sample_id.encode()) / 2**32


def shuffled(numbers: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Order a split's samples by a seed."""
    order = np.random.default_rng([seed, len(numbers)]).permutation(len(numbers))
    return np.asarray(numbers, dtype=np.int64)[order]


def _open(source: str | Path, root: Path, image_column: str | None, label_column: str | None) -> Content:
    if str(source) == "digits":
        return origins.from_digits()
    path = local_path(str(source))
    content: Content
    if root.exists() and path.exists() and root.resolve() in (path.resolve(), path.resolve().parent):
        raise ConfigError(f"out={str(root)!r} is where the source lies; give another folder")
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        content = _tables().from_saved_dataset(path, image_column, label_column)
    elif path.is_dir() and any(path.glob("*.tar")):
        content = origins.from_tars(path)
    elif path.is_dir():
        content = origins.from_folder(path)
    elif path.suffix.lower() == ".csv" and path.is_file():
        content = origins.from_csv(path, image_column, label_column)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        content = _tables().from_parquet(path, image_column, label_column)
    elif path.suffix.lower() == ".tar" and path.is_file():
        content = origins.from_tars(path)
    else:
        raise ConfigError(
            f"source={str(source)!r} is neither an image folder, nor a CSV or Parquet file, nor a dataset saved to "
            "disk, nor tars, nor `digits`"
        )
    if not content.keys:
        lost = f"; {content.damaged[0]}" if content.damaged else ""
        raise ConfigError(f"source={str(source)!r} has no images (.jpg, .jpeg, .png, .webp){lost}")
    return content


def _tables() -> ModuleType:
    """Import data/tables.py, and with it pyarrow. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module("vmamba_dist.data.tables")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ConfigError(
            "Parquet files and saved datasets are read with the package pyarrow, which is not installed; "
            "pip install 'vmamba-dist[tables]'"
        ) from error


def _orders(content: Content, split: str, holdout: float, seed: int | None) -> dict[str, NDArray[np.int64]]:
    by_split: dict[str, list[int]] = {}
    for number, own in enumerate(content.splits):
        where = own or ("test" if share_of(content.keys[number]) < holdout else split)
        by_split.setdefault(where, []).append(number)
    if seed is None:
        return {name: np.array(numbers, dtype=np.int64) for name, numbers in by_split.items()}
    return {name: shuffled(numbers, seed) for name, numbers in by_split.items()}


def _digest(content: Content, options: Sequence[object]) -> str:
    said = hashlib.sha256(json.dumps([content.stamp, *options]).encode())
    said.update("\n".join(content.keys).encode())
    said.update("\n".join(content.classes).encode("utf-8", "surrogateescape"))
    said.update(json.dumps([int(label) for label in content.labels or ()]).encode())
    return said.hexdigest()


def _largest_label(records: Sequence[ShardRecord]) -> int:
    return max((label for record in records for label, _ in record.labels), default=0)


def _cluster_warnings(
    content: Content, plan: Plan, records: Sequence[ShardRecord], shuffle: bool
) -> list[str]:
    warnings = []
    for name, numbers in plan.splits.items():
        if split_clusters(records, name):
            warnings.append(
                f"split {name}: neighbours have the same label far more often than by chance; a run mixes only "
                "near samples: " + ("pack with another seed" if shuffle else "pack again with shuffling")
            )
        elif shuffle and content.labels is not None:
            labels = np.asarray(content.labels)[np.sort(numbers)]
            same = int((labels[1:] == labels[:-1]).sum())
            if labels_cluster(same, len(labels) - 1, Counter(labels.tolist())):
                warnings.append(f"split {name}: the source lies sorted by class; it was shuffled")
    return warnings
