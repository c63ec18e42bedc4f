"""The layer with exchanges beside compute, and in chunks: what it computes without both."""

import dataclasses
import re
from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import assert_close, squashed
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType
from test_router_options import Plain

from freeio_jax import reference
from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import MLP, Experts, SwiGLU
from freeio_jax.grouped_matmul import grouped_matmul

WIDTH = 8
LAYER = {
    "num_experts": 4,
    "top_k": 2,
    "expert_width": 8,
    "shared_expert_width": 4,
    "overlap": True,
}
GATED = LAYER | {"shared_expert_gate": True}


@dataclasses.dataclass(frozen=True)
class Twice(Experts):
    """One matrix, used by two products; and a scale, used by none."""

    ignores_tail = True

    def parameters(self, width, expert_width):
        return {"kernel": (width, width), "scale": (width,)}

    def __call__(self, parameters, rows, group_sizes):
        kernel, scale = parameters["kernel"], jnp.mean(parameters["scale"])
        rows = jnp.sin(grouped_matmul(rows, kernel, group_sizes)) * scale
        return grouped_matmul(rows, kernel, group_sizes)


#: Ways to call a function of the rows that JAX traces by itself.
NESTED = {
    "checkpoint": lambda f, rows: jax.checkpoint(f)(rows),
    "jit": lambda f, rows: jax.jit(f)(rows),
    "cond": lambda f, rows: jax.lax.cond(rows.size > 0, f, jnp.zeros_like, rows),
    "scan": lambda f, rows: jax.lax.scan(lambda r, _: (f(r), None), rows, length=2)[0],
    "vmap": lambda f, rows: jax.vmap(f)(jnp.stack([rows, -rows]))[1],
}


@dataclasses.dataclass(frozen=True)
class Nested(Experts):
    """A product in a function that closes over its matrix, and one that is not."""

    how: str

    ignores_tail = True

    def parameters(self, width, expert_width):
        return {"first": (width, width), "second": (width, width)}

    def __call__(self, parameters, rows, group_sizes):
        def first(rows):
            return jnp.sin(grouped_matmul(rows, parameters["first"], group_sizes))

        return grouped_matmul(NESTED[self.how](first, rows), parameters["second"], group_sizes)


@dataclasses.dataclass(frozen=True)
class ByHand(Experts):
    """No product of this package's."""

    def parameters(self, width, expert_width):
        return {"kernel": (width, width)}

    def __call__(self, parameters, rows, group_sizes):
        return jax.lax.ragged_dot(rows, parameters["kernel"], group_sizes)


@jax.custom_vjp
def with_own_rule(x):
    return jnp.sin(x)


with_own_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (2 * ct * jnp.cos(x),))


@dataclasses.dataclass(frozen=True)
class OwnRule(Experts):
    """A function with a rule for reverse mode alone, behind a product or instead of one."""

    multiplies: bool

    def parameters(self, width, expert_width):
        return {"kernel": (width, width)}

    def __call__(self, parameters, rows, group_sizes):
        if self.multiplies:
            return with_own_rule(grouped_matmul(rows, parameters["kernel"], group_sizes))
        return with_own_rule(rows * jnp.mean(parameters["kernel"]))


