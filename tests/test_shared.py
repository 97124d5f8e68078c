"""One array at several places of a model: a rule on any of its paths speaks of that one array."""

import functools
import re
import warnings
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
from tests.flags import OPTIONS

VOCABULARY, WIDTH = 5, 3
KEY = jax.random.key(0)
TOKENS = jnp.arange(4)
LABELS = jnp.array([1, 2, 3, 0])


# The embedding of a model is the kernel of its head too -------------------------------------------


class LinenHead(nn.Module):
    table: nn.Module

    def setup(self):
        self.own = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.table.attend(self.own(x))


class LinenModel(nn.Module):
    def setup(self):
        self.tokens = nn.Embed(VOCABULARY, WIDTH)
        self.body = nn.Dense(WIDTH)
        self.head = LinenHead(self.tokens)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.body(self.tokens(tokens))))


class NNXHead(nnx.Module):
    def __init__(self, weight, rngs):
        self.weight, self.own = weight, nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.own(x) @ self.weight.T


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.body = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = NNXHead(self.tokens.embedding, rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.body(self.tokens(tokens))))


class EquinoxHead(eqx.Module):
    own: eqx.nn.Linear
    weight: jax.Array

    def __init__(self, key):
        self.own = eqx.nn.Linear(WIDTH, WIDTH, key=key)
        self.weight = jnp.zeros((VOCABULARY, WIDTH))

    def __call__(self, x):
        return self.weight @ self.own(x)


class EquinoxModel(eqx.Module):
    body: eqx.nn.Linear
    tied: eqx.nn.Shared

    def __init__(self, key):
        self.body = eqx.nn.Linear(WIDTH, WIDTH, key=key)
        both = {"tokens": eqx.nn.Embedding(VOCABULARY, WIDTH, key=key), "head": EquinoxHead(key)}
        self.tied = eqx.nn.Shared(
            both, where=lambda t: t["head"].weight, get=lambda t: t["tokens"].weight
        )

    def __call__(self, token):
        tied = self.tied()
        return tied["head"](jnp.tanh(self.body(tied["tokens"](token))))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


class Case(NamedTuple):
    params: Any
    structure: lm.Structure
    loss: Any
    stands: str  # where the array stands in the tree of parameters
    alias: str  # its other path
    head: str  # a node that holds it under one of its paths, and arrays of its own


@functools.cache
def case(library):
    if library == "linen":
        module = LinenModel()
        params = jax.jit(module.init)(KEY, TOKENS)["params"]
        return Case(
            params,
            lm.structure_of(module, KEY, TOKENS),
            lambda params: loss_of(module.apply({"params": params}, TOKENS)),
            "tokens/embedding",
            "head/table/embedding",
            "head",
        )
    if library == "nnx":
        model = NNXModel(nnx.Rngs(0))
        structure = lm.structure_of(model)
        graph, params = nnx.split(model, nnx.Param)

        def loss(params):
            return loss_of(nnx.merge(graph, params)(TOKENS))

        # A state keeps the path that comes first in the alphabet.
        return Case(params, structure, loss, "head/weight", "tokens/embedding", "head")
    model = EquinoxModel(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Case(
        params,
        lm.structure_of(model),
        lambda params: loss_of(jax.vmap(eqx.combine(params, static))(TOKENS)),
        "tied/pytree/tokens/weight",
        "tied/pytree/head/weight",
        "tied/pytree/head",
    )


in_every_library = pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])


def got(case, rules):
    plan = lm.compile_rules(rules, case.params, structure=case.structure)
    return {leaf.path: leaf.multiplier for leaf in plan.leaves}


def arrays(params):
    return dict(zip(lm.paths(params), map(np.array, jax.tree.leaves(params)), strict=True))


def kept(before, after):
    before, after = arrays(before), arrays(after)
    assert before.keys() == after.keys()
    return {path for path in before if before[path].tobytes() == after[path].tobytes()}


def adamw():
    return optax.adamw(0.05, weight_decay=0.1)


def train(tx, params, loss, steps=3):
    """The parameters after each step."""

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        found.append(params)
    return found


@functools.cache
def plain_step(library):
    tied = case(library)
    return train(adamw(), tied.params, tied.loss, 1)[0]


