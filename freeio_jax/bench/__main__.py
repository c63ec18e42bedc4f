"""Command line of the benchmark; see ``python -m freeio_jax.bench --help``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax

from freeio_jax import cluster
from freeio_jax.launch import pod

PARTS = (
    "newest",
    *(
        "check",
        "tax",
        "shapes",
        "floors",
        "scaling",
        "sms",
        "late",
        "soak",
        "decode",
        "layer",
        "experts",
    ),
    *("readme", "once"),
)
#: What --all leaves out.
ALONE = ("newest", "readme", "once")
OPS = ("dispatch", "combine", "combine_transpose", "dispatch_along")
NAMES = ("freeio", "reference", "ragged", "ragged-by-expert", "ragged-32", "ragged-1", "dense")
SUITES = ("large", "small", "half", "zipf")
PRODUCTS = ("chosen", "hopper", "tokamax", "ragged_dot", "tiled")
DTYPES = ("bfloat16", "float16", "float32")
#: What --all does when no other number is said, and --soak without one.
SOAK_CALLS = 2000

DESCRIPTION = """\
Times dispatch and combine on the devices of this process, or of all processes of a launcher.

On CPU: dispatch, combine and both with gradients, against the same contract over dense
lax.all_to_all. On GPUs: the parts below, --shapes unless others are named.
"""

EPILOG = """\
shapes, of bfloat16 rows:
  large   H=7168 K=8 E=256, uniform routing, T of 1, 8, 128, 1024, 4096, 8192
  small   H=2048 K=4 E=64, likewise
  half    as large, T of 128 and 4096; half of all assignments go to one rank (of 2: as large)
  zipf    as large, T of 128 and 4096; the n-th most popular expert is drawn with weight 1/n
--hidden, --top-k or --num-experts make one suite of their own, "custom", of uniform routing. The
packed rows are 1.25 x T*K, or as many as the routing needs; so are the slots of the dense exchange.

floor = max(link_bytes / link_bw, hbm_bytes / hbm_bw) + 2 flag trips, where the bandwidths and the
trip are measured first, on the same GPUs, and the bytes are those that must move at least. The link
has a rate for loads and one for stores, and memory one for copies and one for zeros.

--sms compares with what so many SMs can load and store, too. An SM of an H200 stores at most
59 GB/s, and loads 149 where it is alone and 31 where all do. Other GPUs have no such figure.

wall: of one call in a program of several that wait for each other, programs in a row, for all
exchanges alike, a kernel of a few numbers between two calls included. Command buffers are off, so
that no recording of them is timed, unless XLA_FLAGS says otherwise.
kernel: the median duration of the one kernel that an operation is, by jax.profiler.

experts: M x K x N rows and widths in G groups, each product by each implementation, against one
dense product. --experts takes no other sizes.

decode: 61 layers of dispatch and combine in one program, with XLA's command buffers and without,
beside controls without exchanges.

tax: dispatch and combine of each exchange, on 2, 4, ... ranks. The ideal time is that of the bytes
that must cross the link, at its rate. The parts of XLA's exchanges come from the profile, ours from
kernels with time stamps, by --stamped; see CONTRIBUTING.md. On CPU there are only the totals. --png
draws two pictures, NAME-latency and NAME-parts.

newest: XLA's kernel that moves ragged rows from and to symmetric buffers. It may crash, so each
exchange is tried in processes of its own, which this part starts: one, and one for each GPU.

readme: measures what the tables of README and docs/performance.md show, of XLA's newest exchanges,
too, and prints them. On CPU: the table of the CPU.

floors: also by a single rate, the link's better one, and the copy's for all bytes in memory.

In several processes all parts print the same tables, once. All devices take part:
  python -m freeio_jax.launch -n 2 --platform cuda -m freeio_jax.bench

exchanges:
  freeio            this package's engine
  reference         freeio_jax.reference: dense lax.all_to_all with slots for the worst case
  ragged            lax.ragged_all_to_all, what goes to a peer in 128 updates
  ragged-32, -1     likewise, in 32 updates, or in one
  ragged-by-expert  likewise, in updates of one expert each, that land in packed order at once
  dense             lax.all_to_all with slots for 1.25 of an even load
