"""Train heads on a frozen trunk whose output is computed once, and compare with the usual way.

A residual network learns to tell the digits 0 to 4 that scikit-learn ships. Then its trunk is
frozen, and new heads learn 5 to 9: a linear probe, and a head of two layers. What a frozen trunk
says of an image never changes. From the loss function and the rules `lrmult.precompute` finds out
where to cut, `lrmult.CachedFeatures` sends all images through the trunk once, and both heads are
trained on what came out. The model is not written twice, and the loss function is that of the usual
way, where the trunk runs at every step: forward only, since `lrmult.wrap` spares it the way back.

Both ways get the same images in the same order, so the loss is the same at every step. The features
are kept in float32, and in half the room in bfloat16, which changes the losses a little.

    python examples/precompute.py [--output precompute.png] [--seed 0] [--epochs 15]

It needs no network, half a minute of two CPU cores, and ``pip install -e '.[examples]'``.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
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

WIDTH, CLASSES, HIDDEN, BATCH, TRAIN, TEST = 48, 5, 64, 64, 704, 192
OLD_EPOCHS, OLD_RATE, RATE = 5, 3e-3, 5e-3
RULES = lm.Rules([("trunk", None)])
PROBE, TWO = "linear probe", "two-layer head"
IMAGES, FEATURES, NARROW = "images", "features", "features in bfloat16"
COLORS = {IMAGES: "#e69f00", FEATURES: "#1f6f8b", NARROW: "#9a5ba5"}
BOLD = {"weight": "bold", "size": 11}

Data = namedtuple("Data", ["images", "labels"])
Run = namedtuple("Run", ["params", "losses", "seconds", "flops"])  # of an epoch, and of a step


class Trunk(nn.Module):
    """Three convolutions at 8 by 8 places and three at 4 by 4, two of each with a way around."""

    @nn.compact
    def __call__(self, images):
        """What it says of each image, in WIDTH numbers."""
        x = images[..., None]
        for stride in (1, 2):
            y = x = nn.Conv(WIDTH, (3, 3), strides=stride)(x)
            for _ in range(2):
                y = nn.Conv(WIDTH, (3, 3))(nn.LayerNorm()(nn.relu(y)))
            x += y
        return nn.LayerNorm(name="norm")(x.mean(axis=(1, 2)))


class Net(nn.Module):
    """The trunk and a head."""

    hidden: int = 0

    @nn.compact
    def __call__(self, images):
        """A logit of each class for each image."""
        x = Trunk(name="trunk")(images)
        if self.hidden:
            x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(CLASSES, name="head")(x)


HEADS = {PROBE: Net(), TWO: Net(HIDDEN)}


def loss_of(net: Net):
    """A loss function, which knows nothing of what is frozen."""

    def loss_fn(params, batch):
        logits = net.apply({"params": params}, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    return loss_fn


class Failing:
    """An array on a disk that fails when so many examples have been read."""

    def __init__(self, array: np.ndarray, left: int):
        self.array, self.left = array, left
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, place):
        """Some examples, if there are any left."""
        found = self.array[place]
        self.left -= len(found)
        if self.left < 0:
            raise OSError("the disk does not answer")
        return found


def some(data: Data, part) -> Data:
    """Some examples."""
    return Data(*(array[part] for array in data))


def parted(data: Data) -> tuple[Data, Data]:
    """What to train on, and what to test with."""
    return some(data, slice(TRAIN)), some(data, slice(TRAIN, TRAIN + TEST))


def fit(loss_fn, rules: lm.Rules, rate: float, params, take, batches: np.ndarray) -> Run:
    """Train on what `take` makes of batches, which are numbers of images by epoch and step."""
    tx = lm.wrap(optax.adam(rate), rules)

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, params)  # what is donated is gone
    state, losses, seconds = tx.init(params), [], []
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, take(batches[0, 0])).compile()
    for epoch in batches:
        begun = time.perf_counter()
        for batch in epoch:
            params, state, loss = step(params, state, take(batch))
            losses.append(loss)
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - begun)
    return Run(params, np.array(losses), np.median(seconds[1:]), step.cost_analysis()["flops"])


def shuffled(epochs: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of images, of shape (epochs, steps, BATCH)."""
    return np.stack([rng.permutation(TRAIN).reshape(-1, BATCH) for _ in range(epochs)])


@functools.partial(jax.jit, static_argnums=0)
def accuracy(net, params, data):
    """The fraction of images that is read rightly."""
    return (net.apply({"params": params}, data.images).argmax(-1) == data.labels).mean()


