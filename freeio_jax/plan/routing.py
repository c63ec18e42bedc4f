"""Routings to plan with: made ones, and recorded ids of a file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from freeio_jax.layout import round_up


@dataclasses.dataclass(frozen=True)
class Pod:
    """The ranks of an expert group, and what each of them routes.

    Attributes:
      num_hosts: NVLink domains; rank r is on host r // num_gpus.
      num_gpus: ranks of each.
      num_tokens: T, of one rank.
      top_k: K.
      num_experts: E, of all ranks.
    """

    num_hosts: int
    num_gpus: int
    num_tokens: int
    top_k: int
    num_experts: int

    @property
    def num_ranks(self) -> int:
        return self.num_hosts * self.num_gpus

    @property
    def experts_per_host(self) -> int:
        return self.num_experts // self.num_hosts


#: ``[T, K]`` distinct ids of one rank; -1: none.
Ids = np.ndarray


def _best(scores: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]


def _drawn(pod: Pod, rng: np.random.Generator, log_weight: np.ndarray | float) -> np.ndarray:
    """Scores whose largest ones are a draw without replacement by these weights (Gumbel)."""
    uniform = rng.random((pod.num_tokens, pod.num_experts), np.float32)
    return log_weight - np.log(-np.log(np.maximum(uniform, np.float32(1e-30))))


def uniform(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """Each expert alike."""
    return _best(_drawn(pod, own, 0.0), pod.top_k)


def zipf(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """The n-th most popular expert with weight 1/n; which one that is, is random."""
    log_weight = -np.log1p(layer.permutation(pod.num_experts)).astype(np.float32)
    return _best(_drawn(pod, own, log_weight), pod.top_k)


def skewed(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """As recorded routers look: each layer prefers some experts, and each rank's texts others.

    Both preferences are normal, of standard deviation 0.6 in the logarithm of the weights. The
    busiest of 256 experts then has about five times the mean load.
    """
    log_weight = layer.normal(0, 0.6, pod.num_experts) + own.normal(0, 0.6, pod.num_experts)
    return _best(_drawn(pod, own, log_weight.astype(np.float32)), pod.top_k)


def group_limited(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """DeepSeek-V3's: the experts form 8 groups, of which a token uses the 4 with the best two.

    arXiv:2412.19437, section 2.1.2. With eight hosts each group is a host's.
    """
    scores = _drawn(pod, own, 0.0)
    grouped = scores.reshape(pod.num_tokens, 8, -1)
    two_best = -np.partition(-grouped, 1, axis=-1)[..., :2].sum(-1)
    left_out = np.argpartition(two_best, 4, axis=1)[:, :4]
    np.put_along_axis(grouped, left_out[..., None], -np.inf, axis=1)
    return _best(scores, pod.top_k)


def one_host(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """All tokens to experts of the first host."""
    scores = _drawn(pod, own, 0.0)
    scores[:, pod.experts_per_host :] = -np.inf
    return _best(scores, pod.top_k)


def uneven(pod: Pod, rank: int, layer: np.random.Generator, own: np.random.Generator) -> Ids:
    """Uniform, but the ranks of a host have 1/G, 2/G, ... G/G of T tokens; the rest is padding."""
    ids = uniform(pod, rank, layer, own)
    ids[pod.num_tokens * (rank % pod.num_gpus + 1) // pod.num_gpus :] = -1
    return ids


ROUTINGS: dict[str, Callable[..., Ids]] = {
    "uniform": uniform,
    "zipf": zipf,
    "skewed": skewed,
    "group-limited": group_limited,
    "one-host": one_host,
    "uneven": uneven,
}


def made(name: str, pod: Pod, seed: int) -> Iterator[Ids]:
    """The ids of each rank, by one of :data:`ROUTINGS`.

    Raises:
      ValueError: the routing does not suit the experts.
    """
    if name == "group-limited" and (
        pod.num_experts % 8 or pod.num_experts < max(16, 2 * pod.top_k)
    ):
        raise ValueError(
            "group-limited routing has 8 groups of two or more experts, of which 4 must have "
            f"{pod.top_k}: {pod.num_experts} experts do not suit it. Use a multiple of 8 from "
            f"{round_up(max(16, 2 * pod.top_k), 8)} on."
        )
    if name == "one-host" and pod.experts_per_host < pod.top_k:
        raise ValueError(
            f"one-host: a host has {pod.experts_per_host} experts, fewer than top_k={pod.top_k}."
        )
    for rank in range(pod.num_ranks):
        layer = np.random.default_rng([seed, 0])  # the same for all ranks
        own = np.random.default_rng([seed, 1, rank])
        yield ROUTINGS[name](pod, rank, layer, own)


def recorded(path: pathlib.Path, num_ranks: int) -> np.ndarray:
    """Ids ``[R, T, K]`` of a .npy file that has them so, or as ``[R * T, K]`` in order of rank.

    Raises:
      ValueError: it is no such file, or its array has another shape or dtype.
    """
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: this is no .npy file of ids ({error}). Write one array by numpy.save."
        ) from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path}: ids must be integers, got {ids.dtype}.")
    if not ids.size:
        raise ValueError(f"{path}: ids of shape {ids.shape} are none. Record one token or more.")
    if ids.ndim == 2 and len(ids) % num_ranks == 0:
        return ids.reshape(num_ranks, -1, ids.shape[-1])
    if ids.ndim == 3 and len(ids) == num_ranks:
        return ids
    raise ValueError(
        f"{path}: ids of {num_ranks} ranks must be [{num_ranks}, T, K] or [{num_ranks} * T, K], "
        f"got shape {ids.shape}. Record them again, or change --hosts and --gpus."
    )
