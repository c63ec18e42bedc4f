"""Exchanges that run beside compute and beside synchronous exchanges, on emulated GPUs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from emulated import PROTOCOLS, EngineError, Group, Start, capacity_of
from helpers import Geometry, assert_bitwise, assert_combined, routing, values
from operations import (
    check_dispatched,
    check_transposed,
    combine,
    combine_transpose,
    dispatch,
    done,
    first_gpus,
    run_dispatch,
)
from test_emulated_failures import SMALL, assert_failed, assert_spoiled, errors_of, launch_dispatch
from test_emulated_schedules import Calls

all_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)


@pytest.fixture
def machine_with_starts(machine):
    """Its synchronous calls are those of programs that have starts."""
    machine.starts_num_sms = 0
    return machine


@all_protocols
@pytest.mark.usefixtures("protocol")
def test_started_operations_equal_synchronous_ones(machine_with_starts, rng):
    """A layer whose exchanges are all started, with compute before each done."""
    machine = machine_with_starts
    geometry = Geometry(3, 11, 3, 9, alignment=2)
    group = first_gpus(geometry)
    topk_idx = routing(rng, geometry)
    x = values(rng, (3, 11, 72), "float32")
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    shape = geometry.topk_shape
    for run in range(4):
        starts = [Start(number, run=run) for number in range(4)]

        def finish(start):
            for gpu in group.gpus:
                machine.compute(gpu, ctas=24)
            done(machine, group, start)
            machine.synchronize()

        machine.set_seed(rng.integers(2**32))
        out = dispatch(machine, geometry, topk_idx, [x], start=starts[0])
        finish(starts[0])
        placement = check_dispatched(out, geometry, topk_idx, [x])
        rows = np.stack([result.rows[0] for result in out])
        along = [
            machine.dispatch_along(group, rank, geometry, out[rank], [x[rank]], start=starts[1])
            for rank in range(3)
        ]
        finish(starts[1])
        for rank in range(3):
            assert_bitwise(along[rank][0], rows[rank])
        z = combine(machine, geometry, out, rows, weights, start=starts[2])
        finish(starts[2])
        assert_combined(np.stack(z), rows, placement, shape, weights, exact=True)
        inputs = {"weights": weights, "expert_out": rows}
        grads = combine_transpose(machine, geometry, out, x, **inputs, start=starts[3])
        finish(starts[3])
        check_transposed(grads, geometry, placement, x, weights, rows)


class Mix(Calls):
    """Starts, dones, synchronous calls and compute in any order, the same on all ranks."""

    def __init__(self, machine, rng):
        super().__init__(machine, rng)
        self.in_flight = []  # (group, start, check)
        self.numbers = itertools.count()

    def start(self, group):
        start = Start(next(self.numbers), num_sms=int(self.rng.integers(3)))
        self.launch(group, start=start)
        self.in_flight.append((group, start, self.checks.pop()))

    def done(self):
        group, start, check = self.in_flight.pop(self.rng.integers(len(self.in_flight)))
        done(self.machine, group, start)
        self.checks.append(check)

    def step(self, groups, *, most_in_flight=4):
        group = groups[self.rng.integers(len(groups))]
        what = self.rng.integers(4)
        if what == 0 and len(self.in_flight) < most_in_flight:
            self.start(group)
        elif what == 1 and self.in_flight:
            self.done()
        elif what == 2:
            self.launch(group)
        else:
            for gpu in group.gpus:
                self.machine.compute(gpu, ctas=int(self.rng.integers(1, 40)))

    def finish(self):
        while self.in_flight:
            self.done()
        self.run()


def run_mix(machine, rng, groups, rounds, steps=8):
    mix = Mix(machine, rng)
    for _ in range(rounds):
        for _ in range(steps):
            mix.step(groups)
        if rng.random() < 0.5:
            mix.finish()
        else:
            mix.run()  # some stay in flight while the handles of others are used
    mix.finish()


@pytest.mark.parametrize("num_sms", [0, 5, 16])
def test_random_mixes(machine_with_starts, rng, num_sms):
    """With the engine's choice of multiprocessors, with few, and with all."""
    machine_with_starts.set_num_sms(num_sms)
    run_mix(machine_with_starts, rng, [Group((0, 1, 2))], rounds=10)


def test_random_mixes_of_groups(machine_with_starts, rng):
    groups = [Group(gpus) for gpus in [(0, 1), (2, 3), (1, 2), (3, 0), (0, 1, 2, 3), (3, 1, 0)]]
    run_mix(machine_with_starts, rng, groups, rounds=8)


