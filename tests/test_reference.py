"""The package against a naive interpreter, on generated trees and rules."""

import itertools
import math
import os
import re
import warnings

import jax
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lrmult as lm
from tests.reference import STAR, Name, RefusedError, dense, errors, grow, interpret, numbered

# HYPOTHESIS_PROFILE=explore tries other cases at every run, and twenty times as many.
EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"

ERRORS = {
    "unmatched": lm.UnmatchedRuleError,
    "shadowed": lm.ShadowedRuleError,
    "position": lm.PositionError,
    "range": lm.IndexRangeError,
    "axis": lm.AxisError,
    "mask": lm.MaskError,
}


def cases(count):
    return settings(
        max_examples=count * 10 if EXPLORE else count // 2,
        deadline=None,
        derandomize=not EXPLORE,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# --- trees ---------------------------------------------------------------------------------------

PLAIN = ["a", "b", "w", "bias", "a_0", "a_1", "a_2", "a0", "a1", "b_1", "b_10", "0", "1", "10"]
ODD = [
    "",
    "*",
    "**",
    "a*",
    "{a,b}",
    "a[0]",
    "[0]",
    "\\",
    "a\\",
    "a,b",
    "a b",
    "é",
    "...",
    "-1",
    "]",
]
ODD += ["a_", "_", "1a", "a}", "日本", "?", "a_01", "01", "a²", "a٣"]
SPLIT = ["a/b", "b/a", "a/b/w", "a/~/a_1", "a/0", "a/*", "a/"]
names = st.sampled_from(PLAIN * 3 + ODD + SPLIT)
segments = st.sampled_from(PLAIN + ODD)
stems = st.sampled_from(["a_", "b_", "a", "b", "Dense_", "*_", ""])
leaves = st.sampled_from([(2,), (3,), (2, 3), (), (0,)]).map(np.zeros)


@st.composite
def families(draw, children):
    """Children numbered from 0 or from 1, with numbers missing or not, in Haiku's way or not."""
    stem = draw(stems)
    numbers = draw(
        st.sampled_from(
            [[0, 1], [0, 1, 2], [1, 2], [1, 2, 3], [0, 2], [0, 1, 10], [1, 3], [2], [1]]
        )
    )
    tree = {f"{stem}{number}": draw(children) for number in numbers}
    if draw(st.booleans()):
        # The bare name, the same name numbered in the other way, or another name.
        name = stem.rstrip("_")
        other = f"{name}1" if stem != name else f"{name}_1"
        tree[draw(st.sampled_from([name, name, other, "bias"]))] = draw(children)
    return tree


def containers(children):
    return st.one_of(
        st.dictionaries(names, children, min_size=1, max_size=4),
        st.lists(children, min_size=1, max_size=4),
        families(children),
        families(children),
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from([0, 1, 2, 3, 10]), children, min_size=1, max_size=4),
    )


# Depth is bounded by hand, as `st.recursive` makes mostly small trees.
level = st.one_of(leaves, leaves, leaves, leaves, st.none())
for _ in range(3):
    level = st.one_of(level, containers(level), containers(level))
trees = st.one_of(containers(level), containers(level), containers(level), level)


# --- targets -------------------------------------------------------------------------------------

spans = st.builds(
    slice,
    st.sampled_from([None, None, 0, 1, 2, -1, -2]),
    st.sampled_from([None, None, 0, 1, 2, 3, 11, -1, -2]),
    st.sampled_from([None, None, None, 1, 2, -1, -2]),
)
positions = st.one_of(st.sampled_from([0, 1, 2, -1, -2, 10]), spans)


@st.composite
def globs(draw, text):
    """A glob that fits the text, mostly."""
    kind = draw(st.sampled_from(["literal", "literal", "star", "braces", "both", "other"]))
    if kind == "literal":
        return (text,)
    if kind == "other":
        return (draw(segments),)
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, len(text)))
    before, middle, after = text[:start], text[start:end], text[end:]
    if kind == "star":
        return (before, STAR, after)
    other = draw(st.sampled_from(["", "a", "b", "_1", "0", ","]))
    options = [(middle,), (other,)]
    if kind == "both":
        options = [([(middle,), (other, "x")],), (other, STAR), ()]
    return (before, draw(st.permutations(options)), after)


