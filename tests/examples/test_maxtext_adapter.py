"""MaxText's MoE layer with freeio_jax as its exchange: equal numbers on any mesh, drops, remat."""

import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import types
from collections import Counter

import pytest

pytest.importorskip("maxtext", reason="MaxText is not installed: tests/examples/maxtext.txt")

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from flax.linen import partitioning
from maxtext.configs import pyconfig
from maxtext.layers.initializers import nd_dense_init
from maxtext.layers.moe import RoutedMoE
from maxtext.layers.nnx_decoders import NNXDecoder
from maxtext.utils import maxtext_utils
from maxtext_adapter import freeio_exchange

BATCH, LENGTH, WIDTH, EXPERTS, TOP_K = 16, 4, 16, 8, 2


#: What base.yml is given beside the mesh and the folder.
BASE = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
OPTIONS = {
    "run_name": "test",
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "log_config": False,
    "base_emb_dim": WIDTH,
    "base_moe_mlp_dim": 24,
    "base_mlp_dim": 24,
    "base_num_decoder_layers": 1,
    "head_dim": 8,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "vocab_size": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "decoder_block": "mixtral",
    "load_balance_loss_weight": 0.01,
    "megablox": False,  # its kernel does not run on CPUs: lax.ragged_dot does
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "per_device_batch_size": BATCH // 8,
    "max_target_length": LENGTH,
    "ici_fsdp_parallelism": 1,
}


@contextlib.contextmanager
def routed_moe(folder, **options):
    """The layer on the mesh of ``options``, within MaxText's axis rules."""
    options = OPTIONS | {"base_output_directory": str(folder)} | options
    config = pyconfig.initialize(["", BASE], **options)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
        layer = RoutedMoE(
            config=config,
            num_experts=EXPERTS,
            num_experts_per_tok=config.num_experts_per_tok,
            mesh=mesh,
            kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed", "mlp"),
            intermediate_dim=24,
            dtype=config.dtype,
            weight_dtype=config.weight_dtype,
            rngs=nnx.Rngs(0),
        )
        yield layer


def inputs(seed):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


def parts(layer, x):
    """Output, balance loss, and the gradients of both together by the parameters and ``x``."""
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def loss(parameters, x):
        y, balance, _ = nnx.merge(graph, parameters, rest)(x)[:3]
        balance = jnp.zeros(()) if balance is None else balance
        weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return jnp.sum(y * weight) + balance, (y, balance)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_parameters, by_x), outputs = gradient(parameters, x)
    return jax.tree.map(np.asarray, (jax.tree.leaves(by_parameters), by_x, outputs))


FAMILIES = {
    "mixtral": {},
    "llama4": {"decoder_block": "llama4", "num_experts_per_tok": 1},
    "biases": {"mlp_bias": True},
}
MESHES = {
    "expert 8": {"ici_expert_parallelism": 8, "ici_data_parallelism": 1},
    "data 2, expert 4": {"ici_expert_parallelism": 4, "ici_data_parallelism": 2},
    "data 4, expert 2": {"ici_expert_parallelism": 2, "ici_data_parallelism": 4},
    "fsdp 2, expert 4": {"ici_expert_parallelism": 4, "ici_fsdp_parallelism": 2},
    "fsdp 4, expert 2": {"ici_expert_parallelism": 2, "ici_fsdp_parallelism": 4},
    "data 2, fsdp 2, expert 2": {
        "ici_expert_parallelism": 2,
        "ici_fsdp_parallelism": 2,
        "ici_data_parallelism": 2,
    },
}


@pytest.fixture(scope="module")
def without_experts_axis(tmp_path_factory):
    """By MaxText alone: its exchange does not run on CPUs, so all experts are on every device."""
    results = {}

    def compute(family, x):
        if family not in results:
            folder = tmp_path_factory.mktemp("maxtext")
            with routed_moe(folder, ici_data_parallelism=8, **FAMILIES[family]) as layer:
                results[family] = parts(layer, x)
        return results[family]

    return compute


@pytest.mark.parametrize(
    ("family", "mesh"), [*(("mixtral", m) for m in MESHES), *((f, "expert 8") for f in FAMILIES)]
)
def test_equal_to_maxtext_without_an_exchange(family, mesh, without_experts_axis, tmp_path):
    x = inputs(seed=1)
    expected = without_experts_axis(family, x)
    with routed_moe(tmp_path, **FAMILIES[family], **MESHES[mesh]) as layer, freeio_exchange():
        ours = parts(layer, x)
    for theirs, mine in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * max(np.abs(theirs).max(), 1))


def losses_of_training(folder, **options):
    """What MaxText's own train loop writes for each step: its losses by name."""
    train = pytest.importorskip(
        "maxtext.trainers.pre_train.train",
        reason="MaxText's train loop has packages of its own: tests/examples/maxtext.txt",
    )
    folder.mkdir()
    metrics = folder / "metrics"
    options = (
        OPTIONS
        | options
        | {
            "base_output_directory": folder,
            "metrics_file": metrics,
            "base_num_decoder_layers": 2,
            "attention": "dot_product",
            "dataset_type": "synthetic",
            "steps": 4,
            "learning_rate": 0.01,
            "enable_tensorboard": False,
            "enable_goodput_recording": False,
            "monitor_goodput": False,
        }
    )
    arguments = (f"{name}={value}" for name, value in options.items())
    config, recorder, *_ = train.initialize(["", BASE, *arguments])
    train.run(config, recorder)
    steps = map(json.loads, metrics.read_text().splitlines())
    return [{n: value for n, value in step.items() if n.endswith("loss")} for step in steps]


