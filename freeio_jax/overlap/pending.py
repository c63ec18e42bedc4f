"""dispatch_start, combine_start, between, and the Pending that goes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax._src import core

from freeio_jax.arguments import combine_arguments, dispatch_arguments, overlap_sms
from freeio_jax.define import vary_alike
from freeio_jax.handle import Dispatched, Handle
from freeio_jax.overlap.derivative import hold_p, release
from freeio_jax.overlap.origin import Origin
from freeio_jax.overlap.start_done import done_p, start, tie_p
from freeio_jax.primitives import combine_p, dispatch_along_p, dispatch_p, split_dispatched

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """An exchange that is under way: what :func:`dispatch_start` and :func:`combine_start` return.

    It is no array, and no pytree. It belongs to the function and loop body that started it. There
    it may go through :func:`between` any number of times, and then once through :meth:`done`.
    """

    def __init__(self, origin: Origin, operands, unfinished, finish: Callable[..., Result]):
        """``done`` returns ``finish(held, results)``; ``held`` is what hold makes of operands."""
        self._origin = origin
        self._held = hold_p.bind(*operands, name=origin.name)
        self._unfinished = unfinished
        self._finish = finish
        self._trace = core.get_opaque_trace_state()

    def done(self) -> Result:
        """Waits for the exchange, and returns what the synchronous call returns, bit by bit.

        Raises:
          RuntimeError: called a second time, or in another function or loop body than the start.
          jax.errors.JaxRuntimeError: when it runs, as the synchronous call.
        """
        self._check("done")
        self._origin.is_done = True
        return self._finish(self._held, done_p.bind(*self._unfinished, name=self._origin.name))

    def _check(self, call: str) -> None:
        """Raises RuntimeError unless ``call`` may use this, here and now."""
        if self._origin.is_done:
            raise RuntimeError(
                f"{call}: done() was called before on the Pending of {self._origin}. A Pending is "
                "done once: keep what done() returns."
            )
        if core.get_opaque_trace_state() != self._trace:
            raise RuntimeError(
                f"{call}: the Pending of {self._origin} was made in another function or loop "
                "body: JAX traces the body of jit, grad, vmap, scan, while_loop, cond, checkpoint "
                "and shard_map by itself. Start the exchange and call done() in the same one, and "
                "pass on what done() returns."
            )

    def __repr__(self):
        return f"<Pending of {self._origin}{', done' if self._origin.is_done else ''}>"

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"the Pending of {self._origin} has no attribute {name!r}: its results are not there "
            "yet. Call done() first, and use what it returns."
        )

    def _refuse_as_array(self, *_, **__):
        raise TypeError(
            f"freeio_jax: the Pending of {self._origin} is used as an array. Its results are not "
            "there yet: call done() first, and use what it returns."
        )

    __jax_array__ = __array__ = _refuse_as_array


def _refuse_to_flatten(pending: Pending):
    raise TypeError(
        f"freeio_jax: the Pending of {pending._origin} is passed to, or returned from, a function "
        "that JAX transforms or calls (jit, grad, vmap, scan, while_loop, cond, checkpoint, "
        "shard_map), or is carried round a loop. Start the exchange and call done() in one "
        "function and loop body, and pass on what done() returns. between() takes pytrees of them."
    )


# A node that refuses to be flattened: so the error names the call, wherever JAX meets a Pending.
jax.tree_util.register_pytree_node(Pending, _refuse_to_flatten, lambda *_: None)


def dispatch_start(
    tokens,
    topk_idx: jax.Array,
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...],
    capacity: int | None = None,
    alignment: int = 1,
    zero_tail: bool = True,
    num_sms: int | None = None,
) -> Pending[Dispatched]:
    """Starts what :func:`freeio_jax.dispatch` does; ``done()`` of what it returns ends it.

    On GPUs the exchange runs beside what :func:`between` runs until then, and so do the exchanges
    of its derivative in the backward pass. On CPU, under ``vmap``, and where ``shard_map`` is
    called without ``jit``, the exchange runs to its end when it starts.

    Args:
      tokens, topk_idx, num_experts, axis_name, capacity, alignment, zero_tail: as in
        :func:`freeio_jax.dispatch`.
      num_sms: multiprocessors of a GPU that the exchange may use, and its derivative in the
        backward pass. The others are left to compute. None is the setting ``overlap_num_sms``. The
        same on all ranks.

    Returns:
      A :class:`Pending`. Its ``done()`` returns what :func:`freeio_jax.dispatch` returns.

    Raises:
      NameError, TypeError, ValueError: an argument, as in :func:`freeio_jax.dispatch`.
      RuntimeError: when it is compiled: ``done()`` was not called on the Pending.

    >>> import jax, jax.numpy as jnp, freeio_jax as fio
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
    >>> def layer(tokens, topk_idx):
    ...     pending = fio.dispatch_start(tokens, topk_idx, num_experts=2, axis_name="expert")
    ...     shared, pending = fio.between(pending, jnp.square, tokens)
    ...     out = pending.done()
    ...     return shared + fio.combine(out.tokens, out.handle)
    >>> layer = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    >>> jax.jit(layer)(jnp.array([[2.0], [3.0]]), jnp.array([[1, 0], [0, -1]])).tolist()
    [[8.0], [12.0]]
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
    how = {"num_sms": overlap_sms("dispatch_start", num_sms), "axes": axes, "layout": layout}
    topk_idx, *leaves = vary_alike((topk_idx, *leaves), axes)

    def finish(held, results):
        rows, routes, counts = split_dispatched(results)
        rows = release(dispatch_along_p, routes, leaves, held, rows, **how)
        group_sizes, load, dropped, invalid = counts
        handle = Handle(load, dropped, invalid, *routes, layout, axes)
        return Dispatched(jax.tree_util.tree_unflatten(treedef, rows), group_sizes, handle)

    origin = Origin.here("dispatch_start")
    unfinished = start(dispatch_p, topk_idx, *leaves, origin=origin, **how)
    return Pending(origin, leaves, unfinished, finish)


