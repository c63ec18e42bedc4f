"""Which GPUs carry the rows that cross from host to host, so that no network link has too many.

A row crosses once to each host that needs it. Two GPUs are in charge of the crossing: the *sender*
on the token's host, from whose memory the network takes the row, and the *receiver* on the other
host, in whose memory it lands. Both are called rails. By default the token's own GPU sends, and the
GPU with the same local rank receives. Where some ranks have more to send than others, some links
carry more than the rest, and all ranks wait for them. :func:`even_rails` shares the rows evenly.

All ranks must choose alike, without asking each other. So the choice follows from counts that all
ranks have, in integers. Each rank counts its own tokens for each host, and sends these numbers with
its counts of experts.

FUSCO's balancer (arXiv:2512.22036) evens out the senders: it pairs ranks of one host with ranks of
another. Here each rank's rows for each host get rails of their own, on both hosts.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rails:
    """The rails of each flow, which is what one rank sends to one host.

    With H hosts of G GPUs, the rank ``l`` of host ``h`` sends its rows for host ``d`` from the GPU
    ``sender[h, l, d]`` of its host to the GPU ``receiver[h, l, d]`` of host ``d``.

    Attributes:
      sender: int ``[H, G, H]``, local ranks.
      receiver: int ``[H, G, H]``, local ranks.
    """

    sender: np.ndarray
    receiver: np.ndarray

    @classmethod
    def same(cls, num_hosts: int, num_gpus: int) -> Rails:
        """The default: the token's GPU sends, and the one with its local rank receives."""
        own = np.broadcast_to(np.arange(num_gpus)[:, None], (num_hosts, num_gpus, num_hosts))
        return cls(own, own)

    def sent(self, rows: np.ndarray) -> np.ndarray:
        """Rows that each link carries out of its host, ``[H, G]``, for ``rows [H, G, H]``."""
        host = np.arange(len(rows))[:, None, None]
        return _sums(rows, host, self.sender)

    def received(self, rows: np.ndarray) -> np.ndarray:
        """Rows that each link carries into its host, ``[H, G]``, for ``rows [H, G, H]``."""
        host = np.arange(len(rows))[None, None, :]
        return _sums(rows, host, self.receiver)

    def forwarded(self, rows: np.ndarray) -> int:
        """Rows that first cross NVLink to their sender, because it is not the token's GPU."""
        own = np.arange(rows.shape[1])[None, :, None]
        return int(_crossing(rows)[self.sender != own].sum())

    def busiest(self, rows: np.ndarray) -> int:
        """Rows of the link that carries most, in one direction."""
        return int(max(self.sent(rows).max(), self.received(rows).max()))


def _crossing(rows):
    """The rows without those that stay on their host."""
    same_host = np.eye(len(rows), dtype=bool)[:, None, :]
    return np.where(same_host, 0, rows)


def _sums(rows, host, rail):
    num_hosts, num_gpus, _ = rows.shape
    link = np.broadcast_to(host * num_gpus + rail, rows.shape)
    # bincount's weights are floats, which are exact up to 2^53.
    sums = np.bincount(link.ravel(), _crossing(rows).ravel(), num_hosts * num_gpus)
    return sums.astype(np.int64).reshape(num_hosts, num_gpus)


def lower_bound(rows: np.ndarray) -> int:
    """Rows that the busiest link carries at least, whatever the rails: an even share of its host's.

    Args:
      rows: int ``[H, G, H]``, as :func:`even_rails` takes them.
    """
    rows = _crossing(rows)
    num_gpus = rows.shape[1]
    busiest_host = max(rows.sum((1, 2)).max(), rows.sum((0, 1)).max())
    return int(-(-busiest_host // num_gpus))


def even_rails(rows: np.ndarray, *, least_gain: float = 0.02) -> Rails:
    """Rails that spread the rows over the links; the default ones where that gains too little.

    The receivers are chosen first, because this costs nothing: the ranks of the other host pull the
    rows from one GPU instead of another. Other senders cost another crossing of NVLink, so they are
    chosen only if the busiest link is one that sends, and gains by it.

    Flows are not split, so that whoever knows the counts knows where each row lands.

    >>> import numpy as np
    >>> rows = np.zeros((3, 2, 3), int)  # three hosts of two GPUs
    >>> rows[1:, :, 0] = [[40, 10], [40, 10]]  # the first GPUs have more tokens than the second
    >>> Rails.same(3, 2).busiest(rows), even_rails(rows).busiest(rows), lower_bound(rows)
    (80, 50, 50)

    Args:
      rows: int ``[H, G, H]``: how many tokens of local rank ``l`` of host ``h`` have an expert on
        host ``d``. Entries of a host for itself do not count.
      least_gain: by how large a part the rows of the busiest link must fall.

    Raises:
      ValueError: ``rows`` has another shape.
    """
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 3 or rows.shape[0] != rows.shape[2]:
        raise ValueError(
            f"even_rails: rows must be [hosts, GPUs of a host, hosts], got shape {rows.shape}."
        )
    rows = _crossing(rows)
    num_hosts, num_gpus, _ = rows.shape
    same = Rails.same(num_hosts, num_gpus)
    # What comes to a host depends on its own receivers alone, and what leaves it on its senders.
    flows = rows.reshape(-1, num_hosts)
    own = np.tile(np.arange(num_gpus), num_hosts)
    receiver = [_level(flows[:, host], own, num_gpus) for host in range(num_hosts)]
    receiver = np.stack(receiver, axis=-1).reshape(rows.shape)
    even = Rails(same.sender, receiver)
    enough = int(even.received(rows).max())
    own = np.repeat(np.arange(num_gpus), num_hosts)
    sender = [_level(rows[host].ravel(), own, num_gpus, enough) for host in range(num_hosts)]
    best = same
    for rails in (even, Rails(np.stack(sender).reshape(rows.shape), receiver)):
        before, after = best.busiest(rows), rails.busiest(rows)
        if after < before and after <= (1 - least_gain) * before:
            best = rails
    return best


def _level(flows: np.ndarray, own: np.ndarray, num_rails: int, enough: int = 0) -> np.ndarray:
    """A rail for each flow: its own, unless a change relieves the busiest rail.

    Each step moves a flow from the busiest rail to another one, or exchanges it for a smaller flow
    of another one, whichever leaves the busier of the two with least. That is less than the busiest
    rail had, so the steps end. They also end when no rail has more than ``enough``. They take the
    first of equals: the same choice on every rank.
    """
    # A flow of nothing on each rail, so that a move is an exchange, too.
    sizes = np.concatenate([flows, np.zeros(num_rails, np.int64)])
    rails = np.concatenate([own, np.arange(num_rails)])
    carried = np.bincount(own, flows, num_rails).astype(np.int64)
    while carried.max() > enough:
        busiest = np.argmax(carried)
        (here,), (there,) = np.nonzero(rails == busiest), np.nonzero(rails != busiest)
        less = sizes[here][:, None] - sizes[there]
        after = np.maximum(carried[busiest] - less, carried[rails[there]] + less)
        best = np.unravel_index(np.argmin(after), after.shape) if after.size else None
        if best is None or after[best] >= carried[busiest]:
            break
        mine, other = here[best[0]], there[best[1]]
        carried[busiest] -= less[best]
        carried[rails[other]] += less[best]
        rails[mine] = rails[other]
        if other < len(flows):
            rails[other] = busiest
    return rails[: len(flows)]
