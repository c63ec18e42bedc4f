"""Text to tokens and back, by the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's ``tokenizer.json``."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json. Older checkpoints have other tokenizer files: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes "
            "this one."
        )
    return Tokenizer.from_file(str(file))


def pad(sequences: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of unequal lengths as one batch: tokens int32 ``[B, L]``, and bool, true for them.

    ``side`` is where the padding comes: "left" or "right".

    >>> tokens, mask = pad([[5, 6, 7], [8]], "left")
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    length = max(map(len, sequences))
    tokens = np.zeros((len(sequences), length), np.int32)
    mask = np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, place], mask[row, place] = sequence, True
    return tokens, mask
