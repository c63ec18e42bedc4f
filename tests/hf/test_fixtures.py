"""The layers with the fixtures' weights, against what transformers computed with them.

``make_fixtures.py`` has written the fixtures."""

from pathlib import Path

import compare
import pytest
import quantize

from freeio_jax import hf
from freeio_jax.hf import safetensors

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.name not in quantize.CONFIG)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name, tmp_path):
    ckpt = hf.open(FIXTURES / name)
    file = safetensors.SafetensorsFile(FIXTURES / name / "expected.safetensors")
    expected = {tensor: file.tensor(tensor) for tensor in file.names()}
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    gradients = {n: expected.pop(f"d.{n}") for n in ckpt.names()}
    safetensors.write(tmp_path / "model.safetensors", gradients)
    (layer,) = hf.moe_layers(ckpt)
    compare.largest_difference(compare.by_nnx, 4, ckpt, hf.open(tmp_path), layer, **expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", quantize.CONFIG)
def test_quantized_weights_are_bit_equal(name, dtype):
    quantize.assert_equal(FIXTURES / name, dtype)
