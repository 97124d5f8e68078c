"""Multipliers that a model carries, and targets by type: through all that a model goes through."""

import collections
import copy
import dataclasses
import functools
import itertools
import pickle
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import lrmult as lm

KEY = jax.random.key(0)
INIT = nn.initializers.normal()


def ramp(step):
    return step / 4


def activate(x):  # unlike jnp.tanh, it can be pickled
    return jnp.tanh(x)


def planned(rules, params, **options):
    plan = lm.compile_rules(rules, params, **options)
    return {leaf.path: leaf.multiplier for leaf in plan.leaves}


def frozen(rules, params, **options):
    return [path for path, got in planned(rules, params, **options).items() if got == 0]


def pairs(rules):
    assert isinstance(rules, lm.Rules)
    assert all(rule.optional for rule in rules)
    return [(rule.target, rule.multiplier) for rule in rules]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def chained(optimizer, rules, **options):
    return optax.chain(optimizer, lm.scale_by_rules(rules, **options))


both = pytest.mark.parametrize("make", [chained, lm.wrap], ids=["chained", "wrapped"])


def assert_trained(before, after, wanted, steps):
    """Arrays whose gradients were 1 at the rate 1/2, and what multiplies that: to the last bit."""
    before, after = (
        {path: np.asarray(leaf) for path, leaf in zip(lm.paths(t), jax.tree.leaves(t), strict=True)}
        for t in (before, after)
    )
    for path, multiplier in wanted.items():
        expected = before[path] - np.float32(0.5 * steps * multiplier) if multiplier else None
        expected = before[path] if expected is None else expected
        assert after[path].tobytes() == expected.tobytes(), path


def exact(leaf):
    """Such that sums of a few halves are exact; some are -0.0, which only no update leaves so."""
    return jnp.round(leaf * 64) / 64 * jnp.where(jnp.arange(leaf.size).reshape(leaf.shape), 1, -0.0)


def total(tree):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


# NNX --------------------------------------------------------------------------------------------


def linear(**options):
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0), **options)


class Net(nnx.Module):
    def __init__(self):
        self.trunk = nnx.Sequential(linear(), activate, linear())
        self.parts = nnx.Dict(b=linear(), a=nnx.List([linear(), nnx.Dict(deep=linear())]))
        self.head = linear()

    def __call__(self, x):
        for layer in (self.trunk, self.parts.b, self.parts.a[0], self.parts.a[1].deep, self.head):
            x = layer(x)
        return x


def params_of(model):
    return nnx.state(model, nnx.Param)


NODES = [
    (),
    ("trunk",),
    ("trunk", "layers"),
    ("trunk", "layers", 0),
    ("trunk", "layers", 2, "kernel"),
    ("parts",),
    ("parts", "b"),
    ("parts", "b", "bias"),
    ("parts", "a"),
    ("parts", "a", 1),
    ("parts", "a", 1, "deep"),
    ("parts", "a", 1, "deep", "kernel"),
    ("head",),
    ("head", "bias"),
]


def node(model, path):
    for name in path:
        model = model[name] if isinstance(name, int) else getattr(model, name)
    return model


@pytest.mark.parametrize("seed", range(8))
def test_the_innermost_counts_whichever_was_attached_first(seed):
    rng = np.random.default_rng(seed)
    model, values = Net(), {}
    for each in rng.integers(len(NODES), size=10):  # some of them twice: set anew
        value = rng.choice([None, 0.5, 1, -2, ramp])
        assert lm.attach(node(model, NODES[each]), value) is node(model, NODES[each])
        values["/".join(map(str, NODES[each]))] = value
    wanted = {}
    for path in lm.paths(params_of(model)):
        above = [path.rsplit("/", n)[0] for n in range(path.count("/") + 1)] + [""]
        wanted[path] = next((values[name] for name in above if name in values), 1)
    # A schedule cannot be read off a plan of numbers.
    got = planned(lm.attached_rules(model), params_of(model))
    assert {p: m for p, m in got.items() if wanted[p] is not ramp} == {
        p: m or 0 for p, m in wanted.items() if m is not ramp
    }
    rules = pairs(lm.attached_rules(model))
    assert len(rules) == len(values)
    assert {"" if target is ... else target: m for target, m in rules} == values
    depths = [-1 if target is ... else target.count("/") for target, _ in rules]
    assert depths == sorted(depths, reverse=True)


def test_every_order_of_attaching_gives_the_same_rules():
    made = [("head/bias", 0.5), ("head", None), ("trunk", 2), ("", 0.1)]
    found = set()
    for order in itertools.permutations(made):
        model = Net()
        for path, multiplier in order:
            lm.attach(node(model, path.split("/") if path else ()), multiplier)
        found.add(lm.attached_rules(model))
    [rules] = found
    assert pairs(rules) == [("head/bias", 0.5), ("head", None), ("trunk", 2.0), (..., 0.1)]


def test_metadata_that_was_given_at_construction():
    model = nnx.Dict(
        a=linear(kernel_metadata={"lr_mult": None}, bias_metadata={"lr_mult": ramp}),
        b=nnx.Dict(w=nnx.Param(jnp.ones(2), lr_mult=0.5)),
        c=linear(kernel_init=nnx.with_metadata(INIT, lr_mult=2)),
        d=nnx.BatchNorm(2, rngs=nnx.Rngs(0), scale_metadata={"lr_mult": 3}),
    )
    wanted = [("a/bias", ramp), ("a/kernel", None), ("b/w", 0.5), ("c/kernel", 2.0)]
    wanted.append(("d/scale", 3.0))
    assert pairs(lm.attached_rules(model)) == wanted
    assert pairs(lm.attached_rules(nnx.state(model))) == wanted  # variables carry it in a state too
    lm.attach(model.a.kernel, 4)
    lm.attach(model.a, 5)
    assert planned(lm.attached_rules(model), params_of(model))["a/kernel"] == 4.0


def test_what_can_be_attached():
    assert pairs(lm.attached_rules(lm.attach(linear(), 0))) == [(..., None)]
    assert pairs(lm.attached_rules(lm.attach(linear(), np.float32(0.5)))) == [(..., 0.5)]
    assert pairs(lm.attached_rules(lm.attach(nnx.Param(jnp.ones(2)), ramp))) == [(..., ramp)]


class Inert(nnx.Pytree):
    """No module."""


class Callable(nnx.Pytree):
    """Nor is this, nor an initializer, though it can be called."""

    def __call__(self, *args):
        return args


@pytest.mark.parametrize(
    "target",
    [jnp.ones(2), {}, None, 3, "head", nnx.Linear, nn.Dense(2), nn.Dense, [Net], Inert()]
    + [nnx.state(Net()), Callable(), eqx.nn.Linear(2, 2, key=KEY)],
    ids=lambda target: type(target).__name__,
)
def test_what_nothing_can_be_attached_to(target):
    with pytest.raises(
        lm.RuleError, match=r"nothing can be attached|Equinox.*eqx\.field\(metadata"
    ):
        lm.attach(target, 0.1)


