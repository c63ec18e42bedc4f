"""Random mixes of exchanges in one program, against what NumPy makes of the same steps.

Started exchanges are in flight while synchronous ones, matrix products and sums over the ranks run.
All numbers are small integers times powers of two, so nothing is rounded, and results and gradients
must be equal bit by bit.

NumPy needs no exchange. An expert multiplies its rows with 1 or -1, so a token's sum of K rows is
the token times one number. A reference of the same exchanges in XLA's operations would take XLA
minutes to compile for each program.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import freeio_jax as fio
from freeio_jax.bench import timing
from freeio_jax.bench.cases import Shape, expert_mesh, uniform_routing
from freeio_jax.bench.programs import per_shard, put
from freeio_jax.bench.report import Report
from freeio_jax.varying import vary

#: Exchanges of small calls and of large ones, as (tokens of a rank, width).
SIZES = ((48, 256), (700, 512))

#: What may run while exchanges are in flight.
WORK = ("exchange", "product", "sum")

MOST_IN_FLIGHT = 4
PROGRAMS = 6  # of each size
INPUTS = 4  # of each program

#: The products' speed does not count here, and XLA would time many implementations of each.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0"}


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


# --- On the devices ------------------------------------------------------------------------------


def _bounded(x):
    """Between -8 and 8, so that numbers stay small; for JAX and for NumPy."""
    numpy = jnp if isinstance(x, jax.Array) else np
    return numpy.where(_is_free(x), x, 8 * numpy.sign(x))


def _is_free(x):
    """Whether :func:`_bounded` leaves a number as it is: its derivative is 1 there, else 0."""
    return abs(x) <= 8


def _matrix(numpy, width: int):
    """As dense as any other for a GPU, but with sums that stay small."""
    return numpy.eye(width, k=1, dtype=np.float32) - numpy.eye(width, k=-3, dtype=np.float32)


def _sign_of_expert(expert):
    return 1 - 2 * (expert % 2)


def _scale(item: int) -> int:
    """What the tokens of an exchange are multiplied with before it."""
    return item % 3 - 1


def _apply_experts(out: fio.Dispatched, shape: Shape) -> jax.Array:
    """The packed rows, each times the sign of its expert."""
    per_rank = shape.num_experts // shape.num_ranks
    expert = lax.axis_index("expert") * per_rank + out.expert_of_row()
    return out.tokens * _sign_of_expert(expert)[:, None].astype(out.tokens.dtype)


def run_steps(steps, shape: Shape, tokens, topk_idx, weights) -> list[jax.Array]:
    """One rank's program; the sums of all exchanges, and what the work has computed."""
    options: dict[str, Any] = {"num_experts": shape.num_experts, "axis_name": "expert"}

    def exchange(x):
        out = fio.dispatch(x, topk_idx, **options)
        return _bounded(fio.combine(_apply_experts(out, shape), out.handle, weights))

    def product(x):
        return _bounded(jnp.matmul(x, _matrix(jnp, shape.hidden), precision="highest"))

    def add_ranks(x):
        # Each rank goes on with its own sum, so the gradient is a sum over the ranks, too.
        return _bounded(vary(lax.psum(x, "expert"), ("expert",)))

    work = dict(zip(WORK, (exchange, product, add_ranks), strict=True))
    beside, results = tokens, []
    pendings: dict[int, Any] = {}
    rows: dict[int, Any] = {}
    for what, item in steps:
        num_sms = (None, 8, 16)[item % 3]
        if what == "dispatch":
            ids = jnp.roll(topk_idx, item, axis=0)
            pendings[item] = fio.dispatch_start(
                tokens * _scale(item), ids, num_sms=num_sms, **options
            )
        elif what == "combine":
            out = rows[item]
            pendings[item] = fio.combine_start(
                _apply_experts(out, shape), out.handle, weights, num_sms=num_sms
            )
        elif what == "done":
            done = pendings.pop(item).done()
            if item in rows:
                results.append(done)
            else:
                rows[item] = done
        else:
            beside, _ = fio.between(list(pendings.values()), work[what], beside)
    return [*results, beside]


def _count_wrong(steps, shape: Shape) -> Callable:
    """(tokens, topk_idx, weights, what is right) -> how many numbers differ on all ranks; jitted.

    The numbers are those of the results, and of both gradients for the results' signs.
    """

    def count(tokens, topk_idx, weights, expected):
        def run(tokens, weights):
            return run_steps(steps, shape, tokens, topk_idx, weights)

        results, pull = jax.vjp(run, tokens, weights)
        found = results, pull([jnp.sign(result) for result in results])
        apart = jax.tree.map(lambda a, b: jnp.sum(~(a == b)), found, expected)  # NaN differs, too
        return lax.psum(sum(jax.tree.leaves(apart)), "expert")

    return per_shard(count, expert_mesh(shape.num_ranks))


# --- In NumPy ------------------------------------------------------------------------------------


