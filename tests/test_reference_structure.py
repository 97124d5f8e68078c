"""Orders and shared arrays against a naive interpreter, on generated trees, facts and rules."""

import dataclasses
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import lrmult as lm
from tests.reference import (
    Along,
    Elements,
    Name,
    Neurons,
    Node,
    errors,
    grow,
    interpret,
    joined,
    numbered,
    order,
    select,
    stem,
)
from tests.test_reference import (
    ERRORS,
    EVERY_POSITION,
    PLAIN,
    cases,
    families,
    globs,
    known,
    others,
    positions,
    rendered,
    segments,
    structures,
    texts,
    trees,
)
from tests.test_reference_parts import (
    check_plan,
    indices,
    masks,
    multipliers,
    stacked_trees,
    with_axis,
)

# --- facts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree and what is known of it, as the interpreter reads it and as the package does."""

    tree: Any
    facts: dict
    structure: lm.Structure

    @property
    def root(self):
        return grow(self.tree, **self.facts)[0]


ABSENT = ["relu", "pool", "a", "a_2", "a_3", "b_2", "2", "3", "a2", "*", "", "w", "é"]


@st.composite
def name_lists(draw, node, own):
    """The children of a node in some order, and layers without parameters; None if they have none.

    Args:
        draw: draws.
        node: the node.
        own: the paths that are those of the tree itself, not only of a shared array.
    """
    names = []
    for name, child in node.children.items():
        # Arrays need not be named, nor what only other paths of shared arrays lead to.
        free = child.leaf is not None or child.path not in own
        if not free or draw(st.integers(0, 3)):
            names.append(name)
    names += draw(st.lists(st.sampled_from(ABSENT), max_size=3))
    names = draw(st.permutations([*dict.fromkeys(names)]))
    everyone = Node((), {name: name for name in {*names, *node.children}})
    for before in map(stem, everyone.children):
        numbers = [number for number, _ in numbered(everyone, before)]
        if len(set(numbers)) < len(numbers):
            return None  # a_1 and a_01
    family = order(Node((), {name: name for name in names}))
    return [family[number] for number in sorted(family)] if family else names or None


@st.composite
def orders(draw, root, own):
    """An order for some nodes."""
    found = {}
    for node in root.below():
        if node.children and not node.hole and draw(st.integers(0, 2)):
            names = draw(name_lists(node, own))
            if names:
                found[node.path] = names
    return found


def is_free(root, path, shape):
    """Whether an array of that shape may have that path too."""
    node = root
    for segment in path:
        if node.leaf is not None:
            return False
        if segment not in node.children:
            return True
        node = node.children[segment]
    return not node.children and (node.hole or (node.leaf is not None and node.leaf.shape == shape))


def is_stacked(tree, stacked, shared):
    """Whether all that is below each stack has its layers."""
    root = grow(tree, shared=shared)[0]
    for path, axis in stacked.items():
        shapes = [
            node.leaf.shape
            for node in root.below()
            if node.leaf is not None and "/".join(node.path).startswith(f"{path}/" if path else "")
        ]
        if len({shape[axis] if axis < len(shape) else None for shape in shapes}) != 1:
            return False  # among them are stacks of which nothing is left
    return True


@st.composite
def groups(draw, tree, stacked):
    """Groups of paths, each of one array: of leaves of one shape, of holes, and of new places."""
    leaves = [leaf for leaf in grow(tree)[1] if leaf.path]
    shared = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2])) if leaves else 0):
        leaf = draw(st.sampled_from(leaves))
        first = leaf.path
        if shared and draw(st.booleans()):  # a path of both groups, which are one then
            first = draw(st.sampled_from(shared[0]))
            [leaf] = [node for node in grow(tree, shared=shared)[0].below() if node.path == first]
        shared.append([first])
        alike = [other.path for other in leaves if other.leaf.shape == leaf.leaf.shape]
        for _ in range(draw(st.integers(1, 3))):
            root = grow(tree, shared=shared)[0]
            inner = [node for node in root.below() if node.leaf is None]
            above = draw(st.sampled_from(inner)).path
            new = draw(st.lists(st.one_of(st.sampled_from(PLAIN), segments), max_size=2))
            path = draw(
                st.sampled_from([(*above, *new), (*above, *new), draw(st.sampled_from(alike))])
            )
            more = [*shared[:-1], [*shared[-1], path]]
            free = path and path not in shared[-1] and is_free(root, path, leaf.leaf.shape)
            if free and is_stacked(tree, stacked, more):
                shared = more
    return [group for group in shared if len(group) > 1]


def path_text(path):
    """A path as `lm.paths` shows it."""
    return "/".join([re.sub(r"[\\*{}\[\]]", r"\\\g<0>", segment) or "{}" for segment in path])