BAD = ["x", float("nan"), float("inf"), True, 1j, jnp.ones(()), jnp.ones(2), np.ones(3), [0.1]]


@pytest.mark.parametrize("multiplier", BAD, ids=repr)
def test_what_is_no_multiplier(multiplier):
    model = linear()
    for target in (model, model.kernel, INIT):
        with pytest.raises(lm.MultiplierError, match="attach"):
            lm.attach(target, multiplier)
    assert lm.attached_rules(model) == lm.Rules([])  # nothing of it is left


def attached_net():
    model = Net()
    for path, multiplier in [
        (("trunk",), None),
        (("trunk", "layers", 0, "bias"), 0.5),
        (("parts", "a"), ramp),
        (("parts", "a", 1, "deep"), 2),
        (("head", "kernel"), None),
    ]:
        lm.attach(node(model, path), multiplier)
    return model


def jitted_in_place(model):
    nnx.jit(lambda model: model(jnp.ones((1, 2))))(model)
    return model


def differentiated(model):
    nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    return model


def updated(model):
    nnx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model)))
    return model


def merged_in_jit(model):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.jit(lambda state: jax.tree.map(jnp.sin, state))(state))


GOES_THROUGH = {
    "clone": nnx.clone,
    "split and merge": lambda model: nnx.merge(*nnx.split(model)),
    "merge in jit": merged_in_jit,
    "tree.map": lambda model: jax.tree.map(lambda leaf: leaf + 1, model),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "nnx.jit": jitted_in_place,
    "nnx.jit returns it": nnx.jit(lambda model: model),
    "jax.jit": jax.jit(lambda model: model),
    "nnx.grad": differentiated,
    "nnx.update": updated,
    "eval_shape": lambda model: nnx.eval_shape(lambda: nnx.clone(model)),
    "train and eval": lambda model: [model.eval(), model.train(), model][-1],
}


@pytest.mark.parametrize("name", GOES_THROUGH)
def test_nnx_what_is_attached_survives(name):
    model = attached_net()
    wanted = pairs(lm.attached_rules(model))
    assert wanted == [
        ("parts/a/1/deep", 2.0),
        ("trunk/layers/0/bias", 0.5),
        ("head/kernel", None),
        ("parts/a", ramp),
        ("trunk", None),
    ]
    after = GOES_THROUGH[name](model)
    assert pairs(lm.attached_rules(after)) == wanted
    assert pairs(lm.attached_rules(nnx.Dict(net=after)))[-1] == ("net/trunk", None)


def test_nnx_in_a_vmap_and_a_scan():
    def make(key):
        layer = linear(bias_metadata={"lr_mult": 2})
        lm.attach(layer.kernel, 0.5)
        return lm.attach(layer, None)

    layers = nnx.vmap(make)(jax.random.split(KEY, 3))
    wanted = [("bias", 2.0), ("kernel", 0.5), (..., None)]
    assert pairs(lm.attached_rules(layers)) == wanted
    nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        jnp.ones((1, 2)), layers
    )
    assert pairs(lm.attached_rules(layers)) == wanted
    assert layers.kernel.shape == (3, 2, 2)


def test_nnx_attach_within_jit_reaches_the_model_outside():
    model = Net()

    @nnx.jit
    def attach(model):
        lm.attach(model.head, 0.5)

    attach(model)
    assert pairs(lm.attached_rules(model)) == [("head", 0.5)]


def test_nnx_a_jitted_step_sees_what_is_attached_anew():
    model, seen = Net(), []

    @nnx.jit
    def step(model):
        seen.append(pairs(lm.attached_rules(model)))

    for multiplier in (0.5, 0.5, None):
        lm.attach(model.head, multiplier)
        step(model)
    assert seen == [[("head", 0.5)], [("head", None)]]


@both
def test_nnx_an_optimizer(make):
    model = Net()
    nnx.update(model, jax.tree.map(exact, nnx.state(model)))
    lm.attach(model.trunk, None)
    lm.attach(model.trunk.layers[0].bias, 0.5)
    lm.attach(model.parts, 2)
    lm.attach(model.parts.a[1].deep.kernel, -4)
    lm.attach(model.head, None)
    rules = lm.Rules([("head/kernel", 0.25)]) + lm.attached_rules(model)
    optimizer = nnx.Optimizer(model, make(optax.sgd(0.5), rules), wrt=nnx.Param)
    before = nnx.clone(params_of(model))
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: total(params_of(model)))(model))

    for _ in range(3):
        step(model, optimizer)
    assert len(traces) == 1
    wanted = dict.fromkeys(lm.paths(before), 0.0)
    for path in lm.paths(before):
        if path.startswith("parts"):
            wanted[path] = 2.0
    wanted |= {"trunk/layers/0/bias": 0.5, "parts/a/1/deep/kernel": -4.0, "head/kernel": 0.25}
    assert_trained(before, params_of(model), wanted, steps=3)
    assert lm.attached_rules(model) == rules[1:]


def test_nnx_containers_do_not_list_it():
    together = nnx.Dict(b=linear(), a=linear())
    layers = nnx.List([linear(), linear()])
    for each in (together, layers, nnx.Sequential(linear())):
        lm.attach(each, 0.5)
    assert (list(together), len(together), "a" in together) == (["b", "a"], 2, True)
    assert [type(value) for value in together.values()] == [nnx.Linear] * 2
    layers.append(linear())
    assert (len(layers), [type(layer) for layer in layers]) == (3, [nnx.Linear] * 3)
    del layers[0], together["b"]
    assert (len(layers), list(together)) == (2, ["a"])
    assert pairs(lm.attached_rules({"d": together, "l": layers})) == [("d", 0.5), ("l", 0.5)]
    for each in (together, layers):
        assert "lr_mult" not in repr(each)


def test_nnx_states_and_paths_do_not_change():
    model, plain = Net(), Net()
    for path in NODES:
        if not isinstance(node(model, path), nnx.Variable):
            lm.attach(node(model, path), 0.5)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))
    assert lm.paths(nnx.state(attached_net())) == lm.paths(nnx.state(plain)) == lm.paths(model)
    x = jnp.ones((3, 2))
    assert bits(attached_net()(x)) == bits(plain(x))


def test_nnx_replaced_parts_carry_what_they_were_given():
    model = attached_net()
    model.parts.a[1].deep = linear()
    model.head.kernel = nnx.Param(model.head.kernel[...])
    model.trunk.layers[0].bias[...] = jnp.ones(2)  # the variable is the same
    wanted = [("trunk/layers/0/bias", 0.5), ("parts/a", ramp), ("trunk", None)]
    assert pairs(lm.attached_rules(model)) == wanted
    model.parts.a.append(lm.attach(linear(), 3))
    assert ("parts/a/2", 3.0) in pairs(lm.attached_rules(model))
    model.trunk = attached_net().parts
    assert ("trunk/a/1/deep", 2.0) in pairs(lm.attached_rules(model))
    assert ("trunk", None) not in pairs(lm.attached_rules(model))


