"""Wrong use is a clear error at trace time: its type, the argument, its shape or value, the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import PartitionSpec as P

import freeio_jax as fio

RANKS, TOKENS, TOP_K, EXPERTS, CAPACITY = 2, 3, 2, 4, 12


def trace_dispatch(tokens=None, topk_idx=None, mesh=None, **options):
    """Traces one rank's dispatch of ``tokens`` [T, H] along ``topk_idx`` [T, K]."""
    tokens = jnp.zeros((TOKENS, 5)) if tokens is None else tokens
    topk_idx = jnp.zeros((TOKENS, TOP_K), jnp.int32) if topk_idx is None else topk_idx
    options = {"num_experts": EXPERTS, "axis_name": "expert"} | options

    def fn(tokens, topk_idx):
        return fio.dispatch(tokens, topk_idx, **options).tokens

    mesh = make_mesh(RANKS) if mesh is None else mesh
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P()), out_specs=P("expert"))
    return jax.eval_shape(mapped, tokens, topk_idx)


def trace_combine(expert_out=None, topk_weights=None, *, handle=None):
    expert_out = jnp.zeros((CAPACITY, 5)) if expert_out is None else expert_out

    def fn(topk_idx):
        out = fio.dispatch(topk_idx, topk_idx, num_experts=EXPERTS, axis_name="expert")
        assert out.tokens.shape[0] == CAPACITY
        return fio.combine(expert_out, out.handle if handle is None else handle, topk_weights)

    mapped = jax.shard_map(fn, mesh=make_mesh(RANKS), in_specs=P(), out_specs=P("expert"))
    return jax.eval_shape(mapped, jnp.zeros((TOKENS, TOP_K), jnp.int32))


def raises(error, *parts):
    """Expects exactly ``error``, with a message that contains every one of ``parts``."""
    match = "".join(f"(?=.*{part})" for part in map(_escape, parts))
    return pytest.raises(error, match=f"(?s)^{match}", check=lambda e: type(e) is error)


def _escape(part):
    return "".join("\\" + c if c in "()[].*+?|^$" else c for c in part)


def test_good_arguments_trace():
    assert trace_dispatch().shape == (RANKS * CAPACITY, 5)
    assert trace_combine().shape == (RANKS * TOKENS, 5)


# --- Where the call is ---------------------------------------------------------------------------


def test_dispatch_outside_shard_map():
    with raises(NameError, "dispatch", "'expert'", "shard_map"):
        fio.dispatch(
            jnp.zeros((3, 5)), jnp.zeros((3, 2), jnp.int32), num_experts=4, axis_name="expert"
        )


def test_dispatch_under_jit_alone():
    with raises(NameError, "dispatch", "'expert'", "shard_map"), jax.set_mesh(make_mesh(RANKS)):
        jax.jit(lambda x, i: fio.dispatch(x, i, num_experts=4, axis_name="expert").tokens)(
            jnp.zeros((3, 5)), jnp.zeros((3, 2), jnp.int32)
        )


def test_combine_outside_shard_map():
    kept = []

    def fn(topk_idx):
        out = fio.dispatch(topk_idx, topk_idx, num_experts=EXPERTS, axis_name="expert")
        kept.append(out.handle)
        return out.tokens

    mapped = jax.shard_map(fn, mesh=make_mesh(RANKS), in_specs=P(), out_specs=P("expert"))
    jax.eval_shape(mapped, jnp.zeros((TOKENS, TOP_K), jnp.int32))
    with raises(NameError, "combine", "'expert'", "shard_map"):
        fio.combine(jnp.zeros((CAPACITY, 5)), kept[0])


def test_axis_that_the_mesh_lacks():
    with raises(NameError, "dispatch", "'experts'", "'expert'", "shard_map"):
        trace_dispatch(axis_name="experts")


def test_one_of_several_axes_lacks():
    with raises(NameError, "dispatch", "'model'"):
        trace_dispatch(axis_name=("expert", "model"))


def test_axis_that_is_not_manual():
    mesh = make_mesh((2, 2), ("data", "expert"))

    def fn(x, i):
        return fio.dispatch(x, i, num_experts=EXPERTS, axis_name="expert").tokens

    mapped = jax.shard_map(
        fn, mesh=mesh, in_specs=(P(), P()), out_specs=P("data"), axis_names={"data"}
    )
    with raises(NameError, "dispatch", "'expert'", "'data'", "shard_map"):
        jax.eval_shape(mapped, jnp.zeros((3, 5)), jnp.zeros((3, 2), jnp.int32))


