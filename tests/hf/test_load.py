"""Loading: who reads what, meshes, dtypes, and what is said of checkpoints that do not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType, PartitionSpec

from freeio_jax import hf
from freeio_jax.flax import linen
from freeio_jax.flax import nnx as fio_nnx
from freeio_jax.flax.experts import SwiGLU
from freeio_jax.hf import safetensors
from freeio_jax.hf.families import FAMILIES, INEXPRESSIBLE

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = ("mixtral", "gpt_oss", "granitemoe", "dbrx", "deepseek_v3", "ernie4_5_moe")


def open_fixture(name):
    ckpt = hf.open(FIXTURES / name)
    return ckpt, hf.moe_layers(ckpt)[0]


def changed(tmp_path, name, change_config=None, change_tensors=None):
    """A copy of a fixture with another config.json or other tensors."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "changed")
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        change_config(config)
        (folder / "config.json").write_text(json.dumps(config))
    if change_tensors:
        tensors = tensors_of(folder)
        change_tensors(tensors)
        safetensors.write(folder / "model.safetensors", tensors)
    return hf.open(folder)


def tensors_of(folder):
    ckpt = hf.open(folder)
    return {n: np.array(ckpt.tensor(n)) for n in ckpt.names()}


@pytest.fixture
def reads(monkeypatch):
    """What is read: (name, rows) of each call."""
    seen = []
    tensor = hf.Checkpoint.tensor

    def counted(self, name, rows=None, dtype=None):
        seen.append((name, rows))
        return tensor(self, name, rows, dtype)

    monkeypatch.setattr(hf.Checkpoint, "tensor", counted)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_device_reads_its_own_experts(name, reads):
    """Nothing is read twice, although the mesh has two devices for each expert."""
    ckpt, layer = open_fixture(name)
    mesh = make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    weights = hf.load_moe(ckpt, layer, mesh=mesh)
    own = {shard.index[0].start or 0 for shard in weights.parameters["down"].addressable_shards}
    expected = {}
    for tensor in hf.tensors_of_layer(ckpt, layer):
        num_rows = ckpt.shape(tensor)[0]
        of_expert = re.search(r"experts\.(\d+)\.", tensor)
        if of_expert and int(of_expert[1]) in own:
            expected[tensor] = [(0, num_rows)]
        elif not of_expert and re.search(r"\.experts\.|block_sparse_moe.*put_linear", tensor):
            share = num_rows // 4
            expected[tensor] = [(e * share, (e + 1) * share) for e in sorted(own)]
        elif not of_expert:
            expected[tensor] = [(0, num_rows)]
    got = {}
    for tensor, rows in reads:
        bounds = (rows or slice(None)).indices(ckpt.shape(tensor)[0])[:2]
        got.setdefault(tensor, []).append(bounds)
    assert {tensor: sorted(bounds) for tensor, bounds in got.items()} == expected

    whole = hf.load_moe(ckpt, layer)
    for parameter, array in weights.parameters.items():
        np.testing.assert_array_equal(array, whole.parameters[parameter])
        spread = parameter not in ("router", "router_bias") and "shared" not in parameter
        first = "expert" if spread else None
        assert array.sharding.spec == PartitionSpec(first, *(None,) * (array.ndim - 1))


def test_several_expert_axes_and_the_current_mesh():
    ckpt, layer = open_fixture("mixtral")
    whole = hf.load_moe(ckpt, layer)
    with jax.set_mesh(make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)):
        weights = hf.load_moe(ckpt, layer, axis_name=("a", "b"))
    assert weights.parameters["gate_up"].sharding.spec == PartitionSpec(("a", "b"), None, None)
    np.testing.assert_array_equal(weights.parameters["gate_up"], whole.parameters["gate_up"])


def test_dtypes():
    """The router's arrays are float32. The others are as asked for, or as config.json says."""
    ckpt, layer = open_fixture("deepseek_v3")
    for dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        weights = hf.load_moe(ckpt, layer, dtype=dtype)
        assert weights.parameters["router"].dtype == weights.bias.dtype == jnp.float32
        assert weights.parameters["gate_up"].dtype == expected
        assert weights.parameters["shared_down"].dtype == expected


