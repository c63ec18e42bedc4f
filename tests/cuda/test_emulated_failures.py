"""What becomes of calls whose ranks do not come, or do not agree, on emulated GPUs."""

from __future__ import annotations

import dataclasses
import re
import time

import numpy as np
import pytest
from emulated import PROTOCOLS, EngineError, Group, capacity_of
from helpers import Geometry, routing, values
from operations import combine, combine_transpose, dispatch, first_gpus, run_dispatch

SMALL = Geometry(2, 6, 2, 4, capacity=24)


def launch_dispatch(machine, group, rank, geometry=SMALL, **options):
    topk_idx = np.zeros((geometry.num_tokens, geometry.top_k), np.int32)
    x = np.ones((geometry.num_tokens, 4), np.float32)
    return machine.dispatch(group, rank, geometry, topk_idx, [x], **options)


def errors_of(machine, group, ranks, geometry=SMALL):
    """What the next call on each rank raises."""
    messages = []
    for rank in ranks:
        with pytest.raises(EngineError) as error:
            launch_dispatch(machine, group, rank, geometry)
        messages.append(str(error.value))
    return messages


def assert_failed(messages, cause, *, gave_up=r"rank \d gave this call up"):
    """Some rank says the cause, every other one says it too or that a rank gave up."""
    assert any(re.search(cause, message) for message in messages), messages
    for message in messages:
        assert re.search(f"{cause}|{gave_up}", message), message


def assert_spoiled(out):
    """Nothing of a dispatch's results can be taken for data, and the sizes fit any rows."""
    integers = {name: array for name, array in vars(out).items() if name != "rows"}
    assert not integers.pop("group_sizes").any()
    for name, array in integers.items():
        assert (array == -1).all(), name
    for rows in out.rows:
        assert (rows.reshape(-1).view(np.uint8) == 0xFF).all()


def test_a_rank_that_never_comes(new_machine):
    machine = new_machine(timeout=5, num_sms=3)
    group, geometry = Group((0, 1, 2)), Geometry(3, 60, 2, 6)
    results = [launch_dispatch(machine, group, rank, geometry) for rank in (0, 1)]
    machine.synchronize()
    for out in results:
        assert_spoiled(out)
    cause = r"rank \d waited 5 s for rank 2, for the (beginning of the call|routing of its tokens)"
    messages = errors_of(machine, group, (0, 1), geometry)
    assert_failed(messages, cause)
    assert any(message.startswith("DEADLINE_EXCEEDED") for message in messages)


def test_a_wait_that_lasts_is_told_before_it_ends(new_machine):
    """In the log, by the host; each time that it has become twice as long."""
    machine = new_machine(timeout=100, num_sms=3)
    group = Group((0, 1))
    assert machine.take_note() is None
    launch_dispatch(machine, group, 0)
    machine.synchronize()
    note = machine.take_note()
    told = re.fullmatch(
        r"freeio_jax.dispatch: rank 0 has waited (\d+) s \(it gives up after 100 s\) for rank 1, "
        r"for (the beginning of the call|the routing of its tokens)\.",
        note,
    )
    assert told and int(told[1]) >= 30, note
    assert machine.take_note() is None


def test_a_short_wait_is_not_told(new_machine):
    machine = new_machine(timeout=20)
    launch_dispatch(machine, Group((0, 1)), 0)
    machine.synchronize()
    assert machine.take_note() is None


def test_the_shortest_time_out_ends_a_wait(new_machine):
    machine = new_machine(timeout=1e-10)
    launch_dispatch(machine, Group((0, 1)), 0)
    machine.synchronize()
    assert_failed(errors_of(machine, Group((0, 1)), [0]), r"rank 0 waited \S+ s for rank 1")


def test_a_rank_that_comes_too_late_is_told(new_machine):
    machine = new_machine(timeout=5)
    group = Group((0, 1))
    launch_dispatch(machine, group, 0)
    machine.synchronize()
    launch_dispatch(machine, group, 1)
    machine.synchronize()
    assert_failed(errors_of(machine, group, [0]), "rank 0 waited 5 s for rank 1")
    assert_failed(errors_of(machine, group, [1]), "rank 1: rank 0 gave this call up")


def test_time_outs_in_real_time(new_machine, rng):
    machine = new_machine(timeout=0.3)
    machine.set_real_time(True)
    group = Group((0, 1))
    run_dispatch(machine, rng, SMALL, group=group)
    begin, busy = time.monotonic(), time.process_time()
    launch_dispatch(machine, group, 0)
    machine.synchronize()
    assert time.monotonic() - begin >= 0.3
    assert time.process_time() - busy < 0.5 * (time.monotonic() - begin)
    assert_failed(errors_of(machine, group, [0]), r"rank 0 waited 0\.3 s for rank 1")


