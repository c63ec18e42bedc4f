"""The benchmark with another build of the native module: one whose kernels have time stamps.

    python freeio_jax/bench/stamped.py build/_native.cpython-312-x86_64-linux-gnu.so --tax ...

Run by its path, not imported: the module must be there before the package imports its own.
"""

import importlib.util
import os
import sys

NAME = "freeio_jax._native"


def load(path: str) -> None:
    """Makes the module at ``path`` the package's native module in this process."""
    if not os.path.isfile(path):
        sys.exit(f"stamped.py: there is no module {path}. Build one with -DFREEIO_STAMPS=ON.")
    if NAME in sys.modules:
        sys.exit(f"stamped.py: {NAME} has been imported already. Run stamped.py by its path.")
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python freeio_jax/bench/stamped.py NATIVE_MODULE [arguments of the bench]")
    # Python puts this folder first, and it has names of the standard library in it.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    load(sys.argv[1])
    from freeio_jax.bench.__main__ import main

    sys.exit(main(sys.argv[2:]))
