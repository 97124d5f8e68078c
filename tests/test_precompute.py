"""A loss function in two: the same values and gradients, and all work ahead that can be."""

import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lrmult as lm
from tests.test_reference import cases

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
    variables = jax.jit(CNN().init)(KEY, jnp.ones((1, 8, 8, 3)))

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
    depth: int = 2
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
    params = jax.jit(model.init)(KEY, jnp.ones((1, 8, 8, 3)))["params"]

    def loss_fn(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["image"]), batch["label"])

    rules = [("block[1]", 1), ("LayerNorm_0", 1), ("Dense_0", 1), (..., None)]
    split = check(loss_fn, params, rules, images())
    assert sizes(split) == [4, 4 * 8 * 4]
    split = lm.precompute(loss_fn, params, [("Dense_0", 1), (..., None)], images())
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
    assert split.cut.front_params == [0, 1]


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
    nnx.jit(of_nnx)(one, images())
    nnx.jit(split.rest)(two, split.front(two, images()))
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (one, two))), strict=True):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert abs(two.head_norm.mean[...] - model.head_norm.mean[...]).max() > 0


def test_a_module_in_another_mode():
    """Features are never taken for what another program computes at that place."""
    model = NNXModel(nnx.Rngs(0), train=True)
    model.eval()
    rules = [("head", 1), ("head_norm", 1), (..., None)]
    split = lm.precompute(of_nnx, model, rules, images())
    features = split.front(model, images())
    model.norm.use_running_average = False
    with pytest.raises(lm.FeaturesError, match=r"another mode \(train\(\) and eval\(\) are two"):
        split.rest(model, features)


def test_parameters_of_another_dtype():
    def loss_fn(params, batch):
        return (jnp.square(batch.astype(params["w"].dtype) @ params["w"]) @ params["u"]).sum()

    params = square_params("wu")
    split = lm.precompute(loss_fn, params, [("w", None)], normal(5, 4))
    narrow = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    with pytest.raises(lm.FeaturesError, match="a parameter has another dtype"):
        split.rest(narrow, split.front(params, normal(5, 4)))


def test_weak_types_are_kept():
    def loss_fn(params, batch, factor):
        x = (batch["x"] @ params["w"]) * batch["scale"]
        x, _ = jax.lax.scan(lambda c, _: (c * params["gain"], None), x, None, length=2)
        return (x @ params["u"]).sum() * factor

    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), square_params("wu"))
    params["gain"] = jnp.asarray(2.0)
    batch = {"x": normal(5, 4).astype(jnp.bfloat16), "scale": 0.5}
    split = lm.precompute(loss_fn, params, [("w", None)], batch, 0.25)
    value = split.rest(params, split.front(params, batch), 0.25)
    assert value.dtype == loss_fn(params, batch, 0.25).dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss_fn(params, batch, 0.25), rtol=1e-2)


def test_each_region_is_computed_again_by_itself():
    params = {f"w{i}": normal(4, 4, seed=i) for i in range(4)}

    def loss_fn(params, batch):
        x = batch["x"]
        for name in sorted(params):
            block = jax.checkpoint(lambda x, w: jnp.tanh(x @ w * batch["mask"][:, None]))
            x = block(x, params[name])
        return x.sum()

    batch = {"x": normal(5, 4), "mask": jnp.ones(5)}
    split = check(loss_fn, params, [("w0", None)], batch)
    jaxpr = jax.make_jaxpr(split.rest)(params, split.front(params, batch))
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert sum(name in ("checkpoint", "remat", "remat2") for name in names) == 3


def test_the_cut_is_the_same_at_all_sizes():
    """What is the same for all examples weighs more in a small batch, but the cut stays."""
    params = square_params("wuv") | {"v": normal(128, 2)}

    def loss_fn(params, batch):
        x = batch @ params["w"]
        table = jnp.tanh(params["u"] @ params["w"] @ params["u"])
        far = jnp.abs(x[:, None] - jnp.tile(table, (32, 1))).sum(-1)
        return (far @ params["v"]).sum()

    split = lm.precompute(loss_fn, params, [("v", 1), (..., None)], normal(64, 4))
    for count in (64, 2):
        features = split.front(params, normal(count, 4))
        value = loss_fn(params, normal(count, 4))
        np.testing.assert_allclose(split.rest(params, features), value, rtol=1e-4)
        shapes = [each.shape_of(count) for each in split.features]
        assert [each.shape for each in features] == shapes


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
    params = jax.jit(model.init)(KEY, images()["image"])

    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch["image"]), batch["label"])

    split = check(loss_fn, params, [("linear_1", 1), (..., None)], images())
    assert sizes(split) == [4, 8 * 4]


