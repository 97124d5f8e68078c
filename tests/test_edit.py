"""Parts of trees by path: what `extract` reads, `replace` sets and `graft` transplants."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lrmult as lm
from tests.devices import printed_on_four_devices

KEY = jax.random.key(0)


class Pair(NamedTuple):
    query: Any
    scale: Any


class One(NamedTuple):
    weight: Any


@flax.struct.dataclass
class Box:
    weight: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["name"]
)
@dataclasses.dataclass
class Record:
    left: Any
    right: Any
    name: str = "record"


def bits(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()
    return None


def assert_same(new, old):
    """Alike in every bit, and in all that JAX tells apart."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for path, one, other in zip(lm.paths(old), *map(jax.tree.leaves, (new, old)), strict=True):
        assert type(one) is type(other), path
        if isinstance(other, bool | int | float):
            assert one == other, path
            continue
        assert (one.shape, one.dtype, bits(one)) == (other.shape, other.dtype, bits(other)), path
        if isinstance(other, jax.Array):
            assert one.sharding == other.sharding, path
            assert getattr(one, "weak_type", None) == getattr(other, "weak_type", None), path


def by_path(tree):
    return dict(zip(lm.paths(tree), jax.tree.leaves(tree), strict=True))


def ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)


# ---- every kind of target, against NumPy ---------------------------------------------------------

SHAPES = {
    "embed": {"table": (6, 3)},
    "blocks": [{"kernel": (3, 4), "bias": (4,)} for _ in range(3)],
    "heads": Pair((2, 3, 2), ()),
    "gain*": {"x y": (2,), "[0]": (2,)},
    "net/~/linear": {"w": (3, 2), "b": (2,)},
    "net/~/linear_1": {"w": (2, 2), "b": (2,)},
    "scan": {"kernel": (4, 2, 3), "bias": (4, 3)},
}
STRUCTURE = lm.Structure(
    order={"": ["embed", "blocks", "pool", "heads", "gain*", "net", "scan", "out"]},
    shared=[["embed/table", "out/tied"]],
    stacked={"scan": 0},
)
CHECKER = np.add.outer(np.arange(6), np.arange(3)) % 2 == 0


def tree(make=jnp.asarray):
    """A tree in which no two numbers are alike."""
    numbers = iter(range(1000))

    def leaf(shape):
        count = int(np.prod(shape))
        return make(np.array([next(numbers) for _ in range(count)], np.float32).reshape(shape))

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: type(node) is tuple)


def whole(array):
    return array


def each(*names, index=whole):
    return dict.fromkeys(names, index)


def block(*numbers, index=whole):
    return each(
        *(f"blocks/{n}/{name}" for n in numbers for name in ("bias", "kernel")), index=index
    )


LINEAR = each("net/~/linear/b", "net/~/linear/w"), each("net/~/linear_1/b", "net/~/linear_1/w")
GAINS = each(r"gain\*/\[0\]", r"gain\*/x y")
BIASES = each(*(f"blocks/{n}/bias" for n in range(3)), "scan/bias")
WS = each("net/~/linear/w", "net/~/linear_1/w")


def only(path, index):
    return path, {path: index}


table = functools.partial(only, "embed/table")
# A target; the node whose value `extract` gives, None where that is a dict from paths; and the
# arrays, each with what NumPy makes of it.
TARGETS = [
    ("embed", "embed", each("embed/table")),
    ("embed/table", "embed/table", each("embed/table")),
    ("blocks", "blocks", block(0, 1, 2)),
    ("blocks/1", "blocks/1", block(1)),
    ("heads/scale", "heads/scale", each("heads/scale")),
    ("net", "net", LINEAR[0] | LINEAR[1]),
    ("net/~", "net/~", LINEAR[0] | LINEAR[1]),
    ("net/~/linear", "net/~/linear", LINEAR[0]),
    (r"gain\*", r"gain\*", GAINS),
    (("gain*", "[0]"), r"gain\*/\[0\]", each(r"gain\*/\[0\]")),
    (("net", "~", "linear_1"), "net/~/linear_1", LINEAR[1]),
    (("blocks", -1), "blocks/2", block(2)),
    (("blocks", 1, "bias"), "blocks/1/bias", each("blocks/1/bias")),
    (0, "embed", each("embed/table")),
    (-5, "heads", each("heads/query", "heads/scale")),
    ("blocks[0]", "blocks/0", block(0)),
    ("blocks[-1]/bias", "blocks/2/bias", each("blocks/2/bias")),
    ("net/~/linear[1]", "net/~/linear_1", LINEAR[1]),
    ("out/tied", "embed/table", each("embed/table")),
    (slice(0, 2), None, block(0, 1, 2) | each("embed/table")),
    ("blocks[:2]", None, block(0, 1)),
    ("blocks[1:2]", None, block(1)),
    ("blocks[::2]/bias", None, each("blocks/0/bias", "blocks/2/bias")),
    ("**/bias", None, BIASES),
    ("emb*", None, each("embed/table")),
    ("*/~/linear{,_1}/w", None, WS),
    ("{embed,heads}/*", None, each("embed/table", "heads/query", "heads/scale")),
    ("out/*", None, each("embed/table")),
    (("net", ..., "w"), None, WS),
    (re.compile(r"net/.*/w"), None, WS),
    (lambda path, leaf: leaf.shape == (), None, each("heads/scale")),
    (lm.rows("embed/table", [5, 2]), *table(lambda a: a[[5, 2]])),
    (lm.rows("embed", -1), *table(lambda a: a[-1])),
    (lm.rows("embed", [-1, 0, -3]), *table(lambda a: a[[5, 0, 3]])),
    (lm.rows("embed", np.int64(4)), *table(lambda a: a[4])),
    (lm.rows("embed", np.array([3, 1])), *table(lambda a: a[[3, 1]])),
    (lm.rows("embed", jnp.array([3, -6])), *table(lambda a: a[[3, 0]])),
    (lm.rows("embed", [4]), *table(lambda a: a[4:5])),
    (lm.rows("embed", [True, False] * 3), *table(lambda a: a[::2])),
    (lm.rows("embed", CHECKER[:, 1]), *table(lambda a: a[1::2])),
    (lm.rows("embed", slice(4, None, -2)), *table(lambda a: a[4::-2])),
    (lm.rows("embed", slice(-2, 99)), *table(lambda a: a[-2:])),
    (lm.rows("out/tied", [1]), *table(lambda a: a[[1]])),
    (lm.rows("emb*", [5, 2]), None, each("embed/table", index=lambda a: a[[5, 2]])),
    (lm.along("heads/query", -1, 0), *only("heads/query", lambda a: a[..., 0])),
    (lm.along("heads/query", 1, [2, 0]), *only("heads/query", lambda a: a[:, [2, 0]])),
    (lm.along("*/query", 2, 1), None, each("heads/query", index=lambda a: a[:, :, 1])),
    (lm.along(lm.rows("embed", [5, 2]), 1, [2, 0]), *table(lambda a: a[[5, 2]][:, [2, 0]])),
    (lm.along(lm.rows("embed", 3), 1, [2, 0]), *table(lambda a: a[3, [2, 0]])),
    (lm.rows(lm.along("embed", 1, 1), -1), *table(lambda a: a[-1, 1])),
    (lm.rows(lm.rows("embed", [5, 2, 0]), [0, 1, 5]), *table(lambda a: a[[5, 0]])),
    (lm.elements("embed/table", CHECKER), *table(lambda a: a[CHECKER])),
    (lm.elements("embed/table", np.outer(CHECKER[:, 0], [True, False, True])),
     *table(lambda a: a[::2, ::2].reshape(-1))),
    (lm.elements(lm.rows("embed", [5, 2]), CHECKER), *table(lambda a: a[[2, 5]][CHECKER[[2, 5]]])),
    (lm.along(lm.elements("embed", CHECKER), 1, 0), *table(lambda a: a[CHECKER[:, 0], 0])),
    (lm.elements("heads/scale", np.array(True)), *only("heads/scale", lambda a: a.reshape(1))),
    (lm.neurons("blocks/0", [3, 1]), None, block(0, index=lambda a: a[..., [3, 1]])),
    (lm.neurons("blocks[-1]", 0), None, block(2, index=lambda a: a[..., 0])),
    (lm.neurons("blocks/*/kernel", [0]), None,
     each(*(f"blocks/{n}/kernel" for n in range(3)), index=lambda a: a[:, [0]])),
    (lm.neurons("net/~/linear", 1), None, dict.fromkeys(LINEAR[0], lambda a: a[..., 1])),
    (lm.rows("**", 3), None, each("embed/table", *BIASES, "scan/kernel", index=lambda a: a[3])),
    ("scan", "scan", each("scan/bias", "scan/kernel")),
    ("scan[2]", None, each("scan/bias", "scan/kernel", index=lambda a: a[2])),
    ("scan[-1]/kernel", *only("scan/kernel", lambda a: a[-1])),
    ("scan[1:3]", None, each("scan/bias", "scan/kernel", index=lambda a: a[1:3])),
    ("scan[:]", None, each("scan/bias", "scan/kernel")),
    ("scan[2]/k*", None, each("scan/kernel", index=lambda a: a[2])),
    (lm.along("scan[2]/kernel", 2, [2, 0]), *only("scan/kernel", lambda a: a[2][:, [2, 0]])),
    (lm.neurons("scan[1]", [2, 0]), None,
     each("scan/bias", "scan/kernel", index=lambda a: a[1][..., [2, 0]])),
    (lm.elements("scan[3]/bias", np.eye(4, 3, -1, dtype=bool)),
     *only("scan/bias", lambda a: a[3, [2]])),
]  # fmt: skip


