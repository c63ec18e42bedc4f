"""What a training run has measured so far, and plots of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass
class History:
    """What the plots show: one entry for each step, and one for each evaluation."""

    train_bits: list[float] = dataclasses.field(default_factory=list)  # per byte
    load: list[list[list[int]]] = dataclasses.field(default_factory=list)  # [step][layer][expert]
    dropped: list[int] = dataclasses.field(default_factory=list)
    held_out: list[list[float]] = dataclasses.field(default_factory=list)  # [step, bits per byte]


def plot_loss(history: History, path: Path) -> None:
    bits = np.array(history.train_bits)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(np.arange(1, len(bits) + 1), bits, color="#9ecae1", lw=1, label="training batch")
    span = max(1, len(bits) // 50)
    smooth = np.convolve(bits, np.ones(span) / span, mode="valid")
    axes.plot(
        np.arange(span, len(bits) + 1),
        smooth,
        color="#2171b5",
        lw=2,
        label=f"training, mean of {span} steps",
    )
    axes.plot(*zip(*history.held_out, strict=True), "o-", color="#d94801", ms=5, label="held out")
    axes.set(xlabel="step", ylabel="bits per byte", title="Loss", xlim=(0, len(bits)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_load(history: History, path: Path) -> None:
    """One panel for each layer: each expert's load over time, relative to an even one."""
    load = np.array(history.load, float)  # [steps, layers, experts]
    steps, layers, experts = load.shape
    span = max(1, steps // 200)  # steps that share a column
    columns = load[: steps // span * span].reshape(-1, span, layers, experts).mean(1)
    relative = columns / columns.mean(axis=-1, keepdims=True)
    figure, panels = plt.subplots(
        layers, 1, figsize=(8, 0.8 + 1.9 * layers), sharex=True, squeeze=False, layout="constrained"
    )
    for layer, axes in enumerate(panels[:, 0]):
        image = axes.imshow(
            relative[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(0, len(columns) * span, experts - 0.5, -0.5),
        )
        axes.set(ylabel="expert", title=f"MoE layer {layer}")
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panels[-1, 0].set_xlabel("step")
    bar = figure.colorbar(image, ax=panels, extend="max", ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_label("load relative to an even one")
    figure.savefig(path, dpi=150)
    plt.close(figure)
