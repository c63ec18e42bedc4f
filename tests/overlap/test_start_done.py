"""Start and done are the synchronous calls, bit by bit, under every transformation."""

import dataclasses
import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import (
    GEOMETRY,
    Started,
    StartedApi,
    Synchronous,
    arguments,
    layer,
    sharded,
    shared,
)
from helpers import (
    Geometry,
    assert_bitwise,
    assert_dispatched,
    calls_in,
    check_exchange,
    dispatch_fn,
    make_mesh,
    require_calls,
    routing,
    values,
)
from jax import lax
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import hosts
from freeio_jax.engines import ENGINES


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_same(actual, expected):
    jax.tree.map(assert_bitwise, actual, expected)


def assert_equal_runs(run, *args):
    """``run(exchange, *args)`` gives the same bits for both exchanges."""
    assert_same(run(Started, *args), run(Synchronous, *args))


def lowered_calls(fn, *args):
    """How often each exchange is in the program before XLA looks at it."""
    require_calls(make_mesh(GEOMETRY.num_ranks))
    return calls_in(jax.jit(fn).lower(*args).as_text())


def loss_of(exchange, topk_idx, mapped=None, **kwargs):
    """(tokens, weights, params) -> scalar in which every element has another factor."""
    mapped = sharded(exchange, **kwargs) if mapped is None else mapped

    def loss(tokens, weights, params):
        z = mapped(tokens, topk_idx, weights, params)
        return jnp.sum(z * (jnp.arange(z.size, dtype=z.dtype) % 7 - 3).reshape(z.shape))

    return loss


def gradients_of(exchange, topk_idx, **kwargs):
    return jax.value_and_grad(loss_of(exchange, topk_idx, **kwargs), argnums=(0, 1, 2))


# --- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 5, 3, 6),
        Geometry(4, 6, 3, 8, capacity=8, alignment=4),
        Geometry(3, 4, 2, 6, capacity=0),
        Geometry(2, 0, 2, 4, capacity=4),
    ],
    ids=["dropless", "cut, aligned", "no rows", "no tokens"],
)
def test_values_are_those_of_the_contract(geometry, rng):
    mesh = make_mesh(geometry.num_ranks)
    check_exchange(rng, geometry, mesh, api=StartedApi, skews=("hot", "invalid"))


def test_a_pytree_of_many_dtypes(rng):
    geometry = Geometry(2, 5, 2, 4, capacity=9)
    tokens = {
        "rows": values(rng, (2, 5, 16), jnp.float8_e4m3fn),
        "ids": [values(rng, (2, 5, 1), np.int32), values(rng, (2, 5), bool)],
        "empty": values(rng, (2, 5, 0), np.float32),
    }
    topk_idx = routing(rng, geometry, "hot")
    out = dispatch_fn(geometry, api=StartedApi)(tokens, topk_idx)
    assert_dispatched(out, tokens, topk_idx, geometry)


# --- Derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
def test_jit_and_gradients(check_vma, rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def run(exchange):
        gradients = gradients_of(exchange, topk_idx, check_vma=check_vma)
        return jax.jit(gradients)(tokens, weights, params)

    assert_equal_runs(run)


def test_without_jit(rng):
    """Each primitive is a program of its own; so are those of the backward pass."""
    tokens, topk_idx, weights, _ = arguments(rng)

    def run(exchange):
        loss = sharded(exchange, lambda e, *args: _sums(e, *args) ** 2)
        z, pull = jax.vjp(lambda x, w: loss(x, topk_idx, w), tokens, weights)
        return z, pull(z)

    assert_equal_runs(run)


@pytest.mark.parametrize("which", ["all", 0, 1, 2])
def test_jvp(which, rng):
    """Of all arguments at once, and of one alone."""
    tokens, topk_idx, weights, params = arguments(rng)
    primals = (tokens, weights, params)
    tangents = jax.tree.map(lambda x: x[::-1] + 1, primals)

    def run(exchange):
        def of(*some):
            full = primals if which == "all" else (*primals[:which], *some, *primals[which + 1 :])
            tokens, weights, params = some if which == "all" else full
            return sharded(exchange)(tokens, topk_idx, weights, params)

        if which == "all":
            return jax.jit(lambda: jax.jvp(of, primals, tangents))()
        return jax.jit(lambda: jax.jvp(of, (primals[which],), (tangents[which],)))()

    assert_equal_runs(run)


def test_unit_weights_and_linearize(rng):
    tokens, topk_idx, _, params = arguments(rng)

    def run(exchange):
        mapped = sharded(exchange, lambda e, x, i, p: layer(e, x, i, None, p))
        z, linear = jax.linearize(jax.jit(lambda x: mapped(x, topk_idx, params)), tokens)
        return z, linear(tokens), jax.jit(jax.linear_transpose(linear, tokens))(z)

    assert_equal_runs(run)


def test_second_derivatives(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    args = (tokens, weights)

    def run(exchange):
        grad = jax.grad(lambda x, w: loss_of(exchange, topk_idx)(x, w, params), argnums=(0, 1))

        def slope(*args):
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grad(*args), args)))

        def both(*args):
            return jax.jvp(grad, args, args)[1], jax.grad(slope, argnums=(0, 1))(*args)

        return jax.jit(both)(*args)

    assert_equal_runs(run)


