"""Which CTA multiplies which tile, and when: tables that XLA computes before a kernel starts.

Rows are cut into tiles of ``TILE_ROWS``; a tile has rows of one group. Tiles are cut anew in each
group, so the last one of a group is partly empty: often it has rows for one warpgroup only, which
then takes about half as long. Two things make the order of tiles matter:

- CTAs that run at the same time should share operands, so that these come from the L2 cache. The
  order goes group by group, through the columns of the result, and within a column through the
  tiles of rows. At most ``BAND`` of them are a band; a larger group goes through the columns once
  for each of its bands.
- CTA s takes the tiles at the places s, s + S, s + 2 S, ... of the order. Left to chance, some CTA
  would get no short tile at all, and all others would wait for it. So within each round of S tiles
  the short ones go to the CTAs whose turn it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

#: Rows of a tile: 64, what one wgmma multiplies, for each of two warpgroups.
TILE_ROWS = 128
WARPGROUP_ROWS = 64
#: Copies of rows begin at a multiple of this.
ROW_ALIGNMENT = 8
BAND = 8


def group_ends(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """First row of each group and the row after its last, int32 ``[G]``, all within the rows."""
    group = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    before = group[:, None] >= group[None, :]
    ends = jnp.sum(jnp.where(before, group_sizes[None, :], 0), axis=1, dtype=jnp.int32)
    ends = jnp.minimum(ends, num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def max_row_tiles(num_rows: int, num_groups: int) -> int:
    """No fewer than the tiles of rows that any sizes of ``num_groups`` groups give."""
    rows = num_rows + (ROW_ALIGNMENT - 1) * num_groups
    return rows // TILE_ROWS + num_groups


def _count_before(values: jax.Array, bounds: jax.Array) -> jax.Array:
    """For each value, how many of the ascending ``bounds`` are at most that."""
    return jnp.sum(bounds[None, :] <= values[:, None], axis=1, dtype=jnp.int32)


def row_tiles(group_sizes: jax.Array, num_rows: int) -> dict[str, jax.Array]:
    """The tiles of rows, in order; the rows past the last group are a group of their own, G.

    Args:
      group_sizes: int32 ``[G]``.
      num_rows: M, a multiple of ROW_ALIGNMENT and at least TILE_ROWS.

    Returns:
      Arrays of ``max_row_tiles(M, G + 1)`` entries: ``group``; ``row``, the tile's first row, which
      may belong to a group before; ``begin`` and ``end``, its rows that are the group's, counted
      from ``row``; ``band`` and ``size``, the first tile of its band and the number of tiles in it.
      And ``count``, a scalar: how many tiles there are.
    """
    starts, ends = group_ends(group_sizes, num_rows)
    starts = jnp.append(starts, ends[-1])
    ends = jnp.append(ends, num_rows)
    firsts = starts // ROW_ALIGNMENT * ROW_ALIGNMENT
    counts = jnp.where(ends > starts, -((firsts - ends) // TILE_ROWS), 0)
    groups = counts.shape[0]
    _, last = group_ends(counts, jnp.iinfo(jnp.int32).max)
    tile = jnp.arange(max_row_tiles(num_rows, groups), dtype=jnp.int32)
    group = jnp.minimum(_count_before(tile, last), groups - 1)
    of_group = tile - (last - counts)[group]
    row = firsts[group] + of_group * TILE_ROWS
    # Not past the end of the array: a tile that would be begins earlier.
    first = jnp.minimum(row, num_rows - TILE_ROWS)
    band = of_group // BAND * BAND
    return {
        "group": group,
        "row": first,
        "begin": jnp.maximum(starts[group], row) - first,
        "end": jnp.minimum(ends[group], row + TILE_ROWS) - first,
        "band": tile - of_group + band,
        "size": jnp.minimum(BAND, counts[group] - band),
        "count": last[-1],
    }


def tile_order(tiles: dict[str, jax.Array], num_columns: int, num_ctas: int) -> jax.Array:
    """The tiles of the result, in the order in which CTAs take them.

    Args:
      tiles: of ``row_tiles``.
      num_columns: how many tiles of columns the result has.
      num_ctas: S; place p of the order is CTA ``p % S``'s.

    Returns:
      int32 ``[places, 4]``: group, first row, begin and end of the group's rows in the tile (as
      ``begin * 256 + end``), and tile of columns. The first ``tiles["count"] * num_columns`` count.
    """
    num_tiles = tiles["row"].shape[0]
    total = tiles["count"] * num_columns
    is_short = (tiles["begin"] >= WARPGROUP_ROWS) | (tiles["end"] <= WARPGROUP_ROWS)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    short = (is_short & (tile < tiles["count"])).astype(jnp.int32)
    earlier = tile[:, None] > tile[None, :]
    short_before = jnp.sum(jnp.where(earlier, short[None, :], 0), axis=1, dtype=jnp.int32)
    short_before = jnp.append(short_before, short_before[-1] + short[-1])

    def at(index):
        """Tile of rows and of columns at an index of the order before CTAs are balanced."""
        anchor = jnp.minimum(index // num_columns, num_tiles - 1)
        band, size = tiles["band"][anchor], jnp.maximum(tiles["size"][anchor], 1)
        within = index - band * num_columns
        return band, size, band + within % size, within // size

    def short_until(index):
        """How many short tiles come before an index."""
        band, size, row_tile, column = at(index)
        row_tile = jnp.minimum(row_tile, num_tiles)
        of_band = short_before[jnp.minimum(band + size, num_tiles)] - short_before[band]
        before = short_before[band] * num_columns + column * of_band
        return before + short_before[row_tile] - short_before[band]

    index = jnp.arange(num_tiles * num_columns, dtype=jnp.int32)
    _, _, row_tile, column = at(index)
    row_tile = jnp.minimum(row_tile, num_tiles - 1)
    rounds = index // num_ctas
    begin = rounds * num_ctas
    size = jnp.maximum(jnp.minimum(num_ctas, total - begin), 1)
    first_short = short_until(begin)
    num_short = short_until(begin + size) - first_short
    nth_short = short_until(index) - first_short
    turn = jnp.where(short[row_tile] == 1, nth_short, num_short + (index - begin - nth_short))
    place = begin + (first_short + turn) % size
    record = jnp.stack(
        [
            tiles["group"][row_tile],
            tiles["row"][row_tile],
            tiles["begin"][row_tile] * 256 + tiles["end"][row_tile],
            column,
        ],
        axis=1,
    )
    place = jnp.where(index < total, place, index)
    return jnp.zeros_like(record).at[place].set(record, unique_indices=True)
