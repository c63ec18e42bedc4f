"""What is measured: shapes, routing, and the calls of the comparison on CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


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


def expert_mesh(num_ranks: int) -> Mesh:
    """The first devices, along an axis ``expert``."""
    devices = np.array(jax.devices()[:num_ranks])
    return Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))


# --- Routing: distinct expert ids [R*T, K] for each token ----------------------------------------


def uniform_routing(shape: Shape, seed: int) -> np.ndarray:
    """Uniformly at random."""
    return _best(np.random.default_rng(seed).random(_scores_shape(shape), np.float32), shape.top_k)


def zipf_routing(shape: Shape, seed: int) -> np.ndarray:
    """Popular experts and others: drawn without replacement, the n-th most popular with weight 1/n.

    A token's first id follows that distribution exactly. Which expert is how popular is random, so
    the popular ones are spread over the ranks.
    """
    rng = np.random.default_rng(seed)
    weight = 1 / (1 + rng.permutation(shape.num_experts))
    # The largest of log-weights plus Gumbel noise are a draw without replacement.
    noise = rng.gumbel(size=_scores_shape(shape))
    return _best((np.log(weight) + noise).astype(np.float32), shape.top_k)


def half_routing(shape: Shape, seed: int) -> np.ndarray:
    """Half of all assignments to rank 0, the rest uniformly to the others."""
    scores = np.random.default_rng(seed).random(_scores_shape(shape), np.float32)
    if shape.num_ranks == 1:
        return _best(scores, shape.top_k)
    local = shape.num_experts // shape.num_ranks
    here, there = (
        _best(part, min(shape.top_k, part.shape[1])) for part in np.split(scores, [local], axis=1)
    )
    # Half of an odd K by turns.
    token, k = np.arange(len(scores))[:, None], np.arange(shape.top_k)
    num_here = (token + 1) * shape.top_k // 2 - token * shape.top_k // 2
    return np.where(
        k < num_here,
        here[:, np.minimum(k, here.shape[1] - 1)],
        local + np.take_along_axis(there, np.maximum(k - num_here, 0), axis=1),
    ).astype(np.int32)


def _scores_shape(shape):
    return shape.num_ranks * shape.num_tokens, shape.num_experts


def _best(scores, top_k):
    """The ``top_k`` ids of the largest scores, largest first."""
    some = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(scores, some, axis=1), axis=1)
    return np.take_along_axis(some, order, axis=1).astype(np.int32)


ROUTINGS = {"uniform": uniform_routing, "half": half_routing, "zipf": zipf_routing}


def loads(topk_idx: np.ndarray, shape: Shape) -> np.ndarray:
    """int ``[source, destination]``: assignments between each two ranks."""
    dest = topk_idx.reshape(shape.num_ranks, -1) // (shape.num_experts // shape.num_ranks)
    return (dest[..., None] == np.arange(shape.num_ranks)).sum(1)


# --- The comparison on CPU -----------------------------------------------------------------------


def operations(shape: Shape, library: ModuleType, seed: int = 0) -> dict[str, Callable[[], object]]:
    """Calls to time: ``dispatch``, ``combine``, and ``both + gradients``, with their inputs bound.

    ``library`` is ``freeio_jax`` or ``freeio_jax.reference``: the same contract.
    """
    mesh = expert_mesh(shape.num_ranks)
    spec = PartitionSpec("expert")
    sharding = NamedSharding(mesh, spec)
    rng = np.random.default_rng(seed)
    num_rows = shape.num_ranks * shape.num_tokens

    def put(array):
        # Each process of several puts the ranks of its own devices.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    tokens = rng.standard_normal((num_rows, shape.hidden)).astype(jnp.dtype(shape.dtype))
    tokens = put(tokens)
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
