"""Compiles layers with start and done for two H200s that are not there, and writes what XLA makes.

    python gpu_programs.py FOLDER TOPOLOGY

It needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and neither a GPU nor nvcc. XLA
wants a handler for every custom call, and asks it nothing: any serves. So a stand-in replaces the
CUDA engine's C++ side.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import jax_plugins.xla_cuda13 as plugin
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

HERE = pathlib.Path(__file__).parent
OPERATIONS = ("dispatch", "dispatch_along", "combine", "combine_transpose")


class StandIn:
    """What ``engines.CudaEngine`` asks of the engine's C++ side."""

    def __init__(self, cpu):
        self._handler = cpu.ffi_targets()["freeio_combine"]["execute"]

    def set_starter(self, start):
        pass

    def has_driver(self):
        return False

    def ffi_types(self):
        return {}

    def ffi_targets(self):
        names = ("done", "check", *OPERATIONS, *(f"{name}_start" for name in OPERATIONS))
        return {f"freeio_{name}": {"execute": self._handler} for name in names}


def import_with_stand_in():
    """freeio_jax with the stand-in as the native module's CUDA part."""
    folder = pathlib.Path(importlib.util.find_spec("freeio_jax").origin).parent
    # importlib.util.find_spec would import freeio_jax first. Every finder is asked, as an editable
    # installation has one of its own.
    specs = (f.find_spec("freeio_jax._native", [str(folder)]) for f in sys.meta_path)
    spec = next(filter(None, specs))
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    native.cuda = StandIn(native)
    sys.modules["freeio_jax._native"] = native
    import freeio_jax
    from freeio_jax.engines import ENGINES

    ENGINES["cuda"].start = lambda: None  # there are no GPUs to make ready
    return freeio_jax


fio = import_with_stand_in()
plugin._check_cuda_versions = lambda *args, **kwargs: None  # there is no driver to ask
jax.devices()
try:
    plugin.initialize()
except Exception as error:  # the platform is registered, only devices are missing
    print("no devices, as expected:", type(error).__name__)

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


CASES = {
    "forward": lambda mesh: sharded(mesh, layer),
    "gradients": lambda mesh: gradients(mesh, layer),
    "two-batches": lambda mesh: gradients(mesh, batches),
    "scan": lambda mesh: gradients(mesh, partial(layers, layer)),
    "scan-of-one-routing": lambda mesh: gradients(mesh, partial(layers, layer, shifts=(None,))),
    "remat": lambda mesh: gradients(mesh, partial(layers, jax.checkpoint(layer))),
}
SCHEDULERS = {
    "default": {},
    "latency-hiding": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "not-hiding": {
        "xla_gpu_enable_latency_hiding_scheduler": False,
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
    },
}


def devices(topology):
    """Of a topology of slices x processes x devices of a process."""
    target = (HERE / "h200.txtpb").read_text()
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=target, topology=topology
    ).devices


def main(folder, topology):
    mesh = Mesh(np.array(devices(topology)), ("expert",), axis_types=(AxisType.Auto,))

    def shape(spec, dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    tokens = mesh.size * T
    args = (
        shape(P("expert"), jnp.bfloat16, tokens, H),
        shape(P("expert"), jnp.int32, tokens, K),
        shape(P("expert"), jnp.float32, tokens, K),
        shape(P(), jnp.bfloat16, H, H),
    )
    for case, make in CASES.items():
        lowered = jax.jit(make(mesh)).lower(*args)
        for scheduler, options in SCHEDULERS.items():
            text = lowered.compile(compiler_options=options).as_text()
            (pathlib.Path(folder) / f"{case}.{scheduler}").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
