"""Many exchanges at once: never paired wrongly, never stuck, and an error where a rank stays away.

Each exchange carries its own tag and each rank checks what lands there, so that rows of another
call, or in another order, are counted as errors inside the program that runs thousands of them.
"""

import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax import lax
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

RANKS, TOKENS, TOP_K, EXPERTS = 8, 4, 2, 16
# Of each loop, with several exchanges in each step.
STEPS = int(os.environ.get("STRESS_ITERATIONS", "1000"))
# Programs dispatched from Python before any of them is waited for. XLA:CPU allows 32; past that its
# own collectives get stuck as well, because devices wait in the thread pool that would free them.
IN_FLIGHT = 24
WINDOWS = 12  # how often that many are dispatched


def ids_of(tag, source):
    """int32 [TOKENS, TOP_K]: distinct ids for each token, or -1; other loads for every tag."""
    tag, source, token = (jnp.asarray(a, jnp.uint32) for a in (tag, source, jnp.arange(TOKENS)))
    x = (tag * jnp.uint32(2654435761) + source * 40503 + token * 97) * jnp.uint32(2246822519)
    first = (x >> 13) % EXPERTS
    ids = jnp.stack([first, (first + 1 + (x >> 21) % (EXPERTS - 1)) % EXPERTS], axis=1)
    skipped = jnp.stack([(x >> 7) % 5 == 0, (x >> 10) % 3 == 0], axis=1)
    return jnp.where(skipped, -1, ids.astype(jnp.int32))


@jax.jit
def exchange(tag):
    """One dispatch and combine for ``tag``; the number of things that are wrong on this rank."""
    rank = lax.axis_index("expert")
    ids = ids_of(tag, rank)
    order = rank * TOKENS + jnp.arange(TOKENS)
    tokens = jnp.stack([order, jnp.full(TOKENS, tag), ids[:, 0], ids[:, 1]], axis=1)
    out = fio.dispatch(tokens, ids, num_experts=EXPERTS, axis_name="expert")

    every = jax.vmap(ids_of, (None, 0))(tag, jnp.arange(RANKS))
    mine = rank * 2 + jnp.arange(2)
    load = jnp.sum(every[None] == mine[:, None, None, None], axis=(1, 2, 3))
    wrong = jnp.sum(out.group_sizes != load) + jnp.sum(out.handle.expert_load != load)
    wrong += out.handle.num_dropped + out.handle.num_invalid

    rows = jnp.arange(out.tokens.shape[0])
    used = rows < jnp.sum(load)
    group = (rows >= load[0]).astype(jnp.int32)
    source, its_tag, *its_ids = out.tokens.T
    wrong += jnp.sum(used & (its_tag != tag))
    wrong += jnp.sum(used & (its_ids[0] != mine[group]) & (its_ids[1] != mine[group]))
    ordered = (source[1:] > source[:-1]) | (rows[1:] == load[0])
    wrong += jnp.sum(used[1:] & ~ordered)
    wrong += jnp.sum(~used & jnp.any(out.tokens != 0, axis=1))

    # Small integers, so that the sums are exact.
    scale = (tag % 7 + 1).astype(jnp.float32)
    expert_out = (out.tokens[:, :1] * scale).at[:, 0].add(jnp.where(used, group * 0.5, jnp.nan))
    z = fio.combine(expert_out, out.handle)[:, 0]
    expected = jnp.sum(jnp.where(ids >= 0, order[:, None] * scale + ids % 2 * 0.5, 0), axis=1)
    return wrong + jnp.sum(z != expected)


def three(step):
    """Three exchanges of one jitted function that do not depend on each other."""
    return sum(exchange(3 * step + call) for call in range(3))


def on_all_ranks(fn, **kwargs):
    """``fn(seed)`` -> errors of one rank, as a jitted function to the errors of all ranks."""

    def body(seed):
        return jnp.reshape(fn(seed), 1)

    mesh = make_mesh(RANKS)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("expert"), **kwargs))


def zero():
    """An error count that varies over the ranks, as what is added to it does."""
    return lax.axis_index("expert") * 0


