"""Layers stacked along an axis: rules speak of them, and they train, as if they stood apart."""

from functools import cache, partial
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrmult as lm

KEY = jax.random.key(0)
DEPTH, WIDTH = 12, 4
INPUT = jax.random.normal(KEY, (5, WIDTH))
MULTIPLIERS = [None, 0.1, 0.2, None, 0.4, 0.5, -0.6, 1, 1.5, 2, 3, None]
RULES = [(f"net/layers[{i}]", multiplier) for i, multiplier in enumerate(MULTIPLIERS)]
OPTIMIZERS = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
}
RATE = 1e-2


class Stack(NamedTuple):
    params: Any
    loss: Any
    axis: int = 0


def loss_of(x):
    return jnp.mean((x - 1) ** 2)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, name="fc2")(jnp.tanh(nn.Dense(6, name="fc1")(x))), None


@cache
def linen(axis):
    options = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}, "length": DEPTH}
    net = nn.scan(Block, **options)()
    params = jax.jit(net.init)(KEY, INPUT, None)["params"]

    def loss(params):
        return loss_of(net.apply({"params": params["net"]["layers"]}, INPUT, None)[0])

    return Stack({"net": {"layers": params}}, loss, axis)


class NNXNet(nnx.Module):
    def __init__(self):
        def block(key):
            rngs = nnx.Rngs(key)
            fc1, fc2 = nnx.Linear(WIDTH, 6, rngs=rngs), nnx.Linear(6, WIDTH, rngs=rngs)
            return nnx.Sequential(fc1, jnp.tanh, fc2)

        self.layers = nnx.vmap(block)(jax.random.split(KEY, DEPTH))

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


@cache
def split_nnx():
    return nnx.split(nnx.Dict(net=NNXNet()))


def of_nnx():
    graph, params = split_nnx()
    return Stack(params, lambda params: loss_of(nnx.merge(graph, params)["net"](INPUT)))


@cache
def equinox():
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(WIDTH, WIDTH, 6, 1, jnp.tanh, key=key))
    layers = eqx.filter_jit(make)(jax.random.split(KEY, DEPTH))
    params, static = eqx.partition(layers, eqx.is_inexact_array)

    def block(x, layer):
        return x + jax.vmap(eqx.combine(layer, static))(x), None

    def loss(params):
        return loss_of(jax.lax.scan(block, INPUT, params["net"]["layers"])[0])

    return Stack({"net": {"layers": params}}, loss)


STACKS = {
    "linen": partial(linen, 0),
    "axis 1": partial(linen, 1),
    "nnx": of_nnx,
    "equinox": equinox,
}


# Training ---------------------------------------------------------------------------------------


def train(stack, tx):
    """The parameters after some steps, and the gradient of each."""
    params, state, seen = stack.params, tx.init(stack.params), []

    @jax.jit
    def step(params, state):
        grads = jax.grad(stack.loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    for _ in range(4):
        params, state, grads = step(params, state)
        seen.append(grads)
    return params, seen


@partial(jax.jit, static_argnums=0)
def step_of_one(optimizer, rate, grads, state, params):
    updates, state = OPTIMIZERS[optimizer](rate).update(grads, state, params)
    return optax.apply_updates(params, updates), state


def assert_trained_as_apart(optimizer, stack, after, grads):
    """Every layer must stand where its own optimizer, at its own rate, would have led it."""

    def layer(tree, number):
        return [np.moveaxis(leaf, stack.axis, 0)[number] for leaf in jax.tree.leaves(tree)]

    for number, multiplier in enumerate(MULTIPLIERS):
        before, found = layer(stack.params, number), layer(after, number)
        if multiplier is None:
            assert [leaf.tobytes() for leaf in found] == [leaf.tobytes() for leaf in before]
            continue
        wanted, state = before, OPTIMIZERS[optimizer](RATE).init(before)
        for each in grads:
            rate = RATE * multiplier
            wanted, state = step_of_one(optimizer, rate, layer(each, number), state, wanted)
        chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-7)
        assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(found, before, strict=True))


def chained(optimizer, axis):
    scale = lm.scale_by_rules(RULES, structure=lm.Structure(stacked={"net/layers": axis}))
    return optax.chain(OPTIMIZERS[optimizer](RATE), scale)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_trains_as_its_layers_would_apart(name, optimizer):
    stack = STACKS[name]()
    after, grads = train(stack, chained(optimizer, stack.axis))
    assert_trained_as_apart(optimizer, stack, after, grads)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nnx_optimizer(optimizer):
    model = nnx.clone(nnx.merge(*split_nnx()))
    trainer = nnx.Optimizer(model, chained(optimizer, 0), wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer):
        grads = nnx.grad(lambda model: loss_of(model["net"](INPUT)))(model)
        trainer.update(model, grads)
        return grads

    grads = [step(model, trainer) for _ in range(4)]
    assert_trained_as_apart(optimizer, of_nnx(), nnx.state(model, nnx.Param), grads)