# Calls, loops and branches.


def square_params(names):
    return {name: normal(4, 4, seed=i) / 2 for i, name in enumerate(names)}


@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp])
def test_a_call_that_holds_both(call):
    params = square_params("wuv")

    @call
    def both(x, w, u):
        return jnp.tanh(jnp.tanh(x @ w) @ u)

    if call is jax.custom_jvp:
        both.defjvp(lambda primals, tangents: (both(*primals), 3 * tangents[2].sum() + primals[0]))
    if call is jax.custom_vjp:
        both.defvjp(
            lambda *args: (both(*args), args), lambda args, g: (g, *[3 * each for each in args[1:]])
        )

    def loss_fn(params, batch):
        x = jnp.tanh(batch @ params["w"])
        return (both(x, params["w"], params["u"]) @ params["v"]).sum()

    split = check(loss_fn, params, [("w", None)], normal(5, 4))
    assert sizes(split) == [16]
    front, _ = split.cut.work()
    opened = call in (jax.jit, jax.checkpoint)
    assert front == (2 if opened else 1) * (2 * 5 * 16 + 5 * 4)
    text = str(jax.make_jaxpr(jax.grad(split.rest))(params, split.front(params, normal(5, 4))))
    assert ("checkpoint" in text or "remat" in text) == (call is jax.checkpoint)


def test_a_rule_of_differentiation_in_the_front_is_opened():
    params = square_params("wu")

    @jax.custom_vjp
    def scaled(x):
        return jnp.concatenate([x, 2 * x], axis=-1)

    scaled.defvjp(lambda x: (scaled(x), None), lambda _, g: (g[..., :4],))

    def loss_fn(params, batch):
        return (scaled(batch @ params["w"])[:, 2:6] @ params["u"]).sum()

    split = check(loss_fn, params, [("w", None)], normal(5, 4))
    assert sizes(split) == [16]  # and not 32


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrent_net_whose_lower_layer_is_frozen(reverse):
    params = square_params("wuv")

    def loss_fn(params, batch):
        def cell(carry, x):
            low, high, count = carry
            low = jnp.tanh(x @ params["w"] + low @ params["w"])
            high = jnp.tanh(low @ params["u"] + high @ params["v"] + jnp.tanh(count @ params["w"]))
            return (low, high, count), (high, low)

        zeros = jnp.zeros_like(batch["start"])
        (low, high, _), (highs, lows) = jax.lax.scan(
            cell, (zeros, zeros, batch["start"]), batch["x"], reverse=reverse
        )
        return (highs * lows).mean() + (low * high).sum()

    batch = {"x": normal(7, 3, 4), "start": normal(3, 4, seed=1)}
    split = lm.precompute(loss_fn, params, [("w", None)], batch, batch_axis={"x": 1, "start": 0})
    check(loss_fn, params, [("w", None)], batch, split=split)
    # Of each example: the states of the lower layer, the last of them, and what is the same at
    # every time, once.
    assert sizes(split) == [16, 16, 7 * 16]
    assert [feature.axis for feature in split.features if feature.size == 7 * 16] == [1]


def test_a_loop_in_which_nothing_is_known_is_left_alone():
    params = square_params("wu")

    def loss_fn(params, batch):
        def layer(x, w):
            return jnp.tanh(x @ w + batch.sum(0)), None

        x, _ = jax.lax.scan(layer, batch @ params["w"], jnp.stack([params["u"]] * 3))
        return x.sum()

    split = check(loss_fn, params, [("w", None)], normal(5, 4))
    assert sizes(split) == [16, 16]
    jaxpr = jax.make_jaxpr(split.rest)(params, split.front(params, normal(5, 4)))
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("scan") == 1


