"""The contract of dispatch and combine on one expert axis, against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    ROUTINGS,
    Geometry,
    assert_bitwise,
    assert_combined,
    assert_dispatched,
    check_exchange,
    dispatch_fn,
    exchange_fn,
    hosts_of,
    make_mesh,
    moves_rows,
    per_shard,
    pool_rows,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)

import freeio_jax as fio

FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64"]
OTHERS = ["int8", "int32", "uint8", "uint16", "bool", "complex64", "int64"]


def rows_of(result, rank):
    return np.asarray(result["tokens"])[rank].tolist()


# --- By hand -------------------------------------------------------------------------------------


def test_packs_by_expert_then_source_then_token():
    geometry = Geometry(num_ranks=2, num_tokens=2, top_k=1, num_experts=4)
    a, b, c, d = 1, 2, 3, 4
    out = dispatch_fn(geometry)(
        np.array([[[a], [b]], [[c], [d]]], np.int32), np.array([[[2], [0]], [[0], [3]]], np.int32)
    )
    assert rows_of(out, 0) == [[b], [c], [0], [0]]
    assert rows_of(out, 1) == [[a], [d], [0], [0]]
    assert out["group_sizes"].tolist() == [[2, 0], [1, 1]]
    assert out["expert_load"].tolist() == [[2, 0], [1, 1]]
    assert out["num_dropped"].tolist() == [0, 0]
    assert out["num_invalid"].tolist() == [0, 0]


def test_a_repeated_id_gets_a_row_for_each_k():
    geometry = Geometry(num_ranks=1, num_tokens=2, top_k=3, num_experts=2, capacity=6)
    out = dispatch_fn(geometry)(
        np.array([[[1], [2]]], np.int32), np.array([[[1, 0, 1], [1, 1, 1]]], np.int32)
    )
    assert rows_of(out, 0) == [[1], [1], [1], [2], [2], [2]]
    assert out["group_sizes"].tolist() == [[1, 5]]


def test_alignment_pads_each_group_with_zeros():
    geometry = Geometry(num_ranks=1, num_tokens=3, top_k=1, num_experts=3, capacity=8, alignment=4)
    out = dispatch_fn(geometry)(
        np.array([[[1], [2], [3]]], np.int32), np.array([[[2], [0], [0]]], np.int32)
    )
    assert rows_of(out, 0) == [[2], [3], [0], [0], [1], [0], [0], [0]]
    assert out["group_sizes"].tolist() == [[4, 0, 4]]
    assert out["expert_load"].tolist() == [[2, 0, 1]]


def test_capacity_drops_the_last_in_packed_order_and_counts():
    geometry = Geometry(num_ranks=1, num_tokens=4, top_k=1, num_experts=2, capacity=2)
    out = dispatch_fn(geometry)(
        np.array([[[1], [2], [3], [4]]], np.int32), np.array([[[1], [0], [1], [-1]]], np.int32)
    )
    assert rows_of(out, 0) == [[2], [1]]
    assert out["group_sizes"].tolist() == [[1, 1]]
    assert out["expert_load"].tolist() == [[1, 2]]
    assert out["num_dropped"].tolist() == [1]


def test_ids_out_of_range_are_skipped_and_counted():
    geometry = Geometry(num_ranks=2, num_tokens=1, top_k=4, num_experts=2, capacity=4)
    ids = np.array([[[2, -2, -1, 0]], [[2**31 - 1, -(2**31), 1, 1]]], np.int32)
    out = dispatch_fn(geometry)(np.array([[[1]], [[2]]], np.int32), ids)
    assert rows_of(out, 0) == [[1], [0], [0], [0]]
    assert rows_of(out, 1) == [[2], [2], [0], [0]]
    assert out["num_invalid"].tolist() == [2, 2]
    assert out["num_dropped"].tolist() == [0, 0]


def test_combine_rounds_once_on_each_rank_and_once_at_the_source():
    # In bfloat16, 256 + 1 rounds to 256. Both on one rank: 256 + (1 + 1) = 258 is exact in float32
    # before the one rounding. Spread over two ranks: 256 + 1 -> 256 there, then + 1 -> 256.
    geometry = Geometry(num_ranks=2, num_tokens=2, top_k=3, num_experts=6)
    ids = np.array([[[0, 1, 2], [0, 1, 3]], [[-1, -1, -1], [-1, -1, -1]]], np.int32)
    value_of_expert = np.array([256, 1, 1, 1, 0, 0])

    def fn(tokens, topk_idx, value):
        out = fio.dispatch(tokens, topk_idx, num_experts=6, axis_name="expert")
        group = jnp.repeat(jnp.arange(3), out.group_sizes, total_repeat_length=len(out.tokens))
        return fio.combine(value[group].astype(jnp.bfloat16), out.handle)

    z = per_shard(fn, make_mesh(geometry.num_ranks))(
        np.zeros((2, 2, 1), np.float32), ids, value_of_expert.reshape(2, 3, 1)
    )
    assert np.asarray(z)[0].astype(float).tolist() == [[258.0], [256.0]]


# --- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_ranks_and_every_skew(num_ranks, rng):
    geometry = Geometry(num_ranks, num_tokens=4, top_k=3, num_experts=2 * num_ranks)
    check_exchange(rng, geometry, make_mesh(num_ranks), skews=tuple(ROUTINGS))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(4, 6, 3, 8, capacity=5),
        Geometry(4, 6, 3, 8, capacity=8, alignment=4),
        Geometry(4, 6, 3, 8, capacity=0),
        Geometry(4, 5, 2, 12, capacity=200, alignment=8),
        Geometry(4, 5, 2, 12, alignment=3),
        Geometry(4, 5, 1, 4),
        Geometry(4, 5, 6, 4),
        Geometry(4, 6, 3, 8, zero_tail=False),
        Geometry(4, 6, 3, 8, capacity=8, alignment=4, zero_tail=False),
        Geometry(4, 5, 2, 12, capacity=200, alignment=8, zero_tail=False),
    ],
    ids=[
        *("cut", "cut, aligned", "no rows", "ample, aligned", "aligned", "top-1", "K > E"),
        *("any tail", "any tail, cut, aligned", "any tail, ample, aligned"),
    ],
)
def test_capacity_and_alignment(geometry, rng):
    check_exchange(rng, geometry, make_mesh(4), skews=("uniform", "hot", "one rank", "invalid"))


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_few_tokens(num_tokens, num_ranks, rng):
    geometry = Geometry(num_ranks, num_tokens, top_k=2, num_experts=2 * num_ranks)
    check_exchange(rng, geometry, make_mesh(num_ranks), skews=("uniform", "none", "one expert"))


def test_no_tokens_with_rows_to_spare(rng):
    check_exchange(rng, Geometry(2, 0, 2, 4, capacity=8, alignment=4), make_mesh(2))


@pytest.mark.parametrize("dtype", FLOATS + OTHERS)
def test_dispatch_moves_the_bits_of_every_dtype(dtype, rng):
    geometry = Geometry(2, 5, 2, 4, capacity=12)
    with jax.enable_x64(dtype.endswith("64")):
        dtype = np.dtype(getattr(jnp, dtype) if dtype != "bool" else bool)
        tokens = random_bits(rng, (2, 5, 3), dtype)
        for skew in ("uniform", "hot"):
            topk_idx = routing(rng, geometry, skew)
            out = dispatch_fn(geometry)(tokens, topk_idx)
            assert_dispatched(out, tokens, topk_idx, geometry)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [True, False])
def test_combine_sums_every_float(dtype, weighted, rng):
    geometry = Geometry(3, 5, 4, 6, capacity=24)
    with jax.enable_x64(dtype == "float64"):
        dtype = np.dtype(getattr(jnp, dtype))
        topk_idx = routing(rng, geometry, "holes")
        tokens = values(rng, (3, 5, 1), np.float32)
        pool = values(rng, (3, pool_rows(geometry), 7), dtype)
        fn = exchange_fn(geometry, weighted=weighted)
        for weights in (
            power_of_two_weights(rng, topk_idx.shape),
            values(rng, topk_idx.shape, np.float64 if dtype == np.float64 else np.float32),
        ):
            out, expert_out, z = fn(tokens, topk_idx, pool, weights)
            (placement,) = assert_dispatched(out, tokens, topk_idx, geometry)
            exact = not weighted or (
                weights.dtype == np.float32 and np.all(np.abs(np.frexp(weights)[0]) == 0.5)
            )
            assert_combined(
                z,
                expert_out,
                placement,
                geometry.topk_shape,
                weights if weighted else None,
                exact=exact,
                hosts=hosts_of(make_mesh(3)),
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_any_float(dtype, rng):
    geometry = Geometry(2, 4, 2, 4)
    topk_idx = routing(rng, geometry)
    tokens, pool = (
        values(rng, (2, 4, 1), np.float32),
        values(rng, (2, pool_rows(geometry), 2), "f4"),
    )
    weights = power_of_two_weights(rng, topk_idx.shape).astype(getattr(jnp, dtype))
    out, expert_out, z = exchange_fn(geometry)(tokens, topk_idx, pool, weights)
    (placement,) = assert_dispatched(out, tokens, topk_idx, geometry)
    sums = z, expert_out, placement, geometry.topk_shape, weights
    assert_combined(*sums, exact=True, hosts=hosts_of(make_mesh(2)))


def test_a_pytree_travels_in_one_exchange(rng):
    geometry = Geometry(4, 5, 2, 8, capacity=9)
    lead = (4, 5)
    tokens = {
        "rows": values(rng, (*lead, 16), jnp.float8_e4m3fn),
        "scales": (values(rng, (*lead, 2), np.float32), values(rng, lead, jnp.bfloat16)),
        "ids": [values(rng, (*lead, 1), np.int32), values(rng, (*lead, 2, 3), np.int8)],
        "mask": values(rng, (*lead, 5), bool),
        "empty": values(rng, (*lead, 0), np.float32),
    }
    topk_idx = routing(rng, geometry, "hot")
    fn = dispatch_fn(geometry)
    assert_dispatched(fn(tokens, topk_idx), tokens, topk_idx, geometry)
    text = fn.lower(tokens, topk_idx).compile().as_text()
    call = r"dispatch\w*" if moves_rows(make_mesh(4)) else "meet"
    assert len(re.findall(f'custom_call_target="freeio_{call}"', text)) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 5, 17, 1024, 4099])
def test_rows_of_any_number_of_bytes(width, rng):
    geometry = Geometry(2, 3, 2, 2)
    tokens = values(rng, (2, 3, width), np.int8)
    topk_idx = routing(rng, geometry, "holes")
    assert_dispatched(dispatch_fn(geometry)(tokens, topk_idx), tokens, topk_idx, geometry)


def test_a_large_exchange(rng):
    geometry = Geometry(8, 256, 4, 64, capacity=1500)
    topk_idx = routing(rng, geometry, "hot")
    tokens = values(rng, (8, 256, 64), np.float32)
    out = dispatch_fn(geometry)(tokens, topk_idx)
    assert_dispatched(out, tokens, topk_idx, geometry)


# --- What combine looks at -----------------------------------------------------------------------


def test_one_handle_serves_many_combines(rng):
    geometry = Geometry(3, 4, 2, 6, capacity=10)
    topk_idx = routing(rng, geometry, "hot")
    pools = [
        values(rng, (3, 10, 2), np.float32),
        values(rng, (3, 10, 3, 2), jnp.bfloat16),
        values(rng, (3, 10), np.float16),
    ]

    def fn(tokens, topk_idx, pools):
        out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        leaves, treedef = jax.tree.flatten(out.handle)
        handle = jax.tree.unflatten(treedef, [leaf + 0 for leaf in leaves])
        return [fio.combine(pool, handle) for pool in pools]

    combined = per_shard(fn, make_mesh(3))(values(rng, (3, 4, 1), np.int32), topk_idx, pools)
    placement = geometry.place(topk_idx, 10)
    for z, pool in zip(combined, pools, strict=True):
        sums = z, pool, placement, geometry.topk_shape
        assert_combined(*sums, exact=True, hosts=hosts_of(make_mesh(3)))


def test_padding_rows_and_weights_of_assignments_without_a_row_are_not_looked_at(rng):
    geometry = Geometry(2, 6, 3, 4, capacity=16, alignment=8)
    topk_idx = routing(rng, geometry, "invalid")
    tokens = values(rng, (2, 6, 1), np.float32)
    placement = geometry.place(topk_idx, 16)
    pool = values(rng, (2, 16, 2), np.float32)
    for rank, rows in enumerate(placement.source):
        for row, assignment in enumerate(rows):
            if assignment is None:
                pool[rank, row] = np.nan
    weights = power_of_two_weights(rng, topk_idx.shape)
    weights[~placement.kept(topk_idx.shape)] = np.nan
    _, expert_out, z = exchange_fn(geometry)(tokens, topk_idx, pool, weights)
    assert not np.isnan(z).any()
    sums = z, expert_out, placement, geometry.topk_shape, weights
    assert_combined(*sums, exact=True, hosts=hosts_of(make_mesh(2)))


def test_nan_of_a_used_row_or_weight_shows(rng):
    geometry = Geometry(2, 1, 2, 2)
    topk_idx = np.array([[[0, 1]], [[1, 0]]], np.int32)
    pool = np.ones((2, pool_rows(geometry), 1), np.float32)
    pool[0, 0] = np.nan  # expert 0's row for rank 0
    weights = np.ones(topk_idx.shape, np.float32)
    weights[1, 0, 1] = np.inf
    out = exchange_fn(geometry)(np.ones((2, 1, 1), np.float32), topk_idx, pool, weights)
    z = np.asarray(out[2])
    assert np.isnan(z[0]).all() and np.isposinf(z[1]).all()


def test_runs_are_bitwise_equal(rng):
    geometry = Geometry(8, 16, 4, 16, capacity=50)
    topk_idx = routing(rng, geometry, "hot")
    arguments = (
        values(rng, (8, 16, 5), jnp.bfloat16),
        topk_idx,
        values(rng, (8, 50, 5), jnp.bfloat16),
        values(rng, topk_idx.shape, np.float32),
    )
    fn = exchange_fn(geometry)
    first = jax.tree.leaves(fn(*arguments))
    for _ in range(5):
        for one, other in zip(first, jax.tree.leaves(fn(*arguments)), strict=True):
            assert_bitwise(other, one)


def test_dropless_capacity_is_the_bound_of_the_contract(rng):
    for top_k, num_experts in ((1, 4), (3, 4), (2, 8)):
        geometry = Geometry(4, 5, top_k, num_experts)
        out = dispatch_fn(geometry)(np.zeros((4, 5, 1), np.int8), routing(rng, geometry))
        assert out["tokens"].shape[1] == oracle.dropless_capacity(4, 5, top_k, num_experts)