def test_random_mixes_where_multiprocessors_are_scarce(new_machine, rng):
    """Both lanes together have just as many CTAs as there is room for."""
    machine = new_machine(num_gpus=3, num_sms=5)
    machine.starts_num_sms = 2
    machine.set_overlap_num_sms(1)
    run_mix(machine, rng, [Group((0, 1, 2))], rounds=12)


def two_in_flight(machine, rng, rounds):
    """Synchronous calls while one started exchange waits for the end of another."""
    geometry = Geometry(2, 8, 2, 4)
    group = first_gpus(geometry)
    topk_idx = routing(rng, geometry)
    x = values(rng, (2, 8, 8), "float32")
    for run in range(rounds):
        machine.set_seed(rng.integers(2**32))
        machine.set_protocol(PROTOCOLS[run % 3])
        starts = [Start(number, run=run) for number in range(2)]
        out = [dispatch(machine, geometry, topk_idx, [x], start=start) for start in starts]
        out.append(dispatch(machine, geometry, topk_idx, [x]))
        for start in starts:
            done(machine, group, start)
        machine.synchronize()
        for results in out:
            check_dispatched(results, geometry, topk_idx, [x])


def test_the_lanes_fit_on_a_gpu_together(new_machine, rng):
    machine = new_machine(num_gpus=2, num_sms=6, timeout=5)
    machine.set_overlap_num_sms(2)
    machine.starts_num_sms = 0
    two_in_flight(machine, rng, 60)


def test_lanes_that_do_not_fit_hold_gpus_in_a_circle(new_machine, rng):
    """What the engine avoids: each GPU runs the exchange for which the other one has no room."""
    machine = new_machine(num_gpus=2, num_sms=6, timeout=5)
    machine.set_overlap_num_sms(2)
    machine.starts_num_sms = None
    with pytest.raises((AssertionError, EngineError)):
        two_in_flight(machine, rng, 60)
    assert_failed(list(iter(machine.take_failure, None)), r"rank \d waited 5 s for rank \d")


def ctas_of(machine, *, num_sms=0, overlap=3, start=None, starts_num_sms=None):
    """How many CTAs a call gets, told by the error of a rank whose call has two."""
    group = Group((0, 1))
    machine.set_overlap_num_sms(overlap)
    machine.set_num_sms(num_sms)
    machine.starts_num_sms = starts_num_sms
    names = [None, None] if start is None else [Start(1, num_sms=sms) for sms in (start, 2)]
    launch_dispatch(machine, group, 0, start=names[0])
    machine.set_num_sms(2)
    machine.starts_num_sms = None
    launch_dispatch(machine, group, 1, start=names[1])
    machine.synchronize()
    failures = "".join(iter(machine.take_failure, None))
    numbers = map(int, re.search(r"number of CTAs \((\d+) and (\d+)\)", failures).groups())
    (ctas,) = set(numbers) - {2}
    return ctas


@pytest.mark.parametrize(
    ("options", "ctas"),
    [
        ({}, 8),  # no starts in the program: four stay free, as ever
        ({"starts_num_sms": 0}, 5),
        ({"starts_num_sms": 2}, 5),
        ({"starts_num_sms": 5}, 3),
        ({"starts_num_sms": 100}, 1),
        ({"starts_num_sms": 0, "overlap": 100}, 1),
        ({"num_sms": 12}, 12),
        ({"num_sms": 12, "starts_num_sms": 0}, 9),
        ({"num_sms": 4, "starts_num_sms": 0}, 4),
        ({"start": 0}, 3),
        ({"start": 5}, 5),
        ({"start": 100}, 8),
    ],
    ids=str,
)
def test_the_multiprocessors_of_each_lane(new_machine, options, ctas):
    assert ctas_of(new_machine(num_sms=12, timeout=5), **options) == ctas


@pytest.mark.parametrize("name", PROTOCOLS)
def test_epochs_of_both_lanes_begin_anew(new_machine, rng, name):
    machine = new_machine(num_sms=6)
    machine.set_num_sms(3)
    machine.set_overlap_num_sms(2)
    machine.starts_num_sms = 0
    machine.set_protocol(name)
    group = Group((0, 1, 2))
    machine.set_epochs(group, 2**32 - 4)
    geometry = Geometry(3, 11, 2, 6)
    topk_idx = routing(rng, geometry)
    for run in range(6):
        x = [values(rng, (3, 11, 8), "float32") for _ in range(2)]
        start = Start(0, run=run)
        out = [
            dispatch(machine, geometry, topk_idx, [x[0]], start=start),
            dispatch(machine, geometry, topk_idx, [x[1]]),
        ]
        done(machine, group, start)
        machine.synchronize()
        for rows, results in zip(x, out, strict=True):
            check_dispatched(results, geometry, topk_idx, [rows])


