"""Command line of the plan; see ``python -m freeio_jax.plan --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import jax.numpy as jnp
import numpy as np

from freeio_jax.dtypes import has_whole_bytes
from freeio_jax.plan import rates as known_rates
from freeio_jax.plan import report
from freeio_jax.plan.plan import capacity_of, make
from freeio_jax.plan.rates import Rate, Rates
from freeio_jax.plan.routing import ROUTINGS, Pod, made, recorded
from freeio_jax.plan.traffic import Counts

EPILOG = """\
routing:
  uniform        each expert alike
  zipf           the n-th most popular expert with weight 1/n
  skewed         as recorded routers look: layers prefer experts, and ranks' texts prefer others
  group-limited  DeepSeek-V3's: 4 of 8 groups of experts for each token
  one-host       all tokens to experts of the first host
  uneven         uniform, but the ranks of a host have from 1/G to all of the tokens
  FILE.npy       recorded ids, int [R, T, K] or [R * T, K], rank by rank; -1 is no expert

What is counted is exact for the routing. The predicted time is the floor's bytes over rates, and
what the kernels add on two H200s. It is within 10% of what was measured on two and four H200s, with
the exceptions that docs/scaling.md names. Nothing was ever run on more GPUs, or between hosts with
RDMA NICs: there it is a prediction and no more.

examples:
  python -m freeio_jax.plan --hosts 8 --gpus 8 --tokens 4096
  python -m freeio_jax.plan --hosts 8 --gpus 8 --tokens 4096 --routing uneven --rails same
  python -m freeio_jax.plan --gpus 64 --gpu gb200 --tokens 2048   # one NVLink domain of 64
"""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m freeio_jax.plan",
        description="Bytes, memory, floors and predicted times of an exchange, without any GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = _at_least(1)
    sizes = parser.add_argument_group("sizes").add_argument
    sizes("--hosts", type=count, default=1, help="NVLink domains; default %(default)s")
    sizes("--gpus", type=count, default=8, help="GPUs of each; default %(default)s")
    sizes("--tokens", type=count, help="T, tokens of one rank; default 4096, or the file's")
    sizes("--hidden", type=count, default=7168, help="H, elements of a row; default %(default)s")
    sizes("--top-k", type=count, help="K, experts of a token; default 8, or the file's")
    sizes("--experts", type=count, default=256, help="E, of all ranks; default %(default)s")
    sizes("--dtype", type=_dtype, default="bfloat16", help="of the rows; default %(default)s")
    sizes(
        "--capacity-factor",
        type=_factor,
        default=1.25,
        help="packed rows of a rank as a multiple of T*K, or as many as the routing needs; "
        "0: the dropless bound; default %(default)s",
    )
    sizes("--no-zero-tail", action="store_true", help="as zero_tail=False of dispatch")
    what = parser.add_argument_group("routing").add_argument
    what("--routing", default="uniform", help="see below; default %(default)s")
    what("--seed", type=_at_least(0), default=0, help="of the made ones; default %(default)s")
    what(
        "--rails",
        choices=("even", "same"),
        default="even",
        help="which GPUs carry rows between hosts; same: those of the same local rank",
    )
    machine = parser.add_argument_group("machine").add_argument
    machine("--gpu", choices=known_rates.GPUS, default="h200", help="default %(default)s")
    machine("--measure", action="store_true", help="take NVLink's and memory's rates from here")
    for name, words in (
        ("link", "of NVLink, each direction"),
        ("memory", "of memory, read and written"),
        ("network", "of a GPU's network card, each direction"),
    ):
        machine(f"--{name}", type=_rate, metavar="GB/s", help=words)
    told = parser.add_argument_group("output").add_argument
    told("--per-rank", action="store_true", help="also the bytes of each rank in dispatch")
    told("--json", type=pathlib.Path, help="write all figures to this file")
    told("--png", type=pathlib.Path, help="draw each rank's bytes in dispatch")
    arguments = parser.parse_args(argv)
    for path in (arguments.json, arguments.png):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            parser.error(f"{path} is a folder: name a file in it")
    return arguments


def _at_least(least: int):
    """A type of arguments: an int that is not less."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    number.__name__ = "int"
    return number


