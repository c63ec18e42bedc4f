"""Exchanges with compute beside them: synchronous calls and ``fn``, or start, ``fn``, done.

Both have the same methods, so that a layer can be written once and run either way.

The barriers around ``fn`` change what XLA fuses, and with it the roundings of sums. So the layer
computes sums and products of small integers, in float64: nothing is rounded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from helpers import Geometry, make_mesh, routing
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

GEOMETRY = Geometry(num_ranks=2, num_tokens=5, top_k=3, num_experts=4)


class Synchronous:
    """``fn(*args)`` and the result of a synchronous call."""

    @staticmethod
    def dispatch(fn, args, *arguments, **options):
        return fn(*args), fio.dispatch(*arguments, **options)

    @staticmethod
    def combine(fn, args, *arguments):
        return fn(*args), fio.combine(*arguments)


class Started:
    """The same, with ``fn(*args)`` between start and done."""

    @staticmethod
    def _between(pending, fn, args):
        result, pending = fio.between(pending, fn, *args)
        return result, pending.done()

    @classmethod
    def dispatch(cls, fn, args, *arguments, **options):
        return cls._between(fio.dispatch_start(*arguments, **options), fn, args)

    @classmethod
    def combine(cls, fn, args, *arguments):
        return cls._between(fio.combine_start(*arguments), fn, args)


class StartedApi:
    """``dispatch`` and ``combine`` by start and done, with nothing between them."""

    @staticmethod
    def dispatch(*arguments, **options):
        return fio.dispatch_start(*arguments, **options).done()

    @staticmethod
    def combine(*arguments):
        return fio.combine_start(*arguments).done()


def shared(x, scale):
    """What runs beside an exchange: a product of matrices, and something that is not linear."""
    matrix = jnp.array([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, -1.0]], x.dtype)
    return x * (x @ matrix) * scale


def experts(rows, group_sizes, params):
    """Each row times its expert's matrix, and squared."""
    group = jnp.repeat(jnp.arange(len(params)), group_sizes, total_repeat_length=len(rows))
    return jnp.einsum("ch,chj->cj", rows, params[group]) ** 2


def layer(exchange, tokens, topk_idx, weights, params, geometry=GEOMETRY):
    """One rank's MoE layer: tokens [T, 3] -> [T, 3]. Its two exchanges hide two small products."""
    beside, out = exchange.dispatch(
        shared, (tokens, 3.0), tokens, topk_idx, axis_name="expert", **geometry.options()
    )
    rows = experts(out.tokens, out.group_sizes, params)
    beside, z = exchange.combine(shared, (beside, 2.0), rows, out.handle, weights)
    return z + beside


def arguments(rng, geometry=GEOMETRY):
    """(tokens, topk_idx, weights, params), flattened over ranks; float64."""
    topk_idx = routing(rng, geometry, "holes").reshape(-1, geometry.top_k)

    def integers(*shape):
        return jnp.asarray(rng.integers(-2, 3, shape), jnp.float64)

    return (
        integers(len(topk_idx), 3),
        jnp.asarray(topk_idx),
        integers(*topk_idx.shape),
        integers(geometry.num_experts, 3, 3),
    )


def sharded(exchange, body=layer, mesh=None, specs=None, **kwargs):
    """``body(exchange, *arguments)`` over all ranks of the mesh."""

    def fn(*arguments):
        return body(exchange, *arguments)

    mesh = make_mesh(GEOMETRY.num_ranks) if mesh is None else mesh
    spec = P("expert")
    return jax.shard_map(
        fn, mesh=mesh, in_specs=spec if specs is None else specs, out_specs=spec, **kwargs
    )
