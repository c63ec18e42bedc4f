"""Text as bytes: where it comes from, its held-out part, and windows of it to learn."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class UserError(Exception):
    """Something that the user can mend: printed without a traceback."""


def read_text(path: str | None) -> bytes:
    """The bytes of a file, of all files under a folder, or of the standard library's sources."""
    if path is None:
        library = Path(os.__file__).parent
        skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        files = sorted(
            file
            for file in library.rglob("*.py")
            if not skipped & set(file.relative_to(library).parts)
        )
        if not files:
            raise UserError(f"no Python sources under {library}: name a text with --text PATH.")
    elif Path(path).is_dir():
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    else:
        files = [Path(path)]
    try:
        return b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror}: {error.filename}") from error


def split_text(text: bytes, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out bytes: every tenth block of the text is held out."""
    least = 20 * (context + 1)
    if len(text) < least:
        raise UserError(
            f"the text has {len(text)} bytes; a context of {context} needs at least {least}. "
            "Use a longer --text or a smaller --context."
        )
    block = min(1 << 16, len(text) // 20)
    data = np.frombuffer(text, np.uint8)
    held_out = np.arange(len(data)) // block % 10 == 9
    return data[~held_out], data[held_out]


def draw_windows(data: np.ndarray, batch: int, context: int, seed: list[int]) -> np.ndarray:
    """int32 ``[batch, context + 1]`` from random places, the same ones for the same seed."""
    starts = np.random.default_rng(seed).integers(0, len(data) - context, batch)
    return data[starts[:, None] + np.arange(context + 1)].astype(np.int32)