def test_only_some_leaves_and_complex_ones(rng):
    """Gradients of some leaves of a pytree; those of complex rows are sums of pairs of reals."""
    geometry = GEOMETRY
    _, topk_idx, weights, _ = arguments(rng, geometry)
    leaves = {
        "complex": jnp.round(4 * values(rng, (10, 2), np.complex128)),
        "id": values(rng, (10, 1), np.int8),
        "real": [jnp.round(4 * values(rng, shape, np.float64)) for shape in ((10, 3), (10,))],
    }

    def body(exchange, leaves, topk_idx, weights):
        beside, out = exchange.dispatch(
            shared,
            (leaves["real"][0], 1.0),
            leaves,
            topk_idx,
            axis_name="expert",
            **geometry.options(),
        )
        rows = (out.tokens["complex"] * jnp.conj(out.tokens["complex"])).real
        rows = rows * lax.stop_gradient(out.tokens["real"][1])[:, None] + out.tokens["id"]
        return exchange.combine(jnp.sum, (beside,), rows, out.handle, weights)[1]

    def run(exchange):
        def loss(leaf):
            return sharded(exchange, body)({**leaves, "complex": leaf}, topk_idx, weights).sum()

        return jax.jit(jax.grad(loss))(leaves["complex"])

    assert_equal_runs(run)


LINEAR = {
    # what is done, the argument in which it is linear
    "tokens": (lambda e, x, i, w, p: _rows(e, x, i)[0], 0),
    "both exchanges": (lambda e, x, i, w, p: _sums(e, x, i, w), 0),
    "weights": (lambda e, x, i, w, p: _sums(e, x, i, w), 2),
    "under checkpoint": (
        lambda e, x, i, w, p: jax.checkpoint(partial(_sums, e))(x, i, w),
        0,
    ),
    "in a scan": (
        lambda e, x, i, w, p: lax.scan(lambda x, _: (_sums(e, x, i, w), None), x, length=2)[0],
        0,
    ),
}


def _rows(exchange, tokens, topk_idx):
    _, out = exchange.dispatch(
        jnp.negative, (tokens,), tokens, topk_idx, axis_name="expert", **GEOMETRY.options()
    )
    return out.tokens, out.handle


def _sums(exchange, tokens, topk_idx, weights):
    rows, handle = _rows(exchange, tokens, topk_idx)
    return exchange.combine(jnp.negative, (tokens,), 2 * rows, handle, weights)[1]


@pytest.mark.parametrize("body, which", LINEAR.values(), ids=LINEAR)
def test_linear_transpose(body, which, rng):
    args = arguments(rng)

    def run(exchange):
        def of(x):
            return sharded(exchange, body)(*args[:which], x, *args[which + 1 :])

        ct = of(args[which]) + 1
        transpose = jax.linear_transpose(of, args[which])
        (back,) = jax.linear_transpose(transpose, ct)((args[which],))
        return jax.jit(transpose)(ct), back

    assert_equal_runs(run)


