"""Quantized checkpoints of random bits, and the weights that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from freeio_jax import hf
from freeio_jax.hf import safetensors

CONFIG = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [4, 8]},
    "mxfp4": {"quant_method": "mxfp4"},
}


def draw(name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tensors of a quantized weight, of which some are as small or large as the format has them."""
    if name == "fp8":
        bits = rng.integers(0, 256, size=(12, 16)).astype(np.uint8)
        bits[(bits & 127) == 127] = 126  # not NaN
        scales = np.exp(rng.normal(size=(3, 2), scale=20)).astype(np.float32)
        return {"a.weight": bits.view(ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": scales}
    blocks = rng.integers(0, 256, size=(2, 4, 3, 16)).astype(np.uint8)
    scales = rng.integers(0, 255, size=(2, 4, 3)).astype(np.uint8)
    scales.flat[:6] = 0, 1, 2, 126, 127, 254
    return {"a_blocks": blocks, "a_scales": scales}


def dequantized(name: str, tensors: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    """The weight, by transformers."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dtype = getattr(torch, dtype)
    parts = [
        torch.tensor(array.view(np.uint8) if name == "fp8" and i == 0 else array)
        for i, array in enumerate(tensors.values())
    ]
    if name == "fp8":
        weight = parts[0].view(torch.float8_e4m3fn)
        out = Fp8Dequantize(None)._dequantize_one(weight, parts[1], dtype)
    else:
        out = convert_moe_packed_tensors(*parts, dtype=dtype)
    if dtype == torch.bfloat16:
        return out.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return out.numpy()


def write(folder: Path, name: str, rng: np.random.Generator) -> None:
    """A folder with a quantized checkpoint and ``expected.safetensors``."""
    folder.mkdir(parents=True)
    tensors = draw(name, rng)
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG[name]}) + "\n")
    safetensors.write(folder / "model.safetensors", tensors)
    expected = {dtype: dequantized(name, tensors, dtype) for dtype in ("bfloat16", "float32")}
    safetensors.write(folder / "expected.safetensors", expected)


def assert_equal(folder: Path, dtype: str) -> None:
    """Checks that the reader gives the very bits of ``expected.safetensors``."""
    ckpt = hf.open(folder)
    (name,) = ckpt.names()
    expected = safetensors.SafetensorsFile(folder / "expected.safetensors").tensor(dtype)
    got = np.ascontiguousarray(ckpt.tensor(name, dtype=expected.dtype))
    assert got.shape == ckpt.shape(name) == expected.shape
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
