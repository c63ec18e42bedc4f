"""Groups that span hosts, on emulated GPUs: the kernels of xla_ffi/hosts against the oracle.

What goes from host to host arrives late, and in any order up to its sender's fence.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from emulated import EngineError, Group, capacity_of
from helpers import (
    ROUTINGS,
    Geometry,
    assert_bitwise,
    assert_combined,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import (
    check_dispatched,
    check_rows,
    check_transposed,
    combine,
    combine_transpose,
    dispatch,
    first_gpus,
    run_dispatch,
)

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
#: Hosts, and GPUs of each.
HOSTS = [(2, 2), (4, 2), (4, 4), (2, 1), (3, 1), (2, 4)]
#: Bytes of a half of a window: for calls of one round, and of many.
WINDOWS = [1 << 20, 1 << 11]


def hosts_of(group, per_host):
    """Of the group's ranks, numbered in the order in which the ranks come to them."""
    numbers = {}
    return np.array([numbers.setdefault(gpu // per_host, len(numbers)) for gpu in group.gpus])


def check_all(
    machine, rng, geometry, hosts, *, skew="holes", width=12, dtype="float32", group=None
):
    """All four operations, on the handle of the first."""
    group = group or first_gpus(geometry)
    _, out, placement = run_dispatch(machine, rng, geometry, skew, group=group)
    leaves = [random_bits(rng, (*geometry.topk_shape[:2], size), np.uint8) for size in (32, 7)]
    along = [
        machine.dispatch_along(group, rank, geometry, out[rank], [leaf[rank] for leaf in leaves])
        for rank in range(group.size)
    ]
    machine.synchronize()
    for i, leaf in enumerate(leaves):
        for rank, rows in enumerate(oracle.dispatch(leaf, placement)):
            sizes = placement.group_sizes[rank]
            check_rows(along[rank][i], rows, geometry, sizes, f"leaf {i} of rank {rank}")
    expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), width), dtype)
    weights = power_of_two_weights(rng, geometry.topk_shape)
    for some in (weights, None):
        z = combine(machine, geometry, out, expert_out, some, group)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, some, exact=True, hosts=hosts
        )
    cotangent = values(rng, (*geometry.topk_shape[:2], width), dtype)
    for options in (
        {"weights": weights, "expert_out": expert_out},
        {"weights": weights},
        {"expert_out": expert_out},
    ):
        grads = combine_transpose(machine, geometry, out, cotangent, group=group, **options)
        machine.synchronize()
        options = {"weights": None, "expert_out": None, **options}
        check_transposed(grads, geometry, placement, cotangent, **options)


GEOMETRIES = {
    "few tokens": {"num_tokens": 3, "top_k": 2},
    "one token": {"num_tokens": 1, "top_k": 4},
    "no tokens": {"num_tokens": 0, "top_k": 2},
    "no capacity": {"num_tokens": 5, "top_k": 2, "capacity": 0},
    "aligned": {"num_tokens": 13, "top_k": 3, "alignment": 8},
    "drops": {"num_tokens": 33, "top_k": 4, "capacity": 24, "alignment": 4},
    "any tail": {"num_tokens": 20, "top_k": 3, "alignment": 4, "zero_tail": False},
    "many tokens": {"num_tokens": 70, "top_k": 3},
}


#: Sixteen GPUs take long, so they make some of the calls only.
CASES = [
    (name, hosts)
    for hosts in HOSTS
    for name in GEOMETRIES
    if hosts != (4, 4) or name in ("one token", "drops", "many tokens")
]


@pytest.mark.parametrize("window_bytes", WINDOWS)
@pytest.mark.parametrize(("name", "hosts"), CASES, ids=str)
def test_every_operation(machine, rng, name, hosts, window_bytes):
    num_hosts, per_host = hosts
    num_ranks = num_hosts * per_host
    machine.set_num_sms(3)
    machine.set_hosts(num_ranks, per_host, window_bytes)
    geometry = Geometry(num_ranks=num_ranks, num_experts=2 * num_ranks, **GEOMETRIES[name])
    group = first_gpus(geometry)
    check_all(machine, rng, geometry, hosts_of(group, per_host))