def pretrained(data: Data, seed: int):
    """The trunk of a network that reads 0 to 4."""
    net = HEADS[PROBE]
    key = jax.random.key(seed, impl="rbg")  # which compiles faster
    params = jax.jit(net.init)(key, data.images[:1])["params"]
    train, test = parted(data)
    batches = shuffled(OLD_EPOCHS, np.random.default_rng(seed))
    run = fit(loss_of(net), lm.Rules([]), OLD_RATE, params, lambda i: some(train, i), batches)
    rate = float(accuracy(net, run.params, test))
    print(f"The digits 0 to 4: {rate:.1%} of {TEST} held-out images are right\n")
    return run.params["trunk"]


@functools.partial(jax.jit, static_argnums=0)
def new_head(net: Net, key):
    """The parameters of a new head. What compiles is no more than that."""
    params = net.init(key, np.zeros((1, 8, 8), np.float32))["params"]
    return {name: part for name, part in params.items() if name != "trunk"}


def computed(split: lm.Precomputed, params, data: Data, folder: Path) -> tuple[dict, float]:
    """The features of a data set by where they are from, and the seconds that it took."""
    begun = time.perf_counter()
    jax.block_until_ready(split.front(params, some(data, slice(BATCH))))
    compiled = time.perf_counter()
    caches = {FEATURES: lm.CachedFeatures(split, params, data)}
    seconds = time.perf_counter() - compiled
    print(f"Those of {TRAIN} images, after {compiled - begun:.1f} s of compiling:\n")
    print(f"{'float32, in memory':24}{caches[FEATURES].nbytes:,} bytes, in {seconds:.2f} s")

    # All images are read twice, for a fingerprint and for the features: this stops half-way there.
    failing = data._replace(images=Failing(data.images, 7 * TRAIN // 4))
    try:
        lm.CachedFeatures(split, params, failing, path=folder, dtype=jnp.bfloat16)
        sys.exit("error: nothing stopped")
    except OSError as error:
        done = json.loads((folder / "features.json").read_text())["done"]
        print(f"{'bfloat16, in files':24}{done} of {TRAIN} images, then a stop: {error}")
    caches[NARROW] = lm.CachedFeatures(split, params, data, path=folder, dtype=jnp.bfloat16)
    for wide, narrow in zip(caches[FEATURES][:], caches[NARROW][:], strict=True):
        if wide.astype(narrow.dtype).tobytes() != narrow.tobytes():
            sys.exit("error: after a stop the features are others")
    size = caches[NARROW].nbytes
    print(f"{'the same once more':24}{size:,} bytes, as if there had been no stop")
    return caches, seconds


def largest(one, other) -> float:
    """The largest difference between two trees of arrays."""
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one, other)
    return float(max(jax.tree.leaves(differences)))


def report(runs: dict, starts: dict, test: Data) -> None:
    """Print what came out."""
    print("\nMFLOP of a step, ms of an epoch, accuracy on images held out, largest differences of")
    print("losses and of weights from those of training on images:\n")
    print(f"{'':24}  MFLOP      ms   faster accuracy   losses  weights")
    for name, net in HEADS.items():
        print(name)
        usual = runs[name, IMAGES]
        for way in COLORS:
            run = runs[name, way]
            lm.assert_frozen(starts[name], run.params, RULES)
            times = f"{usual.seconds / run.seconds:.1f}" if way != IMAGES else ""
            cells = f"{run.flops / 1e6:7.2f}{1000 * run.seconds:8.1f}{times:>8}"
            cells += f"{accuracy(net, run.params, test):9.1%}"
            if way != IMAGES:
                cells += f"{largest(usual.losses, run.losses):9.1g}"
                cells += f"{largest(usual.params, run.params):9.1g}"
            print(f"  {way:22}{cells}")
    print(f"\nIn all {len(runs)} runs the trunk kept every bit.")


def draw_losses(top, bottom, name: str, runs: dict) -> None:
    """Draw losses, and how far those from features are from those from images."""
    usual = runs[name, IMAGES].losses
    epochs = (np.arange(len(usual)) + 1) * BATCH / TRAIN
    top.set_title(f"{name.capitalize()}: loss", **BOLD)
    styles = {
        IMAGES: {"lw": 6, "alpha": 0.45},
        FEATURES: {"lw": 1.8},
        NARROW: {"lw": 1.5, "ls": (0, (1, 2))},
    }
    for way, style in styles.items():
        losses = runs[name, way].losses
        top.semilogy(epochs, losses, color=COLORS[way], label=f"from {way}", **style)
        if way != IMAGES:
            text = f"{way}: {largest(losses, usual):.1g} at most"
            bottom.plot(epochs, losses - usual, color=COLORS[way], lw=1.8, label=text)
    top.legend(frameon=False, loc="upper right")
    top.yaxis.set_major_formatter("{x:g}")
    bottom.set_title("How far from the loss from images", **BOLD)
    bottom.legend(frameon=False, labelcolor="linecolor", handlelength=0, loc="upper left")
    bottom.set(xlabel="epoch", xlim=(0, epochs[-1]))
    bottom.margins(y=0.5)


def draw_bars(ax, title: str, bars: list, text: str) -> None:
    """Draw bars, given as what they are, their color and their length."""
    ax.set_title(title, **BOLD)
    for place, (_, color, length) in enumerate(bars):
        ax.barh(place, length, 0.7, color=color)
        ax.text(length, place, " " + text.format(length), va="center", size=10)
    ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    ax.set(ylim=(len(bars) - 0.5, -0.5), xticks=[])
    ax.margins(x=0.2)
    ax.tick_params(length=0)
    ax.spines["bottom"].set_visible(False)


def draw(path: Path, runs: dict, seconds: float, sizes: dict) -> None:
    """Save the picture."""
    figure = Figure(figsize=(13.5, 7), layout="constrained")
    title = (
        "The frozen trunk runs once, not at every step: the same losses in a fraction of the time"
    )
    figure.suptitle(title, weight="bold", size=14)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1), wspace=0.03)
    charts = left.subplots(2, 2, sharex=True, sharey="row", height_ratios=(2, 1))
    for column, name in zip(charts.T, HEADS, strict=True):
        draw_losses(*column, name, runs)
    times, bytes_ = right.subplots(2, 1, height_ratios=(2, 1))
    bars = [
        (f"{name},\nfrom {way}", COLORS[way], 1000 * runs[name, way].seconds)
        for name in HEADS
        for way in (IMAGES, FEATURES)
    ]
    bars.append(("the features,\ncomputed once", "0.7", 1000 * seconds))
    draw_bars(times, "Time of an epoch", bars, "{:.0f} ms")
    bars = [(way, COLORS[way], size / 1000) for way, size in sizes.items()]
    draw_bars(bytes_, f"Size of {TRAIN} examples", bars, "{:.0f} kB")
    for ax in (*charts.flat, times, bytes_):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("precompute.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    bunch = load_digits()
    order = rng.permutation(len(bunch.target))
    digits = Data(
        (bunch.images[order] / 16).astype(np.float32), bunch.target[order].astype(np.int32)
    )
    trunk = pretrained(some(digits, digits.labels < CLASSES), options.seed)
    digits = some(digits, digits.labels >= CLASSES)
    train, test = parted(digits._replace(labels=digits.labels - CLASSES))

    key = jax.random.key(options.seed + 1)
    starts = {name: new_head(net, key) | {"trunk": trunk} for name, net in HEADS.items()}
    splits = {
        name: lm.precompute(loss_of(net), starts[name], RULES, some(train, slice(BATCH)))
        for name, net in HEADS.items()
    }
    print(lm.compile_rules(RULES, starts[TWO]), splits[TWO], sep="\n\n")
    if splits[PROBE].features != splits[TWO].features:
        sys.exit("error: the linear probe needs other features")
    print("\nThe linear probe needs the same features, so they are computed once for both heads.")

    batches, runs = shuffled(options.epochs, rng), {}
    with tempfile.TemporaryDirectory() as folder:
        caches, seconds = computed(splits[PROBE], starts[PROBE], train, Path(folder) / "features")
        for name, net in HEADS.items():
            ways = {IMAGES: (loss_of(net), lambda batch: some(train, batch))}
            ways |= {way: (splits[name].rest, cache.__getitem__) for way, cache in caches.items()}
            for way, (loss_fn, take) in ways.items():
                runs[name, way] = fit(loss_fn, RULES, RATE, starts[name], take, batches)
    report(runs, starts, test)
    caches[FEATURES].check(runs[PROBE, FEATURES].params)
    other = lm.replace(starts[PROBE], "trunk/Conv_0/bias", np.ones(WIDTH))
    try:
        caches[FEATURES].check(other)
        sys.exit("error: a frozen array was changed, and nobody noticed")
    except lm.FeaturesError as error:
        print(f"When a bias in it is changed by hand:\n{type(error).__name__}: {error}")
    sizes = {IMAGES: sum(array.nbytes for array in train)}
    sizes |= {way: cache.nbytes for way, cache in caches.items()}
    draw(options.output, runs, seconds, sizes)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
