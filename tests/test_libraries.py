"""One architecture in Linen, NNX, Equinox and Haiku: the same rules give the same multipliers."""

import dataclasses
import itertools
from typing import NamedTuple

import chex
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

WIDTHS = (5, 7, 6, 3)
INPUT = jnp.ones((2, 4))


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in WIDTHS:
            x = jnp.tanh(nn.Dense(width)(x))
        return x


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        widths = (INPUT.shape[-1], *WIDTHS)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


class EquinoxMLP(eqx.Module):
    layers: list

    def __init__(self, key):
        widths = (INPUT.shape[-1], *WIDTHS)
        keys = jax.random.split(key, len(WIDTHS))
        self.layers = [
            eqx.nn.Linear(a, b, key=k)
            for a, b, k in zip(widths[:-1], widths[1:], keys, strict=True)
        ]

    def __call__(self, x):  # callable: must never be taken for a function of params
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def haiku_mlp(x):
    for width in WIDTHS:
        x = jnp.tanh(hk.Linear(width)(x))
    return x


def linen_params():
    return LinenMLP().init(jax.random.key(0), INPUT)["params"]


def nnx_params():
    return nnx.state(NNXMLP(nnx.Rngs(0)), nnx.Param)


def equinox_params():
    return eqx.filter(EquinoxMLP(jax.random.key(0)), eqx.is_inexact_array)


def haiku_params():
    return hk.transform(haiku_mlp).init(jax.random.key(0), INPUT)


# How each library calls layer i, its weights and its biases; and its layers as a sequence.
DIALECTS = {
    "linen": (linen_params, "Dense_{}", "kernel", "bias", "Dense"),
    "nnx": (nnx_params, "layers/{}", "kernel", "bias", "layers"),
    "nnx pure dict": (
        lambda: nnx.to_pure_dict(nnx_params()),
        "layers/{}",
        "kernel",
        "bias",
        "layers",
    ),
    "nnx module": (lambda: NNXMLP(nnx.Rngs(0)), "layers/{}", "kernel", "bias", "layers"),
    "equinox": (equinox_params, "layers/{}", "weight", "bias", "layers"),
    "haiku": (haiku_params, "linear_{}", "w", "b", "linear"),
}

# {0}, {1}... are layers, `w` and `b` what they hold, `all` the sequence of layers.
RULE_LISTS = {
    "names": [("{0}", None), ("{1}/{w}", 0.5), ("{3}", 10)],
    "positions": [("{all}[:2]", None), ("{all}[-1]", 3), ("**/{b}", 0.25)],
    "steps": [("{all}[::2]", 0.1), ("{all}[1]/{w}", None)],
    "globs": [("**/{w}", 0.1), (..., None)],
    "negative": [("{all}[-2]", -1), ("{all}[1:3]", 2), ("**", 0.5)],
}


def spell(rules, dialect):
    _, layer, w, b, every = DIALECTS[dialect]
    # Haiku calls the first of a family by its bare name.
    names = [layer.format(i) if (i, dialect) != (0, "haiku") else "linear" for i in range(4)]
    return [
        (t if t is ... else t.format(*names, w=w, b=b, all=every), multiplier)
        for t, multiplier in rules
    ]


def by_layer(plan, dialect):
    """The multipliers as {(layer, "w" or "b"): multiplier}."""
    _, layer, w, b, _ = DIALECTS[dialect]
    found = {}
    for leaf in plan.leaves:
        above, _, kind = leaf.path.rpartition("/")
        for i in range(4):
            if above == layer.format(i) or (i == 0 and above == "linear"):
                found[i, {w: "w", b: "b"}[kind]] = leaf.multiplier
    return found


@pytest.mark.parametrize("rules", RULE_LISTS)
def test_the_same_rules_in_every_library(rules):
    answers = {}
    for dialect, (make, *_) in DIALECTS.items():
        plan = lm.compile_rules(spell(RULE_LISTS[rules], dialect), make())
        answers[dialect] = by_layer(plan, dialect)
        assert len(answers[dialect]) == 8, dialect
    assert len({tuple(sorted(answer.items())) for answer in answers.values()}) == 1, answers