@pytest.mark.parametrize("window_bytes", WINDOWS)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("per_host", [1, 2])
def test_hosts_that_reach_each_other_by_a_link(machine, rng, name, per_host, window_bytes):
    num_ranks = 2 * per_host
    machine.set_num_sms(3)
    machine.set_hosts(num_ranks, per_host, window_bytes, linked=True)
    geometry = Geometry(num_ranks=num_ranks, num_experts=2 * num_ranks, **GEOMETRIES[name])
    check_all(machine, rng, geometry, hosts_of(first_gpus(geometry), per_host))


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("window_bytes", [1 << 20, 1 << 14])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_warps_share_a_wide_row(machine, rng, dtype, window_bytes, linked):
    machine.set_hosts(4, 2, window_bytes, linked=linked)
    geometry = Geometry(4, 9, 3, 8)
    hosts = hosts_of(first_gpus(geometry), 2)
    check_all(machine, rng, geometry, hosts, width=2500, dtype=dtype)
    topk_idx = routing(rng, geometry)
    x = random_bits(rng, (4, 9, 5000), np.float16)
    out = dispatch(machine, geometry, topk_idx, [x])
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, [x])


@pytest.mark.parametrize("skew", ROUTINGS)
def test_any_routing(machine, rng, skew):
    machine.set_hosts(8, 4, 1 << 12)
    geometry = Geometry(8, 23, 4, 16, capacity=64)
    check_all(machine, rng, geometry, hosts_of(first_gpus(geometry), 4), skew=skew)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(machine, rng, data):
    num_hosts, per_host = data.draw(st.sampled_from(HOSTS))
    num_ranks = num_hosts * per_host
    experts = data.draw(st.integers(1, 5))
    alignment = data.draw(st.sampled_from([1, 1, 4]))
    geometry = Geometry(
        num_ranks=num_ranks,
        num_tokens=data.draw(st.integers(0, 40)),
        top_k=data.draw(st.integers(1, min(8, experts * num_ranks))),
        num_experts=experts * num_ranks,
        alignment=alignment,
        capacity=data.draw(st.one_of(st.none(), st.integers(0, 12).map(lambda n: n * alignment))),
        zero_tail=data.draw(st.booleans()),
    )
    machine.set_num_sms(data.draw(st.integers(1, 4)))
    window_bytes = data.draw(st.sampled_from([1 << 11, 1 << 12, 1 << 20]))
    machine.set_hosts(num_ranks, per_host, window_bytes, linked=data.draw(st.booleans()))
    skew = data.draw(st.sampled_from(sorted(ROUTINGS)))
    hosts = hosts_of(first_gpus(geometry), per_host)
    check_all(machine, rng, geometry, hosts, skew=skew, width=data.draw(st.integers(1, 20)))


@pytest.mark.parametrize("offset", [0, 8, 2])
def test_leaves_of_any_row_size_travel_together(machine, rng, offset):
    """Rows of 1 byte to several slices, at addresses that allow accesses of 16, 8 or 2 bytes."""
    machine.set_hosts(4, 2, 1 << 16)
    geometry = Geometry(4, 10, 2, 8)
    shape = (geometry.num_ranks, geometry.num_tokens)
    leaves = [
        random_bits(rng, (*shape, size), np.uint8) for size in (1, 2, 3, 16, 24, 100, 4112, 12301)
    ]
    leaves.append(random_bits(rng, (*shape, 3, 2), ml_dtypes.bfloat16))
    topk_idx = routing(rng, geometry)
    out = dispatch(machine, geometry, topk_idx, leaves, offset=offset)
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_every_dtype(machine, rng, dtype):
    """Widths that fill whole packs, that do not, and that take several steps of a warp."""
    machine.set_hosts(4, 2, 1 << 15)
    geometry = Geometry(4, 9, 4, 16, capacity=24)
    for width in (1, 64, 530):
        check_all(machine, rng, geometry, np.array([0, 0, 1, 1]), width=width, dtype=dtype)


