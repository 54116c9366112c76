"""Sets of shards by their address: a folder, a web address, s3://bucket/prefix, or a pattern of tars.

Law: what a set holds is known before the run begins, and is the same for all ranks. A set without an index gets
one, made of its tars' headers, once for all ranks, and kept: in the run directory, and beside the shards when
asked. Whoever comes while it is being made waits at its flock. A kept index belongs to the list of shards that it
was made of, and where that has changed it is made anew.

What a shard is known by, its size and a tag (ETag, or when it was written), is found before the run begins too, so
that a reader sees a change that came before its first look. A store that lists is asked for a list, of a thousand
shards a request; one that does not is asked for each shard, where they are few enough.
"""

from __future__ import annotations

import atexit
import dataclasses
import fcntl
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError, DataConfig
from vmamba_dist.data.cache import Cache, CachedSource, Entry
from vmamba_dist.data.index import (
    EVAL_SPLITS,
    INFO,
    PACKING,
    Column,
    Index,
    Listed,
    Offsets,
    Shard,
    TarScan,
    fingerprint_of,
    known_classes,
    look_at,
    parse_info,
    read_split,
    scan_tars,
    write_whole,
)
from vmamba_dist.data.remote import CONCURRENCY, Fetcher, Item, Patience, RemoteSource, Store, Web
from vmamba_dist.data.sidecar import open_index
from vmamba_dist.data.sources import LocalSource, Source, SourceError, local_path
from vmamba_dist.data.tarscan import Contents, RangeFile, scan_shard
from vmamba_dist.data.writer import labels_cluster

log = logging.getLogger(__name__)

_MOST_SHARDS = 10_000_000  # of a pattern: a slip like {0..99999999999} is told before it fills the memory
_MOST_LOOKS = 1024  # shards of a store without a list: 3 s where an answer takes 50 ms
_STALE_S = 24 * 3600.0  # of what a killed process was making: the headers of a million tars take hours
_SPLITS = ("train", *EVAL_SPLITS)
_NOTED = "noted.json"  # of a kept index: number of classes, and each shard's size and tag when it was made
_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class ListingStore(Store, Protocol):
    """A store that can be listed and written: s3.S3."""

    def list(self, address: str, beginning: str = "") -> Iterator[Item]: ...

    def write(self, address: str, data: bytes) -> None: ...


class Folder(Protocol):
    """A place that shards lie in."""

    address: str  # as it is told
    parallel: int  # so many files are worth opening at a time

    @property
    def is_listed(self) -> bool:
        """Whether it can be asked what it holds."""

    def tars(self) -> list[Item]:
        """List its tars, where it is listed."""

    def look(self, name: str) -> Item | None:
        """Find a file; None where there is none."""

    def find_listed(self, names: Sequence[str]) -> list[Item | None] | None:
        """Find many files by a list; None where looking at each is the way."""

    def load(self, item: Item) -> bytes:
        """Read a small file whole."""

    def open(self, item: Item) -> IO[bytes]: ...

    def write(self, name: str, content: bytes) -> None: ...

    def name_of(self, item: Item) -> str:
        """The item's name, relative to the folder."""

    def source(self, items: Sequence[Item]) -> Source:
        """Return a reader of the items' bytes, for one process."""

    def close(self) -> None: ...


class LocalFolder:
    """A folder of this machine, or of a file system that it has mounted."""

    parallel = 8  # reading headers waits for a network file system, and takes the interpreter's lock else
    is_listed = True

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.address = str(root)

    def tars(self) -> list[Item]:
        found = (self.look(path.name) for path in sorted(self.root.glob("*.tar")))
        return [item for item in found if item is not None]

    def look(self, name: str) -> Item | None:
        path = self.root / name
        found = look_at(path)
        return None if found is None else Item(str(path), found[0], str(found[1]))

    def find_listed(self, names: Sequence[str]) -> None:
        return None

    def load(self, item: Item) -> bytes:
        return Path(item.address).read_bytes()

    def open(self, item: Item) -> IO[bytes]:
        return Path(item.address).open("rb")

    def write(self, name: str, content: bytes) -> None:
        try:
            write_whole(self.root / name, content)
        except OSError as error:
            raise ConfigError(
                f"data.keep_index=beside: {self.address} cannot be written ({error.strerror}); use run"
            ) from error

    def name_of(self, item: Item) -> str:
        return str(Path(item.address).relative_to(self.root))

    def source(self, items: Sequence[Item]) -> Source:
        return LocalSource(
            [Path(item.address) for item in items],
            sizes=[item.size or 0 for item in items],
            written=[int(item.tag) for item in items],
        )

    def close(self) -> None: ...


