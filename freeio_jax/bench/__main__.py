"""The benchmark as a program: which parts run, on which devices; see ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax

from freeio_jax import cluster
from freeio_jax.bench.command_line import (
    MODELS,
    NAMES,
    ignored_by_readme,
    layer_sizes,
    parse_arguments,
)
from freeio_jax.launch import pod


def run_parts(arguments: argparse.Namespace, newest: Sequence[Mapping] = ()) -> int:
    """The parts, in order, on the first ``arguments.ranks`` devices; 1 if something failed.

    ``newest``: the records of that part, which comes before JAX starts.
    """
    import freeio_jax
    from freeio_jax.bench import (
        check,
        cpu,
        decode,
        experts,
        floors,
        late,
        layer,
        mix,
        on_demand,
        overlap,
        readme,
        scaling,
        shapes,
        tax,
    )
    from freeio_jax.bench.floor import Limits
    from freeio_jax.bench.report import Report, plot_scaling, plot_shapes

    devices = jax.devices()[: arguments.ranks]
    on_gpu = devices[0].platform == "gpu"
    if arguments.num_sms is not None:
        freeio_jax.config(num_sms=arguments.num_sms)

    def exchanges(*left_out):
        if not on_demand.is_at_hand(devices):
            left_out += ("on-demand",)
        names = arguments.exchanges or [name for name in NAMES if name not in left_out]
        asked = arguments.exchanges is not None
        why = no_ragged(on_gpu, jax.process_count() > 1, asked)
        if why is None:
            return names
        print(f"# lax.ragged_all_to_all {why}: left out")
        return [name for name in names if not name.startswith("ragged")]

    dtype = arguments.dtype or "bfloat16"
    print(f"# {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}", flush=True)
    report = Report(_about(devices), arguments.json)
    if newest:
        report.data["newest"] = list(newest)
        report.save()
    sizes = {"num_ranks": len(devices), "dtype": dtype}
    stamped = tax.read_stamped(arguments.stamped) if arguments.stamped else ()
    for part in arguments.parts:
        if part == "check":
            check.run(report, num_ranks=len(devices), exchanges=exchanges("reference"))
        elif part == "tax":
            tax.run(
                report,
                _suites(arguments, "large", (128, 4096)),
                devices=devices,
                numbers_of_ranks=scaling.numbers_of_ranks(len(devices)),
                exchanges=exchanges("ragged-32", "ragged-1"),
                dtype=dtype,
                stamped=stamped,
                png=arguments.png,
            )
        elif part == "shapes":
            names = exchanges("reference")
            # Floors are of freeio's kernels. What tries XLA's exchanges need not wait for limits.
            limits = Limits.measure(devices) if "freeio" in names else Limits(*5 * [math.nan])
            report.data["about"]["limits"] = dataclasses.asdict(limits)
            memory = check.memory(jax.local_devices())
            report.data["about"]["engine_bytes"] = memory.get("engine")
            print(f"# {limits}; bytes in use: {memory}", flush=True)
            suites = _suites(arguments)
            shapes.run(report, limits, suites, ops=arguments.ops, exchanges=names, **sizes)
            if arguments.png:
                plot_shapes(report.data["shapes"], arguments.png)
        elif part == "floors":
            limits = Limits.measure(devices)
            report.data["about"]["limits"] = dataclasses.asdict(limits)
            floors.run(report, limits, _suites(arguments), ops=arguments.ops, **sizes)
        elif part == "scaling":
            suites = _suites(arguments, "large", (128, 4096))
            scaling.run(report, suites, devices=devices, ops=arguments.ops, dtype=dtype)
            if arguments.png:
                path = arguments.png
                if "shapes" in arguments.parts:
                    path = path.with_name(f"{path.stem}-scaling{path.suffix}")
                plot_scaling(report.data.get("scaling", []), path)
        elif part == "sms":
            suites = _suites(arguments, "large", (128, 4096))
            numbers = shapes.numbers_of_sms()
            limits = Limits.measure(devices)
            shapes.sweep(report, limits, suites, ops=arguments.ops, sms=numbers, **sizes)
        elif part == "late":
            suites = _suites(arguments, "large", (128, 4096))
            late.run(report, suites, ops=arguments.ops, **sizes)
        elif part == "soak":
            check.soak(report, arguments.soak, num_ranks=len(devices))
            mix.run(report, arguments.soak, num_ranks=len(devices))
        elif part == "decode":
            for suite in _suites(arguments, "large", decode.TOKENS):
                decode.run(report, suite, layers=arguments.layers or decode.LAYERS, **sizes)
        elif part == "layer":
            tokens, given = arguments.tokens or (4096,), layer_sizes(arguments)
            all_sizes = [layer.Sizes(num_tokens=t, **sizes, **given) for t in tokens]
            products = [
                None if name == "chosen" else name for name in arguments.products or ["chosen"]
            ]
            layer.run(report, all_sizes, exchanges("ragged-32", "ragged-1"), products)
        elif part == "overlap":
            overlap.run(
                report,
                _models(arguments),
                tokens=arguments.tokens or overlap.TOKENS,
                num_chunks=arguments.num_chunks,
                num_sms=arguments.overlap_sms,
                passes=arguments.passes,
                png=arguments.png,
                **sizes,
            )
        elif part == "memory":
            _memory(report, arguments)
        elif part == "experts":
            path = arguments.png
            if path and len(arguments.parts) > 1:
                path = path.with_name(f"{path.stem}-experts{path.suffix}")
            experts.run(report, dtype=dtype, png=path, products=arguments.products)
        elif part == "readme":
            if on_gpu:
                readme.measure(
                    report, devices=devices, dtype=dtype, stamped=stamped, png=arguments.png
                )
            else:
                cpu.run(report, arguments)
            readme.print_tables(report.data, arguments.json.name)
        elif part == "once":
            op, tokens = arguments.once
            (suite,) = _suites(arguments, "large", (tokens,), override=False)
            shapes.once(op, shapes.Case(suite, tokens, **sizes))
    if report.failed:
        print(f"\n{report.failed} measurement(s) failed, see above", file=sys.stderr)
    return min(report.failed, 1)


def _about(devices: Sequence[jax.Device]) -> dict[str, object]:
    """What a record says of its run."""
    import freeio_jax

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": " ".join(["python -m freeio_jax.bench", *sys.argv[1:]]),
        "platform": devices[0].client.platform_version,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "ranks": len(devices),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": freeio_jax.config(),
    }


def _commit() -> str | None:
    """Of the checkout that this package lies in; None: it lies in none."""
    describe = ["git", "describe", "--always", "--dirty"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # there is no git
        return None
    return found.stdout.strip() or None


def _num_gpus() -> int:
    """GPUs that JAX will use here. It need not have started."""
    platforms = jax.config.jax_platforms
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    return len(pod.visible_gpus())


def no_ragged(on_gpu: bool, in_processes: bool, asked: bool) -> str | None:
    """Why XLA's ragged exchanges are not measured, in words; None: they are.

    ``asked``: they are named on the command line.
    """
    if not on_gpu:
        return "exists on GPUs alone"
    if in_processes and not asked:
        return "hung between processes at T=4096, jax 0.11.2 (name it by --exchanges to try it)"
    return None


def xla_flags(given: str, in_processes: bool) -> str:
    """XLA's options of this run: those that were given, and ours where they say nothing else."""
    ours = {"xla_gpu_enable_command_buffer": ""}
    # From this version on XLA refuses ragged exchanges between processes over NCCL, unless it is
    # told that they are meant. Older ones do not know the option.
    if in_processes and jax.__version_info__ >= (0, 11, 2):
        ours["xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"] = "true"
    added = [f"--{name}={value}" for name, value in ours.items() if name not in given]
    return " ".join([given, *added]).strip()


