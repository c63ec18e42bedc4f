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


#: Shared memory of the kernel for few multiprocessors. The other one asks for less.
LEAST_BYTES = 120 << 10


def check(machine, rng, geometry, width, dtype="float32", *, skew="holes", weighted=True, few=True):
    """Combines rows and compares the sums with the oracle, bit by bit. `few`: by which kernel."""
    _, out, placement = run_dispatch(machine, rng, geometry, skew, width=1)
    expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), width), dtype)
    weights = power_of_two_weights(rng, geometry.topk_shape) if weighted else None
    z = combine(machine, geometry, out, expert_out, weights)
    assert (machine.shared_bytes_of_last_launch() >= LEAST_BYTES) == few
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "width", [PASS, PASS + 4, 2 * PASS, 3 * PASS + 4 * 4 * 32, 4 * PASS, 5 * PASS - 4], ids=str
)
def test_slices_of_several_passes(machine, rng, num_ranks, width):
    """Of one pass to four, the last one short, or of an access; and of two slices."""
    machine.set_num_sms(1)
    check(machine, rng, Geometry(num_ranks, 129, 3, 3 * num_ranks), width)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("num_sms", [1, 2, 7, 16])
def test_eight_ranks(machine, rng, num_sms):
    """On few tokens, whose slices have one pass."""
    machine.set_num_sms(num_sms)
    check(machine, rng, Geometry(8, 19, 3, 24), 2 * PASS - 12)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("skew", ROUTINGS)
def test_passes_of_any_routing(machine, rng, skew):
    machine.set_num_sms(1)
    check(machine, rng, Geometry(4, 67, 4, 12, capacity=100), 2 * PASS, skew=skew)
    check(machine, rng, Geometry(2, 130, 2, 6), 2 * PASS, skew=skew)


@few_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
)
def test_passes_of_any_dtype(machine, rng, dtype):
    """Of three ranks the last one puts its own sum aside."""
    machine.set_num_sms(1)
    for width, weighted in ((1792, True), (2 * 1792, False), (3008, True)):
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
    check(machine, rng, Geometry(2, 400, 8, 8, capacity=1000), PASS)
    check(machine, rng, Geometry(8, 70, 8, 16, capacity=200), 32)


@few_protocols
@pytest.mark.usefixtures("protocol")
def test_rows_that_are_not_aligned(machine, rng):
    """They take the other kernel."""
    machine.set_num_sms(2)
    check(machine, rng, Geometry(3, 20, 3, 6), PASS + 2, few=False)
    check(machine, rng, Geometry(2, 20, 3, 6), PASS + 8, "float8_e4m3fn", few=False)


@pytest.mark.parametrize("num_sms", [64, 65])
def test_how_many_multiprocessors_are_few(new_machine, rng, num_sms):
    """Of a machine that may use the kernel on up to 64."""
    machine = new_machine(num_gpus=2, num_sms=66)
    machine.set_few_ctas(64)
    machine.set_num_sms(num_sms)
    check(machine, rng, Geometry(2, 300, 8, 8, capacity=800), 32, few=num_sms == 64)


def test_it_serves_nobody_before_it_has_been_seen_on_gpus(new_machine, rng):
    """Emulated GPUs do not show whether bulk stores arrive before the flags that follow them."""
    machine = new_machine(num_gpus=2, num_sms=4)
    check(machine, rng, Geometry(2, 300, 8, 8, capacity=800), 32, few=False)


def test_a_gpu_with_little_shared_memory_takes_the_other_kernel(new_machine, rng):
    machine = new_machine(num_gpus=2, num_sms=4, shared_bytes=163 << 10)
    machine.set_protocol("few")
    check(machine, rng, Geometry(2, 40, 3, 6), 2 * PASS, few=False)


@few_protocols
@pytest.mark.usefixtures("protocol")
def test_many_schedules(machine, rng):
    geometry = Geometry(4, 20, 4, 8)
    for num_sms in (1, 3, 1, 2):
        machine.set_num_sms(num_sms)
        machine.set_seed(rng.integers(2**32))
        check(machine, rng, geometry, 2 * PASS)
