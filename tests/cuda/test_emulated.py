"""The CUDA engine's kernels against the oracle, on emulated GPUs: no GPU is needed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracle
import pytest
from emulated import COMBINE_PROTOCOLS, PROTOCOLS, capacity_of
from helpers import (
    ROUTINGS,
    Geometry,
    assert_combined,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from operations import (
    check_dispatched,
    check_rows,
    check_transposed,
    combine,
    combine_transpose,
    dispatch,
    first_gpus,
    run_dispatch,
)

from freeio_jax import _native

all_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
combine_protocols = pytest.mark.parametrize("protocol", COMBINE_PROTOCOLS, indirect=True)
#: Of operations that have no kernel for small calls.
large_protocols = pytest.mark.parametrize("protocol", PROTOCOLS[1:], indirect=True)


# --- dispatch ------------------------------------------------------------------------------------

GEOMETRIES = {
    "small": Geometry(2, 7, 2, 8),
    "one rank": Geometry(1, 40, 4, 8),
    "no tokens": Geometry(2, 0, 2, 4),
    "one token": Geometry(4, 1, 4, 16),
    "three ranks": Geometry(3, 17, 3, 9, alignment=4),
    "aligned": Geometry(4, 21, 4, 16, alignment=8),
    "drops": Geometry(4, 33, 4, 8, capacity=40),
    "drops, aligned": Geometry(3, 20, 3, 12, capacity=24, alignment=8),
    "no capacity": Geometry(2, 9, 2, 4, capacity=0),
    "many experts": Geometry(2, 19, 8, 512),
    "most experts": Geometry(3, 14, 4, 4095),
    "eight ranks": Geometry(8, 43, 8, 64),
    "sixteen ranks": Geometry(16, 5, 3, 32),
    "more ids than experts": Geometry(2, 9, 8, 4),
    "widest token": Geometry(2, 6, 32, 64),
    "many tokens": Geometry(3, 70, 3, 9),
    "many tokens, drops": Geometry(2, 64, 4, 8, capacity=100),
    "several tiles": Geometry(2, 1500, 8, 8, capacity=600),
    "any tail": Geometry(2, 37, 3, 8, zero_tail=False),
    "any tail, aligned": Geometry(3, 29, 4, 12, alignment=8, zero_tail=False),
    "any tail, much alignment": Geometry(2, 19, 2, 8, capacity=256, alignment=64, zero_tail=False),
    "any tail, drops": Geometry(3, 20, 3, 12, capacity=24, alignment=8, zero_tail=False),
    "any tail, several tiles": Geometry(2, 1500, 8, 8, capacity=20_000, zero_tail=False),
    "any tail, no tokens": Geometry(2, 0, 2, 4, capacity=8, alignment=4, zero_tail=False),
}


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_dispatch(machine, rng, name):
    """Rows of a part of a slice as it is sent in lines, of more than one, and of 20 bytes."""
    for width in (4, 244, 5):
        run_dispatch(machine, rng, GEOMETRIES[name], width=width)


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("skew", ROUTINGS)
def test_dispatch_of_any_routing(machine, rng, skew):
    run_dispatch(machine, rng, Geometry(4, 23, 4, 12, capacity=64), skew, width=8)
    run_dispatch(machine, rng, Geometry(2, 11, 3, 6, alignment=4), skew, width=5)


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("offset", [0, 8, 2])
def test_leaves_of_any_row_size_travel_together(machine, rng, offset):
    """Rows of 1 byte to several slices, at addresses that allow accesses of 16, 8 or 2 bytes."""
    geometry = Geometry(3, 10, 2, 6)
    shape = (geometry.num_ranks, geometry.num_tokens)
    leaves = [
        random_bits(rng, (*shape, size), np.uint8)
        for size in (1, 2, 3, 16, 24, 100, 4096, 4112, 12301)
    ]
    leaves.append(random_bits(rng, (*shape, 3, 2), ml_dtypes.bfloat16))
    topk_idx = routing(rng, geometry)
    out = dispatch(machine, geometry, topk_idx, leaves, offset=offset)
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, leaves)


@all_protocols
@pytest.mark.usefixtures("protocol")
def test_a_call_runs_again_with_other_buffers_alignments_and_num_sms(machine, rng):
    geometry = Geometry(3, 10, 2, 6)
    for num_sms, offset in ((5, 0), (5, 0), (5, 4), (2, 4), (5, 0)):
        machine.set_num_sms(num_sms)
        leaves = [random_bits(rng, (3, 10, 40), np.float32)]
        topk_idx = routing(rng, geometry)
        out = dispatch(machine, geometry, topk_idx, leaves, offset=offset)
        machine.synchronize()
        check_dispatched(out, geometry, topk_idx, leaves)


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("num_sms", [1, 2, 7])
def test_leaves_of_several_slices_travel_together(machine, rng, num_sms):
    """All of them in lines: of one access, of a slice, of one more, and of many."""
    machine.set_num_sms(num_sms)
    geometry = Geometry(3, 19, 3, 6, capacity=40)
    shape = (geometry.num_ranks, geometry.num_tokens)
    leaves = [random_bits(rng, (*shape, size), np.uint8) for size in (16, 960, 976, 4000, 32)]
    topk_idx = routing(rng, geometry, "invalid")
    out = dispatch(machine, geometry, topk_idx, leaves)
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, leaves)


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize(
    "geometry",
    [Geometry(2, 1, 8, 16), Geometry(1, 3, 2, 4), Geometry(4, 2, 8, 16, capacity=20)],
    ids=str,
)
def test_few_tokens_with_rows_of_any_size_and_alignment(machine, rng, geometry):
    """Accesses of 1, 2, 4 and 8 bytes; rows that end within 16 bytes, and behind a slice."""
    sizes = [(1, 0), (6, 0), (20, 0), (24, 0), (32, 8), (16, 4), (961, 0), (974, 0), (1928, 0)]
    for num_bytes, offset in [*sizes, (1920, 2), (960, 1)]:
        x = random_bits(rng, (geometry.num_ranks, geometry.num_tokens, num_bytes), np.uint8)
        topk_idx = routing(rng, geometry)
        out = dispatch(machine, geometry, topk_idx, [x], offset=offset)
        machine.synchronize()
        check_dispatched(out, geometry, topk_idx, [x])


@pytest.mark.parametrize("num_tokens", [256, 257])
def test_the_most_rows_that_are_sent(machine, rng, num_tokens):
    """256 rows of 16 slices are just as many as a rank has room for from a peer."""
    run_dispatch(machine, rng, Geometry(2, num_tokens, 2, 4), width=16 * 240)


@large_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("num_sms", [1, 2, 5, 9, 13])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 300, 2, 2),
        Geometry(3, 203, 4, 6, capacity=300, alignment=4),
        Geometry(1, 700, 3, 5),
    ],
    ids=str,
)
def test_ids_are_counted_in_segments(machine, rng, geometry, num_sms):
    """Of as many CTAs each, of fewer, and of one; chunks that begin within four ids of another."""
    machine.set_num_sms(num_sms)
    run_dispatch(machine, rng, geometry, "invalid", width=3)


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize(("capacity", "alignment"), [(64, 8), (24, 4), (200, 1)])
def test_groups_are_placed_as_the_layout_says(machine, rng, capacity, alignment):
    """The kernels add the rows of many groups up in parallel, core/layout.h one after the other."""
    geometry = Geometry(3, 12, 4, 45, capacity=capacity, alignment=alignment)
    topk_idx, out, _ = run_dispatch(machine, rng, geometry)
    for rank, result in enumerate(out):
        load = result.expert_load.tolist()
        starts, sizes = _native.groups(3, 45, capacity, alignment, load)
        assert result.group_sizes.tolist() == sizes
        for group, start in enumerate(starts):
            if load[group] > 0 and start < capacity:
                expert = topk_idx.reshape(-1)[result.row_source[start]]
                assert expert == rank * 15 + group


@pytest.mark.parametrize("num_tokens", [4096, 4097])
def test_the_most_places_that_are_sent(machine, rng, num_tokens):
    """All of a rank's for one expert: numbers up to the last that a place has room for."""
    geometry = Geometry(2, num_tokens, 8, 2, capacity=70_000)
    x = values(rng, (2, num_tokens, 1), "float32")
    topk_idx = np.ones(geometry.topk_shape, np.int32)
    out = dispatch(machine, geometry, topk_idx, [x])
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, [x])


