"""What a parameter tree does not tell: `Structure`, `structure_of`, positions that need them."""

import copy
import functools
import itertools
import pickle
import re

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
X = jnp.ones((2, 4))
SEQUENCE = jnp.ones((2, 3, 4))
ALL = slice(None)


def told(value):
    """The name of a case; that of a set must not depend on how sets are ordered in a process."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


def masks(target, params, structure=None):
    """By path, the elements that a target names; without arrays of which it names none."""
    plan = lm.compile_rules([(target, None)], params, structure=structure)
    found = {}
    leaves = zip(jax.tree.leaves(plan.frozen), jax.tree.leaves(params), strict=True)
    arrays = [mask for mask, leaf in leaves if hasattr(leaf, "shape")]
    for leaf, mask in zip(plan.leaves, arrays, strict=True):
        mask = mask.dense() if isinstance(mask, lm.Parts) else mask
        found[leaf.path] = np.broadcast_to(mask, leaf.shape)
    return {path: mask for path, mask in found.items() if mask.any()}


def named(target, params, structure=None):
    """The layers that a target names: all that they hold, and nothing else."""
    found = masks(target, params, structure)
    assert all(mask.all() for mask in found.values())
    layers = {path.rpartition("/")[0] for path in found}
    everything = {path for path in lm.paths(params) if path.rpartition("/")[0] in layers}
    assert everything == found.keys()
    return layers


def tree(*names):
    """A layer of each name."""
    return {name: {"w": jnp.ones(2), "b": jnp.ones(1)} for name in names}


# What is written by hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"order": ["a"]}, r"order= is \['a'\]; write .* Structure\(order=\{"),
        ({"order": None}, r"order= is None; write"),
        ({"order": {"": []}}, r"order= has \[\] for ''; write a list of the names"),
        ({"order": {"": "ab"}}, r"order= has 'ab' for ''; write a list"),
        ({"order": {"": {"a"}}}, r"order= has \{.*\} for ''; write a list"),
        ({"order": {"": None}}, r"order= has None for ''; write a list"),
        ({"order": {"net": ["a", 1]}}, r"order= has \['a', 1\] for 'net'; write a list"),
        ({"order": {"net": ["a", "b", "a"]}}, r"names a child of 'net' twice: \['a', 'b', 'a'\]"),
        ({"order": {"": ["a", "a/b"]}}, r"names 'a/b' as a child of ''.* entry of their own"),
        ({"order": {"n": ["l_1", "l_0"]}}, r"for 'n', but .* by their numbers; write them in that"),
        ({"order": {"": ["lin_1", "lin"]}}, r"counted by their numbers; write them in that order"),
        ({"order": {"*": ["a"]}}, r"'\*' in order= has a wildcard .* lrmult.paths"),
        ({"order": {"a/": ["a"]}}, r"'a/' in order= cannot be read: .* ends with a '/'"),
        ({"order": {1: ["a"]}}, r"1 in order= is no path; lrmult.paths"),
        ({"shared": "ab"}, r"shared= is 'ab'; write groups of paths, as in Structure\(shared="),
        ({"shared": {"a": "b"}}, r"shared= is \{'a': 'b'\}; write groups"),
        ({"shared": ["ab"]}, r"shared= has 'ab'; write groups"),
        ({"shared": [1]}, r"shared= has 1; write groups"),
        ({"shared": [["a"]]}, r"shared= has \['a'\]; a group has two paths or more"),
        ({"shared": [["a", "a"]]}, r"a group has two paths or more"),
        ({"shared": [["a", "b/*"]]}, r"'b/\*' in shared= has a wildcard"),
        ({"shared": [["a", ""]]}, r"'' in shared= cannot be read"),
        ({"shared": [["a", 2]]}, r"2 in shared= is no path"),
        ({"stacked": ["a"]}, r"stacked= is \['a'\]; write the axis of each path"),
        ({"stacked": {"a": 1.0}}, r"stacked= has 1.0 for 'a'; an axis is an int"),
        ({"stacked": {"a": True}}, r"stacked= has True for 'a'; an axis is an int"),
        ({"stacked": {"a[0]": 0}}, r"'a\[0\]' in stacked= has a wildcard or a position"),
    ],
    ids=told,
)
def test_what_cannot_be_a_structure(facts, message):
    with pytest.raises(lm.RuleError, match=message):
        lm.Structure(**facts)


FACTS = {
    "order": {"": ["zed", "pool", "a"], "a": ["q", "k"]},
    "shared": [["a/q", "zed/q"], ["a/k", "zed/k"]],
    "stacked": {"zed": -1, "": 0},
}


def test_equality_hash_pickle_repr_and_copy():
    whole, again = lm.Structure(**FACTS), lm.Structure(**FACTS)
    assert whole == again
    assert hash(whole) == hash(again)
    shuffled = lm.Structure(
        order=dict(reversed(FACTS["order"].items())), stacked={"": 0, "zed": -1},
        shared=FACTS["shared"],
    )  # fmt: skip
    assert whole == shuffled
    assert hash(whole) == hash(shuffled)
    for copied in (
        eval(repr(whole), {"Structure": lm.Structure}),
        pickle.loads(pickle.dumps(whole)),
        copy.deepcopy(whole),
        whole | lm.Structure(),
        lm.Structure() | whole,
        whole | whole,
    ):
        assert copied == whole
        assert hash(copied) == hash(whole)
        assert repr(copied) == repr(whole)
    assert repr(lm.Structure()) == "Structure()"
    for name in FACTS:  # each is told apart
        assert lm.Structure(**{**FACTS, name: type(FACTS[name])()}) != whole
        assert name + "=" in repr(whole)
    turned = {"": ["a", "pool", "zed"], "a": ["q", "k"]}
    assert lm.Structure(**FACTS | {"order": turned}) != whole


def test_a_structure_does_not_change():
    given = {"": ["zed", "a"]}
    structure = lm.Structure(order=given)
    given[""].reverse()
    given["a"] = ["q"]
    assert structure == lm.Structure(order={"": ["zed", "a"]})
    with pytest.raises(TypeError):
        structure.order[""] = ("a", "zed")
    with pytest.raises(AttributeError):
        structure.order = {}


def test_the_right_one_of_two_counts():
    one = lm.Structure(
        order={"": ["a", "b"], "a": ["x"]}, stacked={"a": 0}, shared=[["a/x", "b/x"]]
    )
    other = lm.Structure(order={"": ["b", "a"]}, stacked={"a": 1, "b": 0})
    assert one | other == lm.Structure(
        order={"": ["b", "a"], "a": ["x"]}, stacked={"a": 1, "b": 0}, shared=[["a/x", "b/x"]]
    )
    assert (other | one).order[""] == ("a", "b")
    assert (other | one).stacked == {"a": 0, "b": 0}
    with pytest.raises(TypeError):
        one | {"order": {}}
    # What is said by hand overrides what was read, and stays hand-written: a typo shows.
    read = lm.structure_of(nnx.Sequential(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
    with pytest.raises(lm.RuleError, match="nothing in the tree has that path"):
        lm.compile_rules([], tree("a"), structure=read | lm.Structure(order={"layrs": ["0"]}))


def test_groups_that_overlap_are_one():
    pairs = [["a/w", "b/w"], ["c/w", "d/w"], ["e/w", "f/w"], ["d/w", "b/w"]]
    for order in itertools.permutations(pairs):
        structure = lm.Structure(shared=order)
        groups = {frozenset(group) for group in structure.shared}
        assert groups == {frozenset({"a/w", "b/w", "c/w", "d/w"}), frozenset({"e/w", "f/w"})}
        found = masks("d/w", tree("a", "e"), structure)
        assert found.keys() == {"a/w"}
    merged = lm.Structure(shared=pairs[:2]) | lm.Structure(shared=pairs[2:])
    assert {frozenset(group) for group in merged.shared} == groups


CHAIN = ("conv1", "zpool", "conv2", "flat", "fc", "act")
PARAMS = tree("conv1", "conv2", "fc")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"": ["conv1", "fc"]}, r"at the root without 'conv2'"),
        ({"": ["conv1", "conv22", "fc"]}, r"without 'conv2'; is it 'conv22' there\?"),
        ({"": ["conv1", "conv2", "drop", "head"]}, r"without 'fc'"),
        ({"fcs": ["a"]}, r"children of 'fcs' have an order, but nothing .* did you mean 'fc'\?"),
        ({"conv1/conv": ["a"]}, r"'conv1/conv' have an order, but nothing in the tree"),
        ({"nothing like it": ["a"]}, r"nothing in the tree .*lrmult.paths\(params\)"),
    ],
    ids=told,
)
def test_an_order_that_does_not_fit_the_tree(order, message):
    with pytest.raises(lm.RuleError, match=message):
        lm.compile_rules([], PARAMS, structure=lm.Structure(order=order))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([["fc/W", "fc2/W"]], r"'fc/W' is shared, but nothing .* did you mean 'fc/w'\?"),
        ([["fc/w", "conv1"]], r"'conv1' is an array, but it holds '[wb]' and '[wb]'"),
        ([["fc/w", "conv1/b"]], r"'.*/[wb]' float32\[\d\] and .* are one array.* unlike shapes"),
        ([["fc/w", "fc/w/v"]], r"an array at 'fc/w/v', below that at 'fc/w'"),
    ],
    ids=told,
)
def test_groups_that_do_not_fit_the_tree(shared, message):
    with pytest.raises(lm.RuleError, match=message):
        lm.compile_rules([], PARAMS, structure=lm.Structure(shared=shared))


def test_arrays_beside_layers_need_no_name_and_do_not_count():
    params = {**PARAMS, "gain": jnp.ones(3)}
    structure = lm.Structure(order={"": CHAIN})
    assert named(-2, params, structure) == {"fc"}
    assert masks("gain", params, structure).keys() == {"gain"}


def test_an_order_may_speak_of_what_is_cut_out():
    structure = lm.Structure(order={"": CHAIN, "fc": ["x", "y"]}, stacked={"fc": 0})
    for hole in (optax.MaskedNode(), None):
        plan = lm.compile_rules(
            [(2, None), (4, 3)], {**PARAMS, "fc": hole}, structure=structure
        )  # no error: position 4 is inside the hole
        assert {leaf.path for leaf in plan.leaves if leaf.frozen} == {"conv2/b", "conv2/w"}


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        (0, {"conv1"}),
        (2, {"conv2"}),
        (-2, {"fc"}),
        ("[-4]", {"conv2"}),
        (slice(1, 4), {"conv2"}),
        (slice(None, None, 2), {"conv1", "conv2", "fc"}),
        (slice(-2, None), {"fc"}),
        (slice(None, -2), {"conv1", "conv2"}),
        (slice(None, None, -2), set()),
        (slice(3, 99), {"fc"}),
        ("conv[1]", {"conv1"}),  # a family is counted by its numbers all the same
        ("conv[-1]", {"conv2"}),
    ],
    ids=told,
)
def test_positions_in_a_chain(target, layers):
    structure = lm.Structure(order={"": CHAIN})
    if layers:
        assert named(target, PARAMS, structure) == layers
    else:
        with pytest.raises(lm.UnmatchedRuleError, match="have no parameters"):
            named(target, PARAMS, structure)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (1, lm.UnmatchedRuleError, r"\[1\] of the root is 'zpool', which has no parameters"),
        (-1, lm.UnmatchedRuleError, r"\[-1\] of the root is 'act', which has no parameters"),
        ("[3:4]", lm.UnmatchedRuleError, r"is 'flat', which has no parameters"),
        (6, lm.IndexRangeError, r"\[6\] is out of range: the root has 6 members"),
        (-7, lm.IndexRangeError, r"\[-7\] is out of range"),
        (slice(6, None), lm.IndexRangeError, r"selects nothing"),
        ("conv[0]", lm.IndexRangeError, r"numbered from 1 to 2"),
        ("fc[0]", lm.PositionError, r"'b' and 'w'"),
    ],
    ids=told,
)
def test_positions_where_nothing_is(target, error, message):
    with pytest.raises(error, match=message):
        named(target, PARAMS, lm.Structure(order={"": CHAIN}))


@pytest.mark.parametrize("target", [0, -2, "[1:]", ("..", 0)[1:], "*/[0]", "**/[-1]"], ids=told)
def test_without_a_structure_unlike_names_have_no_order(target):
    params = tree("conv", "head") if target != "*/[0]" else {"net": tree("conv", "head")}
    with pytest.raises(lm.PositionError, match=r"unlike names.*structure=lrmult.structure_of\("):
        named(target, params)


LAYERS = ["layers_0", "layers_1", "layers_2", "layers_3"]


@pytest.mark.parametrize("target", [-2, "[-2]", "layers[-2]", ("layers", -2)[1:]], ids=told)
@pytest.mark.parametrize(
    "names", [LAYERS, ["layers_0", "relu", "layers_2", "softmax"]], ids=["numbers", "names"]
)
def test_an_order_fills_the_gaps_of_a_family(names, target):
    params = tree("layers_0", "layers_2")
    if names != LAYERS and target == "layers[-2]":
        with pytest.raises(lm.PositionError, match="gaps"):  # those of the family stay
            named(target, params, lm.Structure(order={"": names}))
        return
    assert named(target, params, lm.Structure(order={"": names})) == {"layers_2"}
    with pytest.raises(lm.PositionError, match="cannot be known"):
        named(target, params)


@pytest.mark.parametrize(
    "names",
    [
        [f"Block_{i}" for i in range(12)],
        [str(i) for i in range(12)],
        [f"blocks{i}" for i in range(12)],
        ["linear", *(f"linear_{i}" for i in range(1, 12))],  # as Haiku names them
    ],
    ids=lambda names: names[2],
)
def test_2_comes_before_10(names):
    """In a dict that is sorted as JAX sorts it."""
    params = tree(*sorted(names))
    structures = [None, lm.Structure(order={"": names}), lm.Structure(order={"": [*names, "end"]})]
    for structure in structures:
        for number in (0, 1, 2, 10, 11):
            assert named(number, params, structure) == {names[number]}
        assert named(slice(2, 11), params, structure) == {*names[2:11]}
    for structure in structures[:2]:
        assert named(-2, params, structure) == {names[-2]}
    assert named(-2, params, structures[2]) == {names[-1]}


def test_positions_under_wildcards_follow_each_order():
    params = {"enc": tree("z", "a"), "dec": tree("y", "b"), "head": tree("q")["q"]}
    structure = lm.Structure(
        order={"enc": ["z", "a", "drop"], "dec": ["y", "b"], "": ["enc", "dec", "head"]}
    )
    assert named("*/[0]", params, structure) == {"enc/z", "dec/y"}
    assert named("*/[-1]", params, structure) == {"dec/b"}  # that of `enc` has no parameters
    assert named("{enc,head}/[1:]", params, structure) == {"enc/a"}
    assert named("**/[2]", params, structure) == {"head"}
    assert named((..., 1), params, structure) == {"enc/a", "dec/y", "dec/b"}
    with pytest.raises(lm.UnmatchedRuleError, match="'drop', which has no parameters"):
        named("enc/[2]", params, structure)
    with pytest.raises(lm.IndexRangeError):
        named("*/[7]", params, structure)


@pytest.mark.parametrize("number", [0, 1, -1, -2])
def test_positions_lead_through_other_paths(number):
    """To an array that stands elsewhere in the tree."""
    params = {"embed": {"w": jnp.ones(3)}, "body": {"w": jnp.ones(2)}}
    structure = lm.Structure(
        order={"": ["embed", "body", "head"], "head": ["norm", "out"]},
        shared=[["embed/w", "head/out/w"]],
    )
    assert named(-1, params, structure) == {"embed"}
    if number in (1, -1):
        assert named(("head", number), params, structure) == {"embed"}
        assert named(f"*/[{number}]/w", params, structure) == {"embed"}
    else:
        with pytest.raises(lm.UnmatchedRuleError, match="'norm', which has no parameters"):
            named(("head", number), params, structure)


# Linen --------------------------------------------------------------------------------------------


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


class Named(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, name="zed")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x * self.param("beside", nn.initializers.ones, (4,))
        x = nn.BatchNorm(use_running_average=not train, name="a")(x)
        return nn.Dense(3, name="mid")(x)


class Setup(nn.Module):
    def setup(self):  # not in the order of the calls
        self.a, self.never, self.zed = nn.Dense(4), nn.Dense(4), nn.Dense(4)
        self.blocks = [nn.Dense(4) for _ in range(12)]
        self.heads = {"x": nn.Dense(3), "b": nn.Dense(3)}

    def __call__(self, x):
        x = self.zed(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["x"](self.a(x)) + self.heads["b"](x)

    def features(self, x):
        return self.a(self.zed(x))


class Holder(nn.Module):
    layers: list
    more: dict
    last: nn.Module

    def __call__(self, x):
        for layer in [*self.layers, *self.more.values()]:
            x = layer(x)
        return self.last(x)


class Holding(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = nn.Dense(4, name="zed"), nn.Dense(4, name="own")
        x = nn.Dense(4, name="stem")(first(x))  # `first` is called twice, at its own path first
        return Holder([second, nn.relu, first], {"q": nn.Dense(4)}, nn.Dense(2))(x)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="zed")
        return layer(nn.Dense(4, name="mid")(layer(x)))


def chain():
    return nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.softmax])


class WithSequential(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.softmax], name="zbody")
        return nn.Dense(2, name="head")(body(x))


class SetupSequential(nn.Module):
    def setup(self):
        self.head, self.zbody = nn.Dense(2), chain()

    def __call__(self, x):
        return self.head(self.zbody(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.SimpleCell(4), name="zrnn")(x)
        x = nn.Bidirectional(nn.RNN(nn.SimpleCell(4)), nn.RNN(nn.SimpleCell(4)), name="both")(x)
        return nn.Dense(2, name="a")(x)


class SetupRecurrent(nn.Module):
    def setup(self):
        self.a = nn.Dense(2)
        self.cell = nn.SimpleCell(4)
        self.rnn = nn.RNN(self.cell)

    def __call__(self, x):
        return self.a(self.rnn(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="zed")(x)
        x = nn.WeightNorm(nn.Dense(4, name="inner"))(x)
        x = nn.SpectralNorm(nn.Dense(4, name="other"))(x, update_stats=False)
        return nn.Dense(4, name="last")(x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="a")(nn.tanh(nn.Dense(3, name="zed")(x)))


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.remat(Pair)(name="zremat")(x)
        x = nn.jit(Pair)(name="jit")(x)
        return nn.remat(nn.Dense)(4, name="a")(x)


class Methods(nn.Module):
    def setup(self):
        self.zed, self.a = nn.Dense(3), nn.Dense(4)

    def encode(self, x):
        return self.zed(x)

    def decode(self, x):
        return self.a(x)


class CallsMethods(nn.Module):
    @nn.compact
    def __call__(self, x):
        net = Methods(name="znet")
        return net.decode(nn.Dense(3, name="mid")(net.encode(x)))


# A module, the arguments of its `init` after the keys, and what targets name in it.
MODULES = {
    "nested": (Nested(), (X,), {}, {0: {"Dense_0"}, -1: {"Dense_1"}, "Dense[1]": {"Dense_1"}}),
    "named": (
        Named(), (X,), {"train": False},
        {0: {"zed"}, 2: {"a"}, -1: {"mid"}, -2: {"a"}, "[0:2]": {"zed"}, "[1:]": {"a", "mid"}},
    ),
    "positional argument": (Named(), (X, False), {}, {0: {"zed"}, -2: {"a"}}),
    "setup": (
        Setup(), (X,), {},
        {0: {"zed"}, 10: {"blocks_9"}, "blocks[2]": {"blocks_2"}, "blocks[-2]": {"blocks_10"},
         "[1:3]": {"blocks_0", "blocks_1"}, -3: {"a"}, -2: {"heads_x"}, -1: {"heads_b"}},
    ),
    "method": (Setup(), (X,), {"method": "features"}, {0: {"zed"}, 1: {"a"}, -2: {"zed"}}),
    "function": (Setup(), (X,), {"method": Setup.features}, {0: {"zed"}, -1: {"a"}}),
    "attributes": (
        Holding(), (X,), {},
        {0: {"zed"}, 1: {"stem"}, "Holder_0/[0]": {"own"}, "Holder_0/[1]": {"zed"},
         "Holder_0/layers[2]": {"zed"}, "Holder[0]/layers[0]": {"own"},
         -1: {"zed", "own", "Dense_0", "Dense_1"}, "*/last": {"Dense_1"}, "*/more_q": {"Dense_0"}},
    ),
    "twice": (Twice(), (X,), {}, {0: {"zed"}, 1: {"mid"}, -1: {"mid"}}),
    "Sequential": (
        chain(), (X,), {},
        {-2: {"layers_2"}, "layers[-2]": {"layers_2"}, "layers[:2]": {"layers_0"}, 0: {"layers_0"},
         "[-3:]": {"layers_2"}, "layers[::2]": {"layers_0", "layers_2"}},
    ),
    "Sequential in compact": (
        WithSequential(), (X,), {},
        {0: {"Dense_0", "Dense_1"}, -1: {"head"}, -2: {"Dense_0", "Dense_1"},
         "zbody/layers[-2]": {"Dense_1"}, "*/[-2]": {"Dense_1"}, "**/layers[0]": {"Dense_0"}},
    ),
    "Sequential in setup": (
        SetupSequential(), (X,), {},
        {0: {"zbody/layers_0", "zbody/layers_2"}, -1: {"head"}, "*/layers[-2]": {"zbody/layers_2"},
         "zbody[-2]": {"zbody/layers_2"}, "zbody[:2]": {"zbody/layers_0"}},
    ),
    "recurrent": (
        Recurrent(), (SEQUENCE,), {},
        {0: {"SimpleCell_0/h", "SimpleCell_0/i"}, -1: {"a"}, 2: {"a"},
         "zrnn/cell/i": {"SimpleCell_0/i"}, "both[0]/cell/i": {"SimpleCell_1/i"},
         "both[-1]/cell/h": {"SimpleCell_2/h"}},
    ),
    "recurrent second": (
        Recurrent(), (SEQUENCE,), {},
        {target: {f"SimpleCell_{i}/{name}" for i in (1, 2) for name in "hi"}
         for target in (1, -2, "both")},
    ),
    "recurrent in setup": (
        SetupRecurrent(), (SEQUENCE,), {},
        {0: {"cell/h", "cell/i"}, "rnn/cell/h": {"cell/h"}, -1: {"a"}, 1: {"a"},
         -2: {"cell/h", "cell/i"}},
    ),
    "lifted": (
        Lifted(), (X,), {},
        {0: {"zremat/a", "zremat/zed"}, 1: {"jit/a", "jit/zed"}, -1: {"a"},
         "*/[0]": {"zremat/zed", "jit/zed"}, "zremat[1]": {"zremat/a"}},
    ),
    "lifted root": (nn.remat(Pair)(), (X,), {}, {0: {"zed"}, -1: {"a"}}),
    "methods": (
        CallsMethods(), (X,), {},
        {0: {"znet/zed", "znet/a"}, 1: {"mid"}, -1: {"mid"}, "znet[-1]": {"znet/a"}},
    ),
}  # fmt: skip


def init(module, *args):
    return jax.eval_shape(module.init, KEY, *args)["params"]


@functools.cache
def linen(name):
    module, args, kwargs, _ = MODULES[name]
    keys = {"params": KEY, "dropout": KEY}
    params = jax.eval_shape(lambda: module.init(keys, *args, **kwargs))["params"]
    return params, lm.structure_of(module, keys, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "target", "layers"),
    [
        pytest.param(name, target, layers, id=f"{name}-{target}")
        for name, (*_, targets) in MODULES.items()
        for target, layers in targets.items()
    ],
)
def test_positions_in_linen(name, target, layers):
    assert named(target, *linen(name)) == layers


@pytest.mark.parametrize("name", MODULES)
def test_linen_names_nothing_twice_and_nothing_else(name):
    """Under every position of the root, together: all layers there are."""
    params, structure = linen(name)
    assert set(lm.paths(params)) == set(masks(..., params, structure))
    assert named(slice(None), params, structure) == {
        path.rpartition("/")[0] for path in lm.paths(params) if "/" in path
    }


def test_what_wraps_a_layer_of_linen_counts_once():
    params = init(Normed(), X)
    structure = lm.structure_of(Normed(), KEY, X)
    assert {path.split("/")[0] for path in masks(0, params, structure)} == {"zed"}
    assert {path.split("/")[0] for path in masks(1, params, structure)} == {"WeightNorm_0", "inner"}
    assert {path.split("/")[0] for path in masks(2, params, structure)} == {"other"}
    assert {path.split("/")[0] for path in masks(-1, params, structure)} == {"last"}
    with pytest.raises(lm.IndexRangeError, match="4 members"):
        masks(4, params, structure)


@pytest.mark.parametrize(
    ("name", "target", "layer"),
    [
        ("Sequential", -1, "layers_3"),
        ("Sequential", "layers[1]", "layers_1"),
        ("Sequential", "layers[1:2]", "layers_1"),
        ("Sequential in setup", "zbody/layers[-1]", "layers_3"),
        ("Sequential in compact", "zbody/[1]", "layers_1"),
        ("named", 1, "Dropout_0"),
        ("named", "[-3]", "Dropout_0"),
    ],
)
def test_layers_of_linen_without_parameters(name, target, layer):
    with pytest.raises(lm.UnmatchedRuleError, match=f"'{layer}', which has no parameters"):
        named(target, *linen(name))


@pytest.mark.parametrize("target", [-2, "layers[-2]", "[-2:]"])
def test_without_a_structure_the_end_of_a_sequential_is_not_known(target):
    with pytest.raises(lm.PositionError, match=r"gaps \(0, 2\).*pass structure="):
        named(target, linen("Sequential")[0])


def test_shapes_are_enough_for_linen():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for key in (KEY, jax.eval_shape(lambda: KEY), {"params": KEY}):
        for x in (X, shape, np.ones(X.shape, np.float32)):
            assert lm.structure_of(Named(), key, x, train=False) == linen("named")[1]


def test_a_structure_of_one_call_says_nothing_of_layers_that_it_does_not_reach():
    """`-1` would be a guess: after `a` come others that only the whole model calls."""
    structure = lm.structure_of(Setup(), KEY, X, method="features")
    with pytest.raises(lm.PositionError):
        named(-1, linen("setup")[0], structure)


class Block(nn.Module):
    box: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, (None, "model")) if self.box else init
        h = nn.Dense(6, name="up", kernel_init=init)(x)
        return x + nn.Dense(4, name="down")(nn.tanh(h)), None


def scan(axis=0, length=3, block=Block):
    return nn.scan(
        block,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Decoder(nn.Module):
    axis: int = 0
    box: bool = False
    extra: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="zstem")(x)
        x, _ = scan(self.axis)(self.box, name="layers")(x, None)
        x, _ = scan(self.axis, 2, nn.remat(Block))(self.box, name="after")(x, None)
        if self.extra:
            wrapper, kwargs = getattr(nn, self.extra), {}
            kwargs = {"update_stats": False} if self.extra == "SpectralNorm" else {}
            x = wrapper(nn.Dense(4, name="inner"))(x, **kwargs)
        return nn.Dense(4, name="head")(x)


class SetupDecoder(nn.Module):
    axis: int = 0
    box: bool = False

    def setup(self):
        self.head, self.zstem = nn.Dense(4), nn.Dense(4)
        self.after, self.layers = scan(self.axis, 2)(self.box), scan(self.axis)(self.box)

    def __call__(self, x):
        return self.head(self.after(self.layers(self.zstem(x), None)[0], None)[0])


def assert_layer(found, node, axis, index, arrays=4):
    """The masks are those of some layers of a stack."""
    assert len(found) == arrays
    assert {path.split("/")[0] for path in found} == {node}
    for mask in found.values():
        wanted = np.zeros_like(mask)
        np.moveaxis(wanted, axis, 0)[index] = True
        np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("box", [False, True], ids=["plain", "box"])
@pytest.mark.parametrize("kind", [Decoder, SetupDecoder])
def test_scanned_layers_of_linen(kind, box, axis):
    module = kind(axis, box)
    params, structure = init(module, X), lm.structure_of(module, KEY, X)
    assert structure.order[""] == ("zstem", "layers", "after", "head")
    assert structure.stacked == {"layers": axis, "after": axis}
    assert_layer(masks("layers[1]", params, structure), "layers", axis, 1)
    assert_layer(masks("layers[-2:]", params, structure), "layers", axis, slice(1, None))
    assert_layer(masks(("after", -1), params, structure), "after", axis, 1)
    assert_layer(masks("[2]/[0]", params, structure), "after", axis, 0)
    assert_layer(masks("layers[2]/down", params, structure), "layers", axis, 2, arrays=2)
    assert_layer(masks("layers[2]/[1]", params, structure), "layers", axis, 2, arrays=2)
    assert masks("layers[2]/[1]", params, structure).keys() == {
        "layers/down/bias", "layers/down/kernel"
    }  # fmt: skip
    assert named(-1, params, structure) == {"head"}
    with pytest.raises(lm.IndexRangeError):
        masks("after[2]", params, structure)


@pytest.mark.parametrize("extra", ["WeightNorm", "SpectralNorm"])
def test_scanned_layers_beside_a_layer_that_looks_at_its_arrays(extra):
    """If the stack were lost, `layers[1]` would be `down` of all layers."""
    module = Decoder(extra=extra)
    params, structure = init(module, X), lm.structure_of(module, KEY, X)
    assert structure.stacked == {"layers": 0, "after": 0}
    assert_layer(masks("layers[1]", params, structure), "layers", 0, 1)


def test_a_scan_is_the_model():
    structure = lm.structure_of(scan()(), KEY, X, None)
    params = init(scan()(), X, None)
    for path, mask in masks(-1, params, structure).items():
        assert mask[-1].all(), path
        assert not mask[:-1].any(), path


def test_a_broadcast_scan_is_no_stack():
    module = nn.scan(
        Block, variable_broadcast="params", split_rngs={"params": False}, length=3
    )()  # fmt: skip
    structure = lm.structure_of(module, KEY, X, None)
    assert not structure.stacked
    assert named(0, init(module, X, None), structure) == {"up"}


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return scan(1)(name="inner")(nn.Dense(4, name="pre")(x), None)


def test_nested_scans():
    module = scan(0, 2, Outer)()
    structure = lm.structure_of(nn.Sequential([module]), KEY, X, None)
    params = init(nn.Sequential([module]), X, None)
    found = masks("layers_0[1]/inner[2]", params, structure)
    assert len(found) == 4
    for path, mask in found.items():  # kernels are (2, 4, 3, 6), biases (2, 6, 3) or so
        wanted = np.zeros_like(mask)
        wanted[1, :, 2] = True
        np.testing.assert_array_equal(mask, wanted, path)
    assert {path.split("/")[1] for path in masks("layers_0[1]", params, structure)} == {
        "pre", "inner"
    }  # fmt: skip
    for path, mask in masks("layers_0[0]", params, structure).items():
        assert mask[0].all(), path
        assert not mask[1].any(), path


class Ensemble(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        many = nn.vmap(
            Pair,
            in_axes=None,
            axis_size=3,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
        )
        return nn.Dense(2, name="head")(many(name="zmany")(x).sum(0))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vmapped_layers_of_linen(axis):
    structure = lm.structure_of(Ensemble(axis), KEY, X)
    params = init(Ensemble(axis), X)
    assert_layer(masks("zmany[-2]", params, structure), "zmany", axis, 1)
    assert_layer(masks("zmany[:2]", params, structure), "zmany", axis, slice(2))
    assert named(1, params, structure) == {"head"}


class RematScan(nn.Module):
    lengths: tuple

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="a")(nn.remat_scan(Pair, lengths=self.lengths)(name="zed")(x))


def test_remat_scan():
    structure = lm.structure_of(RematScan((5,)), KEY, X)
    params = init(RematScan((5,)), X)
    assert_layer(masks("zed[3:]", params, structure), "zed", 0, slice(3, None))
    assert named(-1, params, structure) == {"a"}


@pytest.mark.parametrize("target", ["zed[1]", "zed[:3]"])
def test_two_axes_of_layers_below_one_node_are_not_told_as_one(target):
    """Neither is the number of a layer among the six; a position would be a guess."""
    module = RematScan((2, 3))
    params, structure = init(module, X), lm.structure_of(module, KEY, X)
    assert "zed" not in structure.stacked
    with pytest.raises(lm.PositionError):
        masks(target, params, structure)


# NNX ----------------------------------------------------------------------------------------------


def linear(inputs=1, outputs=1):
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(inputs, outputs, kernel_init=zeros, rngs=nnx.Rngs(0))


def model_of(names, **options):
    """A model that has layers of these names, in this order."""

    class Model(nnx.Module, **options):
        def __init__(self):
            for name in names:
                setattr(self, name, linear())

        def __call__(self, x):
            for name in names:
                x = getattr(self, name)(x)
            return x

    return Model()


def loss(model):
    return model(jnp.ones((1, 1))).sum()


def train(model):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss)(model))


def train_in_jit(model):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    nnx.jit(lambda model, o: o.update(model, nnx.grad(loss)(model)))(model, optimizer)


# What NNX does to a model: to the object itself, or in a new one.
EVENTS = {
    "nothing": lambda model: None,
    "jit": lambda model: nnx.jit(loss)(model) and None,
    "grad": lambda model: nnx.grad(loss)(model) and None,
    "value_and_grad": lambda model: nnx.value_and_grad(loss)(model) and None,
    "split": lambda model: nnx.split(model) and None,
    "merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
    "tree.map": lambda model: jax.tree.map(lambda x: x, model),
    "jax.jit": lambda model: jax.jit(lambda model: model)(model),
    "eval_shape": lambda model: nnx.eval_shape(lambda: model),
    "update": lambda model: nnx.update(model, nnx.state(model)),
    "eval": lambda model: model.eval() and None,
    "train": train,
    "train in jit": train_in_jit,
}
# One that is sorted as it stands, names around those of NNX's own attributes, and many.
NAMES = [("a", "b", "c"), ("Abc", "_zz", "zed")]


def named_or_not(target, params, structure):
    """The layers that a position names; None if it is an error that says what to do."""
    try:
        return named(target, params, structure)
    except lm.PositionError as refused:
        error = refused
    assert re.search(r"keep them in a list, or .*order=", str(error))
    return None


def check_never_wrong(model, names):
    """Every position is the right one, or an error that says what to do; returns whether right."""
    params, structure, right = nnx.state(model, nnx.Param), lm.structure_of(model), set()
    for number in [*range(len(names)), *range(-len(names), 0)]:
        found = named_or_not(number, params, structure)
        assert found in ({names[number]}, None)
        right.add(found is not None)
    [right] = right
    return right


@pytest.mark.parametrize("event", EVENTS)
def test_attributes_that_nnx_has_sorted_are_never_counted(event):
    for names in itertools.chain.from_iterable(map(itertools.permutations, NAMES)):
        model = model_of(names)
        model = EVENTS[event](model) or model
        right = check_never_wrong(model, names)
        if event == "nothing":  # of what is sorted as it was built, nothing is known
            assert right == (list(names) != sorted(names))
        # What comes later does not make the order known again.
        setattr(model, names[1], linear())
        check_never_wrong(model, names)
        model.added = linear()
        check_never_wrong(model, [*names, "added"])
        delattr(model, names[0])
        check_never_wrong(model, [*names[1:], "added"])


@pytest.mark.parametrize("event", ["nothing", "jit", "merge", "clone", "train"])
def test_modules_that_are_no_pytrees(event):
    for names in itertools.permutations(NAMES[1]):
        model = model_of(names, pytree=False)
        check_never_wrong(EVENTS[event](model) or model, names)


@pytest.mark.parametrize("event", ["nothing", "jit", "merge", "train"])
def test_numbered_attributes_are_counted_whatever_nnx_does(event):
    for stem in ("Block_", "l"):
        names = [f"{stem}{number}" for number in range(12)]
        model = model_of(names)
        model = EVENTS[event](model) or model
        assert check_never_wrong(model, names)


def test_a_structure_of_before_does_not_count_what_came_later():
    model = model_of(("zed", "body", "head"))
    structure = lm.structure_of(model)
    model.adapter = linear()  # after `head`
    with pytest.raises(lm.PositionError):
        named(-1, nnx.state(model, nnx.Param), structure)


@pytest.mark.parametrize("event", EVENTS)
def test_a_structure_of_a_fresh_model_stays_right(event):
    names = ("zed", "body", "head", "adapter")
    model = model_of(names)
    structure = lm.structure_of(model)
    model = EVENTS[event](model) or model
    for number in range(-4, 4):
        assert named(number, nnx.state(model, nnx.Param), structure) == {names[number]}


class NNXNet(nnx.Module):
    def __init__(self):
        layers = [linear(), nnx.relu, linear(), nnx.softmax]
        self.trunk = nnx.Sequential(*layers)
        self.drop = nnx.Dropout(0.5)
        self.gain = nnx.Param(jnp.ones(1))
        self.blocks = nnx.List([nnx.Dict(q=linear(), k=linear()) for _ in range(12)])
        self.head = linear()
        self.act = nnx.relu  # no module

    def __call__(self, x):
        for block in self.blocks:
            x = block["k"](block["q"](x))
        return self.head(self.drop(self.trunk(x), deterministic=True) * self.gain)


TRUNK = {"trunk/layers/0", "trunk/layers/2"}
IN_NNX = {
    "trunk/layers[-2]": {"trunk/layers/2"},
    "**/layers[-2]": {"trunk/layers/2"},
    "trunk/layers[:2]": {"trunk/layers/0"},
    "trunk/layers[1:3]": {"trunk/layers/2"},
    "blocks[2]": {"blocks/2/q", "blocks/2/k"},
    "blocks[-2]/q": {"blocks/10/q"},
    "blocks[9:11]/k": {"blocks/9/k", "blocks/10/k"},
    "blocks[10]/{q,k}": {"blocks/10/q", "blocks/10/k"},
}
IN_FRESH_NNX = {
    0: TRUNK,
    -1: {"head"},
    "[:2]": TRUNK,
    3: {"head"},
    "blocks[10]/[0]": {"blocks/10/q"},
    "blocks/*/[-1]": {f"blocks/{i}/k" for i in range(12)},
}


@pytest.mark.parametrize("event", EVENTS)
def test_lists_of_nnx_stay_in_order(event):
    model = NNXNet()
    fresh = lm.structure_of(model)
    model = EVENTS[event](model) or model
    params, structure = nnx.state(model, nnx.Param), lm.structure_of(model)
    for target, layers in IN_NNX.items():
        assert named(target, params, structure) == layers, target
    for target, layers in IN_FRESH_NNX.items():
        assert named(target, params, fresh) == layers, target
        found = named_or_not(target, params, structure)
        assert found == layers or (found is None and event != "nothing"), target
    with pytest.raises(lm.UnmatchedRuleError, match=r"'3', which has no parameters"):
        named("trunk/layers[-1]", params, structure)
    with pytest.raises(lm.UnmatchedRuleError, match=r"'drop', which has no parameters"):
        named(1, params, fresh)
    by_hand = structure | lm.Structure(order={"": ["trunk", "drop", "blocks", "head"]})
    assert named(-1, params, by_hand) == {"head"}


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_sequential_at_the_root(library):
    if library == "nnx":
        model = nnx.Sequential(linear(), nnx.relu, linear(), nnx.softmax)
        params = nnx.state(model, nnx.Param)
    else:
        relu, softmax = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jax.nn.softmax)
        layers = [eqx.nn.Linear(1, 1, key=KEY), relu, eqx.nn.Linear(1, 1, key=KEY), softmax]
        model = eqx.nn.Sequential(layers)
        params = eqx.filter(model, eqx.is_inexact_array)
    structure = lm.structure_of(model)
    assert named("layers[-2]", params, structure) == {"layers/2"}
    assert named("layers[2:]", params, structure) == {"layers/2"}
    for target in ("layers[-1]", "layers[1]"):
        with pytest.raises(lm.UnmatchedRuleError, match=r"no (parameters|array)"):
            # In a filtered module of Equinox, a layer without parameters may be a hole.
            named(target, model if library == "equinox" else params, structure)
    if library == "nnx":  # in Equinox the other layers are in the tree
        with pytest.raises(lm.PositionError, match=r"gaps.*pass structure="):
            named("layers[-2]", params)


class EquinoxNet(eqx.Module):
    zed: eqx.nn.Linear
    drop: eqx.nn.Lambda
    gain: jax.Array
    blocks: list
    act: object
    head: eqx.nn.MLP

    def __init__(self):
        self.zed, self.drop = eqx.nn.Linear(4, 4, key=KEY), eqx.nn.Lambda(jnp.tanh)
        self.gain, self.act = jnp.ones(2), jax.nn.relu
        self.blocks = [{"a": eqx.nn.Linear(4, 4, key=KEY)} for _ in range(12)]
        self.head = eqx.nn.MLP(4, 2, 5, 1, key=KEY)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        (0, {"zed"}),
        (2, {f"blocks/{i}/a" for i in range(12)}),
        (-1, {"head/layers/0", "head/layers/1"}),
        ("blocks[2]", {"blocks/2/a"}),
        ("blocks[-2:]", {"blocks/10/a", "blocks/11/a"}),
        ("head/layers[-1]", {"head/layers/1"}),
        ("*/layers[-1]", {"head/layers/1"}),
    ],
    ids=told,
)
def test_positions_in_equinox(target, layers):
    """Fields are in the order of their definition, whatever has been done to the module."""
    model = EquinoxNet()
    moved = eqx.filter_jit(lambda model: jax.tree.map(lambda x: x, model))(model)
    for each in (model, moved):
        structure = lm.structure_of(each)
        assert named(target, eqx.filter(each, eqx.is_inexact_array), structure) == layers
        assert named(target, each, structure) == layers
        with pytest.raises(lm.UnmatchedRuleError, match=r"'drop'.* no (parameters|array)"):
            named(1, each, structure)


def test_what_is_no_module():
    for given in (PARAMS, None, 1, nnx.Linear, Named, jnp.ones(2)):
        with pytest.raises(lm.RuleError, match=r"no module of NNX, Linen or Equinox"):
            lm.structure_of(given)
    with pytest.raises(lm.RuleError, match=r"example_inputs"):
        lm.structure_of(Named())
    with pytest.raises(lm.RuleError, match=r"the model alone"):
        lm.structure_of(linear(), KEY, X)


def test_what_was_read_is_passed_over_where_it_is_not():
    """An optimizer may see a part of a model."""
    params, structure = linen("setup")
    part = {"zed": params["zed"], "blocks_3": params["blocks_3"]}
    assert named(0, part, structure) == {"zed"}
    assert named(4, part, structure) == {"blocks_3"}
    with pytest.raises(lm.UnmatchedRuleError):
        named(-1, part, structure)
    same = lm.Structure(structure.order, structure.shared, structure.stacked)
    assert same == structure
    inner = lm.Structure(order={"": ["zed", "blocks_3"], "blocks_4": ["x", "y"]})
    with pytest.raises(lm.RuleError, match="'blocks_4'"):
        named(0, part, inner)


# Stacks -------------------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    def __init__(self, key, width=4, hidden=6):
        make = functools.partial(nnx.Linear, kernel_init=nnx.initializers.zeros_init())
        self.up = make(width, hidden, rngs=nnx.Rngs(key))
        self.down = make(hidden, width, rngs=nnx.Rngs(key))


class EquinoxBlock(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key, width=4, hidden=6):
        self.up = eqx.nn.Linear(width, hidden, key=key)
        self.down = eqx.nn.Linear(hidden, width, key=key)


class EquinoxStacks(eqx.Module):
    stem: eqx.nn.Linear
    layers: EquinoxBlock
    nested: list
    alone: EquinoxBlock


def nnx_stack(size, axis=0, *shape):
    make = nnx.vmap(lambda key: NNXBlock(key, *shape), out_axes=axis)
    return make(jax.random.split(KEY, size))


def equinox_stack(size, axis=0, *shape):
    make = eqx.filter_vmap(lambda key: EquinoxBlock(key, *shape), out_axes=axis)
    return eqx.filter_eval_shape(make, jax.random.split(KEY, size))


class NNXStacks(nnx.Module):
    def __init__(self, axis, *shape):
        self.stem = linear(4, 4)
        self.layers = nnx_stack(3, axis, *shape)
        self.nested = nnx.List([nnx_stack(3, axis, *shape), nnx_stack(2, axis, *shape)])
        self.alone = NNXBlock(KEY)


@functools.cache
def stacks(library, axis=0, *shape):
    if library == "nnx":
        model = NNXStacks(axis, *shape)
        return nnx.state(model, nnx.Param), lm.structure_of(model)
    nested = [equinox_stack(3, axis, *shape), equinox_stack(2, axis, *shape)]
    stem, alone = eqx.nn.Linear(4, 4, key=KEY), EquinoxBlock(KEY)
    model = EquinoxStacks(stem, equinox_stack(3, axis, *shape), nested, alone)
    return eqx.filter(model, lambda leaf: hasattr(leaf, "shape")), lm.structure_of(model)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_stacks_are_told_by_their_layers(library, axis):
    params, structure = stacks(library, axis)
    assert structure.stacked == {"layers": axis, "nested/0": axis, "nested/1": axis}
    assert_layer(masks("layers[1]", params, structure), "layers", axis, 1)
    assert_layer(masks("layers[-1]/down", params, structure), "layers", axis, 2, arrays=2)
    assert_layer(masks("nested[0]/[2]", params, structure), "nested", axis, 2)
    assert_layer(masks("nested/1[-1]", params, structure), "nested", axis, 1)
    assert named("nested[1]", params, structure) == {"nested/1/up", "nested/1/down"}
    # With either of them, the fields' order is known of a module that is no stack.
    with pytest.raises(lm.IndexRangeError, match="3 members"):
        masks("layers[3]", params, structure)


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_stack_of_as_many_layers_as_they_are_wide_is_not_told(library):
    """And a position there is an error: it must not mean a layer within each block."""
    params, structure = stacks(library, 0, 3, 3)
    assert "layers" not in structure.stacked
    with pytest.raises(lm.PositionError, match="stacked"):
        masks("layers[1]", params, structure)
    by_hand = structure | lm.Structure(stacked={"layers": 0})
    assert_layer(masks("layers[1]", params, by_hand), "layers", 0, 1)


def test_stacks_within_an_ensemble_are_not_mistaken():
    """Of `layers`, which has two axes more, `down` must not be taken for the second layer."""
    model = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((5, *leaf.shape), leaf.dtype), stacks("equinox")[0]
    )
    with pytest.raises(lm.PositionError):
        masks("layers[1]", model, lm.structure_of(model))


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_an_ensemble_of_a_whole_model(library):
    if library == "nnx":
        params = nnx_stack(5)
        structure, params = lm.structure_of(params), nnx.state(params, nnx.Param)
    else:
        params = equinox_stack(5)
        structure = lm.structure_of(params)
    assert structure.stacked[""] == 0
    for target, index in ((1, 1), (-1, 4), (slice(2, 4), slice(2, 4)), ("[0]", 0)):
        found = masks(target, params, structure)
        assert len(found) == 4
        for mask in found.values():
            assert mask.sum() == mask[index].sum() == mask[index].size
    assert named("up", params, structure) == {"up"}


# Every function of rules takes structure= ---------------------------------------------------------

RULES = [(-2, None), (0, 0.5)]  # in CHAIN: `fc`, `conv1`
KNOWN = lm.Structure(order={"": CHAIN})
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
WANTED = {"conv1": -0.5, "conv2": -1.0, "fc": 0.0}


def check_updates(updates):
    for name, value in WANTED.items():
        for leaf in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(leaf, value, rtol=1e-6)


def transforms():
    sgd = optax.sgd(1.0)
    scale = lm.scale_by_rules(RULES, structure=KNOWN)
    everything = jax.tree.map(lambda _: True, PARAMS)
    return {
        "chain": optax.chain(sgd, scale),
        "wrap": lm.wrap(sgd, RULES, structure=KNOWN),
        "compact": lm.wrap(sgd, RULES, compact=True, structure=KNOWN),
        "masked": optax.chain(sgd, optax.masked(scale, everything)),
        "partition": optax.partition({"x": optax.chain(sgd, scale)}, jax.tree.map(
            lambda _: "x", PARAMS)),
        "partition of parts": optax.partition(
            {"x": optax.chain(sgd, scale), "y": sgd}, {"conv1": "x", "conv2": "y", "fc": "x"}
        ),
        "masked wrap": optax.masked(lm.wrap(sgd, RULES, structure=KNOWN), everything),
    }  # fmt: skip


@pytest.mark.parametrize("name", transforms())
def test_transformations(name):
    tx = transforms()[name]
    state = tx.init(PARAMS)
    check_updates(tx.update(GRADS, state, PARAMS)[0])
    check_updates(jax.jit(tx.update)(GRADS, state, PARAMS)[0])


@pytest.mark.parametrize("make", [lm.scale_by_rules, functools.partial(lm.wrap, optax.sgd(1.0))])
def test_transformations_without_a_structure(make):
    with pytest.raises(lm.PositionError, match="structure="):
        make(RULES).init(PARAMS)


def test_functions_of_params():
    mask = lm.trainable_mask(RULES, structure=KNOWN)(PARAMS)
    assert mask == {name: {"w": name != "fc", "b": name != "fc"} for name in PARAMS}
    with pytest.raises(lm.PositionError):
        lm.trainable_mask(RULES)(PARAMS)

    def total(params):
        return sum(map(jnp.sum, jax.tree.leaves(lm.stop_frozen(params, RULES, structure=KNOWN))))

    grads = jax.grad(total)(PARAMS)
    assert [name for name in PARAMS if not grads[name]["w"].any()] == ["fc"]
    changed = {**PARAMS, "conv2": jax.tree.map(jnp.zeros_like, PARAMS["conv2"])}
    lm.assert_frozen(PARAMS, changed, RULES, structure=KNOWN)
    with pytest.raises(lm.FrozenError, match="fc/"):
        lm.assert_frozen(PARAMS, {**changed, "fc": changed["conv2"]}, RULES, structure=KNOWN)
    assert lm.extract(PARAMS, -2, structure=KNOWN) is PARAMS["fc"]
    replaced = lm.replace(PARAMS, "[2]/w", jnp.zeros(2), structure=KNOWN)
    assert [name for name in PARAMS if not replaced[name]["w"].any()] == ["conv2"]
    source = jax.tree.map(jnp.zeros_like, PARAMS)
    grafted, left = lm.graft(PARAMS, source, [0, -2], structure=KNOWN)
    assert not left
    assert [name for name in PARAMS if not grafted[name]["w"].any()] == ["conv1", "fc"]
    for function in (lm.extract, functools.partial(lm.replace, value=PARAMS["fc"])):
        with pytest.raises(lm.PositionError, match="structure="):
            function(PARAMS, target=-2)


def test_migrate():
    momentum = optax.sgd(1.0, momentum=0.9)
    tx = lm.wrap(momentum, RULES, structure=KNOWN)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    thawed = lm.migrate(state, PARAMS, momentum, RULES, [(2, None)], structure=KNOWN)
    trace = optax.tree.get(thawed, "trace")
    assert trace["conv2"] == jax.tree.map(lambda _: optax.MaskedNode(), PARAMS["conv2"])
    np.testing.assert_array_equal(trace["fc"]["w"], 0)
    np.testing.assert_array_equal(trace["conv1"]["w"], 1)


class Trained(nnx.Module):
    """Sorted, `head` comes first; its low-rank part is of another type of variable."""

    def __init__(self):
        self.zed = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.0)
        self.mid = nnx.LoRALinear(2, 2, lora_rank=1, rngs=nnx.Rngs(1))
        self.head = nnx.LoRALinear(2, 2, lora_rank=1, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.head(self.mid(self.drop(self.zed(x), deterministic=True)))


@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "wrap"])
@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam], ids=["Param", "LoRAParam"])
def test_nnx_optimizer(wrt, wrapped):
    """NNX sorts the attributes in the first step, and gives the optimizer a part of the model."""
    model = Trained()
    rules, structure = [(-1, None), (lm.optional([("zed", 0.5)])[0])], lm.structure_of(model)
    sgd = optax.sgd(0.1)
    if wrapped:
        tx = lm.wrap(sgd, rules, structure=structure)
    else:
        tx = optax.chain(sgd, lm.scale_by_rules(rules, structure=structure))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    for state in (model.mid.lora.lora_b, model.head.lora.lora_b):  # both start at zero
        state[...] = jnp.ones(state.shape)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum(), argnums=nnx.DiffState(0, wrt))
        optimizer.update(model, grads(model))

    for _ in range(2):
        step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kept = {
        path
        for path, one, other in zip(
            lm.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
        )
        if np.array(one).tobytes() == np.array(other).tobytes()
    }
    everything = set(lm.paths(before))
    frozen = {path for path in everything if path.startswith("head/")}
    trained = {path for path in everything if wrt is nnx.Param or "lora_" in path}
    assert kept == everything - (trained - frozen)
