"""Adapt a network with LoRA and with LoRA+: one learning rate for A and B, or a faster B.

A network learns to read the upright digits that scikit-learn ships. Then low-rank adapters alone
teach it to read them lying on their side: each kernel W gets a product A @ B of rank 4. With
`lrmult.wrap` no optimizer state is kept for what they adapt, which keeps every bit, so without the
adapters the network reads upright digits just as before.

LoRA+ (Hayou, Ghosh and Yu 2024) lets B learn faster than A, 16 times as fast to begin with. Is that
better than LoRA, or does LoRA merely want a larger rate? Here all pairs of rates in steps of 2 are
tried, A's from 2^-13 to 2^-3 and B's from 2^-10 to 2^-2, and every ratio is compared at its best.
For that the multiplier of B is a run-time value, so that all pairs are one compiled program.

    python examples/lora_plus.py [--output lora_plus.png] [--seed 0] [--runs 5]

It needs no network, a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import functools
import itertools
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits

import lrmult as lm
from lrmult import recipes

SIZES, RANK, BATCH = (64, 256, 256, 256, 10), 4, 32
STEPS, EVERY = 120, 12  # of adapting, and from one look at held-out images to the next
LOGS_A, LOGS_B = np.arange(-13, -2), np.arange(-10, -1)  # of the rates, to base 2
RATIOS, LORA, PLUS = (1, 4, 16, 64), 1, 16
HALF_WAY = 0.5  # a loss
COLORS = {1: "#d55e00", 4: "0.7", 16: "#1f6f8b", 64: "0.4"}
NAMES = {LORA: "LoRA", PLUS: "LoRA+"}
BOLD = {"weight": "bold", "size": 11}

Data = namedtuple("Data", ["images", "labels"])  # images as rows of 64 pixels


class Net(nnx.Module):
    """Four linear layers, with an adapter beside each."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            nnx.LoRALinear(*pair, lora_rank=RANK, rngs=rngs) for pair in itertools.pairwise(SIZES)
        )

    def __call__(self, x):
        """Ten logits for each image."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


GRAPH, _ = nnx.split(Net(nnx.Rngs(0)))


def logits(params, images):
    """What the network of some parameters says."""
    return nnx.merge(GRAPH, params)(images)


def measure(params, images, labels):
    """The mean cross-entropy in nats, and the fraction that is read rightly."""
    found = logits(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, labels)
    return losses.mean(), (found.argmax(-1) == labels).mean()


def fit(rules, rate, params, train: Data, test: Data, batches):
    """Train by some rules; give the parameters, and losses and accuracies held out on the way."""
    tx = lm.wrap(optax.adam(optax.cosine_decay_schedule(rate, len(batches))), rules)

    def step(carry, batch):
        params, state = carry
        grads, _ = jax.grad(measure, has_aux=True)(params, *(a[batch] for a in train))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def steps(carry, batches):
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, measure(carry[0], *test)

    batches = batches.reshape(-1, EVERY, batches.shape[-1])
    (params, _), notes = jax.lax.scan(steps, (params, tx.init(params)), batches)
    return params, notes


@functools.partial(jax.jit, static_argnums=0)
def pretrain(rules, params, train, test, batches):
    """Learn the first task."""
    return fit(rules, 2e-3, params, train, test, batches)


@jax.jit
def grid(params, train, test, batches):
    """Losses and accuracies of shape (rates of A, rates of B, looks)."""

    def one(rate_a, rate_b):
        # What recipes.lora_plus(params, ratio) says, with a ratio that is known at run time only.
        rules = [("**/lora_b", rate_b / rate_a), ("**/lora_a", 1), (..., None)]
        return fit(rules, rate_a, params, train, test, batches)[1]

    over_b = jax.vmap(one, (None, 0))
    return jax.vmap(over_b, (0, None))(jnp.exp2(LOGS_A), jnp.exp2(LOGS_B))


def ordinary(params, rules, rate: float, train: Data, batches):
    """Adapt a network with these rules in the way of NNX; give its parameters, and the state."""
    model = nnx.merge(GRAPH, jax.tree.map(jnp.copy, params))
    tx = lm.wrap(optax.adam(optax.cosine_decay_schedule(rate, STEPS)), rules)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            return measure(nnx.state(model), images, labels)[0]

        optimizer.update(model, nnx.grad(loss)(model))

    for batch in batches:
        step(model, optimizer, *(array[batch] for array in train))
    return nnx.state(model), optimizer.opt_state


def bits(params, path: str) -> bytes:
    """The bytes of an array."""
    return np.asarray(lm.extract(params, path)).tobytes()


def bytes_of(tree) -> int:
    """How many bytes all arrays in a tree take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def without_adapters(params):
    """The same parameters, with adapters that add nothing."""
    found = lm.extract(params, "**/lora_b")
    return lm.replace(params, "**/lora_b", {path: jnp.zeros_like(b) for path, b in found.items()})


