"""What each rank moves: over NVLink, over the network, and in its own memory.

Within a host a row goes from the token's rank to each rank that has an expert of it, once. To
another host it goes once, from rail to rail (:mod:`freeio_jax.rails`), and then over NVLink to
the ranks that want it. combine goes the same ways backwards, with sums of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from freeio_jax.plan.routing import Pod
from freeio_jax.rails import Rails


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a routing asks for, in tokens and assignments.

    Attributes:
      pod: the ranks.
      pairs: int ``[R, R]``, tokens of rank s that have an expert on rank d.
      crossing: int ``[R, H]``, tokens of rank s that have an expert on host d.
      loads: int ``[R]``, assignments to each rank.
    """

    pod: Pod
    pairs: np.ndarray
    crossing: np.ndarray
    loads: np.ndarray

    @classmethod
    def of(cls, pod: Pod, ids_of_ranks: Iterable[np.ndarray]) -> Counts:
        """Counts the ids ``[T, K]`` of each rank; ids that name no expert count for nothing."""
        per_rank = pod.num_experts // pod.num_ranks
        pairs, crossing = [], []
        loads = np.zeros(pod.num_ranks, np.int64)
        for ids in ids_of_ranks:
            valid = (ids >= 0) & (ids < pod.num_experts)
            token = np.nonzero(valid)[0]
            # Recorded ids may be of a dtype that does not hold `per_rank`.
            rank = ids[valid].astype(np.int64) // per_rank
            wants = np.zeros((len(ids), pod.num_ranks), bool)
            wants[token, rank] = True
            pairs.append(wants.sum(0))
            crossing.append(wants.reshape(len(ids), pod.num_hosts, -1).any(-1).sum(0))
            loads += np.bincount(rank, minlength=pod.num_ranks)
        return cls(pod, np.stack(pairs), np.stack(crossing), loads)

    @property
    def rows(self) -> np.ndarray:
        """What crosses, as :func:`freeio_jax.rails.even_rails` takes it: ``[H, G, H]``."""
        return self.crossing.reshape(self.pod.num_hosts, self.pod.num_gpus, self.pod.num_hosts)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one operation, by rank: ``[R]`` each.

    Attributes:
      link_out, link_in: over NVLink.
      network_out, network_in: over the network.
      loaded, stored: in memory, by this rank.
    """

    link_out: np.ndarray
    link_in: np.ndarray
    network_out: np.ndarray
    network_in: np.ndarray
    loaded: np.ndarray
    stored: np.ndarray

    @property
    def link(self) -> np.ndarray:
        """Over NVLink in the direction that has more."""
        return np.maximum(self.link_out, self.link_in)

    @property
    def network(self) -> np.ndarray:
        """Over the network in the direction that has more."""
        return np.maximum(self.network_out, self.network_in)

    @property
    def memory(self) -> np.ndarray:
        """In memory, loaded and stored."""
        return self.loaded + self.stored


OPERATIONS = ("dispatch", "combine", "combine_transpose", "dispatch_along")


def traffic(
    counts: Counts, rails: Rails, *, capacity: int, row_bytes: int, zero_tail: bool = True
) -> dict[str, Traffic]:
    """What each rank must move in each of :data:`OPERATIONS`.

    Args:
      counts: of the routing.
      rails: which GPUs carry rows between hosts.
      capacity: packed rows of a rank.
      row_bytes: of one row.
      zero_tail: whether the packed rows past the last group are stored, too.
    """
    pod = counts.pod
    link_out, link_in = _over_nvlink(counts, rails)
    sent = rails.sent(counts.rows).ravel()
    received = rails.received(counts.rows).ravel()
    remote = counts.pairs * (1 - np.eye(pod.num_ranks, dtype=int))
    landed = remote.sum(0)
    kept = np.minimum(counts.loads, capacity)
    written = np.full_like(kept, capacity) if zero_tail else kept
    # The partial sums that come back for a rank's own tokens: of ranks here, and of other hosts.
    host = np.arange(pod.num_ranks) // pod.num_gpus
    here = host[:, None] == host
    elsewhere = host[:, None] != np.arange(pod.num_hosts)
    returned = (remote * here).sum(1) + (counts.crossing * elsewhere).sum(1)
    # On a rail: what lands in its window, and what its own host stores to it to be added up.
    to_rails = _at_rails(counts, rails)
    # What lands in a window, or lies with its sender first, is stored once and loaded once.
    staged = received + _forwarded(counts, rails)[1]
    loaded_and_stored = {
        "dispatch": (pod.num_tokens + landed + staged, written + staged),
        "combine": (kept + returned + to_rails + staged, landed + pod.num_tokens + staged),
    }
    loaded, stored = loaded_and_stored["dispatch"]
    loaded_and_stored["combine_transpose"] = loaded + kept, stored
    loaded_and_stored["dispatch_along"] = loaded, stored
    moved = {}
    for op in OPERATIONS:
        loaded, stored = loaded_and_stored[op]
        ways = link_out, link_in, sent, received
        if op == "combine":
            ways = link_in, link_out, received, sent
        moved[op] = Traffic(*(rows * row_bytes for rows in (*ways, loaded, stored)))
    return moved


def _wanted(counts, rails):
    """For each flow to another host: its rail's rank there, and the tokens of each rank there."""
    pod = counts.pod
    wanted = counts.pairs.reshape(pod.num_ranks, pod.num_hosts, pod.num_gpus)
    rail = rails.receiver.reshape(pod.num_ranks, pod.num_hosts)
    rail = rail + pod.num_gpus * np.arange(pod.num_hosts)
    host = np.arange(pod.num_ranks)[:, None] // pod.num_gpus
    crosses = host != np.arange(pod.num_hosts)
    return rail[crosses], wanted[crosses]


def _over_nvlink(counts, rails):
    """Rows that leave and reach each rank over NVLink in dispatch."""
    pod = counts.pod
    rank = np.arange(pod.num_ranks)
    wanted = counts.pairs.reshape(pod.num_ranks, pod.num_hosts, pod.num_gpus)
    # [R, G]: from each rank to the ranks of its host, first of its own tokens.
    rows = wanted[rank, rank // pod.num_gpus]
    np.add.at(rows, *_wanted(counts, rails))
    rows[rank, rank % pod.num_gpus] = 0
    from_sources, to_senders = _forwarded(counts, rails)
    out = rows.sum(1) + from_sources
    into = rows.reshape(pod.num_hosts, pod.num_gpus, pod.num_gpus).sum(1).ravel() + to_senders
    return out, into


def _at_rails(counts, rails):
    """For each rank, the partial sums that it adds up as a rail, its own ones too."""
    rail, wanted = _wanted(counts, rails)
    sums = np.bincount(rail, wanted.sum(-1), counts.pod.num_ranks)
    return sums.astype(np.int64)


def _forwarded(counts, rails):
    """Rows of each rank that another rank of its host sends, and rows that it sends for others."""
    pod = counts.pod
    own = np.arange(pod.num_gpus)[:, None]
    same_host = np.eye(pod.num_hosts, dtype=bool)[:, None, :]
    rows = np.where(same_host | (rails.sender == own), 0, counts.rows)
    sender = rails.sender + pod.num_gpus * np.arange(pod.num_hosts)[:, None, None]
    taken = np.bincount(sender.ravel(), rows.ravel(), pod.num_ranks)
    return rows.sum(-1).ravel(), taken.astype(np.int64)
