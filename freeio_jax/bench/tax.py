"""The collective tax: what an exchange takes beside the time that its bytes need on the link.

The ideal time is that of the rows that must cross the link, each once for each token and remote
rank, at the link's measured rate. It is the same for all exchanges. A total divides into parts:

* agreement: until a rank knows what it gets and may touch its peers' buffers. Counts, addresses and
  flags, and the arrival of peers.
* routing: to find out which row goes where. Sorts, counts, indices.
* shuffling: rows are copied before and after the transfer, and buffers are filled with zeros.
* transfer: rows on their way, their summation where it is the same kernel, and until they arrive.
* rest: all other time. For XLA's exchanges the gaps between kernels.

XLA's parts come from the profile. Its kernels are told apart by their names, and those of fusions
by the size of their results in the compiled program. In one process, a collective's time before the
last rank has begun it is agreement: it waits for a peer to arrive. Several processes have a clock
each, so there this time is part of the transfer.

This package's operation is one kernel. Its parts come from time stamps in a build that is not the
shipped one (:mod:`freeio_jax.bench.stamps`), and add up to that build's total, which is beside the
shipped one's. It has no shuffling; where a kernel copies a row twice (small calls), it does so
within the transfer.

Kernels that put rows to other hosts have no time stamps. There the parts of this package's exchange
come from the profile, too: its waits are in the transfer. ``on-demand`` puts rows by such a kernel,
too, when all ranks have agreed by XLA's collectives (:mod:`freeio_jax.bench.on_demand`).

On CPU there is neither a link to measure nor a profile of kernels: only the totals are shown, by
the host's clock.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from freeio_jax import _native
from freeio_jax.bench import on_demand, processes, profile, stamps, timing
from freeio_jax.bench.floor import Limits
from freeio_jax.bench.profile import Event
from freeio_jax.bench.report import Report, draw
from freeio_jax.bench.shapes import Case, Suite, cases, some_milliseconds_of_work, time_kernel

OPS = ("dispatch", "combine")
PARTS = ("agreement", "routing", "shuffling", "transfer", "rest")
#: Runs whose stamps are averaged.
STAMPED_RUNS = 20

_COLUMNS = {
    "name": "shape",
    "num_tokens": "T",
    "num_ranks": "R",
    "op": "operation",
    "exchange": "exchange",
    "wall_s": "wall us",
    "total_s": "total us",
    "ideal_s": "ideal us",
    "of_ideal": "x ideal",
    "stamped_s": "with stamps us",
    **{f"{part}_s": f"{part} us" for part in PARTS},
}


def run(
    report: Report,
    suites: Sequence[Suite],
    *,
    devices: Sequence[jax.Device],
    numbers_of_ranks: Iterable[int],
    exchanges: Sequence[str],
    dtype: str,
    stamped: Sequence[Mapping[str, Any]] = (),
    png: pathlib.Path | None = None,
) -> None:
    """Times dispatch and combine of each exchange on each number of ranks.

    Args:
      stamped: records of freeio's exchanges from a build with time stamps.
      png: two pictures, whose names it begins.
    """
    if _has_stamps(devices):
        exchanges = ["freeio"]
        print("# This build's kernels have time stamps: freeio alone, and slower than as shipped")
    stamped = {_key(record): record for record in stamped}
    for num_ranks in numbers_of_ranks:
        with processes.among(devices[:num_ranks]) as takes_part:
            if takes_part:
                _run(report, suites, devices[:num_ranks], exchanges, dtype, stamped)
    processes.share(None)
    if png is not None:
        plot_latency(report.data["tax"], png.with_name(f"{png.stem}-latency{png.suffix}"))
        plot_parts(report.data["tax"], png.with_name(f"{png.stem}-parts{png.suffix}"))


def read_stamped(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run of a build with time stamps.

    Raises:
      ValueError: the file has none.
    """
    records = [r for r in json.loads(path.read_text()).get("tax", []) if "stamped_s" in r]
    if not records:
        raise ValueError(
            f"{path}: it has no record of a build with time stamps. Make one with "
            "python freeio_jax/bench/stamped.py NATIVE_MODULE --tax --json FILE (CONTRIBUTING.md)"
        )
    return records