def test_branches():
    params = square_params("wuv")

    def loss_fn(params, batch):
        def one(x):
            return jnp.tanh(jnp.tanh(x @ params["w"]) @ params["u"])

        def other(x):
            return jnp.sin(jnp.sin(x @ params["v"]) @ params["v"]) @ params["u"]

        return jax.lax.cond(batch["which"] > 0, one, other, batch["x"]).sum()

    split = None
    for which in (0, 1):
        batch = {"x": normal(5, 4), "which": jnp.array(which)}
        split = check(loss_fn, params, [("{w,v}", None)], batch, split=split)
    assert sizes(split) == [1, 16, 16]


@pytest.mark.parametrize("form", ["scan", "reverse", "remat", "loop", "transposed"])
def test_the_lower_layers_of_a_stack(form):
    layers = slice(2, 6) if form == "reverse" else slice(0, 4)
    params = {"kernel": normal(6, 4, 4) / 2, "bias": normal(6, 4), "head": normal(4, 2, seed=1)}
    axis = 1 if form == "transposed" else 0
    params["kernel"] = jnp.moveaxis(params["kernel"], 0, axis)

    def loss_fn(params, batch):
        def layer(x, weights):
            return jnp.tanh(x @ weights[0] + weights[1]), x.sum()

        kernel = jnp.moveaxis(params["kernel"], axis, 0)
        if form == "loop":
            x = batch
            for i in range(6):
                x, _ = layer(x, (kernel[i], params["bias"][i]))
            return ((x @ params["head"]) ** 2).mean()
        layer = jax.checkpoint(layer) if form == "remat" else layer
        x, sums = jax.lax.scan(layer, batch, (kernel, params["bias"]), reverse=form == "reverse")
        return ((x @ params["head"]) ** 2).mean(), sums

    rules = [(lm.along("kernel", axis, layers), None), (lm.along("bias", 0, layers), None)]
    batch = normal(5, 4)
    split = lm.precompute(loss_fn, params, rules, batch)
    features = split.front(params, batch)
    assert (5, 4) in [each.shape for each in features]
    value, wanted = gradients(loss_fn, params, batch)
    ahead, found = gradients(split.rest, params, features)
    np.testing.assert_allclose(ahead, value, rtol=1e-6)
    plan = lm.compile_rules(rules, params)
    for one, two, frozen in zip(found, wanted, jax.tree.leaves(plan.frozen), strict=True):
        np.testing.assert_allclose(one, jnp.where(frozen, 0, two), rtol=1e-5, atol=1e-6)
    front, rest = split.cut.work()
    assert front > rest
    changed = dict(params, kernel=params["kernel"] + jnp.where(plan.frozen["kernel"], 0, 1))
    assert split.fingerprints(changed) == split.fingerprints(params)
    assert split.fingerprints(dict(params, bias=params["bias"] + 1)) != split.fingerprints(params)


def test_a_stack_with_a_number_that_is_no_array():
    """A weak type stays one where a scan is cut in two: else the carry would become float32."""
    params = {"kernel": normal(6, 4, 4).astype(jnp.bfloat16), "gain": jnp.asarray(2.0)}

    def loss_fn(params, batch):
        def layer(x, kernel):
            return jnp.tanh(x @ kernel) * params["gain"], None

        return jax.lax.scan(layer, batch, params["kernel"])[0].sum()

    batch = normal(5, 4).astype(jnp.bfloat16)
    rules = [("gain", None), (lm.along("kernel", 0, slice(0, 3)), None)]
    split = lm.precompute(loss_fn, params, rules, batch)
    value = split.rest(params, split.front(params, batch))
    assert value.dtype == loss_fn(params, batch).dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss_fn(params, batch), rtol=2e-2)


def test_a_stack_of_flax():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=6
            )
            x, _ = scan(name="layers")(x, None)
            return nn.Dense(2)(x)

    params = Stack().init(KEY, jnp.ones((1, 4)))["params"]
    structure = lm.Structure(stacked={"layers": 0})

    def loss_fn(params, batch):
        return (Stack().apply({"params": params}, batch) ** 2).mean()

    split = lm.precompute(
        loss_fn, params, [("layers[:4]", None)], normal(5, 4), structure=structure
    )
    features = split.front(params, normal(5, 4))
    np.testing.assert_allclose(
        split.rest(params, features), loss_fn(params, normal(5, 4)), rtol=1e-6
    )
    assert sizes(split) == [16]
    assert split.cut.work()[0] > split.cut.work()[1]