@pytest.mark.parametrize(
    "name",
    [
        *("small", "three ranks", "drops", "eight ranks", "no tokens"),
        *(name for name in GEOMETRIES if name.startswith("any tail")),
    ],
)
def test_dispatch_along_a_handle(machine, rng, name):
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    leaves = [
        random_bits(rng, (geometry.num_ranks, geometry.num_tokens, size), np.uint8)
        for size in (32, 7)
    ]
    group = first_gpus(geometry)
    along = [
        machine.dispatch_along(group, rank, geometry, out[rank], [leaf[rank] for leaf in leaves])
        for rank in range(group.size)
    ]
    machine.synchronize()
    for i, leaf in enumerate(leaves):
        for rank, rows in enumerate(oracle.dispatch(leaf, placement)):
            sizes = placement.group_sizes[rank]
            check_rows(along[rank][i], rows, geometry, sizes, f"leaf {i} of rank {rank}")


# --- combine -------------------------------------------------------------------------------------

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]


@combine_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_dtypes(machine, rng, dtype, weighted):
    """Widths that fill whole packs, that do not, and that take several slices."""
    geometry = Geometry(3, 9, 4, 12, capacity=24)
    _, out, placement = run_dispatch(machine, rng, geometry)
    for width in (1, 7, 64, 530, 1040):
        shape = (geometry.num_ranks, capacity_of(geometry), width)
        expert_out = values(rng, shape, dtype)
        weights = power_of_two_weights(rng, geometry.topk_shape) if weighted else None
        z = combine(machine, geometry, out, expert_out, weights)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True
        )