def flat(found, at):
    """What `extract` gave, by path."""
    if at is None:
        return found
    return {"/".join(filter(None, [at, path])): leaf for path, leaf in by_path(found).items()}


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize(
    ("target", "at", "wanted"),
    TARGETS,
    ids=[re.sub(" at 0x.*", "", str(target)) for target, _, _ in TARGETS],
)
def test_targets_mean_what_numpy_would_give(target, at, wanted, make):
    params = tree(make)
    before = {path: np.array(leaf) for path, leaf in by_path(params).items()}
    found = lm.extract(params, target, structure=STRUCTURE)
    parts = flat(found, at)
    assert list(parts) == [path for path in before if path in wanted]  # in the order of the tree
    for path, index in wanted.items():
        np.testing.assert_array_equal(parts[path], index(before[path]), strict=True)
    assert_same(lm.replace(params, target, found, structure=STRUCTURE), params)

    value = jax.tree.map(lambda part: -1 - part, found)
    new = lm.replace(params, target, value, structure=STRUCTURE)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for path, leaf in by_path(new).items():
        places = np.arange(before[path].size).reshape(before[path].shape)
        expected = before[path].copy().reshape(-1)
        if path in wanted:
            expected[wanted[path](places).reshape(-1)] *= -1
            expected[wanted[path](places).reshape(-1)] -= 1
        np.testing.assert_array_equal(leaf, expected.reshape(places.shape), strict=True)
        assert type(leaf) is type(by_path(params)[path])
        np.testing.assert_array_equal(by_path(params)[path], before[path])  # a new tree
    again = lm.extract(new, target, structure=STRUCTURE)
    assert [*map(bits, jax.tree.leaves(again))] == [*map(bits, jax.tree.leaves(value))]


def test_everything():
    params = tree()
    for target in (..., "**"):
        assert_same(lm.extract(params, target), by_path(params))
        assert_same(lm.replace(params, target, by_path(params)), params)
    assert lm.extract({}, ...) == {}
    bare = jnp.arange(3.0)
    assert_same(lm.extract(bare, ...), {"": bare})
    for value in (bare + 1, {"": bare + 1}):
        assert_same(lm.replace(bare, ..., value), bare + 1)


def test_a_name_gives_the_very_object():
    params = tree()
    assert lm.extract(params, "blocks") is params["blocks"]
    assert lm.extract(params, "blocks/1") is params["blocks"][1]
    assert lm.extract(params, "heads") is params["heads"]
    assert lm.extract(params, "net/~/linear") is params["net/~/linear"]
    assert lm.extract(params, "embed/table") is params["embed"]["table"]


def test_an_index_that_names_a_place_twice():
    params = {"w": jnp.arange(3.0)}
    target = lm.rows("w", [2, 0, -1])
    assert lm.extract(params, target).tolist() == [2, 0, 2]
    assert_same(lm.replace(params, target, lm.extract(params, target)), params)
    assert lm.replace(params, target, [7.0, 8.0, 7.0])["w"].tolist() == [8, 1, 7]
    with pytest.raises(lm.RuleError, match="one place twice, and cannot take two values there"):
        lm.replace(params, target, [7.0, 8.0, 9.0])
    with pytest.raises(lm.RuleError, match="one place twice"):
        jax.jit(lambda value: lm.replace(params, target, value))(jnp.ones(3))


NAMES = st.text("ab0_*[]{}\\~ .é/", min_size=1, max_size=3)
SIZES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def trees_and_parts(draw):
    """A tree with odd keys; a part of one of its arrays, and the numbers of its elements there."""
    leaves = st.deferred(lambda: SIZES | nodes)
    nodes = (
        st.dictionaries(NAMES, leaves, min_size=1, max_size=3)
        | st.lists(leaves, min_size=1, max_size=3)
        | st.builds(One, leaves)
        | st.builds(Box, leaves)
    )
    shapes = draw(st.dictionaries(NAMES, leaves, min_size=1, max_size=3))
    seed = np.random.default_rng(draw(st.integers(0, 9)))
    params = jax.tree.map(
        lambda shape: seed.integers(0, 2**32, shape, np.uint32).view(np.float32),
        shapes,
        is_leaf=lambda node: type(node) is tuple,
    )
    try:
        path = draw(st.sampled_from(lm.paths(params)))
    except lm.RuleError:  # two arrays have one path
        assume(False)
    shape = by_path(params)[path].shape
    places, target = np.arange(np.prod(shape, dtype=int)).reshape(shape), path
    axes: dict[int, Any] = {}
    for axis in draw(st.permutations(range(len(shape))))[: draw(st.integers(0, 3))]:
        size = shape[axis]
        ints = st.integers(-size, size - 1)
        index = draw(
            st.just(slice(None, None, -1)) | ints | st.lists(ints, min_size=1, unique=True)
            if size
            else st.sampled_from([slice(None), []])
        )
        axes[axis] = np.arange(size)[index if isinstance(index, slice | int) else [*index]]
        if isinstance(index, list) and size:
            assume(len(set(axes[axis].tolist())) == len(index))
        target = lm.along(target, axis - draw(st.sampled_from([0, len(shape)])), index)
    if draw(st.booleans()):
        mask = seed.random(shape) < 0.6
        for axis, chosen in axes.items():
            inside = np.isin(np.arange(shape[axis]), chosen)
            mask = mask & inside.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        assume(mask.any() or not mask.size)
        return params, lm.elements(target, mask), path, places[mask]
    for axis in sorted(axes, reverse=True):
        places = places.take(axes[axis], axis)
    return params, target, path, places


def check_part(case, make):
    params, target, path, places = case
    params = jax.tree.map(make, params)
    before = np.asarray(by_path(params)[path])
    found = lm.extract(params, target)
    np.testing.assert_array_equal(
        np.asarray(found).view(np.uint32), before.view(np.uint32).reshape(-1)[places]
    )
    assert_same(lm.replace(params, target, found), params)
    value = np.arange(places.size, dtype=np.float32).reshape(places.shape)
    new = lm.replace(params, target, value)
    np.testing.assert_array_equal(lm.extract(new, target), value)
    wanted = before.view(np.uint32).reshape(-1).copy()
    wanted[places.reshape(-1)] = value.view(np.uint32).reshape(-1)
    same = lm.replace(new, path, wanted.view(np.float32).reshape(before.shape))
    assert_same(new, same)
    assert_same(lm.replace(new, path, before), params)  # nothing else changed


@given(trees_and_parts())
@settings(max_examples=80)
def test_any_part_of_any_tree_of_numpy(case):
    check_part(case, np.asarray)


@given(trees_and_parts())
@settings(max_examples=15)  # every shape compiles anew
def test_any_part_of_any_tree_of_jax(case):
    check_part(case, jnp.asarray)


@given(trees_and_parts())
@settings(max_examples=50)
def test_any_node_of_any_tree(case):
    params, *_ = case
    for node in nodes_of(params):
        found = lm.extract(params, node)
        assert [*map(bits, jax.tree.leaves(found))] == arrays_below(params, node)
        assert_same(lm.replace(params, node, found), params)


# ---- containers ----------------------------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
        x = nn.Dense(3, kernel_init=split, bias_init=lm.attach(nn.initializers.ones, 0.5))(x)
        return nn.Dense(2, use_bias=False, kernel_init=split)(x)