# What is handed on.


def test_the_fewest_bytes_are_handed_on():
    params = {"w": normal(64, 64), "v": normal(300, 3)}

    def loss_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])[:, :20]
        wide = jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1)  # 40
        wide = jnp.repeat(wide, 7, axis=1) + 1.0  # 280
        wide = jnp.concatenate([wide, jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape)], -1)
        labels = jax.nn.one_hot(batch["label"], 3)
        return -(labels * jax.nn.log_softmax(wide @ params["v"])).sum()

    batch = {"x": normal(5, 64), "label": jnp.arange(5, dtype=jnp.int8) % 3}
    split = check(loss_fn, params, [("w", None)], batch, within=1e-5)
    assert sizes(split) == [1, 20 * 4]
    half = check(
        lambda params, batch: loss_fn(params, dict(batch, x=batch["x"].astype(jnp.float32))),
        params,
        [("w", None)],
        dict(batch, x=batch["x"].astype(jnp.bfloat16)),
        within=1e-5,
    )
    assert sizes(half) == [1, 20 * 4]


def test_what_is_as_much_work_as_the_front_is_handed_on():
    params = {"w": normal(4, 4), "centers": normal(50, 4, seed=1), "v": normal(50, 3, seed=2)}

    def loss_fn(params, batch):
        x = batch @ params["w"]
        near = jnp.exp(-((x[:, None] - params["centers"]) ** 2).sum(-1))
        return ((near @ params["v"]) ** 2).sum()

    split = check(loss_fn, params, [("v", 1), (..., None)], normal(5, 4))
    assert sizes(split) == [50 * 4]


def test_no_parameter_is_handed_on_nor_what_is_no_work_to_make_of_one():
    params = {"w": normal(4, 4), "u": normal(4, 4, seed=1), "v": normal(4, 4, seed=2)}

    def loss_fn(params, batch):
        x = (batch @ params["w"]).astype(jnp.bfloat16)
        x = jnp.tanh(x @ params["u"].astype(jnp.bfloat16))
        x = x @ params["w"].T.astype(jnp.bfloat16)
        norm = jnp.linalg.norm(params["w"])  # no work of its own beside the batch
        return (x.astype(jnp.float32) / norm).sum()

    split = check(loss_fn, params, [("w", None)], normal(5, 4), within=1e-2)
    assert [(each.dtype, each.axis) for each in split.features if each.shape] == [(jnp.bfloat16, 0)]


def test_examples_are_apart_where_they_can_be():
    params = square_params("wu")

    def loss_fn(params, batch):
        x = jnp.tanh(batch["x"] @ params["w"])
        teacher = x @ x.T  # between examples
        student = x @ params["u"]
        student = student @ student.T
        weight = batch["mask"] / batch["mask"].sum()
        return ((student - teacher) ** 2 * weight).sum(), {"mean": x.mean(0)}

    batch = {"x": normal(5, 4), "mask": jnp.arange(5.0)}
    split = check(loss_fn, params, [("w", None)], batch, within=1e-5)
    assert sizes(split) == [4, 16]


def test_all_is_known():
    params = square_params("w")
    split = lm.precompute(
        lambda params, batch: {"loss": (batch @ params["w"]).sum(-1), "x": batch},
        params,
        [(..., None)],
        normal(5, 4),
    )
    found = split.rest(params, split.front(params, normal(5, 4)))
    np.testing.assert_allclose(found["loss"], (normal(5, 4) @ params["w"]).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["x"], normal(5, 4))


def test_effects_happen_once(capsys):
    params = square_params("wu")

    def loss_fn(params, batch):
        x = batch @ params["w"]
        jax.debug.print("front {}", x.shape[0] + 0 * x.sum().astype(int))
        y = x @ params["u"]
        jax.debug.print("rest {}", x.shape[0] + 0 * y.sum().astype(int))
        return y.sum()

    split = lm.precompute(loss_fn, params, [("w", None)], normal(5, 4))
    features = split.front(params, normal(5, 4))
    jax.effects_barrier()
    assert capsys.readouterr().out == "front 5\n"
    split.rest(params, features).block_until_ready()
    jax.effects_barrier()
    assert capsys.readouterr().out == "rest 5\n"


