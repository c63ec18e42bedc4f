"""SwiGLU experts against one expert at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from freeio_jax.flax.experts import shared_swiglu, swiglu


def test_each_group_sees_its_own_expert(rng):
    sizes, rows = jnp.array([5, 0, 9], jnp.int32), jnp.asarray(rng.normal(size=(20, 6)))
    gate_up, down = (
        jnp.asarray(rng.normal(size=(3, 6, 16))),
        jnp.asarray(rng.normal(size=(3, 8, 6))),
    )
    out = swiglu(rows, gate_up, down, sizes)
    gate, up = np.split(np.asarray(gate_up), 2, axis=-1)
    for group, part in ((0, slice(0, 5)), (2, slice(5, 14))):
        x = np.asarray(rows[part])
        g = x @ gate[group]
        expected = (g / (1 + np.exp(-g)) * (x @ up[group])) @ np.asarray(down[group])
        np.testing.assert_allclose(out[part], expected, rtol=1e-4, atol=1e-4)
        shared = shared_swiglu(rows[part], gate_up[group], down[group])
        np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-4)
    assert not out[14:].any()


def test_rows_past_the_end_leave_no_trace(rng):
    sizes = jnp.array([5, 0, 9], jnp.int32)
    rows, gate_up, down, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((20, 6), (3, 6, 16), (3, 8, 6), (20, 6))
    )

    def loss(rows, gate_up, down, weight):
        return jnp.sum(swiglu(rows, gate_up, down, sizes)[:14] * weight[:14])

    clean = jax.grad(loss, (0, 1, 2))(rows.at[14:].set(0), gate_up, down, weight)
    dirty = jax.grad(loss, (0, 1, 2))(rows.at[14:].set(jnp.nan), gate_up, down, weight)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not dirty[0][14:].any()