class Unsorted(nnx.Module):
    def __init__(self, early=None, late=None):
        if early:
            lm.attach(self, early)
        self.second, self.first = linear(), linear()
        if late:
            lm.attach(self, late)


@pytest.mark.parametrize("when", [{"early": 0.5}, {"late": 0.5}], ids=str)
def test_nnx_the_order_of_layers_is_told_as_before(when):
    plain, model = Unsorted(), Unsorted(**when)
    assert pairs(lm.attached_rules(model)) == [(..., 0.5)]
    assert lm.structure_of(model) == lm.structure_of(plain)
    assert lm.structure_of(model).order[""] == ("second", "first")
    structure = lm.structure_of(model)
    assert set(frozen([(0, None)], params_of(model), structure=structure)) == {
        "second/bias",
        "second/kernel",
    }
    # A model whose attributes NNX has sorted tells no order, with or without a multiplier.
    assert lm.structure_of(nnx.clone(model)) == lm.structure_of(nnx.clone(plain))
    assert "" not in lm.structure_of(lm.attach(nnx.clone(plain), 0.5)).order
    assert lm.structure_of(attached_net()) == lm.structure_of(Net())


class Tied(nnx.Module):
    """The state keeps the path of each array that comes first in the alphabet."""

    def __init__(self):
        self.z = nnx.Dict(layer=linear())
        self.a = self.z.layer
        self.embed = nnx.Embed(4, 2, rngs=nnx.Rngs(0))
        self.head = Head(self.embed.embedding)


class Head(nnx.Module):
    def __init__(self, kernel):
        self.kernel, self.bias = kernel, nnx.Param(jnp.ones(4))


TIED = ["a/bias", "a/kernel", "embed/embedding", "head/bias"]


@pytest.mark.parametrize("told", [False, True], ids=["alone", "with structure_of"])
@pytest.mark.parametrize(
    ("attached", "wanted"),
    [
        ({"z": None}, [0, 0, 1, 1]),
        ({"a": None}, [0, 0, 1, 1]),
        ({"head": None}, [1, 1, 0, 0]),
        ({"head/kernel": None}, [1, 1, 0, 1]),
        ({"embed": None}, [1, 1, 0, 1]),
        ({"head": None, "head/kernel": 2}, [1, 1, 2, 0]),
        ({"z": None, "a/bias": 2}, [2, 0, 1, 1]),
        ({"": 3, "z": None, "head": 2}, [0, 0, 2, 2]),
    ],
    ids=str,
)
def test_nnx_a_shared_array_has_what_is_attached_on_any_of_its_paths(attached, wanted, told):
    for order in (list(attached), list(attached)[::-1]):
        model = Tied()
        for path in order:
            lm.attach(node(model, path.split("/") if path else ()), attached[path])
        options = {"structure": lm.structure_of(model)} if told else {}
        state = params_of(model)
        assert lm.paths(state) == TIED
        got = planned(lm.attached_rules(model), state, **options)
        assert got == dict(zip(TIED, wanted, strict=True))


def test_nnx_a_module_that_knows_the_one_that_holds_it():
    model = nnx.Dict(child=nnx.Dict(w=nnx.Param(jnp.ones(2))))
    model.child.parent = model
    lm.attach(model, 0.5)
    lm.attach(model.child.w, None)
    assert frozen(lm.attached_rules(model), params_of(model)) == ["child/w"]
    assert planned(lm.attached_rules(lm.attach(model, 0.5)), params_of(model)) == {"child/w": 0.0}


# Linen ------------------------------------------------------------------------------------------

partitioned = functools.partial(nn.with_partitioning, names=(None, "model"))
logical = functools.partial(nn.with_logical_partitioning, names=("in", "out"))
FORMS = {
    "alone": (lambda init: init, lambda init, m: lm.attach(init, m)),
    "outside": (partitioned, lambda init, m: lm.attach(partitioned(init), m)),
    "inside": (partitioned, lambda init, m: partitioned(lm.attach(init, m))),
    "outside logical": (logical, lambda init, m: lm.attach(logical(init), m)),
    "inside logical": (logical, lambda init, m: logical(lm.attach(init, m))),
}
in_every_form = pytest.mark.parametrize("form", FORMS)
LAYERS = {
    "dense": lambda init: nn.Dense(3, kernel_init=init),
    "several axes": lambda init: nn.DenseGeneral((2, 3), kernel_init=init),
    "convolution": lambda init: nn.Conv(3, (2,), kernel_init=init),
    "attention": lambda init: nn.MultiHeadDotProductAttention(2, kernel_init=init),
    "norm": lambda init: nn.LayerNorm(scale_init=init),
}
SEQUENCE = jax.random.normal(KEY, (2, 4, 6))


@in_every_form
@pytest.mark.parametrize("layer", LAYERS)
def test_linen_a_model_computes_as_without(layer, form):
    without, attaching = FORMS[form]
    plain, module = LAYERS[layer](without(INIT)), LAYERS[layer](attaching(INIT, 0.1))
    wanted = plain.init(KEY, SEQUENCE)
    variables = module.init(KEY, SEQUENCE)
    assert lm.paths(variables) == lm.paths(wanted)
    assert bits(variables) == bits(wanted)
    unboxed = nn.meta.unbox(variables)
    assert jax.tree.structure(unboxed) == jax.tree.structure(nn.meta.unbox(wanted))
    result = plain.apply(wanted, SEQUENCE)
    for given in (variables, unboxed):
        assert bits(module.apply(given, SEQUENCE)) == bits(result)
    rules = pairs(lm.attached_rules(variables["params"]))
    assert [target.split("/")[-1] for target, _ in rules] == ["kernel"] * len(rules) or (
        layer == "norm" and rules == [("scale", 0.1)]
    )
    assert rules
    assert {multiplier for _, multiplier in rules} == {0.1}
    abstract = jax.eval_shape(module.init, KEY, SEQUENCE)
    assert pairs(lm.attached_rules(abstract["params"])) == rules


def dense(multiplier=0.5, form="alone"):
    kernel = FORMS[form][1](INIT, multiplier)
    return nn.Sequential([nn.Dense(3, kernel_init=kernel), jnp.tanh, nn.Dense(2)])


X = jax.random.normal(KEY, (5, 4))


def made(form="alone", multiplier=0.5):
    return dense(multiplier, form).init(KEY, X)["params"]


def jit_of_it(params):
    return jax.jit(lambda params: jax.tree.map(jnp.sin, params))(params)


def through_bytes(params):
    blank = jax.tree.map(jnp.zeros_like, params)
    return flax.serialization.from_bytes(blank, flax.serialization.to_bytes(params))


def through_grad(params):
    return jax.grad(lambda params: dense().apply({"params": params}, X).sum())(params)


def through_updates(params):
    tx = optax.adamw(0.1)
    return optax.apply_updates(params, tx.update(params, tx.init(params), params)[0])


