"""Bytes of shards, and the samples in them.

Law: a range is read by byte offset, never by passing over what lies before it; what is wrong with a sample
is a value (Fault), the same for every reader; what is wrong with the source itself (an input/output error) is
never one: it is tried again, and raised where it stays. No code runs from data: nothing here unpickles, and a
sample that carries a pickle is a fault.

Local files are read here; `Source` is the seam that object stores (remote.py) and the cache (cache.py) meet.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from webdataset.tariterators import base_plus_ext, group_by_keys

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError, UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PICKLED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"})
BLOCK = 512  # bytes: tar headers and contents start at multiples of it
# What tarfile ends in over a damaged or hostile tar; in memory an OSError is one of them, from a disk it is none.
_DAMAGE = (
    *(tarfile.TarError, ValueError, OverflowError, EOFError, IndexError, KeyError, TypeError),
    *(RecursionError, MemoryError),
)
_TAR_ERRORS = (*_DAMAGE, OSError)
_READ_AT_ONCE = 64 << 20  # an absurd offset costs no more memory than the file has bytes
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(?!\\)")

# A network file system that fails over or remounts mostly answers again within two seconds; longer is for the
# file system's own retries, because all ranks wait meanwhile.
RETRY_AFTER_S = (0.1, 0.4, 1.6)


class SourceError(UserError, OSError):
    """Shards cannot be read, however often that was tried; the message says which, where and why."""


@dataclass(frozen=True)
class Fault:
    """Why a sample cannot be used; key is "" where even that is unknown."""

    reason: str
    key: str = ""


@dataclass(frozen=True)
class Raw:
    """A sample as it lies in its tar."""

    key: str
    image: bytes
    label: bytes
    label_suffix: str  # cls | json


def local_path(address: str) -> Path:
    """Return the folder or file that a config names. Raises ConfigError for addresses that are not local."""
    match = _SCHEME.match(address)
    if match and match[1] == "pipe":
        raise ConfigError(
            f"{redact(address)!r}: pipe: addresses run a shell command and are refused; copy the shards to a "
            "local folder"
        )
    if match and match[1] != "file":
        raise ConfigError(
            f"{redact(address)!r}: {match[1]}: addresses cannot be read here: this needs a local folder"
        )
    return Path(address.removeprefix("file://")).expanduser()


class Source(Protocol):
    """Where shards are read from."""

    @property
    def concurrency(self) -> int:
        """How many threads may read at a time, and gain by it."""

    def read(self, shard: int, start: int, end: int) -> bytes:
        """Read bytes [start, end) of a shard; fewer where it ends before. Raises SourceError once retries failed."""

    def close(self) -> None: ...


class LocalSource:
    """Shards in local files; keeps the few last used ones open. Not for use from several threads.

    A file that is written during the run is a SourceError at once, unless its bytes are still those of its sha256.
    `sizes` and `written` (in ns), where given, are what the files had when the run began. Without them a file is held
    to what it had when it was first opened here, and one with a sha256 to that, where it was written after `since`,
    when the run began.
    """

    concurrency = 1

    def __init__(
        self,
        paths: Sequence[Path],
        max_open: int = 16,
        *,
        sizes: Sequence[int] | None = None,
        written: Sequence[int] | None = None,
        since: int | None = None,
        sha256: Sequence[str] = (),
    ) -> None:
        self._paths = paths
        self._max_open = max_open
        self._sizes = sizes
        self._written = written
        self._since = since
        self._sha256 = sha256
        self._open: OrderedDict[int, int] = OrderedDict()
        self._known: dict[int, tuple[int, int]] = {}  # each file's size, and when it was written

    def read(self, shard: int, start: int, end: int) -> bytes:
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                return self._read(shard, start, end)
            except SourceError:
                raise
            except OSError as error:
                self._forget(shard)  # a descriptor may be stale where the file is not
                if wait_s is None:
                    raise SourceError(
                        f"{self._paths[shard]}: bytes {start} … {end} could not be read in {len(RETRY_AFTER_S) + 1} "
                        f"attempts over {sum(RETRY_AFTER_S):.1f} s; the last one failed with: {error}"
                    ) from error
                log.warning(
                    "%s: bytes %d … %d could not be read (%s); trying again in %.1f s",
                    *(self._paths[shard], start, end, error, wait_s),
                )
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, shard: int, start: int, end: int) -> bytes:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= self._max_open:
                os.close(self._open.popitem(last=False)[1])
            file = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = file
        self._check(shard, file)
        parts = []
        while start < end and (part := os.pread(file, min(end - start, _READ_AT_ONCE), start)):
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, shard: int, file: int) -> None:
        """Raise SourceError where a file is no longer the one that the run began with; one fstat."""
        now = os.fstat(file)
        if shard not in self._known:
            self._known[shard] = self._at_start(shard, now)
        size, written = self._known[shard]
        if (now.st_size, now.st_mtime_ns) == (size, written):
            return
        if now.st_size != size:
            why = f"it has {now.st_size} bytes, and had {size}"
        elif not (self._sha256 and self._sha256[shard]):
            why = "it was written again, and its index has no sha256 to tell whether its content is the same"
        elif _sha256_of(file, size) == self._sha256[shard]:
            self._known[shard] = size, now.st_mtime_ns  # the same bytes, copied or touched
            return
        else:
            why = "its sha256 is not its index's any more"
        raise SourceError(
            f"{self._paths[shard]} has changed: {why}; a run's shards must stay as they are: put the old one back, "
            "or begin a new run"
        )

    def _at_start(self, shard: int, now: os.stat_result) -> tuple[int, int]:
        """What a file had when the run began, as far as that is known."""
        size = now.st_size if self._sizes is None else self._sizes[shard]
        if self._written is not None:
            return size, self._written[shard]
        # A file server's clock may be ahead of this machine's: only a sha256 tells that from a change.
        late = (
            self._since is not None and now.st_mtime_ns > self._since and self._sha256 and self._sha256[shard]
        )
        return size, -1 if late else now.st_mtime_ns

    def _forget(self, shard: int) -> None:
        file = self._open.pop(shard, None)
        if file is not None:
            with suppress(OSError):  # what fails to be read may fail to be closed, and nothing was written
                os.close(file)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _sha256_of(file: int, size: int) -> str:
    digest = hashlib.sha256()
    for at in range(0, size, 1 << 20):
        digest.update(os.pread(file, 1 << 20, at))
    return digest.hexdigest()


def samples(data: bytes, bounds: Sequence[int]) -> list[Raw | Fault]:
    """Read the len(bounds) - 1 samples whose members fill data[bounds[i]:bounds[i+1]].

    Grouped as WebDataset groups them, in one pass; where that finds anything odd, sample by sample, so that a
    damaged sample does not take its neighbours along.
    """
    count = len(bounds) - 1
    if count > 1 and len(data) >= bounds[-1]:
        try:
            found = [_sample(group) for group in _groups(data)]
        except _TAR_ERRORS:
            found = []
        if len(found) == count and all(isinstance(sample, Raw) for sample in found):
            return found
    return [_alone(data, bounds[i], bounds[i + 1]) for i in range(count)]


def _alone(data: bytes, start: int, end: int) -> Raw | Fault:
    if len(data) < end:
        return Fault(f"the tar ends {end - len(data)} bytes too early")
    try:
        groups = list(_groups(data[start:end]))
    except _TAR_ERRORS as error:
        return Fault(f"no readable tar members: {stable(error)}")
    if len(groups) != 1:
        return Fault(f"expected the members of one sample, found {len(groups)}")
    return _sample(groups[0])


def stable(error: BaseException) -> str:
    """Say what went wrong without what differs from process to process: the objects' addresses."""
    return re.sub(r"( @)? ?<[^<>]* at 0x[0-9a-f]+>", "", str(error)).strip()


