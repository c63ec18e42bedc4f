"""Command line of the launcher: see ``python -m freeio_jax.launch --help``."""

import argparse
import os
import sys

from freeio_jax.launch.pod import Pod


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m freeio_jax.launch",
        usage="%(prog)s -n PROCESSES [options] (script.py | -m module) [arguments ...]",
        description="Runs a Python program in several processes of this host. In each of them "
        "jax.distributed.initialize() needs no arguments. Output lines start with the number of "
        "their process; when a process fails the others are stopped, and the exit status is its.",
    )
    parser.add_argument("-n", "--num-processes", type=int, required=True, metavar="PROCESSES")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        metavar="D",
        help="CPU devices, or GPUs, of each process (default 1; on CPU JAX_NUM_CPU_DEVICES, where "
        "that is set)",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        default=1,
        metavar="H",
        help="shares the processes out, in order, among so many virtual hosts (FREEIO_HOST_SIZE): "
        "expert groups run as between hosts (default 1: none)",
    )
    parser.add_argument(
        "--platform",
        default=os.environ.get("JAX_PLATFORMS") or "cpu",
        help="JAX_PLATFORMS of the processes (default: that of the environment, else cpu)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="time for the others to end by themselves once a process has failed (default 5)",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="script, or module after -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the program")
    options = parser.parse_args(arguments)
    if options.devices_per_process is None:
        on_cpu = options.platform.split(",")[0] == "cpu"
        asked = os.environ.get("JAX_NUM_CPU_DEVICES", "") if on_cpu else ""
        options.devices_per_process = int(asked) if asked.isdecimal() else 1
    for name in ("num_processes", "devices_per_process", "hosts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.num_processes % options.hosts:
        parser.error(f"-n {options.num_processes} does not divide by --hosts {options.hosts}")
    if not options.module and not os.path.isfile(options.program):
        parser.error(f"there is no script {options.program}")
    return options


def main(arguments=None):
    options = parse(arguments)
    program = ["-m"] * options.module + [options.program, *options.arguments]
    try:
        pod = Pod(
            program,
            num_processes=options.num_processes,
            devices_per_process=options.devices_per_process,
            num_hosts=options.hosts,
            platform=options.platform,
            grace=options.grace,
        )
    except ValueError as error:
        sys.exit(f"freeio_jax.launch: {error}")
    return pod.run()


if __name__ == "__main__":
    sys.exit(main())
