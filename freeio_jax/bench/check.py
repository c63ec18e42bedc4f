"""Right or wrong: every exchange against ``freeio_jax.reference``, compared on the devices."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from freeio_jax import _native, reference
from freeio_jax.bench import baselines, processes
from freeio_jax.bench.cases import ROUTINGS, Shape, expert_mesh
from freeio_jax.bench.programs import per_shard, put
from freeio_jax.bench.report import Report
from freeio_jax.layout import round_up


@dataclasses.dataclass(frozen=True)
class CheckShape:
    """What is fixed when an exchange is compiled, apart from the number of ranks."""

    num_tokens: int
    hidden: int
    top_k: int
    experts_per_rank: int
    capacity_factor: float | None = None
    alignment: int = 1
    dtype: str = "bfloat16"

    def of(self, num_ranks: int) -> Shape:
        return Shape(
            num_ranks,
            self.num_tokens,
            self.hidden,
            self.top_k,
            self.experts_per_rank * num_ranks,
            self.dtype,
            self.capacity_factor,
        )


SHAPES = (
    CheckShape(1, 7168, 8, 128),
    CheckShape(8, 512, 4, 8, 1.0),
    CheckShape(129, 264, 4, 8, None, 16),
    CheckShape(128, 7168, 8, 64, 1.25),
    CheckShape(300, 64, 4, 8, 0.5),
    CheckShape(1000, 1024, 8, 16, 1.25, 8, "float32"),
)


@functools.cache
def _layer(api: Any, shape: Shape, alignment: int) -> Callable[..., Any]:
    """(tokens, topk_idx, weights) -> what must be equal, and sums with gradients; compiled."""
    options = {
        "num_experts": shape.num_experts,
        "axis_name": "expert",
        "capacity": None if shape.capacity is None else round_up(shape.capacity, alignment),
        "alignment": alignment,
    }

    def everything(tokens, topk_idx, weights):
        def layer(tokens, weights):
            out = api.dispatch(tokens, topk_idx, **options)
            z = api.combine(out.tokens * jnp.asarray(1.5, out.tokens.dtype), out.handle, weights)
            return z, out

        z, pull, out = jax.vjp(layer, tokens, weights, has_aux=True)
        names = ("expert_load", "num_dropped", "num_invalid")
        counts = {name: getattr(out.handle, name) for name in names}
        exact = {"tokens": out.tokens, "group_sizes": out.group_sizes, **counts}
        by_tokens, by_weights = pull(jnp.roll(tokens, 1, axis=0))
        return exact, {"z": z, "d_tokens": by_tokens, "d_weights": by_weights}

    return per_shard(everything, expert_mesh(shape.num_ranks))


@functools.partial(jax.jit, static_argnums=3)
def _count_differing(ours, right, magnitudes, top_k):
    """Elements that differ: exact ones bit by bit, sums by more than their roundings can."""
    wrong = {name: jnp.sum(_bits(ours[0][name]) != _bits(right[0][name])) for name in ours[0]}
    for name, value in ours[1].items():
        # Sums of K rows may be rounded at each step, those over H are of float32.
        units = 64 if value.dtype == jnp.float32 else 2 + top_k
        bound = units * float(jnp.finfo(value.dtype).eps) * magnitudes[1][name].astype(jnp.float32)
        apart = jnp.abs(value.astype(jnp.float32) - right[1][name].astype(jnp.float32))
        wrong[name] = jnp.sum(~(apart <= bound))  # so that NaN differs from all
    return wrong


def _bits(array):
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{array.dtype.itemsize * 8}"))


@functools.cache
def _numbers(dtype: str) -> np.ndarray:
    """A prime number of normal ones: to draw all tokens anew takes longer than to exchange them."""
    return np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(jnp.dtype(dtype))


def compare(api: Any, check: CheckShape, num_ranks: int, routing: str, seed: int) -> dict[str, int]:
    """What differs from the reference, by name and number of elements; empty if all is right."""
    shape = check.of(num_ranks)
    rng = np.random.default_rng(seed)
    lead = (num_ranks, check.num_tokens)
    tokens = np.resize(np.roll(_numbers(check.dtype), seed), (*lead, check.hidden))
    topk_idx = ROUTINGS[routing](shape, seed).reshape(*lead, check.top_k)
    # Skipped ids, and some out of range.
    topk_idx[rng.random(topk_idx.shape) < 0.1] = -1
    topk_idx[rng.random(topk_idx.shape) < 0.02] = shape.num_experts + 5
    weights = rng.random(topk_idx.shape, np.float32)
    mesh = expert_mesh(num_ranks)
    args = put(mesh, (tokens, topk_idx, weights))
    positive = (jnp.abs(args[0]), *args[1:])
    expected = _layer(reference, shape, check.alignment)
    ours = jax.block_until_ready(_layer(api, shape, check.alignment)(*args))
    wrong = _count_differing(ours, expected(*args), expected(*positive), shape.top_k)
    return {name: int(n) for name, n in wrong.items() if int(n)}


def _expect_nothing(wrong: dict[str, int], what: str) -> None:
    if wrong:
        raise AssertionError(f"{what} differs from freeio_jax.reference in {wrong}")


def run(
    report: Report,
    *,
    num_ranks: int,
    exchanges: Sequence[str],
    shapes: Sequence[CheckShape] = SHAPES,
) -> None:
    """Checks freeio on all shapes, and the others on some, with each kind of routing."""
    columns = {field.name: field.name for field in dataclasses.fields(CheckShape)}
    report.table("Checks", {"exchange": "exchange", **columns, "wrong": "wrong"})
    for name in exchanges:
        for shape in shapes if name == "freeio" else shapes[:3]:

            def measure(name=name, shape=shape):
                # As many slots as assignments: what dense drops beyond is not the contract.
                api = baselines.named(name, slots=shape.num_tokens * shape.top_k)
                for seed, routing in enumerate(ROUTINGS):
                    wrong = compare(api, shape, num_ranks, routing, seed)
                    _expect_nothing(wrong, f"{name} with routing {routing}")
                return {"wrong": "nothing"}

            report.guarded("check", {"exchange": name, **dataclasses.asdict(shape)}, measure)
    _layer.cache_clear()


# --- The soak ------------------------------------------------------------------------------------


def memory(devices: Sequence[jax.Device]) -> dict[str, int]:
    """Bytes in use by this process: the arrays on its fullest device, the engine's own there, and
    the host's."""
    gc.collect()
    devices = processes.local(devices)
    stats = [device.memory_stats() or {} for device in devices]
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    used = {
        "device": max(int(s.get("bytes_in_use", 0)) for s in stats),
        "host": pages * os.sysconf("SC_PAGE_SIZE"),
    }
    if hasattr(_native, "cuda") and devices[0].platform == "gpu":
        used["engine"] = int(_native.cuda.memory()[0])
    return used


