"""The router against loops over plain numpy, and the formulas of its papers."""

import dense_moe
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from freeio_jax.flax.router import Router, load_balance_loss, route, select, update_bias

ROUTERS = {
    "softmax": Router(),
    "softmax_not_renormalized": Router(renormalize=False),
    "sigmoid": Router(score="sigmoid", weight_scale=2.5),
    "groups": Router(num_groups=4, groups_per_token=2),
    "groups_by_their_best": Router(num_groups=4, groups_per_token=2, group_score="max"),
    "groups_of_one": Router(num_groups=16, groups_per_token=3),
    "sigmoid_groups": Router(score="sigmoid", num_groups=2, groups_per_token=1),
}


def draw(rng, tokens=40, width=12, experts=16):
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(width, experts)), jnp.float32)


def test_groups_by_the_two_best_or_the_best():
    scores = jnp.array([[0.6, 0.0, 0.4, 0.3]])
    for group_score, chosen in (("top2", [2, 3]), ("max", [0, 1])):
        router = Router(num_groups=2, groups_per_token=1, group_score=group_score)
        assert select(scores, 2, router)[0].tolist() == [chosen]


def test_a_bias_on_the_logits_is_part_of_everything(rng):
    """It is what the kernel's row for an input of ones is."""
    x, kernel = draw(rng)
    router, bias = Router(logits_bias=True), kernel[-1]
    got = route(x[:, :-1], kernel[:-1], top_k=2, router=router, logits_bias=bias)
    expected = route(x.at[:, -1].set(1), kernel, top_k=2, router=Router())
    dense_moe.assert_close(got, expected)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_choice_and_weights(name, with_bias, rng):
    router, (x, kernel) = ROUTERS[name], draw(rng)
    bias = rng.normal(size=16).astype(np.float32) if with_bias else None
    routing = route(x, kernel, top_k=3, router=router, bias=bias)
    scores, _ = dense_moe.score({"router": kernel}, x, router)
    chosen = dense_moe.choose(scores, 3, router, bias)
    for token in range(len(x)):
        ids = np.asarray(routing.topk_idx[token])
        assert sorted(ids) == np.flatnonzero(chosen[token]).tolist()
        expected = np.asarray(scores)[token, ids]
        order = expected + (0 if bias is None else bias[ids])
        assert (np.diff(order) <= 1e-6).all()  # best first
        if router.renormalizes(3):
            expected = expected / expected.sum()
        np.testing.assert_allclose(
            routing.topk_weights[token], expected * router.weight_scale, rtol=1e-5
        )
    assert routing.topk_idx.dtype == routing.load.dtype == jnp.int32
    np.testing.assert_array_equal(routing.load, chosen.sum(0))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name):
    idx, weights = select(jnp.zeros((0, 16)), 3, ROUTERS[name])
    assert idx.shape == weights.shape == (0, 3)


def test_ties_go_to_the_lower_id():
    idx, weights = select(jnp.ones((2, 4)), 2, Router())
    assert idx.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_sigmoid_scores_that_underflow_give_weights_of_zero():
    x, kernel = jnp.ones((1, 1)), jnp.full((1, 4), -1e4)
    routing = route(x, kernel, top_k=2, router=Router(score="sigmoid"))
    assert routing.topk_weights.tolist() == [[0.0, 0.0]]
    assert np.isfinite(routing.load_balance_loss)


def test_load_balance_loss_is_one_where_even_and_e_where_all_goes_to_one():
    even = load_balance_loss(jnp.full(8, 1 / 8), jnp.full(8, 5))
    one = load_balance_loss(jnp.zeros(8).at[3].set(1.0), jnp.zeros(8, jnp.int32).at[3].set(40))
    np.testing.assert_allclose((even, one), (1.0, 8.0), rtol=1e-6)