def combine_start(
    expert_out: jax.Array,
    handle: Handle,
    topk_weights: jax.Array | None = None,
    *,
    num_sms: int | None = None,
) -> Pending[jax.Array]:
    """Starts what :func:`freeio_jax.combine` does; ``done()`` of what it returns ends it.

    Args:
      expert_out, handle, topk_weights: as in :func:`freeio_jax.combine`.
      num_sms: as in :func:`dispatch_start`.

    Returns:
      A :class:`Pending`. Its ``done()`` returns what :func:`freeio_jax.combine` returns.

    Raises:
      NameError, TypeError, ValueError: an argument, as in :func:`freeio_jax.combine`.
      RuntimeError: when it is compiled: ``done()`` was not called on the Pending.
    """
    expert_out, weights = combine_arguments(expert_out, handle, topk_weights)
    axes = handle._axis_name
    how = {
        "num_sms": overlap_sms("combine_start", num_sms),
        "axes": axes,
        "layout": handle._layout,
    }
    operands = (expert_out,) if weights is None else (expert_out, weights)
    num_routes = len(handle._routes)
    varied = vary_alike((*handle._routes, *operands), axes)
    routes, operands = varied[:num_routes], varied[num_routes:]

    def finish(held, results):
        (sums,) = release(combine_p, routes, operands, held, results, **how)
        return sums

    origin = Origin.here("combine_start")
    unfinished = [start(combine_p, *routes, *operands, origin=origin, **how)]
    return Pending(origin, operands, unfinished, finish)


def between(pendings, fn: Callable, *args) -> tuple[Any, Any]:
    """Runs ``fn(*args)`` after the starts of the pendings, and before their dones.

    In the backward pass the derivative of ``fn`` runs between the starts and the dones of the
    exchanges that are the pendings' derivatives. XLA's scheduler does not change that.

    Args:
      pendings: a :class:`Pending`, or a pytree of them.
      fn: what is to run beside the exchanges. It takes and returns pytrees.
      args: its arguments. Pass all arrays that ``fn`` needs. What it computes from others alone may
        run before the starts, and their gradients may be computed after the dones.

    Returns:
      ``(fn(*args), pendings)``. The pendings are the same objects.

    Raises:
      TypeError: ``pendings`` has a leaf that is no Pending.
      RuntimeError: one of them is done, or was started in another function or loop body.
    """
    leaves = jax.tree_util.tree_leaves(pendings, is_leaf=lambda x: isinstance(x, Pending))
    for pending in leaves:
        if not isinstance(pending, Pending):
            raise TypeError(
                "between: pendings must be what dispatch_start or combine_start returned, or a "
                f"pytree of them, got {type(pending).__name__}."
            )
    distinct = list({id(pending): pending for pending in leaves}.values())
    args = _tie(distinct, args)
    return _tie(distinct, fn(*args)), pendings


def _tie(pendings: list[Pending], tree):
    """The tree. Its users come after the starts; the dones come after what has made it."""
    for pending in pendings:
        pending._check("between")
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    values = [leaf for leaf in leaves if _is_array(leaf)]
    for pending in pendings:
        values += [*pending._unfinished, *pending._held]
    tied = iter(tie_p.bind(*values) if pendings else values)
    leaves = [next(tied) if _is_array(leaf) else leaf for leaf in leaves]
    for pending in pendings:
        pending._unfinished = [next(tied) for _ in pending._unfinished]
        pending._held = [next(tied) for _ in pending._held]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _is_array(leaf) -> bool:
    """Whether it is an array. One of float0, which stands for no tangent, has no elements."""
    return isinstance(leaf, (jax.Array, np.ndarray)) and leaf.dtype != jax.dtypes.float0
