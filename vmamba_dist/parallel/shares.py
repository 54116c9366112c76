"""Tensors in pieces: gathered whole at one owner, one at a time, and dealt out again.

Law: a rank never holds more than its share of the whole tensors, one more, and its own pieces; every rank walks through
the same tensors in the same order. No arithmetic touches a value: what was dealt out is gathered bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How one tensor is cut: rank r holds elements [start, start + length) of the flattened one, perhaps none."""

    shape: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    owner: int  # the rank that holds it whole in a checkpoint

    @property
    def numel(self) -> int:
        return sum(length for _, length in self.cuts)


def choose_owners(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Give each tensor to a rank so that all have nearly the same number of elements: the largest first."""
    held = [0] * world
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = held.index(min(held))
        held[owners[name]] += sizes[name]
    return owners


def contiguous_cuts(start: int, numel: int, part: int, world: int) -> tuple[tuple[int, int], ...]:
    """Cut elements [start, start + numel) of a flat buffer where rank r has [r · part, (r + 1) · part)."""
    cuts = []
    for rank in range(world):
        first = max(start, rank * part)
        last = min(start + numel, (rank + 1) * part)
        cuts.append((first - start, last - first) if last > first else (0, 0))
    return tuple(cuts)


def gather(piece: Tensor, layout: Layout, rank: int) -> Tensor | None:
    """Bring the pieces together on the owner's CPU; None on the other ranks. A collective."""
    start, length = layout.cuts[rank]
    mine = piece.detach()[:length].contiguous()
    if rank != layout.owner:
        _exchange([dist.P2POp(dist.isend, mine, layout.owner)] if length else [])
        return None
    whole = torch.empty(layout.numel, dtype=piece.dtype, device=piece.device)
    whole[start : start + length] = mine
    _exchange([dist.P2POp(dist.irecv, part, other) for other, part in _others(whole, layout, rank)])
    return whole.cpu().view(layout.shape)


def scatter(whole: Tensor | None, piece: Tensor, layout: Layout, rank: int) -> None:
    """Undo `gather`: deal the owner's tensor out into every rank's piece, in place. A collective."""
    start, length = layout.cuts[rank]
    into = piece.detach()[:length]
    if rank != layout.owner:
        _exchange([dist.P2POp(dist.irecv, into, layout.owner)] if length else [])
        return
    assert whole is not None
    flat = whole.detach().to(piece.device).reshape(-1)
    _exchange([dist.P2POp(dist.isend, part, other) for other, part in _others(flat, layout, rank)])
    into.copy_(flat[start : start + length])


def _others(whole: Tensor, layout: Layout, rank: int) -> list[tuple[int, Tensor]]:
    """The parts of a whole flat tensor that other ranks hold."""
    return [
        (other, whole[start : start + length])
        for other, (start, length) in enumerate(layout.cuts)
        if length and other != rank
    ]


def _exchange(operations: Sequence[dist.P2POp]) -> None:
    # One batch a tensor: on NCCL it then goes over the group's communicator, not over one for each pair of ranks.
    for work in dist.batch_isend_irecv(list(operations)) if operations else []:
        work.wait()