def haiku_net(x):
    class Block(hk.Module):
        def __call__(self, x):
            gain = hk.get_parameter("gain", [x.shape[-1]], init=jnp.ones)
            return hk.Linear(2)(hk.Linear(3)(gain * x))

    return Block(name="block")(x)


X = jnp.ones((2, 4))
CONTAINERS = {
    "dict": tree,
    "NamedTuple": lambda: Pair({"w": jnp.ones(2)}, jnp.ones(())),
    "dataclasses": lambda: Record(Record(jnp.ones(2), jnp.zeros(3)), [jnp.ones(1), jnp.ones(2)]),
    "struct": lambda: {"a": Box({"w": jnp.ones(2), "b": jnp.ones(1)})},
    "list of one": lambda: {"a": [jnp.arange(2.0)]},
    "tuple of one": lambda: {"a": (jnp.arange(2.0),)},
    "NamedTuple of one": lambda: {"a": One(jnp.arange(2.0))},
    "struct of one": lambda: {"a": Box(jnp.arange(2.0))},
    "dict of one": lambda: {"a": {"b": {"c": jnp.arange(2.0)}}},
    "holes": lambda: {"a": {"w": jnp.ones(2), "b": None}, "c": [optax.MaskedNode(), jnp.ones(1)]},
    "FrozenDict": lambda: flax.core.freeze({"a": {"w": jnp.ones(2), "b": jnp.ones(1)}}),
    "Linen boxes": lambda: LinenNet().init(KEY, X)["params"],
    "TrainState.params": lambda: (
        TrainState.create(
            apply_fn=None, params=LinenNet().init(KEY, X)["params"], tx=optax.adam(1e-3)
        ).params
    ),
    "nnx.State": lambda: nnx.state(NNXNet(nnx.Rngs(0))),
    "pure dict of NNX": lambda: nnx.to_pure_dict(nnx.state(NNXNet(nnx.Rngs(0)), nnx.Param)),
    "Equinox": lambda: EquinoxNet(KEY),
    "filtered Equinox": lambda: eqx.filter(EquinoxNet(KEY), eqx.is_array),
    "Haiku": lambda: hk.transform(haiku_net).init(KEY, X),
    "keys that begin alike": lambda: {"a": {"w": jnp.ones(2)}, "a/b": {"w": jnp.zeros(3)}},
}


def nodes_of(params):
    """The paths of all nodes below the root."""
    names = [path.split("/") for path in lm.paths(params)]
    return list(dict.fromkeys("/".join(n[:k]) for n in names for k in range(1, len(n) + 1)))


def arrays_below(params, node):
    wanted = [path for path in lm.paths(params) if f"{path}/".startswith(f"{node}/")]
    return [bits(by_path(params)[path]) for path in wanted]


def changed(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, 1)
    return leaf + jnp.ones_like(leaf)


def array_leaves(value):
    return [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "dtype")]


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_stands_at_a_node_may_be_put_there(container):
    params = CONTAINERS[container]()
    arrays, rest = eqx.partition(params, eqx.is_array)
    for node in nodes_of(arrays):
        found = lm.extract(params, node)
        # Of keys that begin alike, names inside are sorted among those of what is beside them.
        assert sorted(map(bits, array_leaves(found))) == sorted(arrays_below(arrays, node)), node
        same = lm.replace(params, node, found)
        assert_same(eqx.filter(same, eqx.is_array), arrays)
        assert jax.tree.structure(same) == jax.tree.structure(params), node

        value = jax.tree.map(lambda leaf: changed(leaf) if eqx.is_array(leaf) else leaf, found)
        new, static = eqx.partition(lm.replace(params, node, value), eqx.is_array)
        assert eqx.tree_equal(static, rest)
        for path, old in by_path(arrays).items():
            inside = f"{path}/".startswith(f"{node}/")
            assert bits(by_path(new)[path]) == bits(changed(old) if inside else old)


def test_boxes_do_not_show():
    params = LinenNet().init(KEY, X)["params"]
    kernel = lm.extract(params, "Dense_0/kernel")
    assert isinstance(kernel, jax.Array)
    assert isinstance(lm.extract(params, "Dense_0")["kernel"], nn.Partitioned)
    box = params["Dense_0"]["kernel"]
    for value in (kernel + 1, box.replace_boxed(kernel + 1), np.asarray(kernel + 1)):
        new = lm.replace(params, "Dense_0/kernel", value)
        assert_same(new["Dense_0"]["kernel"], box.replace_boxed(kernel + 1))
        assert jax.tree.structure(new) == jax.tree.structure(params)
    raw = nn.unbox(params["Dense_0"])
    assert_same(lm.replace(params, "Dense_0", raw), params)
    only = lm.replace({"fc": {"kernel": box}}, "fc", {"kernel": box.replace_boxed(kernel + 1)})
    assert_same(only, {"fc": {"kernel": box.replace_boxed(kernel + 1)}})


# ---- what a leaf may be --------------------------------------------------------------------------

LEAVES = {
    "float64 of NumPy": np.array([[np.pi, -0.0], [np.nan, 1e300]]),
    "int64 of NumPy": np.array([[2**40, 1], [2, 3]]),
    "scalar of NumPy": np.float32(0.5),
    "0-d of NumPy": np.array(0.5),
    "float": 0.5,
    "int": 3,
    "bool": True,
    "weak": jnp.asarray(0.5),
    "weak int": jnp.full((2, 2), 3),
    "bfloat16": jnp.array([[1, -0.0], [jnp.nan, 3]], jnp.bfloat16),
    "bfloat16 of NumPy": np.array([[1, 2], [3, 4]], jnp.bfloat16),
    "float8": jnp.ones((2, 2), jnp.float8_e4m3fn),
    "int8": jnp.array([[1, -128], [127, 0]], jnp.int8),
    "uint32": jnp.array([[1, 2**32 - 1], [0, 0]], jnp.uint32),
    "bools": jnp.array([[True, False], [False, True]]),
    "complex": jnp.array([[1j, 2], [3, 4]], jnp.complex64),
    "keys": jax.random.split(KEY, (2, 2)),
    "one key": KEY,
    "old keys": jax.random.PRNGKey(0),
    "subnormal": jnp.array([[1e-40, -1e-45], [0, 1]], jnp.float32),
    "zero rows": jnp.zeros((0, 2)),
    "zero columns": jnp.zeros((2, 0)),
    "a shape": jax.ShapeDtypeStruct((2, 2), jnp.float32),
}


@pytest.mark.parametrize("kind", LEAVES)
def test_every_kind_of_leaf(kind):
    leaf = LEAVES[kind]
    params = {"a": {"w": leaf, "b": jnp.ones(2)}, "c": jnp.ones(2)}
    shape = np.shape(leaf)
    mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 == 0
    targets = ["a", "a/w", "**/w", ..., lm.elements("a/w", mask)]
    if shape:
        targets += [
            lm.rows("a/w", slice(None, None, -1)),
            lm.rows("a/w", list(range(shape[0]))[-1:]),
            lm.rows("a/w", 0) if shape[0] else lm.along("a/w", 1, 1),
        ]
    for target in targets:
        found = lm.extract(params, target)
        assert_same(lm.replace(params, target, found), params)
    if isinstance(leaf, bool | int | float):
        return
    part = lm.extract(params, targets[4])
    assert (part.shape, part.dtype) == ((mask.sum(),), leaf.dtype)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        assert bits(part) == bits(leaf.reshape(-1)[np.flatnonzero(mask)])


@pytest.mark.parametrize(
    ("leaf", "value", "wanted"),
    [
        (jnp.zeros(2), [1, 2], np.array([1, 2], np.float32)),
        (jnp.zeros(2), (1.5, True), np.array([1.5, 1], np.float32)),
        (jnp.zeros(2), np.array([1.0, 2.0]), np.array([1, 2], np.float32)),
        (jnp.zeros(2), jnp.ones(2, jnp.bfloat16), np.ones(2, np.float32)),
        (jnp.zeros(2, jnp.bfloat16), np.array([1 / 3, 0]), np.array([1 / 3, 0], jnp.bfloat16)),
        (jnp.zeros(2, jnp.int8), np.array([1, 2]), np.array([1, 2], np.int8)),
        (jnp.zeros(2, bool), [True, False], np.array([True, False])),
        (jnp.zeros(2, jnp.complex64), np.array([1j, 2]), np.array([1j, 2], np.complex64)),
        (np.zeros(2), jnp.ones(2), np.ones(2)),
        (np.zeros(2, np.float32), [np.pi, 0], np.array([np.pi, 0], np.float32)),
    ],
)
def test_values_are_cast_within_a_kind(leaf, value, wanted):
    new = lm.replace({"w": leaf}, "w", value)["w"]
    assert isinstance(new, type(leaf) if isinstance(leaf, np.ndarray) else jax.Array)
    assert (new.dtype, bits(new)) == (leaf.dtype, bits(wanted))
    row = lm.replace({"w": leaf}, lm.rows("w", [1, 0]), value)["w"]
    assert (row.dtype, bits(row)) == (leaf.dtype, bits(wanted[::-1]))


