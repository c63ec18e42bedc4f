"""Groups that span hosts: virtual hosts of one process, by the engine and by XLA's collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Geometry,
    assert_bitwise,
    assert_combined,
    assert_dispatched,
    expert_groups,
    hosts_of,
    make_mesh,
    per_shard,
    pool_rows,
    power_of_two_weights,
    routing,
    stacked,
    values,
    visible,
)
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import hosts, reference
from freeio_jax.engines import CpuEngine

pytestmark = pytest.mark.skipif(
    jax.process_count() > 1 or jax.default_backend() != "cpu", reason="virtual hosts of one process"
)


@pytest.fixture
def host_size():
    yield lambda size: fio.config(host_size=size)
    fio.config(host_size=None)


@pytest.fixture(params=["engine", "collectives"])
def carrier(request, monkeypatch):
    """What moves the rows between hosts."""
    if request.param == "collectives":
        monkeypatch.setattr(CpuEngine, "knows_hosts", False)
    return request.param


#: (size of a host, mesh shape, names, order of devices): also groups whose ranks are on hosts in
#: another way than those of other groups, or on one host.
MESHES = {
    "hosts of two": (2, (8,), ("expert",), None),
    "hosts of one": (1, (4,), ("expert",), None),
    "uneven": (3, (8,), ("expert",), None),
    "ranks of a host apart": (2, (6,), ("expert",), [0, 4, 1, 2, 5, 3]),
    "groups that differ": (2, (2, 4), ("data", "expert"), [0, 1, 2, 3, 4, 6, 5, 7]),
    "one group on one host": (4, (2, 4), ("data", "expert"), [0, 4, 1, 5, 2, 3, 6, 7]),
    "no group spans": (4, (2, 4), ("data", "expert"), None),
}


def exchange(geometry, api=fio, **combine_options):
    def fn(tokens, topk_idx, pool, weights):
        out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        rows = pool[: out.tokens.shape[0]]
        return visible(out), rows, api.combine(rows, out.handle, weights, **combine_options)

    return fn


def arguments(rng, geometry, shards, dtype=jnp.bfloat16):
    topk_idx = routing(rng, geometry, "invalid", shards)
    tokens = values(rng, (shards, geometry.num_tokens, 3), np.float32)
    pool = values(rng, (shards, pool_rows(geometry), 5), dtype)
    return tokens, topk_idx, pool, power_of_two_weights(rng, topk_idx.shape)


@pytest.mark.parametrize("name", MESHES)
def test_the_contract(name, carrier, host_size, rng):
    size, shape, names, order = MESHES[name]
    host_size(size)
    mesh = make_mesh(shape, names, order=order)
    num_ranks = mesh.shape["expert"]
    geometry = Geometry(num_ranks, 6, 4, 2 * num_ranks, capacity=20, alignment=2)
    args = arguments(rng, geometry, mesh.size)
    out, expert_out, z = per_shard(exchange(geometry), mesh)(*args)
    groups = expert_groups(mesh, "expert")
    placements = assert_dispatched(out, args[0], args[1], geometry, groups)
    for group, placement in zip(groups, placements, strict=True):
        z_of, rows, weights = (np.asarray(a)[group] for a in (z, expert_out, args[3]))
        of_group = hosts_of(mesh, group)
        sums = z_of, rows, placement, geometry.topk_shape, weights
        assert_combined(*sums, exact=True, hosts=of_group)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_equal_bits(dtype, host_size, rng, monkeypatch):
    """Of the engine, of XLA's collectives, and of the reference that is told of hosts."""
    host_size(2)
    mesh, geometry = make_mesh(8), Geometry(8, 6, 5, 16)
    args = arguments(rng, geometry, 8, getattr(jnp, dtype))
    told = exchange(geometry, reference, hosts=[0, 0, 1, 1, 2, 2, 3, 3])
    sums = [per_shard(exchange(geometry), mesh)(*args)[2], per_shard(told, mesh)(*args)[2]]
    monkeypatch.setattr(CpuEngine, "knows_hosts", False)
    sums.append(per_shard(exchange(geometry), mesh)(*args)[2])
    for other in sums[1:]:
        assert_bitwise(other, sums[0])


def test_where_sums_are_rounded(carrier, host_size):
    # In bfloat16, 256 + 1 rounds to 256. On two hosts of two ranks: 256 + 1 -> 256, and 1 + 1 -> 2.
    host_size(2)

    def fn(tokens, topk_idx, value):
        out = fio.dispatch(tokens, topk_idx, num_experts=4, axis_name="expert")
        rows = jnp.broadcast_to(value, out.tokens.shape).astype(jnp.bfloat16)
        return fio.combine(rows, out.handle)

    ids = np.full((4, 1, 4), -1, np.int32)
    ids[0] = [0, 1, 2, 3]
    value = np.array([256.0, 1, 1, 1], np.float32)
    z = per_shard(fn, make_mesh(4))(np.zeros((4, 1, 1), np.float32), ids, value)
    assert float(z[0, 0, 0]) == 258.0
    host_size(None)
    z = per_shard(lambda *args: fn(*args), make_mesh(4))(
        np.zeros((4, 1, 1), np.float32), ids, value
    )
    assert float(z[0, 0, 0]) == 260.0  # 259 rounds to even


