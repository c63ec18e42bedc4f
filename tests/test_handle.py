"""What a dispatch's result says of its rows and assignments, against the oracle's placement."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Geometry, make_mesh, per_shard, routing

import freeio_jax as fio
from freeio_jax import reference

GEOMETRIES = [
    Geometry(2, 5, 3, 6),
    Geometry(4, 6, 2, 8, capacity=6),
    Geometry(4, 6, 2, 8, capacity=8, alignment=4),
    Geometry(1, 0, 2, 4, alignment=2),
]


@pytest.mark.parametrize("api", [fio, reference], ids=["freeio", "reference"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_experts_of_rows_and_assignments_with_rows(geometry, api, rng):
    def fn(tokens, topk_idx):
        out = api.dispatch(tokens, topk_idx, axis_name="expert", **geometry.options())
        return out.expert_of_row(), out.group_sizes, out.handle.has_row()

    topk_idx = routing(rng, geometry, "invalid")
    tokens = jnp.ones((*topk_idx.shape[:2], 1))
    experts, sizes, has_row = map(
        np.asarray, per_shard(fn, make_mesh(geometry.num_ranks))(tokens, topk_idx)
    )
    placement = geometry.place(topk_idx, experts.shape[1])
    np.testing.assert_array_equal(has_row, placement.kept(topk_idx.shape))
    local = geometry.num_experts // geometry.num_ranks
    for of_rows, of_groups in zip(experts, sizes, strict=True):
        past = np.full(len(of_rows) - of_groups.sum(), local)
        np.testing.assert_array_equal(of_rows, [*np.repeat(np.arange(local), of_groups), *past])