def test_the_gradient_costs_the_same_exchanges(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    expected = {"dispatch": 1, "combine": 2, "combine_transpose": 1}
    for exchange in (Synchronous, Started):
        gradients = gradients_of(exchange, topk_idx)
        assert lowered_calls(gradients, tokens, weights, params) == expected
    # Only of what is asked for.
    by_weights = jax.value_and_grad(loss_of(Started, topk_idx), argnums=1)
    assert lowered_calls(by_weights, tokens, weights, params) == {
        "dispatch": 1,
        "combine": 1,
        "combine_transpose": 1,
    }
    assert lowered_calls(loss_of(Started, topk_idx), tokens, weights, params) == {
        "dispatch": 1,
        "combine": 1,
    }


def equations(jaxpr):
    """All equations in order, those of inner functions in place of the equation that has them."""
    for eqn in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(eqn.params.values())) if hasattr(p, "eqns")]
        if not inner:
            yield eqn
        for part in inner:
            yield from equations(part)


def order(fn, *args):
    """S, D: start and done, t: tie, p: a product, in the order of the program."""
    short = {"freeio_start": "S", "freeio_done": "D", "freeio_tie": "t", "dot_general": "p"}
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return "".join(short.get(eqn.primitive.name, "") for eqn in equations(jaxpr))


def test_what_lies_between_does_so_in_the_backward_pass(rng):
    tokens, topk_idx, weights, params = arguments(rng)
    args = tokens, weights, params
    # In the backward pass the experts' product has two, of their weights and of their rows. The
    # matrix of the products that run beside is a constant, so each of those has one.
    forward, backward = "StptDpStptD", "StptDppStptD"
    assert order(loss_of(Started, topk_idx), *args) == forward
    assert order(gradients_of(Started, topk_idx), *args) == forward + backward


# --- jax.checkpoint, loops, branches -------------------------------------------------------------


def by_primitive(primitive, *_, **__):
    return primitive.name.startswith("freeio_")


POLICIES = {
    "nothing": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "by name": jax.checkpoint_policies.save_only_these_names("rows"),
    "by primitive": by_primitive,
}