@st.composite
def structures(draw, root):
    """A structured target that matches something, mostly."""
    path = draw(st.sampled_from(root.below())).path
    node, parts = root, []
    if node.layers and draw(st.booleans()):
        parts.append(draw(positions))
    while path:
        segment, path = path[0], path[1:]
        node = node.children[segment]
        number = re.search("[0-9]*$", segment)[0]
        kinds = ["name", "name", "name", "deep", "skip"]
        kinds += ["family", "family", "at"] * bool(number) + ["index", "index"] * bool(path)
        kinds += ["layer"] * 15 * bool(node.layers)
        kind = draw(st.sampled_from(kinds))
        if kind == "name":
            parts.append(Name(draw(globs(segment))))
        elif kind == "deep":
            parts += [..., Name(draw(globs(segment)))]
        elif kind == "skip":
            parts.append(...)
        elif kind == "layer":
            part = Name(draw(globs(segment)), draw(positions))
            parts += draw(st.sampled_from([[part], [part], [..., part], [..., part.at]]))
        elif kind == "at":
            parts.append(draw(st.one_of(st.just(int(number[-2:])), positions)))
        elif kind == "family":
            stem = segment.removesuffix(number)
            stem = draw(st.sampled_from([stem, stem.removesuffix("_"), stem.removesuffix("_")]))
            position = draw(st.one_of(st.just(int(number[-2:])), positions))
            parts.append(Name(draw(globs(stem)), position))
        else:
            parts.append(Name(draw(globs(segment)), draw(positions)))
            node, path = node.children[path[0]], path[1:]
    if draw(st.integers(0, 9)) == 0:
        parts.append(draw(st.one_of(positions, st.just(...), segments.map(lambda s: Name((s,))))))
    return tuple(parts) or (...,)


def is_literal(part):
    return not isinstance(part, Name) or all(isinstance(piece, str) for piece in part.glob)


@st.composite
def rendered(draw, parts):
    """One of the ways to write a structured target."""
    ways = ["text"]
    literal = all(is_literal(part) for part in parts)
    if literal and all("".join(p.glob) for p in parts if isinstance(p, Name)):
        # In a tuple, a position right after a name is that of the name: ("a", 0) is "a[0]".
        pairs = itertools.pairwise(parts)
        if not any(isinstance(a, Name) and a.at is None and is_position(b) for a, b in pairs):
            ways.append("tuple")
    if len(parts) == 1 and not isinstance(parts[0], Name):
        ways.append("bare")
    way = draw(st.sampled_from(ways))
    if way == "bare":
        return parts[0]
    if way == "tuple":
        return draw(tuples(parts))
    return "/".join([draw(texts(part)) for part in parts])


def is_position(part):
    return isinstance(part, int | slice)


@st.composite
def tuples(draw, parts):
    items = []
    for part in parts:
        if not isinstance(part, Name):
            items.append(part)
            continue
        name = "".join(part.glob)
        if items and isinstance(items[-1], str) and draw(st.booleans()):
            items[-1] += "/" + name
        else:
            items.append(name)
        if part.at is not None:
            items.append(part.at)
    return tuple(items)


@st.composite
def texts(draw, part):
    if part is ...:
        return "**"
    if is_position(part):
        return draw(brackets(part))
    text = draw(glob_texts(part.glob, inside=False)) or "{}"
    return text if part.at is None else text + draw(brackets(part.at))


@st.composite
def brackets(draw, position):
    if isinstance(position, int):
        return f"[{position}]"
    start, stop, step = (
        "" if v is None else str(v) for v in (position.start, position.stop, position.step)
    )
    colon = step or draw(st.booleans())
    return f"[{start}:{stop}:{step}]" if colon else f"[{start}:{stop}]"


@st.composite
def glob_texts(draw, glob, inside):
    text = ""
    for piece in glob:
        if piece is STAR:
            text += "*"
        elif isinstance(piece, str):
            for character in piece:
                special = character in "*{}[]\\" or (inside and character == ",")
                text += "\\" * (special or draw(st.integers(0, 15)) == 0) + character
        else:
            options = [draw(glob_texts(option, inside=True)) for option in piece]
            text += "{" + ",".join(options) + "}"
    return text


