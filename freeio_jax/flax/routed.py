"""The routed experts of an MoE layer: chunks of tokens are dispatched, multiplied, and combined."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.drops import keep_evenly, keep_first
from freeio_jax.flax.exchange import exchange_of
from freeio_jax.flax.report import count_drops, no_drops
from freeio_jax.flax.router import Router, Routing
from freeio_jax.layout import balanced_capacity, dropless_capacity
from freeio_jax.overlap.start_done import tie_p
from freeio_jax.varying import vary


def routed(
    parameters: dict[str, jax.Array],
    tokens: jax.Array,
    routing: Routing,
    sequence_length: int,
    config: MoEConfig,
    beside: tuple[Callable, tuple] | None,
) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
    """The weighted sums of the experts' outputs ``[T, H]``.

    The order of chunks 0, ..., n-1. What a line names first runs while the exchanges that it names
    then are under way. ::

        experts of chunk 0        dispatch of 1
        experts of chunk i        dispatch of i+1, combine of i-1
        experts of chunk n-1      combine of n-2
        beside                    combine of n-1

    Nothing runs beside the dispatch of chunk 0. In the backward pass the gradients of the weights
    by that chunk do. Barriers keep XLA from starting an exchange earlier. So packed rows of two
    chunks exist at most, and in the backward pass gradients of such rows.

    Args:
      parameters: of this rank's experts.
      tokens: ``[T, H]``.
      routing: of the tokens.
      sequence_length: L; where ``config.expert_capacity`` is set, T is a multiple of it.
      config: of the layer.
      beside: a function and its arguments, to run while the last chunk is combined; None: nothing.

    Returns:
      The sums; what ``beside`` has returned, else None; and ``dropped``, ``expert_drops`` and
      ``source_drops`` of the report.
    """
    exchange = exchange_of(config)
    chunks = _cut(tokens, routing, sequence_length, config)
    arrived, handle = exchange.first_dispatch(*chunks[0].operands, **chunks[0].options)
    sums, handles, returning = [], [], []
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        handles.append(handle)
        coming = []
        if following is not None:
            # The next dispatch starts when this one has arrived.
            operands, arrived = _together(following.operands, arrived)
            coming = [exchange.dispatch_start(*operands, **following.options)]
        with jax.named_scope("experts"):
            rows = exchange.multiply([*coming, *returning], config.experts, parameters, arrived)
        if returning:
            # This combine starts when the one before is done.
            rows, combined = _together(rows, returning[0].done())
            sums.append(combined)
        if coming:
            # In the backward pass the gradients of later chunks' parameters are added up before
            # this chunk computes its own.
            rows, parameters = _together(rows, parameters)
        arguments = (rows, handle, chunk.weights)
        if coming:
            arrived, handle = exchange.arrived(coming[0].done())
        if coming or beside is not None:
            returning = [exchange.combine_start(*arguments)]
    result = None
    if beside is None:
        sums.append(exchange.last_combine(*arguments))
    else:
        fn, args = beside
        result = exchange.between(returning, fn, *args)
        sums += [pending.done() for pending in returning]
    y = jnp.concatenate([chunk.finish(s) for chunk, s in zip(chunks, sums, strict=True)])
    return y, result, _drops(chunks, handles, config)


def _together(*trees):
    """The trees; what uses one of them runs after all of them are there."""
    leaves, treedef = jax.tree.flatten(trees)
    return jax.tree.unflatten(treedef, tie_p.bind(*leaves))


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Tokens that are exchanged together.

    Attributes:
      asked_for: int32 ``[t, K]``: ids of the experts that the router has chosen; others are none.
      operands: of the dispatch: rows, and the ids of those assignments that are not given up.
      options: of the dispatch.
      weights: of the combine.
      finish: from the combine's result to ``[t, H]``.
    """

    asked_for: jax.Array
    operands: tuple[jax.Array, jax.Array]
    options: dict[str, Any]
    weights: jax.Array | None
    finish: Callable[[jax.Array], jax.Array]


def _cut(tokens, routing, sequence_length, config) -> list[_Chunk]:
    """Chunks whose sizes differ by one token at most; fewer than asked for where T is less."""
    num_tokens, ids = tokens.shape[0], routing.topk_idx
    weights = vary(routing.topk_weights, config.model_axes)
    if config.num_slots > config.num_experts or config.num_zero_experts:
        ids = jnp.where(ids < config.num_experts, ids, -1)
    asked_for = ids
    if config.expert_capacity is not None:
        ids = keep_first(ids, room=config.expert_capacity, sequence_length=sequence_length)
    num_chunks = max(1, min(config.num_chunks, num_tokens))
    ends = [num_tokens * i // num_chunks for i in range(num_chunks + 1)]
    return [
        _chunk(*(a[begin:end] for a in (tokens, asked_for, ids, weights)), config)
        for begin, end in itertools.pairwise(ends)
    ]


def _chunk(tokens, asked_for, ids, weights, config) -> _Chunk:
    num_tokens, top_k = ids.shape
    sizes = {
        "num_ranks": lax.axis_size(config.expert_axes),
        "num_tokens": num_tokens,
        "top_k": top_k,
        "num_experts": config.num_slots,
        "alignment": config.alignment,
    }
    capacity, bound = None, dropless_capacity(**sizes)
    if config.capacity_factor is not None:
        # An even load of all the router's choices gives a rank of used experts this many times T*K.
        even_share = config.num_slots / config.num_choices
        capacity = balanced_capacity(config.capacity_factor * even_share, **sizes)
    rows, finish = tokens, lambda sums: sums
    if config.drops == "evenly" and capacity is not None and capacity < bound:
        ids = keep_evenly(
            ids,
            num_experts=config.num_slots,
            capacity=capacity,
            alignment=config.alignment,
            axes=config.expert_axes,
        )
    if config.router.weights_on == "input":
        # Each expert of a token gets another row, so each assignment is sent as a token of its own.
        # The default capacity would not know that the experts of K neighbours are distinct.
        if capacity is None:
            capacity = bound
        wide = jnp.promote_types(tokens.dtype, jnp.float32)
        rows = tokens.astype(wide)[:, None] * weights.astype(wide)[..., None]
        rows = rows.astype(tokens.dtype).reshape(num_tokens * top_k, tokens.shape[1])
        ids, weights = ids.reshape(-1, 1), None

        def finish(sums):
            return jnp.sum(sums.reshape(num_tokens, top_k, sums.shape[1]), axis=1)

    options = {
        "num_experts": config.num_slots,
        "axis_name": config.expert_axes,
        "capacity": capacity,
        "alignment": config.alignment,
        "zero_tail": not config.experts.ignores_tail,
    }
    return _Chunk(asked_for, (rows, ids), options, weights, finish)


def _drops(chunks, handles, config):
    """``dropped``, ``expert_drops`` and ``source_drops`` of all chunks."""
    distinct = isinstance(config.router, Router)
    dropless = config.capacity_factor is None and config.expert_capacity is None
    if distinct and dropless and config.exchange is None:
        # All assignments have room: there is nothing to count.
        return no_drops(config.num_experts, lax.axis_size(config.all_token_axes))
    has_row = [
        handle.has_row().reshape(chunk.asked_for.shape)
        for chunk, handle in zip(chunks, handles, strict=True)
    ]
    return count_drops(
        jnp.concatenate([chunk.asked_for for chunk in chunks]),
        jnp.concatenate(has_row),
        config.num_experts,
        token_axes=config.all_token_axes,
        model_axes=config.model_axes,
    )