def test_two_runs_give_equal_bits(machine, rng):
    """Of sums whose value depends on the order, although everything arrives in another order."""
    machine.set_hosts(8, 2, 1 << 12)
    geometry = Geometry(8, 21, 6, 16)
    _, out, _ = run_dispatch(machine, rng, geometry)
    expert_out = rng.normal(size=(8, capacity_of(geometry), 12)).astype(np.float32)
    weights = rng.normal(size=geometry.topk_shape).astype(np.float32)
    runs = []
    for _ in range(2):
        runs.append(combine(machine, geometry, out, expert_out, weights))
        machine.synchronize()
    for first, second in zip(*runs, strict=True):
        assert_bitwise(first, second)


@pytest.mark.parametrize(
    "group",
    [Group((0, 4, 1, 5)), Group((4, 5, 0, 1)), Group((2, 6)), Group((1, 3, 5, 7))],
    ids=str,
)
def test_ranks_in_any_order_on_some_gpus_of_each_host(machine, rng, group):
    machine.set_hosts(8, 4, 1 << 12)
    geometry = Geometry(group.size, 19, 3, 4 * group.size)
    check_all(machine, rng, geometry, hosts_of(group, 4), group=group)


def test_groups_that_share_a_host_use_its_windows_in_turn(machine, rng):
    machine.set_hosts(8, 2, 1 << 11)
    groups = [Group((0, 1, 2, 3)), Group((0, 1, 4, 5)), Group((0, 2, 4, 6)), Group((2, 3, 0, 1))]
    for group in (*groups, *groups):
        run_dispatch(machine, rng, Geometry(4, 31, 2, 8), group=group)


# --- Who is late ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_host", [1, 2])
def test_a_host_that_is_far_behind(machine, rng, per_host):
    """Several calls are in the streams, and the GPUs of one host come to theirs late."""
    num_ranks = 2 * per_host
    machine.set_hosts(num_ranks, per_host, 1 << 11)
    geometry = Geometry(num_ranks, 40, 3, 2 * num_ranks)
    group = first_gpus(geometry)
    _, out, placement = run_dispatch(machine, rng, geometry)
    hosts = hosts_of(group, per_host)
    for late in (0, 1):
        launched = []
        for _ in range(3):
            for gpu in range(late * per_host, (late + 1) * per_host):
                machine.compute(gpu, ctas=2, turns=3000)
            topk_idx = routing(rng, geometry)
            leaves = [random_bits(rng, (num_ranks, 40, 5), np.float32)]
            sent = dispatch(machine, geometry, topk_idx, leaves)
            expert_out = values(rng, (num_ranks, capacity_of(geometry), 12), "float32")
            z = combine(machine, geometry, out, expert_out)
            cotangent = values(rng, (num_ranks, 40, 12), "float32")
            weights = power_of_two_weights(rng, geometry.topk_shape)
            options = {"weights": weights, "expert_out": expert_out}
            grads = combine_transpose(machine, geometry, out, cotangent, **options)
            launched.append((topk_idx, leaves, sent, expert_out, z, cotangent, options, grads))
        machine.synchronize()
        for topk_idx, leaves, sent, expert_out, z, cotangent, options, grads in launched:
            check_dispatched(sent, geometry, topk_idx, leaves)
            shape = geometry.topk_shape
            assert_combined(np.stack(z), expert_out, placement, shape, exact=True, hosts=hosts)
            check_transposed(grads, geometry, placement, cotangent, **options)


SMALL = Geometry(4, 6, 2, 8)


def launch(machine, group, rank, geometry=SMALL, **options):
    topk_idx = np.zeros((geometry.num_tokens, geometry.top_k), np.int32)
    x = np.ones((geometry.num_tokens, 4), np.float32)
    return machine.dispatch(group, rank, geometry, topk_idx, [x], **options)