def _key(record):
    """What two records of one operation on one shape have in common."""
    sizes = ("num_tokens", "num_ranks", "hidden", "top_k", "num_experts", "dtype", "capacity")
    return tuple(record[name] for name in ("name", "op", "exchange", "processes", *sizes))


def _run(report, suites, devices, exchanges, dtype, stamped):
    """On all of these devices."""
    limits = Limits.measure(devices)
    num_ranks = len(devices)
    print(f"# R={num_ranks}: {limits}", flush=True)
    limits_of = report.data["about"].setdefault("limits_of_ranks", {})
    limits_of[str(num_ranks)] = dataclasses.asdict(limits)
    report.table(f"Collective tax, R={num_ranks}", _COLUMNS)
    ahead = _names_ahead()
    between_hosts = on_demand.carrier(devices)
    fitting = [suite for suite in suites if suite.num_experts % num_ranks == 0]
    for case in cases(fitting, num_ranks, dtype):
        programs, moved = case.programs(), case.traffic()
        wanted = [(name, op) for name in exchanges for op in OPS]
        futures = programs.build_all(((case.exchange(n), op) for n, op in wanted), case.calls)
        for (name, op), future in zip(wanted, futures, strict=True):
            about = {**case.about, "op": op, "exchange": name}
            about["processes"] = jax.process_count()
            ideal = moved[op].link_bytes / limits.link
            if between_hosts and name in ("freeio", "on-demand"):
                about["exchange"] = f"{name} over {between_hosts}"
            if name == "freeio" and not between_hosts:
                parts = stamped.get(_key(about), {})
                measure = functools.partial(_measure_ours, future, op, devices, ahead, parts)
            else:
                measure = functools.partial(_measure_xlas, future, case, ahead)
            report.guarded("tax", about, lambda m=measure, i=ideal: _against(i, m()))


def _against(ideal, record):
    return {
        **record,
        "ideal_s": ideal,
        "of_ideal": record["total_s"] / ideal if ideal else math.nan,
    }


# --- Ours ----------------------------------------------------------------------------------------


def _has_stamps(devices):
    return stamps.are_there(_native) and devices[0].platform == "gpu"


def _measure_ours(future, op, devices, ahead, stamped):
    program = future.result()
    times = _times(program, _events(program, ahead))
    if not _has_stamps(devices):
        parts = {name: stamped[name] for name in (f"{p}_s" for p in PARTS) if name in stamped}
        kernel = {"kernel_s": time_kernel(program, op).seconds}
        return times | kernel | parts | {"stamped_s": stamped.get("stamped_s", math.nan)}
    phases = _native.cuda.phases
    own = [device.local_hardware_id for device in processes.local(devices)]
    found = []
    for _ in range(STAMPED_RUNS):
        for ordinal in own:
            _native.cuda.take_timelines(ordinal)
        jax.block_until_ready((some_milliseconds_of_work()(), program()))
        for ordinal in own:
            timelines = _native.cuda.take_timelines(ordinal)
            step = stamps.step(timelines)
            found.append(stamps.parts(phases, timelines) | {"timer_step_s": step})
    found = [one for of_process in processes.share(found) for one in of_process]
    parts = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    kernel = sum(parts[f"{part}_s"] for part in PARTS if part != "shuffling")
    # What the total has beside the kernel: the gap before it, and what makes its calls depend on
    # each other.
    parts["rest_s"] += times["total_s"] - kernel
    return times | parts | {"shuffling_s": 0.0, "stamped_s": times["total_s"], "kernel_s": kernel}


# --- XLA's ---------------------------------------------------------------------------------------

