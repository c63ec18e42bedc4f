"""``python -m freeio_jax.hf``: what check says, and that convert's layers restore on any mesh."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quantize
from helpers import make_mesh
from jax.sharding import AxisType

from freeio_jax import hf
from freeio_jax.hf import safetensors
from freeio_jax.hf.__main__ import main
from freeio_jax.hf.convert import restore_moe

FIXTURES = Path(__file__).parent / "fixtures"


def check(capfd, folder, *options):
    status = main(["check", str(folder), "--no-compare", *options])
    return status, capfd.readouterr().out


def test_check_says_what_a_checkpoint_is(capfd):
    status, out = check(capfd, FIXTURES / "deepseek_v3", "--ranks", "4")
    assert status == 0
    for text in (
        "model_type deepseek_v3",
        "1 with an MoE block: 1",
        "width 8, 4 experts of width 4, 2 for each token",
        "a shared expert of width 8",
        "SwiGLU()",
        "Router(score='sigmoid', renormalize=True, weight_scale=2.5, num_groups=2, ",
        "4, 1 experts each",
        "every tensor",
    ):
        assert text in out, text


def test_check_counts_bytes(capfd):
    """Two experts of 3 * 8 * 4 weights, a shared one of 3 * 8 * 8; router and bias in float32."""
    _, out = check(capfd, FIXTURES / "deepseek_v3", "--ranks", "2", "--dtype", "bfloat16")
    spread, others = 2 * (2 * 3 * 8 * 4), 4 * (8 * 4 + 4) + 2 * 3 * 8 * 8
    text = f"{(spread + others) / 2**30:.3g} GiB on each device in bfloat16"
    assert f"{text}: experts {spread / 2**30:.3g}, " in out


def test_check_says_what_does_not_fit(capfd, tmp_path):
    status, out = check(capfd, FIXTURES / "mixtral", "--ranks", "8", "--memory", "1e-9")
    assert status == 1
    assert (
        "WRONG: 4 experts do not divide among 8 ranks. Use pad_experts_to=8, or 1, 2, 4 ranks"
        in out
    )
    assert "WRONG: the MoE layers' parameters do not fit in 1e-09 GiB" in out

    folder = shutil.copytree(FIXTURES / "mixtral", tmp_path / "folder")
    ckpt = hf.open(folder)
    tensors = {n: np.array(ckpt.tensor(n)) for n in ckpt.names()}
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    missing = name.replace("w2", "w3")
    del tensors[missing]
    tensors[name] = tensors[name][1:]
    safetensors.write(folder / "model.safetensors", tensors)
    status, out = check(capfd, folder)
    assert status == 1
    assert f"WRONG: hf: {folder} has no tensor {missing!r}" in out
    assert f"WRONG: hf: the tensor {name!r}" in out and "[7, 6]" in out and "[8, 6]" in out

    file = folder / "model.safetensors"
    file.write_bytes((FIXTURES / "mixtral" / "model.safetensors").read_bytes()[:-1])
    status, out = check(capfd, folder)
    assert status == 1 and "It is truncated" in out


@pytest.mark.parametrize("name", quantize.CONFIG)
def test_check_of_quantized_experts(name, capfd, tmp_path, rng):
    folder = tmp_path / "folder"
    quantize.write_layer(folder, name, FIXTURES / quantize.FIXTURE_OF[name], rng)
    status, out = check(capfd, folder, "--ranks", "2", "--dtype", "bfloat16")
    assert status == 0, out
    assert "1 with an MoE block: 1" in out and "every tensor" in out
    ckpt = hf.open(folder)
    tensors = hf.tensors_of_layer(ckpt, 1)
    quantized = next(n for n in tensors if ckpt.is_quantized(n))
    file = safetensors.SafetensorsFile(folder / "model.safetensors")
    stored = {n: np.array(file.tensor(n)) for n in file.names()}
    part = quantized if name == "fp8" else f"{quantized}_blocks"
    stored[part] = stored[part][1:]
    safetensors.write(folder / "model.safetensors", stored)
    status, out = check(capfd, folder)
    assert status == 1 and f"WRONG: hf: the tensor {quantized!r}" in out, out


def test_errors_are_one_line(capfd, tmp_path):
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_converted_layers_restore_on_any_mesh(name, tmp_path, capfd):
    if jax.process_count() > 1:
        pytest.skip("the command is a single process")
    folder = shutil.copytree(FIXTURES / name, tmp_path / "folder")
    ckpt = hf.open(folder)
    tensors = {n: np.array(ckpt.tensor(n)) for n in ckpt.names()}
    tensors["model.norm.weight"] = np.arange(3, dtype=np.float16)
    safetensors.write(folder / "model.safetensors", tensors)
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--ranks", "4"]) == 0
    (layer,) = hf.moe_layers(ckpt)
    assert capfd.readouterr().out.splitlines() == [f"layer {layer}", "1 other tensors"]
    assert json.loads((out / "config.json").read_text()) == ckpt.config

    for shape, names, axis in (
        ((2, 2), ("data", "expert"), "expert"),
        ((4,), ("expert",), "expert"),
        ((2, 2), ("a", "b"), ("a", "b")),
    ):
        mesh = make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
        expected = hf.load_moe(ckpt, layer, mesh=mesh, axis_name=axis)
        got = restore_moe(out, layer, mesh=mesh, axis_name=axis)
        assert got.nnx.keys() == expected.nnx.keys()
        for parameter, array in expected.nnx.items():
            np.testing.assert_array_equal(got.nnx[parameter], array)
            assert got.nnx[parameter].dtype == array.dtype
            assert got.nnx[parameter].sharding.is_equivalent_to(array.sharding, array.ndim)
    with ocp.StandardCheckpointer() as checkpointer:
        rest = checkpointer.restore(out / "rest")
    assert rest.keys() == {"model.norm.weight"}
    assert rest["model.norm.weight"].dtype == np.float16
    np.testing.assert_array_equal(rest["model.norm.weight"], tensors["model.norm.weight"])
    without = restore_moe(out, layer, dtype="bfloat16")
    assert without.parameters["down"].dtype == "bfloat16"
    assert without.parameters["router"].dtype == "float32"
    with pytest.raises(FileNotFoundError, match="moe/7"):
        restore_moe(out, 7)
    with pytest.raises(ValueError, match=r"pad_experts_to.*load it by hf\.load_moe"):
        restore_moe(out, layer, pad_experts_to=8)
    assert main(["convert", str(folder), str(out)]) == 1
    assert "exists already" in capfd.readouterr().err
