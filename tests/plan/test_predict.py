"""Predictions against what two and four H200s took, and against hand-made cases."""

import numpy as np
import pytest

from freeio_jax import _native
from freeio_jax.bench.cases import ROUTINGS, Shape
from freeio_jax.plan.plan import capacity_of, make
from freeio_jax.plan.predict import predict
from freeio_jax.plan.rates import known
from freeio_jax.plan.routing import Pod
from freeio_jax.plan.traffic import OPERATIONS, Counts, Traffic

LARGE, SMALL = (7168, 8, 256), (2048, 4, 64)  # H, K, E

#: Kernel us by (GPUs, shape, routing, T), from docs/notebook/2026-11_figures.md.
#: In the order of OPERATIONS: dispatch, combine, combine_transpose, dispatch_along.
MEASURED = {
    (2, LARGE, "uniform", 1): (8.3, 6.1, 15.1, 8.3),
    (2, LARGE, "uniform", 8): (8.6, 6.5, 16.4, 8.7),
    (2, LARGE, "uniform", 32): (9.5, 7.6, 17.1, 10.0),
    (2, LARGE, "uniform", 128): (13.8, 13.4, 20.8, 13.9),
    (2, LARGE, "uniform", 256): (22.7, 20.5, 34.1, 19.3),
    (2, LARGE, "uniform", 1024): (58.4, 63.0, 95.4, 54.2),
    (2, LARGE, "uniform", 4096): (205, 188, 340, 199),
    (2, LARGE, "uniform", 8192): (405, 356, 669, 390),
    (2, LARGE, "zipf", 128): (13.7, 13.3, 21.1, 14.0),
    (2, LARGE, "zipf", 4096): (203, 202, 370, 199),
    (2, LARGE, "zipf", 8192): (400, 358, 684, 388),
    (2, SMALL, "uniform", 1): (7.7, 5.7, 10.1, 7.2),
    (2, SMALL, "uniform", 128): (8.5, 7.7, 12.3, 9.1),
    (2, SMALL, "uniform", 4096): (59.0, 65.5, 62.9, 55.4),
    (2, SMALL, "uniform", 8192): (107, 111, 112, 103),
    (4, LARGE, "uniform", 1): (8.8, 6.6, 21.6, 9.2),
    (4, LARGE, "uniform", 8): (9.5, 7.5, 22.1, 10.1),
    (4, LARGE, "uniform", 32): (12.4, 10.6, 23.8, 14.4),
    (4, LARGE, "uniform", 128): (21.9, 23.4, 31.1, 26.4),
    (4, LARGE, "uniform", 256): (38.4, 41.0, 47.1, 41.1),
    (4, LARGE, "uniform", 1024): (138, 142, 140, 134),
    (4, LARGE, "uniform", 4096): (526, 504, 514, 519),
    (4, LARGE, "uniform", 8192): (1015, 993, 1016, 1015),
    (4, LARGE, "half", 4096): (558, 575, 568, 538),
    (4, LARGE, "zipf", 4096): (568, 545, 552, 529),
    (4, SMALL, "uniform", 1): (10.7, 10.4, 13.1, 9.2),
    (4, SMALL, "uniform", 128): (15.5, 14.6, 17.3, 14.1),
    (4, SMALL, "uniform", 4096): (129, 139, 128, 121),
    (4, SMALL, "uniform", 8192): (250, 255, 239, 231),
}


def plan_of(num_gpus, shape, routing, num_tokens):
    hidden, top_k, num_experts = shape
    pod = Pod(1, num_gpus, num_tokens, top_k, num_experts)
    sizes = Shape(num_gpus, num_tokens, hidden, top_k, num_experts)
    ids = ROUTINGS[routing](sizes, seed=num_tokens).reshape(num_gpus, num_tokens, top_k)
    counts = Counts.of(pod, ids)
    capacity = capacity_of(counts, 1.25)
    rates = known("h200", num_gpus)
    return make(counts, rates, hidden=hidden, element_bytes=2, capacity=capacity)