@in_every_library
def test_a_rule_on_either_name_gives_the_same_plan(library):
    tied = case(library)
    paths = lm.paths(tied.params)
    assert tied.stands in paths
    assert tied.alias not in paths
    plain = dict.fromkeys(paths, 1.0)
    for multiplier in (0.5, None):
        wanted = plain | {tied.stands: multiplier or 0.0}
        rules = [[(name, multiplier)] for name in (tied.stands, tied.alias)]
        plans = [lm.compile_rules(r, tied.params, structure=tied.structure) for r in rules]
        for plan in plans:
            assert {leaf.path: leaf.multiplier for leaf in plan.leaves} == wanted
        for name in ("multipliers", "frozen", "trainable"):
            one, other = (getattr(plan, name) for plan in plans)
            chex.assert_trees_all_equal(one, other)
            assert jax.tree.structure(one) == jax.tree.structure(other)
        one, other = ([(x.trained, x.frozen) for x in plan.leaves] for plan in plans)
        assert one == other


@in_every_library
def test_of_two_rules_the_first_counts(library):
    tied = case(library)
    plain = dict.fromkeys(lm.paths(tied.params), 1.0)
    for one, other in ((tied.stands, tied.alias), (tied.alias, tied.stands)):
        assert got(tied, [(one, 2), (other, None)]) == plain | {tied.stands: 2.0}
        assert got(tied, [(one, None), (other, 2)]) == plain | {tied.stands: 0.0}
        assert got(tied, [(one, 3), (other, None), (..., 0.5)]) == dict.fromkeys(plain, 0.5) | {
            tied.stands: 3.0
        }


@in_every_library
def test_a_rule_on_a_node_above_means_it_too(library):
    tied = case(library)
    plain = dict.fromkeys(lm.paths(tied.params), 1.0)
    inside = {path: 2.0 for path in plain if path.startswith(tied.head + "/own/")}
    assert len(inside) == 2
    assert got(tied, [(tied.head, 2)]) == plain | inside | {tied.stands: 2.0}
    tokens = tied.head.removesuffix("head") + "tokens"
    assert got(tied, [(tokens, 2)]) == plain | {tied.stands: 2.0}
    assert got(tied, [(tokens, None), (tied.head, 2)]) == plain | inside | {tied.stands: 0.0}
    assert got(tied, [(tied.head, 2), (tokens, None)]) == plain | inside | {tied.stands: 2.0}


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_positions_count_it_at_each_of_its_places(library):
    tied = case(library)
    plain = dict.fromkeys(lm.paths(tied.params), 1.0)
    own = {path: 2.0 for path in plain if path.startswith("head/own/")}
    body = {path: 2.0 for path in plain if path.startswith("body/")}
    assert got(tied, [(0, 2)]) == plain | {tied.stands: 2.0}
    assert got(tied, [(1, 2)]) == plain | body
    assert got(tied, [(-1, 2)]) == plain | own | {tied.stands: 2.0}
    wanted = dict.fromkeys(plain, 2.0) | dict.fromkeys(own, 0.0)
    assert got(tied, [(slice(2), 2), (2, None)]) == wanted


def test_positions_count_a_layer_that_is_another():
    """In a module of Equinox something that is no module stands for it."""
    layers = {name: eqx.nn.Linear(2, 2, key=KEY) for name in ("first", "second", "third")}

    class Chain(eqx.Module):
        first: Any
        second: Any
        third: Any

    model = eqx.nn.Shared(Chain(**layers), lambda net: net.second, lambda net: net.first)
    params, structure = eqx.filter(model, eqx.is_inexact_array), lm.structure_of(model)
    for position, name in ((0, "first"), (1, "first"), (2, "third"), (-1, "third"), (-2, "first")):
        plan = lm.compile_rules([(("pytree", position), 2)], params, structure=structure)
        assert [leaf.path for leaf in plan.leaves if leaf.multiplier == 2] == [
            f"pytree/{name}/weight",
            f"pytree/{name}/bias",
        ]


