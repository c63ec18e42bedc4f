"""Bytes and floors against counts in plain loops."""

import json
import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from freeio_jax.bench import floor
from freeio_jax.bench.cases import ROUTINGS, Shape
from freeio_jax.bench.floor import Limits, Traffic, floor_of_sms, pulls, traffic


def counted(topk_idx, num_experts, capacity):
    """Rows over links, and rows read and written in memory, on the busiest rank."""
    num_ranks, num_tokens, top_k = topk_idx.shape
    per_rank = num_experts // num_ranks
    out, landed, packed = (np.zeros(num_ranks, int) for _ in range(3))
    for source in range(num_ranks):
        for token in range(num_tokens):
            ranks = {int(e) // per_rank for e in topk_idx[source, token] if e >= 0}
            for rank in ranks - {source}:
                out[source] += 1
                landed[rank] += 1
            for k in range(top_k):
                if topk_idx[source, token, k] >= 0:
                    packed[topk_idx[source, token, k] // per_rank] += 1
    packed = np.minimum(packed, capacity)
    link = max(*out, *landed)
    dispatch = max(num_tokens + landed + capacity)
    return {
        "dispatch": (link, dispatch),
        "dispatch_along": (link, dispatch),
        "combine": (link, max(packed + landed + out + num_tokens)),
        "combine_transpose": (link, max(num_tokens + landed + capacity + packed)),
    }


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_traffic(routing, num_ranks, rng):
    shape = Shape(num_ranks, 13, 8, 3, 16)
    topk_idx = ROUTINGS[routing](shape, 0).reshape(num_ranks, 13, 3)
    topk_idx[rng.random(topk_idx.shape) < 0.2] = -1
    for capacity in (20, 200):
        moved = traffic(topk_idx, num_experts=16, capacity=capacity, row_bytes=16)
        expected = counted(topk_idx, 16, capacity)
        assert {op: (t.link_bytes / 16, t.hbm_bytes / 16) for op, t in moved.items()} == expected


def test_the_floor_is_the_slower_of_both_and_two_trips():
    limits = Limits(push=100.0, pull=80.0, memory=1000.0, write=2000.0, trip=0.5)
    assert limits.link == 100
    assert limits.floor(Traffic(400, 1500, 500), pulls=False) == 4 + 1
    assert limits.floor(Traffic(400, 1500, 500), pulls=True) == 5 + 1
    assert limits.floor(Traffic(100, 500, 1500), pulls=True) == 2 + 1
    # Of 1500 stored bytes 1000 are zeros, which are written at twice the copy's rate.
    assert limits.floor(Traffic(100, 500, 1500, 1000), pulls=True) == 1.5 + 1
    alone = Limits(math.inf, math.inf, 1000.0, 1000.0, 0.0)
    assert alone.floor(Traffic(0, 1000, 1000), pulls=True) == 2


def test_small_calls_and_combine_store_over_the_link():
    assert pulls("dispatch", False)
    assert pulls("combine_transpose", False)
    assert not pulls("dispatch", True)
    assert not pulls("combine", False)


def test_gpus_of_several_processes_are_measured_by_one_that_sees_all(monkeypatch, capsys):
    """It is a process of its own, which says what it measures, and then what it has found."""
    figures = {"push": 1.0, "pull": 2.0, "memory": 3.0, "write": 4.0, "trip": math.nan}
    ran = []

    def run(command, *, env, **options):
        ran.append((command[1:], env["CUDA_VISIBLE_DEVICES"]))
        said = "# push, GB/s by CTAs: {8: 1}\n" + json.dumps(figures) + "\n"
        return SimpleNamespace(returncode=status, stdout=said, stderr="no driver")

    monkeypatch.setattr(subprocess, "run", run)
    status = 0
    assert str(floor._measure_elsewhere(["2", "3"])) == str(figures)
    assert ran == [(["-m", "freeio_jax.bench.floor", "2"], "2,3")]
    assert "push, GB/s by CTAs" in capsys.readouterr().out
    status = 1
    with pytest.raises(RuntimeError, match="on the GPUs 2, 3 ended with status 1: no driver"):
        floor._measure_elsewhere(["2", "3"])


def test_a_tail_that_is_not_zero_is_not_stored():
    topk_idx = np.zeros((1, 5, 1), int)
    zero, any_tail = (
        traffic(topk_idx, num_experts=1, capacity=20, row_bytes=16, zero_tail=zero_tail)
        for zero_tail in (True, False)
    )
    for op in ("dispatch", "dispatch_along", "combine_transpose"):
        assert (zero[op].stored_bytes, any_tail[op].stored_bytes) == (20 * 16, 5 * 16)
        assert (zero[op].zero_bytes, any_tail[op].zero_bytes) == (15 * 16, 0)
        assert zero[op].loaded_bytes == any_tail[op].loaded_bytes
    assert zero["combine"] == any_tail["combine"]


def test_few_sms_have_a_floor_of_their_own():
    """4096 tokens on two H200s: what 16 and 32 SMs must store in dispatch, and load in combine."""
    dispatch = Traffic(0, 117_440_512, 587_202_560)
    combine = Traffic(0, 528_482_304, 117_440_512)
    floors = [
        floor_of_sms(moved, n, "NVIDIA H200") * 1e6
        for moved in (dispatch, combine)
        for n in (16, 32)
    ]
    assert [round(floor) for floor in floors] == [622, 311, 269, 169]
    assert math.isnan(floor_of_sms(dispatch, 16, "NVIDIA A100"))