def _groups(data: bytes) -> Iterator[dict[str, Any]]:
    return group_by_keys(_members(data))  # type: ignore[no-any-return]


def _members(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar in memory. Plain tar alone: a compressed one may unpack to any size."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        while (member := _next(tar)) is not None:
            end = member.offset_data + member.size
            if end > len(data):
                raise tarfile.ReadError("unexpected end of data")
            if member.isreg() and not _is_meta(member.name):
                yield {"fname": member.name, "data": data[member.offset_data : end], "__url__": ""}


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member. Raises ReadError for one that would turn the reader back, or that unpacks to any size."""
    member = tar.next()
    if member is not None and (member.size < 0 or member.offset_data < member.offset):
        raise tarfile.ReadError(f"a member of {member.size} bytes")
    if member is not None and member.issparse():
        raise tarfile.ReadError("a sparse member")
    tar.members = []  # type: ignore[attr-defined]  # keeps memory flat over a large tar
    return member


def _sample(members: dict[str, Any]) -> Raw | Fault:
    key = members["__key__"]
    for suffix in members:
        if suffix.rsplit(".", 1)[-1] in PICKLED:
            return Fault(f"member .{suffix} may hold pickled code and is refused", key)
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        return Fault(f"no image member (.{', .'.join(IMAGE_SUFFIXES)})", key)
    for suffix in ("cls", "json"):
        if suffix in members:
            return Raw(key, image, members[suffix], suffix)
    return Fault("no label member (.cls, .json)", key)


def parse_label(sample: Raw, num_classes: int) -> int | Fault:
    """Read a label: `.cls` holds an integer as text, `.json` an object with an integer `label`."""
    try:
        if sample.label_suffix == "cls":
            text = sample.label.decode("ascii").strip()
            label: object = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text
        else:
            content = json.loads(sample.label)
            label = content.get("label") if isinstance(content, dict) else content
        if not isinstance(label, int) or isinstance(label, bool):
            return Fault(f"label {str(label)[:40]!r} is not an integer", sample.key)
    except (ValueError, RecursionError) as error:  # not text, not JSON, or a number of thousands of digits
        return Fault(f"unreadable label: {error}", sample.key)
    if not 0 <= label < num_classes:
        return Fault(f"label {str(label)[:40]} is outside 0 … {num_classes - 1}", sample.key)
    return label


@dataclass(frozen=True)
class Scan:
    """What the headers of a tar say."""

    bounds: list[int]  # byte offset of each sample's first header, then the end of the last sample
    keys: list[str]
    whole: bool  # false where the tar breaks off or a header is unreadable


def scan(path: Path) -> Scan:
    """Find the samples of a tar in one pass over its headers; contents are skipped, not read."""
    with path.open("rb") as file:
        return scan_tar(file, path.stat().st_size)


def scan_tar(
    file: IO[bytes], size: int, visit: Callable[[tarfile.TarFile, tarfile.TarInfo], None] | None = None
) -> Scan:
    """Find the samples of an open tar of `size` bytes; `visit` is shown each member, and may read it."""
    bounds: list[int] = []
    keys: list[str] = []
    most = -(-size // BLOCK) * BLOCK  # where a member ends that says it is longer
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while end <= size and (member := _next(tar)) is not None:
                if visit is not None:
                    visit(tar, member)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                key, _ = base_plus_ext(member.name)
                if member.isreg() and key is not None and not _is_meta(member.name) and [key] != keys[-1:]:
                    bounds.append(member.offset)
                    keys.append(key)
    except _DAMAGE:
        return Scan([*bounds, min(end, most)], keys, whole=False)
    if end > most:
        return Scan([*bounds, most], keys, whole=False)
    file.seek(end)
    return Scan([*bounds, end], keys, whole=file.read(BLOCK) == bytes(BLOCK))


def _is_meta(name: str) -> bool:
    return re.match(r"__[^/]*__($|/)", name) is not None  # what WebDataset's reader passes over
