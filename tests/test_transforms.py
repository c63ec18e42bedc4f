"""Derivatives of dispatch and combine, and the exchanges that they cost."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe import arguments, dense_moe, sharded_moe

assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def custom_calls(fn, *args):
    """How often each of the engine's calls is in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return Counter(re.findall(r'custom_call_target="freeio_(\w+)"', text))


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
