"""The same tokens per rank on more and more ranks: time, and how far it is from the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

import freeio_jax as fio
from freeio_jax.bench import processes
from freeio_jax.bench.floor import Limits, pulls
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite, cases, time_kernel_or_wall

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
        with processes.among(devices[:num_ranks]) as takes_part:
            if takes_part:
                _run(report, suites, devices[:num_ranks], ops, dtype)
    processes.share(None)


def _run(report, suites, devices, ops, dtype):
    """On all of these devices."""
    num_ranks = len(devices)
    limits = Limits.measure(devices)
    print(f"# R={num_ranks}: {limits}", flush=True)
    limits_of = report.data["about"].setdefault("limits_of_ranks", {})
    limits_of[str(num_ranks)] = dataclasses.asdict(limits)
    fitting = [suite for suite in suites if suite.num_experts % num_ranks == 0]
    for suite in suites:
        if suite not in fitting:
            print(f"# {suite.name}: {suite.num_experts} experts are not {num_ranks} equal parts")
    report.table(f"Scaling, R={num_ranks}", _COLUMNS)
    for case in cases(fitting, num_ranks, dtype):
        programs, moved = case.programs(), case.traffic()
        for op in ops:

            def measure(op=op, case=case, programs=programs, moved=moved, limits=limits):
                program = programs.build(fio, op, case.calls)
                kernel = time_kernel_or_wall(program, op)
                seconds, loads = kernel.seconds, pulls(op, kernel.is_small)
                floor, link = limits.floor(moved[op], pulls=loads), moved[op].link_bytes
                return {
                    "kernel_s": seconds,
                    "floor_s": floor,
                    "ratio": seconds / floor,
                    "link_bytes": link,
                    "link_rate": link / seconds,
                    "of_link": link / seconds / (limits.pull if loads else limits.push),
                }

            report.guarded("scaling", {**case.about, "op": op}, measure)
