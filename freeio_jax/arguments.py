"""Checks of user arguments at trace time: what is wrong, with which shape, and the fix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from freeio_jax.dtypes import (
    COMBINE_DTYPES,
    accumulator_dtype,
    combine_dtype_names,
    has_whole_bytes,
)
from freeio_jax.handle import Handle
from freeio_jax.layout import Layout


def expert_axes(op: str, axis_name: Any) -> tuple[tuple[str, ...], int]:
    """Canonical axis names and the number of ranks R.

    Raises:
      TypeError: ``axis_name`` is not a name or a tuple of names.
      NameError: a name is no manual mesh axis here, that is, the call is outside ``shard_map``.
    """
    axes = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if not axes or not all(isinstance(a, str) for a in axes) or len(set(axes)) != len(axes):
        raise TypeError(
            f"{op}: axis_name must be a mesh axis name or a tuple of distinct ones, got "
            f"{axis_name!r}."
        )
    mesh = jax.sharding.get_abstract_mesh()
    for axis in axes:
        if axis not in mesh.manual_axes:
            here = tuple(mesh.manual_axes)
            inside = f"manual axes here: {here}" if here else "there are no manual axes here"
            raise NameError(
                f"{op}: {axis!r} is not a manual mesh axis ({inside}). Call {op} per shard, inside "
                f"jax.shard_map over a mesh with an axis {axis!r}."
            )
    return axes, lax.axis_size(axes)


def dispatch_arguments(tokens, topk_idx, *, num_experts, axis_name, capacity, alignment, zero_tail):
    """Returns (leaves, treedef, topk_idx, layout, axes), or raises what the contract names."""
    axes, num_ranks = expert_axes("dispatch", axis_name)
    topk_idx = jnp.asarray(topk_idx)
    if topk_idx.ndim != 2:
        raise ValueError(
            f"dispatch: topk_idx must be [T, K], got shape {topk_idx.shape}."
            + (" For K=1 pass topk_idx[:, None]." if topk_idx.ndim == 1 else "")
            + (" Flatten batch and sequence into T first." if topk_idx.ndim > 2 else "")
        )
    if topk_idx.dtype != jnp.int32:
        raise TypeError(
            f"dispatch: topk_idx must be int32, got {topk_idx.dtype}. "
            "Use topk_idx.astype(jnp.int32)."
        )
    num_tokens, top_k = topk_idx.shape
    if top_k < 1:
        raise ValueError(
            f"dispatch: topk_idx has shape {topk_idx.shape}; each token needs at least one "
            "column (fill it with -1 for 'no expert')."
        )
    leaves, treedef = jax.tree_util.tree_flatten(tokens)
    if not leaves:
        raise ValueError("dispatch: tokens is an empty pytree; pass at least one array [T, ...].")
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for path, leaf in zip(jax.tree_util.tree_leaves_with_path(tokens), leaves, strict=True):
        name = "tokens" + jax.tree_util.keystr(path[0])
        if leaf.ndim == 0 or leaf.shape[0] != num_tokens:
            raise ValueError(
                f"dispatch: {name} has shape {leaf.shape}, but topk_idx {topk_idx.shape} says "
                f"T={num_tokens}: every leaf must be [T, ...] with the same T."
            )
        if not has_whole_bytes(leaf.dtype):
            raise TypeError(
                f"dispatch: {name} has dtype {leaf.dtype}, whose elements are not whole bytes. "
                "Bitcast it to uint8 (jax.lax.bitcast_convert_type) and back after the exchange."
            )
    layout = Layout.create(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        capacity=capacity,
        alignment=alignment,
        zero_tail=zero_tail,
    )
    return leaves, treedef, topk_idx, layout, axes


def overlap_sms(op: str, num_sms: int | None) -> int:
    """``num_sms`` as the engines take it: 0 stands for None.

    Raises:
      TypeError: it is no int.
      ValueError: it is less than 1.
    """
    if num_sms is None:
        return 0
    if isinstance(num_sms, bool) or not isinstance(num_sms, (int, np.integer)):
        raise TypeError(
            f"{op}: num_sms must be an int or None, got {num_sms!r} of type "
            f"{type(num_sms).__name__}."
        )
    if num_sms < 1:
        raise ValueError(
            f"{op}: num_sms must be at least 1, got {num_sms}. None is the setting overlap_num_sms."
        )
    return int(num_sms)


def combine_arguments(expert_out, handle, topk_weights):
    """Returns (expert_out, weights in the accumulator dtype or None), or raises."""
    if not isinstance(handle, Handle):
        raise TypeError(
            f"combine: handle must be the `handle` of a dispatch result, got "
            f"{type(handle).__name__}."
        )
    expert_axes("combine", handle._axis_name)
    layout = handle._layout
    if not jax.tree_util.all_leaves([expert_out]):
        raise TypeError(
            f"combine: expert_out must be one array, got {type(expert_out).__name__}. Combine the "
            "arrays of a pytree one by one: jax.tree.map(lambda rows: combine(rows, handle, "
            "topk_weights), expert_out)."
        )
    expert_out = jnp.asarray(expert_out)
    if expert_out.ndim == 0 or expert_out.shape[0] != layout.capacity:
        raise ValueError(
            f"combine: expert_out has shape {expert_out.shape}, but the handle's dispatch packed "
            f"capacity={layout.capacity} rows: pass [{layout.capacity}, ...], one row for each row "
            "of out.tokens."
        )
    if expert_out.dtype not in COMBINE_DTYPES:
        raise TypeError(
            f"combine: expert_out has dtype {expert_out.dtype}; rows of "
            f"{combine_dtype_names()} can be summed. Cast it with .astype()."
        )
    if topk_weights is None:
        return expert_out, None
    weights = jnp.asarray(topk_weights)
    expected = (layout.num_tokens, layout.top_k)
    if weights.shape != expected:
        raise ValueError(
            f"combine: topk_weights has shape {weights.shape}, but the handle's dispatch had "
            f"topk_idx {expected}: pass one weight for each assignment."
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"combine: topk_weights must be floating, got {weights.dtype}. Use "
            "topk_weights.astype(jnp.float32)."
        )
    return expert_out, weights.astype(accumulator_dtype(expert_out.dtype))
