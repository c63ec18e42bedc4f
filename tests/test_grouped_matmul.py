"""grouped_matmul, by each implementation that runs here, against one group at a time."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from freeio_jax.grouped_matmul import grouped_matmul, implementation

module = importlib.import_module("freeio_jax.grouped_matmul")

SIZES = {
    "even": (100, [25, 25, 25, 25]),
    "rows left over": (300, [70, 3, 64, 65]),
    "empty groups": (130, [0, 129, 0, 1]),
    "all empty": (10, [0, 0, 0, 0]),
    "fewer rows than a tile": (7, [1, 0, 2, 2]),
    "no rows": (0, [0, 0, 0, 0]),
}


@pytest.fixture(params=["this platform's", "ragged_dot"])
def chosen(request, monkeypatch):
    """The implementation of this platform, or lax.ragged_dot, which every platform has."""
    if request.param == "ragged_dot":
        default = implementation("default")
        monkeypatch.setattr(module, "implementation", lambda platform: default)


def draw(rng, num_rows, num_groups, k=24, n=40, dtype=jnp.float32):
    rows, weights = rng.normal(size=(num_rows, k)), rng.normal(size=(num_groups, k, n))
    return jnp.asarray(rows, dtype), jnp.asarray(weights, dtype)


def expected_product(rows, weights, sizes):
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows, weights = (np.asarray(a, np.float64) for a in (rows, weights))
    out = np.zeros((len(rows), weights.shape[2]))
    out[: len(group)] = np.einsum("mk,mkn->mn", rows[: len(group)], weights[group])
    return out


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("name", SIZES)
def test_product_and_gradients(name, rng):
    num_rows, sizes = SIZES[name]
    rows, weights = draw(rng, num_rows, len(sizes))
    used, group = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    cotangents = rng.normal(size=(num_rows, 40)).astype(np.float32)
    # Rows past the end may hold anything, in the gradient as well.
    dirty = rows.at[used:].set(jnp.nan)
    product, vjp = jax.vjp(lambda r, w: grouped_matmul(r, w, jnp.array(sizes)), dirty, weights)
    np.testing.assert_allclose(product, expected_product(rows, weights, sizes), atol=1e-4)
    d_rows, d_weights = vjp(jnp.asarray(cotangents))
    expected = np.zeros((num_rows, 24))
    expected[:used] = np.einsum("mn,mkn->mk", cotangents[:used], np.asarray(weights)[group])
    np.testing.assert_allclose(d_rows, expected, atol=1e-4)
    for g in range(len(sizes)):
        of_g = np.flatnonzero(group == g)
        expected = np.asarray(rows)[of_g].T @ cotangents[of_g]
        np.testing.assert_allclose(d_weights[g], expected, atol=1e-4)


@pytest.mark.usefixtures("chosen")
def test_second_derivatives(rng):
    sizes = jnp.array([30, 0, 41], jnp.int32)
    rows, weights = draw(rng, 90, 3, 4, 5)
    mask = (jnp.arange(90) < 71)[:, None]
    group = jnp.repeat(jnp.arange(3), jnp.array([30, 0, 60]), total_repeat_length=90)

    def grouped(rows, weights):
        return grouped_matmul(rows, weights, sizes)

    def plain(rows, weights):
        return jnp.where(mask, jnp.einsum("mk,mkn->mn", rows, weights[group]), 0)

    def of_gradients(product):
        def loss(rows, weights):
            return jnp.sum(jnp.sin(product(rows, weights)))

        def norm(rows, weights):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(loss, (0, 1))(rows, weights))

        return jax.grad(norm, (0, 1))(rows, weights)

    for got, expected in zip(of_gradients(grouped), of_gradients(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma, rng):
    """Weights that are replicated over an axis get the sum of its gradients."""
    explicit = (AxisType.Explicit, AxisType.Explicit)
    mesh = make_mesh((2, 2), ("data", "expert"), axis_types=explicit)
    rows, weights = draw(rng, 4 * 50, 4)
    sizes = np.array([[10, 20], [0, 45], [50, 0], [1, 2]], np.int32)  # by (data, expert)

    def loss(rows, weights, sizes):
        product = grouped_matmul(rows, weights, sizes)
        return jax.lax.psum(jnp.sum(jnp.sin(product)), ("data", "expert"))

    specs = P(("data", "expert")), P("expert"), P(("data", "expert"))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    with jax.set_mesh(mesh):
        arguments = [
            jax.device_put(a, s)
            for a, s in zip((rows, weights, jnp.asarray(sizes.reshape(-1))), specs, strict=True)
        ]
        grads = jax.jit(jax.grad(sharded, (0, 1)))(*arguments)

    def whole(rows, weights):
        total = 0.0
        for shard in range(4):
            expert = slice(2 * (shard % 2), 2 * (shard % 2) + 2)
            local = rows[50 * shard : 50 * (shard + 1)]
            total += jnp.sum(jnp.sin(grouped_matmul(local, weights[expert], sizes[shard])))
        return total

    for got, expected in zip(grads, jax.grad(whole, (0, 1))(rows, weights), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-4)


def test_bfloat16_sums_in_float32(rng):
    sizes = [100, 28]
    rows, weights = draw(rng, 128, 2, 512, 8, jnp.bfloat16)
    product = grouped_matmul(rows, weights, jnp.array(sizes))
    expected = expected_product(rows, weights, sizes)
    assert product.dtype == jnp.bfloat16
    np.testing.assert_allclose(product.astype(np.float32), expected, rtol=2**-8, atol=1e-3)


def test_vmap(rng):
    rows, weights = draw(rng, 60, 2)
    sizes = jnp.array([[10, 20], [60, 0], [0, 7]], jnp.int32)
    got = jax.vmap(lambda s: grouped_matmul(rows, weights, s))(sizes)
    for g, s in zip(got, sizes, strict=True):
        np.testing.assert_allclose(g, expected_product(rows, weights, s), atol=1e-4)


def test_wrong_arguments():
    rows, weights, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        grouped_matmul(rows, weights[:, :2], sizes)
    with pytest.raises(ValueError, match="2 groups"):
        grouped_matmul(rows, weights, jnp.array([1]))
    with pytest.raises(TypeError, match="int32"):
        grouped_matmul(rows, weights, jnp.array([1.0, 2.0]))
    with pytest.raises(TypeError, match="floating"):
        grouped_matmul(rows.astype(int), weights.astype(int), sizes)


def test_the_choice_is_made_once_and_explained():
    assert implementation("cpu") is implementation("cpu")
    assert implementation("cpu").name != implementation("default").name
    assert implementation("cpu").reason


def test_a_candidate_is_tried_out_first():
    default = implementation("default")
    module._try_out(default)
    wrong = dataclasses.replace(default, outer=lambda *args: 2 * default.outer(*args))
    with pytest.raises(ValueError, match="wrong result of outer"):
        module._try_out(wrong)


def test_a_product_may_forget_what_its_operands_vary_over(monkeypatch):
    """As tokamax's gradient does: beside it, in the same program, is this platform's own."""

    def forgets(shape_of):
        return lambda rows, other, sizes, **_: jnp.zeros(shape_of(rows, other, sizes), rows.dtype)

    forgetful = dataclasses.replace(
        implementation("default"),
        multiply=forgets(lambda rows, weights, _: (len(rows), weights.shape[2])),
        outer=forgets(lambda r, c, sizes: (len(sizes), r.shape[1], c.shape[1])),
    )
    own = implementation("cpu")
    monkeypatch.setattr(
        module, "implementation", lambda platform: own if platform == "cpu" else forgetful
    )
    rows, weights = jnp.ones((8, 4)), jnp.ones((4, 4, 4))
    spec = P("expert")

    def loss(rows, weights):
        product = grouped_matmul(rows, weights, jnp.array([3, 1]))
        return jax.lax.psum(product.sum(), "expert")

    mapped = jax.shard_map(jax.grad(loss, (0, 1)), mesh=make_mesh(2), in_specs=spec, out_specs=spec)
    d_rows, d_weights = jax.jit(mapped)(rows, weights)
    assert (d_rows.shape, d_weights.shape) == (rows.shape, weights.shape)


def test_a_gpu_without_tokamax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    chosen = implementation.__wrapped__("gpu")
    assert chosen.name == "jax.lax.ragged_dot"
    assert "pip install tokamax" in chosen.reason
