"""Device times of the exchanges on GPUs, next to the floor that the GPUs themselves set.

    python -m freeio_jax.bench.gpu [--tokens 128,4096] [--json FILE]

Times are of the device: what one more call adds to a program of many, and with ``--profile`` the
kernels' own durations. Command buffers are off, so that no recording of them is timed.

The floor of one exchange: ``max(link_bytes / link_bw, hbm_bytes / hbm_bw) + 2 flag trips``, where
the bandwidths and the trip are measured first, on the same GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import statistics
import tempfile
import time

# Read by JAX's backend: without it, each program's first calls would record command buffers anew.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import _native
from freeio_jax.engines import ENGINES

#: The kernels by the names that the profiler shows.
KERNELS = {
    "dispatch": "dispatch_kernel",
    "dispatch_along": "dispatch_kernel",
    "combine": "combine_kernel",
    "combine_transpose": "combine_transpose_kernel",
}
HIDDEN, TOP_K, EXPERTS, FACTOR = 7168, 8, 256, 1.25


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the GPUs can do at best: bytes per second, and seconds."""

    link: float
    memory: float
    trip: float

    @classmethod
    def measure(cls, ordinals):
        """The link's figure is the better one of pushing and pulling, by CTAs on all SMs."""
        size = 256 << 20
        memory = _native.cuda.memory_bandwidth(ordinals[0], 4 * size)
        if len(ordinals) == 1:
            return cls(float("inf"), memory, 0.0)
        best = 0.0
        for pull in (False, True):
            rates = {
                ctas: _native.cuda.link_bandwidth(ordinals, size, ctas, pull)
                for ctas in (8, 16, 32, 64, 132)
            }
            print(
                f"# {'pull' if pull else 'push'}, GB/s by CTAs:",
                {ctas: round(rate / 1e9) for ctas, rate in rates.items()},
                flush=True,
            )
            best = max(best, *rates.values())
        return cls(best, memory, _native.cuda.flag_trip(ordinals[0], ordinals[1]))


def routing(rng, num_ranks, tokens):
    scores = rng.random((num_ranks, tokens, EXPERTS), np.float32)
    return np.argpartition(scores, TOP_K, axis=-1)[..., :TOP_K].astype(np.int32)


def floors(limits, topk_idx, capacity, row_bytes):
    """Seconds for each operation: each byte moved once; the slowest rank's."""
    num_ranks, tokens, _ = topk_idx.shape
    dest = topk_idx // (EXPERTS // num_ranks)
    # pairs[s, d]: tokens of rank s that have a row on rank d
    pairs = np.stack([(dest == rank).any(-1).sum(-1) for rank in range(num_ranks)], axis=-1)
    rows = np.stack([(dest == rank).sum() for rank in range(num_ranks)])
    remote = pairs * (1 - np.eye(num_ranks, dtype=int))
    link = max(remote.sum(0).max(), remote.sum(1).max()) * row_bytes
    kept = np.minimum(rows, capacity)
    landed = remote.sum(0)
    memory = {
        "dispatch": (tokens + landed + capacity).max(),
        "combine": (kept + landed + remote.sum(1) + tokens).max(),
    }
    memory["dispatch_along"] = memory["dispatch"]
    # Both gradients: every row of expert_out is read, too.
    memory["combine_transpose"] = (tokens + landed + capacity + kept).max()
    return {
        op: max(link / limits.link, rows * row_bytes / limits.memory) + 2 * limits.trip
        for op, rows in memory.items()
    }


def wall_of_one(program, short, long):
    """Seconds that one call adds to a program of many: the device's time, launches hidden."""

    def seconds(n):
        fn = program(n)
        jax.block_until_ready(fn())
        samples = []
        for _ in range(7):
            begin = time.perf_counter()
            jax.block_until_ready(fn())
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    return (seconds(long) - seconds(short)) / (long - short)


def kernel_times(fn, name):
    """Durations of the kernels called ``name``, by jax.profiler; empty if it cannot tell."""
    jax.block_until_ready(fn())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn())
        times = []
        for file in glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True):
            for plane in jax.profiler.ProfileData.from_file(file).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    times += [e.duration_ns * 1e-9 for e in line.events if name in e.name]
    return times