@combine_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_combine(machine, rng, name):
    """Any weights: bitwise where products and sums round one by one, else within their rounding."""
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    for dtype, exact in (("float32", True), ("bfloat16", False)):
        expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), 12), dtype)
        weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        z = combine(machine, geometry, out, expert_out, weights)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=exact
        )


@pytest.mark.parametrize(("num_tokens", "width"), [(4096, 4), (4097, 4), (1024, 32 * 512)])
def test_the_most_routes_that_are_sent(machine, rng, num_tokens, width):
    """A rank has room for those of 4096 tokens with 8 assignments each, and for 32768 slices."""
    geometry = Geometry(2, num_tokens, 8, 8, capacity=200)
    _, out, placement = run_dispatch(machine, rng, geometry, width=4)
    expert_out = values(rng, (2, 200, width), "float32")
    weights = power_of_two_weights(rng, geometry.topk_shape)
    z = combine(machine, geometry, out, expert_out, weights)
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)


def test_one_cta_pushes_hundreds_of_partial_sums(machine, rng):
    """Many more than can wait for their flags, also where who raises those is far behind."""
    machine.set_num_sms(1)
    geometry = Geometry(8, 60, 8, 64)
    _, out, placement = run_dispatch(machine, rng, geometry, width=1)
    expert_out = values(rng, (8, capacity_of(geometry), 3), "float32")
    weights = power_of_two_weights(rng, geometry.topk_shape)
    for _ in range(5):
        machine.set_seed(rng.integers(2**32))
        z = combine(machine, geometry, out, expert_out, weights)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True
        )


def test_the_weight_of_a_skipped_id_is_not_looked_at(machine, rng):
    geometry = Geometry(2, 15, 4, 8, capacity=20)
    _, out, placement = run_dispatch(machine, rng, geometry)
    kept = placement.kept(geometry.topk_shape)
    weights = np.where(kept, rng.random(kept.shape), np.nan).astype(np.float32)
    expert_out = values(rng, (2, 20, 8), "float32")
    z = combine(machine, geometry, out, expert_out, weights)
    machine.synchronize()
    assert np.isfinite(np.stack(z)).all()


def test_few_tokens_and_very_much_padding(machine, rng):
    machine.set_num_sms(1)
    run_dispatch(machine, rng, Geometry(1, 2, 1, 2, capacity=524_280), width=1)


@pytest.mark.parametrize("num_tokens", [256, 257])
def test_the_most_sums_that_are_sent(machine, rng, num_tokens):
    """256 rows of 16 slices are just as many as a rank has room for from a peer."""
    geometry = Geometry(2, num_tokens, 2, 4)
    _, out, placement = run_dispatch(machine, rng, geometry)
    expert_out = values(rng, (2, capacity_of(geometry), 16 * 480), "bfloat16")
    z = combine(machine, geometry, out, expert_out)
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, None, exact=True)


# --- combine_transpose ---------------------------------------------------------------------------


@large_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("results", ["rows", "weights", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_transpose_dtypes(machine, rng, dtype, results):
    geometry = Geometry(3, 8, 4, 6, capacity=24)
    _, out, placement = run_dispatch(machine, rng, geometry)
    for width in (1, 12, 1040):
        cotangent = values(rng, (geometry.num_ranks, geometry.num_tokens, width), dtype)
        weights = expert_out = None
        if results != "weights":
            weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        if results != "rows":
            expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), width), dtype)
        grads = combine_transpose(
            machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
        )
        machine.synchronize()
        check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


@large_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_combine_transpose(machine, rng, name):
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    cotangent = values(rng, (geometry.num_ranks, geometry.num_tokens, 10), "float32")
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), 10), "float32")
    grads = combine_transpose(
        machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
    )
    machine.synchronize()
    check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


def test_wide_rows_of_a_token_with_many_assignments(machine, rng):
    """One token's dot products, one for each slice of a row, fill the shared memory."""
    geometry = Geometry(16, 1, 32, 32, capacity=40)
    _, out, placement = run_dispatch(machine, rng, geometry)
    width = 1601  # odd: no wide accesses
    weights = rng.standard_normal(geometry.topk_shape)
    cotangent = values(rng, (16, 1, width), "float64")
    expert_out = values(rng, (16, 40, width), "float64")
    grads = combine_transpose(
        machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
    )
    machine.synchronize()
    check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


# --- Arithmetic ----------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
@example(n=2**31 - 1, d=2**31 - 1)
@example(n=2**31 - 1, d=2**30 + 1)
@example(n=2**31 - 1, d=1)
def test_division(machine, n, d):
    assert machine.divide(n, d) == divmod(n, d)
    assert machine.divide(d * (n // d), d) == (n // d, 0)
