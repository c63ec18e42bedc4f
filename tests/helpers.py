"""Meshes, per-shard functions, routing and comparisons that several tests need."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import hosts as hosts_of_program
from freeio_jax import reference, transport
from freeio_jax.engines import ENGINES, CudaEngineBetweenHosts

# --- Meshes and per-shard functions --------------------------------------------------------------


def _spread(size):
    """Numbers of ``size`` devices, as evenly from all processes as it goes."""
    count = jax.process_count()
    per_process = len(jax.devices()) // count
    if size > count * per_process:
        return list(range(size))
    taken = [size // count + (p < size % count) for p in range(count)]
    return [p * per_process + i for p in range(count) for i in range(taken[p])]


def make_mesh(shape, names=("expert",), *, order=None, axis_types=None):
    """A mesh of the first devices of each process, or of those numbered in ``order``.

    Skips where there are too few devices, or a process would have none.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    devices, size = jax.devices(), int(np.prod(shape))
    order = _spread(size) if order is None else list(order)
    if len(devices) <= max(order):
        pytest.skip(f"needs {max(order) + 1} devices, there are {len(devices)}")
    if len({devices[i].process_index for i in order}) < jax.process_count():
        pytest.skip(f"none of the devices {order} is in some process")
    chosen = np.array([devices[i] for i in order], dtype=object).reshape(shape)
    return Mesh(chosen, names, axis_types=axis_types)


def expert_groups(mesh, axes):
    """Positions of the shards of each EP group, in order of rank: int [groups, R]."""
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    positions = np.arange(mesh.size).reshape([mesh.shape[name] for name in mesh.axis_names])
    others = [name for name in mesh.axis_names if name not in axes]
    order = [mesh.axis_names.index(name) for name in (*others, *axes)]
    return positions.transpose(order).reshape(-1, int(np.prod([mesh.shape[a] for a in axes])))


def stacked(fn):
    """``fn`` of one shard's arrays as a function of arrays with a leading axis of length 1."""

    def body(*args):
        outs = fn(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], outs)

    return body


def per_shard(fn, mesh, **kwargs):
    """Jitted ``fn`` per shard; arguments and results are stacked ``[shards, ...]``."""
    spec = P(mesh.axis_names)
    return jax.jit(jax.shard_map(stacked(fn), mesh=mesh, in_specs=spec, out_specs=spec, **kwargs))


# --- Exchanges -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What fixes the shapes of one exchange."""

    num_ranks: int
    num_tokens: int
    top_k: int
    num_experts: int
    capacity: int | None = None
    alignment: int = 1
    zero_tail: bool = True

    @property
    def topk_shape(self):
        return (self.num_ranks, self.num_tokens, self.top_k)

    def options(self):
        return {
            "num_experts": self.num_experts,
            "capacity": self.capacity,
            "alignment": self.alignment,
            "zero_tail": self.zero_tail,
        }

    def num_defined(self, group_sizes):
        """How many of a rank's packed rows the contract defines; None: all of them."""
        return None if self.zero_tail else int(np.sum(group_sizes))

    def place(self, topk_idx, rows):
        """The oracle's placement; ``rows`` is the number of packed rows that came back."""
        return oracle.place(
            topk_idx, num_experts=self.num_experts, capacity=rows, alignment=self.alignment
        )


def visible(out):
    """All that the contract shows of a dispatch's result."""
    return {
        "tokens": out.tokens,
        "group_sizes": out.group_sizes,
        "expert_load": out.handle.expert_load,
        "num_dropped": out.handle.num_dropped,
        "num_invalid": out.handle.num_invalid,
    }


@functools.cache
def dispatch_fn(geometry, mesh=None, axis_name="expert", api=fio, **kwargs):
    """(tokens, topk_idx) -> visible results, jitted, on stacked arrays."""
    mesh = make_mesh(geometry.num_ranks) if mesh is None else mesh

    def fn(tokens, topk_idx):
        out = api.dispatch(tokens, topk_idx, axis_name=axis_name, **geometry.options())
        return visible(out)

    return per_shard(fn, mesh, **kwargs)


@functools.cache
def exchange_fn(geometry, mesh=None, axis_name="expert", weighted=True, api=fio, **kwargs):
    """(tokens, topk_idx, pool, weights) -> visible results, expert outputs and the combined sums.

    Expert outputs are rows of ``pool`` (at least ``capacity`` of them), so that combine is tested
    with any rows, padding included.
    """
    mesh = make_mesh(geometry.num_ranks) if mesh is None else mesh

    def fn(tokens, topk_idx, pool, weights):
        out = api.dispatch(tokens, topk_idx, axis_name=axis_name, **geometry.options())
        expert_out = pool[: jax.tree.leaves(out.tokens)[0].shape[0]]
        z = api.combine(expert_out, out.handle, weights if weighted else None)
        return visible(out), expert_out, z

    return per_shard(fn, mesh, **kwargs)


