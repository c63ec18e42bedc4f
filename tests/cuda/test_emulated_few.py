"""The kernel of a large combine for few multiprocessors, where rows have several passes."""

from __future__ import annotations

import numpy as np
import pytest
from emulated import capacity_of
from helpers import ROUTINGS, Geometry, assert_combined, power_of_two_weights, values
from operations import combine, run_dispatch

few_protocols = pytest.mark.parametrize("protocol", ["few", "few, through buffers"], indirect=True)

#: Elements of float32 in a pass.
PASS = 4 * 7 * 32


def check(machine, rng, geometry, width, dtype="float32", *, skew="holes", weighted=True):
    """Combines rows and compares the sums with the oracle, bit by bit."""
    _, out, placement = run_dispatch(machine, rng, geometry, skew, width=1)
    expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), width), dtype)
    weights = power_of_two_weights(rng, geometry.topk_shape) if weighted else None
    z = combine(machine, geometry, out, expert_out, weights)
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("num_sms", [1, 2, 7])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_slices_of_several_passes(machine, rng, num_ranks, num_sms):
    """Of one pass to four, the last one short, or of an access; and of several slices."""
    machine.set_num_sms(num_sms)
    widths = (PASS, PASS + 4, 2 * PASS, 3 * PASS + 4 * 4 * 32, 4 * PASS, 9 * PASS - 4)
    for num_tokens, width in zip((19, 140), rng.choice(widths, 2).tolist(), strict=True):
        check(machine, rng, Geometry(num_ranks, num_tokens, 3, 3 * num_ranks), width)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("skew", ROUTINGS)
def test_passes_of_any_routing(machine, rng, skew):
    machine.set_num_sms(1)
    check(machine, rng, Geometry(4, 131, 4, 12, capacity=100), 2 * PASS, skew=skew)
    check(machine, rng, Geometry(2, 130, 2, 6), 4 * PASS, skew=skew)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
)
def test_passes_of_any_dtype(machine, rng, dtype):
    """With 3 ranks, two of the ranks' own sums are added behind at most one other."""
    machine.set_num_sms(1)
    for width in (1792, 4 * 1792, 3000 + 8):
        for weighted in (True, False):
            check(machine, rng, Geometry(3, 129, 4, 6), width, dtype, weighted=weighted)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("top_k", [1, 2, 32])
def test_passes_of_tokens_with_few_and_many_rows(machine, rng, top_k):
    machine.set_num_sms(3)
    check(machine, rng, Geometry(2, 40, top_k, 64), 2 * PASS)
    check(machine, rng, Geometry(5, 21, top_k, 65), PASS)


@few_protocols
@pytest.mark.usefixtures("protocol")
def test_several_tiles(machine, rng):
    """More routes than a CTA has room for at a time, so that it begins anew."""
    machine.set_num_sms(1)
    check(machine, rng, Geometry(2, 700, 8, 8, capacity=3000), 2 * PASS)
    check(machine, rng, Geometry(8, 90, 8, 16, capacity=400), PASS)


@few_protocols
@pytest.mark.usefixtures("protocol")
def test_rows_that_are_not_aligned(machine, rng):
    """They take the other kernel."""
    machine.set_num_sms(2)
    check(machine, rng, Geometry(3, 20, 3, 6), PASS + 2)
    check(machine, rng, Geometry(2, 20, 3, 6), PASS + 8, "float8_e4m3fn")


@pytest.mark.parametrize("num_sms", [64, 65])
def test_how_many_multiprocessors_are_few(new_machine, rng, num_sms):
    machine = new_machine(num_gpus=2, num_sms=66)
    machine.set_num_sms(num_sms)
    check(machine, rng, Geometry(2, 300, 8, 8), PASS)


def test_a_gpu_with_little_shared_memory_takes_the_other_kernel(new_machine, rng):
    machine = new_machine(num_gpus=2, num_sms=4, shared_bytes=163 << 10)
    machine.set_protocol("few")
    check(machine, rng, Geometry(2, 140, 3, 6), 2 * PASS)


@few_protocols
@pytest.mark.usefixtures("protocol")
def test_many_schedules(machine, rng):
    geometry = Geometry(4, 30, 4, 8)
    for num_sms in (1, 3, 1, 2):
        machine.set_num_sms(num_sms)
        machine.set_seed(rng.integers(2**32))
        check(machine, rng, geometry, 2 * PASS)
