"""GPUs of several hosts, on one machine and without a network card: NVSHMEM carries rows by TCP.

    python tests/cuda/network/over_tcp.py -n 4 --hosts 2 tests/cuda/gpu_program.py layers

runs a program as ``python -m freeio_jax.launch`` does. But only the network is between its hosts:
no link, and no shared memory. If there are fewer GPUs than processes, these take turns on them.

Needs NVSHMEM 3.8.0 and UCX (``pip install nvidia-nvshmem-cu13==3.8.0 libucx-cu13``), and a C
compiler. It shows whether what goes by a network is right, not how fast.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import take_turns

from freeio_jax.launch import Pod
from freeio_jax.launch.pod import visible_gpus

HERE = Path(__file__).parent

#: NVSHMEM by UCX over TCP, with symmetric memory of the CPU.
SETTINGS = {
    "FREEIO_TRANSPORT": "nvshmem",
    "NVSHMEM_REMOTE_TRANSPORT": "ucx",
    "NVSHMEM_HEAP_KIND": "SYSMEM",
    "NVSHMEM_DISABLE_CUDA_VMM": "1",
    "NVSHMEM_UCX_TLS": "tcp,cuda_copy,self",
    "UCX_TLS": "tcp,cuda_copy,self",
    "UCX_NET_DEVICES": "lo",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def compile_stand_ins(folder: Path) -> None:
    """Makes libown_host.so and libgdrapi.so of the sources here."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: neither cc nor gcc")
    for source, target in (("own_host.c", "libown_host.so"), ("gdrapi.c", "libgdrapi.so.2")):
        flags = ["-shared", "-fPIC", "-O1", "-o", str(folder / target)]
        subprocess.run([compiler, *flags, str(HERE / source), "-ldl"], check=True)
    (folder / "libgdrapi.so").symlink_to("libgdrapi.so.2")


def libraries(package: str) -> str:
    """The folder with the libraries of an installed wheel."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ModuleNotFoundError(
            f"{package} is missing: pip install nvidia-nvshmem-cu13==3.8.0 libucx-cu13"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / "lib")


def own_hosts(folder: Path, num_processes: int, num_hosts: int) -> dict[str, str]:
    """The variables by which each process is on its host."""
    return {
        "LD_PRELOAD": str(folder / "libown_host.so"),
        "TESTS_RANKS_PER_HOST": str(num_processes // num_hosts),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-processes", type=int, required=True)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.hosts < 1 or options.num_processes < 1 or options.num_processes % options.hosts:
        parser.error(f"-n {options.num_processes} does not divide by --hosts {options.hosts}")
    if not options.program:
        parser.error("which program?")
    gpus = visible_gpus()
    if not gpus:
        parser.error("there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES names none")
    with tempfile.TemporaryDirectory(prefix="freeio_jax-tcp-") as folder:
        try:
            compile_stand_ins(Path(folder))
            found = [folder, libraries("libucx"), libraries("nvidia.nvshmem")]
        except (FileNotFoundError, ModuleNotFoundError) as error:
            parser.error(str(error))
        if "LD_LIBRARY_PATH" in os.environ:
            found.append(os.environ["LD_LIBRARY_PATH"])
        os.environ |= own_hosts(Path(folder), options.num_processes, options.hosts)
        os.environ |= take_turns(gpus, options.num_processes)
        os.environ |= SETTINGS | {"LD_LIBRARY_PATH": ":".join(found)}
        pod = Pod(
            options.program,
            num_processes=options.num_processes,
            num_hosts=options.hosts,
            platform="cuda",
        )
        return pod.run()


if __name__ == "__main__":
    sys.exit(main())