def pool_rows(geometry):
    """Rows that suffice for ``exchange_fn``'s pool."""
    if geometry.capacity is not None:
        # Not 0: XLA:GPU crashes when it compiles a program that returns an empty argument.
        return max(1, geometry.capacity)
    return geometry.num_ranks * geometry.num_tokens * geometry.top_k + (
        geometry.num_experts * geometry.alignment
    )


# --- Routing and values --------------------------------------------------------------------------


def _distinct(rng, shape, num_experts):
    """Random distinct ids for each token; -1 where K exceeds E."""
    *lead, top_k = shape
    ids = rng.permuted(np.broadcast_to(np.arange(num_experts), (*lead, num_experts)), axis=-1)
    pad = np.full((*lead, max(top_k - num_experts, 0)), -1)
    return np.concatenate([ids[..., :top_k], pad], axis=-1)


def _hot(rng, shape, num_experts):
    """Most tokens have one expert in common."""
    ids = _distinct(rng, shape, num_experts)
    hot = rng.integers(num_experts)
    takes = (rng.random(shape[:-1]) < 0.8) & ~(ids == hot).any(axis=-1)
    ids[..., 0] = np.where(takes, hot, ids[..., 0])
    return ids


def _one_expert(rng, shape, num_experts):
    """Every token to one expert, nothing else."""
    ids = np.full(shape, -1)
    ids[..., rng.integers(shape[-1])] = rng.integers(num_experts)
    return ids


