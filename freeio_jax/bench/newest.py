"""XLA's newest way to exchange ragged rows, each try in processes of its own.

XLA has a kernel that moves the rows of ``lax.ragged_all_to_all`` by itself, from and to buffers at
the same address on all GPUs. It is off by default, and it may end the whole process. So each
exchange is tried in processes that this one starts: in one process for all GPUs, and in one for
each. A process that crashes is a row of the table that says so.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freeio_jax.bench.report import Report

#: Options of XLA, by what they are called here.
OPTIONS = {
    "defaults": "",
    "device kernel": (
        "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true "
        "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true "
        "--xla_enable_nccl_symmetric_buffers_for_collectives=raggedalltoall"
    ),
}
EXCHANGES = ("ragged-1", "ragged", "ragged-by-expert", "dense")
#: Of one try, which compiles some programs.
SECONDS = 300

_COLUMNS = {
    "exchange": "exchange",
    "options": "XLA's options",
    "processes": "processes",
    "name": "shape",
    "num_tokens": "T",
    "op": "operation",
    "wall_s": "wall us",
    "ended": "ended",
}


def run(
    report: Report,
    sizes: Sequence[str],
    *,
    num_ranks: int,
    platform: str,
    exchanges: Sequence[str] = EXCHANGES,
    options: Sequence[str] = tuple(OPTIONS),
    in_processes: bool = True,
) -> None:
    """Tries each exchange with each set of options. JAX must not have started in this process.

    Args:
      sizes: arguments of the benchmark: suites or widths, and tokens.
      platform: ``cuda`` or ``cpu``, for the processes.
      options: names of :data:`OPTIONS`.
      in_processes: whether to try with a process for each rank, too.
    """
    report.table("XLA at its newest", _COLUMNS)
    for processes in dict.fromkeys((1, num_ranks) if in_processes else (1,)):
        for option in options:
            flags = OPTIONS[option]
            for exchange in exchanges:
                # The options are for ragged exchanges alone.
                if flags and not exchange.startswith("ragged"):
                    continue
                about = {"exchange": exchange, "options": option, "processes": processes}
                about |= {"num_ranks": num_ranks}
                for record in _try(exchange, flags, processes, num_ranks, platform, sizes):
                    report.add("newest", {**about, **record})


def _try(exchange, flags, processes, num_ranks, platform, sizes) -> Iterator[Mapping[str, Any]]:
    """What the processes have measured, and how they ended, unless that was well."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "found.json"
        what = ["--shapes", "--ops", "dispatch", "combine", "--exchanges", exchange, *sizes]
        bench = ["-m", "freeio_jax.bench", *what, "--json", str(path)]
        if processes == 1:
            command = [sys.executable, *bench, "--ranks", str(num_ranks)]
        else:
            pod = ["-m", "freeio_jax.launch", "-n", str(processes), "--platform", platform]
            command = [sys.executable, *pod, *bench]
        ended = _end_of(command, flags, platform)
        found = json.loads(path.read_text()).get("shapes", []) if path.exists() else []
    failed = [record for record in found if "error" in record]
    for record in found:
        about = {name: record[name] for name in ("name", "num_tokens", "op")}
        if "error" not in record:
            yield about | {"wall_s": record["wall_s"]}
        else:
            yield about | {"ended": record["error"].splitlines()[0][:200]}
    # Status 1 is that of failures which have rows of their own.
    if ended and not (failed and ended == _status(1)):
        yield {"ended": ended}
    elif not found:
        yield {"ended": "left out: lax.ragged_all_to_all exists on GPUs alone"}


def _end_of(command, flags, platform) -> str:
    """How the command ended; empty: well."""
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    environment["JAX_PLATFORMS"] = platform
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    if done.returncode == 0:
        return ""
    sys.stderr.write(done.stderr[-2000:])
    # A check of XLA's that fails says why in a line of level F.
    fatal = re.findall(r"^(?:\[\d+\] )?F\d{4} .*?\] (.*)$", done.stderr, re.MULTILINE)
    return ": ".join([_status(done.returncode), *fatal[:1]])[:200]


def _status(code: int) -> str:
    """In words. The launcher's status is 128 and the signal's number."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"status {code}"
