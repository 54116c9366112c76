"""What the headers of a tar say, wherever it lies.

Law: a scan reads headers and labels; what lies between them is passed over where that saves time. A store answers
a request in the time of some hundred kB, so small gaps are read through and large ones are jumped.
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from vmamba_dist.data.sources import Raw, parse_label, scan_tar

_AHEAD = 1 << 21  # bytes of a request where headers lie close together: it doubles up to this
_JUMP = 1 << 16  # bytes of the first request and after a jump: a header, mostly its label and the next header
_GAP = 1 << 20  # bytes that are cheaper to read than to jump
_MOST_LABEL = 1 << 16  # bytes; a larger member is no label


@dataclass(frozen=True)
class Contents:
    """A shard's samples and labels."""

    bounds: list[int]  # byte offset of each sample's first header, then the end of the last sample
    labels: NDArray[np.uint32]  # those that can be read, as they lie
    whole: bool  # false where the tar breaks off or a header is unreadable

    @property
    def num_samples(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_classes(self) -> int:
        """1 + the largest label; 0 where there is none."""
        return 1 + int(self.labels.max()) if len(self.labels) else 0


def scan_shard(file: IO[bytes], size: int) -> Contents:
    """Find the samples and labels of an open tar of `size` bytes."""
    labels = array("I")
    last = None

    def visit(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        nonlocal last
        key, suffix = base_plus_ext(member.name)
        if suffix not in ("cls", "json") or not member.isreg() or member.size > _MOST_LABEL:
            return
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        label = parse_label(Raw("", b"", content.read(), suffix), 2**31)
        if isinstance(label, int):  # what is none is the reader's to tell, sample by sample
            if key != last:
                labels.append(label)
            elif suffix == "cls":  # a sample with both has this one's
                labels[-1] = label
            last = key

    found = scan_tar(file, size, visit)
    bounds = found.bounds if found.keys else [0]
    return Contents(bounds, np.array(labels, dtype=np.uint32), found.whole)


class RangeFile(io.RawIOBase):
    """A seekable file over reads of ranges; keeps one window of them."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._at = 0
        self._start = 0
        self._window = b""
        self._length = _JUMP // 2

    def as_file(self) -> IO[bytes]:
        return cast("IO[bytes]", self)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        parts = []
        while self._at < end:
            if not self._start <= self._at < self._start + len(self._window):
                self._fill()
            part = self._window[self._at - self._start : end - self._start]
            if not part:
                break
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def _fill(self) -> None:
        """Read the window at the place; read on from the last one where the gap between is small."""
        ahead = self._at - (self._start + len(self._window))
        self._length = min(2 * self._length, _AHEAD) if 0 <= ahead <= _GAP else _JUMP
        self._window = self._read(self._at, min(self._at + self._length, self._size))
        self._start = self._at
