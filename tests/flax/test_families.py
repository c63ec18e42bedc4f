"""The layers with the settings of model families, against the families' own formulas.

Output and all gradients in float32, as a share of the largest value; on one device by the core,
on four by linen and nnx."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, WIDTH
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax.flax import MoEConfig, linen, moe
from freeio_jax.flax import nnx as fio_nnx


def router_input(family, x):
    return None if family.router_input is None else family.router_input(x)


def core(family, parameters, x):
    parameters = dict(parameters)
    options = {"bias": parameters.pop("bias", None), "router_input": router_input(family, x)}
    return moe(parameters, x, MoEConfig(**family.settings()), **options)[0]


def by_linen(family, parameters, x):
    parameters = dict(parameters)
    bias = parameters.pop("bias", None)
    state = {} if bias is None else {"router_state": {"bias": bias}}
    layer = linen.MoE(**family.settings())
    return layer.apply({"params": parameters, **state}, x, router_input=router_input(family, x))


def by_nnx(family, parameters, x):
    layer = nnx.eval_shape(lambda: fio_nnx.MoE(WIDTH, **family.settings(), rngs=nnx.Rngs(0)))
    nnx.update(layer, parameters)
    return layer(x, deterministic=True, router_input=router_input(family, x))


LAYERS = ((core, 1), (by_linen, 4), (by_nnx, 4))


def draw(family, rng):
    shapes = {n: s for n, (s, _) in MoEConfig(**family.settings()).parameters(WIDTH).items()}
    if family.has_bias:
        shapes["bias"] = (MoEConfig(**family.settings()).num_choices,)
    parameters = {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2:][0]), jnp.float32)
        for name, shape in shapes.items()
    }
    return parameters, jnp.asarray(rng.normal(size=(8, 3, WIDTH)), jnp.float32)


def value_and_gradients(function, parameters, x):
    def loss(parameters, x):
        y = function(parameters, x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parameters, x)
    return jax.tree.map(np.asarray, (y, grads))


def assert_equal(got, expected):
    def check(got, expected):
        largest = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_allclose(got / largest, expected / largest, rtol=0, atol=1e-5)

    jax.tree.map(check, got, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, rng):
    family = FAMILIES[name]
    parameters, x = draw(family, rng)

    def block(parameters, x):
        return family.block(parameters, x.reshape(-1, WIDTH)).reshape(x.shape)

    expected = value_and_gradients(block, parameters, x)
    assert all(np.abs(g).max() > 1e-4 for n, g in expected[1][0].items() if n != "bias")
    for function, num_devices in LAYERS:
        with jax.set_mesh(make_mesh(num_devices, axis_types=(AxisType.Auto,))):
            got = value_and_gradients(functools.partial(function, family), parameters, x)
        assert_equal(got, expected)