def errors_of(machine, group, ranks):
    """What the next call on each rank raises."""
    messages = []
    for rank in ranks:
        with pytest.raises(EngineError) as error:
            launch(machine, group, rank)
        messages.append(str(error.value))
    return messages


GAVE_UP = r"rank \d (on host \d of the group|of them) gave this call up"


def test_a_host_that_never_comes(new_machine):
    """Every rank of the other host says for which rank on which host, and at which step."""
    machine = new_machine(timeout=5, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    results = [launch(machine, group, rank) for rank in (0, 1)]
    machine.synchronize()
    for out in results:
        assert not out.group_sizes.any()
        assert (out.rows[0].view(np.uint8) == 0xFF).all()
    messages = errors_of(machine, group, (0, 1))
    cause = (
        r"DEADLINE_EXCEEDED: freeio_jax.dispatch: rank [01] on host 0 of the group waited 5 s for "
        r"rank [23] on host 1 of the group, for the beginning of the call"
    )
    assert any(re.search(cause, message) for message in messages), messages
    for message in messages:
        assert re.search(f"{cause}|{GAVE_UP}", message), message


def test_a_host_that_comes_too_late_hears_of_it(new_machine):
    machine = new_machine(timeout=5, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    for rank in (0, 1):
        launch(machine, group, rank)
    machine.synchronize()
    for rank in (2, 3):
        launch(machine, group, rank)
    machine.synchronize(late_writes=True)
    for message in errors_of(machine, group, (2, 3)):
        assert re.search(GAVE_UP, message), message


@pytest.mark.parametrize(("why", "text"), [(1, "ended"), (2, r"left \(freeio_jax.shutdown.*\)")])
def test_processes_of_another_host_that_have_gone(new_machine, why, text):
    machine = new_machine(timeout=600, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    for rank in (0, 1):
        for gone in (2, 3):
            machine.set_gone(rank, gone, why)
        launch(machine, group, rank)
    machine.synchronize()
    messages = errors_of(machine, group, (0, 1))
    cause = (
        r"UNAVAILABLE: freeio_jax.dispatch: rank [01] on host 0 of the group: rank [23] on host 1 "
        rf"of the group {text} while it was waited for"
    )
    assert any(re.search(cause, message) for message in messages), messages
    for message in messages:
        assert re.search(f"{cause}|{GAVE_UP}", message), message


@pytest.mark.parametrize("rank", range(4))
def test_one_rank_that_never_comes(new_machine, rank):
    machine = new_machine(timeout=5, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    others = [r for r in range(4) if r != rank]
    for r in others:
        launch(machine, group, r)
    machine.synchronize()
    messages = errors_of(machine, group, others)
    cause = (
        rf"waited 5 s for rank ({rank} on host {rank // 2} of the group|{rank % 2} of them), for "
    )
    assert any(re.search(cause, message) for message in messages), messages
    for message in messages:
        assert re.search(f"{cause}|{GAVE_UP}", message), message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_tokens": 7}, r"differ in num_tokens \((6 and 7|7 and 6)\)"),
        ({"num_experts": 16}, r"differ in num_experts \((8 and 16|16 and 8)\)"),
        ({"capacity": 8}, r"differ in capacity"),
    ],
)
def test_hosts_that_make_different_calls(new_machine, change, text):
    machine = new_machine(timeout=5, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    for rank in range(4):
        launch(machine, group, rank, SMALL if rank < 2 else dataclasses.replace(SMALL, **change))
    machine.synchronize(late_writes=True)
    messages = errors_of(machine, group, range(4))
    cause = rf"rank \d on host \d of the group and rank \d on host \d of the group {text}"
    assert any(re.search(cause, message) for message in messages), messages
    for message in messages:
        assert re.search(f"{cause}|{GAVE_UP}", message), message


def test_hosts_with_another_operation(new_machine, rng):
    machine = new_machine(timeout=5, num_sms=3)
    machine.set_hosts(4, 2)
    group = Group((0, 1, 2, 3))
    _, out, _ = run_dispatch(machine, rng, SMALL)
    expert_out = values(rng, (4, capacity_of(SMALL), 4), "float32")
    for rank in (0, 1):
        launch(machine, group, rank)
    for rank in (2, 3):
        machine.combine(group, rank, SMALL, out[rank], expert_out[rank])
    machine.synchronize(late_writes=True)
    messages = errors_of(machine, group, range(4))
    text = r"differ in the operation \((dispatch and combine|combine and dispatch)\)"
    assert any(re.search(text, message) for message in messages), messages


def test_groups_that_the_windows_do_not_suit(new_machine):
    machine = new_machine(num_gpus=6)
    machine.set_hosts(6, 3)
    with pytest.raises(EngineError, match="the same number of ranks on each"):
        launch(machine, Group((0, 1, 3)), 0, Geometry(3, 6, 2, 6))
    with pytest.raises(EngineError, match="the same numbers within their hosts"):
        launch(machine, Group((0, 1, 4, 5)), 0)


def test_rows_that_no_window_holds(new_machine):
    machine = new_machine()
    machine.set_hosts(4, 2, window_bytes=1 << 10)
    x = np.zeros((6, 300), np.float32)
    with pytest.raises(
        EngineError, match=r"a token has rows or sums of 1200 bytes.*larger windows"
    ):
        machine.dispatch(Group((0, 1, 2, 3)), 0, SMALL, np.zeros((6, 2), np.int32), [x])


# --- What crosses --------------------------------------------------------------------------------


@pytest.mark.parametrize("window_bytes", [1 << 20, 1 << 14])
def test_a_row_crosses_once_for_each_host(machine, rng, window_bytes):
    """And with it the routes of all tokens, once for each host, and a header for each rank."""
    machine.set_hosts(8, 4, window_bytes)
    geometry, row_bytes = Geometry(8, 50, 6, 32), 4 * 40
    topk_idx = routing(rng, geometry)
    x = random_bits(rng, (8, 50, 40), np.float32)
    before = machine.network_bytes
    out = dispatch(machine, geometry, topk_idx, [x])
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, [x])
    wants = [
        {expert // 16 for expert in topk_idx[rank, token] if expert >= 0} - {rank // 4}
        for rank in range(8)
        for token in range(50)
    ]
    rows = sum(map(len, wants)) * row_bytes
    routes = 8 * 50 * 6 * 8
    headers = 8 * 4 * (9 + 32) * 4
    assert machine.network_bytes - before == rows + routes + headers


# --- What the kernels rely on --------------------------------------------------------------------


def run_with_fault(library, seed, *fault):
    program = Path(__file__).with_name("hosts_program.py")
    command = [sys.executable, str(program), str(library), str(seed), *fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.stdout.strip() or f"ended with {done.returncode}: {done.stderr[-500:]}"


def test_without_a_fault_all_is_right(emulator_library):
    for seed in range(3):
        assert run_with_fault(emulator_library, seed, "none") == "right"


@pytest.mark.parametrize(
    "fault",
    [
        ("ignores_fences",),
        *(("unawaited", kind) for kind in ("header", "parcel", "answer", "credit")),
    ],
    ids=" ".join,
)
def test_a_fence_or_a_wait_that_is_taken_out_is_noticed(emulator_library, fault):
    seen = [run_with_fault(emulator_library, seed, *fault) for seed in range(3)]
    assert any(text != "right" for text in seen)


@pytest.mark.parametrize("kind", ["header", "parcel", "answer", "credit"])
def test_a_signal_that_is_taken_out_is_an_error(emulator_library, kind):
    """It names the rank and the host for which another one has waited."""
    text = run_with_fault(emulator_library, 0, "lost", kind)
    assert re.search(
        r"rank \d on host [01] of the group waited 5 s for rank \d on host [01] of the group, for ",
        text,
    ), text