def test_derivatives(host_size, rng, monkeypatch):
    """By XLA's collectives they are those of the engine; of second order, too."""
    host_size(2)
    geometry, mesh = Geometry(4, 5, 3, 8, capacity=12), make_mesh(4)
    with jax.enable_x64(True):
        tokens = values(rng, (4, 5, 3), np.float64)
        topk_idx = routing(rng, geometry, "holes")
        weights = values(rng, topk_idx.shape, np.float64)

        def layer(tokens, weights, topk_idx):
            out = fio.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
            return fio.combine(jnp.sin(out.tokens), out.handle, weights)

        def derivatives():
            sharded = jax.shard_map(
                stacked(layer), mesh=mesh, in_specs=P("expert"), out_specs=P("expert")
            )

            def loss(tokens, weights):
                return jnp.sum(jnp.sin(sharded(tokens, weights, topk_idx)))

            def directional(tokens, weights):
                grads = jax.grad(loss, (0, 1))(tokens, weights)
                return sum(jnp.sum(jnp.cos(g)) for g in grads)

            both = jax.jit(
                lambda *args: (
                    jax.value_and_grad(loss, (0, 1))(*args),
                    jax.grad(directional, (0, 1))(*args),
                    jax.jvp(loss, args, args),
                )
            )
            return both(tokens, weights)

        ours = derivatives()
        monkeypatch.setattr(CpuEngine, "knows_hosts", False)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            derivatives(),
            ours,
        )


def test_loops_branches_starts_and_dtypes(carrier, host_size, rng):
    host_size(2)
    geometry, mesh = Geometry(4, 5, 2, 8), make_mesh(4)

    def fn(tokens, topk_idx, ids, mask):
        def step(x, _):
            pending = fio.dispatch_start(x, topk_idx, num_experts=8, axis_name="expert")
            doubled, pending = fio.between(pending, jnp.multiply, x, 2)
            out = pending.done()
            return fio.combine_start(out.tokens, out.handle).done() + 0 * doubled, None

        x, _ = jax.lax.scan(step, tokens, length=3)
        x = jax.lax.cond(x.shape[0] > 0, lambda x: step(x, None)[0], lambda x: x, x)
        out = fio.dispatch((ids, mask), topk_idx, num_experts=8, axis_name="expert")
        return x, out.tokens

    tokens = values(rng, (4, 5, 3), np.float32)
    topk_idx = routing(rng, geometry)
    ids, mask = values(rng, (4, 5, 2), np.int8), values(rng, (4, 5), bool)
    x, rows = per_shard(fn, mesh, check_vma=False)(tokens, topk_idx, ids, mask)
    np.testing.assert_array_equal(x, 2.0**4 * tokens)
    placement = geometry.place(topk_idx, rows[0].shape[1])
    for leaf, actual in zip((ids, mask), rows, strict=True):
        for rank, sources in enumerate(placement.source):
            for row, source in enumerate(sources):
                expected = np.zeros_like(leaf[0, 0]) if source is None else leaf[source[:2]]
                assert_bitwise(np.asarray(actual)[rank, row], expected)


def test_a_mesh_without_devices_is_refused(host_size):
    host_size(2)
    fn = per_shard(exchange(Geometry(4, 2, 2, 4)), make_mesh(4).abstract_mesh)
    with pytest.raises(ValueError, match=r"nobody knows which ranks share a host.*jax.set_mesh"):
        fn.lower(*arguments(np.random.default_rng(0), Geometry(4, 2, 2, 4), 4))


def test_the_devices_of_a_process_are_on_one_host():
    devices = [jax.local_devices()[0]] * 4
    assert hosts.virtual_host(devices, 0, None) is None
    assert hosts.virtual_host(devices, 0, 4) == 0
    with pytest.raises(ValueError, match=r"host_size=2 .*multiple of the devices of a process"):
        hosts.virtual_host(devices, 0, 2)


def test_hosts_are_numbered_in_order_of_rank():
    assert hosts.in_order_of_rank("baab") == (0, 1, 1, 0)


def test_the_reference_wants_a_host_for_each_rank():
    geometry = Geometry(2, 2, 1, 2)
    fn = per_shard(exchange(geometry, reference, hosts=[0]), make_mesh(2))
    with pytest.raises(ValueError, match="hosts has 1 numbers, but the group has 2 ranks"):
        fn(*arguments(np.random.default_rng(0), geometry, 2))


@pytest.mark.parametrize("value", [0, -1, "two"])
def test_sizes_of_hosts(value):
    with pytest.raises(ValueError, match="host_size="):
        fio.config(host_size=value)


def test_a_size_that_covers_all_devices_makes_no_hosts(host_size):
    host_size(jax.device_count())
    mesh = jax.sharding.AbstractMesh((2,), ("expert",))
    assert hosts.of_groups(mesh, np.arange(2)[None]) is None
    host_size(jax.device_count() - 1)
    with pytest.raises(ValueError, match="several hosts, and the mesh has no devices"):
        hosts.of_groups(mesh, np.arange(2)[None])


def test_a_size_that_changes_after_initialize_is_an_error(host_size, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_connected", None)
    hosts.connect([hosts.Host(0, "one", (0, 1))])
    host_size(1)
    with pytest.raises(RuntimeError, match=r"host_size was None when initialize.*and is 1 now"):
        hosts.of_groups(None, np.arange(2)[None])