EXPRESSIONS = [".*", ".*a.*", "a.*", ".*/w", "[^/]*/[^/]*", r".*\*.*", r".*\\.*", "b/a|a/b", ".*é"]
PREDICATES = [
    lambda path, leaf: "a" in path,
    lambda path, leaf: path.count("/") == 1,
    lambda path, leaf: len(leaf.shape) == 2,
    lambda path, leaf: leaf.shape == (2,),
]
others = st.one_of(st.sampled_from(EXPRESSIONS).map(re.compile), st.sampled_from(PREDICATES))
multipliers = st.sampled_from([None, 0, 0.0, -0.0, 1, 2, 0.5, -1, -0.25, 1e-3, 10**9])


@st.composite
def rule_lists(draw, root, max_size=4):
    """Rules as the interpreter reads them, and as the package does."""
    structured, written = [], []
    for _ in range(draw(st.integers(1, max_size))):
        multiplier, optional = draw(multipliers), draw(st.integers(0, 4)) == 0
        kind = draw(st.integers(0, 9))
        if kind == 0:
            target = text = draw(others)
        elif kind == 2 and structured and isinstance(structured[-1][0], tuple):
            target = structured[-1][0]  # for once a rule that can never apply
            text = draw(rendered(target))
        else:
            target = (...,) if kind == 1 else draw(structures(root))
            text = draw(rendered(target))
        structured.append((target, multiplier, optional))
        written += lm.optional([(text, multiplier)]) if optional else [(text, multiplier)]
    return structured, written


# --- properties ----------------------------------------------------------------------------------


def known(tree):
    """The nodes of a tree that the package must not refuse."""
    try:
        return grow(tree)[0]
    except RefusedError:
        assume(False)


@cases(1200)
@given(trees, st.data())
def test_compile_rules_agrees_with_the_interpreter(tree, data):
    structured, written = data.draw(rule_lists(known(tree)))
    check_list(structured, written, tree)
    for rule, text in zip(structured, written, strict=True):
        check_list([rule], [text], tree)


