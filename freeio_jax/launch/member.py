"""One process of a pod: tells JAX of the pod, then becomes the program.

Run by its path, not imported: the program may set environment variables that JAX reads when it is
imported, so nothing here imports JAX.
"""

import ctypes
import faulthandler
import importlib.abc
import importlib.util
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _define_cluster(clusters):
    class LaunchedPod(clusters.ClusterEnv):
        """What ``jax.distributed.initialize()`` asks for its missing arguments."""

        name = "freeio_launch"

        @classmethod
        def is_env_present(cls):
            return True

        @classmethod
        def get_coordinator_address(cls, timeout_secs=None, override_coordinator_port=None):
            return os.environ["JAX_COORDINATOR_ADDRESS"]

        @classmethod
        def get_process_count(cls):
            return int(os.environ["JAX_NUM_PROCESSES"])

        @classmethod
        def get_process_id(cls):
            return int(os.environ["JAX_PROCESS_ID"])

    # Before Slurm's and the others': a pod may be started inside an allocation of theirs.
    clusters.ClusterEnv._cluster_types.remove(LaunchedPod)
    clusters.ClusterEnv._cluster_types.insert(0, LaunchedPod)


class _WhenJaxIsImported(importlib.abc.MetaPathFinder):
    """Defines the cluster right after ``jax._src.clusters`` has been imported."""

    MODULE = "jax._src.clusters"

    def find_spec(self, name, path=None, target=None):
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _define_cluster(module)

        spec.loader.exec_module = exec_module
        return spec


def _end_with(parent):
    """Makes the kernel end this process when the launcher dies, however that happens."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("freeio_jax.launch: the launcher has ended")


def _pass_over_breakpoints():
    """Makes ``breakpoint()`` print a line in all processes but process 0.

    They have no input, with which a debugger would end the program.
    """
    rank = os.environ["JAX_PROCESS_ID"]

    def pass_over(*_args, **_kwargs):
        caller = sys._getframe(1)
        where = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
        print(
            f"freeio_jax.launch: breakpoint() of process {rank} at {where} is passed over: the "
            "launcher's input goes to process 0 alone.",
            file=sys.stderr,
        )

    if rank != "0" and not os.environ.get("PYTHONBREAKPOINT"):
        sys.breakpointhook = pass_over


def main():
    _end_with(int(sys.argv[1]))
    # A copy of stderr, because the program may put another file in its place, as pytest does.
    stderr = os.fdopen(os.dup(2), "w")
    faulthandler.enable(stderr)
    faulthandler.register(signal.SIGUSR2, stderr, all_threads=True)
    sys.meta_path.insert(0, _WhenJaxIsImported())
    _pass_over_breakpoints()
    program = sys.argv[2:]
    is_module = program[0] == "-m"
    if not sys.flags.safe_path:  # with it Python adds no folder of the program
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(program[0]))
    if is_module:
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
