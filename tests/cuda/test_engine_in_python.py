"""The CUDA engine's Python side, where there need be no GPU."""

from __future__ import annotations

import pytest

from freeio_jax import engines


@pytest.mark.skipif(not hasattr(engines._native, "cuda"), reason="built without the CUDA engine")
def test_failures_are_looked_for_before_every_run():
    """XLA replays captured launches without a call of `execute`, but not without `initialize`."""
    targets = engines._native.cuda.ffi_targets()
    assert len(targets) == 4
    for stages in targets.values():
        assert set(stages) == {"instantiate", "initialize", "execute"}
