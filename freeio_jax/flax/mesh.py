"""The mesh of an MoE layer: named by the caller, the current one, or that of the arguments."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.partition import axes_of


def check_manual(config: MoEConfig) -> None:
    """Checks that a surrounding shard_map has made all of a kind of axes manual, or none."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    for field, axes in (
        ("axis_name", config.expert_axes),
        ("fsdp_axes", config.fsdp_axes),
        ("model_axes", config.model_axes),
    ):
        inside = [axis for axis in axes if axis in manual]
        if inside and len(inside) < len(axes):
            raise ValueError(
                f"MoE: of {field}={getattr(config, field)!r} only {inside} are manual axes of the "
                "surrounding shard_map. Make all of them manual, or none."
            )


def manual_sizes() -> dict[str, int]:
    """The sizes of the axes that a surrounding shard_map has made manual: parameters are shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.manual_axes}


def check_divides(config: MoEConfig, mesh: Mesh | AbstractMesh | None, width: int) -> None:
    """Checks that all ranks of ``mesh``, or of the current mesh, get equal shares of parameters.

    Args:
      config: the layer.
      mesh: None: the current mesh.
      width: H.

    Raises:
      ValueError: they do not, with the fix. Flax and shard_map would say it in terms of arrays.
    """
    sizes = _named_or_current(mesh).shape
    if set(config.expert_axes) <= set(sizes):
        _check_experts(config, math.prod(sizes[axis] for axis in config.expert_axes))
    for name, (shape, names) in config.parameters(width).items():
        for size, over in zip(shape, names, strict=True):
            count = math.prod(sizes.get(axis, 1) for axis in axes_of(over))
            if size % count:
                field = "model_axes" if axes_of(over) == config.model_axes else "fsdp_axes"
                raise ValueError(
                    f"MoE: {size}, a dimension of the parameter {name!r} {shape}, does not divide "
                    f"evenly among the {count} ranks of {field}={getattr(config, field)!r}.\n"
                    f"Use a mesh on which they have a number of ranks that divides {size}, or "
                    f"{field}=()."
                )


def _check_experts(config, num_ranks):
    if config.num_slots % num_ranks == 0:
        return
    fewer = max(n for n in range(1, num_ranks) if config.num_slots % n == 0)
    more = -(-config.num_experts // num_ranks) * num_ranks
    padded = "" if config.pad_experts_to is None else f" (pad_experts_to={config.pad_experts_to})"
    raise ValueError(
        f"MoE: num_experts={config.num_experts}{padded} does not divide evenly among the "
        f"{num_ranks} ranks of axis_name={config.axis_name!r}.\nUse pad_experts_to={more}, or a "
        f"mesh whose expert axis has {fewer} rank{'s' if fewer > 1 else ''}."
    )


def num_token_shards(config: MoEConfig, mesh: Mesh | AbstractMesh | None) -> int:
    """Over how many ranks of ``mesh``, or of the current mesh, the tokens are sharded."""
    shape = _named_or_current(mesh).shape
    return math.prod(shape.get(axis, 1) for axis in config.all_token_axes)


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """The axes of ``mesh`` over which the types of arrays say how they are sharded."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(axis for axis, kind in kinds if kind == AxisType.Explicit)


def _named_or_current(mesh):
    current = jax.sharding.get_abstract_mesh()
    return current if current.manual_axes or mesh is None else mesh


def current_mesh(config: MoEConfig, mesh: Mesh | AbstractMesh | None, arrays, width: int):
    """The mesh on which the layer runs, by the rules of the argument ``mesh`` of ``moe``.

    Raises:
      ValueError: the mesh lacks an axis of the layer, or the parameters do not divide among its
        ranks.
    """
    mesh = _named_or_current(mesh)
    needed = (*config.all_token_axes, *config.model_axes)
    if mesh.empty:
        mesh = _mesh_of(arrays) or mesh
        if mesh.empty or (mesh.size == 1 and not set(needed) <= set(mesh.axis_names)):
            return _mesh_of_one_device(needed, arrays)
    missing = [axis for axis in needed if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"MoE: the mesh has axes {tuple(mesh.axis_names)}, but not {missing}, over which the "
            f"layer spreads its experts (axis_name={config.axis_name!r}), tokens "
            f"(token_axes={config.token_axes!r}) or width (model_axes={config.model_axes!r}). "
            "Change these, or the mesh: set another with jax.set_mesh, or pass it as mesh=."
        )
    check_divides(config, mesh, width)
    return mesh


def _is_concrete(array):
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _mesh_of(arrays):
    """The mesh of the arrays' shardings, with its devices where one of them is not traced."""
    concrete = (a.sharding for a in arrays if _is_concrete(a))
    meshes = [sharding.mesh for sharding in concrete if isinstance(sharding, NamedSharding)]
    meshes += [jax.typeof(a).sharding.mesh for a in arrays]
    return next((mesh for mesh in meshes if not mesh.empty), None)


def _mesh_of_one_device(axes, arrays):
    shape, types = (1,) * len(axes), (AxisType.Auto,) * len(axes)
    if not jax.config.jax_disable_jit:
        return AbstractMesh(shape, axes, types)
    # Without jit a gradient is not compiled, and needs a device: an argument's, if any has one.
    devices = [device for a in arrays if _is_concrete(a) for device in a.devices()]
    devices = devices or jnp.zeros(()).devices()
    return Mesh(np.array([*devices][:1]).reshape(shape), axes, axis_types=types)