# --- Failures ------------------------------------------------------------------------------------


def test_a_rank_that_never_starts(new_machine):
    machine = new_machine(timeout=5, num_sms=6)
    group = Group((0, 1))
    out = launch_dispatch(machine, group, 0, start=Start(1))
    machine.done(group, 0, Start(1))
    machine.synchronize()
    assert_spoiled(out)
    assert_failed(errors_of(machine, group, [0]), "rank 0 waited 5 s for rank 1")


def test_a_failure_between_start_and_done(new_machine):
    """Its done says what a synchronous call would say."""
    machine = new_machine(timeout=5, num_sms=6)
    group = Group((0, 1))
    out = launch_dispatch(machine, group, 0, start=Start(1))
    machine.synchronize()
    with pytest.raises(EngineError, match=r"DEADLINE_EXCEEDED.*rank 0 waited 5 s for rank 1"):
        machine.done(group, 0, Start(1))
    machine.synchronize()
    assert_spoiled(out)
    with pytest.raises(EngineError, match="rank 0 waited 5 s for rank 1"):
        launch_dispatch(machine, group, 0, start=Start(2))
    with pytest.raises(EngineError, match="rank 0 waited 5 s for rank 1"):
        machine.check_state(group)


@pytest.mark.parametrize("ours", ["synchronous", "started"])
@pytest.mark.parametrize("theirs", ["synchronous", "started"])
def test_a_rank_that_comes_too_late_is_told_in_any_lane(new_machine, ours, theirs):
    machine = new_machine(timeout=5, num_sms=6)
    group = Group((0, 1))
    names = [Start(1) if how == "started" else None for how in (ours, theirs)]
    launch_dispatch(machine, group, 0, start=names[0])
    machine.synchronize()
    machine.set_timeout(1e6)
    launch_dispatch(machine, group, 1, start=names[1])
    machine.synchronize()
    assert machine.take_note() is None, "it has waited for long"
    assert_failed(errors_of(machine, group, [1]), "rank 1: rank 0 gave this call up")


@pytest.mark.parametrize("failing", ["synchronous", "started"])
def test_a_failure_in_one_lane_ends_the_other(new_machine, failing):
    """At once, and also for a rank that takes part only in the exchange of the other lane."""
    machine = new_machine(timeout=1e6, num_sms=6)
    machine.set_late_events(False)
    machine.set_num_sms(2)
    machine.starts_num_sms = 0
    names = [None, Start(1)] if failing == "synchronous" else [Start(1), None]
    differing, late = Group((0, 1)), Group((0, 2))
    # GPU 0 waits for GPU 2, which is late, when it finds that GPU 1 makes another call. It starts
    # first what it starts: that would wait for a synchronous call before it.
    if failing == "started":
        launch_dispatch(machine, differing, 0, instance=1, start=names[0])
    ended = launch_dispatch(machine, late, 0, start=names[1])
    if failing == "synchronous":
        launch_dispatch(machine, differing, 0, instance=1, start=names[0])
    launch_dispatch(machine, differing, 1, instance=2, start=names[0])
    machine.synchronize()
    assert machine.take_note() is None, "it has waited for long"
    cause = "differ in the call of the program|rank 1 gave this call up"
    if failing == "synchronous":
        with pytest.raises(EngineError, match=cause):
            machine.done(late, 0, Start(1))
        machine.synchronize()
    assert_spoiled(ended)
    with pytest.raises(EngineError, match="differ in the call of the program"):
        machine.check_state(differing)
    launch_dispatch(machine, late, 1, start=names[1])
    machine.synchronize()
    assert_failed(errors_of(machine, late, [1]), "rank 1: rank 0 gave this call up")


@pytest.mark.parametrize("what", ["synchronous", "start", "done"])
def test_an_error_before_done_waits_for_what_is_in_flight(new_machine, what):
    """The program ends, and XLA takes back the buffers of what it has started."""
    machine = new_machine(num_gpus=2, num_sms=6, shared_bytes=99 << 10)
    group = Group((0, 1))
    for rank in range(2):
        launch_dispatch(machine, group, rank, start=Start(1))
    for rank in range(2):
        with pytest.raises(EngineError):
            if what == "done":
                machine.done(group, rank, Start(2))
            else:
                machine.set_protocol("large")
                geometry = Geometry(2, 6, 2, 4096, capacity=24)
                start = Start(2) if what == "start" else None
                launch_dispatch(machine, group, rank, geometry, start=start)
        machine.abandon(group, rank, Start(1))
    machine.synchronize()


