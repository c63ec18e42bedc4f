"""``zero_tail=False``: rows past the end hold anything, and no defined result depends on them.

On CPU the tests' engine fills such rows with NaN (``conftest.py``).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Geometry, assert_bitwise, make_mesh, per_shard, routing, values
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import reference
from freeio_jax.flax.experts import bias_of_rows
from freeio_jax.grouped_matmul import grouped_matmul, use

GEOMETRIES = {
    "dropless": Geometry(4, 5, 3, 8),
    "aligned": Geometry(4, 5, 3, 8, alignment=4),
    "cut": Geometry(4, 5, 3, 8, capacity=12, alignment=4),
}
every = pytest.mark.parametrize("name", GEOMETRIES)
#: Of the packed rows, of the experts' hidden rows, and of what they give back.
WIDTH, HIDDEN, OUT = 3, 4, 2

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU engine poisons tails")


def with_any_tail(geometry):
    return dataclasses.replace(geometry, zero_tail=False)


def experts_of(rows, group_sizes, params):
    """Two products with biases and an activation between: all that layers do with packed rows."""
    first, first_bias, second, second_bias = params
    hidden = grouped_matmul(rows, first, group_sizes)
    hidden = jnp.tanh(hidden + bias_of_rows(first_bias, group_sizes, rows.shape[0]))
    out = grouped_matmul(hidden, second, group_sizes)
    return out + bias_of_rows(second_bias, group_sizes, rows.shape[0])


def layer(geometry, api=fio, remat=False):
    """(tokens, topk_idx, weights, params) -> sums, of all ranks."""

    def one_rank(tokens, topk_idx, weights, params):
        out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        return api.combine(experts_of(out.tokens, out.group_sizes, params), out.handle, weights)

    if remat:
        one_rank = jax.checkpoint(one_rank)
    mesh = make_mesh(geometry.num_ranks)
    return jax.shard_map(one_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def arguments(rng, geometry, skew="holes"):
    topk_idx = routing(rng, geometry, skew).reshape(-1, geometry.top_k)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = (
        *(normal(geometry.num_experts, WIDTH, HIDDEN), normal(geometry.num_experts, HIDDEN)),
        *(normal(geometry.num_experts, HIDDEN, OUT), normal(geometry.num_experts, OUT)),
    )
    tokens = normal(topk_idx.shape[0], WIDTH)
    return jnp.asarray(topk_idx), tokens, normal(*topk_idx.shape), params


def loss(layer, topk_idx, tokens, weights, params):
    z = layer(tokens, topk_idx, weights, params)
    return jnp.sum(jnp.sin(z + jnp.arange(z.size, dtype=z.dtype).reshape(z.shape)))


def assert_equal(got, expected):
    """To the last bit on CPU; on GPUs XLA may choose another product for each compilation."""
    if jax.default_backend() == "cpu":
        jax.tree.map(assert_bitwise, got, expected)
    else:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def assert_no_difference(evaluate, geometry, rng, **options):
    """``evaluate(layer, topk_idx, *operands)`` gives the same whatever the tail is."""
    compiled = [
        jax.jit(partial(evaluate, layer(each, **options)))
        for each in (geometry, with_any_tail(geometry))
    ]
    for skew in ("holes", "one expert", "none"):
        operands = arguments(rng, geometry, skew)
        expected, got = (run(*operands) for run in compiled)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected))
        assert_equal(got, expected)


# --- What is not written -------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("operation", ["dispatch", "dispatch_along", "combine_transpose"])
@every
def test_only_rows_past_the_end_are_left(name, operation, rng):
    geometry = with_any_tail(GEOMETRIES[name])

    send = partial(fio.dispatch, axis_name="expert", **geometry.options())

    def fn(tokens, topk_idx, weights):
        out = send(tokens, topk_idx)
        rows = out.tokens
        if operation == "dispatch_along":
            rows = jax.jvp(lambda x: send(x, topk_idx).tokens, (tokens,), (tokens,))[1]
        if operation == "combine_transpose":
            _, transpose = jax.vjp(lambda rows: fio.combine(rows, out.handle, weights), out.tokens)
            (rows,) = transpose(tokens)
        return rows, out.group_sizes

    topk_idx = routing(rng, geometry, "uniform")
    tokens = values(rng, (geometry.num_ranks, geometry.num_tokens, WIDTH), "float32")
    weights = np.ones(topk_idx.shape, np.float32)
    rows, group_sizes = per_shard(fn, make_mesh(geometry.num_ranks))(tokens, topk_idx, weights)
    left = 0
    for ours, sizes in zip(np.asarray(rows), np.asarray(group_sizes), strict=True):
        assert np.isfinite(ours[: sizes.sum()]).all()
        assert (ours[sizes.sum() :].view(np.uint32) == 2**32 - 1).all()
        left += len(ours) - sizes.sum()
    assert left > 0 or name == "cut"


# --- What does not depend on them ----------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@every
def test_values_and_gradients(name, remat, rng):
    def evaluate(layer, topk_idx, *operands):
        return jax.value_and_grad(partial(loss, layer, topk_idx), (0, 1, 2))(*operands)

    assert_no_difference(evaluate, GEOMETRIES[name], rng, remat=remat)


@pytest.mark.parametrize("name", ["ragged_dot", "tiled"])
def test_gradients_by_each_product_that_is_always_there(name, rng):
    def evaluate(layer, topk_idx, *operands):
        with use(name):
            return jax.grad(partial(loss, layer, topk_idx), (0, 1, 2))(*operands)

    assert_no_difference(evaluate, GEOMETRIES["aligned"], rng)


def test_forward_mode(rng):
    def evaluate(layer, topk_idx, *operands):
        tangents = jax.tree.map(jnp.cos, operands)
        return jax.jvp(partial(loss, layer, topk_idx), operands, tangents)

    assert_no_difference(evaluate, GEOMETRIES["aligned"], rng)


def test_second_derivatives(rng):
    def evaluate(layer, topk_idx, *operands):
        gradient = jax.grad(partial(loss, layer, topk_idx), (0, 1, 2))
        tangents = jax.tree.map(jnp.cos, operands)
        by_forward = jax.jvp(gradient, operands, tangents)[1]

        def along(*operands):
            terms = jax.tree.map(jnp.vdot, gradient(*operands), tangents)
            return sum(jax.tree.leaves(terms))

        return by_forward, jax.grad(along, (0, 1, 2))(*operands)

    assert_no_difference(evaluate, GEOMETRIES["aligned"], rng)


def test_vmap(rng):
    def evaluate(layer, topk_idx, *operands):
        batch = jax.tree.map(lambda a: jnp.stack([a, jnp.sin(a)]), operands)
        gradient = jax.grad(partial(loss, layer, topk_idx), (0, 1, 2))
        return jax.vmap(gradient)(*batch)

    assert_no_difference(evaluate, GEOMETRIES["aligned"], rng)


def test_the_reference_takes_it_and_its_handle(rng):
    geometry = with_any_tail(GEOMETRIES["aligned"])

    @dataclasses.dataclass(frozen=True)
    class Mixed:
        dispatch: object
        combine: object

    topk_idx, *operands = arguments(rng, geometry)
    expected, *others = (
        jax.jit(jax.value_and_grad(partial(loss, layer(geometry, api), topk_idx), (0, 1, 2)))(
            *operands
        )
        for api in (fio, reference, Mixed(reference.dispatch, fio.combine))
    )
    for other in others:
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, other, expected)
