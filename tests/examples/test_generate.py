"""The generation example: equal logits to transformers', generation, sampling, and its program."""

import io
import json
import re
import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_models
from generate import decode
from make_expected_logits import FOLDER
from models import families, rope, tiny
from models.generation import Generator
from models.sampling import choose, within_top_p
from models.tokens import open_tokenizer, pad

from freeio_jax import hf
from freeio_jax.hf import safetensors

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes a family's tiny checkpoint once."""
    folders = {}

    def folder_of(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family] = whole_models.write(folder, family)
        return folders[family]

    return folder_of


@pytest.mark.parametrize(
    ("family", "ranks"), [*((family, 8) for family in tiny.CONFIGS), ("mixtral", 1), ("olmoe", 2)]
)
def test_logits_are_those_of_transformers(family, ranks, checkpoint):
    """``make_expected_logits.py`` has written what transformers computes with these checkpoints."""
    expected = np.load(FOLDER / f"{family}.npy")
    whole, cached = whole_models.evaluate(checkpoint(family), ranks)
    assert whole_models.difference(whole_models.at_places(whole), expected) < 2e-5
    assert whole_models.difference(cached, expected) < 2e-5


def generate(folder, ranks, prompts, side="left", new_tokens=10, **options):
    """Tokens after each prompt, one column for each step, and whether each text went on then."""
    mesh, (tokens, mask) = whole_models.mesh_of(ranks), pad(prompts, side)
    with jax.set_mesh(mesh):
        generator = Generator(
            whole_models.load(folder, mesh),
            mesh,
            batch=len(prompts),
            length=tokens.shape[1],
            new_tokens=new_tokens,
            **options,
        )
        texts = generator.start(tokens, mask, seed=3)
        steps = [jax.device_get((texts.last, texts.running))]
        for _ in range(new_tokens - 1):
            texts = generator.step(texts)
            steps.append(jax.device_get((texts.last, texts.running)))
    return tuple(np.stack(rows, axis=1) for rows in zip(*steps, strict=True))


@pytest.mark.parametrize(("family", "side"), [("gpt_oss", "left"), ("deepseek_v3", "right")])
def test_each_token_is_the_most_likely_one(family, side, checkpoint):
    """By the logits of the whole text, evaluated at once, for texts of unequal lengths."""
    folder, prompts = checkpoint(family), whole_models.PROMPTS
    tokens, _ = generate(folder, 2, prompts, side)
    grown = [p + list(map(int, t)) for p, t in zip(prompts, tokens, strict=True)]
    mesh = whole_models.mesh_of(1)
    with jax.set_mesh(mesh):
        all_logits = whole_models.without_cache(whole_models.load(folder, mesh), grown)
    for row, logits in enumerate(all_logits):
        expected = np.argmax(logits[len(prompts[row]) - 1 : -1], axis=-1)
        np.testing.assert_array_equal(tokens[row], expected)


def test_a_text_ends_at_a_stop_token_and_the_others_go_on(tmp_path, checkpoint):
    prompts = [*whole_models.PROMPTS, [65]]  # as many as make a row for each device
    tokens, running = generate(checkpoint("olmoe"), 2, prompts)
    assert running.all()
    stop = int(tokens[1, 2])
    first = {row: list(t).index(stop) for row, t in enumerate(tokens) if stop in t}
    assert 1 in first
    assert len(first) < len(prompts)
    changed = tiny.config_of("olmoe", eos_token_id=[300, stop])
    tiny.write_checkpoint(tmp_path, changed)
    ended, running = generate(tmp_path, 2, prompts)
    for row in range(len(prompts)):
        last = first.get(row, tokens.shape[1])
        np.testing.assert_array_equal(ended[row, : last + 1], tokens[row, : last + 1])
        np.testing.assert_array_equal(running[row], np.arange(tokens.shape[1]) < last)


def test_sampling_draws_by_probability(rng):
    logits = jnp.array(rng.normal(size=(1, 7)), jnp.float32)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 20_000)
    draw = jax.jit(jax.vmap(lambda key: choose(key, logits, 0.7, 0.6)[0]))
    shares = np.bincount(np.asarray(draw(keys)), minlength=7) / len(keys)
    probabilities = np.exp(np.asarray(logits[0], np.float64) / 0.7)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    number = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    kept = np.isin(np.arange(7), order[:number])
    expected = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    np.testing.assert_allclose(shares, expected, atol=0.02)


def test_the_limits_of_sampling():
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 0.0, 4.0]])
    key = jax.random.key(0)
    assert choose(key, logits, 0.0, 1.0).tolist() == [1, 0]
    assert choose(key, logits, 1.0, 1e-6).tolist() == [1, 0]
    np.testing.assert_array_equal(within_top_p(logits, 1.0), logits)


