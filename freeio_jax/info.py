"""What this installation is and does: ``python -m freeio_jax.info``, or :func:`info`."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

from freeio_jax import runtime
from freeio_jax.engines import ENGINES
from freeio_jax.grouped_matmul import implementation

#: Platforms for which there are engines, as ``jax.default_backend()`` names them.
_ENGINE_PLATFORMS = tuple("gpu" if platform == "cuda" else platform for platform in ENGINES)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """What this installation is and does, as ``{topic: words}``. Starts JAX's backend.

    >>> from freeio_jax.info import info
    >>> sorted(info())
    ['devices', 'engine', 'grouped matmul', 'settings', 'versions']
    """
    packages = ("freeio_jax", "jax", "jaxlib", "flax", "tokamax")
    versions = [f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]
    devices = jax.devices()
    backend = jax.default_backend()
    if backend in _ENGINE_PLATFORMS:
        engine = f"native, for {backend}"
    else:
        engine = (
            f"none for {backend} in this installation, only for {', '.join(_ENGINE_PLATFORMS)}: "
            "freeio_jax.reference has the same contract there, or set JAX_PLATFORMS=cpu"
        )
    hint = ""
    if backend == "cpu" and len(devices) == 1:
        hint = (
            "; for more on this CPU set XLA_FLAGS=--xla_force_host_platform_device_count=8 before "
            "JAX starts"
        )
    chosen = implementation(backend)
    settings = (
        f"{name}={value} (config({name}=...) or FREEIO_{name.upper()})"
        for name, value in runtime.config().items()
    )
    return {
        "versions": ", ".join(versions),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({backend}), "
        f"{jax.process_count()} process(es){hint}",
        "engine": engine,
        "grouped matmul": f"{chosen.name} ({chosen.reason})",
        "settings": ", ".join(settings),
    }


if __name__ == "__main__":
    for topic, words in info().items():
        print(f"{topic + ':':16}{words}")
