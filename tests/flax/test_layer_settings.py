"""The layers and the router under settings of JAX that users turn on."""

import contextlib

import dense_moe
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import SwiGLU
from freeio_jax.flax.router import load_balance_loss, route, select, update_bias

WIDTH = 8
ROUTER = Router(score="sigmoid", num_groups=2, bias_update_rate=0.1, jitter=0.1)
LAYER = {
    "num_experts": 4,
    "top_k": 2,
    "expert_width": 8,
    "router": ROUTER,
    "shared_expert_width": 4,
    "capacity_factor": 1.0,
    "alignment": 2,
}
FAMILY = LAYER | {
    "router": Router(logits_bias=True, num_groups=2, group_score="max", weights_on="input"),
    "experts": SwiGLU(limit=1.0, alpha=1.5, biases=True, interleaved=True),
    "shared_expert_gate": True,
}
REPORTS = {
    "load": "int32",
    "dropped": "int32",
    "expert_drops": "int32",
    "source_drops": "int32",
    "load_balance_loss": "float32",
    "z_loss": "float32",
    "aux_loss": "float32",
}


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


SETTINGS = {"strict": strict, "x64": lambda: jax.enable_x64(True), "no_jit": jax.disable_jit}
settings = pytest.mark.parametrize("setting", SETTINGS)
on_meshes = pytest.mark.parametrize("shape", [None, (2,)], ids=["one_device", "mesh"])


@contextlib.contextmanager
def mesh_of(shape):
    if shape is None:
        yield
    else:
        with jax.set_mesh(make_mesh(shape, axis_types=(AxisType.Auto,))):
            yield


def tokens(rng, *shape):
    return jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32)


def assert_equal(got, expected):
    got, expected = map(dense_moe.on_any_mesh, (got, expected))
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, expected)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(
            np.asarray(g), e, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(e).max())
        ),
        got,
        expected,
    )


@on_meshes
@settings
def test_the_layer(setting, shape, rng):
    check_the_layer(setting, shape, MoEConfig(**LAYER), rng)


@pytest.mark.parametrize("setting", ["strict", "x64"])
def test_the_layer_with_what_model_families_need(setting, rng):
    check_the_layer(setting, None, MoEConfig(**FAMILY), rng)


def check_the_layer(setting, shape, config, rng):
    x, mask = tokens(rng, 3, 3), jnp.arange(3)[None] < jnp.array([3, 2, 1])[:, None]
    parameters = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32)
        for n, (s, _) in config.parameters(WIDTH).items()
    }
    bias = None if config.router.bias_update_rate is None else jnp.zeros(4, jnp.float32)

    def loss(parameters, x):
        y, report = moe(parameters, x, config, bias=bias, token_mask=mask)
        return jnp.sum(y**2) + report.aux_loss, (y, report)

    compute = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    expected = jax.tree.map(np.asarray, compute(parameters, x))
    with SETTINGS[setting](), mesh_of(shape):
        got = compute(parameters, x)
    assert_equal(got, expected)


@on_meshes
@settings
def test_linen(setting, shape, rng):
    x = tokens(rng, 4, 2)
    with SETTINGS[setting](), mesh_of(shape):
        layer = linen.MoE(**LAYER)
        variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
        y, state = layer.apply(
            variables,
            x,
            rngs={"jitter": jax.random.key(1)},
            mutable=["losses", "intermediates", "drops", "router_state"],
        )
    sown = state["intermediates"] | state["losses"] | state["drops"]
    assert {name: value[0].dtype.name for name, value in sown.items()} == REPORTS
    assert {a.dtype.name for a in jax.tree.leaves((variables, state["router_state"], y))} == {
        "float32"
    }


@on_meshes
@settings
def test_nnx(setting, shape, rng):
    x = tokens(rng, 4, 2)
    with SETTINGS[setting](), mesh_of(shape):
        model = fio_nnx.MoE(WIDTH, **LAYER, rngs=nnx.Rngs(0))
        made = {name: getattr(model, name)[...].dtype.name for name in REPORTS}
        y = model(x)
        called = {name: getattr(model, name)[...].dtype.name for name in REPORTS}
    assert made == called == REPORTS
    assert y.dtype == model.bias[...].dtype == model.gate_up[...].dtype == jnp.float32


@settings
@pytest.mark.parametrize("router", [Router(), ROUTER], ids=["softmax", "groups_bias_jitter"])
def test_the_router(setting, router, rng):
    x, kernel = tokens(rng, 12), jnp.asarray(rng.normal(size=(WIDTH, 4)), jnp.float32)
    mask, bias = jnp.arange(12) % 3 > 0, jnp.asarray(rng.normal(size=4), jnp.float32)
    bias = bias if router.bias_update_rate else None

    def all_of_it(x, kernel):
        routing = route(
            x,
            kernel,
            top_k=2,
            router=router,
            bias=bias,
            token_mask=mask,
            jitter_key=jax.random.key(0),
        )
        scores = jnp.abs(x[:, :4])
        return (
            routing,
            select(scores, 2, router, bias),
            load_balance_loss(jnp.full(4, 0.25, jnp.float32), routing.load),
            update_bias(jnp.zeros(4, jnp.float32), routing.load, 0.1),
        )

    expected = jax.tree.map(np.asarray, all_of_it(x, kernel))
    with SETTINGS[setting]():
        got = all_of_it(x, kernel)
    assert_equal(got, expected)