def test_losses(rng):
    x, kernel = draw(rng)
    routing = route(x, kernel, top_k=2, router=Router())
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    exponents = np.exp(logits)
    probabilities = exponents / exponents.sum(-1, keepdims=True)
    share = np.asarray(routing.load) / (2 * len(x))
    np.testing.assert_allclose(
        routing.load_balance_loss, 16 * np.sum(share * probabilities.mean(0)), rtol=1e-5
    )
    np.testing.assert_allclose(routing.z_loss, np.mean(np.log(exponents.sum(-1)) ** 2), rtol=1e-5)


def test_masked_tokens_go_nowhere_and_do_not_count(rng):
    x, kernel = draw(rng)
    mask = np.arange(40) % 3 > 0
    masked = route(x, kernel, top_k=2, router=Router(), token_mask=jnp.asarray(mask))
    without = route(x[mask], kernel, top_k=2, router=Router())
    assert (masked.topk_idx[~mask] == -1).all()
    np.testing.assert_array_equal(masked.topk_idx[mask], without.topk_idx)
    np.testing.assert_array_equal(masked.load, without.load)
    np.testing.assert_allclose(masked.load_balance_loss, without.load_balance_loss, rtol=1e-6)
    np.testing.assert_allclose(masked.z_loss, without.z_loss, rtol=1e-6)


def test_load_and_losses_are_those_of_all_shards(rng):
    axes = ("data", "expert")
    explicit = (AxisType.Explicit, AxisType.Explicit)
    (x, kernel), mesh = draw(rng), make_mesh((2, 4), axes, axis_types=explicit)

    def shard(x, kernel):
        routing = route(x, kernel, top_k=2, router=Router(), token_axes=axes)
        return routing.load, routing.load_balance_loss, routing.z_loss

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(axes), P()), out_specs=P())
    with jax.set_mesh(mesh):
        got = jax.jit(sharded)(jax.device_put(x, P(axes)), kernel)
    whole = route(x, kernel, top_k=2, router=Router())
    for a, b in zip(got, (whole.load, whole.load_balance_loss, whole.z_loss), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)


def test_the_bias_moves_towards_even_load():
    bias = update_bias(jnp.array([0.5, 0.0, 0.0, -1.0]), jnp.array([9, 3, 4, 0]), 0.125)
    assert bias.tolist() == [0.375, 0.125, 0.0, -0.875]


def test_the_bias_balances(rng):
    x, kernel = draw(rng, tokens=512)
    x, kernel = jnp.abs(x) / 8, kernel.at[:, 0].set(jnp.abs(kernel[:, 0]))
    router, bias = Router(score="sigmoid", bias_update_rate=0.005), jnp.zeros(16)
    step = jax.jit(lambda bias: route(x, kernel, top_k=2, router=router, bias=bias).load)
    loads = [step(bias)]
    for _ in range(300):
        bias = update_bias(bias, loads[-1], router.bias_update_rate)
        loads.append(step(bias))
    # Each step moves every bias, so that single loads swing around the even one.
    assert np.max(loads[0]) > 3 * np.mean(loads[0])
    assert np.mean(loads[-50:], axis=0).max() < 1.5 * np.mean(loads[0])


def test_jitter_needs_a_key(rng):
    (x, kernel), router = draw(rng), Router(jitter=0.2)
    plain = route(x, kernel, top_k=2, router=Router())
    still = route(x, kernel, top_k=2, router=router)
    noisy = route(x, kernel, top_k=2, router=router, jitter_key=jax.random.key(0))
    np.testing.assert_array_equal(plain.topk_weights, still.topk_weights)
    assert np.abs(noisy.topk_weights - still.topk_weights).max() > 1e-3


def test_math_is_float32_for_bfloat16_tokens(rng):
    x, kernel = draw(rng)
    x = x.astype(jnp.bfloat16)
    low = route(x, kernel, top_k=2, router=Router())
    high = route(x.astype(jnp.float32), kernel, top_k=2, router=Router())
    assert low.topk_weights.dtype == jnp.float32
    np.testing.assert_array_equal(low.topk_weights, high.topk_weights)
