"""Where samples to be packed come from: image folders, CSV lists, tars, and what is built in.

Law: listing reads names, sizes and labels, never an image; a sample's bytes are read when its shard is written,
by its number. What a list cannot be right about stops the pack and names its line; what is wrong with one
sample alone leaves that one out, by name. Nothing that comes from data becomes a path to write to.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import sources
from vmamba_dist.data.datasets import digits
from vmamba_dist.data.index import EVAL_SPLITS, INFO, MAX_CLASSES, inside, read_info
from vmamba_dist.data.sources import Fault, LocalSource

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Content:
    """Samples by number 0 … len(keys) - 1."""

    name: str
    classes: tuple[str, ...]  # their names, where they have any
    keys: Sequence[str]
    splits: Sequence[str]  # "" where pack decides
    sizes: NDArray[np.int64]  # bytes of each image, or about so
    load: Callable[[int], tuple[bytes, int] | Fault]  # (image file, label)
    labels: Sequence[int] | None = None  # None: known only when read
    names: Sequence[str] = ()  # what messages call the samples; (): their keys
    num_classes: int = 0  # where there are no names; 0: as many as the largest label says
    stamp: str = ""  # changes when the content may have
    ignored: tuple[str, ...] = ()  # files that are no JPEG, PNG or WebP by name
    damaged: tuple[str, ...] = ()  # what was lost before it had a number


@dataclass(frozen=True)
class Row:
    """A line of a list; `where` names it in a message."""

    where: str
    path: str
    label: str
    split: str


def from_digits() -> Content:
    found = list(digits.digits())
    return Content(
        name="digits",
        classes=tuple(str(n) for n in range(digits.NUM_CLASSES)),
        keys=[key for key, _, _ in found],
        splits=[""] * len(found),
        sizes=np.array([len(png) for _, png, _ in found]),
        labels=[label for _, _, label in found],
        load=lambda number: (found[number][1], found[number][2]),
    )


def from_folder(root: Path) -> Content:
    """List an image folder: a class a folder, or a split a folder and its classes below."""
    tops = _folders(root)
    has_splits = bool(tops) and all(top.name in ("train", *EVAL_SPLITS) for top in tops)
    groups = {top.name: _folders(top) for top in tops} if has_splits else {"": tops}
    classes = sorted({folder.name for folders in groups.values() for folder in folders})
    number = {name: i for i, name in enumerate(classes)}
    files = _Files(root)
    for group, folders in groups.items():
        for folder in folders:
            for name in _below(root, folder):
                if not name.lower().endswith(_SUFFIXES) or not files.add(name, number[folder.name], group):
                    files.ignored.append(name)
    return files.content(root.resolve().name, classes)


def _below(root: Path, folder: Path) -> list[str]:
    """Names of the files below a folder, relative to the root, in the order of their parts; no file is looked at."""
    found = [  # text: a million Path objects take a gigabyte
        f"{prefix}/{name}"
        for place, _, names in os.walk(folder)
        for prefix in (os.path.relpath(place, root),)
        for name in names
    ]
    return sorted(found, key=lambda name: name.split("/"))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def from_csv(path: Path, image_column: str | None, label_column: str | None) -> Content:
    """List the images that a CSV file names. Raises ConfigError naming file, line and fix."""
    columns = (image_column or "path", label_column or "label")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            check_columns(path, columns, reader.fieldnames or ())
            rows = [
                Row(f"line {line}", *(row.get(column) or "" for column in (*columns, "split")))
                for line, row in enumerate(reader, start=2)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return from_rows(path, rows)


def check_columns(path: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raise ConfigError where a list lacks a column."""
    if not set(wanted) <= set(found):
        raise ConfigError(f"{path}: needs the columns {' and '.join(wanted)}, has {', '.join(found)}")


def from_rows(path: Path, rows: Sequence[Row]) -> Content:
    """List the images that a table names, by path relative to the table's folder.

    Raises ConfigError naming file, line and fix.
    """
    labels = sorted({row.label for row in rows})
    if all(re.fullmatch(r"[0-9]{1,9}", label) for label in labels):
        number = {label: int(label) for label in labels}
        largest = max(number.values(), default=-1)
        if largest >= MAX_CLASSES:
            raise ConfigError(f"{path}: label {largest} is beyond {MAX_CLASSES} classes; number them from 0")
        classes = [str(n) for n in range(1 + largest)]
    else:
        number = {label: i for i, label in enumerate(labels)}
        classes = labels
    files = _Files(path.parent)
    for row in rows:
        if not row.path or not row.label:
            raise ConfigError(f"{path}, {row.where}: path {row.path!r}, label {row.label!r}: both are needed")
        if row.split and not re.fullmatch(r"[A-Za-z0-9_]+", row.split):
            raise ConfigError(f"{path}, {row.where}: split {row.split!r}: use letters, digits and _")
        if not row.path.lower().endswith(_SUFFIXES):
            files.ignored.append(row.path)
        elif "\0" in row.path or not files.add(row.path, number[row.label], row.split):
            raise ConfigError(f"{path}, {row.where}: no file {row.path!r}")
    return files.content(path.stem, classes)


