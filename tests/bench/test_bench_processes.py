"""The benchmark in several processes: all parts run, and one process tells of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from freeio_jax.bench import processes

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "freeio_jax.launch", "-n", "2"]
SIZES = ["--tokens", "3", "--hidden", "16", "--top-k", "2", "--num-experts", "4"]


def launch(*program, timeout=480):
    done = subprocess.run(
        [*LAUNCH, *program], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Gloo speaks for itself.
    return [line for line in done.stdout.splitlines() if "Gloo" not in line]


@pytest.mark.timeout(500)
def test_parts_print_once(tmp_path):
    path, png = tmp_path / "parts.json", tmp_path / "parts.png"
    parts = ["--tax", "--shapes", "--floors", "--scaling", "--experts", "--once", "dispatch", "3"]
    layer = ["--layer", "--expert-width", "16", "--dtype", "float32"]
    few = ["--ops", "combine", "--exchanges", "freeio", "dense"]
    files = ["--json", str(path), "--png", str(png)]
    lines = launch(str(HERE / "few_calls.py"), *parts, *layer, *few, *SIZES, *files)
    assert all(line.startswith("[0]") for line in lines), lines
    titles = [line.removeprefix("[0] ## ") for line in lines if "## " in line]
    assert titles == [
        *("Collective tax, R=2", "Exchanges", "Floors", "Scaling, R=2", "MoE layer"),
        "The experts' product",
    ]
    data = json.loads(path.read_text())
    assert (data["about"]["ranks"], data["about"]["processes"]) == (2, 2)
    for part, ops in (("tax", ("dispatch", "combine")), ("shapes", ("combine",))):
        found = [(record["exchange"], record["op"]) for record in data[part]]
        assert found == [(e, op) for e in ("freeio", "dense") for op in ops]
        assert all(record["wall_s"] > 0 for record in data[part])
    assert [record["pass"] for record in data["layer"]] == 2 * ["forward", "forward + backward"]
    assert (tmp_path / "parts-latency.png").exists()


@pytest.mark.timeout(200)
def test_the_comparison_on_cpu_prints_once():
    lines = launch("-m", "freeio_jax.bench", *SIZES, "--repeats", "1")
    assert all(line.startswith("[0]") for line in lines), lines
    assert sum("both + gradients" in line for line in lines) == 1


@pytest.mark.timeout(500)
def test_checks_of_any_size_and_what_processes_tell_each_other():
    lines = launch(str(HERE / "process_program.py"))
    assert all(line.startswith("[0]") for line in lines), lines
    assert "[0] shared [0, 1]" in lines
    for title in ("Checks", "Soak", "Mixes of exchanges in flight", "The last rank's kernel"):
        assert sum(f"## {title}" in line for line in lines) == 1


def test_alone_a_process_has_nobody_to_tell():
    assert processes.is_first()
    assert processes.share({"a": 1}) == [{"a": 1}]
