"""How the output of a pod's processes is shown."""

from __future__ import annotations

import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

#: What ends a line. A progress bar ends in a carriage return, so that the next one overwrites it.
_ENDS = re.compile(rb"\r\n|\n|\r")

#: A line that has not ended after this time is shown as it is: the prompt of a debugger, or a
#: progress bar that begins with its carriage return. The words of one print() arrive faster.
_PATIENCE_SECONDS = 0.5


def pieces(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """(text, end) of each line that a pipe brings, until it is closed.

    ``end`` is a newline, a carriage return, or empty where the line goes on in the next piece.
    """
    descriptor = stream.fileno()
    pending = b""
    while True:
        # A carriage return at the very end may be the first half of "\r\n".
        patience = _PATIENCE_SECONDS if pending else None
        if select.select([descriptor], [], [], patience)[0]:
            chunk = os.read(descriptor, 1 << 16)
            pending += chunk
            at_end = not chunk
        else:
            chunk, at_end = b"", False
        if not chunk and pending:
            text = pending.removesuffix(b"\r")
            yield text.decode(errors="replace"), "\r" if text != pending else ""
            pending = b""
        if at_end:
            return
        while (end := _ENDS.search(pending)) is not None:
            if end.group() == b"\r" and end.end() == len(pending):
                break
            text, pending = pending[: end.start()], pending[end.end() :]
            yield text.decode(errors="replace"), "\r" if end.group() == b"\r" else "\n"


class Lines:
    """Puts lines together from their pieces, and passes on whole lines."""

    def __init__(self, output: Callable[[int, str, str], None]):
        self._output = output
        self._begun: dict[tuple[int, str], str] = {}

    def show(self, rank: int, name: str, text: str, end: str) -> None:
        text = self._begun.pop((rank, name), "") + text
        if end:
            self._output(rank, name, text)
        else:
            self._begun[rank, name] = text

    def close(self, rank: int, name: str) -> None:
        if (rank, name) in self._begun:
            self._output(rank, name, self._begun.pop((rank, name)))


class Terminal:
    """Writes to this process's streams, with ``[rank]`` in front of each line."""

    def __init__(self, num_processes: int):
        self._width = len(str(num_processes - 1))
        self._begun: tuple[int, str] | None = None  # (rank, stream) of the line that has not ended

    def show(self, rank: int, name: str, text: str, end: str) -> None:
        prefix = f"[{rank:{self._width}d}] "
        if self._begun == (rank, name):
            prefix = ""
        else:
            self.end_line()
        self._write(name, f"{prefix}{text}{end}")
        self._begun = None if end else (rank, name)

    def close(self, rank: int, name: str) -> None:
        if self._begun == (rank, name):
            self.end_line()

    def end_line(self) -> None:
        if self._begun is not None:
            self._write(self._begun[1], "\n")
            self._begun = None

    @staticmethod
    def _write(name: str, text: str) -> None:
        stream = getattr(sys, name)
        stream.write(text)
        stream.flush()


class Printer:
    """Shows the output of all processes, one writer at a time."""

    def __init__(self, num_processes: int, output: Callable[[int, str, str], None] | None):
        self._target = Terminal(num_processes) if output is None else Lines(output)
        self._lock = threading.Lock()

    def copy(self, rank: int, name: str, stream: BinaryIO) -> None:
        """Shows what a process writes to a pipe, until the pipe is closed."""
        with stream:
            for text, end in pieces(stream):
                with self._lock:
                    self._target.show(rank, name, text, end)
        with self._lock:
            self._target.close(rank, name)

    def say(self, line: str) -> None:
        """Prints a line of the launcher itself."""
        with self._lock:
            if isinstance(self._target, Terminal):
                self._target.end_line()
            print(f"[launch] {line}", file=sys.stderr, flush=True)
