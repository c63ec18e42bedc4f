"""What the GPUs did, by ``jax.profiler``: kernels' durations, and the share of communication."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable

import jax

from freeio_jax.bench import processes


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel or copy: where, what, and when, in seconds."""

    device: str
    name: str
    start: float
    duration: float
    stream: str = ""


def record(
    run: Callable[[], object],
    folder: str | None = None,
    ahead: Callable[[], object] = lambda: None,
) -> list[Event]:
    """All that this process's GPUs did in one run, after a warm-up; nothing where there are none.

    ``folder``: keeps the trace there, for XProf or Perfetto.
    ``ahead``: keeps the GPUs busy while the host launches all of the run. Else a kernel that waits
    for its peers also waits for the host to launch those.
    """
    jax.block_until_ready((ahead(), run()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or temporary
        with jax.profiler.trace(folder, profiler_options=_options()):
            processes.share(None)  # to start a profile takes longer than the work ahead
            jax.block_until_ready((ahead(), run()))
        return read(folder)


def _options() -> jax.profiler.ProfileOptions:
    """No calls of Python's functions: to write them down takes longer than the programs do."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def read(folder: str) -> list[Event]:
    """The events of the traces in ``folder``."""
    events = []
    for file in glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True):
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            if plane.name.startswith("/device:GPU"):
                events += events_of_plane(plane)
    return events


def events_of_plane(plane) -> list[Event]:
    """Events of one GPU's streams; other lines, if there are streams, say the same otherwise."""
    lines = list(plane.lines)
    lines = [line for line in lines if "stream" in line.name.lower()] or lines
    return [
        Event(plane.name, event.name, event.start_ns * 1e-9, event.duration_ns * 1e-9, line.name)
        for line in lines
        for event in line.events
    ]


def is_copy(event: Event) -> bool:
    """Whether it copies or sets memory; else it is a kernel."""
    return event.name.lower().startswith(("memcpy", "memset"))


def durations(events: Iterable[Event], kernel: str) -> list[float]:
    """Seconds of the events whose names have the pattern ``kernel`` in them."""
    return [event.duration for event in events if re.search(kernel, event.name)]


#: What moves rows between GPUs: ours, NCCL's, XLA's own collective kernels, and its copies.
COMMUNICATION = re.compile(
    r"(dispatch|combine|hosts)_[a-z_]+_kernel|nccl|ragged_?all_?to_?all|multi_?gpu_?barrier|p2p",
    re.IGNORECASE,
)


def busy(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events of one device ran."""
    total = end = 0.0
    for event in sorted(events, key=lambda event: event.start):
        begin, end_of_event = max(event.start, end), event.start + event.duration
        total += max(0.0, end_of_event - begin)
        end = max(end, end_of_event)
    return total


def shares(events: list[Event]) -> dict[str, float]:
    """Mean over the devices: seconds from first to last event, busy, and in communication.

    Empty where there are no events.
    """
    devices = sorted({event.device for event in events})
    if not devices:
        return {}
    sums: Counter[str] = Counter()
    for device in devices:
        mine = [event for event in events if event.device == device]
        end = max(event.start + event.duration for event in mine)
        sums["span_s"] += end - min(event.start for event in mine)
        sums["busy_s"] += busy(mine)
        sums["communication_s"] += busy(e for e in mine if COMMUNICATION.search(e.name))
    means = {name: value / len(devices) for name, value in sums.items()}
    return means | {"communication_share": means["communication_s"] / means["span_s"]}


def longest(events: list[Event], number: int = 12) -> dict[str, float]:
    """Seconds of the kernels that took most, by name, summed over launches, mean over devices."""
    devices = len({event.device for event in events})
    sums: Counter[str] = Counter()
    for event in events:
        sums[event.name] += event.duration / devices
    return dict(sums.most_common(number))
