"""What both kernels share: memory, roles of warpgroups, and how a result leaves.

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
      pieces: of a warpgroup's result that lie in shared memory at once.
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


def store(staging, out, values, row, column, *, pieces: int, span=None):
    """A warpgroup's ``values`` [ROWS, columns], to ``out`` at row, column.

    Args:
      staging: shared memory of this warpgroup, [pieces, ROWS, PIECE].
      out: [rows, columns] in global memory.
      values: of out's dtype.
      row, column: where row 0 and column 0 of ``values`` would be in ``out``.
      pieces: of PIECE columns, how many are on their way at once.
      span: the first row that is stored, and the one after the last; None: all are.
    """

    def copy(j, first_row, num_rows):
        plgpu.copy_smem_to_gmem(
            staging.at[j % pieces, pl.ds(first_row, num_rows)],
            out.at[pl.ds(row + first_row, num_rows), pl.ds(column + j * PIECE, PIECE)],
            commit_group=False,
        )

    def copy_span(j, begin, end):
        # A copy has a size that is known when the kernel is compiled. Two copies of the largest
        # power of two that fits cover the rows; those that both have get the same values twice.
        count = end - begin
        pl.when(count == ROWS)(lambda: copy(j, 0, ROWS))
        size = ROWS // 2  # of no rows, no copy
        while size:

            @pl.when((count >= size) & (count < 2 * size))
            def _(size=size):
                copy(j, begin, size)
                copy(j, end - size, size)

            size //= 2

    for j in range(values.shape[1] // PIECE):
        # The copy that last read this piece of shared memory is through with it.
        plgpu.wait_smem_to_gmem(pieces - 1, wait_read_only=True)
        staging[j % pieces] = values[:, j * PIECE : (j + 1) * PIECE]
        plgpu.commit_smem()
        if span is None:
            copy(j, 0, ROWS)
        else:
            copy_span(j, *span)
        plgpu.commit_smem_to_gmem_group()


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
