"""What the layers report, and when: Flax's variables and collections around a call."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax import lax
from jax.sharding import AxisType

from freeio_jax.flax import MoEConfig, Report, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx

WIDTH = 8
LAYER = {"num_experts": 4, "top_k": 2, "expert_width": 8}
REPORTS = tuple(field.name for field in dataclasses.fields(Report))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 2, WIDTH)), jnp.float32)


def model_of(**changes):
    return fio_nnx.MoE(WIDTH, **(LAYER | changes), rngs=nnx.Rngs(0))


def loss_of(model, x):
    """The auxiliary loss that one call of ``model``'s core would report."""
    parameters = {name: getattr(model, name)[...] for name in ("router", "gate_up", "down")}
    return float(moe(parameters, x, model.config)[1].aux_loss)


# --- nnx -----------------------------------------------------------------------------------------


def by_jit(model, x):
    return jax.jit(lambda x: model(x))(x)


def by_scan(model, x):
    return lax.scan(lambda carry, x: (carry, model(x)), 0, x[None])[1][0]


def by_cond(model, x):
    return lax.cond(x[0, 0, 0] < jnp.inf, model, lambda x: x, x)


def by_shape(model, x):
    return jax.eval_shape(model, x)


def state_of(model):
    """All that a call could write: the random stream's count among it, but not its key."""
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))


@pytest.mark.parametrize("transform", [by_jit, by_scan, by_cond, by_shape])
def test_an_evaluation_writes_nothing(transform, x):
    router = Router(bias_update_rate=0.5, jitter=0.3)
    with jax.set_mesh(make_mesh((2,), axis_types=(AxisType.Auto,))):
        model = model_of(router=router)
        model.eval()
        before = state_of(model)
        expected = model(x)
        got = transform(model, x)
        if transform is by_shape:
            assert got.shape == expected.shape
        else:
            np.testing.assert_allclose(got, expected, atol=1e-6)
        model(x, deterministic=True)
        after = state_of(model)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_gradient_of_an_evaluation_by_closure(x):
    model = model_of()
    expected = nnx.grad(lambda model, x: jnp.sum(model(x) ** 2), argnums=1)(model, x)
    model.eval()
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(model(x) ** 2))(x), expected, atol=1e-5)


def test_popped_reports_come_back(x):
    model, kinds = model_of(), {name: type(getattr(model_of(), name)) for name in REPORTS}
    expected = model(x)
    reported = {name: np.asarray(getattr(model, name)[...]) for name in REPORTS}
    step = nnx.jit(lambda model, x: model(x))
    for call in (lambda model, x: model(x), step, step):
        nnx.pop(model, nnx.Intermediate)
        assert not any(hasattr(model, name) for name in REPORTS)
        np.testing.assert_allclose(call(model, x), expected, atol=1e-6)
        for name in REPORTS:
            assert type(getattr(model, name)) is kinds[name]
            np.testing.assert_allclose(getattr(model, name)[...], reported[name], rtol=1e-6)
    nnx.pop(model, nnx.Intermediate)
    nnx.grad(lambda model, x: jnp.sum(model(x)))(model, x)
    np.testing.assert_allclose(model.aux_loss[...], reported["aux_loss"], rtol=1e-6)
    nnx.pop(model, nnx.Intermediate)
    model.eval()
    np.testing.assert_allclose(model(x), expected, atol=1e-6)
    assert not hasattr(model, "load")


def by_call(model, x):
    return model(x)


def by_nnx_jit(model, x):
    return nnx.jit(by_call)(model, x)


def by_gradient(model, x):
    def loss(model, x):
        y = model(x)
        return jnp.sum(y), y

    return nnx.grad(loss, has_aux=True)(model, x)[1]


def by_split(model, x):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


@pytest.mark.parametrize("call", [by_call, by_nnx_jit, by_gradient, by_split])
def test_a_model_by_eval_shape_needs_its_parameters_only(call, x):
    with jax.set_mesh(make_mesh((2,), axis_types=(AxisType.Auto,))):
        trained = model_of()
        expected = trained(x)
        model = nnx.eval_shape(model_of)
        nnx.update(model, nnx.state(trained, nnx.Param))
        assert float(read_state(nnx.eval_shape(model_of))) == 0
        np.testing.assert_allclose(call(model, x), expected, atol=1e-6)
        for name in REPORTS:
            value = getattr(model, name)[...]
            expected = getattr(trained, name)[...]
            assert value.dtype == expected.dtype
            if call is not by_split:  # which calls a copy
                np.testing.assert_allclose(value, expected, rtol=1e-6)


def read_value(model):
    return model.aux_loss[...]


def read_state(model):
    return sum(jax.tree.leaves(nnx.state(model, fio_nnx.AuxLoss)))


