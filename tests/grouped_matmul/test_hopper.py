"""The Hopper kernels without a GPU: interpreted, and lowered for one that is not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import PartitionSpec as P

from freeio_jax.grouped_matmul import Product, grouped_matmul, use
from freeio_jax.grouped_matmul.hopper import hopper, obstacle

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

INTERPRETER = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="this JAX's interpreter of GPU kernels does not know transposed references",
)


def interpreted(product, left, right, sizes, **options):
    run = jax.jit(
        lambda *args: hopper(
            product, *args, num_ctas=2, interpret=plgpu.InterpretGPUParams(), **options
        )
    )
    return np.asarray(run(left, right, jnp.asarray(sizes, jnp.int32)), np.float32)


def draw(rng, product, num_rows, k, n, sizes, dtype):
    """Operands; rows past the last group are NaN."""
    shapes = {"a": (num_rows, k), "b": (num_rows, n), "w": (len(sizes), k, n)}
    operands = []
    for name in product.operands:
        values = rng.normal(size=shapes[name]).astype(np.float32)
        if name != "w":
            values[sum(sizes) :] = np.nan
        operands.append(jnp.asarray(values, dtype))
    return operands


def expected(product, left, right, sizes):
    """Group by group in float32, by numpy."""
    left, right = (np.asarray(a, np.float32) for a in (left, right))
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if product == Product.WEIGHTS_GRADIENT:
        return np.stack([left[span].T @ right[span] for span in spans])
    right = right if product == Product.FORWARD else right.transpose(0, 2, 1)
    out = np.zeros((len(left), right.shape[2]), np.float32)
    for span, matrix in zip(spans, right, strict=True):
        out[span] = left[span] @ matrix
    return out


def assert_close(got, want):
    """To a hundredth of the largest entry, which roundings of 16-bit results are far below."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-2 * max(np.abs(want).max(), 1e-30))


SIZES = {
    "uneven": (256, (100, 0, 37, 60)),
    "one group with all rows": (256, (0, 256, 0)),
    "no rows": (136, (0, 0)),
    "fewer rows than a tile, unaligned": (77, (3, 61, 0, 9)),
}


@INTERPRETER
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("product", Product)
def test_products(product, name, rng):
    num_rows, sizes = SIZES[name]
    operands = draw(rng, product, num_rows, 128, 256, sizes, jnp.bfloat16)
    assert_close(interpreted(product, *operands, sizes), expected(product, *operands, sizes))


@INTERPRETER
def test_float16(rng):
    sizes = (5, 90)
    operands = draw(rng, Product.FORWARD, 128, 128, 128, sizes, jnp.float16)
    assert_close(
        interpreted(Product.FORWARD, *operands, sizes), expected(Product.FORWARD, *operands, sizes)
    )


@INTERPRETER
def test_nan_in_one_groups_rows_is_in_no_other_groups_gradient(rng):
    sizes = (100, 37, 60)
    left, right = draw(rng, Product.WEIGHTS_GRADIENT, 256, 128, 128, sizes, jnp.bfloat16)
    left, right = (a.at[jnp.array([100, 136])].set(jnp.inf) for a in (left, right))
    got = interpreted(Product.WEIGHTS_GRADIENT, left, right, sizes)
    want = expected(Product.WEIGHTS_GRADIENT, left, right, sizes)
    assert not np.isfinite(got[1]).all()
    for group in (0, 2):
        assert_close(got[group], want[group])


@pytest.mark.parametrize("width", [128, 256, 384])
@pytest.mark.parametrize("product", Product)
def test_lowers_for_a_gpu_that_is_not_here(product, width):
    shapes = {"a": (1000, 256), "b": (1000, width), "w": (8, 256, width)}
    args = [jax.ShapeDtypeStruct(shapes[name], jnp.bfloat16) for name in product.operands]
    function = jax.jit(lambda *args: hopper(product, *args, num_ctas=132))
    traced = function.trace(*args, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_inside_a_shard_map_that_checks_what_varies():
    mesh = make_mesh(2)
    spec = P("expert")

    def loss(a, w, s):
        return jax.lax.psum(jnp.sum(grouped_matmul(a, w, s).astype(jnp.float32)), "expert")

    grads = jax.shard_map(
        jax.grad(loss, (0, 1)), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True
    )
    shapes = [((512, 128), jnp.bfloat16), ((4, 128, 256), jnp.bfloat16), ((4,), jnp.int32)]
    with use("hopper"):
        traced = jax.jit(grads).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("freeio_grouped_outer") and text.count("freeio_grouped_multiply_transposed")


def test_lowers_whatever_jaxs_settings_are():
    shapes = [((512, 128), jnp.bfloat16), ((4, 128, 256), jnp.bfloat16), ((4,), jnp.int32)]

    def loss(a, w, s):
        return jnp.sum(grouped_matmul(a, w, s).astype(jnp.float32))

    with (
        use("hopper"),
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(
            *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
        )
        assert "freeio_grouped_outer" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_does_not_fit():
    assert obstacle(Product.FORWARD, jnp.dtype(jnp.bfloat16), (7168, 4096)) is None
    assert obstacle(Product.FORWARD, jnp.dtype(jnp.float16), None) is None
    assert "not float32" in obstacle(Product.FORWARD, jnp.dtype(jnp.float32), (128, 128))
    assert "K=100" in obstacle(Product.FORWARD, jnp.dtype(jnp.bfloat16), (100, 128))
    assert "N=64" in obstacle(Product.WEIGHTS_GRADIENT, jnp.dtype(jnp.bfloat16), (128, 64))


@pytest.mark.parametrize("product", Product)
def test_nothing_to_multiply(product):
    shapes = {"a": (0, 128), "b": (0, 128), "w": (3, 128, 128)}
    operands = (jnp.ones(shapes[name], jnp.bfloat16) for name in product.operands)
    got = hopper(product, *operands, jnp.zeros(3, jnp.int32))
    assert got.shape in ((0, 128), (3, 128, 128)) and not got.any()
