"""What the kernels' own time stamps say: how long an exchange spends on what.

Only a build with ``FREEIO_STAMPS`` has them (CONTRIBUTING.md). Its kernels are slower than the
shipped ones, so the benchmark shows both times. Each CTA keeps a timeline: when it began and ended,
and how long it spent in each phase (``xla_ffi/cuda/timeline.h``).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

#: When a CTA began and ended, and how long it spent in each phase, in nanoseconds.
Timeline = tuple[int, int, Sequence[int]]

#: The phases whose time is a part by itself. All other time is the rest.
_PART_OF_PHASE = {"agreeing": "agreement_s", "routing": "routing_s", "moving": "transfer_s"}


def are_there(native: Any) -> bool:
    """Whether the kernels of this native module have time stamps."""
    return hasattr(getattr(native, "cuda", None), "take_timelines")


def span(timelines: Sequence[Timeline]) -> float:
    """Seconds from the first CTA's beginning to the last one's end."""
    return (max(end for _, end, _ in timelines) - min(begin for begin, *_ in timelines)) * 1e-9


def parts(phases: Sequence[str], timelines: Sequence[Timeline]) -> dict[str, float]:
    """How the span of one rank's kernel divides, in seconds.

    Each part is the mean over the CTAs. Agreement also has the time in which all CTAs have done
    their own work, and the kernel waits until the peers no longer read this rank's buffers. The
    rest is the opening, and the time in which some CTAs have not begun or have ended before others.
    """
    seconds = dict.fromkeys((*_PART_OF_PHASE.values(), "rest_s"), 0.0)
    for name, part in _PART_OF_PHASE.items():
        index = phases.index(name)
        seconds[part] += statistics.fmean(spent[index] for *_, spent in timelines) * 1e-9
    finishing = phases.index("finishing")
    work_ends = max(end - spent[finishing] for _, end, spent in timelines)
    seconds["agreement_s"] += (max(end for _, end, _ in timelines) - work_ends) * 1e-9
    seconds["rest_s"] = span(timelines) - sum(seconds.values())
    return seconds


def step(timelines: Sequence[Timeline]) -> float:
    """Seconds by which the GPU's clock advances at a time, as far as these times show."""
    times = sorted({time for begin, end, _ in timelines for time in (begin, end)})
    return min((b - a for a, b in itertools.pairwise(times)), default=0) * 1e-9
