"""Ranks that come at different times, as they do in a model: what that costs the last one."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import freeio_jax as fio
from freeio_jax.bench import processes, profile, timing
from freeio_jax.bench.floor import KERNELS
from freeio_jax.bench.programs import Program
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite, cases, some_milliseconds_of_work

#: By how much the last rank comes later than the others.
MILLISECONDS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
_REPEATS = 5


def run(
    report: Report,
    suites: Sequence[Suite],
    *,
    num_ranks: int,
    ops: Sequence[str],
    dtype: str,
    milliseconds: Sequence[float] = MILLISECONDS,
) -> None:
    """The kernel's time on the last rank, for each operation of freeio, when it comes late."""
    last = jax.devices()[num_ranks - 1]
    with processes.among([last]) as is_here:
        delay = _delay(last) if is_here else lambda milliseconds: None
    for case in cases(suites, num_ranks, dtype):
        programs = case.programs()
        report.table(
            f"The last rank's kernel: {case.name}, T={case.shape.num_tokens}",
            {"op": "operation"} | {_column(ms): f"{ms:g} ms late: us" for ms in milliseconds},
        )
        for op in ops:

            def measure(op=op, programs=programs):
                program = programs.build(fio, op, 1)
                return {
                    _column(ms): _kernel_seconds_on(last, program, op, lambda ms=ms: delay(ms))
                    for ms in milliseconds
                }

            report.guarded("late", {**case.about, "op": op}, measure)


def _column(milliseconds: float) -> str:
    return f"late_{round(milliseconds * 1000)}us_s"


def _kernel_seconds_on(
    device: jax.Device, program: Program, op: str, delay: Callable[[], object]
) -> float:
    """Median duration of the device's kernel; NaN where no profile shows any."""
    work = some_milliseconds_of_work()
    seconds = []
    for _ in range(_REPEATS):
        # The exchange before the delay brings all GPUs together, whatever their hosts did before.
        events = profile.record(program, ahead=lambda: (work(), program(), delay()))
        own = [e for e in events if e.device.endswith(f":{device.local_hardware_id}")]
        kernels = [event for event in own if re.search(KERNELS[op], event.name)]
        if kernels and processes.local([device]):
            seconds.append(max(kernels, key=lambda event: event.start).duration)
    seconds = [duration for of_process in processes.share(seconds) for duration in of_process]
    return statistics.median(seconds) if seconds else math.nan


def _delay(device: jax.Device) -> Callable[[float], object]:
    """Queues work of that many milliseconds on the device."""
    side = 2048 if device.platform == "gpu" else 64  # much less than a millisecond
    matrix = jax.device_put(jnp.zeros((side, side), jnp.bfloat16), device)

    @functools.partial(jax.jit, static_argnums=1)
    def multiply(a, times):
        for _ in range(times):
            a = a @ a
        return a

    unit = timing.seconds_per_run(lambda: multiply(matrix, 64), least=0.01) / 64
    return lambda milliseconds: multiply(matrix, round(milliseconds * 1e-3 / unit))
