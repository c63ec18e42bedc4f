"""The MoE layers against a dense evaluation of the same parameters on one device."""

import dataclasses

import dense_moe
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.layout import balanced_capacity

WIDTH = 16
AXES = ("data", "expert")
LAYERS = {
    "softmax": {},
    "not_renormalized": {"router": Router(renormalize=False, weight_scale=2.0)},
    "sigmoid_groups_bias_shared": {
        "router": Router(
            score="sigmoid", num_groups=4, groups_per_token=2, bias_update_rate=0.25, jitter=0.1
        ),
        "shared_expert_width": 12,
    },
    "aligned": {"alignment": 8},
    "top_1": {"top_k": 1, "router": Router(renormalize=False)},
}
CASES = [(name, AxisType.Auto) for name in LAYERS] + [
    ("softmax", AxisType.Explicit),
    ("sigmoid_groups_bias_shared", AxisType.Explicit),
]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def settings(**changes):
    return {"num_experts": 8, "top_k": 3, "expert_width": 24, "token_axes": AXES} | changes


def mesh_2x4(axis_type=AxisType.Auto):
    return make_mesh((2, 4), AXES, axis_types=(axis_type,) * 2)


def draw_parameters(config, rng):
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
        for name, (shape, _) in config.parameters(WIDTH).items()
    }


def draw_tokens(rng, *shape):
    return jnp.asarray(rng.normal(size=(*shape, WIDTH)), jnp.float32)


def dense(parameters, x, config, bias=None):
    """Output, report, and gradients by parameters and x of the loss of :func:`loss_of`."""
    # Plain arrays of one device: the type of an array carries its explicit mesh.
    parameters, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (parameters, x))
    scores, _ = dense_moe.score(parameters, x, config.router)
    chosen = dense_moe.choose(scores, config.top_k, config.router, bias)

    def loss(parameters, x):
        y, report = dense_moe.dense_moe(parameters, x, config, chosen)
        return loss_of(y, report.aux_loss), (y, report)

    (_, (y, report)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, x)
    return y, report, grads


def loss_of(y, aux_loss):
    return jnp.mean(jnp.sin(y + jnp.arange(y.shape[-1]))) + aux_loss


def assert_close(got, expected):
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(np.asarray(g), np.asarray(e), **TOLERANCE),
        *map(dense_moe.on_any_mesh, (got, expected)),
    )


def draw_bias(config, rng):
    if config.router.bias_update_rate is None:
        return None
    return jnp.asarray(rng.normal(size=config.num_experts) / 4, jnp.float32)


@pytest.mark.parametrize(("name", "axis_type"), CASES)
def test_linen_equals_dense(name, axis_type, rng):
    layer = linen.MoE(**settings(**LAYERS[name]))
    config = MoEConfig(**settings(**LAYERS[name]))
    mesh = mesh_2x4(axis_type)
    x, parameters, bias = (
        draw_tokens(rng, 8, 5),
        draw_parameters(config, rng),
        draw_bias(config, rng),
    )
    state = {} if bias is None else {"router_state": {"bias": bias}}

    def loss(parameters, x):
        collections = ["losses", "intermediates", "drops"]
        y, sown = layer.apply({"params": parameters, **state}, x, True, mutable=collections)
        return loss_of(y, sown["losses"]["aux_loss"][0]), (y, sown)

    with jax.set_mesh(mesh):
        shardings = {
            n: NamedSharding(mesh, P(*names)) for n, (_, names) in config.parameters(WIDTH).items()
        }
        sharded = jax.device_put(parameters, shardings)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P(AXES)))
        (_, (y, sown)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            sharded, x_sharded
        )
    expected_y, report, expected_grads = dense(parameters, x, config, bias)
    assert_close(y, expected_y)
    assert_close(grads, expected_grads)
    assert grads[0]["gate_up"].sharding.spec[0] == "expert"
    assert_close(sown["losses"]["aux_loss"][0], report.aux_loss)
    for field in ("load", "dropped", "load_balance_loss", "z_loss"):
        assert_close(sown["intermediates"][field][0], getattr(report, field))
    assert_close(sown["drops"]["expert_drops"][0], report.expert_drops)
    assert sown["drops"]["source_drops"][0].tolist() == [0] * 8


