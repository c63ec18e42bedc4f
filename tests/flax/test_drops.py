"""Which assignments are dropped where a rank has not enough room, and what is reported of them."""

import dataclasses
from collections import Counter

import dense_moe
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Geometry, make_mesh, per_shard, routing
from jax.sharding import AxisType

from freeio_jax import reference
from freeio_jax.bench.baselines import Dense
from freeio_jax.flax import MoEConfig, Router, linen, moe
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.drops import keep_evenly, keep_first
from freeio_jax.flax.router import route
from freeio_jax.layout import balanced_capacity

WIDTH = 16


def kept_by_the_rule(topk_idx, num_experts, capacity, alignment):
    """The rule of ``freeio_jax.flax.drops`` in Python integers: bool ``[R, T, K]``."""
    num_ranks, local = len(topk_idx), num_experts // len(topk_idx)
    kept = np.zeros(topk_idx.shape, bool)
    for rank in range(num_ranks):
        numbered, rows = [], 0
        for expert in range(rank * local, (rank + 1) * local):
            before = len(numbered)
            for turn in range(num_ranks):
                source = (expert + turn) % num_ranks
                numbered += [(source, *tk) for tk in np.argwhere(topk_idx[source] == expert)]
            rows += -(-(len(numbered) - before) // alignment) * alignment
        room = capacity - local * (alignment - 1)
        share = -(-(room << 32) // max(len(numbered), 1))
        for i, assignment in enumerate(numbered):
            grows = (i + 1) * share >> 32 > i * share >> 32
            kept[tuple(assignment)] = rows <= capacity or grows
    return kept


def by_keep_evenly(topk_idx, num_experts, capacity, alignment):
    def fn(ids):
        return keep_evenly(
            ids,
            num_experts=num_experts,
            capacity=capacity,
            alignment=alignment,
            axes=("expert",),
        )

    return np.asarray(per_shard(fn, make_mesh(len(topk_idx)))(topk_idx))


@pytest.mark.parametrize("skew", ["uniform", "hot", "one rank", "holes", "repeated", "none"])
@pytest.mark.parametrize(("factor", "alignment"), [(0.5, 1), (1.0, 4), (1.25, 1)])
def test_the_rule(factor, alignment, skew, rng):
    geometry = Geometry(4, 13, 3, 12, alignment=alignment)
    topk_idx = routing(rng, geometry, skew)
    capacity = balanced_capacity(
        factor, num_ranks=4, num_tokens=13, top_k=3, num_experts=12, alignment=alignment
    )
    got = by_keep_evenly(topk_idx, 12, capacity, alignment)
    kept = kept_by_the_rule(topk_idx, 12, capacity, alignment)
    np.testing.assert_array_equal(got, np.where(kept, topk_idx, -1))
    # What is kept fits, and no expert of a rank loses another share than the rank does.
    assert not geometry.place(got, capacity).num_dropped.any()
    for rank in range(4):
        of_rank = topk_idx // 3 == rank
        all_fit = kept[of_rank].all()
        lost = 0 if all_fit else 1 - (capacity - 3 * (alignment - 1)) / of_rank.sum()
        for expert in range(3 * rank, 3 * rank + 3):
            of_expert = topk_idx == expert
            assert abs((of_expert & ~kept).sum() - lost * of_expert.sum()) < 1 + 1e-6
        for source in range(4):
            sent = of_rank[source].sum()
            assert abs((of_rank & ~kept)[source].sum() - lost * sent) < 3 + 1e-6


def test_many_assignments():
    """Numbers whose product with the room does not fit in 32 bits."""
    ids = np.zeros((2, 150_000, 1), np.int32)
    got = by_keep_evenly(ids, 2, 123_457, 1)
    np.testing.assert_array_equal(got == 0, kept_by_the_rule(ids, 2, 123_457, 1))
    assert (got == 0).sum() == 123_457


def test_sources_with_as_many_assignments_for_each_expert_lose_as_many():
    """In an order that is the same for each expert all drops would be those of one source."""
    ids = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 1, 8))
    got = by_keep_evenly(ids, 64, 40, 1)
    assert (got == -1).sum(axis=(1, 2)).tolist() == [3] * 8
    assert (got == -1).sum(axis=(0, 1)).tolist() == [3] * 8


