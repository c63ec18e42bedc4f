"""Which implementation of a product serves: after which trial, and what is said of it."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from freeio_jax.grouped_matmul import choice, choose, trial
from freeio_jax.grouped_matmul.product import Product
from freeio_jax.grouped_matmul.tiled import tiled

#: Of the trial's kinds, but for two cores instead of a GPU.
PROBLEMS = (
    trial.Problem(60, 24, 40, ((20, 0, 7, 33), (0, 0, 0, 0))),
    trial.Problem(700, 32, 48, ((300, 0, 133, 260), (0, 700, 0, 0), (129, 1, 0, 7))),
)


RAGGED_DOT = dataclasses.replace(choice.RAGGED_DOT, slow=False)


def first_rows_only(product, left, right, sizes):
    """Looks at the first 128 rows of a group for its weights' gradient, as tokamax 0.0.17 did."""
    if product != Product.WEIGHTS_GRADIENT:
        return tiled(product, left, right, sizes)
    row = jnp.arange(left.shape[0])[:, None]
    ends = jnp.cumsum(sizes)
    group = jnp.sum(row >= ends, axis=1, keepdims=True)
    starts = jnp.append(ends - sizes, left.shape[0])
    return tiled(product, jnp.where(row < starts[group] + 128, left, 0), right, sizes)


def reads_left_over_rows(product, left, right, sizes):
    """Multiplies the rows past the end with zero instead of leaving them out."""
    if product != Product.WEIGHTS_GRADIENT:
        return tiled(product, left, right, sizes)
    used = jnp.arange(left.shape[0])[:, None] < jnp.sum(sizes)
    whole = sizes.at[-1].add(left.shape[0] - jnp.sum(sizes))
    return tiled(product, left, jnp.where(used, right, right * 0), whole)


def reads_weights_of_empty_groups(product, left, right, sizes):
    """Adds a group's product times zero where the group has no rows, as tokamax 0.0.17 did."""
    out = tiled(product, left, right, sizes)
    if product == Product.WEIGHTS_GRADIENT:
        return out
    empty = sizes[:, None, None] == 0
    return out + jnp.sum(jnp.where(empty, right * 0, 0)).astype(out.dtype)


def does_not_compile(product, left, right, sizes):
    raise NotImplementedError("Mosaic has changed its mind\nand says so at length")


def leaves_garbage_past_the_end(product, left, right, sizes):
    out = tiled(product, left, right, sizes)
    if product == Product.WEIGHTS_GRADIENT:
        return out
    return out.at[-1].add(jnp.where(jnp.sum(sizes) < len(out), 1, 0).astype(out.dtype))


def takes_all_memory(product, left, right, sizes, *, most=60):
    if max(left.shape[0], right.shape[0]) > most:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return tiled(product, left, right, sizes)


@pytest.fixture
def candidates(monkeypatch):
    """Lets a test say what is chosen from on this platform."""

    def choose_from(*functions):
        own = tuple(choice.Implementation(f.__name__, f) if callable(f) else f for f in functions)
        monkeypatch.setitem(choice.CANDIDATES, "cpu", own)

    monkeypatch.setattr(trial, "PROBLEMS", PROBLEMS)
    monkeypatch.setattr(trial, "CASES", tuple((p, s) for p in PROBLEMS for s in p.sizes))
    caches = (choice._first, choice._wrong, choice._tell_slow)
    for cache in caches:
        cache.cache_clear()
    yield choose_from
    for cache in caches:
        cache.cache_clear()


def served(product, dtype=jnp.bfloat16):
    chosen = choose("cpu", product, dtype)
    return chosen.implementation.name, chosen.reason


