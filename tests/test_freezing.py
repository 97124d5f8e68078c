"""What is frozen, in a loss and in a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import lrmult as lm
from tests.reference import dense, interpret
from tests.test_reference import cases
from tests.test_reference_parts import compiled_lists

# --- stop_frozen ---------------------------------------------------------------------------------


@cases(60)
@given(compiled_lists())
def test_the_gradient_is_zero_where_it_is_frozen_and_as_ever_elsewhere(case):
    tree, stacked, structured, written = case
    claims, _ = interpret(structured, tree, stacked)
    values = [rule[1] or 0 for rule in structured]
    kwargs = {"rules": lm.optional(written), "structure": lm.Structure(stacked=stacked)}
    params = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32) + 2, tree)
    params = jax.tree.map(lambda p, leaf: p.reshape(leaf.shape), params, tree)

    def loss(params):
        stopped = lm.stop_frozen(params, **kwargs)
        for a, b in zip(*map(jax.tree.leaves, (params, stopped)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(stopped)) + 0.0

    value, grads = jax.value_and_grad(loss)(params)
    assert value == sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) + 0.0
    for grad, leaf, claim in zip(*map(jax.tree.leaves, (grads, params)), claims, strict=True):
        trains = np.broadcast_to(dense(claim, values) != 0, leaf.shape)
        np.testing.assert_array_equal(grad, np.where(trains, 2 * leaf, 0))


def test_a_nan_behind_what_is_frozen_stays_there():
    params = {"a": jnp.array([0.0, 4.0]), "b": jnp.array([0.0, 4.0])}
    rules = [(lm.rows("a", 0), None), ("b", None)]

    def loss(params):
        params = lm.stop_frozen(params, rules)
        return sum(jnp.sum(jnp.sqrt(leaf) * jnp.sqrt(leaf)) for leaf in params.values())

    grads = jax.grad(loss)(params)
    assert grads["a"].tolist() == [0.0, pytest.approx(1.0)]
    assert grads["b"].tolist() == [0.0, 0.0]


def test_other_leaves_pass_through():
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "f": jax.nn.relu}
    for rules in ([(..., None)], []):
        stopped = lm.stop_frozen(params, rules)
        assert stopped["f"] is jax.nn.relu
        assert stopped["key"] is params["key"]
        assert stopped["n"].tolist() == [0, 1, 2]


def test_a_schedule_that_is_zero_does_not_stop():
    rules = [("w", lambda step: 0.0)]
    grad = jax.grad(lambda params: lm.stop_frozen(params, rules)["w"].sum())({"w": jnp.ones(2)})
    assert grad["w"].tolist() == [1.0, 1.0]


def test_rules_that_do_nothing_are_errors():
    with pytest.raises(lm.UnmatchedRuleError):
        lm.stop_frozen({"w": jnp.ones(2)}, [("v", None)])
    with pytest.warns(UserWarning, match="no path matches 'v'") as caught:
        lm.stop_frozen({"w": jnp.ones(2)}, [("v", None)], strict=False)
    assert caught[0].filename == __file__


# --- assert_frozen -------------------------------------------------------------------------------

BEFORE = {
    "head": jnp.array([[1.0, -0.0], [jnp.nan, 3.0]]),
    "trunk": {"n": jnp.arange(3), "w": jnp.ones((2, 2), jnp.bfloat16)},
}
RULES = [(lm.rows("head", 0), None), ("trunk", None)]


def changed(path, index, value):
    tree = jax.tree.map(lambda leaf: leaf, BEFORE)
    *above, name = path.split("/")
    node = tree
    for key in above:
        node = node[key]
    node[name] = node[name].at[index].set(value)
    return tree


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (changed("head", (0, 0), 2.0), "'head' float32[2,2] is frozen, but changed at [0, 0]: 1.0"),
        (changed("head", (0, 1), 0.0), "changed at [0, 1]: -0.0 became 0.0"),
        (changed("trunk/n", (2,), 7), "'trunk/n' int32[3] is frozen, but changed at [2]: 2 became"),
        (
            changed("trunk/w", (slice(None), 1), 1.0078125),
            "'trunk/w' bfloat16[2,2] is frozen, but changed at [0, 1]: 1 became 1.00781, and so "
            "did 1 more of its elements",
        ),
        (BEFORE | {"head": jnp.ones((2, 3))}, "'head' float32[2,2] became float32[2,3]"),
        (BEFORE | {"head": jnp.ones((2, 2), jnp.float16)}, "'head' float32[2,2] became float16"),
        ({"head": BEFORE["head"]}, "only before has 'trunk/n' and 'trunk/w'"),
        (BEFORE | {"new": jnp.ones(1)}, "only after has 'new'"),
    ],
)
def test_what_changed_is_named(after, says):
    with pytest.raises(lm.FrozenError) as caught:
        lm.assert_frozen(BEFORE, after, RULES)
    assert says in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_what_trains_may_change_and_nan_equals_itself():
    lm.assert_frozen(BEFORE, changed("head", 1, 9.0), RULES)
    lm.assert_frozen(BEFORE, BEFORE, [(..., None)])
    with pytest.raises(lm.FrozenError):
        lm.assert_frozen(BEFORE, changed("head", 1, 9.0), [(..., None)])


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (1, 0)])
def test_element_masks(place):
    mask = np.eye(2) > 0
    after = changed("head", place, 5.0)
    if not mask[place]:
        lm.assert_frozen(BEFORE, after, [(lm.elements("head", mask), None)])
        return
    with pytest.raises(lm.FrozenError, match=rf"\[{place[0]}, {place[1]}\]"):
        lm.assert_frozen(BEFORE, after, [(lm.elements("head", mask), None)])


def test_leaves_of_every_kind():
    tree = {
        "f": jax.nn.relu,
        "key": jax.random.key(0),
        "number": 1.5,
        "none": None,
        "zero": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2),
        "numpy": np.arange(3.0)[::-1],
        "complex": jnp.array([1j]),
        "flag": jnp.array([True]),
    }
    lm.assert_frozen(tree, dict(tree), [(..., None)])
    for name, value in {
        "key": jax.random.key(1),
        "number": 1.25,
        "scalar": jnp.float32(3),
        "numpy": np.array([2.0, 1.0, 0.5]),
        "complex": jnp.array([2j]),
        "flag": jnp.array([False]),
    }.items():
        with pytest.raises(lm.FrozenError, match=f"'{name}'"):
            lm.assert_frozen(tree, tree | {name: value}, [(..., None)])


def test_other_classes_of_the_same_paths():
    before = {"layers": [jnp.ones(2), jnp.zeros(2)]}
    after = {"layers": {0: np.ones(2, np.float32), 1: np.zeros(2, np.float32)}}
    lm.assert_frozen(before, after, [(..., None)])


def test_a_rule_that_does_nothing_is_warned_of_once():
    with pytest.warns(UserWarning, match="no path matches 'v'") as caught:
        lm.assert_frozen(BEFORE, BEFORE, [*RULES, ("v", None)], strict=False)
    assert [each.filename for each in caught] == [__file__]


def test_what_cannot_tell_what_was():
    rules = [("kernel", None)]
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before, copy = nnx.state(module), nnx.clone(module)
    module.kernel[...] += 1
    for after in (module, nnx.state(module)):
        with pytest.raises(lm.RuleError, match=r"share their NNX variables.*nnx\.clone"):
            lm.assert_frozen(before, after, rules)
        with pytest.raises(lm.FrozenError, match="'kernel'"):
            lm.assert_frozen(copy, after, rules)
    params = {"w": jnp.ones(2)}
    after = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    with pytest.raises(lm.RuleError, match=r"'w' was donated, and is gone; keep a copy"):
        lm.assert_frozen(params, after, [(..., None)])
    with pytest.raises(lm.RuleError, match=r"call it outside of jax\.jit"):
        jax.jit(lambda p: lm.assert_frozen(p, p, [(..., None)]))(after)


def test_stacked_layers():
    before = {"layers": jnp.ones((3, 2))}
    after = {"layers": before["layers"].at[2].set(5.0)}
    structure = lm.Structure(stacked={"layers": 0})
    lm.assert_frozen(before, after, [("layers[:2]", None)], structure=structure)
    with pytest.raises(lm.FrozenError, match=r"at \[2, 0\]"):
        lm.assert_frozen(before, after, [("layers[1:]", None)], structure=structure)
