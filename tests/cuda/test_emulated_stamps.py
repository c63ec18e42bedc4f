"""The build whose kernels record how long their phases take, on emulated GPUs."""

from __future__ import annotations

import numpy as np
import pytest
from emulated import PROTOCOLS, Emulator
from helpers import Geometry, power_of_two_weights, random_bits, routing, values
from operations import check_dispatched, combine, combine_transpose, dispatch, first_gpus

from freeio_jax.bench import stamps

NUM_SMS = 5
GEOMETRY = Geometry(3, 40, 3, 6, alignment=4)


@pytest.fixture(scope="module")
def machine():
    import build

    try:
        library = build.library(stamps=True)
    except build.NotHereError as error:
        pytest.skip(str(error))
    machine = Emulator(library, seed=1, num_gpus=3, num_sms=NUM_SMS)
    yield machine
    machine.close()


def timelines(machine):
    return [machine.take_timelines(gpu) for gpu in range(GEOMETRY.num_ranks)]


def check(machine, phases):
    """Each CTA of each rank has a timeline that adds up, with time in these phases."""
    for of_rank in timelines(machine):
        assert len(of_rank) == NUM_SMS
        for begin, end, spent in of_rank:
            assert 0 < begin <= end
            assert sum(spent) == end - begin
        parts = stamps.parts(machine.phases, of_rank)
        assert sum(parts.values()) == pytest.approx(stamps.span(of_rank))
        assert min(parts.values()) >= 0
        for phase in phases:
            index = machine.phases.index(phase)
            assert any(spent[index] > 0 for _, _, spent in of_rank), phase


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_phases_of_every_kernel_add_up(machine, rng, protocol):
    machine.set_protocol(protocol)
    topk_idx = routing(rng, GEOMETRY)
    leaves = [random_bits(rng, (3, 40, 80), np.float32)]
    out = dispatch(machine, GEOMETRY, topk_idx, leaves)
    machine.synchronize()
    check_dispatched(out, GEOMETRY, topk_idx, leaves)  # as right as without stamps
    waits_for_the_end = () if protocol == "small" else ("finishing",)
    check(machine, ("opening", "routing", "agreeing", "moving", *waits_for_the_end))

    weights = power_of_two_weights(rng, topk_idx.shape)
    expert_out = [values(rng, result.rows[0].shape, np.float32) for result in out]
    combine(machine, GEOMETRY, out, expert_out, weights)
    machine.synchronize()
    check(machine, ("opening", "agreeing", "moving"))

    cotangent = values(rng, (3, 40, 80), np.float32)
    combine_transpose(machine, GEOMETRY, out, cotangent, weights=weights, expert_out=expert_out)
    machine.synchronize()
    check(machine, ("opening", "agreeing", "moving"))

    for rank in range(GEOMETRY.num_ranks):
        machine.dispatch_along(
            first_gpus(GEOMETRY), rank, GEOMETRY, out[rank], [leaf[rank] for leaf in leaves]
        )
    machine.synchronize()
    check(machine, ("opening", "agreeing", "moving", "finishing"))


def test_the_phases_between_hosts_add_up(machine, rng):
    machine.set_hosts(3, 1)
    try:
        topk_idx = routing(rng, GEOMETRY)
        leaves = [random_bits(rng, (3, 40, 80), np.float32)]
        out = dispatch(machine, GEOMETRY, topk_idx, leaves)
        machine.synchronize()
        check_dispatched(out, GEOMETRY, topk_idx, leaves)
        check(machine, ("opening", "routing", "agreeing", "moving", "finishing"))
        weights = power_of_two_weights(rng, topk_idx.shape)
        expert_out = [values(rng, result.rows[0].shape, np.float32) for result in out]
        combine(machine, GEOMETRY, out, expert_out, weights)
        machine.synchronize()
        check(machine, ("routing", "agreeing", "moving", "finishing"))
        combine_transpose(machine, GEOMETRY, out, leaves[0], weights=weights, expert_out=expert_out)
        machine.synchronize()
        check(machine, ("routing", "agreeing", "moving", "finishing"))
    finally:
        machine.set_hosts(0, 0)


def test_timelines_are_returned_once(machine, rng):
    topk_idx = routing(rng, GEOMETRY)
    dispatch(machine, GEOMETRY, topk_idx, [random_bits(rng, (3, 40, 4), np.float32)])
    machine.synchronize()
    assert all(timelines(machine))
    assert not any(timelines(machine))


def test_a_shipped_build_has_no_stamps(emulator_library):
    machine = Emulator(emulator_library, num_gpus=1)
    assert machine.phases == ()
    machine.close()
