"""The layers with a checkpoint's weights, against the MoE blocks of transformers that wrote it."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="compares with transformers, which needs torch")
pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

import compare
import numpy as np
import quantize
import tiny_models
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from freeio_jax import hf
from freeio_jax.hf.__main__ import main
from freeio_jax.hf.check import differences, moe_function
from freeio_jax.hf.families import FAMILIES
from freeio_jax.hf.family import Key, Times
from freeio_jax.hf.options import family_of, look_up


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_family(name, tmp_path, rng, record_property):
    model = tiny_models.make(name, seed=int(rng.integers(2**31)))
    model.save_pretrained(tmp_path / "model")
    ckpt = hf.open(tmp_path / "model")
    layer = hf.moe_layers(ckpt)[-1]
    width = hf.moe_options(ckpt.config, layer)["width"]
    x, weight = rng.normal(size=(2, 4, 6, width)).astype(np.float32)
    y, dx = tiny_models.output_and_gradients(moe_function(model, layer), x, weight)
    # Saved as a model of their own, so that loading brings the gradients into the layer's layout.
    tiny_models.replace_by_gradients(model)
    model.save_pretrained(tmp_path / "gradients")
    gradients = hf.open(tmp_path / "gradients")
    difference = max(
        compare.largest_difference(apply, ranks, ckpt, gradients, layer, x, weight, y, dx)
        for apply, ranks in ((compare.by_linen, 1), (compare.by_core, 2), (compare.by_nnx, 4))
    )
    record_property("largest_difference", difference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", quantize.CONFIG)
def test_quantized_weights_are_bit_equal(name, dtype, tmp_path, rng):
    quantize.write(tmp_path / "ckpt", name, rng)
    quantize.assert_equal(tmp_path / "ckpt", dtype)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "deepseek_v3", "granitemoeshared"])
def test_check_compares_every_layer(name, tmp_path, capfd):
    model = tiny_models.make(name, seed=0)
    model.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    layers = hf.moe_layers(hf.open(tmp_path))
    out = capfd.readouterr().out
    assert layers
    for layer in layers:
        assert f"layer {layer}: largest difference from transformers" in out


def test_check_finds_a_difference(tmp_path, capfd):
    tiny_models.make("mixtral", seed=0).save_pretrained(tmp_path)
    ckpt = hf.open(tmp_path)
    ckpt.config["hidden_act"] = "gelu"  # what transformers does not see
    lines = list(differences(ckpt))
    assert [is_fault for _, _, is_fault in lines] == [True, True]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "dbrx"])
def test_transformers_reads_what_is_saved(name, tmp_path):
    model = tiny_models.make(name, seed=0)
    model.save_pretrained(tmp_path / "model")
    ckpt = hf.open(tmp_path / "model")
    layers = {n: hf.load_moe(ckpt, n) for n in hf.moe_layers(ckpt)}
    changed = {
        n: hf.Weights({k: a + 1 for k, a in weights.parameters.items()}, weights.bias)
        for n, weights in layers.items()
    }
    hf.save(tmp_path / "changed", ckpt, changed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed", dtype=torch.float32)
    experts = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert experts
    own, new = dict(model.named_parameters()), dict(again.named_parameters())
    for name, parameter in own.items():
        expected = (
            parameter + 1
            if name in experts or "router" in name or ".gate." in name
            else (parameter)
        )
        torch.testing.assert_close(new[name], expected, rtol=0, atol=1e-6)


def keys_of(family):
    """All settings that a family looks up."""
    found = [getattr(family, field.name) for field in dataclasses.fields(family)]
    found += [*family.router.values(), *(only.key for only in family.only)]
    for product in [value for value in found if isinstance(value, Times)]:
        found += product.factors
    return [value for value in found if isinstance(value, Key)]


@pytest.mark.parametrize(
    "model_type", [t for family in FAMILIES for t in family.model_types if t in CONFIG_MAPPING]
)
def test_defaults_are_those_of_transformers(model_type):
    """What an older config.json leaves out means the same as for transformers."""
    config = CONFIG_MAPPING[model_type]().to_dict()
    for key in keys_of(family_of({"model_type": model_type})):
        name, value = look_up(config, key)
        if key.is_required or value is None:
            continue
        value = key.values[value] if key.values else value
        assert key.default == value, f"{name} is {value!r} by default"
