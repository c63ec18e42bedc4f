"""Misuse of a Pending is an error that names the call: at trace time, on every platform."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import GEOMETRY, StartedApi, sharded
from jax import lax
from test_arguments import raises

import freeio_jax as fio
from freeio_jax.overlap import start_done
from freeio_jax.primitives import combine_p

HERE = "test_pending.py"
ROWS = jnp.ones((10, 3))
IDS = jnp.zeros((10, 3), jnp.int32)


def start(rows, topk_idx, **kwargs):
    return fio.dispatch_start(rows, topk_idx, axis_name="expert", **GEOMETRY.options(), **kwargs)


def start_combine(rows, topk_idx, **kwargs):
    out = start(rows, topk_idx).done()
    return fio.combine_start(out.tokens, out.handle, **kwargs)


STARTS = pytest.mark.parametrize(
    "start, name", [(start, "dispatch_start"), (start_combine, "combine_start")]
)


def run(body):
    """Compiles ``body(rows, topk_idx)`` under shard_map."""
    return jax.jit(sharded(None, lambda _, *args: body(*args))).lower(ROWS, IDS).compile()


def rows_of(result):
    return result.tokens if isinstance(result, fio.Dispatched) else result


# --- done twice, never done ----------------------------------------------------------------------


@STARTS
def test_done_twice(start, name):
    def body(rows, topk_idx):
        pending = start(rows, topk_idx)
        pending.done()
        return rows_of(pending.done())

    with raises(RuntimeError, name, HERE, "done() was called before", "once"):
        run(body)


def never_done(start, rows, topk_idx):
    _, pending = fio.between(start(rows, topk_idx), jnp.tanh, rows)
    del pending
    return rows + 1


NEVER = {
    "in shard_map": never_done,
    "in a scan": lambda start, rows, topk_idx: lax.scan(
        lambda x, _: (never_done(start, x, topk_idx), None), rows, length=2
    )[0],
    "in a branch": lambda start, rows, topk_idx: lax.cond(
        topk_idx[0, 0] == 0, partial(never_done, start), lambda x, _: x, rows, topk_idx
    ),
    "in a gradient": lambda start, rows, topk_idx: jax.grad(
        lambda x: never_done(start, x, topk_idx).sum()
    )(rows),
    "in checkpoint": lambda start, rows, topk_idx: jax.checkpoint(partial(never_done, start))(
        rows, topk_idx
    ),
    "in jit": lambda start, rows, topk_idx: jax.jit(partial(never_done, start))(rows, topk_idx),
}


@STARTS
@pytest.mark.parametrize("body", NEVER.values(), ids=NEVER)
def test_never_done(body, start, name):
    with raises(RuntimeError, name, HERE, "was never done", "Call done()"):
        run(partial(body, start))


# --- out of the function or loop body that made it ----------------------------------------------

PASSED = {
    "out of jit": lambda pending, rows: jax.jit(lambda x: pending)(rows),
    "into jit": lambda pending, rows: jax.jit(lambda p: rows_of(p.done()))(pending),
    "round a scan": lambda pending, rows: lax.scan(lambda p, _: (p, None), pending, length=2),
    "round a while_loop": lambda pending, rows: lax.while_loop(
        lambda p: True, lambda p: p, pending
    ),
    "into a branch": lambda pending, rows: lax.cond(
        rows[0, 0] > 0, lambda p: rows_of(p.done()), lambda p: rows, pending
    ),
    "out of a branch": lambda pending, rows: lax.cond(
        rows[0, 0] > 0, lambda: pending, lambda: pending
    ),
    "into vmap": lambda pending, rows: jax.vmap(lambda p: rows_of(p.done()))(pending),
    "into grad": lambda pending, rows: jax.grad(lambda p: rows_of(p.done()).sum())(pending),
    "into checkpoint": lambda pending, rows: jax.checkpoint(lambda p: rows_of(p.done()))(pending),
    "out of shard_map": lambda pending, rows: pending,
    "into tree.map": lambda pending, rows: jax.tree.map(jnp.sin, [pending]),
}


@STARTS
@pytest.mark.parametrize("passed", PASSED.values(), ids=PASSED)
def test_it_is_passed_on(passed, start, name):
    with raises(TypeError, name, HERE, "call done() in one function and loop body"):
        run(lambda rows, topk_idx: passed(start(rows, topk_idx), rows))


CLOSED_OVER = {
    "jit": lambda pending, rows: jax.jit(lambda: rows_of(pending.done()))(),
    "scan": lambda pending, rows: lax.scan(
        lambda x, _: (x + rows_of(pending.done()).sum(), None), rows, length=2
    ),
    "while_loop": lambda pending, rows: lax.while_loop(
        lambda x: x.sum() < 0, lambda x: x + rows_of(pending.done()).sum(), rows
    ),
    "cond": lambda pending, rows: lax.cond(
        rows[0, 0] > 0, lambda: rows_of(pending.done()), lambda: rows_of(pending.done())
    ),
    "grad": lambda pending, rows: jax.grad(lambda x: x.sum() * rows_of(pending.done()).sum())(rows),
    "vmap": lambda pending, rows: jax.vmap(lambda x: x * rows_of(pending.done()).sum())(rows),
    "checkpoint": lambda pending, rows: jax.checkpoint(lambda: rows_of(pending.done()))(),
    "between in jit": lambda pending, rows: jax.jit(lambda x: fio.between(pending, jnp.sin, x)[0])(
        rows
    ),
}


@STARTS
@pytest.mark.parametrize("use", CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_it_is_done_in_another_function(use, start, name):
    with raises(RuntimeError, name, HERE, "another function or loop body", "in the same one"):
        run(lambda rows, topk_idx: use(start(rows, topk_idx), rows))


def test_it_leaves_by_the_back_door():
    kept = []

    def body(rows, topk_idx):
        kept.append(start(rows, topk_idx))
        return rows

    with raises(RuntimeError, "dispatch_start", "was never done"):
        run(body)
    with raises(RuntimeError, "dispatch_start", "another function or loop body"):
        kept[0].done()
    with raises(RuntimeError, "dispatch_start", "another function or loop body"):
        run(lambda rows, topk_idx: kept[0].done().tokens)


def test_arrays_that_went_round_a_loop_are_noticed_when_it_is_lowered():
    """No function of the API lets them. A transformation of somebody else's could."""

    def body(rows, topk_idx):
        out = start(rows, topk_idx).done()
        how = {"axes": ("expert",), "layout": out.handle._layout}
        sums = start_done.start(combine_p, *out.handle._routes, out.tokens, num_sms=0, **how)
        sums = lax.fori_loop(0, 2, lambda _, x: x + 0, sums)
        return start_done.done_p.bind(sums, name="combine_start")[0]

    with raises(RuntimeError, "combine_start", "another function or loop body"):
        run(body)