#: Settings of a layer, its mesh, and whether all tokens are real.
LAYERS = {
    "gated": (GATED, {"expert": 2}, False),
    "alone": (LAYER | {"shared_expert_width": None}, {"expert": 2}, False),
    "biases": (LAYER | {"experts": MLP(biases=True), "router": Plain()}, {"expert": 2}, True),
    "input": (
        GATED
        | {
            "experts": SwiGLU(limit=1.0, alpha=1.5, biases=True, interleaved=True),
            "router": Router(weights_on="input", logits_bias=True),
        },
        {"expert": 2, "model": 2},
        True,
    ),
    "zero experts": (
        LAYER | {"num_experts": 3, "pad_experts_to": 4, "num_zero_experts": 2, "alignment": 2},
        {"data": 2, "expert": 2},
        True,
    ),
    "twice": (LAYER | {"experts": Twice()}, {"expert": 2}, False),
    "by hand": (LAYER | {"experts": ByHand()}, {"expert": 2}, False),
    "own rule": (LAYER | {"experts": OwnRule(True)}, {"expert": 2}, False),
    "own rule alone": (LAYER | {"experts": OwnRule(False)}, {"expert": 2}, False),
    **{f"in {how}": (LAYER | {"experts": Nested(how)}, {"expert": 2}, False) for how in NESTED},
    "drops": (
        LAYER | {"experts": SwiGLU(separate=True), "capacity_factor": 0.6, "drops": "evenly"},
        {"data": 2, "expert": 2, "model": 2},
        True,
    ),
}
AXES = {
    "data": {"token_axes": ("data", "expert"), "fsdp_axes": ("data",)},
    "model": {"model_axes": ("model",)},
}
#: Tokens of a rank; they are cut into chunks of 2, 3 and 2.
NUM_TOKENS, NUM_CHUNKS = 7, 3


def case(name, **changes):
    """The configuration, its mesh, and the arguments of :func:`results`."""
    rng = np.random.default_rng(5)
    settings, mesh, is_masked = LAYERS[name]
    for axis in mesh:
        settings = settings | AXES.get(axis, {})
    config = MoEConfig(**settings | changes)
    parameters = {
        n: np.asarray(rng.normal(size=shape) / 2, np.float32)
        for n, (shape, _) in config.parameters(WIDTH).items()
    }
    num_tokens = NUM_TOKENS * mesh.get("data", 1) * mesh["expert"]
    x = np.asarray(rng.normal(size=(num_tokens, WIDTH)), np.float32)
    mask = rng.random(num_tokens) < 0.7 if is_masked else None
    made = make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    return config, made, (parameters, x, mask)


def loss_of(config, mesh):
    def loss(parameters, x, mask=None):
        y, report = moe(parameters, x, config, token_mask=mask, mesh=mesh)
        return squashed(y) + report.aux_loss, (y, report)

    return loss


def results(name, **changes):
    """Output and report, and the gradients by parameters and x."""
    config, mesh, args = case(name, **changes)
    evaluate = jax.jit(jax.value_and_grad(loss_of(config, mesh), (0, 1), has_aux=True))
    (_, out), gradients = evaluate(*args)
    return out, gradients


@pytest.mark.parametrize("name", LAYERS)
def test_exchanges_beside_compute_change_nothing(name):
    assert_close(results(name), results(name, overlap=False))


#: The cases that also run in chunks: each setting is in one of them.
CHUNKED = ("gated", "alone", "biases", "input", "zero experts", "by hand")


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_change_nothing_where_nothing_is_dropped(name):
    assert_close(results(name, num_chunks=NUM_CHUNKS), results(name, overlap=False))


def test_the_room_of_a_chunk_is_its_own():
    """Overlap changes nothing then, either. All drops of all chunks are counted."""
    got = results("drops", num_chunks=NUM_CHUNKS)
    assert_close(got, results("drops", num_chunks=NUM_CHUNKS, overlap=False))
    report = got[0][1]
    assert report.dropped > 0
    assert report.dropped == report.expert_drops.sum() == report.source_drops.sum()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_more_chunks_than_tokens(num_tokens):
    config, mesh, (parameters, _, _) = case("gated", num_chunks=4)
    x = np.ones((2 * num_tokens, WIDTH), np.float32)
    y, _ = jax.jit(lambda x: moe(parameters, x, config, mesh=mesh))(x)
    once = dataclasses.replace(config, num_chunks=1, overlap=False)
    expected, _ = jax.jit(lambda x: moe(parameters, x, once, mesh=mesh))(x)
    assert_close(y, expected)


