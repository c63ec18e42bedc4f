"""What is measured: shapes, routing, and the functions under test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Shape:
    """One MoE exchange, in the contract's letters; ``num_tokens`` is of one rank."""

    num_ranks: int
    num_tokens: int
    hidden: int
    top_k: int
    num_experts: int
    dtype: str = "float32"
    capacity_factor: float | None = None

    @property
    def capacity(self) -> int | None:
        """Rows per rank: ``capacity_factor`` times the mean load; None: the dropless bound."""
        if self.capacity_factor is None:
            return None
        return int(np.ceil(self.capacity_factor * self.num_tokens * self.top_k))

    def __str__(self) -> str:
        capacity = "dropless" if self.capacity is None else f"capacity {self.capacity_factor:g}x"
        return (
            f"R={self.num_ranks} T={self.num_tokens} H={self.hidden} K={self.top_k} "
            f"E={self.num_experts} {self.dtype} {capacity}"
        )


def uniform_routing(shape: Shape, seed: int) -> np.ndarray:
    """``[R*T, K]`` distinct expert ids per token, uniformly at random."""
    rng = np.random.default_rng(seed)
    scores = rng.random((shape.num_ranks * shape.num_tokens, shape.num_experts))
    return np.argsort(scores, axis=1)[:, : shape.top_k].astype(np.int32)


def operations(shape: Shape, library: ModuleType, seed: int = 0) -> dict[str, Callable[[], object]]:
    """Calls to time: ``dispatch``, ``combine``, and ``both + gradients``, with their inputs bound.

    ``library`` is ``freeio_jax`` or ``freeio_jax.reference``: the same contract.
    """
    mesh = jax.make_mesh(
        (shape.num_ranks,),
        ("expert",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: shape.num_ranks],
    )
    spec = PartitionSpec("expert")
    rng = np.random.default_rng(seed)
    num_rows = shape.num_ranks * shape.num_tokens

    def put(array):
        return jax.device_put(array, NamedSharding(mesh, spec))

    tokens = put(jnp.asarray(rng.standard_normal((num_rows, shape.hidden)), shape.dtype))
    weights = put(rng.random((num_rows, shape.top_k), np.float32))
    topk_idx = put(uniform_routing(shape, seed))

    def sharded(function, num_in):
        return jax.shard_map(function, mesh=mesh, in_specs=(spec,) * num_in, out_specs=spec)

    def dispatch(tokens, topk_idx):
        out = library.dispatch(
            tokens,
            topk_idx,
            num_experts=shape.num_experts,
            axis_name="expert",
            capacity=shape.capacity,
        )
        # Scalars per rank become vectors over the ranks.
        return out.tokens, jax.tree.map(jnp.atleast_1d, out.handle)

    def combine(rows, handle, weights):
        handle = jax.tree.unflatten(
            handle_tree,
            [a.reshape(s) for a, s in zip(jax.tree.leaves(handle), handle_shapes, strict=True)],
        )
        return library.combine(rows, handle, weights)

    def both(tokens, topk_idx, weights):
        rows, handle = dispatch(tokens, topk_idx)
        return combine(rows, handle, weights)

    def loss(tokens, weights, topk_idx):
        return jnp.sum(sharded(both, 3)(tokens, topk_idx, weights).astype(jnp.float32) ** 2)

    jitted_dispatch = jax.jit(sharded(dispatch, 2))
    scalars = {"num_dropped", "num_invalid"}
    rows, handle = jax.block_until_ready(jitted_dispatch(tokens, topk_idx))
    handle_tree = jax.tree.structure(handle)
    handle_shapes = [
        () if path[-1].name in scalars else (-1, *leaf.shape[1:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(handle)
    ]
    jitted_combine = jax.jit(sharded(combine, 3))
    jitted_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return {
        "dispatch": lambda: jitted_dispatch(tokens, topk_idx),
        "combine": lambda: jitted_combine(rows, handle, weights),
        "both + gradients": lambda: jitted_gradients(tokens, weights, topk_idx),
    }
