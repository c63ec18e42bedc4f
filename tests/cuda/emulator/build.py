"""Builds the emulator: the CUDA engine's sources, compiled as C++ against a machine of fibers.

Needs a C++17 compiler for Linux and nothing of CUDA. Built once for each state of the sources, into
the user's cache directory; processes that want it at the same time build it once.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENGINE = HERE.parents[2] / "xla_ffi"
#: Sources of the engine that know XLA, Python or NVSHMEM. (No folder of kernels has `measure.cu`,
#: whose launches only nvcc understands.)
LEFT_OUT = {
    *("handlers.cc", "module.cc", "nothing.cc"),
    *("nvshmem.cc", "program.cc", "device_library.cc"),
}
BEFORE_KERNELS, AFTER_KERNELS = HERE / "shared_begin.cc", HERE / "shared_end.cc"

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-ffp-contract=off"),
]
# The machine's headers come first: some stand for the engine's own.
INCLUDES = [f"-I{HERE}", f"-I{HERE / 'include'}", f"-I{ENGINE}"]
KERNEL_FLAGS = ["-include", "device.h", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
#: Libraries of other states of the sources, which other trees may be using.
KEEP_SECONDS = 7 * 24 * 3600


class NotHereError(RuntimeError):
    """The emulator cannot be built on this machine."""


def _compiler():
    if not sys.platform.startswith("linux"):
        raise NotHereError("the emulator is for Linux")
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    raise NotHereError("the emulator needs a C++ compiler, and there is none")


def _commands(compiler, folder, flags_of_all):
    """(command, object) for each source."""

    def engine(pattern, flags):
        paths = sorted(ENGINE.glob(pattern))
        return [(path, flags) for path in paths if path.name not in LEFT_OUT]

    of_kernels = [*KERNEL_FLAGS, "-x", "c++"]
    kernels = [*engine("cuda/*/*.cu", of_kernels), *engine("hosts/*.cu", of_kernels)]
    around = {BEFORE_KERNELS, AFTER_KERNELS}
    machine = [(path, ["-Wshadow", "-O2"]) for path in sorted(HERE.glob("*.cc"))]
    rest = [
        *engine("cuda/*.cc", []),
        *engine("core/*.cc", []),
        *engine("hosts/*.cc", []),
        *engine("pod/*.cc", []),
        *(source for source in machine if source[0] not in around),
    ]
    # In the order of linking.
    for source, flags in [(BEFORE_KERNELS, []), *kernels, (AFTER_KERNELS, []), *rest]:
        target = str(folder / f"{source.parent.name}_{source.name}.o")
        yield [compiler, *flags_of_all, *INCLUDES, *flags, "-c", str(source), "-o", target], target


def _key(compiler, flags_of_all):
    """Names the state of the sources, wherever they lie: copies of a tree share one library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(
        version + repr((flags_of_all, KERNEL_FLAGS, os.uname().machine)).encode()
    )
    for folder in (ENGINE, HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".cc", ".h", ".cu", ".cuh", ".py"}:
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def library(*, stamps: bool = False, max_ranks: int | None = None) -> Path:
    """The shared library, built if it is not there.

    Args:
      stamps: its kernels record how long each of their phases takes.
      max_ranks: ranks of a group, and GPUs of a host, that it takes; None: as in a shipped build.

    Raises:
      NotHereError: this machine lacks what it takes.
      RuntimeError: a source does not compile.
    """
    compiler = _compiler()
    flags = [
        *FLAGS,
        *(["-DFREEIO_STAMPS"] if stamps else []),
        *([] if max_ranks is None else [f"-DFREEIO_MAX_RANKS={max_ranks}"]),
    ]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freeio_jax"
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"emulator-{_key(compiler, flags)}.so"
    with open(root / "emulator.lock", "w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        commands, objects = zip(*_commands(compiler, Path(folder), flags), strict=True)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = root / f"{target.name}.{os.getpid()}"
        _run([compiler, "-shared", "-o", str(linked), *objects])
        linked.rename(target)
        for old in root.glob("emulator-*.so"):
            if time.time() - old.stat().st_mtime > KEEP_SECONDS:
                old.unlink()
    return target


if __name__ == "__main__":
    print(library())
