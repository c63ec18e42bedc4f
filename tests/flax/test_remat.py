"""The layers under nn.remat and nnx.remat: a policy by primitive saves the exchange."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax.flax import linen as freeio_linen
from freeio_jax.flax import nnx as freeio_nnx

WIDTH = 4
OPTIONS = {"num_experts": 4, "top_k": 2, "expert_width": 8}


def saves_exchanges(primitive, *_, **__):
    return primitive.name.startswith("freeio_")


def linen_loss(x, policy):
    layer = nn.remat(freeio_linen.MoE, policy=policy)(**OPTIONS)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    return params, lambda params: (layer.apply({"params": params}, x) ** 2).sum()


def nnx_loss(x, policy):
    model = freeio_nnx.MoE(WIDTH, **OPTIONS, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    call = nnx.remat(lambda model, x: model(x), policy=policy)
    return state, lambda state: (call(nnx.merge(graph, state), x) ** 2).sum()


@pytest.mark.parametrize("loss_of", [linen_loss, nnx_loss])
def test_a_policy_by_primitive_saves_the_exchange(loss_of):
    gradients = []
    with jax.set_mesh(make_mesh(2, axis_types=(AxisType.Auto,))):
        x = jax.random.normal(jax.random.key(1), (6, WIDTH), jnp.float32)
        for policy, dispatches in ((None, 2), (saves_exchanges, 1)):
            params, loss = loss_of(x, policy)
            step = jax.jit(jax.value_and_grad(loss, allow_int=True))  # nnx: all of the state
            calls = Counter(re.findall(r"@freeio_(\w+)", step.lower(params).as_text()))
            assert calls["dispatch"] == dispatches
            leaves = jax.tree.leaves(step(params))
            gradients.append([leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *gradients)