@pytest.mark.parametrize("kept", ["layers", "kernel", "head"])
def test_below_masked(kept):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), stacked(1))
    structure = lm.Structure(stacked={"net/layers": 1})
    rules = [*lm.optional(RULES), ("**/kernel", 7)]
    mask = jax.tree.map_with_path(lambda path, _: f"'{kept}'" in str(path), params)
    scale = optax.masked(lm.scale_by_rules(rules, structure=structure), mask)
    updates, _ = scale.update(params, scale.init(params), params)
    plan = lm.compile_rules(rules, params, structure=structure)
    wanted = jax.tree.map(lambda x, m, on: x * m if on else x, params, plan.multipliers, mask)
    chex.assert_trees_all_close(updates, wanted)


def stacked(axis):
    """The shapes of layers stacked below `net/layers`, and of a layer beside it."""

    def shape(*sizes):
        place = axis % (len(sizes) + 1)
        return jax.ShapeDtypeStruct((*sizes[:place], DEPTH, *sizes[place:]), jnp.float32)

    fc1 = {"kernel": shape(4, 6), "bias": shape(6)}
    fc2 = {"kernel": shape(6, 4), "bias": shape(4)}
    head = {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    return {"net": {"layers": {"fc1": fc1, "fc2": fc2}, "head": head}}


def frozen(target, params, stacked):
    """By path, what a target names."""
    plan = lm.compile_rules([(target, None)], params, structure=lm.Structure(stacked=stacked))
    found = {}
    for leaf, mask in zip(plan.leaves, jax.tree.leaves(plan.frozen), strict=True):
        dense = mask.dense() if isinstance(mask, lm.Parts) else np.broadcast_to(mask, leaf.shape)
        assert dense.sum() == leaf.frozen
        found[leaf.path] = dense
    return found


ALL = slice(None)
FIRST = {f"fc{i}/{name}": slice(4) for i in (1, 2) for name in ("kernel", "bias")}
# A target, and what it names: by array, an index of the array with its layers first.
TARGETS = [
    ("net/layers[:4]", FIRST),
    ("net/layers[-1]", dict.fromkeys(FIRST, -1)),
    ("net/layers[::2]", dict.fromkeys(FIRST, slice(None, None, 2))),
    ("net/layers", dict.fromkeys(FIRST, ALL)),
    ("net/layers[-2:]/*/bias", {"fc1/bias": slice(-2, None), "fc2/bias": slice(-2, None)}),
    ("net/layers[2:4]/fc[1]/kernel", {"fc1/kernel": slice(2, 4)}),
    ("*/layers[9:99]/fc2/kernel", {"fc2/kernel": slice(9, None)}),
    ("**/layers[5]/**/kernel", {"fc1/kernel": 5, "fc2/kernel": 5}),
    ("net/layers/[0]/fc1/bias", {"fc1/bias": 0}),
    (("net", "layers", slice(4)), FIRST),
    (("net", "layers", 2, "fc1"), {"fc1/kernel": 2, "fc1/bias": 2}),
    (lm.neurons("net/layers[2]/fc1", [0]), {"fc1/kernel": (2, ALL, 0), "fc1/bias": (2, 0)}),
    (lm.neurons("net/layers/fc1", [1]), {"fc1/kernel": (ALL, ALL, 1), "fc1/bias": (ALL, 1)}),
    (lm.neurons("net/layers[-1]", 3),
     {"fc1/kernel": (-1, ALL, 3), "fc1/bias": (-1, 3),
      "fc2/kernel": (-1, ALL, 3), "fc2/bias": (-1, 3)}),
]  # fmt: skip


def assert_are(found, parts, axis=0):
    """The masks must hold these places: by path, an index of the array with that axis first."""
    for path, mask in found.items():
        wanted = np.zeros_like(mask)
        if path in parts:
            np.moveaxis(wanted, axis, 0)[parts[path]] = True
        np.testing.assert_array_equal(mask, wanted, path)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("target", "parts"), TARGETS, ids=[str(target) for target, _ in TARGETS])
