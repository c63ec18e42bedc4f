"""The plan of one exchange: all its figures together."""

from __future__ import annotations

import dataclasses

from freeio_jax.layout import balanced_capacity, dropless_capacity, round_up
from freeio_jax.plan.memory import Memory, beyond_the_engine, memory
from freeio_jax.plan.predict import Prediction, predict
from freeio_jax.plan.rates import Rates
from freeio_jax.plan.routing import Pod
from freeio_jax.plan.traffic import OPERATIONS, Counts, Traffic, traffic
from freeio_jax.rails import Rails, even_rails, lower_bound


@dataclasses.dataclass(frozen=True)
class Plan:
    """All figures of one exchange; see :func:`make`."""

    pod: Pod
    row_bytes: int
    capacity: int
    rails: dict[str, int]
    moved: dict[str, Traffic]
    predictions: dict[str, Prediction]
    memory: Memory
    beyond: list[str]


def make(
    counts: Counts,
    rates: Rates,
    *,
    hidden: int,
    element_bytes: int,
    capacity: int,
    zero_tail: bool = True,
    even: bool = True,
) -> Plan:
    """Plans an exchange.

    Args:
      counts: of the routing.
      rates: of the machine.
      hidden: elements of a row.
      element_bytes: of one of them.
      capacity: packed rows of a rank.
      zero_tail: as in ``freeio_jax.dispatch``.
      even: whether rails are chosen by :func:`freeio_jax.rails.even_rails`.
    """
    pod, row_bytes = counts.pod, hidden * element_bytes
    same = Rails.same(pod.num_hosts, pod.num_gpus)
    levelled = even_rails(counts.rows)
    rails = levelled if even else same
    moved = traffic(counts, rails, capacity=capacity, row_bytes=row_bytes, zero_tail=zero_tail)
    return Plan(
        pod=pod,
        row_bytes=row_bytes,
        capacity=capacity,
        rails={
            "busiest_same": same.busiest(counts.rows) * row_bytes,
            "busiest_even": levelled.busiest(counts.rows) * row_bytes,
            "lower_bound": lower_bound(counts.rows) * row_bytes,
            "forwarded": levelled.forwarded(counts.rows) * row_bytes,
        },
        moved=moved,
        predictions={op: predict(op, moved[op], rates, pod, row_bytes) for op in OPERATIONS},
        memory=memory(counts, rails, capacity=capacity, hidden=hidden, element_bytes=element_bytes),
        beyond=beyond_the_engine(counts),
    )


def capacity_of(counts: Counts, factor: float) -> int:
    """Packed rows of a rank: ``factor`` times T*K, but enough for the routing; 0: the bound.

    They are never more than what the dropless bound takes.

    Args:
      factor: not negative, and finite.
    """
    pod = counts.pod
    sizes = {
        "num_ranks": pod.num_ranks,
        "num_tokens": pod.num_tokens,
        "top_k": pod.top_k,
        "num_experts": pod.num_experts,
        "alignment": 1,
    }
    if factor == 0:
        return dropless_capacity(**sizes)
    # R times T*K are all assignments. A larger factor could only overflow.
    share = balanced_capacity(min(factor, pod.num_ranks), **sizes)
    return round_up(max(share, int(counts.loads.max())), 8)