LINEN_GOES_THROUGH = {
    "jit": jit_of_it,
    "grad": through_grad,
    "tree.map": lambda params: jax.tree.map(lambda leaf: leaf + 1, params),
    "eval_shape": lambda params: jax.eval_shape(lambda: params),
    "vmap": lambda params: jax.vmap(lambda _: params)(jnp.arange(3)),
    "freeze": freeze,
    "bytes": through_bytes,
    "pickle": lambda params: pickle.loads(pickle.dumps(params)),
    "deepcopy": copy.deepcopy,
    "apply_updates": through_updates,
    "box again": lambda params: nn.meta.replace_boxed(params, nn.meta.unbox(params)),
    "a list": lambda params: jax.tree.unflatten(
        jax.tree.structure(params), jax.tree.leaves(params)
    ),
}


@in_every_form
@pytest.mark.parametrize("name", LINEN_GOES_THROUGH)
def test_linen_the_box_survives(name, form):
    params = made(form)
    after = LINEN_GOES_THROUGH[name](params)
    assert pairs(lm.attached_rules(after)) == [("layers_0/kernel", 0.5)]
    assert lm.paths(after) == lm.paths(params)
    if name != "freeze":
        assert jax.tree.structure(after) == jax.tree.structure(params)
    if name in ("bytes", "box again"):
        assert bits(after) == bits(params)


@in_every_form
def test_linen_the_box_survives_orbax(form, tmp_path):
    params = made(form)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "params", jax.eval_shape(lambda: params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert bits(back) == bits(params)
    assert pairs(lm.attached_rules(back)) == [("layers_0/kernel", 0.5)]


def lifted(kind, init):
    if kind == "none":
        return nn.Dense(3, kernel_init=init), (X,)
    lift = {"split_rngs": {"params": True}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
    if kind == "vmap":
        lift["variable_axes"] = {"params": 0}
        return nn.vmap(nn.Dense, in_axes=None, axis_size=3, **lift)(3, kernel_init=init), (X,)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(4, kernel_init=init)(x), None

    lift["variable_axes"] = {"params": 1 if kind == "scan, axis 1" else 0}
    return nn.scan(Block, length=3, **lift)(), (X, None)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *[("none", form) for form in FORMS],
        ("vmap", "outside"),
        ("vmap", "inside logical"),
        ("scan", "alone"),
        ("scan", "outside logical"),
        ("scan, axis 1", "outside"),
        ("scan, axis 1", "inside"),
    ],
)
def test_linen_lifted_and_sharded_as_without(kind, form):
    without, attaching = FORMS[form]
    (plain, inputs), (module, _) = lifted(kind, without(INIT)), lifted(kind, attaching(INIT, 0.1))
    wanted, found = (jax.eval_shape(each.init, KEY, *inputs) for each in (plain, module))
    assert nn.get_partition_spec(found) == nn.get_partition_spec(wanted)
    assert [m for _, m in pairs(lm.attached_rules(found))] == [0.1]
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    if "logical" in form:
        axes = [("in", None), ("out", "model"), ("layers", None)]
        specs = map(nn.get_partition_spec, (found, wanted))
        shardings = [nn.logical_to_mesh_sharding(each, mesh, axes) for each in specs]
    elif kind == "none":
        shardings = [nn.get_sharding(each, mesh) for each in (found, wanted)]
    else:  # the mesh has no axis for the layers
        shardings = [0, 0]
    assert shardings[0] == shardings[1]
    told = lm.structure_of(module, KEY, *inputs)
    assert told == lm.structure_of(plain, KEY, *inputs)
    assert bool(told.stacked) == (kind != "none")
    shapes = [jax.eval_shape(m.apply, v, *inputs) for m, v in ((module, found), (plain, wanted))]
    assert shapes[0] == shapes[1]


def test_linen_a_scan_computes_as_without():
    (plain, inputs), (module, _) = lifted("scan", INIT), lifted("scan", lm.attach(INIT, 0.1))
    wanted, found = (jax.jit(each.init)(KEY, *inputs) for each in (plain, module))
    assert bits(found) == bits(wanted)
    results = [jax.jit(m.apply)(v, *inputs) for m, v in ((module, found), (plain, wanted))]
    assert bits(results[0]) == bits(results[1])


@pytest.mark.parametrize(
    ("init", "multiplier"),
    [
        (lm.attach(lm.attach(INIT, 0.1), None), None),
        (lm.attach(lm.attach(INIT, None), 1), 1.0),
        (lm.attach(partitioned(lm.attach(INIT, 0.1)), 2), 2.0),
        (lm.attach(lm.attach(partitioned(INIT), 0.1), ramp), ramp),
        (lm.attach(lm.attach(partitioned(lm.attach(INIT, 3)), 0.1), -1), -1.0),
    ],
)
def test_linen_attached_anew(init, multiplier):
    params = nn.Dense(3, kernel_init=init).init(KEY, X)["params"]
    assert pairs(lm.attached_rules(params)) == [("kernel", multiplier)]
    assert bits(params["kernel"]) == bits(nn.Dense(3, kernel_init=INIT).init(KEY, X)["params"])[1:]


def test_linen_attach_leaves_the_initializer_alone():
    attached = lm.attach(INIT, 0.1)
    assert attached is not INIT
    assert isinstance(INIT(KEY, (2,)), jax.Array)
    assert lm.attached_rules(INIT(KEY, (2,))) == lm.Rules([])
    assert pairs(lm.attached_rules(attached(KEY, (2,)))) == [(..., 0.1)]
    assert pairs(lm.attached_rules({"w": attached(KEY, shape=(2,))})) == [("w", 0.1)]


@both
@in_every_form
def test_linen_a_train_state(make, form):
    module = dense(2, form)
    params = jax.tree.map(exact, module.init(KEY, X)["params"])
    rules = lm.Rules([("layers_2/kernel", None)]) + lm.attached_rules(params)
    tx = make(optax.sgd(0.5), rules)
    state = TrainState.create(apply_fn=module.apply, params=params, tx=tx)
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state.apply_gradients(grads=jax.grad(total)(state.params))

    for _ in range(3):
        state = step(state)
    assert len(traces) == 1
    wanted = {"layers_0/kernel": 2, "layers_2/kernel": None}
    wanted |= {"layers_0/bias": 1, "layers_2/bias": 1}
    assert_trained(params, state.params, wanted, steps=3)
    assert pairs(lm.attached_rules(state.params)) == [("layers_0/kernel", 2.0)]


def test_linen_modules_are_no_parameters():
    for module in (dense(), dense().bind({"params": made()})):
        with pytest.raises(lm.RuleError, match=r"Sequential.*attached_rules\(params\)"):
            lm.attached_rules(module)


def test_bridges_between_linen_and_nnx_carry_it():
    plain = nnx.bridge.ToNNX(nn.Dense(3, kernel_init=INIT), rngs=nnx.Rngs(0)).lazy_init(X)
    attached = nn.Dense(3, kernel_init=lm.attach(INIT, None))
    model = nnx.bridge.ToNNX(attached, rngs=nnx.Rngs(0)).lazy_init(X)
    assert bits(model(X)) == bits(plain(X))
    assert pairs(lm.attached_rules(model)) == [("kernel", None)]


