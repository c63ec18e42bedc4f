"""Parameters over further mesh axes: FSDP, and tensor parallelism of the experts' width.

Results and gradients are those of the layer on one device."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import assert_close, squashed
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import MLP, SwiGLU

WIDTH = 8
LAYER = {"num_experts": 8, "top_k": 2, "expert_width": 8, "shared_expert_width": 4}
LAYERS = {
    "separate": {"experts": SwiGLU(separate=True)},
    "interleaved_with_biases": {
        "experts": SwiGLU(limit=1.0, alpha=1.5, biases=True, interleaved=True),
        "shared_expert_gate": True,
        "router": Router(weights_on="input", logits_bias=True),
    },
    "separate_with_biases": {
        "experts": SwiGLU(separate=True, biases=True),
        "num_zero_experts": 2,
        "capacity_factor": 0.6,
        "drops": "evenly",
        "alignment": 2,
        "num_experts": 6,
        "pad_experts_to": 8,
    },
    "mlp": {"experts": MLP(biases=True), "capacity_factor": 1.0},
}
DATA = {"token_axes": ("data", "expert"), "fsdp_axes": ("data",)}
MODEL = {"model_axes": ("model",)}
MESHES = {
    "fsdp": ((2, 4), ("data", "expert"), DATA),
    "model": ((4, 2), ("expert", "model"), MODEL),
    "both": ((2, 2, 2), ("data", "expert", "model"), DATA | MODEL),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
on_meshes = pytest.mark.parametrize("name", MESHES)


def mesh_of(name, kind=AUTO):
    shape, axes, _ = MESHES[name]
    return make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def draw(rng, config):
    parameters = {
        n: jnp.asarray(rng.normal(size=s) / 2, jnp.float32)
        for n, (s, _) in config.parameters(WIDTH).items()
    }
    return parameters, jnp.asarray(rng.normal(size=(8, 4, WIDTH)), jnp.float32)


def results(parameters, x, config, **options):
    def loss(parameters, x):
        y, report = moe(parameters, x, config, **options)
        return squashed(y) + report.aux_loss, (y, report)

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    return out, grads


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def without_partition(name, options):
    """The same layer where each rank has whole matrices: on the mesh without the model axis."""
    shape, axes, partition = MESHES[name]
    plain = MoEConfig(**options, **without(partition, "fsdp_axes", "model_axes"))
    kept = [(n, axis) for n, axis in zip(shape, axes, strict=True) if axis != "model"]
    sizes, names = zip(*kept, strict=True)
    return plain, make_mesh(sizes, names, axis_types=(AUTO,) * len(names))


@pytest.mark.parametrize(
    ("layer", "kind"), [*((name, AUTO) for name in LAYERS), ("separate_with_biases", EXPLICIT)]
)
@on_meshes
def test_equal_numbers(name, layer, kind, rng):
    options = LAYER | LAYERS[layer]
    config = MoEConfig(**options, **MESHES[name][2])
    parameters, x = draw(rng, config)
    x = x.at[..., 0].set(1)
    parameters["router"] = parameters["router"].at[0, 0].set(3)  # most tokens want expert 0
    plain, small_mesh = without_partition(name, options)
    with jax.set_mesh(small_mesh):  # which has as many ranks that drop
        expected = jax.tree.map(
            np.asarray, jax.jit(results, static_argnums=2)(parameters, x, plain)
        )
    with jax.set_mesh(mesh_of(name, kind)):
        got = jax.jit(results, static_argnums=2)(parameters, x, config)
    assert_close(got, expected)
    if layer == "separate":
        assert_close(got, jax.jit(results, static_argnums=2)(parameters, x, MoEConfig(**options)))
    if layer == "separate_with_biases":
        assert int(got[0][1].dropped) > 0
        assert got[0][1].source_drops.tolist() == expected[0][1].source_drops.tolist()


SPECS = {
    "fsdp": {
        "gate": P("expert", "data", None),
        "down": P("expert", None, "data"),
        "gate_bias": P("expert", None),
        "shared_gate": P("data", None),
        "shared_down": P(None, "data"),
        "router": P(None, None),
    },
    "model": {
        "gate": P("expert", None, "model"),
        "down": P("expert", "model", None),
        "gate_bias": P("expert", "model"),
        "down_bias": P("expert", None),
        "shared_gate": P(None, "model"),
        "shared_down": P("model", None),
    },
    "both": {
        "gate": P("expert", "data", "model"),
        "down": P("expert", "model", "data"),
        "gate_bias": P("expert", "model"),
        "shared_down": P("model", "data"),
    },
}


@on_meshes
def test_linen_and_nnx_keep_the_shards(name, rng):
    options = LAYER | {"experts": SwiGLU(separate=True, biases=True)} | MESHES[name][2]
    layer, config = linen.MoE(**options), MoEConfig(**options)
    parameters, x = draw(rng, config)
    expected, expected_grads = jax.jit(results, static_argnums=2)(parameters, x, config)
    mesh = mesh_of(name)

    def loss(parameters, x):
        y, state = layer.apply({"params": parameters}, x, mutable=["losses"])
        return squashed(y) + state["losses"]["aux_loss"][0], y

    with jax.set_mesh(mesh):
        specs = nn.get_partition_spec(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
        placed = {
            n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in parameters.items()
        }
        grads, y = jax.jit(jax.grad(loss, has_aux=True))(placed, x)
        model = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
        for parameter, value in placed.items():
            variable = getattr(model, parameter)
            assert variable[...].sharding.is_equivalent_to(value.sharding, value.ndim)
            variable[...] = value
        by_nnx = nnx.jit(lambda model, x: model(x))(model, x)
    for parameter, spec in SPECS[name].items():
        assert specs[parameter] == spec
    for parameter, gradient in grads.items():
        sharding = placed[parameter].sharding
        assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim), parameter
    assert_close((y, by_nnx), (expected[0], expected[0]))
    assert_close(grads, expected_grads[0])


def test_what_crosses_the_links(rng):
    """FSDP gathers six matrices and scatters their gradients; model axes need neither."""

    def collectives(name):
        config = MoEConfig(**LAYER, experts=SwiGLU(separate=True), **MESHES[name][2])
        parameters, x = draw(rng, config)
        with jax.set_mesh(mesh_of(name)):
            lowered = jax.jit(results, static_argnums=2).lower(parameters, x, config)
        text = lowered.as_text()
        return {
            operation: len(re.findall(rf"stablehlo\.{operation}\b", text))
            for operation in ("all_gather", "reduce_scatter")
        }

    assert collectives("fsdp") == {"all_gather": 6, "reduce_scatter": 6}
    assert collectives("model") == {"all_gather": 0, "reduce_scatter": 0}


@pytest.mark.parametrize(
    ("manual", "check_vma"),
    [(None, True), (None, False), ({"expert"}, True), ({"data", "model"}, False)],
    ids=["all", "all_unchecked", "expert", "others_unchecked"],
)
def test_inside_a_shard_map(manual, check_vma, rng):
    options = LAYER | {"experts": SwiGLU(separate=True, biases=True)} | MESHES["both"][2]
    config, mesh = MoEConfig(**options), mesh_of("both")
    parameters, x = draw(rng, config)
    expected = jax.jit(results, static_argnums=2)(parameters, x, config)
    axes = set(mesh.axis_names) if manual is None else manual

    def only(*entries):
        return P(*(tuple(a for a in np.ravel(e).tolist() if a in axes) for e in entries))

    specs = {
        n: only(*(e or () for e in names)) for n, (_, names) in config.parameters(WIDTH).items()
    }
    tokens = only(("data", "expert"))
    layer = jax.shard_map(
        lambda parameters, x: moe(parameters, x, config),
        mesh=mesh,
        in_specs=(specs, tokens),
        out_specs=(tokens, P()),
        axis_names=axes,
        check_vma=check_vma,
    )

    def loss(parameters, x):
        y, report = layer(parameters, x)
        return squashed(y) + report.aux_loss, (y, report)

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(parameters, x)
    assert_close((out, grads), expected)


def test_separate_parameters_compute_what_one_does(rng):
    config = MoEConfig(**LAYER)
    parameters, x = draw(rng, config)
    separate = {}
    for name, a in parameters.items():
        if name.endswith("gate_up"):
            halves = jnp.split(a, 2, axis=-1)
            for part, half in zip(("gate", "up"), halves, strict=True):
                separate[name.replace("gate_up", part)] = half
        else:
            separate[name] = a
    split = MoEConfig(**LAYER, experts=SwiGLU(separate=True))
    assert set(split.parameters(WIDTH)) == set(separate)
    assert_close(moe(separate, x, split), moe(parameters, x, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_axes": "data"}, r"fsdp_axes must be a tuple"),
        ({"fsdp_axes": ("data",)}, r"have \['data'\].*Add the axes to token_axes"),
        ({"fsdp_axes": ("expert",)}, r"no expert axes: \[\]"),
        ({"model_axes": ("expert",)}, r"work on the same tokens: use another mesh axis"),
        ({"model_axes": ("model",)}, r"SwiGLU\(separate=True\) or SwiGLU\(interleaved=True\)"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MoEConfig(**LAYER, **changes)


def test_other_mistakes(rng):
    with pytest.raises(ValueError, match="exclude each other"):
        SwiGLU(separate=True, interleaved=True)
    options = LAYER | {"experts": SwiGLU(separate=True)} | MESHES["both"][2]
    config = MoEConfig(**options)
    parameters, x = draw(rng, config)
    with jax.set_mesh(mesh_of("fsdp")), pytest.raises(ValueError, match=r"not \['model'\]"):
        moe(parameters, x, config)
    with jax.set_mesh(mesh_of("both")):
        for changes, message in (
            (
                {"expert_width": 5},
                r"^MoE: 5, .*'gate' \(8, 8, 5\).* 2 ranks of model_axes.*\n.*\(\)",
            ),
            ({"shared_expert_width": 3}, r"'shared_gate' \(8, 3\).* 2 ranks of model_axes"),
        ):
            narrow = options | changes
            with pytest.raises(ValueError, match=message):
                moe(draw(rng, MoEConfig(**narrow))[0], x, MoEConfig(**narrow))
            with pytest.raises(ValueError, match=message):
                linen.MoE(**narrow).init(jax.random.key(0), x)
            with pytest.raises(ValueError, match=message):
                fio_nnx.MoE(WIDTH, **narrow, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"'gate' \(8, 7, 8\).* 2 ranks of fsdp_axes"):
            fio_nnx.MoE(7, **options, rngs=nnx.Rngs(0))
