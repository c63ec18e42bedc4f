"""Gradients with respect to tokens, expert outputs and weights: dense ones, finite differences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Geometry, make_mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from moe import GEOMETRY, WIDTH, arguments, dense_moe, moe, placement_of, sharded_moe

import freeio_jax as fio

SMALL = Geometry(num_ranks=2, num_tokens=3, top_k=2, num_experts=4)


def loss(layer, topk_idx, tokens, weights, params):
    # Every element has another factor: rows that go astray show.
    z = layer(tokens, topk_idx, weights, params)
    return jnp.sum(z * jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape))


def assert_same_gradients(layer, dense, topk_idx, *operands, rtol):
    actual, expected = (
        jax.jit(jax.value_and_grad(partial(loss, fn, topk_idx), argnums=(0, 1, 2)))(*operands)
        for fn in (layer, dense)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=rtol), actual, expected)


@pytest.mark.parametrize("skew", ["uniform", "hot", "holes", "none", "one expert"])
def test_gradients_are_the_dense_ones(skew, rng):
    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, skew=skew, dtype=np.float64)
        assert_same_gradients(
            sharded_moe(), dense_moe, topk_idx, tokens, weights, params, rtol=1e-10
        )


def test_gradients_in_float32(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    assert_same_gradients(sharded_moe(), dense_moe, topk_idx, tokens, weights, params, rtol=1e-4)


@pytest.mark.parametrize("capacity, alignment", [(6, 1), (8, 4), (0, 1), (96, 8)])
def test_a_dropped_assignment_gets_zero_gradient(capacity, alignment, rng):
    geometry = dataclasses.replace(GEOMETRY, capacity=capacity, alignment=alignment)
    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, skew="uniform", dtype=np.float64)
        placement = placement_of(topk_idx, geometry, capacity)
        kept = placement.kept(geometry.topk_shape).reshape(topk_idx.shape)
        assert capacity == 96 or not kept.all()
        dense = partial(dense_moe, kept=kept)
        layer = sharded_moe(geometry)
        assert_same_gradients(layer, dense, topk_idx, tokens, weights, params, rtol=1e-10)
        by_weights = jax.grad(partial(loss, layer, topk_idx), argnums=1)(tokens, weights, params)
        assert not np.asarray(by_weights)[~kept].any()


def test_weights_of_skipped_ids_stay_out_of_the_gradients(rng):
    tokens, topk_idx, weights, params = arguments(rng, skew="holes")
    poisoned = jnp.where(topk_idx >= 0, weights, jnp.nan)
    clean, dirty = (
        jax.grad(partial(loss, sharded_moe(), topk_idx), argnums=(0, 1, 2))(tokens, w, params)
        for w in (weights, poisoned)
    )
    # To the last bit on CPU; on GPUs XLA may choose another product for each compilation.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), dirty, clean)


def test_unit_weights(rng):
    def layer(tokens, topk_idx, _, params, geometry):
        return moe(tokens, topk_idx, None, params, geometry)

    def dense(tokens, topk_idx, weights, params):
        return dense_moe(tokens, topk_idx, jnp.ones_like(weights), params)

    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, dtype=np.float64)
        assert_same_gradients(
            sharded_moe(layer=layer), dense, topk_idx, tokens, weights, params, rtol=1e-10
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_have_the_dtype_of_their_arguments(dtype, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    dtype = getattr(jnp, dtype)
    tokens, params = jax.tree.map(lambda a: a.astype(dtype), (tokens, params))
    actual = jax.grad(partial(loss, sharded_moe(), topk_idx), argnums=(0, 1, 2))(
        tokens, weights, params
    )
    expected = jax.grad(partial(loss, dense_moe, topk_idx), argnums=(0, 1, 2))(
        *jax.tree.map(lambda a: a.astype(np.float32), (tokens, weights, params))
    )
    assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(
        lambda a: a.dtype, (tokens, weights, params)
    )
    rtol = 1e-4 if dtype == jnp.float32 else 16 * float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=rtol, atol=rtol),
        actual,
        expected,
    )


def test_ragged_dot_as_the_experts(rng):
    def layer(tokens, topk_idx, weights, params, geometry):
        out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        y = jax.lax.ragged_dot(out.tokens, params[0], out.group_sizes)
        return fio.combine(y, out.handle, weights)

    def dense(tokens, topk_idx, weights, params):
        rows = jnp.einsum("th,tkhj->tkj", tokens, params[0][jnp.maximum(topk_idx, 0)])
        return jnp.sum(jnp.where(topk_idx >= 0, weights, 0)[..., None] * rows, axis=1)

    tokens, topk_idx, weights, params = arguments(rng)
    assert_same_gradients(
        sharded_moe(layer=layer), dense, topk_idx, tokens, weights, params, rtol=1e-4
    )


def test_only_the_floating_leaves_of_a_pytree_move(rng):
    tokens, topk_idx, *_ = arguments(rng)

    def fn(tokens, topk_idx):
        leaves = {"x": tokens, "id": topk_idx, "scale": [tokens[:, 0], tokens[:, :1] * 2]}
        out = fio.dispatch(leaves, topk_idx, axis_name="expert", **GEOMETRY.options())
        x, scale = out.tokens["x"], out.tokens["scale"]
        return fio.combine(x * scale[0][:, None] * scale[1] + out.tokens["id"][:, :1], out.handle)

    layer = jax.shard_map(fn, mesh=make_mesh(4), in_specs=P("expert"), out_specs=P("expert"))
    count = jnp.sum(topk_idx >= 0, axis=1)[:, None]

    def dense(x):
        return count * 2 * x * x[:, :1] ** 2

    actual = jax.grad(lambda x: layer(x, topk_idx).sum())(tokens)
    expected = jax.grad(lambda x: dense(x).sum())(tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_replicated_tokens_get_the_sum_over_ranks():
    """With tokens the same on all ranks, the gradient is summed over the expert axis."""
    mesh = make_mesh(4)

    def fn(tokens, topk_idx):
        out = fio.dispatch(tokens, topk_idx, num_experts=4, axis_name="expert")
        return fio.combine(out.tokens, out.handle)

    layer = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("expert")), out_specs=P("expert"))
    topk_idx = jnp.array([[0, 1], [2, -1]] * 4, jnp.int32)
    grad = jax.grad(lambda x: layer(x, topk_idx).sum())(jnp.ones((2, 3)))
    assert grad.tolist() == [[8.0] * 3, [4.0] * 3]


def test_complex_rows():
    mesh = make_mesh(2)

    def fn(tokens, topk_idx):
        out = fio.dispatch(tokens, topk_idx, num_experts=2, axis_name="expert")
        return fio.combine((out.tokens * jnp.conj(out.tokens)).real, out.handle)

    layer = jax.shard_map(fn, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    x = jnp.array([[1 + 2j], [3 - 1j]])
    topk_idx = jnp.array([[1, 0], [0, -1]], jnp.int32)
    grad = jax.grad(lambda x: layer(x, topk_idx).sum())(x)
    np.testing.assert_allclose(grad, [[2 * 2 * (1 - 2j)], [2 * (3 + 1j)]])


# --- Finite differences, forward and reverse, twice --------------------------------------------


def check_to_second_order(fn, args):
    check_grads(fn, args, order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_finite_differences_of_the_layer(rng):
    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, SMALL, dtype=np.float64)
        layer = sharded_moe(SMALL)
        check_to_second_order(
            lambda tokens, weights, params: layer(tokens, topk_idx, weights, params),
            (tokens, weights, params),
        )


def test_finite_differences_of_dispatch(rng):
    with jax.enable_x64(True):
        tokens, topk_idx, *_ = arguments(rng, SMALL, dtype=np.float64)

        def fn(tokens, topk_idx):
            return fio.dispatch(tokens, topk_idx, axis_name="expert", **SMALL.options()).tokens

        fn = jax.jit(
            jax.shard_map(fn, mesh=make_mesh(2), in_specs=P("expert"), out_specs=P("expert"))
        )
        check_to_second_order(lambda tokens: fn(tokens, topk_idx), (tokens,))


@pytest.mark.parametrize("capacity", [None, 4])
def test_finite_differences_of_combine(capacity, rng):
    geometry = dataclasses.replace(SMALL, capacity=capacity)
    with jax.enable_x64(True):
        _, topk_idx, weights, _ = arguments(rng, geometry, "hot", dtype=np.float64)
        rows = capacity or 12
        expert_out = jnp.asarray(rng.standard_normal((2 * rows, WIDTH)))

        def fn(expert_out, topk_idx, weights):
            out = fio.dispatch(topk_idx, topk_idx, axis_name="expert", **geometry.options())
            return fio.combine(expert_out, out.handle, weights)

        fn = jax.jit(
            jax.shard_map(fn, mesh=make_mesh(2), in_specs=P("expert"), out_specs=P("expert"))
        )
        check_to_second_order(lambda e, w: fn(e, topk_idx, w), (expert_out, weights))
