"""Wall times, by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax

from freeio_jax.bench import processes


def compare(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call over ``repeats`` rounds; every round runs each call once.

    Implementations take turns, so that noise hits all alike.
    """
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


#: Runs that nobody waits for: XLA:CPU can hang beyond some 30.
MOST_RUNS = 20


def seconds_per_run(run: Callable[[], object], least: float = 0.1) -> float:
    """Median seconds of a run in a row of runs, so that the host's launches overlap the devices.

    After a warm-up. Seven samples, each of as many runs as take ``least`` seconds, ``MOST_RUNS`` at
    most; three samples where one run takes longer.
    """
    jax.block_until_ready(run())

    def sample(runs):
        begin = time.perf_counter()
        for _ in range(runs):
            result = run()  # the run before it gives its memory back
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / runs

    # All processes make as many: those that the first one finds right.
    runs = processes.share(min(MOST_RUNS, 1 + int(least / sample(1))))[0]
    return statistics.median(sample(runs) for _ in range(7 if runs > 1 else 3))
