"""What the benchmark's command line takes, and its help."""

from __future__ import annotations

import argparse
import pathlib

PARTS = (
    "newest",
    *("check", "tax", "shapes", "floors", "scaling", "sms", "late", "soak", "decode", "layer"),
    *("overlap", "memory", "experts"),
    *("readme", "once"),
)
#: What --all leaves out.
NOT_OF_ALL = ("newest", "overlap", "memory", "readme", "once")
OPS = ("dispatch", "combine", "combine_transpose", "dispatch_along")
NAMES = ("freeio", "reference", "ragged", "ragged-by-expert", "ragged-32", "ragged-1", "dense")
NAMES += ("on-demand",)
SUITES = ("large", "small", "half", "zipf")
MODELS = ("DeepSeek-V3", "Qwen3-30B-A3B")
PASSES = ("forward", "gradients")
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
beside controls without exchanges; the same with a shared expert, after the combine or beside it.

tax: dispatch and combine of each exchange, on 2, 4, ... ranks. The ideal time is that of the bytes
that must cross the link, at its rate. The parts of XLA's exchanges come from the profile, ours from
kernels with time stamps, by --stamped; see CONTRIBUTING.md. On CPU there are only the totals. --png
draws two pictures, NAME-latency and NAME-parts.

newest: XLA's kernel that moves ragged rows from and to symmetric buffers. It may crash, so each
exchange is tried in processes of its own, which this part starts: one, and one for each GPU.

readme: measures what the tables of README and docs/performance.md show, of XLA's newest exchanges,
too, and prints them. The tables have their sizes, so it takes none. On CPU: the table of the CPU,
of any sizes.

floors: also by a single rate, the link's better one, and the copy's for all bytes in memory.

In several processes all parts print the same tables, once. All devices take part:
  python -m freeio_jax.launch -n 2 --platform cuda -m freeio_jax.bench

overlap: an MoE layer whose exchanges run beside its experts, whole and in chunks, of DeepSeek-V3
(H=7168 K=8 E=256, width 2048) and of Qwen3-30B-A3B (H=2048 K=8 E=128, width 768), with a shared
expert and without. hidden = (one after the other - beside each other) / exchange alone. --png draws
what ran when. --hidden, --top-k, --num-experts and --expert-width
make another layer, "custom".

memory: what XLA plans for that layer on two H200s, which need not be there. It needs
jax-cuda13-plugin and jax-cuda13-pjrt of jax's version.

exchanges:
  freeio            this package's engine
  reference         freeio_jax.reference: dense lax.all_to_all with slots for the worst case
  ragged            lax.ragged_all_to_all, what goes to a peer in 128 updates
  ragged-32, -1     likewise, in 32 updates, or in one
  ragged-by-expert  likewise, in updates of one expert each, that land in packed order at once
  dense             lax.all_to_all with slots for 1.25 of an even load
  on-demand         all gather all ids, and then put each row to its place; by default only where
                    NVSHMEM carries the rows between hosts
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
    parts("--overlap", action="store_true", help="what a layer hides of its exchanges")
    parts("--memory", action="store_true", help="peak memory of a layer in chunks, without a GPU")
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
    names = ", ".join(f"--{name}" for name in NOT_OF_ALL)
    parts("--all", action="store_true", help=f"all parts but {names}")

    sizes = parser.add_argument_group("sizes").add_argument
    sizes("--ranks", type=count, help="R, devices; default: 8 (virtual ones) on CPU, else all")
    sizes("--tokens", type=count, nargs="+", metavar="T", help="tokens of one rank")
    sizes("--hidden", type=count, help="H, elements of one row")
    sizes("--top-k", type=count, help="K, experts of one token")
    sizes("--num-experts", type=count, help="E, experts of all ranks")
    sizes("--expert-width", type=count, help="of one expert, of the layer; default: 2048")
    sizes("--dtype", choices=DTYPES, help="of the rows; default: float32 on CPU, else bfloat16")
    sizes(
        "--capacity-factor",
        type=float,
        help="on CPU and of --memory: rows per rank as a multiple of T*K; default: the dropless "
        "bound, of --memory 1.25",
    )

    what = parser.add_argument_group("what of it").add_argument
    what("--suites", nargs="+", choices=SUITES, help="of --shapes; default: all")
    what("--ops", nargs="+", choices=OPS, default=OPS, help="not of --layer; default: all")
    what(
        "--exchanges",
        nargs="+",
        choices=NAMES,
        help="default: all, but no reference in --shapes, no -32 and -1 in --layer and --tax, and "
        "no ragged ones between processes",
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
    what("--models", nargs="+", choices=MODELS, help="of --overlap; default: all")
    what("--passes", nargs="+", choices=PASSES, default=PASSES, help="of --overlap; default: both")
    what(
        "--num-chunks",
        type=count,
        nargs="+",
        default=(1, 2, 4),
        metavar="N",
        help="of --overlap and --memory; default: 1 2 4",
    )
    what(
        "--overlap-sms",
        type=count,
        nargs="+",
        default=(8, 16, 24, 32),
        metavar="N",
        help="multiprocessors beside compute, of --overlap; default: 8 16 24 32",
    )
    what("--layers", type=count, help="of --decode, 2 at least; default: 61")
    what("--num-sms", type=count, help="as in freeio_jax.config")
    what("--repeats", type=count, default=5, help="on CPU: rounds; the median counts")
    what("--json", type=pathlib.Path, help="also write all figures to this file, as they come")
    what("--png", type=pathlib.Path, help="also draw the times over T, or R")
    arguments = parser.parse_args(argv)

    arguments.parts = [p for p in PARTS if getattr(arguments, p) not in (None, False)]
    if arguments.all:
        arguments.parts = [p for p in PARTS if p not in NOT_OF_ALL or p in arguments.parts]
        arguments.soak = arguments.soak or SOAK_CALLS
    if arguments.models and layer_sizes(arguments):
        parser.error(
            "--models have sizes of their own: leave out --hidden, --top-k, --num-experts, "
            "--expert-width"
        )
    for suites in (arguments.hidden, arguments.top_k, arguments.num_experts):
        if suites is not None and arguments.suites:
            parser.error(
                "--suites have sizes of their own: leave out --hidden, --top-k, --num-experts"
            )
    if arguments.layers == 1:
        parser.error(
            "--layers 1: the host's time of a call is that of two layers or more less one's"
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


def layer_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """The sizes of a layer that the command line names."""
    names = ("hidden", "top_k", "num_experts", "expert_width")
    given = {name: getattr(arguments, name) for name in names}
    return {name: size for name, size in given.items() if size is not None}


def ignored_by_readme(arguments: argparse.Namespace) -> list[str]:
    """The options given that mean nothing to --readme on GPUs: its tables have their sizes."""
    names = ("suites", "tokens", "hidden", "top_k", "num_experts", "expert_width")
    names += ("capacity_factor", "exchanges", "products", "layers")
    given = [name for name in names if getattr(arguments, name) is not None]
    return [f"--{name.replace('_', '-')}" for name in given]


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


_at_least_one.__name__ = "int"
