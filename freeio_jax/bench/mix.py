"""Random mixes of exchanges in one program, against ``freeio_jax.reference``.

Started exchanges are in flight while synchronous ones, matrix products and sums over the ranks run.
The reference makes the same steps one after the other. All numbers are small integers times powers
of two, so nothing is rounded, and results and gradients must be equal bit by bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import freeio_jax as fio
from freeio_jax import reference
from freeio_jax.bench.cases import Shape, expert_mesh, uniform_routing
from freeio_jax.bench.programs import per_shard, put
from freeio_jax.bench.report import Report

#: Exchanges of small calls and of large ones, as (tokens of a rank, width).
SIZES = ((48, 256), (700, 512))

#: What may run while exchanges are in flight.
WORK = ("exchange", "product", "sum")

MOST_IN_FLIGHT = 4
PROGRAMS = 6  # of each size
INPUTS = 4  # of each program


class Started:
    """What a mix calls: exchanges that run beside compute, and synchronous ones."""

    dispatch, combine = staticmethod(fio.dispatch), staticmethod(fio.combine)
    dispatch_start = staticmethod(fio.dispatch_start)
    combine_start = staticmethod(fio.combine_start)
    between = staticmethod(fio.between)

    @staticmethod
    def done(pending):
        return pending.done()


class Reference:
    """The same by ``freeio_jax.reference``: a start runs to its end."""

    dispatch, combine = staticmethod(reference.dispatch), staticmethod(reference.combine)

    @staticmethod
    def dispatch_start(*args, num_sms, **options):
        return reference.dispatch(*args, **options)

    @staticmethod
    def combine_start(*args, num_sms):
        return reference.combine(*args)

    @staticmethod
    def between(pendings, fn, *args):
        return fn(*args), pendings

    @staticmethod
    def done(pending):
        return pending


def draw_steps(seed: int, length: int = 12) -> tuple[tuple[str, int], ...]:
    """The steps of a program: ("dispatch", i), ("combine", i) and ("done", i), and some of WORK.

    Each exchange i is dispatched and waited for. Then its rows are combined, and waited for.
    """
    rng = np.random.default_rng(seed)
    in_flight: list[int] = []
    dispatched: list[int] = []  # and done
    combining: set[int] = set()
    steps = []

    def done():
        item = in_flight.pop(rng.integers(len(in_flight)))
        steps.append(("done", item))
        if item not in combining:
            dispatched.append(item)

    def combine():
        item = dispatched.pop(rng.integers(len(dispatched)))
        combining.add(item)
        in_flight.append(item)
        steps.append(("combine", item))

    number = 0
    while len(steps) < length:
        what = rng.integers(4)
        if what == 0 and len(in_flight) < MOST_IN_FLIGHT:
            steps.append(("dispatch", number))
            in_flight.append(number)
            number += 1
        elif what == 1 and dispatched and len(in_flight) < MOST_IN_FLIGHT:
            combine()
        elif what == 2 and in_flight:
            done()
        elif what == 3:
            steps.append((WORK[rng.integers(len(WORK))], 0))
    while in_flight or dispatched:
        if in_flight:
            done()
        else:
            combine()
    return tuple(steps)


def run_steps(api, steps, shape: Shape, tokens, topk_idx, weights) -> list[jax.Array]:
    """One rank's program; the sums of all exchanges, and what the work has computed."""
    options: dict[str, Any] = {"num_experts": shape.num_experts, "axis_name": "expert"}

    def bounded(x):
        return jnp.clip(x, -8, 8)

    def exchange(x):
        out = api.dispatch(x, topk_idx, **options)
        return bounded(api.combine(out.tokens, out.handle, weights))

    def product(x):
        # As dense as any other, but its sums stay small.
        matrix = jnp.eye(shape.hidden, k=1) - jnp.eye(shape.hidden, k=-3)
        return bounded(jnp.matmul(x, matrix, precision="highest"))

    def add_ranks(x):
        return bounded(lax.psum(x, "expert"))

    work = dict(zip(WORK, (exchange, product, add_ranks), strict=True))
    beside, results = tokens, []
    pendings: dict[int, Any] = {}
    rows: dict[int, Any] = {}
    for what, item in steps:
        num_sms = (None, 8, 16)[item % 3]
        if what == "dispatch":
            ids = jnp.roll(topk_idx, item, axis=0)
            pendings[item] = api.dispatch_start(
                tokens * (item % 3 - 1), ids, num_sms=num_sms, **options
            )
        elif what == "combine":
            out = rows[item]
            pendings[item] = api.combine_start(out.tokens * 2, out.handle, weights, num_sms=num_sms)
        elif what == "done":
            done = api.done(pendings.pop(item))
            if item in rows:
                results.append(done)
            else:
                rows[item] = done
        else:
            beside, _ = api.between(list(pendings.values()), work[what], beside)
    return [*results, beside]