def test_a_failed_gpu_takes_no_further_call_and_others_do(new_machine, rng):
    machine = new_machine(timeout=1)
    group = Group((0, 1))
    launch_dispatch(machine, group, 0)
    machine.synchronize()
    for _ in range(2):
        assert_failed(errors_of(machine, group, [0]), "can make no further exchange on this GPU")
    # A program of one device does not say which: it could be this GPU.
    with pytest.raises(EngineError, match="can make no further exchange on this GPU"):
        machine.check_state(Group(()))
    machine.check_state(Group((2,)))
    geometry = Geometry(2, 8, 2, 4)
    run_dispatch(machine, rng, geometry, group=Group((2, 3)))


def test_calls_launched_before_the_failure_is_known_end(new_machine):
    machine = new_machine(timeout=1)
    group = Group((0, 1))
    results = [launch_dispatch(machine, group, 0) for _ in range(3)]
    machine.synchronize()
    for out in results:
        assert_spoiled(out)
    assert_failed(errors_of(machine, group, [0]), "rank 0 waited 1 s for rank 1.*exchange 1 of")


def differing(**changes):
    base = {"num_ranks": 2, "num_tokens": 6, "top_k": 2, "num_experts": 4, "capacity": 24}
    return Geometry(**{**base, **changes})


@pytest.mark.parametrize(
    ("geometry", "name"),
    [
        (differing(num_tokens=7), r"num_tokens \((6 and 7|7 and 6)\)"),
        (differing(top_k=3), r"top_k \((2 and 3|3 and 2)\)"),
        (differing(num_experts=6), r"num_experts \((4 and 6|6 and 4)\)"),
        (differing(capacity=20), r"capacity \((24 and 20|20 and 24)\)"),
        (differing(alignment=2), r"alignment \((1 and 2|2 and 1)\)"),
    ],
)
def test_ranks_with_different_shapes(new_machine, geometry, name):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0)
    launch_dispatch(machine, group, 1, geometry)
    machine.synchronize()
    messages = errors_of(machine, group, (0, 1))
    assert_failed(messages, rf"rank (0 and rank 1|1 and rank 0) differ in {name}")
    assert any(message.startswith("INVALID_ARGUMENT") for message in messages)


def test_ranks_with_different_operations(new_machine, rng):
    machine = new_machine()
    group = Group((0, 1))
    _, out, _ = run_dispatch(machine, rng, SMALL)
    launch_dispatch(machine, group, 0)
    machine.dispatch_along(group, 1, SMALL, out[1], [np.ones((6, 4), np.float32)])
    machine.synchronize()
    messages = errors_of(machine, group, (0, 1))
    assert_failed(
        messages,
        r"differ in the operation \((dispatch and dispatch_along|dispatch_along and dispatch)\)",
    )


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("other", ["num_tokens", "num_experts", "operation"])
def test_who_waits_sees_that_the_other_rank_differs(new_machine, rng, name, other):
    """Also where all threads wait for what the other rank, in another call, never sends."""
    machine = new_machine(timeout=5, num_sms=1)
    group, geometry = Group((0, 1)), Geometry(2, 512, 4, 4, capacity=4096)
    machine.set_protocol("through buffers")
    _, out, _ = run_dispatch(machine, rng, geometry, group=group)
    machine.set_protocol(name)
    launch_dispatch(machine, group, 0, geometry)
    if other == "operation":
        machine.combine(group, 1, geometry, out[1], np.ones((capacity_of(geometry), 4), np.float32))
    else:
        changed = {"num_tokens": 40} if other == "num_tokens" else {"num_experts": 2}
        launch_dispatch(machine, group, 1, dataclasses.replace(geometry, **changed))
    machine.synchronize()
    messages = errors_of(machine, group, (0, 1), geometry)
    # Of two operations, which also differ in other words, any of them may be seen first.
    assert_failed(messages, "differ in " if other == "operation" else f"differ in {other}")


def test_ranks_with_different_dtypes(new_machine, rng):
    machine = new_machine()
    group = Group((0, 1))
    _, out, _ = run_dispatch(machine, rng, SMALL)
    for rank, dtype in enumerate(("float32", "bfloat16")):
        machine.combine(group, rank, SMALL, out[rank], np.ones((24, 8), dtype))
    machine.synchronize()
    assert_failed(errors_of(machine, group, (0, 1)), "differ in the dtypes or shapes of a row")


@pytest.mark.parametrize(
    ("ones", "others"),
    [
        (np.ones((6, 4), np.float32), np.ones((6, 4), np.int32)),
        (np.ones((6, 8), np.float32), np.ones((6, 2, 4), np.float32)),
        (np.ones((6, 4), np.float32), np.ones((6, 8), np.float16)),
    ],
)
def test_ranks_whose_rows_have_the_same_bytes(new_machine, ones, others):
    machine = new_machine()
    group = Group((0, 1))
    ids = np.zeros((6, 2), np.int32)
    for rank, tokens in enumerate((ones, others)):
        machine.dispatch(group, rank, SMALL, ids, [tokens])
    machine.synchronize()
    assert_failed(errors_of(machine, group, (0, 1)), "differ in the dtypes or shapes of a row")


