"""Set six units of a layer by hand, freeze only those, and train everything around them.

A network with two hidden layers learns the digits that scikit-learn ships. Six units of the second
are drawn by hand, to look for a hole, a stem and so on. One rule freezes their kernel columns and
biases; the other units learn, and so does the layer before, through both. For comparison the same
network is trained with nothing frozen, and with that whole layer frozen.

    python examples/freeze_neurons.py [--output freeze_neurons.png] [--seed 0]

It needs no network, less than half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import lrmult as lm

# A unit answers where there is more ink under its + than under its -, by more than its threshold.
DRAWN = """
    ..++++..  ..-++-..  ........  ..+++++.  ..++++..  .....--.
    .++++++.  ..-++-..  ........  ..+++++.  .++..++.  ....---.
    .++--++.  ..-++-..  --....--  ..--....  .++--++.  ....---.
    .++--++.  ..-++-..  --....--  ..-.....  ..+++++.  ..+++...
    .++--++.  ..-++-..  .--..--.  ........  ..--....  .+++++..
    .++--++.  ..-++-..  ........  .....--.  .----...  .++--++.
    .++++++.  ..-++-..  ..++++++  .....--.  .---....  ..++-++.
    ..++++..  ..-++-..  ..++++++  .....--.  ........  ...+++.."""
THRESHOLDS = (0.2, 0.3, 0.4, 0.35, 0.25, 0.25)
DIGITS = {"hole": 0, "stem": 1, "foot": 2, "roof": 7, "upper loop": 9, "lower loop": 6}
HAND, OTHERS = slice(0, 6), slice(6, 32)  # units of the second layer

SLOW = ("fc1", 0.1)  # so that what the six see still looks like the image
SIX = [(lm.neurons("fc2", [0, 1, 2, 3, 4, 5]), None), SLOW]
RULES = {"nothing frozen": [SLOW], "six frozen": SIX, "all of fc2 frozen": [("fc2", None), SLOW]}
PARTS = {"fc2, 0-5": ("fc2", HAND), "fc2, 6-31": ("fc2", OTHERS), "fc1": ("fc1", slice(None))}
RATE, DECAY, BATCH, EPOCHS, RUNS = 3e-3, 0.1, 64, 12, 3
RIGHT, WRONG = "#1f6f8b", "#b3541e"
BOLD = {"weight": "bold", "size": 11}
SIDEWAYS = {"rotation": 0, "ha": "right", "va": "center", "size": 11, "labelpad": 10}

Data = tuple[np.ndarray, np.ndarray]  # images as rows of 64 pixels, and labels
Units = dict[str, np.ndarray]  # by layer, a column per unit: its part of the kernel, and its bias
Run = namedtuple("Run", ["start", "end", "accuracy"])  # two Units, and a fraction


class Net(nnx.Module):
    """Two hidden layers and a readout; the first units of the second are set by hand."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(64, 64, rngs=rngs)
        self.fc2 = nnx.Linear(64, 32, rngs=rngs)
        self.readout = nnx.Linear(32, 10, rngs=rngs)
        self.fc1.kernel[...] = np.eye(64) + self.fc1.kernel / 8  # shows the image, almost
        drawn = np.array([list("".join(line.split())) for line in DRAWN.split("\n")[1:]])
        columns = drawn.reshape(8, 6, 8).swapaxes(0, 1).reshape(6, 64).T
        plus, minus = columns == "+", columns == "-"
        self.fc2.kernel[:, HAND] = 4 * (plus / plus.sum(axis=0) - minus / minus.sum(axis=0))
        self.fc2.bias[HAND] = -4 * np.array(THRESHOLDS)

    def __call__(self, images):
        """Ten logits for each image."""
        return self.readout(nnx.relu(self.fc2(nnx.relu(self.fc1(images)))))


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step down the cross-entropy."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def units(model: Net) -> Units:
    """Copies of all weights and biases, unit by unit."""
    layers = {"fc1": model.fc1, "fc2": model.fc2, "readout": model.readout}
    return {name: np.vstack([layer.kernel, layer.bias]) for name, layer in layers.items()}


def fit(tx: optax.GradientTransformation, train: Data, test: Data, seed: int) -> Run:
    """Train a new model, in shuffled batches."""
    model, rng = Net(nnx.Rngs(seed)), np.random.default_rng(seed)
    start, optimizer = units(model), nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(EPOCHS):
        order = rng.permutation(len(train[1]))[: len(train[1]) // BATCH * BATCH]
        for batch in order.reshape(-1, BATCH):
            train_step(model, optimizer, train[0][batch], train[1][batch])
    return Run(start, units(model), np.mean(np.argmax(model(test[0]), axis=-1) == test[1]))


def movement(run: Run, layer: str, part: slice) -> float:
    """How far units of a layer moved: the L2 norm of the change over that of the start."""
    start, end = run.start[layer][:, part], run.end[layer][:, part]
    return float(np.linalg.norm(end - start) / np.linalg.norm(start))


def answers(at: Units, test: Data) -> np.ndarray:
    """How often each unit set by hand answers: to its own digit, and to others; of shape (6, 2)."""
    shown = np.maximum(test[0] @ at["fc1"][:-1] + at["fc1"][-1], 0)
    on = (shown @ at["fc2"][:-1] + at["fc2"][-1] > 0).T
    own = [test[1] == digit for digit in DIGITS.values()]
    return np.array([(on[k, own[k]].mean(), on[k, ~own[k]].mean()) for k in range(6)])


def draw_units(panel, rows: dict[str, Units], test: Data) -> None:
    """Draw the weights of the units set by hand, and how often they answer."""
    panel.suptitle("The six, and how often they answer to their own digit and to others", **BOLD)
    grid = panel.subplots(3, 6)
    for line, (name, at) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, **SIDEWAYS)
        for k, (own, others) in enumerate(answers(at, test)):
            line[k].imshow(at["fc2"][:-1, k].reshape(8, 8), "PuOr_r", vmin=-0.4, vmax=0.4)
            line[k].set(xticks=[], yticks=[])
            text = f"{list(DIGITS.values())[k]}: {own:.0%}  others: {others:.0%}"
            line[k].set_xlabel(text, color=RIGHT if own > others + 0.5 else WRONG, labelpad=3)
    for ax, name in zip(grid[0], DIGITS, strict=True):
        ax.set_title(name, size=11)