@functools.cache
def _program(api, seed: int, shape: Shape):
    """(tokens, topk_idx, weights) -> results and gradients, of all ranks; compiled."""
    steps = draw_steps(seed)

    def everything(tokens, topk_idx, weights):
        def run(tokens, weights):
            return run_steps(api, steps, shape, tokens, topk_idx, weights)

        results, pull = jax.vjp(run, tokens, weights)
        return results, pull([jnp.sign(result) for result in results])

    return per_shard(everything, expert_mesh(shape.num_ranks))


@jax.jit
def _count_differing(ours, right):
    apart = jax.tree.map(lambda a, b: jnp.sum(~(a == b)), ours, right)  # NaN differs from all
    return sum(jax.tree.leaves(apart))


def _input(shape: Shape, seed: int):
    rng = np.random.default_rng(seed)
    lead = (shape.num_ranks, shape.num_tokens)
    topk_idx = uniform_routing(shape, seed).reshape(*lead, shape.top_k)
    tokens = rng.integers(-2, 3, (*lead, shape.hidden)).astype(np.float32)
    weights = np.exp2(rng.integers(-1, 2, topk_idx.shape)).astype(np.float32)
    return put(expert_mesh(shape.num_ranks), (tokens, topk_idx, weights))


@dataclasses.dataclass(frozen=True)
class Case:
    """A program with an input, and what is right."""

    program: Any
    args: Any
    expected: Any
    name: str


def cases(api, num_ranks: int, sizes=SIZES, programs=PROGRAMS, inputs=INPUTS) -> list[Case]:
    """All programs with all of their inputs."""
    found = []
    for num_tokens, hidden in sizes:
        shape = Shape(num_ranks, num_tokens, hidden, 4, 8 * num_ranks)
        all_args = [_input(shape, seed) for seed in range(inputs)]
        for seed in range(programs):
            right = _program(Reference, seed, shape)
            for number, args in enumerate(all_args):
                name = f"program {seed} of {shape} with input {number}"
                found.append(Case(_program(api, seed, shape), args, right(*args), name))
    return found


def run(report: Report, rounds: int, *, num_ranks: int, api=Started, **how) -> None:
    """Runs ``rounds`` programs in random order. Many wait in the devices' queues at a time."""
    report.table("Mixes of exchanges in flight", {"rounds": "rounds", "wrong": "wrong"})
    between_looks = 50

    def measure():
        everything = cases(api, num_ranks, **how)
        order = np.random.default_rng(0).integers(len(everything), size=rounds)
        for first in range(0, rounds, between_looks):
            chosen = [everything[i] for i in order[first : first + between_looks]]
            differing = [
                _count_differing(case.program(*case.args), case.expected) for case in chosen
            ]
            for case, count in zip(chosen, differing, strict=True):
                if int(count):
                    raise AssertionError(f"{case.name} differs from the reference in {int(count)}")
            if first // 1000 != (first + between_looks) // 1000:
                print(f"# {first + between_looks} mixes", flush=True)
        return {"wrong": "nothing"}

    report.guarded("mix", {"rounds": rounds}, measure)
    _program.cache_clear()
