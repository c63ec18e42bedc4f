"""The CUDA engine against the reference, on the GPUs of one process (R = 1 and up)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import _native
from freeio_jax.bench import late, profile
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite


def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(150),
    pytest.mark.skipif(not gpus(), reason="needs NVIDIA GPUs, and JAX finds none"),
]


def gpu_mesh(num_ranks, order=None):
    devices = gpus()
    if len(devices) < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs, there are {len(devices)}")
    chosen = [devices[i] for i in order or range(num_ranks)]
    return Mesh(np.array(chosen), ("expert",), axis_types=(AxisType.Auto,))


def sharded(function, mesh):
    """Jitted, per shard; arguments and results are stacked over the ranks."""

    def body(*args):
        outs = function(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], outs)

    spec = P("expert")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))


def run(function, mesh, *args):
    sharding = NamedSharding(mesh, P("expert"))
    args = jax.tree.map(lambda a: jax.device_put(a, sharding), args)
    return jax.tree.map(np.asarray, sharded(function, mesh)(*args))


def by_reference(function, num_ranks, *args):
    """The same on the CPU devices of this process."""
    devices = jax.devices("cpu")
    if len(devices) < num_ranks:
        pytest.skip(f"needs {num_ranks} CPU devices: --xla_force_host_platform_device_count")
    mesh = Mesh(np.array(devices[:num_ranks]), ("expert",), axis_types=(AxisType.Auto,))
    return run(function, mesh, *args)


SHAPES = {
    # T, H, K, E/R, capacity as a share of the mean load (None: dropless), alignment
    "small": (16, 32, 2, 4, None, 1),
    "odd row": (33, 7, 3, 5, None, 1),
    "decode": (8, 7168, 8, 32, None, 1),
    "one token": (1, 512, 4, 8, None, 1),
    "not in lines": (256, 4096, 4, 8, None, 1),  # too many bytes; but routes are sent
    "wide": (257, 7168, 8, 128, 1.25, 1),
    "drops": (300, 64, 4, 8, 0.5, 1),
    "aligned": (129, 256, 4, 8, None, 16),
    "many tokens": (3000, 128, 8, 16, None, 1),
    "passes": (600, 7168, 8, 32, 1.25, 1),  # where few CTAs combine, a slice has several passes
    "short rows": (700, 1000, 4, 8, 0.5, 1),
}
#: Of the results of Case.gradients: sums of K products, which XLA may fuse with its additions, and
#: the weights' gradients, which are long sums in another order. Rounding to 16 bits hides most.
ULPS = {
    "float32": {"z": 8, "d tokens": 8, "d weights": 4000},
    "bfloat16": {"z": 2, "d tokens": 4, "d weights": 4000},
}
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]


class Case:
    def __init__(self, num_ranks, shape, dtype="bfloat16", seed=0, skew="uniform"):
        tokens, hidden, top_k, local, factor, alignment = SHAPES[shape]
        self.num_ranks, self.num_experts = num_ranks, local * num_ranks
        capacity = None
        if factor is not None:
            capacity = -(-int(factor * tokens * top_k + 8) // alignment) * alignment
        self.options = {
            "num_experts": self.num_experts,
            "axis_name": "expert",
            "capacity": capacity,
            "alignment": alignment,
        }
        rng = np.random.default_rng(seed)
        lead = (num_ranks, tokens)
        scores = rng.random((*lead, self.num_experts))
        if skew == "one rank":
            scores[..., :local] -= 1
        self.topk_idx = np.argsort(scores, axis=-1)[..., :top_k].astype(np.int32)
        self.topk_idx[rng.random(self.topk_idx.shape) < 0.1] = -1
        self.topk_idx[rng.random(self.topk_idx.shape) < 0.02] = self.num_experts + 5
        if skew == "one expert":
            self.topk_idx[..., 0] = 1
        self.tokens = rng.standard_normal((*lead, hidden)).astype(dtype)
        self.cotangent = rng.standard_normal((*lead, hidden)).astype(dtype)
        self.weights = rng.random((*lead, top_k), np.float32)
        self.rng = rng

    def handle_arrays(self, out):
        h = out.handle
        return {
            "rows": out.tokens,
            "group_sizes": out.group_sizes,
            "expert_load": h.expert_load,
            "num_dropped": h.num_dropped,
            "num_invalid": h.num_invalid,
            "dest_rank": h._dest_rank,
            "dest_row": h._dest_row,
            "row_source": h._row_source,
        }

    def dispatch(self, api, tokens, topk_idx):
        return self.handle_arrays(api.dispatch(tokens, topk_idx, **self.options))

    def layer(self, api, tokens, topk_idx, weights):
        """Dispatch, a cheap expert, combine."""
        out = api.dispatch(tokens, topk_idx, **self.options)
        rows = out.tokens * jnp.asarray(1.5, out.tokens.dtype)
        return api.combine(rows, out.handle, weights)

    def gradients(self, api, tokens, topk_idx, weights, cotangent):
        z, pull = jax.vjp(lambda x, w: self.layer(api, x, topk_idx, w), tokens, weights)
        return z, *pull(cotangent)


def assert_bits(ours, theirs):
    for name in theirs:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.dtype == b.dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)


def assert_close(ours, theirs, dtype, ulps=1):
    """At most some units in the last place of ``dtype`` apart, relative to the largest value."""
    a, b = (np.asarray(v, np.float64) for v in (ours, theirs))
    unit = float(jnp.finfo(dtype).eps)
    bound = ulps * unit * np.maximum(np.abs(b), 1e-2 * np.abs(b).max(initial=0))
    worst = np.max(np.abs(a - b) - bound, initial=-1)
    assert worst <= 0, f"{np.sum(np.abs(a - b) > bound)} of {a.size} differ by more"


ranks = pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])


@pytest.fixture
def few_ctas():
    """Sets on how many CTAs at most a large combine takes the kernel for few of them."""
    if float(gpus()[0].compute_capability) < 9:
        pytest.skip("the kernel for few CTAs needs the bulk stores of compute capability 9.0")
    before = fio.config()["num_sms"]
    yield _native.cuda.set_few_ctas
    _native.cuda.set_few_ctas(0)
    fio.config(num_sms=before)


@ranks
@pytest.mark.parametrize("shape", SHAPES)
def test_dispatch_is_bitwise_the_reference(num_ranks, shape):
    case = Case(num_ranks, shape)
    args = (case.tokens, case.topk_idx)
    ours = run(functools.partial(case.dispatch, fio), gpu_mesh(num_ranks), *args)
    theirs = by_reference(functools.partial(case.dispatch, fio.reference), num_ranks, *args)
    assert_bits(ours, theirs)


@ranks
@pytest.mark.parametrize(
    "shape", ["small", "odd row", "decode", "not in lines", "wide", "drops", "aligned"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layer_and_its_gradients(num_ranks, shape, dtype):
    case = Case(num_ranks, shape, dtype)
    args = (case.tokens, case.topk_idx, case.weights, case.cotangent)
    ours = run(functools.partial(case.gradients, fio), gpu_mesh(num_ranks), *args)
    theirs = by_reference(functools.partial(case.gradients, fio.reference), num_ranks, *args)
    for a, b, name in zip(ours, theirs, ("z", "d tokens", "d weights"), strict=True):
        assert_close(a, b, "float32" if name == "d weights" else dtype, ULPS[dtype][name])


@ranks
@pytest.mark.parametrize("shape", ["odd row", "wide", "drops", "aligned"])
def test_rows_along_a_handle(num_ranks, shape):
    """The transpose of an unweighted combine, and the tangent of a dispatch."""
    case = Case(num_ranks, shape, "float32")

    def both(api, tokens, topk_idx, cotangent):
        out = api.dispatch(tokens, topk_idx, **case.options)
        _, pull = jax.vjp(lambda rows: api.combine(rows, out.handle), out.tokens)
        along = jax.jvp(
            lambda x: api.dispatch(x, topk_idx, **case.options).tokens, (tokens,), (cotangent,)
        )[1]
        return {"transpose": pull(cotangent)[0], "tangent": along}

    args = (case.tokens, case.topk_idx, case.cotangent)
    ours = run(functools.partial(both, fio), gpu_mesh(num_ranks), *args)
    theirs = by_reference(functools.partial(both, fio.reference), num_ranks, *args)
    assert_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    case = Case(2, "small", dtype)
    args = (case.tokens, case.topk_idx, case.weights)
    mesh = gpu_mesh(2)
    ours = run(functools.partial(case.layer, fio), mesh, *args)
    theirs = by_reference(functools.partial(case.layer, fio.reference), 2, *args)
    assert_close(ours, theirs, dtype, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["decode", "wide"])
def test_sums_are_the_cpu_engines_but_for_a_rare_rounding(shape, dtype):
    """Sums in float32 may round otherwise, which shows where that decides a bit of the result.

    Of positive rows: with cancellation one unit of a partial sum is several of the result.
    """
    case = Case(2, shape, dtype)
    args = (abs(case.tokens), case.topk_idx, case.weights)
    ours = run(functools.partial(case.layer, fio), gpu_mesh(2), *args)
    theirs = by_reference(functools.partial(case.layer, fio), 2, *args)
    a, b = (np.asarray(z, np.float32) for z in (ours, theirs))
    _, exponent = np.frexp(np.maximum(np.abs(a), np.abs(b)))
    assert np.all(np.abs(a - b) <= np.ldexp(float(jnp.finfo(dtype).eps), exponent - 1))
    print(f"{shape}, {dtype}: {np.sum(a != b)} of {a.size} differ by one unit in the last place")
    assert np.mean(a != b) < 1e-3


@ranks
@pytest.mark.parametrize("num_sms", [4, 24, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["passes", "short rows"])
def test_few_ctas_give_the_same_bits(num_ranks, shape, dtype, num_sms, few_ctas):
    """A large combine by the kernel for few CTAs, by the other one, and by the reference."""
    case = Case(num_ranks, shape, dtype)
    args = (case.tokens, case.topk_idx, case.weights)
    mesh = gpu_mesh(num_ranks)
    few_ctas(0)
    fio.config(num_sms=num_sms)
    theirs = run(functools.partial(case.layer, fio), mesh, *args)
    expected = by_reference(functools.partial(case.layer, fio.reference), num_ranks, *args)
    few_ctas(64)
    step = sharded(functools.partial(case.layer, fio), mesh)
    args = [jax.device_put(a, NamedSharding(mesh, P("expert"))) for a in args]
    names = {event.name for event in profile.record(lambda: step(*args))}
    assert any("FewWarp" in name for name in names), names
    for _ in range(20):
        ours = np.asarray(step(*args))
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    assert_close(ours, expected, dtype, ULPS[dtype]["z"])


def test_fp8_rows_with_scales_travel_together():
    case = Case(2, "wide", "float8_e4m3fn")
    scales = case.rng.random((*case.tokens.shape[:2], 56), np.float32)
    pair = {"rows": case.tokens, "scales": scales}

    def dispatch(api, tokens, topk_idx):
        out = api.dispatch(tokens, topk_idx, **case.options)
        return {**out.tokens, "sizes": out.group_sizes}

    ours = run(functools.partial(dispatch, fio), gpu_mesh(2), pair, case.topk_idx)
    theirs = by_reference(functools.partial(dispatch, fio.reference), 2, pair, case.topk_idx)
    assert_bits(ours, theirs)


@pytest.mark.parametrize("skew", ["one rank", "one expert"])
def test_skew(skew):
    case = Case(2, "many tokens", skew=skew)
    args = (case.tokens, case.topk_idx)
    ours = run(functools.partial(case.dispatch, fio), gpu_mesh(2), *args)
    theirs = by_reference(functools.partial(case.dispatch, fio.reference), 2, *args)
    assert_bits(ours, theirs)


def test_devices_in_another_order():
    case = Case(2, "drops")
    args = (case.tokens, case.topk_idx, case.weights)
    theirs = by_reference(functools.partial(case.layer, fio.reference), 2, *args)
    for order in ([0, 1], [1, 0]):
        ours = run(functools.partial(case.layer, fio), gpu_mesh(2, order), *args)
        assert_close(ours, theirs, "bfloat16", 2)


def test_two_runs_are_bitwise_equal():
    case = Case(2, "wide")
    args = (case.tokens, case.topk_idx, case.weights, case.cotangent)
    function, mesh = functools.partial(case.gradients, fio), gpu_mesh(2)
    for a, b in zip(run(function, mesh, *args), run(function, mesh, *args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_layers_side_by_side_and_in_a_scan():
    case = Case(2, "small", "float32")

    def model(api, tokens, topk_idx, weights):
        def layer(x, _):
            a = case.layer(api, x, topk_idx, weights)
            b = case.layer(api, -x, topk_idx, weights)
            return jnp.tanh(a + 0.5 * b), None

        return lax.scan(layer, tokens, length=20)[0]

    args = (case.tokens, case.topk_idx, case.weights)
    ours = run(functools.partial(model, fio), gpu_mesh(2), *args)
    theirs = by_reference(functools.partial(model, fio.reference), 2, *args)
    assert_close(ours, theirs, "float32", 1000)


def test_thousands_of_calls():
    """Command buffers replay these: the same program, again and again, with other data."""
    case = Case(2, "drops", "float32")
    mesh = gpu_mesh(2)

    def layer(tokens, topk_idx, weights):
        z = case.layer(fio, tokens, topk_idx, weights)
        for shift in range(1, 8):
            rolled = jnp.roll(topk_idx, shift, axis=0)
            z = z + case.layer(fio, tokens, rolled, weights)
        return z

    step = sharded(layer, mesh)
    sharding = NamedSharding(mesh, P("expert"))
    tokens, weights = (jax.device_put(a, sharding) for a in (case.tokens, case.weights))
    batches = [jax.device_put(np.roll(case.topk_idx, i, axis=1), sharding) for i in range(5)]
    first = [np.asarray(step(tokens, idx, weights)) for idx in batches]
    for _ in range(100):
        last = [step(tokens, idx, weights) for idx in batches]
    for a, b in zip(first, last, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_next_to_collectives_of_xla():
    case = Case(2, "small", "float32")

    def model(api, tokens, topk_idx, weights):
        total = lax.psum(tokens, "expert")
        z = case.layer(api, tokens + total, topk_idx, weights)
        return z + lax.ppermute(z, "expert", [(0, 1), (1, 0)])

    args = (case.tokens, case.topk_idx, case.weights)
    ours = run(functools.partial(model, fio), gpu_mesh(2), *args)
    theirs = by_reference(functools.partial(model, fio.reference), 2, *args)
    assert_close(ours, theirs, "float32", 16)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_waiting_for_a_late_rank_costs_no_more_than_the_wait(op):
    """The last rank's kernel: the others must not slow it down by how they wait."""
    report = Report({})
    late.run(
        report,
        [Suite("late", 2048, 8, 64, "uniform", (2048,))],
        num_ranks=gpu_mesh(2).size,
        ops=[op],
        dtype="bfloat16",
        milliseconds=(0.0, 3.0),
    )
    assert report.failed == 0
    (times,) = report.data["late"]
    assert times["late_3000us_s"] < 1.5 * times["late_0us_s"], times
