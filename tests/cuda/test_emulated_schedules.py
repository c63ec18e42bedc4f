"""The CUDA engine's kernels in any order: schedules, queues, groups, and calls of any shape."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
from emulated import PROTOCOLS, Group, capacity_of
from helpers import (
    ROUTINGS,
    Geometry,
    assert_bitwise,
    assert_combined,
    routing,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import (
    check_dispatched,
    check_transposed,
    combine,
    combine_transpose,
    dispatch,
    run_dispatch,
)


def all_operations(machine, geometry, topk_idx, x, weights, group=None):
    """Launches a layer's four operations, and runs them; all results."""
    out = dispatch(machine, geometry, topk_idx, [x], group)
    machine.synchronize()
    expert_out = np.stack([result.rows[0] for result in out])
    z = combine(machine, geometry, out, expert_out, weights, group)
    grads = combine_transpose(
        machine, geometry, out, x, weights=weights, expert_out=expert_out, group=group
    )
    machine.synchronize()
    return out, expert_out, z, grads


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
@pytest.mark.usefixtures("protocol")
def test_results_do_not_depend_on_the_schedule(machine, rng):
    geometry = Geometry(4, 13, 4, 16, alignment=2)
    topk_idx = routing(rng, geometry)
    x = values(rng, (4, 13, 72), "bfloat16")
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    results = []
    for _ in range(12):
        machine.set_seed(rng.integers(2**32))
        out, _, z, grads = all_operations(machine, geometry, topk_idx, x, weights)
        check_dispatched(out, geometry, topk_idx, [x])
        results.append([*z, *itertools.chain(*grads)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise(a, b)


def test_the_same_seed_gives_the_same_schedule(new_machine, rng):
    geometry = Geometry(2, 9, 2, 4)
    topk_idx = routing(rng, geometry)
    x = values(rng, (2, 9, 4), "float32")
    weights = np.ones(geometry.topk_shape, np.float32)
    machines = [new_machine(seed=seed) for seed in (1, 1, 2, 3, 4)]
    for machine in machines:
        all_operations(machine, geometry, topk_idx, x, weights)
    first, again, *others = [machine.steps for machine in machines]
    assert first == again
    assert set(others) != {first}


class Calls:
    """Calls of changing shapes and groups, launched one by one and checked once they have run."""

    def __init__(self, machine, rng):
        self.machine, self.rng = machine, rng
        self.handles = {}  # group -> (geometry, results, placement)
        self.checks = []

    def launch(self, group, **options):
        """Some operation: dispatch, or one along the last handle of the group."""
        rng, handle = self.rng, self.handles.get(group)
        self.machine.set_protocol(rng.choice(PROTOCOLS))
        operation = rng.integers(4) if handle else 0
        if operation == 0:
            self._dispatch(group, **options)
            return
        geometry, out, placement = handle
        ranks, tokens = geometry.num_ranks, geometry.num_tokens
        width = int(rng.choice([3, 8, 260]))
        x = values(rng, (ranks, tokens, width), "float32")
        weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        expert_out = values(rng, (ranks, capacity_of(geometry), width), "float32")
        if operation == 1:
            rows = [
                self.machine.dispatch_along(group, rank, geometry, out[rank], [x[rank]], **options)
                for rank in range(ranks)
            ]
            expected = oracle.dispatch(x, placement)
            self.checks.append(lambda: assert_bitwise(np.stack([r[0] for r in rows]), expected))
        elif operation == 2:
            z = combine(self.machine, geometry, out, expert_out, weights, group, **options)
            shape = geometry.topk_shape
            self.checks.append(
                lambda: assert_combined(
                    np.stack(z), expert_out, placement, shape, weights, exact=True
                )
            )
        else:
            inputs = {"weights": weights, "expert_out": expert_out}
            grads = combine_transpose(
                self.machine, geometry, out, x, **inputs, group=group, **options
            )
            self.checks.append(
                lambda: check_transposed(grads, geometry, placement, x, weights, expert_out)
            )

    def _dispatch(self, group, **options):
        rng = self.rng
        geometry = Geometry(
            group.size,
            num_tokens=int(rng.integers(1, 9)),
            top_k=int(rng.integers(1, 4)),
            num_experts=group.size * int(rng.integers(1, 5)),
            capacity=int(rng.integers(1, 30)) if rng.random() < 0.5 else None,
        )
        topk_idx = routing(rng, geometry, "invalid")
        width = int(rng.choice([3, 8, 260]))
        x = values(rng, (group.size, geometry.num_tokens, width), "float32")
        out = dispatch(self.machine, geometry, topk_idx, [x], group, **options)
        placement = geometry.place(topk_idx, capacity_of(geometry))
        # Along it only once it has run: the operands are copied when a call is launched.
        self.handles.pop(group, None)

        def check():
            check_dispatched(out, geometry, topk_idx, [x])
            self.handles[group] = (geometry, out, placement)

        self.checks.append(check)

    def run(self):
        self.machine.set_seed(self.rng.integers(2**32))
        self.machine.synchronize()
        for check in self.checks:
            check()
        self.checks.clear()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_many_calls_one_after_the_other(machine, rng, num_ranks):
    calls = Calls(machine, rng)
    for _ in range(60):
        calls.launch(Group(tuple(range(num_ranks))))
        calls.run()


def test_calls_that_wait_for_each_other_in_queues(machine, rng):
    """A GPU begins its next call while others are busy with the last one, or have not begun it."""
    calls = Calls(machine, rng)
    for _ in range(12):
        for _ in range(rng.integers(2, 9)):
            calls.launch(Group((0, 1, 2)))
        calls.run()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_epochs_begin_anew(new_machine, rng, name):
    """After 2^32 - 1 exchanges; no epoch is 0, and odd and even ones still take turns."""
    machine = new_machine(num_sms=3)
    machine.set_protocol(name)
    group = Group((0, 1, 2))
    machine.set_epochs(group, 2**32 - 4)
    geometry = Geometry(3, 11, 2, 6)
    topk_idx = routing(rng, geometry)
    for _ in range(4):
        x = [values(rng, (3, 11, 8), "float32") for _ in range(2)]
        out = [dispatch(machine, geometry, topk_idx, [rows]) for rows in x]
        machine.synchronize()
        for rows, results in zip(x, out, strict=True):
            check_dispatched(results, geometry, topk_idx, [rows])


@pytest.mark.parametrize("num_sms", [2, 5])
def test_small_calls_in_queues(machine, rng, num_sms):
    """No rank waits for the others to end: what comes next must not fall on what is unread."""
    machine.set_num_sms(num_sms)

    def launch(geometry, topk_idx, out, placement):
        width = int(rng.choice([8, 260]))
        if rng.random() < 0.5:
            x = values(rng, (3, geometry.num_tokens, width), "float32")
            sent = dispatch(machine, geometry, topk_idx, [x])
            return lambda: check_dispatched(sent, geometry, topk_idx, [x])
        rows = values(rng, (3, capacity_of(geometry), width), "float32")
        z = combine(machine, geometry, out, rows)
        return lambda: assert_combined(
            np.stack(z), rows, placement, geometry.topk_shape, None, exact=True
        )

    for _ in range(20):
        geometry = Geometry(3, int(rng.integers(1, 24)), 2, 6)
        handle = run_dispatch(machine, rng, geometry, width=8)
        checks = [launch(geometry, *handle) for _ in range(6)]
        machine.set_seed(rng.integers(2**32))
        machine.synchronize()
        for check in checks:
            check()


def test_groups_side_by_side(machine, rng):
    calls = Calls(machine, rng)
    for _ in range(6):
        for _ in range(2):
            calls.launch(Group((0, 2)))
            calls.launch(Group((3, 1)))
        calls.run()


def test_groups_that_change_from_call_to_call(machine, rng):
    """Epochs are those of a pair of GPUs, whatever the group."""
    calls = Calls(machine, rng)
    groups = [(0, 1), (2, 3), (1, 2), (3, 0), (0, 1, 2, 3), (3, 1, 0), (2,), (2, 0)]
    for _ in range(8):
        for _ in range(4):
            calls.launch(Group(groups[rng.integers(len(groups))]))
        calls.run()


@pytest.mark.parametrize("num_sms", [1, 2, 5, 16])
def test_any_number_of_ctas(machine, rng, num_sms):
    machine.set_num_sms(num_sms)
    geometry = Geometry(2, 20, 3, 8, capacity=50)
    topk_idx = routing(rng, geometry)
    x = values(rng, (2, 20, 24), "float32")
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    out, expert_out, z, grads = all_operations(machine, geometry, topk_idx, x, weights)
    placement = check_dispatched(out, geometry, topk_idx, [x])
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)
    check_transposed(grads, geometry, placement, x, weights, expert_out)


def test_mesh_devices_in_another_order(machine, rng):
    geometry = Geometry(3, 6, 2, 6)
    group = Group((2, 0, 1), mesh_devices=(7, 1, 4))
    run_dispatch(machine, rng, geometry, group=group)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_geometry(machine, data):
    num_ranks = data.draw(st.integers(1, 5), "num_ranks")
    alignment = data.draw(st.integers(1, 5), "alignment")
    geometry = Geometry(
        num_ranks,
        num_tokens=data.draw(st.integers(0, 20), "num_tokens"),
        top_k=data.draw(st.integers(1, 9), "top_k"),
        num_experts=num_ranks * data.draw(st.integers(1, 9), "experts_per_rank"),
        capacity=data.draw(st.none() | st.integers(0, 30).map(lambda n: n * alignment), "capacity"),
        alignment=alignment,
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    machine.set_seed(rng.integers(2**32))
    machine.set_num_sms(data.draw(st.integers(1, 6), "num_sms"))
    machine.set_protocol(data.draw(st.sampled_from(PROTOCOLS), "protocol"))
    skew = data.draw(st.sampled_from(sorted(ROUTINGS)), "skew")
    width = data.draw(st.integers(1, 40) | st.sampled_from([240, 244, 500]), "width")
    dtype = data.draw(st.sampled_from(["float32", "float64"]), "dtype")
    topk_idx = routing(rng, geometry, skew)
    x = values(rng, (num_ranks, geometry.num_tokens, width), dtype)
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    out, expert_out, z, grads = all_operations(machine, geometry, topk_idx, x, weights)
    placement = check_dispatched(out, geometry, topk_idx, [x])
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)
    check_transposed(grads, geometry, placement, x, weights, expert_out)
