"""What a layer hides of its exchanges: the figures' meaning, on CPU and from made-up profiles."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest

from freeio_jax.bench import command_line as command
from freeio_jax.bench import memory, overlap, report
from freeio_jax.bench.profile import Event

pytestmark = pytest.mark.usefixtures("few_calls")

TINY = overlap.Model(hidden=8, top_k=2, num_experts=4, expert_width=6)
EXCHANGE, COMPUTE = "combine_large_kernel<1>", "gemm"


def test_models_are_those_of_the_command():
    assert set(command.MODELS) == set(overlap.MODELS)
    assert command.PASSES == overlap.PASSES


def test_on_cpu_nothing_is_hidden(capsys, tmp_path):
    found, png = report.Report({}), tmp_path / "timeline.png"
    overlap.run(
        found,
        {"tiny": TINY},
        num_ranks=2,
        dtype="float32",
        tokens=(6,),
        num_chunks=(1, 2),
        num_sms=(8, 16),
        png=png,
    )
    assert found.failed == 0
    keys = ("shared", "pass", "num_chunks", "num_sms")
    assert [tuple(r[key] for key in keys) for r in found.data["overlap"]] == [
        (shared, which, chunks, sms)
        for shared in (False, True)
        for which in ("forward", "gradients")
        for chunks in (1, 2)
        for sms in (8, 16)
    ]
    for record in found.data["overlap"]:
        hidden = record["in_turn_s"] - record["beside_s"]
        assert record["hidden_share"] == hidden / record["exchange_s"]
        assert record["compute_s"] > 0
        assert record["in_turn_bytes"] > 0 and record["beside_bytes"] > 0
        assert math.isnan(record["covered_share"])
    assert not png.exists()
    assert "On CPU a start runs the exchange to its end" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_in_two_processes(tmp_path):
    path = tmp_path / "figures.json"
    launcher = ["-m", "freeio_jax.launch", "-n", "2", "--devices-per-process", "1"]
    sizes = ["--hidden", "8", "--top-k", "2", "--num-experts", "4", "--expert-width", "6"]
    which = ["--tokens", "6", "--num-chunks", "2", "--overlap-sms", "8", "--passes", "forward"]
    bench = ["-m", "freeio_jax.bench", "--overlap", "--dtype", "float32", "--json", str(path)]
    subprocess.run([sys.executable, *launcher, *bench, *sizes, *which], check=True, timeout=550)
    records = json.loads(path.read_text())["overlap"]
    assert [(r["model"], r["num_ranks"], r["shared"]) for r in records] == [
        ("custom", 2, False),
        ("custom", 2, True),
    ]


def events(*spans, device="/device:GPU:0"):
    return [Event(device, name, start, duration, stream) for name, start, duration, stream in spans]


def test_covered_share_is_of_the_exchanges_time():
    one = events((EXCHANGE, 0.0, 4.0, "a"), (COMPUTE, 1.0, 2.0, "b"), (COMPUTE, 3.5, 2.0, "b"))
    assert overlap.covered_share(one) == pytest.approx(2.5 / 4)
    # NCCL and copies hide nothing; another GPU's compute does not, either.
    other = events(("ncclKernel", 0.0, 4.0, "b"), ("Memcpy D2D", 0.0, 4.0, "c"))
    other += events((COMPUTE, 0.0, 4.0, "b"), device="/device:GPU:1")
    assert overlap.covered_share(events((EXCHANGE, 0.0, 4.0, "a")) + other) == 0.0
    assert math.isnan(overlap.covered_share(other))


def test_timeline(tmp_path):
    path = tmp_path / "timeline.png"
    shown = events((EXCHANGE, 0.0, 4.0, "a"), (COMPUTE, 1.0, 2.0, "b"))
    report.plot_timeline({"beside": shown, "empty": []}, path, overlap.kind_of)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="XLA for GPUs is not installed: pip install jax-cuda13-plugin jax-cuda13-pjrt, of "
    "jax's version. It needs no GPU",
)
@pytest.mark.timeout(600)
def test_chunks_need_less_memory():
    sizes = {"hidden": 256, "num_experts": 4, "top_k": 2, "expert_width": 256}
    options = {"num_tokens": 8192, "num_chunks": [1, 4], "capacity_factor": 1.25}
    found = memory.run(sizes | options | {"product": "hopper"})
    for which in ("forward", "with gradients"):
        whole, chunks = (r["temporary_bytes"] for r in found if r["pass"] == which)
        assert chunks < whole
