"""A model's decode step without its model: many layers of dispatch and combine in one program.

What a step pays beside the kernels shows here: the gaps between them on the device, and the host's
time for each call. Controls have the same number of layers and show what XLA takes by itself: two
small matrix products; two custom calls that launch an empty kernel of one CTA, or of as many as an
exchange has; and two such calls with results as large as the exchange's. Two more programs have a
shared expert in each layer: after the exchange, and beside its combine.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import _native
from freeio_jax.bench import profile
from freeio_jax.bench.cases import expert_mesh
from freeio_jax.bench.floor import KERNELS
from freeio_jax.bench.programs import put
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Case, Suite

TOKENS = (1, 8, 32, 128)
LAYERS = 61  # DeepSeek-V3's
#: Calls of a layer that reach the GPU, of every program without a shared expert.
CALLS = 2
#: Hidden width of the shared expert: DeepSeek-V3's.
SHARED_WIDTH = 2048
#: Runs that are timed, the median counts; and runs before them.
RUNS = 40
WARM_UPS = 5

#: What XLA captures with command buffers on: its default where the exchange is concerned.
_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL"
#: XLA's options. In sequence: each captured command waits for the one before, and for no other.
_COMMAND_BUFFERS = {
    "off": {"xla_gpu_enable_command_buffer": ""},
    "on": {"xla_gpu_enable_command_buffer": _CAPTURED},
    "in sequence": {
        "xla_gpu_enable_command_buffer": _CAPTURED,
        "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
    },
}

_COLUMNS = {
    "program": "program",
    "num_tokens": "T",
    "command_buffers": "command buffers",
    "wall_s": "wall us",
    "in_a_row_s": "in a row us",
    "span_s": "span us",
    "kernels_s": "kernels us",
    "host_s": "host us",
    "host_of_call_s": "host of a call us",
}


def run(
    report: Report,
    suite: Suite,
    *,
    num_ranks: int,
    dtype: str,
    layers: int = LAYERS,
) -> None:
    """Times a program of ``layers`` layers for each T of ``suite``, and the controls.

    A program's tokens are donated, and its result is the next run's tokens, as a decode loop does
    with its state: so all buffers stay where they are, and XLA need not record its command buffers
    anew. Figures of one layer: ``wall_s`` from the call of the program until its result is there;
    ``in_a_row_s`` the same where the next run is started before the last one's result is there;
    ``host_s`` until Python has control back, the GPUs being idle when it starts; ``span_s`` on a
    device, from the first kernel's start to the last one's end, and ``kernels_s``, the sum of the
    kernels' durations, both means over this process's devices. (XLA sets four bytes of memory, the
    device's number, before it launches what it has captured. So that is no part of the span.)
    ``host_of_call_s`` is what one more call adds to the host's time: that of a program of one layer
    is subtracted. It is of layers without a shared expert.
    """
    mesh = expert_mesh(num_ranks)
    processes = jax.process_count()
    report.table(f"Decode: {layers} layers, {processes} process(es), us for each layer", _COLUMNS)
    programs: list[tuple[str, int, Callable[[], tuple[Callable, tuple]]]] = []
    for num_tokens in suite.tokens:
        case = Case(suite, num_tokens, num_ranks, dtype)
        programs.append(("exchange", num_tokens, functools.partial(_exchange, case, mesh=mesh)))
        for program, beside in SHARED.items():
            build = functools.partial(_with_shared_expert, case, beside, mesh=mesh)
            programs.append((program, num_tokens, build))
    build = functools.partial(_products, mesh=mesh)
    programs.append(("two small products", 1, build))
    if mesh.devices.flat[0].platform == "gpu":
        target = _register_nothing()
        for ctas, name in ((1, "two empty kernels"), (128, "two empty kernels of 128 CTAs")):
            build = functools.partial(_nothing, target, ctas, (8,), (8,), mesh=mesh)
            programs.append((name, 1, build))
        for num_tokens in suite.tokens:
            case = Case(suite, num_tokens, num_ranks, dtype)
            tokens, rows = (num_tokens, suite.hidden), (case.capacity, suite.hidden)
            build = functools.partial(_nothing, target, 128, tokens, rows, dtype, mesh=mesh)
            programs.append(("two empty kernels, the exchange's rows", num_tokens, build))
    for name, num_tokens, build in programs:
        for command_buffers, options in _COMMAND_BUFFERS.items():
            about = {
                "program": name,
                "num_tokens": num_tokens,
                "num_ranks": num_ranks,
                "processes": processes,
                "layers": layers,
                "command_buffers": command_buffers,
            }

            def measure(build=build, options=options, calls=0 if name in SHARED else CALLS):
                loops = []
                for number in (layers, 1):
                    function, args = build(layers=number)
                    loops.append(
                        Loop(function.lower(*args).compile(compiler_options=options), args)
                    )
                return _measure(*loops, layers, calls)

            report.guarded("decode", about, measure)


class Loop:
    """A compiled program whose first argument is its last result. Call it for one run."""

    def __init__(self, compiled: Callable, args: Sequence[jax.Array]):
        self.compiled, (self.state, *self.rest) = compiled, args

    def __call__(self) -> jax.Array:
        self.state = self.compiled(self.state, *self.rest)
        return self.state


def _chain(layer: Callable, mesh: Mesh, layers: int) -> Callable:
    """``layers`` times ``x = layer(x, *rest)`` on each rank's arrays; x is donated. Jitted."""

    def body(x, *rest):
        x, *rest = jax.tree.map(lambda a: a[0], (x, *rest))
        for _ in range(layers):
            x = layer(x, *rest)
        return x[None]

    spec = P("expert")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped, donate_argnums=0)


