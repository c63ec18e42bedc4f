"""The mesh of an MoE layer: named by the caller, the current one, or that of the arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from freeio_jax.flax.config import MoEConfig


def experts_are_manual(config: MoEConfig) -> bool:
    """Whether this is traced inside a shard_map over the expert axes, so parameters are shards."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    inside = [axis for axis in config.expert_axes if axis in manual]
    if inside and len(inside) < len(config.expert_axes):
        raise ValueError(
            f"MoE: of axis_name={config.axis_name!r} only {inside} are manual axes of the "
            "surrounding shard_map. Make all of them manual, or none."
        )
    return bool(inside)


def current_mesh(config: MoEConfig, mesh: Mesh | AbstractMesh | None, arrays):
    """The mesh on which the layer runs, by the rules of the argument ``mesh`` of ``moe``.

    Raises:
      ValueError: the mesh lacks an axis of the layer.
    """
    current = jax.sharding.get_abstract_mesh()
    if current.manual_axes or mesh is None:
        mesh = current
    needed = config.all_token_axes
    if mesh.empty:
        mesh = _mesh_of(arrays) or mesh
        if mesh.empty or (mesh.size == 1 and not set(needed) <= set(mesh.axis_names)):
            return _mesh_of_one_device(needed, arrays)
    missing = [axis for axis in needed if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"MoE: the mesh has axes {tuple(mesh.axis_names)}, but not {missing}, over which the "
            f"layer spreads its experts (axis_name={config.axis_name!r}) or tokens "
            f"(token_axes={config.token_axes!r}). Change these, or the mesh: set another with "
            "jax.set_mesh, or pass it as mesh=."
        )
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
