"""Derivatives of dispatch and combine, and the exchanges that they cost."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import calls_in, make_mesh, require_calls
from jax import lax
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name
from moe import GEOMETRY, arguments, dense_moe, moe, sharded_moe

import freeio_jax as fio

assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def custom_calls(fn, *args):
    """How often each of the engine's calls is in the compiled program."""
    require_calls(make_mesh(GEOMETRY.num_ranks))
    return calls_in(jax.jit(fn).lower(*args).compile().as_text())


@pytest.mark.parametrize("check_vma", [True, False])
def test_jvp_linearize_and_vjp_agree_with_dense(check_vma, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    primals, tangents = (tokens, weights, params), jax.tree.map(jnp.sin, (tokens, weights, params))
    layer = sharded_moe(check_vma=check_vma)

    def of(fn):
        return lambda tokens, weights, params: fn(tokens, topk_idx, weights, params)

    expected, expected_dot = jax.jvp(of(dense_moe), primals, tangents)
    z, z_dot = jax.jvp(of(layer), primals, tangents)
    assert_close(z, expected)
    assert_close(z_dot, expected_dot)
    z, linear = jax.linearize(of(layer), *primals)
    assert_close(z, expected)
    assert_close(linear(*tangents), expected_dot)
    z, pullback = jax.vjp(of(layer), *primals)
    assert_close(z, expected)
    jax.tree.map(assert_close, pullback(z), jax.vjp(of(dense_moe), *primals)[1](z))


@pytest.mark.parametrize("which", range(3))
def test_jvp_of_one_argument_alone(which, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    args = (tokens, weights, params)

    def of(fn):
        def one(arg):
            tokens, weights, params = (*args[:which], arg, *args[which + 1 :])
            return fn(tokens, topk_idx, weights, params)

        return one

    tangent = jax.tree.map(jnp.cos, args[which])
    for actual, expected in zip(
        jax.jvp(of(sharded_moe()), (args[which],), (tangent,)),
        jax.jvp(of(dense_moe), (args[which],), (tangent,)),
        strict=True,
    ):
        assert_close(actual, expected)


def test_the_backward_pass_never_exchanges_routing(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = sharded_moe()

    def loss(tokens, weights, params):
        return (layer(tokens, topk_idx, weights, params) ** 2).sum()

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert custom_calls(grad, tokens, weights, params) == {
        "dispatch": 1,
        "combine": 2,
        "combine_transpose": 1,
    }
    assert custom_calls(loss, tokens, weights, params) == {"dispatch": 1, "combine": 1}


def test_only_the_gradients_asked_for_are_computed(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = sharded_moe()

    def loss(tokens, weights, params):
        return (layer(tokens, topk_idx, weights, params) ** 2).sum()

    for argnum, expected in (
        (1, {"dispatch": 1, "combine": 1, "combine_transpose": 1}),
        (2, {"dispatch": 1, "combine": 1, "combine_transpose": 1}),
    ):
        grad = jax.value_and_grad(loss, argnums=argnum)
        assert custom_calls(grad, tokens, weights, params) == expected


def test_no_order_of_derivative_exchanges_routing(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = sharded_moe()

    def loss(tokens, weights):
        return (layer(tokens, topk_idx, weights, params) ** 3).sum()

    def hessian_vector(tokens, weights):
        grad = jax.grad(loss, argnums=(0, 1))
        return jax.jvp(grad, (tokens, weights), (tokens, weights))

    assert custom_calls(hessian_vector, tokens, weights)["dispatch"] == 1
    assert custom_calls(jax.jacfwd(loss), tokens, weights)["dispatch"] == 1


def test_hessian_vector_products_agree_with_dense(rng):
    with jax.enable_x64(True):
        tokens, topk_idx, weights, params = arguments(rng, dtype=np.float64)
        primals = (tokens, weights, params)

        def products(layer):
            def loss(tokens, weights, params):
                return (layer(tokens, topk_idx, weights, params) ** 3).sum()

            grad = jax.grad(loss, argnums=(0, 1, 2))
            forward = jax.jvp(grad, primals, primals)[1]

            def slope(*args):
                grads = grad(*args)
                return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, args)))

            return forward, jax.grad(slope, argnums=(0, 1, 2))(*primals)

        jax.tree.map(
            assert_close, jax.jit(products, static_argnums=0)(sharded_moe()), products(dense_moe)
        )


# --- jax.checkpoint ------------------------------------------------------------------------------


def lowered_calls(fn, *args):
    """How often each call is in the program before XLA merges those that are equal."""
    require_calls(make_mesh(GEOMETRY.num_ranks))
    return calls_in(jax.jit(fn).lower(*args).as_text())


def by_primitive(primitive, *_, **__):
    return primitive.name.startswith("freeio_")


NAMED = {"names_which_can_be_saved": [], "names_which_can_be_offloaded": ["rows"]}
POLICIES = {
    "saved": jax.checkpoint_policies.save_only_these_names("rows"),
    "offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        **NAMED, offload_src="device", offload_dst="pinned_host"
    ),
    "by primitive": by_primitive,
}


def named_moe(tokens, topk_idx, weights, params, geometry):
    """``moe``, with a name for the rows that arrive."""

    class Api:
        combine = staticmethod(fio.combine)

        @staticmethod
        def dispatch(*args, **kwargs):
            out = fio.dispatch(*args, **kwargs)
            return dataclasses.replace(out, tokens=checkpoint_name(out.tokens, "rows"))

    return moe(tokens, topk_idx, weights, params, geometry, Api)


def rematted(policy, place):
    """The layer under jax.checkpoint, inside or outside of its shard_map."""
    if place == "outside":
        return jax.checkpoint(sharded_moe(layer=named_moe), policy=policy)
    return sharded_moe(layer=jax.checkpoint(named_moe, policy=policy, static_argnums=4))


def value_and_gradients(layer, topk_idx):
    def loss(tokens, weights, params):
        return (layer(tokens, topk_idx, weights, params) ** 2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_dispatch_whose_rows_are_saved_runs_once(policy, place, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    plain = value_and_gradients(sharded_moe(), topk_idx)
    saving = value_and_gradients(rematted(policy, place), topk_idx)
    args = tokens, weights, params
    assert lowered_calls(saving, *args)["dispatch"] == 1
    jax.tree.map(assert_close, jax.jit(saving)(*args), jax.jit(plain)(*args))


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_without_a_policy_nothing_is_saved(place, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = rematted(None, place)
    saved = saved_residuals(
        lambda weights, params: layer(tokens, topk_idx, weights, params), weights, params
    )
    assert all("from the argument" in source or "constant" in source for _, source in saved), saved
    grad = value_and_gradients(layer, topk_idx)
    assert lowered_calls(grad, tokens, weights, params)["dispatch"] == 2


def test_layers_in_a_scan_save_their_rows(rng):
    tokens, topk_idx, weights, _ = arguments(rng)

    def stack(policy):
        def layer(tokens, topk_idx, weights, _, geometry):
            out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
            rows = jnp.tanh(checkpoint_name(out.tokens, "rows"))
            return fio.combine(rows, out.handle, weights)

        layer = jax.checkpoint(sharded_moe(layer=layer), policy=policy)

        def layers(tokens, weights):
            def step(tokens, scale):
                return layer(tokens, topk_idx, scale * weights, (tokens,)), None

            return (lax.scan(step, tokens, jnp.arange(1.0, 4.0))[0] ** 2).sum()

        return jax.value_and_grad(layers, argnums=(0, 1))

    expected = stack(None)(tokens, weights)
    saving = stack(POLICIES["saved"])
    assert lowered_calls(saving, tokens, weights)["dispatch"] == 1
    jax.tree.map(assert_close, jax.jit(saving)(tokens, weights), expected)


# --- jax.linear_transpose ------------------------------------------------------------------------


def rows_of(tokens, topk_idx, weights, params, geometry):
    """All leaves that arrive, of a pytree of which the transpose may know a part."""
    both = {"tokens": tokens, "weights": weights}
    return fio.dispatch(both, topk_idx, axis_name="expert", **geometry.options()).tokens


def linear_layer(tokens, topk_idx, weights, params, geometry):
    out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
    return fio.combine(2 * out.tokens, out.handle, weights)


def linear_stack(tokens, topk_idx, weights, params, geometry):
    def step(tokens, _):
        return linear_layer(tokens, topk_idx, weights, params, geometry), None

    return lax.scan(step, tokens, length=2)[0]


def combine_of(tokens, topk_idx, weights, params, geometry):
    """Linear in the first features of ``params``, which are rows, and in the weights."""
    out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
    return fio.combine(params, out.handle, weights)


LINEAR = {
    # function, the arguments in which it is linear
    "dispatch": (rows_of, ["tokens"]),
    "dispatch of all leaves": (rows_of, ["tokens", "weights"]),
    "layer": (linear_layer, ["tokens"]),
    "layer in its weights": (linear_layer, ["weights"]),
    "layer under checkpoint": (jax.checkpoint(linear_layer, static_argnums=4), ["tokens"]),
    "scan": (linear_stack, ["tokens"]),
    "combine": (combine_of, ["params"]),
    "combine in its weights": (combine_of, ["weights"]),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layer, linear", LINEAR.values(), ids=LINEAR)
def test_linear_transpose_is_the_pullback(layer, linear, check_vma, rng):
    tokens, topk_idx, weights, _ = arguments(rng)
    ranks = GEOMETRY.num_ranks
    capacity = ranks * GEOMETRY.num_tokens * min(GEOMETRY.top_k, GEOMETRY.num_experts // ranks)
    args = {
        "tokens": tokens,
        "weights": weights,
        "params": rng.standard_normal((ranks * capacity, 2)).astype(np.float32),
    }
    mapped = sharded_moe(layer=layer, check_vma=check_vma)

    def of(*values):
        now = args | dict(zip(linear, values, strict=True))
        return mapped(now["tokens"], topk_idx, now["weights"], now["params"])

    values = [args[name] for name in linear]
    out, pull = jax.vjp(of, *values)
    ct = jax.tree.map(jnp.cos, out)
    transpose = jax.linear_transpose(of, *values)
    jax.tree.map(assert_close, transpose(ct), pull(ct))
    jax.tree.map(assert_close, jax.jit(transpose)(ct), pull(ct))
    # It is linear itself: its derivative is the same function, and its transpose the first one.
    jax.tree.map(assert_close, jax.jvp(transpose, (ct,), (ct,))[1], pull(ct))
    (back,) = jax.linear_transpose(transpose, ct)(tuple(values))
    if not (layer is rows_of and linear == ["tokens"]):  # else the known leaf is no part of it
        jax.tree.map(assert_close, back, out)


def test_linear_transpose_of_dispatch_is_one_combine(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    layer = sharded_moe(layer=lambda *args: rows_of(*args)["tokens"])

    def transposed(ct):
        return jax.linear_transpose(lambda x: layer(x, topk_idx, weights, params), tokens)(ct)

    rows = jax.eval_shape(layer, tokens, topk_idx, weights, params)
    assert custom_calls(transposed, jnp.ones(rows.shape)) == {"dispatch": 1, "combine": 1}
