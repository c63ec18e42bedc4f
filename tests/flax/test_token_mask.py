"""Tokens that are masked out: as if they were not there, whatever they hold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import assert_close
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax import reference
from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import SwiGLU
from freeio_jax.flax.router import route

WIDTH = 8
LAYER = {"num_experts": 4, "top_k": 2, "expert_width": 8, "shared_expert_width": 4}
LENGTHS = np.array([4, 2, 1, 0])
MASK = np.arange(4)[None] < LENGTHS[:, None]


def draw(rng, config):
    parameters = {
        name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
        for name, (shape, _) in config.parameters(WIDTH).items()
    }
    return parameters, jnp.asarray(rng.normal(size=(*MASK.shape, WIDTH)), jnp.float32)


def results(parameters, x, config, mask, weight=1.0):
    """Output, report, and the gradients by parameters and x."""

    def loss(parameters, x):
        y, report = moe(parameters, x, config, token_mask=mask)
        return jnp.sum(weight * jnp.tanh(y)) + report.aux_loss, (y, report)

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    return out, grads


compiled_results = jax.jit(results, static_argnums=2)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("exchange", [None, reference], ids=["freeio", "reference"])
def test_masked_tokens_are_as_if_they_were_not_there(exchange, axis_type, rng):
    config = MoEConfig(**LAYER, exchange=exchange)
    parameters, x = draw(rng, config)
    (y, report), (by_parameters, by_x) = compiled_results(parameters, x[MASK], config, None)
    whole = np.zeros(x.shape, np.float32)

    def scattered(rows):
        out = whole.copy()
        out[MASK] = rows
        return out

    expected = (scattered(y), report), (by_parameters, scattered(by_x))
    # NaN where it must not be looked at: in the tokens, and in the gradient that comes back.
    dirty = jnp.where(MASK[..., None], x, jnp.nan)
    weight = jnp.where(MASK[..., None], 1.0, jnp.nan)
    compute = jax.jit(results, static_argnums=2)
    if axis_type is None:
        return assert_close(compute(parameters, dirty, config, MASK, weight), expected)
    with jax.set_mesh(make_mesh((2,), axis_types=(axis_type,))):
        assert_close(compute(parameters, dirty, config, MASK, weight), expected)


def test_masked_tokens_are_not_there_for_biases_gates_and_weights_on_the_input(rng):
    """What is not zero for an input of zeros must not show, nor a NaN that comes back."""
    config = MoEConfig(
        **LAYER,
        experts=SwiGLU(limit=1.0, alpha=1.5, biases=True),
        router=Router(logits_bias=True, weights_on="input"),
        shared_expert_gate=True,
    )
    parameters, x = draw(rng, config)
    expected, (by_parameters, by_x) = compiled_results(parameters, x[MASK], config, None)
    dirty = jnp.where(MASK[..., None], x, jnp.nan)
    weight = jnp.where(MASK[..., None], 1.0, jnp.nan)

    def loss(parameters, x):
        y, report = moe(parameters, x, config, token_mask=MASK)
        return (y, report.aux_loss), report

    (y, _), pull, report = jax.vjp(loss, parameters, dirty, has_aux=True)
    assert_close((y[MASK], report), expected)
    assert not y[~MASK].any()
    got_parameters, got_x = pull((weight * (1 - jnp.tanh(y) ** 2), jnp.float32(1)))
    assert_close((got_parameters, got_x[MASK]), (by_parameters, by_x))
    assert not got_x[~MASK].any()


def test_masked_tokens_take_no_room(rng):
    # All that is real goes to one expert, whose rank has room for just that.
    router = Router(load_balance_coef=0.0)
    config = MoEConfig(
        num_experts=4,
        top_k=1,
        expert_width=8,
        capacity_factor=MASK.sum() / MASK.size,
        router=router,
    )
    parameters, x = draw(rng, config)
    parameters["router"] = jnp.zeros_like(parameters["router"]).at[:, 1].set(1.0)
    _, report = moe(parameters, jnp.abs(x), config, token_mask=MASK)
    assert report.load.tolist() == [0, MASK.sum(), 0, 0]
    assert int(report.dropped) == 0
    _, report = moe(parameters, jnp.abs(x), config)
    assert int(report.dropped) == MASK.size - MASK.sum()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mask_where_the_tokens_do_not_divide_evenly(axis_type, rng):
    config = MoEConfig(**LAYER)
    parameters, x = draw(rng, config)
    x, mask = x[:3, :3], MASK[:3, :3]
    expected = compiled_results(parameters, x, config, mask)
    with jax.set_mesh(make_mesh((2,), axis_types=(axis_type,))):
        got = jax.jit(results, static_argnums=2)(parameters, x, config, mask)
    assert_close(got, expected)


def test_nothing_but_masked_tokens(rng):
    config = MoEConfig(**LAYER)
    parameters, x = draw(rng, config)
    out, grads = compiled_results(parameters, x * jnp.nan, config, np.zeros_like(MASK))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves((out, grads)))


def test_the_router_does_not_look_at_masked_tokens(rng):
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 8), (8, 4)))
    mask = jnp.arange(16) % 3 > 0

    def losses(kernel, x):
        routing = route(x, kernel, top_k=2, router=Router(), token_mask=mask)
        return routing.load_balance_loss + routing.z_loss + routing.topk_weights[1].sum()

    dirty = jnp.where(mask[:, None], x, jnp.nan)
    got, expected = (jax.value_and_grad(losses, (0, 1))(kernel, a) for a in (dirty, x))
    assert_close(got, expected)
    assert not got[1][1][~mask].any()


def test_linen_and_nnx_take_a_mask(rng):
    layer, (_, x) = linen.MoE(**LAYER), draw(rng, MoEConfig(**LAYER))
    variables = nn.meta.unbox(layer.init(jax.random.key(0), x, token_mask=MASK))
    expected, report = moe(variables["params"], x, MoEConfig(**LAYER), token_mask=MASK)
    y, state = layer.apply(variables, x, token_mask=MASK, mutable=["intermediates"])
    assert_close((y, state["intermediates"]["load"][0]), (expected, report.load))
    model = fio_nnx.MoE(WIDTH, **LAYER, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state({n: nnx.Param(a) for n, a in variables["params"].items()}))
    y = nnx.jit(lambda model, x, mask: model(x, token_mask=mask))(model, x, MASK)
    assert_close((y, model.load[...]), (expected, report.load))


def test_a_mask_that_does_not_fit(rng):
    config = MoEConfig(**LAYER)
    parameters, x = draw(rng, config)
    with pytest.raises(TypeError, match=r"token_mask must be bool.*astype\(bool\)"):
        moe(parameters, x, config, token_mask=jnp.ones(MASK.shape))
    with pytest.raises(ValueError, match=r"token_mask has shape \(4,\).*\(4, 4\)"):
        moe(parameters, x, config, token_mask=MASK[0])