def test_other_exchanges_run_to_their_end_where_they_begin():
    expected = results("gated", overlap=False)
    assert_close(results("gated", exchange=reference, num_chunks=2), expected)


@pytest.mark.parametrize("num_chunks", [0, 1.5, True])
def test_num_chunks_is_checked(num_chunks):
    with pytest.raises(ValueError, match=f"num_chunks must be an int .*{num_chunks}"):
        MoEConfig(**LAYER, num_chunks=num_chunks)


def test_num_chunks_may_be_an_int_of_numpy():
    assert type(MoEConfig(**LAYER, num_chunks=np.int64(2)).num_chunks) is int


@pytest.mark.parametrize("field", ["overlap", "shared_expert_gate"])
def test_switches_are_bools(field):
    with pytest.raises(TypeError, match=f"{field} must be True or False, got 'no'"):
        MoEConfig(**GATED | {field: "no"})
    MoEConfig(**GATED | {field: np.True_})


@pytest.mark.parametrize("of", ["linen", "nnx"])
def test_layers_hand_the_settings_on(of):
    def program(**options):
        x, options = jnp.ones((4, WIDTH)), LAYER | options
        if of == "linen":
            layer = linen.MoE(**options)
            return str(jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x))
        layer = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
        return str(jax.make_jaxpr(lambda x: layer(x, deterministic=True))(x))

    def exchanges(text):
        return Counter(re.findall(r"freeio_(start|dispatch|combine)\[", text))

    assert exchanges(program()) == {"dispatch": 1, "start": 1}
    assert exchanges(program(overlap=False)) == {"dispatch": 1, "combine": 1}
    assert exchanges(program(overlap=False, num_chunks=2)) == {"dispatch": 2, "combine": 2}
    # The first dispatch is synchronous.
    assert exchanges(program(num_chunks=2)) == {"dispatch": 1, "start": 3}


# --- Derivatives ---------------------------------------------------------------------------------


def counts(function, *args):
    """How often each product and exchange is evaluated, an exchange with or without a done."""
    products = Counter(re.findall(r"product=Product.(\w+)", str(jax.make_jaxpr(function)(*args))))
    text = jax.jit(function).lower(*args).as_text()
    exchanges = Counter(re.findall(r"@freeio_(\w+?)(?:_start)?\(", text))
    del exchanges["done"], exchanges["check"]
    return products, exchanges


SAVED = {
    "nothing": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": lambda primitive, *_, **__: "grouped_matmul" in primitive.name,
    "exchanges": lambda primitive, *_, **__: primitive.name == "freeio_dispatch",
}


def gradient(config, mesh, saved=None):
    loss = loss_of(config, mesh)
    if saved is not None:
        loss = jax.checkpoint(loss, policy=SAVED[saved])
    return jax.grad(lambda *args: loss(*args)[0], (0, 1))


@pytest.mark.parametrize("saved", [None, *SAVED])
def test_nothing_is_computed_twice(saved):
    config, mesh, args = case("gated")
    got = counts(gradient(config, mesh, saved), *args)
    assert got == counts(gradient(dataclasses.replace(config, overlap=False), mesh, saved), *args)
    assert got[0]["WEIGHTS_GRADIENT"] == 2


@pytest.mark.parametrize("saved", SAVED)
def test_under_checkpoint(saved):
    config, mesh, args = case("gated", num_chunks=2)
    got = jax.jit(gradient(config, mesh, saved))(*args)
    assert_close(got, jax.jit(gradient(config, mesh))(*args))


def assert_equal_without_overlap(function, **changes):
    """``function(loss, parameters, x)``, where the loss is a scalar, is the same without."""
    config, mesh, (parameters, x, _) = case("gated", **changes)
    got, expected = (
        jax.jit(lambda *args, c=c: function(lambda *a: loss_of(c, mesh)(*a)[0], *args))(
            parameters, x
        )
        for c in (config, dataclasses.replace(config, overlap=False, num_chunks=1))
    )
    assert_close(got, expected)


