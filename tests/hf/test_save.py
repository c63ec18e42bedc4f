"""Saving: the same names, layouts and bytes, and the weights of the layers that were given."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantize
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax import hf
from freeio_jax.flax import linen
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import SwiGLU
from freeio_jax.hf import safetensors

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.name not in quantize.CONFIG)


def assert_same(got, expected):
    assert set(got.names()) == set(expected.names())
    for name in expected.names():
        a, b = got.tensor(name), expected.tensor(name)
        assert a.dtype == b.dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_round_trip(name, tmp_path):
    ckpt = hf.open(FIXTURES / name)
    (layer,) = hf.moe_layers(ckpt)
    weights = hf.load_moe(ckpt, layer, dtype=jnp.float32)
    hf.save(tmp_path / "same", ckpt, {layer: weights})
    assert_same(hf.open(tmp_path / "same"), ckpt)
    assert hf.open(tmp_path / "same").config == ckpt.config

    doubled = hf.Weights(jax.tree.map(lambda a: 2 * a, weights.parameters), weights.bias)
    hf.save(tmp_path / "doubled", ckpt, {layer: doubled})
    got = hf.load_moe(hf.open(tmp_path / "doubled"), layer, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, got.nnx, doubled.nnx)


@pytest.mark.parametrize("name", ["phimoe", "gemma4", "longcat_flash"])
def test_nnx_layers_with_routers_and_experts_of_their_own(name):
    """Routers that are no matrix, and one with more columns than there are experts."""
    ckpt = hf.open(next(path for path in FIXTURES.iterdir() if path.name.startswith(name)))
    (number,) = hf.moe_layers(ckpt)
    weights = hf.load_moe(ckpt, number, dtype=jnp.float32)
    layer = fio_nnx.MoE.from_hf(ckpt.config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    nnx.update(layer, weights.nnx)
    jax.tree.map(np.testing.assert_array_equal, hf.Weights.of_nnx(layer).nnx, weights.nnx)


def test_layers_of_linen_and_nnx(tmp_path):
    ckpt = hf.open(FIXTURES / "deepseek_v3")
    mesh = make_mesh(4, axis_types=(AxisType.Auto,))
    width = hf.moe_options(ckpt.config)["width"]
    with jax.set_mesh(mesh):
        weights = hf.load_moe(ckpt, 1, dtype=jnp.float32)
        layer = fio_nnx.MoE.from_hf(ckpt.config, rngs=nnx.Rngs(0))
        nnx.update(layer, weights.nnx)
        variables = linen.MoE.from_hf(ckpt.config).init(jax.random.key(0), jnp.ones((4, width)))
        hf.Weights.of_linen(variables)
    if jax.process_count() > 1:  # in a pod
        with pytest.raises(ValueError, match="other processes"):
            hf.save(tmp_path / "nnx", ckpt, {1: hf.Weights.of_nnx(layer)})
        return
    hf.save(tmp_path / "nnx", ckpt, {1: hf.Weights.of_nnx(layer)})
    assert_same(hf.open(tmp_path / "nnx"), ckpt)
    hf.save(tmp_path / "linen", ckpt, {1: hf.Weights.of_linen(weights.linen)})
    assert_same(hf.open(tmp_path / "linen"), ckpt)


def several_files(folder):
    """A checkpoint of two files, with a tensor that is in no MoE layer, and a tokenizer."""
    ckpt = hf.open(FIXTURES / "mixtral")
    names = list(ckpt.names())
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": [*names[1::2], "rest"]}
    rest = np.arange(5, dtype=np.float16)
    folder.mkdir()
    for file, own in parts.items():
        arrays = {n: rest if n == "rest" else ckpt.tensor(n) for n in own}
        safetensors.write(folder / file, arrays)
    index = {"metadata": {}, "weight_map": {n: f for f, own in parts.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(ckpt.config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return hf.open(folder)


def test_several_files_and_what_is_no_moe_layer(tmp_path):
    ckpt = several_files(tmp_path / "from")
    (layer,) = hf.moe_layers(ckpt)
    hf.save(tmp_path / "to", ckpt, {layer: hf.load_moe(ckpt, layer)})
    saved = hf.open(tmp_path / "to")
    assert_same(saved, ckpt)
    assert {n: saved.file_of(n) for n in saved.names()} == {
        n: ckpt.file_of(n) for n in ckpt.names()
    }
    assert (tmp_path / "to" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_quantized_weights_are_saved_dequantized(tmp_path):
    ckpt = hf.open(FIXTURES / "mxfp4")
    hf.save(tmp_path, ckpt, {})
    saved = hf.open(tmp_path)
    assert saved.names() == ("a",) and not saved.is_quantized("a")
    assert saved.tensor("a").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(saved.tensor("a"), ckpt.tensor("a"))
    assert "quantization_config" not in saved.config


@pytest.mark.parametrize("name", quantize.CONFIG)
def test_a_layer_of_quantized_experts(name, tmp_path, rng):
    """Its weights, and others in their place, are saved dequantized under the same names."""
    quantize.write_layer(tmp_path / "from", name, FIXTURES / quantize.FIXTURE_OF[name], rng)
    ckpt = hf.open(tmp_path / "from")
    (layer,) = hf.moe_layers(ckpt)
    weights = hf.load_moe(ckpt, layer, dtype=jnp.float32)
    doubled = hf.Weights(jax.tree.map(lambda a: 2 * a, weights.parameters), weights.bias)
    assert any(ckpt.is_quantized(n) for n in hf.tensors_of_layer(ckpt, layer))
    for folder, given in (("same", weights), ("doubled", doubled)):
        hf.save(tmp_path / folder, ckpt, {layer: given})
        saved = hf.open(tmp_path / folder)
        assert set(saved.names()) == set(ckpt.names())
        assert not any(saved.is_quantized(n) for n in saved.names())
        assert "quantization_config" not in saved.config
        got = hf.load_moe(saved, layer, dtype=jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, got.nnx, given.nnx)


def test_what_cannot_be_saved(tmp_path):
    ckpt = hf.open(FIXTURES / "mixtral")
    (layer,) = hf.moe_layers(ckpt)
    weights = hf.load_moe(ckpt, layer)
    with pytest.raises(ValueError, match="the checkpoint itself"):
        hf.save(FIXTURES / "mixtral", ckpt, {layer: weights})
    with pytest.raises(ValueError, match="no MoE block"):
        hf.save(tmp_path, ckpt, {7: weights})
    one = dict(weights.parameters)
    del one["down"]
    with pytest.raises(ValueError, match=r"must have the arrays \['down'"):
        hf.save(tmp_path, ckpt, {layer: hf.Weights(one)})
    one["down"] = weights.parameters["down"][:2]
    with pytest.raises(ValueError, match=r"'down'.*\[2, 6, 8\].*\[4, 6, 8\]"):
        hf.save(tmp_path, ckpt, {layer: hf.Weights(one)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4_text"])
def test_padding_and_gates_of_their_own_are_saved_as_they_were(name, tmp_path):
    ckpt = hf.open(FIXTURES / name)
    (layer,) = hf.moe_layers(ckpt)
    weights = hf.load_moe(ckpt, layer, experts=SwiGLU(separate=True), pad_experts_to=6)
    assert weights.parameters["gate"].shape[0] == 6
    hf.save(tmp_path, ckpt, {layer: weights})
    assert_same(hf.open(tmp_path), ckpt)
