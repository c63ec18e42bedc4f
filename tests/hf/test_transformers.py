"""The layers with a checkpoint's weights, against the MoE blocks of transformers that wrote it.

Output and all gradients in float32, as a share of the largest value."""

import pytest

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny_models  # noqa: E402
from flax import nnx  # noqa: E402
from helpers import make_mesh  # noqa: E402
from jax.sharding import AxisType  # noqa: E402

from freeio_jax import hf  # noqa: E402
from freeio_jax.flax import linen  # noqa: E402
from freeio_jax.flax import nnx as fio_nnx  # noqa: E402

TOLERANCE = 1e-5


def largest_difference(got, expected):
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_family(name, tmp_path, rng, record_property):
    seed = int(rng.integers(2**31))
    model = tiny_models.make(name, seed)
    layer, block = tiny_models.moe_block(model)
    model.save_pretrained(tmp_path / "model")
    ckpt = hf.open(tmp_path / "model")
    assert layer in hf.moe_layers(ckpt)

    x = rng.normal(size=(4, 6, hf.moe_options(ckpt.config, layer)["width"])).astype(np.float32)
    weight = rng.normal(size=x.shape).astype(np.float32)
    y, dx = tiny_models.output_and_gradients(block, x, weight)
    # The gradients are saved as a model of their own, so that loading brings them into our layout.
    tiny_models.replace_by_gradients(model)
    model.save_pretrained(tmp_path / "gradients")
    gradients = hf.open(tmp_path / "gradients")

    def loss(parameters, x, bias, apply):
        y = apply(parameters, bias, x)
        return jnp.sum(y * weight), y

    def by_linen(parameters, bias, x):
        module = linen.MoE.from_hf(ckpt.config, layer)
        return module.apply(hf.Weights(parameters, bias).linen, x, deterministic=True)

    def by_nnx(parameters, bias, x):
        module = nnx.eval_shape(lambda: fio_nnx.MoE.from_hf(ckpt.config, layer, rngs=nnx.Rngs(0)))
        nnx.update(module, hf.Weights(parameters, bias).nnx)
        return module(x, deterministic=True)

    worst = 0
    for apply, num_devices in ((by_linen, 1), (by_nnx, 4)):
        with jax.set_mesh(make_mesh(num_devices, axis_types=(AxisType.Auto,))):
            weights = hf.load_moe(ckpt, layer)
            d_weights = hf.load_moe(gradients, layer).parameters
            step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=3)
            (d_parameters, d_x), got = step(weights.parameters, jnp.asarray(x), weights.bias, apply)
            compared = {"y": (got, y), "dx": (d_x, dx)}
            compared |= {n: (d_parameters[n], d_weights[n]) for n in d_weights}
        for what, (got, expected) in compared.items():
            got, expected = np.asarray(got), np.asarray(expected)
            assert np.abs(expected).max() > 1e-4, f"{what} says nothing"
            difference = largest_difference(got, expected)
            assert difference < TOLERANCE, f"{what}: {difference}"
            worst = max(worst, difference)
    record_property("largest difference", float(worst))
