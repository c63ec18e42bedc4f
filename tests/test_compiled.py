"""What XLA makes of an exchange: one custom call, and nothing around it that moves a row."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import lowering_platform, make_mesh
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import hosts

#: None of these touches memory.
FREE = {"parameter", "partition-id", "get-tuple-element", "tuple", "bitcast"}


# Of what else the program consists is XLA's affair if XLA moves the rows.
pytestmark = pytest.mark.skipif(
    jax.process_count() > 1 and hosts.there_are_several(), reason="no engine moves rows here"
)


def operations(compiled):
    """Opcodes of all instructions, and the targets of the custom calls."""
    text = compiled.as_text()
    opcodes = re.findall(r"^ +(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(", text, re.M)
    targets = re.findall(r'custom_call_target="([^"]+)"', text)
    # On GPUs this program has one more call, which does nothing when it runs.
    checks = targets.count("freeio_check")
    assert checks <= 1
    for _ in range(checks):
        opcodes.remove("custom-call")
        targets.remove("freeio_check")
    return opcodes, targets


def test_a_layer_is_two_custom_calls():
    mesh = make_mesh(2, axis_types=(AxisType.Auto,))

    def layer(tokens, topk_idx, weights):
        out = fio.dispatch(tokens, topk_idx, num_experts=8, axis_name="expert", capacity=64)
        return out.tokens, out.group_sizes, fio.combine(out.tokens, out.handle, weights)

    spec = P("expert")
    compiled = (
        jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec))
        .lower(
            jax.ShapeDtypeStruct((32, 16), jnp.bfloat16),
            jax.ShapeDtypeStruct((32, 2), jnp.int32),
            jax.ShapeDtypeStruct((32, 2), jnp.float32),
        )
        .compile()
    )
    opcodes, targets = operations(compiled)
    assert targets == ["freeio_dispatch", "freeio_combine"]
    assert opcodes.count("custom-call") == 2
    assert set(opcodes) <= FREE | {"custom-call"}, opcodes


def test_a_platform_without_an_engine():
    mesh = make_mesh(2, axis_types=(AxisType.Auto,))

    def layer(tokens, topk_idx):
        return fio.dispatch(tokens, topk_idx, num_experts=8, axis_name="expert").tokens

    spec = P("expert")
    traced = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)).trace(
        jax.ShapeDtypeStruct((32, 16), jnp.bfloat16), jax.ShapeDtypeStruct((32, 2), jnp.int32)
    )
    with pytest.raises(NotImplementedError) as error:
        traced.lower(lowering_platforms=("tpu",))
    text = str(error.value)
    assert "freeio_jax.dispatch has no engine for platform(s) ('tpu',)" in text
    assert "freeio_jax.reference runs on every platform" in text
    with pytest.raises(NotImplementedError, match="has no engine for platform"):
        traced.lower(lowering_platforms=(lowering_platform(), "tpu"))


SIZES = {
    # T, H, capacity
    "no tokens": (0, 3, 4),
    "no rows": (2, 3, 0),
    "no width": (2, 0, 4),
    "nothing at all": (0, 0, 0),
}


@pytest.mark.parametrize("num_tokens, width, capacity", SIZES.values(), ids=SIZES)
def test_buffers_without_elements_stay_out_of_the_calls(num_tokens, width, capacity):
    """Not every XLA can compile such calls. What stands for them gives the same."""
    mesh = make_mesh(2, axis_types=(AxisType.Auto,))

    def layer(tokens, topk_idx, weights):
        def exchange(tokens, weights):
            out = fio.dispatch(
                tokens, topk_idx, num_experts=2, axis_name="expert", capacity=capacity
            )
            return fio.combine(out.tokens, out.handle, weights), out

        z, pull, out = jax.vjp(exchange, tokens, weights, has_aux=True)
        handle = out.handle
        counts = out.group_sizes, handle.expert_load, handle.num_dropped[None]
        return z, out.tokens, *counts, *pull(jnp.ones_like(z))

    spec = P("expert")
    run = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec))
    tokens = jnp.ones((2 * num_tokens, width))
    topk_idx = jnp.zeros((2 * num_tokens, 2), jnp.int32)
    text = run.lower(tokens, topk_idx, topk_idx * 0.5).as_text()
    calls = re.findall(r".*@freeio_(?!check\().*", text)
    # Without tokens or rows there is nothing to do but the routing; without width, but that and the
    # weights' gradient, which is zero.
    assert len(calls) == (2 if num_tokens and capacity else 1)
    types = [line.rsplit(" : ", 1)[1] for line in calls]
    assert not any(re.search(r"[<x]0x", text) for text in types), types
    z, rows, sizes, load, dropped, d_tokens, d_weights = run(tokens, topk_idx, topk_idx * 0.5)
    assert z.shape == d_tokens.shape == tokens.shape
    assert rows.shape == (2 * capacity, width)
    # Expert 0, on rank 0, is asked for by every assignment.
    everything = 4 * num_tokens
    kept = min(everything, capacity)
    assert sizes.tolist() == [kept, 0]
    assert load.tolist() == [everything, 0]
    assert dropped.tolist() == [everything - kept, 0]
    assert d_weights.shape == topk_idx.shape
    assert not d_weights.any()


def test_a_leaf_without_elements_stays_out_of_the_call_of_others():
    def swap(leaves, topk_idx):
        return fio.dispatch(leaves, topk_idx, num_experts=2, axis_name="expert").tokens

    spec, mesh = P("expert"), make_mesh(2, axis_types=(AxisType.Auto,))
    run = jax.jit(jax.shard_map(swap, mesh=mesh, in_specs=spec, out_specs=spec))
    leaves = {"empty": jnp.ones((4, 0, 3)), "full": jnp.ones((4, 3))}
    topk_idx = jnp.array([[0], [1], [1], [0]], jnp.int32)
    (call,) = re.findall(r".*@freeio_dispatch\(.*", run.lower(leaves, topk_idx).as_text())
    assert not re.search(r"[<x]0x", call.rsplit(" : ", 1)[1]), call
    rows = run(leaves, topk_idx)
    assert rows["empty"].shape == (*rows["full"].shape[:1], 0, 3)
    assert rows["full"].sum() == leaves["full"].sum()


def test_a_device_of_a_mesh_without_devices_may_be_any():
    """On GPUs the call has to find out by itself where it runs."""

    def layer(tokens, topk_idx):
        out = fio.dispatch(tokens, topk_idx, num_experts=2, axis_name="expert")
        return fio.combine(out.tokens, out.handle)

    mesh = AbstractMesh((1,), ("expert",), axis_types=(AxisType.Explicit,))
    layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    for device in jax.local_devices():
        tokens, topk_idx = jax.device_put(
            (jnp.arange(6.0).reshape(2, 3), jnp.array([[0, 1], [1, -1]], jnp.int32)), device
        )
        z = layer(tokens, topk_idx)
        assert z.tolist() == [[0, 2, 4], [3, 4, 5]]
        assert z.devices() == {device}