def check(before, after, rules, images) -> None:
    """End the program unless the base kept every bit, all adapters changed, and nothing is lost."""
    lm.assert_frozen(before, after, rules)
    same = {path for path in lm.paths(before) if bits(before, path) == bits(after, path)}
    if same != {path for path in lm.paths(before) if "/lora/" not in path}:
        sys.exit(f"error: of all arrays, these kept every bit: {same}")
    then, now = (jax.jit(logits)(without_adapters(params), images) for params in (before, after))
    if then.tobytes() != now.tobytes():
        sys.exit("error: without its adapters the network reads upright digits in another way")
    print("\nThe base kept every bit, and all adapters changed. Without these, all")
    print(f"{then.size:,} logits for {len(then)} upright digits are what they were, bit by bit.")


def along(ratio: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in the grid where B learns by a ratio faster than A."""
    return np.nonzero(LOGS_B - LOGS_A[:, None] == np.log2(ratio))


def best(losses: np.ndarray, ratio: int) -> tuple[int, int]:
    """The place of the best rates with a ratio, by the mean of the runs."""
    rows, columns = along(ratio)
    place = losses[:, rows, columns, -1].mean(axis=0).argmin()
    return rows[place], columns[place]


def report(losses: np.ndarray, rates: np.ndarray) -> None:
    """Print what came out, from losses and accuracies of shape (runs, rates of A, of B, looks)."""
    print(f"\nSideways digits, held out, after {STEPS} steps: at the best rates of each ratio, the")
    print(f"loss and the accuracy (means of {len(losses)} runs, lowest - highest), and the step at")
    print(f"which the mean loss is below {HALF_WAY} (looked at every {EVERY} steps).\n")
    print(f"ratio   A       B {'loss':>11}{'accuracy':>27}{'step':>16}")
    for ratio in RATIOS:
        row, column = best(losses, ratio)
        line = f"{ratio:5}   {f'2^{LOGS_A[row]}':6}  {f'2^{LOGS_B[column]}':6}"
        for values, form in (
            (losses, "{:.3f} ({:.3f} - {:.3f})"),
            (rates, "{:.1%} ({:.1%} - {:.1%})"),
        ):
            ends = values[:, row, column, -1]
            line += form.format(ends.mean(), ends.min(), ends.max()).rjust(25)
        below = losses[:, row, column].mean(axis=0) < HALF_WAY
        print(line + (f"{(1 + below.argmax()) * EVERY:8}" if below.any() else "   never"))
    print(f"\nRatio {PLUS} less ratio {LORA}, each at its best rates, in pairs that begin with the")
    print("same network and get the same batches, with standard errors:")
    for values, name, unit in ((losses, "loss", 1), (rates, "accuracy in points", 100)):
        ends = [values[(slice(None), *best(losses, ratio), -1)] for ratio in (PLUS, LORA)]
        pairs = unit * (ends[0] - ends[1])
        print(f"  {name} {pairs.mean():+.3f} +- {pairs.std(ddof=1) / len(pairs) ** 0.5:.3f}")


def draw_images(panel, title: str, images: np.ndarray) -> None:
    """Draw images in a row."""
    panel.suptitle(title, **BOLD)
    for ax, image in zip(panel.subplots(1, len(images)), images, strict=True):
        ax.imshow(image.reshape(8, 8), "Greys")
        ax.set_axis_off()


def power(log: int) -> str:
    """A power of two, as matplotlib writes it."""
    return f"$2^{{{log}}}$"


def draw_map(figure, losses: np.ndarray) -> None:
    """Draw the loss of each pair of rates."""
    ax, ends = figure.subplots(), losses[..., -1].mean(axis=0)
    shown = ax.imshow(ends, "viridis_r", LogNorm(ends.min(), 2.4), origin="lower", aspect="auto")
    bar = figure.colorbar(shown, ax=ax, extend="max", ticks=[0.25, 0.5, 1, 2], format="%g")
    bar.minorticks_off()
    of = {
        (row, column): ratio for ratio in NAMES for row, column in zip(*along(ratio), strict=True)
    }
    tops = [best(losses, ratio) for ratio in NAMES]
    for cell, loss in np.ndenumerate(ends):
        look = {"color": "white" if loss > 0.8 or cell in of else "black", "size": 9}
        if cell in of:
            edge = {"ec": "black", "lw": 3} if cell in tops else {"ec": "white", "lw": 1}
            look |= {"weight": "bold", "bbox": {"fc": COLORS[of[cell]], "boxstyle": "round"} | edge}
        text = f"{loss:.2f}" if loss < 10 else "> 10"
        ax.text(*reversed(cell), text, ha="center", va="center", **look)
    patches = [
        Patch(color=COLORS[ratio], label=f"{NAMES[ratio]}, ratio {ratio}") for ratio in NAMES
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    ax.set_xticks(range(len(LOGS_B)), map(power, LOGS_B))
    ax.set_yticks(range(len(LOGS_A)), map(power, LOGS_A))
    ax.set(xlabel="learning rate of B", ylabel="learning rate of A")
    title = f"Loss on sideways digits, held out, after {STEPS} steps; framed: the best"
    ax.set_title(title, **BOLD)


def draw_ratios(ax, losses: np.ndarray) -> None:
    """Draw the loss of some ratios by the rate of A: means, and the range of the runs."""
    for ratio in RATIOS:
        rows, columns = along(ratio)
        ends, color = losses[:, rows, columns, -1], COLORS[ratio]
        ax.plot(LOGS_A[rows], ends.mean(axis=0), color=color, lw=2.5, label=f"ratio {ratio}")
        area = ends.min(axis=0), ends.max(axis=0)
        ax.fill_between(LOGS_A[rows], *area, color=color, alpha=0.15, lw=0)
    ax.set_xticks(LOGS_A[::2], map(power, LOGS_A[::2]))
    ax.set(yscale="log", ylim=(0.15, 3), xlabel="learning rate of A")
    ax.set_title("The same by ratio: means, and the range of the runs", **BOLD)


def draw_curves(ax, losses: np.ndarray) -> None:
    """Draw the loss over the steps, at the best rates."""
    steps = np.arange(1, STEPS // EVERY + 1) * EVERY
    for ratio, name in NAMES.items():
        row, column = best(losses, ratio)
        curves, color = losses[:, row, column], COLORS[ratio]
        label = f"{name}: A {power(LOGS_A[row])}, B {power(LOGS_B[column])}"
        ax.plot(steps, curves.mean(axis=0), color=color, lw=2.5, label=label)
        ax.plot(steps, curves.T, color=color, lw=0.8, alpha=0.5)
    ax.set(yscale="log", xlabel="step")
    ax.set_title("The same over the steps, at the best rates: all runs and means", **BOLD)


def draw(path: Path, losses: np.ndarray, old: Data, new: Data) -> None:
    """Save the picture."""
    figure = Figure(figsize=(14, 8.5), layout="constrained")
    title = "LoRA and LoRA+ at all pairs of learning rates: each is to be judged at its own best"
    figure.suptitle(title, size=14, weight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 6.5), hspace=0.03)
    titles = "What the network reads", "What its adapters learn to read"
    ten = [np.flatnonzero(old.labels == k)[0] for k in range(10)]
    for panel, title, data in zip(top.subfigures(1, 2), titles, (old, new), strict=True):
        draw_images(panel, title, data.images[np.array(ten)])
    left, right = bottom.subfigures(1, 2, width_ratios=(1.2, 1), wspace=0.03)
    draw_map(left, losses)
    upper, lower = right.subplots(2, 1)
    draw_ratios(upper, losses)
    draw_curves(lower, losses)
    for ax in (upper, lower):
        ax.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, labelcolor="linecolor", handlelength=0)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("lora_plus.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    bunch = load_digits()
    upright = (bunch.images / 16).astype(np.float32)
    parts = np.split(np.random.default_rng(options.seed).permutation(len(upright)), [359])
    (old_test, old), (new_test, new) = (
        [
            Data(jnp.array(each[part].reshape(-1, 64)), jnp.array(bunch.target[part]))
            for part in parts
        ]
        for each in (upright, np.rot90(upright, 1, (1, 2)))
    )

    begun, found = [], []
    for seed in range(options.seed, options.seed + options.runs):
        model, rng = Net(nnx.Rngs(seed)), np.random.default_rng(seed)
        rules = lm.Rules([(lm.of_type(model, nnx.LoRAParam), None)])  # adapters wait
        batches = rng.integers(len(old.labels), size=(204, 64))
        params, _ = pretrain(rules, nnx.state(model), old, old_test, batches)
        lm.assert_frozen(nnx.state(model), params, rules)
        begun.append((params, rng.integers(len(new.labels), size=(STEPS, BATCH))))
        found.append(grid(params, new, new_test, begun[-1][1]))
    losses, rates = (np.stack(each) for each in zip(*found, strict=True))

    params, batches = begun[0]
    before = [float(measure(params, *test)[1]) for test in (old_test, new_test)]
    print("Read rightly, held out: {:.1%} upright, {:.1%} sideways".format(*before))
    plan = lm.compile_rules(rules := recipes.lora_plus(params, PLUS), params)
    print(f"\nThe plan of recipes.lora_plus(params, {PLUS}):\n", plan, sep="\n")
    row, column = best(losses, PLUS)
    end, state = ordinary(params, rules, 2.0 ** LOGS_A[row], new, batches)
    alone = bytes_of(optax.adam(1).init(params))
    print(f"\nThe state of Adam: {alone:,} bytes; in lm.wrap: {bytes_of(state):,}")
    check(params, end, rules, old_test.images)
    loss = measure(end, *new_test)[0]
    print(f"\nLoss at the best rates by that recipe, in an nnx.Optimizer: {loss:.4f}")
    print(
        f"Among all pairs, with a ratio known at run time:        {losses[0, row, column, -1]:.4f}"
    )
    report(losses, rates)
    draw(options.output, losses, old_test, new_test)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
