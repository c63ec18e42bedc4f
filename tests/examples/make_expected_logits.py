"""Writes tests/examples/expected_logits: what transformers computes with the tiny whole models.

    python tests/examples/make_expected_logits.py

It needs torch and transformers. Each file has float32 ``[3, 2, 257]``: logits at two places of each
prompt.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "expected_logits"

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parents[2])]
    import whole_models
    from models import tiny

    FOLDER.mkdir(exist_ok=True)
    for family in tiny.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            logits = whole_models.by_transformers(whole_models.write(Path(folder), family))
        np.save(FOLDER / f"{family}.npy", whole_models.at_places(logits))
