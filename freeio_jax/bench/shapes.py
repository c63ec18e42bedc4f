"""Each exchange on each shape: time next to the floor, and XLA's exchanges in the same run."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import re
import statistics
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax.bench import baselines, processes, profile, timing
from freeio_jax.bench.cases import ROUTINGS, Shape, expert_mesh, loads
from freeio_jax.bench.floor import KERNELS, Limits, Traffic, floor_of_sms, pulls, traffic
from freeio_jax.bench.programs import Programs
from freeio_jax.bench.report import Report
from freeio_jax.layout import round_up

#: Room of a rank, and of a pair of ranks, as a multiple of an even load; more where the routing of
#: the shape needs it, so that nothing is dropped by anyone.
ROOM = 1.25


@dataclasses.dataclass(frozen=True)
class Suite:
    """Shapes that differ in T."""

    name: str
    hidden: int
    top_k: int
    num_experts: int
    routing: str
    tokens: tuple[int, ...]


_TOKENS = (1, 8, 128, 1024, 4096, 8192)
SUITES = {
    "large": Suite("large", 7168, 8, 256, "uniform", _TOKENS),
    "small": Suite("small", 2048, 4, 64, "uniform", _TOKENS),
    "half": Suite("half", 7168, 8, 256, "half", (128, 4096)),
    "zipf": Suite("zipf", 7168, 8, 256, "zipf", (128, 4096)),
}


class Case:
    """One shape with its routing, and the room that it needs."""

    def __init__(self, suite: Suite, num_tokens: int, num_ranks: int, dtype: str):
        self.shape = Shape(
            num_ranks, num_tokens, suite.hidden, suite.top_k, suite.num_experts, dtype, ROOM
        )
        topk_idx = ROUTINGS[suite.routing](self.shape, seed=num_tokens)
        pairs = loads(topk_idx, self.shape)
        self.capacity = round_up(max(self.shape.capacity, int(pairs.sum(0).max())), 8)
        share = math.ceil(ROOM * num_tokens * suite.top_k / num_ranks)
        self.slots = max(share, int(pairs.max()))
        self.topk_idx = topk_idx.reshape(num_ranks, num_tokens, suite.top_k)
        self.name, self.routing = suite.name, suite.routing

    @property
    def about(self) -> dict[str, object]:
        shape = dataclasses.asdict(self.shape)
        return {"name": self.name, "routing": self.routing, **shape, "capacity": self.capacity}

    def traffic(self) -> dict[str, Traffic]:
        return traffic(
            self.topk_idx,
            num_experts=self.shape.num_experts,
            capacity=self.capacity,
            row_bytes=self.shape.hidden * np.dtype(jax.numpy.dtype(self.shape.dtype)).itemsize,
        )

    def programs(self) -> Programs:
        return Programs(expert_mesh(self.shape.num_ranks), self.shape, self.topk_idx, self.capacity)

    def exchange(self, name: str):
        return baselines.named(name, slots=self.slots)

    @property
    def calls(self) -> int:
        """Calls of a program: enough to hide the host, few enough for the results' memory."""
        return 16 if self.shape.num_tokens <= 128 else 8 if self.shape.num_tokens <= 1024 else 4


