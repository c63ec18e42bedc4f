"""XLA's exchanges against the contract: what lies around the one collective of each."""

import functools
import itertools

import emulation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ROUTINGS,
    Geometry,
    assert_bitwise,
    assert_combined,
    assert_dispatched,
    exchange_fn,
    make_mesh,
    per_shard,
    pool_rows,
    power_of_two_weights,
    routing,
    values,
    visible,
)
from moe import arguments, moe, sharded_moe

from freeio_jax import config, reference
from freeio_jax.bench import on_demand
from freeio_jax.bench.baselines import Dense, Ragged
from freeio_jax.layout import Layout

EXCHANGES = {
    "dense": Dense(slots_factor=8),
    "ragged 1": Ragged(1),
    "ragged 3": Ragged(3),
    "by expert 1": Ragged(1, by_expert=True),
    "by expert 5": Ragged(5, by_expert=True),
    "on demand": on_demand,
}


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulation.ragged_all_to_all)


DROPS = Geometry(3, 4, 3, 6, capacity=7)
ALIGNED = Geometry(4, 3, 2, 8, capacity=16, alignment=4)
EMPTY = Geometry(2, 4, 6, 4, capacity=0), Geometry(2, 0, 2, 4)


@pytest.mark.parametrize(
    ("exchange", "geometry"),
    [
        *itertools.product(("dense", "ragged 3", "by expert 5", "on demand"), (DROPS,)),
        *itertools.product(("ragged 1", "by expert 1", "on demand"), (ALIGNED,)),
        *itertools.product(("ragged 3", "on demand"), EMPTY),
        ("ragged 3", Geometry(1, 5, 3, 4)),
        ("by expert 5", Geometry(8, 3, 4, 16)),
    ],
    ids=str,
)
def test_exchange_is_the_contract(exchange, geometry, rng):
    fn = exchange_fn(geometry, api=EXCHANGES[exchange])
    for skew in ROUTINGS:
        topk_idx = routing(rng, geometry, skew)
        tokens = values(rng, (geometry.num_ranks, geometry.num_tokens, 3), np.float32)
        pool = values(rng, (geometry.num_ranks, pool_rows(geometry), 2), jnp.bfloat16)
        weights = power_of_two_weights(rng, topk_idx.shape)
        weights[topk_idx < 0] = np.nan
        out, expert_out, z = fn(tokens, topk_idx, pool, weights)
        (placement,) = assert_dispatched(out, tokens, topk_idx, geometry)
        # bfloat16 rows of both may be rounded at different points.
        assert_combined(z, expert_out, placement, topk_idx.shape, weights, exact=False)


def test_gradients_with_drops_are_the_reference_ones(rng):
    geometry = Geometry(4, 6, 3, 8, capacity=13)
    topk_idx = routing(rng, geometry, "hot")
    tokens = values(rng, (4, 6, 3), np.float32)
    weights = values(rng, topk_idx.shape, np.float32)

    def gradients(api, tokens, topk_idx, weights):
        def layer(tokens, weights):
            out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
            return api.combine(jnp.cos(out.tokens), out.handle, weights)

        z, pull = jax.vjp(layer, tokens, weights)
        return pull(z)

    expected, *others = (
        per_shard(functools.partial(gradients, api), make_mesh(4))(tokens, topk_idx, weights)
        for api in (
            reference,
            *(EXCHANGES[n] for n in ("dense", "ragged 3", "by expert 5", "on demand")),
        )
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for got in others:
        jax.tree.map(close, got, expected)


def test_a_pytree_of_several_dtypes(rng):
    geometry = Geometry(4, 5, 2, 8, capacity=9)
    tokens = {"rows": values(rng, (4, 5, 3), np.int8), "scale": values(rng, (4, 5), np.float32)}
    topk_idx = routing(rng, geometry)
    for exchange in (EXCHANGES["dense"], EXCHANGES["ragged 3"], on_demand):
        fn = per_shard(
            lambda tokens, topk_idx, api=exchange: visible(
                api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
            ),
            make_mesh(4),
        )
        assert_dispatched(fn(tokens, topk_idx), tokens, topk_idx, geometry)


def test_dense_drops_what_has_no_slot(rng):
    """Of each pair of ranks the last assignments in the order of experts."""
    geometry = Geometry(2, 6, 2, 4)
    topk_idx = routing(rng, geometry, "one expert")  # 6 of 12 to one rank
    tokens = values(rng, (2, 6, 1), np.float32)
    pool = values(rng, (2, pool_rows(geometry), 1), np.float32)
    weights = np.ones(topk_idx.shape, np.float32)
    for slots in (4, 6):
        out, _, z = exchange_fn(geometry, api=Dense(slots=slots))(tokens, topk_idx, pool, weights)
        assert int(np.sum(out["num_dropped"])) == 2 * (6 - slots)
        assert int(np.sum(out["group_sizes"])) == 2 * slots
        kept = topk_idx.copy()
        kept[:, slots:] = -1
        expected = exchange_fn(geometry)(tokens, kept, pool, weights)
        assert_bitwise(out["tokens"], expected[0]["tokens"])
        assert_bitwise(z, expected[2])


def test_the_share_of_slots_is_rounded_up_and_never_more_than_there_are_assignments():
    layout = Layout(4, 10, 3, 8, capacity=120)
    assert Dense(1.25)._slots(layout) == 10  # of 9.375
    assert Dense(100.0)._slots(layout) == 30


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_collective_itself_lowers_for_gpus(check_vma, monkeypatch, rng):
    """Forward and backward, with JAX's own primitive; to run it takes GPUs."""
    monkeypatch.undo()
    tokens, topk_idx, weights, params = arguments(rng)

    def loss(tokens, weights, params):
        layer = functools.partial(moe, api=Ragged(4))
        fn = sharded_moe(layer=layer, check_vma=check_vma)
        return jnp.sum(fn(tokens, topk_idx, weights, params))

    lowered = (
        jax.jit(jax.grad(loss, (0, 1, 2)))
        .trace(tokens, weights, params)
        .lower(lowering_platforms=("cuda",))
    )
    assert lowered.as_text().count("@ragged_all_to_all") == 4


def test_on_demand_between_virtual_hosts(rng):
    geometry = Geometry(4, 6, 3, 8, capacity=13)
    topk_idx = routing(rng, geometry, "hot")
    tokens = values(rng, (4, 6, 3), np.float32)
    pool = values(rng, (4, pool_rows(geometry), 2), np.float32)
    weights = power_of_two_weights(rng, topk_idx.shape)
    args = tokens, topk_idx, pool, weights
    here = exchange_fn(geometry, api=on_demand)(*args)
    config(host_size=2)
    try:
        between = exchange_fn(geometry, api=on_demand)(*args)
    finally:
        config(host_size=None)
    jax.tree.map(assert_bitwise, between, here)
