"""XLA's exchanges against the contract: what lies around the one collective of each."""

import functools

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
from moe import GEOMETRY, arguments, dense_moe, moe, sharded_moe

from freeio_jax import reference
from freeio_jax.bench.baselines import Dense, Ragged

EXCHANGES = {
    "dense": Dense(slots_factor=8),
    "ragged 1": Ragged(1),
    "ragged 3": Ragged(3),
    "ragged 128": Ragged(128),
    "ragged by expert": Ragged(1, by_expert=True),
    "ragged by expert 4": Ragged(4, by_expert=True),
}
exchanges = pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)


@pytest.fixture(autouse=True)
def ragged_all_to_all(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulation.ragged_all_to_all)


@exchanges
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(1, 5, 3, 4),
        Geometry(3, 4, 3, 6, capacity=7),
        Geometry(4, 3, 2, 8, capacity=16, alignment=4),
        Geometry(2, 4, 6, 4, capacity=0),
        Geometry(2, 0, 2, 4),
    ],
    ids=str,
)
def test_exchange_is_the_contract(exchange, geometry, rng):
    fn = exchange_fn(geometry, api=exchange)
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


@exchanges
def test_gradients_are_the_dense_ones(exchange, rng):
    tokens, topk_idx, weights, params = arguments(rng, skew="holes")

    def layer(*args):
        return moe(*args, api=exchange)

    def loss(fn, tokens, weights, params):
        return jnp.sum(jnp.sin(fn(tokens, topk_idx, weights, params)))

    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, fn), argnums=(0, 1, 2)))(
            tokens, weights, params
        )
        for fn in (sharded_moe(layer=layer), dense_moe)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected
    )


@exchanges
def test_gradients_with_drops_are_the_reference_ones(exchange, rng):
    geometry = Geometry(4, 6, 3, 8, capacity=13)
    topk_idx = routing(rng, geometry, "hot")
    tokens = values(rng, (4, 6, 3), np.float32)
    weights = values(rng, topk_idx.shape, np.float32)

    def gradients(api, tokens, topk_idx, weights):
        def layer(tokens, weights):
            out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
            return jnp.sin(api.combine(jnp.cos(out.tokens), out.handle, weights))

        z, pull = jax.vjp(layer, tokens, weights)
        return z, pull(jnp.ones_like(z))

    for check_vma in (True, False):
        ours, theirs = (
            per_shard(functools.partial(gradients, api), make_mesh(4), check_vma=check_vma)(
                tokens, topk_idx, weights
            )
            for api in (exchange, reference)
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs
        )


def test_a_pytree_of_several_dtypes(rng):
    geometry = Geometry(4, 5, 2, 8, capacity=9)
    tokens = {"rows": values(rng, (4, 5, 3), np.int8), "scale": values(rng, (4, 5), np.float32)}
    topk_idx = routing(rng, geometry)
    for exchange in (EXCHANGES["dense"], EXCHANGES["ragged 3"]):
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
        out, expert_out, z = exchange_fn(geometry, api=Dense(slots=slots))(
            tokens, topk_idx, pool, weights
        )
        assert int(np.sum(out["num_dropped"])) == 2 * (6 - slots)
        assert int(np.sum(out["group_sizes"])) == 2 * slots
        kept = topk_idx.copy()
        kept[:, slots:] = -1
        expected = exchange_fn(geometry)(tokens, kept, pool, weights)
        assert_bitwise(out["tokens"], expected[0]["tokens"])
        assert_bitwise(z, expected[2])


def test_the_share_of_slots_is_rounded_up_and_never_more_than_there_are_assignments():
    layout = Geometry(4, 10, 3, 8)
    layout = reference.Layout(4, 10, 3, 8, capacity=120)
    assert Dense(1.25)._slots(layout) == 10  # of 7.5 on average
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
    assert GEOMETRY.num_ranks == 4
