"""The command line: what it takes, what it refuses, and the comparison on CPU."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from freeio_jax.bench import __main__ as command
from freeio_jax.bench import baselines, command_line, cpu, floor, overlap, shapes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "must be at least 1"),
        (["--tokens", "many"], "invalid int value: 'many'"),
        (["--exchanges", "nvshmem"], "invalid choice: 'nvshmem'"),
        (["--ops", "scatter"], "invalid choice: 'scatter'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--once", "scatter", "4"], "the operations are dispatch, combine"),
        (["--once", "dispatch", "-4"], "T must be a positive number"),
        (["--once", "dispatch"], "expected 2 arguments"),
        (["--once", "dispatch", "4", "--suites", "half", "zipf"], "of one of the --suites"),
        (["--soak", "none"], "invalid int value"),
        (["--top-k", "9", "--num-experts", "8"], "--top-k 9 exceeds --num-experts 8"),
        (["--decode", "--layers", "1"], "of two layers or more"),
        (["--suites", "large", "--hidden", "8"], "have sizes of their own"),
        (["--models", "DeepSeek-V3", "--expert-width", "8"], "leave out .*--expert-width"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_a_record_of_gpus_has_sizes_of_its_own(monkeypatch, tmp_path, capsys):
    """Its tables would compare different shapes."""
    monkeypatch.setattr(command, "_num_gpus", lambda: 2)
    monkeypatch.setattr(command, "_try_newest", lambda *_: pytest.fail("it has started"))
    record = ["--readme", "--json", str(tmp_path / "record.json")]
    assert command.main([*record, "--tokens", "4", "--top-k", "2"]) == 2
    assert "leave out --tokens, --top-k" in capsys.readouterr().err


@pytest.mark.parametrize(("platforms", "number"), [("cpu", 0), ("cuda,cpu", 2), (None, 2)])
def test_gpus_count_where_jax_may_use_them(monkeypatch, platforms, number):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(
        command, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms))
    )
    assert command._num_gpus() == number


def test_the_width_of_experts_makes_another_layer():
    def models(*arguments):
        return command._models(command_line.parse_arguments(arguments))

    assert list(models()) == list(command_line.MODELS)
    (custom,) = models("--expert-width", "768").values()
    assert custom == overlap.Model(7168, 8, 256, 768)
    (custom,) = models("--hidden", "16").values()
    assert custom == overlap.Model(16, 8, 256, 2048)


def test_names_are_those_of_the_modules():
    assert set(command_line.NAMES) == set(baselines.NAMES)
    assert set(command_line.SUITES) == set(shapes.SUITES)
    assert set(command_line.OPS) == set(floor.KERNELS)


def test_parts():
    def parts(*arguments):
        return command_line.parse_arguments(arguments).parts

    assert parts() == []
    assert parts("--layer", "--check") == ["check", "layer"]
    assert parts("--all") == [
        "check",
        "tax",
        "shapes",
        "floors",
        "scaling",
        "sms",
        "late",
        "soak",
        "decode",
        "layer",
        "experts",
    ]
    assert parts("--soak", "7", "--once", "combine", "8") == ["soak", "once"]
    assert command_line.parse_arguments(["--all"]).soak == command_line.SOAK_CALLS


def test_suites():
    def suites(*arguments, **more):
        return command._suites(command_line.parse_arguments(arguments), **more)

    assert suites() == list(shapes.SUITES.values())
    (small,) = suites("--suites", "small", "--tokens", "3", "5")
    assert (small.hidden, small.tokens) == (2048, (3, 5))
    (custom,) = suites("--hidden", "16")
    assert (custom.hidden, custom.top_k, custom.num_experts) == (16, 8, 256)
    (large,) = suites(only="large", tokens=(7,))
    assert (large.name, large.tokens) == ("large", (7,))


def test_parts_run(tmp_path, capsys):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    sizes = ["--hidden", "8", "--top-k", "2", "--num-experts", "4", "--tokens", "4", "--ranks", "2"]
    what = ["--shapes", "--ops", "dispatch", "--exchanges", "freeio", "ragged"]
    arguments = [*sizes, *what, "--json", str(path), "--png", str(picture)]
    assert command.run_parts(command_line.parse_arguments(arguments)) == 0
    results = json.loads(path.read_text())
    assert results["about"]["ranks"] == 2
    assert set(results["about"]["limits"].values()) == {None}
    (record,) = results["shapes"]
    assert (record["name"], record["op"], record["exchange"]) == ("custom", "dispatch", "freeio")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists on GPUs alone" in capsys.readouterr().out


def test_the_comparison_on_cpu_has_sizes_by_default():
    arguments = command_line.parse_arguments([])
    cpu.set_defaults(arguments)
    assert {name: getattr(arguments, name) for name in cpu.DEFAULTS} == cpu.DEFAULTS
    assert (arguments.num_experts, arguments.dtype) == (64, "float32")


def test_the_comparison_on_cpu(tmp_path):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    command_line = [sys.executable, "-m", "freeio_jax.bench", "--ranks", "2", "--tokens", "4"]
    command_line += ["--hidden", "8", "--repeats", "1"]
    command_line += ["--json", str(path), "--png", str(picture)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 cpu devices" in done.stdout
    data = json.loads(path.read_text())
    assert (data["about"]["ranks"], data["about"]["device"]) == (2, "cpu")
    records = data["cpu"]
    assert {r["operation"] for r in records} == {"dispatch", "combine", "both + gradients"}
    assert records[0]["ratio"] == records[0]["engine_s"] / records[0]["all_to_all_s"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_options_of_xla_that_are_given_are_kept():
    name = "--xla_gpu_enable_command_buffer"
    assert command.xla_flags("", in_processes=False) == f"{name}="
    assert command.xla_flags("--some=1", in_processes=False) == f"--some=1 {name}="
    assert command.xla_flags(f"{name}=FUSION", in_processes=False) == f"{name}=FUSION"


def test_ragged_exchanges_between_processes_may_go_over_nccl():
    added = set(command.xla_flags("", in_processes=True).split()) - {
        "--xla_gpu_enable_command_buffer="
    }
    option = "--xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback=true"
    # An older XLA would end the process because of an option that it does not know.
    assert added == ({option} if jax.__version_info__ >= (0, 11, 2) else set())


def test_ragged_exchanges_between_processes_are_measured_if_they_are_asked_for():
    assert "GPUs alone" in command.no_ragged(False, in_processes=False, asked=True)
    assert "hung between processes" in command.no_ragged(True, in_processes=True, asked=False)
    assert command.no_ragged(True, in_processes=True, asked=True) is None
    assert command.no_ragged(True, in_processes=False, asked=False) is None