def draw_changes(panel, run: Run) -> None:
    """Draw how far each weight and bias moved; what did not is white."""
    panel.suptitle("With the six frozen: how far each weight moved, one column per unit", **BOLD)
    grid = panel.subplots(2, 3, width_ratios=(64, 32, 10), height_ratios=(16, 1))
    for (top, bottom), layer in zip(grid.T, run.end, strict=True):
        change = np.ma.masked_equal(np.abs(run.end[layer] - run.start[layer]), 0)
        for ax, part in ((top, change[:-1]), (bottom, change[-1:])):
            image = ax.imshow(part, "viridis_r", LogNorm(1e-4, 1), aspect="auto")
            ax.set(xticks=[], yticks=[])
        top.set_title(layer + " (rate x 0.1)" * (layer == "fc1"), size=11)
    centred = {"ha": "center", "va": "center", "color": RIGHT}
    grid[0, 1].text(2.5, 31.5, "set by hand, frozen", centred, rotation=90, size=13)
    grid[0, 0].set_ylabel("kernel", **SIDEWAYS)
    grid[1, 0].set_ylabel("bias", **SIDEWAYS)
    grid[1, 0].set_xlabel("yellow rows: pixels that never have ink, moved by weight decay alone")
    panel.colorbar(image, ax=grid, label="|change|; white is none", pad=0.02, extend="min")


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("freeze_neurons.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    nets = [Net(nnx.Rngs(options.seed + k)) for k in range(RUNS)]
    plan = lm.compile_rules(SIX, nnx.state(nets[0], nnx.Param))
    print("The plan with six units frozen:\n", plan, sep="\n")
    bunch = load_digits()
    order = np.random.default_rng(options.seed).permutation(len(bunch.data))
    parts = np.split(order, [len(order) // 5])
    test, train = [(bunch.data[part] / 16, bunch.target[part]) for part in parts]
    print("\nHow far units moved, |change| / |start|; how often the six answer to their own digit")
    print(f"and to others; accuracy. On {len(test[1])} held-out digits, means of {RUNS} runs:\n")
    print(" " * 18, *(f"{head:>10}" for head in (*PARTS, "own", "others", "accuracy")))
    rates = np.mean([answers(units(net), test) for net in nets], axis=(0, 1))
    print(f"{'set by hand':51}", *(f"{rate:10.1%}" for rate in rates))
    runs = {}
    for name, rules in RULES.items():
        tx = optax.chain(optax.adamw(RATE, weight_decay=DECAY), lm.scale_by_rules(rules))
        found = runs[name] = [fit(tx, train, test, options.seed + k) for k in range(RUNS)]
        rates = [(*answers(run.end, test).mean(axis=0), run.accuracy) for run in found]
        moved = [[movement(run, *part) for part in PARTS.values()] for run in found]
        print(f"{name:18}", *(f"{part:10.3f}" for part in np.mean(moved, axis=0)), end=" ")
        print(*(f"{rate:10.1%}" for rate in np.mean(rates, axis=0)))
    steps = EPOCHS * (len(train[1]) // BATCH)
    decay = [1 - (1 - RATE * DECAY * rate) ** steps for rate in (1, 1, SLOW[1])]
    print("weight decay alone", *(f"{part:10.3f}" for part in decay))

    print("\nKernel columns and biases of fc2, before and after each run, byte by byte:\n")
    for (name, found), frozen in zip(runs.items(), (0, 6, 32), strict=True):
        for run in found:
            pairs = zip(run.start["fc2"].T, run.end["fc2"].T, strict=True)
            same = [start.tobytes() == end.tobytes() for start, end in pairs]
            if same != [k < frozen for k in range(32)] or movement(run, *PARTS["fc1"]) <= decay[-1]:
                sys.exit(f"error: {name}: not just what is frozen in fc2 stayed, or fc1 did")
        print(f"{name:18} {frozen:2} of 32 units are identical, {32 - frozen:2} changed")

    free, six = runs["nothing frozen"][0], runs["six frozen"][0]
    figure = Figure(figsize=(11.5, 10.5), layout="constrained")
    figure.suptitle("Six units keep every bit while all around them learns", size=15, weight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.03)
    rows = {"set by hand": six.start, "trained,\nfrozen": six.end, "trained,\nfree": free.end}
    draw_units(top, rows, test)
    draw_changes(bottom, six)
    figure.savefig(options.output, dpi=100, bbox_inches="tight", pad_inches=0.15)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
