"""The layers with a checkpoint's weights, against the MoE blocks of transformers that wrote it."""

import pytest

pytest.importorskip("torch", reason="compares with transformers, which needs torch")
pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

import compare
import numpy as np
import quantize
import tiny_models

from freeio_jax import hf


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_family(name, tmp_path, rng, record_property):
    model = tiny_models.make(name, seed=int(rng.integers(2**31)))
    layer, block = tiny_models.moe_block(model)
    model.save_pretrained(tmp_path / "model")
    ckpt = hf.open(tmp_path / "model")
    assert layer in hf.moe_layers(ckpt)

    width = hf.moe_options(ckpt.config, layer)["width"]
    x, weight = rng.normal(size=(2, 4, 6, width)).astype(np.float32)
    y, dx = tiny_models.output_and_gradients(block, x, weight)
    # Saved as a model of their own, so that loading brings the gradients into the layer's layout.
    tiny_models.replace_by_gradients(model)
    model.save_pretrained(tmp_path / "gradients")
    gradients = hf.open(tmp_path / "gradients")
    difference = max(
        compare.largest_difference(apply, ranks, ckpt, gradients, layer, x, weight, y, dx)
        for apply, ranks in ((compare.by_linen, 1), (compare.by_nnx, 4))
    )
    record_property("largest_difference", difference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", quantize.CONFIG)
def test_quantized_weights_are_bit_equal(name, dtype, tmp_path, rng):
    quantize.write(tmp_path / "ckpt", name, rng)
    quantize.assert_equal(tmp_path / "ckpt", dtype)