def check_list(structured, written, tree, stacked=(), check=None):
    claims, verdicts = interpret(structured, tree, stacked)
    check = check or check_plan
    raised, plan = outcome(written, tree, stacked, strict=True)
    assert raised in errors(verdicts)
    if plan:
        check(plan, structured, claims, tree)
        return
    passed = ("unmatched", "shadowed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised, plan = outcome(written, tree, stacked, strict=False)
    assert raised in errors(verdicts, passed)
    if plan:
        check(plan, structured, claims, tree)
        assert len(caught) == sum(verdict <= {*passed} for verdict in verdicts)


def outcome(rules, tree, stacked=(), *, strict):
    """The kind of error that the package raises, or "ok" and its plan."""
    options = {"structure": lm.Structure(stacked=stacked)} if stacked else {}
    try:
        return "ok", lm.compile_rules(rules, tree, strict=strict, **options)
    except lm.LrmultError as error:
        # A range error is a position error too: the more special class comes last in ERRORS.
        return [kind for kind, known in ERRORS.items() if isinstance(error, known)][-1], None


def check_plan(plan, structured, claims, tree):
    claims = [claim.item(0) for claim in claims]  # without parts a rule claims whole arrays
    expected = [float(dense(claim, [rule[1] or 0.0 for rule in structured])) for claim in claims]
    assert jax.tree.structure(plan.multipliers) == jax.tree.structure(tree)
    assert [repr(value) for value in jax.tree.leaves(plan.multipliers)] == [*map(repr, expected)]
    assert jax.tree.leaves(plan.frozen) == [value == 0 for value in expected]
    assert jax.tree.leaves(plan.trainable) == [value != 0 for value in expected]
    found = [[claim.index for claim in leaf.rules] for leaf in plan.leaves]
    assert found == [[] if claim == -1 else [claim] for claim in claims]


characters = st.sampled_from(["a", "b", "ab", "ba", ",", "*", "\\", "{", "\0", "\n"])


def free_globs(depth):
    pieces = st.one_of(characters, characters, st.just(STAR))
    if depth:
        pieces |= st.lists(free_globs(depth - 1), min_size=1, max_size=3)
    # Two stars side by side would be written as "**".
    return st.lists(pieces, max_size=4).map(
        lambda glob: tuple(piece for piece, _ in itertools.groupby(glob))
    )


def expansions(glob):
    """How many names the braces of a glob stand for; the package refuses more than 1000."""
    lists = [piece for piece in glob if isinstance(piece, list)]
    return math.prod(sum(map(expansions, options)) for options in lists)


@cases(250)
@given(
    st.lists(st.text("ab,*\\{\0\n", max_size=5), min_size=1, max_size=12, unique=True),
    st.lists(free_globs(2).filter(lambda g: expansions(g) <= 1000), min_size=1, max_size=4),
    st.data(),
)
def test_every_glob_agrees_with_the_interpreter(found, globs, data):
    tree = {name: np.zeros(2) for name in found}
    structured = [((Name(glob),), 2.0 + i, True) for i, glob in enumerate(globs)]
    written = [(data.draw(rendered(target)), value) for target, value, _ in structured]
    check_list(structured, lm.optional(written), tree)
    for rule, text in zip(structured, written, strict=True):
        check_list([rule], lm.optional([text]), tree)


EVERY_POSITION = [*range(-3, 4), 10, -11]
EVERY_POSITION += [
    slice(start, stop, step)
    for start in (None, 0, 1, -1)
    for stop in (None, 0, 2, 11, -1)
    for step in (None, 2, -1)
]


def twice(text):
    return [*lm.optional([(text, None)]), (text, 2)]


@cases(25)
@given(trees, st.data())
def test_every_position_agrees_with_the_interpreter(tree, data):
    root = known(tree)
    parents = [node for node in root.below() if node.children] or [root]
    path = data.draw(st.sampled_from(parents)).path
    parts = tuple(Name((segment,)) for segment in path)
    targets = [(*parts, position) for position in EVERY_POSITION]
    if path:
        name = data.draw(st.sampled_from([path[-1], re.sub("_?[0-9]+$", "", path[-1])]))
        targets += [(*parts[:-1], Name((name,), position)) for position in EVERY_POSITION]
    else:
        targets += [(..., position) for position in EVERY_POSITION]
    for target in targets:
        text = data.draw(rendered(target))
        check_list([(target, None, False)], [(text, None)], tree)
        check_list([(target, None, True), (target, 2, False)], twice(text), tree)


# --- paths ---------------------------------------------------------------------------------------


@cases(300)
@given(trees)
def test_a_path_as_a_target_selects_its_leaf_alone(tree):
    known(tree)
    paths = lm.paths(tree)
    assert len(paths) == len(set(paths)) == len(jax.tree.leaves(tree))
    assume(paths != [""])  # a bare array has no path
    together = lm.compile_rules([(path, i + 2) for i, path in enumerate(paths)], tree)
    assert jax.tree.leaves(together.multipliers) == [i + 2 for i in range(len(paths))]
    for i, path in enumerate(paths):
        plan = lm.compile_rules([(path, None)], tree)
        assert jax.tree.leaves(plan.frozen) == [j == i for j in range(len(paths))]
        assert [leaf.path for leaf in plan.leaves] == paths


@cases(300)
@given(trees)
def test_a_tuple_of_segments_selects_its_leaf_alone(tree):
    known(tree)
    leaves = grow(tree)[1]
    for i, leaf in enumerate(leaves):
        if leaf.path and "" not in leaf.path:
            plan = lm.compile_rules([(leaf.path, None)], tree)
            assert jax.tree.leaves(plan.frozen) == [j == i for j in range(len(leaves))]


clashing = st.recursive(
    st.one_of(leaves, st.none()),
    lambda children: st.one_of(
        st.dictionaries(
            st.sampled_from(["a", "b", "a/b", "b/a", "a/0", "a/b/a"]), children, min_size=1
        ),
        st.lists(children, min_size=1, max_size=2),
    ),
    max_leaves=6,
)


@cases(400)
@given(clashing)
def test_exactly_the_trees_with_clashing_paths_are_refused(tree):
    try:
        leaves = grow(tree)[1]
    except RefusedError:
        for refuse in (lm.paths, lambda tree: lm.compile_rules([], tree)):
            with pytest.raises(lm.RuleError):
                refuse(tree)
    else:
        assert lm.paths(tree) == ["/".join(leaf.path) for leaf in leaves]


# --- laws ----------------------------------------------------------------------------------------


@st.composite
def compiled_lists(draw):
    """A tree and a list of rules that can be compiled for it."""
    tree = draw(trees)
    rules = lm.optional(draw(rule_lists(known(tree)))[1])
    return tree, [rule for rule in rules if outcome([rule], tree, strict=True)[1]]


def answers(rules, tree):
    """The multiplier per path, or None where no rule claims."""
    leaves = lm.compile_rules(rules, tree).leaves
    return {leaf.path: leaf.multiplier if leaf.rules else None for leaf in leaves}


@cases(150)
@given(compiled_lists(), st.integers(0, 4))
def test_what_is_added_is_overridden(case, cut):
    tree, rules = case
    first, second = lm.Rules(rules[:cut]), lm.Rules(rules[cut:])
    assert first + second == lm.Rules(rules) == rules[:cut] + second == first + rules[cut:]
    over, under = answers(first, tree), answers(second, tree)
    expected = {path: under[path] if over[path] is None else over[path] for path in over}
    assert answers(first + second, tree) == expected


@cases(150)
@given(compiled_lists())
def test_a_mapping_is_the_list_of_its_items(case):
    tree, rules = case
    mapping = {}
    for rule in rules:
        if "slice" not in repr(rule.target):  # not to be hashed before Python 3.12
            mapping.setdefault(rule.target, rule.multiplier)
    items = list(mapping.items())
    assert lm.Rules(mapping) == lm.Rules(items)
    assert answers(lm.optional(mapping), tree) == answers(lm.optional(items), tree)


def rebuilt(tree, change):
    """The tree with its containers changed, from below."""
    if isinstance(tree, dict):
        tree = {key: rebuilt(child, change) for key, child in tree.items()}
    elif isinstance(tree, list | tuple):
        tree = type(tree)(rebuilt(child, change) for child in tree)
    return change(tree)


def as_reversed(tree):
    return dict(reversed(tree.items())) if isinstance(tree, dict) else tree


def as_mapping(tree):
    return dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree


def as_list(tree):
    ordered = isinstance(tree, dict) and tree and set(tree) == set(range(len(tree)))
    return [tree[number] for number in range(len(tree))] if ordered else tree


def flat(tree):
    """One dict with joined keys, as Haiku has it."""
    holes = [node for node in grow(tree)[0].below() if node.hole or node.leaf is not None]
    return {"/".join(node.path): node.leaf for node in holes}


@cases(150)
@given(compiled_lists())
def test_the_kind_and_order_of_containers_do_not_matter(case):
    tree, rules = case
    expected = answers(rules, tree)
    for same in (
        jax.tree.map(lambda leaf: leaf, tree),
        jax.eval_shape(lambda tree: tree, tree),
        rebuilt(tree, as_reversed),
        rebuilt(tree, as_mapping),
        rebuilt(tree, as_list),
        flat(tree) if isinstance(tree, dict | list | tuple) else tree,
    ):
        assert answers(rules, same) == expected
    traced = []
    jax.eval_shape(lambda tree: traced.append(answers(rules, tree)), tree)
    assert traced == [expected]


def holed(tree, is_hole):
    """The tree with None for what is picked at random, as a mask or a partition leaves it."""
    if is_hole():
        return None
    if isinstance(tree, dict):
        return {key: holed(child, is_hole) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(holed(child, is_hole) for child in tree)
    return tree


def is_none(leaf):
    return leaf is None


@cases(300)
@given(compiled_lists(), st.data())
def test_what_is_left_of_a_tree_gets_what_it_got_in_the_whole(case, data):
    tree, rules = case
    strict = []
    for target, multiplier in rules:
        rule = (target, multiplier)
        strict += [rule] * bool(outcome([*strict, rule], tree, strict=True)[1])
    expected = answers(strict, tree)
    part = holed(tree, lambda: data.draw(st.integers(0, 3)) == 0)
    for node in known(part).below():
        for name, child in node.children.items():
            # Which of the two `name[0]` means is up to the children of `name`: here unknown.
            assume(not (child.hole and (numbered(node, name) or numbered(node, name + "_"))))
    masked = jax.tree.map(
        lambda leaf: optax.MaskedNode() if leaf is None else leaf, part, is_leaf=is_none
    )
    for left in (part, masked):
        assert answers(strict, left).items() <= expected.items()


# --- text ----------------------------------------------------------------------------------------


@cases(1500)
@given(st.text("ab*{}[]\\/,:-01.", max_size=10))
def test_any_text_is_read_or_refused(text):
    tree = {"a": [np.zeros(2), {"b": np.zeros(3)}], "b_0": np.zeros(2), "b_1": np.zeros(2)}
    try:
        rules = lm.Rules([(text, 2)])
    except lm.PatternError:
        return
    try:
        lm.compile_rules(rules, tree)
    except (lm.UnmatchedRuleError, lm.PositionError):
        return
