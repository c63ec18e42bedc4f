"""How much of the time goes to dispatch and combine, by ``jax.profiler``."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Callable

import jax

from freeio_jax.bench import profile


def exchange_share(run: Callable[[], object], num_devices: int) -> float:
    """The share of ``run``'s time that a device spends in dispatch and combine, waiting included.

    ``num_devices``: of this process.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the program down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            began = time.perf_counter()
            jax.block_until_ready(run())
            elapsed = time.perf_counter() - began
        kernels = profile.durations(profile.read(folder), r"(dispatch|combine)_[a-z]+_kernel")
        return sum(kernels or _custom_calls(folder)) / (num_devices * elapsed)


def _custom_calls(folder):
    """Seconds of each of our custom calls on CPU devices."""
    return [
        event.duration_ns * 1e-9
        for file in glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        for plane in jax.profiler.ProfileData.from_file(file).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("freeio_")
    ]
