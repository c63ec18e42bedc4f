"""What an MoE layer hides of its exchanges: walls, what the profiler saw, and a timeline."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

import freeio_jax as fio
from freeio_jax.bench import layer, profile
from freeio_jax.bench.floor import KERNELS
from freeio_jax.bench.report import Report, plot_timeline


@dataclasses.dataclass(frozen=True)
class Model:
    """An MoE layer, with the letters of the contract; a shared expert is as wide as an expert."""

    hidden: int
    top_k: int
    num_experts: int
    expert_width: int


MODELS = {
    "DeepSeek-V3": Model(7168, 8, 256, 2048),
    "Qwen3-30B-A3B": Model(2048, 8, 128, 768),
}
TOKENS = (128, 2048, 4096, 8192)
NUM_CHUNKS = (1, 2, 4)
NUM_SMS = (8, 16, 24, 32)
PASSES = ("forward", "gradients")
#: Of each program. All processes of a pod must run a program equally often.
RUNS = 5
SAMPLES = 3

NOTHING_HIDDEN = (
    "# On CPU a start runs the exchange to its end. So nothing is hidden here: the differences "
    "between the columns are noise, and there is no timeline."
)

_COLUMNS = {
    "model": "model",
    "shared": "shared expert",
    "num_tokens": "T",
    "pass": "pass",
    "num_chunks": "n",
    "num_sms": "SMs",
    "exchange_s": "exchange alone ms",
    "compute_s": "compute alone ms",
    "in_turn_s": "one after the other ms",
    "beside_s": "beside each other ms",
    "hidden_share": "hidden %",
    "covered_share": "started kernels with compute beside them %",
    "in_turn_bytes": "temporaries, one after the other MB",
    "beside_bytes": "temporaries, beside each other MB",
}


def run(
    report: Report,
    models: dict[str, Model],
    *,
    num_ranks: int,
    dtype: str,
    tokens: Sequence[int] = TOKENS,
    num_chunks: Sequence[int] = NUM_CHUNKS,
    num_sms: Sequence[int] = NUM_SMS,
    passes: Sequence[str] = PASSES,
    png: pathlib.Path | None = None,
) -> None:
    """Times each model's layer with a shared expert and without, whole and in chunks.

    ``exchange_s`` and ``compute_s`` are of programs that have the exchanges alone, or the experts
    alone, with all SMs and without chunks. ``in_turn_s`` is the layer with ``overlap=False``,
    ``beside_s`` with ``overlap=True``. The hidden share is ``(in_turn_s - beside_s) / exchange_s``.
    ``covered_share`` is by the profiler: the share of the time of kernels of exchanges in which a
    kernel that is no exchange runs on that GPU. It is taken at the first of ``num_sms``. (No figure
    of it where there is no GPU.) ``in_turn_bytes`` and ``beside_bytes`` are what XLA plans for the
    temporaries of one device: the peak beside parameters, input and results.

    Args:
      models: by name.
      num_ranks: R.
      dtype: of rows and parameters.
      tokens, num_chunks, num_sms, passes: what is varied.
      png: the timeline of the largest T with a shared expert and gradients goes there, without
        overlap and with each number of chunks, at the first of ``num_sms``.
    """
    on_gpu = jax.devices()[0].platform == "gpu"
    if not on_gpu:
        print(NOTHING_HIDDEN, flush=True)
    report.table("Beside compute", _COLUMNS)
    timelines: dict[str, list[profile.Event]] = {}
    before = fio.config()["overlap_num_sms"]
    try:
        for (name, model), num_tokens, shared in itertools.product(
            models.items(), tokens, (False, True)
        ):
            sizes = layer.Sizes(
                num_ranks,
                num_tokens,
                **dataclasses.asdict(model),
                dtype=dtype,
                shared_width=model.expert_width if shared else None,
            )
            about = {"model": name, "num_ranks": num_ranks, "num_tokens": num_tokens}
            about |= {"shared": shared}
            wanted = png if shared and num_tokens == max(tokens) else None

            def measure(sizes=sizes, name=name, wanted=wanted):
                return _measure(
                    layer.Layer(sizes),
                    num_chunks,
                    num_sms,
                    passes,
                    timelines if wanted and on_gpu else None,
                    name,
                )

            report.guarded_all("overlap", about, measure)
    finally:
        fio.config(overlap_num_sms=before)
    if png is not None and timelines:
        plot_timeline(timelines, png, kind_of)


def _measure(moe, num_chunks, num_sms, passes, timelines, name):
    begin = time.perf_counter()
    programs = _compiled(moe, num_chunks, passes)
    print(f"# {len(programs)} programs compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for which in passes:
        gradients = which == "gradients"
        exchange_s = seconds(programs[which, "exchange"])
        compute_s = seconds(programs[which, "compute"])
        in_turn = programs[which, "in turn"]
        in_turn_s = seconds(in_turn)
        if gradients and timelines is not None:
            timelines[f"{name}, one after the other"] = profile.record(in_turn)
        for chunks in num_chunks:
            # The number of multiprocessors is read when an exchange runs.
            beside = programs[which, chunks]
            for sms in num_sms:
                fio.config(overlap_num_sms=sms)
                beside_s = seconds(beside)
                events = profile.record(beside) if sms == num_sms[0] else []
                if gradients and timelines is not None and events:
                    timelines[f"{name}, {chunks} chunk(s), {sms} SMs"] = events
                yield {
                    "pass": which,
                    "num_chunks": chunks,
                    "num_sms": sms,
                    "exchange_s": exchange_s,
                    "compute_s": compute_s,
                    "in_turn_s": in_turn_s,
                    "beside_s": beside_s,
                    "hidden_share": (in_turn_s - beside_s) / exchange_s,
                    "covered_share": covered_share(events),
                    "in_turn_bytes": in_turn.temporary_bytes,
                    "beside_bytes": beside.temporary_bytes,
                }


def _compiled(moe, num_chunks, passes) -> dict[tuple[str, object], layer.Bound]:
    """All programs of a layer. XLA compiles some while others are lowered, which takes as long."""
    futures = {}
    with ThreadPoolExecutor() as pool:
        # Those of gradients take longest, so they come first.
        for which in reversed(passes):
            gradients = which == "gradients"
            whole = moe.backward if gradients else moe.forward

            def submit(key, lowered, which=which):
                futures[which, key] = pool.submit(lowered.compile)

            for chunks in reversed(num_chunks):
                submit(chunks, whole(None, overlap=True, num_chunks=chunks))
            submit("in turn", whole(None, overlap=False))
            submit("compute", moe.experts(gradients))
            submit("exchange", moe.alone(fio, gradients))
        return {key: future.result() for key, future in futures.items()}


def seconds(run: Callable[[], object]) -> float:
    """Median seconds of a run in a row of ``RUNS``, after a warm-up."""
    jax.block_until_ready(run())
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        for _ in range(RUNS):
            result = run()  # the run before it gives its memory back
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - begin) / RUNS)
    return statistics.median(samples)


_EXCHANGE = re.compile("|".join(KERNELS.values()))


def kind_of(event: profile.Event) -> str:
    """``exchange``, ``other communication``, ``copy`` or ``compute``."""
    if _EXCHANGE.search(event.name):
        return "exchange"
    if profile.COMMUNICATION.search(event.name):
        return "other communication"
    return "copy" if profile.is_copy(event) else "compute"


def covered_share(events: Sequence[profile.Event]) -> float:
    """Share of the time of exchanges in which compute runs on the same GPU; NaN without any."""
    covered = total = 0.0
    for device in {event.device for event in events}:
        mine = [event for event in events if event.device == device]
        exchanges = [event for event in mine if kind_of(event) == "exchange"]
        compute = [event for event in mine if kind_of(event) == "compute"]
        alone, both = profile.busy(exchanges), profile.busy([*exchanges, *compute])
        total += alone
        covered += alone + profile.busy(compute) - both
    return covered / total if total else math.nan
