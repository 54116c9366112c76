"""What a checkpoint's tensors consist of, which rank writes what, and copies of it that training cannot change.

Law: every element is written once, by a rank that holds it, and who that is follows from what the ranks hold. A
staged copy is what the tensor was when it was staged, whatever becomes of the tensor.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vmamba_dist.checkpoint.store import CheckpointError

_ALIGN = 64  # bytes: a cache line


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor; the whole of it where nothing is sharded."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def whole(name: str, shape: Sequence[int], dtype: torch.dtype) -> Chunk:
    """The chunk that is all of a tensor."""
    return Chunk(name, tuple(shape), (0,) * len(shape), tuple(shape), dtype)


Part = tuple[Chunk, Tensor]  # a chunk, and the memory that it is in on this rank
Known = dict[str, tuple[object, Chunk]]  # by tensor: what its chunk followed from, and the chunk


def held(tensors: Mapping[str, Tensor], known: Known) -> list[Part]:
    """This rank's part of every tensor, sharing its memory; a shard may have no elements.

    `known` keeps the chunks for the next call: to ask a DTensor for its place costs 70 µs, with training waiting.
    """
    parts = []
    for name, tensor in tensors.items():
        own = tensor.detach()
        if isinstance(own, DTensor):
            local = own.to_local()
            facts: object = (own.shape, own.dtype, own.device_mesh, own.placements)
        else:
            local, facts = own, (own.shape, own.dtype)
        if name not in known or known[name][0] != facts:
            known[name] = (facts, _chunk(name, own))
        parts.append((known[name][1], local))
    return parts


def _chunk(name: str, tensor: Tensor) -> Chunk:
    if not isinstance(tensor, DTensor):
        return whole(name, tensor.shape, tensor.dtype)
    (place,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Chunk(name, tuple(tensor.shape), tuple(place.offsets), tuple(place.sizes), tensor.dtype)


def deal(holdings: Sequence[Iterable[Chunk]]) -> list[list[Chunk]]:
    """Give each chunk to one of the ranks that hold it, so that all write about as many bytes."""
    holders: dict[Chunk, list[int]] = {}
    for rank, chunks in enumerate(holdings):
        for chunk in chunks:
            holders.setdefault(chunk, []).append(rank)
    _check_cover(holders)
    dealt: list[list[Chunk]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    # What only one rank holds first, then the largest first; equals by name, so that the deal is a function.
    order = sorted(holders, key=lambda c: (len(holders[c]) > 1, -c.nbytes, c.name, c.offsets))
    for chunk in order:
        rank = min(holders[chunk], key=load.__getitem__)
        dealt[rank].append(chunk)
        load[rank] += chunk.nbytes
    return dealt


def _check_cover(chunks: Iterable[Chunk]) -> None:
    """Assert that the chunks of each tensor are as many elements as it has."""
    covered: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in chunks:
        covered[chunk.name] = covered.get(chunk.name, 0) + math.prod(chunk.sizes)
        assert shapes.setdefault(chunk.name, chunk.shape) == chunk.shape, f"{chunk.name} has two shapes"
    for name, count in covered.items():
        assert count == math.prod(shapes[name]), f"{name}: the ranks hold {count} elements of {shapes[name]}"


class Staging:
    """One stretch of the host's memory that copies are kept in: allocated once, used for every save.

    Never shared with forked readers, since a write to shared pages would copy them anew, and pinned for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: mmap.mmap | None = None
        self._chunks: list[Chunk] = []
        self._buffers: list[Tensor] = []  # in the order of the chunks
        self._warming: threading.Thread | None = None
        self._pinned = 0  # address, 0 for none
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._arena is None else len(self._arena)

    def reserve(self, chunks: list[Chunk]) -> None:
        """Make the memory for these ready in the background: its first touch takes longer than a copy."""
        if self._lay_out(chunks):
            self._warming = threading.Thread(target=self._warm, name="memory for checkpoints")
            self._warming.start()

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """Copy the parts; the copies hold until the next call. On a GPU, `wait` before reading them.

        The copies are queued on the current stream, so what training queues after this cannot change them.
        """
        chunks = [chunk for chunk, _ in parts]
        if chunks != self._chunks:
            self._lay_out(chunks)
        self._join()
        if self._device.type == "cuda" and self._arena is not None and not self._pinned:
            self._pin()
        with torch.no_grad():
            for buffer, (_, tensor) in zip(self._buffers, parts, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self._device))
        return list(zip(chunks, self._buffers, strict=True))

    def wait(self) -> None:
        """Return when the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """Give the memory back, once nothing uses the copies."""
        self._join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)  # type: ignore[no-untyped-call]
        self._pinned, self._chunks, self._buffers, self._arena = 0, [], [], None

    def _lay_out(self, chunks: list[Chunk]) -> bool:
        """Give each chunk its place; whether that took new memory."""
        starts, end = [], 0
        for chunk in chunks:
            starts.append(end)
            end += -(-chunk.nbytes // _ALIGN) * _ALIGN
        self._chunks, self._buffers = [], []
        grows = end > self.nbytes
        if grows:
            self.release()
            self._arena = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._arena.madvise(mmap.MADV_DONTFORK)
        self._chunks = chunks
        self._buffers = [self._buffer(chunk, start) for chunk, start in zip(chunks, starts, strict=True)]
        return grows

    def _buffer(self, chunk: Chunk, start: int) -> Tensor:
        count = math.prod(chunk.sizes)
        if not count:
            return torch.empty(chunk.sizes, dtype=chunk.dtype)
        assert self._arena is not None
        # Its own storage, of its own length: a view of a longer one would be copied again to be written.
        return torch.frombuffer(self._arena, dtype=chunk.dtype, count=count, offset=start).view(chunk.sizes)

    def _warm(self) -> None:
        if self._device.type == "cuda":
            with suppress(CheckpointError):  # a save tries again, and tells
                self._pin()
        else:
            assert self._arena is not None
            torch.frombuffer(self._arena, dtype=torch.uint8).zero_()  # without Python's lock

    def _join(self) -> None:
        if self._warming is not None:
            self._warming.join()
            self._warming = None

    def _pin(self) -> None:
        assert self._arena is not None
        torch.cuda.set_device(self._device)  # a new thread's is the first, somebody else's
        address = torch.frombuffer(self._arena, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, self.nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            raise CheckpointError(
                f"{self.nbytes / 2**30:.1f} GiB of the host's memory for checkpoints cannot be pinned (CUDA error "
                f"{code}); free some, or set checkpoint.async_save=false, which needs none"
            )
        self._pinned = address
