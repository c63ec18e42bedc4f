"""The floor, in which each kind of access has its rate, beside one with a single rate for all.

With a single rate the link has the better one of loads and stores, and all bytes in memory that of
a copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import freeio_jax as fio
from freeio_jax.bench.floor import Limits, pulls
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite, cases, time_kernel

_COLUMNS = {
    "name": "shape",
    "num_tokens": "T",
    "op": "operation",
    "way": "over the link by",
    "floor_s": "floor us",
    "single_rate_s": "floor by a single rate us",
    "apart": "apart %",
}


def run(
    report: Report,
    limits: Limits,
    suites: Sequence[Suite],
    *,
    num_ranks: int,
    ops: Sequence[str],
    dtype: str,
) -> None:
    """Both floors of each operation of each shape; nothing is timed but the limits."""
    report.table("Floors", _COLUMNS)
    for case in cases(suites, num_ranks, dtype):
        programs, moved = case.programs(), case.traffic()
        for op in ops:

            def measure(op=op, programs=programs, moved=moved[op]):
                loads = pulls(op, time_kernel(programs.build(fio, op, 1), op).is_small)
                floor = limits.floor(moved, pulls=loads)
                single = dataclasses.replace(limits, pull=limits.link, write=limits.memory)
                by_single = single.floor(moved, pulls=True)
                return {
                    "way": "loads" if loads else "stores",
                    "floor_s": floor,
                    "single_rate_s": by_single,
                    "apart": floor / by_single - 1,
                }

            report.guarded("floors", {**case.about, "op": op}, measure)
    apart = [abs(record.get("apart", math.nan)) for record in report.data["floors"]]
    if any(map(math.isfinite, apart)):
        print(f"\nThe floors are apart by at most {max(filter(math.isfinite, apart)):.1%}.")