# ---- traced --------------------------------------------------------------------------------------

PARTS = [
    "w",
    lm.rows("w", [2, 0]),
    lm.rows("w", 1),
    lm.elements("w", np.eye(3, 2, dtype=bool)),
    ...,
]


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("target", PARTS, ids=str)
def test_under_jit_grad_and_vmap(target, make):
    params = {"w": make(np.arange(6, dtype=np.float32).reshape(3, 2))}
    found = lm.extract(params, target)
    value = jax.tree.map(lambda part: part * 2 + 1, found)
    new = lm.replace(params, target, value)
    assert_same(
        jax.jit(lambda params: lm.extract(params, target))(params), jax.tree.map(jnp.asarray, found)
    )
    for function, inputs in [
        (lambda params, value: lm.replace(params, target, value), (params, value)),
        (lambda value: lm.replace(params, target, value), (value,)),  # the tree is a constant
    ]:
        np.testing.assert_array_equal(jax.jit(function)(*inputs)["w"], new["w"])
    grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(lm.extract(p, target)))))(
        jax.tree.map(jnp.asarray, params)
    )
    ones = jax.tree.map(np.ones_like, found)
    np.testing.assert_array_equal(
        grads["w"], lm.replace({"w": np.zeros((3, 2), np.float32)}, target, ones)["w"]
    )
    many = jax.tree.map(lambda part: jnp.stack([part, part + 1]), found)
    batch = jax.vmap(lambda value: lm.replace(params, target, value)["w"])(many)
    np.testing.assert_array_equal(batch[0], params["w"])
    assert (np.asarray(batch[1]) != batch[0]).sum() == sum(map(np.size, jax.tree.leaves(found)))


def test_graft_under_jit():
    old, new = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    done, left = lm.graft(new, old)
    assert_same(jax.jit(lambda new, old: lm.graft(new, old)[0])(new, old), done)
    assert [path for path, _ in left] == ["b"]


def test_values_made_of_traced_numbers():
    new = jax.jit(lambda x: lm.replace({"w": jnp.zeros(2)}, "w", [x, 2 * x]))(1.0)
    assert new["w"].tolist() == [1, 2]


# ---- several devices -----------------------------------------------------------------------------

ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import lrmult as lm
one, *_, other = jax.devices()
host = np.arange(32, dtype=np.float32).reshape(8, 4)
PARTS = {
    "whole": "w", "rows": lm.rows("w", [5, 2]), "row": lm.rows("w", 1),
    "columns": lm.along("w", 1, [0]), "box": lm.along(lm.rows("w", [5, 2]), 1, [3, 1]),
    "elements": lm.elements("w", np.eye(8, 4, dtype=bool)),
}

