"""Features of a data set: the same training, kept, served, refused, resumed, out of date."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import lrmult as lm
from lrmult import _feature_files

KEY = jax.random.key(0)
COUNT = 50


def normal(*shape, seed=0):
    return np.asarray(jax.random.normal(jax.random.fold_in(KEY, seed), shape))


def params():
    return {name: jnp.asarray(normal(4, 4, seed=i)) for i, name in enumerate("wuv")}


def loss_fn(params, batch):
    x = jnp.tanh(batch["x"] @ params["w"])
    return ((x @ params["u"] - batch["y"][:, None]) ** 2).mean()


RULES = [("w", None)]


def data(count=COUNT):
    return {"x": normal(count, 4), "y": np.arange(count, dtype=np.float32)}


def split(function=loss_fn, rules=RULES, batch=None, **options):
    batch = batch or jax.tree.map(lambda array: array[:8], data())
    return lm.precompute(function, params(), rules, batch, **options)


def cached(*args, function=loss_fn, **options):
    options.setdefault("progress", False)
    args = args or (split(function), params(), data())
    return lm.CachedFeatures(*args, **options)


def test_training_with_and_without():
    images, labels = load_digits(return_X_y=True)
    digits = {"x": (images[:600] / 16).astype(np.float32), "y": labels[:600].astype(np.int32)}
    model = nn.Sequential(
        [nn.Dense(48), nn.relu, nn.Dense(32), nn.relu, nn.Dense(16), nn.relu, nn.Dense(10)]
    )
    start = model.init(KEY, digits["x"][:1])["params"]
    rules = [("layers_{0,2}", None), ("layers_4", 0.3)]

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    batch = jax.tree.map(lambda array: array[:50], digits)
    ahead = lm.precompute(loss_fn, start, rules, batch)
    features = lm.CachedFeatures(ahead, start, digits, progress=False)
    assert features.nbytes == 600 * (32 * 4 + 4)
    tx = lm.wrap(optax.adamw(3e-3), rules)

    def step(function, params, state, batch):
        grads = jax.grad(function)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for function, take in (
        (loss_fn, lambda numbers: jax.tree.map(lambda array: array[numbers], digits)),
        (ahead.rest, features.__getitem__),
    ):
        compiled = jax.jit(step, static_argnums=0)
        trained, state = start, tx.init(start)
        for epoch in range(20):
            order = np.random.default_rng(epoch).permutation(600).reshape(-1, 50)
            for numbers in order:
                trained, state = compiled(function, trained, state, take(numbers))
        found.append(trained)
    lm.assert_frozen(start, found[1], rules)
    features.check(found[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, found[1])
    assert min(moved["layers_4"]["kernel"], moved["layers_6"]["kernel"]) > 0.05


def test_features_by_number():
    ahead, kept = split(), cached()
    assert len(kept) == COUNT
    for index in ([3, 1, 49, -1], slice(40, 46), np.arange(8), np.array([], int)):
        batch = jax.tree.map(lambda array, index=index: array[index], data())
        if len(batch["y"]):
            wanted = ahead.front(params(), batch)
            for one, two in zip(kept[index], wanted, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
        else:
            assert [len(each) for each in kept[index]] == [0, 0]
    for index in (3, [50], [-51], [0.5], "x", [[1]]):
        with pytest.raises(lm.FeaturesError, match="examples"):
            kept[index]


def test_batches():
    kept = cached()
    labels = [feature.origin for feature in split().features].index("batch/y")

    def seen(*args, **options):
        return [each[labels].tolist() for each in kept.batches(*args, **options)]

    assert seen(20) == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]
    assert seen(20, drop_last=True) == seen(20)[:2]
    assert [len(each) for each in seen(7)] == [7] * 6 + [8]  # not one example alone
    assert [len(each) for each in seen(7, drop_last=True)] == [7] * 7
    assert seen(1) == [[i] for i in range(50)]
    assert seen(100) == [[*range(50)]]
    one, two = seen(20, seed=0), seen(20, seed=1)
    assert one == seen(20, seed=0) != two
    assert sorted(itertools.chain(*one)) == sorted(itertools.chain(*two)) == [*range(50)]
    with pytest.raises(lm.FeaturesError, match="one example at least, not 0"):
        seen(0)


@pytest.mark.parametrize("path", [None, "features"])
def test_narrower_dtypes(path, tmp_path):
    path = path and tmp_path / path
    full, half = cached(), cached(dtype=jnp.bfloat16, path=path)
    assert (full.nbytes, half.nbytes) == (COUNT * 20, COUNT * 12)  # labels stay what they are
    for one, two in zip(full[:5], half[:5], strict=True):
        if one.ndim > 1:
            assert two.dtype == jnp.bfloat16
            np.testing.assert_array_equal(one.astype(jnp.bfloat16), two)
        else:
            assert one.dtype == two.dtype
    value = split().rest(params(), half[:8])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, split().rest(params(), full[:8]), rtol=1e-2)
    with pytest.raises(lm.FeaturesError, match="dtype=int8 holds no floating-point numbers"):
        cached(dtype=jnp.int8)

    def large(params, batch):
        return ((batch["x"] @ params["w"] * 1e6) @ params["u"]).sum()

    with pytest.raises(lm.FeaturesError, match=r"float16 has no numbers as large as .*e\+06"):
        cached(function=large, dtype=jnp.float16)


def test_examples_along_other_axes():
    def loss_fn(params, batch):
        def cell(carry, x):
            return jnp.tanh(x @ params["w"] + carry @ params["w"]), carry

        last, states = jax.lax.scan(cell, jnp.zeros_like(batch["x"][0]), batch["x"])
        flat = jnp.swapaxes(states, 0, 1).reshape(-1, 4) @ params["w"]  # rows of many examples
        pairs = flat.reshape(*last.shape[:1], -1, 4) @ params["u"]
        return ((flat @ params["u"]).mean() + pairs.mean() + last.mean()) * batch["y"].mean()

    whole = {"x": normal(7, COUNT, 4), "y": np.arange(COUNT, dtype=np.float32)}
    batch = {"x": whole["x"][:, :6], "y": whole["y"][:6]}
    ahead = lm.precompute(loss_fn, params(), RULES, batch)
    assert ahead.example_axes == (1, 0)
    kept = lm.CachedFeatures(ahead, params(), whole, progress=False)
    numbers = [5, 30, 2]
    batch = {"x": whole["x"][:, numbers], "y": whole["y"][numbers]}
    np.testing.assert_allclose(
        ahead.rest(params(), kept[numbers]), loss_fn(params(), batch), rtol=1e-5
    )


def test_what_is_the_same_for_all_examples():
    def loss_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])
        scale = jnp.linalg.eigh(params["w"] @ params["w"].T)[0]
        return (x @ params["u"] * scale * batch["table"]).sum()

    batch = {"x": normal(8, 4), "table": normal(4)}
    axes = {"x": 0, "table": None}
    ahead = lm.precompute(loss_fn, params(), RULES, batch, batch_axis=axes)
    whole = {"x": normal(COUNT, 4), "table": batch["table"]}
    kept = lm.CachedFeatures(ahead, params(), whole, progress=False)
    np.testing.assert_allclose(
        ahead.rest(params(), kept[:8]), loss_fn(params(), {**batch, "x": whole["x"][:8]}), rtol=1e-5
    )
    assert str(ahead).count(" 16 in all") == 2


# What is refused.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.middle = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.middle(self.dropout(self.norm(self.linear(x)))))


def of_net(model, batch):
    return (model(batch["x"]) ** 2).mean()


def test_modules_in_training_mode_are_refused():
    batch = {"x": normal(8, 4)}
    rules = [("head", 1), (..., None)]

    def make(model):
        ahead = lm.precompute(of_net, model, rules, batch)
        return lm.CachedFeatures(ahead, model, {"x": normal(20, 4)}, progress=False)

    model = Net(nnx.Rngs(0))
    with pytest.raises(
        lm.FeaturesError, match=r"does not train, but is behind random numbers.*deterministic=True"
    ):
        make(model)
    model.dropout.deterministic = True
    with pytest.raises(
        lm.FeaturesError, match=r"mixes the examples .*as in batch normalization in"
    ):
        make(model)
    model.eval()
    assert len(make(model)) == 20


def middle(change):
    """A loss function in whose frozen part something is changed."""

    def loss_fn(params, batch):
        x = jnp.tanh(change(jnp.tanh(batch["x"] @ params["w"])) @ params["w"])
        return (x @ params["u"]).sum() + batch["y"].sum()

    return loss_fn


def dropout(x):
    return x * jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)


def of_batch_key(params, batch):
    x = batch["x"] + jax.random.normal(batch["key"], batch["x"].shape)
    return (jnp.tanh(x @ params["w"]) @ params["u"]).sum()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dropout, r"draws random numbers \(.*have dropout and augmentation left out"),
        (lambda x: (x - x.mean(0)) / x.std(0), r"mixes the examples of a batch \(reduce_sum"),
        (lambda x: jax.nn.softmax(x @ x.T) @ x, r"mixes the examples of a batch \(dot_general"),
        (lambda x: jnp.cumsum(x, 0), r"mixes the examples of a batch \(cumsum"),
        (lambda x: x[::-1] + x, r"mixes the examples of a batch \(rev"),
        (lambda x: x[jnp.argsort(x[:, 0])], r"mixes the examples of a batch \(sort"),
        (lambda x: x + jnp.roll(x, 1, 0), "mixes the examples|hang on its place"),
        (lambda x: x * jnp.arange(len(x))[:, None], "hang on its place in the batch"),
        (
            lambda x: jax.lax.map(lambda each: jnp.sin(each @ each), x)[:, None] * x[:1],
            "mixes the examples",
        ),
        (
            lambda x: jax.experimental.io_callback(lambda y: y, jax.typeof(x), x),
            "has an effect on the host",
        ),
        (
            lambda x: jax.lax.scan(lambda c, r: (0.5 * c + r, 0.5 * c + r), x[0], x)[1],
            "mixes the examples",
        ),
        (lambda x: jnp.fft.fft(x, axis=0).real, "mixes the examples|hang on its place"),
        (lambda x: jnp.sort(x) / len(x), "mixes the examples"),  # other numbers in other batches
        (lambda x: jnp.maximum(x, 1.0 * (x.max() > 3)), "mixes the examples"),
    ],
)
def test_features_that_would_not_stay_are_refused(change, match):
    with pytest.raises(lm.FeaturesError, match=match):
        cached(function=middle(change))


def test_a_key_is_refused_wherever_it_comes_from():
    batch = {"x": normal(8, 4), "key": jax.random.key(0)}
    whole = {**batch, "x": normal(COUNT, 4)}
    ahead = lm.precompute(of_batch_key, params(), RULES, batch)
    with pytest.raises(lm.FeaturesError, match="draws random numbers from a seed in the batch"):
        lm.CachedFeatures(ahead, params(), whole, progress=False)

    def behind(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"]) @ params["u"]
        return (x * jax.random.normal(batch["key"], x.shape)).sum()

    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        batch, axes = {"x": batch["x"], "key": key}, {"x": 0, "key": None}
        ahead = lm.precompute(behind, params(), RULES, batch, batch_axis=axes)
        with pytest.raises(lm.FeaturesError, match="same whenever the example is seen; leave it"):
            lm.CachedFeatures(ahead, params(), {**whole, "key": key}, progress=False)

    def of_key(params, batch, key):
        return of_batch_key(params, {**batch, "key": key})

    x = {"x": batch["x"]}
    with pytest.warns(UserWarning, match=r"needs a further argument of loss_fn .a random key"):
        ahead = lm.precompute(of_key, params(), RULES, x, jax.random.key(0))
    with pytest.raises(
        lm.FeaturesError, match=r"needs a further argument of loss_fn .a random key"
    ):
        lm.CachedFeatures(ahead, params(), {"x": whole["x"]}, progress=False)


def test_constants_may_be_random():
    def project(x):
        return jnp.cos(x @ jax.random.normal(jax.random.key(1), (4, 4)))

    assert len(cached(function=middle(project))) == COUNT


def test_dropout_in_the_head_is_no_obstacle():
    class Headed(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(4, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(jnp.tanh(self.trunk(x))))

    model = Headed(nnx.Rngs(0))
    ahead = lm.precompute(of_net, model, [("head", 1), (..., None)], {"x": normal(8, 4)})
    kept = lm.CachedFeatures(ahead, model, {"x": normal(20, 4)}, progress=False)
    one, two = (float(ahead.rest(model, kept[:8])) for _ in range(2))
    assert one != two


def test_a_choice_by_the_batch():
    """The branch is chosen by a mean over the batch, so what a branch computes is no feature."""

    def loss_fn(params, batch):
        one, other = (lambda x, name=name: jnp.tanh(x @ params[name]) for name in "wu")
        x = jax.lax.cond(batch["y"].mean() > 20, one, other, batch["x"])
        return (x @ params["v"]).sum()

    ahead = split(loss_fn, [("{w,u}", None)])
    try:
        kept = cached(ahead, params(), data())
    except lm.FeaturesError:
        return
    for numbers in (slice(0, 8), slice(40, 48)):
        batch = jax.tree.map(lambda array, numbers=numbers: array[numbers], data())
        value = loss_fn(params(), batch)
        np.testing.assert_allclose(ahead.rest(params(), kept[numbers]), value, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_views_and_micro_batches(count):
    """Where rows of examples are interleaved, the cut is where they are not."""

    def loss_fn(params, batch):
        both = jnp.concatenate([batch["x"], 2 * batch["x"]])  # two views
        one, two = jnp.split(jnp.tanh(both @ params["w"]), 2)
        parts = jnp.tanh(batch["x"] @ params["w"]).reshape(-1, 1, 4)
        _, ys = jax.lax.scan(lambda c, x: (c, jnp.sin(x @ params["u"])), 0.0, parts)
        return ((one - two) @ params["u"]).sum() + ys.sum() + batch["y"].sum()

    batch = jax.tree.map(lambda array: array[:8], data())
    ahead = split(loss_fn, batch=batch)
    kept = cached(ahead, params(), data(), batch_size=count)
    numbers = [4, 30, 2, 9]
    batch = jax.tree.map(lambda array: array[np.array(numbers)], data())
    value = loss_fn(params(), batch)
    np.testing.assert_allclose(ahead.rest(params(), kept[numbers]), value, rtol=1e-4)


def test_each_example_may_be_a_loop():
    assert len(cached(function=middle(lambda x: jax.lax.map(jnp.sin, x)))) == COUNT


def test_batch_norm_behind_the_cut_is_no_obstacle():
    def loss_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])
        x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
        return ((x @ params["u"]) ** 3).sum() / batch["y"].sum()

    kept = cached(function=loss_fn)
    batch = jax.tree.map(lambda array: array[5:25], data())
    np.testing.assert_allclose(
        split(loss_fn).rest(params(), kept[5:25]), loss_fn(params(), batch), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["x"], "structured like .* not like the batch"),
        (lambda d: {**d, "x": d["x"][:, :3]}, r"'x' of the data is float32\[50,3\], .*\[8,4\]"),
        (lambda d: {**d, "x": d["x"].astype(int)}, r"'x' of the data is int64\[50,4\]"),
        (lambda d: {**d, "x": d["x"][:20]}, "not one number of examples: 20 in 'x', 50 in 'y'"),
        (lambda d: jax.tree.map(lambda a: a[:0], d), "not one number of examples: 0 in 'x'"),
    ],
)
def test_data_that_is_not_like_the_batch(change, match):
    with pytest.raises(lm.FeaturesError, match=match):
        cached(split(), params(), change(data()))


def test_unknown_axes():
    def fixed(params, batch):
        return loss_fn(params, batch) + jnp.zeros(8) @ batch["y"]

    with pytest.raises(lm.FeaturesError, match="does other things with 16 of them than with 8"):
        cached(function=fixed)
    ahead = lm.precompute(
        lambda params, batch: (batch[0] @ params["w"] @ params["u"]).sum() * batch[1].sum(),
        params(),
        RULES,
        (jnp.ones((5, 4)), jnp.ones(3)),
    )
    with pytest.raises(lm.FeaturesError, match=r"not clear along which axis .* pass batch_axis="):
        cached(ahead, params(), (jnp.ones((5, 4)), jnp.ones(3)))


# Files.


def test_files_are_mapped_and_found_again(tmp_path):
    path = tmp_path / "a" / "b"
    kept = cached(path=path)
    assert sorted(file.name for file in path.iterdir()) == ["0.npy", "1.npy", "features.json"]
    for i, array in enumerate(cached()[:]):
        np.testing.assert_array_equal(np.load(path / f"{i}.npy"), array)
    assert isinstance(kept._arrays[0], np.memmap)

    class Gone:
        def __getattr__(self, name):
            raise AssertionError

    ahead = split()
    assert ahead.front(params(), jax.tree.map(lambda array: array[:8], data()))
    calls = []
    ahead.front = lambda *args: calls.append(args) or split().front(*args)
    again = lm.CachedFeatures(ahead, params(), data(), path=path, progress=False)
    assert len(calls) == 2  # the trial alone
    np.testing.assert_array_equal(again[:][0], kept[:][0])


class Stops:
    """An array that breaks off where it is read at some place."""

    def __init__(self, array, at):
        self.array, self.at = array, at
        self.shape, self.dtype = array.shape, array.dtype
        self.reads = []

    def __getitem__(self, index):
        start = index[0].start
        if self.at is not None and start >= self.at and len(self.reads) > 17:  # a look at all
            raise KeyboardInterrupt
        self.reads.append(start)
        return self.array[index]


def test_a_stop_half_way(tmp_path):
    whole = data()
    stops = {**whole, "x": Stops(whole["x"], 32)}
    with pytest.raises(KeyboardInterrupt):
        cached(split(), params(), stops, path=tmp_path / "f")
    done = json.loads((tmp_path / "f" / "features.json").read_text())["done"]
    assert 0 < done < 32
    goes_on = {**whole, "x": Stops(whole["x"], None)}
    kept = cached(split(), params(), goes_on, path=tmp_path / "f")
    assert goes_on["x"].reads[16:] == [0, *range(done, 50, 8)]  # after a trial, and a look at all
    for one, two in zip(kept[:], cached()[:], strict=True):
        np.testing.assert_array_equal(one, two)


KILLED = """
    import os, signal, sys, time
    import jax, numpy as np
    sys.path.insert(0, {root!r})
    from tests import test_features as here
    import lrmult as lm

    class Slow(here.Stops):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    whole = here.data(400)
    whole["x"] = Slow(whole["x"], None)
    here.cached(here.split(), here.params(), whole, path=sys.argv[1], batch_size=2)
