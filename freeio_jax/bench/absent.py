"""GPUs that are not there: XLA compiles programs for them, and nothing runs.

It needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and neither a GPU nor nvcc. XLA
wants a handler for every custom call, and asks it nothing: any serves. So a stand-in replaces the
CUDA engine's C++ side.

A program must load this file by its path, and call :func:`import_with_stand_in`, before anything
imports freeio_jax. So nothing here imports freeio_jax at the top.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

OPERATIONS = ("dispatch", "dispatch_along", "combine", "combine_transpose")


class StandIn:
    """What ``engines.CudaEngine`` asks of the engine's C++ side."""

    def __init__(self, cpu):
        self._handler = cpu.ffi_targets()["freeio_combine"]["execute"]

    def set_starter(self, start):
        pass

    def has_driver(self):
        return False

    def ffi_types(self):
        return {}

    def ffi_targets(self):
        names = ("done", "check", *OPERATIONS, *(f"{name}_start" for name in OPERATIONS))
        return {f"freeio_{name}": {"execute": self._handler} for name in names}


def import_with_stand_in():
    """freeio_jax with the stand-in as the native module's CUDA part, and XLA for GPUs."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax_plugins.xla_cuda13 as plugin

    folder = pathlib.Path(importlib.util.find_spec("freeio_jax").origin).parent
    # importlib.util.find_spec would import freeio_jax first. Every finder is asked, as an editable
    # installation has one of its own.
    specs = (f.find_spec("freeio_jax._native", [str(folder)]) for f in sys.meta_path)
    spec = next(filter(None, specs))
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    native.cuda = StandIn(native)
    sys.modules["freeio_jax._native"] = native
    import freeio_jax
    from freeio_jax.engines import ENGINES

    ENGINES["cuda"].start = lambda: None  # there are no GPUs to make ready
    plugin._check_cuda_versions = lambda *args, **kwargs: None  # there is no driver to ask
    jax.devices()
    try:
        plugin.initialize()
    except Exception as error:  # the platform is registered, only devices are missing
        print("no devices, as expected:", type(error).__name__, file=sys.stderr)
    return freeio_jax


def devices(topology: str):
    """H200s of a topology of slices x processes x devices of a process, as ``"1x1x2"``."""
    from jax.experimental import topologies

    target = (pathlib.Path(__file__).parent / "h200.txtpb").read_text()
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=target, topology=topology
    ).devices
