"""grouped_matmul: the experts' matrix product, by the fastest implementation at hand.

Which one that is depends on the platform that the computation is compiled for, and is decided once
in a process: :func:`implementation` says which and why, ``python -m freeio_jax.info`` prints it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from freeio_jax.arguments import accumulator_dtype
from freeio_jax.varying import vary, varying_axes


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to multiply groups of rows. The rows past the last group are zero in every result.

    Attributes:
      name: what :mod:`freeio_jax.info` shows.
      reason: why it was chosen, in words a user can act on.
      multiply: ``(rows [M, K], weights [G, K, N], group_sizes) -> [M, N]``, and with
        ``transposed=True`` ``(rows [M, N], weights [G, K, N], group_sizes) -> [M, K]``.
      outer: ``(rows [M, K], cotangents [M, N], group_sizes) -> [G, K, N]``: each group's
        ``rows.T @ cotangents``.
    """

    name: str
    reason: str
    multiply: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows with its own matrix.

    Args:
      rows: ``[M, K]``, floating: group 0's rows first, then group 1's, ... Rows past
        ``sum(group_sizes)`` are not looked at.
      weights: ``[G, K, N]``, floating.
      group_sizes: int32 ``[G]``, at most M in sum.

    Returns:
      ``[M, N]`` in the common dtype of ``rows`` and ``weights``; rows past ``sum(group_sizes)`` are
      zero. Sums are made in float32 (float64 for float64) and rounded once.

    Raises:
      TypeError, ValueError: an argument's dtype or shape.

    Differentiable in ``rows`` and ``weights`` by reverse mode, any number of times; the gradient of
    rows past the end is zero. Forward mode (``jax.jvp``) raises a TypeError.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.grouped_matmul import grouped_matmul
    >>> rows = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    >>> weights = jnp.array([[[1.0], [0.0]], [[0.0], [10.0]]])
    >>> grouped_matmul(rows, weights, jnp.array([1, 2])).tolist()
    [[1.0], [40.0], [60.0], [0.0]]
    """
    rows, weights, group_sizes = map(jnp.asarray, (rows, weights, group_sizes))
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"grouped_matmul: rows {rows.shape} and weights {weights.shape} must be [M, K] and "
            "[G, K, N]."
        )
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(
            f"grouped_matmul: group_sizes has shape {group_sizes.shape}, but weights "
            f"{weights.shape} has {weights.shape[0]} groups: pass one size for each."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"grouped_matmul: group_sizes must be int32, got {group_sizes.dtype}.")
    dtype = jnp.result_type(rows, weights)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"grouped_matmul: rows and weights must be floating, got {rows.dtype} and "
            f"{weights.dtype}."
        )
    axes = varying_axes(rows, weights, group_sizes)
    rows, weights = rows.astype(dtype), weights.astype(dtype)
    group_sizes = group_sizes.astype(jnp.int32)
    return _multiply(False, *(vary(a, axes) for a in (rows, weights, group_sizes)))


# --- Derivatives: multiply and outer are each other's ------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(transposed, rows, weights, group_sizes):
    return _by_platform(
        lambda chosen: functools.partial(chosen.multiply, transposed=transposed),
        rows,
        weights,
        group_sizes,
    )


def _multiply_backward(transposed, residuals, cotangents):
    rows, weights, group_sizes = residuals
    pair = (cotangents, rows) if transposed else (rows, cotangents)
    return (
        _multiply(not transposed, cotangents, weights, group_sizes),
        _outer(*pair, group_sizes),
        None,
    )


@jax.custom_vjp
def _outer(rows, cotangents, group_sizes):
    return _by_platform(lambda chosen: chosen.outer, rows, cotangents, group_sizes)


def _outer_backward(residuals, weights):
    rows, cotangents, group_sizes = residuals
    return (
        _multiply(True, cotangents, weights, group_sizes),
        _multiply(False, rows, weights, group_sizes),
        None,
    )


_multiply.defvjp(lambda transposed, *args: (_multiply(transposed, *args), args), _multiply_backward)
_outer.defvjp(lambda *args: (_outer(*args), args), _outer_backward)


def _by_platform(function, *args):
    """Runs ``function(implementation)`` of the platform that the computation is compiled for."""
    axes = varying_axes(*args)

    def on(platform):
        multiply = function(implementation(platform))
        # A library's product may not say what its operands vary over; all branches must agree.
        return lambda *args: vary(multiply(*args), axes)

    by_platform = {"cpu": on("cpu")}
    if jax.default_backend() == "gpu":
        by_platform["cuda"] = by_platform["rocm"] = on("gpu")
    return lax.platform_dependent(*args, **by_platform, default=on("default"))


# --- CPU: a loop over tiles of one group's rows ------------------------------------------------
#
# XLA lowers lax.ragged_dot on CPU to one dense product for each group, over all rows: float32,
# 4096 x 256 rows of which a quarter are filled, 8 groups, N = 512, take 158 ms forward and 550 with
# gradients on 2 cores (jax 0.10.2); this loop takes 7 and 22.

_TILE_ROWS = 64


def _for_each_tile(body, out, group_sizes, num_rows):
    """``out = body(group, start, mask, out)`` for each tile of at most _TILE_ROWS rows.

    A tile is ``rows[start:start + size]``, ``size = min(_TILE_ROWS, num_rows)``; ``mask``
    ``[size, 1]`` is true where the row is of this group and of no other tile of it.
    """
    size = min(_TILE_ROWS, num_rows)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    num_tiles = (group_sizes + size - 1) // size
    last_tile = jnp.cumsum(num_tiles)

    def step(tile, out):
        group = jnp.searchsorted(last_tile, tile, side="right")
        first = starts[group] + (tile - last_tile[group] + num_tiles[group]) * size
        start = jnp.minimum(first, num_rows - size)
        row = start + jnp.arange(size, dtype=jnp.int32)
        return body(group, start, ((row >= first) & (row < ends[group]))[:, None], out)

    return lax.fori_loop(jnp.zeros((), jnp.int32), last_tile[-1], step, out)


def _tiled_multiply(rows, weights, group_sizes, *, transposed):
    num_rows, width = rows.shape[0], weights.shape[1 if transposed else 2]
    out = vary(jnp.zeros((num_rows, width), rows.dtype), varying_axes(rows))
    if not out.size or not weights.size:
        return out

    def body(group, start, mask, out):
        tile = lax.dynamic_slice_in_dim(rows, start, mask.shape[0])
        product = lax.dot_general(
            tile,
            weights[group],
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=accumulator_dtype(rows.dtype),
        )
        before = lax.dynamic_slice_in_dim(out, start, mask.shape[0])
        tile = jnp.where(mask, product.astype(out.dtype), before)
        return lax.dynamic_update_slice_in_dim(out, tile, start, 0)

    return _for_each_tile(body, out, group_sizes, num_rows)


def _tiled_outer(rows, cotangents, group_sizes):
    shape = (group_sizes.shape[0], rows.shape[1], cotangents.shape[1])
    acc_dtype = accumulator_dtype(rows.dtype)
    out = vary(jnp.zeros(shape, acc_dtype), varying_axes(rows))
    if not out.size or not rows.shape[0]:
        return out.astype(rows.dtype)

    def body(group, start, mask, out):
        left, right = (
            jnp.where(mask, lax.dynamic_slice_in_dim(a, start, mask.shape[0]), 0)
            for a in (rows, cotangents)
        )
        product = lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=acc_dtype
        )
        return out.at[group].add(product)

    return _for_each_tile(body, out, group_sizes, rows.shape[0]).astype(rows.dtype)


# --- Other platforms: ragged_dot_general of jax.lax or of tokamax -------------------------------

_MULTIPLY = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_MULTIPLY_TRANSPOSED = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_OUTER = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def _masked(rows, group_sizes):
    """``rows`` with zeros past the last group: ragged dots may leave or read garbage there."""
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where((row < jnp.sum(group_sizes))[:, None], rows, jnp.zeros((), rows.dtype))


def _ragged_implementation(name, reason, ragged_dot_general):
    def multiply(rows, weights, group_sizes, *, transposed):
        numbers = _MULTIPLY_TRANSPOSED if transposed else _MULTIPLY
        out = ragged_dot_general(
            rows, weights, group_sizes, numbers, preferred_element_type=rows.dtype
        )
        return _masked(out, group_sizes)

    def outer(rows, cotangents, group_sizes):
        return ragged_dot_general(
            _masked(rows, group_sizes),
            _masked(cotangents, group_sizes),
            group_sizes,
            _OUTER,
            preferred_element_type=rows.dtype,
        )

    return Implementation(name, reason, multiply, outer)


# --- The choice ----------------------------------------------------------------------------------


@functools.cache
def implementation(platform: str) -> Implementation:
    """The implementation for ``"cpu"``, ``"gpu"`` or any other platform, chosen once."""
    if platform == "cpu":
        return Implementation(
            "tiled loop of freeio_jax",
            "lax.ragged_dot multiplies all rows with every group's matrix on CPU",
            _tiled_multiply,
            _tiled_outer,
        )
    if platform != "gpu":
        return _ragged_implementation(
            "jax.lax.ragged_dot", "the only one for this platform", lax.ragged_dot_general
        )
    try:
        import tokamax
    except ImportError as error:
        why = (
            f"tokamax cannot be imported ({error}); it is much faster on a GPU: "
            "pip install tokamax (Python 3.12 or later)"
        )
        return _ragged_implementation("jax.lax.ragged_dot", why, lax.ragged_dot_general)
    try:
        chosen = _ragged_implementation(
            f"tokamax {importlib.metadata.version('tokamax')}",
            "installed, and right in a trial on this GPU",
            functools.partial(_tokamax_ragged_dot_general, tokamax),
        )
        # A thread of its own: the trial must not be traced into the program that asks.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(_try_out, chosen).result()
    except Exception as error:  # whatever it is, lax.ragged_dot serves; info shows it
        why = f"tokamax failed a trial on this GPU ({type(error).__name__}: {error})"
        return _ragged_implementation("jax.lax.ragged_dot", why, lax.ragged_dot_general)
    return chosen


def _tokamax_ragged_dot_general(tokamax, left, right, group_sizes, numbers, **options):
    return tokamax.ragged_dot_general(
        left,
        right,
        group_sizes,
        ragged_dot_dimension_numbers=numbers,
        manual_axis_type=jax.typeof(left).mat,
        **options,
    )


def _try_out(candidate: Implementation) -> None:
    """Raises unless ``candidate`` multiplies a small problem right on the default device."""
    rng = np.random.default_rng(0)
    sizes = np.array([96, 0, 160, 128], np.int32)  # 128 rows are left over
    group = np.repeat(np.arange(4), sizes)
    rows, cotangents = (
        jnp.asarray(rng.integers(-2, 3, (512, width)), jnp.bfloat16) for width in (256, 128)
    )
    weights = jnp.asarray(rng.integers(-2, 3, (4, 256, 128)), jnp.bfloat16)
    r, c, w = (np.asarray(a, np.float32) for a in (rows, cotangents, weights))
    used = len(group)
    expected = (
        np.einsum("mk,mkn->mn", r[:used], w[group]),
        np.einsum("mn,mkn->mk", c[:used], w[group]),
        np.stack([r[:used][group == g].T @ c[:used][group == g] for g in range(4)]),
    )

    def products(rows, cotangents, weights, sizes):
        return (
            candidate.multiply(rows, weights, sizes, transposed=False)[:used],
            candidate.multiply(cotangents, weights, sizes, transposed=True)[:used],
            candidate.outer(rows, cotangents, sizes),
        )

    # In a shard_map, where the layers call it: a kernel may serve outside and fail there.
    mesh = jax.make_mesh((1,), ("trial",), (AxisType.Auto,), devices=jax.local_devices()[:1])
    spec = PartitionSpec("trial")
    sharded = jax.shard_map(products, mesh=mesh, in_specs=spec, out_specs=spec)
    got = jax.jit(sharded)(rows, cotangents, weights, sizes)
    for name, value, right in zip(("multiply", "transposed", "outer"), got, expected, strict=True):
        if not np.allclose(np.asarray(value, np.float32), right, rtol=1e-2, atol=1e-2):
            raise ValueError(f"wrong result of {name}")