def test_ranks_at_different_calls_of_the_program(new_machine):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, instance=3)
    launch_dispatch(machine, group, 1, instance=4)
    machine.synchronize()
    cause = "differ in the call of the program, or the program[.]"
    assert_failed(errors_of(machine, group, (0, 1)), cause)


def test_ranks_with_different_numbers_of_ctas(new_machine):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0)
    machine.set_num_sms(1)
    launch_dispatch(machine, group, 1)
    machine.synchronize()
    cause = r"differ in the number of CTAs \((4 and 1|1 and 4)\)"
    assert_failed(errors_of(machine, group, (0, 1)), cause)


def test_a_gpu_with_little_shared_memory(new_machine, rng):
    """Of compute capability 8.6, 8.9 or 12.0. Who does not need more does not notice."""
    machine = new_machine(shared_bytes=99 << 10)
    machine.set_protocol("large")
    run_dispatch(machine, rng, SMALL)
    with pytest.raises(EngineError, match=r"num_experts=4096, needs \d+ bytes of shared memory"):
        launch_dispatch(machine, Group((0, 1)), 0, differing(num_experts=4096))
    run_dispatch(machine, rng, SMALL)


def test_more_assignments_than_places_have_numbers_for(new_machine):
    machine = new_machine()
    geometry = Geometry(2, 2**17, 16, 4096, capacity=8)
    with pytest.raises(EngineError, match=r"top_k = 2097152 assignments .* at most 2097151 where"):
        launch_dispatch(machine, Group((0, 1)), 0, geometry)


def test_some_multiprocessors_are_left_to_others(new_machine):
    """NCCL's kernels, for instance: two that hold a GPU each would wait for each other."""
    machine = new_machine(num_sms=12)
    group = Group((0, 1))
    machine.set_num_sms(0)  # the engine's choice
    launch_dispatch(machine, group, 0)
    machine.set_num_sms(3)
    launch_dispatch(machine, group, 1)
    machine.synchronize()
    assert_failed(
        errors_of(machine, group, (0, 1)), r"differ in the number of CTAs \((8 and 3|3 and 8)\)"
    )


def test_another_mesh_device_than_the_compiled_one(new_machine):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, device=5)
    launch_dispatch(machine, group, 1)
    machine.synchronize()
    cause = "rank 0 runs on mesh device 5, but was compiled for mesh device 0"
    assert_failed(errors_of(machine, group, [0]), cause)
    assert_failed(errors_of(machine, group, [1]), "rank 1: rank 0 gave this call up")


def test_a_time_out_at_any_step(new_machine, rng):
    """Whatever a rank waits for when its time is up: every kernel ends, and writes nowhere else."""
    geometry = Geometry(3, 9, 3, 9)
    group = first_gpus(geometry)
    topk_idx = routing(rng, geometry)
    x = values(rng, (3, 9, 8), "float32")
    weights = np.ones(geometry.topk_shape, np.float32)
    steps = set()
    for _ in range(25):
        machine = new_machine()
        machine.set_protocol(rng.choice(PROTOCOLS))
        _, out, _ = run_dispatch(machine, rng, geometry)
        machine.set_timeout(10 ** rng.uniform(-8, -3.5))
        machine.set_patience(2)
        operation = rng.integers(3)
        if operation == 0:
            dispatch(machine, geometry, topk_idx, [x])
        elif operation == 1:
            combine(machine, geometry, out, np.ones((3, capacity_of(geometry), 300), np.float32))
        else:
            expert_out = values(rng, (3, capacity_of(geometry), 8), "float32")
            combine_transpose(
                machine, geometry, out, x, weights=weights, expert_out=expert_out, group=group
            )
        machine.synchronize(late_writes=True)
        for rank in range(3):
            try:
                launch_dispatch(machine, group, rank, geometry)
            except EngineError as error:
                steps |= set(re.findall(r"for rank \d, for ([\w ]+)\.", str(error)))
                steps |= set(re.findall("gave this call up", str(error)))
        machine.close()
    print(steps)
    assert len(steps) > 2, steps


def test_gpus_without_nvlink_are_refused(new_machine):
    with pytest.raises(EngineError, match=r"no NVLink from GPU \d to GPU \d.*CUDA_VISIBLE_DEVICES"):
        new_machine(native_atomics=False)
    new_machine(num_gpus=1, native_atomics=False)


def test_a_gpu_that_is_not_started(new_machine):
    machine = new_machine(num_gpus=2)
    with pytest.raises(EngineError, match="GPU 3 of the mesh is not connected"):
        launch_dispatch(machine, Group((0, 3)), 0)
