"""The CUDA engine's kernels against the oracle, on emulated GPUs: no GPU is needed."""

from __future__ import annotations

import itertools
import re
import time

import ml_dtypes
import numpy as np
import oracle
import pytest
from emulated import PROTOCOLS, EngineError, Group, capacity_of
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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# --- Exchanges -----------------------------------------------------------------------------------


def first_gpus(geometry):
    return Group(tuple(range(geometry.num_ranks)))


def launch_all(group, call, *stacked):
    """``call(group, rank, ...)`` on every rank, with the rank's part of the stacked arrays."""
    return [call(group, rank, *(a[rank] for a in stacked)) for rank in range(group.size)]


def dispatch(machine, geometry, topk_idx, leaves, group=None, **options):
    """Launches dispatch on all ranks; the results by rank."""
    group = group or first_gpus(geometry)
    return [
        machine.dispatch(
            group, rank, geometry, topk_idx[rank], [leaf[rank] for leaf in leaves], **options
        )
        for rank in range(group.size)
    ]


def check_dispatched(out, geometry, topk_idx, leaves):
    """All results bitwise against the oracle, the handle's too. Returns the placement."""
    placement = geometry.place(topk_idx, capacity_of(geometry))
    shape = geometry.topk_shape
    dest = np.full((*shape, 2), -1, np.int32)
    row_source = np.full((geometry.num_ranks, capacity_of(geometry)), -1, np.int32)
    for (s, t, k), (rank, row) in placement.row_of.items():
        dest[s, t, k] = rank, row
        row_source[rank, row] = np.ravel_multi_index((s, t, k), shape)
    expected = {
        "dest_rank": dest[..., 0],
        "dest_row": dest[..., 1],
        "row_source": row_source,
        "group_sizes": placement.group_sizes,
        "expert_load": placement.expert_load,
        "num_dropped": placement.num_dropped,
        "num_invalid": placement.num_invalid,
    }
    for name, arrays in expected.items():
        for rank, result in enumerate(out):
            assert_bitwise(getattr(result, name), arrays[rank], f"{name} of rank {rank}")
    for i, leaf in enumerate(leaves):
        rows = oracle.dispatch(leaf, placement)
        for rank, result in enumerate(out):
            assert_bitwise(result.rows[i], rows[rank], f"leaf {i} of rank {rank}")
    return placement


def run_dispatch(machine, rng, geometry, skew="holes", width=5, group=None):
    """Dispatches random rows and checks them; the ids, the results by rank and the placement."""
    topk_idx = routing(rng, geometry, skew)
    leaves = [random_bits(rng, (geometry.num_ranks, geometry.num_tokens, width), np.float32)]
    out = dispatch(machine, geometry, topk_idx, leaves, group)
    machine.synchronize()
    return topk_idx, out, check_dispatched(out, geometry, topk_idx, leaves)


def combine(machine, geometry, handles, expert_out, weights=None, group=None, **options):
    group = group or first_gpus(geometry)
    return [
        machine.combine(
            *(group, rank, geometry, handles[rank], expert_out[rank]),
            None if weights is None else weights[rank],
            **options,
        )
        for rank in range(group.size)
    ]


def combine_transpose(
    machine, geometry, handles, cotangent, *, weights=None, expert_out=None, group=None
):
    group = group or first_gpus(geometry)
    return [
        machine.combine_transpose(
            *(group, rank, geometry, handles[rank], cotangent[rank]),
            weights=None if weights is None else weights[rank],
            expert_out=None if expert_out is None else expert_out[rank],
        )
        for rank in range(group.size)
    ]


def check_transposed(out, geometry, placement, cotangent, weights, expert_out):
    """Rows bitwise, dot products within the rounding of their sums."""
    dtype = cotangent.dtype
    accumulator = np.float64 if dtype == np.float64 else np.float32
    rows = np.zeros((geometry.num_ranks, capacity_of(geometry), *cotangent.shape[2:]), dtype)
    grads, bounds = (np.zeros(geometry.topk_shape, np.float64) for _ in range(2))
    for (s, t, k), (rank, row) in placement.row_of.items():
        x = cotangent[s, t]
        if weights is not None:
            product = x.astype(accumulator) * weights[s, t, k].astype(accumulator)
            rows[rank, row] = product.astype(dtype)
        if expert_out is not None:
            terms = x.astype(np.float64) * expert_out[rank, row].astype(np.float64)
            grads[s, t, k], bounds[s, t, k] = terms.sum(), np.abs(terms).sum()
    bounds *= (cotangent.shape[-1] + 8) * np.finfo(accumulator).eps
    for rank, (ours, our_grads) in enumerate(out):
        assert (ours is None) == (weights is None)
        assert (our_grads is None) == (expert_out is None)
        if ours is not None:
            assert_bitwise(ours, rows[rank], f"rows of rank {rank}")
        if our_grads is not None:
            assert our_grads.dtype == accumulator
            assert np.all(np.abs(our_grads - grads[rank]) <= bounds[rank])


