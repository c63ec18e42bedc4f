"""Bytes of each rank: against the benchmark's on one host, and token by token on several."""

import numpy as np
import pytest

from freeio_jax.bench import floor
from freeio_jax.plan.routing import ROUTINGS, Pod, made
from freeio_jax.plan.traffic import OPERATIONS, Counts, traffic
from freeio_jax.rails import Rails, even_rails


def counts_of(name, pod, seed=0):
    ids = np.stack(list(made(name, pod, seed)))
    return ids, Counts.of(pod, ids)


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_one_host_is_as_the_benchmark_counts(num_gpus, zero_tail):
    pod = Pod(1, num_gpus, 33, 3, 16)
    ids, counts = counts_of("zipf", pod)
    sizes = {"row_bytes": 32, "zero_tail": zero_tail}
    for capacity in (30, 300):
        expected = floor.traffic(ids, num_experts=16, capacity=capacity, **sizes)
        moved = traffic(counts, Rails.same(1, num_gpus), capacity=capacity, **sizes)
        assert list(moved) == list(OPERATIONS)
        assert set(moved) == set(expected)
        for op in OPERATIONS:
            assert moved[op].link.max() == expected[op].link_bytes
            assert moved[op].memory.max() == expected[op].hbm_bytes
            assert not moved[op].network.any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_several_hosts_token_by_token(routing):
    pod = Pod(3, 4, 20, 3, 48)
    ids, counts = counts_of(routing, pod)
    ids = ids.reshape(3, 4, 20, 3)
    for rails in (Rails.same(3, 4), even_rails(counts.rows, least_gain=0)):
        names = ("link_out", "link_in", "network_out", "network_in")
        moved = {name: np.zeros((3, 4), int) for name in names}
        num_reached = 0
        for host, rank, token in np.ndindex(3, 4, 20):
            where = {divmod(int(e) // 4, 4) for e in ids[host, rank, token] if e >= 0}
            for there in {h for h, _ in where}:
                source = rank
                if there != host:
                    sender = rails.sender[host, rank, there]
                    source = rails.receiver[host, rank, there]
                    moved["link_out"][host, rank] += rank != sender
                    moved["link_in"][host, sender] += rank != sender
                    moved["network_out"][host, sender] += 1
                    moved["network_in"][there, source] += 1
                for target in {r for h, r in where if h == there}:
                    moved["link_out"][there, source] += source != target
                    moved["link_in"][there, target] += source != target
                    num_reached += 1
        by_op = traffic(counts, rails, capacity=100, row_bytes=1)
        for name in names:
            np.testing.assert_array_equal(getattr(by_op["dispatch"], name), moved[name].ravel())
        # combine goes the same ways backwards.
        for kind in ("link", "network"):
            for way, back in (("out", "in"), ("in", "out")):
                found = getattr(by_op["combine"], f"{kind}_{way}")
                np.testing.assert_array_equal(found, moved[f"{kind}_{back}"].ravel())
        # A row reaches each rank once.
        assert counts.pairs.sum() == num_reached


def test_what_leaves_arrives():
    _, counts = counts_of("skewed", Pod(4, 8, 50, 8, 256))
    rails = even_rails(counts.rows, least_gain=0)
    for moved in traffic(counts, rails, capacity=500, row_bytes=2).values():
        assert moved.link_out.sum() == moved.link_in.sum()
        assert moved.network_out.sum() == moved.network_in.sum()


def test_ids_that_name_no_expert_count_for_nothing():
    pod = Pod(1, 2, 3, 2, 4)
    ids = np.array([[[0, 3], [-1, -1], [4, -7]], [[2, -1], [0, 1], [1, 0]]])
    counts = Counts.of(pod, ids)
    np.testing.assert_array_equal(counts.pairs, [[1, 1], [2, 1]])
    np.testing.assert_array_equal(counts.loads, [5, 2])


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(name):
    """Distinct experts of each token, the same ones in each run, others on other ranks."""
    pod = Pod(2, 4, 64, 4, 64)
    ids = np.stack(list(made(name, pod, 0)))
    assert ids.shape == (8, 64, 4)
    for token in ids.reshape(-1, 4):
        experts = token[token >= 0]
        assert len(set(experts)) == len(experts)
    np.testing.assert_array_equal(ids, np.stack(list(made(name, pod, 0))))
    assert (ids[0] != ids[1]).any()
    if name == "group-limited":
        assert max(len(set(token // 8)) for token in ids.reshape(-1, 4)) <= 4
    if name == "one-host":
        assert ids.max() < 32
    if name == "uneven":
        np.testing.assert_array_equal((ids >= 0).any(-1).sum(-1), [16, 32, 48, 64] * 2)
