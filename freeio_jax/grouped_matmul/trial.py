"""The trial that an implementation must pass on this GPU before it serves.

Small problems of small numbers proved nothing: a library passed such a trial whose weights'
gradients were off by a third wherever a group filled more than two of its tiles. So the problems
here have normal numbers, groups of many tiles, uneven, unaligned and empty ones, one group with all
rows, no rows at all, NaN in rows that are left over and in the weights of groups without rows, and
the row counts of real layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from freeio_jax.grouped_matmul.product import Product
from freeio_jax.grouped_matmul.tiled import tiled

#: An entry may be off by this much of the largest entry of its row (weights: of its group).
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows, widths, and several ways to cut the rows into groups; what takes no part is NaN."""

    num_rows: int
    k: int
    n: int
    sizes: tuple[tuple[int, ...], ...]

    def __str__(self):
        return f"{self.num_rows} x {self.k} x {self.n}"


def _uneven(seed: int, num_rows: int, num_groups: int, power: float) -> tuple[int, ...]:
    """Rows of random routing: the n-th group is drawn with weight ``(1 + n) ** -power``."""
    weights = (1.0 + np.arange(num_groups)) ** -power
    rng = np.random.default_rng(seed)
    rng.shuffle(weights)
    return tuple(map(int, rng.multinomial(num_rows, weights / weights.sum())))


PROBLEMS = (
    Problem(1000, 768, 1280, (_uneven(0, 1000, 24, 1.0), (0,) * 24)),
    Problem(
        4224,
        512,
        768,
        (
            (505, 483, 521, 551, 500, 516, 511, 525),
            (512, 896, 256, 768, 384, 384, 640, 256),
            (0, 4224, 0, 0, 0, 0, 0, 0),
            (1, 0, 63, 65, 2049, 0, 7, 1000),
        ),
    ),
    Problem(16384, 2048, 1024, (_uneven(1, 16300, 32, 0.0), _uneven(2, 16384, 32, 1.0))),
)

#: (problem, sizes): each is one computation that must be right.
CASES = tuple((problem, sizes) for problem in PROBLEMS for sizes in problem.sizes)


def wrong(product: Product, dtype, by: str) -> str | None:
    """What is wrong with the product of the implementation ``by`` on the default device.

    None: nothing. An error of any kind, also of the compiler, is a reason not to use it.
    """
    try:
        return _in_a_thread(_worst, product, dtype, by)
    except Exception as error:  # others can serve; info shows it
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def share_of_dense(product: Product, dtype, by: str) -> float:
    """How fast it is: time of one dense product of the same size over its own.

    NaN where it could not be measured, for want of memory, say.
    """
    try:
        return _in_a_thread(_share_of_dense, product, dtype, by)
    except jax.errors.JaxRuntimeError:
        return math.nan


