"""Element types: the list of those that combine sums is the engines' own."""

import jax
import jax.numpy as jnp
import pytest

from freeio_jax import _native
from freeio_jax.dtypes import COMBINE_DTYPES, accumulator_dtype, has_whole_bytes


def test_combine_sums_the_dtypes_that_the_engines_sum():
    assert sorted(d.name for d in COMBINE_DTYPES) == sorted(_native.combine_dtypes)


def test_sums_are_in_float32_but_for_float64():
    assert {accumulator_dtype(d).name for d in COMBINE_DTYPES if d != jnp.float64} == {"float32"}
    assert accumulator_dtype(jnp.float64) == jnp.float64


@pytest.mark.parametrize(
    "dtype, whole",
    [
        (jnp.int4, False),
        (jnp.uint4, False),
        (jnp.float4_e2m1fn, False),
        (jax.dtypes.prng_key, False),
        (jnp.bool_, True),
        (jnp.int8, True),
        (jnp.float8_e8m0fnu, True),
        (jnp.bfloat16, True),
        (jnp.complex64, True),
    ],
)
def test_elements_of_whole_bytes(dtype, whole):
    assert has_whole_bytes(dtype) == whole