@pytest.mark.parametrize(("name", "axis_type"), CASES)
def test_nnx_equals_dense(name, axis_type, rng):
    mesh, options = mesh_2x4(axis_type), settings(**LAYERS[name])
    # In training, for an evaluation reports nothing; without jitter, which dense has not.
    options["router"] = dataclasses.replace(options.get("router", Router()), jitter=0.0)
    with jax.set_mesh(mesh):
        layer = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
        assert layer.gate_up.get_value().sharding.spec[0] == "expert"
        bias = draw_bias(layer.config, rng)
        if bias is not None:
            layer.bias[...] = bias
        x = draw_tokens(rng, 8, 5)

        def loss(layer, x):
            y = layer(x)
            return loss_of(y, layer.aux_loss[...]), y

        arguments = (nnx.DiffState(0, nnx.Param), 1)
        (_, y), grads = nnx.jit(nnx.value_and_grad(loss, argnums=arguments, has_aux=True))(
            layer, jax.device_put(x, NamedSharding(mesh, P(AXES)))
        )
    names = layer.config.parameters(WIDTH)
    parameters = {n: getattr(layer, n)[...] for n in names}
    expected_y, report, expected_grads = dense(parameters, x, layer.config, bias)
    assert_close(y, expected_y)
    assert_close(({n: grads[0][n][...] for n in names}, grads[1]), expected_grads)
    for field in dataclasses.fields(report):
        if field.name != "source_drops":
            assert_close(getattr(layer, field.name)[...], getattr(report, field.name))
    assert layer.source_drops[...].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("shape", "axis_type"),
    [((3, 5), AxisType.Auto), ((1, 1), AxisType.Auto), ((2, 4), AxisType.Explicit)],
)
def test_tokens_that_do_not_divide_evenly_are_padded(shape, axis_type, rng):
    config = MoEConfig(**settings())
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, *shape)

    def loss(parameters, x):
        y, report = moe(parameters, x, config)
        return loss_of(y, report.aux_loss), (y, report)

    with jax.set_mesh(mesh_2x4(axis_type)):
        (_, (y, report)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            parameters, x
        )
    expected_y, expected_report, expected_grads = dense(parameters, x, config)
    assert_close((y, report, grads), (expected_y, expected_report, expected_grads))


def test_without_a_mesh_one_device_suffices(rng):
    config = MoEConfig(**settings())
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 2, 5)
    expected_y, expected_report, _ = dense(parameters, x, config)
    device = jax.local_devices()[-1]
    for arguments in ((parameters, x), jax.device_put((parameters, x), device)):
        y, report = moe(*arguments, config)
        assert_close((y, report), (expected_y, expected_report))
    assert y.devices() == {device}


def test_mesh_as_an_argument(rng):
    config = MoEConfig(**settings())
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 2)
    expected_y, expected_report, _ = dense(parameters, x, config)
    y, report = moe(parameters, x, config, mesh=mesh_2x4())
    assert_close((y, report), (expected_y, expected_report))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_over_all_axes(check_vma, rng):
    config = MoEConfig(**settings())
    layer, mesh = linen.MoE(**settings()), mesh_2x4()
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 5)
    specs = {n: P(names[0]) for n, (_, names) in config.parameters(WIDTH).items()}

    def shard(parameters, x):
        y, sown = layer.apply({"params": parameters}, x, True, mutable=["losses", "intermediates"])
        return y, sown["intermediates"]["load"][0]

    y, load = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(specs, P(AXES)),
            out_specs=(P(AXES), P()),
            check_vma=check_vma,
        )
    )(parameters, x)
    expected_y, report, _ = dense(parameters, x, config)
    assert_close((y, load), (expected_y, report.load))


@pytest.mark.parametrize("outer", AXES)
def test_inside_a_shard_map_over_one_axis(outer, rng):
    config, mesh = MoEConfig(**settings()), mesh_2x4()
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 5)
    specs = {
        n: P("expert") if outer == "expert" and names[0] == "expert" else P()
        for n, (_, names) in config.parameters(WIDTH).items()
    }
    y, report = jax.jit(
        jax.shard_map(
            lambda parameters, x: moe(parameters, x, config),
            mesh=mesh,
            in_specs=(specs, P(outer)),
            out_specs=(P(outer), P()),
            axis_names={outer},
        )
    )(parameters, x)
    expected_y, expected_report, _ = dense(parameters, x, config)
    assert_close((y, report), (expected_y, expected_report))