def assert_right(errors):
    assert np.asarray(errors).tolist() == [0] * RANKS


def fori(step, count=STEPS):
    return lambda seed: lax.fori_loop(0, count, lambda i, n: n + step(seed + i), zero())


# --- Within one program --------------------------------------------------------------------------


def test_independent_exchanges_in_a_fori_loop():
    assert_right(on_all_ranks(fori(three))(7))


@pytest.mark.parametrize("check_vma", [True, False])
def test_independent_exchanges_in_a_scan(check_vma):
    def fn(seed):
        steps = seed + jnp.arange(STEPS)
        return lax.scan(lambda n, i: (n + three(i), None), zero(), steps)[0]

    assert_right(on_all_ranks(fn, check_vma=check_vma)(11))


def test_independent_exchanges_in_a_while_loop():
    def fn(seed):
        # The end is data, the same on all ranks.
        last = seed + STEPS
        return lax.while_loop(
            lambda s: s[0] < last, lambda s: (s[0] + 1, s[1] + three(s[0])), (seed, zero())
        )[1]

    assert_right(on_all_ranks(fn)(13))


def test_loops_beside_loops():
    def fn(seed):
        return sum(fori(exchange, STEPS)(seed + 5000 * i) for i in range(4))

    assert_right(on_all_ranks(fn)(17))


def test_many_independent_exchanges_in_one_straight_program():
    fn = on_all_ranks(lambda seed: sum(exchange(seed + i) for i in range(16)))
    for seed in range(30):
        assert_right(fn(100 * seed))


def busy(count):
    """Work that takes a time proportional to ``count``; its result is always 0."""
    noise = lax.fori_loop(0, count, lambda _, x: x * 1.0001 + 1e-3, zero() + jnp.float32(1))
    return (noise < 0).astype(jnp.int32)


def test_devices_that_run_calls_apart():
    """In each step another device is late, for a while of its own."""

    def late(step):
        rank = lax.axis_index("expert")
        work = jnp.where(rank == step % RANKS, 20_000 * (step % 3 + 1), 0)
        first = exchange(3 * step + busy(work))
        work = jnp.where(rank == (step + 3) % RANKS, 20_000, 0)
        return first + exchange(3 * step + 1) + exchange(3 * step + 2 + busy(work))

    assert_right(on_all_ranks(fori(late, 300))(19))