class StoreFolder:
    """A web address, or a prefix of a bucket."""

    parallel = CONCURRENCY

    def __init__(self, root: str, store: Store, patience: Patience) -> None:
        self.root = root
        self.address = redact(root)
        self._store = store
        self._patience = patience
        self._fetcher = Fetcher(store, patience)

    @property
    def is_listed(self) -> bool:
        return not isinstance(self._store, Web)

    def tars(self) -> list[Item]:
        return [
            item
            for item in cast("ListingStore", self._store).list(self.root)
            if item.address.endswith(".tar")
        ]

    def look(self, name: str) -> Item | None:
        return self._fetcher.look(f"{self.root}/{name}")

    def find_listed(self, names: Sequence[str]) -> list[Item | None] | None:
        below: dict[str, list[str]] = {}
        for name in names:
            folder, _, last = name.rpartition("/")
            below.setdefault(folder, []).append(last)
        if not self.is_listed or len(names) <= self.parallel * len(below):
            return None
        wanted = {f"{self.root}/{name}" for name in names}
        found = {}
        try:
            for folder, own in below.items():
                address = f"{self.root}/{folder}" if folder else self.root
                for item in cast("ListingStore", self._store).list(address, _beginning(own)):
                    if item.address in wanted:
                        found[item.address] = item
        except SourceError as error:  # who may read what lies there need not be allowed to list it
            log.info("%s: its %d shards are looked at one by one", error, len(names))
            return None
        return [found.get(f"{self.root}/{name}") for name in names]

    def load(self, item: Item) -> bytes:
        return self._fetcher.read(item, 0, item.size or 0)

    def open(self, item: Item) -> IO[bytes]:
        return RangeFile(lambda start, end: self._fetcher.read(item, start, end), item.size or 0).as_file()

    def write(self, name: str, content: bytes) -> None:
        cast("ListingStore", self._store).write(f"{self.root}/{name}", content)

    def name_of(self, item: Item) -> str:
        return item.address.removeprefix(f"{self.root}/")

    def source(self, items: Sequence[Item]) -> Source:
        return RemoteSource(items, self._store, self._patience)

    def close(self) -> None:
        self._fetcher.close()


class Places:
    """The places of a run's sets: what lies in one is looked up once, for training and for evaluation."""

    def __init__(self, data: DataConfig, keep: str | Path) -> None:
        """`keep` is the folder of kept indices, made if needed."""
        self._data = data
        self._keep = Path(keep)
        self._known: dict[str, _Place] = {}

    def open(self, address: str, split: str, *, key: str = "data.train") -> Index:
        """Find a set and return one split of it, checked.

        Raises ConfigError, naming `key`, for what no run could be right about; SourceError where a store fails.
        """
        data, named = self._data, f"{key}={redact(address)!r}"
        if address not in self._known:
            self._known[address] = _Place(*_locate(address, data, key))
        place = self._known[address]
        with closing(place.folder):
            if place.names is None and isinstance(place.folder, LocalFolder) and not _is_bare(place.folder):
                index = open_index(place.folder.address, split, key=key, scan=_keeping(self._keep))
                items: Sequence[Item] = _items_of(index)
            else:
                index, items = _open_kept(place, split, data, self._keep, named)
        opener = index.opener or index.source
        if data.cache_dir:
            cache = Cache(Path(data.cache_dir).expanduser(), int(data.cache_gib * (1 << 30)))
            shards = index.shards

            def entry(i: int) -> Entry:
                item = items[i]
                return Entry(item.address, item.size or 0, shards[i].sha256, item.tag)

            entries = Column(len(shards), entry)
            return dataclasses.replace(index, opener=lambda: CachedSource(opener(), cache, entries))
        return index


