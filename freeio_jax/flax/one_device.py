"""The check that a layer without a mesh is in a program for one device."""

from __future__ import annotations

import jax
from jax._src import core
from jax.interpreters import ad, batching, mlir


def on_one_device(x: jax.Array) -> jax.Array:
    """``x``, in a program that is compiled for one device.

    Until a program is lowered, JAX does not tell for how many devices it is. Without this check XLA
    would fail on the exchange, with an error that names neither the layer nor the fix.

    Raises:
      ValueError: when it is lowered for several devices, with the fix.
    """
    return one_device_p.bind(x)


def _lowering(ctx, x):
    attributes = ctx.module_context.module.operation.attributes
    num_devices = attributes["mhlo.num_partitions"].value
    if num_devices > 1:
        raise ValueError(
            f"MoE: the program runs on {num_devices} devices, but the layer knows of no mesh with "
            "its axes, neither from its arguments nor from its surroundings. Call it under "
            "jax.set_mesh(mesh), or pass mesh=mesh to it; jax.set_mesh replaces `with mesh:`."
        )
    return [x]


one_device_p = core.Primitive("freeio_one_device")
one_device_p.def_impl(lambda x: x)
one_device_p.def_abstract_eval(lambda x: x)
ad.deflinear2(one_device_p, lambda cotangent, x: [cotangent])
batching.defvectorized(one_device_p)
mlir.register_lowering(one_device_p, _lowering)