all_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
#: Of dispatch, which sums nothing.
protocols_of_routes = pytest.mark.parametrize("protocol", PROTOCOLS[1:], indirect=True)


@pytest.fixture
def protocol(request, machine):
    machine.set_protocol(request.param)


# --- dispatch ------------------------------------------------------------------------------------

GEOMETRIES = {
    "small": Geometry(2, 7, 2, 8),
    "one rank": Geometry(1, 40, 4, 8),
    "no tokens": Geometry(2, 0, 2, 4),
    "one token": Geometry(4, 1, 4, 16),
    "three ranks": Geometry(3, 17, 3, 9, alignment=4),
    "aligned": Geometry(4, 21, 4, 16, alignment=8),
    "drops": Geometry(4, 33, 4, 8, capacity=40),
    "drops, aligned": Geometry(3, 20, 3, 12, capacity=24, alignment=8),
    "no capacity": Geometry(2, 9, 2, 4, capacity=0),
    "many experts": Geometry(2, 19, 8, 512),
    "eight ranks": Geometry(8, 43, 8, 64),
    "sixteen ranks": Geometry(16, 5, 3, 32),
    "more ids than experts": Geometry(2, 9, 8, 4),
    "widest token": Geometry(2, 6, 32, 64),
    "early rows": Geometry(3, 70, 3, 9),
    "early rows, drops": Geometry(2, 64, 4, 8, capacity=100),
    "several tiles": Geometry(2, 1500, 8, 8, capacity=600),
}


@protocols_of_routes
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_dispatch(machine, rng, name):
    run_dispatch(machine, rng, GEOMETRIES[name])


@protocols_of_routes
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("skew", ROUTINGS)
def test_dispatch_of_any_routing(machine, rng, skew):
    run_dispatch(machine, rng, Geometry(4, 23, 4, 12, capacity=64), skew)
    run_dispatch(machine, rng, Geometry(2, 11, 3, 6, alignment=4), skew)


@pytest.mark.parametrize("offset", [0, 8, 2])
def test_leaves_of_any_row_size_travel_together(machine, rng, offset):
    """Rows of 1 byte to several slices, at addresses that allow accesses of 16, 8 or 2 bytes."""
    geometry = Geometry(3, 10, 2, 6)
    shape = (geometry.num_ranks, geometry.num_tokens)
    leaves = [
        random_bits(rng, (*shape, size), np.uint8)
        for size in (1, 2, 3, 16, 24, 100, 4096, 4112, 12301)
    ]
    leaves.append(random_bits(rng, (*shape, 3, 2), ml_dtypes.bfloat16))
    topk_idx = routing(rng, geometry)
    out = dispatch(machine, geometry, topk_idx, leaves, offset=offset)
    machine.synchronize()
    check_dispatched(out, geometry, topk_idx, leaves)


@pytest.mark.parametrize("name", ["small", "three ranks", "drops", "eight ranks", "no tokens"])
def test_dispatch_along_a_handle(machine, rng, name):
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    leaves = [
        random_bits(rng, (geometry.num_ranks, geometry.num_tokens, size), np.uint8)
        for size in (32, 7)
    ]
    group = first_gpus(geometry)
    along = [
        machine.dispatch_along(group, rank, geometry, out[rank], [leaf[rank] for leaf in leaves])
        for rank in range(group.size)
    ]
    machine.synchronize()
    for i, leaf in enumerate(leaves):
        for rank, rows in enumerate(oracle.dispatch(leaf, placement)):
            assert_bitwise(along[rank][i], rows)


# --- combine -------------------------------------------------------------------------------------

DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_dtypes(machine, rng, dtype, weighted):
    """Widths that fill whole packs, that do not, and that take several slices."""
    geometry = Geometry(3, 9, 4, 12, capacity=24)
    _, out, placement = run_dispatch(machine, rng, geometry)
    for width in (1, 7, 64, 530, 1040):
        shape = (geometry.num_ranks, capacity_of(geometry), width)
        expert_out = values(rng, shape, dtype)
        weights = power_of_two_weights(rng, geometry.topk_shape) if weighted else None
        z = combine(machine, geometry, out, expert_out, weights)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True
        )