def test_the_train_loop_has_equal_losses(tmp_path):
    expected = losses_of_training(tmp_path / "theirs", ici_data_parallelism=8)
    with freeio_exchange():
        ours = losses_of_training(tmp_path / "ours", **MESHES["expert 8"])
    assert len(expected) == 4
    assert {"learning/lm_loss", "learning/moe_lb_loss"} <= expected[0].keys()
    lm_loss = [step["learning/lm_loss"] for step in expected]
    assert lm_loss[-1] < lm_loss[0]
    for theirs, mine in zip(expected, ours, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_drops_are_reported(tmp_path):
    """``ragged_buffer_factor`` is the room of a rank; what does not fit is counted."""
    x, drops = inputs(seed=2), []
    factor, mesh = 1.25, {"ici_expert_parallelism": 8, "ici_data_parallelism": 1}
    with routed_moe(tmp_path, ragged_buffer_factor=factor, **mesh) as layer:
        logits = np.asarray(x).reshape(-1, WIDTH) @ np.asarray(layer.gate.kernel[...])
        chosen = np.argsort(-logits, axis=-1)[:, :TOP_K]
        graph, state = nnx.split(layer)
        with freeio_exchange(on_drop=drops.append):
            evaluate = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])
            jax.block_until_ready(evaluate(state, x))
            jax.effects_barrier()
    load = np.bincount(chosen.ravel(), minlength=EXPERTS)  # one expert on each rank
    room = int(chosen.size // 8 * factor)
    expected = np.maximum(load - room, 0)
    assert expected.sum() > 0
    assert sorted(drops) == sorted(expected[expected > 0].tolist())


#: MaxText's policies, and the dispatches of a layer in a training step. ``custom`` saves the rows.
POLICIES = {
    "none": 1,
    "custom": 1,
    "full": 2,
    "minimal": 2,
    "minimal_with_context": 2,
    "minimal_flash": 2,
    "minimal_with_quantization": 2,
    "minimal_with_context_and_quantization": 2,
    "minimal_offloaded": 2,
    "save_dot_except_mlp": 2,
    "save_dot_except_mlpwi": 2,
    "save_dot_with_context_except_mlp": 2,
    "save_qkv_proj": 2,
    "qkv_proj_offloaded": 2,
    "save_out_proj": 2,
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_each_remat_policy_exchanges(name, tmp_path):
    """MaxText's policies are lists of names. It names the rows that a dispatch returns."""
    saved = {"moe_x_sorted": "device"} if name == "custom" else {}
    options = MESHES["data 2, expert 4"] | saved
    with routed_moe(tmp_path, remat_policy=name, **options) as layer, freeio_exchange():
        graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

        def evaluate(parameters, x):
            return nnx.merge(graph, parameters, rest)(x)[0]

        step = evaluate
        if name != "none":
            step = jax.checkpoint(evaluate, policy=policy_of_maxtext(layer.config))
        gradient = jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(step(*args))), argnums=(0, 1)))
        program = gradient.lower(parameters, inputs(seed=3)).compile().as_text()
    calls = Counter(re.findall(r'custom_call_target="(freeio_\w+)"', program))
    assert calls["freeio_dispatch"] == POLICIES[name]
    # The way back of the rows is a combine, and that of the results its transpose.
    assert calls["freeio_combine"] == 2
    assert calls["freeio_combine_transpose"] == 1


def policy_of_maxtext(config):
    """What MaxText's decoder gives to ``jax.checkpoint``, without making the decoder."""
    decoder = types.SimpleNamespace(config=config)
    decoder.minimal_policy = functools.partial(NNXDecoder.minimal_policy, decoder)
    return NNXDecoder.get_remat_policy(decoder)


def test_every_remat_policy_is_counted():
    """Those of MaxText's source are in the test above, and in the table of docs/adopting.md."""
    source = inspect.getsource(NNXDecoder.get_remat_policy)
    compared = re.findall(r"remat_policy (?:==|!=|in) (.*)", source)
    assert set(re.findall(r'"(\w+)"', " ".join(compared))) == set(POLICIES)
    page = (pathlib.Path(__file__).parents[2] / "docs" / "adopting.md").read_text()
    rows = re.findall(r"^\| (.*`\w+`.*) \| (\d) \| 2 \| 1 \|$", page, re.MULTILINE)
    told = {n: int(count) for names, count in rows for n in re.findall(r"`(\w+)`", names)}
    assert told == POLICIES


def test_what_is_not_supported_is_refused(tmp_path):
    with (
        routed_moe(tmp_path, **MESHES["expert 8"], use_ring_of_experts=True) as layer,
        freeio_exchange(),
        pytest.raises(NotImplementedError, match="use_ring_of_experts=True"),
    ):
        layer(inputs(seed=4))


def test_maxtext_is_itself_again_afterwards():
    before = vars(RoutedMoE)["permute"]
    with contextlib.suppress(KeyError), freeio_exchange():
        assert vars(RoutedMoE)["permute"] is not before
        raise KeyError
    assert vars(RoutedMoE)["permute"] is before