def open_set(
    address: str, split: str, *, data: DataConfig, keep: str | Path, key: str = "data.train"
) -> Index:
    """Open one set; as Places.open."""
    return Places(data, keep).open(address, split, key=key)


class _Place:
    """An address, and what lies there."""

    def __init__(self, folder: Folder, names: list[str] | None) -> None:
        self.folder = folder
        self.names = names  # of its shards, where the address is a pattern
        self._items: list[Item] = []

    @cached_property
    def info(self) -> Item | None:
        """The set's index; None where it has none."""
        return self.folder.look(INFO) if self.names is None else None

    def tars(self, named: str) -> list[Item]:
        """Find the tars of a set without an index. Raises ConfigError where there are none, or some are missing."""
        if not self._items:
            self._items = self._list(named) if self.names is None else _find(self.folder, self.names, named)
        return self._items

    def _list(self, named: str) -> list[Item]:
        if not self.folder.is_listed:
            raise ConfigError(
                f"{named} has no {INFO}, and a web server cannot be asked what else it has: give a pattern, like "
                f"{self.folder.address}/name-{{000000..000099}}.tar"
            )
        items = self.folder.tars()
        if not items:
            raise ConfigError(f"{named} has neither an {INFO} nor tars; make a set with: vmamba shards pack")
        return items


def _items_of(index: Index) -> Sequence[Item]:
    """The files of a local set, as the cache must know them: a time tells two of one size apart."""

    def item(i: int) -> Item:
        shard = index.shards[i]
        path = index.root / shard.filename
        size = index.sizes[i] if index.sizes else shard.num_bytes  # a sidecar has looked at no tar
        if shard.sha256:
            return Item(str(path), size)
        if index.written:
            return Item(str(path), size, str(index.written[i]))
        found = look_at(path)
        return Item(str(path), size, "" if found is None else str(found[1]))

    return Column(len(index.shards), item)


def _locate(address: str, data: DataConfig, key: str) -> tuple[Folder, list[str] | None]:
    """Return the folder that an address means, and the names in it where the address is a pattern."""
    kind = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    scheme = kind[1].lower() if kind else ""
    if scheme in ("", "file"):
        address = str(local_path(address))
    elif scheme not in ("http", "https", "s3"):
        raise ConfigError(
            f"{key}={redact(address)!r}: {scheme}:// addresses cannot be read; use a folder, https:// or s3://"
        )
    names = None
    root = address.rstrip("/") or "/"
    if "{" in address or address.endswith(".tar"):
        paths = _expand(address, key)
        if scheme in ("", "file"):
            paths = [str(Path(path).absolute()) for path in paths]
        root = _common_folder(paths)
        names = [path[len(root) + 1 :] for path in paths]
    if scheme in ("", "file"):
        return LocalFolder(Path(root)), names
    store = Web() if scheme != "s3" else open_s3(data.s3.endpoint_url, data.read_timeout_s)
    return StoreFolder(
        root, store, Patience(data.read_timeout_s, data.read_attempts, data.max_failures)
    ), names


def open_s3(endpoint_url: str, timeout_s: float) -> ListingStore:
    """Return the environment's S3. Raises ConfigError where boto3 is not installed."""
    try:
        module = importlib.import_module("vmamba_dist.data.s3")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"s3:// addresses need boto3 ({error}); install it with: pip install 'vmamba-dist[s3]'"
        ) from error
    return cast("ListingStore", module.S3(endpoint_url, timeout_s))


