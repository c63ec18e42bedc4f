"""Compiled programs of many calls of one exchange: what is timed on GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax.bench.cases import Shape


def put(mesh: Mesh, tree: Any) -> Any:
    """Arrays stacked over the ranks, each rank's on its device."""
    sharding = NamedSharding(mesh, P("expert"))
    return jax.tree.map(lambda a: jax.device_put(a, sharding), tree)


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
    XLA neither merges them, nor leaves out what nobody reads, nor runs two at a time.

    Args:
      shape: the sizes and the rows' dtype.
      topk_idx: int32 ``[R, T, K]``.
      capacity: rows of a rank's packed output.
    """

    def __init__(self, mesh: Mesh, shape: Shape, topk_idx: np.ndarray, capacity: int):
        self.mesh, self.num_experts, self.capacity = mesh, shape.num_experts, capacity
        rng = np.random.default_rng(0)
        lead = (shape.num_ranks, shape.num_tokens)
        tokens = rng.standard_normal((*lead, shape.hidden), np.float32)
        self.tokens = put(mesh, tokens.astype(jnp.dtype(shape.dtype)))
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
        once, args = getattr(self, f"_{op}")(api)

        def many(*args):
            outs = []
            for _ in range(calls):
                if outs:
                    args, outs[-1] = lax.optimization_barrier((args, outs[-1]))
                outs.append(once(*args))
            return outs

        return Program(per_shard(many, self.mesh).lower(*args).compile(), args, calls)

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
        if self._last_dispatched[0] is not api:
            once, args = self._dispatch(api)
            out = per_shard(once, self.mesh)(*args)
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