def test_the_answers_themselves():
    plan = lm.compile_rules(spell(RULE_LISTS["positions"], "linen"), linen_params())
    assert by_layer(plan, "linen") == {
        (0, "w"): 0.0, (0, "b"): 0.0, (1, "w"): 0.0, (1, "b"): 0.0,
        (2, "w"): 1.0, (2, "b"): 0.25, (3, "w"): 3.0, (3, "b"): 3.0,
    }  # fmt: skip


def test_nnx_optimizer_under_jit():
    """`init` sees boxed parameters there, `update` raw arrays in another tree."""
    model = NNXMLP(nnx.Rngs(0))
    rules = [("layers[:2]", None), ("layers[-1]", 3), ("**/bias", 0.25)]
    tx = optax.chain(optax.sgd(1.0), lm.scale_by_rules(rules))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)

    step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plan = lm.compile_rules(rules, before)
    moved = jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), before, after)
    wanted = jax.tree.map(lambda a, m: np.full_like(a, -m), before, plan.multipliers)
    chex.assert_trees_all_close(moved, wanted, atol=1e-6)
    for i in (0, 1):
        assert bytes(after["layers"][i]["kernel"]) == bytes(before["layers"][i]["kernel"])


def test_functional_nnx_sees_boxes_in_both():
    model = NNXMLP(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = optax.chain(optax.sgd(1.0), lm.scale_by_rules([("layers/0/kernel", None), (..., 2)]))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, _ = step(params, tx.init(params))
    kernel = nnx.to_pure_dict(new)["layers"][0]
    np.testing.assert_array_equal(kernel["kernel"], model.layers[0].kernel[...])
    np.testing.assert_allclose(kernel["bias"], -2.0 * np.ones(5))


def test_equinox_training():
    model = EquinoxMLP(jax.random.key(0))
    rules = [("layers[:-1]", None)]
    tx = optax.chain(optax.adamw(1e-2), lm.scale_by_rules(rules))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda m: jnp.sum(m(INPUT[0])))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    new, _ = step(model, state)
    for i in range(3):
        assert bytes(new.layers[i].weight) == bytes(model.layers[i].weight)
    assert bytes(new.layers[3].weight) != bytes(model.layers[3].weight)


def test_equinox_partition_takes_the_mask_of_a_whole_module():
    model = eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0))  # has functions among its leaves
    plan = lm.compile_rules([("layers[:2]", None)], model)
    trained, rest = eqx.partition(model, plan.trainable)
    assert lm.paths(trained) == ["layers/2/weight", "layers/2/bias"]
    assert lm.paths(rest) == [f"layers/{i}/{n}" for i in (0, 1) for n in ("weight", "bias")]
    assert lm.paths(model) == lm.paths(eqx.filter(model, eqx.is_array))


def test_masks_for_optax():
    params = linen_params()
    rules = [("Dense[:2]", None)]
    tx = optax.masked(optax.sgd(1.0), lm.trainable_mask(rules))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
    assert updates["Dense_3"]["bias"][0] == -1
    assert updates["Dense_0"]["bias"][0] == 1
    mask = lm.trainable_mask(rules)(params)
    assert mask["Dense_1"]["kernel"] is False
    assert mask["Dense_2"]["kernel"] is True
    decayed = optax.adamw(1e-2, weight_decay=1.0, mask=lm.trainable_mask(rules))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decayed.update(zeros, decayed.init(params), params)
    assert not updates["Dense_0"]["kernel"].any()
    assert updates["Dense_3"]["kernel"].any()


# Paths, library by library --------------------------------------------------------------------


class Point(NamedTuple):
    x: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    value: jax.Array
    gain: jax.Array


class Unkeyed:
    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(
    Unkeyed, lambda node: (node.children, None), lambda _, children: Unkeyed(*children)
)