def test_bridges_between_nnx_and_linen_carry_it():
    module = nnx.bridge.to_linen(nnx.Linear, 4, 3, kernel_metadata={"lr_mult": None})
    params = module.init(KEY, X)["params"]
    assert [multiplier for _, multiplier in pairs(lm.attached_rules(params))] == [None]
    with pytest.raises(lm.RuleError, match="attached_rules"):
        lm.scale_by_rules([]).init(params)


# Equinox ----------------------------------------------------------------------------------------


def carrying(multiplier, **options):
    return eqx.field(metadata={"lr_mult": multiplier}, **options)


class Leaf(eqx.Module):
    free: Any
    w: Any = carrying(0.5)
    lin: Any = carrying(None)
    size: int = carrying(3, static=True, default=7)

    def __init__(self):
        self.free, self.w = jnp.ones(2), jnp.ones(3)
        self.lin = eqx.nn.Linear(2, 2, key=KEY)


class Same(Leaf):
    """Inherits what the fields carry."""


class Other(Leaf):
    """Declares one of them anew, and drops that of another."""

    w: Any = carrying(2)
    lin: Any

    def __init__(self):
        super().__init__()


class Outer(eqx.Module):
    one: Leaf = carrying(-1)  # what stands further in counts first
    rest: list[Any]
    none: Any = carrying(9, default=None)

    def __init__(self):
        self.one, self.rest = Leaf(), [Same(), {"o": Other()}]


class Outermost(eqx.Module):
    model: Outer = carrying(4)
    tail: Any

    def __init__(self):
        self.model, self.tail = Outer(), jnp.ones(2)


def leaf_plan(path, free, w, lin):
    return {f"{path}free": free, f"{path}w": w, f"{path}lin/weight": lin, f"{path}lin/bias": lin}


ARRAYS = eqx.is_array
OUTER = (
    leaf_plan("one/", -1.0, 0.5, 0.0)
    | leaf_plan("rest/0/", 1.0, 0.5, 0.0)
    | leaf_plan("rest/1/o/", 1.0, 2.0, 1.0)
)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (Leaf, leaf_plan("", 1.0, 0.5, 0.0)),
        (Same, leaf_plan("", 1.0, 0.5, 0.0)),
        (Other, leaf_plan("", 1.0, 2.0, 1.0)),
        (Outer, OUTER),
        (
            Outermost,
            {f"model/{path}": 4.0 if m == 1.0 else m for path, m in OUTER.items()} | {"tail": 1.0},
        ),
    ],
)
def test_equinox_fields(make, wanted):
    model = make()
    if make is Outermost:  # what the class of `Other` dropped is not 1, but that further out
        wanted["model/rest/1/o/lin/weight"] = wanted["model/rest/1/o/lin/bias"] = 4.0
    params, static = eqx.partition(model, ARRAYS)
    rules = lm.attached_rules(model)
    assert planned(rules, params) == wanted
    for each in (params, eqx.filter(model, lambda leaf: False), static, jax.eval_shape(make)):
        assert lm.attached_rules(each) == rules
    for after in (
        jax.tree.map(jnp.sin, params),
        eqx.filter_jit(lambda model: model)(model),
        eqx.filter_grad(lambda model: total(eqx.filter(model, ARRAYS)))(model),
    ):
        assert planned(lm.attached_rules(after), eqx.filter(after, ARRAYS)) == wanted
    for tx in (lm.scale_by_rules(rules), lm.wrap(optax.adam(0.1), rules)):
        optax.tree.map_params(tx, jnp.zeros_like, tx.init(params))


def test_equinox_what_was_cut_out_is_passed_over():
    model = Outer()
    rules = lm.attached_rules(model)
    params = eqx.filter(model, ARRAYS)
    bare = eqx.tree_at(lambda model: (model.one.w, model.rest[0].lin.bias), params, (None, None))
    got = planned(rules, bare)
    assert got == {path: OUTER[path] for path in lm.paths(bare)}
    assert len(got) == len(OUTER) - 2
    replaced = eqx.tree_at(lambda model: model.rest[0], model, Other())
    assert planned(lm.attached_rules(replaced), eqx.filter(replaced, ARRAYS))["rest/0/w"] == 2.0


@both
def test_equinox_trains(make):
    params = jax.tree.map(exact, eqx.filter(Outer(), ARRAYS))
    tx = make(optax.sgd(0.5), lm.Rules([("one/free", None)]) + lm.attached_rules(params))
    state, after = tx.init(params), params
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, after)
        after = optax.apply_updates(after, updates)
    assert_trained(params, after, OUTER | {"one/free": None}, steps=3)


class Weights(eqx.Module):
    emb: Any
    head: Any = carrying(None)

    def __init__(self):
        self.emb = eqx.nn.Embedding(3, 2, key=KEY)
        self.head = eqx.nn.Linear(2, 3, key=KEY, use_bias=False)


def tied_weights():
    return eqx.nn.Shared(Weights(), lambda m: m.head.weight, lambda m: m.emb.weight)


def test_equinox_a_shared_array():
    """The tree holds it where nothing is attached; it stands below what carries a multiplier."""
    model = tied_weights()
    params, structure = eqx.filter(model, ARRAYS), lm.structure_of(model)
    assert lm.paths(params) == ["pytree/emb/weight"]
    rules = lm.attached_rules(model)
    assert frozen(rules, params, structure=structure) == ["pytree/emb/weight"]
    with pytest.raises(lm.RuleError, match=r"^'pytree/emb/weight' carries .*attached_rules"):
        lm.scale_by_rules([], structure=structure).init(params)


# attached_rules ---------------------------------------------------------------------------------