# Nothing to gain, and what is wrong.


def test_nothing_to_gain():
    loss_fn, params = cnn()
    with pytest.warns(UserWarning, match="nothing is gained") as seen:
        split = lm.precompute(loss_fn, params, [("Conv_0", 1), (..., None)], images())
    [warning] = seen
    assert str(warning.message).startswith(
        "nothing is gained by computing ahead: conv_general_dilated in CNN/Conv_0 needs "
        "'Conv_0/kernel', which trains, and no work is before it; take lrmult.wrap alone"
    )
    assert warning.filename == __file__
    assert not split.gains
    assert split.reason in str(split)
    check(loss_fn, params, [("Conv_0", 1), (..., None)], images(), split=split)


def test_other_batches():
    loss_fn, params = cnn()
    split = lm.precompute(loss_fn, params, [("Dense_1", 1), (..., None)], images())
    for count in (3, 11):
        features = split.front(params, images(count))
        value = jax.jit(loss_fn)(params, images(count))
        np.testing.assert_allclose(jax.jit(split.rest)(params, features), value, rtol=1e-5)
    with pytest.raises(
        lm.FeaturesError, match=r"front returns int32\[6\], float32\[6,12\].* \(4,\)"
    ):
        split.rest(params, [jnp.ones(4)])
    with pytest.raises(lm.FeaturesError, match=r"further arguments of loss_fn.* 0, .* not 1"):
        split.rest(params, features, 1.0)
    with pytest.raises(lm.FeaturesError, match=r"a feature is int32\[6,12\] where front returns"):
        split.rest(params, [jnp.ones(6, int), jnp.ones((6, 12), int)])
    narrow = [each.astype(jnp.bfloat16) if each.ndim > 1 else each for each in features]
    assert split.rest(params, narrow).dtype == jnp.float32
    np.testing.assert_allclose(split.rest(params, narrow), value, rtol=1e-2)


def test_shapes_are_enough():
    loss_fn, params = cnn()
    split = lm.precompute(
        loss_fn,
        jax.eval_shape(lambda: params),
        [("Dense_1", 1), (..., None)],
        jax.eval_shape(images),
    )
    np.testing.assert_allclose(
        jax.jit(split.rest)(params, split.front(params, images())),
        jax.jit(loss_fn)(params, images()),
        rtol=1e-6,
    )


def test_a_rule_that_cannot_be_read():
    loss_fn, params = cnn()
    with pytest.raises(lm.UnmatchedRuleError, match="did you mean 'Dense_1'"):
        lm.precompute(loss_fn, params, [("Dense1", None)], images())


