"""What a checkpoint is, whether its MoE layers fit on some ranks, and whether they are equal."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from freeio_jax.flax import linen
from freeio_jax.hf.checkpoint import Checkpoint
from freeio_jax.hf.families import BASES
from freeio_jax.hf.load import Layout, is_of_router, load_moe, moe_layers
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
    layouts = [Layout(ckpt, layer) for layer in layers]
    for text in _settings(layouts[0]):
        yield "settings", text, False
    yield _divisibility(layouts[0].config.num_experts, num_ranks)
    yield from _bytes_of_device(ckpt, layouts, num_ranks, dtype, memory)
    faults = [fault for layout in layouts for fault in layout.faults()]
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


def _settings(layout):
    config = layout.config
    yield (
        f"width {layout.width}, {config.num_experts} experts of width {config.expert_width}, "
        f"{config.top_k} for each token"
    )
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
    return (
        "ranks",
        f"{num_experts} experts do not divide among {num_ranks} ranks; they do among "
        f"{', '.join(map(str, fits))}",
        True,
    )


def _bytes_of_device(ckpt, layouts, num_ranks, dtype, memory):
    dtype = np.dtype(ckpt.default_dtype if dtype is None else dtype)
    spread = others = 0
    for layout in layouts:
        for name, (shape, _) in layout.shapes.items():
            of_router = is_of_router(name)
            size = math.prod(shape) * (4 if of_router else dtype.itemsize)
            if layout.is_spread(name):
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
        block = transformers_block(model, layer)
        if block is None:
            yield "compared", f"not layer {layer}: transformers does not use it", False
            continue
        layout = Layout(ckpt, layer)
        x = rng.normal(size=(1, _NUM_TOKENS, layout.width)).astype(np.float32)
        module = linen.MoE.from_hf(ckpt.config, layer)
        weights = load_moe(ckpt, layer, dtype=np.float32)
        with jax.default_matmul_precision("highest"):
            got = np.asarray(jax.jit(module.apply, static_argnums=2)(weights.linen, x, True))
        expected = block(x)
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


def transformers_block(model, layer: int | str) -> Callable[[np.ndarray], np.ndarray] | None:
    """The MoE block of a model of transformers, as a function of arrays ``[B, T, H]``.

    Args:
      model: a model, or one with a model in it.
      layer: as :func:`freeio_jax.hf.moe_layers` names it.

    Returns:
      None where the model has no such block.
    """
    import torch

    modules = moe_modules(model, layer)
    if not modules:
        return None

    def apply(x):
        x = torch.tensor(x)
        with torch.no_grad():
            return sum(output_of(module, x) for module in modules).numpy()

    return apply


def moe_modules(model, layer: int | str) -> list[Any]:
    """The modules of a model of transformers whose outputs' sum is that of the MoE layer."""
    family = family_of(model.config.to_dict())
    modules = dict(model.named_modules())
    paths = [layer.removesuffix(".") + "."] if isinstance(layer, str) else []
    if isinstance(layer, int):
        paths = [base + family.layer.format(layer=layer) for base in BASES]
    for path in paths:
        if hasattr(modules.get(path + family.blocks[0]), "experts"):
            return [modules[path + b] for b in family.blocks if path + b in modules]
    return []


def output_of(module, x):
    """What a module computes of x: of several results the first, in the shape of x."""
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