class Boxed(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """Somebody else's box."""

    value: Any
    lr_mult: Any = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def field_of(multiplier):
    return type("Field", (eqx.Module,), {"__annotations__": {"w": Any}, "w": carrying(multiplier)})


# An array below "q/w" that carries a multiplier, in each of the ways.
CARRIERS = {
    "a variable": lambda m: nnx.state(
        nnx.Dict(q=nnx.Dict(w=nnx.Param(jnp.ones((2, 2)), lr_mult=m)))
    ),
    "a box": lambda m: {"q": {"w": Boxed(jnp.ones((2, 2)), m)}},
    "a field": lambda m: {"q": field_of(m)(jnp.ones((2, 2)))},
}
everywhere = pytest.mark.parametrize("kind", CARRIERS)


@everywhere
@pytest.mark.parametrize("multiplier", BAD, ids=repr)
def test_bad_metadata_is_named_by_its_place(kind, multiplier):
    with pytest.raises(lm.MultiplierError, match="'q/w'"):
        lm.attached_rules(CARRIERS[kind](multiplier))
    if isinstance(multiplier, str):
        with pytest.raises(lm.MultiplierError, match="'q/w'"):
            lm.scale_by_rules([(..., 1)]).init(CARRIERS[kind](multiplier))


@pytest.mark.parametrize(
    "model",
    [None, 3, {}, [], jnp.ones(2), Net(), {"w": jnp.ones(2)}, nnx.state(Net()), {"f": jnp.tanh}]
    + [eqx.nn.MLP(2, 2, 2, 1, key=KEY), nn.Dense(2).init(KEY, X)],
    ids=lambda model: type(model).__name__,
)
def test_nothing_attached_is_no_rule(model):
    assert lm.attached_rules(model) == lm.Rules([])
    assert lm.Rules([("head", 1)]) + lm.attached_rules(model) == lm.Rules([("head", 1)])


@flax.struct.dataclass
class Struct:
    q: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    q: Any


class Pair(NamedTuple):
    q: Any


class Holder(nnx.Module):
    def __init__(self, q):
        self.q = nnx.data(q)


CONTAINERS = {
    "a dict": lambda q: {"q": q},
    "an OrderedDict": lambda q: collections.OrderedDict(q=q),
    "a FrozenDict": lambda q: freeze({"q": q}),
    "a NamedTuple": lambda q: Pair(q),
    "a list": lambda q: [q],
    "a tuple": lambda q: (q,),
    "a struct of Flax": Struct,
    "a registered dataclass": Registered,
    "a module of Equinox": lambda q: type("M", (eqx.Module,), {"__annotations__": {"q": Any}})(q),
    "a module of NNX": Holder,
    "lookahead": optax.LookaheadParams.init_synced,
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("kind", ["a box", "a field", "a variable"])
def test_it_is_found_in_every_container_that_has_paths(name, kind):
    inner = CARRIERS[kind](None)["q"]
    tree = CONTAINERS[name](inner)
    assert all(path.endswith("/w") for path in lm.paths(tree))
    rules = lm.attached_rules(tree)
    assert frozen(rules, tree) == lm.paths(tree)
    with pytest.raises(lm.RuleError, match="attached_rules"):
        lm.scale_by_rules([]).init(tree)
    lm.scale_by_rules(rules).init(tree)


def test_names_that_mean_something_in_a_rule():
    keys = ["a*b", "**", "{x,y}", "c[0]", "d/e", r"back\slash", "?", "layers"]
    model = nnx.Dict(**{key: linear() for key in keys})
    for key in keys[:-1]:
        lm.attach(model[key], None)
    state = params_of(model)
    got = planned(lm.attached_rules(model), state)
    assert {path for path, multiplier in got.items() if multiplier == 1} == {
        "layers/bias",
        "layers/kernel",
    }
    params = {"a*": made(), "b/c": {"layers_0": made()}}
    got = planned(lm.attached_rules(params), params)
    assert sorted(p for p, m in got.items() if m == 0.5) == [
        r"a\*/layers_0/kernel",
        "b/c/layers_0/layers_0/kernel",
    ]


def test_rules_of_the_call_come_first():
    model = attached_net()
    state = params_of(model)
    rules = lm.attached_rules(model)
    for above in ([("trunk", 3)], [("trunk/layers[:1]", 3)], [("**/layers/0", 3)]):
        got = planned(lm.Rules(above) + rules, state)
        assert got["trunk/layers/0/kernel"] == got["trunk/layers/0/bias"] == 3.0
    got = planned(lm.Rules([(..., 3)]) + rules, state)  # optional: no rule is shadowed
    assert set(got.values()) == {3.0}
    assert planned(rules + [(..., 3)], state)["parts/b/bias"] == 3.0
    part = {"head": state["head"]}
    assert frozen(rules, part) == ["head/kernel"]  # nor is any unmatched


# init -------------------------------------------------------------------------------------------

BELOW = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("a", tx)),
    "masked": lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    "partition": lambda tx: optax.partition(
        {"a": tx}, lambda params: jax.tree.map(lambda _: "a", params)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), tx)
    )(rate=0.1),
    "jit": lambda tx: tx._replace(init=jax.jit(tx.init)),
    "eval_shape": lambda tx: tx._replace(init=functools.partial(jax.eval_shape, tx.init)),
    "wrap": lambda tx: lm.wrap(tx, [(..., 1)]),
}
SAYS = r"^'q/w' carries the multiplier {}, but .*rules \+ lrmult\.attached_rules\("


@both
@everywhere
@pytest.mark.parametrize("below", BELOW)
def test_init_raises_where_no_rule_speaks(below, kind, make):
    for multiplier, text in ((None, "frozen"), (0.5, "0.5"), (ramp, "schedule ramp")):
        params = CARRIERS[kind](multiplier)
        with pytest.raises(lm.RuleError, match=SAYS.format(text)):
            BELOW[below](make(optax.sgd(0.1), [])).init(params)
        BELOW[below](make(optax.sgd(0.1), lm.attached_rules(params))).init(params)


EITHER_ROW = [(lm.rows("q/w", 0), 2), (lm.rows("q/w", 1), 3)]


@both
@everywhere
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("rules", "raises"),
    [
        ([], True),
        (EITHER_ROW[:1], True),
        ([(lm.neurons("q/w", 1, axis=0), None)], True),
        ([(lm.elements("q/w", np.eye(2, dtype=bool)), None)], True),
        (lm.optional([("elsewhere", 1)]), True),
        (lm.optional([(lm.elements("q/w", np.zeros((2, 2), bool)), 1)]), True),
        (EITHER_ROW, False),
        ([*EITHER_ROW[:1], ("q", 1)], False),
        ([(lm.elements("q/w", np.ones((2, 2), bool)), None)], False),
        ([(..., 1)], False),
        (1, False),
        ([("**/w", 1)], False),
        ([(lambda path, leaf: True, ramp)], False),
        (lm.optional([("q", 0.5)]), False),
    ],
)
def test_init_asks_for_a_rule_for_every_element(kind, rules, raises, strict, make):
    tx = make(optax.sgd(0.1), rules, strict=strict)
    params = CARRIERS[kind](None)
    if raises:
        with pytest.raises(lm.RuleError, match=SAYS.format("frozen")):
            tx.init(params)
    else:
        tx.init(params)


@both
@everywhere
@pytest.mark.parametrize("multiplier", [1, 1.0, np.float32(1)], ids=repr)
def test_init_lets_pass_what_nothing_is_lost_of(kind, multiplier, make):
    tx = make(optax.sgd(0.1), [])
    tx.init(CARRIERS[kind](multiplier))
    params = CARRIERS[kind](None)
    optax.masked(tx, jax.tree.map(lambda _: False, params)).init(params)  # it is not in the tree


@both
def test_init_sees_the_multiplier_that_counts(make):
    """One of 1 is further in than what would have been dropped."""
    tx = make(optax.sgd(0.1), [("rest", 1), ("one/lin", 1), ("one/w", 1)])
    with pytest.raises(lm.RuleError, match=r"^'one/free' carries the multiplier -1,"):
        tx.init(eqx.filter(Outer(), ARRAYS))
    tx = make(optax.sgd(0.1), [])
    slow, full = field_of(0.5), field_of(1)
    tx.init(slow(full(jnp.ones(2))))
    with pytest.raises(lm.RuleError, match=r"^'w/w' carries the multiplier 0\.5,"):
        tx.init(full(slow(jnp.ones(2))))