# --- used as an array ----------------------------------------------------------------------------

USES = {
    "function": (jnp.sin, TypeError),
    "operator": (lambda pending: jnp.ones(3) + pending, TypeError),
    "numpy": (np.asarray, TypeError),
    "result": (lambda pending: pending.tokens, AttributeError),
    "method": (lambda pending: pending.sum(), AttributeError),
}


@STARTS
@pytest.mark.parametrize("use, error", USES.values(), ids=USES)
def test_it_is_no_array(use, error, start, name):
    with raises(error, name, HERE, "all done()"):
        run(lambda rows, topk_idx: use(start(rows, topk_idx)))


# --- between -------------------------------------------------------------------------------------


def test_between_of_one_that_is_done():
    def body(rows, topk_idx):
        pending = start(rows, topk_idx)
        pending.done()
        return fio.between(pending, jnp.sin, rows)[0]

    with raises(RuntimeError, "between", "dispatch_start", HERE, "done() was called before"):
        run(body)


def test_done_inside_of_between():
    def body(rows, topk_idx):
        pending = start(rows, topk_idx)
        return fio.between(pending, lambda x: x + pending.done().tokens.sum(), rows)[0]

    with raises(RuntimeError, "between", "dispatch_start", HERE, "done() was called before"):
        run(body)