@pytest.mark.parametrize(
    "function, wrong_in",
    [
        (first_rows_only, {Product.WEIGHTS_GRADIENT}),
        (reads_left_over_rows, {Product.WEIGHTS_GRADIENT}),
        (reads_weights_of_empty_groups, {Product.FORWARD, Product.ROWS_GRADIENT}),
        (leaves_garbage_past_the_end, {Product.FORWARD, Product.ROWS_GRADIENT}),
        (does_not_compile, set(Product)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_product_is_passed_over_and_the_right_ones_of_it_serve(
    function, wrong_in, candidates
):
    candidates(function, choice.TILED)
    for product in Product:
        name, reason = served(product)
        if product in wrong_in:
            assert name == "tiled" and f"{function.__name__}: " in reason
            assert "wrong in a trial" in reason or "NotImplementedError: Mosaic" in reason
            assert "\n" not in reason
        else:
            assert name == function.__name__ and "right in a trial" in reason


@pytest.mark.parametrize(
    "product, dtype",
    [
        (Product.FORWARD, jnp.float16),
        (Product.ROWS_GRADIENT, jnp.float32),
        (Product.WEIGHTS_GRADIENT, jnp.bfloat16),
    ],
)
def test_right_ones_pass(product, dtype, candidates):
    candidates(RAGGED_DOT, choice.TILED)
    assert served(product, dtype)[0] == "ragged_dot"


def test_the_trial_is_made_once_for_each_product_and_dtype(candidates):
    calls = []

    def counted(product, left, right, sizes):
        calls.append((product, left.dtype.name))
        return tiled(product, left, right, sizes)

    candidates(counted, choice.TILED)
    for _ in range(2):
        for dtype in (jnp.bfloat16, jnp.float32):
            choose("cpu", Product.FORWARD, dtype, (24, 40))
            choose("cpu", Product.FORWARD, dtype, (40, 24))
    assert set(calls) == {(Product.FORWARD, "bfloat16"), (Product.FORWARD, "float32")}
    assert len(calls) == 2 * len(PROBLEMS)


@pytest.mark.parametrize("most, serves", [(60, True), (0, False)])
def test_problems_without_memory_are_left_out(most, serves, candidates):
    named = choice.Implementation("large", functools.partial(takes_all_memory, most=most))
    candidates(named, choice.TILED)
    name, reason = served(Product.FORWARD)
    assert name == ("large" if serves else "tiled")
    assert serves or "large: no memory is left for a trial" in reason


def test_operands_that_do_not_fit_are_passed_on(candidates):
    def obstacle(product, dtype, widths):
        return "K=25 is no multiple of 8" if widths == (25, 40) else None

    picky = dataclasses.replace(RAGGED_DOT, name="picky", obstacle=obstacle)
    candidates(picky, choice.TILED)
    chosen = choose("cpu", Product.FORWARD, jnp.bfloat16, (25, 40))
    assert chosen.implementation.name == "tiled"
    assert "picky: K=25 is no multiple of 8" in chosen.reason
    assert choose("cpu", Product.FORWARD, jnp.bfloat16, (64, 40)).implementation.name == "picky"


def test_the_programs_settings_are_not_the_trials(candidates):
    candidates(RAGGED_DOT, choice.TILED)
    with (
        jax.enable_x64(True),
        jax.debug_nans(True),
        jax.disable_jit(),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        assert served(Product.WEIGHTS_GRADIENT)[0] == "ragged_dot"


@pytest.mark.parametrize("faster", ["ragged_dot", "tiled"])
def test_of_slow_ones_the_faster_serves_and_it_is_told_once(
    faster, candidates, monkeypatch, caplog
):
    monkeypatch.setattr(trial, "share_of_dense", lambda *args: 0.3 if args[-1] == faster else 0.05)
    candidates(does_not_compile, choice.RAGGED_DOT, choice.TILED_ON_GPU)
    monkeypatch.setattr(logging.getLogger("freeio_jax"), "propagate", True)
    for widths in ((24, 40), (40, 24)):
        chosen = choose("cpu", Product.FORWARD, jnp.bfloat16, widths)
        assert chosen.implementation.name == faster
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"comes from {faster}" in record.getMessage()
    assert f"{faster} 0.30" in record.getMessage()
    assert "does_not_compile: NotImplementedError" in record.getMessage()


def test_what_could_not_be_timed_is_the_last_choice_and_told(candidates, monkeypatch, caplog):
    monkeypatch.setattr(
        trial, "share_of_dense", lambda *args: 0.01 if args[-1] == "tiled" else float("nan")
    )
    candidates(choice.RAGGED_DOT, choice.TILED_ON_GPU)
    monkeypatch.setattr(logging.getLogger("freeio_jax"), "propagate", True)
    assert choose("cpu", Product.FORWARD, jnp.bfloat16).implementation.name == "tiled"
    monkeypatch.setattr(trial, "share_of_dense", lambda *_: float("nan"))
    assert choose("cpu", Product.ROWS_GRADIENT, jnp.bfloat16).implementation.slow
    assert len(caplog.records) == 2


def test_what_is_slow_but_fast_here_is_not_told(candidates, monkeypatch, caplog):
    monkeypatch.setattr(trial, "share_of_dense", lambda *_: 0.8)
    candidates(choice.RAGGED_DOT, choice.TILED_ON_GPU)
    monkeypatch.setattr(logging.getLogger("freeio_jax"), "propagate", True)
    assert choose("cpu", Product.FORWARD, jnp.bfloat16).implementation.name == "ragged_dot"
    assert not caplog.records


def test_the_share_of_dense_is_measured(candidates):
    candidates(choice.TILED)
    for product in Product:
        assert 0 < trial.share_of_dense(product, jnp.float32, "tiled") < 100


def test_the_trials_problems_are_hard():
    """Each kind of input that has hidden a fault before."""
    assert any(max(sizes) > 4 * 128 for _, sizes in trial.CASES)
    assert any(0 in sizes and any(size % 8 for size in sizes) for _, sizes in trial.CASES)
    assert any(max(sizes) == problem.num_rows for problem, sizes in trial.CASES)
    assert any(sum(sizes) == 0 for _, sizes in trial.CASES)
    assert any(0 < sum(sizes) < problem.num_rows for problem, sizes in trial.CASES)
    assert all(sum(sizes) <= problem.num_rows for problem, sizes in trial.CASES)
    assert len({(p.k, p.n) for p in trial.PROBLEMS}) >= 3
    assert max(p.num_rows for p in trial.PROBLEMS) >= 16384
    sizes = jnp.array(PROBLEMS[1].sizes[0])
    left, right = trial.draw_operands(Product.WEIGHTS_GRADIENT, PROBLEMS[1], jnp.bfloat16, sizes, 0)
    assert jnp.isnan(left[693:]).all() and jnp.isfinite(right[:693]).all()
    rows, weights = trial.draw_operands(Product.FORWARD, PROBLEMS[1], jnp.bfloat16, sizes, 0)
    assert jnp.isnan(rows[693:]).all() and jnp.isfinite(rows[:693]).all()
    assert jnp.isnan(weights[1]).all() and jnp.isfinite(weights[jnp.array([0, 2, 3])]).all()