def cases(suites: Sequence[Suite], num_ranks: int, dtype: str) -> Iterator[Case]:
    """Each shape of each suite."""
    for suite in suites:
        for num_tokens in suite.tokens:
            yield Case(suite, num_tokens, num_ranks, dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The one kernel of an operation: its median duration, and whether it is that of small calls.

    NaN, and False, where the profile shows none.
    """

    seconds: float
    is_small: bool


def time_kernel(program, op: str) -> Kernel:
    """By the profile, on the devices of all processes."""
    events = profile.record(program, ahead=some_milliseconds_of_work())
    events = [event for event in events if re.search(KERNELS[op], event.name)]
    shared = processes.share([(event.name, event.duration) for event in events])
    kernels = [kernel for of_process in shared for kernel in of_process]
    if not kernels:
        return Kernel(math.nan, False)
    return Kernel(
        statistics.median(duration for _, duration in kernels),
        any("small" in name for name, _ in kernels),
    )


def time_kernel_or_wall(program, op: str) -> Kernel:
    """Of one call, by the host's clock where the profile shows no kernel."""
    kernel = time_kernel(program, op)
    if not math.isnan(kernel.seconds):
        return kernel
    return Kernel(timing.seconds_per_run(program) / program.calls, False)


@functools.cache
def some_milliseconds_of_work():
    """Work for all GPUs of this process that no collective is part of."""
    devices = jax.local_devices()
    if devices[0].platform != "gpu":
        return lambda: None
    side = 8192
    mesh = Mesh(np.asarray(devices), ("all",))
    spec = P("all")
    matrices = jax.device_put(
        np.zeros((len(devices), side, side), jnp.bfloat16), NamedSharding(mesh, spec)
    )

    def multiply(a):
        for _ in range(4):
            a = a @ a
        return a

    multiply = jax.jit(jax.shard_map(multiply, mesh=mesh, in_specs=spec, out_specs=spec))
    return lambda: multiply(matrices)


#: Operations that are timed for the other exchanges, too.
BASELINE_OPS = ("dispatch", "combine")
_COLUMNS = {
    "name": "shape",
    "num_tokens": "T",
    "op": "operation",
    "exchange": "exchange",
    "wall_s": "wall us",
    "of_freeio": "x freeio",
    "kernel_s": "kernel us",
    "floor_s": "floor us",
    "ratio": "kernel / floor",
    "link_bytes": "link MB",
    "link_rate": "link GB/s",
    "hbm_bytes": "memory MB",
    "hbm_rate": "memory GB/s",
}


def run(
    report: Report,
    limits: Limits,
    suites: Sequence[Suite],
    *,
    num_ranks: int,
    ops: Sequence[str],
    exchanges: Sequence[str],
    dtype: str,
) -> None:
    """Times ``ops`` of freeio, and dispatch and combine of the other exchanges."""
    report.table("Exchanges", _COLUMNS)
    for case in cases(suites, num_ranks, dtype):
        _run_case(report, limits, case, ops, exchanges)


def _run_case(report, limits, case, ops, exchanges):
    programs, moved = case.programs(), case.traffic()
    ours: dict[str, float] = {}

    def measure(name, op, future):
        program = future.result()
        wall = timing.seconds_per_run(program) / case.calls
        times = {"wall_s": wall, "merged": program.found < program.calls}
        if name != "freeio":
            return {**times, "of_freeio": wall / ours.get(op, math.nan)}
        ours[op] = wall
        kernel = time_kernel(program, op)
        floor = limits.floor(moved[op], pulls=pulls(op, kernel.is_small))
        against = _against(floor, moved[op], kernel.seconds)
        return {**times, **against, "kernel_s": kernel.seconds}

    wanted = [
        (name, op) for name in exchanges for op in ops if name == "freeio" or op in BASELINE_OPS
    ]
    futures = programs.build_all(((case.exchange(n), op) for n, op in wanted), case.calls)
    for (name, op), future in zip(wanted, futures, strict=True):
        about = {**case.about, "op": op, "exchange": name}
        report.guarded("shapes", about, functools.partial(measure, name, op, future))
        if report.data["shapes"][-1].get("merged"):
            print("\nXLA merged calls of this program: its time is no use.\n")


def _against(floor: float, moved: Traffic, seconds: float) -> dict[str, float]:
    return {
        "floor_s": floor,
        "ratio": seconds / floor,
        "link_bytes": moved.link_bytes,
        "link_rate": moved.link_bytes / seconds,
        "hbm_bytes": moved.hbm_bytes,
        "hbm_rate": moved.hbm_bytes / seconds,
    }


# --- How many SMs an exchange needs --------------------------------------------------------------

_SMS = (4, 8, 16, 24, 32, 48, 64, 96, 128)
ENOUGH = 0.95


def numbers_of_sms() -> tuple[int, ...]:
    """From 4 to all that a device has."""
    every = getattr(jax.devices()[0], "core_count", None) or 132
    return (*(number for number in _SMS if number < every), every)


def sweep(
    report: Report,
    limits: Limits,
    suites: Sequence[Suite],
    *,
    num_ranks: int,
    ops: Sequence[str],
    dtype: str,
    sms: Sequence[int],
) -> None:
    """Times each operation of freeio with some of the SMs: how many give 95% of the best speed.

    Beside each time is its ratio to the floor: what the SMs can load and store at most, or what
    the link and the memory can move, whichever takes longer.
    """
    before = fio.config()["num_sms"]
    kind = jax.devices()[0].device_kind
    for case in cases(suites, num_ranks, dtype):
        programs, traffic_of = case.programs(), case.traffic()
        columns = {"op": "operation", "enough_sms": f"SMs for {ENOUGH:.0%} of the best"}
        for n in sms:
            columns |= {f"sms_{n}": f"{n}: us", f"floor_{n}": "floor us", f"ratio_{n}": "x floor"}
        report.table(f"SMs: {case.name}, T={case.shape.num_tokens}", columns)
        for op in ops:

            def measure(op=op, programs=programs, case=case, moved=traffic_of[op]):
                seconds, floors = {}, {}
                for number in sms:
                    # Holds for programs compiled from here on.
                    fio.config(num_sms=number)
                    program = programs.build(fio, op, case.calls)
                    kernel = time_kernel_or_wall(program, op)
                    seconds[number] = kernel.seconds
                    floor = limits.floor(moved, pulls=pulls(op, kernel.is_small))
                    # NaN where either is not known.
                    floors[number] = float(np.maximum(floor_of_sms(moved, number, kind), floor))
                fastest = min(seconds.values())
                enough = min(n for n in sms if fastest / seconds[n] >= ENOUGH)
                record = {"enough_sms": enough}
                for n, s in seconds.items():
                    record |= {f"sms_{n}": s, f"floor_{n}": floors[n], f"ratio_{n}": s / floors[n]}
                return record

            try:
                report.guarded("sms", {**case.about, "op": op}, measure)
            finally:
                fio.config(num_sms=before)


# --- For other profilers -------------------------------------------------------------------------


def once(op: str, case: Case) -> None:
    """One launch of an operation after one to warm up, between cudaProfilerStart and -Stop."""
    program = case.programs().build(fio, op, 1)
    jax.block_until_ready(program())
    print(f"{KERNELS[op]}: 1 launch before the one to look at", flush=True)
    with _profiled():
        jax.block_until_ready(program())
    moved = case.traffic()[op]
    print(f"moves at least: link_bytes {moved.link_bytes}, hbm_bytes {moved.hbm_bytes}")


@contextlib.contextmanager
def _profiled():
    """Between cuProfilerStart and cuProfilerStop on every GPU; nothing where there is no driver."""
    _on_every_gpu("cuProfilerStart")
    yield
    _on_every_gpu("cuProfilerStop")


def _on_every_gpu(function):
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    for device in jax.local_devices():
        if device.platform == "gpu":
            # XLA works in the primary context.
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.local_hardware_id)
            driver.cuCtxPushCurrent_v2(context)
            getattr(driver, function)()
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