def test_among_collectives_of_xla():
    """psum, all_to_all and ppermute before, after and beside the exchanges."""

    def mixed(step):
        rank = lax.axis_index("expert")
        first = exchange(3 * step)
        seen = lax.psum(first + step + rank, "expert")
        beside = lax.all_to_all(step + rank * RANKS + jnp.arange(RANKS), "expert", 0, 0, tiled=True)
        wrong = jnp.sum(beside != step + jnp.arange(RANKS) * RANKS + rank)
        # Depends on the psum; the all_to_all does not depend on it, nor it on the all_to_all.
        second = exchange(3 * step + (seen - RANKS * step - RANKS * (RANKS - 1) // 2) + 1)
        third = lax.ppermute(exchange(3 * step + 2), "expert", [(i, i ^ 1) for i in range(RANKS)])
        return first + second + third + wrong

    assert_right(on_all_ranks(fori(mixed, STEPS))(23))


def test_gradients_in_a_loop():
    """Forward and backward exchanges of two layers that do not depend on each other."""

    def layer(x, tag):
        ids = ids_of(tag, lax.axis_index("expert"))
        out = fio.dispatch(x, ids, num_experts=EXPERTS, axis_name="expert")
        return jnp.sum(fio.combine(out.tokens**2, out.handle))

    def step(tag):
        x = (lax.axis_index("expert") * TOKENS + jnp.arange(TOKENS, dtype=jnp.float32))[:, None]
        wrong = 0
        for call in (2 * tag, 2 * tag + 1):
            count = jnp.sum(ids_of(call, lax.axis_index("expert")) >= 0, axis=1)
            wrong += jnp.sum(jax.grad(layer)(x, call) != 2 * x * count[:, None])
        return wrong

    assert_right(on_all_ranks(fori(step, STEPS))(29))


# --- Several programs in flight ------------------------------------------------------------------


def check_in_flight(*programs):
    """Programs are dispatched in turns, and nothing waits until the end of a window."""
    for window in range(WINDOWS):
        seeds = 1000 * window + np.arange(IN_FLIGHT // len(programs))
        for errors in [program(seed) for seed in seeds for program in programs]:
            assert_right(errors)


def test_one_program_in_flight_many_times():
    check_in_flight(on_all_ranks(three))


def test_two_programs_in_flight():
    check_in_flight(
        on_all_ranks(three), on_all_ranks(lambda seed: exchange(seed) + exchange(seed + 1))
    )


def test_a_long_and_a_short_program_in_flight():
    check_in_flight(on_all_ranks(exchange), on_all_ranks(fori(three, 10)))


@pytest.mark.skipif(
    "jax.process_count() > 1", reason="all processes must launch programs in the same order"
)
def test_programs_from_several_threads():
    fns = [on_all_ranks(three), on_all_ranks(fori(exchange, 20)), on_all_ranks(exchange)]
    for fn in fns:
        assert_right(fn(0))
    failures = []

    def work(fn, first):
        try:
            for i in range(50):
                assert_right(fn(first + 100 * i))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(fn, 7 * i)) for i, fn in enumerate(fns)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_programs_on_different_meshes_in_flight():
    """Two programs on half of the devices each, and one across both halves."""

    def on(order):
        def body(x, ids):
            out = fio.dispatch(x, ids, num_experts=8, axis_name="expert")
            return fio.combine(out.tokens, out.handle)

        mesh = make_mesh(len(order), order=order)
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))

    rng = np.random.default_rng(0)
    programs = [on([0, 1, 2, 3]), on([7, 6, 5, 4]), on([4, 2, 0, 6])]
    ids = rng.integers(-1, 8, (16, 2)).astype(np.int32)
    count = (ids >= 0).sum(axis=1)[:, None]
    x = np.arange(16, dtype=np.float32)[:, None]
    for window in range(WINDOWS):
        shifts = window + np.arange(IN_FLIGHT // len(programs))
        results = [(i, program(x + i, ids)) for i in shifts for program in programs]
        for i, z in results:
            np.testing.assert_array_equal(z, count * (x + i))


# --- A rank that does not come -------------------------------------------------------------------


@pytest.fixture
def short_timeout():
    before = fio.config()
    yield fio.config(timeout=2)["timeout"]
    fio.config(**before)


@pytest.mark.parametrize("absent", [0, 3])
def test_a_rank_that_does_not_come_is_named(absent, short_timeout):
    def fn(seed):
        here = lax.axis_index("expert") != absent
        return lax.cond(here, exchange, lambda _: zero(), seed)

    program = on_all_ranks(fn)
    start = time.monotonic()
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(program(1))
    assert time.monotonic() - start < short_timeout + 20
    message = str(caught.value)
    assert "dispatch" in message and "timeout" in message.lower().replace("timed out", "timeout")
    named = message.split("rank", 1)[1]
    assert f" {absent} " in f" {named.replace(',', ' ').replace('.', ' ').replace(':', ' ')} "


def test_exchanges_go_on_after_an_error(short_timeout):
    def fn(seed):
        return lax.cond(lax.axis_index("expert") != 5, exchange, lambda _: zero(), seed)

    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(on_all_ranks(fn)(1))
    good = on_all_ranks(three)
    for seed in range(3):
        assert_right(good(seed))


def test_a_late_rank_within_the_timeout_is_waited_for(short_timeout):
    def fn(seed):
        def sleep(seed):
            time.sleep(short_timeout / 4)
            return seed

        late = lax.axis_index("expert") == 2
        seed = lax.cond(
            late,
            lambda s: jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.int32), s),
            lambda s: s,
            seed,
        )
        return exchange(seed)

    assert_right(on_all_ranks(fn, check_vma=False)(1))
