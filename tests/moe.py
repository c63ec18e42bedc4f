"""A small MoE layer over the exchange, and the same layer computed densely on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from helpers import Geometry, make_mesh, routing
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

GEOMETRY = Geometry(num_ranks=4, num_tokens=5, top_k=3, num_experts=8)
WIDTH, OUT_WIDTH = 3, 2


def experts_of(rows, group_sizes, params):
    """tanh(rows W_e + b_e) of each row's expert: rows of padding give tanh(b), not zero."""
    kernel, bias = params
    group = jnp.repeat(jnp.arange(kernel.shape[0]), group_sizes, total_repeat_length=rows.shape[0])
    return jnp.tanh(jnp.einsum("ch,chj->cj", rows, kernel[group]) + bias[group])


def moe(tokens, topk_idx, weights, params, geometry=GEOMETRY, api=fio):
    """One rank's layer: tokens [T, H] -> [T, J]."""
    out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
    return api.combine(experts_of(out.tokens, out.group_sizes, params), out.handle, weights)


def sharded_moe(geometry=GEOMETRY, layer=None, mesh=None, **kwargs):
    """The layer over all ranks: tokens [R*T, H], params [E, ...] -> [R*T, J]."""
    mesh = make_mesh(geometry.num_ranks) if mesh is None else mesh
    layer = moe if layer is None else layer

    def fn(tokens, topk_idx, weights, params):
        return layer(tokens, topk_idx, weights, params, geometry)

    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), **kwargs)
    )


def dense_moe(tokens, topk_idx, weights, params, kept=None):
    """The same without an exchange; ``kept`` [R*T, K]: assignments that have a row."""
    kernel, bias = params
    kept = topk_idx >= 0 if kept is None else kept
    expert = jnp.where(kept, topk_idx, 0)
    rows = jnp.tanh(jnp.einsum("th,tkhj->tkj", tokens, kernel[expert]) + bias[expert])
    return jnp.sum(jnp.where(kept, weights, 0)[..., None] * rows, axis=1, where=kept[..., None])


def arguments(rng, geometry=GEOMETRY, skew="holes", dtype=np.float32):
    """(tokens, topk_idx, weights, params), flattened over ranks."""
    topk_idx = routing(rng, geometry, skew).reshape(-1, geometry.top_k)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return (
        normal(topk_idx.shape[0], WIDTH),
        jnp.asarray(topk_idx),
        normal(*topk_idx.shape),
        (
            normal(geometry.num_experts, WIDTH, OUT_WIDTH),
            normal(geometry.num_experts, OUT_WIDTH),
        ),
    )


def placement_of(topk_idx, geometry, rows):
    return geometry.place(np.asarray(topk_idx).reshape(geometry.topk_shape), rows)