@pytest.mark.parametrize(
    "axis_name", [None, 0, (), ("expert", "expert"), ("expert", 1), P("expert")]
)
def test_axis_name_is_a_name_or_a_tuple_of_names(axis_name):
    with raises(TypeError, "dispatch", "axis_name", "tuple", repr(axis_name)):
        trace_dispatch(axis_name=axis_name)


def test_axis_name_of_a_vmap():
    def fn(x, i):
        inner = jax.vmap(
            lambda x, i: fio.dispatch(x, i, num_experts=EXPERTS, axis_name="v").tokens,
            axis_name="v",
        )
        return inner(x, i)

    mapped = jax.shard_map(fn, mesh=make_mesh(RANKS), in_specs=P(), out_specs=P("expert"))
    with raises(NameError, "dispatch", "'v'", "shard_map"):
        jax.eval_shape(mapped, jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 2), jnp.int32))


# --- topk_idx and tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, fix", [((3,), "topk_idx[:, None]"), ((1, 3, 2), "Flatten"), ((), "[T, K]")]
)
def test_topk_idx_has_two_dimensions(shape, fix):
    with raises(ValueError, "dispatch", "topk_idx", "[T, K]", str(shape), fix):
        trace_dispatch(topk_idx=jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("dtype", ["uint32", "int16", "float32", "bool"])
def test_topk_idx_is_int32(dtype):
    with raises(TypeError, "dispatch", "topk_idx", "int32", dtype, "astype(jnp.int32)"):
        trace_dispatch(topk_idx=jnp.zeros((TOKENS, TOP_K), dtype))


def test_topk_idx_is_int32_under_x64():
    with jax.enable_x64(True), raises(TypeError, "topk_idx", "int64", "astype(jnp.int32)"):
        trace_dispatch(topk_idx=jnp.zeros((TOKENS, TOP_K), jnp.int64))


def test_topk_idx_has_a_column():
    with raises(ValueError, "dispatch", "topk_idx", "(3, 0)", "-1"):
        trace_dispatch(topk_idx=jnp.zeros((TOKENS, 0), jnp.int32))


@pytest.mark.parametrize("tokens", [{}, (), []])
def test_tokens_have_a_leaf(tokens):
    with raises(ValueError, "dispatch", "tokens", "empty", "[T, ...]"):
        trace_dispatch(tokens=tokens)


@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (6,), ()])
def test_tokens_agree_with_topk_idx(shape):
    with raises(ValueError, "dispatch", "tokens", str(shape), "(3, 2)", "T=3"):
        trace_dispatch(tokens=jnp.zeros(shape))


def test_the_wrong_leaf_is_named():
    tokens = {"rows": jnp.zeros((3, 5)), "scales": [jnp.zeros((3,)), jnp.zeros((2, 1))]}
    with raises(ValueError, "tokens['scales'][1]", "(2, 1)", "T=3"):
        trace_dispatch(tokens=tokens)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
def test_tokens_of_parts_of_bytes(dtype):
    with raises(TypeError, "dispatch", "tokens['x']", dtype, "bitcast_convert_type"):
        trace_dispatch(tokens={"x": jax.ShapeDtypeStruct((3, 4), getattr(jnp, dtype))})


def test_tokens_of_keys():
    with raises(TypeError, "dispatch", "tokens", "key<fry>"):
        trace_dispatch(tokens=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3)))


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts, fix", [(3, "4"), (1, "2")])
def test_experts_divide_over_ranks(num_experts, fix):
    with raises(ValueError, "dispatch", f"num_experts={num_experts}", "2 ranks", f"Use {fix}"):
        trace_dispatch(num_experts=num_experts)


@pytest.mark.parametrize(
    "option, value, least",
    [("num_experts", 0, 1), ("num_experts", -4, 1), ("alignment", 0, 1), ("capacity", -1, 0)],
)
def test_sizes_out_of_range(option, value, least):
    with raises(ValueError, "dispatch", option, f"at least {least}", str(value)):
        trace_dispatch(**{option: value})


@pytest.mark.parametrize("option", ["num_experts", "capacity", "alignment"])
@pytest.mark.parametrize("value", [4.0, "4", True, (4,)])
def test_sizes_are_ints(option, value):
    with raises(TypeError, "dispatch", option, "int", repr(value)):
        trace_dispatch(**{option: value})


@pytest.mark.parametrize("option", ["num_experts", "capacity", "alignment"])
def test_sizes_are_not_traced(option):
    with raises(TypeError, "dispatch", option, "static", "traced"):
        jax.eval_shape(lambda n: trace_dispatch(**{option: n}), jnp.int32(4))