@st.composite
def told(draw, tree, stacked=()):
    """A tree with facts about it."""
    shared = draw(groups(tree, dict(stacked)))
    own = {node.path for node in known(tree).below()}
    given = draw(orders(grow(tree, shared=shared)[0], own))
    structure = lm.Structure(
        order={
            "/".join([draw(texts(Name((segment,)))) for segment in path]): names
            for path, names in given.items()
        },
        shared=[draw(st.permutations([path_text(path) for path in group])) for group in shared],
        stacked=dict(stacked),
    )
    return Case(tree, {"order": given, "shared": shared, "stacked": stacked}, structure)


# --- targets -------------------------------------------------------------------------------------


@st.composite
def counted(draw, root):
    """A target that counts the children of a node with an order, mostly."""
    nodes = [node for node in root.below() if node.order or node.layers] or [root]
    path, node, parts = draw(st.sampled_from(nodes)).path, root, []
    for segment in path:
        node = node.children[segment]
        position = draw(positions) if node.layers and draw(st.booleans()) else None
        parts.append(Name(draw(globs(segment)), position))
    names = node.order or [*node.children]
    place = draw(st.integers(0, max(len(names) - 1, 0)))
    position = draw(st.one_of(st.sampled_from([place, place, place - len(names)]), positions))
    numbers = [name for name in names if name != stem(name)]
    if numbers and draw(st.integers(0, 2)) == 0:
        base = stem(draw(st.sampled_from(numbers)))
        base = draw(st.sampled_from([base, base.removesuffix("_"), base.removesuffix("_")]))
        parts.append(Name(draw(globs(base)), position))
    elif parts and parts[-1].at is None and draw(st.booleans()):
        parts[-1] = Name(parts[-1].glob, position)
    else:
        parts.append(position)
    child = node.children.get(names[place]) if names else None
    while child and child.children and draw(st.booleans()):
        segment, child = draw(st.sampled_from([*child.children.items()]))
        parts.append(Name(draw(globs(segment))))
    if draw(st.integers(0, 5)) == 0:
        parts.insert(draw(st.integers(0, len(parts))), ...)
    return tuple(parts)


layers = st.sampled_from([None, 0, 1, -1, slice(1, None), slice(None, None, -2)])


@st.composite
def targets(draw, root, group):
    """A target of whole arrays, as the interpreter reads it and as the package does."""
    kinds = ["other", "path", "path", "all", *["often"] * 5, *["counted"] * 3, "any", "any"]
    kind = draw(st.sampled_from(kinds))
    if kind == "other":
        target = draw(others)
        return target, target
    if kind == "path":  # some paths of one array, and nothing else
        some = draw(st.lists(st.sampled_from(group), min_size=1, max_size=2))
        target = re.compile("|".join([re.escape("/".join(path)) for path in some]))
        return target, target
    target = (...,)
    if kind == "often":
        node, names = root, []
        for segment in draw(st.sampled_from(group)):
            node = node.children[segment]
            position = draw(layers) if node.layers else None
            names.append(Name((segment,), position))
        target = tuple(names[:-1] if len(names) > 1 and draw(st.booleans()) else names) or target
    elif kind == "counted":
        target = draw(counted(root))
    elif kind == "any":
        target = draw(structures(root))
    return target, draw(rendered(target))


@st.composite
def parts(draw, case, leaves, target, written):
    """A part of what a target selects."""
    found = [leaves[path].leaf.shape for path in select(target, case.root, leaves).masks]
    shape = draw(st.sampled_from(found or [(2, 3)]))
    rank = len(shape)
    axis = draw(st.integers(-rank, rank - 1)) if rank and draw(st.integers(0, 11)) else rank
    index, text = draw(indices(shape[axis] if axis < rank else 2))
    # What the output axis of an array is that has several names is nobody's to say.
    kind = draw(
        st.sampled_from(["along", "elements", "along" if case.facts["shared"] else "neurons"])
    )
    if kind == "elements":
        mask = draw(masks(shape))
        return Elements(target, mask), lm.elements(written, mask)
    if kind == "neurons":
        return Neurons(target, index, axis), lm.neurons(written, text, axis=axis)
    if axis == 0 and draw(st.booleans()):
        return Along(target, axis, index), lm.rows(written, text)
    return Along(target, axis, index), lm.along(written, axis, text)


@st.composite
def rule_lists(draw, case, *, with_parts=False):
    """Rules as the interpreter reads them, and as the package does."""
    root = case.root
    leaves = {node.path: node for node in root.below() if node.leaf is not None}
    # Rules meet at one array, by all of its paths.
    group = {draw(st.sampled_from([*leaves] or [()]))}
    if case.facts["shared"] and draw(st.integers(0, 3)):
        group = draw(st.sampled_from(joined(case.facts["shared"])))
    structured, written = [], []
    for _ in range(draw(st.integers(2, 4))):
        multiplier, optional = draw(multipliers), draw(st.integers(0, 4)) == 0
        target, text = draw(targets(root, sorted(group)))
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2])) if with_parts else 0):
            target, text = draw(parts(case, leaves, target, text))
        structured.append((target, multiplier, optional))
        written += lm.optional([(text, multiplier)]) if optional else [(text, multiplier)]
    return structured, written