@pytest.mark.parametrize("read", [read_value, read_state])
def test_the_auxiliary_loss_adds_up_the_calls_of_a_step(read, x):
    model = model_of()
    both = loss_of(model, x) + loss_of(model, 3 * x)

    def step(model, x):
        model(x)
        model(3 * x)
        return read(model)

    def loss(model, x):
        return step(model, x) * 2

    compiled, gradient = nnx.jit(step), nnx.jit(nnx.value_and_grad(loss))
    for _ in range(3):  # and no step counts those before it
        assert float(step(model, x)) == pytest.approx(both)
        assert float(read(model)) == pytest.approx(both)
        assert float(compiled(model, x)) == pytest.approx(both)
        assert float(read(model)) == pytest.approx(both)
        assert float(gradient(model, x)[0]) == pytest.approx(2 * both)
        model(x)
        assert float(read(model)) == pytest.approx(loss_of(model, x))


def test_calls_in_a_transformation_each_return_their_loss(x):
    model = model_of()

    @nnx.remat
    def call(model, x):
        return model(x), model.aux_loss[...]

    losses = [call(model, scale * x)[1] for scale in (1, 3)]
    assert float(sum(losses)) == pytest.approx(loss_of(model, x) + loss_of(model, 3 * x))
    assert float(model.aux_loss[...]) == pytest.approx(loss_of(model, 3 * x))


def test_the_auxiliary_loss_has_the_gradients_of_all_calls(x):
    model = model_of(router=Router(load_balance_coef=1.0, z_loss_coef=1.0))

    def total(model, xs):
        for x in xs:
            model(x)
        return read_state(model)

    grad = nnx.grad(total)
    got = grad(model, (x, 3 * x))["router"][...]
    each = [grad(model, (x,))["router"][...], grad(model, (3 * x,))["router"][...]]
    np.testing.assert_allclose(got, sum(each), rtol=1e-5, atol=1e-6)


# --- linen ---------------------------------------------------------------------------------------


def test_init_reports_nothing(x):
    variables = linen.MoE(**LAYER, router=Router(bias_update_rate=0.1)).init(jax.random.key(0), x)
    assert set(variables) == {"params", "router_state"}


class Shared(nn.Module):
    """One layer, called as often as ``scales`` says."""

    scales: tuple[float, ...]
    lifted: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(linen.MoE)(**LAYER) if self.lifted else linen.MoE(**LAYER)
        return sum(layer(scale * x) for scale in self.scales)


@pytest.mark.parametrize("lifted", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_report_that_is_passed_in_again_is_replaced(jit, lifted, x):
    module = Shared((1.0,), lifted)
    variables = module.init(jax.random.key(0), x)

    def apply(variables, x):
        return module.apply(variables, x, mutable=["losses", "intermediates"])[1]

    apply = jax.jit(apply) if jit else apply
    first = apply(variables, x)
    again = apply(variables | first, 3 * x)
    expected = apply(variables, 3 * x)
    assert jax.tree.structure(again) == jax.tree.structure(first)
    assert len(jax.tree.leaves(again["losses"])) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, expected)


def test_each_call_of_an_apply_has_an_entry(x):
    twice, thrice = Shared((1.0, 3.0)), Shared((1.0, 3.0, 1.0))
    variables = twice.init(jax.random.key(0), x)
    state = None
    for module, calls in ((twice, 2), (twice, 2), (thrice, 3)):
        collections = ["losses", "intermediates", "drops"]
        _, state = module.apply(variables | (state or {}), x, mutable=collections)
        losses = jax.tree.leaves(state["losses"])
        assert len(losses) == calls
        assert float(losses[0]) != float(losses[1])
        others = state["intermediates"], state["drops"]
        assert len(jax.tree.leaves(others)) == (len(REPORTS) - 1) * calls


def test_each_call_of_a_bound_layer_has_an_entry(x):
    layer = linen.MoE(**LAYER)
    variables = layer.init(jax.random.key(0), x)

    def twice(layer, x):
        return layer(x) + layer(3 * x)

    for _ in range(2):
        _, state = layer.apply(variables, x, method=twice, mutable=["losses"])
        assert len(state["losses"]["aux_loss"]) == 2
        variables = variables | state


def test_reports_of_a_scan_that_are_passed_in_again_are_replaced(x):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + linen.MoE(**LAYER)(x), None

    stack = nn.scan(
        Block,
        variable_axes={"params": 0, "losses": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: None},
    )()
    variables = stack.init(jax.random.key(0), x, None)
    for _ in range(2):
        _, state = stack.apply(variables, x, None, mutable=["losses", "intermediates"])
        (losses,) = jax.tree.leaves(state["losses"])
        assert losses.shape == (3,)
        variables = variables | state


def call_in_remat(layer, x):
    return nn.remat(lambda layer, x: layer(x))(layer, x)


