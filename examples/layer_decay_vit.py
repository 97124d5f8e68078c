"""Fine-tune a small vision transformer with a rate for each layer, and see what that does.

A transformer of six blocks learns from the digits 0 to 4 that scikit-learn ships, turned and
mirrored in all eight ways: it tells which digit it sees, and which way. Then it gets a new head and
a new token, and learns to read 5 to 9 from ten images of each: with one learning rate for all; with
layer decay, where each layer learns at 0.75 of the rate of the layer above it; and as a linear
probe, where the head alone learns. A transformer of random numbers learns the same, to see what the
first task was worth. All get the same images, batches and learning rates.

In the end it reads ``rules.toml``, which has a rule of each kind for this model, prints what they
do, and saves the model. Of the saved file the command line tells the same, as below.

    python examples/layer_decay_vit.py [--output layer_decay_vit.png] [--checkpoint vit.npz]
                                       [--seed 0] [--runs 5]
    lrmult explain vit.npz --rules examples/rules.toml

It needs no network, one to two minutes of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import functools
import re
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import lrmult as lm
from lrmult import recipes

BLOCKS, WIDTH, HEADS = 6, 32, 4
TOP, DECAY = BLOCKS + 1, 0.75  # depth 0 is what blocks read, 7 what reads the last of them
CLASSES, TURNS, SHOTS = 5, 8, 10
PRETRAIN, PRETRAIN_RATE = (400, 64), 0.003  # the numbers of steps, and of images in a batch
STEPS = (80, 25)
RATES, SAME = (0.003, 0.01, 0.03, 0.1), 0.01  # at one of them movements are compared

DECAYED, PLAIN, PROBE, SCRATCH = "layer decay", "one rate", "linear probe", "from random numbers"
COLORS = {DECAYED: "#1f6f8b", PLAIN: "#d55e00", PROBE: "#9a5ba5", SCRATCH: "0.55"}
BOLD = {"weight": "bold", "size": 11}

Data = namedtuple("Data", ["images", "labels"])
Run = namedtuple("Run", ["start", "end", "accuracy"])


class Block(nn.Module):
    """Attention and two layers, each with a norm before it and a way around it."""

    @nn.compact
    def __call__(self, x):
        """Tokens of shape (batch, tokens, WIDTH)."""
        x += nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm(name="norm1")(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class ViT(nn.Module):
    """A vision transformer, whose head reads the token of the task."""

    classes: int
    task: int

    @nn.compact
    def __call__(self, images):
        """Logits for images of 8 by 8 pixels, which are cut into eight patches of 2 by 4."""
        patches = images.reshape(-1, 4, 2, 2, 4).swapaxes(2, 3).reshape(-1, 8, 8)
        x = nn.Dense(WIDTH, name="patch")(patches)
        token = nn.Embed(2, WIDTH, name="tokens")(jnp.full((len(x), 1), self.task))
        x = jnp.concatenate([token, x], axis=1)
        x += self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(BLOCKS):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x[:, 0]))


OLD, NEW = ViT(CLASSES * TURNS, task=0), ViT(CLASSES, task=1)
ONE = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)  # an image


def random(model: ViT, seed: int) -> dict:
    """The parameters of a new model."""
    return model.lazy_init(jax.random.key(seed), ONE)["params"]


@functools.partial(jax.jit, static_argnames="model")
def accuracy(model, params, data):
    """The fraction of images that is read rightly."""
    return (model.apply({"params": params}, data.images).argmax(-1) == data.labels).mean()


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def fit(model, rules, params, rate, data, batches):
    """Train on batches, given as numbers of images."""
    shape = optax.warmup_cosine_decay_schedule(0, 1, len(batches) // 10, len(batches))
    tx = lm.wrap(optax.adamw(lambda step: rate * shape(step), weight_decay=0.05), rules)

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, data.images[batch], data.labels[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def turned(images: np.ndarray) -> np.ndarray:
    """Images in all eight ways: turned by 0, 90, 180, 270 degrees, and mirrored and turned."""
    ways = [np.rot90(one, k, (1, 2)) for one in (images, images[:, :, ::-1]) for k in range(4)]
    return np.concatenate(ways)


def pretrained(data: Data, seed: int) -> dict:
    """A model that tells the digits 0 to 4 and which way they are turned."""
    steps, size = PRETRAIN
    labels = data.labels + CLASSES * np.arange(TURNS)[:, None]
    data, rng = Data(turned(data.images), labels.ravel()), np.random.default_rng(seed)
    halves = np.split(rng.permutation(len(data.labels)), [len(data.labels) // 10])
    test, train = (Data(*(array[part] for array in data)) for part in halves)
    batches = rng.integers(len(train.labels), size=(steps, size))
    params = fit(OLD, lm.Rules([]), random(OLD, seed), PRETRAIN_RATE, train, batches)
    rate = float(accuracy(OLD, params, test))
    print(f"Which digit, and which way: {rate:.1%} of {len(test.labels)} held-out images are right")
    return params


def beginning(params: dict, seed: int) -> dict:
    """A model that is to learn the new task: with a new head, and a token copied from the old."""
    token = lm.extract(params, lm.rows("tokens/embedding", 0))
    params = lm.replace(params, lm.rows("tokens/embedding", 1), token)
    head = nn.Dense(CLASSES).init(jax.random.key(seed), jnp.zeros((1, WIDTH)))["params"]
    return params | {"head": head}


def tune(way: str, rules: lm.Rules, params: dict, data: Data, seeds: range) -> dict:
    """Learn the new task in one of the ways: by learning rate, a run for each seed."""
    steps, size = STEPS
    found = {rate: [] for rate in RATES}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        each = [rng.permutation(np.flatnonzero(data.labels == k)) for k in range(CLASSES)]
        train, test = (
            Data(*(array[np.concatenate([one[part] for one in each])] for array in data))
            for part in (slice(SHOTS), slice(SHOTS, None))
        )
        batches = np.stack([rng.permutation(len(train.labels))[:size] for _ in range(steps)])
        start = random(NEW, seed) if way == SCRATCH else beginning(params, seed)
        for rate in RATES:
            end = fit(NEW, rules, start, rate, train, batches)
            lm.assert_frozen(start, end, rules)
            found[rate].append(Run(start, end, float(accuracy(NEW, end, test))))
    return found


def formula(path: str) -> float:
    """The multiplier of layer decay, worked out by hand: 0.75 for each layer above."""
    block = re.match(r"block_(\d+)/", path)
    depth = int(block[1]) + 1 if block else TOP if path.startswith(("norm/", "head/")) else 0
    return DECAY ** (TOP - depth)


def check(plan: lm.Plan) -> None:
    """End the program unless each array has the multiplier that the formula gives."""
    for leaf in plan.leaves:
        if leaf.multiplier != formula(leaf.path):
            sys.exit(f"error: {leaf.path} has {leaf.multiplier}, not {formula(leaf.path)}")
    print(f"\nAll {len(plan.leaves)} multipliers are {DECAY} to the power of the layers above.")


def moved(run: Run, targets: list) -> float:
    """How far some arrays moved, in their own length."""
    before, after = (
        np.concatenate([np.ravel(x) for t in targets for x in jax.tree.leaves(lm.extract(tree, t))])
        for tree in (run.start, run.end)
    )
    return np.linalg.norm(after - before) / np.linalg.norm(before)


def report(runs: dict, depths: list, far: dict) -> None:
    """Print what came out."""
    count = len(far[PLAIN])
    print(f"\nAccuracy on 5 to 9, held out, means of {count} runs (lowest - highest):\n")
    print(f"{'learning rate':18}" + "".join(f"{rate:>23}" for rate in RATES))
    best = {}
    for way, found in runs.items():
        rates = [[run.accuracy for run in each] for each in found.values()]
        cells = [f"{np.mean(each):.1%} ({min(each):.1%} - {max(each):.1%})" for each in rates]
        print(f"{way:18}" + "".join(f"{cell:>23}" for cell in cells))
        best[way] = 100 * np.array(max(rates, key=np.mean))
    print("\nEach at its best rate less one rate for all at its best, in points, in pairs that")
    print("learn from the same images, with standard errors:")
    for way in (DECAYED, PROBE, SCRATCH):
        pairs = best[way] - best[PLAIN]
        print(f"  {way:18}{pairs.mean():+6.1f} +- {pairs.std(ddof=1) / count**0.5:.1f}")
    print(f"\nHow far each depth moved at the rate {SAME}, in its own length:\n")
    print(f"{'':32}{'multiplier':>10}{PLAIN:>18}{DECAYED:>13}{'quotient':>10}")
    for depth in reversed(range(len(depths))):
        free, held = (far[way][:, depth].mean() for way in (PLAIN, DECAYED))
        numbers = f"{DECAY ** (TOP - depth):10.3f}{free:18.3f}{held:13.3f}{held / free:10.2f}"
        print(f"{depth}: {', '.join(depths[depth]):29}{numbers}")


def draw_images(panel, title: str, images: np.ndarray) -> None:
    """Draw images in a row."""
    panel.suptitle(title, **BOLD)
    for ax, image in zip(panel.subplots(1, len(images)), images, strict=True):
        ax.imshow(image, "Greys")
        ax.set_axis_off()


def draw_depths(left, right, depths: list, far: dict) -> None:
    """Draw the multiplier of each depth, and how far it moved."""
    places = np.arange(len(depths))
    left.barh(places, DECAY ** (TOP - places), 0.7, color=COLORS[DECAYED])
    for place in places:
        scale = DECAY ** (TOP - place)
        left.text(scale + 0.03, place, f"{scale:.3f}", va="center", color=COLORS[DECAYED])
    left.set_yticks(places, [",\n".join(targets) for targets in depths])
    right.set_yticks(places, [""] * len(places))
    left.set(xlim=(0, 1.25), xticks=[])
    left.set_title(f"Multiplier: {DECAY} to the\npower of the layers above", **BOLD)
    for way, runs in far.items():
        right.plot(runs.T, places, "o", color=COLORS[way], alpha=0.35, ms=5, mew=0)
        right.plot(runs.mean(axis=0), places, color=COLORS[way], lw=2.5, label=way)
    ticks = [0.02, 0.05, 0.1, 0.2, 0.4]
    right.set(xscale="log", xlim=(0.02, 0.5), ylim=left.get_ylim())
    right.set_xticks(ticks, map(str, ticks))
    right.minorticks_off()
    right.set_title(f"How far it moved, in its own\nlength, at the rate {SAME}", **BOLD)
    right.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="upper left")


def draw_accuracy(ax, runs: dict) -> None:
    """Draw the accuracy of all runs by learning rate."""
    for way, found in runs.items():
        rates = 100 * np.array([[run.accuracy for run in each] for each in found.values()])
        ax.plot(RATES, rates, "o", color=COLORS[way], alpha=0.35, ms=5, mew=0)
        ax.plot(RATES, rates.mean(axis=1), color=COLORS[way], lw=2.5, label=way)
    ax.set(xscale="log", xlabel="learning rate", ylabel="%", ylim=(0, 100))
    ax.set_xticks(RATES, map(str, RATES))
    ax.minorticks_off()
    ax.set_title(f"Accuracy on 5 to 9, held out: {len(found[SAME])} runs and their mean", **BOLD)
    ax.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="lower left")


def draw(path: Path, runs: dict, depths: list, far: dict, data: list[Data], plan: lm.Plan) -> None:
    """Save the picture."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    title = "Layer decay in a vision transformer: the lower a layer, the less it moves"
    figure.suptitle(title, size=14, weight="bold")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 6), hspace=0.03)
    first, then = top.subfigures(1, 2, width_ratios=(TURNS, CLASSES))
    (old, labels), new = data[0], data[1]
    draw_images(first, "First: which of 0 to 4 is it, and which way?", turned(old[labels == 4][:1]))
    each = [np.flatnonzero(new.labels == k)[0] for k in range(CLASSES)]
    draw_images(then, f"Then: 5 to 9, from {SHOTS} images of each", new.images[each])
    left, middle, right = bottom.subfigures(1, 3, width_ratios=(1.2, 0.85, 1.05), wspace=0.03)
    draw_depths(*left.subplots(1, 2), depths, far)
    draw_accuracy(middle.subplots(), runs)
    ax = plan.plot(steps=STEPS[0], ax=right.subplots())
    ax.set_title("What rules.toml says of it, by step", loc="left", **BOLD)
    ax.set_xlabel("step", loc="left")
    for ax in (*left.axes, *middle.axes):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("layer_decay_vit.png"))
    parser.add_argument("--checkpoint", type=Path, help="by default, in a new temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    bunch = load_digits()
    old, images = bunch.target < CLASSES, (bunch.images / 16).astype(np.float32)
    data = [Data(images[part], bunch.target[part] % CLASSES) for part in (old, ~old)]
    model = pretrained(data[0], options.seed)
    params = beginning(model, options.seed)

    below, above = [["patch", "tokens", "position"]], [["norm", "head"]]
    depths = recipes.depths(params, "block", below=below, above=above)
    ways = {
        DECAYED: recipes.layer_decay(params, DECAY, depths),
        PLAIN: lm.Rules([]),
        PROBE: recipes.linear_probe(params, "head"),
        SCRATCH: lm.Rules([]),
    }
    print("\nThe plan of layer decay:\n", plan := lm.compile_rules(ways[DECAYED], params), sep="\n")
    check(plan)
    seeds = range(options.seed, options.seed + options.runs)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda way: tune(way, ways[way], model, data[1], seeds), ways)
        runs = dict(zip(ways, found, strict=True))
    far = {
        way: np.array([[moved(run, each) for each in depths] for run in runs[way][SAME]])
        for way in (PLAIN, DECAYED)
    }
    report(runs, depths, far)

    file = Path(__file__).with_name("rules.toml")
    structure = lm.structure_of(NEW, jax.random.key(0), np.zeros(ONE.shape, ONE.dtype))
    plan = lm.compile_rules(lm.load_rules(file, params), params, structure=structure)
    print("\nThe plan of rules.toml:\n", plan, sep="\n")
    checkpoint = options.checkpoint or Path(tempfile.mkdtemp(), "vit.npz")
    np.savez(checkpoint, **lm.extract(params, "**"))
    print(f"\nThe same is shown by: lrmult explain {checkpoint} --rules {file}")
    draw(options.output, runs, depths, far, data, plan)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
