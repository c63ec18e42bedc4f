"""Which assignments are given up before the exchange, by a rule.

**An expert's room for one sequence** (``expert_capacity``) goes to the first in order of token,
then of k.

**Fair drops** (``drops="evenly"``): which assignments a rank gives up that has not enough room.

Let the experts of one rank get N assignments, numbered from 0 in this order: by expert, then by
source rank, then by token, then by k. For the expert with id e the source ranks begin with rank
``e mod R``. If all rows fit, all assignments are kept. If not, let n be the rows that the rank has
room for, apart from those that alignment may add. Then assignment i is kept where

    floor((i + 1) * n / N) > floor(i * n / N)

So n of N are kept, evenly spaced. (n / N is rounded up to a multiple of 2^-32.) Of neighbours in
this order the share that is lost is that of the whole, to within one assignment. This holds for
each expert, and for a source rank's assignments to one expert. A source rank's assignments to all
experts of a rank lose that share to within one for each expert. Such differences do not add up,
because the order begins with another source for each expert. If it always began with rank 0, and
each source had one assignment for each expert, one source could lose all of them.

Each rank must know how many assignments each rank has for each expert. This costs one all-gather of
E numbers. To know the place of each assignment among those to its expert costs a sort of a rank's
T*K ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.layout import round_up


def keep_evenly(
    topk_idx: jax.Array, *, num_experts: int, capacity: int, alignment: int, axes: tuple[str, ...]
) -> jax.Array:
    """The ids, with -1 for assignments that are given up so that the others fit everywhere.

    Args:
      topk_idx: int32 ``[T, K]``: this rank's assignments. Ids outside ``[0, P)`` are none.
      num_experts: P, divisible by the R ranks.
      capacity: rows of each rank, at least ``(alignment - 1) * P/R``.
      alignment: every group of rows is padded to a multiple of it.
      axes: the expert axes, manual.
    """
    num_ranks, me = lax.axis_size(axes), lax.axis_index(axes)
    ids = topk_idx.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    mine = jnp.sum(ids[:, None] == experts[None], axis=0, dtype=jnp.int32)
    counts = lax.all_gather(mine, axes)  # [R, P]

    load = jnp.sum(counts, axis=0, dtype=jnp.int32).reshape(num_ranks, -1)
    rows = jnp.sum(round_up(load, alignment), axis=1, dtype=jnp.int32)
    room = capacity - load.shape[1] * (alignment - 1)
    total = jnp.sum(load, axis=1, dtype=jnp.int32)
    share = _fraction_of_2_32(jnp.full_like(total, room), jnp.maximum(total, room + 1))

    # The number of my first assignment to each expert, among those of the expert's rank.
    before_expert = jnp.cumsum(load, axis=1, dtype=jnp.int32) - load
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    turn = (ranks - experts[None]) % num_ranks
    my_turn = (me - experts[None]) % num_ranks
    before_me = jnp.sum(jnp.where(turn < my_turn, counts, 0), axis=0, dtype=jnp.int32)
    first = before_expert.reshape(-1) + before_me

    expert = jnp.minimum(ids, num_experts - 1)
    rank = expert // load.shape[1]
    number = first[expert] + _place_among_equals(ids, mine)
    # floor(number * share / 2^32) grows at the next number where the product's low bits carry.
    low_bits = number.astype(jnp.uint32) * share[rank]
    carries = low_bits + share[rank] < share[rank]
    kept = (rows <= capacity)[rank] | carries
    return jnp.where(kept.reshape(topk_idx.shape), topk_idx, -1)


def keep_first(topk_idx: jax.Array, *, room: int, sequence_length: int) -> jax.Array:
    """The ids, with -1 for assignments beyond the first ``room`` of a sequence to one expert.

    Args:
      topk_idx: int32 ``[B*L, K]``: the assignments of whole sequences. Negative ids are none.
      room: of one expert for one sequence.
      sequence_length: L.
    """
    top_k = topk_idx.shape[1]

    def of_sequence(ids):
        order = jnp.argsort(ids, stable=True)
        index, ordered = jnp.arange(ids.size, dtype=jnp.int32), ids[order]
        begins = jnp.append(True, ordered[1:] != ordered[:-1])
        first = lax.cummax(jnp.where(begins, index, 0))
        kept = jnp.where(index - first < room, ordered, -1)
        return jnp.zeros_like(ids).at[order].set(kept, unique_indices=True)

    if topk_idx.size == 0:
        return topk_idx
    return jax.vmap(of_sequence)(topk_idx.reshape(-1, sequence_length * top_k)).reshape(-1, top_k)


def _fraction_of_2_32(numerator, denominator):
    """``ceil(numerator / denominator * 2**32)`` of int32, where 0 <= numerator < denominator."""
    rest, denominator = numerator.astype(jnp.uint32), denominator.astype(jnp.uint32)
    quotient = jnp.zeros_like(rest)
    for _ in range(32):  # long division, a bit at a time: there is no wider integer everywhere
        rest = rest * 2
        bit = rest >= denominator
        rest = jnp.where(bit, rest - denominator, rest)
        quotient = quotient * 2 + bit.astype(jnp.uint32)
    return quotient + (rest > 0).astype(jnp.uint32)


def _place_among_equals(ids, counts):
    """How many equal ids are before each id: int32, for ids whose numbers are ``counts``."""
    order = jnp.argsort(ids, stable=True)
    ends = jnp.append(jnp.cumsum(counts, dtype=jnp.int32), jnp.int32(0))
    first = ends - jnp.append(counts, jnp.int32(0))
    index = jnp.arange(ids.size, dtype=jnp.int32)
    place = index - first[ids[order]]
    return jnp.zeros_like(ids).at[order].set(place, unique_indices=True)