class _Files:
    """Image files below a root, listed with one look at each: that is what a list of millions costs."""

    def __init__(self, root: Path) -> None:
        self.ignored: list[str] = []
        self._root = root
        self._names: list[str] = []
        self._labels: list[int] = []
        self._splits: list[str] = []
        self._sizes: list[int] = []
        self._stamp = hashlib.sha256()

    def add(self, name: str, label: int, split: str) -> bool:
        """Add a file; False where there is no regular one."""
        try:
            status = (self._root / name).stat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
            return False
        self._names.append(name)
        self._labels.append(label)
        self._splits.append(split)
        self._sizes.append(status.st_size)
        self._stamp.update(os.fsencode(name) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
        return True

    def content(self, name: str, classes: Sequence[str]) -> Content:
        keys = Keys()
        names, labels, root = self._names, self._labels, self._root
        return Content(
            name=name,
            classes=tuple(classes),
            keys=[keys.new(str(Path(text).with_suffix(""))) for text in names],
            splits=self._splits,
            sizes=np.array(self._sizes, dtype=np.int64),
            labels=labels,
            load=lambda number: ((root / names[number]).read_bytes(), labels[number]),
            names=names,
            stamp=self._stamp.hexdigest(),
            ignored=tuple(self.ignored),
        )


def from_tars(path: Path) -> Content:
    """List the samples of one tar, or of a folder's; with an `_info.json`, by its splits and classes.

    A sample keeps its image and its label (`.cls`, or `.json` with `label`); other members are left behind.
    """
    root = path if path.is_dir() else path.parent
    info: Mapping[str, object] = {}
    files: list[tuple[str, Path]] = [("", path)]
    if path.is_dir():
        files = [("", tar) for tar in sorted(path.glob("*.tar"))]
        if (root / INFO).is_file():
            info = read_info(root, "source")
            files = _listed(root, info)
    splits: list[str] = []
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    damaged: list[str] = []
    for i, (split, tar) in enumerate(files):
        found = sources.scan(tar)
        if not found.whole:
            damaged.append(
                f"{tar.name}: breaks off or has an unreadable header after {len(found.keys)} samples"
            )
        names += found.keys
        splits += [split] * len(found.keys)
        places += [(i, found.bounds[j], found.bounds[j + 1]) for j in range(len(found.keys))]
    classes = tuple(str(name) for name in _list(info.get("classes", ())))
    num_classes = len(classes) or _count(info.get("num_classes"))
    source = LocalSource([tar for _, tar in files])

    def load(number: int) -> tuple[bytes, int] | Fault:
        shard, start, end = places[number]
        sample = sources.samples(source.read(shard, start, end), [0, end - start])[0]
        if isinstance(sample, Fault):
            return sample
        label = sources.parse_label(sample, num_classes or MAX_CLASSES)
        return label if isinstance(label, Fault) else (sample.image, label)

    keys = Keys()
    return Content(
        name=str(info.get("name", "")) or path.resolve().stem,
        classes=classes,
        num_classes=num_classes,
        keys=[keys.new(name) for name in names],
        splits=splits,
        sizes=np.array([end - start for _, start, end in places], dtype=np.int64),
        load=load,
        names=[
            f"{files[i][1].name}[{start}] {name}" for (i, start, _), name in zip(places, names, strict=True)
        ],
        stamp=stamp_of(tar for _, tar in files),
        damaged=tuple(damaged),
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_CLASSES else 0


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _listed(root: Path, info: Mapping[str, object]) -> list[tuple[str, Path]]:
    """The (split, tar) of an index. Raises ConfigError where it names what no set can have."""
    splits = info["splits"]
    assert isinstance(splits, Mapping)  # read_info has looked
    files = []
    for split, entry in splits.items():
        names = entry.get("filenames") if isinstance(entry, Mapping) else None
        if not isinstance(names, list) or not re.fullmatch(r"[A-Za-z0-9_]+", str(split)):
            raise ConfigError(f"{root / INFO}: split {split!r} is not in timm's form")
        for name in map(str, names):
            if not inside(name):
                raise ConfigError(f"{root / INFO}: split {split!r} names files outside its folder")
            if not (root / name).is_file():
                raise ConfigError(f"{root / INFO}: split {split!r} lists {name}, which is missing")
            files.append((str(split), root / name))
    return files


def stamp_of(paths: Iterable[Path]) -> str:
    """Say which files these are, by name, size and time of change."""
    stamp = hashlib.sha256()
    for path in paths:
        status = path.stat()
        stamp.update(os.fsencode(path) + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def clean(text: str) -> str:
    """Keep what is safe in a member's name: no dots (they start the suffix), no folders."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "x"


class Keys:
    """Unique member names of at most 90 characters."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._times: Counter[str] = Counter()

    def new(self, path: str) -> str:
        key = clean(path)
        if len(key) > 80:
            key = ""
        while not key or key in self._seen:
            self._times[path] += 1
            again = f"#{self._times[path]}" if self._times[path] > 1 else ""
            digest = hashlib.blake2b(os.fsencode(path + again), digest_size=6).hexdigest()
            key = f"{clean(path)[:70]}-{digest}"
        self._seen.add(key)
        return key