@in_every_library
def test_patterns_meet_it_under_either_name(library):
    tied = case(library)
    wanted = dict.fromkeys(lm.paths(tied.params), 1.0) | {tied.stands: 2.0}
    for name in (tied.stands, tied.alias):
        *above, node, last = name.split("/")
        targets = [f"**/{node}/{last}", f"**/{node[:2]}*/{last}", (..., node, last)]
        for target in (
            *targets,
            (*above, node, last),
            re.compile(name),
            re.compile(f".*{node}/{last}"),
        ):
            assert got(tied, [(target, 2)]) == wanted, target


@in_every_library
def test_the_table_lists_the_other_paths(library):
    tied = case(library)
    total = "5 arrays, 39 parameters: 24 train, 15 frozen"  # it counts once
    for name in (tied.stands, tied.alias):
        rules = [(name, None)]
        lines = str(lm.compile_rules(rules, tied.params, structure=tied.structure)).splitlines()
        [note] = lines[lines.index(total) + 1 :]
        for path in (tied.stands, tied.alias):  # or nodes that are one
            assert path.rpartition("/")[0] in note
    assert str(lm.compile_rules([(tied.stands, None)], tied.params)).splitlines()[-1] == total


@in_every_library
def test_it_is_read_and_set_under_either_name(library):
    tied = case(library)
    structure, everything = {"structure": tied.structure}, set(lm.paths(tied.params))
    for name in (tied.stands, tied.alias):
        found = lm.extract(tied.params, name, **structure)
        np.testing.assert_array_equal(found, arrays(tied.params)[tied.stands])
        new = lm.replace(tied.params, name, found + 1, **structure)
        np.testing.assert_array_equal(arrays(new)[tied.stands], found + 1)
        assert kept(tied.params, new) == everything - {tied.stands}
        rows = lm.extract(tied.params, lm.rows(name, [3, 1]), **structure)
        np.testing.assert_array_equal(rows, found[np.array([3, 1])])


@pytest.mark.parametrize("node", ["tokens", "head", "body"])
@in_every_library
def test_what_is_read_of_a_node_can_be_set_there(library, node):
    tied = case(library)
    target = node if node == "body" else tied.head.removesuffix("head") + node
    found = lm.extract(tied.params, target, structure=tied.structure)
    new = lm.replace(tied.params, target, found, structure=tied.structure)
    assert kept(tied.params, new) == set(lm.paths(tied.params))


def test_what_is_read_of_a_node_can_be_set_there_in_a_module():
    model = NNXModel(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    for target in ("tokens", "head", "body", 0, 2, "tokens/embedding", "head/weight"):
        assert lm.replace(model, target, lm.extract(model, target)) is model
        assert model.head.weight is model.tokens.embedding
        assert kept(before, nnx.state(model)) == set(lm.paths(before))
    lm.replace(model, "tokens", {"embedding": jnp.full((VOCABULARY, WIDTH), 7.0)})
    assert np.all(np.asarray(model.head.weight[...]) == 7)
    module = EquinoxModel(KEY)
    for target in ("tied/pytree/tokens", "tied/pytree/head", "tied", "body"):
        new = lm.replace(module, target, lm.extract(module, target))
        assert kept(*(eqx.filter(m, eqx.is_array) for m in (module, new))) == set(
            lm.paths(eqx.filter(module, eqx.is_array))
        )


@in_every_library
def test_without_the_structure_the_other_name_is_not_known(library):
    tied = case(library)
    # In a module of Equinox something stands at the other path: in a filtered one, a hole.
    params = EquinoxModel(KEY) if library == "equinox" else tied.params
    with pytest.raises(lm.UnmatchedRuleError):
        lm.compile_rules([(tied.alias, None)], params)
    plan = lm.compile_rules([(tied.stands, None)], params)
    assert [leaf.path for leaf in plan.leaves if leaf.frozen] == [tied.stands]


@pytest.mark.parametrize("kind", ["scale_by_rules", "wrap", "compact"])
@in_every_library
def test_training(library, kind):
    tied = case(library)
    rules = [(lm.rows(tied.alias, [0, 2]), None), ("body", None), (tied.stands, 0.5)]
    if kind == "scale_by_rules":
        tx = optax.chain(adamw(), lm.scale_by_rules(rules, structure=tied.structure))
    else:
        tx = lm.wrap(adamw(), rules, compact=kind == "compact", structure=tied.structure)
    first, _, after = train(tx, tied.params, tied.loss)
    lm.assert_frozen(tied.params, after, rules, structure=tied.structure)
    assert kept(tied.params, after) == {p for p in lm.paths(tied.params) if p.startswith("body/")}
    start, first, plain, after = (
        arrays(params)[tied.stands] for params in (tied.params, first, plain_step(library), after)
    )
    np.testing.assert_array_equal((after != start).any(axis=1), [False, True, False, True, True])
    assert after[[0, 2]].tobytes() == start[[0, 2]].tobytes()
    np.testing.assert_allclose(
        (first - start)[[1, 3, 4]], (plain - start)[[1, 3, 4]] / 2, rtol=1e-4
    )


def test_training_in_an_nnx_optimizer():
    model = NNXModel(nnx.Rngs(0))
    structure = lm.structure_of(model)
    rules = [("tokens", None), ("head", 2)]  # it stands below `head` in the state
    tx = optax.chain(optax.adamw(0.05), lm.scale_by_rules(rules, structure=structure))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(TOKENS)))(model))

    for _ in range(3):
        step(model, optimizer)
    assert model.head.weight is model.tokens.embedding
    assert kept(before, nnx.state(model, nnx.Param)) == {"head/weight"}


