"""What XLA makes of an exchange: one custom call, and nothing around it that moves a row."""

import re

import jax
import jax.numpy as jnp
from helpers import make_mesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

#: None of these touches memory.
FREE = {"parameter", "partition-id", "get-tuple-element", "tuple", "bitcast"}


def operations(compiled):
    """Opcodes of all instructions, and the targets of the custom calls."""
    text = compiled.as_text()
    opcodes = re.findall(r"^ +(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(", text, re.M)
    return opcodes, re.findall(r'custom_call_target="([^"]+)"', text)


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
