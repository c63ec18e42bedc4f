"""Routers of a user's own, other inputs for routers, zero experts and experts that only pad.

What they compute is in test_families.py. Here: what is reported, random streams, and mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import assert_close, squashed
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from freeio_jax.flax import Choice, CustomRouter, MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.routers import SparseMixer

WIDTH = 8
LAYER = {"num_experts": 4, "top_k": 2, "expert_width": 8}


@dataclasses.dataclass(frozen=True)
class Plain(CustomRouter):
    """The default router, as one of a user's own; in training with noise."""

    load_balance_coef: float = 1e-2
    z_loss_coef: float = 1e-3
    bias_update_rate: float | None = None
    needs_key: bool = False

    def parameters(self, width, num_experts):
        return {"kernel": (width, num_experts)}

    def __call__(self, parameters, x, top_k, key=None):
        logits = jnp.dot(x, parameters["kernel"], precision="highest")
        if key is not None:
            logits = logits + jax.random.normal(key, logits.shape, jnp.float32)
        scores = jax.nn.softmax(logits)
        ids = jax.lax.top_k(scores + parameters.get("bias", jnp.zeros(1))[None], top_k)[1]
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        return Choice(ids, weights / weights.sum(-1, keepdims=True), scores, logits)


@dataclasses.dataclass(frozen=True)
class Returns(CustomRouter):
    """Returns what it is given."""

    returned: tuple
    load_balance_coef: float = 0.0

    def parameters(self, width, num_experts):
        return {}

    def __call__(self, parameters, x, top_k, key=None):
        return tuple(jnp.zeros(shape, dtype) for shape, dtype in self.returned)


@dataclasses.dataclass(frozen=True)
class Named(Returns):
    """Has vectors of these names."""

    returned: tuple
    bias_update_rate: float | None = None

    def parameters(self, width, num_experts):
        return dict.fromkeys(self.returned, (num_experts,))


def draw(config, rng, *shape):
    parameters = {
        n: jnp.asarray(rng.normal(size=s) / 2, jnp.float32)
        for n, (s, _) in config.parameters(WIDTH).items()
    }
    return parameters, jnp.asarray(rng.normal(size=(*(shape or (4, 3)), WIDTH)), jnp.float32)


def results(parameters, x, config, bias, mask):
    def loss(parameters, x):
        y, report = moe(parameters, x, config, bias=bias, token_mask=mask)
        return squashed(y) + report.aux_loss, (y, report)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(parameters, x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_default_router_as_a_custom_one(axis_type, rng):
    """Losses, reports, the choice's bias, masked tokens, padding, and gradients are the same."""
    usual = MoEConfig(**LAYER, router=Router(bias_update_rate=0.0))
    own = MoEConfig(**LAYER, router=Plain(bias_update_rate=0.0))
    parameters, x = draw(usual, rng)
    bias = jnp.asarray(rng.normal(size=4), jnp.float32)
    mask = jnp.arange(3)[None] < jnp.array([3, 2, 1, 3])[:, None]
    x = jnp.where(mask[..., None], x, jnp.nan)
    with jax.set_mesh(make_mesh((2,), axis_types=(axis_type,))):
        expected, grads = results(parameters, x[:3], usual, bias, mask[:3])
        parameters["router_kernel"] = parameters.pop("router")
        got, own_grads = results(parameters, x[:3], own, bias, mask[:3])
    own_grads[0]["router"] = own_grads[0].pop("router_kernel")
    assert_close((got, own_grads), (expected, grads))


def test_layers_have_a_custom_routers_parameters_in_float32():
    options = {"router": Plain(), "param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    layer = linen.MoE(**LAYER, **options)
    params = layer.init(jax.random.key(0), jnp.ones((2, WIDTH)))["params"]
    model = fio_nnx.MoE(WIDTH, **LAYER, **options, rngs=nnx.Rngs(0))
    for kernel in (params["router_kernel"].value, model.router_kernel[...]):
        assert (kernel.shape, kernel.dtype) == ((WIDTH, 4), jnp.float32)
        assert np.asarray(kernel).std() > 0.1
    assert model.gate_up[...].dtype == jnp.bfloat16


def test_a_key_in_training_only(rng):
    router = Plain(needs_key=True, bias_update_rate=0.5)
    x = draw(MoEConfig(**LAYER), rng)[1]
    layer = linen.MoE(**LAYER, router=router)
    variables = layer.init(jax.random.key(0), x)
    state = {name: variables[name] for name in ("params", "router_state")}

    def train(seed):
        rngs = {"jitter": jax.random.key(seed)}
        return layer.apply(state, x, mutable=["router_state", "intermediates"], rngs=rngs)

    def moved(load):
        load = np.asarray(load)
        return 0.5 * np.sign(load.mean() - load)

    still = layer.apply(state, x, True)
    (y, changed), (other, _) = train(1), train(2)
    assert np.abs(y - still).max() > 1e-3
    assert np.abs(y - other).max() > 1e-3
    load = changed["intermediates"]["load"][0]
    np.testing.assert_array_equal(changed["router_state"]["bias"], moved(load))
    model = fio_nnx.MoE(WIDTH, **LAYER, router=router, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(x, deterministic=True), model(x, deterministic=True))
    assert not model.bias[...].any()
    first = model(x)
    np.testing.assert_array_equal(model.bias[...], moved(model.load[...]))
    model.bias[...] = jnp.zeros(4)
    assert np.abs(model(x) - first).max() > 1e-3


def test_a_router_that_returns_ids_and_weights_only_has_no_losses(rng):
    config = MoEConfig(**LAYER, router=Returns((((12, 2), jnp.int32), ((12, 2), jnp.float32))))
    _, report = moe(*draw(config, rng), config)
    assert report.load.tolist() == [24, 0, 0, 0]
    assert float(report.load_balance_loss) == float(report.z_loss) == float(report.aux_loss) == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((((12, 2), "int32"),), r"Return ids and weights"),
        ((((12, 2), "float32"), ((12, 2), "float32")), r"ids float32\[12, 2\].*integer\[12, 2\]"),
        ((((12, 2), "int32"), ((12, 1), "float32")), r"weights float32\[12, 1\]"),
        ((((4, 3, 2), "int32"), ((12, 2), "float32")), r"one row for each of this rank's tokens"),
        (
            (((12, 2), "int32"), ((12, 2), "float32"), ((12, 3), "float32")),
            r"shares float32\[12, 3\].*floating\[12, 4\]",
        ),
    ],
)
def test_a_router_that_returns_something_else(returned, message, rng):
    config = MoEConfig(**LAYER, router=Returns(returned))
    with pytest.raises((TypeError, ValueError), match=message):
        moe(*draw(config, rng), config)