def on(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    return jax.device_put(host, NamedSharding(mesh, PartitionSpec("d")))

def edit(array, target, value=None):
    part = lm.extract({"w": host}, target)
    new = lm.replace({"w": array}, target, value(-1 - part) if value else -1 - part)["w"]
    np.testing.assert_array_equal(new, lm.replace({"w": host}, target, -1 - part)["w"])
    assert new.sharding == array.sharding, new.sharding
    return new

def sharded(target, array):
    np.testing.assert_array_equal(lm.extract({"w": array}, target), lm.extract({"w": host}, target))
    edit(array, target)
    new = lm.replace({"w": array}, target, lm.extract({"w": array}, target))["w"]
    assert new.sharding == array.sharding and np.array_equal(new, host)

def elsewhere(target):  # a value that lives on another device
    edit(on(AxisType.Auto), target, lambda value: jax.device_put(value, other))

def grafted(target):
    array = on(AxisType.Auto)
    new, left = lm.graft({"w": array}, {"w": jax.device_put(host + 1, other)}, target)
    assert new["w"].sharding == array.sharding and left == []

def uncommitted(target):  # it can still go where the others are
    array = jnp.asarray(host)
    for new in (edit(array, target), lm.graft({"w": array}, {"w": host}, target)[0]["w"]):
        assert new.committed == array.committed
        jax.jit(jnp.add)(new, on(AxisType.Auto))

for name, target in PARTS.items():
    for kind, check in {
        "sharded": lambda target: sharded(target, on(AxisType.Auto)),
        "explicit": lambda target: sharded(target, on(AxisType.Explicit)),
        "elsewhere": elsewhere, "grafted": grafted, "uncommitted": uncommitted,
    }.items():
        try:
            check(target)
            print(f"{kind}-{name}|ok")
        except Exception as error:
            print(f"{kind}-{name}|{type(error).__name__}", str(error)[:90].replace(chr(10), " "))
"""


@functools.cache
def on_devices():
    lines = printed_on_four_devices(ON_DEVICES).splitlines()
    return dict(line.split("|") for line in lines)


@pytest.mark.parametrize("part", ["whole", "rows", "row", "columns", "box", "elements"])
@pytest.mark.parametrize("kind", ["sharded", "explicit", "elsewhere", "grafted", "uncommitted"])
def test_arrays_stay_where_they_are(kind, part):
    assert on_devices()[f"{kind}-{part}"] == "ok"


# ---- shared arrays and stacks --------------------------------------------------------------------

TIED = lm.Structure(shared=[["embed/table", "head/kernel"]])


@pytest.mark.parametrize("target", ["embed", "embed/table", "head/kernel", "head", "**", "head/*"])
@pytest.mark.parametrize("own", [True, False], ids=["beside a bias", "alone"])
@pytest.mark.parametrize("both", [False, True], ids=["one leaf", "two leaves"])
def test_a_shared_array_is_read_and_set_by_each_name(target, own, both):
    table = jnp.arange(6.0).reshape(3, 2)
    params = {"embed": {"table": table}, "head": {"bias": jnp.ones(2)} if own else {}}
    params["head"] |= {"kernel": table} if both else {}
    found = lm.extract(params, target, structure=TIED)
    assert_same(lm.replace(params, target, found, structure=TIED), params)
    if target == "head" and own and not both:  # the array stands elsewhere in the tree
        assert found is params["head"]
        return
    new = lm.replace(params, target, jax.tree.map(lambda a: a + 1, found), structure=TIED)
    np.testing.assert_array_equal(new["embed"]["table"], table + 1)
    if both:
        np.testing.assert_array_equal(new["head"]["kernel"], table + 1)


def test_one_of_two_leaves_that_are_one_array():
    table = jnp.arange(6.0).reshape(3, 2)
    params = {"embed": {"table": table}, "head": {"kernel": table}}
    for value in (table + 1, np.asarray(table + 1)):
        new = lm.replace(params, "head/kernel", value, structure=TIED)
        assert_same(new, {"embed": {"table": table + 1}, "head": {"kernel": table + 1}})


@pytest.mark.parametrize("target", ["layers[0]", "layers[-1]", "layers[0]/k", ("layers", 0, "b")])
def test_a_stack_of_one_layer_is_a_stack(target):
    structure = lm.Structure(stacked={"layers": 0})
    one = {"layers": {"k": jnp.arange(6.0).reshape(1, 2, 3), "b": jnp.ones((1, 3))}}
    two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)
    found = lm.extract(one, target, structure=structure)
    assert_same(found, lm.extract(two, target, structure=structure))
    assert_same(lm.replace(one, target, found, structure=structure), one)


NESTED = {"o": {"i": {"k": jnp.arange(24.0).reshape(2, 3, 4)}, "b": jnp.arange(4.0).reshape(2, 2)}}
NESTED_STRUCTURE = lm.Structure(stacked={"o": 0, "o/i": 1})


@pytest.mark.parametrize(
    ("target", "at", "wanted"),
    [
        ("o[1]", None, {"o/b": lambda a: a[1], "o/i/k": lambda a: a[1]}),
        ("o[1]/i[0]", "o/i/k", {"o/i/k": lambda a: a[1, 0]}),
        ("o/i[2]", "o/i/k", {"o/i/k": lambda a: a[:, 2]}),
        ("o[:1]/i[1:]", None, {"o/i/k": lambda a: a[:1, 1:]}),
        (lm.along("o[1]/i[2]", 2, [3, 0]), "o/i/k", {"o/i/k": lambda a: a[1, 2, [3, 0]]}),
    ],
)
def test_stacks_in_stacks(target, at, wanted):
    found = lm.extract(NESTED, target, structure=NESTED_STRUCTURE)
    for path, part in flat(found, at).items():
        np.testing.assert_array_equal(
            part, wanted.pop(path)(np.asarray(by_path(NESTED)[path])), strict=True
        )
    assert not wanted
    assert_same(lm.replace(NESTED, target, found, structure=NESTED_STRUCTURE), NESTED)


# ---- modules -------------------------------------------------------------------------------------


class NNXNet(nnx.Module):
    def __init__(self, rngs, classes=3):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, classes, rngs=rngs)


class NNXTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(3, 2, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.head.kernel = self.embed.embedding
        self.again = self.head  # of several paths, the state keeps the alphabetically first


class EquinoxNet(eqx.Module):
    embed: eqx.nn.Embedding
    layers: tuple
    act: Any
    head: eqx.nn.Linear
    scale: float = eqx.field(static=True)

    def __init__(self, key, classes=3):
        self.embed = eqx.nn.Embedding(5, 4, key=key)
        self.layers = (eqx.nn.Linear(4, 4, use_bias=False, key=key), eqx.nn.Lambda(jax.nn.relu))
        self.act, self.scale = jax.nn.gelu, 2.0
        self.head = eqx.nn.Linear(4, classes, key=key)


class EquinoxTied(eqx.Module):
    tied: eqx.nn.Shared

    def __init__(self, key):
        both = {"embed": eqx.nn.Embedding(3, 2, key=key), "head": eqx.nn.Linear(2, 3, key=key)}
        self.tied = eqx.nn.Shared(
            both, where=lambda t: t["head"].weight, get=lambda t: t["embed"].weight
        )


def variables(model):
    return {path: value for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)}


def frozen_copy(model):
    return jax.tree.map(jnp.copy, nnx.state(model))


NNX_TARGETS = [
    "embed", "embed/embedding", "layers", "layers[0]", "norm", "drop", "head", 0, -1, slice(0, 2),
    "**/bias", lm.rows("embed/embedding", [4, 1]), lm.neurons("head", 2), ...,
]  # fmt: skip


@pytest.mark.parametrize("target", NNX_TARGETS, ids=str)
def test_a_module_of_nnx_is_changed_in_place(target):
    model = NNXNet(nnx.Rngs(0))
    held, before = variables(model), frozen_copy(model)
    found = lm.extract(model, target)
    assert lm.replace(model, target, found) is model
    assert_same(nnx.state(model), before)
    value = lm.extract(NNXNet(nnx.Rngs(1)), target)
    assert lm.replace(model, target, value) is model
    assert all(variables(model)[path] is variable for path, variable in held.items())
    assert held.keys() == variables(model).keys()
    got = lm.extract(model, target)
    for leaf, wanted in zip(*map(jax.tree.leaves, (got, value)), strict=True):
        assert bits(leaf) == bits(wanted)
    after = by_path(nnx.state(model))
    kept = {path for path, old in by_path(before).items() if bits(old) == bits(after[path])}
    plan = lm.compile_rules([(target, 2)], nnx.state(model), structure=lm.structure_of(model))
    assert {leaf.path for leaf in plan.leaves if not leaf.rules} <= kept


def test_metadata_and_other_state_of_a_module_stay():
    model = NNXNet(nnx.Rngs(0))
    model.head.kernel.set_metadata(lr_mult=0.5)
    before = frozen_copy(nnx.state(model, nnx.Not(nnx.Param)))
    lm.replace(model, "head", nnx.Linear(4, 3, rngs=nnx.Rngs(5)))
    lm.replace(model, "layers/0/kernel", nnx.Param(jnp.ones((4, 4)), lr_mult=3))
    assert_same(nnx.state(model, nnx.Not(nnx.Param)), before)
    assert isinstance(model.norm.mean, nnx.BatchStat)
    assert model.head.kernel.get_metadata()["lr_mult"] == 0.5
    assert "lr_mult" not in model.layers[0].kernel.get_metadata()
    assert np.all(np.asarray(model.layers[0].kernel[...]) == 1)


def test_what_may_stand_for_a_submodule():
    model, other = NNXNet(nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(7))
    wanted = by_path(frozen_copy(other))
    for value in (other, nnx.state(other), nnx.to_pure_dict(nnx.state(other)), wanted):
        lm.replace(model, "head", jax.tree.map(jnp.zeros_like, wanted))
        assert lm.replace(model, "head", value) is model
        assert_same(by_path(nnx.state(model.head)), wanted)
    only = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(8))
    for value in (only, nnx.state(only), {"kernel": only.kernel}, only.kernel, only.kernel[...]):
        lm.replace(model, "layers[0]", np.zeros((4, 4)))
        lm.replace(model, "layers[0]", value)
        np.testing.assert_array_equal(model.layers[0].kernel[...], only.kernel[...])


def test_arrays_of_a_type():
    model = NNXNet(nnx.Rngs(0))
    target = lm.of_type(model, nnx.BatchStat)
    found = lm.extract(model, target)
    assert list(found) == ["norm/mean", "norm/var"]
    lm.replace(model, target, {path: leaf + 2 for path, leaf in found.items()})
    assert (np.asarray(model.norm.mean[...]) == 2).all()
    assert (np.asarray(model.norm.var[...]) == 3).all()
    net = EquinoxNet(KEY)
    found = lm.extract(net, lm.of_type(net, eqx.nn.Linear))
    assert list(found) == ["layers/0/weight", "head/weight", "head/bias"]


@pytest.mark.parametrize(
    "target", ["embed", "head", "again", "head/kernel", "embed/embedding", "**/kernel", ..., 0, -1]
)
def test_variables_that_nnx_modules_share(target):
    model = NNXTied(nnx.Rngs(0))
    variable, before = model.embed.embedding, frozen_copy(model)
    found = lm.extract(model, target)
    assert lm.replace(model, target, found) is model
    assert_same(nnx.state(model), before)
    lm.replace(model, target, jax.tree.map(lambda leaf: leaf + 1, lm.extract(model, target)))
    assert model.head.kernel is model.again.kernel is model.embed.embedding is variable
    np.testing.assert_array_equal(variable[...], before["again"]["kernel"][...] + 1)


@pytest.mark.parametrize("node", ["embed", "head", "head/bias", "embed/weight", "head/weight"])
def test_shared_arrays_of_equinox(node):
    net, node = EquinoxTied(KEY), f"tied/pytree/{node}"
    found = lm.extract(net, node)
    assert eqx.tree_equal(lm.replace(net, node, found), net)
    more = jax.tree.map(lambda leaf: leaf + 1 if eqx.is_array(leaf) else leaf, found)
    new = lm.replace(net, node, more)
    assert eqx.tree_equal(lm.extract(new, node), more)
    assert jax.tree.structure(new) == jax.tree.structure(net)


def test_an_equinox_module_comes_back_new():
    net = EquinoxNet(KEY)
    old = eqx.filter(net, eqx.is_array)
    before = jax.tree.map(jnp.copy, old)
    new = lm.replace(net, "head", {"weight": np.ones((3, 4)), "bias": np.ones(3)})
    assert new is not net
    assert_same(eqx.filter(net, eqx.is_array), before)
    assert (new.act, new.scale, new.layers[1].fn) == (net.act, net.scale, net.layers[1].fn)
    assert new.layers[0].bias is None
    assert new.embed.weight is net.embed.weight
    assert (new.head.weight == 1).all()
    assert lm.extract(net, 2) is net.head  # an activation function is no layer
    assert lm.extract(net, "layers") is net.layers


def test_nnx_under_jit():
    model = NNXNet(nnx.Rngs(0))
    held = variables(model)

    @nnx.jit
    def shift(model, value):
        lm.replace(model, lm.rows("embed/embedding", [4, 1]), value)
        return lm.extract(model, lm.rows("embed/embedding", [1, 4]))

    before = np.asarray(model.embed.embedding[...])
    out = shift(model, jnp.array([[4.0] * 4, [1.0] * 4]))
    np.testing.assert_array_equal(out, [[1.0] * 4, [4.0] * 4])
    after = np.asarray(model.embed.embedding[...])
    np.testing.assert_array_equal(after[[1, 4]], out)
    np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert all(variables(model)[path] is variable for path, variable in held.items())


# ---- errors --------------------------------------------------------------------------------------

FC = {"fc": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, "head": {"w": jnp.zeros((2, 4))}}
READING = {
    "near miss": ("hed", lm.UnmatchedRuleError, "'hed'; did you mean 'head'?"),
    "near miss below": ("fc/ww", lm.UnmatchedRuleError, "did you mean 'fc/w'?"),
    "no array": (("fc", "w", "w"), lm.UnmatchedRuleError, "no path matches"),
    "pattern": ("**/kernel", lm.UnmatchedRuleError, "the paths are 'fc/b'"),
    "regex": (re.compile("w"), lm.UnmatchedRuleError, "matches no whole path"),
    "predicate": (lambda path, leaf: False, lm.UnmatchedRuleError, "returned False for all 3"),
    "raising": (lambda path, leaf: 1 / 0, lm.RuleError, "raised ZeroDivisionError"),
    "order": (1, lm.PositionError, r"structure=lrmult.structure_of\(model\)"),
    "order below": ("fc[0]", lm.PositionError, "neurons"),
    "range": (lm.rows("fc/w", 3), lm.IndexRangeError, "3 is out of range for axis 0 of 'fc/w'"),
    "negative": (lm.rows("fc/w", [0, -4]), lm.IndexRangeError, "-4 is out .* size 3.* -3 to 2"),
    "axis": (lm.along("fc/b", 1, 0), lm.AxisError, "'fc/b' float32.2. has no axis 1"),
    "mask": (lm.elements("fc/w", np.ones(3, bool)), lm.MaskError, "bool.3. does not fit 'fc/w'"),
    "mask size": (lm.rows("fc/w", [True, False]), lm.MaskError, "of 2 does not fit axis 0 of 'fc"),
    "disjoint": (lm.rows(lm.rows("fc/w", 0), 1), lm.UnmatchedRuleError, "in common"),
    "malformed": ("fc[", lm.PatternError, "never closed"),
    "no target": (None, lm.PatternError, "is no target"),
    "a list": (["fc", "head"], lm.PatternError, "is no target"),
}  # fmt: skip


@pytest.mark.parametrize("case", READING)
def test_targets_that_are_mistakes(case):
    target, error, words = READING[case]
    calls = {
        "extract(params, ": lambda: lm.extract(FC, target),
        "replace(params, ": lambda: lm.replace(FC, target, 1.0),
        "graft(params, source, ": lambda: lm.graft(FC, FC, [target]),
    }
    for name, call in calls.items():
        with pytest.raises(error, match=words) as raised:
            call()
        assert type(raised.value) is error
        assert str(raised.value).startswith(name)


@pytest.mark.parametrize(
    "target",
    [lm.elements("fc/b", np.zeros(2, bool)), lm.rows("fc/w", []), lm.rows("fc/w", [False] * 3)],
)
def test_messages_speak_of_no_rule_where_there_is_none(target):
    with pytest.raises(lm.LrmultError) as raised:
        lm.extract(FC, target)
    assert not re.search(r"\brule\b|optional", str(raised.value))


WRITING = {
    "shape": ("fc/w", np.ones((2, 3)), r"'fc/w' float32\[3,2\] cannot take float64\[2,3\]: shapes"),
    "scalar": ("fc/w", 0.0, r"'fc/w' float32\[3,2\] cannot take float64\[\]: shapes"),
    "shape of a part": (lm.rows("fc/w", 0), np.ones((1, 2)), r"'fc/w' .* part of shape \[2\]"),
    "scalar part": (lm.rows("fc/w", [0]), np.ones(2), r"'fc/w' .* part of shape \[1, 2\]"),
    "shape of a mask": (lm.elements("fc/b", np.ones(2, bool)), np.ones(1), r"part of shape \[2\]"),
    "ints": ("fc/b", jnp.ones(2, int), r"'fc/b' float32\[2\] cannot take int32.* x.astype"),
    "bools": ("fc/b", [True, False], "'fc/b' .* another kind of dtype"),
    "complex": ("fc/b", np.ones(2, complex), "'fc/b' .* complex128.* x.astype"),
    "keys": ("fc/b", jax.random.split(KEY, 2), "'fc/b' .* another kind of dtype"),
    "text": ("fc/b", "ab", "'ab' is no array"),
    "None": ("fc/b", None, "None is no array"),
    "ragged": ("fc/b", [[1], [1, 2]], "is no array"),
    "a function": ("fc/b", jnp.ones, "is no array"),
    "a shape": ("fc/b", jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct|no array"),
    "a shape in rows": (
        lm.rows("fc/b", [0]), jax.ShapeDtypeStruct((1,), jnp.float32), "ShapeDtypeStruct|no array"
    ),
    "missing": ("fc", {"w": np.ones((3, 2))}, r"nothing for 'b'; pass .* extract\(params, 'fc'\)"),
    "extra": ("fc", {"w": np.ones((3, 2)), "b": np.ones(2), "c": np.ones(1)}, "no place for 'c'"),
    "names": ("fc", {"k": np.ones((3, 2)), "b": np.ones(2)}, "for 'w' and no place for 'k'"),
    "shape below": ("fc", {"w": np.ones((3, 2)), "b": np.ones(3)}, r"'fc/b' float32\[2\] cannot"),
    "missing path": (
        "**/w", {"fc/w": np.ones((3, 2))}, r"for 'head/w'.*extract\(params, '\*\*/w'\)"
    ),
    "extra path": (
        "**/b", {"fc/b": np.ones(2), "head/b": np.ones(2)}, "no place for 'head/b'"
    ),
    "misspelt path": ("**/b", {"fc.b": np.ones(2)}, "nothing for 'fc/b' and no place for 'fc.b'"),
    "one for several": ("**/w", np.ones((3, 2)), "is one array, .* 2 to be set: 'fc/w' and 'head"),
    "part missing": (lm.neurons("fc", 0), {"fc/b": 0.0}, "nothing for 'fc/w'"),
}  # fmt: skip


class NNXFC(nnx.Module):
    def __init__(self):
        self.fc, self.head = nnx.Dict(), nnx.Dict()
        self.fc.w, self.fc.b = nnx.Param(FC["fc"]["w"]), nnx.Param(FC["fc"]["b"])
        self.head.w = nnx.Param(FC["head"]["w"])


@pytest.mark.parametrize("case", WRITING)
def test_values_that_do_not_fit(case):
    target, value, words = WRITING[case]
    model = NNXFC()
    before = frozen_copy(model)
    for params in (FC, model):
        with pytest.raises(lm.RuleError, match=words) as raised:
            lm.replace(params, target, value)
        assert type(raised.value) is lm.RuleError
        assert str(raised.value).startswith("replace(params, ")
    assert_same(nnx.state(model), before)  # bad input loses nothing


@pytest.mark.parametrize(
    ("target", "value"),
    [("fc/b", {"b": np.ones(2)}), ("fc", np.ones(2)), ("fc/b", {"fc/b": np.ones(2)})],
)
def test_messages_name_no_path_of_no_letters(target, value):
    with pytest.raises(lm.RuleError) as raised:
        lm.replace(FC, target, value)
    assert "''" not in str(raised.value)


@pytest.mark.parametrize("value", [0, [1, 2], 0.5])
def test_numbers_are_no_random_keys(value):
    with pytest.raises(lm.RuleError, match="key"):
        lm.replace({"k": KEY}, "k", value)


def test_nothing_of_a_module_is_lost_where_graft_fails():
    model, source = NNXNet(nnx.Rngs(0)), NNXNet(nnx.Rngs(1))
    before = frozen_copy(model)
    for targets in (["embed", "hed"], ["embed", lm.rows("embed/embedding", 7)], ["embed", "fc[2]"]):
        with pytest.raises(lm.LrmultError):
            lm.graft(model, source, targets)
        assert_same(nnx.state(model), before)


def test_structure_is_checked():
    with pytest.raises(lm.RuleError, match="structure="):
        lm.extract(FC, "fc", structure={"order": 1})
    with pytest.raises(lm.UnmatchedRuleError, match=r"'pool'.* no parameters"):
        lm.extract(FC, 1, structure=lm.Structure(order={"": ["fc", "pool", "head"]}))


# ---- values are copies ---------------------------------------------------------------------------


def donate(tree):
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(tree)


def test_what_is_given_is_copied():
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4), "c": {"w": jnp.zeros(4)}}
    value = jnp.arange(4.0)
    source = {"a": value, "b": value, "c": {"w": value}}
    trees = [
        lm.replace(lm.replace(params, "a", value), "b", value),
        lm.replace(params, "**", by_path(source)),
        lm.replace(params, lm.rows("a", slice(None)), value),
        lm.replace(params, "c", {"w": value}),
        lm.graft(params, source)[0],
        lm.graft(source, source)[0],
        lm.graft(params, source, lm.rows("*", [0, 1, 2, 3]))[0],
    ]
    for new in trees:
        lm.compile_rules([("a", 2)], new)  # warns of one array at two leaves
        fresh = [leaf for leaf in jax.tree.leaves(new) if (leaf != 0).any()]
        donate(fresh)
        assert all(leaf.is_deleted() for leaf in fresh)  # else this test would show nothing
        assert not value.is_deleted()
    np.testing.assert_array_equal(value, np.arange(4.0))


def test_what_is_given_is_copied_to_a_module():
    model, source = NNXNet(nnx.Rngs(0)), NNXNet(nnx.Rngs(1))
    before = frozen_copy(source)
    lm.graft(model, source)
    donate(nnx.state(model, nnx.Param))
    assert_same(nnx.state(source), before)


def test_arrays_of_numpy_are_copied():
    params, value = {"a": np.zeros(2), "b": jnp.zeros(2)}, np.ones(2)
    for new in (
        lm.replace(params, "**", {"a": value, "b": value}),
        lm.graft(params, {"a": value, "b": value})[0],
    ):
        value[0] = 5
        assert new["a"].tolist() == new["b"].tolist() == [1, 1]
        value[0] = 1
    part = lm.replace(params, lm.rows("a", 0), 3.0)
    assert (part["a"].tolist(), params["a"].tolist()) == ([3, 0], [0, 0])


# ---- known features, kept: the edges of pictures -------------------------------------------------

EDGES = np.stack([[[1, 0, -1], [2, 0, -2], [1, 0, -1]], [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]]) / 8
PICTURES = jax.random.normal(KEY, (4, 6, 6, 1))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2, (3, 3), name="conv1")(x))
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))


class NNXConv(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.head = nnx.Linear(72, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv1(x)).reshape(len(x), -1))


class EquinoxConv(eqx.Module):
    conv1: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(1, 2, 3, padding=1, key=key)
        self.head = eqx.nn.Linear(72, 1, key=key)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.conv1(jnp.moveaxis(x, -1, 0))).reshape(-1))


def error_of(outputs):
    return ((outputs - 1) ** 2).mean()


def train(params, loss, tx, steps=3):
    """Plain training of the arrays in a tree."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def edge_linen(tx):
    net = LinenConv()
    params = net.init(KEY, PICTURES)["params"]
    params = lm.replace(params, "conv1/kernel", EDGES.transpose(1, 2, 0)[:, :, None])
    after = train(params, lambda p: error_of(net.apply({"params": p}, PICTURES)), tx)
    return params["conv1"], params["head"], after["conv1"], after["head"]


def edge_nnx(tx):
    net = NNXConv(nnx.Rngs(0))
    lm.replace(net, "conv1/kernel", EDGES.transpose(1, 2, 0)[:, :, None])
    before = frozen_copy(net)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(lambda net: error_of(net(PICTURES)))(net))

    for _ in range(3):
        step(net, optimizer)
    after = nnx.state(net)
    return before["conv1"], before["head"], after["conv1"], after["head"]