def _in_a_thread(function, *args):
    """What asks is being traced or lowered; its settings, which a thread has, are not ours."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_with_own_settings, function, *args).result()


def _with_own_settings(function, *args):
    with contextlib.ExitStack() as settings:
        for setting in (
            jax.disable_jit(False),
            jax.enable_x64(False),
            jax.debug_nans(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            settings.enter_context(setting)
        return function(*args)


def draw_operands(product, problem, dtype, sizes, seed):
    """The product's operands: normal numbers, and NaN in what must not reach a result.

    That is rows past the last group, and weights of groups without rows. An implementation that
    multiplies them by zero, instead of leaving them out, gives NaN.
    """
    groups = len(problem.sizes[0])
    shapes = {
        "a": (problem.num_rows, problem.k),
        "b": (problem.num_rows, problem.n),
        "w": (groups, problem.k, problem.n),
    }
    operands = []
    for name in product.operands:
        key = jax.random.fold_in(jax.random.key(seed), ord(name))
        values = jax.random.normal(key, shapes[name], dtype)
        if name == "w":
            takes_part = (sizes > 0)[:, None, None]
        else:
            takes_part = (jnp.arange(problem.num_rows) < jnp.sum(sizes))[:, None]
        operands.append(jnp.where(takes_part, values, jnp.nan))
    return operands


def per_shard(function):
    """``function`` compiled in a shard_map of one device, as layers call it."""
    mesh = jax.make_mesh((1,), ("trial",), (AxisType.Auto,), devices=jax.local_devices()[:1])
    spec = PartitionSpec("trial")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


def evaluate(product: Product, by: str):
    """``(left, right, group_sizes)``: the product by this implementation, as layers call it."""
    from freeio_jax.grouped_matmul.primitive import bind

    return per_shard(lambda *args: bind(product, *args, by=by))


@functools.partial(jax.jit, static_argnums=0)
def error(product: Product, result, left, right, group_sizes) -> jax.Array:
    """The largest error of a row (weights: of a group) over its largest entry, against float32.

    Rows of the operands past the last group, and weights of groups without rows, may be anything.
    NaN where the result has one.
    """
    left, right = (jnp.nan_to_num(a.astype(jnp.float32)) for a in (left, right))
    expected = tiled(product, left, right, group_sizes, tile_rows=512)
    axes = tuple(range(1, expected.ndim))
    off = jnp.max(jnp.abs(result.astype(jnp.float32) - expected), axes)
    scale = jnp.max(jnp.abs(expected), axes)
    return jnp.max(jnp.where(off == 0, 0, off / scale), initial=0)


def _worst(product, dtype, by):
    """The first problem with a result that is off by more than TOLERANCE, in words."""
    programs, tried = _compile(product, dtype, by), 0
    for seed, (problem, sizes) in enumerate(CASES):
        try:
            program = programs[problem].result()
            off = float(program(seed, np.array(sizes, np.int32)))
        except jax.errors.JaxRuntimeError as full:
            # The program that asks may have taken the memory. The smaller problems say enough.
            if "RESOURCE_EXHAUSTED" not in str(full):
                raise
            continue
        tried += 1
        if not off <= TOLERANCE:
            return f"wrong in a trial: off by {off:.2g} of the largest entry, {problem}, {sizes}"
    return None if tried else "no memory is left for a trial"


def _compile(product, dtype, by):
    """For each problem ``(seed, sizes) -> error`` of the product on operands that it draws.

    They are futures: XLA takes seconds for each of these programs, and compiles them together.
    """
    multiply = evaluate(product, by)

    def compiled(problem):
        def largest_error(seed, sizes):
            operands = draw_operands(product, problem, dtype, sizes, seed)
            # Both sides take the same rounded numbers: nothing is fused across a barrier.
            operands = lax.optimization_barrier(operands)
            result = lax.optimization_barrier(multiply(*operands, sizes))
            return error(product, result, *operands, sizes)

        sizes = jax.ShapeDtypeStruct((len(problem.sizes[0]),), np.int32)
        seed = jax.ShapeDtypeStruct((), np.int32)
        return jax.jit(largest_error).lower(seed, sizes).compile()

    with ThreadPoolExecutor(len(PROBLEMS)) as executor:
        return {p: executor.submit(_with_own_settings, compiled, p) for p in PROBLEMS}


def _share_of_dense(product, dtype, by):
    problem = PROBLEMS[-1]
    sizes = jnp.asarray(problem.sizes[0], jnp.int32)
    operands = jax.jit(draw_operands, static_argnums=(0, 1, 2))(product, problem, dtype, sizes, 0)
    widths = dict(zip("kn", product.widths(*operands), strict=True))
    wide, narrow = (jnp.ones((problem.num_rows, widths[w]), dtype) for w in "kn")
    grouped, dense = evaluate(product, by), jax.jit(lambda a, b: a.T @ b)

    def seconds(function, *args):
        jax.block_until_ready(function(*args))
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            jax.block_until_ready(function(*args))
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(dense, wide, narrow) / seconds(grouped, *operands, sizes)
