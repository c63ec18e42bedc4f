"""What both kernels share: memory, and roles of warpgroups.

A CTA has two warpgroups that multiply and one that loads. The operands' tiles go through ``stages``
slots of shared memory. The loader waits until a slot is ``empty``, and the copy engine says that it
is ``full``; both barriers count in order, so slot ``step % stages`` is that of a step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

#: Rows that a warpgroup multiplies at once.
ROWS = 64
#: Columns of a piece of shared memory that one copy moves: 128 bytes of a 16-bit dtype.
PIECE = 64

LOADER = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a kernel.

    Attributes:
      columns: of a tile of the result; each of the two warpgroups multiplies all of them.
      depth: how much of the sum is in a slot.
      stages: slots.
      pieces: of a warpgroup's result that lie in shared memory at once, when rows are multiplied.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    pieces: int = 2


def num_sms() -> int:
    return getattr(jax.local_devices()[0], "core_count", None) or 132


def tiled_smem(shape, dtype, rows: int = 8):
    """Shared memory as wgmma and the copy engine want it; ``rows`` of a tile of it."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((rows, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def slot_of(step, config: Config):
    return lax.rem(step, jnp.int32(config.stages))


def await_empty(empty, step, config: Config):
    """Before a slot is filled: what was there ``stages`` steps ago has been multiplied."""

    @pl.when(step >= config.stages)
    def _():
        plgpu.barrier_wait(empty.at[slot_of(step, config)])


def await_last(empty, steps, config: Config):
    """The loader stays until all slots are empty: an arrival needs a CTA that is there."""
    for i in range(config.stages):
        step = steps - config.stages + i

        @pl.when(step >= 0)
        def _(step=step):
            plgpu.barrier_wait(empty.at[slot_of(jnp.maximum(step, 0), config)])


def release(empty, step, config: Config):
    plgpu.barrier_arrive(empty.at[slot_of(step, config)])


def kernel(body, out_type, *, num_ctas: int, num_threads: int, name: str, interpret):
    """``body`` as a function of its operands: one CTA on each multiprocessor."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=num_threads,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True),
        kernel_name=name,
    )
