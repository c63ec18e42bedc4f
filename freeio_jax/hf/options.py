"""From a config.json to the settings of the Flax layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.experts import GLU, SwiGLU
from freeio_jax.hf.families import FAMILIES, INEXPRESSIBLE
from freeio_jax.hf.family import ACTIVATIONS, Family, Key, Times

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that tells of the decoder: ``text_config`` of multimodal models.

    Qwen3-Omni has that of its thinker one level further down.
    """
    known = (*_BY_TYPE, *INEXPRESSIBLE)
    for name in ("thinker_config", "text_config"):
        inner = config.get(name)
        if config.get("model_type") not in known and isinstance(inner, Mapping):
            config = inner
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: it is not in the table, or the layers cannot express it.
    """
    model_type = text_config(config).get("model_type")
    if model_type in INEXPRESSIBLE:
        raise ValueError(
            f"hf: the layers cannot express model_type={model_type!r}. It needs "
            f"{INEXPRESSIBLE[model_type]}."
        )
    if model_type not in _BY_TYPE:
        raise ValueError(
            f"hf: model_type={model_type!r} is not in the table of families. Known are "
            f"{', '.join(sorted(_BY_TYPE))}. Where the block is of one of these kinds, change "
            "model_type in the configuration."
        )
    return _BY_TYPE[model_type]


def moe_options(config: Mapping[str, Any], layer: int | str | None = None) -> dict[str, Any]:
    """The settings of ``freeio_jax.flax.nnx.MoE`` for a config.json; linen's are those but width.

    Losses and jitter are off, for they are choices of a training run: ``router=
    dataclasses.replace(options["router"], load_balance_coef=...)`` turns them on.

    Args:
      config: the contents of config.json.
      layer: its number, needed where layers differ (Hunyuan's lists).

    Raises:
      ValueError: the family is not known, the configuration lacks a key, or the layers cannot
        express it; the message names what.
    """
    family = family_of(config)
    config = text_config(config)

    def get(setting):
        return _value(config, setting, family, layer)

    for only in family.only:
        if only.unless_zero is not None and not get(only.unless_zero):
            continue
        value = get(only.key)
        if value not in only.allowed:
            raise ValueError(
                f"hf: the layers cannot express {only.key.names[0]}={value!r} of "
                f"model_type={config['model_type']!r}: it means {only.reason}. They can express "
                f"{' and '.join(map(repr, only.allowed))}."
            )
    name = get(family.activation)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hf: the activation {family.activation.names[0]}={name!r} is not known; known are "
            f"{', '.join(ACTIVATIONS)}."
        )
    activation = ACTIVATIONS[name]
    if family.experts is not None:
        experts = family.experts(get, activation)
    else:
        experts = SwiGLU() if activation is ACTIVATIONS["silu"] else GLU(activation)
    shared = family.shared_expert_width
    router = family.router_kind(
        load_balance_coef=0.0,
        z_loss_coef=0.0,
        **{name: get(setting) for name, setting in family.router.items()},
    )
    return {
        "width": get(family.width),
        "num_experts": get(family.num_experts),
        "top_k": get(family.top_k),
        "expert_width": get(family.expert_width),
        "shared_expert_width": (get(shared) if shared is not None else None) or None,
        "shared_expert_gate": family.shared_expert_gate,
        "experts": experts,
        "num_zero_experts": get(family.num_zero_experts) or 0,
        "expert_capacity": get(family.expert_capacity),
        "router": router,
    }


def moe_config(
    config: Mapping[str, Any], layer: int | str | None = None, **options: Any
) -> tuple[int, MoEConfig]:
    """H, and the ``MoEConfig`` of a config.json; ``options`` are more of its fields."""
    settings = moe_options(config, layer) | options
    return settings.pop("width"), MoEConfig(**settings)


def _value(config, setting, family, layer):
    if isinstance(setting, Times):
        product = 1
        for factor in setting.factors:
            product *= _value(config, factor, family, layer) or 0
        return product
    if not isinstance(setting, Key):
        return setting
    if setting.only_if is not None:
        condition, wanted = setting.only_if
        if _value(config, condition, family, layer) != wanted:
            return setting.default
    name, value = look_up(config, setting)
    if name is None or (value is None and not setting.values and not setting.is_required):
        if setting.is_required:
            raise ValueError(
                f"hf: the configuration of model_type={config['model_type']!r} has no "
                f"{' or '.join(map(repr, setting.names))}, which {family.title} needs."
            )
        return setting.default
    if isinstance(value, list):
        value = _of_layer(name, value, layer)
    if setting.values is None:
        return value
    if value not in setting.values:
        raise ValueError(
            f"hf: the layers cannot express {name}={value!r} of "
            f"model_type={config['model_type']!r}. They can express "
            f"{' and '.join(map(repr, setting.values))}."
        )
    return setting.values[value]


def look_up(config: Mapping[str, Any], key: Key) -> tuple[str | None, Any]:
    """The name under which a config.json has a setting, and its value; None where it has none."""
    for name in key.names:
        value = config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            return name, value
    return None, None


def _of_layer(name, values, layer):
    if len(set(values)) == 1:
        return values[0]
    if not isinstance(layer, int):
        raise ValueError(
            f"hf: {name}={values} differs between layers: say which layer it is, by layer=."
        )
    return values[layer]