def test_mistakes_with_routers(rng):
    returned = (((12, 2), "int32"), ((12, 2), "float32"))
    config = MoEConfig(**LAYER, router=Returns(returned, load_balance_coef=0.1))
    with pytest.raises(ValueError, match=r"load_balance_coef=0\.1, but returns no shares"):
        moe(*draw(config, rng), config)
    with pytest.raises(TypeError, match=r"must be a freeio_jax\.flax\.Router"):
        MoEConfig(**LAYER, router=lambda x: x)
    with pytest.raises(ValueError, match="two experts, got top_k=1"):
        MoEConfig(**LAYER | {"top_k": 1}, router=SparseMixer())
    with pytest.raises(ValueError, match="top_k=5"):
        MoEConfig(**LAYER | {"top_k": 5}, router=Plain())
    own_bias = Named(("bias",), bias_update_rate=0.1)
    with pytest.raises(ValueError, match="rename the parameter"):
        MoEConfig(**LAYER, router=own_bias).parameters(WIDTH)
    assert "router_bias" in MoEConfig(**LAYER, router=Named(("bias",))).parameters(WIDTH)
    config = MoEConfig(**LAYER, router=Plain())
    parameters, x = draw(config, rng)
    with pytest.raises(ValueError, match=r"no use for \['router'\].*lacks \['router_kernel'\]"):
        moe(dict(parameters, router=parameters.pop("router_kernel")), x, config)


def test_a_router_input_that_does_not_fit(rng):
    config = MoEConfig(**LAYER)
    parameters, x = draw(config, rng)
    wide = MoEConfig(**LAYER, router_width=5)
    wide_parameters, _ = draw(wide, rng)
    calls = [
        (parameters, config, x[:3], r"router_input has an array of shape \(3, 3, 8\)"),
        (parameters, config, x[..., 0], r"one floating array.*CustomRouter"),
        (parameters, config, (x, x), r"one floating array.*CustomRouter"),
        (parameters, config, x.astype(int), r"one floating array"),
        (parameters, config, x[..., :5], r"router_input has 5 features.*width is 8.*router_width"),
        (wide_parameters, wide, None, r"x, which the router sees as well, has 8 .*width is 5"),
    ]
    for arrays, settings, router_input, message in calls:
        with pytest.raises((ValueError, TypeError), match=message):
            moe(arrays, x, settings, router_input=router_input)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_router_input_where_tokens_are_padded_and_masked(axis_type, rng):
    config = MoEConfig(**LAYER, router_width=5)
    parameters, x = draw(config, rng, 3, 3)
    seen = jnp.asarray(rng.normal(size=(3, 3, 5)), jnp.float32)
    mask = jnp.arange(3)[None] < jnp.array([3, 2, 1])[:, None]
    dirty = jnp.where(mask[..., None], seen, jnp.nan)

    def results(parameters, x, seen):
        def loss(parameters, x, seen):
            y, report = moe(parameters, x, config, router_input=seen, token_mask=mask)
            return squashed(y) + report.aux_loss, y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(parameters, x, seen)

    expected = jax.jit(results)(parameters, x, seen)
    with jax.set_mesh(make_mesh((2,), axis_types=(axis_type,))):
        got = jax.jit(results)(parameters, x, dirty)
    assert_close(got, expected)
    assert not got[1][2][~mask].any()
    assert np.abs(got[1][2]).max() > 1e-4