@everywhere
def test_only_init_asks(kind):
    params = CARRIERS[kind](None)
    assert planned([], params) == {"q/w": 1.0}
    assert jax.tree.leaves(lm.trainable_mask([])(params)) == [True]
    assert bits(lm.stop_frozen(params, [])) == bits(params)
    for tx in (lm.scale_by_rules([]), lm.wrap(optax.sgd(1.0), [])):
        state = tx.init(jax.tree.map(jnp.ones_like, {"q": {"w": jnp.ones((2, 2))}}))
        updates, _ = tx.update(params, state)
        assert len(jax.tree.leaves(updates)) == 1
    covered = lm.wrap(optax.adam(0.1), lm.attached_rules(params))
    state = optax.tree.map_params(covered, jnp.ones_like, covered.init(params))
    assert optax.MaskedNode() in jax.tree.leaves(
        state, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )


def test_init_sees_what_an_nnx_module_carries_if_it_is_given_the_module():
    model = nnx.Dict(a=lm.attach(linear(), None), b=linear())
    with pytest.raises(lm.RuleError, match=r"^'a/bias' carries .*attached_rules"):
        lm.scale_by_rules([]).init(model)
    lm.scale_by_rules(lm.attached_rules(model)).init(model)
    model = nnx.Dict(a=linear(kernel_metadata={"lr_mult": 2}))
    with pytest.raises(
        lm.RuleError, match=r"^'a/kernel' carries the multiplier 2, .*attached_rules"
    ):
        nnx.Optimizer(model, lm.scale_by_rules([]), wrt=nnx.Param)


# of_type ----------------------------------------------------------------------------------------


class MyLinear(nnx.Linear):
    pass


class Zoo(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.lin = nnx.Linear(2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 4, rngs=rngs, base_module=MyLinear(4, 4, rngs=rngs))
        self.more = nnx.List([nnx.LayerNorm(4, rngs=rngs), nnx.Dict(d=MyLinear(4, 4, rngs=rngs))])


def below(*nodes):
    return {f"{node}/{name}" for node in nodes for name in ("bias", "kernel")}


LORA, STATS = {"lora/lora_a", "lora/lora_b"}, {"norm/mean", "norm/var"}
MINE = below("lora/base_module", "more/1/d")
NORMED = {"more/0/bias", "more/0/scale"}
ZOO = nnx.state(Zoo())
ALL = set(lm.paths(ZOO))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (nnx.LoRAParam, LORA),
        (nnx.BatchStat, STATS),
        (nnx.Param, ALL - STATS),
        (nnx.Variable, ALL),
        ((nnx.LoRAParam, nnx.BatchStat), LORA | STATS),
        (MyLinear, MINE),
        (nnx.Linear, MINE | below("lin")),
        (nnx.LoRA, LORA | below("lora/base_module")),
        ((nnx.LayerNorm, nnx.LoRAParam), NORMED | LORA),
        (nnx.List, NORMED | below("more/1/d")),
        (nnx.Module, ALL),
        (Zoo, ALL),
    ],
)
def test_nnx_types(kind, wanted):
    model = Zoo()
    target = lm.of_type(model, kind)
    assert set(frozen([(target, None)], ZOO)) == wanted
    assert set(frozen([(lm.of_type(nnx.clone(model), kind), None)], model)) == wanted
    nested = lm.of_type(nnx.Dict(top=model), kind)
    assert set(frozen([(nested, None)], {"top": ZOO})) == {f"top/{path}" for path in wanted}
    if isinstance(kind, type) and issubclass(kind, nnx.Variable):
        assert set(frozen([(lm.of_type(ZOO, kind), None)], ZOO)) == wanted
    got = planned([(target, 2)], jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(ZOO)))
    assert {path for path, multiplier in got.items() if multiplier == 2} == wanted


class MyEqx(eqx.nn.Linear):
    pass


class EqxZoo(eqx.Module):
    a: Any
    b: list[Any]
    activation: Any = jax.nn.relu

    def __init__(self):
        self.a = eqx.nn.Linear(2, 2, key=KEY)
        self.b = [MyEqx(2, 2, key=KEY), {"n": eqx.nn.LayerNorm(2)}, eqx.nn.MLP(2, 2, 2, 1, key=KEY)]


def weights(*nodes):
    return {f"{node}/{name}" for node in nodes for name in ("bias", "weight")}


MLP = weights("b/2/layers/0", "b/2/layers/1")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (MyEqx, weights("b/0")),
        (eqx.nn.Linear, weights("a", "b/0") | MLP),
        (eqx.nn.MLP, MLP),
        ((eqx.nn.LayerNorm, MyEqx), weights("b/0", "b/1/n")),
        (EqxZoo, weights("a", "b/0", "b/1/n") | MLP),
        (eqx.Module, weights("a", "b/0", "b/1/n") | MLP),
    ],
)
def test_equinox_types(kind, wanted):
    model = EqxZoo()
    params, static = eqx.partition(model, ARRAYS)
    for each in (model, params, static, jax.eval_shape(lambda: params)):
        assert set(frozen([(lm.of_type(each, kind), None)], params)) == wanted


def test_shared_arrays_by_type():
    model = Tied()
    state = params_of(model)
    assert frozen([(lm.of_type(model, nnx.Linear), None)], state) == ["a/bias", "a/kernel"]
    assert frozen([(lm.of_type(model.z, nnx.Linear), None)], {"layer": state["a"]}) == [
        "layer/bias",
        "layer/kernel",
    ]
    told = {"structure": lm.structure_of(model)}
    target = lm.of_type(model, Head)
    assert frozen([(target, None)], state, **told) == ["embed/embedding", "head/bias"]
    model = tied_weights()
    params, told = eqx.filter(model, ARRAYS), {"structure": lm.structure_of(model)}
    target = lm.of_type(model, eqx.nn.Linear)
    assert frozen([(target, None)], params, **told) == ["pytree/emb/weight"]


def test_of_a_class_all_arrays_are_meant_those_it_shares_too():
    """The model tells on which other path the tree has it, without `structure=`."""
    model = Tied()
    target = lm.of_type(model, Head)
    assert frozen([(target, None)], params_of(model)) == ["embed/embedding", "head/bias"]