def ones(*shape):
    return jnp.ones(shape)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"b": ones(1), "a": [ones(1), (ones(1), ones(2))]}, ["a/0", "a/1/0", "a/1/1", "b"]),
        (Point(ones(1), ones(2)), ["x", "value"]),
        ({"r": Record(ones(1), ones(2))}, ["r/value", "r/gain"]),
        (Unkeyed(ones(1), {"w": ones(1)}), ["0", "1/w"]),
        ({0: ones(1), 10: ones(1), 2: ones(1)}, ["0", "2", "10"]),
        ({"a/b": ones(1), "a": {"c": ones(1)}}, ["a/c", "a/b"]),
        ({"a": None, "b": ones(1), "c": optax.MaskedNode()}, ["b"]),
        ({"*": ones(1), "[x]": ones(1), "{": ones(1), "": ones(1), "a,b": ones(1)},
         ["{}", "\\*", "\\[x\\]", "a,b", "\\{"]),
        (ones(3), [""]),
        ({"s": 1.5, "i": 2, "f": print}, ["i", "s"]),
        ({}, []),
    ],
)  # fmt: skip
def test_paths_of_plain_trees(params, wanted):
    assert lm.paths(params) == wanted


def test_paths_of_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            x = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2, kernel_init=boxed)])(x)
            x = nn.WeightNorm(nn.Dense(2))(x)
            return nn.MultiHeadDotProductAttention(2)(x, x)

    params = Model().init(jax.random.key(0), INPUT)
    found = lm.paths(params)
    assert "params/Dense_1/kernel" in found
    assert "params/WeightNorm_0/Dense_2/kernel/scale" in found
    assert "params/MultiHeadDotProductAttention_0/value/kernel" in found
    assert "params/MultiHeadDotProductAttention_0/value/bias" in found
    unboxed = nn.unbox(params)
    assert lm.paths(unboxed) == found
    rules = [("params/Dense[1]/kernel", 0.5), ("**/value/kernel", None), ("params/WeightNorm_0", 2)]
    boxed = [leaf.multiplier for leaf in lm.compile_rules(rules, params).leaves]
    assert boxed == [leaf.multiplier for leaf in lm.compile_rules(rules, unboxed).leaves]
    assert {0.5, 0.0, 2.0, 1.0} == set(boxed)
    tree = lm.compile_rules(rules, params).multipliers
    assert jax.tree.structure(tree) == jax.tree.structure(params)


def test_paths_of_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.seq = nnx.Sequential(
                nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.BatchNorm(3, rngs=rngs)
            )
            self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)

    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    found = lm.paths(state)
    assert found == lm.paths(nnx.to_pure_dict(state))
    assert "attention/value/kernel" in found
    assert {"seq/layers/0/kernel", "seq/layers/2/scale"} <= set(found)
    assert "seq/layers/2/mean" in lm.paths(model)
    raw = jax.tree.unflatten(
        jax.tree.structure(state, is_leaf=lambda x: isinstance(x, nnx.Variable)),
        jax.tree.leaves(state),
    )
    assert lm.paths(raw) == found


def test_paths_of_haiku():
    def net(x):
        return hk.nets.MLP([3, 2])(x)

    params = hk.transform(net).init(jax.random.key(0), INPUT)
    assert lm.paths(params) == [f"mlp/~/linear_{i}/{name}" for i in (0, 1) for name in ("b", "w")]
    plan = lm.compile_rules([("mlp/~/linear[1]", 2), ("mlp", None)], params)
    assert plan.multipliers["mlp/~/linear_1"] == {"w": 2.0, "b": 2.0}
    assert plan.multipliers["mlp/~/linear_0"] == {"w": 0.0, "b": 0.0}


def test_frozen_dict_and_dict_are_one():
    from flax.core import freeze

    params = linen_params()
    rules = [("Dense_0", None), ("**/bias", 2)]
    plain, frozen = (lm.compile_rules(rules, p).leaves for p in (params, freeze(params)))
    assert plain == frozen


def test_shapes_are_enough():
    shapes = jax.eval_shape(linen_params)
    rules = [("Dense_0", None), ("**/bias", 2)]
    assert lm.compile_rules(rules, shapes).leaves == lm.compile_rules(rules, linen_params()).leaves


@pytest.mark.parametrize("kind", [np.float32, jnp.float32, jnp.bfloat16, int, np.dtype("int8")])
def test_a_dtype_is_no_array(kind):
    tree = {"w": jnp.ones(3), "kind": kind}
    assert lm.paths(tree) == ["w"]
    plan = lm.compile_rules([("**", 2)], tree)
    assert plan.multipliers == {"w": 2, "kind": 1}
    assert plan.trainable == {"w": True, "kind": False}
    tx = lm.scale_by_rules([("w", 2)])
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates["kind"] is kind
    assert updates["w"].tolist() == [2, 2, 2]
