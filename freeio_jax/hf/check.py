"""What a checkpoint is, whether its MoE layers fit on some ranks, and whether they are equal."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freeio_jax.flax import linen
from freeio_jax.hf.checkpoint import Checkpoint
from freeio_jax.hf.family import BASES
from freeio_jax.hf.load import StoredLayer, is_of_router, load_moe, moe_layers
from freeio_jax.hf.options import family_of, text_config

#: Larger differences from transformers are told as a fault: as a share of the largest output.
TOLERANCE = 1e-5
_NUM_TOKENS = 64
_GIB = 2**30


def check(
    ckpt: Checkpoint,
    num_ranks: int,
    dtype: Any = None,
    memory: float | None = None,
    compare: bool = True,
) -> Iterator[tuple[str, str, bool]]:
    """Looks at a checkpoint: yields lines ``(subject, text, whether it is a fault)``.

    Args:
      ckpt: of :func:`freeio_jax.hf.open`.
      num_ranks: ranks over which the experts are to be spread.
      dtype: of the experts' parameters on the devices; None: the ``dtype`` of config.json.
      memory: GiB of a device; None: not known.
      compare: whether to compare with transformers, where it is installed.
    """
    family = family_of(ckpt.config)
    yield "family", f"{family.title}; model_type {text_config(ckpt.config)['model_type']}", False
    layers = moe_layers(ckpt)
    yield "layers", f"{len(layers)} with an MoE block: {_ranges(layers)}", not layers
    if not layers:
        return
    all_stored = [StoredLayer(ckpt, layer) for layer in layers]
    for text in _settings(all_stored[0]):
        yield "settings", text, False
    yield _divisibility(all_stored[0].config.num_experts, num_ranks)
    yield from _bytes_of_device(ckpt, all_stored, num_ranks, dtype, memory)
    faults = [fault for stored in all_stored for fault in stored.faults()]
    for fault in faults[:10]:
        yield "files", fault, True
    if len(faults) > 10:
        yield "files", f"and {len(faults) - 10} faults more", True
    if not faults:
        yield "files", "every tensor of these layers is there, in the shape of config.json", False
        if compare:
            yield from differences(ckpt)


def _ranges(layers) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    parts: list[list] = []
    for layer in layers:
        if parts and isinstance(layer, int) and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _settings(stored):
    config = stored.config
    yield (
        f"width {stored.width}, {config.num_experts} experts of width {config.expert_width}, "
        f"{config.top_k} for each token"
    )
    if config.num_zero_experts:
        yield f"{config.num_zero_experts} zero experts"
    if config.shared_expert_width is not None:
        gated = ", with a gate" if config.shared_expert_gate else ""
        yield f"a shared expert of width {config.shared_expert_width}{gated}"
    yield _call(config.experts)
    yield _call(config.router)


def _call(settings):
    """A dataclass as it would be written: without what is the default."""
    changed = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }
    values = (f"{n}={v.__name__ if callable(v) else repr(v)}" for n, v in changed.items())
    return f"{type(settings).__name__}({', '.join(values)})"


def _divisibility(num_experts, num_ranks):
    if num_experts % num_ranks == 0:
        return "ranks", f"{num_ranks}, {num_experts // num_ranks} experts each", False
    fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    padded = -(-num_experts // num_ranks) * num_ranks
    return (
        "ranks",
        f"{num_experts} experts do not divide among {num_ranks} ranks. Use "
        f"pad_experts_to={padded}, or {', '.join(map(str, fits))} ranks",
        True,
    )


def _bytes_of_device(ckpt, all_stored, num_ranks, dtype, memory):
    dtype = np.dtype(ckpt.default_dtype if dtype is None else dtype)
    spread = others = 0
    for stored in all_stored:
        for name, (shape, _) in stored.shapes.items():
            of_router = is_of_router(name)
            size = math.prod(shape) * (4 if of_router else dtype.itemsize)
            if stored.is_spread(name):
                spread += -(-size // num_ranks)
            else:
                others += size
    total = (spread + others) / _GIB
    yield (
        "bytes",
        f"{total:.3g} GiB on each device in {dtype}: experts {spread / _GIB:.3g}, routers and "
        f"shared experts {others / _GIB:.3g}; without optimizer state, gradients and activations",
        False,
    )
    if memory is not None:
        fits = total <= memory
        yield (
            "memory",
            f"the MoE layers' parameters {'' if fits else 'do not '}fit in {memory:g} GiB",
            not fits,
        )


def differences(ckpt: Checkpoint) -> Iterator[tuple[str, str, bool]]:
    """Compares each MoE layer with that of transformers, in float32, on random tokens."""
    model_type = ckpt.config.get("model_type")
    missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        yield "compared", f"not with transformers: {' and '.join(missing)} not installed", False
        return
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        yield "compared", f"not: transformers has no model_type {model_type!r} itself", False
        return
    needed = 4 * sum(math.prod(ckpt.shape(name)) for name in ckpt.names())
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        yield (
            "compared",
            f"not: the model has {needed / _GIB:.3g} GiB in float32, and {available / _GIB:.3g} "
            "GiB are free",
            False,
        )
        return
    model = _transformers_model(ckpt)
    rng = np.random.default_rng(0)
    for layer in moe_layers(ckpt):
        function = moe_function(model, layer)
        if function is None:
            yield "compared", f"not layer {layer}: transformers does not use it", False
            continue
        stored = StoredLayer(ckpt, layer)
        x = rng.normal(size=(1, _NUM_TOKENS, stored.width)).astype(np.float32)
        router_input = router_input_of(ckpt.config, x)
        module = linen.MoE.from_hf(ckpt.config, layer)
        weights = load_moe(ckpt, layer, dtype=np.float32)
        with jax.default_matmul_precision("highest"):
            apply = jax.jit(functools.partial(module.apply, deterministic=True))
            got = np.asarray(apply(weights.linen, x, router_input=router_input))
        with torch.no_grad():
            expected = function(torch.tensor(x)).numpy()
        difference = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)
        text = f"layer {layer}: largest difference from transformers {difference:.1e}"
        yield "compared", text, not difference <= TOLERANCE


def _transformers_model(ckpt):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, FineGrainedFP8Config

    auto = AutoModelForCausalLM
    if ckpt.config.get("is_encoder_decoder"):
        auto = AutoModelForSeq2SeqLM
    options = {}
    if (ckpt.config.get("quantization_config") or {}).get("quant_method") == "fp8":
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = auto.from_pretrained(
        ckpt.folder, dtype=torch.float32, experts_implementation="eager", **options
    )
    return model.eval()


def moe_function(model, layer: int | str) -> Callable[[Any], Any] | None:
    """What a model of transformers computes in the MoE block of a layer: from ``[..., H]`` torch.

    Where the router has an input of its own, it is that of the experts, rolled by one feature.

    Args:
      model: a model of transformers.
      layer: as :func:`freeio_jax.hf.moe_layers` names it.

    Returns:
      None where the model has no such block.
    """
    family = family_of(model.config.to_dict())
    modules = dict(model.named_modules())
    paths = [layer.removesuffix(".") + "."] if isinstance(layer, str) else []
    if isinstance(layer, int):
        paths = [base + family.layer.format(layer=layer) for base in BASES]
    for path in paths:
        block = modules.get((path + family.blocks[0]).removesuffix("."))
        if not hasattr(block, "experts"):
            continue
        if family.router_input:
            return lambda x: _of_router_and_experts(block, x)
        found = [modules[path + name] for name in family.blocks if path + name in modules]
        return lambda x: sum(_output_of(module, x) for module in found)
    return None


def _output_of(module, x):
    """Of several results the first, in the shape of x."""
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def _of_router_and_experts(layer, x):
    tokens = x.reshape(-1, x.shape[-1])
    _, weights, ids = layer.router(tokens.roll(1, -1))
    return layer.experts(tokens, ids, weights).reshape(x.shape)


def router_input_of(config: Mapping[str, Any], x: jax.Array) -> jax.Array | None:
    """What the layer's router is to see in a comparison with :func:`moe_function`."""
    return jnp.roll(x, 1, -1) if family_of(config).router_input else None
