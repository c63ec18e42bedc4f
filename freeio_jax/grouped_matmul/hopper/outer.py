"""Each group's ``rows.T @ cotangents``: the gradient of weights.

The sum goes over the rows of a group, slot by slot. The first and the last slot have rows of other
groups in them, or rows past the end, which may be NaN. The warpgroups that multiply zero them in
shared memory first, each one its own columns of the rows. The cotangents of such rows are then
multiplied with zero, so they matter only where they are not finite. XLA looks at them before, and
only for a group beside which there is such a value each warpgroup zeroes the cotangents, too (both
write the same to the same place). To do so always takes a tenth of the time.
"""

from __future__ import annotations

import math

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
#: Tiles along the longer side of a result that are gone through together, so that they share in L2
#: what they read of the other side.
BAND = 8


def _spans(cotangents, group_sizes, depth):
    """For each group: its slots, its rows within them, and what is beside it.

    Returns int32 ``[G, 5]``: first row of the first slot; number of slots; rows of the first slot
    that are not the group's; rows of the last slot up to the group's end; and whether a cotangent
    in the slots' other rows is not finite. A group without rows has a slot, too, and no rows in it.
    """
    num_rows = cotangents.shape[0]
    starts, ends = schedule.group_ends(group_sizes, num_rows)
    is_empty = ends <= starts
    starts, ends = jnp.where(is_empty, 0, starts), jnp.where(is_empty, 0, ends)
    firsts = starts // schedule.ROW_ALIGNMENT * schedule.ROW_ALIGNMENT
    slots = jnp.maximum(-((firsts - ends) // depth), 1)
    before = firsts[:, None] + jnp.arange(schedule.ROW_ALIGNMENT, dtype=jnp.int32)
    after = ends[:, None] + jnp.arange(depth, dtype=jnp.int32)
    beside = jnp.concatenate([before, after], axis=1)
    is_beside = (beside < starts[:, None]) | (beside >= ends[:, None])
    is_beside &= beside < jnp.minimum(firsts + slots * depth, num_rows)[:, None]
    finite = jnp.isfinite(cotangents[jnp.minimum(beside, num_rows - 1)])
    is_dirty = jnp.any(~finite & is_beside[..., None], axis=(1, 2))
    end_of_last = ends - firsts - (slots - 1) * depth
    return jnp.stack([firsts, slots, starts - firsts, end_of_last, is_dirty], axis=1)


def _strip_layout():
    """STRIP x PIECE values over 128 threads: each has eight neighbours of a row, 16 bytes."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((STRIP, PIECE), (STRIP // 4, PIECE), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _clean(slot, begin, end):
    """Zeroes the rows of a slot that are not in ``[begin, end)``."""
    layout = _strip_layout()
    pieces = range(0, slot.shape[1], PIECE)
    for strip in range(0, slot.shape[0], STRIP):
        of_strip = [slot.at[pl.ds(strip, STRIP), pl.ds(column, PIECE)] for column in pieces]

        @pl.when((strip + STRIP <= begin) | (strip >= end))
        def _(of_strip=of_strip):
            for piece in of_strip:
                piece[...] = plgpu.layout_cast(jnp.zeros(piece.shape, piece.dtype), layout)

        is_cut = ((strip < begin) & (begin < strip + STRIP)) | (
            (strip < end) & (end < strip + STRIP)
        )

        @pl.when(is_cut)
        def _(of_strip=of_strip, strip=strip):
            row = strip + plgpu.broadcasted_iota(jnp.int32, (STRIP, PIECE), 0, layout=layout)
            inside = (row >= begin) & (row < end)
            for piece in of_strip:
                value = plgpu.layout_cast(piece[...], layout)
                piece[...] = jnp.where(inside, value, jnp.zeros_like(value))


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
    width = cotangents.shape[1]
    num_groups = group_sizes.shape[0]
    tiles = rows.shape[1] // TILE_K, width // config.columns
    longer = 0 if tiles[0] >= tiles[1] else 1
    spans = _spans(cotangents, group_sizes, config.depth).reshape(-1)

    def body(spans_ref, rows_ref, cotangents_ref, out_ref):
        def with_memory(row_slots, cotangent_slots, staging, full, empty, added):
            warpgroup = lax.axis_index("warpgroup")

            def each_tile(work):
                """``work(first step, span, group, k, n)`` for each tile; all steps of this CTA."""

                @plgpu.nd_loop(
                    (num_groups, math.prod(tiles)), collective_axes="cta", init_carry=jnp.int32(0)
                )
                def steps(loop, carry):
                    group, tile = loop.index
                    tile_k, tile_n = plgpu.planar_snake(tile, tiles, longer, BAND)
                    span = [spans_ref[group * 5 + i] for i in range(5)]
                    work(carry, span, group, tile_k * TILE_K, tile_n * config.columns)
                    return carry + span[1]

                return steps

            @pl.when(warpgroup == LOADER)
            def _():
                plgpu.set_max_registers(40, action="decrease")

                @each_tile
                def steps(first_step, span, group, k, n):
                    first, slots, *_ = span

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

                def tile(first_step, span, group, k, n):
                    _, slots, begin_of_first, end_of_last, is_dirty = span

                    out = out_ref.at[
                        group,
                        pl.ds(k + warpgroup * ROWS, ROWS),
                        pl.ds(n, config.columns),
                    ]

                    def release_slot_of_last_result():
                        """Warpgroup 1: the slot from which the last tile's result was copied."""

                        @pl.when((warpgroup == 1) & (first_step > 0))
                        def _():
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            common.release(empty, first_step - 1, config)

                    def add(sums, i, begin, end):
                        """Starts to add the rows ``[begin, end)`` of the i-th slot to the sums."""
                        slot = common.slot_of(first_step + i, config)
                        plgpu.barrier_wait(full.at[slot])
                        if begin is not None:

                            @pl.when((begin > 0) | (end < config.depth))
                            def _():
                                _clean(row_slots.at[slot, :, mine], begin, end)

                                @pl.when(is_dirty == 1)
                                def _():
                                    _clean(cotangent_slots.at[slot], begin, end)

                                plgpu.commit_smem()

                        plgpu.wgmma(
                            sums,
                            row_slots.at[slot, :, mine].transpose((1, 0)),
                            cotangent_slots.at[slot],
                        )

                    def release_before(i):
                        """The slot before the i-th one has been added."""
                        plgpu.wgmma_wait(1)
                        common.release(empty, first_step + i - 1, config)

                    def accumulate(sums):
                        # The loop over the slots that are the group's as a whole has no branch.
                        last = slots - 1
                        add(
                            sums, 0, begin_of_first, jnp.where(last == 0, end_of_last, config.depth)
                        )
                        release_slot_of_last_result()

                        @pl.loop(1, last)
                        def _(i):
                            add(sums, i, None, None)
                            release_before(i)

                        @pl.loop(jnp.maximum(last, 1), slots)
                        def _(i):
                            add(sums, i, jnp.int32(0), end_of_last)
                            release_before(i)

                        plgpu.wgmma_wait(0)
                        return sums[...]

                    sums = pl.run_scoped(accumulate, plgpu.ACC((ROWS, config.columns), jnp.float32))
                    values = sums.astype(out_ref.dtype)
                    last = common.slot_of(first_step + slots - 1, config)

                    def store(memory):
                        memory[...] = values
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(memory, out)

                    @pl.when(warpgroup == 0)
                    def _():
                        plgpu.barrier_arrive(added.at[last])
                        common.release(empty, first_step + slots - 1, config)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        store(staging)

                    @pl.when(warpgroup == 1)
                    def _():
                        # Warpgroup 0 has arrived when it no longer reads this slot.
                        plgpu.barrier_wait(added.at[last])
                        store(cotangent_slots.at[last])

                steps = each_tile(tile)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                # The loader waits for the last slot, too.
                @pl.when((warpgroup == 1) & (steps > 0))
                def _():
                    common.release(empty, steps - 1, config)

        pl.run_scoped(
            with_memory,
            common.tiled_smem((config.stages, config.depth, TILE_K), rows.dtype),
            common.tiled_smem((config.stages, config.depth, config.columns), rows.dtype),
            common.tiled_smem((ROWS, config.columns), rows.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
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