@all_protocols
@pytest.mark.usefixtures("protocol")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_combine(machine, rng, name):
    """Any weights: bitwise where products and sums round one by one, else within their rounding."""
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    for dtype, exact in (("float32", True), ("bfloat16", False)):
        expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), 12), dtype)
        weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        z = combine(machine, geometry, out, expert_out, weights)
        machine.synchronize()
        assert_combined(
            np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=exact
        )


def test_the_weight_of_a_skipped_id_is_not_looked_at(machine, rng):
    geometry = Geometry(2, 15, 4, 8, capacity=20)
    _, out, placement = run_dispatch(machine, rng, geometry)
    kept = placement.kept(geometry.topk_shape)
    weights = np.where(kept, rng.random(kept.shape), np.nan).astype(np.float32)
    expert_out = values(rng, (2, 20, 8), "float32")
    z = combine(machine, geometry, out, expert_out, weights)
    machine.synchronize()
    assert np.isfinite(np.stack(z)).all()


def test_few_tokens_and_very_much_padding(machine, rng):
    machine.set_num_sms(1)
    run_dispatch(machine, rng, Geometry(1, 2, 1, 2, capacity=524_280), width=1)


@pytest.mark.parametrize("num_tokens", [56, 57])
def test_the_most_sums_that_are_sent(machine, rng, num_tokens):
    """56 rows of 1024 bfloat16 elements are just as many words as a rank has for a peer's."""
    geometry = Geometry(2, num_tokens, 2, 4)
    _, out, placement = run_dispatch(machine, rng, geometry)
    expert_out = values(rng, (2, capacity_of(geometry), 1024), "bfloat16")
    z = combine(machine, geometry, out, expert_out)
    machine.synchronize()
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, None, exact=True)


# --- combine_transpose ---------------------------------------------------------------------------


@pytest.mark.parametrize("results", ["rows", "weights", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_transpose_dtypes(machine, rng, dtype, results):
    geometry = Geometry(3, 8, 4, 6, capacity=24)
    _, out, placement = run_dispatch(machine, rng, geometry)
    for width in (1, 12, 1040):
        cotangent = values(rng, (geometry.num_ranks, geometry.num_tokens, width), dtype)
        weights = expert_out = None
        if results != "weights":
            weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        if results != "rows":
            expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), width), dtype)
        grads = combine_transpose(
            machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
        )
        machine.synchronize()
        check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_combine_transpose(machine, rng, name):
    geometry = GEOMETRIES[name]
    _, out, placement = run_dispatch(machine, rng, geometry)
    cotangent = values(rng, (geometry.num_ranks, geometry.num_tokens, 10), "float32")
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    expert_out = values(rng, (geometry.num_ranks, capacity_of(geometry), 10), "float32")
    grads = combine_transpose(
        machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
    )
    machine.synchronize()
    check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


def test_wide_rows_of_a_token_with_many_assignments(machine, rng):
    """One token's dot products, one for each slice of a row, fill the shared memory."""
    geometry = Geometry(16, 1, 32, 32, capacity=40)
    _, out, placement = run_dispatch(machine, rng, geometry)
    width = 1601  # odd: no wide accesses
    weights = rng.standard_normal(geometry.topk_shape)
    cotangent = values(rng, (16, 1, width), "float64")
    expert_out = values(rng, (16, 40, width), "float64")
    grads = combine_transpose(
        machine, geometry, out, cotangent, weights=weights, expert_out=expert_out
    )
    machine.synchronize()
    check_transposed(grads, geometry, placement, cotangent, weights, expert_out)


# --- Schedules -----------------------------------------------------------------------------------


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


