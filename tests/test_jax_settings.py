"""dispatch and combine under the settings with which JAX is stricter, wider, or runs eagerly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh, values
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

APIS = {"freeio_jax": fio, "reference": fio.reference}

SETTINGS = {
    "numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "numpy_dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "enable_x64": lambda: jax.enable_x64(True),
    "enable_checks": lambda: jax.enable_checks(True),
    "debug_nans": lambda: jax.debug_nans(True),
}


def layer_of(api, ranks=2):
    """(tokens, topk_idx, weights) -> (sums, what the handle reports), over all ranks."""

    def layer(tokens, topk_idx, weights):
        leaves = {"rows": tokens, "first": tokens[:, 0]}
        out = api.dispatch(
            leaves, topk_idx, num_experts=2 * ranks, axis_name="expert", capacity=6, alignment=2
        )
        rows = jnp.sin(out.tokens["rows"]) + out.tokens["first"][:, None]
        counts = out.handle.num_dropped[None], out.handle.num_invalid[None]
        return api.combine(rows, out.handle, weights), (
            *(out.group_sizes, out.handle.expert_load),
            *counts,
        )

    mesh = make_mesh(ranks, axis_types=(AxisType.Auto,))
    return jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))


def arguments(rng, dtype, weight_dtype):
    topk_idx = jnp.array([[0, 3], [-1, 2], [1, 3], [3, 0], [2, 1], [3, 9]], jnp.int32)
    tokens = jnp.asarray(values(rng, (6, 3), np.float32), dtype)
    return tokens, topk_idx, jnp.asarray(values(rng, (6, 2), np.float32), weight_dtype)


def derivatives_of(layer, tokens, topk_idx, weights):
    """Results, gradients and a product with the Hessian."""

    def loss(tokens, weights):
        sums, counts = layer(tokens, topk_idx, weights)
        return (sums**2).sum(), (sums, counts)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, (sums, counts)), (products, _) = jax.jvp(gradient, (tokens, weights), (tokens, weights))
    return sums, counts, grads, products


#: One function for each API, so that it is compiled once without a setting.
without_setting = functools.cache(layer_of)


@pytest.mark.parametrize("api", APIS.values(), ids=APIS)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_changes_neither_values_nor_dtypes(setting, api, rng):
    args = arguments(rng, "bfloat16", "float32")
    run = jax.jit(derivatives_of, static_argnums=0)
    expected = run(without_setting(api), *args)
    with setting():
        # A new function: not every setting is a part of the key by which JAX finds a program.
        got = run(layer_of(api), *args)
    assert {count.dtype for count in got[1]} == {np.dtype(np.int32)}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("setting", [jax.disable_jit, *SETTINGS.values()])
def test_eagerly(setting, rng):
    args = arguments(rng, "float32", "float32")
    expected = jax.jit(derivatives_of, static_argnums=0)(without_setting(fio), *args)
    with setting():
        got = derivatives_of(layer_of(fio), *args)
    assert_close(got, expected)


def test_the_reference_eagerly(rng):
    """Its results alone: each of its steps is a program here, and in gradients there are many."""
    args = arguments(rng, "float32", "float32")
    expected = jax.jit(without_setting(fio.reference))(*args)
    with jax.disable_jit():
        got = layer_of(fio.reference)(*args)
    assert_close(got, expected)


def assert_close(got, expected):
    assert [a.dtype for a in jax.tree.leaves(got)] == [a.dtype for a in jax.tree.leaves(expected)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)