def test_positions_are_slices(target, parts, axis):
    parts = {f"net/layers/{path}": index for path, index in parts.items()}
    assert_are(frozen(target, stacked(axis), {"net/layers": axis}), parts, axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_multipliers_are_one_vector(axis):
    structure = lm.Structure(stacked={"net/layers": axis})
    plan = lm.compile_rules([*RULES, ("**/kernel", 7)], stacked(axis), structure=structure)
    for leaf in plan.leaves[1:]:
        assert leaf.multiplier.shape == tuple(n if n == DEPTH else 1 for n in leaf.shape)
        np.testing.assert_array_equal(leaf.multiplier.ravel(), [m or 0 for m in MULTIPLIERS])
        assert [index for index, _ in leaf.rules] == list(range(DEPTH))
    assert plan.leaves[0].multiplier == 7


def test_the_table_names_layers():
    structure = lm.Structure(stacked={"net/layers": 0})
    rules = [("net/layers[:4]", None), ("net/layers[::2]/fc2", 3)]
    table = str(lm.compile_rules(rules, stacked(0), structure=structure))
    assert table.count("layers 0-3 of 12 frozen; rest 1 ") == 1
    assert "layers 0-3 of 12 frozen; layers 4, 6, 8, 10 of 12: 3; rest 1 " in table


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("blocks[1]", {"scale": 1, "layers/w": 1}),
        ("blocks[-1]/scale", {"scale": 1}),
        ("blocks[0]/layers[:2]/w", {"layers/w": (0, ALL, slice(2))}),
        ("blocks/layers[1]", {"layers/w": (ALL, ALL, 1)}),
        ("*[0]", {"scale": 0, "layers/w": 0}),
        ("**/layers/[2]", {"layers/w": (ALL, ALL, 2)}),
        (("blocks", 1, "layers", slice(1, None)), {"layers/w": (1, ALL, slice(1, None))}),
        (lm.neurons("blocks[1]/layers[0]", [3]), {"layers/w": (1, ALL, 0, 3)}),
        (lm.neurons("blocks/layers", [3]), {"layers/w": (ALL, ALL, ALL, 3)}),
        (lm.along("blocks[1]/layers[:2]", 2, [0, 2]), {"layers/w": (1, ALL, 0)}),
    ],
    ids=str,
)
def test_nested_stacks(target, parts):
    # Two blocks along the first axis of all arrays, three layers along the last but one.
    params = {"blocks": {"scale": np.ones((2, 5)), "layers": {"w": np.ones((2, 4, 3, 6))}}}
    found = frozen(target, params, {"blocks": 0, "blocks/layers": -2})
    assert_are(found, {f"blocks/{path}": index for path, index in parts.items()})


@pytest.mark.parametrize("target", [slice(4), "[:4]"])
def test_a_stack_at_the_root(target):
    params = equinox().params["net"]["layers"]
    assert_are(frozen(target, params, {"": 0}), dict.fromkeys(lm.paths(params), slice(4)))


@pytest.mark.parametrize("bias", [True, False])
def test_an_ensemble_is_never_taken_for_one_layer(bias):
    keys = jax.random.split(KEY, 4)
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 3, use_bias=bias, key=key))
    params = {"heads": eqx.filter_eval_shape(make, keys)}
    with pytest.raises(lm.AxisError, match=r"stacked, with structure="):
        frozen(lm.neurons("heads", 0), params, {})
    found = frozen(lm.neurons("heads[1]", -1), params, {"heads": 0})
    assert_are(found, {"heads/weight": (1, 2), "heads/bias": (1, 2)})


LAYERS = {"net/layers": 0}


@pytest.mark.parametrize(
    ("target", "stacked_at", "error", "message"),
    [
        ("net/layers[12]", LAYERS, lm.IndexRangeError, r"layers"),
        ("net/layers[-13]/fc1", LAYERS, lm.IndexRangeError, r"layers"),
        ("net/layers[1]/fc3", LAYERS, lm.UnmatchedRuleError, r"fc3"),
        (lm.neurons("net/layers[2]/fc1", 6), LAYERS, lm.IndexRangeError, r"fc1"),
        (lm.neurons("net/layers[2]/fc1", 0, axis=0), LAYERS, lm.AxisError, r"stacked"),
        (..., {"net/layer": 0}, lm.RuleError, r"'net/layer' is stacked, but nothing in the tree"),
        (..., {"net": 0}, lm.AxisError, r"'net/head/kernel' float32\[4,2\]"),
        (..., {"net/layers": 1}, lm.AxisError, r"has \d+ layers there and .* has \d+"),
        (..., {"net/layers": 2}, lm.AxisError, r"axis 2, which 'net/layers/fc1/bias' .*not have"),
        (..., {"net/layers": 0, "net/layers/fc1": 0}, lm.AxisError, r"of both .* axis 0 of"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_tree(target, stacked_at, error, message):
    with pytest.raises(error, match=message):
        frozen(target, stacked(0), stacked_at)


@pytest.mark.parametrize("entry", [lm.compile_rules, lm.scale_by_rules, lm.trainable_mask])
@pytest.mark.parametrize("structure", [LAYERS, "net/layers", 0], ids=repr)
def test_structure_of_a_wrong_type(entry, structure):
    arguments = [stacked(0)] if entry is lm.compile_rules else []
    with pytest.raises((lm.RuleError, TypeError), match="Structure"):
        entry([(..., None)], *arguments, structure=structure)


@pytest.mark.parametrize(
    "given", ["net/layers", {"net": True}, {"net": "0"}, {"*": 0}, {"a[0]": 0}, {1: 0}, {"a//b": 0}]
)
def test_structures_that_cannot_be_read(given):
    with pytest.raises(lm.RuleError, match=r"stacked="):
        lm.Structure(stacked=given)
