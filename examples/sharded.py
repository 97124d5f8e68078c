"""Fine-tune on eight devices: arrays split among them, two layers and half of a third frozen.

A network that tells the digits 0 to 4 learns 5 to 9, as FSDP lays it out: each device keeps an
eighth of every kernel, of its share of the optimizer's state too, and collects the kernels when it
needs them. Plain AdamW trains everything; with rules, wrapped around the same AdamW, only half of
the last hidden layer and the head learn. For both: what a device has to keep, what the devices have
to send each other in a step (as XLA compiled it), and that the losses are those of one device.

    python examples/sharded.py [--output sharded.png] [--seed 0]

An array that is frozen whole has no gradient to be summed; of one that is frozen in part, all of it
is. The eight devices are virtual ones on the CPU, where XLA sums by all-reduce; elsewhere it may
give each device only its eighth of a sum. It needs no network, a quarter of a minute of two CPU
cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits

import lrmult as lm

DEVICES, WIDTH, BATCH = 8, 256, 128
STEPS = 60
RULES = lm.Rules(
    [
        ("Dense[:2]", None),
        (lm.neurons("Dense_2", slice(WIDTH // 2)), None),
        ("head", 4),
        (..., 2),
    ]
)
ADAMW = optax.adamw(1e-3, eps=1e-6)
# compact: half of a layer's outputs train, so its moments are half as wide.
RUNS = {"AdamW": ADAMW, "with rules": lm.wrap(ADAMW, RULES, compact=True)}
FROZEN, RULED = "0.75", "#4a9ab5"
COLORS = {"AdamW": "#d55e00", "with rules": RULED}


class Model(nn.Module):
    """Three hidden layers, and a head for five digits."""

    @nn.compact
    def __call__(self, x):
        """Logits of shape (batch, 5)."""
        for _ in range(3):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(5, name="head")(x)


class Fit(NamedTuple):
    """What comes of a run.

    Attributes:
        params: the parameters.
        losses: the loss at each step.
        collectives: what `collectives` finds in the compiled step.
        params_size: the bytes of the parameters on a device.
        state_size: the bytes of the optimizer's state on a device.
    """

    params: dict
    losses: np.ndarray
    collectives: dict[str, tuple[int, int]]
    params_size: int
    state_size: int


def data(digits: range, seed: int) -> tuple[np.ndarray, ...]:
    """Shuffled images of some digits and their labels, counted from the first; half for tests."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, digits)))
    return (*np.array_split(images[chosen] / 16, 2), *np.array_split(labels[chosen] - digits[0], 2))


def layout(mesh, leaf) -> NamedSharding:
    """How an array is laid out: kernels split along their inputs, the small rest everywhere."""
    return NamedSharding(mesh, PartitionSpec("devices") if leaf.ndim == 2 else PartitionSpec())


def step_of(tx, mesh):
    """One step of training: parameters, state, images and labels to new ones and the loss."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss(params, images, labels):
        params = jax.lax.with_sharding_constraint(params, everywhere)  # collected for use
        logits = Model().apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """For each kind of collective in a compiled program, how many arrays, and their bytes."""
    found = {}
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for result, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"f32\[([\d,]*)\]", result):
            size = 4 * math.prod(map(int, filter(None, shape.split(","))))
            count, total = found.get(kind, (0, 0))
            found[kind] = count + 1, total + size
    return found


def bytes_on_a_device(tree) -> int:
    """What the first device keeps of a tree of arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def fit(tx, start, train, steps: int, devices: int, seed: int) -> Fit:
    """Train on so many devices."""
    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, layout(mesh, leaf)), start)
    state, step, rng, losses = tx.init(params), None, np.random.default_rng(seed), []
    by_rows = NamedSharding(mesh, PartitionSpec("devices"))
    for _ in range(steps):
        chosen = rng.choice(len(train[0]), BATCH, replace=False)
        batch = [jax.device_put(each[chosen], by_rows) for each in train]
        # Compiled once; it would refuse arrays that lie elsewhere than those of the first step.
        step = step or step_of(tx, mesh).lower(params, state, *batch).compile()
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    sizes = bytes_on_a_device(params), bytes_on_a_device(state)
    return Fit(params, np.array(losses), collectives(step.as_text()), *sizes)