"""


def test_a_killed_process(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path, note = tmp_path / "f", tmp_path / "f" / "features.json"
    code = textwrap.dedent(KILLED.format(root=root))
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        while process.poll() is None and not (
            note.exists() and json.loads(note.read_text())["done"]
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert 0 < json.loads(note.read_text())["done"] < 400
    kept = cached(split(), params(), data(400), path=path, batch_size=2)
    for one, two in zip(kept[:], cached(split(), params(), data(400))[:], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_out_of_date():
    kept = cached()
    kept.check(params())
    kept.check({**params(), "u": params()["w"]})  # what trains may change
    with pytest.raises(lm.FeaturesError, match="out of date: 'w' changed since they were"):
        kept.check({**params(), "w": params()["w"] + 1e-7})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: (split(), {**params(), "w": params()["u"]}, data()), r"other frozen .*\('w'\)"),
        (lambda: (split(), params(), {**data(), "y": -data()["y"]}), "features of other data"),
        (lambda: (split(), params(), data(60)), "features of other data"),
        (lambda: (split(middle(jnp.sin)), params(), data()), "another frozen part"),
        (lambda: (split(middle(lambda x: 2 * x)), params(), data()), "another frozen part"),
        (lambda: (split(rules=[("{w,u}", None)]), params(), data()), "another frozen part"),
    ],
)
def test_files_of_something_else(change, match, tmp_path):
    path = tmp_path / "f"
    cached(
        split(middle(lambda x: 3 * x)) if "part" in match else split(), params(), data(), path=path
    )
    with pytest.raises(lm.FeaturesError, match=match):
        cached(*change(), path=path)
    with pytest.raises(lm.FeaturesError, match=r"in another dtype|another frozen part"):
        cached(path=path, dtype=jnp.bfloat16)


def test_files_for_another_head(tmp_path):
    def another(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])
        return ((x @ params["hidden"] @ params["u"] - batch["y"][:, None]) ** 2).mean()

    more = {**params(), "hidden": params()["u"]}
    batch = jax.tree.map(lambda array: array[:8], data())
    ahead = lm.precompute(another, more, RULES, batch)
    kept = cached(path=tmp_path / "f")
    again = lm.CachedFeatures(ahead, more, data(), path=tmp_path / "f", progress=False)
    np.testing.assert_array_equal(again[:][1], kept[:][1])
    kept.check(more)
    with pytest.raises(lm.FeaturesError, match="'w' changed since they were computed"):
        kept.check({"u": more["u"]})


def damage_note(path):
    (path / "features.json").write_text('{"done": ')


def damage_array(path):
    (path / "0.npy").write_bytes(b"no array")


def shorten(path):
    with open(path / "1.npy", "r+b") as file:
        file.truncate(150)


def other_array(path):
    np.save(path / "0.npy", np.ones(3))


def lost(path):
    (path / "1.npy").unlink()


def no_note(path):
    (path / "features.json").unlink()


@pytest.mark.parametrize("size", [4, 16])
def test_files_are_found_with_other_batch_sizes(size, tmp_path):
    kept = cached(path=tmp_path / "f")
    batch = jax.tree.map(lambda array: array[:size], data())
    again = cached(split(batch=batch), params(), data(), path=tmp_path / "f", batch_size=size)
    np.testing.assert_array_equal(again[:][0], kept[:][0])


@pytest.mark.parametrize("loop", ["scan", "fori", "switch"])
def test_constants_within_loops_are_part_of_the_front(loop, tmp_path):
    def using(constant):
        inner = jax.jit(lambda x: jnp.tanh(x @ constant))

        def change(x):
            if loop == "scan":
                return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0]
            if loop == "fori":
                return jax.lax.fori_loop(0, 2, lambda _, c: inner(c), x)
            return jax.lax.switch(1, [jnp.sin, inner], x)

        return split(middle(change))

    one, two = normal(4, 4, seed=7), normal(4, 4, seed=8)
    cached(using(one), params(), data(), path=tmp_path / "f")
    cached(using(one), params(), data(), path=tmp_path / "f")
    with pytest.raises(lm.FeaturesError, match="another frozen part"):
        cached(using(two), params(), data(), path=tmp_path / "f")


def test_complete_files_are_only_read(tmp_path):
    path = tmp_path / "f"
    cached(path=path)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    kept = cached(path=path)
    assert not kept._arrays[0].flags.writeable
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_a_process_that_starts_in_between(tmp_path, monkeypatch):
    """One that found no files yet does not clear those that another has filled since."""
    path = tmp_path / "f"
    make_room = _feature_files.FeatureFiles._make_room

    def meanwhile(self, size):
        monkeypatch.undo()
        make_room(self, size)
        cached(path=path)

    monkeypatch.setattr(_feature_files.FeatureFiles, "_make_room", meanwhile)
    found = cached(path=path)
    np.testing.assert_array_equal(found[:][0], cached()[:][0])


def test_stopped_before_the_first_array(tmp_path):
    path = tmp_path / "f"
    cached(path=path)
    note = json.loads((path / "features.json").read_text())
    (path / "features.json").write_text(json.dumps(note | {"done": 0}))
    (path / "1.npy").unlink()
    np.testing.assert_array_equal(cached(path=path)[:][1], cached()[:][1])


def test_numbers_that_a_dtype_cannot_hold():
    def small(params, batch):
        return ((batch["x"] @ params["w"] * 1e-9) @ params["u"]).sum()

    with pytest.raises(lm.FeaturesError, match="would become zero in float16"):
        cached(function=small, dtype=jnp.float16)
    for size in (0, -4):
        with pytest.raises(lm.FeaturesError, match="one example at least"):
            cached(batch_size=size)
    assert len(list(cached(split(), params(), data(1)).batches(8))) == 1


def test_a_number_among_the_parameters():
    some = {**params(), "gain": 2.0}

    def loss_fn(params, batch):
        x = jnp.cumsum(jnp.tanh(batch["x"] @ params["w"]) * params["gain"], 1)
        return (x @ params["u"]).sum()

    batch = {"x": normal(8, 4)}
    for rules in (RULES, [("{w,gain}", None)]):
        ahead = lm.precompute(loss_fn, some, rules, batch)
        features = ahead.front(some, batch)
        for rest in (ahead.rest, jax.jit(ahead.rest)):
            np.testing.assert_allclose(rest(some, features), loss_fn(some, batch), rtol=1e-5)
    kept = lm.CachedFeatures(ahead, some, {"x": normal(COUNT, 4)}, progress=False)
    with pytest.raises(lm.FeaturesError, match="'gain' changed"):
        kept.check({**some, "gain": 3.0})


@pytest.mark.parametrize("damage", [damage_note, damage_array, shorten, other_array, lost, no_note])
def test_damaged_files(damage, tmp_path):
    path = tmp_path / "f"
    cached(path=path)
    damage(path)
    with pytest.raises(lm.FeaturesError, match=r"remove .* to begin anew|something else than"):
        cached(path=path)
    assert path.exists()  # bad input loses nothing


def test_a_place_for_files(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(lm.FeaturesError, match="something else than features"):
            cached(path=path)
    with pytest.raises(lm.FeaturesError, match="cannot be made"):
        cached(path=tmp_path / "file" / "below")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(lm.FeaturesError, match=r"the features take 1 kB, but .* has 100 B left"):
        cached(path=tmp_path / "f")
    assert not any((tmp_path / "f").iterdir())


def test_the_size_is_told_beforehand(capsys):
    cached(progress=True)
    error = capsys.readouterr().err
    assert error.startswith("lrmult.CachedFeatures of 50 examples, 1 kB in memory\n")
    assert "50/50" in error
    cached()
    assert capsys.readouterr() == ("", "")
