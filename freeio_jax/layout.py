"""Layout: the static geometry of one exchange. All size arithmetic is here and only here.

The C++ twin is ``xla_ffi/core/layout.h``; ``tests/test_layout.py`` checks one against the other.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import jax.numpy as jnp
import numpy as np

INT32_MAX = 2**31 - 1


def round_up(size, multiple):
    """The smallest multiple of ``multiple`` that is at least ``size`` (numbers or arrays)."""
    return (size + multiple - 1) // multiple * multiple


def dropless_capacity(
    *, num_ranks: int, num_tokens: int, top_k: int, num_experts: int, alignment: int
) -> int:
    """Rows that always suffice on one rank when each token names distinct experts.

    ``R*T*min(K, E/R)`` rows, plus what ``alignment`` can add: at most ``alignment - 1`` rows for
    each group that is not empty, and never more than every group holding all ``R*T`` tokens.
    """
    experts_per_rank = num_experts // num_ranks
    rows = num_ranks * num_tokens * min(top_k, experts_per_rank)
    busy_groups = min(experts_per_rank, rows)
    padded = (rows + busy_groups * (alignment - 1)) // alignment * alignment
    return min(padded, experts_per_rank * round_up(num_ranks * num_tokens, alignment))


def balanced_capacity(
    factor: float,
    *,
    num_ranks: int,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    alignment: int,
) -> int:
    """Rows for ``factor`` times ``T*K``, which is a rank's share of evenly spread assignments.

    It includes the rows that ``alignment`` adds to groups, and never exceeds the dropless bound.

    Raises:
      ValueError: ``factor`` is not a positive, finite number.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(
            f"capacity_factor must be a positive number, got {factor!r}. Use None to drop nothing."
        )
    padding = num_experts // num_ranks * (alignment - 1)
    share = round_up(math.ceil(num_tokens * top_k * factor) + padding, alignment)
    bound = dropless_capacity(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        alignment=alignment,
    )
    return min(share, bound)


#: Most bytes of a GPU's windows, in which rows from other hosts land.
WINDOW_BYTES = 512 << 20


def window_part_bytes(num_hosts: int) -> int:
    """Bytes of a part of a window: a power of two, so that all windows fit in WINDOW_BYTES.

    A GPU has a window for each host. A window has two halves, and a half three parts: what comes
    in, what comes back, and what goes back.
    """
    parts = 2 * 3 * num_hosts
    return 1 << max(WINDOW_BYTES // parts, 1).bit_length() - 1


def symmetric_heap_bytes(landing_bytes: int) -> int:
    """Bytes of NVSHMEM's heap, where it cannot grow: the windows, and room for what it keeps."""
    return landing_bytes + (256 << 20)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Geometry of one exchange: hashable, known at trace time, equal on all ranks.

    Attributes:
      num_ranks: R, size of the expert axis.
      num_tokens: T, tokens of one rank.
      top_k: K, assignments of one token.
      num_experts: E, experts of all ranks together.
      capacity: rows of one rank's packed output.
      alignment: every group size is a multiple of it.
      zero_tail: whether the packed rows past the last group are zero; else they are unspecified.
    """

    num_ranks: int
    num_tokens: int
    top_k: int
    num_experts: int
    capacity: int
    alignment: int = 1
    zero_tail: bool = True

    @classmethod
    def create(
        cls,
        *,
        num_ranks: int,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        capacity: int | None = None,
        alignment: int = 1,
        zero_tail: bool = True,
    ) -> Layout:
        """Checks the geometry; ``capacity=None`` means the dropless bound.

        Raises:
          TypeError: a size is not an int, or ``zero_tail`` not a bool.
          ValueError: a size is out of range, or the sizes do not fit together.
        """
        for name, value, least in (
            ("num_experts", num_experts, 1),
            ("alignment", alignment, 1),
            ("capacity", 0 if capacity is None else capacity, 0),
        ):
            try:
                # A bool and a tracer have __index__ as well; the tracer's raises a TypeError.
                size = None if isinstance(value, bool) else operator.index(value)
            except TypeError:
                size = None
            if size is None:
                raise TypeError(
                    f"dispatch: {name} must be a static int, got {value!r} of type "
                    f"{type(value).__name__}. Sizes shape the output, so they cannot be traced: "
                    "pass a Python int."
                )
            if size < least:
                raise ValueError(f"dispatch: {name} must be at least {least}, got {value}.")
        if not isinstance(zero_tail, (bool, np.bool_)):
            raise TypeError(
                f"dispatch: zero_tail must be True or False, got {zero_tail!r} of type "
                f"{type(zero_tail).__name__}. It decides what is compiled, so it cannot be traced."
            )
        num_experts, alignment = int(num_experts), int(alignment)
        if num_experts % num_ranks:
            below = num_experts // num_ranks * num_ranks
            raise ValueError(
                f"dispatch: num_experts={num_experts} does not divide evenly over the {num_ranks} "
                f"ranks of the expert axis. Use {below + num_ranks} experts"
                + (f" or {below}" if below else "")
                + ", or another mesh axis."
            )
        if capacity is None:
            capacity = dropless_capacity(
                num_ranks=num_ranks,
                num_tokens=num_tokens,
                top_k=top_k,
                num_experts=num_experts,
                alignment=alignment,
            )
        capacity = int(capacity)
        if capacity % alignment:
            raise ValueError(
                f"dispatch: capacity={capacity} is not a multiple of alignment={alignment}, so a "
                "group size could not be one either. Use "
                f"capacity={round_up(capacity, alignment)}."
            )
        sizes = num_ranks, num_tokens, top_k, num_experts, capacity, alignment
        layout = cls(*sizes, bool(zero_tail))
        for name, rows in (
            ("capacity", capacity),
            ("alignment", alignment),
            ("num_ranks * num_tokens * top_k", num_ranks * layout.num_assignments),
        ):
            if rows > INT32_MAX:
                raise ValueError(
                    f"dispatch: {name} = {rows} does not fit in int32, which counts rows here. "
                    "Pass a smaller capacity or alignment, or fewer tokens per call."
                )
        return layout

    @property
    def experts_per_rank(self) -> int:
        """E/R: rank r hosts experts [r*E/R, (r+1)*E/R)."""
        return self.num_experts // self.num_ranks

    @property
    def num_assignments(self) -> int:
        """T*K: assignments that one rank makes."""
        return self.num_tokens * self.top_k

    def group_sizes(self, expert_load):
        """Group sizes for the loads ``[..., E/R]`` of one rank: aligned, then cut at capacity."""
        return jnp.diff(self._group_ends(expert_load), axis=-1, prepend=0).astype(jnp.int32)

    def group_starts(self, expert_load):
        """First row of each group, at most capacity, for the loads ``[..., E/R]`` of one rank."""
        end = self._group_ends(expert_load)
        return end - jnp.diff(end, axis=-1, prepend=0)

    def _group_ends(self, expert_load):
        """First row behind each group."""
        rows = round_up(expert_load, self.alignment)
        return jnp.minimum(jnp.cumsum(rows, axis=-1), self.capacity)
