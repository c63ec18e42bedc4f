"""The order in which CTAs take the tiles of a grouped product."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from freeio_jax.grouped_matmul.hopper import schedule


def order_of(sizes, num_rows, num_columns, num_ctas):
    """The tiles that count, as (group, row, begin, end, column), and all rows' groups."""

    @jax.jit
    def run(sizes):
        tiles = schedule.row_tiles(sizes, num_rows)
        return tiles["count"], schedule.tile_order(tiles, num_columns, num_ctas)

    count, order = run(jnp.asarray(sizes, jnp.int32))
    group, row, span, column = np.asarray(order)[: int(count) * num_columns].T
    return np.stack([group, row, span // 256, span % 256, column], axis=1)


def check(sizes, num_rows, num_columns, num_ctas):
    """Each row of each group is in one tile of each column, and in no other group's."""
    order = order_of(sizes, num_rows, num_columns, num_ctas)
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)[:num_rows]
    rest = num_rows - len(group_of_row)
    group_of_row = np.append(group_of_row, np.full(rest, len(sizes)))
    times = np.zeros((num_rows, num_columns), int)
    for group, row, begin, end, column in order:
        assert 0 <= begin < end <= schedule.TILE_ROWS
        assert row % schedule.ROW_ALIGNMENT == 0
        assert 0 <= row <= num_rows - schedule.TILE_ROWS
        assert (group_of_row[row + begin : row + end] == group).all()
        times[row + begin : row + end, column] += 1
    assert (times == 1).all()
    return order


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_each_row_is_in_one_tile_of_each_column(data):
    num_rows = 8 * data.draw(st.integers(16, 120), label="rows / 8")
    sizes = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=12), label="sizes")
    while sum(sizes) > num_rows:
        sizes = [size // 2 for size in sizes]
    check(sizes, num_rows, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7)))


@pytest.mark.parametrize(
    "sizes",
    [[0, 0, 0], [128], [0, 4224, 0], [1] * 16, [505, 483, 521, 551, 500, 516, 511, 525]],
    ids=str,
)
def test_hard_sizes(sizes):
    check(sizes, 4224, 3, 132)


def test_sizes_that_exceed_the_rows_are_cut():
    """That is against the contract, and must not write past the end."""
    check([300, 20], 256, 2, 3)


def test_short_tiles_are_spread_evenly_over_the_ctas():
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(32768, np.ones(64) / 64)
    order = check(sizes, 32768, 16, 132)
    is_short = (order[:, 3] <= 64) | (order[:, 2] >= 64)
    short = np.bincount(np.arange(len(order))[is_short] % 132, minlength=132)
    assert is_short.sum() > 200
    # One more or less for each of the last round, which has fewer tiles than there are CTAs.
    assert short.max() - short.min() <= 2


def test_tiles_of_a_group_follow_each_other():
    """So that the CTAs that run at the same time share its weights."""
    order = order_of([1000, 3000, 96], 4096, 8, 16)
    changes = np.count_nonzero(np.diff(order[:, 0] // 1))
    rounds = len(order) // 16
    assert changes <= 2 * 3 * 16 and rounds > 10
    first, last = order[: len(order) // 8, 0], order[-len(order) // 8 :, 0]
    assert first.max() <= 1 and last.min() >= 1
