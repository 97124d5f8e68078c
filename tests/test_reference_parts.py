"""Parts of arrays and stacked layers against a naive interpreter, on generated trees and rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import assume, given
from hypothesis import strategies as st

import lrmult as lm
from tests.reference import (
    Along,
    Elements,
    Name,
    Neurons,
    dense,
    grow,
    interpret,
    select,
)
from tests.test_reference import (
    cases,
    check_list,
    others,
    outcome,
    positions,
    rendered,
    spans,
    structures,
)

# --- trees ---------------------------------------------------------------------------------------

sizes = st.sampled_from([2, 2, 3, 4])
shapes = st.lists(st.sampled_from([1, 2, 2, 3, 3, 4, 0]), max_size=4).map(tuple)


@st.composite
def modules(draw):
    """The arrays of one layer, as the libraries name and shape them, mostly."""
    ins, outs, width = draw(sizes), draw(sizes), draw(sizes)
    other = 5 - outs  # a size other than that of the outputs
    spatial = (width,) * draw(st.integers(1, 2))
    kernel, bias = draw(st.sampled_from([("kernel", "bias"), ("w", "b")]))
    found = draw(
        st.sampled_from(
            [
                {kernel: (ins, outs), bias: (outs,)},
                {kernel: (ins, outs), bias: (outs,)},
                {kernel: (ins, outs), bias: (outs,)},
                {kernel: (*spatial, other, outs), bias: (outs,)},
                {kernel: (*spatial, outs, other), bias: (outs,)},
                {kernel: (*spatial, other, outs)},
                {kernel: (*spatial, outs, outs), bias: (outs,)},
                {kernel: (ins, outs)},
                {kernel: (outs,), bias: (outs,)},
                {kernel: (ins, outs), "scale": (other,)},
                {kernel: (other, outs), bias: (other,)},
                {kernel: (ins, width, outs), bias: (width, outs)},
                {"weight": (outs, other), "bias": (outs,)},
                {"scale": (outs,), "bias": (outs,)},
                {"scale": (outs,), "offset": (outs,)},
                {"embedding": (ins, outs)},
            ]
        )
    )
    return {name: np.zeros(shape, np.float32) for name, shape in found.items()}


level = st.one_of(modules(), modules(), shapes.map(lambda shape: np.zeros(shape, np.float32)))
for _ in range(2):
    level = st.one_of(
        level,
        st.dictionaries(
            st.sampled_from(["a", "c", "fc_0", "fc_1", "0", "1"]),
            level,
            min_size=1,
            max_size=3,
        ),
        st.lists(level, min_size=1, max_size=3),
    )


def changed(tree, path, change):
    """The tree with one node changed."""
    if not path:
        return change(tree)
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
        return [*(tree | {int(path[0]): changed(tree[int(path[0])], path[1:], change)}).values()]
    return tree | {path[0]: changed(tree[path[0]], path[1:], change)}


def with_axis(tree, axis, size):
    """The tree with one more axis in every array."""
    return jax.tree.map(
        lambda leaf: np.zeros((*leaf.shape[:axis], size, *leaf.shape[axis:]), leaf.dtype), tree
    )


@st.composite
def stacked_trees(draw):
    """A tree, and where which of its nodes are stacked along which axis."""
    tree, stacked = draw(level), {}
    if draw(st.integers(0, 5)) == 0:
        tree = jax.tree.map(lambda leaf: leaf if draw(st.integers(0, 3)) else None, tree)
    nodes = [node for node in grow(tree)[0].below() if node.children]
    if nodes and draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2, unique=True))
        for node in sorted(chosen, key=lambda node: -len(node.path)):
            ranks = [below.leaf.ndim for below in node.below() if below.leaf is not None]
            axis = draw(st.integers(0, min([1, *ranks])))
            path = "/".join(node.path)
            for inner in stacked:
                if inner.startswith(path) and stacked[inner] >= axis:
                    stacked[inner] += 1
            stacked[path] = axis
            stack = functools.partial(with_axis, axis=axis, size=draw(st.integers(1, 3)))
            tree = changed(tree, node.path, stack)
    return tree, stacked


# --- targets -------------------------------------------------------------------------------------


@st.composite
def indices(draw, size):
    """An index into an axis, within its size mostly, and one of the ways to write it."""
    inside = st.integers(-size, size - 1) if size else st.just(0)
    kind = draw(st.sampled_from(["int", "slice", "slice", "list", "list", "bools", "bools"]))
    if kind == "int":
        index = draw(inside if draw(st.integers(0, 9)) else st.sampled_from([size, -size - 1, 9]))
        return index, draw(st.sampled_from([index, np.int32(index)]))
    if kind == "slice":
        index = draw(spans)
        return index, index
    if kind == "list":
        index = draw(st.lists(inside, min_size=1, max_size=3))
        if draw(st.integers(0, 9)) == 0:
            index = draw(st.sampled_from([[], [size], [0, -size - 1]]))
        ways = [index, tuple(index), np.array(index, np.int32), jnp.array(index, jnp.int32)]
        if index and index == [*range(index[0], index[-1] + 1)]:
            ways.append(range(index[0], index[-1] + 1))
        return index, draw(st.sampled_from(ways))
    length = size if draw(st.integers(0, 9)) else size + 1
    index = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), bool)
    return index, draw(
        st.sampled_from([index, jnp.asarray(index), index.tolist()] if length else [index])
    )


@st.composite
def masks(draw, shape):
    """A boolean array, of that shape mostly."""
    if draw(st.integers(0, 11)) == 0:
        shape = draw(st.sampled_from([(*shape, 1), shape[1:], shape[::-1], (2, 3)]))
    if draw(st.integers(0, 3)) == 0:  # an outer product
        mask = np.ones(shape, bool)
        for axis, size in enumerate(shape):
            chosen = draw(st.lists(st.integers(0, max(size - 1, 0)), min_size=1, max_size=3))
            vector = np.isin(np.arange(size), chosen)
            mask &= np.expand_dims(vector, [*range(axis), *range(axis + 1, len(shape))])
        return mask
    size = int(np.prod(shape))
    bits = draw(st.one_of(st.integers(0, 2**size - 1), st.just(2**size - 1)))
    return np.array([bits >> bit & 1 for bit in range(size)], bool).reshape(shape)


@st.composite
def targets(draw, root, leaves, often):
    """A target as the interpreter reads it, and as the package does; often of one path."""
    kind = draw(st.integers(0, 13))
    if kind == 0:
        target = written = draw(others)
    else:
        cut = draw(st.integers(0, 1)) if len(often) > 1 else 0
        exact = tuple([Name((segment,)) for segment in often[: len(often) - cut]]) or (...,)
        target = exact if kind > 6 else (...,) if kind == 1 else draw(structures(root))
        written = draw(rendered(target))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3]))):
        found = [leaves[path].leaf.shape for path in select(target, root, leaves).masks]
        shape = draw(st.sampled_from(found or [(2, 3)]))
        rank = len(shape)
        axis = draw(st.integers(-rank, rank - 1)) if rank and draw(st.integers(0, 11)) else rank
        size = shape[axis] if axis < rank else 2
        kind = draw(st.sampled_from(["along", "along", "neurons", "elements"]))
        if kind == "elements":
            mask = draw(masks(shape))
            target = Elements(target, mask)
            written = lm.elements(written, draw(st.sampled_from([mask, jnp.asarray(mask)])))
        elif kind == "along":
            index, text = draw(indices(size))
            target = Along(target, axis, index)
            if axis == 0 and draw(st.booleans()):
                written = lm.rows(written, text)
            else:
                written = lm.along(written, axis, text)
        else:
            index, text = draw(indices(draw(st.sampled_from([size, *shape[-1:], *shape[:1]]))))
            axis = draw(st.sampled_from([None, None, axis]))
            target = Neurons(target, index, axis)
            written = lm.neurons(written, text, axis=axis)
    return target, written


multipliers = st.sampled_from([None, 0.0, 0.5, 0.5, 0.1, 1, 2, -1])


@st.composite
def rule_lists(draw, tree, stacked, max_size=4):
    """Rules as the interpreter reads them, and as the package does."""
    root, leaves = grow(tree, stacked)
    leaves = {leaf.path: leaf for leaf in leaves}
    structured, written = [], []
    often = draw(st.sampled_from([*leaves] or [()]))
    for _ in range(draw(st.integers(1, max_size))):
        multiplier, optional = draw(multipliers), draw(st.integers(0, 3)) == 0
        target, text = draw(targets(root, leaves, often))
        structured.append((target, multiplier, optional))
        written += lm.optional([(text, multiplier)]) if optional else [(text, multiplier)]
    return structured, written


# --- properties ----------------------------------------------------------------------------------


@cases(600)
@given(stacked_trees(), st.data())
def test_compile_rules_agrees_with_the_interpreter(case, data):
    tree, stacked = case
    structured, written = data.draw(rule_lists(tree, stacked))
    check_list(structured, written, tree, stacked, check=check_plan)
    for rule, text in zip(structured, written, strict=True):
        check_list([rule], [text], tree, stacked, check=check_plan)


def check_plan(plan, structured, claims, tree):
    values = [rule[1] or 0.0 for rule in structured]
    for answers in (plan.multipliers, plan.frozen, plan.trainable):
        assert jax.tree.structure(answers) == jax.tree.structure(tree)
    rows = (*map(jax.tree.leaves, (plan.multipliers, plan.frozen, plan.trainable)), plan.leaves)
    for leaf, claim, factor, frozen, trainable, record in zip(
        jax.tree.leaves(tree), claims, *rows, strict=True
    ):
        expected = dense(claim, values)
        masked = any(has_mask(structured[index]) for index in {*claim.flat} - {-1})
        check_form(factor, expected, float, np.float64, masked)
        check_form(frozen, expected == 0, bool, np.bool_, masked)
        assert trainable is bool((expected != 0).any())
        assert [rule.index for rule in record.rules] == sorted({*claim.flat} - {-1})
        assert record.frozen == (expected == 0).sum() * (leaf.size > 0)
        assert record.trained + record.frozen == leaf.size
        check_form(record.multiplier, expected, float, np.float64, masked)


def check_form(answer, expected, scalar, dtype, masked):
    """One value where all elements share it, a vector along the axis along which they vary."""
    varying = [
        axis
        for axis, size in enumerate(expected.shape)
        if (np.diff(expected.astype(float), axis=axis) != 0).any()
    ]
    if not varying:
        assert type(answer) is scalar
        assert answer == expected.flat[0]
    elif len(varying) == 1 and not (masked and isinstance(answer, lm.Parts)):
        assert isinstance(answer, np.ndarray)
        assert answer.dtype == dtype
        assert answer.shape == tuple(
            size if axis in varying else 1 for axis, size in enumerate(expected.shape)
        )
        np.testing.assert_array_equal(np.broadcast_to(answer, expected.shape), expected)
    else:
        assert isinstance(answer, lm.Parts)
        assert answer.dense().dtype == dtype
        np.testing.assert_array_equal(answer.dense(), expected)


# --- updates -------------------------------------------------------------------------------------


@st.composite
def compiled_lists(draw):
    """A tree, its stacks, and rules of which each claims something."""
    tree, stacked = draw(stacked_trees())
    structured, written = [], []
    for rule, text in zip(*draw(rule_lists(tree, stacked, max_size=6)), strict=True):
        if interpret([*structured, rule], tree, stacked)[1][-1] == {"ok"}:
            structured.append(rule)
            written.append(text)
    return tree, stacked, structured, written


factors = st.one_of(
    st.sampled_from([None, 0.5, 0.1, 1.0, -1.0]),
    st.sampled_from([None, 0.5, 0.1, 1.0, -1.0]),
    st.sampled_from([0.0, 1.0, 0.3]).map(lambda start: optax.linear_schedule(start, 1.0, 2)),
    st.sampled_from([0.0, 1.0, 0.3]).map(jnp.float32),
)
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5]


def scaled(update, claims, multipliers, step):
    """The update, element by element."""
    result = np.array(update)
    for index, multiplier in enumerate(multipliers if update.size else []):
        mine = claims == index
        value = np.float32((multiplier(step) if callable(multiplier) else multiplier) or 0)
        if value == 0 and not isinstance(multiplier, jax.Array):
            result[mine] = -0.0
        elif jnp.issubdtype(update.dtype, jnp.inexact):
            with np.errstate(all="ignore"):
                product = update.astype(np.float32) * value
                result[mine] = np.asarray(product.astype(update.dtype))[mine]
    return result


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(*(np.signbit(a[~np.isnan(a)]) for a in (found, expected)))


@st.composite
def updates_like(draw, leaves):
    """Numbers of many dtypes, among them those that do not survive an arithmetic operation."""
    random = np.random.default_rng(draw(st.integers(0, 99)))
    updates = []
    for leaf in leaves:
        dtype = draw(st.sampled_from([np.float32, np.float32, jnp.bfloat16, np.float16, np.int32]))
        numbers = random.standard_normal(leaf.shape) * 9
        if dtype is not np.int32:
            special = np.minimum(random.integers(0, 2 * len(SPECIAL), leaf.shape), len(SPECIAL))
            numbers = np.choose(special, [*SPECIAL, numbers])
        updates.append(np.asarray(numbers).astype(dtype))
    return updates


@cases(60)
@given(compiled_lists(), st.data())
def test_updates_are_scaled_element_by_element(case, data):
    tree, stacked, structured, written = case
    claims, _ = interpret(structured, tree, stacked)
    values = [data.draw(factors) for _ in written]
    leaves, treedef = jax.tree.flatten(tree)
    updates = data.draw(updates_like(leaves))
    targets = [rule.target for rule in lm.Rules(written)]
    structure = lm.Structure(stacked=stacked)

    def with_values(values):
        rules = lm.optional(list(zip(targets, values, strict=True)))
        return lm.scale_by_rules(rules, structure=structure)

    arrays = {i: value for i, value in enumerate(values) if isinstance(value, jax.Array)}

    @jax.jit
    def traced(updates, state, arrays):
        tx = with_values([arrays.get(i, value) for i, value in enumerate(values)])
        return tx.update(updates, state)

    tx = with_values(values)
    for update in (tx.update, functools.partial(traced, arrays=arrays)):
        state = tx.init(tree)
        for step in range(2):
            found, state = update(jax.tree.map(jnp.asarray, treedef.unflatten(updates)), state)
            for array, before, claim in zip(jax.tree.leaves(found), updates, claims, strict=True):
                assert_same_bits(array, scaled(before, claim, values, step))
    if not any(map(callable, values)) and not any(map(has_mask, structured)):
        assert state == optax.EmptyState()
    if not arrays:
        rules = lm.optional(list(zip(targets, values, strict=True)))
        plan = lm.compile_rules(rules, tree, structure=structure)
        for step in range(2):
            at_step = [(value(step) if callable(value) else value) or 0.0 for value in values]
            for array, claim, leaf in zip(full(plan, tree, step), claims, leaves, strict=True):
                expected = np.broadcast_to(dense(claim, at_step), leaf.shape)
                np.testing.assert_array_equal(array, expected)


def has_mask(rule):
    """Whether a rule has a mask of elements that is no outer product of vectors."""
    target = rule[0]
    while isinstance(target, Along | Neurons | Elements):
        if isinstance(target, Elements):
            mask, vectors = target.mask, np.ones((), bool)
            for axis in range(mask.ndim):
                other = tuple(a for a in range(mask.ndim) if a != axis)
                vectors = vectors & mask.any(axis=other, keepdims=True)
            if (mask != vectors).any():
                return True
        target = target.target
    return False


# --- laws ----------------------------------------------------------------------------------------


def full(plan, tree, step=0):
    """The multiplier of every element."""
    found = jax.tree.leaves(plan.multipliers)
    return [
        np.broadcast_to(value.dense(step) if isinstance(value, lm.Parts) else value, leaf.shape)
        for value, leaf in zip(found, jax.tree.leaves(tree), strict=True)
    ]


def assert_same_answers(rules, others, tree, stacked):
    structure = lm.Structure(stacked=stacked)
    plans = [
        lm.compile_rules(lm.optional(each), tree, structure=structure) for each in (rules, others)
    ]
    for one, other in zip(*[full(plan, tree) for plan in plans], strict=True):
        np.testing.assert_array_equal(one, other)
    assert plans[0].trainable == plans[1].trainable


@cases(100)
@given(compiled_lists(), st.integers(0, 6), st.data())
def test_two_rules_on_two_halves_are_one_rule_on_both(case, cut, data):
    tree, stacked, _, written = case
    leaves = [leaf for leaf in grow(tree)[1] if leaf.path and leaf.leaf.ndim]
    assume(leaves)
    leaf = data.draw(st.sampled_from(leaves))
    axis = data.draw(st.integers(-leaf.leaf.ndim, leaf.leaf.ndim - 1))
    size = leaf.leaf.shape[axis]
    assume(size)
    places = st.lists(st.integers(-size, size - 1), min_size=1, max_size=3)
    first, second = data.draw(places), data.draw(places)

    def with_rules(*indices):
        return [
            *written[:cut],
            *[(lm.along(leaf.path, axis, index), 0.25) for index in indices],
            *written[cut:],
        ]

    assert_same_answers(with_rules(first + second), with_rules(first, second), tree, stacked)
    bools = [place in [one % size for one in first] for place in range(size)]
    assert_same_answers(with_rules(first), with_rules(np.array(bools)), tree, stacked)
    rows, along = (lm.rows(leaf.path, 0), None), (lm.along(leaf.path, 0, 0), None)
    assert_same_answers([rows, *written], [along, *written], tree, stacked)


@cases(100)
@given(level, st.integers(1, 3), st.integers(0, 1), st.data())
def test_a_stack_is_the_sequence_of_its_layers(tree, count, axis, data):
    root, leaves = grow(tree)
    # An empty array counts as one element, which all layers of a stack share.
    assume(all(leaf.leaf.ndim >= axis and leaf.leaf.size for leaf in leaves))
    stack = {"layers": with_axis(tree, axis, count)}
    sequence = {f"layers_{number}": jax.tree.map(np.copy, tree) for number in range(count)}
    pairs = [([], [])]
    for _ in range(data.draw(st.integers(1, 4))):
        target = data.draw(layer_targets(root, leaves))
        one, other = target, target
        if data.draw(st.booleans()):
            along, index = data.draw(st.integers(0, 3)), data.draw(indices(3))[1]
            one, other = (
                lm.along(one, along + (along >= axis), index),
                lm.along(other, along, index),
            )
        if data.draw(st.integers(0, 2)) == 0:
            mask = data.draw(masks(data.draw(st.sampled_from(leaves)).leaf.shape))
            assume(mask.ndim >= axis)
            stacked_mask = np.stack([mask] * count, axis)
            one, other = lm.elements(one, stacked_mask), lm.elements(other, mask)
        multiplier = data.draw(multipliers)
        pairs.append(((one, multiplier), (other, multiplier)))
    stack_rules, sequence_rules = map(list, zip(*pairs[1:], strict=True))

    raised, plan = outcome(stack_rules, stack, {"layers": axis}, strict=True)
    raised_too, plan_too = outcome(sequence_rules, sequence, strict=True)
    assert raised == raised_too
    if plan:
        answers = iter(full(plan_too, sequence))
        for number in range(count):
            for array in full(plan, stack):
                np.testing.assert_array_equal(array.take(number, axis), next(answers))


@st.composite
def layer_targets(draw, root, leaves):
    """A target in some of the layers, or of one name in all of them."""
    if draw(st.integers(0, 3)):
        position = draw(positions)
        rest = draw(st.sampled_from([(), draw(structures(root))]))
        return draw(rendered((Name(("layers",), position), *rest)))
    path = draw(st.sampled_from(leaves)).path
    return draw(rendered((..., *[Name((segment,)) for segment in path])))