class Inner(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


def by_lifted_layer(x):
    layer = nn.remat(linen.MoE)(**LAYER)
    return layer(x) + layer(3 * x)


def by_lifted_calls(x):
    layer = linen.MoE(**LAYER)
    return call_in_remat(layer, x) + call_in_remat(layer, 3 * x)


def by_lifted_and_plain_calls(x):
    layer = linen.MoE(**LAYER)
    return call_in_remat(layer, x) + layer(3 * x) + call_in_remat(layer, x) + layer(x)


def by_lifted_modules_around_it(x):
    layer = linen.MoE(**LAYER)
    return nn.remat(Inner)(layer)(x) + nn.remat(Inner)(layer)(3 * x)


def by_lifted_calls_in_a_lifted_module(x):
    return nn.remat(Around)(by_lifted_calls)(x)


def by_branches(x):
    layer = linen.MoE(**LAYER)
    if layer.is_initializing():
        return layer(x)
    first = nn.cond(x[0, 0, 0] < jnp.inf, call_in_remat, call_in_remat, layer, x)
    return first + nn.cond(x[0, 0, 0] < jnp.inf, call_in_remat, call_in_remat, layer, 3 * x)


def by_a_scan_called_twice(x):
    stack = stack_of(by_lifted_calls)
    return stack(stack(x))


def stack_of(function):
    stack = nn.scan(
        lambda block, x, _: (x + block(x), None),
        variable_axes={"params": 0, "losses": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: None},
    )
    block = Around(function)
    return lambda x: stack(block, x, None)[0]


class Around(nn.Module):
    function: Callable

    @nn.compact
    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (by_lifted_layer, 2),
        (by_lifted_calls, 2),
        (by_lifted_and_plain_calls, 4),
        (by_lifted_modules_around_it, 2),
        (by_lifted_calls_in_a_lifted_module, 2),
        (by_branches, 2),
        (by_a_scan_called_twice, 4),
    ],
)
def test_each_call_in_a_lifted_transformation_has_an_entry(function, calls, x):
    """Whether or not reports of an earlier ``apply`` are passed in."""
    module = Around(function)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def apply(variables, x):
        return module.apply(variables, x, mutable=["losses", "intermediates"])[1]

    first = apply(variables, x)
    losses = jax.tree.leaves(first["losses"])
    assert len(losses) == calls
    assert len({float(jnp.sum(loss)) for loss in losses[:2]}) == 2
    again = apply(variables | first, x)
    assert jax.tree.structure(again) == jax.tree.structure(first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, first)


def test_each_call_of_a_part_of_a_module_has_an_entry(x):
    module = Around(lambda x: linen.MoE(**LAYER)(x))
    variables = module.init(jax.random.key(0), x)

    def twice(module, x):
        return module(x) + module(3 * x)

    state = {}
    for _ in range(2):
        _, state = module.apply(variables | state, x, method=twice, mutable=["losses"])
        assert len(jax.tree.leaves(state["losses"])) == 2


# --- The losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_mesh", [False, True], ids=["one_device", "mesh"])
def test_losses_that_are_switched_off_are_zero_and_have_no_gradient(on_mesh, x):
    off = MoEConfig(**LAYER, router=Router(load_balance_coef=0.0, z_loss_coef=0.0))
    half = MoEConfig(**LAYER, router=Router(load_balance_coef=0.0, z_loss_coef=0.5))
    model, x = model_of(), x.at[0, 1].set(jnp.nan)
    parameters = {n: jnp.asarray(getattr(model, n)[...]) for n in ("router", "gate_up", "down")}

    def aux(parameters, config, x):
        y, report = moe(parameters, x, config)
        return report.aux_loss, (y, report)

    compute = jax.jit(jax.value_and_grad(aux, has_aux=True), static_argnums=1)
    with jax.set_mesh(make_mesh((2,) if on_mesh else (1,), axis_types=(AxisType.Auto,))):
        (loss, (y, report)), grads = compute(parameters, off, x)
        assert loss == 0
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
        assert int(np.isfinite(np.asarray(y)).all(-1).sum()) == 7
        (loss, (_, report)), _ = compute(parameters, half, jnp.nan_to_num(x))
        assert float(loss) == pytest.approx(0.5 * float(report.z_loss))


# --- One expert for each token -------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [None, False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_router_learns_from_the_output_with_one_expert(score, renormalize, x):
    router = Router(score=score, renormalize=renormalize)
    config = MoEConfig(num_experts=4, top_k=1, expert_width=8, router=router)
    model = model_of()
    parameters = {name: getattr(model, name)[...] for name in ("router", "gate_up", "down")}
    grads = jax.grad(lambda p: jnp.sum(moe(p, x, config)[0] ** 2))(parameters)
    # Renormalized, the one weight is 1 whatever the score.
    assert (np.abs(grads["router"]).max() > 1e-4) == (renormalize is not True)