@pytest.mark.parametrize("value", [0, None, "no"])
def test_zero_tail_is_a_bool(value):
    with raises(TypeError, "dispatch", "zero_tail", "True or False", repr(value)):
        trace_dispatch(zero_tail=value)


def test_zero_tail_is_not_traced():
    with raises(TypeError, "dispatch", "zero_tail", "traced"):
        jax.eval_shape(lambda flag: trace_dispatch(zero_tail=flag), jnp.bool_(True))


def test_numpy_ints_are_sizes():
    sizes = {"num_experts": np.int64(4), "capacity": np.int32(8), "alignment": np.uint8(4)}
    assert trace_dispatch(**sizes).shape == (RANKS * 8, 5)


def test_capacity_is_a_multiple_of_alignment():
    with raises(ValueError, "dispatch", "capacity=10", "alignment=4", "capacity=12"):
        trace_dispatch(capacity=10, alignment=4)


def test_rows_are_counted_in_int32():
    with raises(ValueError, "dispatch", "capacity", str(2**31), "int32"):
        trace_dispatch(capacity=2**31)
    # Also what no row needs: the kernels divide by it.
    with raises(ValueError, "dispatch", "alignment", str(2**32), "int32"):
        trace_dispatch(capacity=0, alignment=2**32)


# --- combine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(CAPACITY - 1, 5), (0, 5), ()])
def test_expert_out_has_a_row_for_each_packed_row(shape):
    with raises(ValueError, "combine", "expert_out", str(shape), f"capacity={CAPACITY}"):
        trace_combine(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64"])
def test_expert_out_is_floating(dtype):
    with raises(TypeError, "combine", "expert_out", dtype, "float32", "astype"):
        trace_combine(jnp.zeros((CAPACITY, 5), dtype))


@pytest.mark.parametrize(
    "leaves", [{"a": jnp.zeros((CAPACITY, 5))}, [jnp.zeros((CAPACITY, 5))], ()]
)
def test_expert_out_is_one_array(leaves):
    with raises(TypeError, "combine", "expert_out", type(leaves).__name__, "jax.tree.map"):
        trace_combine(leaves)


@pytest.mark.parametrize("shape", [(TOKENS,), (TOKENS, TOP_K + 1), (TOP_K, TOKENS), (CAPACITY,)])
def test_topk_weights_have_the_shape_of_topk_idx(shape):
    with raises(ValueError, "combine", "topk_weights", str(shape), "(3, 2)"):
        trace_combine(topk_weights=jnp.zeros(shape))


def test_topk_weights_are_floating():
    with raises(TypeError, "combine", "topk_weights", "int32", "astype(jnp.float32)"):
        trace_combine(topk_weights=jnp.zeros((TOKENS, TOP_K), jnp.int32))


@pytest.mark.parametrize("handle", [(1, 2), "handle"])
def test_handle_is_a_handle(handle):
    with raises(TypeError, "combine", "handle", "dispatch", type(handle).__name__):
        trace_combine(handle=handle)


def test_the_whole_result_is_no_handle():
    def fn(topk_idx):
        out = fio.dispatch(topk_idx, topk_idx, num_experts=EXPERTS, axis_name="expert")
        return fio.combine(jnp.zeros((CAPACITY, 5)), out)

    mapped = jax.shard_map(fn, mesh=make_mesh(RANKS), in_specs=P(), out_specs=P("expert"))
    with raises(TypeError, "combine", "handle", "Dispatched"):
        jax.eval_shape(mapped, jnp.zeros((TOKENS, TOP_K), jnp.int32))


# --- Settings ------------------------------------------------------------------------------------


def test_config_returns_and_changes_settings():
    before = fio.config()
    try:
        assert fio.config(timeout=12)["timeout"] == 12.0
        assert fio.config()["timeout"] == 12.0
    finally:
        assert fio.config(**before) == before


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e10, "soon", None])
def test_timeout_is_a_positive_number_of_seconds(value):
    before = fio.config()
    with raises(ValueError, "timeout", repr(value)):
        fio.config(timeout=value)
    assert fio.config() == before


def test_a_wrong_setting_changes_no_other():
    before = fio.config()
    with raises(ValueError, "verbosity", "7"):
        fio.config(timeout=before["timeout"] + 1, verbosity=7)
    assert fio.config() == before


def test_unknown_setting():
    with raises(TypeError, "time_out", "timeout"):
        fio.config(time_out=3)


def test_initialize_in_one_process_is_harmless():
    fio.initialize()
    fio.initialize()
