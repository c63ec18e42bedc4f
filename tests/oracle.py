"""The contract of dispatch and combine in plain numpy loops.

Arrays of all ranks are stacked: ``[R, T, ...]`` on the source side, ``[R, capacity, ...]`` on the
expert side.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Placement:
    """Where each assignment of one exchange goes.

    Attributes:
      source: for each rank, for each packed row, the ``(rank, token, k)`` it comes from, or None.
      group_sizes: int32 [R, E/R].
      expert_load: int32 [R, E/R].
      num_dropped: int32 [R].
      num_invalid: int32 [R].
    """

    source: list
    group_sizes: np.ndarray
    expert_load: np.ndarray
    num_dropped: np.ndarray
    num_invalid: np.ndarray

    @property
    def row_of(self):
        """(rank, token, k) -> (destination rank, row there), for the assignments that have one."""
        return {
            assignment: (rank, row)
            for rank, rows in enumerate(self.source)
            for row, assignment in enumerate(rows)
            if assignment is not None
        }

    def kept(self, shape):
        """bool [R, T, K]: the assignments that have a row."""
        mask = np.zeros(shape, bool)
        for assignment in self.row_of:
            mask[assignment] = True
        return mask


def dropless_capacity(num_ranks, num_tokens, top_k, num_experts):
    return num_ranks * num_tokens * min(top_k, num_experts // num_ranks)


def place(topk_idx, *, num_experts, capacity, alignment=1):
    """Packs the assignments ``[R, T, K]``: by expert, then source rank, then token, then k."""
    num_ranks, num_tokens, top_k = topk_idx.shape
    per_rank = num_experts // num_ranks
    source = [[None] * capacity for _ in range(num_ranks)]
    sizes = np.zeros((num_ranks, per_rank), np.int32)
    load = np.zeros((num_ranks, per_rank), np.int32)
    dropped = np.zeros(num_ranks, np.int32)
    invalid = np.zeros(num_ranks, np.int32)
    for rank in range(num_ranks):
        start = 0
        for local in range(per_rank):
            end = start
            for s in range(num_ranks):
                for t in range(num_tokens):
                    for k in range(top_k):
                        if topk_idx[s, t, k] != rank * per_rank + local:
                            continue
                        load[rank, local] += 1
                        if end < capacity:
                            source[rank][end] = (s, t, k)
                        else:
                            dropped[rank] += 1
                        end += 1
            while (end - start) % alignment:
                end += 1
            sizes[rank, local] = min(end, capacity) - min(start, capacity)
            start = end
        for expert in topk_idx[rank].reshape(-1):
            if expert < -1 or expert >= num_experts:
                invalid[rank] += 1
    return Placement(source, sizes, load, dropped, invalid)


def dispatch(tokens, placement):
    """Packed rows ``[R, capacity, ...]`` of ``tokens`` ``[R, T, ...]``; zeros elsewhere."""
    capacity = len(placement.source[0])
    packed = np.zeros((tokens.shape[0], capacity, *tokens.shape[2:]), tokens.dtype)
    for rank, rows in enumerate(placement.source):
        for row, assignment in enumerate(rows):
            if assignment is not None:
                s, t, _ = assignment
                packed[rank, row] = tokens[s, t]
    return packed


def combine(expert_out, placement, topk_shape, topk_weights=None, hosts=None):
    """``z[t] = sum_k w[t,k] * row(t,k)`` ``[R, T, ...]``, rounded where the contract rounds.

    ``hosts``: the host of each rank, numbered in the order in which the ranks come to them; None:
    all are on one host.
    """
    dtype = expert_out.dtype
    accumulator = np.float64 if dtype == np.float64 else np.float32
    num_ranks, num_tokens, top_k = topk_shape
    row_of = placement.row_of
    z = np.zeros((num_ranks, num_tokens, *expert_out.shape[2:]), dtype)
    for s in range(num_ranks):
        for t in range(num_tokens):
            total = np.zeros(expert_out.shape[2:], accumulator)
            of_host = total
            for rank in np.argsort(hosts, kind="stable") if hosts is not None else range(num_ranks):
                partial = np.zeros(expert_out.shape[2:], accumulator)
                for k in range(top_k):
                    where = row_of.get((s, t, k))
                    if where is None or where[0] != rank:
                        continue
                    row = expert_out[where].astype(accumulator)
                    if topk_weights is not None:
                        row = row * topk_weights[s, t, k].astype(accumulator)
                    partial = partial + row
                of_host = of_host + partial.astype(dtype).astype(accumulator)
                if hosts is not None and rank == np.flatnonzero(hosts == hosts[rank])[-1]:
                    total = total + of_host.astype(dtype).astype(accumulator)
                    of_host = np.zeros_like(total)
            z[s, t] = (total if hosts is not None else of_host).astype(dtype)
    return z


def combine_tolerance(expert_out, placement, topk_shape, topk_weights=None):
    """How far two sums that obey the contract may differ, for each element of the result.

    Products may be rounded or fused into the sum, which moves a float32 sum by a few of its ulps;
    that can move each rounding to the rows' dtype by one ulp of what was rounded.
    """
    import jax.numpy as jnp

    dtype = expert_out.dtype
    magnitude = combine(
        np.abs(np.nan_to_num(expert_out.astype(np.float64))),
        placement,
        topk_shape,
        None if topk_weights is None else np.abs(np.nan_to_num(topk_weights.astype(np.float64))),
    )
    info = jnp.finfo(dtype)
    accumulator = np.finfo(np.float64 if dtype == np.float64 else np.float32)
    relative = 2 * float(info.eps) + 2 * sum(topk_shape) * float(accumulator.eps)
    return relative * magnitude + topk_shape[0] * float(info.smallest_subnormal)
