"""XLA's own exchanges at their best, with the signatures of ``dispatch`` and ``combine``.

What one writes without this package: sort the assignments by expert, gather the rows in that
order, exchange, and bring what has landed into packed order; and all of it back. There is one over
``lax.ragged_all_to_all`` (:class:`Ragged`) and one over ``lax.all_to_all`` (:class:`Dense`). Either
serves as ``exchange`` of the MoE layers.

The contract is :func:`freeio_jax.dispatch`'s and :func:`freeio_jax.combine`'s, but for a rounding:
each row crosses a link by itself, so ``combine`` rounds once, at the end, and not once a rank.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import freeio_jax
from freeio_jax.arguments import dispatch_arguments
from freeio_jax.dtypes import accumulator_dtype
from freeio_jax.handle import Dispatched
from freeio_jax.layout import INT32_MAX, Layout
from freeio_jax.varying import vary, varying_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The way of each row, both ways. Indices are -1 where there is no row.

    Attributes:
      order: int32 ``[S]``: assignment ``t*K + k`` of each row of the send buffer.
      inverse: int32 ``[T, K]``: row of each assignment in the send buffer.
      arrival: int32 ``[capacity]``: row of the landing buffer of each packed row; None where rows
        land packed.
      back: int32 ``[L]``: packed row of each row of the landing buffer, or None.
      slices: of ``lax.ragged_all_to_all``, int32 ``[R * updates]`` each: what this rank sends to
        its peers (first rows here, sizes, first rows there), then what it gets from them (sizes,
        first rows here, first rows there). None where the exchange is dense.
    """

    order: jax.Array
    inverse: jax.Array
    arrival: jax.Array | None
    back: jax.Array | None
    slices: tuple[jax.Array, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BaselineHandle:
    """As :class:`freeio_jax.Handle`: the public fields, and the plan."""

    expert_load: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    _plan: Plan
    _layout: Layout = dataclasses.field(metadata={"static": True})
    _axis_name: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def has_row(self) -> jax.Array:
        return self._plan.inverse >= 0


# --- Rows by index, with gradients that gather, too: XLA's scatters are slow --------------------


def _take(rows, index):
    """``rows[index]``, zero where ``index`` is negative."""
    taken = jnp.take(rows, jnp.maximum(index, 0), axis=0, mode="clip")
    return jnp.where(_column(index >= 0, taken), taken, jnp.zeros((), rows.dtype))


def _column(values, like):
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


@jax.custom_vjp
def _move(rows, to, back):
    """Row i of the result is ``rows[to[i]]``; ``back`` is the inverse of ``to``."""
    return _take(rows, to)


_move.defvjp(
    lambda rows, to, back: (_take(rows, to), (to, back)),
    lambda res, ct: (_take(ct, res[1]), None, None),
)


@jax.custom_vjp
def _gather_tokens(tokens, order, inverse):
    """The send buffer: the token of each assignment, in sorted order."""
    return _take(tokens, jnp.where(order >= 0, order // inverse.shape[1], -1))


_gather_tokens.defvjp(
    lambda tokens, order, inverse: (_gather_tokens(tokens, order, inverse), (order, inverse)),
    lambda res, ct: (sum_rows(ct, None, *res), None, None),
)


@jax.custom_vjp
def sum_rows(rows, weights, order, inverse):
    """``[T, ...]``: the sum of each token's rows, with their weights, in float32."""
    dtype = accumulator_dtype(rows.dtype)
    taken = _take(rows, inverse).astype(dtype)
    if weights is not None:
        # Select the weight before multiplying: the one of a skipped id may be NaN.
        taken = taken * _column(jnp.where(inverse >= 0, weights.astype(dtype), 0), taken)
    return jnp.sum(taken, axis=1).astype(rows.dtype)


def _sum_rows_backward(residuals, ct):
    rows, weights, order, inverse = residuals
    by_rows, by_weights = _gather_tokens(ct, order, inverse), None
    if weights is not None:
        dtype = accumulator_dtype(rows.dtype)
        weight_of_row = _take(weights.reshape(-1).astype(dtype), order)
        by_rows = (by_rows.astype(dtype) * _column(weight_of_row, by_rows)).astype(rows.dtype)
        taken = _take(rows, inverse).astype(dtype)
        product = taken * ct.astype(dtype)[:, None]
        by_weights = jnp.sum(product, axis=tuple(range(2, taken.ndim))).astype(weights.dtype)
    return by_rows, by_weights, None, None


sum_rows.defvjp(lambda *args: (sum_rows(*args), args), _sum_rows_backward)


# --- The two exchanges ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Baseline:
    """What both exchanges share: routing, the sort, packing, and the sum."""

    def dispatch(
        self,
        tokens: Any,
        topk_idx: jax.Array,
        *,
        num_experts: int,
        axis_name: str | tuple[str, ...],
        capacity: int | None = None,
        alignment: int = 1,
        zero_tail: bool = True,
    ) -> Dispatched:
        """As :func:`freeio_jax.dispatch`; only this class's ``combine`` takes its handle.

        Rows past the end are zero, whatever ``zero_tail`` says.
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
        me = lax.axis_index(axes)
        num_ranks, local = layout.num_ranks, layout.experts_per_rank
        ids = topk_idx.reshape(-1)
        valid = (ids >= 0) & (ids < num_experts)
        # Invalid ids go behind the last expert, and so past every row.
        expert = jnp.where(valid, ids, num_experts)
        counts = jnp.sum(
            expert[:, None] == jnp.arange(num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32
        )
        # [source, destination, local expert]
        routed = lax.all_gather(counts, axes).reshape(num_ranks, num_ranks, local)
        load = jnp.sum(routed, axis=0)[me]
        sent = self._admitted(routed, layout)
        # Capacity cuts the end of the packed rows, and so the end of what a rank sends to another:
        # its rows for one expert lie before those for the next.
        sent_load = jnp.sum(sent, axis=0)
        starts = layout.group_starts(sent_load)[None] + _before(sent, axis=0)
        kept = jnp.clip(layout.capacity - starts, 0, sent)
        order = _sorted(expert, num_experts)
        # Of the assignments to one expert the first ones are kept; of the invalid ones, none.
        first, room = (jnp.append(a, 0) for a in (_before(counts), kept[me].reshape(-1)))
        within = jnp.arange(ids.size, dtype=jnp.int32) - first[expert[order]]
        order = jnp.where(within < room[expert[order]], order, -1)
        plan = self._plan(order, routed, kept, starts, me, layout)
        handle = BaselineHandle(
            expert_load=load,
            num_dropped=jnp.sum(load) - jnp.sum(kept[:, me], dtype=jnp.int32),
            num_invalid=jnp.sum(~valid & (ids != -1), dtype=jnp.int32),
            _plan=plan,
            _layout=layout,
            _axis_name=axes,
        )

        def exchange(leaf):
            if not layout.num_assignments or not layout.capacity:
                return jnp.zeros((layout.capacity, *leaf.shape[1:]), leaf.dtype)
            # Under one type of variation, so that custom gradients have their primals' type.
            leaf, p = vary_alike(leaf, plan)
            landed = self._exchange(_gather_tokens(leaf, p.order, p.inverse), p, layout, axes, True)
            return landed if p.arrival is None else _move(landed, p.arrival, p.back)

        rows = jax.tree_util.tree_unflatten(treedef, [exchange(leaf) for leaf in leaves])
        return Dispatched(rows, layout.group_sizes(sent_load[me]), handle)

    def combine(
        self,
        expert_out: jax.Array,
        handle: BaselineHandle,
        topk_weights: jax.Array | None = None,
    ) -> jax.Array:
        """As :func:`freeio_jax.combine`, rounding once."""
        layout, axes = handle._layout, handle._axis_name
        if not layout.num_assignments or not layout.capacity:
            return jnp.zeros((layout.num_tokens, *expert_out.shape[1:]), expert_out.dtype)
        expert_out, plan, topk_weights = vary_alike(expert_out, handle._plan, topk_weights)
        if plan.arrival is not None:
            expert_out = _move(expert_out, plan.back, plan.arrival)
        rows = self._exchange(expert_out, plan, layout, axes, False)
        return sum_rows(rows, topk_weights, plan.order, plan.inverse)

    def _admitted(self, routed, layout):
        """Of the ``routed`` assignments ``[R, R, E/R]``, those that the exchange has room for."""
        return routed


def _sorted(expert, num_experts):
    """Assignments in order of expert, ties in their own order."""
    size = expert.size
    if (num_experts + 1) * size > INT32_MAX:
        return jnp.argsort(expert, stable=True).astype(jnp.int32)
    # One sort of one array of distinct numbers: XLA has a radix sort for that.
    return lax.sort(expert * size + jnp.arange(size, dtype=jnp.int32), is_stable=False) % size


def _inverse(index, size):
    """``inverse[index[i]] = i`` for those i with an index; -1 elsewhere."""
    position = jnp.arange(index.size, dtype=jnp.int32)
    empty = jnp.full(size, -1, jnp.int32)
    return empty.at[jnp.where(index >= 0, index, size)].set(position, mode="drop")


def _assignments(order, layout):
    """The row of each assignment ``[T, K]`` in a buffer of the assignments ``order``."""
    return _inverse(order, layout.num_assignments).reshape(layout.num_tokens, layout.top_k)


def vary_alike(*args):
    axes = varying_axes(*jax.tree.leaves(args))
    return jax.tree.map(lambda a: vary(a, axes), args)


def _before(sizes, axis=-1):
    """Exclusive sums."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _arrivals(kept, starts, landing, me, layout, size):
    """Landing row of each packed row, where what a peer sends lies together, expert by expert.

    ``landing`` ``[R]``: the first row of what each source sends to this rank.
    """
    mine = kept[:, me]  # [source, local expert]
    first = landing[:, None] + _before(mine)
    row = jnp.arange(layout.capacity, dtype=jnp.int32)
    # Groups of packed rows in their order: expert by expert, and in it source by source.
    begins = starts[:, me].T.reshape(-1)
    group = jnp.sum(begins[None, :] <= row[:, None], axis=1, dtype=jnp.int32) - 1
    within = row - begins[group]
    there = within < mine.T.reshape(-1)[group]
    arrival = jnp.where(there, first.T.reshape(-1)[group] + within, -1)
    return arrival, _inverse(arrival, size)


@dataclasses.dataclass(frozen=True)
class Dense(_Baseline):
    """``lax.all_to_all`` over as many slots between each pair of ranks.

    Attributes:
      slots_factor: slots of a pair, as a multiple of their share ``T*K/R`` of an even load. What
        does not fit is dropped and counted; R, the number of ranks, always suffices.
      slots: their number, instead.
    """

    slots_factor: float = 1.25
    slots: int | None = None

    def _slots(self, layout):
        if self.slots is not None:
            return self.slots
        share = -(-self.slots_factor * layout.num_assignments // layout.num_ranks)
        return min(int(share), layout.num_assignments)

    def _admitted(self, routed, layout):
        return jnp.clip(self._slots(layout) - _before(routed), 0, routed)

    def _plan(self, order, routed, kept, starts, me, layout):
        slots, num_ranks = self._slots(layout), layout.num_ranks
        slot = jnp.arange(slots, dtype=jnp.int32)
        first = _before(jnp.sum(routed[me], axis=-1))[:, None]  # of each destination, in `order`
        in_slot = jnp.where(
            slot < jnp.sum(kept[me], axis=-1)[:, None], _take(order, first + slot), -1
        ).reshape(-1)
        landing = jnp.arange(num_ranks, dtype=jnp.int32) * slots
        arrival, back = _arrivals(kept, starts, landing, me, layout, num_ranks * slots)
        return Plan(in_slot, _assignments(in_slot, layout), arrival, back, None)

    def _exchange(self, rows, plan, layout, axes, forward):
        return lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)


@dataclasses.dataclass(frozen=True)
class Ragged(_Baseline):
    """``lax.ragged_all_to_all``, with what goes to a peer split into many updates.

    XLA runs one block of 128 threads for each update, so their number decides the speed.

    Attributes:
      updates: of each peer, of equal size.
      by_expert: as many for each of the peer's experts, ``updates`` at least in all, that land in
        packed order at once. False: what a peer sends lands together, and another gather brings it
        into packed order.
    """

    updates: int = 128
    by_expert: bool = False

    def _plan(self, order, routed, kept, starts, me, layout):
        # First row of what goes to each expert, or rank, in every rank's send buffer.
        send = _before(routed.reshape(layout.num_ranks, -1)).reshape(routed.shape)
        sizes, land, arrival, back = kept, starts, None, None
        if not self.by_expert:
            send, sizes = send[..., :1], jnp.sum(kept, axis=-1, keepdims=True)
            land = _before(sizes, axis=0)
            arrival, back = _arrivals(kept, starts, land[:, me, 0], me, layout, layout.capacity)
        parts = -(-self.updates // sizes.shape[-1])
        cuts = sizes[..., None] * jnp.arange(parts + 1, dtype=jnp.int32) // parts
        within, sizes = cuts[..., :-1], jnp.diff(cuts, axis=-1)
        send, land = send[..., None] + within, land[..., None] + within
        slices = (send[me], sizes[me], land[me], sizes[:, me], land[:, me], send[:, me])
        slices = tuple(a.reshape(-1) for a in slices)
        return Plan(order, _assignments(order, layout), arrival, back, slices)

    def _exchange(self, rows, plan, layout, axes, forward):
        return _ragged(rows, plan.slices, layout, axes, forward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _ragged(rows, slices, layout, axes, forward):
    """To the landing buffer, or back from it. Each is the other's transpose.

    JAX's own rule would exchange the offsets anew; all ranks know them all here.
    """
    send_here, send_size, send_there, get_size, get_here, get_there = slices
    if forward:
        size, offsets = layout.capacity, (send_here, send_size, send_there, get_size)
    else:
        size, offsets = layout.num_assignments, (get_here, get_size, get_there, send_size)
    into = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    into = vary(into, varying_axes(rows))
    return lax.ragged_all_to_all(rows, into, *offsets, axis_name=axes)


_ragged.defvjp(
    lambda rows, slices, *static: (_ragged(rows, slices, *static), slices),
    lambda layout, axes, forward, slices, ct: (
        _ragged(ct, slices, layout, axes, not forward),
        None,
    ),
)


def named(name: str, *, slots: int | None = None) -> Any:
    """The exchange of a name of :data:`NAMES`, for ``dispatch``, ``combine`` and the MoE layers.

    ``slots``: of ``dense``; None: its default.
    """
    if name == "dense":
        return Dense(slots=slots)
    if name == "freeio":
        return freeio_jax
    if name == "reference":
        return freeio_jax.reference
    if name == "on-demand":
        from freeio_jax.bench import on_demand  # which imports this file

        return on_demand
    return _RAGGED[name]


_RAGGED = {
    "ragged": Ragged(),
    "ragged-by-expert": Ragged(by_expert=True),
    "ragged-32": Ragged(32),
    "ragged-1": Ragged(1),
}
NAMES = ("freeio", "reference", *_RAGGED, "dense", "on-demand")
