"""What `LearningRateMultipliers` does in the Wolfram Language, row by row (W1 to W17), and its
examples (a) to (e), in nets of Linen, NNX and Equinox that are really trained.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

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
from tests.flags import OPTIONS

LIBRARIES = ("linen", "nnx", "equinox")
in_every_library = pytest.mark.parametrize("library", LIBRARIES)
KEY = jax.random.key(0)
X, Y, IMAGES = (
    jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    for seed, shape in enumerate([(6, 3), (6, 2), (6, 14, 14, 1)])
)


# Training -----------------------------------------------------------------------------------------


def arrays(params):
    """Copies of all arrays, by path."""
    return dict(zip(lm.paths(params), map(np.array, jax.tree.leaves(params)), strict=True))


def common(path):
    """A path as Linen has it; `layers/2/weight` and `layers_2/kernel` are the same."""
    return re.sub(r"\blayers/(\d+)", r"layers_\1", path).replace("weight", "kernel")


def squares(found, wanted):
    return jnp.mean((found - wanted) ** 2)


def cross_entropy(likelihoods, labels):  # of a net that ends in a softmax
    return -jnp.log(jnp.take_along_axis(likelihoods, labels[:, None], 1)).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A net of some library: what an optimizer sees of it, and how it is trained.

    `start(tx)` returns a function that makes one step and returns all arrays by path.
    """

    params: Any
    structure: lm.Structure
    attached: lm.Rules
    start: Callable
    model: Any = None  # that of Equinox, in which layers without parameters are no holes
    w: str = "kernel"

    @functools.cached_property
    def before(self):
        return arrays(self.params)

    @functools.cached_property
    def plain(self):
        """The arrays after a first step without rules."""
        return self.start(adamw())()

    @property
    def moved(self):
        """How far that moves each array."""
        return {path: self.plain[path] - array for path, array in self.before.items()}

    @functools.cached_property
    def paths(self):
        return {common(path): path for path in self.before}


def adamw():
    return optax.adamw(0.05, weight_decay=0.1)