def _expand(pattern: str, key: str) -> list[str]:
    """x-{000..002}.tar → x-000.tar, x-001.tar, x-002.tar."""
    told = f"{key}={redact(pattern)!r}"
    ranges = [abs(int(a) - int(b)) for a, b in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)]
    if max(ranges, default=0) > _MOST_SHARDS:  # before it is written out
        raise ConfigError(f"{told} names more than {_MOST_SHARDS} shards")
    try:
        paths = list(itertools.islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise ConfigError(f"{told}: {error}; write …/name-{{000000..000099}}.tar") from error
    if len(paths) > _MOST_SHARDS:
        raise ConfigError(f"{told} names more than {_MOST_SHARDS} shards")
    wrong = next((path for path in paths if not path.endswith(".tar")), None)
    if wrong is not None:
        raise ConfigError(f"{told}: a pattern names tars, and {redact(wrong)!r} is none")
    if len(set(paths)) < len(paths):
        raise ConfigError(f"{told} names a shard twice")
    return paths


def _common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that all paths lie in."""
    split = [path.split("/")[:-1] for path in paths]
    return "/".join(
        level[0]
        for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*split, strict=False))
    )


def _beginning(names: Sequence[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(letter for letter, _ in same)


def _open_kept(
    place: _Place, split: str, data: DataConfig, keep: Path, named: str
) -> tuple[Index, list[Item]]:
    """Open a set through its kept index, which is fetched or made where it is not there yet."""
    folder, info = place.folder, place.info
    if info is not None:
        facts: list[object] = [split, info.size, info.tag]

        def make(at: Path) -> None:
            _fetch_index(folder, info, split, at, named)
    else:
        items = place.tars(named)
        facts = [[folder.name_of(item), item.size, item.tag] for item in items]
        if data.keep_index == "beside" and (place.names is not None or not folder.is_listed):
            raise ConfigError(
                f"{named}: data.keep_index=beside needs a folder or s3://bucket/prefix, where an index can be "
                "written for all its shards; use run"
            )

        def make(at: Path) -> None:
            _make_index(folder, items, at, named)
            if data.keep_index == "beside":
                for sidecar in at.glob("_offsets-*.bin"):
                    folder.write(sidecar.name, sidecar.read_bytes())
                folder.write(INFO, (at / INFO).read_bytes())

    at = _kept(keep, [_NOTED, folder.address, facts], make)
    content = parse_info((at / INFO).read_bytes(), str(at / INFO))
    listed = read_split(content, split, named=named, file=f"{folder.address}/{INFO}")
    noted = json.loads((at / _NOTED).read_bytes())
    found = [
        Item(f"{_root_of(folder)}/{shard.filename}", *noted["files"][shard.filename])
        for shard in listed.shards
    ]
    listed = _sized(listed, found)
    offsets = Offsets.read(at / f"_offsets-{listed.split}.bin", listed.fingerprint())
    if offsets is None:
        raise ConfigError(f"{at} is no whole index any more; remove the folder, and it is made anew")
    for warning in listed.warnings:
        log.warning("%s", warning)
    is_local = isinstance(folder, LocalFolder)
    index = Index(
        root=folder.root if isinstance(folder, LocalFolder) else at,
        name=listed.name or Path(folder.address).name,
        split=listed.split,
        shards=listed.shards,
        num_classes=listed.num_classes or noted["num_classes"],
        class_names=listed.class_names,
        offsets=offsets,
        warnings=listed.warnings,
        address="" if is_local else folder.address,
        opener=lambda: folder.source(found),
    )
    return index, found


def _root_of(folder: Folder) -> str:
    return str(folder.root)  # type: ignore[attr-defined]


def _sized(listed: Listed, items: Sequence[Item]) -> Listed:
    """Give shards the sizes of their files where their index has none: so a set is the same by every address."""
    shards = tuple(shard.of_size(item.size) for shard, item in zip(listed.shards, items, strict=True))
    return dataclasses.replace(listed, shards=shards)


def _find(folder: Folder, names: Sequence[str], named: str) -> list[Item]:
    """Find shards by their names. Raises ConfigError where some are missing."""
    found = folder.find_listed(names)
    return _find_each(folder, names, named) if found is None else _all_there(found, names, named)


def _find_each(folder: Folder, names: Sequence[str], named: str) -> list[Item]:
    return _all_there(_in_parallel(folder.look, names, folder.parallel), names, named)


def _all_there(found: Sequence[Item | None], names: Sequence[str], named: str) -> list[Item]:
    missing = [name for name, item in zip(names, found, strict=True) if item is None]
    if missing:
        raise ConfigError(
            f"{named}: {len(missing)} of its {len(names)} shards are missing, first {missing[0]}"
        )
    return [item for item in found if item is not None]


def _fetch_index(folder: Folder, info: Item, split: str, at: Path, named: str) -> None:
    """Copy a set's index to `at`, with one split's offsets, which are made where the set has none."""
    content = folder.load(info)
    write_whole(at / INFO, content)
    listed = read_split(parse_info(content, info.address), split, named=named, file=redact(info.address))
    items = _note_shards(folder, listed, named)
    for shard, item in zip(listed.shards, items, strict=True):
        if shard.num_bytes not in (None, item.size):
            raise ConfigError(
                f"{redact(item.address)} has {item.size} bytes, its index says {shard.num_bytes}: they are not of one "
                "set; pack or copy it again"
            )
    listed = _sized(listed, items)
    sidecar = at / f"_offsets-{listed.split}.bin"
    num_classes = listed.num_classes
    if not _fetch_offsets(folder, listed, sidecar) or not num_classes:
        log.info(
            "%s lacks offsets or classes for split %s: reading the headers of its tars",
            folder.address,
            listed.split,
        )
        contents = _scan(folder, items)
        for shard, item, found in zip(listed.shards, items, contents, strict=True):
            if found.num_samples != shard.num_samples:
                raise ConfigError(
                    f"{redact(item.address)} has {found.num_samples} samples, its index says {shard.num_samples}: "
                    "they are not of one set; pack again"
                )
        Offsets.of([found.bounds for found in contents]).write(sidecar, listed.fingerprint())
        counted = max((found.num_classes for found in contents), default=0)
        num_classes = known_classes(num_classes or counted, redact(info.address))
    _note(folder, items, num_classes, at)


def _note_shards(folder: Folder, listed: Listed, named: str) -> list[Item]:
    """Find the shards of a set with an index: what is known of them when the run begins.

    Those of a store without a list that are too many to be looked at have the sizes of the index, and no tags: each
    reader then holds them to what it first sees.
    """
    names = [shard.filename for shard in listed.shards]
    found = folder.find_listed(names)
    if found is not None:
        return _all_there(found, names, named)
    if len(names) <= _MOST_LOOKS or any(shard.num_bytes is None for shard in listed.shards):
        return _find_each(folder, names, named)
    return [Item(f"{_root_of(folder)}/{shard.filename}", shard.num_bytes) for shard in listed.shards]


def _fetch_offsets(folder: Folder, listed: Listed, to: Path) -> bool:
    """Copy a set's offsets; false where it has none that are its index's."""
    found = folder.look(to.name)
    if found is None:
        return False
    write_whole(to, folder.load(found))
    offsets = Offsets.read(to, listed.fingerprint())
    return offsets is not None and offsets.lengths.tolist() == [s.num_samples for s in listed.shards]


def _note(folder: Folder, items: Sequence[Item], num_classes: int, at: Path) -> None:
    """Write what Index does not hold: it is of this place, and of now, where a set's own index may be copied."""
    files = {folder.name_of(item): [item.size, item.tag] for item in items}
    write_whole(at / _NOTED, json.dumps({"num_classes": num_classes, "files": files}).encode())


def _keeping(keep: Path) -> TarScan:
    """Return a scan of a local set's tars that is done once for all ranks and starts, and kept."""

    def scan(
        root: Path, split: str, shards: Sequence[Shard], found: Sequence[tuple[int, int]]
    ) -> tuple[Offsets, int]:
        fingerprint = fingerprint_of(shards)
        name = f"_offsets-{split}.bin"

        def make(at: Path) -> None:
            offsets, num_classes = scan_tars(root, split, shards, found)
            offsets.write(at / name, fingerprint)
            write_whole(at / _NOTED, json.dumps({"num_classes": num_classes}).encode())

        at = _kept(keep, [_NOTED, str(root.absolute()), split, fingerprint, *found], make)
        offsets = Offsets.read(at / name, fingerprint)
        if offsets is None:
            raise ConfigError(f"{at} is no whole index any more; remove the folder, and it is made anew")
        return offsets, int(json.loads((at / _NOTED).read_bytes())["num_classes"])

    return scan


def _make_index(folder: Folder, items: Sequence[Item], at: Path, named: str) -> None:
    """Read the headers of a set's tars, and write its index to `at`. Splits are told by the shards' names."""
    log.info("%s has no %s: reading the headers of %d tars", folder.address, INFO, len(items))
    contents = _scan(folder, items)
    num_classes = max(content.num_classes for content in contents)
    if not num_classes:
        raise ConfigError(f"{named}: no sample has a label (.cls, or .json with an integer `label`)")
    for item, content in zip(items, contents, strict=True):
        if not content.whole:
            log.warning(
                "DAMAGED SHARD %s: it breaks off, or has an unreadable header, after %d samples; what follows is lost",
                *(redact(item.address), content.num_samples),
            )
    splits: dict[str, Any] = {}
    clustered = []
    for split in sorted({split_of(folder.name_of(item)) for item in items}):
        chosen = [i for i, item in enumerate(items) if split_of(folder.name_of(item)) == split]
        if _sorted_by_label([contents[i].labels for i in chosen]):
            clustered.append(split)
        shards = [Shard(folder.name_of(items[i]), contents[i].num_samples, items[i].size, "") for i in chosen]
        splits[split] = {
            "name": split,
            "filenames": [shard.filename for shard in shards],
            "shard_lengths": [shard.num_samples for shard in shards],
            "num_samples": sum(shard.num_samples for shard in shards),
            "bytes": [shard.num_bytes for shard in shards],
        }
        offsets = Offsets.of([contents[i].bounds for i in chosen])
        listed = Listed("", split, tuple(shards), num_classes, ())
        offsets.write(at / f"_offsets-{split}.bin", listed.fingerprint())
    info = {
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.address.rpartition("/")[2]),
        "num_classes": num_classes,
        "clustered": clustered,
        "splits": splits,
    }
    write_whole(at / INFO, json.dumps(info, indent=1).encode())
    _note(folder, items, num_classes, at)


