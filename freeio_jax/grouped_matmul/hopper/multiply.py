"""Rows times their group's matrix, or its transpose: the forward product and the rows' gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from freeio_jax.grouped_matmul.hopper import common, schedule
from freeio_jax.grouped_matmul.hopper.common import LOADER, PIECE, ROWS, Config


def _store(staging, out, values, row, column, *, pieces: int, span):
    """Some rows of a warpgroup's ``values`` [ROWS, columns], to ``out`` at row, column.

    Args:
      staging: shared memory of this warpgroup, [pieces, ROWS, PIECE].
      out: [rows, columns] in global memory.
      values: of out's dtype.
      row, column: where row 0 and column 0 of ``values`` would be in ``out``.
      pieces: of PIECE columns, how many are on their way at once.
      span: the first row that is stored, and the one after the last.
    """
    begin, end = span
    count = end - begin

    def copy(j, first_row, num_rows):
        plgpu.copy_smem_to_gmem(
            staging.at[j % pieces, pl.ds(first_row, num_rows)],
            out.at[pl.ds(row + first_row, num_rows), pl.ds(column + j * PIECE, PIECE)],
            commit_group=False,
        )

    def copy_span(j):
        # A copy has a size that is known when the kernel is compiled. Two copies of the largest
        # power of two that fits cover the rows; those that both have get the same values twice.
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
        copy_span(j)
        plgpu.commit_smem_to_gmem_group()


def multiply(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool,
    config: Config,
    num_ctas: int,
    interpret=None,
) -> jax.Array:
    """``rows[m] @ weights[g(m)]``, or with ``transposed`` ``rows[m] @ weights[g(m)].T``.

    Args:
      rows: ``[M, K]``, M a multiple of 8 and at least 128, K a multiple of ``config.depth``.
      weights: ``[G, K, N]``, or ``[G, N, K]`` with ``transposed``; N a multiple of
        ``config.columns``. They are read as they lie.
      group_sizes: int32 ``[G]``.
      transposed: see above.
      config: sizes of the kernel.
      num_ctas: one for each multiprocessor.
      interpret: parameters of Pallas' interpreter, or None.

    Returns:
      ``[M, N]``; rows past the last group are zero.
    """
    num_rows, depth = rows.shape
    num_groups, width = weights.shape[0], weights.shape[1 if transposed else 2]
    num_columns, num_steps = width // config.columns, depth // config.depth
    tiles = schedule.row_tiles(group_sizes, num_rows)
    order = schedule.tile_order(tiles, num_columns, num_ctas).reshape(-1)
    total = (tiles["count"] * num_columns).reshape(1)

    def body(order_ref, total_ref, rows_ref, weights_ref, out_ref):
        def with_memory(row_slots, weight_slots, staging, full, empty):
            warpgroup = lax.axis_index("warpgroup")

            def each_tile(work):
                """``work(first step, steps, tile)`` for each tile of this CTA; all its steps."""

                @plgpu.nd_loop((total_ref[0],), collective_axes="cta", init_carry=jnp.int32(0))
                def steps(loop, carry):
                    place = loop.index[0] * 4
                    group = order_ref[place]
                    # Rows past the last group are sums of nothing.
                    steps = jnp.where(group < num_groups, num_steps, 0)
                    row = pl.multiple_of(order_ref[place + 1], schedule.ROW_ALIGNMENT)
                    span = order_ref[place + 2]
                    column = order_ref[place + 3] * config.columns
                    tile = group, row, lax.div(span, 256), lax.rem(span, 256), column
                    work(carry, steps, *tile)
                    return carry + steps

                return steps

            @pl.when(warpgroup == LOADER)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                @each_tile
                def steps(first_step, steps, group, row, begin, end, column):
                    @pl.loop(0, steps)
                    def _(i):
                        step = first_step + i
                        slot = common.slot_of(step, config)
                        common.await_empty(empty, step, config)
                        along = pl.ds(i * config.depth, config.depth)
                        across = pl.ds(column, config.columns)
                        plgpu.copy_gmem_to_smem(
                            rows_ref.at[pl.ds(row, schedule.TILE_ROWS), along],
                            row_slots.at[slot],
                            full.at[slot],
                        )
                        plgpu.copy_gmem_to_smem(
                            weights_ref.at[
                                (group, across, along) if transposed else (group, along, across)
                            ],
                            weight_slots.at[slot],
                            full.at[slot],
                        )

                common.await_last(empty, steps, config)

            @pl.when(warpgroup < LOADER)
            def _():
                plgpu.set_max_registers(232, action="increase")

                @each_tile
                def _(first_step, steps, group, row, begin, end, column):
                    mine = warpgroup * ROWS
                    begin, end = (jnp.clip(x - mine, 0, ROWS) for x in (begin, end))

                    def accumulate(sums):
                        @pl.loop(0, steps)
                        def _(i):
                            step = first_step + i
                            slot = common.slot_of(step, config)
                            plgpu.barrier_wait(full.at[slot])
                            matrix = weight_slots.at[slot]
                            if transposed:
                                matrix = matrix.transpose((1, 0))
                            plgpu.wgmma(sums, row_slots.at[slot, pl.ds(mine, ROWS)], matrix)
                            plgpu.wgmma_wait(1)

                            @pl.when(i > 0)
                            def _():
                                common.release(empty, step - 1, config)

                        plgpu.wgmma_wait(0)

                        @pl.when(steps > 0)
                        def _():
                            common.release(empty, first_step + steps - 1, config)

                        return sums[...]

                    @pl.when(end > begin)
                    def _():
                        sums = pl.run_scoped(
                            accumulate, plgpu.ACC((ROWS, config.columns), jnp.float32)
                        )
                        _store(
                            staging.at[warpgroup],
                            out_ref,
                            sums.astype(out_ref.dtype),
                            row + mine,
                            column,
                            pieces=config.pieces,
                            span=(begin, end),
                        )

                    # The other warpgroup's rows alone are the group's.
                    @pl.when(end <= begin)
                    def _():
                        @pl.loop(0, steps)
                        def _(i):
                            step = first_step + i
                            plgpu.barrier_wait(full.at[common.slot_of(step, config)])
                            common.release(empty, step, config)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        matrix = (config.columns, config.depth) if transposed else (config.depth, config.columns)
        pl.run_scoped(
            with_memory,
            common.tiled_smem((config.stages, schedule.TILE_ROWS, config.depth), rows.dtype),
            common.tiled_smem((config.stages, *matrix), rows.dtype),
            common.tiled_smem((2, config.pieces, ROWS, PIECE), rows.dtype, 1),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            collective_axes="warpgroup",
        )

    return common.kernel(
        body,
        jax.ShapeDtypeStruct((num_rows, width), rows.dtype),
        num_ctas=num_ctas,
        num_threads=3,
        name="freeio_grouped_multiply_transposed" if transposed else "freeio_grouped_multiply",
        interpret=interpret,
    )(order, total, rows, weights)
