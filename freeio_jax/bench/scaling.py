"""The same tokens per rank on more and more ranks: time, and how far it is from the floor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

import freeio_jax as fio
from freeio_jax.bench import timing
from freeio_jax.bench.floor import Limits
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Case, Suite, kernel_seconds

_COLUMNS = {
    "name": "shape",
    "num_tokens": "T",
    "op": "operation",
    "num_ranks": "R",
    "kernel_s": "kernel us",
    "floor_s": "floor us",
    "ratio": "kernel / floor",
    "link_bytes": "link MB",
    "link_rate": "link GB/s",
    "of_link": "of the link's rate %",
}


def numbers_of_ranks(num_devices: int) -> tuple[int, ...]:
    """2, 4, 8, ... up to all devices."""
    numbers = [2**i for i in range(1, num_devices.bit_length())]
    return (*(n for n in numbers if n < num_devices), num_devices)


def run(
    report: Report,
    suites: Sequence[Suite],
    *,
    devices: Sequence[jax.Device],
    ops: Sequence[str],
    dtype: str,
) -> None:
    """Times ``ops`` of freeio on 2, 4, ... ranks; the limits are measured anew for each number."""
    for num_ranks in numbers_of_ranks(len(devices)):
        limits = Limits.measure(devices[:num_ranks])
        print(f"# R={num_ranks}: {limits}", flush=True)
        limits_of = report.data["about"].setdefault("limits_of_ranks", {})
        limits_of[str(num_ranks)] = dataclasses.asdict(limits)
        report.table(f"Scaling, R={num_ranks}", _COLUMNS)
        for suite in suites:
            for num_tokens in suite.tokens:
                case = Case(suite, num_tokens, num_ranks, dtype)
                programs, moved = case.programs(), case.traffic()
                for op in ops:

                    def measure(op=op, case=case, programs=programs, moved=moved, limits=limits):
                        program = programs.build(fio, op, case.calls)
                        kernel = kernel_seconds(program, op)
                        if math.isnan(kernel):
                            kernel = timing.seconds_per_run(program) / case.calls
                        floor, link = limits.floor(moved[op]), moved[op].link_bytes
                        return {
                            "kernel_s": kernel,
                            "floor_s": floor,
                            "ratio": kernel / floor,
                            "link_bytes": link,
                            "link_rate": link / kernel,
                            "of_link": link / kernel / limits.link,
                        }

                    report.guarded("scaling", {**case.about, "op": op}, measure)