def _sorted_by_label(shards: Sequence[NDArray[np.uint32]]) -> bool:
    """Tell whether neighbours share their label more often than in a shuffled set."""
    same = sum(int((labels[1:] == labels[:-1]).sum()) for labels in shards)
    values, counts = np.unique(np.concatenate(shards), return_counts=True)
    pairs = sum(max(0, len(labels) - 1) for labels in shards)
    return labels_cluster(same, pairs, dict(zip(values.tolist(), counts.tolist(), strict=True)))


def split_of(name: str) -> str:
    """Tell the split of a shard by the words of its name; train where none of them is one."""
    words = re.split(r"[^A-Za-z]+", name.lower())
    return next((word for word in reversed(words) if word in _SPLITS), "train")


def _scan(folder: Folder, items: Sequence[Item]) -> list[Contents]:
    def scan(item: Item) -> Contents:
        with folder.open(item) as file:
            return scan_shard(file, item.size or 0)

    return _in_parallel(scan, items, folder.parallel)


def _in_parallel(function: Callable[[_Part], _Result], parts: Sequence[_Part], threads: int) -> list[_Result]:
    """Map in threads, in order; the first error ends it, and nothing that has not begun is begun then."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))


def _kept(keep: Path, key: object, make: Callable[[Path], None]) -> Path:
    """Return the folder that is kept for a key, made by make(folder) where it is not there; whole or not at all."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    try:
        keep.mkdir(parents=True, exist_ok=True)
        lock = os.open(keep / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        keep = Path(tempfile.mkdtemp(prefix="vmamba-index-"))
        atexit.register(shutil.rmtree, keep, ignore_errors=True)
        log.warning("the index cannot be kept in its folder (%s); it is in %s for now", error, keep)
        lock = os.open(keep / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    folder = keep / name
    with _locked(lock):
        if not folder.is_dir():
            for left in keep.glob(f"{name}.*.tmp"):
                # A young one may be another rank's at work: not every file system's locks reach other machines.
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > _STALE_S:
                        shutil.rmtree(left, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".tmp", dir=keep))
            beside.chmod(0o755)
            make(beside)
            try:
                beside.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another rank has made the same, where there are no locks
                    raise
                shutil.rmtree(beside)
    return folder


def _is_bare(folder: LocalFolder) -> bool:
    """Tell whether a folder has tars, and neither an index nor a pack that was interrupted."""
    if (folder.root / INFO).exists() or (folder.root / PACKING).exists():
        return False
    return any(folder.root.glob("*.tar"))


@contextmanager
def _locked(lock: int) -> Iterator[None]:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: at worst several ranks make the same index
            log.warning("no flock in the folder of kept indices (%s)", error)
        yield
    finally:
        os.close(lock)