def test_zero_experts_are_counted_and_move_the_bias(rng):
    router = Router(bias_update_rate=0.5)
    model = fio_nnx.MoE(WIDTH, **LAYER, num_zero_experts=2, router=router, rngs=nnx.Rngs(0))
    assert model.load[...].shape == model.bias[...].shape == (6,)
    assert model.expert_drops[...].shape == (4,)
    x = draw(MoEConfig(**LAYER), rng)[1]
    model.bias[...] = jnp.array([0.0, 0, 0, 0, 5, 5])  # all tokens take these two
    np.testing.assert_allclose(model(x), x, rtol=1e-6)
    assert model.load[...].tolist() == [0, 0, 0, 0, 12, 12]
    assert model.bias[...].tolist() == [0.5, 0.5, 0.5, 0.5, 4.5, 4.5]


def test_zero_experts_take_no_room():
    """A factor of one is room for an even load, in which they have their part."""
    config = MoEConfig(2, 1, 4, num_zero_experts=2, capacity_factor=1.0)
    parameters = {n: jnp.ones(s) for n, (s, _) in config.parameters(4).items()}
    parameters["router"] = 9 * jnp.eye(4)
    for experts, dropped in (([0, 1, 2, 3] * 2, 0), ([2] * 8, 0), ([0] * 5 + [2] * 3, 1)):
        x = jnp.eye(4)[jnp.array(experts)]
        _, report = moe(parameters, x, config)
        assert int(report.dropped) == dropped


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "padded"),
    [(1, 6, 8), (2, 6, 8), (4, 6, 8), (8, 6, 8), (8, 60, 64)],
)
def test_experts_that_only_pad(num_ranks, num_experts, padded, rng):
    """Parameters of one shape fit all meshes; padding may hold anything and takes no gradient."""
    options = LAYER | {"num_experts": num_experts, "pad_experts_to": padded, "capacity_factor": 4.0}
    config = MoEConfig(**options)
    parameters, x = draw(config, rng, 8, 3)
    plain = MoEConfig(**options | {"pad_experts_to": None, "capacity_factor": None})
    cut = {n: a[:num_experts] if n in ("gate_up", "down") else a for n, a in parameters.items()}
    mask = jnp.ones(x.shape[:-1], bool)
    (_, (expected, _)), grads = results(cut, x, plain, None, mask)
    for name in ("gate_up", "down"):
        parameters[name] = parameters[name].at[num_experts:].set(jnp.nan)
    with jax.set_mesh(make_mesh((num_ranks,), axis_types=(AxisType.Auto,))):
        (_, (y, report)), padded_grads = results(parameters, x, config, None, mask)
        model = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
    assert model.gate_up[...].shape == (padded, WIDTH, 16)
    assert model.load[...].shape == report.load.shape == (num_experts,)
    assert int(report.dropped) == 0
    assert_close(y, expected)
    for name in ("gate_up", "down"):
        assert not padded_grads[0][name][num_experts:].any()
        padded_grads[0][name] = padded_grads[0][name][:num_experts]
    assert_close(padded_grads, grads)


def test_mistakes_with_experts_that_only_pad(rng):
    options = LAYER | {"num_experts": 6, "pad_experts_to": 8}
    with pytest.raises(ValueError, match=r"pad_experts_to=5 is less than num_experts=6"):
        MoEConfig(**options | {"pad_experts_to": 5})
    config = MoEConfig(**options)
    parameters, x = draw(config, rng)
    unpadded = parameters | {"gate_up": parameters["gate_up"][:6]}
    with pytest.raises(ValueError, match=r"adds 2 unused experts at the end.*jnp\.pad"):
        moe(unpadded, x, config)
    message = r"num_experts=6 \(pad_experts_to=9\).* 4 ranks .*\nUse pad_experts_to=8, .* 3 ranks"
    mesh = make_mesh((4,), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        moe(parameters, x, MoEConfig(**options | {"pad_experts_to": 9}))


def test_shards_of_experts_that_only_pad(rng):
    config = MoEConfig(**LAYER | {"num_experts": 3, "pad_experts_to": 4})
    parameters, x = draw(config, rng)
    expected, _ = moe(parameters, x, config)
    specs = {n: P(names[0]) for n, (_, names) in config.parameters(WIDTH).items()}
    layer = linen.MoE(**LAYER | {"num_experts": 3, "pad_experts_to": 4})
    shard = jax.shard_map(
        lambda p, x: layer.apply({"params": p}, x),
        mesh=make_mesh((4,), axis_types=(AxisType.Auto,)),
        in_specs=(specs, P("expert")),
        out_specs=P("expert"),
    )
    assert_close(jax.jit(shard)(parameters, x), expected)
