"""Rotary position embeddings (arXiv:2104.09864), and their stretched forms for long contexts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Angles by position.

    Attributes:
      frequencies: radians per position of each pair of features, float32 values.
      factor: on cosine and sine (YaRN's attention factor).
      score_factor: on the attention's scores (DeepSeek-V3's ``mscale_all_dim``).
      interleaved: pairs are neighbours (x0, x1), (x2, x3), ... Else x_i pairs with x_(i + D/2).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    score_factor: float = 1.0
    interleaved: bool = False

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates ``x`` ``[B, L, heads, D]`` by its ``positions``, int32 ``[B, L]``."""
        angle = positions[..., None].astype(jnp.float32) * np.array(self.frequencies, np.float32)
        cos, sin = (self.factor * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))
        wide = x.astype(jnp.float32)
        if self.interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
        else:
            a, b = jnp.split(wide, 2, axis=-1)
        # Both layouts end as halves. Queries and keys do so alike, so their products are the same.
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def from_config(config: dict, width: int, default: dict, interleaved: bool = False) -> Rope:
    """The embedding of ``width`` features that a ``config.json`` asks for.

    Args:
      config: the file. The settings are in ``rope_parameters``, or in ``rope_scaling`` and
        ``rope_theta`` where an older transformers wrote it.
      width: D of the rotated features.
      default: the settings where the file has none. Its ``rope_theta`` holds also where only that
        one is missing.
      interleaved: the layout of the pairs.
    """
    base = config.get("rope_theta") or default["rope_theta"]
    settings = config.get("rope_parameters") or config.get("rope_scaling")
    settings = {"rope_theta": base} | settings if settings else default | {"rope_theta": base}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in _KINDS:
        raise ValueError(f"config.json: rope_type {kind!r} is none of {sorted(_KINDS)}.")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor must be 1.")
    plain = settings["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float32) / width)
    context = config["max_position_embeddings"]
    frequencies, factor, score_factor = _KINDS[kind](plain, settings, context)
    return Rope(tuple(map(float, frequencies)), factor, score_factor, interleaved)


def _plain(frequencies, settings, context):
    return frequencies, 1.0, 1.0


def _linear(frequencies, settings, context):
    return frequencies / settings["factor"], 1.0, 1.0


def _llama3(frequencies, settings, context):
    """Divides the low frequencies by the factor, with a smooth transition to the high ones."""
    original = settings.get("original_max_position_embeddings", context)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # in the original context
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the plain frequency
    return frequencies * (share + (1 - share) / settings["factor"]), 1.0, 1.0


def _yarn(frequencies, settings, context):
    """YaRN (arXiv:2309.00071): pairs that turn often stay, the others are stretched."""
    original = settings.get("original_max_position_embeddings", context)
    stretch = settings.get("factor") or context / original
    pairs = len(frequencies)

    def pair_that_turns(times):
        """The pair, counted from 0 and as a real number, that turns so often in the context."""
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(settings["rope_theta"])

    first = pair_that_turns(settings.get("beta_fast") or 32)
    last = pair_that_turns(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0, 1)

    def scale(by):
        return 1.0 if stretch <= 1 else 0.1 * by * math.log(stretch) + 1.0

    by, by_all = settings.get("mscale"), settings.get("mscale_all_dim")
    factor = settings.get("attention_factor")
    if factor is None:
        factor = scale(by) / scale(by_all) if by and by_all else scale(1.0)
    score_factor = scale(by_all) ** 2 if by_all else 1.0
    return frequencies * (1 - stretched + stretched / stretch), factor, score_factor


_KINDS = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