def test_experts_over_two_axes(rng):
    config = MoEConfig(**settings(axis_name=AXES))
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 5)
    with jax.set_mesh(mesh_2x4()):
        y, report = moe(parameters, x, config)
    expected_y, expected_report, _ = dense(parameters, x, config)
    assert_close((y, report), (expected_y, expected_report))


def test_drops_are_reported_and_add_nothing(rng):
    # All tokens to one expert: its rank holds what fits, in order of tokens.
    router = Router(renormalize=False)
    config = MoEConfig(**settings(top_k=1, capacity_factor=0.5, drops="last", router=router))
    parameters, x = draw_parameters(config, rng), jnp.abs(draw_tokens(rng, 64))
    parameters["router"] = jnp.zeros((WIDTH, 8)).at[:, 5].set(1.0)
    capacity = balanced_capacity(
        0.5, num_ranks=4, num_tokens=8, top_k=1, num_experts=8, alignment=1
    )
    assert capacity == 4

    def loss(parameters, x):
        y, report = moe(parameters, x, config)
        return loss_of(y, 0.0), (y, report)

    with jax.set_mesh(mesh_2x4()):
        (_, (y, report)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            parameters, x
        )
    assert report.load.tolist() == [0, 0, 0, 0, 0, 64, 0, 0]
    assert int(report.dropped) == 64 - 2 * capacity  # one rank hosts expert 5 in each data group
    assert report.expert_drops.tolist() == [0, 0, 0, 0, 0, 56, 0, 0]
    assert report.source_drops.tolist() == [4, 8, 8, 8] * 2
    expected_y, _, _ = dense(parameters, x, config)
    kept = np.isin(np.arange(64), [0, 1, 2, 3, 32, 33, 34, 35])
    assert_close(y[kept], expected_y[kept])
    assert not y[~kept].any()
    assert not grads[1][~kept].any()
    assert grads[1][kept].any()


def test_linen_trains_its_bias_and_jitters_in_training_only(rng):
    router = Router(bias_update_rate=0.5, jitter=0.3)
    layer, x = linen.MoE(**settings(router=router)), draw_tokens(rng, 8, 5)
    with jax.set_mesh(mesh_2x4()):
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        state = {k: variables[k] for k in ("params", "router_state")}
        assert not state["router_state"]["bias"].any()
        collections = ["router_state", "intermediates"]
        evaluate = jax.jit(lambda x: layer.apply(state, x, True))
        train = jax.jit(
            lambda x, key: layer.apply(state, x, mutable=collections, rngs={"jitter": key})
        )
        again, (y, changed) = evaluate(x), train(x, jax.random.key(1))
        other, _ = train(x, jax.random.key(2))
        np.testing.assert_array_equal(evaluate(x), again)
    assert np.abs(y - again).max() > 1e-3
    assert np.abs(y - other).max() > 1e-3
    load = np.asarray(changed["intermediates"]["load"][0])
    expected = 0.5 * np.sign(load.mean() - load)
    np.testing.assert_array_equal(changed["router_state"]["bias"], expected)


def test_nnx_trains_its_bias_and_jitters_in_training_only(rng):
    with jax.set_mesh(mesh_2x4()):
        router = Router(bias_update_rate=0.5, jitter=0.3)
        layer = fio_nnx.MoE(WIDTH, **settings(router=router), rngs=nnx.Rngs(0))
        x, call = draw_tokens(rng, 8, 5), nnx.jit(lambda layer, x: layer(x))
        layer.eval()
        still = call(layer, x)
        np.testing.assert_array_equal(call(layer, x), still)
        assert not layer.bias[...].any()
        layer.train()
        assert np.abs(call(layer, x) - still).max() > 1e-3
        load = np.asarray(layer.load[...])
        np.testing.assert_array_equal(layer.bias[...], 0.5 * np.sign(load.mean() - load))