"""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m freeio_jax.bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = _at_least_one
    parts = parser.add_argument_group("parts").add_argument
    parts("--check", action="store_true", help="each exchange against freeio_jax.reference")
    parts("--tax", action="store_true", help="times next to the link's, and what they divide into")
    parts("--shapes", action="store_true", help="times on each shape, next to the floor")
    parts("--floors", action="store_true", help="the floor, and one with a single rate")
    parts("--scaling", action="store_true", help="times on 2, 4, ... ranks, next to the floors")
    parts("--sms", action="store_true", help="how many SMs an exchange needs")
    parts("--late", action="store_true", help="what an exchange takes when one rank comes late")
    parts(
        "--soak",
        type=count,
        nargs="?",
        const=SOAK_CALLS,
        metavar="N",
        help="N checked calls of changing shape, and the memory they leave; then N programs whose "
        f"exchanges run beside each other and all else; default {SOAK_CALLS}",
    )
    parts("--decode", action="store_true", help="many layers in one program, and the host's time")
    parts("--layer", action="store_true", help="an MoE layer end to end, over each exchange")
    parts("--experts", action="store_true", help="the experts' product, by each implementation")
    parts(
        "--once",
        nargs=2,
        metavar=("OP", "T"),
        help="one launch of one operation, for other profilers; see CONTRIBUTING.md",
    )
    parts("--newest", action="store_true", help="XLA's newest exchanges, in processes of their own")
    parts(
        "--readme",
        action="store_true",
        help="the figures of README and docs/performance.md, into --json, and as their tables",
    )
    parts("--all", action="store_true", help=f"all parts but --{', --'.join(ALONE)}")

    sizes = parser.add_argument_group("sizes").add_argument
    sizes("--ranks", type=count, help="R, devices; default: 8 (virtual ones) on CPU, else all")
    sizes("--tokens", type=count, nargs="+", metavar="T", help="tokens of one rank")
    sizes("--hidden", type=count, help="H, elements of one row")
    sizes("--top-k", type=count, help="K, experts of one token")
    sizes("--num-experts", type=count, help="E, experts of all ranks")
    sizes("--expert-width", type=count, default=2048, help="of the layer; default %(default)s")
    sizes("--dtype", choices=DTYPES, help="of the rows; default: float32 on CPU, else bfloat16")
    sizes(
        "--capacity-factor",
        type=float,
        help="on CPU: rows per rank as a multiple of T*K; default: the dropless bound",
    )

    what = parser.add_argument_group("what of it").add_argument
    what("--suites", nargs="+", choices=SUITES, help="of --shapes; default: all")
    what("--ops", nargs="+", choices=OPS, default=OPS, help="not of --layer; default: all")
    what(
        "--exchanges",
        nargs="+",
        choices=NAMES,
        help="default: all, but no reference in --shapes, and no -32 and -1 in --layer and --tax",
    )
    what(
        "--products",
        nargs="+",
        choices=PRODUCTS,
        help="what multiplies the experts' rows, right or wrong; default: in --layer what is "
        "chosen, in --experts each of them",
    )
    what(
        "--stamped",
        type=pathlib.Path,
        metavar="FILE",
        help="the JSON of --tax in a build with time stamps; see CONTRIBUTING.md",
    )
    what("--num-sms", type=count, help="as in freeio_jax.config")
    what("--repeats", type=count, default=5, help="on CPU: rounds; the median counts")
    what("--json", type=pathlib.Path, help="also write all figures to this file, as they come")
    what("--png", type=pathlib.Path, help="also draw the times over T, or R")
    arguments = parser.parse_args(argv)

    arguments.parts = [p for p in PARTS if getattr(arguments, p) not in (None, False)]
    if arguments.all:
        arguments.parts = [p for p in PARTS if p not in ALONE or p in arguments.parts]
        arguments.soak = arguments.soak or SOAK_CALLS
    for suites in (arguments.hidden, arguments.top_k, arguments.num_experts):
        if suites is not None and arguments.suites:
            parser.error(
                "--suites have sizes of their own: leave out --hidden, --top-k, --num-experts"
            )
    if (arguments.top_k or 8) > (arguments.num_experts or 64):
        parser.error(f"--top-k {arguments.top_k} exceeds --num-experts {arguments.num_experts}")
    if arguments.readme and arguments.json is None:
        parser.error(
            "--readme makes a record: say where, as --json docs/notebook/DATE_figures.json"
        )
    if arguments.stamped is not None and not arguments.stamped.is_file():
        parser.error(f"--stamped {arguments.stamped}: there is no such file")
    if arguments.once is not None:
        op, tokens = arguments.once
        if op not in OPS:
            parser.error(f"--once {op}: the operations are {', '.join(OPS)}")
        if len(arguments.suites or ()) > 1:
            parser.error("--once is of one of the --suites")
        try:
            arguments.once = op, count(tokens)
        except (ValueError, argparse.ArgumentTypeError):
            parser.error(f"--once {op} {tokens}: T must be a positive number")
    for path in (arguments.json, arguments.png):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    return arguments


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


_at_least_one.__name__ = "int"


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
        names = arguments.exchanges or [name for name in NAMES if name not in left_out]
        if on_gpu:
            return names
        print("# lax.ragged_all_to_all exists on GPUs alone: left out")
        return [name for name in names if not name.startswith("ragged")]

    dtype = arguments.dtype or "bfloat16"
    about = {
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
    print(f"# {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}", flush=True)
    report = Report(about, arguments.json)
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
            limits = Limits.measure(devices)
            report.data["about"]["limits"] = dataclasses.asdict(limits)
            memory = check.memory(jax.local_devices())
            report.data["about"]["engine_bytes"] = memory.get("engine")
            print(f"# {limits}; bytes in use: {memory}", flush=True)
            suites = _suites(arguments)
            names = exchanges("reference")
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
                decode.run(report, suite, **sizes)
        elif part == "layer":
            given = {"hidden": arguments.hidden, "top_k": arguments.top_k}
            given |= {"num_experts": arguments.num_experts, "expert_width": arguments.expert_width}
            given = {name: value for name, value in given.items() if value is not None}
            tokens = arguments.tokens or (4096,)
            all_sizes = [layer.Sizes(num_tokens=t, **sizes, **given) for t in tokens]
            products = [
                None if name == "chosen" else name for name in arguments.products or ["chosen"]
            ]
            layer.run(report, all_sizes, exchanges("ragged-32", "ragged-1"), products)
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
                cpu.set_defaults(arguments)
                report.data["cpu"] = cpu.measure(arguments)
                report.save()
            readme.print_tables(report.data, arguments.json.name)
        elif part == "once":
            op, tokens = arguments.once
            (suite,) = _suites(arguments, "large", (tokens,), override=False)
            shapes.once(op, shapes.Case(suite, tokens, **sizes))
    if report.failed:
        print(f"\n{report.failed} measurement(s) failed, see above", file=sys.stderr)
    return min(report.failed, 1)


def _commit() -> str | None:
    """Of the checkout that this package lies in; None: it lies in none."""
    describe = ["git", "describe", "--always", "--dirty"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # there is no git
        return None
    return found.stdout.strip() or None


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
    newest.run(
        report,
        sizes,
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


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    several = cluster.num_processes() > 1
    ranks = arguments.ranks or 8
    # Both are read when JAX's backends start.
    if not several and (jax.config.jax_num_cpu_devices or 0) < ranks:
        jax.config.update("jax_num_cpu_devices", ranks)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    if not several:
        newest = []
        num_gpus = len(pod.visible_gpus())
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

        cpu.run(arguments)
        return 0
    arguments.parts = arguments.parts or ["shapes"]
    return run_parts(arguments, newest)


if __name__ == "__main__":
    sys.exit(main())
