"""freeio_jax.reference against plain numpy: it is the oracle of the property tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
    make_mesh,
    per_shard,
    pool_rows,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)
from moe import GEOMETRY, arguments, dense_moe, moe, sharded_moe

import freeio_jax as fio
from freeio_jax import reference


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(1, 5, 3, 4),
        Geometry(3, 4, 3, 6, capacity=7),
        Geometry(6, 2, 2, 12, capacity=8, alignment=4),
        Geometry(8, 3, 4, 16),
        Geometry(4, 4, 6, 4, capacity=0),
        Geometry(2, 0, 2, 4),
        Geometry(2, 1, 1, 2, alignment=8),
    ],
)
def test_exchange_is_the_contract(geometry, rng):
    check_exchange(
        rng, geometry, make_mesh(geometry.num_ranks), skews=tuple(ROUTINGS), api=reference
    )


@pytest.mark.parametrize("axis_name", ["expert", ("expert", "data"), ("data", "expert")])
def test_groups_and_tuples_of_axes(axis_name, rng):
    mesh = make_mesh((2, 4), ("expert", "data"), order=[3, 0, 1, 2, 7, 6, 5, 4])
    num_ranks = 2 if axis_name == "expert" else 8
    geometry = Geometry(num_ranks, 3, 3, 2 * num_ranks, capacity=9)
    check_exchange(rng, geometry, mesh, axis_name, skews=("hot", "invalid"), api=reference)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "int32"]
)
def test_dtypes(dtype, rng):
    geometry = Geometry(2, 5, 4, 4, capacity=12)
    dtype = np.dtype(getattr(jnp, dtype))
    tokens = random_bits(rng, (2, 5, 3), dtype)
    topk_idx = routing(rng, geometry, "holes")
    if dtype.kind == "i":
        out = dispatch_fn(geometry, api=reference)(tokens, topk_idx)
        assert_dispatched(out, tokens, topk_idx, geometry)
        return
    pool = values(rng, (2, pool_rows(geometry), 7), dtype)
    for weights, exact in (
        (power_of_two_weights(rng, topk_idx.shape), True),
        (values(rng, topk_idx.shape, np.float32), False),
    ):
        fn = exchange_fn(geometry, api=reference)
        out, expert_out, z = fn(tokens, topk_idx, pool, weights)
        (placement,) = assert_dispatched(out, tokens, topk_idx, geometry)
        assert_combined(z, expert_out, placement, geometry.topk_shape, weights, exact=exact)


def test_a_pytree(rng):
    geometry = Geometry(4, 5, 2, 8, capacity=9)
    tokens = {"rows": values(rng, (4, 5, 3), np.int8), "scale": values(rng, (4, 5), np.float32)}
    topk_idx = routing(rng, geometry)
    out = dispatch_fn(geometry, api=reference)(tokens, topk_idx)
    assert_dispatched(out, tokens, topk_idx, geometry)


def test_padding_and_weights_without_a_row_are_not_looked_at(rng):
    geometry = Geometry(2, 6, 3, 4, capacity=16, alignment=8)
    topk_idx = routing(rng, geometry, "invalid")
    placement = geometry.place(topk_idx, 16)
    pool = values(rng, (2, 16, 2), np.float32)
    pool[[[row is None for row in rows] for rows in placement.source]] = np.nan
    weights = power_of_two_weights(rng, topk_idx.shape)
    weights[~placement.kept(topk_idx.shape)] = np.nan
    tokens = values(rng, (2, 6, 1), np.float32)
    _, expert_out, z = exchange_fn(geometry, api=reference)(tokens, topk_idx, pool, weights)
    assert not np.isnan(z).any()
    assert_combined(z, expert_out, placement, geometry.topk_shape, weights, exact=True)


def test_gradients_are_the_dense_ones(rng):
    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, skew="holes", dtype=np.float64)

        def layer(*args):
            return moe(*args, api=reference)

        def loss(fn, tokens, weights, params):
            return jnp.sum(jnp.sin(fn(tokens, topk_idx, weights, params)))

        actual, expected = (
            jax.jit(jax.value_and_grad(partial(loss, fn), argnums=(0, 1, 2)))(
                tokens, weights, params
            )
            for fn in (sharded_moe(layer=layer), dense_moe)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


def test_handles_are_interchangeable(rng):
    """The engine combines along a handle of the reference, and the other way round."""
    topk_idx = routing(rng, GEOMETRY, "holes")

    def fn(tokens, topk_idx):
        outs = [
            api.dispatch(tokens, topk_idx, axis_name="expert", **GEOMETRY.options())
            for api in (fio, reference)
        ]
        return [
            api.combine(outs[0].tokens, out.handle) for api in (fio, reference) for out in outs
        ] + [jax.tree.leaves(out.handle) for out in outs]

    tokens = values(rng, (4, 5, 2), np.float32)
    *sums, handle, other = per_shard(fn, make_mesh(4))(tokens, topk_idx)
    for z in sums:
        assert_bitwise(z, sums[0])
    jax.tree.map(assert_bitwise, handle, other)


def test_check_vma_off(rng):
    check_exchange(rng, GEOMETRY, make_mesh(4), api=reference, check_vma=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_as_documented(dtype):
    """Two arrays of R x T x K rows on each rank, as docs/processes.md says, and little more."""
    num_ranks, num_tokens, top_k, hidden = 4, 64, 4, 512
    spec = jax.sharding.PartitionSpec("expert")

    def body(tokens, topk_idx):
        out = reference.dispatch(
            tokens, topk_idx, num_experts=8, axis_name="expert", capacity=num_tokens
        )
        return out.tokens, reference.combine(out.tokens, out.handle)

    run = jax.shard_map(body, mesh=make_mesh(num_ranks), in_specs=spec, out_specs=spec)
    tokens = jax.ShapeDtypeStruct((num_ranks * num_tokens, hidden), dtype)
    topk_idx = jax.ShapeDtypeStruct((num_ranks * num_tokens, top_k), jnp.int32)
    needed = jax.jit(run).lower(tokens, topk_idx).compile().memory_analysis().temp_size_in_bytes
    one_array = num_ranks * num_tokens * top_k * hidden * tokens.dtype.itemsize
    print("arrays:", needed / one_array)
    assert 2 * one_array <= needed < 3 * one_array