def test_tokens_are_those_of_the_checkpoint(checkpoint, tmp_path):
    tokenizer = open_tokenizer(checkpoint("mixtral"))
    text = "Grüße, 東京!\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*save_pretrained"):
        open_tokenizer(tmp_path)


def test_what_a_config_asks_for_is_done_or_refused():
    with pytest.raises(ValueError, match="'llama' is none of mixtral"):
        families.from_config({"model_type": "llama"})
    with pytest.raises(ValueError, match="hidden_act"):
        families.from_config(tiny.config_of("olmoe", hidden_act="gelu"))
    with pytest.raises(ValueError, match="rope_type 'dynamic' is none of"):
        rope.from_config({"rope_scaling": {"type": "dynamic"}}, 8, {"rope_theta": 1.0})
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        rope.from_config(
            {"rope_parameters": {"partial_rotary_factor": 0.5}}, 8, {"rope_theta": 1.0}
        )


def test_a_weight_of_another_shape_is_named(tmp_path, checkpoint):
    config = tiny.config_of("mixtral")
    tiny.write_checkpoint(tmp_path, config)
    tensors = {name: np.array(hf.open(tmp_path).tensor(name)) for name in hf.open(tmp_path).names()}
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:-1]
    safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"{name}.*\(32, 15\).*\(32, 16\)"):
        whole_models.load(tmp_path, whole_models.mesh_of(1))


def run(monkeypatch, capsys, *arguments):
    """The program in this process: what it prints, and its error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    error = None
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exit:
        error = exit.code
    printed = capsys.readouterr()
    return printed.out, f"{printed.err}{error or ''}"


def test_the_program_needs_nothing(monkeypatch, capsys):
    out, _ = run(monkeypatch, capsys, "--new-tokens", 6)
    assert "3 layers, 8 cpu device(s)" in out
    assert out.count("---") == 3
    rates = re.search(r"generated: 18 tokens, ([\d,]+) tokens/s, exchange: (\d+)% of a step", out)
    assert int(rates[1].replace(",", "")) > 0
    assert 0 < int(rates[2]) < 100


class ScriptedGenerator:
    """Stands for a Generator. The first text ends after four steps, the second after three."""

    def start(self, tokens, mask, seed):
        return self.step(types.SimpleNamespace(number=0))

    def step(self, texts):
        number = texts.number + 1
        running = np.array([number < 4, number < 3])
        return types.SimpleNamespace(number=number, last=np.full(2, number), running=running)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar_counts_steps(is_terminal, monkeypatch):
    """Only a terminal has one. It stops where the last text ends."""
    error = io.StringIO()
    error.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", error)
    prompts, arguments = (np.zeros((2, 1)), np.ones((2, 1))), {"new_tokens": 6, "seed": 0}
    arguments = types.SimpleNamespace(**arguments)
    outputs, *_ = decode(ScriptedGenerator(), prompts, arguments)
    assert outputs == [[1, 2, 3, 4], [1, 2, 3]]
    if is_terminal:
        assert re.search(r" 67%.* 4/6 \[.*step", error.getvalue().split("\r")[-1])
    else:
        assert not error.getvalue()


def test_the_program_takes_a_checkpoint(monkeypatch, capsys, checkpoint):
    arguments = ["--prompt", "one", "--prompt", "two two", "--temperature", 2, "--top-p", 0.9]
    out, _ = run(monkeypatch, capsys, checkpoint("mixtral"), *arguments, "--ranks", 2)
    assert "2 layers, 2 cpu device(s)" in out
    assert "--- one|" in out
    assert "prompts: 10 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no folder missing"),
        (["--ranks", "99"], "--ranks 99 must be between 1 and 8"),
        (["--ranks", "3", "--family", "olmoe"], "num_experts=16 does not divide evenly among"),
        (["--prompt", ""], "--prompt '' has no token"),
        (["--top-p", "0"], "--top-p must be in (0, 1]"),
        (["--new-tokens", "0"], "--new-tokens must be positive"),
        (["--temperature", "-1"], "--temperature must not be negative"),
    ],
)
def test_wrong_input_gets_one_clear_line(arguments, message, monkeypatch, capsys):
    _, error = run(monkeypatch, capsys, *arguments)
    assert message in error


def test_another_model_is_refused(tmp_path, monkeypatch, capsys, checkpoint):
    tiny.write_checkpoint(tmp_path, tiny.config_of("mixtral"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    _, error = run(monkeypatch, capsys, tmp_path)
    assert "model_type 'llama' is none of mixtral, qwen3_moe" in error