def _try_newest(arguments, num_gpus: int) -> list[Mapping]:
    """The part that comes first: its processes need the GPUs' memory, which JAX takes here."""
    from freeio_jax.bench import newest
    from freeio_jax.bench.report import Report

    sizes = []
    for name in ("suites", "tokens", "hidden", "top_k", "num_experts", "dtype"):
        value = getattr(arguments, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            sizes += [f"--{name.replace('_', '-')}", *map(str, values)]
    if not any((arguments.suites, arguments.hidden, arguments.top_k, arguments.num_experts)):
        sizes += ["--suites", "large"]
    if not arguments.tokens:
        sizes += ["--tokens", "1", "128", "1024", "4096", "8192"]
    report = Report({})
    # --readme has XLA's other exchanges in its own process, and its tables are of one process.
    only = {} if arguments.newest else {"options": ["device kernel"], "in_processes": False}
    newest.run(
        report,
        sizes,
        **only,
        num_ranks=arguments.ranks or num_gpus or 2,
        platform="cuda" if num_gpus else "cpu",
        exchanges=[n for n in newest.EXCHANGES if n in (arguments.exchanges or NAMES)],
    )
    return report.data.get("newest", [])


def _suites(arguments, only=None, tokens=None, override=True):
    """The suites asked for: ``only`` one and ``tokens``, unless the command line names others."""
    from freeio_jax.bench.shapes import SUITES, Suite

    given = arguments.hidden, arguments.top_k, arguments.num_experts
    large = SUITES["large"]
    if any(given):
        sizes = (large.hidden, large.top_k, large.num_experts)
        sizes = (mine or default for mine, default in zip(given, sizes, strict=True))
        suites = [Suite("custom", *sizes, "uniform", large.tokens)]
    else:
        suites = [SUITES[name] for name in arguments.suites or ([only] if only else SUITES)]
    if override and arguments.tokens:
        tokens = tuple(arguments.tokens)
    return [dataclasses.replace(s, tokens=tokens) if tokens else s for s in suites]


def _models(arguments):
    """The layers of --overlap and --memory, by name."""
    from freeio_jax.bench import overlap

    given = layer_sizes(arguments)
    if given:
        return {"custom": dataclasses.replace(overlap.MODELS[MODELS[0]], **given)}
    return {name: overlap.MODELS[name] for name in arguments.models or MODELS}


def _memory(report, arguments):
    """What XLA plans, found by a program of its own that imports freeio_jax with a stand-in."""
    from freeio_jax.bench import memory

    report.table("Memory of a layer on two H200s that are not there", memory.COLUMNS)
    for name, model in _models(arguments).items():
        for num_tokens in arguments.tokens or (8192,):
            about = {"model": name, "num_tokens": num_tokens}
            options = dataclasses.asdict(model) | {
                "num_tokens": num_tokens,
                "num_chunks": list(arguments.num_chunks),
                "product": (arguments.products or ["hopper"])[0],
                "capacity_factor": arguments.capacity_factor or 1.25,
            }
            report.guarded_all("memory", about, functools.partial(memory.run, options))


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    several = cluster.num_processes() > 1
    ranks = arguments.ranks or 8
    num_gpus = 0 if several else _num_gpus()
    ignored = ignored_by_readme(arguments) if arguments.readme and num_gpus else []
    if ignored:
        print(
            f"--readme has sizes of its own on GPUs: leave out {', '.join(ignored)}, or run "
            "the part that they are for without --readme.",
            file=sys.stderr,
        )
        return 2
    # Both are read when JAX's backends start.
    if not several and (jax.config.jax_num_cpu_devices or 0) < ranks:
        jax.config.update("jax_num_cpu_devices", ranks)
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), several)
    if not several:
        newest = []
        if arguments.newest or (arguments.readme and num_gpus):
            newest = _try_newest(arguments, num_gpus)
        return _run(arguments, ranks, newest)
    if arguments.newest or arguments.readme:
        print(
            "--newest starts processes by itself, and --readme is of one process, in which it "
            "has --newest: run them without the launcher.",
            file=sys.stderr,
        )
        return 2

    import freeio_jax
    from freeio_jax.bench import processes

    jax.distributed.initialize()
    freeio_jax.initialize()
    if arguments.ranks not in (None, jax.device_count()):
        print(
            f"--ranks {arguments.ranks}: the processes have {jax.device_count()} devices, and all "
            "of them take part.",
            file=sys.stderr,
        )
        return 2
    arguments.ranks = jax.device_count()
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            arguments.json = arguments.png = None
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        status = _run(arguments, arguments.ranks)
        # JAX lets processes wait for each other at their end, but not for long.
        processes.share(None)
    return status


def _run(arguments, ranks: int, newest: Sequence[Mapping] = ()) -> int:
    """The comparison on CPU, or the parts."""
    on_cpu = jax.default_backend() == "cpu"
    if arguments.ranks is None:
        arguments.ranks = ranks if on_cpu else len(jax.devices())
    if len(jax.devices()) < arguments.ranks:
        print(
            f"--ranks {arguments.ranks}: there are {len(jax.devices())} devices "
            f"({jax.devices()[0].platform}).",
            file=sys.stderr,
        )
        return 2
    if on_cpu and not arguments.parts:
        from freeio_jax.bench import cpu
        from freeio_jax.bench.report import Report

        cpu.run(Report(_about(jax.devices()[: arguments.ranks]), arguments.json), arguments)
        return 0
    arguments.parts = arguments.parts or ["shapes"]
    return run_parts(arguments, newest)


if __name__ == "__main__":
    sys.exit(main())