def edge_equinox(tx):
    net = lm.replace(EquinoxConv(KEY), "conv1/weight", EDGES[:, None])
    params, static = eqx.partition(net, eqx.is_array)

    def loss(params):
        return error_of(jax.vmap(eqx.combine(params, static))(PICTURES))

    after = train(params, loss, tx)
    return params.conv1, params.head, after.conv1, after.head


@pytest.mark.parametrize("kind", ["wrap", "scale_by_rules"])
@pytest.mark.parametrize("edge", [edge_linen, edge_nnx, edge_equinox])
def test_features_that_are_set_and_frozen_stay(edge, kind):
    rules, adamw = [("conv1", None)], optax.adamw(0.1, weight_decay=0.1)
    tx = lm.wrap(adamw, rules)
    if kind == "scale_by_rules":
        tx = optax.chain(adamw, lm.scale_by_rules(rules))
    before, head, after, trained = edge(tx)
    assert_same(after, before)
    [kernel] = [leaf for leaf in jax.tree.leaves(after) if leaf.ndim == 4]
    values = sorted(np.asarray(kernel).ravel().tolist())
    assert values == sorted(EDGES.ravel().tolist())
    assert (np.asarray(jax.tree.leaves(trained)[0]) != jax.tree.leaves(head)[0]).all()


