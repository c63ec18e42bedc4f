"""Compiles layers with start and done for two H200s that are not there, and writes what XLA makes.

    python gpu_programs.py FOLDER TOPOLOGY

``freeio_jax/bench/absent.py`` says what it needs.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

PACKAGE = pathlib.Path(importlib.util.find_spec("freeio_jax").origin).parent
spec = importlib.util.spec_from_file_location("absent", PACKAGE / "bench" / "absent.py")
absent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(absent)
fio = absent.import_with_stand_in()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from freeio_jax.flax import MoEConfig, moe  # noqa: E402
from freeio_jax.grouped_matmul import use  # noqa: E402

T, H, K, E, CAPACITY = 512, 256, 2, 8, 1024


def shared(x, w):
    with jax.named_scope("beside"):
        return jnp.tanh(x @ w)


def layer(x, topk_idx, weights, w):
    """An MoE layer whose two exchanges run beside ``shared``."""
    options = {"num_experts": E, "axis_name": "expert", "capacity": CAPACITY}
    pending = fio.dispatch_start(x, topk_idx, **options)
    first, pending = fio.between(pending, shared, x, w)
    out = pending.done()
    rows = jnp.sin(out.tokens) * 2
    pending = fio.combine_start(rows, out.handle, weights)
    second, pending = fio.between(pending, shared, first, w)
    return pending.done() + second


def layer_of_leaves(x, topk_idx, weights, w):
    """As above; a token has a part without elements, too, and so have its results."""
    options = {"num_experts": E, "axis_name": "expert", "capacity": CAPACITY}
    pending = fio.dispatch_start({"rows": x, "none": x[:, :0]}, topk_idx, **options)
    first, pending = fio.between(pending, shared, x, w)
    out = pending.done()
    pending = fio.combine_start(jnp.sin(out.tokens["rows"]), out.handle, weights)
    second, pending = fio.between(pending, shared, first, w)
    return jnp.concatenate([pending.done() + second, out.tokens["none"][:T]], axis=1)


def batches(x, topk_idx, weights, w):
    """Two micro-batches: a synchronous exchange, and two in flight at once, among them."""
    options = {"num_experts": E, "axis_name": "expert", "capacity": CAPACITY}
    pendings = [fio.dispatch_start(x * k, topk_idx, **options) for k in (1, 2)]
    beside, pendings = fio.between(pendings, shared, x, w)
    outs = [pending.done() for pending in pendings]
    backs = [fio.combine_start(out.tokens * 2, out.handle, weights) for out in outs]
    among = fio.dispatch(beside, topk_idx, **options)
    beside, backs = fio.between(backs, shared, beside, w)
    z = [pending.done() for pending in backs]
    return z[0] + jnp.cos(z[1]) + beside + fio.combine(among.tokens, among.handle, weights)


def layers(step, x, topk_idx, weights, w, shifts=(0, 1, 2)):
    """Three layers, each with ids of its own. Where all shifts are None, with the same ids."""

    def body(x, shift):
        return step(x, topk_idx if shift is None else (topk_idx + shift) % E, weights, w), None

    shifts = None if None in shifts else jnp.array(shifts)
    return lax.scan(body, x, shifts, length=3)[0]


def sharded(mesh, fn):
    specs = (P("expert"), P("expert"), P("expert"), P())
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("expert"))


def gradients(mesh, fn):
    def loss(x, topk_idx, weights, w):
        return (sharded(mesh, fn)(x, topk_idx, weights, w).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, (0, 2, 3))


def whole_layer(num_chunks):
    """The gradients of a layer of freeio_jax.flax with a shared expert, and their arguments."""
    config = MoEConfig(
        overlap=True,
        num_experts=E,
        top_k=K,
        expert_width=H,
        shared_expert_width=H,
        capacity_factor=1.25,
        num_chunks=num_chunks,
    )

    def make(mesh):
        def loss(parameters, x):
            with use("ragged_dot"):  # no GPU is there on which another one could be tried
                y, _ = moe(parameters, x, config, mesh=mesh)
            return (y.astype(jnp.float32) ** 2).sum()

        parameters = {
            name: shape_of(mesh, P(*names), jnp.bfloat16, *shape)
            for name, (shape, names) in config.parameters(H).items()
        }
        x = shape_of(mesh, P("expert"), jnp.bfloat16, mesh.size * T, H)
        return jax.value_and_grad(loss, (0, 1)), (parameters, x)

    return make


def exchanges(make):
    """``make(mesh)`` and the arguments of the layers above."""

    def with_arguments(mesh):
        tokens, by_rank = mesh.size * T, P("expert")
        return make(mesh), (
            shape_of(mesh, by_rank, jnp.bfloat16, tokens, H),
            shape_of(mesh, by_rank, jnp.int32, tokens, K),
            shape_of(mesh, by_rank, jnp.float32, tokens, K),
            shape_of(mesh, P(), jnp.bfloat16, H, H),
        )

    return with_arguments


def shape_of(mesh, spec, dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))


CASES = {
    "forward": exchanges(lambda mesh: sharded(mesh, layer)),
    "gradients": exchanges(lambda mesh: gradients(mesh, layer)),
    "leaf-without-elements": exchanges(lambda mesh: gradients(mesh, layer_of_leaves)),
    "two-batches": exchanges(lambda mesh: gradients(mesh, batches)),
    "scan": exchanges(lambda mesh: gradients(mesh, partial(layers, layer))),
    "scan-of-one-routing": exchanges(
        lambda mesh: gradients(mesh, partial(layers, layer, shifts=(None,)))
    ),
    "remat": exchanges(lambda mesh: gradients(mesh, partial(layers, jax.checkpoint(layer)))),
    "whole-layer": whole_layer(num_chunks=1),
    "chunks": whole_layer(num_chunks=2),
}
#: A program's kernels need not be fast. These options change nothing in its schedule.
FAST_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SCHEDULERS = {
    "default": {},
    "latency-hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "not-hiding": {
        "xla_gpu_enable_latency_hiding_scheduler": False,
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
    },
}


def main(folder, topology):
    mesh = Mesh(np.array(absent.devices(topology)), ("expert",), axis_types=(AxisType.Auto,))

    def write(lowered, case, scheduler):
        compiled = lowered.compile(compiler_options=SCHEDULERS[scheduler] | FAST_TO_COMPILE)
        (pathlib.Path(folder) / f"{case}.{scheduler}").write_text(compiled.as_text())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for case, make in CASES.items():
            function, args = make(mesh)
            lowered = jax.jit(function).lower(*args)
            futures += [pool.submit(write, lowered, case, scheduler) for scheduler in SCHEDULERS]
        for future in futures:
            future.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
