"""One process of test_gpu_processes.py: exchanges among the GPUs of several processes.

    python gpu_program.py SCENARIO [TIMEOUT]

Runs on any platform that has an engine. Every process draws the same numbers and checks its own
shards against the oracle.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import oracle

import freeio_jax as fio
from freeio_jax import _native
from freeio_jax.bench import profile
from freeio_jax.layout import dropless_capacity

TOP_K = 2


def make_mesh(groups=1):
    devices = np.array(jax.devices()).reshape(groups, -1)
    return Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)


class Layer:
    """dispatch, combine and the gradients by tokens and weights, on ``mesh``."""

    def __init__(self, mesh, num_tokens, width, seed):
        self.mesh, ranks = mesh, mesh.shape["expert"]
        self.num_experts = 2 * ranks
        rng = np.random.default_rng(seed)
        shape = (mesh.size, num_tokens)
        # Small integers: every sum is exact, in whatever order.
        self.tokens = rng.integers(-4, 5, (*shape, width)).astype(np.float32)
        self.weights = rng.integers(-4, 5, (*shape, TOP_K)).astype(np.float32)
        self.topk_idx = rng.integers(-1, self.num_experts, (*shape, TOP_K)).astype(np.int32)

        def body(tokens, weights, topk_idx):
            def layer(tokens, weights):
                out = fio.dispatch(
                    tokens, topk_idx[0], num_experts=self.num_experts, axis_name="expert"
                )
                return fio.combine(2 * out.tokens, out.handle, weights), out

            (z, out), pull = jax.vjp(layer, tokens[0], weights[0])
            grads = pull((jnp.ones_like(z), jax.tree.map(_zero_cotangent, out)))
            return tuple(a[None] for a in (out.tokens, z, *grads))

        spec = P(("data", "expert"))
        self._sharding = NamedSharding(mesh, spec)
        self._run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))

    def __call__(self):
        args = [
            jax.make_array_from_callback(a.shape, self._sharding, lambda index, a=a: a[index])
            for a in (self.tokens, self.weights, self.topk_idx)
        ]
        return jax.block_until_ready(self._run(*args))

    def check(self, results):
        """Compares this process's shards."""
        ranks = self.mesh.shape["expert"]
        firsts = range(0, self.mesh.size, ranks)
        expected = [self._expected(first, first + ranks) for first in firsts]
        for i, (name, array) in enumerate(
            zip(("rows", "z", "d tokens", "d weights"), results, strict=True)
        ):
            whole = np.concatenate([group[i] for group in expected])
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index], name)

    @functools.cache  # noqa: B019 - a layer lives as long as the process
    def _expected(self, first, end):
        tokens, weights, topk_idx = (
            a[first:end] for a in (self.tokens, self.weights, self.topk_idx)
        )
        capacity = dropless_capacity(
            num_ranks=len(tokens),
            num_tokens=tokens.shape[1],
            top_k=TOP_K,
            num_experts=self.num_experts,
            alignment=1,
        )
        placement = oracle.place(
            topk_idx, num_experts=self.num_experts, capacity=capacity, alignment=1
        )
        rows = oracle.dispatch(tokens, placement)
        z = oracle.combine(2 * rows, placement, topk_idx.shape, weights)
        kept = (topk_idx >= 0).astype(np.float32)
        d_tokens = np.ones_like(tokens) * 2 * (weights * kept).sum(-1, keepdims=True)
        d_weights = 2 * tokens.sum(-1, keepdims=True) * kept
        return rows, z, d_tokens, d_weights


def _zero_cotangent(a):
    if jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def run(num_tokens, width=33, groups=1, seed=0):
    layer = Layer(make_mesh(groups), num_tokens, width, seed)
    for _ in range(3):
        layer.check(layer())


# --- Scenarios -----------------------------------------------------------------------------------


def layers():
    for seed, num_tokens in enumerate((1, 7, 40, 3000)):
        run(num_tokens, seed=seed)


def groups():
    for count in range(1, jax.device_count() + 1):
        if jax.device_count() % count == 0:
            run(24, groups=count, seed=count)


def again():
    """A program that ran before shutdown() is refused after it, and compiled anew if asked for."""
    layer = Layer(make_mesh(), 16, 8, 0)
    layer.check(layer())
    fio.shutdown()
    fio.initialize()
    try:
        layer()
    except Exception as error:  # XLA's own type
        print(f"ERROR {error}".replace("\n", " "), flush=True)
    jax.clear_caches()
    layer.check(layer())


