"""A build for one NVLink domain of 64 GPUs, emulated: the contract on more than 16 ranks."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from emulated import PROTOCOLS, Emulator, EngineError, Group, capacity_of
from helpers import (
    Geometry,
    assert_bitwise,
    assert_combined,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)
from operations import (
    check_dispatched,
    check_transposed,
    combine,
    combine_transpose,
    dispatch,
    first_gpus,
    run_dispatch,
)

MAX_RANKS = 64

#: A warp has 32 lanes, and a word 32 bits: what takes one step for 32 ranks takes two for more.
GEOMETRIES = {
    "17 ranks": Geometry(17, 3, 4, 34),
    "32 ranks": Geometry(32, 3, 8, 64, alignment=4),
    "33 ranks, drops": Geometry(33, 2, 5, 33, capacity=8),
    "64 ranks": Geometry(64, 2, 8, 128),
}
#: In a large dispatch each rank waits for counts of all experts from all ranks, which takes the
#: emulator minutes for more than 32.
CASES = [
    *(("small", name) for name in GEOMETRIES),
    *((protocol, "17 ranks") for protocol in PROTOCOLS[1:]),
]
# The emulator runs all threads of all GPUs on one core.
pytestmark = pytest.mark.timeout(900, method="thread")


@pytest.fixture(scope="module")
def library():
    import build

    try:
        return build.library(max_ranks=MAX_RANKS)
    except build.NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def _machine(library):
    machine = Emulator(library, num_gpus=MAX_RANKS, num_sms=2)
    yield machine
    machine.close()


@pytest.fixture
def machine(_machine, rng):
    _machine.set_seed(rng.integers(2**32))
    return _machine


@pytest.mark.parametrize(("protocol", "name"), CASES)
def test_every_operation(machine, rng, protocol, name):
    machine.set_protocol(protocol)
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    leaves = [random_bits(rng, (*geometry.topk_shape[:2], 3), np.float32)]
    along = [
        machine.dispatch_along(first_gpus(geometry), rank, geometry, out[rank], [leaves[0][rank]])
        for rank in range(geometry.num_ranks)
    ]
    shape = (geometry.num_ranks, capacity_of(geometry), 12)
    expert_out = values(rng, shape, np.float32)
    weights = power_of_two_weights(rng, geometry.topk_shape)
    cotangent = values(rng, (*geometry.topk_shape[:2], 12), np.float32)
    z = combine(machine, geometry, out, expert_out, weights)
    grads = combine_transpose(
        machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
    )
    machine.synchronize()
    for packed, expected in zip(along, oracle.dispatch(leaves[0], placement), strict=True):
        assert_bitwise(packed[0], expected, "along the handle")
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)
    check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


def test_the_last_ranks_of_many(machine, rng):
    """A group of ranks that are not the first GPUs, in another order, and sums of 64 bits."""
    machine.set_protocol("small")
    group = Group(tuple(range(63, 30, -1)))
    geometry = Geometry(33, 1, 4, 33)
    topk_idx = routing(rng, geometry)
    leaves = [random_bits(rng, (33, 1, 5), np.float32)]
    out = dispatch(machine, geometry, topk_idx, leaves, group)
    machine.synchronize()
    placement = check_dispatched(out, geometry, topk_idx, leaves)
    expert_out = values(rng, (33, capacity_of(geometry), 7), np.float64)
    z = combine(machine, geometry, out, expert_out, None, group)
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, None, exact=True)


def test_sums_that_are_too_wide(machine, rng):
    """Routes of a token of each of 64 ranks, with weights of 64 bits, do not fit a CTA."""
    machine.set_protocol("small")
    geometry = Geometry(64, 1, 32, 64)
    _, out, _ = run_dispatch(machine, rng, geometry)
    expert_out = values(rng, (64, capacity_of(geometry), 7), np.float64)
    with pytest.raises(EngineError, match=r"num_ranks \* top_k = 2048.*Use float32"):
        combine(machine, geometry, out, expert_out)


def test_a_rank_beyond_the_first_word_that_does_not_come(library):
    machine = Emulator(library, num_gpus=40, num_sms=1, timeout=5)
    geometry = Geometry(40, 2, 2, 40)
    x, ids = np.ones((2, 4), np.float32), np.full((2, 2), 39, np.int32)
    for rank in range(39):
        machine.dispatch(first_gpus(geometry), rank, geometry, ids, [x])
    machine.synchronize()
    said = []
    for rank in range(39):
        with pytest.raises(EngineError) as error:
            machine.dispatch(first_gpus(geometry), rank, geometry, ids, [x])
        said.append(str(error.value))
    assert any("waited 5 s for rank 39" in text for text in said)
    machine.close()