def right(steps, shape: Shape, tokens, topk_idx, weights):
    """The results and gradients of :func:`run_steps` for all ranks, float32 ``[R, T, ...]``."""
    tokens, weights = tokens.astype(np.float64), weights.astype(np.float64)
    matrix = _matrix(np, shape.hidden).astype(np.float64)
    by_tokens, by_weights = np.zeros_like(tokens), np.zeros_like(weights)

    def exchange(x, ids):
        return x * np.sum(weights * _sign_of_expert(ids), axis=-1, keepdims=True)

    def pull_exchange(x, ids, cotangent):
        """The gradient of x; adds to that of the weights."""
        nonlocal by_weights
        dots = np.sum(cotangent * x, axis=-1, keepdims=True)
        by_weights = by_weights + _sign_of_expert(ids) * dots
        return exchange(cotangent, ids)

    results = []
    in_turn = [what for what, _ in steps if what in WORK]
    combined, waited_for = set(), []
    for what, item in steps:
        if what == "combine":
            combined.add(item)
        elif what == "done" and item in combined:
            waited_for.append(item)
    for item in waited_for:
        x, ids = tokens * _scale(item), np.roll(topk_idx, item, axis=1)
        results.append(exchange(x, ids))
        by_tokens += _scale(item) * pull_exchange(x, ids, np.sign(results[-1]))

    inputs, x = [], tokens
    for what in in_turn:
        if what == "exchange":
            y = exchange(x, topk_idx)
        elif what == "product":
            y = x @ matrix
        else:
            y = np.broadcast_to(np.sum(x, axis=0), x.shape)
        inputs.append((x, y))
        x = _bounded(y)
    results.append(x)
    cotangent = np.sign(x)
    for what, (x, y) in reversed(list(zip(in_turn, inputs, strict=True))):
        cotangent = cotangent * _is_free(y)
        if what == "exchange":
            cotangent = pull_exchange(x, topk_idx, cotangent)
        elif what == "product":
            cotangent = cotangent @ matrix.T
        else:
            cotangent = np.broadcast_to(np.sum(cotangent, axis=0), x.shape)
    found = results, (by_tokens + cotangent, by_weights)
    return jax.tree.map(lambda array: array.astype(np.float32), found)


# --- The test ------------------------------------------------------------------------------------


def _input(shape: Shape, seed: int):
    rng = np.random.default_rng(seed)
    lead = (shape.num_ranks, shape.num_tokens)
    topk_idx = uniform_routing(shape, seed).reshape(*lead, shape.top_k)
    tokens = rng.integers(-2, 3, (*lead, shape.hidden)).astype(np.float32)
    weights = np.exp2(rng.integers(-1, 2, topk_idx.shape)).astype(np.float32)
    return tokens, topk_idx, weights


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled program with an input and what is right; call it for the number of differences."""

    program: Callable
    args: tuple
    name: str

    def __call__(self) -> jax.Array:
        return self.program(*self.args)


def cases(
    num_ranks: int, sizes: Sequence = SIZES, programs: int = PROGRAMS, inputs: int = INPUTS
) -> list[Case]:
    """All programs with all of their inputs. The programs are compiled side by side."""
    mesh, found, lowered = expert_mesh(num_ranks), [], []
    for num_tokens, hidden in sizes:
        shape = Shape(num_ranks, num_tokens, hidden, 4, 8 * num_ranks)
        all_inputs = [_input(shape, seed) for seed in range(inputs)]
        for seed in range(programs):
            steps = draw_steps(seed)
            for number, args in enumerate(all_inputs):
                args = put(mesh, (*args, right(steps, shape, *args)))
                if not number:
                    lowered.append(_count_wrong(steps, shape).lower(*args))
                name = f"program {seed} of {shape} with input {number}"
                found.append((len(lowered) - 1, args, name))
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda low: low.compile(_COMPILER_OPTIONS), lowered))
    return [Case(compiled[index], args, name) for index, args, name in found]


def run(report: Report, rounds: int, *, num_ranks: int, **how) -> None:
    """Runs ``rounds`` programs in random order. Many wait in the devices' queues at a time."""
    report.table("Mixes of exchanges in flight", {"rounds": "rounds", "wrong": "wrong"})
    between_looks, between_notes = timing.MOST_RUNS, 200

    def measure():
        begin = time.perf_counter()
        everything = cases(num_ranks, **how)
        print(f"# programs ready after {time.perf_counter() - begin:.0f} s", flush=True)
        order = np.random.default_rng(0).integers(len(everything), size=rounds)
        for first in range(0, rounds, between_looks):
            chosen = [everything[i] for i in order[first : first + between_looks]]
            wrong = [case() for case in chosen]
            for case, count in zip(chosen, wrong, strict=True):
                number = int(count.addressable_data(0)[0])
                if number:
                    raise AssertionError(f"{case.name} has {number} wrong numbers")
            done = first + len(chosen)
            if done % between_notes == 0:
                print(f"# {done} mixes, {time.perf_counter() - begin:.0f} s", flush=True)
        return {"wrong": "nothing"}

    report.guarded("mix", {"rounds": rounds}, measure)
