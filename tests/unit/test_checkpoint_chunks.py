"""Who writes what, and copies that stay: pure, with plain numbers and one process."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba_dist.checkpoint.chunks import Chunk, Staging, deal, held, whole

FLOAT = torch.float32


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sets(st.integers(0, 4), min_size=1)), max_size=30),
    st.integers(0, 4),
)
def test_each_chunk_goes_to_one_rank_that_holds_it(tensors: list[tuple[int, set[int]]], nobody: int) -> None:
    """`tensors`: rows, and the ranks that have it; whoever is `nobody` has nothing."""
    chunks = [whole(f"t{i}", (rows, 3), FLOAT) for i, (rows, _) in enumerate(tensors)]
    holders = [ranks - {nobody} or {(nobody + 1) % 5} for _, ranks in tensors]
    holdings = [
        [chunk for chunk, ranks in zip(chunks, holders, strict=True) if rank in ranks] for rank in range(5)
    ]
    dealt = deal(holdings)
    assert sorted(c.name for each in dealt for c in each) == sorted(c.name for c in chunks)
    assert all(set(mine) <= set(had) for mine, had in zip(dealt, holdings, strict=True))
    assert deal([list(reversed(each)) for each in holdings]) == dealt  # whatever order a rank says them in


def test_replicas_are_shared_out_evenly() -> None:
    chunks = [whole(f"t{i}", (i,), FLOAT) for i in range(1, 100)]
    written = [sum(c.nbytes for c in each) for each in deal([chunks] * 4)]
    assert sum(written) == 4 * sum(range(1, 100))
    assert max(written) - min(written) <= 0.01 * max(written)


def test_replicas_make_up_for_what_only_one_rank_has() -> None:
    own, shared = whole("own", (100,), FLOAT), [whole(f"t{i}", (10,), FLOAT) for i in range(20)]
    first, second = deal([[own, *shared], shared])
    assert sum(c.nbytes for c in first) == sum(c.nbytes for c in second) == 4 * 150


def test_shards_that_do_not_make_up_the_whole_are_a_defect() -> None:
    def rows(first: int, count: int) -> Chunk:
        return Chunk("w", (7, 2), (first, 0), (count, 2), FLOAT)

    assert deal([[rows(0, 4)], [rows(4, 3)]]) == [[rows(0, 4)], [rows(4, 3)]]
    for second in (rows(4, 2), rows(3, 4)):
        with pytest.raises(AssertionError, match="w: the ranks hold"):
            deal([[rows(0, 4)], [second]])
    with pytest.raises(AssertionError, match="w has two shapes"):
        deal([[whole("w", (3,), FLOAT)], [whole("w", (4,), FLOAT)]])


def test_copies_keep_their_place_until_more_is_needed() -> None:
    staging = Staging(torch.device("cpu"))
    tensors = {
        "a": torch.arange(63.0),
        "empty": torch.empty(0, 3),
        "half": torch.arange(5).to(torch.bfloat16),
        "one": torch.tensor(2**40),
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    first = staging.copy(held(tensors, {}))
    places = {chunk.name: copy.data_ptr() for chunk, copy in first}
    for tensor in tensors.values():
        tensor.zero_()
    for chunk, copy in first:
        assert torch.equal(copy, expected[chunk.name])
        assert copy.untyped_storage().nbytes() == copy.nbytes == chunk.nbytes  # written without another copy
    size = staging.nbytes
    assert size == sum(64 * math.ceil(tensor.nbytes / 64) for tensor in tensors.values())
    again = staging.copy(held(tensors, {}))
    assert {chunk.name: copy.data_ptr() for chunk, copy in again} == places
    assert not any(copy.any() for _, copy in again)
    staging.copy(held({"a": tensors["a"]}, {}))
    assert staging.nbytes == size  # less is laid out in what there is
    staging.copy(held(tensors | {"more": torch.ones(100)}, {}))
    assert staging.nbytes > size
    staging.release()
    assert staging.nbytes == 0
    staging.reserve([chunk for chunk, _ in held(expected, {})])
    for chunk, copy in staging.copy(held(expected, {})):  # waits until the memory is there
        assert torch.equal(copy, expected[chunk.name])
    assert staging.nbytes == size
    staging.release()
    assert staging.copy([]) == []