def test_linen_and_nnx_compute_the_same():
    ckpt, layer = open_fixture("deepseek_v3")
    mesh = make_mesh(4, axis_types=(AxisType.Auto,))
    weights = hf.load_moe(ckpt, layer, mesh=mesh, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (4, 3, hf.moe_options(ckpt.config)["width"]))
    with jax.set_mesh(mesh):
        module = linen.MoE.from_hf(ckpt.config, capacity_factor=4.0)
        y = module.apply(weights.linen, x, deterministic=True)
        layer = fio_nnx.MoE.from_hf(ckpt.config, rngs=nnx.Rngs(0), capacity_factor=4.0)
        nnx.update(layer, weights.nnx)
        np.testing.assert_array_equal(layer(x, deterministic=True), y)
    assert layer.config.capacity_factor == 4.0
    assert layer.config.router.load_balance_coef == layer.config.router.z_loss_coef == 0


def test_quantized_experts(tmp_path):
    """Experts in fp8 and mxfp4 are loaded in the dtype that is asked for."""
    scale = np.array([[3.0]], np.float32)

    def to_fp8(tensors):
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale

    def is_fp8(config):
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    ckpt = changed(tmp_path, "deepseek_v3", is_fp8, to_fp8)
    plain, layer = open_fixture("deepseek_v3")
    got = hf.load_moe(ckpt, layer).parameters
    expected = hf.load_moe(plain, layer).parameters
    for name in ("gate_up", "down"):
        rounded = np.asarray(expected[name]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(got[name], 3 * rounded)
    np.testing.assert_array_equal(got["shared_down"], expected["shared_down"])


def test_layers_that_have_no_block(tmp_path):
    ckpt, layer = open_fixture("deepseek_v3")
    assert layer == 1
    with pytest.raises(ValueError, match=r"layer 0 .* no MoE block.*\[1\]"):
        hf.load_moe(ckpt, 0)

    def add(tensors):
        for name in list(tensors):
            tensors[name.replace("model.layers.1", "mtp.layers.0")] = tensors[name]

    ckpt = changed(tmp_path, "deepseek_v3", None, add)
    assert hf.moe_layers(ckpt) == (1, "mtp.layers.0")
    more = hf.load_moe(ckpt, "mtp.layers.0")
    np.testing.assert_array_equal(more.bias, hf.load_moe(ckpt, 1).bias)


def test_the_text_part_of_a_multimodal_model(tmp_path):
    def nest(config):
        inner = dict(config)
        config.clear()
        config.update(model_type="llama4", text_config=inner)

    def rename(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    ckpt = changed(tmp_path, "llama4_text", nest, rename)
    plain, layer = open_fixture("llama4_text")
    assert hf.moe_layers(ckpt) == hf.moe_layers(plain)
    got, expected = hf.load_moe(ckpt, layer), hf.load_moe(plain, layer)
    np.testing.assert_array_equal(got.parameters["down"], expected.parameters["down"])


def test_the_thinker_of_a_whole_qwen3_omni(tmp_path):
    """Its talker has MoE layers, too, of another kind. They are none of this model's."""

    def nest(config):
        inner = dict(config)
        config.clear()
        config.update(model_type="qwen3_omni_moe", thinker_config=inner, talker_config={})

    def rename(tensors):
        for name in list(tensors):
            array = tensors.pop(name)
            tensors[f"thinker.{name}"] = array
            tensors[f"talker.{name}"] = array[:1]

    name = "qwen3_omni_moe_thinker"
    ckpt = changed(tmp_path, name, nest, rename)
    plain, layer = open_fixture(name)
    assert hf.moe_layers(ckpt) == hf.moe_layers(plain) == (layer,)
    assert hf.moe_options(ckpt.config) == hf.moe_options(plain.config)
    got, expected = hf.load_moe(ckpt, layer), hf.load_moe(plain, layer)
    jax.tree.map(np.testing.assert_array_equal, got.nnx, expected.nnx)


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path):
    """Published as files of DeepSeek-V3 with a model_type of its own."""
    ckpt = changed(tmp_path, "deepseek_v3", lambda config: config.update(model_type="kimi_k2"))
    plain, layer = open_fixture("deepseek_v3")
    assert ckpt.config["model_type"] == "kimi_k2"
    assert hf.moe_layers(ckpt) == hf.moe_layers(plain)
    assert hf.moe_options(ckpt.config) == hf.moe_options(plain.config)
    got, expected = hf.load_moe(ckpt, layer), hf.load_moe(plain, layer)
    assert expected.bias is not None
    jax.tree.map(np.testing.assert_array_equal, got.nnx, expected.nnx)


def fuse(model_type=None):
    """Changes of the fixture qwen3_moe: all experts in one tensor."""
    start = "model.layers.1.mlp.experts"

    def change_tensors(tensors):
        own = [
            {p: tensors.pop(f"{start}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
            for e in range(4)
        ]
        fused = {
            "gate_up_proj": np.stack([np.concatenate([o["gate"], o["up"]]) for o in own]),
            "down_proj": np.stack([o["down"] for o in own]),
        }
        for name, array in fused.items():
            tensors[f"{start}.{name}"] = array

    def change_config(config):
        config["model_type"] = model_type or config["model_type"]

    return change_config, change_tensors


def test_experts_in_one_tensor_as_transformers_has_them(tmp_path):
    ckpt = changed(tmp_path, "qwen3_moe", *fuse())
    plain, layer = open_fixture("qwen3_moe")
    got, expected = hf.load_moe(ckpt, layer), hf.load_moe(plain, layer)
    jax.tree.map(np.testing.assert_array_equal, got.nnx, expected.nnx)


def test_experts_in_one_tensor_either_way_round(tmp_path):
    """The fixture's gate_up is square, [8, 8]: only other sizes tell."""
    ckpt = changed(tmp_path, "qwen3_moe", *fuse("qwen3_vl_moe_text"))
    with pytest.raises(ValueError, match=r"\[4, 8, 8\].*gate_up_proj.*inputs or its outputs"):
        hf.load_moe(ckpt, 1)
    plain, layer = open_fixture("mixtral")
    expected = hf.load_moe(plain, layer)
    for transposed in (False, True):

        def fuse_mixtral(tensors, transposed=transposed):
            for name in list(tensors):
                if "experts" in name:
                    del tensors[name]
            router = tensors.pop("model.layers.1.block_sparse_moe.gate.weight")
            tensors["model.layers.1.mlp.gate.weight"] = router
            for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                array = np.asarray(expected.parameters[ours])
                array = np.swapaxes(array, 1, 2) if transposed else array
                tensors[f"model.layers.1.mlp.experts.{theirs}"] = np.ascontiguousarray(array)

        def to_qwen(config):
            config["model_type"] = "qwen3_vl_moe_text"
            config["moe_intermediate_size"] = config["intermediate_size"]

        ckpt = changed(tmp_path / str(transposed), "mixtral", to_qwen, fuse_mixtral)
        got = hf.load_moe(ckpt, layer)
        jax.tree.map(np.testing.assert_array_equal, got.nnx, expected.nnx)


@pytest.mark.parametrize("biases", [False, True])
def test_experts_that_the_files_do_not_have(biases):
    """gpt-oss's columns alternate, so no half of them is the gate."""
    ckpt, layer = open_fixture("gpt_oss")
    with pytest.raises(ValueError, match=r"'gate'.*files have \['down', 'down_bias', 'gate_up'"):
        hf.load_moe(ckpt, layer, experts=SwiGLU(separate=True, biases=biases))


def test_a_tensor_that_is_missing(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    ckpt = changed(tmp_path, "qwen3_moe", None, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"no tensor {name!r}"):
        hf.load_moe(ckpt, 1)


def test_a_tensor_of_another_shape(tmp_path):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:-1]

    ckpt = changed(tmp_path, "qwen3_moe", None, cut)
    with pytest.raises(ValueError, match=rf"{name!r} of model\.safetensors.*\[3, 8\].*\[4, 8\]"):
        hf.load_moe(ckpt, 1)


def test_experts_that_do_not_divide(tmp_path):
    ckpt, layer = open_fixture("mixtral")
    with pytest.raises(ValueError, match="num_experts=4 does not divide evenly among the 8 ranks"):
        hf.load_moe(ckpt, layer, mesh=make_mesh(8, axis_types=(AxisType.Auto,)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"model_type": "gpt2"}, "'gpt2' is not in the table.*mixtral"),
        ("mixtral", {"hidden_act": "cosine"}, "activation hidden_act='cosine'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*another score"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True.*bias in the shared experts"),
        ("axk2", {"n_group": 4}, "n_group=4.*the score 0.*None and 1"),
        ("laguna", {"moe_router_logit_softcapping": 30.0}, "softcapping=30.0.*a tanh of"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "weights on the experts' input"),
        (
            "cohere2_moe-sigmoid",
            {"shared_expert_combination_strategy": "average"},
            "strategy='average'.*half of",
        ),
        ("cohere2_moe-sigmoid", {"expert_selection_fn": "sparsemax"}, "fn='sparsemax'"),
        ("step3p7", {}, "swiglu_limits=.* differs between layers.*layer="),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk=.* differs between layers.*layer="),
        *(("mixtral", {"model_type": t}, r) for t, r in INEXPRESSIBLE.items()),
    ],
)
def test_what_cannot_be_expressed(name, change, message):
    config = hf.open(FIXTURES / name).config | change
    for from_hf in (linen.MoE.from_hf, lambda c: fio_nnx.MoE.from_hf(c, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            from_hf(config)


def test_a_setting_that_is_missing():
    config = dict(hf.open(FIXTURES / "qwen2_moe").config)
    del config["moe_intermediate_size"]
    with pytest.raises(ValueError, match="no 'moe_intermediate_size', which Qwen2"):
        hf.moe_options(config)


def test_limits_of_single_layers():
    """Layer 0 of Step has limits, layer 1 has none."""
    config = hf.open(FIXTURES / "step3p7").config
    assert hf.moe_options(config, 1)["experts"] == SwiGLU()
    with pytest.raises(ValueError, match=r"swiglu_limits=7\.0 .*bound the gate"):
        hf.moe_options(config, 0)


def test_shared_experts_that_are_averaged_only_where_there_are_some():
    config = hf.open(FIXTURES / "cohere2_moe-sigmoid").config
    without = config | {
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average",
    }
    assert hf.moe_options(without)["shared_expert_width"] is None


def test_settings_of_each_layer():
    config = hf.open(FIXTURES / "hunyuan_v1_moe").config | {"moe_topk": [1, 2]}
    assert hf.moe_options(config, 1)["top_k"] == 2
    assert hf.moe_options(config | {"moe_topk": [2, 2]})["top_k"] == 2


def test_a_family_without_silu():
    config = hf.open(FIXTURES / "mixtral").config | {"hidden_act": "gelu_pytorch_tanh"}
    experts = hf.moe_options(config)["experts"]
    assert experts.activation is jax.nn.gelu


def test_the_table_names_everything_once():
    types = [t for family in FAMILIES for t in family.model_types] + list(INEXPRESSIBLE)
    assert len(types) == len(set(types))
    for family in FAMILIES:
        assert family.router_tensor
        fields = {field.name for field in dataclasses.fields(family.router_kind)}
        assert set(family.router) <= fields


def test_padding_for_ranks_that_do_not_divide_the_experts():
    """Four experts on eight ranks: half of them have padding alone, which is zero."""
    ckpt, layer = open_fixture("granitemoe")
    mesh = make_mesh(8, axis_types=(AxisType.Auto,))
    padded = hf.load_moe(ckpt, layer, mesh=mesh, pad_experts_to=8)
    plain = hf.load_moe(ckpt, layer)
    for name in ("gate_up", "down"):
        got = np.asarray(padded.parameters[name])
        np.testing.assert_array_equal(got[:4], plain.parameters[name])
        assert got.shape[0] == 8 and not got[4:].any()
    np.testing.assert_array_equal(padded.parameters["router"], plain.parameters["router"])
    x = jax.random.normal(jax.random.key(0), (8, 3, 8))
    with jax.set_mesh(mesh):
        module = linen.MoE.from_hf(ckpt.config, layer, pad_experts_to=8)
        y = module.apply(padded.linen, x, deterministic=True)
    expected = linen.MoE.from_hf(ckpt.config, layer).apply(plain.linen, x, deterministic=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "granitemoe", "llama4_text"])
def test_parameters_over_further_axes(name):
    """FSDP and tensor parallelism: gate and up apart, each device with its part of a matrix."""
    ckpt, layer = open_fixture(name)
    mesh = make_mesh((2, 2, 2), ("data", "expert", "model"), axis_types=(AxisType.Auto,) * 3)
    options = {
        "experts": SwiGLU(separate=True),
        "token_axes": ("data", "expert"),
        "fsdp_axes": ("data",),
        "model_axes": ("model",),
    }
    got = hf.load_moe(ckpt, layer, mesh=mesh, **options).parameters
    expected = hf.load_moe(ckpt, layer).parameters
    for start in ("", "shared_") if "shared_down" in expected else ("",):
        gate, up = np.split(np.asarray(expected[f"{start}gate_up"]), 2, axis=-1)
        np.testing.assert_array_equal(got[f"{start}gate"], gate)
        np.testing.assert_array_equal(got[f"{start}up"], up)
        np.testing.assert_array_equal(got[f"{start}down"], expected[f"{start}down"])
    shard = got["gate"].addressable_shards[0].data.shape
    assert np.prod(shard) == got["gate"].size // 8