def chosen_by_hand(num_ranks, expert_of_token, **changes):
    """A layer, and parameters and tokens for which token t takes expert ``expert_of_token[t]``."""
    config = MoEConfig(
        num_experts=WIDTH,
        top_k=1,
        expert_width=4,
        capacity_factor=1.25,
        router=Router(load_balance_coef=0.0, z_loss_coef=0.0),
        **changes,
    )
    parameters = {n: jnp.ones(s) for n, (s, _) in config.parameters(WIDTH).items()}
    parameters["router"] = 10 * jnp.eye(WIDTH)
    x = jnp.asarray(np.tile(np.eye(WIDTH)[expert_of_token], (num_ranks, 1)), jnp.float32)
    return config, parameters, x


@pytest.mark.parametrize("exchange", [None, reference, Dense()], ids=str)
def test_a_rank_at_twice_its_share(exchange):
    """Every source has 4 tokens for each expert of rank 0, which has room for 40 of its 64."""
    of_token = [0] * 4 + [1] * 4 + [2 + i % 14 for i in range(24)]
    config, parameters, x = chosen_by_hand(8, of_token, exchange=exchange, drops="last")
    with jax.set_mesh(make_mesh(8, axis_types=(AxisType.Auto,))):
        _, last = jax.jit(lambda: moe(parameters, x, config))()
        config = dataclasses.replace(config, drops="evenly")
        y, evenly = jax.jit(lambda: moe(parameters, x, config))()
    assert last.load.tolist() == evenly.load.tolist() == [32, 32] + [16] * 10 + [8] * 4
    assert int(last.dropped) == int(evenly.dropped) == 24
    assert evenly.expert_drops.tolist() == [12, 12] + [0] * 14
    assert evenly.source_drops.tolist() == [3] * 8
    assert int((np.asarray(y) == 0).all(axis=-1).sum()) == 24
    if not isinstance(exchange, Dense):  # which has a rule of its own
        assert last.expert_drops.tolist() == [0, 24] + [0] * 14
        assert last.source_drops.tolist() == [0, 0] + [4] * 6


