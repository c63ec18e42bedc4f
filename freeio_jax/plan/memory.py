"""How much memory an exchange needs on each GPU, by the formulas of the engine itself."""

from __future__ import annotations

import dataclasses

from freeio_jax import _native
from freeio_jax.plan.traffic import Counts
from freeio_jax.rails import Rails


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each GPU; where ranks differ, on the one that needs most.

    Attributes:
      engine: what the CUDA engine owns, whatever the shapes.
      windows: what it would own besides, with room for all rows from other hosts. The kernels have
        less room, and use it in rounds.
      dispatch_scratch: a buffer of XLA's while dispatch runs.
      combine_scratch: likewise for combine.
      packed_rows: dispatch's result.
    """

    engine: int
    windows: int
    dispatch_scratch: int
    combine_scratch: int
    packed_rows: int


def memory(
    counts: Counts, rails: Rails, *, capacity: int, hidden: int, element_bytes: int
) -> Memory:
    """Of an exchange of rows of ``hidden`` elements.

    A window has room for all rows that land on a rail in one exchange, twice, because the next
    exchange may begin before all ranks have read the rows of the last one. Rows of dispatch land
    on the receivers, and those of combine on the senders of dispatch. The same window serves both.
    """
    pod, sizes = counts.pod, _native.cuda_sizes
    row_bytes = hidden * element_bytes
    shape = pod.num_ranks, pod.num_tokens, pod.top_k
    slots, flags = sizes.combine_scratch(*shape, hidden)
    landing = max(rails.received(counts.rows).max(), rails.sent(counts.rows).max())
    if pod.num_hosts > 1:
        # The sums of the host's ranks, and one for each other host.
        slots = pod.num_tokens * (
            min(pod.top_k, pod.num_gpus - 1) + min(pod.top_k, pod.num_hosts - 1)
        )
    return Memory(
        engine=sizes.owned_bytes(pod.num_gpus),
        windows=2 * int(landing) * row_bytes,
        dispatch_scratch=8 * sizes.dispatch_scratch(*shape),
        combine_scratch=slots * row_bytes + 4 * flags,
        packed_rows=capacity * row_bytes,
    )


def beyond_the_engine(counts: Counts) -> list[str]:
    """Why the CUDA engine of this installation does not take such an exchange; mostly empty."""
    pod, sizes = counts.pod, _native.cuda_sizes
    reasons = []
    if pod.num_hosts > 1:
        reasons.append(
            "the exchange has not been measured between machines, and these figures are of its "
            "design (docs/scaling.md)"
        )
    for name, value, most in (
        ("ranks in an NVLink domain", pod.num_gpus, sizes.max_ranks),
        ("experts", pod.num_experts, sizes.max_experts),
        ("experts of a token", pod.top_k, sizes.max_top_k),
    ):
        if value > most:
            reasons.append(f"at most {most} {name}, not {value}")
    return reasons
