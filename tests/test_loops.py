"""vmap, loops, checkpoint and jit around and inside of shard_map, with check_vma on and off."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import PartitionSpec as P
from moe import GEOMETRY, WIDTH, arguments, dense_moe, moe, sharded_moe

import freeio_jax as fio

assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def stacked_arguments(rng, count):
    """``count`` sets of (tokens, topk_idx, weights), stacked, with one set of parameters."""
    sets = [arguments(rng) for _ in range(count)]
    return [jnp.stack(column) for column in list(zip(*sets, strict=True))[:3]], sets[0][3]


def square_layer(tokens, topk_idx, weights, params, geometry=GEOMETRY):
    """A layer whose result can be its next tokens."""
    z = moe(tokens, topk_idx, weights, params, geometry)
    return jnp.concatenate([z, z[:, :1]], axis=1) + tokens


def dense_square(tokens, topk_idx, weights, params):
    z = dense_moe(tokens, topk_idx, weights, params)
    return jnp.concatenate([z, z[:, :1]], axis=1) + tokens


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_vmap_is_a_loop(outside, check_vma, rng):
    """Over the sharded function, and inside of it."""
    batch, params = stacked_arguments(rng, 3)
    if outside:
        layer = jax.vmap(sharded_moe(check_vma=check_vma), in_axes=(0, 0, 0, None))
    else:
        layer = jax.shard_map(
            jax.vmap(moe, in_axes=(0, 0, 0, None)),
            mesh=make_mesh(4),
            in_specs=(P(None, "expert"),) * 3 + (P("expert"),),
            out_specs=P(None, "expert"),
            check_vma=check_vma,
        )

    def loss(layer, *args):
        return (layer(*args) ** 2).sum()

    expected = jax.vmap(dense_moe, in_axes=(0, 0, 0, None))
    assert_close(jax.jit(layer)(*batch, params), expected(*batch, params))
    jax.tree.map(
        assert_close,
        jax.jit(jax.grad(partial(loss, layer), argnums=(0, 2, 3)))(*batch, params),
        jax.grad(partial(loss, expected), argnums=(0, 2, 3))(*batch, params),
    )


@pytest.mark.parametrize("in_axes", [(1, None, None, None), (None, None, 0, None), (0, 0, None, 0)])
def test_vmap_of_some_arguments(in_axes, rng):
    (tokens, topk_idx, weights), params = stacked_arguments(rng, 2)
    args = [
        leaf if axis == 0 else jnp.moveaxis(leaf, 0, 1) if axis == 1 else leaf[0]
        for leaf, axis in zip((tokens, topk_idx, weights), in_axes, strict=False)
    ]
    args.append(jax.tree.map(lambda p: jnp.stack([p, -p]), params) if in_axes[3] == 0 else params)
    actual = jax.jit(jax.vmap(sharded_moe(), in_axes=in_axes))(*args)
    assert_close(actual, jax.vmap(dense_moe, in_axes=in_axes)(*args))


def test_vmap_over_a_mesh_axis(rng):
    """vmap with spmd_axis_name: the batch is spread over a further axis of the mesh."""
    batch, params = stacked_arguments(rng, 2)
    mesh = make_mesh((2, 4), ("data", "expert"))
    layer = jax.vmap(sharded_moe(mesh=mesh), in_axes=(0, 0, 0, None), spmd_axis_name="data")
    expected = jax.vmap(dense_moe, in_axes=(0, 0, 0, None))
    assert_close(jax.jit(layer)(*batch, params), expected(*batch, params))


def test_jacobians(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = sharded_moe()
    for jacobian in (jax.jacfwd, jax.jacrev):
        actual, expected = (
            jacobian(lambda w, fn=fn: fn(tokens, topk_idx, w, params)[:, 0])(weights)
            for fn in (layer, dense_moe)
        )
        assert_close(actual, expected)


def scan_of(layer):
    def run(tokens, topk_idx, weights, params):
        def step(tokens, routed):
            z = layer(tokens, *routed, params)
            return z, z

        return jax.lax.scan(step, tokens, (topk_idx, weights))

    return run


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_scan(outside, check_vma, rng):
    """A scan around shard_map, and one inside of it, with other routing at each step."""
    (tokens, topk_idx, weights), params = stacked_arguments(rng, 3)
    if outside:
        run = scan_of(sharded_moe(layer=square_layer, check_vma=check_vma))
    else:
        steps = P(None, "expert")
        run = jax.shard_map(
            scan_of(square_layer),
            mesh=make_mesh(4),
            in_specs=(P("expert"), steps, steps, P("expert")),
            out_specs=(P("expert"), steps),
            check_vma=check_vma,
        )

    def loss(run, *args):
        last, every = run(*args)
        return (last**2).sum() + (every**3).sum(), last

    actual, expected = (
        jax.jit(jax.value_and_grad(partial(loss, fn), argnums=(0, 2, 3), has_aux=True))(
            tokens[0], topk_idx, weights, params
        )
        for fn in (run, scan_of(dense_square))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), actual, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_while_loop(check_vma, rng):
    """The number of steps is data, the same on all ranks."""
    tokens, topk_idx, weights, params = arguments(rng)

    def loop(layer, tokens, topk_idx, weights, params, steps):
        def body(state):
            step, tokens, topk_idx = state
            z = layer(tokens, topk_idx, weights, params)
            return step + 1, z, jnp.where(topk_idx >= 0, (topk_idx + 1) % 8, -1)

        return jax.lax.while_loop(lambda s: s[0] < steps, body, (0, tokens, topk_idx))[1]

    mapped = jax.shard_map(
        partial(loop, square_layer),
        mesh=make_mesh(4),
        in_specs=(P("expert"),) * 4 + (P(),),
        out_specs=P("expert"),
        check_vma=check_vma,
    )
    for steps in (0, 1, 4):
        args = (tokens, topk_idx, weights, params, jnp.int32(steps))
        assert_close(jax.jit(mapped)(*args), loop(dense_square, *args))


def test_cond_that_all_ranks_decide_alike(rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def fn(tokens, topk_idx, weights, params, exchange):
        return jax.lax.cond(
            exchange,
            square_layer,
            lambda tokens, *_: tokens,
            *(tokens, topk_idx, weights, params),
        )

    mapped = jax.jit(
        jax.shard_map(
            fn,
            mesh=make_mesh(4),
            in_specs=(P("expert"),) * 4 + (P(),),
            out_specs=P("expert"),
        )
    )
    args = (tokens, topk_idx, weights, params)
    assert_close(mapped(*args, True), dense_square(*args))
    assert_close(mapped(*args, False), tokens)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
def test_checkpoint(outside, check_vma, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    if outside:
        layer = jax.checkpoint(sharded_moe(check_vma=check_vma))
    else:
        layer = sharded_moe(layer=jax.checkpoint(moe, static_argnums=(4,)), check_vma=check_vma)

    def loss(layer, tokens, weights, params):
        return (layer(tokens, topk_idx, weights, params) ** 2).sum()

    actual, expected = (
        jax.jit(jax.value_and_grad(partial(loss, fn), argnums=(0, 1, 2)))(tokens, weights, params)
        for fn in (layer, dense_moe)
    )
    jax.tree.map(assert_close, actual, expected)


def test_a_handle_crosses_loops_and_jit(rng):
    """It is a pytree: a scan carries it, an inner jit takes and returns it."""
    tokens, topk_idx, *_ = arguments(rng)

    def fn(tokens, topk_idx):
        dispatch = jax.jit(partial(fio.dispatch, axis_name="expert", **GEOMETRY.options()))
        out = dispatch(tokens, topk_idx)

        def step(carry, scale):
            rows, handle = carry
            return (rows, handle), jax.jit(fio.combine)(rows * scale, handle)

        return jax.lax.scan(step, (out.tokens, out.handle), jnp.arange(3.0))[1].sum(axis=0)

    mapped = jax.shard_map(fn, mesh=make_mesh(4), in_specs=P("expert"), out_specs=P("expert"))
    count = jnp.sum(topk_idx >= 0, axis=1)[:, None]
    assert_close(jax.jit(mapped)(tokens, topk_idx), 3 * count * tokens)
    assert tokens.shape[1] == WIDTH


def test_without_jit(rng):
    """shard_map called eagerly evaluates each primitive by itself."""
    tokens, topk_idx, weights, _ = arguments(rng)

    def fn(tokens, topk_idx, weights):
        out = fio.dispatch(tokens, topk_idx, axis_name="expert", **GEOMETRY.options())
        return fio.combine(out.tokens, out.handle, weights)

    mapped = jax.shard_map(fn, mesh=make_mesh(4), in_specs=P("expert"), out_specs=P("expert"))
    expected = jnp.sum(jnp.where(topk_idx >= 0, weights, 0), axis=1)[:, None] * tokens
    assert_close(mapped(tokens, topk_idx, weights), expected)


def test_ahead_of_time_compilation_and_donation(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    expected = dense_square(tokens, topk_idx, weights, params)
    layer = jax.jit(sharded_moe(layer=square_layer), donate_argnums=0)
    compiled = layer.lower(tokens, topk_idx, weights, params).compile()
    assert_close(compiled(tokens, topk_idx, weights, params), expected)
