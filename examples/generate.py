"""Generates text with a Mixture-of-Experts model, its experts spread over all devices.

    python examples/generate.py FOLDER --prompt "The capital of France is"

FOLDER is a Hugging Face checkpoint of Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 or gpt-oss, with
config.json, tokenizer.json and safetensors files. Without it the program writes a tiny checkpoint
with random weights and uses that, so what it says is noise. Without a GPU the mesh is made of
virtual CPU devices. Prompts are taken as they are: applying a chat template is up to the caller.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from models import tiny, weights
from models.exchange_share import exchange_share
from models.generation import Generator
from models.tokens import open_tokenizer, pad
from tqdm import tqdm

from freeio_jax import hf

PROMPTS = ("Mixture of experts", "A token is sent to", "Yes")
#: Steps in which the exchange's share is measured.
TRACED_STEPS = 8


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="checkpoint; default: a tiny one, written by itself")
    add("--family", choices=tiny.CONFIGS, default="qwen3_moe", help="of the tiny checkpoint")
    add("--prompt", action="append", metavar="TEXT", help="can be given several times")
    add("--new-tokens", type=int, default=32, help="the most that are generated for each prompt")
    add("--temperature", type=float, default=0.0, help="0: always the most likely token")
    add("--top-p", type=float, default=1.0, help="draw from this share of the probability")
    add("--seed", type=int, default=0)
    add("--padding", choices=("left", "right"), default="left", help="side of shorter prompts")
    add("--ranks", type=int, help="devices to use; default: all")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on GPUs, else float32")
    add("--cpu-devices", type=int, default=4, help="virtual devices where there is no GPU")
    arguments = parser.parse_args(argv)
    if arguments.new_tokens < 1:
        parser.error(f"--new-tokens must be positive, got {arguments.new_tokens}")
    if arguments.temperature < 0:
        parser.error(f"--temperature must not be negative, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top-p must be in (0, 1], got {arguments.top_p}")
    return arguments


def make_mesh(arguments) -> jax.sharding.Mesh:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    ranks = jax.device_count() if arguments.ranks is None else arguments.ranks
    if not 1 <= ranks <= jax.device_count():
        raise ValueError(f"--ranks {ranks} must be between 1 and {jax.device_count()}.")
    devices = jax.devices()[:ranks]
    return jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)


def decode(generator: Generator, prompts, arguments) -> tuple[list[list[int]], float, float]:
    """Tokens that follow each prompt, and seconds for the prompts and for the further tokens."""
    began = time.perf_counter()
    texts = generator.start(*prompts, arguments.seed)
    running = np.ones(len(prompts[0]), bool)
    outputs: list[list[int]] = [[] for _ in running]
    with tqdm(total=arguments.new_tokens, unit="step", disable=None) as bar:
        for number in range(arguments.new_tokens):
            if number:
                texts = generator.step(texts)
            last, still = jax.device_get((texts.last, texts.running))
            if not number:
                prefilled = time.perf_counter()
            for row in np.flatnonzero(running):
                outputs[row].append(int(last[row]))
            running = still
            bar.update()
            if not running.any():
                break
    return outputs, prefilled - began, time.perf_counter() - prefilled


def share_of_steps(generator: Generator, prompts, arguments, num_devices: int) -> float:
    """The exchange's share in some steps after the first token, which are run for this alone."""
    texts = generator.start(*prompts, arguments.seed)
    texts = jax.block_until_ready(texts)

    def run():
        now = texts
        for _ in range(min(TRACED_STEPS, arguments.new_tokens - 1)):
            now = generator.step(now)
        return now

    return exchange_share(run, num_devices)


def generate(arguments, folder: Path, mesh: jax.sharding.Mesh) -> None:
    kind = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    checkpoint, tokenizer = hf.open(folder), open_tokenizer(folder)
    texts = arguments.prompt or PROMPTS
    encoded = [tokenizer.encode(text).ids for text in texts]
    empty = [text for text, ids in zip(texts, encoded, strict=True) if not ids]
    if empty:
        raise ValueError(f"--prompt {empty[0]!r} has no token.")
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        model = weights.load(checkpoint, mesh=mesh, dtype=jnp.dtype(kind))
        size = sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
        print(
            f"{size / 1e6:.2f} M parameters in {kind}, {len(model.layers)} layers, "
            f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s), loaded in "
            f"{time.perf_counter() - began:.1f} s"
        )
        prompts = pad(encoded, arguments.padding)
        generator = Generator(
            model,
            mesh,
            batch=len(texts),
            length=prompts[0].shape[1],
            new_tokens=arguments.new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
        )
        print(f"compiled in {generator.seconds_to_compile:.1f} s")
        outputs, prefill, steps = decode(generator, prompts, arguments)
        share = share_of_steps(generator, prompts, arguments, mesh.size)
    for text, ids in zip(texts, outputs, strict=True):
        ended = ids[-1] in model.settings.stop_ids
        print(f"--- {text}|{tokenizer.decode(ids)}{' (end)' if ended else ''}")
    num_prompt, num_new = int(prompts[1].sum()), sum(map(len, outputs))
    print(f"prompts: {num_prompt} tokens, {num_prompt / prefill:,.0f} tokens/s")
    if num_new > len(texts):
        rate = (num_new - len(texts)) / steps
        print(f"generated: {num_new} tokens, {rate:,.0f} tokens/s, exchange: {share:.0%} of a step")


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    with contextlib.ExitStack() as stack:
        folder = arguments.folder
        try:
            mesh = make_mesh(arguments)
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                tiny.write_checkpoint(folder, tiny.config_of(arguments.family))
            generate(arguments, folder, mesh)
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(f"generate: {error}") from None


if __name__ == "__main__":
    main()