def soak(
    report: Report, calls: int, *, num_ranks: int, shapes: Sequence[CheckShape] = SHAPES
) -> None:
    """``calls`` exchanges with gradients, each of another shape and routing than the one before."""
    devices = jax.devices()[:num_ranks]
    report.table(
        "Soak",
        {
            "calls": "calls",
            "wrong": "wrong",
            "device_before": "device before MB",
            "device_after": "after MB",
            "host_before": "host before MB",
            "host_after": "after MB",
        },
    )

    def call(seed):
        shape = shapes[seed % len(shapes)]
        routing = tuple(ROUTINGS)[seed // len(shapes) % len(ROUTINGS)]
        wrong = compare(baselines.named("freeio"), shape, num_ranks, routing, seed)
        _expect_nothing(wrong, f"call {seed}, {shape} with routing {routing},")

    def measure():
        for seed in range(
            2 * len(shapes) * len(ROUTINGS)
        ):  # compiles, and fills what caches there are
            call(seed)
        before = memory(devices)
        for seed in range(calls):
            call(seed)
            if seed % 1000 == 999:
                print(f"# {seed + 1} calls", flush=True)
        after = memory(devices)
        return (
            {"wrong": "nothing"}
            | {f"{name}_before": value for name, value in before.items()}
            | {f"{name}_after": value for name, value in after.items()}
        )

    report.guarded("soak", {"calls": calls}, measure)
    _layer.cache_clear()