CASES = {
    "plain": {},
    "aligned": {"alignment": 2},
    "weights_on_input": {"router": Router(weights_on="input")},
    "padded": {"num_experts": 6, "pad_experts_to": 8},
    "zero_experts": {"num_zero_experts": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_kept_assignments(name, rng):
    options = {"num_experts": 8, "top_k": 3, "expert_width": 8} | CASES[name]
    config = MoEConfig(
        **options, capacity_factor=0.7, drops="evenly", token_axes=("data", "expert")
    )
    parameters = {
        n: jnp.asarray(rng.normal(size=s) / 3, jnp.float32)
        for n, (s, _) in config.parameters(WIDTH).items()
    }
    x = jnp.asarray(rng.normal(size=(40, WIDTH)), jnp.float32).at[:, 0].set(1)
    parameters["router"] = parameters["router"].at[0, 0].set(4)  # all tokens want expert 0
    routing = route(x, parameters["router"], top_k=3, router=config.router)
    ids = np.asarray(routing.topk_idx).reshape(2, 4, 5, 3)  # data, rank, token, k
    asked_for = np.where(ids < config.num_experts, ids, -1)
    capacity = balanced_capacity(
        0.7 * config.num_slots / config.num_choices,
        num_ranks=4,
        num_tokens=5,
        top_k=3,
        num_experts=config.num_slots,
        alignment=config.alignment,
    )
    kept = np.stack(
        [kept_by_the_rule(a, config.num_slots, capacity, config.alignment) for a in asked_for]
    )
    lost = (asked_for >= 0) & ~kept

    def dense(parameters, x):
        routing = route(x, parameters["router"], top_k=3, router=config.router)
        weights = jnp.where(lost.reshape(40, 3), 0.0, routing.topk_weights)
        y = jnp.sum(jnp.where(ids.reshape(40, 3) >= config.num_experts, weights, 0), 1)[:, None] * x
        for e in range(config.num_experts):
            weight = jnp.sum(jnp.where(ids.reshape(40, 3) == e, weights, 0), axis=1)[:, None]
            into = weight * x if config.router.weights_on == "input" else x
            gate, up = jnp.split(into @ parameters["gate_up"][e], 2, axis=-1)
            out = (jax.nn.silu(gate) * up) @ parameters["down"][e]
            y += out if config.router.weights_on == "input" else weight * out
        return y

    def loss(function):
        def value(parameters, x):
            y = function(parameters, x)
            y, report = y if isinstance(y, tuple) else (y, None)
            return dense_moe.squashed(y), (y, report)

        return jax.jit(jax.grad(value, (0, 1), has_aux=True))

    expected, (expected_y, _) = loss(dense)(parameters, x)
    with jax.set_mesh(make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)):
        switched_off = dataclasses.replace(
            config, router=dataclasses.replace(config.router, load_balance_coef=0.0)
        )
        got, (y, report) = loss(lambda p, x: moe(p, x, switched_off))(parameters, x)
    assert lost.any()
    counts = Counter(ids[lost].tolist())
    assert report.expert_drops.tolist() == [counts[e] for e in range(config.num_experts)]
    assert report.source_drops.tolist() == lost.sum(axis=(2, 3)).reshape(-1).tolist()
    assert int(report.dropped) == lost.sum()
    dense_moe.assert_close((y, got), (expected_y, expected))


def test_what_evenly_costs():
    """One all-gather; and where nothing can be dropped, nothing."""
    config, parameters, x = chosen_by_hand(4, list(range(16)))

    def all_gathers(**changes):
        changed = dataclasses.replace(config, **changes)
        lowered = jax.jit(lambda p, x: moe(p, x, changed)).lower(parameters, x)
        return lowered.as_text().count("stablehlo.all_gather")

    with jax.set_mesh(make_mesh(4, axis_types=(AxisType.Auto,))):
        assert all_gathers() == 1
        assert all_gathers(drops="last") == 0
        assert all_gathers(capacity_factor=None) == 0
        assert all_gathers(capacity_factor=100.0) == 0


def test_without_drops_the_reports_are_zero(rng):
    config, parameters, x = chosen_by_hand(4, list(range(16)))
    for factor in (None, 100.0):
        changed = dataclasses.replace(config, capacity_factor=factor)
        report = dense_moe.on_any_mesh(moe(parameters, x, changed)[1])
        assert int(report.dropped) == int(report.source_drops) == 0
        assert not report.expert_drops.any()


def test_linen_and_nnx_report_drops():
    """Also an nnx layer that was made without the mesh: the ranks are those of its last call."""
    config, parameters, x = chosen_by_hand(4, [0] * 4 + list(range(12)))
    names = ("num_experts", "top_k", "expert_width", "capacity_factor", "router")
    options = {name: getattr(config, name) for name in names}
    layer, model = linen.MoE(**options), fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
    assert model.source_drops[...].shape == (1,)
    nnx.update(model, parameters)
    with jax.set_mesh(make_mesh(4, axis_types=(AxisType.Auto,))):
        _, report = moe(parameters, x, config)
        _, state = layer.apply({"params": parameters}, x, mutable=["intermediates", "drops"])
        nnx.jit(lambda model, x: model(x))(model, x)
        made_here = fio_nnx.MoE(WIDTH, **options, rngs=nnx.Rngs(0))
    assert made_here.source_drops[...].shape == (4,)
    assert int(report.dropped) > 0
    for name in ("dropped", "expert_drops", "source_drops"):
        expected = np.asarray(getattr(report, name))
        sown = state["intermediates" if name == "dropped" else "drops"]
        np.testing.assert_array_equal(sown[name][0], expected)
        np.testing.assert_array_equal(getattr(model, name)[...], expected)
    expected = [sum(report.expert_drops.tolist())] * 2
    assert [int(report.dropped), sum(report.source_drops.tolist())] == expected


# --- An expert's room for one sequence ------------------------------------------------------------


def first_of_each_sequence(topk_idx, room):
    """The rule of ``expert_capacity``, one assignment after the other: ids ``[B, L, K]``."""
    kept = np.full_like(topk_idx, -1)
    for sequence, ids in enumerate(topk_idx):
        taken = Counter()
        for place in np.ndindex(ids.shape):
            taken[ids[place]] += 1
            if taken[ids[place]] <= room:
                kept[(sequence, *place)] = ids[place]
    return kept


@pytest.mark.parametrize("shape", [(3, 7, 2), (1, 16, 1), (4, 1, 3), (0, 5, 2), (5, 0, 2)])
@pytest.mark.parametrize("room", [1, 2, 100])
def test_the_first_of_each_sequence(shape, room, rng):
    topk_idx = rng.integers(-1, 4, shape, np.int32)
    got = keep_first(topk_idx.reshape(-1, shape[2]), room=room, sequence_length=shape[1])
    np.testing.assert_array_equal(got, first_of_each_sequence(topk_idx, room).reshape(-1, shape[2]))


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_expert_capacity_is_for_each_sequence(batch, num_chunks, rng):
    """Also where the ranks do not divide the sequences, and with tokens that are padding."""
    of_token = rng.integers(0, 4, (batch, 9))
    config, parameters, _ = chosen_by_hand(1, of_token[0])
    config = dataclasses.replace(
        config, capacity_factor=None, expert_capacity=2, num_chunks=num_chunks
    )
    x = jnp.asarray(np.eye(WIDTH)[of_token], jnp.float32)
    mask = rng.random((batch, 9)) < 0.8
    ids = np.where(mask, of_token, -1)
    kept = first_of_each_sequence(ids[..., None], 2)[..., 0]

    def evaluate(parameters, x):
        y, report = moe(parameters, x, config, token_mask=mask)
        return jnp.sum(y), (y, report)

    with jax.set_mesh(make_mesh(4, axis_types=(AxisType.Auto,))):
        gradient = jax.jit(jax.grad(evaluate, has_aux=True, argnums=(0, 1)))
        (by_parameters, by_x), (y, report) = gradient(parameters, x)
    assert ((np.asarray(y) != 0).all(axis=-1) == (kept >= 0)).all()
    assert not np.asarray(by_x)[kept < 0].any()
    lost = [int(((ids == e) & (kept < 0)).sum()) for e in range(WIDTH)]
    assert report.expert_drops.tolist() == lost
    assert int(report.dropped) == sum(lost) == int(report.source_drops.sum())
    assert report.load.tolist() == [int((ids == e).sum()) for e in range(WIDTH)]
    used = np.isin(np.arange(WIDTH), kept)
    assert (np.asarray(by_parameters["down"]).any(axis=(1, 2)) == used).all()


def test_expert_capacity_and_the_room_of_a_rank_bind_together(rng):
    """What a sequence's bound leaves may still be too much for a rank."""
    of_token = np.zeros((4, 8), np.int32)
    config, parameters, _ = chosen_by_hand(1, of_token[0], expert_capacity=5, drops="evenly")
    x = jnp.asarray(np.eye(WIDTH)[of_token], jnp.float32)
    with jax.set_mesh(make_mesh(4, axis_types=(AxisType.Auto,))):
        y, report = jax.jit(lambda: moe(parameters, x, config))()
    room = balanced_capacity(1.25, num_ranks=4, num_tokens=8, top_k=1, num_experts=16, alignment=1)
    assert room < 20
    assert int((np.asarray(y) != 0).all(axis=-1).sum()) == room
    assert int(report.dropped) == 32 - room


def test_expert_capacity_wants_sequences():
    config, parameters, x = chosen_by_hand(1, [0, 1], expert_capacity=1)
    with pytest.raises(ValueError, match=r"Reshape it to \[B, L, H\].*expert_capacity=None"):
        moe(parameters, x, config)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"at least 1, or None, got {wrong}"):
            dataclasses.replace(config, expert_capacity=wrong)
    assert type(dataclasses.replace(config, expert_capacity=np.int64(2)).expert_capacity) is int
