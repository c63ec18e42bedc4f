"""The experts' product on GPUs, at real sizes, against float32: every product, and layers by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.moe import moe
from freeio_jax.grouped_matmul import Product, choose, grouped_matmul, trial, use


def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300, method="thread"),
    pytest.mark.skipif(not gpus(), reason="needs NVIDIA GPUs, and JAX finds none"),
]

#: Rows, widths, sizes of groups: the smallest input that has shown wrong gradients, and layers'.
PROBLEMS = {
    "uneven": (4224, 512, 512, (505, 483, 521, 551, 500, 516, 511, 525)),
    "aligned": (4096, 512, 512, (512, 896, 256, 768, 384, 384, 640, 256)),
    "empty and one large": (5000, 256, 640, (0, 4321, 0, 1, 63, 0)),
    "no rows": (777, 128, 128, (0, 0, 0)),
    "widths that do not fit": (1000, 200, 72, (300, 0, 457)),
    "a layer's": (32768, 7168, 4096, None),
    "a layer's second": (32768, 2048, 7168, None),
}


def sizes_of(name, rng):
    *shape, sizes = PROBLEMS[name]
    if sizes is None:
        sizes = rng.multinomial(shape[0] - 100, rng.dirichlet(np.full(64, 5.0)))
    return shape, jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("product", Product)
def test_what_serves_is_right(product, name, dtype, rng):
    (num_rows, k, n), sizes = sizes_of(name, rng)
    if dtype == jnp.float16 and num_rows > 8192:
        pytest.skip("one large problem for each product is enough")
    problem = trial.Problem(num_rows, k, n, (tuple(map(int, sizes)),))
    draw = jax.jit(trial.draw_operands, static_argnums=(0, 1, 2))
    operands = draw(product, problem, jnp.dtype(dtype), sizes, 3)
    by = choose("cuda", product, dtype, (k, n)).implementation.name
    result = trial.evaluate(product, by)(*operands, sizes)
    assert float(trial.error(product, result, *operands, sizes)) <= trial.TOLERANCE
    if product != Product.WEIGHTS_GRADIENT:
        assert not result[int(sizes.sum()) :].any()


def test_nan_in_one_groups_rows_is_in_no_other_groups_gradient(rng):
    sizes = (100, 300, 412)
    left, right = (jnp.asarray(rng.normal(size=(1024, n)), jnp.bfloat16) for n in (256, 512))
    dirty = right.at[jnp.array([100, 399])].set(jnp.nan)
    product = Product.WEIGHTS_GRADIENT
    if choose("cuda", product, jnp.bfloat16, (256, 512)).implementation.name != "hopper":
        pytest.skip("only the own kernels promise it")
    multiply = trial.evaluate(product, "hopper")
    clean, got = (multiply(left, b, jnp.array(sizes, jnp.int32)) for b in (right, dirty))
    assert jnp.isnan(got[1]).any()
    for group in (0, 2):
        np.testing.assert_array_equal(got[group], clean[group])


def test_hopper_serves_on_hopper():
    if str(gpus()[0].compute_capability) != "9.0":
        pytest.skip("there is no Hopper GPU")
    for product in Product:
        chosen = choose("cuda", product, jnp.bfloat16, (7168, 4096))
        assert chosen.implementation.name == "hopper", chosen.reason


def test_derivatives_in_both_modes(rng):
    """Against the same in plain XLA, which was compared with numpy on CPU."""
    rows, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((600, 128), (4, 128, 256))
    )
    sizes = jnp.array([200, 0, 131, 250], jnp.int32)

    def run(by):
        def loss(rows, weights):
            return jnp.sum(jnp.sin(grouped_matmul(rows, weights, sizes).astype(jnp.float32) / 16))

        with use(by):
            both = jax.value_and_grad(loss, (0, 1))
            return jax.jit(lambda *args: jax.jvp(both, args, args))(rows, weights)

    for got, want in zip(jax.tree.leaves(run(None)), jax.tree.leaves(run("tiled")), strict=True):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        np.testing.assert_allclose(got, want, atol=2e-2 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize(
    "tokens, hidden, width, num_experts, top_k",
    [(2048, 2048, 1408, 64, 6), (1024, 7168, 2048, 32, 8)],
)
def test_gradients_of_a_layer_at_real_widths(tokens, hidden, width, num_experts, top_k, rng):
    """bfloat16 experts with random routing, against the same layer in float32."""
    ranks = max(n for n in (1, 2, 4, 8) if n <= len(gpus()))
    mesh = jax.make_mesh((ranks,), ("expert",), (AxisType.Auto,), devices=gpus()[:ranks])
    config = MoEConfig(num_experts, top_k, width, dtype=jnp.bfloat16)
    keys = iter(jax.random.split(jax.random.key(int(rng.integers(2**31))), 8))
    parameters = {}
    for name, (shape, axes) in config.parameters(hidden).items():
        values = jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[-2] ** -0.5
        parameters[name] = jax.device_put(values, jax.NamedSharding(mesh, P(*axes)))
    x = jax.random.normal(next(keys), (tokens, hidden), jnp.bfloat16)
    cotangent = jax.random.normal(next(keys), x.shape, jnp.float32)

    def gradients(dtype, exchange):
        own = MoEConfig(num_experts, top_k, width, dtype=dtype, exchange=exchange)

        def loss(parameters, x):
            y, _ = moe(parameters, x, own, mesh=mesh)
            return jnp.sum(y.astype(jnp.float32) * cotangent)

        cast = jax.tree.map(lambda a: a.astype(dtype), parameters)
        grads = jax.jit(jax.grad(loss, (0, 1)))(cast, x.astype(dtype))
        return jax.tree.map(lambda a: np.asarray(a, np.float32), grads)

    (got, got_x), (want, want_x) = (
        gradients(jnp.bfloat16, None),
        gradients(jnp.float32, fio.reference),
    )
    for name in ("gate_up", "down"):
        axes = tuple(range(1, got[name].ndim))
        off, scale = np.abs(got[name] - want[name]).max(axes), np.abs(want[name]).max(axes)
        assert (off <= 0.03 * scale).all(), (name, (off / scale).max())
    assert np.abs(got_x - want_x).max() <= 0.03 * np.abs(want_x).max()