def _one_rank(rng, shape, num_experts):
    """All experts asked for are the first ones, which one rank hosts."""
    few = max(num_experts // shape[0], 1)
    return np.where((ids := _distinct(rng, shape, num_experts)) < few, ids, -1)


def _holes(rng, shape, num_experts):
    return np.where(rng.random(shape) < 0.5, -1, _distinct(rng, shape, num_experts))


def _invalid(rng, shape, num_experts):
    """Ids out of range among good ones."""
    bad = rng.choice([-(2**31), -7, -2, num_experts, num_experts + 1, 2**31 - 1], shape)
    return np.where(rng.random(shape) < 0.3, bad, _holes(rng, shape, num_experts))


ROUTINGS = {
    "uniform": _distinct,
    "hot": _hot,
    "one expert": _one_expert,
    "one rank": _one_rank,
    "none": lambda rng, shape, num_experts: np.full(shape, -1),
    "holes": _holes,
    "repeated": lambda rng, shape, num_experts: rng.integers(0, num_experts, shape),
    "invalid": _invalid,
}


def routing(rng, geometry, skew="uniform", shards=None):
    """int32 ``[shards, T, K]`` ids, with a skew of ``ROUTINGS``."""
    shape = (shards or geometry.num_ranks, geometry.num_tokens, geometry.top_k)
    return ROUTINGS[skew](rng, shape, geometry.num_experts).astype(np.int32)


def values(rng, shape, dtype):
    """Numbers of moderate size, exact in ``dtype``; integers for integer dtypes."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return rng.integers(info.min, int(info.max) + 1, shape, dtype=dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def random_bits(rng, shape, dtype):
    """Every bit at random; a quarter of the exponents the least (subnormal), a quarter the greatest
    (NaN or infinite, in most dtypes).
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return values(rng, shape, dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.frombuffer(rng.bytes(count), f"u{dtype.itemsize}").reshape(shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        return bits.view(dtype)
    info, kind = jnp.finfo(dtype), rng.random(shape)
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    bits = np.where(kind < 0.25, bits & ~exponent, np.where(kind > 0.75, bits | exponent, bits))
    return bits.view(dtype)


def power_of_two_weights(rng, shape):
    """Weights whose products are exact, so that a sum's roundings are those of the contract."""
    return (2.0 ** rng.integers(-2, 2, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


# --- Comparisons ---------------------------------------------------------------------------------


def assert_bitwise(actual, expected, what=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (actual, expected))
    if not np.array_equal(a, b):
        np.testing.assert_array_equal(actual, expected, what)
        raise AssertionError(f"{what}: equal numbers, but different bits")


def assert_dispatched(actual, tokens, topk_idx, geometry, groups=None):
    """``visible`` results, stacked, against the oracle: everything bitwise. Returns placements."""
    groups = np.arange(geometry.num_ranks)[None] if groups is None else groups
    placements = []
    for group in groups:
        mine = jax.tree.map(lambda a: np.asarray(a)[group], actual)  # noqa: B023
        rows = jax.tree.leaves(mine["tokens"])[0].shape[1]
        placement = geometry.place(topk_idx[group], rows)
        for name in ("expert_load", "num_dropped", "num_invalid", "group_sizes"):
            assert_bitwise(mine[name], getattr(placement, name), name)
        for rows, leaf in zip(*map(jax.tree.leaves, (mine["tokens"], tokens)), strict=True):
            expected = oracle.dispatch(np.asarray(leaf)[group], placement)
            for ours, theirs, sizes in zip(rows, expected, placement.group_sizes, strict=True):
                defined = slice(geometry.num_defined(sizes))
                assert_bitwise(ours[defined], theirs[defined], "tokens")
        placements.append(placement)
    return placements


def hosts_of(mesh, group=None):
    """The hosts of the ranks of a group; None where they share one. No group: all devices."""
    group = np.arange(mesh.size) if group is None else np.asarray(group)
    spanned = hosts_of_program.of_groups(mesh, group[None])
    return None if spanned is None else spanned[0]


def lowering_platform():
    """The platform of the default devices, as JAX's lowering names it."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def moves_rows(mesh):
    """Whether an engine moves the rows of a group of all devices, not XLA's collectives."""
    if hosts_of(mesh) is None or jax.process_count() == 1:
        return True
    return isinstance(transport.choose(lowering_platform()), transport.Nvshmem)


def require_calls(mesh):
    """Skips where a program has no calls of ours that say which operations it has."""
    if not moves_rows(mesh) and not ENGINES[lowering_platform()].meets:
        pytest.skip("XLA's collectives move the rows, and nothing in the program names operations")


def assert_combined(z, expert_out, placement, topk_shape, weights=None, *, exact, hosts=None):
    """Combined sums of one EP group against the oracle: equal, or within float32 accumulation."""
    z, expert_out = np.asarray(z), np.asarray(expert_out)
    expected = oracle.combine(expert_out, placement, topk_shape, weights, hosts)
    assert (z.shape, z.dtype) == (expected.shape, expected.dtype)
    # In float64, where numpy knows how to compare every dtype; 0 and -0 are the same sum.
    z, expected = z.astype(np.float64), expected.astype(np.float64)
    if exact:
        np.testing.assert_array_equal(z, expected)
        return
    tolerance = oracle.combine_tolerance(expert_out, placement, topk_shape, weights)
    np.testing.assert_array_equal(np.isnan(z), np.isnan(expected))
    excess = np.nan_to_num(np.abs(z - expected)) - tolerance
    assert not np.any(excess > 0), f"off by {excess.max()} more than float32 accumulation allows"


def calls_in(text):
    """How often each operation is in a program's text, as lowered or as compiled.

    It counts an operation that is started and done once. XLA's collectives carry rows between hosts
    as calls of XLA's own, before which the ranks meet. That call says which operation follows.
    """
    names = re.findall(r'(?:@|custom_call_target=")freeio_(\w+)', text)
    assert names.count("done") == sum(name.endswith("_start") for name in names), names
    operations = (
        name.removesuffix(CudaEngineBetweenHosts.suffix).removesuffix("_start")
        for name in names
        if name not in ("check", "done", "meet")
    )
    calls = Counter(operations)
    return calls + Counter(re.findall(r'freeio_meet.* operation = "(\w+)"', text))


_AS_MESH = object()


def check_exchange(
    rng,
    geometry,
    mesh,
    axis_name="expert",
    *,
    fn=None,
    skews=("holes",),
    hosts=_AS_MESH,
    **kwargs,
):
    """Dispatch and combine over all EP groups of ``mesh`` against the oracle.

    ``hosts``: of the ranks of each group. The default is what the devices of ``mesh`` say.
    """
    if kwargs.get("api", fio) is reference:
        hosts = None  # it is not told of hosts
    fn = exchange_fn(geometry, mesh, axis_name, **kwargs) if fn is None else fn
    groups, shards = expert_groups(mesh, axis_name), mesh.size
    for skew in skews:
        topk_idx = routing(rng, geometry, skew, shards)
        tokens = values(rng, (shards, geometry.num_tokens, 3), np.float32)
        pool = values(rng, (shards, pool_rows(geometry), 2), jnp.bfloat16)
        weights = power_of_two_weights(rng, topk_idx.shape)
        out, expert_out, z = fn(tokens, topk_idx, pool, weights)
        placements = assert_dispatched(out, tokens, topk_idx, geometry, groups)
        for group, placement in zip(groups, placements, strict=True):
            assert_combined(
                np.asarray(z)[group],
                np.asarray(expert_out)[group],
                placement,
                geometry.topk_shape,
                weights[group],
                exact=True,
                hosts=hosts_of(mesh, group) if hosts is _AS_MESH else hosts,
            )
