"""Wall times of several implementations in one run, taken in turns so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax


def compare(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call over ``repeats`` rounds; every round runs each call once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            result = jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
            del result
    return {name: statistics.median(samples) for name, samples in times.items()}