class Bench:
    def __init__(self, mesh, tokens):
        self.mesh, self.num_ranks, self.tokens = mesh, mesh.size, tokens
        self.capacity = -(-int(FACTOR * tokens * TOP_K) // 8) * 8
        self.rng = np.random.default_rng(0)
        self.topk = [routing(self.rng, self.num_ranks, tokens) for _ in range(4)]
        shape = (self.num_ranks, tokens)
        self.x = self.put(self.rng.standard_normal((*shape, HIDDEN), np.float32))
        self.x = self.x.astype(jnp.bfloat16)
        self.weights = self.rng.random((*shape, TOP_K), np.float32)

    def put(self, array):
        return jax.device_put(array, NamedSharding(self.mesh, P("expert")))

    def program(self, function, *args):
        """A jitted program of the per-shard ``function``, bound to its arguments."""

        def body(*args):
            outs = function(*jax.tree.map(lambda a: a[0], args))
            return jax.tree.map(lambda a: jnp.atleast_1d(a)[None], outs)

        spec = P("expert")
        jitted = jax.jit(jax.shard_map(body, mesh=self.mesh, in_specs=spec, out_specs=spec))
        return lambda: jitted(*args)

    def dispatch_once(self, x, idx):
        return fio.dispatch(x, idx, num_experts=EXPERTS, axis_name="expert", capacity=self.capacity)

    def dispatch(self, n):
        """n dispatches, each with its own routing: equal calls would be merged."""
        idx = self.put(
            np.stack([np.roll(self.topk[i % 4], i // 4, axis=1) for i in range(n)], axis=1)
        )

        def many(x, idx):
            return [self.dispatch_once(x, idx[i]).handle.num_dropped for i in range(n)]

        return self.program(many, self.x, idx)

    def rows_and_handle(self):
        def once(x, idx):
            out = self.dispatch_once(x, idx)
            return out.tokens, out.handle

        rows, handle = self.program(once, self.x, self.put(self.topk[0]))()
        scalars = {"num_dropped", "num_invalid"}
        unstack = jax.tree_util.tree_map_with_path(
            lambda path, a: a[:, 0] if path[-1].name in scalars else a, handle
        )
        return rows, unstack

    def combine(self, n):
        rows, handle = self.rows_and_handle()
        weights = self.put(np.stack([self.weights + i for i in range(n)], axis=1))

        def many(rows, handle, weights):
            return [fio.combine(rows, handle, weights[i]) for i in range(n)]

        return self.program(many, rows, handle, weights)

    def combine_transpose(self, n):
        rows, handle = self.rows_and_handle()
        weights = self.put(np.stack([self.weights + i for i in range(n)], axis=1))

        def many(x, rows, handle, weights):
            outs = []
            for i in range(n):
                _, pull = jax.vjp(lambda r, w: fio.combine(r, handle, w), rows, weights[i])
                outs.append(pull(x)[1])
            return outs

        return self.program(many, self.x, rows, handle, weights)

    def dispatch_along(self, n):
        """The transpose of an unweighted combine."""
        rows, handle = self.rows_and_handle()

        def many(x, rows, handle):
            outs = []
            for i in range(n):
                _, pull = jax.vjp(lambda r: fio.combine(r, handle), rows)
                outs.append(pull(x * (i + 1))[0][:1, :8])
            return outs

        return self.program(many, self.x, rows, handle)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,128,1024,4096,8192")
    parser.add_argument("--ops", default="dispatch,combine,combine_transpose,dispatch_along")
    parser.add_argument("--ranks", type=int, help="GPUs to use; default all")
    parser.add_argument("--num-sms", type=int, help="as in freeio_jax.config")
    parser.add_argument("--json")
    parser.add_argument("--profile", action="store_true", help="kernel times by jax.profiler, too")
    args = parser.parse_args()
    devices = jax.devices("gpu")[: args.ranks]
    fio.config(num_sms=args.num_sms)
    mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
    ENGINES["cuda"].prepare(None)
    limits = Limits.measure([d.local_hardware_id for d in devices])
    print(
        f"# {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}: link "
        f"{limits.link / 1e9:.0f} GB/s, memory {limits.memory / 1e9:.0f} GB/s, flag trip "
        f"{limits.trip * 1e6:.2f} us; engine's own device memory {_native.cuda.device_bytes()} B",
        flush=True,
    )
    print("| T | op | us | kernel us | floor us | ratio |\n|---|---|---|---|---|---|", flush=True)
    results = []
    for tokens in map(int, args.tokens.split(",")):
        bench = Bench(mesh, tokens)
        floor_of = floors(limits, bench.topk[0], bench.capacity, HIDDEN * 2)
        for op in args.ops.split(","):
            floor = floor_of[op]
            program = getattr(bench, op)
            seconds = wall_of_one(program, 2, 12 if tokens > 1000 else 42)
            kernels = kernel_times(program(8), KERNELS[op]) if args.profile else []
            kernel = statistics.median(kernels) if kernels else float("nan")
            figures = {"seconds": seconds, "kernel": kernel, "floor": floor}
            results.append({"tokens": tokens, "op": op, **figures})
            print(
                f"| {tokens} | {op} | {seconds * 1e6:.1f} | {kernel * 1e6:.1f} | "
                f"{floor * 1e6:.1f} | {(kernel if kernels else seconds) / floor:.2f} |",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"limits": dataclasses.asdict(limits), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
