"""The products on Hopper GPUs, by Pallas Mosaic GPU kernels of jax alone.

They take bfloat16 and float16 and add in float32. A kernel is persistent: one CTA on each
multiprocessor takes one tile of the result after the other; a warpgroup loads, two multiply.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from freeio_jax.grouped_matmul.product import Product

#: Widths are multiples of it: of a tile's columns, and of what a slot of shared memory holds.
WIDTH = 128


def obstacle(product: Product, dtype, widths: tuple[int, int] | None) -> str | None:
    """Why the kernels cannot take operands of this dtype and these widths; None: they can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if widths is not None and any(width < 1 or width % WIDTH for width in widths):
        return f"K={widths[0]}, N={widths[1]} are no multiples of {WIDTH}"
    devices = [d for d in jax.local_devices() if d.platform == "gpu"]
    found = {str(getattr(device, "compute_capability", "unknown")) for device in devices}
    if found and found != {"9.0"}:
        return f"is for compute capability 9.0, not {', '.join(sorted(found))}"
    return None


# The kernels count in 32 bits, also where the program has 64.
@jax.enable_x64(False)
def hopper(product: Product, left, right, group_sizes, *, num_ctas=None, interpret=None):
    """Evaluates ``product``.

    Args:
      product: which one.
      left, right: its operands.
      group_sizes: int32 ``[G]``.
      num_ctas: how many CTAs; None: as many as there are multiprocessors.
      interpret: parameters of Pallas' interpreter; None: the kernel is compiled.
    """
    from freeio_jax.grouped_matmul.hopper import common, schedule
    from freeio_jax.grouped_matmul.hopper.multiply import multiply
    from freeio_jax.grouped_matmul.hopper.outer import outer

    shape = product.shape(left, right, group_sizes.shape[0])
    if 0 in shape or 0 in left.shape or 0 in right.shape:
        return jnp.zeros(shape, left.dtype)
    num_ctas = num_ctas or common.num_sms()
    columns = 256 if shape[-1] % 256 == 0 else 128
    config = common.Config(columns=columns)

    def padded(rows):
        """With so many rows that a tile fits, and its copies begin where they may."""
        size = max(rows.shape[0], schedule.TILE_ROWS)
        size += -size % schedule.ROW_ALIGNMENT
        return jnp.pad(rows, ((0, size - rows.shape[0]), (0, 0)))

    if product == Product.WEIGHTS_GRADIENT:
        options = {"config": config, "num_ctas": num_ctas, "interpret": interpret}
        return outer(padded(left), padded(right), group_sizes, **options)
    out = multiply(
        padded(left),
        right,
        group_sizes,
        transposed=product == Product.ROWS_GRADIENT,
        config=config,
        num_ctas=num_ctas,
        interpret=interpret,
    )
    return out[: shape[0]]
