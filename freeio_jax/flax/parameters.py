"""The parameters of an MoE layer: how they start, and the check of those that a caller gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.custom_router import CustomRouter


def initializer(
    config: MoEConfig, width: int, name: str, kernel_init: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """How the parameter ``name`` of ``config.parameters(width)`` starts.

    A matrix is drawn by ``kernel_init``, for each expert on its own; a vector is zero. A custom
    router may have initializers of its own.
    """
    of_router = name in config.router_parameters(width)
    if of_router and isinstance(config.router, CustomRouter):
        own = config.router.initializer(name.removeprefix("router_"))
        if own is not None:
            return own
    per_expert = name in config.spread_parameters(width)
    shape, _ = config.parameters(width)[name]
    if len(shape) - per_expert < 2:
        return jax.nn.initializers.zeros
    return _per_expert(kernel_init) if per_expert else kernel_init


def _per_expert(init):
    """An initializer for ``[experts, ...]`` that draws each expert's array on its own."""

    def stacked(key, shape, dtype):
        draw = functools.partial(init, shape=shape[1:], dtype=dtype)
        return jax.vmap(lambda key: draw(key))(jax.random.split(key, shape[0]))

    return stacked


def check_names(parameters: Mapping[str, jax.Array], config: MoEConfig, width: int) -> None:
    """Raises ValueError where a parameter is missing, or has no use."""
    needed = config.parameters(width)
    unused, missing = sorted(set(parameters) - set(needed)), sorted(set(needed) - set(parameters))
    if unused or missing:
        raise ValueError(
            f"MoE: of the parameters {sorted(parameters)} the configuration has no use for {unused}"
            f", and lacks {missing}. Change the parameters, or the settings: router.logits_bias, "
            "experts, shared_expert_width, shared_expert_gate."
        )


def check_shapes(
    parameters: Mapping[str, jax.Array], config: MoEConfig, width: int, shards: Mapping[str, int]
) -> None:
    """Raises ValueError where a parameter has another shape than the configuration asks for.

    Args:
      parameters: arrays by name.
      config: the layer.
      width: H.
      shards: sizes of the manual axes of the surrounding shard_map.
    """
    for name, (shape, _) in config.parameters(width, shards).items():
        given = parameters[name].shape
        if given == shape:
            continue
        message = (
            f"MoE: the parameter {name!r} has shape {given}, but the configuration asks for {shape}"
        )
        padding = config.num_slots - config.num_experts
        if padding and given == (config.num_experts, *shape[1:]):
            message += (
                f": pad_experts_to={config.pad_experts_to} adds {padding} unused experts at the "
                f"end. Append them, for instance zeros: jnp.pad(a, [(0, {padding})] + "
                f"[(0, 0)] * {len(shape) - 1})"
            )
        raise ValueError(f"{message}.")
