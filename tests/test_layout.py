"""The static geometry of one exchange: sizes, and the bound that never drops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROUTINGS, Geometry, routing

from freeio_jax import _native
from freeio_jax.layout import Layout, dropless_capacity, round_up


def layout(geometry):
    return Layout.create(
        num_ranks=geometry.num_ranks,
        num_tokens=geometry.num_tokens,
        top_k=geometry.top_k,
        **geometry.options(),
    )


def test_round_up():
    assert [round_up(size, 4) for size in (0, 1, 3, 4, 5)] == [0, 4, 4, 4, 8]
    assert round_up(np.array([0, 7, 8]), 1).tolist() == [0, 7, 8]


@pytest.mark.parametrize(
    "num_ranks, num_tokens, top_k, num_experts",
    [
        (1, 3, 2, 4),
        (2, 3, 1, 2),
        (4, 5, 8, 8),
        (3, 0, 2, 6),
        (6, 1, 2, 12),
        (8, 128, 8, 256),
    ],
)
def test_dropless_capacity_is_the_bound(num_ranks, num_tokens, top_k, num_experts):
    made = layout(Geometry(num_ranks, num_tokens, top_k, num_experts))
    assert made.capacity == num_ranks * num_tokens * min(top_k, num_experts // num_ranks)
    assert made.experts_per_rank == num_experts // num_ranks
    assert made.num_assignments == num_tokens * top_k


def worst_padded_rows(num_tokens, top_k, experts_per_rank, alignment):
    """The most rows, padding included, that one rank can get: every set of loads is tried.

    Loads of the rank's experts are possible with distinct ids if and only if none exceeds the
    number of tokens and all together are at most min(K, E/R) for each token.
    """
    bound = num_tokens * min(top_k, experts_per_rank)
    loads = itertools.product(range(num_tokens + 1), repeat=experts_per_rank)
    return max(
        sum(-(-load // alignment) * alignment for load in each)
        for each in loads
        if sum(each) <= bound
    )


@pytest.mark.parametrize("alignment", [1, 2, 3, 4, 8])
def test_dropless_capacity_suffices_and_is_no_larger_than_needed(alignment):
    for tokens, top_k, per_rank in itertools.product(range(6), (1, 2, 3), (1, 2, 3)):
        capacity = dropless_capacity(
            num_ranks=1,
            num_tokens=tokens,
            top_k=top_k,
            num_experts=per_rank,
            alignment=alignment,
        )
        assert capacity % alignment == 0
        assert capacity >= worst_padded_rows(tokens, top_k, per_rank, alignment)
        # Within one padded group for each expert of the unaligned bound.
        rows = tokens * min(top_k, per_rank)
        assert capacity <= rows + per_rank * (alignment - 1)


@pytest.mark.parametrize("skew", sorted(ROUTINGS))
@pytest.mark.parametrize("capacity, alignment", [(None, 1), (None, 4), (8, 4), (7, 1), (0, 8)])
def test_group_sizes_are_those_of_the_packed_rows(skew, capacity, alignment):
    geometry = Geometry(3, 5, 3, 9, capacity, alignment)
    made = layout(geometry)
    placement = geometry.place(routing(np.random.default_rng(3), geometry, skew), made.capacity)
    sizes = np.asarray(made.group_sizes(jnp.asarray(placement.expert_load)))
    np.testing.assert_array_equal(sizes, placement.group_sizes)
    assert sizes.dtype == np.int32
    assert (sizes % alignment == 0).all()
    assert (sizes.sum(axis=-1) <= made.capacity).all()
    if capacity is None and skew != "repeated":
        assert not placement.num_dropped.any()


def test_group_starts_are_sums_of_what_lies_before():
    made = layout(Geometry(1, 8, 2, 4, alignment=4))
    assert made.group_starts(jnp.array([3, 0, 5, 1])).tolist() == [0, 4, 4, 12]


def test_is_hashable_and_equal_by_value():
    """Layouts are static: equal geometry must not compile twice."""
    one, other = (layout(Geometry(2, 3, 2, 4)) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != layout(Geometry(2, 3, 2, 4, capacity=4))


def test_numpy_sizes_become_ints():
    made = layout(Geometry(2, 3, 2, np.int64(4), np.int32(8), np.uint8(4)))
    assert made == layout(Geometry(2, 3, 2, 4, 8, 4))
    assert all(type(n) is int for n in (made.num_experts, made.capacity, made.alignment))


@pytest.mark.parametrize("alignment", [1, 3, 8])
@pytest.mark.parametrize("experts_per_rank", [1, 2, 7])
def test_groups_are_those_of_the_engines(experts_per_rank, alignment, rng):
    for _ in range(50):
        load = rng.integers(0, 20, experts_per_rank)
        capacity = int(rng.integers(0, 12 * experts_per_rank)) * alignment
        layout = Layout(
            num_ranks=2,
            num_tokens=64,
            top_k=2,
            num_experts=2 * experts_per_rank,
            capacity=capacity,
            alignment=alignment,
        )
        starts, sizes = _native.groups(
            num_ranks=2,
            num_experts=2 * experts_per_rank,
            capacity=capacity,
            alignment=alignment,
            expert_load=load.tolist(),
        )
        assert starts == layout.group_starts(load).tolist()
        assert sizes == layout.group_sizes(load).tolist()