def _exchange(case: Case, *, mesh: Mesh, layers: int) -> tuple[Callable, tuple]:
    """Each layer dispatches the tokens that the one before has combined."""
    shape = case.shape

    def layer(x, topk_idx, weights):
        out = _dispatch(case, x, topk_idx)
        return fio.combine(out.tokens, out.handle, weights)

    rng = np.random.default_rng(0)
    lead = (shape.num_ranks, shape.num_tokens)
    tokens = rng.standard_normal((*lead, shape.hidden), np.float32)
    # They add up to one, so that rows stay as large as they were.
    weights = np.full((*lead, shape.top_k), 1 / shape.top_k, np.float32)
    args = put(mesh, (tokens.astype(jnp.dtype(shape.dtype)), case.topk_idx, weights))
    return _chain(layer, mesh, layers), args


def _dispatch(case: Case, x: jax.Array, topk_idx: jax.Array):
    return fio.dispatch(
        x,
        topk_idx,
        num_experts=case.shape.num_experts,
        axis_name="expert",
        capacity=case.capacity,
    )


#: The programs with a shared expert: whether it runs beside the combine.
SHARED = {"exchange, then shared expert": False, "shared expert beside the combine": True}


def _with_shared_expert(
    case: Case, beside: bool, *, mesh: Mesh, layers: int, width: int = SHARED_WIDTH
) -> tuple[Callable, tuple]:
    """As :func:`_exchange`, and what a shared expert computes of each layer's tokens.

    All layers have the same one. The mean of both goes on, so tokens stay as large as they were.
    """
    _, (tokens, topk_idx, weights) = _exchange(case, mesh=mesh, layers=1)

    def shared_expert(x, up, down):
        return jax.nn.silu(x @ up) @ down

    def layer(x, topk_idx, weights, up, down):
        out = _dispatch(case, x, topk_idx)
        if beside:
            pending = fio.combine_start(out.tokens, out.handle, weights)
            y, pending = fio.between(pending, shared_expert, x, up, down)
            return (pending.done() + y) / 2
        z = fio.combine(out.tokens, out.handle, weights)
        return (z + shared_expert(x, up, down)) / 2

    rng = np.random.default_rng(1)
    dtype, hidden = jnp.dtype(case.shape.dtype), case.shape.hidden

    def matrix(rows, columns):
        drawn = rng.standard_normal((rows, columns), np.float32) / math.sqrt(rows)
        return np.broadcast_to(drawn.astype(dtype), (mesh.size, rows, columns))

    up, down = put(mesh, (matrix(hidden, width), matrix(width, hidden)))
    return _chain(layer, mesh, layers), (tokens, topk_idx, weights, up, down)


def _products(*, mesh: Mesh, layers: int) -> tuple[Callable, tuple]:
    side = 64
    x = np.full((mesh.size, side, side), 1 / side, np.float32)

    def layer(x, first, second):
        # A barrier, or XLA would multiply the two matrices beforehand.
        return lax.optimization_barrier(x @ first) @ second

    args = put(mesh, (x, x, x))
    return _chain(layer, mesh, layers), args


def _register_nothing() -> str:
    target = "freeio_bench_nothing"
    jax.ffi.register_ffi_target(target, _native.cuda.nothing(), platform="CUDA")
    return target


def _nothing(target: str, ctas: int, tokens, rows, dtype="float32", *, mesh: Mesh, layers: int):
    """Two calls in each layer: from ``tokens`` to ``rows``, and back; both are shapes of a rank."""

    def layer(x):
        for shape in (rows, tokens):
            call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, x.dtype))
            x = call(x, ctas=np.int64(ctas))
        return x

    x = np.zeros((mesh.size, *tokens), jnp.dtype(dtype))
    return _chain(layer, mesh, layers), put(mesh, (x,))


def _measure(
    loop: Loop, loop_of_one_layer: Loop, layers: int, calls: int = CALLS
) -> dict[str, float]:
    wall, host = _seconds(loop)
    _, host_of_one = _seconds(loop_of_one_layer)
    record = {
        "wall_s": wall / layers,
        "in_a_row_s": _seconds_in_a_row(loop) / layers,
        "host_s": host / layers,
        "host_of_call_s": (host - host_of_one) / (layers - 1) / calls if calls else math.nan,
        "span_s": math.nan,
        "kernels_s": math.nan,
    }
    return record | _on_devices(profile.record(loop), layers)


def _seconds(loop: Loop) -> tuple[float, float]:
    """Medians of a run: until its result is there, and until Python has control back."""
    walls, hosts = [], []
    for run in range(WARM_UPS + RUNS):
        begin = time.perf_counter()
        result = loop()
        back = time.perf_counter()
        jax.block_until_ready(result)
        if run >= WARM_UPS:
            walls.append(time.perf_counter() - begin)
            hosts.append(back - begin)
    return statistics.median(walls), statistics.median(hosts)


def _seconds_in_a_row(loop: Loop) -> float:
    """Of one run among RUNS that do not wait for each other's results."""
    jax.block_until_ready(loop())
    begin = time.perf_counter()
    for _ in range(RUNS):
        result = loop()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / RUNS


def _on_devices(events: Sequence[profile.Event], layers: int) -> dict[str, float]:
    events = [event for event in events if not profile.is_copy(event)]
    shares = profile.shares(events)
    if not shares:
        return {}
    devices = len({event.device for event in events})
    total = sum(event.duration for event in events)
    medians = {
        f"{op}_s": statistics.median(seconds)
        for op in ("dispatch", "combine")
        if (seconds := profile.durations(events, KERNELS[op]))
    }
    return {
        "span_s": shares["span_s"] / layers,
        "kernels_s": total / devices / layers,
        **medians,
    }
