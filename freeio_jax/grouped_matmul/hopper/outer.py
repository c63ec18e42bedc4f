"""Each group's ``rows.T @ cotangents``: the gradient of weights.

The sum goes over the rows of a group, slot by slot. The first and the last slot have rows of other
groups in them, or rows past the end, which may be NaN: the warpgroups that multiply zero them in
shared memory first, each one its own columns of the rows and half of the cotangents' columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from freeio_jax.grouped_matmul.hopper import common, schedule
from freeio_jax.grouped_matmul.hopper.common import LOADER, PIECE, ROWS, Config

#: How many rows are cleaned at once.
STRIP = 16
TILE_K = 2 * ROWS
#: Tiles of K whose columns are gone through together, so that they share the cotangents in L2.
BAND = 8


def _spans(group_sizes, num_rows, depth):
    """For each group: its first slot's first row, its slots, and its rows within them.

    Returns int32 ``[G, 4]``: first row, slots, rows of the first slot that are not the group's, and
    rows of the last slot up to the group's end.
    """
    starts, ends = schedule.group_ends(group_sizes, num_rows)
    firsts = starts // schedule.ROW_ALIGNMENT * schedule.ROW_ALIGNMENT
    slots = jnp.where(ends > starts, -((firsts - ends) // depth), 0)
    return jnp.stack([firsts, slots, starts - firsts, ends - firsts - (slots - 1) * depth], axis=1)


def _clean(slot, strip, begin, end):
    """Zeroes the rows ``[strip, strip + STRIP)`` of a slot that are not in ``[begin, end)``."""
    for column in range(0, slot.shape[1], PIECE):
        piece = slot.at[pl.ds(strip, STRIP), pl.ds(column, PIECE)].transpose((1, 0))
        row = strip + plgpu.layout_cast(
            lax.broadcasted_iota(jnp.int32, (PIECE, STRIP), 1), plgpu.Layout.WGMMA_TRANSPOSED
        )
        value = plgpu.layout_cast(piece[...], plgpu.Layout.WGMMA_TRANSPOSED)
        piece[...] = jnp.where((row >= begin) & (row < end), value, jnp.zeros_like(value))


def outer(
    rows: jax.Array,
    cotangents: jax.Array,
    group_sizes: jax.Array,
    *,
    config: Config,
    num_ctas: int,
    interpret=None,
) -> jax.Array:
    """``[G, K, N]``: each group's ``rows.T @ cotangents``; zero for a group without rows.

    Args:
      rows: ``[M, K]``, M a multiple of 8 and at least ``config.depth``, K a multiple of 128.
      cotangents: ``[M, N]``, N a multiple of ``config.columns``.
      group_sizes: int32 ``[G]``. Rows of other groups, and past the last one, are in no sum.
      config: sizes of the kernel.
      num_ctas: one for each multiprocessor.
      interpret: parameters of Pallas' interpreter, or None.
    """
    num_rows, width = rows.shape[0], cotangents.shape[1]
    num_groups = group_sizes.shape[0]
    tiles_k, tiles_n = rows.shape[1] // TILE_K, width // config.columns
    spans = _spans(group_sizes, num_rows, config.depth).reshape(-1)

    def body(spans_ref, rows_ref, cotangents_ref, out_ref):
        def with_memory(row_slots, cotangent_slots, staging, full, empty, clean):
            warpgroup = lax.axis_index("warpgroup")

            def each_tile(work):
                @plgpu.nd_loop(
                    (num_groups, tiles_k * tiles_n),
                    collective_axes="cta",
                    init_carry=jnp.int32(0),
                )
                def steps(loop, carry):
                    group, tile = loop.index
                    tile_k, tile_n = plgpu.planar_snake(tile, (tiles_k, tiles_n), 0, BAND)
                    first, slots, begin, end = (spans_ref[group * 4 + i] for i in range(4))
                    span = pl.multiple_of(first, schedule.ROW_ALIGNMENT), slots, begin, end
                    work(carry, group, span, tile_k * TILE_K, tile_n * config.columns)
                    return carry + slots

                return steps

            @pl.when(warpgroup == LOADER)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                @each_tile
                def steps(first_step, group, span, k, n):
                    first, slots, _, _ = span

                    @pl.loop(0, slots)
                    def _(i):
                        step = first_step + i
                        slot = common.slot_of(step, config)
                        common.await_empty(empty, step, config)
                        row = pl.multiple_of(first + i * config.depth, schedule.ROW_ALIGNMENT)
                        along = pl.ds(row, config.depth)
                        plgpu.copy_gmem_to_smem(
                            rows_ref.at[along, pl.ds(k, TILE_K)],
                            row_slots.at[slot],
                            full.at[slot],
                        )
                        plgpu.copy_gmem_to_smem(
                            cotangents_ref.at[along, pl.ds(n, config.columns)],
                            cotangent_slots.at[slot],
                            full.at[slot],
                        )

                common.await_last(empty, steps, config)

            @pl.when(warpgroup < LOADER)
            def _():
                plgpu.set_max_registers(232, action="increase")
                mine = pl.ds(warpgroup * ROWS, ROWS)
                half = config.columns // 2
                my_half = pl.ds(warpgroup * half, half)

                @each_tile
                def _(first_step, group, span, k, n):
                    _, slots, first_begin, last_end = span

                    def accumulate(sums):
                        @pl.loop(0, slots)
                        def _(i):
                            step = first_step + i
                            slot = common.slot_of(step, config)
                            plgpu.barrier_wait(full.at[slot])
                            begin = jnp.where(i == 0, first_begin, 0)
                            end = jnp.where(i == slots - 1, last_end, config.depth)

                            @pl.when((begin > 0) | (end < config.depth))
                            def _():
                                for strip in range(0, config.depth, STRIP):

                                    @pl.when((strip < begin) | (strip + STRIP > end))
                                    def _(strip=strip):
                                        _clean(row_slots.at[slot, :, mine], strip, begin, end)
                                        _clean(cotangent_slots.at[slot, :, my_half], strip, begin, end)

                                plgpu.commit_smem()
                                plgpu.barrier_arrive(clean)
                                plgpu.barrier_wait(clean)

                            plgpu.wgmma(
                                sums,
                                row_slots.at[slot, :, mine].transpose((1, 0)),
                                cotangent_slots.at[slot],
                            )
                            plgpu.wgmma_wait(1)

                            @pl.when(i > 0)
                            def _():
                                common.release(empty, step - 1, config)

                        plgpu.wgmma_wait(0)

                        @pl.when(slots > 0)
                        def _():
                            common.release(empty, first_step + slots - 1, config)

                        return sums[...]

                    sums = pl.run_scoped(accumulate, plgpu.ACC((ROWS, config.columns), jnp.float32))
                    common.store(
                        staging.at[warpgroup],
                        out_ref.at[group],
                        sums.astype(out_ref.dtype),
                        k + warpgroup * ROWS,
                        n,
                        pieces=config.pieces,
                    )

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            with_memory,
            common.tiled_smem((config.stages, config.depth, TILE_K), rows.dtype),
            common.tiled_smem((config.stages, config.depth, config.columns), rows.dtype),
            common.tiled_smem((2, config.pieces, ROWS, PIECE), rows.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="warpgroup",
        )

    return common.kernel(
        body,
        jax.ShapeDtypeStruct((num_groups, rows.shape[1], width), rows.dtype),
        num_ctas=num_ctas,
        num_threads=3,
        name="freeio_grouped_outer",
        interpret=interpret,
    )(spans, rows, cotangents)