#: Kernels that exchange sizes, or wait for peers, and move no rows.
_AGREEMENT = re.compile(
    r"nccl\w*(all_?gather|all_?reduce|broadcast)|all_?(gather|reduce)\w*kernel|barrier",
    re.IGNORECASE,
)
#: Numbers that go to the host, which decides with them, or come from it.
_HOST_COPY = re.compile(r"^memcpy(d2h|h2d)", re.IGNORECASE)


def part_of(name: str, row_kernels: frozenset[str]) -> str:
    """Which part of the tax an event of XLA's exchanges is, by its name.

    ``row_kernels``: names of fusions whose results are rows (:func:`row_kernels`).
    """
    if _HOST_COPY.search(name) or _AGREEMENT.search(name):
        return "agreement"
    if profile.COMMUNICATION.search(name):
        return "transfer"
    if name in row_kernels or name.lower().startswith(("memcpy", "memset")):
        return "shuffling"
    return "routing"


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(", re.MULTILINE)
_ARRAY = re.compile(r"\w+\[([\d,]+)\]")


def row_kernels(program_text: str, num_elements: int) -> frozenset[str]:
    """Names that kernels have whose instructions give arrays of at least so many elements."""
    names = set()
    for name, result in _INSTRUCTION.findall(program_text):
        sizes = [math.prod(map(int, shape.split(","))) for shape in _ARRAY.findall(result)]
        if max(sizes, default=0) >= num_elements:
            names.add(re.sub(r"\W", "_", name))
    return frozenset(names)


def _arrivals(events: Sequence[Event]) -> list[Event]:
    """Splits each collective on several devices where its last device begins it.

    The first part is named a barrier. Left as they are: kernels that not all devices have run
    equally often.
    """
    by_name: dict[str, dict[str, list[Event]]] = {}
    for event in sorted(events, key=lambda e: e.start):
        by_name.setdefault(event.name, {}).setdefault(event.device, []).append(event)
    devices = {event.device for event in events}
    split = []
    for name, of_devices in by_name.items():
        lists = list(of_devices.values())
        alike = len(lists) == len(devices) and len({len(some) for some in lists}) == 1
        if not (profile.COMMUNICATION.search(name) and alike):
            split += [event for some in lists for event in some]
            continue
        for together in zip(*lists, strict=True):
            last = max(event.start for event in together)
            for event in together:
                wait = min(event.duration, last - event.start)
                begin, left = event.start + wait, event.duration - wait
                if wait > 0:
                    split.append(Event(event.device, "barrier", event.start, wait))
                split.append(Event(event.device, name, begin, left))
    return split


def parts_of_events(events: Sequence[Event], rows: frozenset[str]) -> dict[str, float]:
    """Seconds of each part, mean over the devices; empty where there are no events.

    What runs at the same time counts once: as transfer, else as agreement, shuffling or routing.
    """
    devices = sorted({event.device for event in events})
    if not devices:
        return {}
    events = _arrivals(events)
    sums: Counter[str] = Counter()
    for device in devices:
        mine = [event for event in events if event.device == device]
        before, counted = 0.0, []
        for part in ("transfer", "agreement", "shuffling", "routing"):
            counted += [event for event in mine if part_of(event.name, rows) == part]
            busy = profile.busy(counted)
            sums[f"{part}_s"] += busy - before
            before = busy
        span = max(e.start + e.duration for e in mine) - min(e.start for e in mine)
        sums["rest_s"] += span - before
    return {f"{part}_s": sums[f"{part}_s"] / len(devices) for part in PARTS}


def _measure_xlas(future, case: Case, ahead):
    program = future.result()
    events = _events(program, ahead)
    shape = case.shape
    rows = row_kernels(program.compiled.as_text(), shape.num_tokens * shape.hidden)
    parts = parts_of_events(events, rows)
    found = [one for one in processes.share(parts) if one]
    means = {
        name: statistics.fmean(one[name] for one in found) / program.calls
        for name in parts
        if found
    }
    return _times(program, events) | means


# --- Both ----------------------------------------------------------------------------------------


def _names_ahead() -> frozenset[str]:
    """Names of the events of the work ahead of each program."""
    work = some_milliseconds_of_work()
    return frozenset(event.name for event in profile.record(lambda: None, ahead=work))


def _events(program, ahead) -> list[Event]:
    """What this process's GPUs do in a run of the program, all of which has been launched before.

    No exchange has a matrix product, so what is ahead of the program is known by its names.
    """
    events = profile.record(program, ahead=some_milliseconds_of_work())
    return [event for event in events if event.name not in ahead]


def _times(program, events):
    """Of one call, by the host's clock; and on the devices, or by the host's where there are no
    events."""
    wall = timing.seconds_per_run(program) / program.calls
    spans = processes.share(profile.shares(events).get("span_s"))
    spans = [span for span in spans if span is not None]
    total = statistics.fmean(spans) / program.calls if spans else wall
    return {"wall_s": wall, "total_s": total}


def _of_both_ops(records, field):
    """``{(shape, T, R, exchange): seconds}`` of dispatch and combine together."""
    sums: dict[tuple, list[float]] = {}
    for record in records:
        value = record.get(field)
        if value is not None and math.isfinite(value):
            key = (record["name"], record["num_tokens"], record["num_ranks"], record["exchange"])
            sums.setdefault(key, []).append(value)
    return {key: sum(values) for key, values in sums.items() if len(values) == len(OPS)}


#: Of both pictures: beside the bars, which would be behind it.
_LEGEND = {"fontsize": 6, "loc": "upper left", "bbox_to_anchor": (1, 1)}


def plot_latency(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Dispatch and combine together against the ideal, by exchange and number of ranks."""
    totals, ideals = _of_both_ops(records, "total_s"), _of_both_ops(records, "ideal_s")
    panels = list(dict.fromkeys((name, tokens) for name, tokens, _, _ in totals))

    def panel(axes, key):
        here = {k[2:]: seconds for k, seconds in totals.items() if k[:2] == key}
        ranks = sorted({num_ranks for num_ranks, _ in here})
        names = list(dict.fromkeys(name for _, name in here))
        for i, name in enumerate(names):
            some = [r for r in ranks if (r, name) in here]
            places = [ranks.index(r) + 0.8 * i / len(names) for r in some]
            times = [here[r, name] * 1e6 for r in some]
            axes.bar(places, times, 0.8 / len(names), align="edge", label=name)
        for i, r in enumerate(ranks):
            found = [s for k, s in ideals.items() if k[:3] == (*key, r)]
            if found:
                axes.hlines(found[0] * 1e6, i, i + 0.8, "black", label="ideal" if i == 0 else None)
        axes.set(title=f"{key[0]}, T={key[1]}", ylabel="us, dispatch and combine", yscale="log")
        axes.set_xticks([i + 0.4 for i in range(len(ranks))], [f"R={r}" for r in ranks])
        axes.legend(**_LEGEND)

    draw(panels, panel, path)


def plot_parts(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """How the time of dispatch and combine together divides, by exchange, on the most ranks."""
    most = max((record["num_ranks"] for record in records), default=0)
    records = [record for record in records if record["num_ranks"] == most]
    seconds = {part: _of_both_ops(records, f"{part}_s") for part in PARTS}
    keys = list(dict.fromkeys(key for of_part in seconds.values() for key in of_part))
    panels = list(dict.fromkeys(key[:2] for key in keys))

    def panel(axes, key):
        here = [k for k in keys if k[:2] == key]
        bottoms = [0.0] * len(here)
        for part in PARTS:
            heights = [seconds[part].get(k, 0.0) * 1e6 for k in here]
            axes.bar(range(len(here)), heights, bottom=bottoms, label=part)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axes.set(title=f"{key[0]}, T={key[1]}, R={most}", ylabel="us, dispatch and combine")
        axes.set_xticks(range(len(here)), [k[3] for k in here], rotation=20, fontsize=7, ha="right")
        axes.legend(**_LEGEND)

    draw(panels, panel, path)
