"""Experts over packed rows against one expert at a time in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from freeio_jax.flax import MoEConfig, linen
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import GLU, MLP, Experts, SwiGLU, squared_relu

WIDTH, HIDDEN = 6, 8
SIZES = jnp.array([5, 0, 9], jnp.int32)
NUM_ROWS = 20


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def halves(x):
    return np.split(x, 2, axis=-1)


def columns(x):
    return x[:, 0::2], x[:, 1::2]


def silu_gated(gate, up):
    return gate * sigmoid(gate) * up


def clamped(gate, up):
    return np.minimum(gate, 0.5), np.clip(up, -0.5, 0.5)


def gpt_oss(gate, up):
    return gate * sigmoid(1.702 * gate) * (up + 1)


#: Each with the numpy function between its two products.
EXPERTS = {
    "swiglu": (SwiGLU(), lambda x: silu_gated(*halves(x))),
    "interleaved": (SwiGLU(interleaved=True), lambda x: silu_gated(*columns(x))),
    "limit": (SwiGLU(limit=0.5), lambda x: silu_gated(*clamped(*halves(x)))),
    "alpha": (SwiGLU(alpha=1.702), lambda x: gpt_oss(*halves(x))),
    "gpt_oss": (
        SwiGLU(limit=0.5, alpha=1.702, biases=True, interleaved=True),
        lambda x: gpt_oss(*clamped(*columns(x))),
    ),
    "glu": (GLU(jnp.tanh, biases=True), lambda x: np.tanh(halves(x)[0]) * halves(x)[1]),
    "relu": (MLP(), lambda x: np.maximum(x, 0)),
    "relu_squared": (MLP(squared_relu, biases=True), lambda x: np.maximum(x, 0) ** 2),
    "tanh": (MLP(jnp.tanh, biases=True), np.tanh),
}
every = pytest.mark.parametrize("name", EXPERTS)


def draw(experts, rng):
    shapes = experts.parameters(WIDTH, HIDDEN)
    parameters = {n: jnp.asarray(rng.normal(size=(3, *s)), jnp.float32) for n, s in shapes.items()}
    return parameters, jnp.asarray(rng.normal(size=(NUM_ROWS, WIDTH)), jnp.float32)


def one_expert(parameters, x, function):
    """In numpy, float64; products are the parameters of two dimensions, in their order."""
    x = np.asarray(x, np.float64)
    first, last = (name for name, a in parameters.items() if a.ndim == 2)
    for name in (first, last):
        x = x @ np.asarray(parameters[name]) + np.asarray(parameters.get(f"{name}_bias", 0))
        x = function(x) if name == first else x
    return x


@every
def test_each_group_sees_its_own_expert(name, rng):
    experts, function = EXPERTS[name]
    parameters, rows = draw(experts, rng)
    out = experts(parameters, rows, SIZES)
    for group, part in ((0, slice(0, 5)), (2, slice(5, 14))):
        own = {n: a[group] for n, a in parameters.items()}
        expected = one_expert(own, rows[part], function)
        np.testing.assert_allclose(out[part], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(experts.shared(own, rows[part]), expected, rtol=1e-4, atol=1e-4)
        of_one_group = Experts.shared(experts, own, rows[part])
        np.testing.assert_allclose(of_one_group, expected, rtol=1e-4, atol=1e-4)
    assert not out[14:].any()


@pytest.mark.parametrize("name", ["swiglu", "gpt_oss", "tanh"])
def test_rows_past_the_end_leave_no_trace(name, rng):
    experts, _ = EXPERTS[name]
    parameters, rows = draw(experts, rng)
    weight = jnp.asarray(rng.normal(size=rows.shape), jnp.float32)

    @jax.jit
    def gradients(rows, weight):
        def loss(parameters, rows):
            return experts(parameters, rows, SIZES)

        return jax.vjp(loss, parameters, rows)[1](weight)

    clean = gradients(rows.at[14:].set(0), weight.at[14:].set(0))
    dirty = gradients(rows.at[14:].set(jnp.nan), weight.at[14:].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not dirty[1][14:].any()
    assert not any(np.asarray(g[1]).any() for g in dirty[0].values())  # the group without rows


def test_initial_parameters():
    """Matrices are drawn for each expert on its own, biases are zero."""
    options = {"num_experts": 4, "top_k": 2, "expert_width": 64, "experts": MLP(biases=True)}
    variables = linen.MoE(**options).init(jax.random.key(0), jnp.zeros((2, 16)))
    up = np.asarray(variables["params"]["up"].value)
    assert variables["params"]["up_bias"].names == ("expert", None)
    assert not variables["params"]["up_bias"].value.any()
    assert np.abs(up[0] - up[1]).max() > 0.1
    np.testing.assert_allclose(up.std(), 1 / 4, rtol=0.1)


def test_the_default_names_and_shapes():
    shapes = MoEConfig(4, 2, 16, shared_expert_width=8).parameters(12)
    assert shapes == {
        "router": ((12, 4), (None, None)),
        "gate_up": ((4, 12, 32), ("expert", None, None)),
        "down": ((4, 16, 12), ("expert", None, None)),
        "shared_gate_up": ((12, 16), (None, None)),
        "shared_down": ((8, 12), (None, None)),
    }


@dataclasses.dataclass(frozen=True)
class Named(Experts):
    name: str

    def parameters(self, width, expert_width):
        return {self.name: (width, width)}

    def __call__(self, parameters, rows, group_sizes):
        raise AssertionError


def test_experts_that_do_not_fit():
    with pytest.raises(TypeError, match=r"SwiGLU\(\)"):
        MoEConfig(4, 2, 16, experts=jnp.tanh)
    with pytest.raises(ValueError, match="limit"):
        SwiGLU(limit=-1.0)
    for name in ("router", "bias", "shared_up", "expert_gate"):
        with pytest.raises(ValueError, match=f"'{name}'.*rename"):
            MoEConfig(4, 2, 16, experts=Named(name)).parameters(12)
    with pytest.raises(ValueError, match=r"'load'.*rename"):
        fio_nnx.MoE(
            12,
            num_experts=4,
            top_k=2,
            expert_width=16,
            experts=Named("load"),
            rngs=fio_nnx.nnx.Rngs(0),
        )
