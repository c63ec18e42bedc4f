"""The MoE layers on meshes as people have them: with axes that hold no tokens, or given in other
ways than by ``jax.set_mesh``. Results and gradients are those of the layer on one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import assert_close, squashed
from flax import nnx
from helpers import make_mesh
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax import reference
from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx

WIDTH = 8
LAYER = {"num_experts": 4, "top_k": 2, "expert_width": 8, "shared_expert_width": 4}
CONFIG = MoEConfig(**LAYER)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
TYPES = {
    "auto": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "auto_and_explicit": (AUTO, EXPLICIT),
    "explicit_and_auto": (EXPLICIT, AUTO),
}
UNUSED = pytest.mark.parametrize("names", [("data", "expert"), ("expert", "model")], ids="-".join)


def mesh_2x2(names, types="auto"):
    return make_mesh((2, 2), names, axis_types=TYPES[types])


def draw(rng, *shape):
    parameters = {
        name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
        for name, (shape, _) in CONFIG.parameters(WIDTH).items()
    }
    return parameters, jnp.asarray(rng.normal(size=(*(shape or (8, 2)), WIDTH)), jnp.float32)


def results(parameters, x, config=CONFIG, **options):
    """Output, report, and the gradients by parameters and x."""

    def loss(parameters, x):
        y, report = moe(parameters, x, config, **options)
        return squashed(y) + report.aux_loss, (y, report)

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    return out, grads


#: Compiled once for all tests of the same shapes.
on_one_device = jax.jit(results)


def other_than_expert(names):
    return next(name for name in names if name != "expert")


def spread(mesh, parameters, x, x_spec):
    """Parameters that are spread over the unused axis as well (FSDP, say), and x."""
    other = other_than_expert(mesh.axis_names)
    specs = {
        "gate_up": P("expert", other),
        "down": P("expert", None, other),
        "router": P(other),
        "shared_gate_up": P(None, other),
        "shared_down": P(),
    }
    placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in parameters.items()}
    return placed, jax.device_put(x, NamedSharding(mesh, x_spec))


@pytest.mark.parametrize("types", TYPES)
@UNUSED
def test_an_axis_that_holds_no_tokens(names, types, rng):
    mesh, (parameters, x) = mesh_2x2(names, types), draw(rng)
    expected = on_one_device(parameters, x)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(results)(parameters, x), expected)


@pytest.mark.parametrize("types", ["auto", "explicit"])
@UNUSED
def test_arrays_that_are_sharded_over_an_axis_that_holds_no_tokens(names, types, rng):
    mesh, (parameters, x) = mesh_2x2(names, types), draw(rng)
    expected, other = on_one_device(parameters, x), other_than_expert(names)
    with jax.set_mesh(mesh):
        for x_spec in (P(other), P(("expert", other)), P(None, None, other)):
            placed = spread(mesh, parameters, x, x_spec)
            assert_close(jax.jit(results)(*placed), expected)


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_padding_on_a_mesh_with_an_axis_that_holds_no_tokens(types, rng):
    parameters, x = draw(rng, 3, 3)
    expected = on_one_device(parameters, x)
    with jax.set_mesh(mesh_2x2(("data", "expert"), types)):
        assert_close(jax.jit(results)(parameters, x), expected)


@pytest.mark.parametrize("types", ["auto", "explicit"])
@UNUSED
def test_linen_and_nnx_with_an_axis_that_holds_no_tokens(names, types, rng):
    options, (_, x) = LAYER | {"top_k": 1}, draw(rng)
    layer = linen.MoE(**options)
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    expected = jax.jit(layer.apply)(variables, x)
    with jax.set_mesh(mesh_2x2(names, types)):
        assert_close(jax.jit(layer.apply)(variables, x), expected)
        model = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
        for name, value in variables["params"].items():
            sharding = getattr(model, name)[...].sharding
            getattr(model, name)[...] = jax.device_put(value, sharding)
        assert_close(nnx.jit(lambda model, x: model(x))(model, x), expected)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("left_over", ["model", "data"])
@pytest.mark.parametrize("outer_is_expert", [True, False], ids=["expert_is_manual", "left_over"])
def test_inside_a_shard_map_that_leaves_an_axis_over(outer_is_expert, left_over, check_vma, rng):
    """An axis without tokens ("model") or with tokens ("data"); either of the two is manual."""
    mesh, (parameters, x) = mesh_2x2(("expert", left_over)), draw(rng)
    outer = "expert" if outer_is_expert else left_over
    config = MoEConfig(**LAYER, token_axes=None if left_over == "model" else ("data", "expert"))
    expected = on_one_device(parameters, x)
    specs = {
        name: P("expert") if outer == axes[0] else P()
        for name, (_, axes) in config.parameters(WIDTH).items()
    }
    x_spec = P(outer) if outer in config.all_token_axes else P()
    layer = jax.shard_map(
        lambda parameters, x: moe(parameters, x, config),
        mesh=mesh,
        in_specs=(specs, x_spec),
        out_specs=(x_spec, P()),
        axis_names={outer},
        check_vma=check_vma,
    )

    def loss(parameters, x):
        y, report = layer(parameters, x)
        return squashed(y) + report.aux_loss, (y, report)

    def gradient(parameters, x):
        return jax.grad(loss, (0, 1), has_aux=True)(parameters, x)

    grads, out = jax.jit(gradient)(parameters, x)
    assert_close((out, grads), expected)
    tangents = jax.tree.map(jnp.ones_like, (parameters, x))
    by_gradient = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
    _, derivative, _ = jax.jit(lambda *a: jax.jvp(loss, a, tangents, has_aux=True))(parameters, x)
    np.testing.assert_allclose(derivative, by_gradient, 1e-4, 1e-5)


def test_inside_a_shard_map_whose_ranks_hold_different_tokens_for_a_layer_of_their_own(rng):
    mesh, (parameters, x) = mesh_2x2(("data", "expert")), draw(rng)

    def loss(parameters, x):
        y, report = moe(parameters, x, CONFIG)
        return squashed(y) + report.aux_loss

    def average(parameters, x):
        return lax.pmean(loss(parameters, x), "data")

    average = jax.shard_map(
        average, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"}
    )
    each = [jax.grad(loss, (0, 1))(parameters, part) for part in jnp.split(x, 2)]
    by_parameters = jax.tree.map(lambda a, b: (a + b) / 2, each[0][0], each[1][0])
    by_x = jnp.concatenate([each[0][1], each[1][1]]) / 2
    assert_close(jax.jit(jax.grad(average, (0, 1)))(parameters, x), (by_parameters, by_x))


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_jitter_is_equal_along_an_axis_that_holds_no_tokens(types, rng):
    config, (parameters, x) = MoEConfig(**LAYER, router=Router(jitter=0.3)), draw(rng)
    key = jax.random.key(7)

    def layer(parameters, x):
        return moe(parameters, x, config, jitter_key=key)

    with jax.set_mesh(make_mesh((2,), axis_types=TYPES[types][:1])):
        expected = jax.tree.map(np.asarray, jax.jit(layer)(parameters, x))
    with jax.set_mesh(mesh_2x2(("expert", "model"), types)):
        assert_close(jax.jit(layer)(parameters, x), expected)


@pytest.mark.parametrize("types", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("expert"), P()], ids=["sharded", "replicated"])
def test_without_a_current_mesh_the_arguments_name_it(spec, types, rng):
    mesh, (parameters, x) = make_mesh((2,), axis_types=TYPES[types][:1]), draw(rng)
    expected = moe(parameters, x, CONFIG)
    x = jax.device_put(x, NamedSharding(mesh, spec))
    placed = jax.device_put(parameters, NamedSharding(mesh, P()))
    for arguments in ((placed, x), (parameters, x)):
        assert_close(jax.jit(lambda p, x: moe(p, x, CONFIG))(*arguments), expected)
    assert_close(moe(placed, x, CONFIG), expected)
    with pytest.warns(DeprecationWarning), mesh:
        assert_close(jax.jit(lambda p, x: moe(p, x, CONFIG))(placed, x), expected)


def test_without_a_current_mesh_the_arguments_name_the_devices_as_well(rng, caplog):
    parameters, x = draw(rng)
    expected = moe(parameters, x, CONFIG)
    mesh = Mesh(np.array(jax.devices()[2:0:-1]), ("expert",))
    placed = jax.device_put((parameters, x), NamedSharding(mesh, P()))
    with caplog.at_level("DEBUG", logger="freeio_jax"):
        assert_close(moe(*placed, CONFIG), expected)
    compiled = [m for m in caplog.messages if m.startswith("compiles")]
    assert compiled
    assert all("devices, each in one process" in message for message in compiled)
    assert_close(jax.jit(lambda p, x: moe(p, x, CONFIG))(*placed), expected)


def test_without_a_current_mesh_gradients_and_layers_find_the_arguments_mesh_as_well(rng):
    mesh, (parameters, x) = make_mesh((2,), axis_types=(AUTO,)), draw(rng)
    expected = on_one_device(parameters, x)
    placed = jax.device_put((parameters, x), NamedSharding(mesh, P()))
    assert_close(jax.jit(results)(*placed), expected)
    model = fio_nnx.MoE(WIDTH, **LAYER, rngs=nnx.Rngs(0))
    y = model(x)
    assert_close(nnx.jit(lambda model, x: model(x))(model, placed[1]), y)


@pytest.mark.parametrize("exchange", [None, reference], ids=["freeio", "reference"])
@pytest.mark.parametrize("legacy", [False, True], ids=["no_mesh", "with_mesh"])
def test_a_program_for_several_devices_whose_mesh_is_not_known_names_the_remedy(
    legacy, exchange, rng
):
    mesh, (parameters, x) = make_mesh((2,), axis_types=(AUTO,)), draw(rng)
    config = MoEConfig(**LAYER, exchange=exchange)
    elsewhere = jax.device_put(jnp.ones(2), NamedSharding(mesh, P("expert")))

    def step(x, elsewhere):
        # Nothing that the layer sees says that the program runs on two devices.
        return moe(parameters, x, config)[0], elsewhere * 2

    def call():
        with pytest.raises(ValueError, match=r"2 devices.*jax\.set_mesh.*mesh=mesh"):
            jax.jit(step)(x, elsewhere)

    if not legacy:
        return call()
    with pytest.warns(DeprecationWarning), mesh:
        call()


def test_arguments_on_a_mesh_without_the_layers_axes_name_the_remedy(rng):
    mesh, (parameters, x) = make_mesh((2,), ("data",), axis_types=(AUTO,)), draw(rng)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    for call in (moe, jax.jit(moe, static_argnums=2)):
        with pytest.raises(ValueError, match=r"\('data',\), but not \['expert'\].*jax\.set_mesh"):
            call(parameters, x, CONFIG)


def test_arguments_on_a_mesh_of_one_device_need_no_axis(rng):
    parameters, x = draw(rng)
    expected = moe(parameters, x, CONFIG)
    mesh = jax.make_mesh((1,), ("data",), (AUTO,), devices=jax.local_devices()[:1])
    assert_close(moe(parameters, jax.device_put(x, NamedSharding(mesh, P())), CONFIG), expected)
