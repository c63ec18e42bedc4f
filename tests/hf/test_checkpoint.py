"""The reader of checkpoint folders: values, quantized weights, and what it says of damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest

from freeio_jax import hf
from freeio_jax.hf import safetensors


def folder_of(path, tensors, config=None, num_files=1):
    """A checkpoint of ``tensors`` in ``path``, spread over ``num_files``."""
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral"} | (config or {})))
    if num_files == 1:
        safetensors.write(path / "model.safetensors", tensors)
        return path
    names = list(tensors)
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        safetensors.write(path / file, {n: tensors[n] for n in names[i::num_files]})
        weight_map |= dict.fromkeys(names[i::num_files], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("num_files", [1, 3])
def test_every_dtype_and_shape(num_files, tmp_path, rng):
    tensors = {
        name: rng.integers(1, 3, size=(3, 4) if i % 2 else (5, 0, 2)).astype(dtype)
        for i, (name, dtype) in enumerate(safetensors.DTYPES.items())
    }
    tensors["scalar"] = np.float32(1.5).reshape(())
    tensors["unaligned"] = rng.normal(size=(7, 3)).astype(ml_dtypes.bfloat16)
    ckpt = hf.open(folder_of(tmp_path, tensors, num_files=num_files))
    assert set(ckpt.names()) == set(tensors)
    for name, expected in tensors.items():
        got = ckpt.tensor(name)
        assert ckpt.shape(name) == got.shape == expected.shape
        assert ckpt.stored_dtype(name) == got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(ckpt.tensor("unaligned", slice(2, 5)), tensors["unaligned"][2:5])


def test_block_fp8(tmp_path, rng):
    weight = rng.normal(size=(5, 7)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(size=(3, 2)).astype(np.float32)
    config = {
        "dtype": "float32",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]},
    }
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales}
    ckpt = hf.open(folder_of(tmp_path, tensors, config))
    expected = np.array(
        [[np.float32(weight[i, j]) * scales[i // 2, j // 4] for j in range(7)] for i in range(5)]
    )
    assert ckpt.names() == ("a.weight",) and ckpt.is_quantized("a.weight")
    np.testing.assert_array_equal(ckpt.tensor("a.weight"), expected)
    np.testing.assert_array_equal(ckpt.tensor("a.weight", slice(3, 5)), expected[3:5])
    np.testing.assert_array_equal(
        ckpt.tensor("a.weight", dtype=ml_dtypes.bfloat16), expected.astype(ml_dtypes.bfloat16)
    )


def test_fp8_whose_blocks_do_not_fit(tmp_path):
    weight = np.zeros((5, 7), ml_dtypes.float8_e4m3fn)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}}
    tensors = {"a.weight": weight, "a.weight_scale_inv": np.zeros((2, 2), np.float32)}
    ckpt = hf.open(folder_of(tmp_path, tensors, config))
    with pytest.raises(ValueError, match=r"'a.weight'.*\[5, 7\].*\[3, 2\] blocks.*\[2, 2\]"):
        ckpt.tensor("a.weight")


def test_mxfp4(tmp_path, rng):
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-v for v in values]
    blocks = rng.integers(0, 256, size=(2, 3, 2, 16)).astype(np.uint8)
    scales = rng.integers(120, 135, size=(2, 3, 2)).astype(np.uint8)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    ckpt = hf.open(folder_of(tmp_path, tensors, config, num_files=2))
    expected = np.zeros((2, 64, 3))
    for e, m, g, b in np.ndindex(2, 3, 2, 16):
        for half, nibble in enumerate((blocks[e, m, g, b] % 16, blocks[e, m, g, b] // 16)):
            scale = 2.0 ** (int(scales[e, m, g]) - 127)
            expected[e, 32 * g + 2 * b + half, m] = values[nibble] * scale
    assert ckpt.names() == ("e.down_proj",)
    assert ckpt.shape("e.down_proj") == (2, 64, 3)
    got = ckpt.tensor("e.down_proj")
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float64), expected)
    np.testing.assert_array_equal(ckpt.tensor("e.down_proj", slice(1, 2)), got[1:])


def test_what_is_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        hf.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        hf.open(tmp_path)
    tensors = {"model.a.weight": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    folder_of(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"no tensor 'model.a.bias'.*'model.a.weight'"):
        hf.open(tmp_path).tensor("model.a.bias")

    file = tmp_path / "model.safetensors"
    contents = file.read_bytes()
    file.write_bytes(contents[:-1])
    ckpt = hf.open(tmp_path)
    np.testing.assert_array_equal(ckpt.tensor("model.a.weight"), 0)
    with pytest.raises(ValueError, match=r"'b'.*\[5\].*model\.safetensors.*truncated"):
        ckpt.tensor("b")
    for size in (0, 5, 30):
        file.write_bytes(contents[:size])
        with pytest.raises(ValueError, match="truncated"):
            hf.open(tmp_path)
    file.write_bytes((2).to_bytes(8, "little") + b"{]")
    with pytest.raises(ValueError, match="not JSON"):
        hf.open(tmp_path)


def test_a_header_that_contradicts_itself(tmp_path):
    folder_of(tmp_path, {"a": np.zeros((3, 4), np.float32)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[3,4]", b"[3,5]"))
    with pytest.raises(ValueError, match=r"'a'.*48 bytes.*\[3, 5\] needs 60"):
        hf.open(tmp_path).tensor("a")


def test_an_index_that_is_wrong(tmp_path):
    tensors = {"a": np.zeros(3, np.float32), "b": np.zeros(5, np.float32)}
    folder_of(tmp_path, tensors, num_files=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b"', '"c"'))
    ckpt = hf.open(tmp_path)
    with pytest.raises(ValueError, match=r"'c' is in model-00002-of-00002.*does not have it"):
        ckpt.tensor("c")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        hf.open(tmp_path)


def test_files_without_an_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in "ab":
        safetensors.write(tmp_path / f"{name}.safetensors", {name: np.zeros(3, np.float32)})
    assert set(hf.open(tmp_path).names()) == {"a", "b"}
    safetensors.write(tmp_path / "c.safetensors", {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"'a' is in a\.safetensors and in c\.safetensors"):
        hf.open(tmp_path)


def test_a_quantization_that_is_not_known(tmp_path):
    folder_of(tmp_path, {}, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match=r"'gptq'.*fp8, mxfp4"):
        hf.open(tmp_path)
