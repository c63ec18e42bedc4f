"""Trains a byte-level Mixture-of-Experts Transformer on a data x expert mesh.

    python examples/train_moe_lm.py

By default on the Python standard library's own sources, which every machine has. Without a GPU the
mesh is made of virtual CPU devices. Writes a checkpoint, from which ``--resume`` goes on, and plots
of the loss and of each expert's load to ``--out``, and prints a sample of what it has learned.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from history import History, plot_load, plot_loss
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_lm import MESH_AXES, ModelConfig, Trainer
from text import UserError, draw_windows, read_text, split_text
from tqdm import tqdm

from freeio_jax import grouped_matmul
from freeio_jax.bench import baselines, profile

BITS = 1 / math.log(2)  # bits per nat


def open_checkpoints(folder: Path, resume: bool) -> ocp.CheckpointManager:
    if folder.parent.exists() and not folder.parent.is_dir():
        raise UserError(f"--out {folder.parent} is a file; name a folder.")
    if resume and not folder.is_dir():
        raise UserError(f"--resume: there is no checkpoint in {folder.parent}.")
    manager = ocp.CheckpointManager(
        folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    latest = manager.latest_step()
    if resume and latest is None:
        raise UserError(f"--resume: there is no checkpoint in {folder.parent}.")
    if not resume and latest is not None:
        raise UserError(
            f"{folder.parent} already holds a checkpoint of step {latest}: go on from it with "
            "--resume, or choose another --out."
        )
    return manager


def save(manager, trainer, config, history):
    step = int(trainer.state["step"])
    about = {"config": dataclasses.asdict(config), "history": dataclasses.asdict(history)}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(trainer.state), about=ocp.args.JsonSave(about)
    )
    manager.save(step, args=items)


def restore(manager, trainer, config) -> History:
    """Puts the latest checkpoint into ``trainer``; returns the history up to it."""
    step = manager.latest_step()
    try:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = manager.restore(step, args=items)["about"]
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"--resume: no checkpoint of this program ({error}).") from error
    here = dataclasses.asdict(config)
    differing = [
        f"--{name.replace('_', '-')} was {about['config'].get(name)}, is {value}"
        for name, value in here.items()
        if about["config"].get(name) != value
    ]
    if differing:
        raise UserError(f"--resume: the checkpoint is of another model: {'; '.join(differing)}.")
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), trainer.state
    )
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    trainer.state = manager.restore(step, args=items)["state"]
    return History(**about["history"])


def positive(kind):
    def parse(text):
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = positive(int)
    add = parser.add_argument
    add("--text", metavar="PATH", help="file or folder to learn; default: Python's own library")
    add("--out", metavar="DIR", help="for checkpoints and plots; default: a new one under runs/")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--steps", type=count, default=400, help="training steps, resumed ones included")
    add("--batch", type=count, default=16, help="sequences in a step")
    add("--context", type=count, default=128, help="bytes in a sequence")
    add("--layers", type=count, default=2)
    add("--width", type=count, default=128, help="features of a token")
    add("--heads", type=count, default=4, help="attention heads")
    add("--experts", type=count, default=8, help="experts of a layer")
    add("--top-k", type=count, default=2, help="experts of a token")
    add("--expert-width", type=count, default=256, help="hidden width of an expert")
    add(
        "--capacity-factor",
        type=positive(float),
        default=None,
        help="room for this multiple of an even load, the rest is dropped; default: no drops",
    )
    add(
        "--exchange",
        choices=baselines.NAMES,
        default="freeio",
        help="what moves tokens to experts and back; the others are for comparison",
    )
    add(
        "--product",
        choices=("hopper", "tokamax", "ragged_dot", "tiled"),
        default=None,
        help="what multiplies the experts' rows, right or wrong; default: the fastest right one",
    )
    add("--trace", metavar="DIR", help="profile the last step, for XProf or Perfetto, into DIR")
    add("--learning-rate", type=positive(float), default=4e-3, help="its peak, after the warm-up")
    add("--seed", type=int, default=0)
    add("--eval-every", type=count, default=50, metavar="STEPS")
    add("--eval-batches", type=count, default=8, help="held-out batches in an evaluation")
    add("--checkpoint-every", type=count, default=100, metavar="STEPS")
    add("--sample", type=int, default=300, metavar="BYTES", help="length of the final sample")
    add(
        "--expert-parallel",
        type=count,
        default=None,
        help="size of the mesh's expert axis; default: the largest that leaves two data groups",
    )
    add("--cpu-devices", type=count, default=4, help="virtual devices where there is no GPU")
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out DIR, the run to go on with")
    if arguments.width % arguments.heads:
        parser.error(f"--width {arguments.width} must be a multiple of --heads {arguments.heads}")
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k {arguments.top_k} exceeds --experts {arguments.experts}")
    if arguments.out is None:
        arguments.out = time.strftime("runs/moe-lm-%Y%m%d-%H%M%S")
    return arguments


def make_mesh(arguments) -> jax.sharding.Mesh:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    devices, expert = jax.device_count(), arguments.expert_parallel
    if expert is None:
        fitting = [
            n for n in range(1, devices + 1) if not devices % n and not arguments.experts % n
        ]
        expert = max(n for n in fitting if devices // n > 1 or devices < 4)
    if devices % expert or arguments.experts % expert:
        raise UserError(
            f"--expert-parallel {expert} must divide both the {devices} devices and the "
            f"--experts {arguments.experts}."
        )
    if arguments.batch % devices:
        raise UserError(f"--batch {arguments.batch} must be a multiple of the {devices} devices.")
    return jax.make_mesh((devices // expert, expert), MESH_AXES, axis_types=(AxisType.Auto,) * 2)


def train(arguments) -> None:
    train_text, held_out_text = split_text(read_text(arguments.text), arguments.context)
    mesh, out = make_mesh(arguments), Path(arguments.out)
    config = ModelConfig(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ModelConfig)}
    )
    manager = open_checkpoints(out / "checkpoints", arguments.resume)
    warm_up = min(50, arguments.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, arguments.learning_rate, warm_up, arguments.steps, arguments.learning_rate / 10
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))

    with jax.set_mesh(mesh), grouped_matmul.use(arguments.product):
        trainer = Trainer(
            config,
            mesh,
            moe_options={
                "capacity_factor": arguments.capacity_factor,
                "exchange": baselines.named(arguments.exchange),
            },
            optimizer=optimizer,
            seed=arguments.seed,
        )
        history = restore(manager, trainer, config) if arguments.resume else History()
        first = int(trainer.state["step"])
        if first >= arguments.steps:
            raise UserError(
                f"the checkpoint is at step {first} already: ask for more than --steps "
                f"{arguments.steps}."
            )
        size = sum(a.size for a in jax.tree.leaves(trainer.state["params"]))
        print(
            f"{size / 1e6:.2f} M parameters, {len(train_text) / 1e6:.1f} MB to learn, "
            f"{len(held_out_text) / 1e6:.1f} MB held out, mesh {dict(mesh.shape)} of "
            f"{mesh.devices.flat[0].device_kind} devices, steps {first + 1} to {arguments.steps}"
        )

        def windows(data, *seed):
            drawn = draw_windows(data, arguments.batch, arguments.context, list(seed))
            return jax.device_put(drawn, NamedSharding(mesh, P(MESH_AXES)))

        held_out = [windows(held_out_text, i) for i in range(arguments.eval_batches)]

        def evaluate(step):
            nats = [trainer.evaluate(trainer.state["params"], window) for window in held_out]
            history.held_out.append([step, float(np.mean(nats)) * BITS])
            tqdm.write(f"step {step:5d}: held-out {history.held_out[-1][1]:.3f} bits per byte")

        if not history.held_out:
            evaluate(0)
        seconds = []
        with tqdm(total=arguments.steps, initial=first, unit="step", disable=None) as bar:
            for step in range(first + 1, arguments.steps + 1):
                began = time.perf_counter()
                window = windows(train_text, arguments.seed, step)
                traced = arguments.trace and step == arguments.steps
                with jax.profiler.trace(arguments.trace) if traced else contextlib.nullcontext():
                    trainer.state, report = trainer.train_step(trainer.state, window)
                    report = jax.device_get(report)
                if not traced:
                    seconds.append(time.perf_counter() - began)
                history.train_bits.append(float(report["nats"]) * BITS)
                history.load.append(report["load"].tolist())
                history.dropped.append(int(report["dropped"]))
                bar.update()
                bar.set_postfix(bits=f"{history.train_bits[-1]:.3f}", refresh=False)
                if step % arguments.eval_every == 0 or step == arguments.steps:
                    evaluate(step)
                if step % arguments.checkpoint_every == 0 or step == arguments.steps:
                    save(manager, trainer, config, history)
        manager.wait_until_finished()
        plot_loss(history, out / "loss.png")
        plot_load(history, out / "load.png")
        print_sample(trainer, held_out_text, arguments)
    print_summary(history, seconds, arguments, out)


def print_sample(trainer, held_out_text, arguments) -> None:
    if arguments.sample <= 0:
        return
    # A line's end near the middle of the held-out text.
    text = held_out_text.tobytes()
    end = max(text.find(b"\n", len(text) // 2) + 1, arguments.context)
    prompt = text[end - arguments.context : end]
    drawn = trainer.sample(prompt, arguments.sample, arguments.seed)
    shown = prompt[-64:].decode(errors="replace")
    print(f"\n--- sample: the end of a held-out text | and how the model goes on\n{shown}|", end="")
    print(drawn.decode(errors="replace"), end="\n---\n\n")


def print_summary(history, seconds, arguments, out) -> None:
    before, after = history.held_out[0][1], history.held_out[-1][1]
    assignments = arguments.steps * arguments.batch * arguments.context
    assignments *= arguments.layers * arguments.top_k
    print(f"held-out loss: {before:.3f} bits per byte before training, {after:.3f} after")
    if len(seconds) > 1:  # the first step's time is compilation
        rate = arguments.batch * arguments.context * (len(seconds) - 1) / sum(seconds[1:])
        print(f"speed: {rate:,.0f} tokens/s in training steps, exchange: {arguments.exchange}")
    shares = profile.shares(profile.read(arguments.trace)) if arguments.trace else {}
    if shares:  # GPUs only
        print(f"communication: {shares['communication_share']:.1%} of the last step's time")
    print(f"drops: {sum(history.dropped):,} of {assignments:,} assignments")
    print(f"checkpoint: {out / 'checkpoints'}   plots: {out / 'loss.png'}, {out / 'load.png'}")


def main(argv=None) -> None:
    try:
        train(parse_arguments(argv))
    except UserError as error:
        raise SystemExit(f"train_moe_lm: {error}") from None


if __name__ == "__main__":
    main()
