"""A loss function in two: the same values and gradients, and all work ahead that can be."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrmult as lm

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def images(count=6, classes=3):
    return {"image": normal(count, 8, 8, 3), "label": jnp.arange(count) % classes}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def frozen_paths(rules, params, structure=None):
    plan = lm.compile_rules(rules, params, structure=structure)
    return jax.tree.leaves(plan.trainable)


def gradients(function, params, *args):
    """The value of a function, and its gradient, whatever holds the parameters."""

    def scalar(*each):
        found = function(*each)
        return found[0] if isinstance(found, tuple) else found

    if isinstance(params, eqx.Module):
        value, grads = eqx.filter_jit(eqx.filter_value_and_grad(scalar))(params, *args)
        return value, jax.tree.leaves(grads)
    if isinstance(params, nnx.Module):
        value, grads = nnx.jit(nnx.value_and_grad(scalar))(params, *args)
        return value, jax.tree.leaves(grads)
    value, grads = jax.jit(jax.value_and_grad(scalar))(params, *args)
    return value, jax.tree.leaves(grads)


def check(loss_fn, params, rules, batch, *args, structure=None, within=1e-6, split=None):
    """The same values and gradients; what precompute returns."""
    if split is None:
        split = lm.precompute(loss_fn, params, rules, batch, *args, structure=structure)
    features = split.front(params, batch)
    assert [each.shape for each in features] == [each.shape for each in split.features]
    value, wanted = gradients(loss_fn, params, batch, *args)
    ahead, found = gradients(split.rest, params, features, *args)
    np.testing.assert_allclose(ahead, value, rtol=within, atol=within)
    tree = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    tree = eqx.filter(tree, eqx.is_inexact_array) if isinstance(params, eqx.Module) else tree
    trains = jax.tree.leaves(
        lm.compile_rules(lm.optional(rules), tree, structure=structure).trainable
    )
    assert any(trains)
    for one, two, each in zip(found, wanted, trains, strict=True):
        np.testing.assert_allclose(one, two if each else 0 * two, rtol=1e-5, atol=within)
    return split


def sizes(split):
    return sorted(feature.size for feature in split.features)


# Models.


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (8, 16):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(12)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


def cnn():
    variables = CNN().init(KEY, jnp.ones((1, 8, 8, 3)))

    def loss_fn(params, batch):
        logits = CNN().apply({**variables, "params": params}, batch["image"])
        return cross_entropy(logits, batch["label"])

    return loss_fn, variables["params"]


def test_a_convolutional_net():
    loss_fn, params = cnn()
    split = check(loss_fn, params, [("Dense_1", 1), (..., None)], images())
    assert sizes(split) == [4, 12 * 4]
    split = check(loss_fn, params, [("Conv_0", None), ("BatchNorm_0", None)], images())
    assert sizes(split) == [4, 8 * 4 * 4 * 4]  # behind the pooling


class Block(nn.Module):
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(y)))


class ViT(nn.Module):
    depth: int = 3
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, 8)
        x = x + self.param("position", nn.initializers.normal(), x.shape[1:])
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            x = block(name=f"block_{i}")(x)
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


@pytest.mark.parametrize("remat", [False, True])
def test_a_vision_transformer(remat):
    model = ViT(remat=remat)
    params = model.init(KEY, jnp.ones((1, 8, 8, 3)))["params"]

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["image"]), batch["label"])

    rules = [("block[2]", 1), ("LayerNorm_0", 1), ("Dense_0", 1), (..., None)]
    split = check(loss_fn, params, rules, images())
    assert sizes(split) == [4, 4 * 8 * 4]
    check(loss_fn, params, [("block[0]/**/bias", 1), (..., None)], images())
    split = check(loss_fn, params, [("Dense_0", 1), (..., None)], images())
    assert sizes(split) == [4, 8 * 4]


def test_a_residual_net_with_a_skip_across_the_cut():
    params = {name: normal(8, 8, seed=i) / 4 for i, name in enumerate("abcd")}

    def loss_fn(params, batch):
        x = jnp.tanh(batch @ params["a"])
        y = jnp.tanh(x @ params["b"])
        z = jnp.tanh(y @ params["c"]) + x  # around b and c
        return ((z @ params["d"] + batch) ** 2).mean(), z

    split = check(loss_fn, params, [("a", None), ("b", None)], normal(5, 8))
    assert sizes(split) == [32, 32, 32]  # x, y and the batch
    assert "batch" in [feature.origin for feature in split.features]


def test_a_frozen_layer_after_a_trained_one():
    params = {name: normal(8, 8, seed=i) / 4 for i, name in enumerate("abcd")}

    def loss_fn(params, batch):
        for name in "abcd":
            batch = jnp.tanh(batch @ params[name])
        return (batch**2).mean()

    split = check(loss_fn, params, [("{a,b,d}", None)], normal(5, 8))
    assert sizes(split) == [32]
    assert split.split.front_params == [0, 1]


def test_a_tied_embedding():
    params = {"embed": normal(20, 8), "a": normal(8, 8, seed=1), "b": normal(8, 8, seed=2)}

    def loss_fn(params, batch):
        x = jnp.tanh(params["embed"][batch["tokens"]] @ params["a"]) @ params["b"]
        return cross_entropy(x @ params["embed"].T, batch["labels"])

    batch = {"tokens": jnp.arange(12).reshape(3, 4), "labels": jnp.arange(12).reshape(3, 4)[::-1]}
    split = check(loss_fn, params, [("embed", None), ("a", None)], batch)
    assert sizes(split) == [4 * 4, 4 * 8 * 4]
    assert all(feature.shape != (20, 8) for feature in split.features)
    with pytest.warns(UserWarning, match="nothing is gained .* needs 'embed', which trains"):
        split = lm.precompute(loss_fn, params, [("a", None)], batch)
    check(loss_fn, params, [("a", None)], batch, split=split)
    with pytest.warns(UserWarning, match="dot_general in .* needs 'a', which trains"):
        split = lm.precompute(loss_fn, params, [("embed", None)], batch)
    assert sizes(split) == [4 * 4, 4 * 4]  # to look up costs nothing: the tokens are handed on
    check(loss_fn, params, [("embed", None)], batch, split=split)


class NNXModel(nnx.Module):
    def __init__(self, rngs, train=False):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=not train, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=not train, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.head_norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2))
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.head_norm(x))


def of_nnx(model, batch):
    return cross_entropy(model(batch["image"]), batch["label"])


NNX_RULES = [("head", 1), ("head_norm", 1), (..., None)]


def test_an_nnx_module_which_changes():
    model = NNXModel(nnx.Rngs(0))
    split = check(of_nnx, model, NNX_RULES, images())
    assert sizes(split) == [4, 8 * 4]
    one, two = nnx.clone(model), nnx.clone(model)
    of_nnx(one, images())
    split.rest(two, split.front(two, images()))
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (one, two))), strict=True):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert abs(two.head_norm.mean[...] - model.head_norm.mean[...]).max() > 0


def test_an_nnx_state():
    graphdef, state = nnx.split(NNXModel(nnx.Rngs(0)))
    trained, others = nnx.split_state(state, nnx.Param, ...)

    def loss_fn(params, batch):
        return of_nnx(nnx.merge(graphdef, params, others, copy=True), batch)

    split = check(loss_fn, trained, NNX_RULES, images())
    assert sizes(split) == [4, 8 * 4]


class EqxModel(eqx.Module):
    conv: eqx.nn.Conv2d
    layers: list
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=keys[0])
        self.layers = [eqx.nn.Linear(8, 8, key=keys[1]), jax.nn.relu, eqx.nn.LayerNorm(8)]
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(8, 3, key=keys[3])

    def __call__(self, x, key):
        x = jax.nn.relu(self.conv(jnp.moveaxis(x, -1, 0))).mean((1, 2))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x, key=key))


def test_an_equinox_module_and_a_key():
    model = EqxModel(KEY)

    def loss_fn(model, batch, key):
        keys = jax.random.split(key, len(batch["label"]))
        logits = jax.vmap(model)(batch["image"], keys)
        return cross_entropy(logits, batch["label"]), {"logits": logits}

    split = check(loss_fn, model, [("head", 1), (..., None)], images(), jax.random.key(7))
    assert sizes(split) == [4, 8 * 4]  # dropout is behind the cut


def test_haiku():
    def forward(x):
        x = hk.Conv2D(8, 3)(x)
        x = jax.nn.relu(hk.LayerNorm(-1, True, True)(x)).mean((1, 2))
        return hk.Linear(3)(jax.nn.relu(hk.Linear(8)(x)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(KEY, images()["image"])

    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch["image"]), batch["label"])

    split = check(loss_fn, params, [("linear_1", 1), (..., None)], images())
    assert sizes(split) == [4, 8 * 4]