def test_a_bias_with_a_rate_of_zero_is_loaded_and_never_written(rng):
    """So linen's ``router_state`` need not be mutable, in training either."""
    options = settings(router=Router(bias_update_rate=0.0), token_axes=None)
    x, bias = draw_tokens(rng, 8, 5), jnp.asarray(rng.normal(size=8), jnp.float32)
    layer, model = linen.MoE(**options), fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
    parameters = {n: getattr(model, n)[...] for n in model.config.parameters(WIDTH)}
    y = layer.apply({"params": parameters, "router_state": {"bias": bias}}, x)
    model.bias[...] = bias
    assert_close(model(x), y)
    np.testing.assert_array_equal(model.bias[...], bias)
    expected, _, _ = dense(parameters, x, model.config, bias)
    assert_close(y, expected)


def test_drops_with_weights_on_the_input_are_those_of_weights_on_the_output(rng):
    options = settings(capacity_factor=0.7)
    configs = [
        MoEConfig(**options, router=Router(weights_on=where)) for where in ("output", "input")
    ]
    parameters, x = draw_parameters(configs[0], rng), draw_tokens(rng, 8, 5)
    parameters["router"] = parameters["router"].at[:, :2].mul(3)
    with jax.set_mesh(mesh_2x4()):
        (y, out), (z, into) = (jax.jit(lambda c=c: moe(parameters, x, c))() for c in configs)
    assert int(out.dropped) > 0
    assert_close(into, out)
    assert_close((np.abs(z) > 0).any(-1), (np.abs(y) > 0).any(-1))


def test_the_bias_takes_no_gradient(rng):
    config = MoEConfig(**settings(router=Router(bias_update_rate=0.1)))
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 5)

    def loss(bias):
        y, report = moe(parameters, x, config, bias=bias)
        return loss_of(y, report.aux_loss)

    assert not jax.grad(loss)(jnp.asarray(rng.normal(size=8), jnp.float32)).any()


def test_a_bias_that_is_missing(rng):
    config = MoEConfig(**settings(router=Router(bias_update_rate=0.1)))
    with pytest.raises(ValueError, match=r"bias is None.*float32 \[8\]"):
        moe(draw_parameters(config, rng), draw_tokens(rng, 8, 5), config)


def test_a_bias_without_use(rng):
    """A checkpoint's, say, for a layer without ``bias_update_rate``: it must not be ignored."""
    options, x, bias = settings(), draw_tokens(rng, 8, 5), jnp.ones(8)
    config, message = MoEConfig(**options), r"bias_update_rate is None.*0\.0 for a bias"
    parameters = draw_parameters(config, rng)
    with pytest.raises(ValueError, match=message):
        moe(parameters, x, config, bias=bias)
    with pytest.raises(ValueError, match=message):
        linen.MoE(**options).apply({"params": parameters, "router_state": {"bias": bias}}, x)
    layer = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
    nnx.update(layer, {"bias": fio_nnx.RouterBias(bias)})
    with pytest.raises(ValueError, match=message):
        layer(x)


def test_parameters_that_are_not_those_of_the_configuration(rng):
    x, config = draw_tokens(rng, 8, 5), MoEConfig(**settings())
    parameters = draw_parameters(config, rng)
    more = parameters | {"router_bias": jnp.ones(8)}
    message = r"no use for \['router_bias'\].*router\.logits_bias"
    with pytest.raises(ValueError, match=message):
        moe(more, x, config)
    with pytest.raises(ValueError, match=message):
        linen.MoE(**settings()).apply({"params": more}, x)
    layer = fio_nnx.MoE(WIDTH, **settings(), rngs=nnx.Rngs(0))
    nnx.update(layer, {"router_bias": nnx.Param(jnp.ones(8))})
    with pytest.raises(ValueError, match=message):
        layer(x)
    del layer.router_bias, layer.down
    with pytest.raises(ValueError, match=r"lacks \['down'\]"):
        layer(x)
    with pytest.raises(ValueError, match=r"lacks \['router_bias'\]"):
        moe(parameters, x, MoEConfig(**settings(router=Router(logits_bias=True))))
    with pytest.raises(ValueError, match=r"'down' has shape \(8, 16, 24\).*\(8, 24, 16\)"):
        moe(parameters | {"down": jnp.swapaxes(parameters["down"], 1, 2)}, x, config)


