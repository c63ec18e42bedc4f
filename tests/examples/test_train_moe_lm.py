"""The training example: a few tiny steps, resumption, and what it says to wrong input."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_moe_lm.py"
SIZES = {"batch": 8, "context": 16, "layers": 1, "width": 16, "heads": 2, "expert-width": 16}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
TINY += ["--eval-batches=1", "--sample=4", "--capacity-factor=1.0"]


def run(*arguments, check=True):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def held_out(output):
    return {int(s): float(b) for s, b in re.findall(r"step +(\d+): held-out ([\d.]+) ", output)}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    return path


def test_resumes_as_though_never_interrupted(tmp_path, text):
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    common = [*TINY, "--text", text, "--out", out, "--steps", 4]
    first = run(*common, "--eval-every", 2, "--checkpoint-every", 2)
    assert list(held_out(first.stdout)) == [0, 2, 4]
    assert "mesh {'data': 2, 'expert': 4}" in first.stdout
    # Room for an even load alone, and an untrained router: 4 steps * 8 * 16 tokens * top-2.
    assert re.search(r"drops: [1-9]\d* of 1,024 assignments", first.stdout)
    assert "--- sample" in first.stdout
    assert {path.name for path in checkpoints.iterdir()} == {"2", "4"}

    refused = run(*common, check=False)
    assert refused.returncode != 0
    assert "already holds a checkpoint of step 4" in refused.stderr

    shutil.rmtree(checkpoints / "4")
    for plot in ("loss.png", "load.png"):
        (out / plot).unlink()
    trace = tmp_path / "trace"
    second = run(*common, "--resume", "--trace", trace)
    assert list(trace.rglob("*.xplane.pb"))
    assert "steps 3 to 4" in second.stdout
    assert list(held_out(second.stdout)) == [4]
    assert held_out(second.stdout)[4] == held_out(first.stdout)[4]
    assert 0 < held_out(second.stdout)[4] < held_out(first.stdout)[0]
    for plot in ("loss.png", "load.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")

    other = run(*common, "--resume", "--width", 32, check=False)
    assert other.returncode != 0
    assert "--width was 16, is 32" in other.stderr
    assert "Traceback" not in other.stderr


def test_learns_the_same_over_another_exchange(tmp_path, text):
    common = [*TINY, "--text", text, "--steps", 2, "--sample", 0, "--capacity-factor", 4.0]
    ours, theirs = (
        run(*common, "--out", tmp_path / name, "--exchange", name)
        for name in ("freeio", "reference")
    )
    assert "exchange: reference" in theirs.stdout
    assert held_out(ours.stdout) == held_out(theirs.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", __file__, "--context", "4096"], "at least 81940"),
        (["--steps", "0"], "must be positive"),
        (["--resume"], "--resume needs --out"),
        (["--top-k", "9"], "--top-k 9 exceeds --experts 8"),
    ],
)
def test_wrong_input_gets_one_clear_line(arguments, message, monkeypatch, capsys):
    """In this process, as the imports take seconds: the exit and what it prints are the same."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    # Python prints a text, and argparse has printed what it says before it exits with a number.
    assert exit.value.code not in (0, None)
    assert message in f"{exit.value.code}{capsys.readouterr().err}"