def growth():
    """XLA's pool grows from call to call: set XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    for exponent in range(4, 15, 2):
        run(1 << exponent, width=1024, seed=exponent)


def few_ctas():
    """A large combine by the kernel for few CTAs. Sums of small integers are always exact."""
    if float(jax.local_devices()[0].compute_capability) < 9:
        print("LEFT OUT: bulk stores need compute capability 9.0", flush=True)
        return
    _native.cuda.set_few_ctas(64)
    for num_sms in (4, 24, 64):
        fio.config(num_sms=num_sms)
        for num_tokens, width in ((1500, 7168), (3000, 1000)):
            layer = Layer(make_mesh(), num_tokens, width, seed=num_sms)
            names = {event.name for event in profile.record(layer)}
            assert any("FewWarp" in name for name in names), names
            for _ in range(5):
                layer.check(layer())


def allocator():
    try:
        run(8)
    except Exception as error:  # XLA's own type
        print(f"ERROR {error}".replace("\n", " "))


def killed():
    layer = _replayed_layer()
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _until_error(layer)


def stays_away():
    layer = _replayed_layer()
    if jax.process_index() == 1:
        time.sleep(12)
        return
    _until_error(layer)


def _replayed_layer():
    """One whose launches XLA has captured, and replays by now where it does that."""
    layer = Layer(make_mesh(), 16, 8, 0)
    for _ in range(3):
        layer.check(layer())
    return layer


def soak():
    """Two thousand exchanges and more, of shapes that change from call to call."""
    rng = np.random.default_rng(0)
    shapes = (1, 8), (2, 1024), (3, 33), (7, 7168), (16, 33), (40, 8), (128, 7168), (129, 1024)
    shapes += (300, 33), (1000, 1024), (1500, 8), (3000, 256)
    layers = [Layer(make_mesh(), num_tokens, width, seed=width) for num_tokens, width in shapes]
    began = time.monotonic()
    for call in range(len(layers) + 550):  # of four exchanges each
        number = call if call < len(layers) else rng.integers(len(layers))
        layers[number].check(layers[number]())
        if call % 50 == 0:
            print(f"{4 * call} exchanges in {time.monotonic() - began:.1f} s", flush=True)


def times():
    """Times of the kernels, as a profiler sees them."""
    hidden, top_k, num_experts = 7168, 8, 256
    mesh = make_mesh()
    ranks = mesh.shape["expert"]
    for num_tokens in (128, 4096):
        rng = np.random.default_rng(num_tokens)
        ids = rng.permuted(np.tile(np.arange(num_experts), (ranks * num_tokens, 1)), axis=1)
        capacity = num_tokens * top_k * 5 // 4
        sharding = NamedSharding(mesh, P("expert"))

        def put(array, sharding=sharding):
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        tokens = rng.standard_normal((ranks * num_tokens, hidden), np.float32)
        tokens = put(tokens.astype(jnp.bfloat16))
        weights = put(rng.random((ranks * num_tokens, top_k), np.float32))
        topk_idx = put(ids[:, :top_k].astype(np.int32))

        def body(tokens, weights, topk_idx, capacity=capacity):
            def layer(tokens, weights):
                out = fio.dispatch(
                    tokens, topk_idx, num_experts=num_experts, axis_name="expert", capacity=capacity
                )
                return fio.combine(out.tokens, out.handle, weights)

            z, pull = jax.vjp(layer, tokens, weights)
            return z, *pull(z)

        spec = P("expert")
        step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))

        def run(step=step, args=(tokens, weights, topk_idx)):
            return [step(*args) for _ in range(20)][-1]

        events = profile.record(run)
        for name, pattern in (
            ("dispatch", "(hosts_dispatch|dispatch_small|dispatch_large)_kernel"),
            ("combine", "(hosts_combine|combine_small|combine_large)_kernel"),
            ("combine_transpose", "(hosts|combine)_transpose_kernel"),
            ("dispatch along", "dispatch_along_kernel"),
        ):
            found = sorted(profile.durations(events, pattern))
            if found:
                print(
                    f"TIMES T={num_tokens} {name}: median {found[len(found) // 2] * 1e6:.1f} us, "
                    f"least {found[0] * 1e6:.1f} us of {len(found)}",
                    flush=True,
                )
        by_name = sorted(profile.longest(events).items(), key=lambda item: -item[1])
        for name, seconds in by_name[:8]:
            print(f"KERNEL T={num_tokens} {seconds / 20 * 1e6:.1f} us {name[:150]}", flush=True)
        began = time.perf_counter()
        jax.block_until_ready(run())
        print(f"STEP T={num_tokens} {(time.perf_counter() - began) / 20 * 1e6:.1f} us", flush=True)


def _until_error(layer):
    """The first call's results are spoiled, the second one raises."""
    began = time.monotonic()
    for _ in range(2):
        try:
            layer.check(layer())
        except AssertionError:
            print("SPOILED", flush=True)
        except Exception as error:
            text = str(error).replace("\n", " ")
            print(f"ERROR after {time.monotonic() - began:.1f} s: {text}", flush=True)
            os._exit(0)


if __name__ == "__main__":
    jax.distributed.initialize()
    fio.initialize()
    # To start NVSHMEM may take longer than an exchange should wait.
    for seconds in sys.argv[2:]:
        fio.config(timeout=seconds)
    globals()[sys.argv[1]]()
    print("FINISHED", flush=True)
    fio.shutdown()