def drawn(shapes, seed=0):
    """A tree with random arrays in place of shapes: libraries compile a program for each."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype) if is_shape else leaf

    return jax.tree.map(draw, shapes)


def linear(*sizes, **options):
    return nnx.Linear(*sizes, kernel_init=draw, bias_init=draw, **options)


def draw(key, shape, dtype, **_):
    return drawn(jax.ShapeDtypeStruct(shape, dtype), np.asarray(jax.random.key_data(key)))


def equinox(make, *args):
    return drawn(eqx.filter_eval_shape(make, *args))


def of_linen(module, params=None, x=X, y=Y, loss=squares):
    params = drawn(jax.eval_shape(module.init, KEY, x)["params"]) if params is None else params

    def start(tx):
        now = [params, tx.init(params)]

        @functools.partial(jax.jit, compiler_options=OPTIONS)
        def step(params, state):
            grads = jax.grad(lambda p: loss(module.apply({"params": p}, x), y))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def advance():
            now[:] = step(*now)
            return arrays(now[0])

        return advance

    return Net(params, lm.structure_of(module, KEY, x), lm.attached_rules(params), start)


def of_nnx(model, x=X, y=Y, loss=squares):
    structure = lm.structure_of(model)  # before anything has sorted its attributes
    attached = lm.attached_rules(model)

    def start(tx):
        copy = nnx.clone(model)
        optimizer = nnx.Optimizer(copy, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda model: loss(model(x), y))(model))

        def advance():
            step(copy, optimizer)
            return arrays(nnx.state(copy, nnx.Param))

        return advance

    return Net(nnx.state(model, nnx.Param), structure, attached, start)


def of_equinox(model, x=X, y=Y, loss=squares):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def start(tx):
        now = [params, tx.init(params)]

        @functools.partial(jax.jit, compiler_options=OPTIONS)
        def step(params, state):
            grads = jax.grad(lambda p: loss(jax.vmap(eqx.combine(p, static))(x), y))(params)
            updates, state = tx.update(grads, state, params)
            return eqx.apply_updates(params, updates), state

        def advance():
            now[:] = step(*now)
            return arrays(now[0])

        return advance

    return Net(params, lm.structure_of(model), lm.attached_rules(model), start, model, "weight")


def spread(wanted, net):
    """Multipliers by layer or by array, as multipliers by array; every entry must be of use."""
    found = {path: wanted.get(path, wanted.get(path.rpartition("/")[0])) for path in net.paths}
    assert None not in found.values(), found
    layers = {path.rpartition("/")[0] for path in net.paths}
    assert set(wanted) <= layers | set(net.paths)
    return found


def planned(net, rules):
    plan = lm.compile_rules(rules, net.params, structure=net.structure)
    return {common(leaf.path): leaf.multiplier for leaf in plan.leaves}


def check_refused(error, net, rules, text=None):
    params = net.params if net.model is None else net.model
    with pytest.raises(error, match=text):
        lm.compile_rules(rules, params, structure=net.structure)


def frozen_in(before, after):
    """The arrays that have kept every bit."""
    assert before.keys() == after.keys()
    return {common(path) for path in before if before[path].tobytes() == after[path].tobytes()}


def train(net, rules, wanted, make=None):
    """Train for three steps by rules, and see whether every array gets what is wanted."""
    wanted = spread(wanted, net)
    assert planned(net, rules) == wanted
    make = make or chained
    advance = net.start(make(rules, net.structure))
    first = advance()
    if not {0, 1}.issuperset(wanted.values()):  # it takes a training without rules to compare with
        for path, multiplier in wanted.items():
            path = net.paths[path]
            moved, whole = first[path] - net.before[path], net.moved[path]
            np.testing.assert_allclose(moved, multiplier * whole, atol=1e-6, err_msg=path)
    advance()
    after = advance()
    assert frozen_in(net.before, after) == {p for p, multiplier in wanted.items() if not multiplier}
    return after


def chained(rules, structure):
    return optax.chain(adamw(), lm.scale_by_rules(rules, structure=structure))


def wrapped(rules, structure):
    return lm.wrap(adamw(), rules, structure=structure)


@functools.cache
def same_everywhere(library, multiplier):
    """What all arrays of a chain get."""
    return dict.fromkeys(chain(library).paths, multiplier)


# The nets -----------------------------------------------------------------------------------------

# A chain of layers with unlike names; one is a net. Sorted by name, each stands somewhere else.
ORDER = ("stem", "mixer", "body", "head")
BODY = ("body/layers_0", "body/layers_2", "body/layers_4")
LAYERS = {"stem": ("stem",), "mixer": ("mixer",), "body": BODY, "head": ("head",)}


def layers_of(*parts):
    return [layer for part in parts for layer in LAYERS[part]]


def among(multiplier, *parts, rest=1.0):
    """What every layer gets when these parts get one multiplier, and the rest another."""
    everything = dict.fromkeys(layers_of(*ORDER), rest)
    return everything | dict.fromkeys(layers_of(*parts), multiplier)


class LinenChain(nn.Module):
    def setup(self):  # not in the order of the calls
        self.head = nn.Dense(2)
        self.body = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(4), nn.tanh, nn.Dense(4)])
        self.mixer = nn.Dense(4)
        self.stem = nn.Dense(4)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(jnp.tanh(self.mixer(jnp.tanh(self.stem(x)))))))


class NNXChain(nnx.Module):
    def __init__(self, rngs):
        self.stem = linear(3, 4, rngs=rngs)
        self.mixer = linear(4, 4, rngs=rngs)
        first, second, third = (linear(4, 4, rngs=rngs) for _ in range(3))
        self.body = nnx.Sequential(first, nnx.tanh, second, nnx.tanh, third)
        self.head = linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(jnp.tanh(self.mixer(jnp.tanh(self.stem(x)))))))


class EquinoxChain(eqx.Module):
    stem: eqx.nn.Linear
    mixer: eqx.nn.Linear
    body: eqx.nn.Sequential
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = iter(jax.random.split(key, 6))
        self.stem = eqx.nn.Linear(3, 4, key=next(keys))
        self.mixer = eqx.nn.Linear(4, 4, key=next(keys))
        first, second, third = (eqx.nn.Linear(4, 4, key=next(keys)) for _ in range(3))
        tanh = eqx.nn.Lambda(jnp.tanh)
        self.body = eqx.nn.Sequential([first, tanh, second, tanh, third])
        self.head = eqx.nn.Linear(4, 2, key=next(keys))

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(jnp.tanh(self.mixer(jnp.tanh(self.stem(x)))))))


@functools.cache
def chain(library):
    if library == "linen":
        return of_linen(LinenChain())
    if library == "nnx":
        return of_nnx(NNXChain(nnx.Rngs(0)))
    return of_equinox(equinox(EquinoxChain, KEY))


def sequential(library, layers, **data):
    """A Sequential of linear layers, given as (inputs, outputs), and functions."""

    def made(of_sizes, of_function=lambda function: function):
        return [of_sizes(*x) if isinstance(x, tuple) else of_function(x) for x in layers]

    if library == "linen":
        return of_linen(nn.Sequential(made(lambda _, outputs: nn.Dense(outputs))), **data)
    if library == "nnx":
        rngs = nnx.Rngs(0)
        return of_nnx(nnx.Sequential(*made(lambda *sizes: linear(*sizes, rngs=rngs))), **data)

    def make():
        of_sizes = functools.partial(eqx.nn.Linear, key=KEY)
        return eqx.nn.Sequential(made(of_sizes, eqx.nn.Lambda))

    return of_equinox(equinox(make), **data)


LABELS = jnp.arange(6) % 2
NO_PARAMETERS = "(no|without) (array|parameter)"  # what a message says


@functools.cache
def classifier(library):
    """Linear, tanh, linear, tanh, linear, softmax."""
    layers = [(3, 4), jnp.tanh, (4, 4), jnp.tanh, (4, 2), jax.nn.softmax]
    return sequential(library, layers, y=LABELS, loss=cross_entropy)


def of_classifier(multiplier, *layers, rest=1.0):
    return {f"layers_{i}": multiplier if i in layers else rest for i in (0, 2, 4)}


# The rows -----------------------------------------------------------------------------------------


def test_w1_the_first_rule_that_matches_gives_the_rate():
    net = chain("equinox")
    rules = [("stem", 0.5), ("**/bias", 2), ("head", 0.25), (("body", "layers", 0), None)]
    wanted = {path: 2.0 if path.endswith("bias") else 1.0 for path in net.paths}
    wanted |= {"stem/kernel": 0.5, "stem/bias": 0.5, "head/kernel": 0.25}
    wanted["body/layers_0/kernel"] = 0.0
    train(net, lm.Rules(rules), wanted)
    backwards = wanted | {"stem/bias": 2.0, "head/bias": 0.25, "body/layers_0/bias": 0.0}
    assert planned(net, rules[::-1]) == backwards


def test_w2_all_at_the_same_rate():
    net = chain("linen")
    after = net.start(chained(lm.Rules([]), net.structure))()
    assert frozen_in(net.plain, after) == set(net.paths)  # bit for bit as without rules
    assert planned(net, lm.Rules([])) == same_everywhere("linen", 1.0)
    train(net, lm.Rules(0.1), same_everywhere("linen", 0.1))


@in_every_library
def test_w3_a_named_part(library):
    net = chain(library)
    wanted = among(0.5, "body") | {"stem": 3.0, "mixer/kernel": 0.0, "mixer/bias": 1.0}
    train(net, [("stem", 3), ("body", 0.5), (f"mixer/{net.w}", None)], wanted)


@in_every_library
def test_w4_the_nth_layer(library):
    net = chain(library)
    for i, name in enumerate(ORDER):
        for position in (i, i - len(ORDER)):
            assert planned(net, [(position, 2)]) == spread(among(2.0, name), net), position
            with pytest.raises(lm.PositionError, match="structure="):
                lm.compile_rules([(position, 2)], net.params)
    for position in (len(ORDER), -len(ORDER) - 1):
        with pytest.raises(lm.IndexRangeError):
            planned(net, [(position, 2)])
    train(net, [(1, None), (-2, 2)], among(2.0, "body") | {"mixer": 0.0})


@in_every_library
def test_w4_layers_without_parameters_count(library):
    net = classifier(library)
    train(net, [("layers[2]", 2), ("layers[-2]", None)], of_classifier(2, 2) | {"layers_4": 0.0})
    for position, layer in ((0, 0), (4, 4), (-4, 2), (-6, 0)):
        assert planned(net, [(f"layers[{position}]", 2)]) == spread(of_classifier(2, layer), net)
    for position in (1, 3, 5, -1, -3):
        check_refused(lm.UnmatchedRuleError, net, [(f"layers[{position}]", 2)], NO_PARAMETERS)
    for position in (6, -7):
        check_refused(lm.IndexRangeError, net, [(f"layers[{position}]", 2)])
    if library == "linen":  # the root has the layers
        assert planned(net, [(-2, 2), (0, 0)]) == spread(
            of_classifier(2, 4) | {"layers_0": 0.0}, net
        )


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_w4_without_a_structure_the_end_is_not_known(library):
    net = classifier(library)
    for position in (-2, -1):
        with pytest.raises(lm.PositionError):
            lm.compile_rules([(f"layers[{position}]", 2)], net.params)


def test_w4_a_model_that_nnx_has_sorted_has_no_nth_layer():
    model = NNXChain(nnx.Rngs(0))
    before = lm.structure_of(model)
    nnx.grad(lambda model: squares(model(X), Y))(model)
    net = of_nnx(model)
    assert next(iter(net.paths)).startswith("body/")  # a position among these would be wrong
    for position in (0, 1, -1):
        check_refused(lm.PositionError, net, [(position, 2)], "order=")
    assert planned(net, [("body/layers[-3]", 2)])["body/layers_2/kernel"] == 2  # a list is a list
    for known in (before, net.structure | lm.Structure(order={"": ORDER})):
        net = dataclasses.replace(net, structure=known)
        assert planned(net, [(1, 2)]) == spread(among(2.0, "mixer"), net)


class NNXMixed(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(4))
        self.stem = linear(3, 4, rngs=rngs)
        self.act = jnp.tanh
        self.drop = nnx.Dropout(0.0)
        self.head = linear(4, 2, rngs=rngs)


class EquinoxMixed(eqx.Module):
    scale: jax.Array
    stem: eqx.nn.Linear
    act: Callable
    drop: eqx.nn.Identity
    head: eqx.nn.Linear

    def __init__(self, key):
        self.scale, self.act = jnp.ones(4), jnp.tanh
        self.stem, self.head = eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 2, key=key)
        self.drop = eqx.nn.Identity()


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_w4_modules_count_and_functions_and_arrays_do_not(library):
    net = (
        of_nnx(NNXMixed(nnx.Rngs(0)))
        if library == "nnx"
        else of_equinox(equinox(EquinoxMixed, KEY))
    )
    for position, layer in ((0, "stem"), (-3, "stem"), (2, "head"), (-1, "head")):
        wanted = {"scale": 1.0, "stem": 1.0, "head": 1.0} | {layer: 2.0}
        assert planned(net, [(position, 2)]) == spread(wanted, net)
    for position in (1, -2):
        check_refused(lm.UnmatchedRuleError, net, [(position, 2)], NO_PARAMETERS)
    check_refused(lm.IndexRangeError, net, [(3, 2)])


@in_every_library
def test_w5_a_span_of_layers(library):
    net = chain(library)
    for m in range(1, 5):  # counted from 1, both ends in, as they are there
        for n in range(m, 5):
            wanted = spread(among(2.0, *ORDER[m - 1 : n]), net)
            assert planned(net, [(slice(m - 1, n), 2)]) == wanted
        wanted = spread(among(2.0, *ORDER[m - 1 :]), net)
        assert planned(net, [(slice(m - 1, None), 2)]) == wanted
    assert planned(net, [(slice(-3, -1), 2)]) == spread(among(2.0, "mixer", "body"), net)
    wanted = among(0.5, "body", "head", rest=0.0)
    train(net, [(slice(2, None), 0.5), (slice(0, 2), None)], wanted)


@in_every_library
def test_w5_a_span_counts_layers_without_parameters(library):
    net = classifier(library)
    spans = {"[:3]": (0, 2), "[1:3]": (2,), "[2:4]": (2,), "[-3:]": (4,), "[:-3]": (0, 2)}
    for span, layers in (spans | {"[::2]": (0, 2, 4), "[-2::-4]": (4, 0)}).items():
        assert planned(net, [(f"layers{span}", 2)]) == spread(of_classifier(2.0, *layers), net)
    check_refused(lm.UnmatchedRuleError, net, [("layers[5:]", 2)])  # a softmax
    train(net, [("layers[3:]", 2), ("layers[1:3]", None)], of_classifier(2.0, 4) | {"layers_2": 0})


@in_every_library
def test_w6_a_nested_part_by_names_and_positions(library):
    net, w = chain(library), chain(library).w
    rules = [
        (("body", "layers", 2, w), None),
        ((2, "layers", -1, "bias"), 0.25),
        (f"body/layers[0]/{w}", 3),
        ("body/layers[0]", 0.5),
        ((-1, w), -1),
    ]
    wanted = {
        "stem": 1.0,
        "mixer": 1.0,
        "body/layers_0/kernel": 3.0,
        "body/layers_0/bias": 0.5,
        "body/layers_2/kernel": 0.0,
        "body/layers_2/bias": 1.0,
        "body/layers_4/kernel": 1.0,
        "body/layers_4/bias": 0.25,
        "head/kernel": -1.0,
        "head/bias": 1.0,
    }
    train(net, rules, wanted)


def test_w7_everything():
    net = chain("nnx")
    train(net, [("head", 1), (..., 0.5)], among(1.0, "head", rest=0.5))
    assert planned(net, [(..., -2)]) == same_everywhere("nnx", -2.0)


@pytest.mark.parametrize("make", [chained, wrapped], ids=["chained", "wrapped"])
@pytest.mark.parametrize("zero", [None, 0])
def test_w8_what_does_not_train_keeps_every_bit(make, zero):
    module, net = LinenChain(), chain("linen")
    params = net.params | {"stem": jax.tree.map(lambda a: -0.0 * a, net.params["stem"])}
    params["body"] = jax.tree.map(lambda a: a.at[0].set(-0.0), net.params["body"])
    net = of_linen(module, params=params)
    assert b"\0\0\0\x80" in net.before["stem/bias"].tobytes() + net.before["stem/kernel"].tobytes()

    def nan(grads, params):
        return grads | {"stem": jax.tree.map(lambda g: g * jnp.nan, grads["stem"])}

    rules = [("stem", zero), ("body", zero)]
    advance = net.start(optax.chain(optax.stateless(nan), make(rules, net.structure)))
    for _ in range(3):
        after = advance()
    wanted = {f"{layer}/{name}" for layer in ("stem", *BODY) for name in ("kernel", "bias")}
    assert frozen_in(net.before, after) == wanted
    assert all(np.isfinite(array).all() for array in after.values())
    assert lm.Rules([("stem", zero)]) == lm.Rules([("stem", -0.0)])


def test_w9_any_number_multiplies_the_rate():
    net = chain("equinox")
    rules = [("stem", 0.1), ("mixer", 7), ("body", -1), ("head", -0.5)]
    wanted = among(-1.0, "body") | {"stem": 0.1, "mixer": 7.0, "head": -0.5}
    train(net, rules, wanted)
    for bad in (float("nan"), float("inf"), True, 1j):
        with pytest.raises(lm.MultiplierError):
            lm.Rules([("stem", bad)])


@in_every_library
def test_w10_a_rule_on_a_subnet_covers_all_within(library):
    net = chain(library)
    inside = [path for path in net.paths if path.startswith("body/")]
    assert len(inside) == 6
    train(net, [("body/layers[2]", 0.5), ("body", None)], among(0, "body") | {BODY[1]: 0.5})
    with pytest.raises(lm.ShadowedRuleError):
        planned(net, [("body", None), (f"body/layers[4]/{net.w}", 2)])


@in_every_library
def test_w11_freeze_a_part_or_all_but_a_part(library):
    net = chain(library)
    train(net, [("body", None)], among(0, "body"))
    train(net, [("body", 1), (..., None)], among(1.0, "body", rest=0.0))
    with pytest.raises(lm.ShadowedRuleError, match="'body'"):
        planned(net, [(..., None), ("body", 1)])  # would freeze all, as it did for one who asked


def has_two(path, leaf):
    return leaf.shape == (2,)


TARGETS = (
    "stem",
    "body/layers[-1]",
    "stem/bias",
    "**/bias",
    "body/layers[:3]",
    "{stem,head}/bias",
    re.compile(".*/layers.*/bias"),
    has_two,
    -1,
    2,
    slice(0, 2),
    ("body", "layers", 2, "bias"),
    ...,
)


@in_every_library
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: getattr(t, "__name__", str(t)))
def test_w12_the_paths_of_extract_and_replace_are_those_of_the_rules(library, target):
    if library == "linen":
        model = params = chain(library).params
        structure = {"structure": chain(library).structure}
    elif library == "nnx":
        model = NNXChain(nnx.Rngs(0))
        params, structure = nnx.state(model, nnx.Param), {}
    else:
        model = params = equinox(EquinoxChain, KEY)
        structure = {}
    net, before = chain(library), arrays(eqx.filter(params, eqx.is_array))
    claimed = {path for path, got in planned(net, [(target, 2)]).items() if got == 2}
    found = lm.extract(model, target, **structure)
    leaves = jax.tree.leaves(eqx.filter(found, eqx.is_array))
    wanted = [before[net.paths[path]] for path in claimed]
    assert sorted(np.asarray(leaf).tobytes() for leaf in leaves) == sorted(
        array.tobytes() for array in wanted
    )

    def shifted(leaf):
        return leaf + 1 if eqx.is_array(leaf) else leaf

    new = lm.replace(model, target, jax.tree.map(shifted, found), **structure)
    assert (new is model) == (library == "nnx")  # that one alone is changed in place
    after = arrays(nnx.state(new, nnx.Param) if library == "nnx" else eqx.filter(new, eqx.is_array))
    assert frozen_in(before, after) == set(net.paths) - claimed
    for path in claimed:
        np.testing.assert_array_equal(after[net.paths[path]], before[net.paths[path]] + 1)
    if library != "nnx":
        assert frozen_in(before, arrays(eqx.filter(model, eqx.is_array))) == set(net.paths)


def test_w12_a_name_gives_its_node():
    linen = chain("linen")
    assert lm.extract(linen.params, "stem") is linen.params["stem"]
    assert lm.extract(linen.params, "stem/bias") is linen.params["stem"]["bias"]
    assert lm.extract(linen.params, -2, structure=linen.structure) is linen.params["body"]
    model = NNXChain(nnx.Rngs(0))
    assert lm.extract(model, "body/layers[2]") is model.body.layers[2]
    assert lm.extract(model, -1) is model.head
    model = equinox(EquinoxChain, KEY)
    assert lm.extract(model, 1) is model.mixer
    assert lm.extract(model, ("body", "layers", 2, "weight")) is model.body.layers[2].weight


# A net that holds a net that holds a layer with a multiplier of its own.


def linen_fixed(multiplier):
    kernel, bias = nn.initializers.lecun_normal(), nn.initializers.normal()
    options = {"kernel_init": lm.attach(kernel, multiplier)}
    return nn.Dense(4, bias_init=lm.attach(bias, multiplier), **options)


class LinenInner(nn.Module):
    multiplier: Any = None

    def setup(self):
        self.free, self.fixed = nn.Dense(4), linen_fixed(self.multiplier)

    def __call__(self, x):
        return jnp.tanh(self.fixed(jnp.tanh(self.free(x))))


class LinenOuter(nn.Module):
    multiplier: Any = None

    def setup(self):
        self.inner, self.head = LinenInner(self.multiplier), nn.Dense(2)

    def __call__(self, x):
        return self.head(self.inner(x))


class NNXInner(nnx.Module):
    def __init__(self, fixed, rngs):
        self.free, self.fixed = linear(3, 4, rngs=rngs), fixed

    def __call__(self, x):
        return jnp.tanh(self.fixed(jnp.tanh(self.free(x))))


class NNXOuter(nnx.Module):
    def __init__(self, fixed, rngs):
        self.inner, self.head = NNXInner(fixed, rngs), linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.inner(x))


class EquinoxInner(eqx.Module):
    free: eqx.nn.Linear
    fixed: eqx.nn.Linear = eqx.field(metadata={"lr_mult": None})

    def __init__(self, key):
        self.free, self.fixed = eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 4, key=key)

    def __call__(self, x):
        return jnp.tanh(self.fixed(jnp.tanh(self.free(x))))


class EquinoxOuter(eqx.Module):
    inner: EquinoxInner
    head: eqx.nn.Linear

    def __init__(self, key):
        self.inner, self.head = EquinoxInner(key), eqx.nn.Linear(4, 2, key=key)

    def __call__(self, x):
        return self.head(self.inner(x))


def nnx_outer(multiplier=None):
    rngs = nnx.Rngs(0)
    return NNXOuter(lm.attach(linear(4, 4, rngs=rngs), multiplier), rngs)


@functools.cache
def carrying(library):
    if library == "linen":
        return of_linen(LinenOuter())
    return of_nnx(nnx_outer()) if library == "nnx" else of_equinox(equinox(EquinoxOuter, KEY))


@pytest.mark.parametrize("make", [chained, wrapped], ids=["chained", "wrapped"])
@in_every_library
def test_w13_a_layer_is_built_with_its_own_multiplier(library, make):
    net = carrying(library)
    wanted = {"inner/free": 1.0, "inner/fixed": 0.0, "head": 2.0}
    train(net, lm.Rules([("head", 2)]) + net.attached, wanted, make)


@in_every_library
def test_w13_a_rule_comes_before_what_is_built_in(library):
    net = carrying(library)
    wanted = {"inner/free": 1.0, "inner/fixed/kernel": 3.0, "inner/fixed/bias": 0.0, "head": 1.0}
    train(net, lm.Rules([(f"inner/fixed/{net.w}", 3)]) + net.attached, wanted)
    for rules in ([("inner/fixed", 3)], [("inner", 3)], [(..., 3)]):  # nothing of it is left
        got = planned(net, lm.Rules(rules) + net.attached)
        assert {got["inner/fixed/kernel"], got["inner/fixed/bias"]} == {3.0}


@pytest.mark.parametrize("make", [chained, wrapped], ids=["chained", "wrapped"])
@in_every_library
def test_w13_it_is_not_dropped_silently(library, make):
    net = carrying(library)
    if library == "nnx":  # what is attached to a module is not in its state
        options = {"kernel_metadata": {"lr_mult": None}, "bias_metadata": {"lr_mult": None}}
        rngs = nnx.Rngs(0)
        net = of_nnx(NNXOuter(linear(4, 4, rngs=rngs, **options), rngs))
        got = planned(net, net.attached)
        assert got == spread({"inner/free": 1.0, "inner/fixed": 0.0, "head": 1.0}, net)
    for rules in ([], [("head", 2)], [(f"inner/fixed/{net.w}", 3)]):
        with pytest.raises(lm.RuleError, match="attached_rules"):
            net.start(make(rules, net.structure))
    for rules in ([("inner", 3)], [(..., 3)], lm.Rules([("head", 2)]) + net.attached):
        net.start(make(rules, net.structure))


@in_every_library
def test_w14_what_is_built_in_can_be_read(library):
    net = carrying(library)
    assert isinstance(net.attached, lm.Rules)
    assert {rule.multiplier for rule in net.attached} == {None}
    assert all(rule.optional for rule in net.attached)
    wanted = {"inner/free": 1.0, "inner/fixed": 0.0, "head": 1.0}
    assert planned(net, net.attached) == spread(wanted, net)
    assert len(lm.attached_rules(chain(library).params)) == 0


def test_w14_what_is_built_in_can_be_set_in_nnx():
    model = nnx_outer()

    def got():
        rules = lm.attached_rules(model)
        plan = lm.compile_rules(rules, nnx.state(model, nnx.Param))
        return {leaf.path: leaf.multiplier for leaf in plan.leaves}

    plain = dict.fromkeys(got(), 1.0)
    fixed, head = ({f"{p}/bias": 1.0, f"{p}/kernel": 1.0} for p in ("inner/fixed", "head"))
    assert got() == plain | dict.fromkeys(fixed, 0.0)
    assert lm.attach(model.inner.fixed, 0.5) is model.inner.fixed
    assert got() == plain | dict.fromkeys(fixed, 0.5)
    assert lm.attach(model.inner.fixed.bias, None) is model.inner.fixed.bias
    assert got() == plain | {"inner/fixed/kernel": 0.5, "inner/fixed/bias": 0.0}
    lm.attach(model.inner.fixed, 2)  # that of its bias is further in
    assert got() == plain | {"inner/fixed/kernel": 2.0, "inner/fixed/bias": 0.0}
    lm.attach(model.inner, 3)
    wanted = plain | dict.fromkeys(["inner/free/kernel", "inner/free/bias"], 3.0)
    assert got() == wanted | {"inner/fixed/kernel": 2.0, "inner/fixed/bias": 0.0}
    lm.attach(model.inner.fixed.bias, 1)
    lm.attach(model.inner.fixed, 1)  # the rate of the rest, not that of `inner`
    assert got() == wanted
    lm.attach(model, 0.1)
    assert got() == wanted | dict.fromkeys(head, 0.1)
    net = of_nnx(model)
    train(net, net.attached, {"inner/free": 3.0, "inner/fixed": 1.0, "head": 0.1})


def test_w14_what_is_built_in_can_be_set_in_linen():
    net = of_linen(LinenOuter(multiplier=0.5))
    train(net, net.attached, {"inner/free": 1.0, "inner/fixed": 0.5, "head": 1.0})
    twice = lm.attach(lm.attach(nn.initializers.ones, None), 2)
    net = of_linen(nn.Dense(2, kernel_init=twice))
    assert planned(net, net.attached) == {"kernel": 2.0, "bias": 1.0}
    assert np.asarray(net.before["kernel"]).shape == (3, 2)


def test_w15_the_defaults_of_all_arrays():
    net = chain("linen")
    plan = lm.compile_rules([], net.params, structure=net.structure)
    assert [leaf.path for leaf in plan.leaves] == lm.paths(net.params)
    assert jax.tree.leaves(plan.multipliers) == [1.0] * 12
    assert jax.tree.structure(plan.multipliers) == jax.tree.structure(net.params)
    net = carrying("linen")
    plan = lm.compile_rules(net.attached, net.params, structure=net.structure)
    assert plan.multipliers["inner"]["free"] == {"kernel": 1.0, "bias": 1.0}
    assert jax.tree.leaves(plan.multipliers["inner"]["fixed"]) == [0.0, 0.0]


@in_every_library
def test_w16_the_plan_tells_the_multipliers_that_are_used(library):
    net = chain(library)
    rules = [("body/layers[:3]", None), (-1, 2), ("**/bias", -0.5), ((..., net.w), 0.25)]
    plan = lm.compile_rules(rules, net.params, structure=net.structure)
    tx = optax.chain(optax.sgd(1.0), lm.scale_by_rules(rules, structure=net.structure))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, net.params), tx.init(net.params))
    wanted = jax.tree.map(lambda a, m: np.full(a.shape, -m), net.params, plan.multipliers)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda a: a.astype(jnp.float32), wanted))
    assert {leaf.multiplier for leaf in plan.leaves} == {0.0, 2.0, -0.5, 0.25}
    lines = str(plan).splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("head ")] == [["1:", "-1"]]
    [line] = [line for line in lines if line.startswith("stem/bias ")]
    assert re.search(r" -0\.5 +2: '\*\*/bias'$", line)
    assert lines[-1].endswith("66 train, 40 frozen")


# One layer in two nets, each of which has a layer of its own too.


class LinenBranch(nn.Module):
    common: nn.Module

    def setup(self):
        self.own = nn.Dense(2)

    def __call__(self, x):
        return self.own(jnp.tanh(self.common(x)))


class LinenBranches(nn.Module):
    def setup(self):
        self.common = nn.Dense(4)
        self.left, self.right = LinenBranch(self.common), LinenBranch(self.common)

    def __call__(self, x):
        return self.left(x) + 2 * self.right(x)


class NNXBranch(nnx.Module):
    def __init__(self, common, rngs):
        self.common, self.own = common, linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.own(jnp.tanh(self.common(x)))


class NNXBranches(nnx.Module):
    def __init__(self, rngs):
        common = linear(3, 4, rngs=rngs)
        self.right, self.left = NNXBranch(common, rngs), NNXBranch(common, rngs)

    def __call__(self, x):
        return self.left(x) + 2 * self.right(x)


class EquinoxBranch(eqx.Module):
    common: eqx.nn.Linear
    own: eqx.nn.Linear

    def __init__(self, key):
        self.common, self.own = eqx.nn.Linear(3, 4, key=key), eqx.nn.Linear(4, 2, key=key)

    def __call__(self, x):
        return self.own(jnp.tanh(self.common(x)))


class EquinoxBranches(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        one, other = jax.random.split(key)
        both = {"left": EquinoxBranch(one), "right": EquinoxBranch(other)}
        self.shared = eqx.nn.Shared(
            both, where=lambda t: t["right"].common, get=lambda t: t["left"].common
        )

    def __call__(self, x):
        both = self.shared()
        return both["left"](x) + 2 * both["right"](x)


@functools.cache
def branches(library):
    if library == "linen":
        return of_linen(LinenBranches())
    return (
        of_nnx(NNXBranches(nnx.Rngs(0)))
        if library == "nnx"
        else of_equinox(equinox(EquinoxBranches, KEY))
    )


@in_every_library
def test_w17_a_shared_array_has_one_multiplier(library):
    net = branches(library)
    at = "shared/pytree/" if library == "equinox" else ""
    common = {path for path in net.paths if "common" in path}
    assert len(common) == 2
    assert len(net.paths) == 6

    def wanted(shared, left, right):
        own = {f"{at}left/own": left, f"{at}right/own": right}
        return dict.fromkeys(common, shared) | own

    rules = [(f"{at}right", None), (f"{at}left", 2)]
    train(net, rules, wanted(0.0, 2.0, 0.0))
    train(net, rules[::-1], wanted(2.0, 2.0, 0.0), wrapped)
    for place in ("left", "right"):  # wherever it is looked at
        rules = [(f"{at}{place}/common/bias", 0.5)]
        [bias] = [path for path in common if path.endswith("bias")]
        assert planned(net, rules) == spread(wanted(1.0, 1.0, 1.0) | {bias: 0.5}, net)


# The examples -------------------------------------------------------------------------------------


LINE_X = jnp.array([[1.0], [2.0], [3.0], [4.0]])
LINE_Y = jnp.array([[1.9], [4.1], [6.0], [8.1]])


@in_every_library
def test_example_a_a_chain_of_which_the_third_layer_trains(library):
    data = {"x": LINE_X, "y": LINE_Y}
    net = sequential(library, [(1, 3), jax.nn.relu, (3, 1)], **data)
    rules = [((2, 1) if library == "linen" else ("layers[2]", 1)), (..., None)]
    after = train(net, rules, {"layers_0": 0.0, "layers_2": 1.0})
    sizes = {path: after[net.paths[path]].shape for path in net.paths}
    assert sizes["layers_0/bias"] == (3,)
    assert sizes["layers_2/bias"] == (1,)


# Its weights are (outputs, inputs), as those of Equinox.
WEIGHTS, BIASES = np.array([[1.0], [2.0], [3.0]]), np.array([-1.0, -2.0, -3.0])


class LinenHolder(nn.Module):
    def setup(self):
        kernel, bias = (lambda *_, value=value: jnp.asarray(value) for value in (WEIGHTS.T, BIASES))
        self.linear = nn.Dense(
            3, kernel_init=lm.attach(kernel, None), bias_init=lm.attach(bias, None)
        )

    def __call__(self, x):
        return self.linear(x)


class NNXHolder(nnx.Module):
    def __init__(self, rngs):
        self.linear = lm.attach(linear(1, 3, rngs=rngs), None)
        self.linear.kernel[...], self.linear.bias[...] = WEIGHTS.T, BIASES

    def __call__(self, x):
        return self.linear(x)


class EquinoxHolder(eqx.Module):
    linear: eqx.nn.Linear = eqx.field(metadata={"lr_mult": None})

    def __init__(self, key):
        where = lambda layer: (layer.weight, layer.bias)  # noqa: E731
        value = jnp.asarray(WEIGHTS), jnp.asarray(BIASES)
        self.linear = eqx.tree_at(where, eqx.nn.Linear(1, 3, key=key), value)

    def __call__(self, x, key=None):
        return self.linear(x)


@in_every_library
def test_example_b_a_frozen_layer_within_a_bigger_net(library):
    data, rngs = {"x": LINE_X, "y": LINE_Y}, nnx.Rngs(0)
    if library == "linen":
        inner = nn.Sequential([LinenHolder(), nn.tanh, nn.Dense(2)])
        module = nn.Sequential([nn.Dense(1), inner, nn.Dense(1)])
        params = jax.jit(module.init)(KEY, LINE_X)["params"]
        net = of_linen(module, params, **data)
        place = "layers_1/layers_0/linear"
    elif library == "nnx":
        inner = nnx.Sequential(NNXHolder(rngs), nnx.tanh, linear(3, 2, rngs=rngs))
        outer = [linear(1, 1, rngs=rngs), inner, linear(2, 1, rngs=rngs)]
        net, place = of_nnx(nnx.Sequential(*outer), **data), "layers/1/layers/0/linear"
    else:
        inner = [EquinoxHolder(KEY), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(3, 2, key=KEY)]
        outer = [eqx.nn.Linear(1, 1, key=KEY), eqx.nn.Sequential(inner)]
        outer = eqx.nn.Sequential([*outer, eqx.nn.Linear(2, 1, key=KEY)])
        net, place = of_equinox(outer, **data), "layers/1/layers/0/linear"
    wanted = dict.fromkeys(["layers_0", "layers_1/layers_2", "layers_2"], 1.0)
    after = train(net, lm.Rules([]) + net.attached, wanted | {"layers_1/layers_0/linear": 0.0})
    weights = after[f"{place}/{net.w}"]
    np.testing.assert_array_equal(weights if net.w == "weight" else weights.T, WEIGHTS)
    np.testing.assert_array_equal(after[f"{place}/bias"], BIASES)


# A small LeNet. Its layers with parameters are 0, 3, 7 and 9; the last is a softmax.
LETTERS = jnp.arange(6) % 3


def pool(x):
    return nnx.max_pool(x, (2, 2), (2, 2))


def flatten(x):
    return x.reshape(len(x), -1)


def linen_lenet(classes):
    options = {"kernel_size": (3, 3), "padding": "VALID"}
    trunk = [nn.Conv(2, **options), nn.relu, pool, nn.Conv(3, **options), nn.relu, pool, flatten]
    return nn.Sequential([*trunk, nn.Dense(8), nn.relu, nn.Dense(classes), nn.softmax])


def nnx_lenet(classes):
    options = {"rngs": nnx.Rngs(classes)}
    of_conv = options | {"kernel_size": (3, 3), "padding": "VALID", "kernel_init": draw}
    first, second = nnx.Conv(1, 2, **of_conv), nnx.Conv(2, 3, **of_conv)
    trunk = [first, nnx.relu, pool, second, nnx.relu, pool, flatten]
    dense = [linear(12, 8, **options), nnx.relu, linear(8, classes, **options)]
    return nnx.Sequential(*trunk, *dense, nnx.softmax)


def equinox_lenet(classes):
    relu, halve = eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2)
    first, second = eqx.nn.Conv2d(1, 2, 3, key=KEY), eqx.nn.Conv2d(2, 3, 3, key=KEY)
    trunk = [first, relu, halve, second, relu, halve, eqx.nn.Lambda(jnp.ravel)]
    dense = [eqx.nn.Linear(12, 8, key=KEY), relu, eqx.nn.Linear(8, classes, key=KEY)]
    return eqx.nn.Sequential([*trunk, *dense, eqx.nn.Lambda(jax.nn.softmax)])


@functools.cache
def with_new_head(library):
    """A LeNet for ten digits, and one with its trunk and a new head for three letters."""
    options = {"x": IMAGES, "y": LETTERS, "loss": cross_entropy}
    if library == "linen":
        modules = linen_lenet(10), linen_lenet(3)
        shapes = [jax.eval_shape(module.init, KEY, IMAGES)["params"] for module in modules]
        old, fresh = drawn(shapes[0], 0), drawn(shapes[1], 1)
        params, left = lm.graft(fresh, old)
        assert [path for path, _ in left] == ["layers_9/bias", "layers_9/kernel"]
        trees = (old, params)
        return [of_linen(*pair, **options) for pair in zip(modules, trees, strict=True)]
    if library == "nnx":
        digits, fresh = nnx_lenet(10), nnx_lenet(3)
        letters = nnx.Sequential(*digits.layers[:-2], *fresh.layers[-2:])
        return [of_nnx(net, **options) for net in (digits, letters)]
    options["x"] = IMAGES.transpose(0, 3, 1, 2)
    digits, fresh = (equinox(equinox_lenet, classes) for classes in (10, 3))
    letters = eqx.nn.Sequential([*digits.layers[:-2], *fresh.layers[-2:]])
    return [of_equinox(net, **options) for net in (digits, letters)]


@in_every_library
def test_example_c_a_new_head_on_the_trunk_of_an_old_net(library):
    digits, net = with_new_head(library)
    rules = [(-2 if library == "linen" else "layers[-2]", 1), (..., None)]
    wanted = dict.fromkeys(["layers_0", "layers_3", "layers_7"], 0.0) | {"layers_9": 1.0}
    after = train(net, rules, wanted)
    assert after[net.paths["layers_9/bias"]].shape == (3,)
    old = {path: array for path, array in digits.before.items() if "9" not in path}
    assert len(old) == 6
    assert frozen_in(old, {path: after[path] for path in old}) == {common(path) for path in old}
    if library == "equinox":  # a softmax is in the tree
        plan = lm.compile_rules(rules, net.params)
        assert {common(p.path): p.multiplier for p in plan.leaves} == spread(wanted, net)
        return
    for target in ("layers[-2]", *([-2] if library == "linen" else [])):
        with pytest.raises(lm.PositionError):
            lm.compile_rules([(target, 1), (..., None)], net.params)


@in_every_library
def test_example_d_a_span_of_a_lenet(library):
    _, net = with_new_head(library)
    rules = [(slice(3, None) if library == "linen" else "layers[3:]", 2)]
    wanted = dict.fromkeys(["layers_3", "layers_7", "layers_9"], 2.0) | {"layers_0": 1.0}
    train(net, rules, wanted)
    plan = lm.compile_rules(rules, net.params, structure=net.structure)
    used = dict(zip(lm.paths(net.params), jax.tree.leaves(plan.multipliers), strict=True))
    assert {common(path): got for path, got in used.items()} == {
        f"layers_{i}/{name}": 2.0 if i else 1.0 for i in (0, 3, 7, 9) for name in ("kernel", "bias")
    }
    text = "slice(3, None, None)" if library == "linen" else "'layers[3:]'"
    assert len(re.findall(rf"6 arrays .* 2 +0: {re.escape(text)}$", str(plan), re.MULTILINE)) == 1


class EquinoxTwice(eqx.Module):
    net: eqx.nn.Shared

    def __init__(self, key):
        one, other = (eqx.nn.Linear(3, 3, key=key) for key in jax.random.split(key))
        both = eqx.nn.Sequential([one, eqx.nn.Lambda(jnp.tanh), other])
        self.net = eqx.nn.Shared(both, lambda net: net.layers[2], lambda net: net.layers[0])

    def __call__(self, x):
        return self.net()(x)


@in_every_library
def test_example_e_the_same_layer_twice(library):
    data, before = {"y": X[::-1]}, ""
    if library == "linen":
        dense = nn.Dense(3)
        net = of_linen(nn.Sequential([dense, nn.tanh, dense]), **data)
    elif library == "nnx":
        twice = linear(3, 3, rngs=nnx.Rngs(0))
        net = of_nnx(nnx.Sequential(twice, nnx.tanh, twice), **data)
    else:
        net, before = of_equinox(equinox(EquinoxTwice, KEY), **data), "net/pytree/"
    assert list(net.paths) in (
        [f"{before}layers_0/bias", f"{before}layers_0/kernel"],
        [f"{before}layers_0/kernel", f"{before}layers_0/bias"],
    )

    def wanted(weights):
        return {f"{before}layers_0/kernel": weights, f"{before}layers_0/bias": 1.0}

    first, third = f"{before}layers[0]/{net.w}", f"{before}layers[2]/{net.w}"
    train(net, [(first, 0), (third, 2)], wanted(0.0))
    train(net, [(third, 2), (first, 0)], wanted(2.0))
    assert planned(net, [(third, 0.5)]) == wanted(0.5)
    kernel = net.before[net.paths[f"{before}layers_0/kernel"]]
    for place in (first, third):  # wherever it is looked at
        found = lm.extract(net.params, place, structure=net.structure)
        np.testing.assert_array_equal(jax.tree.leaves(found)[0], kernel)