def test_ranks_at_different_starts_of_the_program(new_machine):
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, instance=3, start=Start(1))
    launch_dispatch(machine, group, 1, instance=4, start=Start(1))
    machine.synchronize()
    cause = "differ in the call of the program, or the program[.]"
    assert_failed(errors_of(machine, group, (0, 1)), cause)


def test_long_waits_of_both_lanes_are_told_once_each(new_machine):
    machine = new_machine(timeout=100, num_sms=6)
    machine.set_num_sms(2)
    machine.starts_num_sms = 0
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, start=Start(1))
    launch_dispatch(machine, group, 0)
    machine.synchronize()
    notes = list(iter(machine.take_note, None))
    assert 1 <= len(notes) <= 2
    for note in notes:
        assert re.search(r"rank 0 has waited \d+ s .* for rank 1", note)


def test_a_time_out_in_either_lane_at_any_step(new_machine, rng):
    """Every kernel ends, and writes nowhere else than where it should."""
    geometry = Geometry(3, 9, 3, 9)
    group = first_gpus(geometry)
    for _ in range(12):
        machine = new_machine(num_sms=6)
        machine.set_overlap_num_sms(2)
        machine.starts_num_sms = 0
        _, out, _ = run_dispatch(machine, rng, geometry)
        machine.set_timeout(10 ** rng.uniform(-8, -3.5))
        machine.set_patience(2)
        rows = np.ones((3, capacity_of(geometry), 300), np.float32)
        topk_idx = routing(rng, geometry)
        x = values(rng, (3, 9, 8), "float32")
        machine.set_protocol(rng.choice(PROTOCOLS))
        if rng.random() < 0.5:
            dispatch(machine, geometry, topk_idx, [x], start=Start(1))
        else:
            combine(machine, geometry, out, rows, start=Start(1))
        machine.set_protocol(rng.choice(PROTOCOLS))
        combine(machine, geometry, out, rows)
        done(machine, group, Start(1))
        machine.synchronize(late_writes=True)
        machine.close()


# --- Misuse --------------------------------------------------------------------------------------


def test_done_without_start(new_machine):
    machine = new_machine()
    with pytest.raises(EngineError, match="has not started on this GPU, or for which it has"):
        machine.done(Group((0, 1)), 0, Start(1))


def test_done_twice(new_machine):
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    for rank in range(2):
        launch_dispatch(machine, group, rank, start=Start(1))
        machine.done(group, rank, Start(1))
    machine.synchronize()
    with pytest.raises(EngineError, match="or for which it has waited before"):
        machine.done(group, 0, Start(1))


def test_done_in_another_run(new_machine):
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, start=Start(1, run=1))
    with pytest.raises(EngineError, match="this run of the program has not started"):
        machine.done(group, 0, Start(1, run=2))
    launch_dispatch(machine, group, 1, start=Start(1, run=1))
    done(machine, group, Start(1, run=1))
    machine.synchronize()


def test_results_that_were_copied_before_done(new_machine):
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, start=Start(1))
    launch_dispatch(machine, group, 1, start=Start(1))
    with pytest.raises(EngineError, match=r"dispatch_start: XLA .* \(result 0\)"):
        machine.done(group, 0, Start(1), copied=True)
    machine.done(group, 1, Start(1))
    machine.synchronize()


def test_more_in_flight_than_there_is_room_for(new_machine):
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    most = machine.max_in_flight
    for number, rank in itertools.product(range(most), range(2)):
        launch_dispatch(machine, group, rank, start=Start(number))
    with pytest.raises(EngineError, match=rf"freeio_jax.dispatch_start: {most} exchanges are in"):
        launch_dispatch(machine, group, 0, start=Start(most))
    for number in range(most):
        done(machine, group, Start(number))
    machine.synchronize()


def test_runs_that_ended_before_their_dones(new_machine, rng):
    """An error of something else ended them. What they left in flight is forgotten in time."""
    machine = new_machine(num_sms=6)
    group = Group((0, 1))
    for run in range(3 * machine.max_in_flight):
        for rank in range(2):
            launch_dispatch(machine, group, rank, start=Start(1, run=run))
        machine.synchronize()
    machine.starts_num_sms = 0
    run_dispatch(machine, rng, SMALL)


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ("sd", [True]),
        ("ds", [True]),
        ("s", [False]),
        ("ssdd", [True, True]),
        ("sds", [True, False]),  # a later program of the same name
        ("ssd", [False, True]),  # ... whose first one lacks its done
    ],
)
def test_a_start_whose_done_is_not_in_the_program(machine, rng, calls, found):
    assert machine.pairs(int(rng.integers(2**31)), calls) == found