@all_protocols
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

    def launch(self, group):
        """Some operation: dispatch, or one along the last handle of the group."""
        rng, handle = self.rng, self.handles.get(group)
        self.machine.set_protocol(rng.choice(PROTOCOLS))
        operation = rng.integers(4) if handle else 0
        if operation == 0:
            self._dispatch(group)
            return
        geometry, out, placement = handle
        ranks, tokens = geometry.num_ranks, geometry.num_tokens
        width = int(rng.choice([3, 8, 40]))
        x = values(rng, (ranks, tokens, width), "float32")
        weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        expert_out = values(rng, (ranks, capacity_of(geometry), width), "float32")
        if operation == 1:
            rows = [
                self.machine.dispatch_along(group, rank, geometry, out[rank], [x[rank]])
                for rank in range(ranks)
            ]
            expected = oracle.dispatch(x, placement)
            self.checks.append(lambda: assert_bitwise(np.stack([r[0] for r in rows]), expected))
        elif operation == 2:
            z = combine(self.machine, geometry, out, expert_out, weights, group)
            shape = geometry.topk_shape
            self.checks.append(
                lambda: assert_combined(
                    np.stack(z), expert_out, placement, shape, weights, exact=True
                )
            )
        else:
            grads = combine_transpose(
                self.machine, geometry, out, x, weights=weights, expert_out=expert_out, group=group
            )
            self.checks.append(
                lambda: check_transposed(grads, geometry, placement, x, weights, expert_out)
            )

    def _dispatch(self, group):
        rng = self.rng
        geometry = Geometry(
            group.size,
            num_tokens=int(rng.integers(1, 9)),
            top_k=int(rng.integers(1, 4)),
            num_experts=group.size * int(rng.integers(1, 5)),
            capacity=int(rng.integers(1, 30)) if rng.random() < 0.5 else None,
        )
        topk_idx = routing(rng, geometry, "invalid")
        x = values(rng, (group.size, geometry.num_tokens, int(rng.integers(1, 9))), "float32")
        out = dispatch(self.machine, geometry, topk_idx, [x], group)
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
    machine.set_num_sms(data.draw(st.integers(1, 4), "num_sms"))
    machine.set_protocol(data.draw(st.sampled_from(PROTOCOLS), "protocol"))
    skew = data.draw(st.sampled_from(sorted(ROUTINGS)), "skew")
    width = data.draw(st.integers(1, 40), "width")
    dtype = data.draw(st.sampled_from(["float32", "float64"]), "dtype")
    topk_idx = routing(rng, geometry, skew)
    x = values(rng, (num_ranks, geometry.num_tokens, width), dtype)
    weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
    out, expert_out, z, grads = all_operations(machine, geometry, topk_idx, x, weights)
    placement = check_dispatched(out, geometry, topk_idx, [x])
    assert_combined(np.stack(z), expert_out, placement, geometry.topk_shape, weights, exact=True)
    check_transposed(grads, geometry, placement, x, weights, expert_out)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 2**31 - 1), d=st.integers(1, 2**31 - 1))
@example(n=2**31 - 1, d=2**31 - 1)
@example(n=2**31 - 1, d=2**30 + 1)
@example(n=2**31 - 1, d=1)
def test_division(machine, n, d):
    assert machine.divide(n, d) == divmod(n, d)
    assert machine.divide(d * (n // d), d) == (n // d, 0)


# --- Failures ------------------------------------------------------------------------------------

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
    assert_failed(messages, r"differ in the operation \((0 and 1|1 and 0)\)")


def test_ranks_with_different_dtypes(new_machine, rng):
    machine = new_machine()
    group = Group((0, 1))
    _, out, _ = run_dispatch(machine, rng, SMALL)
    for rank, dtype in enumerate(("float32", "bfloat16")):
        machine.combine(group, rank, SMALL, out[rank], np.ones((24, 8), dtype))
    machine.synchronize()
    assert_failed(errors_of(machine, group, (0, 1)), "differ in the row types")


def test_ranks_at_different_calls_of_the_program(new_machine):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0, instance=3)
    launch_dispatch(machine, group, 1, instance=4)
    machine.synchronize()
    cause = r"differ in the call in the program \((3 and 4|4 and 3)\)"
    assert_failed(errors_of(machine, group, (0, 1)), cause)


def test_ranks_with_different_numbers_of_ctas(new_machine):
    machine = new_machine()
    group = Group((0, 1))
    launch_dispatch(machine, group, 0)
    machine.set_num_sms(1)
    launch_dispatch(machine, group, 1)
    machine.synchronize()
    cause = r"differ in the number of CTAs \((2 and 1|1 and 2)\)"
    assert_failed(errors_of(machine, group, (0, 1)), cause)


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


def test_a_gpu_that_is_not_started(new_machine):
    machine = new_machine(num_gpus=2)
    with pytest.raises(EngineError, match="GPU 3 of the mesh is not connected"):
        launch_dispatch(machine, Group((0, 3)), 0)
