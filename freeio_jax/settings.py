"""Settings: :func:`config`, and the environment variables ``FREEIO_*``."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from typing import Any

from freeio_jax import _native, log


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 < seconds <= 1e9:
        raise ValueError("it must be a positive number of seconds, at most 1e9, thirty years")
    return seconds


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One setting: ``config(name=...)`` or the environment variable ``FREEIO_<NAME>``."""

    default: Any
    parse: Callable[[Any], Any]
    apply: Callable[[Any], None]


def _sms(value: Any) -> int | None:
    sms = None if value is None else int(value)
    if sms is not None and sms < 1:
        raise ValueError("it must be a positive number of multiprocessors, or None")
    return sms


def _overlap_sms(value: Any) -> int:
    sms = int(value)
    if sms < 1:
        raise ValueError("it must be a positive number of multiprocessors")
    return sms


def _devices(value: Any) -> int | None:
    devices = None if value is None else int(value)
    if devices is not None and devices < 1:
        raise ValueError("it must be a positive number of devices, or None")
    return devices


def _transport(value: Any) -> str:
    if value not in ("auto", "nvshmem", "xla"):
        raise ValueError("it must be 'auto', 'nvshmem' or 'xla'")
    return value


_SETTINGS = {
    "timeout": _Setting(600.0, _seconds, _native.set_timeout),
    "num_sms": _Setting(None, _sms, lambda sms: _native.set_num_sms(sms or 0)),
    "overlap_num_sms": _Setting(24, _overlap_sms, _native.set_overlap_num_sms),
    "host_size": _Setting(None, _devices, lambda _: None),  # hosts.py asks for it
    "transport": _Setting("auto", _transport, lambda _: None),  # nvshmem.py asks for it
    "verbosity": _Setting(0, log.parse_verbosity, log.set_verbosity),
}
_values: dict[str, Any] = {}


def _parse(name: str, value: Any, origin: str) -> Any:
    try:
        return _SETTINGS[name].parse(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"freeio_jax: {origin}={value!r}: {error}.") from error


def _apply(parsed: dict[str, Any]) -> None:
    for name, value in parsed.items():
        _SETTINGS[name].apply(value)
        _values[name] = value


def _read_environment() -> None:
    known = {f"FREEIO_{name.upper()}": name for name in _SETTINGS}
    for variable in os.environ:
        if variable.startswith("FREEIO_") and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"freeio_jax: unknown environment variable {variable}.{hint} "
                f"Known: {', '.join(known)}."
            )
    _apply(
        {
            name: _parse(name, os.environ.get(variable, _SETTINGS[name].default), variable)
            for variable, name in known.items()
        }
    )


_read_environment()


def config(**settings: Any) -> dict[str, Any]:
    """Changes settings and returns all of them.

    Args:
      timeout: seconds that a rank waits for its peers in one exchange before it gets an error
        that names the missing ones. Default 600; environment variable ``FREEIO_TIMEOUT``. Holds
        for exchanges that begin after the call. A wait is logged as a warning after 30 seconds, and
        again each time that its length has doubled.
      num_sms: multiprocessors of a GPU that one exchange may use. Default None: all but
        four, which are left to other kernels; environment variable ``FREEIO_NUM_SMS``. Holds for
        programs and command buffers that begin after the call. It must be the same on all ranks:
        set it in all processes, while no program that exchanges rows runs.
      overlap_num_sms: multiprocessors of a GPU that one exchange may use beside compute, that is,
        between :func:`dispatch_start` or :func:`combine_start` and ``done``, where the start does
        not say how many. Default 24; environment variable ``FREEIO_OVERLAP_NUM_SMS``. It holds as
        ``num_sms`` does, and must be the same on all ranks, too.
      host_size: devices of a *virtual host*. Default None: hosts are what they are; environment
        variable ``FREEIO_HOST_SIZE``. Else each so many consecutive devices of ``jax.devices()``
        are taken for a host, and groups that span such hosts run as between hosts. Tests use it.
        In several processes set it before :func:`initialize`, alike in all of them, to a multiple
        of the devices of a process. In one process it holds for programs that are compiled after
        the call.
      transport: what carries rows between hosts on GPUs. ``"auto"``: NVSHMEM where all processes
        have it and one GPU each, else XLA's collectives. The log says once why these serve.
        ``"nvshmem"``: :func:`initialize` raises where NVSHMEM cannot be started. ``"xla"``: XLA's
        collectives. Default ``"auto"``; environment variable ``FREEIO_TRANSPORT``. Set it before
        :func:`initialize`, alike in all processes.
      verbosity: what goes to the logger ``freeio_jax``: 0 warnings and errors, 1 also what was
        chosen when something started (engine, processes, how long it took), 2 also each exchange
        that is compiled. The logger writes to stderr if the program has not set up Python's
        logging. Default 0; environment variable ``FREEIO_VERBOSITY``.

    Raises:
      TypeError: an unknown setting.
      ValueError: a value is out of range. No setting has changed then.

    >>> import freeio_jax as fio
    >>> fio.config(timeout=30)["timeout"]
    30.0
    >>> fio.config(timeout=600.0)
    {'timeout': 600.0, 'num_sms': None, 'overlap_num_sms': 24, 'host_size': None, \
'transport': 'auto', 'verbosity': 0}
    """
    unknown = set(settings) - set(_SETTINGS)
    if unknown:
        raise TypeError(
            f"freeio_jax.config: unknown setting(s) {sorted(unknown)}. Known: {sorted(_SETTINGS)}."
        )
    _apply({name: _parse(name, value, name) for name, value in settings.items()})
    return dict(_values)
