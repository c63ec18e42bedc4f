"""Whole models of the generation example against transformers: logits and generated tokens."""

import pytest

pytest.importorskip("torch", reason="compares with transformers, which needs torch")
pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

import numpy as np
import whole_models
from models import tiny
from models.generation import Generator
from models.tokens import pad

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", [*tiny.CONFIGS, *whole_models.VARIANTS])
def test_logits_are_equal(name, tmp_path, record_property):
    folder = whole_models.write(tmp_path, name)
    expected = whole_models.by_transformers(folder)
    for ranks in (1, 2, 8) if name in tiny.CONFIGS else (2,):
        whole, cached = whole_models.evaluate(folder, ranks)
        plain = whole_models.difference(np.concatenate(whole), np.concatenate(expected))
        kept = whole_models.difference(cached, whole_models.at_places(expected))
        record_property(f"R={ranks}", f"{plain:.1e} without cache, {kept:.1e} with it")
        print(f"{name} R={ranks}: {plain:.1e} without cache, {kept:.1e} with it")
        assert plain < TOLERANCE
        assert kept < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_generated_tokens_are_equal(name, tmp_path):
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    new_tokens = 6
    folder, mesh = whole_models.write(tmp_path, name), whole_models.mesh_of(2)
    tokens, mask = pad(whole_models.PROMPTS, "left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )[:, tokens.shape[1] :]
    with jax.set_mesh(mesh):
        generator = Generator(
            whole_models.load(folder, mesh),
            mesh,
            batch=len(tokens),
            length=tokens.shape[1],
            new_tokens=new_tokens,
        )
        texts = generator.start(tokens, mask, seed=0)
        generated = [np.asarray(texts.last)]
        for _ in range(new_tokens - 1):
            texts = generator.step(texts)
            generated.append(np.asarray(texts.last))
    np.testing.assert_array_equal(np.stack(generated, axis=1), expected.numpy())
