"""Parts of a kernel's time, from its CTAs' timelines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from freeio_jax import _native
from freeio_jax.bench import stamps

PHASES = ["opening", "routing", "agreeing", "moving", "finishing"]


def test_parts_add_up_to_the_span():
    timelines = [
        # The first CTA waits for the peers at the end, from 900 on.
        (100, 1000, [10, 90, 200, 500, 100]),
        # The second one begins later, and ends its own work last, at 940.
        (120, 940, [20, 100, 100, 600, 0]),
    ]
    parts = stamps.parts(PHASES, timelines)
    assert stamps.span(timelines) == pytest.approx(900e-9)
    assert parts == pytest.approx(
        {
            "agreement_s": (150 + 60) * 1e-9,  # from 940 to 1000 all wait for the peers
            "routing_s": 95e-9,
            "transfer_s": 550e-9,
            "rest_s": (900 - 210 - 95 - 550) * 1e-9,
        }
    )


def test_the_step_of_the_clock():
    timelines = [(1000, 3048, [0] * 5), (1032, 3080, [0] * 5), (1000, 3048, [0] * 5)]
    assert stamps.step(timelines) == pytest.approx(32e-9)
    assert stamps.step([(5, 5, [0] * 5)]) == 0


def test_a_shipped_build_has_none():
    assert not stamps.are_there(SimpleNamespace())
    assert not stamps.are_there(SimpleNamespace(cuda=SimpleNamespace()))
    assert stamps.are_there(SimpleNamespace(cuda=SimpleNamespace(take_timelines=None)))


@pytest.mark.timeout(170)
def test_the_benchmark_runs_with_another_native_module(tmp_path):
    """The module that stamped.py is told to load is the one that the package uses."""
    other = tmp_path / Path(_native.__file__).name
    shutil.copyfile(_native.__file__, other)
    script = Path(stamps.__file__).with_name("stamped.py")
    path = tmp_path / "tax.json"
    sizes = [
        "--tokens",
        "3",
        "--hidden",
        "16",
        "--top-k",
        "2",
        "--num-experts",
        "4",
        "--ranks",
        "2",
    ]
    command = [sys.executable, "-X", "importtime", str(script), str(other), "--tax", *sizes]
    done = subprocess.run(
        [*command, "--exchanges", "freeio", "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [r["op"] for r in json.loads(path.read_text())["tax"]] == ["dispatch", "combine"]
    # The package did not import its own.
    assert "freeio_jax._native" not in done.stderr


def test_a_module_that_is_not_there():
    script = Path(stamps.__file__).with_name("stamped.py")
    done = subprocess.run(
        [sys.executable, str(script), "nowhere.so"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Build one with -DFREEIO_STAMPS=ON" in done.stderr
