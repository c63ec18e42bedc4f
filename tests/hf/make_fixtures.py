"""Writes tests/hf/fixtures: MoE layers of tiny models of transformers, and what they compute.

    python tests/hf/make_fixtures.py

It needs torch and transformers. Each folder has the model's config.json and the tensors of one MoE
layer in bfloat16, ``model.safetensors``. In ``expected.safetensors`` there are an input ``x``, the
output ``y``, and the gradients of ``sum(y * weight)``: ``dx``, and ``d.`` before a tensor's name.
Folders of quantized weights have the weights that transformers makes of them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import quantize
import tiny_models

from freeio_jax import hf
from freeio_jax.hf import safetensors
from freeio_jax.hf.check import moe_function

FIXTURES = Path(__file__).parent / "fixtures"

#: One of each kind of block or layout.
NAMES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "dbrx",
    "jamba",
    "hunyuan_v1_moe",
    "nemotron_h",
    "switch_transformers",
    "phimoe",
    "longcat_flash",
    "gemma4_text",
    "axk2",
    "beam",
    "cohere2_moe/sigmoid",
    "flint",
    "laguna",
    "qwen3_omni_moe_thinker",
    "step3p7",
)


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for seed, name in enumerate(NAMES):
        with tempfile.TemporaryDirectory() as folder:
            write_family(name, seed, Path(folder))
    for name in ("fp8", "mxfp4"):
        quantize.write(FIXTURES / name, name, np.random.default_rng(0))


def write_family(name: str, seed: int, temporary: Path) -> None:
    """Writes the folder of one family."""
    import torch

    model = tiny_models.make(name, seed, small=True)
    for array in (*model.parameters(), *model.buffers()):
        array.data = array.data.to(torch.bfloat16).to(array.dtype)
    model.save_pretrained(temporary / "model")
    ckpt = hf.open(temporary / "model")
    layer = hf.moe_layers(ckpt)[-1]
    width = hf.moe_options(ckpt.config, layer)["width"]
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(2, 3, 4, width)).astype(np.float32)
    y, dx = tiny_models.output_and_gradients(moe_function(model, layer), x, weight)
    tiny_models.replace_by_gradients(model)
    model.save_pretrained(temporary / "gradients")
    gradients = hf.open(temporary / "gradients")

    names = hf.tensors_of_layer(ckpt, layer)
    folder = FIXTURES / name.replace("/", "-")
    folder.mkdir(parents=True)
    shutil.copy(temporary / "model" / "config.json", folder)
    tensors = {n: ckpt.tensor(n).astype(ml_dtypes.bfloat16) for n in names}
    safetensors.write(folder / "model.safetensors", tensors)
    expected = {"x": x, "weight": weight, "y": y, "dx": dx}
    expected |= {f"d.{n}": gradients.tensor(n) for n in names}
    safetensors.write(folder / "expected.safetensors", expected)


if __name__ == "__main__":
    main()
