"""dispatch and combine: the two exchanges of an expert-parallel Mixture-of-Experts layer."""

from __future__ import annotations

import jax

from freeio_jax.arguments import combine_arguments, dispatch_arguments
from freeio_jax.define import bind
from freeio_jax.handle import Dispatched, Handle
from freeio_jax.primitives import combine_p, run_dispatch


def dispatch(
    tokens,
    topk_idx: jax.Array,
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...],
    capacity: int | None = None,
    alignment: int = 1,
    zero_tail: bool = True,
) -> Dispatched:
    """Sends each token row to the ranks that host its experts, packed there for a grouped matmul.

    Called per shard, inside ``jax.shard_map``. With R ranks on ``axis_name``, rank r hosts the
    experts ``[r*E/R, (r+1)*E/R)``.

    Args:
      tokens: ``[T, H]``, or a pytree of arrays with the same leading T, of any dtypes of whole
        bytes (fp8 rows with their scales, say). All leaves travel in one exchange.
      topk_idx: int32 ``[T, K]``: global expert ids; -1 means "no expert". Each ``(t, k)`` is one
        assignment and gets one row. Ids outside ``[-1, E)`` are treated as -1 and counted in
        ``handle.num_invalid``.
      num_experts: E, divisible by R.
      axis_name: the mesh axis, or axes, over which the experts are spread.
      capacity: rows of the packed output on each rank. None is the dropless bound
        ``R*T*min(K, E/R)``, rounded up for ``alignment``; it suffices when the ids of a token are
        distinct. What does not fit in a smaller one is dropped, last in packed order first, and
        counted in ``handle.num_dropped``.
      alignment: group sizes are rounded up to a multiple of it, with rows of zeros.
      zero_tail: whether rows past ``sum(group_sizes)`` are zero. False: they are unspecified, NaN
        included, in ``out.tokens`` and in its derivatives. So are those rows in the gradient of
        what is passed to :func:`combine` with this handle. This saves the time to write them. Use
        it where nothing reads such rows. :mod:`freeio_jax.grouped_matmul` does not read them.

    Returns:
      ``out.tokens`` ``[capacity, ...]`` for each leaf: packed expert-major, that is, the rows of
      local expert 0, then 1, ...; within an expert by source rank, then token, then k. Zero past
      the end, unless ``zero_tail`` is False. ``out.group_sizes`` int32 ``[E/R]``, what
      ``jax.lax.ragged_dot`` takes; never more than ``capacity`` in sum. ``out.handle`` for
      :func:`combine`.

    Raises:
      NameError: called outside ``shard_map`` over ``axis_name``.
      TypeError, ValueError: an argument's dtype or shape, with the fix. When it is compiled in a
        program of several hosts, a mesh without devices. When it is compiled on GPUs, more than 16
        ranks, 4096 experts, 32 experts of a token, or 16 leaves.
      RuntimeError: when it is compiled in a program of several processes:
        :func:`freeio_jax.initialize` was not called.
      jax.errors.JaxRuntimeError: when it runs: a rank did not come within the ``timeout`` setting,
        has ended, or makes another call.

    Differentiable in the floating leaves of ``tokens``: the transpose is ``combine`` with unit
    weights along the same handle, so only of dtypes that :func:`combine` takes.

    Two ranks, two experts on each, two tokens a rank, top-1::

        rank 0: tokens [a b], topk_idx [[2], [0]]
        rank 1: tokens [c d], topk_idx [[0], [3]]

        rank 0: out.tokens [b c . .]   out.group_sizes [2, 0]
        rank 1: out.tokens [a d . .]   out.group_sizes [1, 1]

    >>> import jax, jax.numpy as jnp, freeio_jax as fio
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    >>> def swap(tokens, topk_idx):
    ...     out = fio.dispatch(tokens, topk_idx, num_experts=2, axis_name="expert")
    ...     return out.tokens, out.group_sizes
    >>> swap = jax.shard_map(swap, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    >>> rows, sizes = jax.jit(swap)(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1], [0], [-1]]))
    >>> rows.tolist(), sizes.tolist()
    ([[2.0], [1.0], [0.0]], [1, 1])
    """
    leaves, treedef, topk_idx, layout, axes = dispatch_arguments(
        tokens,
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        alignment=alignment,
        zero_tail=zero_tail,
    )
    rows, routes, counts = run_dispatch(topk_idx, *leaves, axes=axes, layout=layout)
    group_sizes, load, dropped, invalid = counts
    handle = Handle(load, dropped, invalid, *routes, layout, axes)
    return Dispatched(jax.tree_util.tree_unflatten(treedef, rows), group_sizes, handle)


def combine(
    expert_out: jax.Array, handle: Handle, topk_weights: jax.Array | None = None
) -> jax.Array:
    """Brings expert outputs back to their tokens: ``z[t] = sum_k w[t,k] * row(t,k)``.

    Args:
      expert_out: ``[capacity, ...]``: one row for each row of ``out.tokens``; width and dtype may
        differ from the tokens'. float64, float32, bfloat16, float16, float8_e5m2 or float8_e4m3fn.
        Rows of padding are not looked at.
      handle: of the dispatch that packed the rows.
      topk_weights: ``[T, K]`` routing weights, floating; None means ones. The weight of an
        assignment that has no row (id -1, out of range, or dropped) is not looked at.

    Returns:
      ``[T, ...]`` in ``expert_out.dtype``. On each rank the token's rows there are summed with
      their weights in float32, in order of k, and rounded once to ``expert_out.dtype``; these
      partial sums are added in float32 in order of rank and rounded once. float64 sums in float64.
      In a group that spans hosts, the partial sums of one host are added and rounded first, and
      then the sums of the hosts. A token without rows gets zeros.

    Raises:
      NameError: called outside ``shard_map`` over the dispatch's ``axis_name``.
      TypeError, ValueError: an argument's dtype or shape, with the fix.
      jax.errors.JaxRuntimeError: when it runs, as in :func:`dispatch`.

    Differentiable in ``expert_out`` and ``topk_weights``. A dropped assignment gets zero gradient.
    """
    expert_out, weights = combine_arguments(expert_out, handle, topk_weights)
    operands = (expert_out,) if weights is None else (expert_out, weights)
    return bind(
        combine_p, *handle._routes, *operands, axes=handle._axis_name, layout=handle._layout
    )
