"""The engine and the reference agree: geometry, routing, skew, dtypes and values at random.

Geometries and dtypes come from bounded sets, because each pair is compiled once; the data of every
example are new. A failure prints what reproduces it.
"""

import jax.numpy as jnp
import numpy as np
import oracle
from helpers import (
    ROUTINGS,
    Geometry,
    assert_bitwise,
    exchange_fn,
    pool_rows,
    power_of_two_weights,
    random_bits,
    routing,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freeio_jax import reference

# num_ranks, num_tokens, top_k, num_experts, capacity, alignment; dtype of tokens and of rows.
CASES = [
    (Geometry(1, 7, 3, 5), "bfloat16", "bfloat16"),
    (Geometry(2, 1, 4, 2), "float8_e4m3fn", "float16"),
    (Geometry(2, 9, 2, 8, 16, 8), "int32", "float32"),
    (Geometry(3, 4, 4, 9, 11), "float8_e5m2", "bfloat16"),
    (Geometry(4, 6, 2, 4, 24, 4), "float16", "float8_e5m2"),
    (Geometry(5, 2, 3, 10), "int8", "float8_e4m3fn"),
    (Geometry(6, 3, 6, 18, alignment=4), "float32", "bfloat16"),
    (Geometry(7, 2, 1, 7, 3), "bfloat16", "float32"),
    (Geometry(8, 5, 8, 24, 40), "bfloat16", "bfloat16"),
    (Geometry(8, 3, 2, 8, 0), "float32", "float32"),
]
SETTINGS = settings(
    max_examples=120,
    deadline=None,  # the first example of a case compiles
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def examples(draw):
    geometry, token_dtype, row_dtype = draw(st.sampled_from(CASES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = (geometry.num_ranks, geometry.num_tokens)
    topk_idx = routing(rng, geometry, draw(st.sampled_from(sorted(ROUTINGS))))
    # A few ids of hypothesis' own choosing, so that it can shrink towards the one that matters.
    at = st.tuples(*(st.integers(0, n - 1) for n in topk_idx.shape))
    expert = st.integers(-2, geometry.num_experts) | st.sampled_from([-(2**31), 2**31 - 1])
    for index, value in draw(st.lists(st.tuples(at, expert), max_size=4)):
        topk_idx[index] = value
    tokens = random_bits(rng, (*lead, 5), getattr(jnp, token_dtype))
    exact = draw(st.booleans())
    weights = (
        power_of_two_weights(rng, topk_idx.shape)
        if exact
        else values(rng, topk_idx.shape, np.float32)
    )
    pool = values(rng, (lead[0], pool_rows(geometry), 3), np.dtype(getattr(jnp, row_dtype)))
    return geometry, (tokens, topk_idx, pool, weights), exact


@SETTINGS
@given(examples())
def test_engine_and_reference_agree(example):
    geometry, arguments, exact = example
    out, expert_out, z = exchange_fn(geometry)(*arguments)
    expected, _, expected_z = exchange_fn(geometry, api=reference)(*arguments)
    for name, value in expected.items():
        assert_bitwise(out[name], value, name)

    again, _, again_z = exchange_fn(geometry)(*arguments)
    for name, value in out.items():
        assert_bitwise(again[name], value, f"second run: {name}")
    assert_bitwise(again_z, z, "second run: combine")

    z, expected_z, expert_out = map(np.asarray, (z, expected_z, expert_out))
    assert (z.shape, z.dtype) == (expected_z.shape, expected_z.dtype)
    z, expected_z = z.astype(np.float64), expected_z.astype(np.float64)
    if exact:
        np.testing.assert_array_equal(z, expected_z)
        return
    _, topk_idx, _, weights = arguments
    placement = geometry.place(topk_idx, expert_out.shape[1])
    tolerance = oracle.combine_tolerance(expert_out, placement, geometry.topk_shape, weights)
    assert np.all(np.abs(z - expected_z) <= tolerance)
