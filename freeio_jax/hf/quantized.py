"""Weights that a checkpoint stores in fewer bits: block fp8 (DeepSeek-V3) and mxfp4 (gpt-oss).

The results are bit-equal to those of transformers.
"""

from __future__ import annotations

import numpy as np

#: What the tensors of a quantized weight have after the weight's name.
FP8_SCALES = "_scale_inv"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"

#: The sixteen values of fp4 (e2m1), and the bias of an exponent of one byte (e8m0).
_FP4_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4_VALUES = np.concatenate([_FP4_VALUES, -_FP4_VALUES])
_EXPONENT_BIAS = 127


def fp8_weight(
    weight: np.ndarray, scales: np.ndarray, block: tuple[int, int], first_row: int, dtype: np.dtype
) -> np.ndarray:
    """``weight * scale of its block``, computed in float32.

    Args:
      weight: float8 ``[..., M, N]``.
      scales: ``[..., rows of blocks, columns of blocks]``.
      block: rows and columns of a block. Blocks at the end may be smaller.
      first_row: the place of the weight's first row in its matrix.
      dtype: of the result.
    """
    row = (first_row + np.arange(weight.shape[-2])) // block[0]
    column = np.arange(weight.shape[-1]) // block[1]
    scales = scales.astype(np.float32)[..., row, :][..., column]
    return (weight.astype(np.float32) * scales).astype(dtype)


def mxfp4_weight(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The weight ``[E, 32 * G, M]``, in dtype.

    A byte holds two values, the first one in its lower half. The result is transposed, as the
    model of transformers has it: ``[E, in, out]``.

    Args:
      blocks: uint8 ``[E, M, G, 16]``.
      scales: uint8 ``[E, M, G]``: exponents of two.
      dtype: of the result.
    """
    # Values of two bits and powers of two: the product has no rounding, whatever the dtype.
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.ldexp(np.float32(1), scales.astype(np.int32) - _EXPONENT_BIAS)
        out = np.empty((*blocks.shape[:-1], 2 * blocks.shape[-1]), dtype)
        out[..., 0::2] = _FP4_VALUES[blocks & 0x0F] * scale[..., None]
        out[..., 1::2] = _FP4_VALUES[blocks >> 4] * scale[..., None]
    return np.swapaxes(out.reshape(*blocks.shape[:-2], -1), -1, -2)