@pytest.mark.parametrize(
    ("shapes", "told", "axes"),
    [
        (((5, 4), (5,), ()), None, (0, 0, None)),
        (((7, 5, 4), (5,)), None, (1, 0)),
        (((5, 5), (5,)), None, (0, 0)),
        (((7, 5), (7, 5)), 1, (1, 1)),
        (((5, 4), (4,)), (0, None), (0, None)),
        (((4, 5), (5,)), (-1, 0), (1, 0)),
    ],
)
def test_the_axis_of_examples(shapes, told, axes):
    batch = tuple(jnp.ones(shape) for shape in shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing is gained")
        split = lm.precompute(
            lambda params, batch: sum((each * params["w"]).sum() for each in batch) + params["u"],
            {"w": jnp.ones(()), "u": jnp.ones(())},
            [("w", None)],
            batch,
            batch_axis=told,
        )
    assert split.example_axes == axes


@pytest.mark.parametrize(
    ("told", "match"),
    [
        (2, "2 is no axis of an array of shape"),
        ((0, 0), r"have \[4, 5\] examples"),
        ((0,), "neither an axis nor a tree of axes like the batch"),
    ],
)
def test_a_wrong_axis(told, match):
    with pytest.raises(lm.FeaturesError, match=match):
        lm.precompute(
            lambda params, batch: batch[0].sum() * params["w"],
            {"w": jnp.ones(())},
            [],
            (jnp.ones((5, 4)), jnp.ones(4)),
            batch_axis=told,
        )


# Any program.

SIZE, WIDTH = 4, 3
NAMES = ["a", "b", "c"]
KINDS = ["product", "product", "sum", "tanh", "mixed", "reversed", "statistics", "wide", "custom"]
CALLS = ["jit", "remat", "scan", "cond"]


def programs(depth=0):
    """Lists of what is computed next: its kind, two values, a parameter, and a list inside."""
    kinds = st.sampled_from(KINDS + CALLS * (depth < 2))
    inside = programs(depth + 1) if depth < 2 else st.just([])
    step = st.tuples(kinds, st.integers(0, 9), st.integers(0, 9), st.sampled_from(NAMES), inside)
    return st.lists(step, min_size=1, max_size=4)


def compute(program, x, y, params):
    """What a program makes of two values, each of shape (SIZE, WIDTH)."""
    values = [x, y]
    for kind, i, j, name, inside in program:
        pick = values[i % len(values)], values[j % len(values)]
        values.append(step_of(kind, *pick, name, inside, params))
    return values[-1]


def step_of(kind, x, y, name, inside, params):
    if kind == "product":
        return jnp.tanh(x @ params[name])
    if kind == "sum":
        return x + 0.5 * y
    if kind == "tanh":
        return jnp.tanh(x)
    if kind == "mixed":
        return x - x.mean(0)
    if kind == "reversed":
        return x[::-1]
    if kind == "statistics":
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(1 + x.var(-1, keepdims=True))
    if kind == "wide":
        return jnp.concatenate([x, jnp.sin(x)], -1)[:, 1 : WIDTH + 1]
    if kind == "custom":
        return jax.nn.silu(x) + jax.nn.relu(y)

    def inner(x, y, params):
        return compute(inside, x, y, params)

    if kind == "jit":
        return jax.jit(inner)(x, y, params)
    if kind == "remat":
        return jax.checkpoint(inner)(x, y, params)
    if kind == "cond":
        return jax.lax.cond((y > 0).sum() > 2, inner, lambda x, y, _: x + y, x, y, params)

    def body(carry, stack):
        found = inner(*carry, {**params, name: stack})
        return (found, jnp.tanh(carry[1] @ params[name])), 2 * found

    (last, _), ys = jax.lax.scan(body, (x, y), params["stacked"])
    return last + ys.sum(0)


@given(data=st.data())
@cases(40)
def test_any_program(data):
    program, others = data.draw(programs()), data.draw(programs())
    params = {name: normal(WIDTH, WIDTH, seed=i) for i, name in enumerate(NAMES)}
    params["stacked"] = normal(3, WIDTH, WIDTH, seed=9)
    frozen = data.draw(st.sets(st.sampled_from(sorted(params)), min_size=1))
    rules = [(name, None) for name in sorted(frozen)]
    if "stacked" not in frozen and data.draw(st.booleans()):
        rules.append((lm.along("stacked", 0, slice(0, data.draw(st.integers(1, 2)))), None))

    def loss_fn(params, batch):
        x = compute(program, batch, 2 * batch, params)
        return x.sum() + 0.1 * (compute(others, x, batch, params) ** 2).sum()

    batch = normal(SIZE, WIDTH, seed=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing is gained")
        split = lm.precompute(loss_fn, params, rules, batch)
    features = split.front(params, batch)
    value, wanted = jax.value_and_grad(loss_fn)(params, batch)
    ahead, found = jax.value_and_grad(split.rest)(params, features)
    np.testing.assert_allclose(ahead, value, rtol=1e-4, atol=1e-5)
    masks = lm.compile_rules(rules, params).frozen
    for name in params:
        # Of an array that is frozen in part, what is frozen may have a gradient.
        trains = ~np.broadcast_to(masks[name], wanted[name].shape)
        np.testing.assert_allclose(
            np.where(trains, found[name], 0),
            np.where(trains, wanted[name], 0),
            rtol=1e-3,
            atol=1e-4,
        )
        if masks[name] is True:
            assert not found[name].any()
    whole = np.asarray(normal(11, WIDTH, seed=6))
    try:
        kept = lm.CachedFeatures(split, params, whole, batch_size=3, progress=False)
    except lm.FeaturesError:
        return
    for numbers in ([7, 0, 10, 3], [1, 2, 5, 4]):
        value = split.rest(params, kept[numbers])
        np.testing.assert_allclose(value, loss_fn(params, whole[numbers]), rtol=1e-3, atol=1e-4)
