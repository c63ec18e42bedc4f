"""A crash of XLA's is a row, and not the end of the run."""

import json
import signal
import subprocess
from types import SimpleNamespace

import pytest

from freeio_jax.bench import newest
from freeio_jax.bench.report import Report


@pytest.fixture
def processes(monkeypatch):
    """Commands that were run, and how each is to end: by its exchange and whether it has flags."""
    ran = []

    def run(command, *, env, **options):
        exchange = command[command.index("--exchanges") + 1]
        flags = "device_kernel" in env["XLA_FLAGS"]
        ran.append((command, env["XLA_FLAGS"]))
        path = command[command.index("--json") + 1]
        about = {"name": "large", "num_tokens": 128, "op": "dispatch"}
        record = {"exchange": exchange, **about, "wall_s": 1e-3}
        stderr, status = "", 0
        if not flags and exchange == "ragged":
            record = about | {"error": "XlaRuntimeError: refused\nat"}
            status = 1
        if flags and exchange == "ragged-by-expert":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if flags and exchange == "ragged":
            launched = "freeio_jax.launch" in command
            status = 128 + signal.SIGSEGV if launched else -signal.SIGSEGV
        if flags and exchange == "ragged-1":
            stderr, status = "x\nF1130 08:26:48.95 12 flags.cc:234] Unknown flags: --a\ny", 1
        else:
            with open(path, "w") as file:
                json.dump({"shapes": [record]}, file)
        return SimpleNamespace(returncode=status, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_every_end_is_a_row(processes, capsys):
    report = Report({})
    newest.run(report, ["--suites", "large"], num_ranks=2, platform="cuda")
    rows = [
        (r["exchange"], r["options"], r.get("wall_s"), r.get("ended"))
        for r in report.data["newest"]
        if r["processes"] == 1
    ]
    assert rows == [
        ("ragged-1", "defaults", 1e-3, None),
        ("ragged", "defaults", None, "XlaRuntimeError: refused"),
        ("ragged-by-expert", "defaults", 1e-3, None),
        ("dense", "defaults", 1e-3, None),
        ("ragged-1", "device kernel", None, "status 1: Unknown flags: --a"),
        ("ragged", "device kernel", 1e-3, None),  # before it crashed
        ("ragged", "device kernel", None, "SIGSEGV"),
        ("ragged-by-expert", "device kernel", None, f"no end within {newest.SECONDS} s"),
    ]
    ended = [r["ended"] for r in report.data["newest"] if r["processes"] == 2 and "ended" in r]
    assert "SIGSEGV" in ended
    assert report.failed == 0
    out = capsys.readouterr().out
    assert "| ragged | defaults | 1 | large | 128 | dispatch |  | XlaRuntimeError: refused |" in out
    assert "| ragged | device kernel | 2 |  |  |  |  | SIGSEGV |" in out


def test_processes_are_started_by_the_launcher(processes):
    newest.run(Report({}), ["--tokens", "8"], num_ranks=2, platform="cuda", exchanges=["dense"])
    (alone, flags), (launched, _) = processes
    assert alone[1:3] == ["-m", "freeio_jax.bench"]
    assert alone[-2:] == ["--ranks", "2"]
    assert launched[1:7] == ["-m", "freeio_jax.launch", "-n", "2", "--platform", "cuda"]
    assert "device_kernel" not in flags
    assert alone[alone.index("--tokens") :][:2] == ["--tokens", "8"]


def test_one_set_of_options_in_one_process(processes):
    report = Report({})
    newest.run(
        report,
        ["--tokens", "8"],
        num_ranks=2,
        platform="cuda",
        exchanges=["ragged-1", "dense"],
        options=["device kernel"],
        in_processes=False,
    )
    tried = {(r["exchange"], r["options"], r["processes"]) for r in report.data["newest"]}
    assert tried == {("ragged-1", "device kernel", 1)}
    assert len(processes) == 1
