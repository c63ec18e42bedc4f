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


def write_layer(folder: Path, name: str, fixture: Path, rng: np.random.Generator) -> None:
    """A checkpoint whose MoE layer has quantized experts, of a fixture in float32.

    mxfp4 has blocks of 32 values, more than the fixtures' widths. So it has weights of its own.
    """
    ckpt = hf.open(fixture)
    config = ckpt.config | {"quantization_config": CONFIG[name]}
    tensors = {n: np.array(ckpt.tensor(n)) for n in ckpt.names()}
    start = "model.layers.1.mlp"
    if name == "fp8":
        for weight in [n for n in tensors if ".experts." in n]:
            tensors[weight] = tensors[weight].astype(ml_dtypes.float8_e4m3fn)
            grid = [-(-n // b) for n, b in zip(tensors[weight].shape, (4, 8), strict=True)]
            scales = np.exp(rng.normal(size=grid)).astype(np.float32)
            tensors[f"{weight}_scale_inv"] = scales
    else:
        config |= {"hidden_size": 32, "intermediate_size": 32}
        shapes = {"router.weight": (4, 32), "router.bias": (4,)}
        shapes |= {"experts.gate_up_proj_bias": (4, 64), "experts.down_proj_bias": (4, 32)}
        tensors = {f"{start}.{n}": rng.normal(size=s) for n, s in shapes.items()}
        tensors = {n: array.astype(np.float32) for n, array in tensors.items()}
        for projection, width in (("gate_up_proj", 64), ("down_proj", 32)):
            blocks = rng.integers(0, 256, size=(4, width, 1, 16)).astype(np.uint8)
            scales = rng.integers(120, 130, size=(4, width, 1)).astype(np.uint8)
            tensors[f"{start}.experts.{projection}_blocks"] = blocks
            tensors[f"{start}.experts.{projection}_scales"] = scales
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.write(folder / "model.safetensors", tensors)


#: Fixtures whose families are published in these formats.
FIXTURE_OF = {"fp8": "deepseek_v3", "mxfp4": "gpt_oss"}


def assert_equal(folder: Path, dtype: str) -> None:
    """Checks that the reader gives the very bits of ``expected.safetensors``."""
    ckpt = hf.open(folder)
    (name,) = ckpt.names()
    expected = safetensors.SafetensorsFile(folder / "expected.safetensors").tensor(dtype)
    got = np.ascontiguousarray(ckpt.tensor(name, dtype=expected.dtype))
    assert got.shape == ckpt.shape(name) == expected.shape
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