def reason_to_be_off(op, num_gpus, shape, num_tokens):
    """Why a prediction may be off by more than 10%; None: it may not."""
    if num_gpus == 4 and shape == SMALL and num_tokens <= 128:
        return "these were taken before small calls sent their rows in lines"
    if op == "combine_transpose" and num_tokens <= 128:
        return "what does not grow with the tokens was fitted to large calls, and is 9 to 22 us"
    if op == "dispatch_along" and num_tokens <= 128 and (num_gpus == 4 or shape == SMALL):
        return "likewise, and is 7 to 10 us"
    if op == "dispatch" and num_tokens == 128 and (num_gpus == 4 or shape == SMALL):
        return "the link works while the exchange opens, which is not taken off"
    return None


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_what_was_measured(case):
    num_gpus, shape, _, num_tokens = case
    plan = plan_of(*case)
    for op, measured in zip(OPERATIONS, MEASURED[case], strict=True):
        off = plan.predictions[op].seconds * 1e6 / measured - 1
        reason = reason_to_be_off(op, num_gpus, shape, num_tokens)
        print(f"{op}: {off:+.0%}", reason or "")
        assert abs(off) < (0.1 if reason is None else 0.4), f"{op}: {off:+.1%}"


def test_most_predictions_have_no_excuse():
    excused = [
        bool(reason_to_be_off(op, num_gpus, shape, num_tokens))
        for num_gpus, shape, _, num_tokens in MEASURED
        for op in OPERATIONS
    ]
    assert sum(excused) < 0.25 * len(excused)


def moved(**given):
    names = ("link_out", "link_in", "network_out", "network_in", "loaded", "stored")
    return Traffic(*(np.array([given.get(name, 0), 0]) for name in names))


def test_the_floor_is_the_slowest_way_and_two_trips():
    rates, pod = known("h200", 2), Pod(2, 1, 4096, 8, 256)
    for given, limit, seconds in (
        ({"link_in": 365e6}, "NVLink", 1e-3 + 2 * 1.24e-6),
        ({"network_in": 45e6}, "network", 1e-3 + 10e-6),
        ({"network_out": 45e6, "link_out": 36e6}, "network", 1e-3 + 10e-6),
        ({"loaded": 2110e6, "stored": 2110e6}, "memory", 1e-3 + 2 * 1.24e-6),
    ):
        found = predict("dispatch", moved(**given), rates, pod, 14336)
        assert found.limit == limit
        assert found.floor == pytest.approx(seconds)
        assert found.seconds > found.floor


def test_small_calls_are_those_of_the_engine():
    """The engine's own arithmetic decides; 4096 slices of 960 bytes are the most."""
    is_small = _native.cuda_sizes.is_small_call
    assert is_small(2, 256, 8, 14336)
    assert not is_small(2, 257, 8, 14336)  # 2056 assignments of a rank
    assert not is_small(16, 256, 8, 14336)  # 32768 of all
    assert not is_small(2, 256, 8, 16384)  # 18 slices of a row
    assert plan_of(2, LARGE, "uniform", 256).predictions["dispatch"].small
    assert not plan_of(2, LARGE, "uniform", 1024).predictions["dispatch"].small


def test_memory_is_the_engines():
    """Two GPUs: 20,209,536 bytes for each lane, as the engine told of itself."""
    memory = plan_of(2, LARGE, "uniform", 128).memory
    assert memory.engine == 2 * 20_209_536
    assert memory.windows == 0
    assert memory.dispatch_scratch == 8 * 2 * 128 * 8
    slices = 56  # of 7168 elements, one for each lane's access
    assert memory.combine_scratch == 128 * 14336 + 4 * 128 * slices
    assert memory.packed_rows == 1280 * 14336


def test_other_gpus_are_said_not_to_be_measured():
    assert "not measured" in known("gb200", 64).push.source
    assert "not measured" not in known("h200", 8).push.source
