"""Compiled programs of many calls of one exchange: what is timed on GPUs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax.bench.baselines import BaselineHandle
from freeio_jax.bench.cases import Shape
from freeio_jax.handle import Handle


def put(mesh: Mesh, tree: Any) -> Any:
    """Arrays stacked over the ranks, each rank's on its device."""
    sharding = NamedSharding(mesh, P("expert"))

    def put_one(array):
        # Each process of several puts the ranks of its own devices.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_one, tree)


def per_shard(function: Callable, mesh: Mesh) -> Callable:
    """``function`` of one rank's arrays as one of arrays stacked over the ranks, jitted."""

    def body(*args):
        outs = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], outs)

    spec = P("expert")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))


class Programs:
    """Programs of one shape and routing.

    The calls of a program wait for each other, as layers do, and return all that they compute:
    XLA neither merges them, nor leaves out what nobody reads, nor runs two at a time. For that the
    indices of a call depend on the results of the one before, which costs a kernel of a few
    numbers for each call, whatever the exchange. An optimization barrier is not enough: XLA may
    drop it and merge equal calls after that.

    Args:
      shape: the sizes and the rows' dtype.
      topk_idx: int32 ``[R, T, K]``.
      capacity: rows of a rank's packed output.
    """

    def __init__(self, mesh: Mesh, shape: Shape, topk_idx: np.ndarray, capacity: int):
        self.mesh, self.num_experts, self.capacity = mesh, shape.num_experts, capacity
        rng = np.random.default_rng(0)
        lead = (shape.num_ranks, shape.num_tokens)
        num_rows = shape.num_ranks * shape.num_tokens
        # A million numbers, again and again: to draw all of them takes longer than to time.
        some = rng.standard_normal(min(1 << 20, num_rows * shape.hidden), np.float32)
        tokens = np.resize(some.astype(jnp.dtype(shape.dtype)), (*lead, shape.hidden))
        self.tokens = put(mesh, tokens)
        self.weights = put(mesh, rng.random((*lead, shape.top_k), np.float32))
        self.topk_idx = put(mesh, topk_idx)
        self._last_dispatched: tuple[Any, Any] = (None, None)

    def build(self, api: Any, op: str, calls: int) -> Program:
        """``calls`` calls of an operation, in one compiled program.

        Args:
          api: what has ``dispatch`` and ``combine``.
          op: ``dispatch``; ``combine``; ``combine_transpose``, the gradients of a weighted combine;
            or ``dispatch_along``, the gradient of an unweighted one.
          calls: their number.
        """
        return self._lowered(api, op, calls)()

    def build_all(self, wanted: Iterable[tuple[Any, str]], calls: int) -> list[Future[Program]]:
        """As :meth:`build`, for each ``(api, op)``; compiled side by side, and all of them done."""
        # All inputs are there before: what XLA loads while an exchange waits for its peers on a
        # GPU may wait for it in turn.
        lowered = [self._try_to_lower(api, op, calls) for api, op in wanted]
        with ThreadPoolExecutor() as pool:
            return [pool.submit(compile_it) for compile_it in lowered]

    def _try_to_lower(self, *args):
        try:
            return self._lowered(*args)
        except Exception as error:
            return functools.partial(_raise, error)  # for whoever asks for the result

    def _lowered(self, api, op, calls):
        """A function that compiles the program; any thread may call it."""
        once, args = getattr(self, f"_{op}")(api)

        def many(*args):
            outs = []
            for _ in range(calls):
                after = [_after(outs[-1], arg) for arg in args] if outs else args
                outs.append(once(*after))
            return outs

        lowered = per_shard(many, self.mesh).lower(*args)
        return lambda: Program(lowered.compile(), args, calls)

    def dispatch_once(self, api: Any, tokens: jax.Array, topk_idx: jax.Array):
        return api.dispatch(
            tokens,
            topk_idx,
            num_experts=self.num_experts,
            axis_name="expert",
            capacity=self.capacity,
        )

    def _dispatch(self, api):
        def once(tokens, topk_idx):
            return self.dispatch_once(api, tokens, topk_idx)

        return once, (self.tokens, self.topk_idx)

    def _dispatched(self, api):
        if self._last_dispatched[0] != api:
            once, args = self._dispatch(api)
            out = jax.block_until_ready(per_shard(once, self.mesh)(*args))
            self._last_dispatched = api, (out.tokens, out.handle)
        return self._last_dispatched[1]

    def _combine(self, api):
        return api.combine, (*self._dispatched(api), self.weights)

    def _combine_transpose(self, api):
        def once(rows, handle, weights, cotangent):
            _, pull = jax.vjp(lambda r, w: api.combine(r, handle, w), rows, weights)
            return pull(cotangent)

        return once, (*self._dispatched(api), self.weights, self.tokens)

    def _dispatch_along(self, api):
        def once(rows, handle, cotangent):
            _, pull = jax.vjp(lambda r: api.combine(r, handle), rows)
            return pull(cotangent)

        return once, (*self._dispatched(api), self.tokens)


def _raise(error):
    raise error


def _after(result, arg):
    """``arg``, and so all that is computed from it, in need of ``result``; otherwise the same."""
    element = jax.tree.leaves(result)[0]
    # The first element: what lies past the end of packed rows may be NaN.
    element = lax.slice(element, [0] * element.ndim, [1] * element.ndim).reshape(())
    zero = (element != element).astype(jnp.int32)  # not NaN: but XLA does not know
    if isinstance(arg, Handle):
        return dataclasses.replace(arg, _dest_rank=arg._dest_rank + zero)
    if isinstance(arg, BaselineHandle):
        plan = arg._plan
        changed = {"order": plan.order + zero}
        if plan.back is not None:
            changed["back"] = plan.back + zero
        if plan.slices is not None:
            changed["slices"] = (*plan.slices[:3], plan.slices[3] + zero, *plan.slices[4:])
        return dataclasses.replace(arg, _plan=dataclasses.replace(plan, **changed))
    return arg + zero if jnp.issubdtype(arg.dtype, jnp.integer) else arg


class Program:
    """A compiled program with its arguments: call it.

    Attributes:
      calls: exchanges in it.
      found: collectives in what XLA made of it; fewer than ``calls`` if XLA merged some after all.
    """

    _COLLECTIVE = re.compile(r'all-to-all(?:-start)?\(|custom_call_target="freeio_')

    def __init__(self, compiled: Any, args: Sequence[Any], calls: int):
        self.compiled, self.args, self.calls = compiled, args, calls
        self.found = len(self._COLLECTIVE.findall(compiled.as_text()))

    def __call__(self) -> Any:
        return self.compiled(*self.args)