@pytest.mark.parametrize("what", [1.0, "dispatch", [jnp.ones(3)]])
def test_between_of_something_else(what):
    with raises(TypeError, "between", "dispatch_start or combine_start"):
        fio.between(what, jnp.sin, 1.0)


def test_between_passes_on_what_is_no_array():
    def body(rows, topk_idx):
        pending = start(rows, topk_idx)

        def fn(size, name, options, nothing):
            assert (size, name, nothing) == (3, "x", None)
            return rows[:size], {"name": name, **options}

        (some, options), same = fio.between([pending, pending], fn, 3, "x", {"a": 1}, None)
        assert options == {"name": "x", "a": 1}
        assert same == [pending, pending]
        assert fio.between((), lambda x: x, 4) == (4, ())
        return some + pending.done().tokens.sum()

    run(body)


def test_repr_tells_where_it_was_started():
    def body(rows, topk_idx):
        pending = start(rows, topk_idx)
        assert "Pending of the dispatch_start at" in repr(pending) and HERE in repr(pending)
        out = pending.done()
        assert repr(pending).endswith(", done>")
        return out.tokens

    run(body)


# --- Arguments -----------------------------------------------------------------------------------


@STARTS
@pytest.mark.parametrize(
    "value, error, fix",
    [(0, ValueError, "at least 1"), (-3, ValueError, "-3"), (1.5, TypeError, "1.5")],
)
def test_num_sms(value, error, fix, start, name):
    with raises(error, name, "num_sms", fix):
        run(lambda rows, topk_idx: rows_of(start(rows, topk_idx, num_sms=value).done()))


def test_other_arguments_are_checked_as_those_of_the_synchronous_calls():
    with raises(NameError, "dispatch", "'expert'", "shard_map"):
        start(ROWS, IDS)
    with raises(ValueError, "dispatch", "topk_idx", "(3,)"):
        run(lambda rows, topk_idx: start(rows, topk_idx[0]).done().tokens)
    with raises(ValueError, "combine", "topk_weights", "(2, 2)"):
        run(lambda rows, i: start_combine(rows, i, topk_weights=jnp.ones((2, 2))).done())


@pytest.mark.parametrize("value", [0, -1, "few", None])
def test_overlap_num_sms_is_a_positive_number(value):
    before = fio.config()
    with raises(ValueError, "overlap_num_sms", repr(value)):
        fio.config(overlap_num_sms=value)
    assert fio.config() == before
    try:
        assert fio.config(overlap_num_sms=np.int64(8))["overlap_num_sms"] == 8
    finally:
        fio.config(**before)


def test_a_platform_without_an_engine():
    traced = jax.jit(sharded(StartedApi, lambda api, *args: start(*args).done().tokens)).trace(
        ROWS, IDS
    )
    with raises(NotImplementedError, "freeio_jax.dispatch has no engine", "('tpu',)"):
        traced.lower(lowering_platforms=("tpu",))


# --- Arguments are those of the synchronous calls ------------------------------------------------


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_a_start_has_all_arguments_of_the_synchronous_call(name):
    started, synchronous, plain = (
        dict(inspect.signature(call).parameters)
        for call in (
            getattr(fio, f"{name}_start"),
            getattr(fio, name),
            getattr(fio.reference, name),
        )
    )
    assert started.pop("num_sms").default is None
    if name == "combine":  # only engines and transports find out which ranks share a host
        assert plain.pop("hosts").default is None
    default_of = {n: parameter.default for n, parameter in synchronous.items()}
    assert {n: parameter.default for n, parameter in started.items()} == default_of
    assert {n: parameter.default for n, parameter in plain.items()} == default_of


@pytest.mark.parametrize("zero_tail", [False, True])
def test_the_handle_of_a_start_says_whether_the_tail_is_zero(zero_tail):
    def body(rows, topk_idx):
        options = GEOMETRY.options() | {"zero_tail": zero_tail}
        out = fio.dispatch_start(rows, topk_idx, axis_name="expert", **options).done()
        assert out.handle._layout.zero_tail is zero_tail
        return out.tokens

    run(body)
