"""The floor by one rate for all accesses, and by a rate for each kind of access."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import freeio_jax as fio
from freeio_jax.bench import processes, profile
from freeio_jax.bench.floor import KERNELS, PULLS, Limits
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite, cases

#: If both floors differ by less, one rate for all is good enough.
NEGLIGIBLE = 0.03

_COLUMNS = {
    "name": "shape",
    "num_tokens": "T",
    "op": "operation",
    "way": "over the link by",
    "floor_s": "floor us",
    "floor_by_rates_s": "floor by rates us",
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
                pulls = op in PULLS and not _is_small(programs.build(fio, op, 1), op)
                floor = limits.floor(moved)
                by_rates = limits.floor_by_rates(moved, pulls=pulls)
                return {
                    "way": "loads" if pulls else "stores",
                    "floor_s": floor,
                    "floor_by_rates_s": by_rates,
                    "apart": by_rates / floor - 1,
                }

            report.guarded("floors", {**case.about, "op": op}, measure)
    apart = [abs(record.get("apart", math.nan)) for record in report.data["floors"]]
    if any(map(math.isfinite, apart)):
        most = max(filter(math.isfinite, apart))
        verdict = "less" if most < NEGLIGIBLE else "more"
        print(f"\nThe floors are apart by at most {most:.1%}, {verdict} than {NEGLIGIBLE:.0%}.")


def _is_small(program, op: str) -> bool:
    """Whether the kernel is that of small calls, as the profile shows it."""
    names = {e.name for e in profile.record(program) if re.search(KERNELS[op], e.name)}
    return any(
        "small" in name for of_process in processes.share(sorted(names)) for name in of_process
    )