def _rate(text: str) -> float:
    """A type of arguments: a rate in GB/s, by which bytes can be divided."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number of GB/s, got {text}")
    return value


def _factor(text: str) -> float:
    """A type of arguments: a capacity factor; 0 stands for the dropless bound."""
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number or 0, got {text}")
    return value


def _dtype(text: str) -> np.dtype:
    """A type of arguments: a dtype whose rows dispatch moves."""
    try:
        dtype = jnp.dtype(text)
    except TypeError:
        dtype = None
    # numpy has dtypes that JAX lacks: strings, objects, dates, long doubles.
    if dtype is None or not hasattr(jnp, dtype.name):
        raise argparse.ArgumentTypeError(f"JAX has no dtype {text}; bfloat16 is one")
    if not has_whole_bytes(dtype):
        raise argparse.ArgumentTypeError(
            f"elements of {text} are not whole bytes, and dispatch moves none of them"
        )
    return dtype


# What argparse calls them where float() fails.
_rate.__name__ = _factor.__name__ = "float"


def counts_of(arguments: argparse.Namespace) -> Counts:
    """Counts what the command line asks for.

    Raises:
      ValueError: the sizes, or the file's array, do not fit together.
    """
    num_ranks = arguments.hosts * arguments.gpus
    tokens, top_k = arguments.tokens or 4096, arguments.top_k or 8
    ids = None
    if arguments.routing not in ROUTINGS:
        path = pathlib.Path(arguments.routing)
        if not path.is_file():
            raise ValueError(
                f"--routing {arguments.routing}: neither a file nor one of {', '.join(ROUTINGS)}."
            )
        ids = recorded(path, num_ranks)
        for name, given, has in (
            ("--tokens", arguments.tokens, ids.shape[1]),
            ("--top-k", arguments.top_k, ids.shape[2]),
        ):
            if given not in (None, has):
                raise ValueError(f"{name} {given}: {path} has {has}. Leave it out.")
        _, tokens, top_k = ids.shape
    if arguments.experts % num_ranks:
        raise ValueError(
            f"--experts {arguments.experts} are not equal parts for {num_ranks} ranks: use a "
            "multiple, or other --hosts and --gpus."
        )
    if top_k > arguments.experts:
        raise ValueError(f"--top-k {top_k} exceeds --experts {arguments.experts}.")
    pod = Pod(arguments.hosts, arguments.gpus, tokens, top_k, arguments.experts)
    return Counts.of(pod, made(arguments.routing, pod, arguments.seed) if ids is None else ids)


def rates_of(arguments: argparse.Namespace) -> Rates:
    """The machine's rates: known, measured, or given.

    Raises:
      ValueError: they cannot be measured here.
    """
    rates = known_rates.known(arguments.gpu, arguments.gpus)
    if arguments.measure:
        import jax

        rates = known_rates.measured(jax.devices(), rates)
    given = {
        "push": arguments.link,
        "pull": arguments.link,
        "memory": arguments.memory,
        "network": arguments.network,
    }
    given = {name: Rate(rate * 1e9, "given") for name, rate in given.items() if rate is not None}
    return dataclasses.replace(rates, **given)


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        counts, rates = counts_of(arguments), rates_of(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    plan = make(
        counts,
        rates,
        hidden=arguments.hidden,
        element_bytes=arguments.dtype.itemsize,
        capacity=capacity_of(counts, arguments.capacity_factor),
        zero_tail=not arguments.no_zero_tail,
        even=arguments.rails == "even",
    )
    about = f"{arguments.routing} routing"
    if arguments.hosts > 1:
        about += f", {arguments.rails} rails"
    print(report.words(plan, rates, about))
    if arguments.per_rank:
        print("\n" + report.words_per_rank(plan))
    if arguments.json:
        numbers = report.numbers(plan, rates, arguments.routing)
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    if arguments.png:
        report.plot(plan, arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
