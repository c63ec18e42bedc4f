"""Which mesh axes the dimensions of the experts' parameters lie over, and their use per shard.

Three kinds of axes share an expert's matrices. The *expert axes* each hold some of the experts.
The *model axes* each hold a slice of the hidden width F of every expert (tensor parallelism): their
ranks compute with the same tokens, and what they compute is summed. The *FSDP axes* hold slices of
another dimension, which are gathered before use. Their ranks hold different tokens, so that the
transpose of the gather sums the gradients and leaves each rank its slice (a reduce-scatter).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.flax.experts import Experts


def entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """An entry of a PartitionSpec for a dimension over ``axes``."""
    return (axes if len(axes) > 1 else axes[0]) if axes else None


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of an entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def placed_parameters(
    experts: Experts,
    width: int,
    expert_width: int,
    *,
    fsdp_axes: tuple[str, ...],
    model_axes: tuple[str, ...],
) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """Shape and mesh axes of each parameter of one expert: ``{name: (shape, entries)}``.

    The model axes hold the first dimension that grows with F. The FSDP axes hold the first other
    one of a matrix, preferably one that does not grow with F. So it is the same dimension on all
    meshes.
    """
    shapes = experts.parameters(width, expert_width)
    of_twice = experts.parameters(width, 2 * expert_width)
    placed = {}
    for name, shape in shapes.items():
        grows = [size != twice for size, twice in zip(shape, of_twice[name], strict=True)]
        entries = [None] * len(shape)
        if any(grows):
            entries[grows.index(True)] = entry(model_axes)
        free = [d for d in range(len(shape)) if entries[d] is None]
        if len(shape) > 1 and free:
            entries[min(free, key=grows.__getitem__)] = entry(fsdp_axes)
        placed[name] = (shape, tuple(entries))
    return placed


def gather(
    parameters: Mapping[str, jax.Array], names: Mapping[str, tuple], fsdp_axes: tuple[str, ...]
) -> dict[str, jax.Array]:
    """This shard's parameters, whole along the FSDP axes.

    Args:
      parameters: shards by name.
      names: for each of them the mesh axes of its dimensions.
      fsdp_axes: manual.
    """

    def whole(name, a):
        for dimension, over in enumerate(names.get(name, ())):
            if fsdp_axes and axes_of(over) == fsdp_axes:
                return lax.all_gather(a, fsdp_axes, axis=dimension, tiled=True)
        return a

    return {name: whole(name, a) for name, a in parameters.items()}


def of_first_slice(
    experts: Experts, parameters: Mapping[str, jax.Array], model_axes: tuple[str, ...]
) -> dict[str, jax.Array]:
    """The experts' parameters so that the ranks of the model axes add what slices have in common
    once: they are zero on all of them but the first."""
    if not model_axes:
        return dict(parameters)
    is_first = lax.axis_index(model_axes) == 0
    once = experts.added_once() or ()
    return {
        name: jnp.where(is_first, a, jnp.zeros((), a.dtype)) if name in once else a
        for name, a in parameters.items()
    }