def named_layer(exchange, tokens, topk_idx, weights, params):
    """``layer`` with a name for the rows that arrive."""

    class Named(exchange):
        @classmethod
        def dispatch(cls, *args, **options):
            beside, out = exchange.dispatch(*args, **options)
            return beside, dataclasses.replace(out, tokens=checkpoint_name(out.tokens, "rows"))

    return layer(Named, tokens, topk_idx, weights, params)


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_checkpoint(policy, place, rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def run(exchange):
        remat = partial(jax.checkpoint, policy=policy)
        if place == "outside":
            mapped = remat(sharded(exchange, named_layer))
        else:
            body = remat(named_layer, static_argnums=0)
            mapped = sharded(exchange, lambda e, *args: body(e, *args))
        gradients = jax.value_and_grad(loss_of(exchange, topk_idx, mapped), argnums=(0, 1, 2))
        return mapped, gradients

    args = tokens, weights, params
    (_, started), (_, synchronous) = run(Started), run(Synchronous)
    assert_same(jax.jit(started)(*args), jax.jit(synchronous)(*args))
    assert lowered_calls(started, *args) == lowered_calls(synchronous, *args)
    # What is not there yet is never saved.
    saved = saved_residuals(lambda x: run(Started)[0](x, topk_idx, weights, params), tokens)
    unfinished = ("freeio_start", "freeio_tie", "freeio_hold", "freeio_done")
    assert not any(name in source for _, source in saved for name in unfinished), saved


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("remat", [False, True])
def test_layers_in_a_scan(remat, check_vma, rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def layers(exchange, tokens, topk_idx, weights, params):
        def step(tokens, scale):
            z = layer(exchange, tokens, topk_idx, scale * weights, params)
            return lax.rem(z, 4.0), tokens.sum()  # small enough for the next step to be exact

        step = jax.checkpoint(step) if remat else step
        return lax.scan(step, tokens, jnp.arange(1.0, 4.0))[0]

    def run(exchange):
        gradients = gradients_of(exchange, topk_idx, body=layers, check_vma=check_vma)
        return jax.jit(gradients)(tokens, weights, params)

    assert_equal_runs(run)


def test_an_exchange_of_what_no_step_of_a_scan_changes(rng):
    """JAX takes it out of the loop, start and done together."""
    tokens, topk_idx, weights, params = arguments(rng)

    def layers(exchange, tokens, topk_idx, weights, params):
        def step(carry, _):
            beside, out = exchange.dispatch(
                shared, (carry, 2.0), tokens, topk_idx, axis_name="expert", **GEOMETRY.options()
            )
            return beside + out.tokens.sum() + carry, None

        return lax.scan(step, weights, length=2)[0]

    def run(exchange):
        gradients = gradients_of(exchange, topk_idx, body=layers)
        return jax.jit(gradients)(tokens, weights, params)

    assert_equal_runs(run)


def test_while_loop_and_cond(rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def loop(exchange, tokens, topk_idx, weights, params, steps):
        def body(state):
            step, tokens = state
            z = lax.cond(
                step % 2 == 0,
                lambda x: layer(exchange, x, topk_idx, weights, params),
                lambda x: x + 1,
                tokens,
            )
            return step + 1, z

        return lax.while_loop(lambda s: s[0] < steps[0], body, (0, tokens))[1]

    specs = (*(P("expert"),) * 4, P())

    def run(exchange, steps):
        mapped = jax.jit(sharded(exchange, loop, specs=specs))
        return mapped(tokens, topk_idx, weights, params, jnp.array([steps]))

    for steps in (0, 3):
        assert_equal_runs(run, steps)


def test_gradient_of_a_cond(rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def body(exchange, tokens, topk_idx, weights, params):
        return lax.cond(
            lax.pmax(jnp.int32(1), "expert") > 0,
            partial(layer, exchange),
            lambda x, *_: 2 * x,
            *(tokens, topk_idx, weights, params),
        )

    def run(exchange):
        return jax.jit(gradients_of(exchange, topk_idx, body=body))(tokens, weights, params)

    assert_equal_runs(run)


# --- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False])
def test_vmap_is_a_loop(outside, rng):
    sets = [arguments(rng) for _ in range(2)]
    tokens, topk_idx, weights = (jnp.stack(column) for column in list(zip(*sets, strict=True))[:3])
    params = sets[0][3]
    axes = (0, 0, 0, None)

    def run(exchange):
        if outside:
            mapped = jax.vmap(sharded(exchange), in_axes=axes)
        else:
            mapped = jax.shard_map(
                jax.vmap(partial(layer, exchange), in_axes=axes),
                mesh=make_mesh(GEOMETRY.num_ranks),
                in_specs=(P(None, "expert"),) * 3 + (P("expert"),),
                out_specs=P(None, "expert"),
            )

        def loss(tokens, weights, params):
            return mapped(tokens, topk_idx, weights, params).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(tokens, weights, params)

    assert_equal_runs(run)


def test_vmap_of_the_weights_alone(rng):
    """The dispatch is started, the combines are a loop."""
    tokens, topk_idx, weights, params = arguments(rng)
    batch = jnp.stack([weights, -weights])

    def run(exchange):
        mapped = jax.vmap(sharded(exchange), in_axes=(None, None, 0, None))
        return jax.jit(mapped)(tokens, topk_idx, batch, params)

    assert_equal_runs(run)


def test_jacobians(rng):
    tokens, topk_idx, weights, params = arguments(rng)

    def run(exchange):
        def of(weights):
            return sharded(exchange)(tokens, topk_idx, weights, params)[:, 0]

        return jax.jit(lambda w: (jax.jacfwd(of)(w), jax.jacrev(of)(w)))(weights)

    assert_equal_runs(run)


# --- Meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, names, kwargs",
    [
        ((2, 2), ("data", "expert"), {}),
        ((2, 2), ("expert", "model"), {"axis_names": {"expert"}}),
    ],
    ids=["groups", "partly manual"],
)
def test_groups_and_partly_manual_meshes(shape, names, kwargs, rng):
    mesh = make_mesh(shape, names)
    spec = P(names if not kwargs else "expert")
    count = 2 if kwargs else 4
    sets = [arguments(rng) for _ in range(count // 2)]
    tokens, topk_idx, weights = (
        jnp.concatenate(column) for column in list(zip(*sets, strict=True))[:3]
    )
    params = sets[0][3]

    def run(exchange):
        mapped = jax.shard_map(
            partial(layer, exchange),
            mesh=mesh,
            in_specs=(spec, spec, spec, P("expert")),
            out_specs=spec,
            **kwargs,
        )

        def loss(tokens, weights, params):
            return mapped(tokens, topk_idx, weights, params).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(tokens, weights, params)

    assert_equal_runs(run)


# --- Several at once -----------------------------------------------------------------------------


def test_several_in_flight_and_synchronous_calls_between(rng):
    """Two micro-batches: one is exchanged while the other one is computed."""
    tokens, topk_idx, weights, params = arguments(rng)
    options = {"axis_name": "expert", **GEOMETRY.options()}

    def two(_, tokens, topk_idx, weights, params):
        batches = [(tokens, topk_idx), (2 * tokens, topk_idx[::-1])]
        pendings = [fio.dispatch_start(*batch, **options) for batch in batches]
        (beside, other), pendings = fio.between(
            {"first": pendings[0], "others": (pendings[1], None)},
            lambda x: (shared(x, 1.0), fio.dispatch(x, topk_idx, **options).tokens.sum()),
            tokens,
        )
        back = []
        for pending in (pendings["others"][0], pendings["first"]):  # done in another order
            out = pending.done()
            back.append(fio.combine_start(out.tokens, out.handle, weights, num_sms=4))
        sums = [pending.done() for pending in back]
        return sums[0] + 3 * sums[1] + beside + other

    def one_after_the_other(_, tokens, topk_idx, weights, params):
        beside, other = (
            shared(tokens, 1.0),
            fio.dispatch(tokens, topk_idx, **options).tokens.sum(),
        )
        sums = []
        for batch in ((2 * tokens, topk_idx[::-1]), (tokens, topk_idx)):
            out = fio.dispatch(*batch, **options)
            sums.append(fio.combine(out.tokens, out.handle, weights))
        return sums[0] + 3 * sums[1] + beside + other

    results = [
        jax.jit(gradients_of(None, topk_idx, body=body))(tokens, weights, params)
        for body in (two, one_after_the_other)
    ]
    assert_same(*results)


def test_one_of_two_results_is_not_used(rng):
    """Nobody uses the first: it goes, with its start."""
    tokens, topk_idx, weights, params = arguments(rng)

    def body(_, tokens, topk_idx, weights, params):
        options = {"axis_name": "expert", **GEOMETRY.options()}
        pendings = [fio.dispatch_start(tokens * k, topk_idx, **options) for k in (1, 2)]
        beside, pendings = fio.between(pendings, shared, tokens, 1.0)
        unused, out = (pending.done() for pending in pendings)
        del unused
        return beside + out.tokens.sum()

    loss = loss_of(None, topk_idx, body=body)
    assert lowered_calls(loss, tokens, weights, params) == {"dispatch": 1}


# --- The calls of an engine that can start an exchange --------------------------------------------


def calls_of(fn, *args):
    """[(target, operands, results, attributes)] of the custom calls, in the program's order.

    Without the checks of a program for GPUs, which no exchange has.
    """
    text = jax.jit(fn).lower(*args).as_text()
    call = r"(?:(%\w+)(?::(\d+))? = )?stablehlo\.custom_call @freeio_(\w+)\((.*?)\) \{(.*)\} : "
    found = []
    for name, count, target, operands, attributes in re.findall(call, text):
        results = [f"{name}#{i}" for i in range(int(count or 1))] if count else [name]
        if target != "check":
            found.append((target, operands.split(", "), results, attributes))
    return found


@pytest.fixture
def apart(monkeypatch):
    """Lowers for an engine with such calls: also for the CPU, where nothing of it runs."""
    if jax.process_count() > 1 and hosts.there_are_several():
        pytest.skip("no engine moves rows here: a transport runs what is started to its end")
    monkeypatch.setattr(ENGINES["cpu"], "starts_apart", True)
    monkeypatch.setattr(ENGINES["cpu"], "dispatch_scratch", lambda *_, **__: (((7,), np.uint32),))
    monkeypatch.setattr(ENGINES["cpu"], "combine_scratch", lambda *_: (((5,), np.uint32),) * 2)


def attribute(attributes, name):
    (value,) = re.findall(rf"\b{name} = (\S+) : i64", attributes)
    return int(value)


def test_done_has_the_operands_and_all_results_of_its_start(apart, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    calls = calls_of(gradients_of(Started, topk_idx), tokens, weights, params)
    assert [target for target, *_ in calls] == [
        *("dispatch_start", "done", "combine_start", "done"),
        *("combine_transpose_start", "done", "combine_start", "done"),
    ]
    for number, (start, done) in enumerate(zip(calls[::2], calls[1::2], strict=True)):
        scratch = {"dispatch_start": 1, "combine_start": 2, "combine_transpose_start": 0}[start[0]]
        num_results = len(start[2]) - scratch
        assert attribute(start[3], "start") == attribute(done[3], "start") == number
        assert attribute(start[3], "num_sms") == 0
        for _, _, _, attributes in (start, done):
            assert "has_side_effect = true" in attributes
            assert re.search(r'module = "\w+"', attributes)
        # The same buffers: of the operands, and of scratch. What lies between are the results.
        operands = done[1]
        assert operands[: len(start[1])] == start[1]
        assert operands[len(start[1]) + num_results :] == start[2][num_results:]
        assert len(operands) == len(start[1]) + len(start[2])
        assert len(done[2]) == num_results
        # Each result lies where the start has written it.
        aliases = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", done[3])
        assert aliases == [
            (str(i) if num_results > 1 else "", str(len(start[1]) + i)) for i in range(num_results)
        ]


def test_num_sms_holds_forward_and_backward(apart, rng):
    tokens, topk_idx, weights, params = arguments(rng)

    class Few(Started):
        @classmethod
        def dispatch(cls, *args, **options):
            return super().dispatch(*args, **options, num_sms=5)

    calls = calls_of(gradients_of(Few, topk_idx), tokens, weights, params)
    assert [attribute(a, "num_sms") for target, *_, a in calls if target != "done"] == [5, 0, 0, 5]


def test_what_has_no_elements_is_not_waited_for(apart, rng):
    geometry = dataclasses.replace(GEOMETRY, capacity=0)
    tokens, topk_idx, weights, params = arguments(rng)
    loss = loss_of(Started, topk_idx, body=partial(layer, geometry=geometry))
    # The dispatch still counts. There is nothing to combine.
    assert [target for target, *_ in calls_of(loss, tokens, weights, params)] == [
        "dispatch_start",
        "done",
    ]


def test_derivatives_of_derivatives_run_at_once(apart, rng):
    tokens, topk_idx, weights, params = arguments(rng)
    grad = jax.grad(loss_of(Started, topk_idx))
    calls = calls_of(lambda x: jax.jvp(lambda x: grad(x, weights, params), (x,), (x,)), tokens)
    starts = Counter(attribute(a, "start") for target, *_, a in calls if target.endswith("start"))
    dones = Counter(attribute(a, "start") for target, *_, a in calls if target == "done")
    assert starts == dones and set(starts.values()) == {1}


def test_synchronous_calls_leave_room_for_the_starts_of_their_program(apart, rng):
    """Those before the starts, those behind them, those in loops, and gradients."""
    tokens, topk_idx, weights, params = arguments(rng)
    options = {"axis_name": "expert", **GEOMETRY.options()}

    def body(_, tokens, topk_idx, weights, params, *, starts):
        out = fio.dispatch(tokens, topk_idx, **options)
        for num_sms in starts:
            started = fio.combine_start(out.tokens, out.handle, weights, num_sms=num_sms)
            beside, started = fio.between(started, shared, tokens, 1.0)
            tokens = tokens + started.done() + beside

        def step(total, _):
            out = fio.dispatch(total, topk_idx, **options)
            return total + fio.combine(out.tokens, out.handle, weights), ()

        return jax.lax.scan(step, tokens, None, length=2)[0]

    for starts, most in (((), []), ((None,), ["0"]), ((None, 7, 3), ["7"])):
        loss = gradients_of(None, topk_idx, body=partial(body, starts=starts))
        calls = calls_of(loss, tokens, weights, params)
        synchronous = [a for target, *_, a in calls if not re.search("start|done", target)]
        assert len(synchronous) >= 4
        for attributes in synchronous:
            assert re.findall(r"\bstarts_num_sms = (\S+) : i64", attributes) == most
        others = [a for target, *_, a in calls if re.search("start|done", target)]
        assert not any("starts_num_sms" in attributes for attributes in others)