@pytest.mark.parametrize("kind", [nnx.Param, jnp.asarray, np.asarray], ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", ["foo", "shared_down"])
def test_a_parameter_that_no_setting_asks_for(name, kind, rng):
    """nnx refuses it as linen does, also where ``nnx.update`` is given arrays."""
    x, array = draw_tokens(rng, 8, 5), np.ones(3, np.float32)
    message = rf"no use for \['{name}'\], and lacks \[\]"
    parameters = draw_parameters(MoEConfig(**settings()), rng)
    with pytest.raises(ValueError, match=message):
        linen.MoE(**settings()).apply({"params": parameters | {name: array}}, x)
    layer = nnx.eval_shape(lambda: fio_nnx.MoE(WIDTH, **settings(), rngs=nnx.Rngs(0)))
    nnx.update(layer, parameters | {name: kind(array)})
    for deterministic in (False, True):
        with pytest.raises(ValueError, match=message):
            layer(x, deterministic=deterministic)


def test_a_subclass_may_have_parameters_of_its_own(rng):
    class Scaled(fio_nnx.MoE):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nnx.Param(jnp.float32(2))

        def __call__(self, x):
            return self.scale[...] * super().__call__(x)

    layer = Scaled(WIDTH, num_experts=4, top_k=2, expert_width=8, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 3, WIDTH)), jnp.float32)
    plain = fio_nnx.MoE(WIDTH, num_experts=4, top_k=2, expert_width=8, rngs=nnx.Rngs(0))
    assert_close(layer(x), 2 * plain(x))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("num_experts", "fix"), [(6, r"=8, or .* 3 ranks\."), (7, r"=8, or .* 1 rank\.")]
)
def test_experts_that_do_not_divide_among_the_ranks(num_experts, fix, axis_type, rng):
    options = settings(num_experts=num_experts, token_axes=None)
    config, x = MoEConfig(**options), draw_tokens(rng, 8, 5)
    message = rf"^MoE: num_experts={num_experts} .* 4 ranks of axis_name='expert'\.\nUse .*{fix}"
    parameters = draw_parameters(config, rng)
    mesh = make_mesh(4, axis_types=(axis_type,))
    calls = [
        lambda: moe(parameters, x, config),
        lambda: linen.MoE(**options).init(jax.random.key(0), x),
        lambda: jax.jit(linen.MoE(**options).apply)({"params": parameters}, x),
        lambda: fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0)),
    ]
    for call in calls:
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            call()
    shard = jax.shard_map(lambda x: moe(parameters, x, config)[0], in_specs=P(), out_specs=P())
    for call in (
        lambda: fio_nnx.MoE(WIDTH, **options, mesh=mesh, rngs=nnx.Rngs(0)),
        lambda: moe(parameters, x, config, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        shard(x)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_zero_tokens(num_devices, rng):
    config = MoEConfig(**settings(router=Router(num_groups=4, groups_per_token=2), token_axes=None))
    parameters = draw_parameters(config, rng)

    def loss(parameters, x):
        y, report = moe(parameters, x, config)
        return jnp.sum(y) + report.aux_loss, (y, report)

    with jax.set_mesh(make_mesh(num_devices, axis_types=(AxisType.Auto,))):
        compute = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (value, (y, report)), grads = compute(parameters, draw_tokens(rng, 0, 5))
    assert y.shape == grads[1].shape == (0, 5, WIDTH)
    assert value == report.dropped == 0
    assert not report.load.any()
    assert not any(np.asarray(g).any() for g in grads[0].values())


def test_linen_parameters_carry_their_partitioning():
    layer, mesh = linen.MoE(**settings(shared_expert_width=4)), mesh_2x4()
    x = jnp.zeros((8, WIDTH))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        specs = nn.get_partition_spec(shapes)["params"]
        shardings = nn.get_sharding(shapes, mesh)
        variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
    assert specs["gate_up"] == specs["down"] == P("expert", None, None)
    assert specs["router"] == specs["shared_down"] == P(None, None)
    assert nn.meta.unbox(variables)["params"]["down"].sharding.spec[0] == "expert"


@pytest.mark.parametrize("types", ["explicit", "auto_and_explicit", "auto"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_linen_initializes_on_any_axes(jit, types):
    auto, explicit = AxisType.Auto, AxisType.Explicit
    kinds = {"explicit": (explicit,) * 2, "auto": (auto,) * 2}.get(types, (auto, explicit))
    options = settings(shared_expert_width=4, router=Router(bias_update_rate=0.1))
    layer, x = linen.MoE(**options), jnp.ones((8, WIDTH))
    expected = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    with jax.set_mesh(make_mesh((2, 4), AXES, axis_types=kinds)):
        variables = (jax.jit(layer.init) if jit else layer.init)(jax.random.key(0), x)
        boxed = jax.jit(lambda variables: layer.apply(variables, x, True))(variables)
        values = jax.tree.map(
            lambda box: box.value if isinstance(box, nn.Partitioned) else box,
            variables,
            is_leaf=lambda box: isinstance(box, nn.Partitioned),
        )
        unboxed = layer.apply(values, x, True)
    if types != "auto":
        assert values["params"]["gate_up"].sharding.spec[0] == "expert"
    assert_close(values, expected)
    assert_close(unboxed, boxed)


def test_each_expert_has_parameters_of_its_own():
    layer = fio_nnx.MoE(WIDTH, **settings(), rngs=nnx.Rngs(0))
    matrices = np.asarray(layer.gate_up[...])
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1
    np.testing.assert_allclose(matrices.std(), WIDTH**-0.5, rtol=0.1)


def test_bfloat16_computation_of_float32_parameters(rng):
    config = MoEConfig(**settings(dtype=jnp.bfloat16))
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8, 5)
    with jax.set_mesh(mesh_2x4()):
        grads, y = jax.jit(
            jax.grad(lambda p: (loss_of((y := moe(p, x, config)[0]), 0.0), y), has_aux=True)
        )(parameters)
    expected, _, _ = dense(parameters, x, config)
    assert y.dtype == jnp.bfloat16
    assert {g.dtype for g in grads.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("factor", "alignment", "expected"),
    [(1.0, 1, 24), (1.25, 1, 30), (0.01, 1, 1), (1.0, 8, 40), (100.0, 1, 64), (100.0, 8, 64)],
)
def test_capacity_factor_is_a_multiple_of_the_even_share(factor, alignment, expected):
    # 4 ranks, 8 tokens and 3 choices on each: 24 rows a rank if even, 64 at most.
    capacity = balanced_capacity(
        factor, num_ranks=4, num_tokens=8, top_k=3, num_experts=8, alignment=alignment
    )
    assert capacity == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k=9"),
        ({"token_axes": ("data",)}, "add the expert axes"),
        ({"shared_expert_gate": True}, "give shared_expert_width"),
        ({"router": Router(score="tanh")}, "'softmax' or 'sigmoid'"),
        ({"router": Router(num_groups=3)}, "must divide"),
        ({"router": Router(num_groups=8, groups_per_token=2)}, "more groups per token"),
        ({"router": Router(jitter=1.0)}, "jitter"),
        ({"router": Router(group_score="mean")}, "'top2' or 'max'"),
        ({"router": Router(weights_on="both")}, "'output' or 'input'"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings(**changes))


def test_wrong_use(rng):
    config = MoEConfig(**settings())
    parameters, x = draw_parameters(config, rng), draw_tokens(rng, 8)
    with jax.set_mesh(make_mesh(8)), pytest.raises(ValueError, match="'data'"):
        moe(parameters, x, config)
    with pytest.raises(ValueError, match="two or more dimensions"):
        moe(parameters, x[0], config)
    with pytest.raises(TypeError, match="floating"):
        moe(parameters, x.astype(jnp.int32), config)
    with pytest.raises(ValueError, match="H=16"):
        moe(parameters, x[:, :8], config)
    with pytest.raises(ValueError, match="capacity_factor"):
        moe(parameters, x, dataclasses.replace(config, capacity_factor=-1.0))
