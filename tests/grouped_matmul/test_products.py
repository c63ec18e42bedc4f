"""grouped_matmul, by each implementation that runs here, against one group at a time."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from freeio_jax.grouped_matmul import Product, grouped_matmul, ragged, trial, use

SIZES = {
    "even": (100, [25, 25, 25, 25]),
    "rows left over": (300, [70, 3, 64, 65]),
    "empty groups": (130, [0, 129, 0, 1]),
    "all empty": (10, [0, 0, 0, 0]),
    "fewer rows than a tile": (7, [1, 0, 2, 2]),
    "no rows": (0, [0, 0, 0, 0]),
}


@pytest.fixture(params=["this platform's", "ragged_dot", "tiled"])
def chosen(request):
    """The implementation of this platform, or one that every platform has."""
    own = request.param == "this platform's"
    with contextlib.nullcontext() if own else use(request.param):
        yield


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
    # So may the weights of groups without rows.
    unused = jnp.where((jnp.array(sizes) > 0)[:, None, None], weights, jnp.nan)
    product, vjp = jax.vjp(lambda r, w: grouped_matmul(r, w, jnp.array(sizes)), dirty, unused)
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


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mapped", ["sizes", "rows and sizes", "all", "weights"])
def test_vmap(mapped, jit, rng):
    drawn = [draw(rng, 60, 2) for _ in range(3)]
    rows, weights = (jnp.stack(arrays) for arrays in zip(*drawn, strict=True))
    sizes = jnp.array([[10, 20], [60, 0], [0, 7]], jnp.int32)
    axes = [0 if mapped == "all" or n in mapped else None for n in ("rows", "weights", "sizes")]
    args = [a if d == 0 else a[0] for a, d in zip((rows, weights, sizes), axes, strict=True)]

    def both(rows, weights, sizes):
        product, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, sizes), rows, weights)
        return product, pull(product)

    batched = jax.vmap(both, axes)
    got = (jax.jit(batched) if jit else batched)(*args)
    for i in range(3):
        expected = both(*(a[i] if d == 0 else a for a, d in zip(args, axes, strict=True)))
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(g[i], e, rtol=1e-5, atol=1e-4)


def plain_product(sizes, num_rows):
    """The same in plain jax.numpy, which JAX knows how to differentiate."""
    group = np.repeat(np.arange(len(sizes)), sizes)

    def product(rows, weights):
        out = jnp.einsum("mk,mkn->mn", rows[: len(group)], weights[group])
        return jnp.pad(out, ((0, num_rows - len(group)), (0, 0)))

    return product


DERIVATIVES = {
    "jvp": lambda f, *args: jax.jvp(f, args, args)[1],
    "jvp of rows": lambda f, rows, weights: jax.jvp(lambda r: f(r, weights), (rows,), (rows,))[1],
    "linearize": lambda f, *args: jax.linearize(f, *args)[1](*args),
    "transpose of linearize": lambda f, *args: jax.linear_transpose(
        jax.linearize(f, *args)[1], *args
    )(f(*args)),
    "jacfwd": lambda f, rows, weights: jax.jacfwd(f, 1)(rows, weights),
    "forward over reverse": lambda f, *args: jax.jvp(
        jax.grad(lambda r, w: jnp.sum(jnp.sin(f(r, w))), (0, 1)), args, args
    )[1],
    "reverse over forward": lambda f, *args: jax.grad(
        lambda r, w: jnp.sum(jnp.sin(jax.jvp(f, (r, w), (r, w))[1])), (0, 1)
    )(*args),
    "hessian": lambda f, rows, weights: jax.hessian(lambda w: jnp.sum(jnp.sin(f(rows, w))))(
        weights
    ),
    "third order": lambda f, rows, weights: jax.jvp(
        jax.jacrev(lambda r: jax.jvp(lambda r: jnp.sum(jnp.sin(f(r, weights))), (r,), (r,))[1]),
        (rows,),
        (rows,),
    )[1],
}


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_in_both_modes(name, rng):
    sizes = [7, 0, 11]
    rows, weights = draw(rng, 20, 3, 4, 5)
    derivative = DERIVATIVES[name]
    plain = plain_product(sizes, 20)

    def grouped(rows, weights):
        return grouped_matmul(rows, weights, jnp.array(sizes))

    def run(f):
        return jax.jit(lambda *args: derivative(f, *args))(rows, weights)

    for got, expected in zip(
        jax.tree.leaves(run(grouped)), jax.tree.leaves(run(plain)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_forward_mode_inside_shard_map(rng):
    """Tangents of rows and of replicated weights vary over other axes than the values do."""
    mesh = make_mesh(2)
    rows, weights = draw(rng, 40, 2, 4, 5)
    sizes = jnp.array([9, 11, 20, 0], jnp.int32)

    def tangent(rows, weights, sizes):
        f = lambda r, w: grouped_matmul(r, w, sizes)  # noqa: E731
        return jax.jvp(f, (rows, weights), (jnp.ones_like(rows), weights))[1]

    specs = P("expert"), P(), P("expert")
    mapped = jax.shard_map(tangent, mesh=mesh, in_specs=specs, out_specs=P("expert"))
    got = jax.jit(mapped)(rows, weights, sizes)
    for shard in range(2):
        part = slice(20 * shard, 20 * shard + 20)
        expected = tangent(rows[part], weights, sizes[2 * shard : 2 * shard + 2])
        np.testing.assert_allclose(got[part], expected, rtol=1e-5, atol=1e-5)


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


def test_operands_sharded_over_explicit_axes_are_refused():
    mesh = make_mesh(2, axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((4, 3)), P("expert"))
        with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
            grouped_matmul(rows, jnp.ones((2, 3, 5)), jnp.array([1, 2]))


def test_an_implementation_that_is_not_there():
    with use("cutlass"), pytest.raises(ValueError, match="'cutlass' does not serve on cpu"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 2]))


class AsTokamax:
    """A module with tokamax's interface, and the fault of its float32 product on GPUs."""

    @staticmethod
    def ragged_dot_general(left, right, group_sizes, *, ragged_dot_dimension_numbers, **options):
        options.pop("manual_axis_type")
        leak = 0 * jnp.sum(right) if right.ndim == 3 else 0
        return leak + lax.ragged_dot_general(
            left, right, group_sizes, ragged_dot_dimension_numbers, **options
        )


@pytest.mark.parametrize("product", [Product.FORWARD, Product.ROWS_GRADIENT])
@pytest.mark.parametrize("multiply", [ragged.ragged, ragged.by_tokamax])
def test_weights_of_groups_without_rows_reach_no_result(multiply, product, monkeypatch, rng):
    """Unless they are left as they are, as the benchmark does to time what others ship."""
    monkeypatch.setitem(sys.modules, "tokamax", AsTokamax)
    sizes = jnp.array([30, 0, 41], jnp.int32)
    rows, weights = draw(rng, 90, 3, 8, 8)
    dirty = weights.at[1].set(jnp.nan)
    evaluate = trial.per_shard(functools.partial(multiply, product))
    np.testing.assert_array_equal(evaluate(rows, dirty, sizes), evaluate(rows, weights, sizes))
    as_shipped = trial.per_shard(functools.partial(multiply, product, guarded=False))
    assert np.isnan(as_shipped(rows, dirty, sizes)[:71]).all()
