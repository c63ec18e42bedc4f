"""An exchange on all ranks of emulated GPUs, and its results against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
from emulated import GARBAGE, Group, capacity_of
from helpers import assert_bitwise, random_bits, routing


def first_gpus(geometry):
    return Group(tuple(range(geometry.num_ranks)))


def dispatch(machine, geometry, topk_idx, leaves, group=None, **options):
    """Launches dispatch on all ranks; the results by rank."""
    group = group or first_gpus(geometry)
    return [
        machine.dispatch(
            group, rank, geometry, topk_idx[rank], [leaf[rank] for leaf in leaves], **options
        )
        for rank in range(group.size)
    ]


def check_dispatched(out, geometry, topk_idx, leaves):
    """All results bitwise against the oracle, the handle's too. Returns the placement."""
    placement = geometry.place(topk_idx, capacity_of(geometry))
    shape = geometry.topk_shape
    dest = np.full((*shape, 2), -1, np.int32)
    row_source = np.full((geometry.num_ranks, capacity_of(geometry)), -1, np.int32)
    for (s, t, k), (rank, row) in placement.row_of.items():
        dest[s, t, k] = rank, row
        row_source[rank, row] = np.ravel_multi_index((s, t, k), shape)
    expected = {
        "dest_rank": dest[..., 0],
        "dest_row": dest[..., 1],
        "row_source": row_source,
        "group_sizes": placement.group_sizes,
        "expert_load": placement.expert_load,
        "num_dropped": placement.num_dropped,
        "num_invalid": placement.num_invalid,
    }
    for name, arrays in expected.items():
        for rank, result in enumerate(out):
            assert_bitwise(getattr(result, name), arrays[rank], f"{name} of rank {rank}")
    for i, leaf in enumerate(leaves):
        rows = oracle.dispatch(leaf, placement)
        for rank, result in enumerate(out):
            what = f"leaf {i} of rank {rank}"
            check_rows(result.rows[i], rows[rank], geometry, placement.group_sizes[rank], what)
    return placement


def check_rows(rows, expected, geometry, group_sizes, what):
    """A rank's packed rows bitwise; unless they are asked for, those past the end are untouched."""
    defined = geometry.num_defined(group_sizes)
    assert_bitwise(rows[:defined], expected[:defined], what)
    if defined is not None:
        assert (rows[defined:].view(np.uint8) == GARBAGE).all(), f"wrote to the tail: {what}"


def run_dispatch(machine, rng, geometry, skew="holes", width=5, group=None):
    """Dispatches random rows and checks them; the ids, the results by rank and the placement."""
    topk_idx = routing(rng, geometry, skew)
    leaves = [random_bits(rng, (geometry.num_ranks, geometry.num_tokens, width), np.float32)]
    out = dispatch(machine, geometry, topk_idx, leaves, group)
    machine.synchronize()
    return topk_idx, out, check_dispatched(out, geometry, topk_idx, leaves)


def combine(machine, geometry, handles, expert_out, weights=None, group=None, **options):
    group = group or first_gpus(geometry)
    return [
        machine.combine(
            *(group, rank, geometry, handles[rank], expert_out[rank]),
            None if weights is None else weights[rank],
            **options,
        )
        for rank in range(group.size)
    ]


def combine_transpose(
    machine, geometry, handles, cotangent, *, weights=None, expert_out=None, group=None, **options
):
    group = group or first_gpus(geometry)
    return [
        machine.combine_transpose(
            *(group, rank, geometry, handles[rank], cotangent[rank]),
            weights=None if weights is None else weights[rank],
            expert_out=None if expert_out is None else expert_out[rank],
            **options,
        )
        for rank in range(group.size)
    ]


def done(machine, group, start):
    """All ranks wait for what they have started."""
    for rank in range(group.size):
        machine.done(group, rank, start)


def check_transposed(out, geometry, placement, cotangent, weights, expert_out):
    """Rows bitwise, dot products within the rounding of their sums."""
    dtype = cotangent.dtype
    accumulator = np.float64 if dtype == np.float64 else np.float32
    rows = np.zeros((geometry.num_ranks, capacity_of(geometry), *cotangent.shape[2:]), dtype)
    grads, bounds = (np.zeros(geometry.topk_shape, np.float64) for _ in range(2))
    for (s, t, k), (rank, row) in placement.row_of.items():
        x = cotangent[s, t]
        if weights is not None:
            product = x.astype(accumulator) * weights[s, t, k].astype(accumulator)
            rows[rank, row] = product.astype(dtype)
        if expert_out is not None:
            terms = x.astype(np.float64) * expert_out[rank, row].astype(np.float64)
            grads[s, t, k], bounds[s, t, k] = terms.sum(), np.abs(terms).sum()
    bounds *= (cotangent.shape[-1] + 8) * np.finfo(accumulator).eps
    for rank, (ours, our_grads) in enumerate(out):
        assert (ours is None) == (weights is None)
        assert (our_grads is None) == (expert_out is None)
        if ours is not None:
            sizes = placement.group_sizes[rank]
            check_rows(ours, rows[rank], geometry, sizes, f"rows of rank {rank}")
        if our_grads is not None:
            assert our_grads.dtype == accumulator
            assert np.all(np.abs(our_grads - grads[rank]) <= bounds[rank])
