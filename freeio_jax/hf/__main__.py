"""``python -m freeio_jax.hf``: looks at checkpoints of Hugging Face, and converts them."""

from __future__ import annotations

import argparse
import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from freeio_jax.hf.check import check
from freeio_jax.hf.checkpoint import open
from freeio_jax.hf.convert import convert


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 where nothing is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(prog="python -m freeio_jax.hf", description=__doc__)
    commands = parser.add_subparsers(required=True)

    look = commands.add_parser(
        "check",
        help="family, settings, bytes of each device, what does not fit, and with transformers "
        "installed the largest difference of each layer",
    )
    look.set_defaults(run=_check)
    look.add_argument("--memory", type=float, metavar="GIB", help="of a device")
    look.add_argument("--no-compare", action="store_true", help="do not compare with transformers")

    write = commands.add_parser("convert", help="writes a sharded checkpoint of orbax")
    write.set_defaults(run=_convert)
    for command in (look, write):
        command.add_argument("folder", help="of the checkpoint: config.json and *.safetensors")
    write.add_argument("out", help="the new folder")
    for command in (look, write):
        command.add_argument(
            "--ranks", type=int, default=1, help="over which the experts are spread (1)"
        )
        command.add_argument("--dtype", type=jnp.dtype, help="of the experts (config.json's)")
    return parser


def _check(options) -> int:
    lines = check(
        open(options.folder), options.ranks, options.dtype, options.memory, not options.no_compare
    )
    wrong = 0
    for subject, text, is_fault in lines:
        wrong += is_fault
        print(f"{subject:<10}{'WRONG: ' if is_fault else ''}{text}", flush=True)
    return int(wrong > 0)


def _convert(options) -> int:
    # As many CPU devices as are needed, unless the user has said how many.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", options.ranks)
    if len(jax.devices()) < options.ranks:
        raise ValueError(
            f"hf convert: --ranks={options.ranks}, but JAX has {len(jax.devices())} "
            f"{jax.default_backend()} devices. Use fewer ranks, or JAX_PLATFORMS=cpu."
        )
    devices = jax.devices()[: options.ranks]
    mesh = jax.make_mesh((options.ranks,), ("expert",), (AxisType.Auto,), devices=devices)
    for written in convert(open(options.folder), options.out, mesh, options.dtype):
        print(written, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