# --- properties ----------------------------------------------------------------------------------


def check_list(structured, written, case):
    claims, verdicts = interpret(structured, case.tree, **case.facts)
    raised, plan = outcome(written, case, strict=True)
    assert raised in errors(verdicts)
    if plan:
        check(plan, structured, claims, case)
        return
    passed = ("unmatched", "shadowed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised, plan = outcome(written, case, strict=False)
    assert raised in errors(verdicts, passed)
    if plan:
        check(plan, structured, claims, case)
        least = sum(verdict <= {*passed} for verdict in verdicts)
        assert least <= len(caught) <= sum(bool(verdict & {*passed}) for verdict in verdicts)


def outcome(rules, case, *, strict):
    """The kind of error that the package raises, or "ok" and its plan."""
    try:
        plan = lm.compile_rules(rules, case.tree, structure=case.structure, strict=strict)
    except tuple(ERRORS.values()) as error:
        # A range error is a position error too: the more special class comes last in ERRORS.
        return [kind for kind, known in ERRORS.items() if isinstance(error, known)][-1], None
    return "ok", plan


def check(plan, structured, claims, case):
    check_plan(plan, structured, claims, case.tree)
    ties = {path: group - {path} for group in joined(case.facts["shared"]) for path in group}
    for leaf, record in zip(grow(case.tree)[1], plan.leaves, strict=True):
        assert sorted(record.aliases) == sorted(map(path_text, ties.get(leaf.path, ())))


def check_all(structured, written, case):
    check_list(structured, written, case)
    for rule, text in zip(structured, written, strict=True):
        check_list([rule], [text], case)


leaves = st.sampled_from([(2,), (3,), (2, 3)]).map(np.zeros)
level = st.one_of(leaves, leaves, leaves, leaves, st.none())
for _ in range(2):
    level = st.one_of(
        level,
        st.dictionaries(st.sampled_from(PLAIN), level, min_size=2, max_size=4),
        families(level),
        st.lists(level, min_size=1, max_size=3),
    )


@cases(400)
@given(st.one_of(level, trees), st.data())
def test_facts_agree_with_the_interpreter(tree, data):
    known(tree)
    case = data.draw(told(tree))
    check_all(*data.draw(rule_lists(case)), case)


@st.composite
def stacks(draw):
    """Stacks beside other arrays, all of few shapes, so that many of them may be one array."""
    arrays = st.sampled_from([(2,), (2, 2)]).map(np.zeros)
    short = st.sampled_from(["w", "b_0", "b_1"])
    nodes = st.dictionaries(short, arrays, min_size=1, max_size=2)
    nodes = st.one_of(nodes, st.dictionaries(short, nodes | arrays, min_size=1, max_size=2))
    stacked = draw(st.sampled_from([{"a": 0}, {"a": 0, "b": 0}, {"c": 1}]))
    tree = {name: with_axis(draw(nodes), axis, 2) for name, axis in stacked.items()}
    return tree | {name: draw(nodes | arrays) for name in ["d", "e"]}, stacked


@cases(600)
@given(st.one_of(stacked_trees(), stacks(), stacks(), stacks()), st.data())
def test_facts_and_parts_agree_with_the_interpreter(stacked_tree, data):
    assume(is_stacked(*stacked_tree, shared=()))
    case = data.draw(told(*stacked_tree))
    check_all(*data.draw(rule_lists(case, with_parts=True)), case)


@cases(25)
@given(st.one_of(level, trees), st.data())
def test_every_position_in_an_order_agrees_with_the_interpreter(tree, data):
    known(tree)
    case = data.draw(told(tree))
    nodes = [node for node in case.root.below() if node.order]
    assume(nodes)
    node = data.draw(st.sampled_from(nodes))
    above = tuple(Name((segment,)) for segment in node.path)
    bases = {stem(name) for name in node.order if name != stem(name)}
    bases |= {name.removesuffix("_") for name in bases}
    ways = [(above, None), (above[:-1], node.path[-1] if above else None)]
    above, name = data.draw(st.sampled_from([*ways, *((above, base) for base in sorted(bases))]))
    for position in EVERY_POSITION:
        target = (*above, position if name is None else Name((name,), position))
        text = data.draw(rendered(target))
        check_list([(target, None, False)], [(text, None)], case)


@cases(100)
@given(level, st.data())
def test_an_order_names_all_that_is_no_array(tree, data):
    nodes = [node for node in grow(tree)[0].below() if node.children]
    assume(nodes)
    node = data.draw(st.sampled_from(nodes))
    left_out = data.draw(st.sampled_from([*node.children]))
    names = [name for name in ["relu", *node.children] if name != left_out]
    structure = lm.Structure(order={path_text(node.path): data.draw(st.permutations(names))})
    if node.children[left_out].children:
        with pytest.raises(lm.RuleError, match=re.escape(repr(left_out))):
            lm.compile_rules([], tree, structure=structure)
    else:
        lm.compile_rules([], tree, structure=structure)