# ---- graft ---------------------------------------------------------------------------------------


@functools.cache
def linen_pair():
    def net(classes):
        return nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.relu, nn.Dense(classes)])

    return [net(c).init(jax.random.key(c), X)["params"] for c in (3, 10)], "layers_4"


def nnx_pair():
    return [NNXNet(nnx.Rngs(c), c) for c in (3, 10)], "head"


@functools.cache
def equinox_pair():
    return [EquinoxNet(jax.random.key(c), c) for c in (3, 10)], "head"


@functools.cache
def haiku_pair():
    def net(classes):
        return hk.transform(lambda x: hk.nets.MLP([4, 4, classes])(x))

    return [net(c).init(jax.random.key(c), X) for c in (3, 10)], "mlp/~/linear_2"


def arrays(model):
    if isinstance(model, nnx.Module):
        return by_path(frozen_copy(model))
    return by_path(eqx.filter(model, eqx.is_array))


PAIRS = [linen_pair, nnx_pair, equinox_pair, haiku_pair]
in_every_library = pytest.mark.parametrize("pair", PAIRS)


@in_every_library
def test_a_trunk_under_a_new_head(pair):
    (new, old), head = pair()
    fresh, given_ = arrays(new), arrays(old)
    done, left = lm.graft(new, old)
    assert (done is new) == isinstance(new, nnx.Module)
    assert jax.tree.structure(done) == jax.tree.structure(pair()[0][0])
    heads = [path for path in fresh if path.startswith(f"{head}/")]
    assert len(heads) == 2
    assert [path for path, _ in left] == heads
    for path, reason in left:
        here, there = [",".join(map(str, tree[path].shape)) for tree in (fresh, given_)]
        assert reason == f"float32[{here}] here, float32[{there}] in the source"
    for path, leaf in arrays(done).items():
        assert bits(leaf) == bits((fresh if path in heads else given_)[path])
    assert [bits(leaf) for leaf in arrays(old).values()] == [*map(bits, given_.values())]
    if not isinstance(new, nnx.Module):
        assert [bits(leaf) for leaf in arrays(new).values()] == [*map(bits, fresh.values())]


@in_every_library
def test_graft_takes_what_was_extracted_or_listed(pair):
    (_, old), _ = pair()
    wanted = arrays(old)
    sources = [
        lm.extract(old, ...),
        {path: np.asarray(leaf) for path, leaf in lm.extract(old, "**/*").items()
         if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)},
        nnx.state(old) if isinstance(old, nnx.Module) else jax.tree.map(lambda leaf: leaf, old),
    ]  # fmt: skip
    for source in sources:
        fresh = pair()[0][1]
        blank = {path: leaf * 0 for path, leaf in lm.extract(fresh, "**/{w,weight,kernel}").items()}
        fresh = lm.replace(fresh, "**/{w,weight,kernel}", blank)
        done, left = lm.graft(fresh, source)
        assert all(reason == "not in the source" for _, reason in left)
        for path, leaf in arrays(done).items():
            assert bits(leaf) == bits(wanted[path])


@in_every_library
def test_graft_onto_itself_changes_nothing(pair):
    (model, _), _ = pair()
    before = arrays(model)
    done, left = lm.graft(model, model)
    assert left == []
    assert_same(arrays(done), before)


def test_graft_of_one_mismatched_array():
    old = {"trunk": {"a": jnp.ones(2), "b": jnp.ones((2, 2))}, "head": jnp.ones(10)}
    new = {"trunk": {"a": jnp.zeros(2), "b": jnp.zeros((2, 3))}, "head": jnp.zeros(3)}
    done, left = lm.graft(new, old, "trunk")
    assert left == [("trunk/b", "float32[2,3] here, float32[2,2] in the source")]
    trunk = {"a": jnp.ones(2), "b": jnp.zeros((2, 3))}
    assert_same(done, {"trunk": trunk, "head": jnp.zeros(3)})