def tangents_of(tree):
    return jax.tree.map(lambda a: jnp.cos(5 * a), tree)


def test_forward_mode():
    def tangent(loss, *args):
        return jax.jvp(loss, args, tangents_of(args))

    assert_equal_without_overlap(tangent, num_chunks=2)


def test_linearize():
    def tangent(loss, *args):
        return jax.linearize(loss, *args)[1](*tangents_of(args))

    assert_equal_without_overlap(tangent)


def test_hessian_times_vector():
    def product(loss, *args):
        return jax.jvp(jax.grad(loss, (0, 1)), args, tangents_of(args))[1]

    assert_equal_without_overlap(product, num_chunks=2)


def test_vmap():
    def gradients(loss, parameters, x):
        many = jnp.stack([x, x[::-1]])
        return jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(parameters, many)

    assert_equal_without_overlap(gradients)


def test_scan():
    def gradients(loss, parameters, x):
        def layers(parameters, x):
            step = jax.checkpoint(lambda x, shift: (x + loss(parameters, x + shift), None))
            return jax.lax.scan(step, x, jnp.arange(3.0))[0].sum()

        return jax.grad(layers, (0, 1))(parameters, x / 8)

    assert_equal_without_overlap(gradients)


@pytest.mark.parametrize("frozen", ["tokens", "experts", "first product"])
def test_frozen_arrays(frozen):
    def gradients(loss, parameters, x):
        moving = {n: a for n, a in parameters.items() if frozen != "experts" or "router" in n}
        if frozen == "first product":
            del moving["gate_up"]
        if frozen == "tokens":
            return jax.grad(lambda p: loss(parameters | p, x))(moving)
        return jax.grad(lambda p, x: loss(parameters | p, x), (0, 1))(moving, x)

    assert_equal_without_overlap(gradients)


# --- What runs beside the backward exchange ------------------------------------------------------


def equations(jaxpr):
    """Of a jaxpr and all that it calls, as (of which jaxpr, equation)."""
    for equation in jaxpr.eqns:
        yield jaxpr, equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def reach(eqns, first):
    """The equations that need a result of ``first``."""
    known, found = set(first.outvars), []
    for equation in eqns:
        if any(v in known for v in equation.invars if not isinstance(v, jax.extend.core.Literal)):
            known.update(equation.outvars)
            found.append(equation)
    return found


def is_product(equation, of="WEIGHTS_GRADIENT"):
    return (
        equation.primitive.name == "freeio_grouped_matmul" and equation.params["product"].name == of
    )


@pytest.mark.parametrize(
    ("experts", "num_products"), [(SwiGLU(), 2), (MLP(biases=True), 2), (Twice(), 2), (ByHand(), 0)]
)
def test_weights_gradients_lie_between_start_and_done_of_the_backward_exchange(
    experts, num_products
):
    config = MoEConfig(**LAYER | {"experts": experts, "shared_expert_width": None})
    mesh = make_mesh(2, axis_types=(AxisType.Auto,))
    parameters = {n: jnp.ones(shape) for n, (shape, _) in config.parameters(WIDTH).items()}
    jaxpr = jax.make_jaxpr(gradient(config, mesh))(parameters, jnp.ones((6, WIDTH)))
    inside = [(body, e) for body, e in equations(jaxpr.jaxpr) if e.primitive.name == "freeio_start"]
    if not num_products:  # nothing to run beside it: so it takes all of the GPU
        assert not inside
        return
    ((body, start),) = inside
    assert start.params["op"].name == "freeio_combine"
    after_start = reach(body.eqns, start)
    products = [e for e in after_start if is_product(e)]
    assert len(products) == num_products
    assert not [e for e in after_start if is_product(e, "ROWS_GRADIENT")]
    (done,) = (e for e in after_start if e.primitive.name == "freeio_done")
    for product in products:
        assert done in reach(body.eqns, product)