def draw_layout(ax, start) -> None:
    """Draw each kernel, its inputs downwards, as the devices share it, and what of it is frozen."""
    frozen = lm.compile_rules(RULES, start).frozen
    left = 0
    for name in start:
        inputs, outputs = start[name]["kernel"].shape
        still = int(np.broadcast_to(frozen[name]["kernel"], (1, outputs)).sum())
        ax.add_patch(Rectangle((left, 0), still, inputs, color=FROZEN, lw=0))
        ax.add_patch(Rectangle((left + still, 0), outputs - still, inputs, color=RULED, lw=0))
        lines = np.arange(1, DEVICES) * inputs / DEVICES
        ax.hlines(lines, left, left + outputs, color="white", lw=inputs / 150)
        ax.text(left + outputs / 2, -8, f"{name}\n{inputs} by {outputs}", ha="center", size=10)
        for start_at, size, says in ((0, still, "frozen"), (still, outputs - still, "trains")):
            if size > 50 and inputs > 100:
                middle = left + start_at + size / 2
                ax.text(
                    middle,
                    inputs * 3.5 / DEVICES,
                    says,
                    ha="center",
                    va="center",
                    size=11,
                    weight="bold",
                )
        left += outputs + 60
    for device in range(DEVICES):
        ax.text(
            left - 45, (device + 0.5) * WIDTH / DEVICES, f"device {device}", va="center", size=9
        )
    ax.set(xlim=(-5, left + 25), ylim=(WIDTH + 5, -45), aspect="equal")
    ax.axis("off")
    title = "The kernels, inputs downwards: each device keeps an eighth of every one"
    ax.set_title(title, size=11, weight="bold")


def draw_bars(ax, title: str, bars: dict[str, list[tuple[str, float, str]]]) -> None:
    """Draw bars of kilobytes, each of some parts: name, size, color."""
    longest = max(sum(size for _, size, _ in parts) for parts in bars.values())
    for y, parts in enumerate(bars.values()):
        end = 0
        for name, size, color in parts:
            ax.barh(y, size, left=end, height=0.66, color=color)
            if size > longest / 5:  # what is narrower has the name of what is above it
                ax.text(end + size / 2, y, name, ha="center", va="center", size=9, color="white")
            end += size
        ax.text(end, y, f" {end:.0f} kB", va="center", size=10)
    ax.set_yticks(range(len(bars)), bars)
    ax.set(xlim=(0, 1.3 * longest), ylim=(len(bars) - 0.4, -0.6), xticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, size=11, weight="bold")


def draw_losses(ax, fits) -> None:
    """Draw the losses on one device as lines, and those on eight as dots."""
    for name in RUNS:
        ax.plot(fits[name, 1].losses, color=COLORS[name], lw=2)
        ax.plot(fits[name, DEVICES].losses, "o", color=COLORS[name], ms=4, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, labelcolor="linecolor", handlelength=0)
    ax.set_title("Loss: a line for one device, dots for eight", size=11, weight="bold")


def draw(path: Path, start, fits) -> None:
    """Save the picture."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    title = (
        "Frozen on eight devices: no optimizer state, and of whole arrays no gradient to be sent"
    )
    figure.suptitle(title, weight="bold", size=13)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1), hspace=0.05)
    left, middle, right = below.subplots(1, 3, width_ratios=(1, 1, 1.2))
    draw_layout(above.subplots(), start)
    kept, sent = {}, {}
    for name, color in COLORS.items():
        run = fits[name, DEVICES]
        kept[name] = [("parameters", run.params_size / 1e3, "0.55")]
        kept[name] += [("moments", run.state_size / 1e3, color)]
        for kind, (count, size) in sorted(run.collectives.items()):
            sent[f"{name}\n{count} {kind}s"] = [("", size / 1e3, color)]
    draw_bars(left, "What a device keeps", kept)
    draw_bars(middle, "What is sent in a step", sent)
    draw_losses(right, fits)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("sharded.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)

    images, _, labels, _ = data(range(5), options.seed)
    model = jax.jit(Model().init)(jax.random.key(options.seed), images[:1])["params"]
    start = fit(ADAMW, model, (images, labels), STEPS, 1, options.seed).params
    print(plan := lm.compile_rules(RULES, start), end="\n\n")
    images, test_images, labels, test_labels = data(range(5, 10), options.seed)
    fits = {
        (name, devices): fit(tx, start, (images, labels), STEPS, devices, options.seed)
        for name, tx in RUNS.items()
        for devices in (1, DEVICES)
    }

    print("                       kept on a device (kB)     sent in a step (kB)")
    print("run         devices    parameters   moments      all-gather   all-reduce    correct")
    for (name, devices), run in fits.items():
        logits = Model().apply({"params": jax.device_get(run.params)}, test_images)
        correct = np.mean(np.argmax(logits, axis=1) == test_labels)
        sent = [run.collectives.get(kind, (0, 0))[1] / 1e3 for kind in ("all-gather", "all-reduce")]
        sizes = run.params_size / 1e3, run.state_size / 1e3, *sent
        numbers = "{:12.1f}{:12.1f}{:14.1f}{:13.1f}".format(*sizes)
        print(f"{name:<12}{devices:>5}{numbers}{correct:>12.1%}")
    for name in RUNS:
        one, eight = (fits[name, devices].losses for devices in (1, DEVICES))
        print(f"{name}: the losses of one device and eight differ by {abs(one - eight).max():.0e}")
    lm.assert_frozen(start, fits["with rules", DEVICES].params, RULES)
    frozen = sum(leaf.frozen for leaf in plan.leaves)
    print(f"{frozen:,} frozen numbers, split among eight devices, kept every bit")
    draw(options.output, start, fits)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
