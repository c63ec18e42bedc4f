"""Expert axes of every kind of mesh: groups, device orders, abstract and partly manual meshes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Geometry,
    check_exchange,
    expert_groups,
    hosts_of,
    make_mesh,
    per_shard,
    stacked,
    visible,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import hosts

GEOMETRY = {
    2: Geometry(2, 4, 3, 6, capacity=14),
    4: Geometry(4, 4, 3, 8, capacity=14),
    8: Geometry(8, 4, 3, 16, capacity=14),
}
SKEWS = ("uniform", "hot", "invalid")


def exchange(geometry, axis_name="expert"):
    """The function that ``helpers.exchange_fn`` puts under shard_map, for other ways to do so."""

    def fn(tokens, topk_idx, pool, weights):
        out = fio.dispatch(tokens, topk_idx, axis_name=axis_name, **geometry.options())
        expert_out = pool[: out.tokens.shape[0]]
        return visible(out), expert_out, fio.combine(expert_out, out.handle, weights)

    return fn


def known(mesh):
    """Lets JAX know the devices of a mesh where it must: if the program has several hosts."""
    return jax.set_mesh(mesh) if hosts.there_are_several() else contextlib.nullcontext()


def on_shards(args, mesh):
    """Stacked arrays, each slice on its device."""
    return jax.device_put(args, NamedSharding(mesh, P(mesh.axis_names)))


@pytest.mark.parametrize(
    "shape, names, axis_name",
    [
        ((2, 4), ("expert", "data"), "expert"),
        ((2, 4), ("data", "expert"), "expert"),
        ((2, 2, 2), ("data", "expert", "model"), "expert"),
        ((2, 4), ("host", "local"), ("host", "local")),
        ((2, 4), ("host", "local"), ("local", "host")),
        ((2, 2, 2), ("host", "data", "local"), ("host", "local")),
        ((2, 2, 2), ("host", "data", "local"), ("local", "host")),
        ((2, 1, 4), ("data", "one", "expert"), ("one", "expert")),
        ((8, 1), ("data", "expert"), "expert"),
    ],
)
def test_axes_and_groups_side_by_side(shape, names, axis_name, rng):
    mesh = make_mesh(shape, names)
    num_ranks = expert_groups(mesh, axis_name).shape[1]
    geometry = GEOMETRY.get(num_ranks, Geometry(1, 4, 3, 6, capacity=14))
    check_exchange(rng, geometry, mesh, axis_name, skews=SKEWS)


@pytest.mark.parametrize(
    "order",
    [
        [7, 6, 5, 4, 3, 2, 1, 0],
        [0, 2, 4, 6, 1, 3, 5, 7],
        [6, 3, 5, 4],
        [4, 5],
    ],
)
def test_device_orders(order, rng):
    mesh = make_mesh(len(order), order=order)
    check_exchange(rng, GEOMETRY[len(order)], mesh, skews=SKEWS)


def test_permuted_devices_in_groups(rng):
    mesh = make_mesh((2, 4), ("data", "expert"), order=[5, 0, 3, 6, 2, 7, 1, 4])
    check_exchange(rng, GEOMETRY[4], mesh, skews=SKEWS)


def test_two_meshes_in_turns(rng):
    low, high = make_mesh(4), make_mesh(4, order=[7, 5, 6, 4])
    for _ in range(3):
        for mesh in (low, high):
            check_exchange(rng, GEOMETRY[4], mesh)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_axis_types(axis_type, check_vma, rng):
    mesh = make_mesh((2, 4), ("data", "expert"), axis_types=(axis_type,) * 2)
    inner = per_shard(exchange(GEOMETRY[4]), mesh, check_vma=check_vma)
    check_exchange(rng, GEOMETRY[4], mesh, fn=lambda *args: inner(*on_shards(args, mesh)))


def test_set_mesh_gives_the_mesh(rng):
    mesh = make_mesh((2, 4), ("data", "expert"), order=[1, 0, 2, 3, 4, 5, 7, 6])
    spec = P(("data", "expert"))
    with jax.set_mesh(mesh):
        fn = jax.jit(jax.shard_map(stacked(exchange(GEOMETRY[4])), in_specs=spec, out_specs=spec))
        check_exchange(rng, GEOMETRY[4], mesh, fn=fn)


@pytest.mark.parametrize("order", [None, [3, 7, 1, 5, 0, 4, 2, 6]])
def test_abstract_mesh(order, rng):
    mesh = make_mesh((2, 4), ("data", "expert"), order=order)
    inner = per_shard(exchange(GEOMETRY[4]), mesh.abstract_mesh)

    def fn(*args):
        return inner(*on_shards(args, mesh))

    with known(mesh):
        check_exchange(rng, GEOMETRY[4], mesh, fn=fn)


@pytest.mark.parametrize(
    "shape, names, manual",
    [
        ((2, 4), ("data", "expert"), {"expert"}),
        ((4, 2), ("expert", "model"), {"expert"}),
        ((2, 2, 2), ("data", "expert", "model"), {"expert", "data"}),
    ],
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_partly_manual(shape, names, manual, check_vma, rng):
    mesh = make_mesh(shape, names)
    named = tuple(name for name in names if name in manual)
    spec = P(named)
    fn = jax.jit(
        jax.shard_map(
            stacked(exchange(GEOMETRY[mesh.shape["expert"]])),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names=manual,
            check_vma=check_vma,
        )
    )
    # What the other axes hold is replicated: compare on a mesh of the manual ones alone.
    shards = make_mesh([mesh.shape[name] for name in named], named)
    of_ranks = hosts_of(mesh, expert_groups(mesh, "expert")[0])
    check_exchange(rng, GEOMETRY[mesh.shape["expert"]], shards, fn=fn, skews=SKEWS, hosts=of_ranks)


def test_partly_manual_over_rows_sharded_by_the_compiler(rng):
    """Features spread over an automatic axis come out as those of a fully manual exchange."""
    mesh = make_mesh((2, 2), ("expert", "model"))
    geometry = Geometry(2, 4, 2, 4)
    topk_idx = rng.integers(-1, 4, (8, 2)).astype(np.int32)
    tokens = rng.standard_normal((8, 6)).astype(np.float32)

    def fn(tokens, topk_idx):
        out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        return fio.combine(out.tokens * 2, out.handle)

    results = []
    for kwargs in ({"axis_names": {"expert"}}, {}):
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), **kwargs)
        placed = jax.device_put(tokens, NamedSharding(mesh, P("expert", "model")))
        results.append(np.asarray(jax.jit(mapped)(placed, topk_idx)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], 2 * tokens * (topk_idx >= 0).sum(1)[:, None], rtol=1e-6)


def test_shard_map_inside_shard_map(rng):
    """The expert axis may become manual inside a region that is manual over another."""
    mesh = make_mesh((2, 2), ("data", "expert"))
    geometry = GEOMETRY[2]
    inner = jax.shard_map(
        stacked(exchange(geometry)),
        in_specs=P("expert"),
        out_specs=P("expert"),
        axis_names={"expert"},
    )
    outer = jax.shard_map(
        inner, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    with known(mesh):
        check_exchange(rng, geometry, mesh, fn=jax.jit(outer))


def test_results_stay_replicated_over_axes_that_the_arguments_do_not_vary_over():
    """With check_vma on, nothing but the expert axis is added to what varies."""
    mesh = make_mesh((2, 2), ("expert", "model"))

    def fn(tokens, topk_idx):
        out = fio.dispatch(tokens, topk_idx, num_experts=4, axis_name="expert")
        return out.tokens, fio.combine(out.tokens, out.handle)

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    rows, z = jax.jit(mapped)(jnp.arange(4.0)[:, None], jnp.array([[0], [2], [1], [2]], jnp.int32))
    assert rows.ravel().tolist() == [0, 2, 0, 0, 1, 3, 0, 0]
    assert z.ravel().tolist() == [0, 1, 2, 3]


def test_replicated_tokens_are_sent_by_every_rank():
    mesh = make_mesh(2)

    def fn(tokens, topk_idx):
        return fio.dispatch(tokens, topk_idx, num_experts=2, axis_name="expert").tokens

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P()), out_specs=P("expert"))
    rows = jax.jit(mapped)(jnp.array([[1.0], [2.0]]), jnp.array([[0], [1]], jnp.int32))
    assert rows.ravel().tolist() == [1, 1, 0, 0, 2, 2, 0, 0]
