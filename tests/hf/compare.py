"""Compares layers that have a checkpoint's weights with what another implementation computed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax import hf
from freeio_jax.flax import linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.hf.check import router_input_of
from freeio_jax.hf.options import moe_config

#: As a share of the largest value, in float32.
TOLERANCE = 1e-5


def by_core(config, layer, parameters, bias, x):
    _, settings = moe_config(config, layer)
    router_input = router_input_of(config, x)
    y, _ = moe(parameters, x, settings, bias=bias, router_input=router_input)
    return y


def by_linen(config, layer, parameters, bias, x):
    module = linen.MoE.from_hf(config, layer)
    return module.apply(
        hf.Weights(parameters, bias).linen,
        x,
        deterministic=True,
        router_input=router_input_of(config, x),
    )


def by_nnx(config, layer, parameters, bias, x):
    module = nnx.eval_shape(lambda: fio_nnx.MoE.from_hf(config, layer, rngs=nnx.Rngs(0)))
    nnx.update(module, hf.Weights(parameters, bias).nnx)
    return module(x, deterministic=True, router_input=router_input_of(config, x))


def largest_difference(apply, num_devices, ckpt, gradients, layer, x, weight, y, dx) -> float:
    """The largest difference of output and gradients of ``sum(y * weight)``.

    Args:
      apply: ``by_core``, ``by_linen`` or ``by_nnx``.
      num_devices: of the mesh, over which the experts are spread.
      ckpt: the checkpoint with the layer's weights.
      gradients: a checkpoint with the weights' gradients.
      layer: the layer's number.
      x, weight, y, dx: input, a factor of each output, the outputs, the input's gradient.
    """
    apply = functools.partial(apply, ckpt.config, layer)

    def loss(parameters, x, bias):
        y = apply(parameters, bias, x)
        return jnp.sum(y * weight), y

    with jax.set_mesh(make_mesh(num_devices, axis_types=(AxisType.Auto,))):
        weights = hf.load_moe(ckpt, layer, dtype=jnp.float32)
        expected = hf.load_moe(gradients, layer, dtype=jnp.float32).parameters
        step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (got, got_dx), got_y = step(weights.parameters, jnp.asarray(x), weights.bias)
        got, expected = got | {"y": got_y, "dx": got_dx}, expected | {"y": y, "dx": dx}
        got, expected = jax.tree.map(np.asarray, (got, expected))
    assert got.keys() == expected.keys()
    differences = {}
    for name, array in expected.items():
        largest = np.abs(array).max()
        assert largest > 1e-4, f"{name} is zero, so it says nothing"
        differences[name] = np.abs(got[name] - array).max() / largest
    assert max(differences.values()) < TOLERANCE, differences
    return float(max(differences.values()))