def test_parts_of_what_a_type_names():
    model = Zoo()
    target = lm.of_type(model, nnx.Linear)
    plan = lm.compile_rules([(lm.neurons(target, [0, 1]), None)], ZOO)
    cut = {leaf.path: leaf.frozen for leaf in plan.leaves if leaf.frozen}
    kernels = {"lin/kernel": 4, "lora/base_module/kernel": 8, "more/1/d/kernel": 8}
    assert cut == kernels | {path.replace("kernel", "bias"): 2 for path in kernels}
    plan = lm.compile_rules([(lm.rows(lm.of_type(model, nnx.LoRAParam), -1), None)], ZOO)
    assert {leaf.path: leaf.frozen for leaf in plan.leaves if leaf.frozen} == {
        "lora/lora_a": 2,
        "lora/lora_b": 4,
    }
    # Arrays without such a place are passed over, as for a pattern.
    plan = lm.compile_rules([(lm.along(target, 1, 0), None)], ZOO)
    assert {leaf.path for leaf in plan.leaves if leaf.frozen} == set(kernels)
    both = lm.neurons(lm.rows(target, 0), 0)
    assert lm.compile_rules([(both, None)], ZOO).leaves[1].frozen == 1
    with pytest.raises(lm.UnmatchedRuleError, match="nothing of that type"):
        lm.compile_rules([(lm.rows(lm.of_type(model, nnx.Conv), 0), None)], ZOO)


def test_layers_in_a_stack_by_type():
    model = nnx.Dict(layers=nnx.vmap(lambda key: linear())(jax.random.split(KEY, 3)))
    state, told = params_of(model), lm.structure_of(model)
    rules = [("layers[0]", 2), (lm.of_type(model, nnx.Linear), None)]
    for leaf in lm.compile_rules(rules, state, structure=told).leaves:
        assert (leaf.shape[0], leaf.frozen) == (3, 2 * leaf.trained)


@pytest.mark.parametrize(
    ("model", "kind", "tree", "says"),
    [
        (Zoo, nnx.Conv, ZOO, r"of_type\(Conv\) -> frozen\): .*nothing of that type"),
        (Zoo, (nnx.Conv, nnx.Embed), ZOO, r"of_type\(Conv or Embed\)"),
        (Zoo, nnx.BatchStat, nnx.state(Zoo(), nnx.Param), "'norm/mean' and 'norm/var'"),
        (lambda: ZOO, nnx.Linear, ZOO, "nothing of that type"),
        (Zoo, eqx.nn.Linear, ZOO, "nothing of that type"),
        (EqxZoo, nnx.Param, eqx.filter(EqxZoo(), ARRAYS), "nothing of that type"),
        (Zoo, nnx.BatchNorm, {"other": jnp.ones(2)}, "'norm'"),
    ],
)
def test_a_type_that_matches_nothing(model, kind, tree, says):
    rule = (lm.of_type(model(), kind), None)
    with pytest.raises(lm.UnmatchedRuleError, match=f"rule 0.*{says}"):
        lm.compile_rules([rule], tree)
    plan = lm.compile_rules(lm.optional([rule]), tree)
    assert not any(leaf.frozen for leaf in plan.leaves)
    with pytest.warns(UserWarning, match=says):
        lm.compile_rules([rule], tree, strict=False)


def test_a_type_in_a_hole_of_the_tree_is_no_mistake():
    model = EqxZoo()
    params = eqx.filter(model, ARRAYS)
    cut = eqx.tree_at(lambda model: model.b[1]["n"], params, optax.MaskedNode())
    assert frozen([(lm.of_type(model, eqx.nn.LayerNorm), None)], cut) == []
    with pytest.raises(lm.UnmatchedRuleError):
        lm.compile_rules([(lm.of_type(model, eqx.nn.LayerNorm), None)], {"c": params.a})


@pytest.mark.parametrize(
    ("make", "wrt"), [(chained, nnx.Param), (lm.wrap, nnx.LoRAParam)], ids=["chained", "wrapped"]
)
def test_types_in_an_optimizer(make, wrt):
    model = Zoo()
    nnx.update(model, jax.tree.map(exact, nnx.state(model)))
    rules = [(lm.of_type(model, nnx.LoRAParam), 2)] + [(..., None)] * (wrt is nnx.Param)
    optimizer = nnx.Optimizer(model, make(optax.sgd(0.5), rules), wrt=wrt)
    before = nnx.clone(nnx.state(model))

    @nnx.jit
    def step(model, optimizer):
        grad = nnx.grad(lambda m: total(nnx.state(m, wrt)), argnums=nnx.DiffState(0, wrt))
        optimizer.update(model, grad(model))

    step(model, optimizer)
    step(model, optimizer)
    wanted = dict.fromkeys(ALL, None) | dict.fromkeys(LORA, 2)
    assert_trained(before, nnx.state(model), wanted, steps=2)


def test_paths_are_those_of_the_model_that_was_given():
    model = Zoo()
    target = lm.of_type(model, nnx.BatchNorm)
    model.norm = linear()
    assert set(frozen([(target, None)], nnx.state(model))) == below("norm")
    with pytest.raises(lm.UnmatchedRuleError, match="nothing of that type"):
        lm.compile_rules([(lm.of_type(model, nnx.BatchNorm), None)], nnx.state(model))
    del model.norm
    with pytest.raises(lm.UnmatchedRuleError, match="'norm'"):
        lm.compile_rules([(target, None)], nnx.state(model))


def test_types_in_rules_compare_by_what_they_found():
    model = Zoo()
    one, same = lm.of_type(model, nnx.Linear), lm.of_type(nnx.clone(model), nnx.Linear)
    other = lm.of_type(model, MyLinear)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    rules = lm.Rules([(one, None)])
    assert rules == lm.Rules([(same, 0)]) == pickle.loads(pickle.dumps(rules))
    assert hash(rules) == hash(lm.Rules([(same, 0)]))
    assert rules != lm.Rules([(other, None)])
    model.more.append(linear())
    assert lm.of_type(model, nnx.Linear) != one
    assert repr(rules) == "Rules([(of_type(Linear), None)])"
    both = lm.of_type(model, (nnx.Linear, nnx.LoRAParam))
    assert repr(both) == "of_type(Linear or LoRAParam)"
    assert "0: of_type(Linear)" in str(lm.compile_rules(rules, ZOO))
    with pytest.raises(lm.ShadowedRuleError, match=r"of_type\(MyLinear\) -> 1"):
        lm.compile_rules([(one, None), (other, 1)], ZOO)


WRONG_KINDS = [3, "Linear", None, object, dict, type, nn.Dense, jax.Array, Zoo(), (nnx.Linear, 3)]


@pytest.mark.parametrize("kind", WRONG_KINDS, ids=lambda kind: getattr(kind, "__name__", None))
def test_what_is_no_type(kind):
    for model in (Zoo(), EqxZoo()):
        with pytest.raises(lm.PatternError, match=r"of_type\(model, .*is neither a type"):
            lm.of_type(model, kind)


LINEN = nn.Dense(2).init(KEY, X)["params"]


@pytest.mark.parametrize(
    "model",
    [Zoo, None, 3, jnp.ones(2), nn.Dense(2), [jnp.ones(2)], INIT, LINEN, freeze(LINEN)]
    + [nnx.to_pure_dict(ZOO)],
    ids=lambda model: type(model).__name__,
)
def test_what_has_no_types(model):
    """Found out later, it would pass as an optional rule that claims nothing."""
    with pytest.raises(lm.PatternError, match="is no module of NNX or Equinox; pass the model"):
        lm.of_type(model, nnx.Linear)