A, B, E = jnp.arange(2.0), jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2)
GRAFTS = {
    "not there": ({"a": A, "b": B}, {"a": A + 1}, ..., {"a": A + 1, "b": B},
                  [("b", "not in the source")]),
    "only there": ({"a": A}, {"a": A + 1, "b": B}, ..., {"a": A + 1},
                   [("b", "only in the source")]),
    "no place asked for": ({"a": A}, {"a": A + 1, "b": B}, "a", {"a": A + 1}, []),
    "a list": ({"a": A, "b": B}, {"a": A + 1, "b": B + 1}, ["a", "b"],
               {"a": A + 1, "b": B + 1}, []),
    "a tuple is a path": ({"a": {"b": B}, "b": B}, {"a": {"b": B + 1}, "b": B + 1}, ("a", "b"),
                          {"a": {"b": B + 1}, "b": B}, []),
    "no targets": ({"a": A}, {"a": A + 1}, [], {"a": A}, []),
    "overlapping": ({"a": {"w": A, "b": B}}, {"a": {"w": A + 1, "b": B + 1}}, ["a/w", "a", "**"],
                    {"a": {"w": A + 1, "b": B + 1}}, []),
    "cast": ({"a": A.astype(jnp.bfloat16)}, {"a": A + 1}, ...,
             {"a": (A + 1).astype(jnp.bfloat16)}, []),
    "cast up": ({"a": A}, {"a": (A + 1).astype(jnp.bfloat16)}, ..., {"a": A + 1}, []),
    "numpy": ({"a": A}, {"a": np.array([1.0, 2.0])}, ..., {"a": A + 1}, []),
    "into numpy": ({"a": np.zeros(2)}, {"a": A}, ..., {"a": np.array([0.0, 1.0])}, []),
    "another kind": ({"a": A, "b": B}, {"a": jnp.arange(2), "b": B + 1}, ...,
                     {"a": A, "b": B + 1}, [("a", "float32[2] here, int32[2] in the source")]),
    "a flat dict": ({"x": {"a": A, "b": B}}, {"x/a": A + 1, "x/b": B + 1}, ...,
                    {"x": {"a": A + 1, "b": B + 1}}, []),
    "odd keys": ({"g*": A, "l[0]": {"w": B}}, {r"g\*": A + 1, r"l\[0\]/w": B + 1}, ...,
                 {"g*": A + 1, "l[0]": {"w": B + 1}}, []),
    "rows of more words": ({"e": jnp.zeros((5, 2))}, {"e": E}, lm.rows("e", slice(0, 3)),
                           {"e": jnp.zeros((5, 2)).at[:3].set(E)}, []),
    "rows of fewer words": ({"e": jnp.zeros((2, 2))}, {"e": E}, lm.rows("e", [1, 0]),
                            {"e": E[:2]}, []),
    "a span of all": ({"e": jnp.zeros((2, 2))}, {"e": E}, lm.rows("e", slice(0, 2)),
                      {"e": E[:2]}, []),
    "all rows of each": ({"e": jnp.zeros((2, 2))}, {"e": E}, lm.rows("e", slice(None)),
                         {"e": jnp.zeros((2, 2))},
                         [("e", "float32[2,2] here, float32[3,2] in the source")]),
    "rows, then all": ({"e": jnp.zeros((5, 2)), "b": B}, {"e": E, "b": B + 1},
                       [lm.rows("e", [0, 1, 2]), ...],
                       {"e": jnp.zeros((5, 2)).at[:3].set(E), "b": B + 1},
                       [("e", "float32[5,2] here, float32[3,2] in the source")]),
    "elements": ({"e": jnp.zeros((3, 2))}, {"e": E}, lm.elements("e", np.eye(3, 2, dtype=bool)),
                 {"e": jnp.array([[0.0, 0], [0, 3], [0, 0]])}, []),
    "zero-size": ({"z": jnp.zeros((0, 2))}, {"z": np.ones((0, 2))}, ...,
                  {"z": jnp.zeros((0, 2))}, []),
    "a hole": ({"a": A, "b": None}, {"a": A + 1, "b": None}, ..., {"a": A + 1, "b": None}, []),
    "shapes": ({"a": jax.ShapeDtypeStruct((2,), "float32")}, {"a": A}, ..., {"a": A}, []),
    "keys": ({"k": KEY}, {"k": jax.random.key(7)}, ..., {"k": jax.random.key(7)}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAFTS)
def test_graft(case):
    params, source, targets, wanted, left = GRAFTS[case]
    before = [*map(bits, jax.tree.leaves((params, source)))]
    done = lm.graft(params, source, targets)
    assert_same(done[0], wanted)
    assert done[1] == left
    assert [*map(bits, jax.tree.leaves((params, source)))] == before


@pytest.mark.parametrize(("here", "there"), [(2, 4), (4, 2), (4, 4), (1, 4), (4, 1)])
def test_graft_of_the_first_layers_of_a_stack(here, there):
    structure = lm.Structure(stacked={"layers": 0})
    params = {"layers": {"k": jnp.zeros((here, 3)), "b": jnp.zeros(here)}}
    source = {"layers": {"k": jnp.ones((there, 3)), "b": jnp.arange(1.0, there + 1)}}
    count = min(here, there)
    done, left = lm.graft(params, source, f"layers[:{count}]", structure=structure)
    assert left == []
    np.testing.assert_array_equal(done["layers"]["b"][:count], np.arange(1.0, count + 1))
    assert not done["layers"]["k"][count:].any()
    first, left = lm.graft(params, source, "layers[0]", structure=structure)
    assert left == []
    assert first["layers"]["k"].sum() == 3


def test_graft_by_position():
    structure = lm.Structure(order={"": ["stem", "relu", "body"]})
    params, source = {"stem": A, "body": B}, {"stem": A + 1, "body": B + 1}
    done, left = lm.graft(params, source, [0], structure=structure)
    assert_same(done, {"stem": A + 1, "body": B})
    assert left == []
    assert_same(lm.graft(params, source, -1, structure=structure)[0], {"stem": A, "body": B + 1})
    assert_same(lm.graft(params, {"stem": A + 1}, 0, structure=structure)[0]["stem"], A + 1)


def test_graft_of_shared_arrays():
    table = E + 1
    for source in ({"embed": {"table": table}}, {"head": {"kernel": table}}):
        for target in (..., "embed", "head", "head/kernel"):
            done, left = lm.graft({"embed": {"table": E}}, source, target, structure=TIED)
            assert_same(done, {"embed": {"table": table}})
            assert left == []
    model, source = NNXTied(nnx.Rngs(0)), NNXTied(nnx.Rngs(1))
    variable = model.embed.embedding
    assert lm.graft(model, source, "embed") == (model, [])
    assert model.head.kernel is variable
    np.testing.assert_array_equal(variable[...], source.head.kernel[...])
    assert (np.asarray(model.head.bias[...]) == 0).all()


WRAPPED = {"params": {"a": {"w": A}, "b": {"w": B}}}


@pytest.mark.parametrize(
    "target", [..., "**", "a", "a/w", "**/w", "*", lm.rows("a/w", 0), ["a", "b"]]
)
def test_a_source_that_is_wrapped(target):
    with pytest.raises(lm.UnmatchedRuleError, match="params/a"):
        lm.graft(WRAPPED["params"], WRAPPED, target)


@pytest.mark.parametrize(
    ("params", "source", "target", "error", "words"),
    [
        ({"a": A}, {"a": A}, "b", lm.UnmatchedRuleError, "graft.params, source, 'b'.: no path"),
        ({"a": A, "b": B}, {"a": A}, ["a", "b"], lm.UnmatchedRuleError, "'b'.*in the source"),
        ({"a": A}, {}, ..., lm.UnmatchedRuleError, "in the source, "),
        ({"a": A}, None, ..., lm.UnmatchedRuleError, "in the source, "),
        ({"a": A, "b": B}, {"a": A, "b": B}, 0, lm.PositionError, "structure="),
        ({"e": jnp.zeros((5, 2))}, {"e": E}, lm.rows("e", [0, 4]), lm.IndexRangeError,
         "in the source: the index 4 is out of range for axis 0 of 'e' float32.3,2."),
        ({"e": jnp.zeros((5, 2))}, {"e": E}, lm.elements("e", np.eye(5, 2, dtype=bool)),
         lm.MaskError, "in the source: .* does not fit 'e'"),
        ({"a": A}, {"a": jax.ShapeDtypeStruct((2,), "float32")}, ..., lm.LrmultError, "source"),
    ],
)  # fmt: skip
def test_grafts_that_are_mistakes(params, source, target, error, words):
    with pytest.raises(error, match=words) as raised:
        lm.graft(params, source, target)
    assert str(raised.value).startswith("graft(params, source, ")
