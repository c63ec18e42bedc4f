"""Rails: no link carries more than it must, and all ranks choose alike."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from freeio_jax.rails import Rails, even_rails, lower_bound


@st.composite
def all_rows(draw):
    num_hosts, num_gpus = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    most = draw(st.sampled_from([1, 10, 5000, 2**31]))
    shape = (num_hosts, num_gpus, num_hosts)
    return draw(some.arrays(np.int64, shape, elements=st.integers(0, most)))


@settings(deadline=None)
@given(all_rows(), st.sampled_from([0.0, 0.05, 0.5]))
def test_even_rails(rows, least_gain):
    rails = even_rails(rows, least_gain=least_gain)
    num_hosts, num_gpus, _ = rows.shape
    same = Rails.same(num_hosts, num_gpus)
    for rail in (rails.sender, rails.receiver):
        assert rail.shape == rows.shape
        assert ((rail >= 0) & (rail < num_gpus)).all()
    # Neither worse than the default nor better than possible.
    assert lower_bound(rows) <= rails.busiest(rows) <= same.busiest(rows)
    # Each row leaves its own host once, and lands on the other host once.
    crossing = rows * ~np.eye(num_hosts, dtype=bool)[:, None, :]
    np.testing.assert_array_equal(rails.sent(rows).sum(1), crossing.sum((1, 2)))
    np.testing.assert_array_equal(rails.received(rows).sum(1), crossing.sum((0, 1)))
    # They stay as they are unless the gain is worth it.
    if rails.busiest(rows) > (1 - least_gain) * same.busiest(rows):
        np.testing.assert_array_equal(rails.sender, same.sender)
        np.testing.assert_array_equal(rails.receiver, same.receiver)
    # Other senders are not free, so they are there only if they relieve the busiest link.
    if rails.forwarded(rows):
        own_senders = Rails(same.sender, rails.receiver)
        assert rails.busiest(rows) < own_senders.busiest(rows)


def test_loads_are_those_of_the_tokens_one_by_one(rng):
    """Token by token, each (token, host) over one link out and one link in."""
    num_hosts, num_gpus, per_rank = 3, 4, 2
    num_experts = num_hosts * num_gpus * per_rank
    topk_idx = rng.integers(-1, num_experts, (num_hosts, num_gpus, 50, 3))
    topk_idx[:, 0, 25:] = -1
    wanted = topk_idx // (num_gpus * per_rank)  # -1: no expert
    rows = np.stack([(wanted == d).any(-1).sum(-1) for d in range(num_hosts)], axis=-1)
    rails = even_rails(rows, least_gain=0)
    sent, received = np.zeros((2, num_hosts, num_gpus), int)
    for host, rank, token in np.ndindex(*topk_idx.shape[:3]):
        for other in {int(d) for d in wanted[host, rank, token]} - {-1, host}:
            sent[host, rails.sender[host, rank, other]] += 1
            received[other, rails.receiver[host, rank, other]] += 1
    np.testing.assert_array_equal(rails.sent(rows), sent)
    np.testing.assert_array_equal(rails.received(rows), received)


def test_all_ranks_choose_alike(tmp_path, rng):
    """Another process, which has the counts in another dtype and order, chooses the same."""
    rows = rng.integers(0, 50, (8, 8, 8))  # with many equal ones
    np.save(tmp_path / "rows.npy", np.asfortranarray(rows.astype(np.int32)))
    program = (
        "import sys, numpy as np; from freeio_jax.rails import even_rails\n"
        "r = even_rails(np.load(sys.argv[1]), least_gain=0)\n"
        "np.save(sys.argv[2], np.stack([r.sender, r.receiver]))"
    )
    paths = [tmp_path / "rows.npy", tmp_path / "rails.npy"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, *paths], check=True, env=environment)
    rails = even_rails(rows, least_gain=0)
    np.testing.assert_array_equal(np.load(paths[1]), np.stack([rails.sender, rails.receiver]))


def test_heavy_ranks_meet_light_ones():
    """Some ranks have more tokens: the default's busiest link has 1.8 times an even share."""
    rows = np.broadcast_to(np.arange(1, 9)[None, :, None] * 500, (8, 8, 8))
    assert Rails.same(8, 8).busiest(rows) == 7 * 4000
    assert lower_bound(rows) == 7 * 2250
    rails = even_rails(rows)
    assert rails.busiest(rows) <= 1.02 * lower_bound(rows)
    # What is above an even share must move, which is 22% of all rows; exchanges move some more.
    assert rails.forwarded(rows) <= 0.33 * 7 * 8 * 8 * 2250


def test_equal_ranks_keep_their_rails():
    rows = np.full((8, 8, 8), 3000)
    rails = even_rails(rows, least_gain=0)
    same = Rails.same(8, 8)
    np.testing.assert_array_equal(rails.sender, same.sender)
    np.testing.assert_array_equal(rails.receiver, same.receiver)


def test_rows_of_another_shape():
    with pytest.raises(ValueError, match=r"rows must be \[hosts, GPUs of a host, hosts\]"):
        even_rails(np.zeros((2, 8, 3), int))