def test_a_multiplier_is_attached_at_either_place():
    for part in ("tokens", "head"):
        model = NNXModel(nnx.Rngs(0))
        tied = case("nnx")._replace(structure=lm.structure_of(model))
        lm.attach(getattr(model, part), None)
        found = got(tied, lm.attached_rules(model))
        inside = [path for path in found if path.startswith("head/own/") and part == "head"]
        assert [path for path, multiplier in found.items() if multiplier == 0] == [
            *inside,
            "head/weight",
        ]
    model = NNXModel(nnx.Rngs(0))
    params, structure = nnx.state(model, nnx.Param), lm.structure_of(model)
    lm.attach(model.tokens.embedding, 0.5)
    with pytest.raises(lm.RuleError, match="attached_rules"):
        lm.scale_by_rules([("body", 2)], structure=structure).init(params)
    for rules in ([("tokens", 2)], [("head", 2)], lm.attached_rules(model)):
        lm.scale_by_rules(rules, structure=structure).init(params)


# Plain trees --------------------------------------------------------------------------------------

TIED = lm.Structure(shared=[["embed/embedding", "head/kernel"]])
RULES = [("embed", 2), ("head", 3)]


def table():
    """An array of its own at every call, always with the same numbers."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH)), jnp.float32)


def one_leaf(at="embed/embedding"):
    """A tree that holds the array at one of its places alone."""
    node, name = at.split("/")
    return {node: {name: table()}, "body": {"kernel": jnp.ones((WIDTH, WIDTH))}}


def two_leaves():
    """A tree that holds it at both; equal arrays, but two."""
    return one_leaf() | {"head": {"kernel": table()}}


@pytest.mark.parametrize(
    "params",
    [one_leaf(), one_leaf("head/kernel"), two_leaves()],
    ids=["first", "second", "both"],
)
def test_shared_arrays_of_plain_trees(params):
    def values(rules, structure=TIED):
        plan = lm.compile_rules(rules, params, structure=structure)
        found = {leaf.path: leaf.multiplier for leaf in plan.leaves}
        assert found.pop("body/kernel") == 1.0
        [value] = set(found.values())  # at all of its places
        return value

    assert values([("embed", 0.5)]) == 0.5
    assert values([("head/kernel", 0.5)]) == 0.5
    assert values(RULES) == 2
    assert values(RULES[::-1]) == 3
    assert values([("head", None), ("embed/embedding", 3)]) == 0
    # The order of the paths does not matter, nor that there is a third.
    paths = [["other/w", "head/kernel", "embed/embedding"]]
    assert values(RULES, lm.Structure(shared=paths)) == 2
    assert values([("other", None)] + RULES, lm.Structure(shared=paths)) == 0
    # What else is known of the model stays known.
    merged = lm.Structure(order={"": ["embed", "body", "head"]}) | TIED
    assert values([(-1, 0.5)], merged) == 0.5
    assert values([(0, 0.5), (2, None)], TIED | lm.Structure(order=merged.order)) == 0.5


def test_arrays_that_are_not_shared_are_ruled_apart():
    plan = lm.compile_rules(RULES, two_leaves())
    assert plan.multipliers["embed"]["embedding"] == 2
    assert plan.multipliers["head"]["kernel"] == 3


def test_several_arrays_are_shared():
    params = {name: {"w": jnp.ones((2, 2)), "b": jnp.ones(2)} for name in "abcd"}
    structure = lm.Structure(shared=[["a/w", "b/w", "c/w"], ["b/b", "d/b"]])
    rules = [("b", 2), ("c", 3), ("a", 4), ("d", 5)]
    plan = lm.compile_rules(rules, params, structure=structure)
    assert plan.multipliers == {
        "a": {"w": 2.0, "b": 4.0},
        "b": {"w": 2.0, "b": 2.0},
        "c": {"w": 2.0, "b": 3.0},
        "d": {"w": 5.0, "b": 2.0},
    }


def test_both_leaves_train_alike():
    """So that two leaves of equal values, with equal gradients, stay equal."""
    params = two_leaves()
    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules(RULES[::-1], structure=TIED))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates["embed"]["embedding"], updates["head"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], -0.3, rtol=1e-6)
    np.testing.assert_allclose(updates["body"]["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("make", [one_leaf, two_leaves])
def test_every_function_of_rules_takes_a_structure(make):
    rules, params = [("head", None), ("body", 0.5)], make()
    shared = [path for path in lm.paths(params) if path != "body/kernel"]
    grads = jax.tree.map(jnp.ones_like, params)

    def check(updates, multiplier=0.5):
        found = arrays(updates)
        np.testing.assert_allclose(found.pop("body/kernel"), -0.1 * multiplier, rtol=1e-6)
        for path in shared:
            assert found[path].tobytes() == np.full((VOCABULARY, WIDTH), -0.0, "f").tobytes()

    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules(rules, structure=TIED))
    check(tx.update(grads, tx.init(params), params)[0])
    check(jax.jit(tx.update)(grads, tx.init(params), params)[0])
    for compact in (False, True):
        tx = lm.wrap(optax.sgd(0.1, momentum=0.9), rules, compact=compact, structure=TIED)
        state = tx.init(params)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * WIDTH**2
        check(tx.update(grads, state, params)[0])
    mask = lm.trainable_mask(rules, structure=TIED)(params)
    assert [
        path for path, on in zip(lm.paths(params), jax.tree.leaves(mask), strict=True) if on
    ] == ["body/kernel"]

    def loss(params):
        params = lm.stop_frozen(params, rules, structure=TIED)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    grads = arrays(jax.grad(loss)(params))
    assert {path for path, grad in grads.items() if not grad.any()} == set(shared)
    for path in lm.paths(params):
        node, name = path.split("/")
        changed = params | {node: {name: params[node][name].at[1, 2].add(1)}}
        if path == "body/kernel":
            lm.assert_frozen(params, changed, rules, structure=TIED)
            continue
        with pytest.raises(lm.FrozenError, match=rf"{path}.*\[1, 2\]"):
            lm.assert_frozen(params, changed, rules, structure=TIED)


@pytest.mark.parametrize("make", [one_leaf, two_leaves])
def test_extract_and_replace_and_graft_take_a_structure(make):
    params, new = make(), jnp.full((VOCABULARY, WIDTH), 7.0)
    shared = [path for path in lm.paths(params) if path != "body/kernel"]
    for name in ("embed/embedding", "head/kernel"):
        found = lm.extract(params, name, structure=TIED)
        np.testing.assert_array_equal(found, arrays(params)[shared[0]])
        node, last = name.split("/")
        trees = [
            lm.replace(params, name, new, structure=TIED),
            lm.graft(params, {node: {last: new}}, name, structure=TIED)[0],
        ]
        for tree in trees:
            assert kept(params, tree) == {"body/kernel"}  # all of its leaves have changed
            assert all((arrays(tree)[path] == 7).all() for path in shared)


def test_migrate_thaws_and_freezes_by_another_name():
    params, momentum = one_leaf(), optax.sgd(0.1, momentum=0.9)
    grads = jax.tree.map(jnp.ones_like, params)
    frozen, free = [("head", None)], [("body", None)]
    tx = lm.wrap(momentum, free, structure=TIED)
    _, state = tx.update(grads, tx.init(params), params)
    same = lm.migrate(state, params, momentum, free, [("body", None), ("head", 2)], structure=TIED)
    np.testing.assert_array_equal(optax.tree.get(same, "trace")["embed"]["embedding"], 1)
    back = lm.migrate(state, params, momentum, free, frozen, structure=TIED)
    trace = optax.tree.get(back, "trace")
    assert trace["embed"]["embedding"] == optax.MaskedNode()
    np.testing.assert_array_equal(trace["body"]["kernel"], 0)
    tx = lm.wrap(momentum, frozen, structure=TIED)
    updates, _ = tx.update(grads, back, params)
    assert not updates["embed"]["embedding"].any()


# Rules that lose ----------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [one_leaf(), two_leaves()], ids=["one", "both"])
def test_a_rule_that_loses_through_another_path_is_forgiven(params):
    for rules in (RULES, RULES[::-1], [("head/kernel", 2), ("embed/embedding", None)]):
        plan = lm.compile_rules(rules, params, structure=TIED)
        assert {leaf.multiplier for leaf in plan.leaves} == {rules[0][1], 1.0}
        text = str(plan)  # which names it
        assert f"rule 1 ({rules[1][0]!r} -> " in text
        assert "rule 0" not in text


@pytest.mark.parametrize("params", [one_leaf(), two_leaves()], ids=["one", "both"])
@pytest.mark.parametrize("name", ["embed/embedding", "head/kernel"])
def test_a_rule_that_loses_through_the_same_path_is_an_error(params, name):
    node = name.split("/")[0]
    for first in (name, node, "**", "**/" + name.split("/")[1], "{embed,head}", (node, ...)):
        with pytest.raises(lm.ShadowedRuleError, match=f"rule 1 .'{name}' -> 2"):
            lm.compile_rules([(first, None), (name, 2)], params, structure=TIED)
        with pytest.warns(UserWarning, match="rule 1"):
            lm.compile_rules([(first, None), (name, 2)], params, structure=TIED, strict=False)
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([(..., None), (node, 2)], params, structure=TIED)


def test_only_what_is_shared_is_forgiven():
    """One array lost through another path; but the other through its own."""
    params = two_leaves() | {"head": {"kernel": jnp.ones((VOCABULARY, WIDTH)), "bias": jnp.ones(5)}}
    lm.compile_rules([("embed", 2), ("head/bias", 3), ("head/kernel", 4)], params, structure=TIED)
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([("embed", 2), ("body", 3), ("body/kernel", 4)], params, structure=TIED)
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([("head/bias", 2), ("head/bias", 4)], params, structure=TIED)
    with pytest.raises(lm.UnmatchedRuleError, match="hed"):
        lm.compile_rules([("embed", 2), ("hed/kernel", 4)], params, structure=TIED)


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [one_leaf(), two_leaves()], ids=["one", "both"])
@pytest.mark.parametrize("names", [("embed", "head"), ("head", "embed")], ids=" then ".join)
def test_parts_under_either_name(params, names):
    one, other = names
    rules = [
        (lm.rows(one, 0), None),
        (lm.rows(other, [0, 1]), 2),
        (lm.along(one, 1, -1), 3),
        (other, 0.5),
    ]
    wanted = np.full((VOCABULARY, WIDTH), 0.5)
    wanted[:, -1] = 3
    wanted[1] = 2
    wanted[0] = 0
    plan = lm.compile_rules(rules, params, structure=TIED)
    tx = lm.scale_by_rules(rules, structure=TIED)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
    for leaf in plan.leaves:
        if leaf.path == "body/kernel":
            assert leaf.multiplier == 1
            continue
        np.testing.assert_array_equal(leaf.multiplier.dense(), wanted)
        assert [rule.index for rule in leaf.rules] == [0, 1, 2, 3]
        assert (leaf.trained, leaf.frozen) == (12, 3)
        node, name = leaf.path.split("/")
        np.testing.assert_allclose(updates[node][name], wanted, rtol=1e-6)
    mask = wanted > 1
    plan = lm.compile_rules([(lm.elements(one, mask), None)], params, structure=TIED)
    other_plan = lm.compile_rules([(lm.elements(other, mask), None)], params, structure=TIED)
    for leaf, same in zip(plan.leaves, other_plan.leaves, strict=True):
        assert leaf.frozen == same.frozen == (0 if leaf.path == "body/kernel" else mask.sum())


def test_a_part_that_loses_through_another_path_is_forgiven():
    params = one_leaf()
    rules = [(lm.rows("embed", [0, 1]), None), (lm.rows("head", 1), 2)]
    plan = lm.compile_rules(rules, params, structure=TIED)
    np.testing.assert_array_equal(plan.multipliers["embed"]["embedding"], [[0], [0], [1], [1], [1]])
    rules = [(lm.rows("head", [0, 1]), None), (lm.rows("head", 1), 2)]
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules(rules, params, structure=TIED)
    with pytest.raises(lm.IndexRangeError, match="axis 0"):
        lm.compile_rules([(lm.rows("head", VOCABULARY), 2)], params, structure=TIED)


def test_what_loses_one_thing_through_another_path_and_the_rest_through_its_own_is_forgiven():
    """Were the array not shared, the last rule would have something."""
    rules = [(lm.rows("head", 0), None), (lm.rows("embed", 1), 2), (lm.rows("head", [0, 1]), 3)]
    plan = lm.compile_rules(rules, one_leaf(), structure=TIED)
    np.testing.assert_array_equal(plan.multipliers["embed"]["embedding"], [[0], [2], [1], [1], [1]])
    params = one_leaf() | {"head": {"bias": jnp.ones(VOCABULARY)}}
    rules = [("embed", None), ("head/bias", 2), ("head", 3)]
    plan = lm.compile_rules(rules, params, structure=TIED)
    assert plan.multipliers["head"]["bias"] == 2
    with pytest.raises(lm.ShadowedRuleError):
        lm.compile_rules([("head/kernel", None), *rules[1:]], params, structure=TIED)


# Arrays that are tied by accident -----------------------------------------------------------------


def accident():
    """One array object at two leaves, which come apart at the first step."""
    array = jnp.ones((VOCABULARY, WIDTH))
    return {
        "embed": {"embedding": array},
        "head": {"kernel": array},
        "body": {"kernel": jnp.ones(2)},
    }


def makers(structure=None):
    return {
        "scale_by_rules": lm.scale_by_rules([("body", 2)], structure=structure),
        "wrap": lm.wrap(optax.adamw(1e-3), [("body", 2)], structure=structure),
        "compact": lm.wrap(optax.adamw(1e-3), [("body", 2)], compact=True, structure=structure),
    }


@pytest.mark.parametrize("kind", makers())
def test_one_array_at_two_leaves_is_a_warning(kind):
    tx = makers()[kind]
    with pytest.warns(UserWarning, match="shared=") as caught:
        tx.init(accident())
    [warning] = caught
    assert "embed/embedding" in str(warning.message)
    assert "head/kernel" in str(warning.message)
    assert "body" not in str(warning.message)


@pytest.mark.parametrize("kind", makers())
def test_no_warning_where_there_is_no_such_accident(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx = makers()[kind]
        tx.init(jax.tree.map(jnp.copy, accident()))  # equal, but two
        makers(TIED)[kind].init(accident())  # known
        jax.jit(tx.init)(accident())
        jax.jit(lambda array: tx.init({"embed": array, "head": array, "body": array}))(jnp.ones(3))
        jax.eval_shape(tx.init, accident())
        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        lm.compile_rules([], {"a": shape, "b": shape})
        lm.compile_rules([("body", 2)], jax.eval_shape(accident))


def test_no_warning_for_models_that_share():
    for library in ("linen", "nnx", "equinox"):
        tied = case(library)
        for tx in makers(tied.structure).values():
            tx.init(tied.params)
