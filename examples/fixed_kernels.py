"""Set the first kernels of a network by hand, never train them, and keep what they promise.

A small convolutional network learns the digits that scikit-learn ships. Its first layer is eight
edge filters, one for each direction, put there with `lrmult.replace` and frozen by one rule. Each
sums to zero, so it cannot see how bright the background is; and since it keeps every bit, neither
can the network. For comparison the filters are only a start, and train; and the layer starts from
random numbers, frozen or trained.

How to set a kernel that is known to be good, and never train it, is one of the questions that
LearningRateMultipliers of the Wolfram Language answers. Where there is no such thing, the answers
were to put the saved values back after every batch, or to run all data through the layer first, and
train the rest without it.

    python examples/fixed_kernels.py [--output fixed_kernels.png] [--seed 0]

It needs no network, half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import lrmult as lm

RULES = [("conv1", None)]  # its bias too, which is 0
EDGES, RANDOM = "edges", "random numbers"
KINDS = {  # by name: what conv1 starts from, and the rules that it learns by
    "edges, frozen": (EDGES, RULES),
    "edges, trained": (EDGES, []),
    "random, frozen": (RANDOM, RULES),
    "random, trained": (RANDOM, []),
}
COLORS = dict(zip(KINDS, ("#1f6f8b", "#d55e00", "0.6", "#9a5ba5"), strict=True))

ANGLES = np.arange(0, 360, 45)
FILTERS, WIDTH, BATCH, STEPS, RUNS = len(ANGLES), 32, 64, 300, 5
LEVELS = np.linspace(0, 2, 9)  # added to all pixels, where ink is 1 and the background was 0
BOLD = {"weight": "bold", "size": 11}

Data = namedtuple("Data", ["images", "labels"])
Run = namedtuple("Run", ["start", "end", "accuracy"])  # accuracy by level


class Net(nn.Module):
    """Two convolutions and a readout."""

    @nn.compact
    def __call__(self, images):
        """Ten logits for each image."""
        x = nn.relu(nn.Conv(FILTERS, (3, 3), padding="VALID", name="conv1")(images))
        x = nn.relu(nn.Conv(WIDTH, (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def edges() -> np.ndarray:
    """A filter for each direction in which ink may begin, as a kernel of shape (3, 3, 1, 8)."""
    y, x, angles = np.meshgrid([1, 0, -1], [-1, 0, 1], np.deg2rad(ANGLES), indexing="ij")
    slopes = (np.cos(angles) * x + np.sin(angles) * y) * np.exp(-(x**2 + y**2) / 2)
    slopes /= np.abs(slopes).sum(axis=(0, 1)) / 2  # so that where ink begins they give 1
    return slopes[:, :, None].astype(np.float32)


def network(start: str, seed: int) -> dict:
    """The parameters of a new network."""
    params = Net().init(jax.random.key(seed), jnp.zeros((1, 10, 10, 1)))["params"]
    return lm.replace(params, "conv1/kernel", edges()) if start == EDGES else params


def step_by(rules: list, params: dict, train: Data):
    """An optimizer that learns by some rules, and a compiled step of training with it."""
    adam = optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS), weight_decay=0.01)
    tx = lm.wrap(adam, rules)

    def step(params, state, images, labels):
        def loss(params):
            logits = Net().apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    batch = (array[:BATCH] for array in train)
    return tx, jax.jit(step).lower(params, tx.init(params), *batch).compile()


@jax.jit
def answers(params, images):
    """The digits that a network sees."""
    return Net().apply({"params": params}, images).argmax(axis=-1)


def fit(start: dict, tx, step, train: Data, test: Data, seed: int) -> Run:
    """Train a network on random batches."""
    params, state = start, tx.init(start)
    for rows in np.random.default_rng(seed).choice(len(train.labels), (STEPS, BATCH)):
        params, state = step(params, state, train.images[rows], train.labels[rows])
    found = [answers(params, (test.images + level).astype(np.float32)) for level in LEVELS]
    return Run(start, params, np.mean(found == test.labels, axis=1))


def sums(params: dict) -> np.ndarray:
    """The sum of each filter: how much it sees of the background."""
    return np.asarray(lm.extract(params, "conv1/kernel")).sum(axis=(0, 1, 2))


def check(run: Run, rules: list) -> None:
    """End the program unless what is frozen kept every bit, and all else changed."""
    lm.assert_frozen(run.start, run.end, rules)
    for path, before in lm.extract(run.start, "**").items():
        same = np.asarray(before).tobytes() == np.asarray(lm.extract(run.end, path)).tobytes()
        if same != (rules == RULES and path.startswith("conv1/")):
            sys.exit(f"error: {path} {'did not change' if same else 'changed'}")


def draw_layer(panel, params: dict, image: np.ndarray, title: str, color: str) -> None:
    """Draw filters, and their answers to an image and to a brighter one."""
    panel.suptitle(title, color=color, **BOLD)
    grid = panel.subplots(3, 1 + FILTERS)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_color("0.6")
    grid[0, 0].set_axis_off()
    grid[0, 0].text(0.5, 0.5, "filter,\nits sum", ha="center", va="center", size=10)
    for k, ax in enumerate(grid[0, 1:]):
        one = np.asarray(lm.extract(params, lm.along("conv1/kernel", -1, k)))[..., 0]
        ax.imshow(one, "PuOr_r", vmin=-0.6, vmax=0.6)
        ax.set_xlabel(f"{one.sum():.2f}".replace("-0.00", "0.00"), labelpad=3, color=color)
        ax.set_title("→↗↑↖←↙↓↘"[k], size=13)
    for line, level in zip(grid[1:], (0, 2), strict=True):
        kernel, bias = (lm.extract(params, f"conv1/{name}") for name in ("kernel", "bias"))
        windows = np.lib.stride_tricks.sliding_window_view(image[..., 0] + level, (3, 3))
        found = np.einsum("yxij,ijk->kyx", windows, kernel[:, :, 0]) + bias[:, None, None]
        line[0].imshow(image[..., 0] + level, "Greys_r", vmin=0, vmax=3)
        line[0].set_xlabel(f"+{level}", labelpad=3)
        for ax, response in zip(line[1:], found, strict=True):
            ax.imshow(np.maximum(response, 0), "viridis", vmin=0, vmax=1)


def draw_levels(ax, runs: dict[str, list[Run]]) -> None:
    """Draw accuracy by brightness: means, and the range of the runs."""
    ax.set_title(f"Accuracy on brighter images, {RUNS} runs", **BOLD)
    for name, found in runs.items():
        rates = 100 * np.array([run.accuracy for run in found])
        ax.plot(LEVELS, rates.mean(axis=0), color=COLORS[name], lw=2.5, label=name)
        shade = {"color": COLORS[name], "alpha": 0.15, "lw": 0}
        ax.fill_between(LEVELS, rates.min(axis=0), rates.max(axis=0), **shade)
    ax.set(xlabel="added to all pixels (ink is 1, background 0)", ylabel="%")
    ax.set(xlim=(0, 2), ylim=(0, 102), xticks=LEVELS[::2])
    ax.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="lower left")


def draw_plain(ax, runs: dict[str, list[Run]]) -> None:
    """Draw the accuracy of each run on images as they are."""
    ax.set_title("Accuracy on images as they are, runs and mean", **BOLD)
    for k, (name, found) in enumerate(runs.items()):
        rates = 100 * np.array([run.accuracy[0] for run in found])
        ax.plot(rates, np.full(RUNS, k), "o", color=COLORS[name], alpha=0.5, ms=7)
        ax.plot(rates.mean(), k, "|", color=COLORS[name], ms=24, mew=3)
    ax.set_yticks(range(len(runs)), runs)
    for label, color in zip(ax.get_yticklabels(), COLORS.values(), strict=True):
        label.set_color(color)
    ax.set(xlabel="%", ylim=(len(runs) - 0.5, -0.5))


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fixed_kernels.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    bunch = load_digits()
    images = np.pad(bunch.images / 16, [(0, 0), (1, 1), (1, 1)], mode="edge")[..., None]
    order = np.random.default_rng(options.seed).permutation(len(images))
    data = Data(images.astype(np.float32), bunch.target)
    test, train = (Data(*(a[k] for a in data)) for k in np.split(order, [len(order) // 4]))

    params = network(EDGES, options.seed)
    print("The plan with conv1 frozen:\n", lm.compile_rules(RULES, params), sep="\n")
    print("\nThe filter of conv1 for ink to the right:\n")
    print(np.asarray(lm.extract(params, lm.along("conv1/kernel", -1, 0)))[..., 0].round(3))
    steps = {str(rules): step_by(rules, params, train) for rules in (RULES, [])}
    flops = [step.cost_analysis()["flops"] for _, step in steps.values()]
    frozen, free = (flop / 1e6 for flop in flops)
    print(f"\nA step of training: {frozen:.1f} MFLOP; if conv1 trains too, {free:.1f} MFLOP")

    runs = {}
    for name, (start, rules) in KINDS.items():
        seeds = range(options.seed, options.seed + RUNS)
        runs[name] = [
            fit(network(start, seed), *steps[str(rules)], train, test, seed) for seed in seeds
        ]
        for run in runs[name]:
            check(run, rules)
    print(f"\nAccuracy on {len(test.labels)} held-out digits, means of {RUNS} runs: as they are")
    print("(and the lowest and highest), and with all pixels brighter; mean |sum| of a filter.\n")
    print(f"{'conv1':16}{'as they are':>20}{'+0.5':>8}{'+1':>8}{'+2':>8}{'|sum|':>8}")
    for name, found in runs.items():
        all_levels = np.array([run.accuracy for run in found])
        plain, *rest = all_levels.mean(axis=0)[[0, 2, 4, 8]]
        spread = f"({all_levels[:, 0].min():.1%} - {all_levels[:, 0].max():.1%})"
        size = np.mean([np.abs(sums(run.end)) for run in found])
        print(f"{name:16}{plain:6.1%} {spread}", *(f"{x:7.1%}" for x in rest), f"{size:7.3f}")
    same = [lm.extract(run.end, "conv1/kernel").tobytes() for run in runs["edges, frozen"]]
    if (kept := same.count(edges().tobytes())) != RUNS:
        sys.exit(f"error: the edge filters changed in {RUNS - kept} runs")
    print(
        f"\nEdges, frozen: the same bytes after training as set by hand, in {kept} of {RUNS} runs."
    )
    print("In all runs what was frozen kept every bit, and all other arrays changed.")

    figure = Figure(figsize=(13.5, 8), layout="constrained")
    title = "Edge filters that keep every bit cannot see how bright the background is"
    figure.suptitle(title, size=14, weight="bold")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1), wspace=0.03)
    panels = left.subfigures(2, 1, hspace=0.03)
    for panel, name in zip(panels, list(KINDS)[:2], strict=True):
        title = f"conv1: {name}; and its answers to a digit, and to a brighter one"
        draw_layer(panel, runs[name][0].end, test.images[0], title, COLORS[name])
    top, bottom = right.subplots(2, 1, height_ratios=(1.5, 1))
    draw_levels(top, runs)
    draw_plain(bottom, runs)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, dpi=100, bbox_inches="tight", pad_inches=0.15)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
