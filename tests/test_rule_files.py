"""Rules as data and in files: they come back as they were, and what is no rule is an error."""

import atexit
import base64
import copy
import dataclasses
import functools
import inspect
import json
import pathlib
import pickle
import re
import shutil
import sys
import tempfile
import tomllib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tomli_w
import yaml
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lrmult as lm
from lrmult import recipes
from tests.test_reference import cases, known
from tests.test_reference import rule_lists as whole_rule_lists
from tests.test_reference import trees as whole_trees
from tests.test_reference_parts import rule_lists, stacked_trees

WRITERS = {
    "json": functools.partial(json.dumps, allow_nan=False),
    "yaml": yaml.safe_dump,
    "toml": tomli_w.dumps,
}


@functools.cache
def folder():
    made = tempfile.mkdtemp(prefix="lrmult-rules-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return pathlib.Path(made)


def write(text, suffix):
    file = folder() / f"rules.{suffix}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def load(text, suffix="json", *args, **options):
    return lm.load_rules(write(text, suffix), *args, **options)


# ---- rules of every kind ------------------------------------------------------------------------

ODD = "\\*{}[],:#&!|>%@`'\"-?~=.() \t\n\r\0\x1b\x7f\x85\u2028\ufeffé日😀"
WORDS = ["encoder", "w", "0", "12", "-1", "1:30", "1e-3", "null", "true", "no", "~", "frozen"]
WORDS += ["...", "", "<<", "2020-01-01", ".inf", "0x1f", "1_000", "path", "target", " ", "日本"]
names = st.one_of(
    st.sampled_from([word for word in WORDS if word]),
    st.text(st.sampled_from(ODD), min_size=1, max_size=4),
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=4
    ),
)
steps = st.sampled_from([None, None, 1, -1, 2, -3, 10**9])
ends = st.one_of(st.none(), st.integers(-9, 9), st.sampled_from([0, 2**31, -(2**40), 10**17]))
spans = st.builds(slice, ends, ends, steps)
ints = st.one_of(st.integers(-9, 9), st.sampled_from([2**31, -(2**40), 10**17]))


def bracketed(position):
    if isinstance(position, int):
        return f"[{position}]"
    found = [position.start, position.stop, position.step]
    return f"[{':'.join('' if end is None else str(end) for end in found)}]"


escaped = names.map(lambda name: re.sub(r"[\\*{}\[\],]", r"\\\g<0>", name))
segments = st.one_of(
    escaped,
    escaped,
    st.sampled_from(["**", "*", "{a,b}*", "b{,c}", "{}", "x[0][-1]", r"\{a\,b\}"]),
    st.builds(lambda name, position: name + bracketed(position), escaped, st.one_of(ints, spans)),
)
texts = st.lists(segments, min_size=1, max_size=3).map("/".join)
regexes = st.builds(
    lambda pattern, flags: re.compile(pattern, functools.reduce(lambda a, b: a | b, flags, 0)),
    st.sampled_from(["", ".*", "a/.*", r"(?i)a", r"(?x) a # b", r"\w+é\\", "日|\n", '"', "[^/]*"]),
    st.lists(st.sampled_from([re.ASCII, re.IGNORECASE, re.MULTILINE, re.DOTALL, re.VERBOSE])),
)
tuples = st.lists(
    st.one_of(names, names, st.just("a/b"), ints, ints.map(np.int64), spans, st.just(...)),
    min_size=1,
    max_size=4,
).map(tuple)
STATE = nnx.State({"a": {"b": nnx.Param(np.ones(2)), 0: nnx.BatchStat(np.ones(2))}})
typed = st.sampled_from([nnx.Param, nnx.BatchStat, (nnx.Param, nnx.BatchStat), nnx.LoRAParam])
wholes = st.one_of(
    texts,
    texts,
    texts.map(np.str_),
    tuples,
    ints,
    ints.map(np.int64),
    spans,
    st.builds(lambda stop: slice(np.int32(1), np.int64(stop)), st.integers(-9, 9)),
    regexes,
    st.just(...),
    typed.map(lambda kind: lm.of_type(STATE, kind)),
)
places = st.lists(st.integers(-99, 99), max_size=4)
bools = st.lists(st.booleans(), min_size=1, max_size=17)
indices = st.one_of(
    ints,
    spans,
    places,
    places.map(tuple),
    places.map(lambda found: np.array(found, np.int16)),
    st.integers(0, 20).map(range),
    bools,
    bools.map(np.array),
    bools.map(tuple),
    st.integers(-9, 9).map(np.int32),
)


@st.composite
def masks(draw):
    shape = draw(st.sampled_from([(), (0,), (3,), (17,), (0, 3), (2, 0), (4, 5), (3, 2, 9)]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    if draw(st.booleans()):
        return np.array(random.random(shape) < share)
    mask = np.ones(shape, bool)  # an outer product
    for axis, size in enumerate(shape):
        vector = random.random(size) < share
        mask &= np.expand_dims(vector, [*range(axis), *range(axis + 1, len(shape))])
    return mask


def parts(inner):
    axes = st.integers(-3, 3)
    return st.one_of(
        st.builds(lm.rows, inner, indices),
        st.builds(lm.along, inner, st.one_of(axes, axes.map(np.int8)), indices),
        st.builds(lm.neurons, inner, indices, axis=st.one_of(st.none(), axes)),
        st.builds(lm.elements, inner, masks()),
    )


targets = wholes
for _ in range(3):
    targets = st.one_of(targets, parts(targets))

numbers = st.floats(allow_nan=False, allow_infinity=False)
EXTREME = [5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1e-3, 1e22]


@st.composite
def durings(draw):
    start = draw(st.sampled_from([0, 1, 100, 2**31 - 2, np.int64(7)]))
    stop = draw(st.one_of(st.none(), st.integers(int(start) + 1, 2**31 - 1)))
    return lm.During(draw(numbers.filter(bool)), start=start, stop=stop)


multipliers = st.one_of(
    st.none(),
    numbers,
    st.sampled_from(EXTREME),
    st.integers(-(10**30), 10**30),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
    durings(),
)


@st.composite
def lists_of_rules(draw):
    pairs = draw(st.lists(st.tuples(targets, multipliers, st.booleans()), max_size=4))
    return lm.Rules([lm.Rule(*pair[:2], optional=pair[2]) for pair in pairs])


def assert_same(again, rules):
    assert again == rules
    assert hash(again) == hash(rules)
    assert repr(again) == repr(rules)
    assert [rule.optional for rule in again] == [rule.optional for rule in rules]
    assert again.to_dict() == rules.to_dict()


def assert_plain(data):
    """Of the types that all of the formats know, and of no subclass of them."""
    assert type(data) in (dict, list, str, int, float, bool), type(data)
    if type(data) is dict:
        assert all(type(key) is str for key in data)
    for each in data.values() if type(data) is dict else data if type(data) is list else ():
        assert_plain(each)


@cases(200)
@given(lists_of_rules())
def test_rules_come_back_as_they_were(rules):
    data = rules.to_dict()
    assert_plain(data)
    assert_same(lm.Rules.from_dict(data), rules)
    assert_same(lm.Rules.from_dict(data["rules"]), rules)


@cases(60)
@given(lists_of_rules())
def test_and_so_they_do_from_every_file(rules):
    for suffix, dumps in WRITERS.items():
        assert_same(load(dumps(rules.to_dict()), suffix), rules)


@cases(40)
@given(lists_of_rules())
def test_and_from_copies_and_pickles(rules):
    for again in (copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert_same(again, rules)


@cases(30)
@given(lists_of_rules())
def test_what_is_written_is_not_shared(rules):
    before, data = copy.deepcopy(rules.to_dict()), rules.to_dict()
    spoil(data)
    assert rules.to_dict() == before


def spoil(data):
    for each in [*data.values()] if isinstance(data, dict) else [*data]:
        if isinstance(each, dict | list):
            spoil(each)
    data.clear()


@cases(30)
@given(lists_of_rules())
def test_nothing_that_is_read_is_changed(rules):
    data = rules.to_dict()
    before = copy.deepcopy(data)
    lm.Rules.from_dict(data)
    assert data == before


def outcome(rules, tree, stacked):
    """The plan in full, or the error."""
    structure = lm.Structure(stacked=stacked) if stacked else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plan = lm.compile_rules(rules, tree, structure=structure)
        except lm.LrmultError as error:
            return type(error), str(error)
    dense = [
        np.asarray(m.dense() if isinstance(m, lm.Parts) else m).tolist()
        for m in jax.tree.leaves(plan.multipliers)
    ]
    return str(plan), dense, [leaf.rules for leaf in plan.leaves]


def can_be_written(rule):
    """Whether it is no predicate; an empty vector of bools comes back as an empty list of ints."""
    indices = [getattr(each, "index", None) for each in rule.restrictions]
    empty = any(len(getattr(index, "vector", "x")) == 0 for index in indices)
    return not callable(rule.selector) and not empty


def assert_means_the_same(written, tree, stacked=()):
    rules = lm.Rules([rule for rule in lm.Rules(written) if can_be_written(rule)])
    again = lm.Rules.from_dict(json.loads(json.dumps(rules.to_dict())))
    assert_same(again, rules)
    assert outcome(again, tree, stacked) == outcome(rules, tree, stacked)


@cases(60)
@given(stacked_trees(), st.data())
def test_rules_that_were_read_mean_the_same(case, data):
    tree, stacked = case
    assert_means_the_same(data.draw(rule_lists(tree, stacked))[1], tree, stacked)


@cases(60)
@given(whole_trees, st.data())
def test_and_so_do_those_of_odd_names(tree, data):
    assert_means_the_same(data.draw(whole_rule_lists(known(tree)))[1], tree)


# ---- how they are written -----------------------------------------------------------------------

EYE = np.eye(3, dtype=bool)
WRITTEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ("a/*[0]", {"target": "a/*[0]"}),
    "int": (-1, {"target": -1}),
    "slice": (slice(None, 4), {"target": {"slice": ":4"}}),
    "step": (slice(0, -2, 2), {"target": {"slice": "0:-2:2"}}),
    "tuple": (
        ("a", 0, ..., slice(1, None), "b"),
        {"target": {"path": ["a", 0, {"everything": True}, {"slice": "1:"}, "b"]}},
    ),
    "everything": (..., {"target": {"everything": True}}),
    "regex": (re.compile("a.*"), {"target": {"regex": "a.*"}}),
    "flags": (
        re.compile("a.*", re.I | re.S | re.A | re.M | re.X),
        {"target": {"regex": "a.*", "flags": "aimsx"}},
    ),
    "of_type": (
        lm.of_type(STATE, nnx.BatchStat),
        {"target": {"types": "of_type(BatchStat)", "paths": [["a", "0"]]}},
    ),
    "rows": (lm.rows("e", slice(-10, None)), {"target": "e", "rows": "-10:"}),
    "along": (lm.along("e", -1, [0, 2]), {"target": "e", "axis": -1, "index": [0, 2]}),
    "along the first axis": (lm.along("e", 0, 1), {"target": "e", "axis": 0, "index": 1}),
    "neurons": (lm.neurons("e", [True, False]), {"target": "e", "neurons": [True, False]}),
    "neurons with an axis": (lm.neurons("e", 0, 1), {"target": "e", "neurons": 0, "axis": 1}),
    "elements": (
        lm.elements("e", EYE),
        {"target": "e", "elements": {"shape": [3, 3], "bits": "iIA="}},
    ),
    "parts of parts": (
        lm.rows(lm.along(("e",), 1, 2), 0),
        {"target": {"target": {"path": ["e"]}, "axis": 1, "index": 2}, "rows": 0},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_how_a_target_is_written(name):
    target, table = WRITTEN[name]
    assert lm.Rules([(target, 2)]).to_dict() == {"rules": [table | {"multiplier": 2.0}]}


@pytest.mark.parametrize(
    ("multiplier", "written"),
    [
        (None, "frozen"),
        (0, "frozen"),
        (3, 3.0),
        (-1e-30, -1e-30),
        (lm.During(0.5), {"multiplier": 0.5, "start": 0}),
        (lm.During(2, 3, 7), {"multiplier": 2.0, "start": 3, "stop": 7}),
    ],
)
def test_how_a_multiplier_is_written(multiplier, written):
    [table] = lm.Rules([("a", multiplier)]).to_dict()["rules"]
    assert table == {"target": "a", "multiplier": written}
    assert type(table["multiplier"]) is type(written)


def test_how_optional_rules_are_written():
    rules = lm.Rules([("a", 1)]) + lm.optional([("b", 1)])
    assert [table.get("optional") for table in rules.to_dict()["rules"]] == [None, True]
    assert lm.Rules([]).to_dict() == {"rules": []}


# What people write by hand, and what it means.
BY_HAND = [
    ({"target": "a", "multiplier": 1}, ("a", 1)),
    ({"target": "a", "multiplier": None}, ("a", None)),
    ({"target": "a", "multiplier": 0}, ("a", None)),
    ({"target": "a", "multiplier": -0.0}, ("a", None)),
    ({"target": "a", "multiplier": {"start": 5}}, ("a", lm.During(1, 5))),
    ({"target": "a", "multiplier": {"multiplier": 2, "stop": 5}}, ("a", lm.During(2, 0, 5))),
    ({"target": "a", "multiplier": lm.During(2, 5)}, ("a", lm.During(2, 5))),
    ({"target": "a", "rows": 3, "multiplier": 1}, (lm.rows("a", 3), 1)),
    ({"target": "a", "rows": " 1 : 3 ", "multiplier": 1}, (lm.rows("a", slice(1, 3)), 1)),
    ({"target": "a", "rows": ":", "multiplier": 1}, (lm.rows("a", slice(None)), 1)),
    ({"target": "a", "rows": "::", "multiplier": 1}, (lm.rows("a", slice(None)), 1)),
    ({"target": "a", "rows": "::-1", "multiplier": 1}, (lm.rows("a", slice(None, None, -1)), 1)),
    ({"target": "a", "rows": (0, 1), "multiplier": 1}, (lm.rows("a", [0, 1]), 1)),
    ({"target": "a", "elements": EYE.tolist(), "multiplier": 1}, (lm.elements("a", EYE), 1)),
    ({"target": "a", "elements": True, "multiplier": 1}, (lm.elements("a", np.array(True)), 1)),
    ({"target": {"target": "a"}, "multiplier": 1}, ("a", 1)),
    ({"target": {"path": ("a", 0)}, "multiplier": 1}, (("a", 0), 1)),
    ({"target": "a", "optional": False, "multiplier": 1}, ("a", 1)),
    (lm.Rule("a", 1), ("a", 1)),
]


@pytest.mark.parametrize("number", range(len(BY_HAND)))
def test_what_is_written_by_hand(number):
    table, rule = BY_HAND[number]
    assert_same(lm.Rules.from_dict({"rules": [table]}), lm.Rules([rule]))
    assert_same(lm.Rules.from_dict((table,)), lm.Rules([rule]))


def test_a_mask_by_its_bits():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    bits = base64.b64encode(np.packbits(mask.ravel()).tobytes()).decode()
    table = {"target": "a", "elements": {"shape": [5, 7], "bits": bits}, "multiplier": None}
    rules = lm.Rules.from_dict([table])
    frozen = lm.compile_rules(rules, {"a": np.zeros((5, 7))}).frozen["a"]
    np.testing.assert_array_equal(frozen.dense(), mask)


TOML = """
# the trunk rests
[[rules]]
target = "encoder/layers[:4]"
multiplier = "frozen"
[[rules]]
target = "embed"
rows = "-10:"
multiplier = { multiplier = 0.5, start = 100 }
[[rules]]
target = { path = ["encoder", { everything = true }, "norm"] }
multiplier = 1e-3
optional = true
"""
YAML = """
rules:
  - {target: "encoder/layers[:4]", multiplier: null}
  - target: embed
    rows: "-10:"
    multiplier: {multiplier: 0.5, start: 100}
  - target: {path: [encoder, {everything: true}, norm]}
    multiplier: 1.0e-3
    optional: yes
"""
FILES = lm.Rules(
    [
        ("encoder/layers[:4]", None),
        (lm.rows("embed", slice(-10, None)), lm.During(0.5, start=100)),
    ]
) + lm.optional([(("encoder", ..., "norm"), 1e-3)])


def test_files_by_hand(tmp_path):
    assert_same(load(TOML, "toml"), FILES)
    assert_same(load(YAML, "yaml"), FILES)
    assert_same(load(YAML, "yml"), FILES)
    assert_same(load(TOML.replace("\n", "\r\n"), "toml"), FILES)
    (tmp_path / "é.json").write_text(json.dumps(FILES.to_dict()["rules"]))
    assert_same(lm.load_rules(str(tmp_path / "é.json")), FILES)
    assert_same(lm.load_rules(tmp_path / "é.json"), FILES)


@pytest.mark.parametrize("suffix", ["json", "yaml", "toml"])
def test_a_mark_of_the_byte_order_is_passed_over(suffix):
    text = WRITERS[suffix](FILES.to_dict())
    assert_same(load(b"\xef\xbb\xbf" + text.encode(), suffix), FILES)


@pytest.mark.parametrize("index", ["1:30", "10:59", "1:2:3", "-1:30", "1:00", "0:4", "-9:-5"])
@pytest.mark.parametrize("key", ["rows", "neurons"])
def test_a_slice_in_yaml_is_no_number(key, index):
    """YAML 1.1 has numbers to the base of 60: there 1:30 is 90."""
    ends = [int(end) if end else None for end in index.split(":")]
    target = {"rows": lm.rows, "neurons": lm.neurons}[key]("a", slice(*ends))
    found = load(f"rules: [{{target: a, {key}: {index} , multiplier: 2}}]", "yaml")
    assert_same(found, lm.Rules([(target, 2)]))


# ---- what cannot be written ---------------------------------------------------------------------


def warm_up(step):
    return step / 10


class Warm:
    def __call__(self, step):
        return step / 10


UNWRITTEN = {
    "lambda": (("b", lambda step: 1.0), lm.MultiplierError, "During"),
    "function": (("b", warm_up), lm.MultiplierError, "During"),
    "optax": (("b", optax.linear_schedule(0.0, 1.0, 10)), lm.MultiplierError, "During"),
    "partial": (("b", functools.partial(pow, 2.0)), lm.MultiplierError, "During"),
    "object": (("b", Warm()), lm.MultiplierError, "During"),
    "array": (("b", jnp.float32(2.0)), lm.MultiplierError, "float(...)"),
    "predicate": ((lambda path, leaf: True, 1), lm.PatternError, "'**/bias'"),
    "partial predicate": (
        (functools.partial(lambda k, path, leaf: True, 1), 1),
        lm.PatternError,
        "regular expression",
    ),
    "part of a predicate": ((lm.rows(lambda path, leaf: True, 0), 1), lm.PatternError, "pattern"),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_is_no_data_is_named(name):
    rule, error, remedy = UNWRITTEN[name]
    with pytest.raises(error, match=r"^rule 1 \(.*\) cannot be written: ") as caught:
        lm.Rules([("a", 1), rule]).to_dict()
    assert remedy in str(caught.value)
    assert type(caught.value) is error
    assert " at 0x" not in str(caught.value)


def test_a_traced_multiplier_is_named():
    @jax.jit
    def write(value):
        lm.Rules([("a", value)]).to_dict()

    with pytest.raises(lm.MultiplierError, match=r"rule 0 \('a' -> run-time float32\[\]\)"):
        write(1.0)


# ---- what cannot be read ------------------------------------------------------------------------

RuleE, PatternE, MultiplierE = lm.RuleError, lm.PatternError, lm.MultiplierError
ONE = {"multiplier": 1}
LONG = "9" * 5000
MISTAKES: dict[str, tuple[Any, type[lm.LrmultError], tuple[str, ...]]] = {
    # keys
    "near target": ({"taget": "a", **ONE}, RuleE, ("'taget'", "did you mean 'target'?")),
    "near multiplier": ({"target": "a", "mutliplier": 1}, RuleE, ("did you mean 'multiplier'?",)),
    "near optional": ({"target": "a", **ONE, "optonal": True}, RuleE, ("'optional'",)),
    "near rows": ({"target": "a", **ONE, "row": 1}, RuleE, ("did you mean 'rows'?",)),
    "near start": (
        {"target": "a", "multiplier": {"strat": 1}},
        RuleE,
        ("multiplier has no 'strat'", "'start'"),
    ),
    "unlike": ({"target": "a", **ONE, "xyzzy": 1}, RuleE, ("'xyzzy'", "there are", "'rows'")),
    "keys of several types": ({"target": "a", **ONE, 1: 1, None: 2}, RuleE, ("rule has no 1",)),
    "no target": (ONE, RuleE, ("no 'target'", "'head'")),
    "no multiplier": ({"target": "a"}, RuleE, ("no 'multiplier'", "'multiplier': 10")),
    "nothing": ({}, RuleE, ("no 'target'",)),
    "a pair": (["a", 1], RuleE, ("no table",)),
    "text": ("a", RuleE, ("'a' is no table",)),
    "null": (None, RuleE, ("None is no table",)),
    "a class": (dict, RuleE, ("no table",)),
    # multipliers
    "true": ({"target": "a", "multiplier": True}, MultiplierE, ("True", "write 1")),
    "text for a number": (
        {"target": "a", "multiplier": "1e-3"},
        MultiplierE,
        ("'1e-3' is text", "write 0.001 without quotes", "1.0e-3"),
    ),
    "another word": ({"target": "a", "multiplier": "Frozen"}, MultiplierE, ("'frozen'",)),
    "a word": ({"target": "a", "multiplier": "None"}, MultiplierE, ("write a number, or",)),
    "nan as text": ({"target": "a", "multiplier": "nan"}, MultiplierE, ("no multiplier",)),
    "nan": ({"target": "a", "multiplier": float("nan")}, MultiplierE, ("not finite",)),
    "inf": ({"target": "a", "multiplier": -float("inf")}, MultiplierE, ("not finite",)),
    "huge": ({"target": "a", "multiplier": 10**400}, MultiplierE, ("too large",)),
    "a list": ({"target": "a", "multiplier": [1]}, MultiplierE, ("not [1]",)),
    "during 0": ({"target": "a", "multiplier": {"multiplier": 0}}, MultiplierE, ("During(0)",)),
    "during null": (
        {"target": "a", "multiplier": {"multiplier": None, "start": 1}},
        MultiplierE,
        ("multiplier is None",),
    ),
    "during huge": (
        {"target": "a", "multiplier": {"multiplier": 10**400}},
        MultiplierE,
        ("finite number",),
    ),
    "during text": ({"target": "a", "multiplier": {"start": "3"}}, MultiplierE, ("start is '3'",)),
    "during before 0": ({"target": "a", "multiplier": {"start": -1}}, MultiplierE, ("start is",)),
    "during half": ({"target": "a", "multiplier": {"stop": 1.5}}, MultiplierE, ("stop is 1.5",)),
    "over before it starts": (
        {"target": "a", "multiplier": {"start": 5, "stop": 5}},
        MultiplierE,
        ("over before",),
    ),
    # optional
    "optional text": ({"target": "a", **ONE, "optional": "yes"}, RuleE, ("'yes'", "true or false")),
    "optional 1": ({"target": "a", **ONE, "optional": 1}, RuleE, ("true or false",)),
    # targets
    "malformed": ({"target": "a[", **ONE}, PatternE, ("never closed",)),
    "empty": ({"target": "", **ONE}, PatternE, ("empty text",)),
    "target true": ({"target": True, **ONE}, PatternE, ("True is no target",)),
    "target null": ({"target": None, **ONE}, PatternE, ("None is no target",)),
    "target float": ({"target": 1.0, **ONE}, PatternE, ("1.0 is no target",)),
    "target list": ({"target": ["a"], **ONE}, PatternE, ("'path'",)),
    "everything false": ({"target": {"everything": False}, **ONE}, PatternE, ("no target",)),
    "unknown table": ({"target": {"glob": "*"}, **ONE}, PatternE, ("'regex'", "'slice'")),
    "two in one": ({"target": {"regex": "a", "path": ["a"]}, **ONE}, PatternE, ("is one of",)),
    "a table of no text": ({"target": {1: 2, "a": 3}, **ONE}, PatternE, ("no target",)),
    "path of nothing": ({"target": {"path": []}, **ONE}, PatternE, ("empty tuple",)),
    "path text": ({"target": {"path": "a/b"}, **ONE}, PatternE, ("no target",)),
    "path of tuples": ({"target": {"path": [{"path": ["a"]}]}, **ONE}, PatternE, ("('a',)",)),
    "path true": ({"target": {"path": [True]}, **ONE}, PatternE, ("True",)),
    "slice int": ({"target": {"slice": 3}, **ONE}, PatternE, ("no target",)),
    "slice word": ({"target": {"slice": "a:b"}, **ONE}, PatternE, ("'a:b' is no index",)),
    "slice of a dash": ({"target": {"slice": "-:"}, **ONE}, PatternE, ("'-:' is no index",)),
    "slice step 0": ({"target": {"slice": "::0"}, **ONE}, PatternE, ("step of 0",)),
    "slice of digits": ({"target": {"slice": f"{LONG}:"}, **ONE}, PatternE, ("no index",)),
    "regex": ({"target": {"regex": "("}, **ONE}, PatternE, ("'('", "unterminated")),
    "regex null": ({"target": {"regex": None}, **ONE}, PatternE, ("None",)),
    "regex list": ({"target": {"regex": ["a"]}, **ONE}, PatternE, ("['a']",)),
    "flags": ({"target": {"regex": "a", "flags": "iq"}, **ONE}, PatternE, ("'iq'", "aimsx")),
    "flags null": ({"target": {"regex": "a", "flags": None}, **ONE}, PatternE, ("aimsx",)),
    "flags that clash": (
        {"target": {"regex": "(?u)a", "flags": "a"}, **ONE},
        PatternE,
        ("incompatible",),
    ),
    "types of no list": ({"target": {"types": "T", "paths": [5]}, **ONE}, PatternE, ("no target",)),
    "types of text": ({"target": {"types": "T", "paths": ["a/b"]}, **ONE}, PatternE, ("a/b",)),
    "types of ints": ({"target": {"types": "T", "paths": [[1]]}, **ONE}, PatternE, ("no target",)),
    "types of no text": ({"target": {"types": 5, "paths": [["a"]]}, **ONE}, PatternE, ("5",)),
    # parts
    "two parts": (
        {"target": "a", "rows": 0, "neurons": 1, **ONE},
        RuleE,
        ("'neurons'", "'rows'", "a part of a part"),
    ),
    "axis alone": ({"target": "a", "axis": 0, **ONE}, RuleE, ("'axis' and 'index'",)),
    "index alone": ({"target": "a", "index": 0, **ONE}, RuleE, ("'axis' and 'index'",)),
    "rows along an axis": ({"target": "a", "rows": 0, "axis": 1, **ONE}, RuleE, ("'axis'",)),
    "elements of an axis": (
        {"target": "a", "elements": [True], "axis": 1, **ONE},
        RuleE,
        ("axis",),
    ),
    "part of a part, wrong": (
        {"target": {"target": "a", "rows": 0, "index": 1}, "rows": 0, **ONE},
        RuleE,
        ("'rows'", "'index'", "a part of a part"),
    ),
    "a table with more": ({"target": {"target": "a", **ONE}, **ONE}, RuleE, ("'multiplier'",)),
    "axis text": ({"target": "a", "axis": "0", "index": 0, **ONE}, lm.AxisError, ("'0'",)),
    "axis true": ({"target": "a", "axis": True, "index": 0, **ONE}, lm.AxisError, ("True",)),
    "rows word": ({"target": "a", "rows": "last", **ONE}, PatternE, ("'last' is no index",)),
    "rows number as text": ({"target": "a", "rows": "5", **ONE}, PatternE, ("'5' is no index",)),
    "rows of a dash": ({"target": "a", "rows": "1:-", **ONE}, PatternE, ("'1:-' is no index",)),
    "rows true": ({"target": "a", "rows": True, **ONE}, PatternE, ("True is no index",)),
    "rows float": ({"target": "a", "rows": 1.0, **ONE}, PatternE, ("1.0 is no index",)),
    "rows mixed": ({"target": "a", "rows": [0, True], **ONE}, PatternE, ("mixes",)),
    "rows of text": ({"target": "a", "rows": ["a"], **ONE}, PatternE, ("no index",)),
    "rows nested": ({"target": "a", "rows": [[0, 1]], **ONE}, PatternE, ("along one axis",)),
    "rows ragged": ({"target": "a", "rows": [[0, 1], [2]], **ONE}, PatternE, ("no index",)),
    "rows of bools nested": ({"target": "a", "rows": [[True]], **ONE}, lm.MaskError, ("elements",)),
    "rows of a table": ({"target": "a", "rows": {"slice": ":"}, **ONE}, PatternE, ("no index",)),
    # element masks
    "mask of ints": ({"target": "a", "elements": [[0, 1]], **ONE}, lm.MaskError, ("no mask",)),
    "mask ragged": ({"target": "a", "elements": [[True], []], **ONE}, lm.MaskError, ("no mask",)),
    "mask of text": ({"target": "a", "elements": "iIA=", **ONE}, lm.MaskError, ("no mask",)),
    "mask of no shape": (
        {"target": "a", "elements": {"bits": "iIA="}, **ONE},
        PatternE,
        ("shape",),
    ),
    "mask near": (
        {"target": "a", "elements": {"shpe": [1], "bits": "iIA="}, **ONE},
        RuleE,
        ("did you mean 'shape'?",),
    ),
}
SHAPES = {
    "cut": [3, 99],
    "too long": [3],
    "negative": [-1],
    "halves": [2.5, 4.0],
    "text": "33",
    "bools": [True, 9],
    "huge": [10**14],
    "larger than any": [10**30],
    "inf": [float("inf")],
    "null": None,
    "int": 9,
}
for _name, _shape in SHAPES.items():
    MISTAKES[f"mask {_name}"] = (
        {"target": "a", "elements": {"shape": _shape, "bits": "iIA="}, **ONE},
        PatternE,
        ("no mask", "lists of booleans"),
    )
for _name, _bits in {"other": "i!I=", "unpadded": "iIA", "é": "é", "null": None}.items():
    MISTAKES[f"bits {_name}"] = (
        {"target": "a", "elements": {"shape": [3, 3], "bits": _bits}, **ONE},
        PatternE,
        ("no mask", "lists of booleans"),
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    table, error, says = MISTAKES[name]
    with pytest.raises(error) as caught:
        lm.Rules.from_dict({"rules": [{"target": "head", "multiplier": 10}, table]})
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith("rule 1 (")
    assert all(words in message for words in says), message
    assert "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "None"),
        (5, "5"),
        ("rules", "'rules'"),
        ({}, "under 'rules'"),
        ({"rules": None}, "list of rules"),
        ({"rules": {"a": 1}}, "list of rules"),
        ({"rules": "a"}, "list of rules"),
        ({"rule": []}, "did you mean 'rules'?"),
        ({"rules": [], "lr": 0.1}, "'lr'"),
        ({"target": "a", "multiplier": 1}, "'target'"),
        (lm.Rule("a", 1), "'target'"),
    ],
)
def test_what_is_no_list_of_rules(data, says):
    with pytest.raises(lm.RuleError) as caught:
        lm.Rules.from_dict(data)
    assert says in str(caught.value)


def nested(depth):
    """A part of a part of ..."""
    head, tail = '{"rows": 0, "target": ' * depth, "}" * depth
    return f'[{{"multiplier": 1, "target": {head}"a"{tail}}}]'


def test_deep_nesting():
    [rule] = lm.Rules.from_dict(json.loads(nested(30)))
    assert len(rule.restrictions) == 30
    with pytest.raises(lm.RuleError, match="deep"):
        lm.Rules.from_dict(json.loads(nested(900)))


# ---- files that cannot be read ------------------------------------------------------------------

FILE_MISTAKES = {
    "syntax of TOML": ("toml", "[[rules]]\ntarget =\n", ("no TOML", "line 2")),
    "syntax of JSON": ("json", '[\n{"target": "a",}]', ("no JSON", "line 2")),
    "syntax of YAML": ("yaml", "rules:\n- target: [\n", ("no YAML", "line 3")),
    "tabs in YAML": ("yaml", "rules:\n\t- target: a", ("no YAML", "line 2")),
    "two documents": ("yaml", "rules: []\n---\nrules: []", ("no YAML", "line 2")),
    "empty JSON": ("json", "", ("no JSON", "line 1")),
    "empty TOML": ("toml", "", ("under 'rules'",)),
    "empty YAML": ("yaml", "", ("None",)),
    "comments alone": ("yaml", "# rules\n", ("None",)),
    "other bytes": ("toml", "é".encode("latin-1"), ("no TOML", "utf-8")),
    "UTF-16": ("json", "[]".encode("utf-16"), ("no JSON", "utf-8")),
    "a key twice in JSON": ("json", '[{"target": "a", "target": "b"}]', ("'target'", "twice")),
    "a key twice in YAML": ("yaml", "[{target: a, target: b}]", ("'target'", "twice")),
    "a key twice in TOML": ("toml", '[[rules]]\ntarget="a"\ntarget="b"\n', ("no TOML",)),
    "rules twice": ("yaml", "rules: []\nrules: []", ("'rules'", "twice")),
    "a key twice within": (
        "json",
        '[{"target": "a", "multiplier": {"start": 1, "start": 2}}]',
        ("'start'", "twice"),
    ),
    "NaN in JSON": ("json", '[{"target": "a", "multiplier": NaN}]', ("rule 0", "not finite")),
    "Infinity": ("json", '[{"target": "a", "multiplier": -Infinity}]', ("not finite",)),
    "nan in TOML": ("toml", '[[rules]]\ntarget="a"\nmultiplier=nan', ("rule 0", "not finite")),
    "inf in YAML": ("yaml", "[{target: a, multiplier: .inf}]", ("rule 0", "not finite")),
    "1e-3 in YAML": ("yaml", "[{target: a, multiplier: 1e-3}]", ("is text", "1.0e-3")),
    "off in YAML": ("yaml", "[{target: off, multiplier: 1}]", ("False is no target",)),
    "a date": ("toml", "[[rules]]\ntarget=2020-01-01\nmultiplier=1", ("no target",)),
    "deep JSON": ("json", "[" * 100_000, ("nested too deeply",)),
    "deep TOML": ("toml", "rules = " + "[" * 100_000, ("nested too deeply",)),
    "deep YAML": ("yaml", "[" * 1000, ("nested too deeply",)),
    "deep rules": ("json", nested(900), ("deep",)),
    "a list within itself": ("yaml", "&a [*a]", ("rule 0",)),
    "a rule within itself": ("yaml", "[&a {target: *a, multiplier: 1}]", ("no YAML",)),
    "Python in YAML": ("yaml", "!!python/object/apply:os.getcwd []", ("no YAML", "line 1")),
    "a list as a key": ("yaml", "? [a]\n: 1", ("no YAML",)),
    "no bool": ("yaml", "rules: !!bool maybe", ("no YAML",)),
    "no int": ("yaml", "rules: !!int ''", ("no YAML",)),
    "no float": ("yaml", "rules: !!float ''", ("no YAML",)),
    "no time": ("yaml", "rules: !!timestamp soon", ("no YAML",)),
    "no set": ("yaml", "rules: !!set {a, b}", ("list of rules",)),
    "keys of two types": ("yaml", "[{target: {1: 2, a: 3}, multiplier: 1}]", ("no target",)),
    "digits": ("json", f'[{{"target": {LONG}, "multiplier": 1}}]', ("no JSON", "digits")),
}


@pytest.mark.parametrize("name", FILE_MISTAKES)
def test_mistakes_in_files_are_named(name):
    suffix, text, says = FILE_MISTAKES[name]
    file = write(text, suffix)
    with pytest.raises(lm.RuleError) as caught:
        lm.load_rules(file)
    message = str(caught.value)
    assert message.startswith(repr(str(file)))
    assert all(words in message for words in says), message


@pytest.mark.parametrize("name", ["rules.txt", "rules", "rules.JSON5", ".toml", "toml"])
def test_other_kinds_of_files(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(lm.RuleError, match=r"\.toml, \.yaml, \.yml, \.json") as caught:
        lm.load_rules(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(lm.RuleError, match=r"missing\.toml' cannot be read: No such file"):
        lm.load_rules(tmp_path / "missing.toml")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(lm.RuleError, match=r"folder\.json' cannot be read: Is a directory"):
        lm.load_rules(tmp_path / "folder.json")
    with pytest.raises(lm.RuleError, match="null byte"):
        lm.load_rules("a\0.toml")


def test_yaml_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(lm.RuleError, match="pip install pyyaml") as caught:
        load("[]", "yaml")
    assert isinstance(caught.value.__cause__, ImportError)
    assert load("[]", "json") == lm.Rules([])


# ---- whatever is given --------------------------------------------------------------------------

KEYS = ["target", "multiplier", "optional", "rows", "neurons", "axis", "index", "elements"]
KEYS += ["path", "slice", "regex", "flags", "everything", "types", "paths", "shape", "bits"]
KEYS += ["start", "stop", "rules", "recipe", "stack", "below", "above", "head", "base", "groups"]
KEYS += ["every", "depths", "decay", "multipliers", "lo", "hi", "n", "steps", "output"]
SLICES = ["1:", ":", "::2", "-:", "1:-", "::0", "0:99999999999999999999", "a", "5", "1:2:3:4"]
TEXTS = ["layers[0]", "layers/1", "head", "**", "a[", "frozen", "1e-3", "(", "(?i)a", "(?u)a"]
TEXTS += ["ai", "iIA=", "gA==", "", "adam", "sgd", "layers", *SLICES]
scalars = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(TEXTS),
    st.sampled_from([*recipes.__all__]),
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([0.5, -1.0, 10**20, 10**400, -(10**400), 1e308, float("nan"), float("inf")]),
    st.text(max_size=3),
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from([*KEYS, "a", ""]))
level = scalars
for _ in range(3):
    level = st.one_of(
        scalars,
        st.lists(level, max_size=3),
        st.dictionaries(
            st.one_of(*[st.sampled_from(KEYS)] * 9, st.text(max_size=2)), level, max_size=3
        ),
    )
free = level
PARAMS = {
    "embed": {"embedding": np.zeros((10, 4))},
    "layers": [{"kernel": np.zeros((4, 4)), "bias": np.zeros(4)} for _ in range(2)],
    "norm": {"scale": np.zeros(4)},
    "head": {"lora_a": np.zeros((4, 1)), "lora_b": np.zeros((1, 4))},
}
GROUPS = ["embed", "layers[0]", "layers[1]", ["norm", "head"]]


@st.composite
def tables(draw):
    """A rule as it should be but for some of its entries, or a recipe."""
    if draw(st.booleans()):
        table = draw(
            st.sampled_from(
                [
                    {"target": "head"},
                    {"target": {"path": ["layers", 0]}},
                    {"target": {"regex": ".*", "flags": "i"}},
                    {"target": "embed", "rows": [0, 1]},
                    {"target": "embed", "axis": 0, "index": "1:"},
                    {"target": "layers", "neurons": 0},
                    {"target": "a", "elements": {"shape": [3, 3], "bits": "iIA="}},
                    {"target": {"types": "T", "paths": [["a"]]}},
                ]
            )
        ) | {"multiplier": draw(st.sampled_from([1, "frozen", {"start": 1, "stop": 3}]))}
    else:
        table = copy.deepcopy(draw(st.sampled_from(EVERY_RECIPE))[1])
    table = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, 2))):
        place = table
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and draw(st.booleans()):
                place = inner
                continue
            place[key] = draw(free)
            break
    return table


# The name of a recipe, the table that calls it, and the call.
BASE = {
    "embed/embedding": [10, 2],
    "layers/0/kernel": [2, 2],
    "layers/0/bias": [2],
    "layers/1/kernel": [2, 2],
    "layers/1/bias": [2],
    "norm/scale": [2],
    "head/lora_a": [2, 1],
    "head/lora_b": [1, 2],
}


def base():
    layer = {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}
    return {
        "embed": {"embedding": np.zeros((10, 2))},
        "layers": [layer, copy.deepcopy(layer)],
        "norm": {"scale": np.zeros(2)},
        "head": {"lora_a": np.zeros((2, 1)), "lora_b": np.zeros((1, 2))},
    }


EVERY_RECIPE: list[tuple[str, dict[str, Any], Any]] = [
    ("bitfit", {}, lambda p: recipes.bitfit(p)),
    (
        "bitfit",
        {"head": "head", "biases": ["**/bias", {"regex": ".*/scale"}]},
        lambda p: recipes.bitfit(p, head="head", biases=["**/bias", re.compile(".*/scale")]),
    ),
    (
        "discriminative",
        {"lo": 0.01, "hi": 1, "groups": GROUPS},
        lambda p: recipes.discriminative(p, 0.01, 1, GROUPS),
    ),
    (
        "discriminative",
        {"lo": None, "hi": 1, "groups": [{"path": ["layers", 0]}, {"everything": True}]},
        lambda p: recipes.discriminative(p, None, 1, [("layers", 0), ...]),
    ),
    (
        "freeze_to",
        {"n": -1, "groups": {"stack": "layers", "below": ["embed"], "above": [["norm", "head"]]}},
        lambda p: recipes.freeze_to(p, -1, GROUPS),
    ),
    (
        "gradual_unfreezing",
        {"groups": GROUPS, "every": 10, "multipliers": [0.1, 0.2, 0.5, 1]},
        lambda p: recipes.gradual_unfreezing(p, GROUPS, 10, multipliers=[0.1, 0.2, 0.5, 1]),
    ),
    (
        "gradual_unfreezing",
        {"groups": GROUPS, "every": [1, 1, 7]},
        lambda p: recipes.gradual_unfreezing(p, GROUPS, [1, 1, 7]),
    ),
    (
        "layer_decay",
        {"decay": 0.5, "depths": {"stack": "layers", "below": ["embed"], "above": [[], "**"]}},
        lambda p: recipes.layer_decay(p, 0.5, ["embed", "layers[0]", "layers[1]", [], "**"]),
    ),
    ("linear_probe", {"head": "head"}, lambda p: recipes.linear_probe(p, "head")),
    (
        "linear_probe",
        {"head": [{"target": "embed", "rows": "-2:"}, {"path": ["layers", 0]}]},
        lambda p: recipes.linear_probe(p, [lm.rows("embed", slice(-2, None)), ("layers", 0)]),
    ),
    ("lora_plus", {}, lambda p: recipes.lora_plus(p)),
    (
        "lora_plus",
        {"ratio": 4, "head": "norm", "a": "head/lora_a", "b": ["head/lora_b"]},
        lambda p: recipes.lora_plus(p, 4, head="norm", a="head/lora_a", b="head/lora_b"),
    ),
    ("mup", {"base": BASE}, lambda p: recipes.mup(p, base())),
    (
        "mup",
        {"base": BASE, "optimizer": "sgd", "output": ["head/*"]},
        lambda p: recipes.mup(p, base(), "sgd", output="head/*"),
    ),
    (
        "new_tokens",
        {"embedding": "embed/embedding", "index": "-2:", "head": "head"},
        lambda p: recipes.new_tokens(p, "embed/embedding", slice(-2, None), head="head"),
    ),
    (
        "new_tokens",
        {"embedding": ["embed/embedding"], "index": [7, 9]},
        lambda p: recipes.new_tokens(p, "embed/embedding", [7, 9]),
    ),
    ("norms_only", {}, lambda p: recipes.norms_only(p)),
    (
        "norms_only",
        {"norms": {"path": ["norm"]}, "head": "head"},
        lambda p: recipes.norms_only(p, norms=("norm",), head="head"),
    ),
    (
        "progressive_freezing",
        {"groups": GROUPS, "steps": 100, "start": 0.2, "level": 0.8},
        lambda p: recipes.progressive_freezing(p, GROUPS, 100, start=0.2, level=0.8),
    ),
]
EVERY_RECIPE = [(name, {"recipe": name} | table, call) for name, table, call in EVERY_RECIPE]


def check_is_read(read):
    """Rules, which come back as they were, or an error of the package; nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rules = read()
        except lm.LrmultError:
            return
    assert isinstance(rules, lm.Rules)
    assert_same(lm.Rules.from_dict(rules.to_dict()), rules)


@cases(300)
@given(free)
def test_anything_is_rules_or_an_error(data):
    check_is_read(lambda: lm.Rules.from_dict(data, PARAMS))
    check_is_read(lambda: lm.Rules.from_dict([data], PARAMS))


@cases(300)
@given(tables())
def test_so_is_anything_that_is_nearly_a_rule(table):
    check_is_read(lambda: lm.Rules.from_dict([table], PARAMS))


TOKENS = ["rules", ":", ": ", "- ", "\n", "\n  ", "[", "]", "[[", "]]", "{", "}", ",", '"', "'"]
TOKENS += [
    "=",
    "target",
    "multiplier",
    "rows",
    "a",
    "1",
    "-1",
    "1.5",
    "1:30",
    "null",
    "true",
    "nan",
]
TOKENS += ["&a ", "*a", "!!", "!!bool ", "!!int ", "!!set ", "!!binary ", "<<", "#", "|", ">", "? "]
TOKENS += [
    "%",
    "\t",
    "\0",
    "é",
    "---",
    "...",
    "2020-01-01",
    "0x",
    "1e5",
    "\\",
    "\\u",
    "\ufeff",
    "=",
]
GOOD = [dumps(FILES.to_dict()) for dumps in WRITERS.values()]


@st.composite
def documents(draw):
    """Bits of syntax, or a good file with some of it replaced."""
    junk = "".join(draw(st.lists(st.sampled_from(TOKENS), max_size=8)))
    if draw(st.integers(0, 2)) == 0:
        return junk.encode() + draw(st.binary(max_size=2))
    text = draw(st.sampled_from(GOOD))
    start = draw(st.integers(0, len(text)))
    end = draw(st.one_of(st.just(start), st.just(start + 1), st.integers(start, len(text))))
    return (text[:start] + junk + text[end:]).encode()


@cases(200)
@given(documents())
def test_so_is_any_file(text):
    for suffix in WRITERS:
        check_is_read(lambda suffix=suffix: load(text, suffix))


# ---- recipes by name ----------------------------------------------------------------------------


def test_every_recipe_has_a_case():
    names = {name for name, _, _ in EVERY_RECIPE}
    assert names == {*recipes.__all__} - {"depths", "unfreezing_stages"}
    tried = {key for _, table, _ in EVERY_RECIPE for key in table}
    for name in names:
        known = {*inspect.signature(getattr(recipes, name)).parameters} - {"params", "structure"}
        assert known <= tried


def multipliers_of(rules):
    plan = lm.compile_rules(rules, PARAMS)
    return [(leaf.path, repr(leaf.multiplier)) for leaf in plan.leaves]


@pytest.mark.parametrize("number", range(len(EVERY_RECIPE)))
def test_a_recipe_by_name_is_the_call(number):
    _, table, call = EVERY_RECIPE[number]
    rules = call(PARAMS)
    for data in (table, json.loads(json.dumps(table)), ml_collections.ConfigDict(table)):
        again = lm.Rules.from_dict([data], PARAMS)
        assert multipliers_of(again) == multipliers_of(rules)
        assert [rule.multiplier for rule in again] == [rule.multiplier for rule in rules]
        if "depths" not in table and not isinstance(table.get("groups"), dict):
            assert again == rules
    shapes = jax.eval_shape(lambda: PARAMS)
    assert lm.Rules.from_dict([table], shapes) == lm.Rules.from_dict([table], PARAMS)
    assert_same(lm.Rules.from_dict(again.to_dict()), again)


@pytest.mark.parametrize("suffix", WRITERS)
def test_recipes_in_files(suffix):
    depths = {"stack": "layers", "below": ["embed"], "above": [["norm", "head"]]}
    data = {
        "rules": [
            {"target": "head", "multiplier": "frozen"},
            {"recipe": "layer_decay", "decay": 0.5, "depths": depths},
        ]
    }
    rules = load(WRITERS[suffix](data), suffix, PARAMS)
    groups = recipes.depths(PARAMS, "layers", below=["embed"], above=[["norm", "head"]])
    assert rules == lm.Rules([("head", None)]) + recipes.layer_decay(PARAMS, 0.5, groups)
    assert [rule.optional for rule in rules] == [False] + [True] * 5


def test_recipes_of_structures():
    params = {"layers": {"w": np.zeros((3, 4))}, "head": np.zeros(4), "again": np.zeros(4)}
    structure = lm.Structure(stacked={"layers": 0})
    data = [{"recipe": "freeze_to", "n": 2, "groups": {"stack": "layers", "above": ["head", "**"]}}]
    rules = load(json.dumps(data), "json", params, structure=structure)
    assert rules == lm.Rules.from_dict(data, params, structure=structure)
    plan = lm.compile_rules(rules, params, structure=structure)
    assert plan.frozen["layers"]["w"].ravel().tolist() == [True, True, False]
    data[0]["groups"]["axis"] = 0
    rules = lm.Rules.from_dict(data, params)
    assert rules == lm.optional([(lm.along("layers", 0, i), None) for i in range(2)])
    assert plan.multipliers["head"] == 1


R = "recipe"
RECIPE_MISTAKES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "near": ({R: "layer_deacy"}, ("no recipe 'layer_deacy'", "did you mean 'layer_decay'?")),
    "unlike": ({R: "xyzzy"}, ("there are 'bitfit'", "'progressive_freezing'")),
    "depths": ({R: "depths", "stack": "layers"}, ("no recipe 'depths'",)),
    "stages": ({R: "unfreezing_stages", "groups": GROUPS}, ("no recipe 'unfreezing_stages'",)),
    "private": ({R: "_grouped"}, ("no recipe '_grouped'",)),
    "null": ({R: None}, ("no recipe None",)),
    "a list": ({R: ["bitfit"]}, ("no recipe ['bitfit']",)),
    "near argument": ({R: "layer_decay", "dcay": 1}, ("'dcay'", "did you mean 'decay'?")),
    "params": ({R: "norms_only", "params": {}}, ("'params'",)),
    "structure": ({R: "norms_only", "structure": {}}, ("'structure'",)),
    "target": ({R: "norms_only", "target": "a"}, ("'target'",)),
    "optional": ({R: "norms_only", "optional": True}, ("'optional'",)),
    "missing": ({R: "layer_decay", "decay": 1}, ("'layer_decay'", "'depths'")),
    "decay": ({R: "layer_decay", "decay": "0.5", "depths": GROUPS}, ("decay is '0.5'",)),
    "decay true": ({R: "layer_decay", "decay": True, "depths": GROUPS}, ("decay is True",)),
    "decay huge": ({R: "layer_decay", "decay": 10**400, "depths": GROUPS}, ("layer_decay",)),
    "groups text": ({R: "freeze_to", "n": 1, "groups": "head"}, ("groups is 'head'", "a list")),
    "n": ({R: "freeze_to", "n": "1", "groups": GROUPS}, ("n is '1'",)),
    "every": ({R: "gradual_unfreezing", "groups": GROUPS, "every": "1"}, ("every is '1'",)),
    "every mixed": (
        {R: "gradual_unfreezing", "groups": GROUPS, "every": ["a", 1, None]},
        ("every is ['a', 1, None]",),
    ),
    "multipliers": (
        {R: "gradual_unfreezing", "groups": GROUPS, "every": 1, "multipliers": 5},
        ("multipliers is 5",),
    ),
    "too few multipliers": (
        {R: "gradual_unfreezing", "groups": GROUPS, "every": 1, "multipliers": [1, 1]},
        ("multipliers", "4 groups"),
    ),
    "forgotten": ({R: "layer_decay", "decay": 0.5, "depths": ["head", "layers"]}, ("no group",)),
    "near stack": (
        {R: "layer_decay", "decay": 0.5, "depths": {"stack": "layers", "abov": []}},
        ("a stack has no 'abov'", "'above'"),
    ),
    "no stack": ({R: "layer_decay", "decay": 0.5, "depths": {"above": []}}, ("no target",)),
    "stack of ints": ({R: "layer_decay", "decay": 0.5, "depths": {"stack": 1}}, ("no path",)),
    "other stack": ({R: "layer_decay", "decay": 0.5, "depths": {"stack": "layer"}}, ("'layer",)),
    "base": ({R: "mup", "base": 5}, ("base",)),
    "base of numbers": ({R: "mup", "base": {"head": 5}}, ("'base' is", "head/kernel")),
    "base of floats": ({R: "mup", "base": {"head": [1.5]}}, ("'base' is", "head/kernel")),
    "base negative": ({R: "mup", "base": {"head": [-1]}}, ("'base' is", "head/kernel")),
    "base inf": ({R: "mup", "base": {"head": [float("inf")]}}, ("'base' is", "head/kernel")),
    "base of others": ({R: "mup", "base": {"head": [5]}}, ("one of the two models",)),
    "base of no text": ({R: "mup", "base": {1: [5]}}, ("'base' is", "head/kernel")),
    "index": ({R: "new_tokens", "embedding": "embed", "index": "5"}, ("no index",)),
    "typo": ({R: "linear_probe", "head": "hed"}, ("'hed'", "'head'")),
}


@pytest.mark.parametrize("name", RECIPE_MISTAKES)
def test_mistakes_in_recipes_are_named(name):
    table, says = RECIPE_MISTAKES[name]
    with pytest.raises(lm.LrmultError) as caught:
        lm.Rules.from_dict([{"target": "head", "multiplier": 1}, table], PARAMS)
    message = str(caught.value)
    assert message.startswith("rule 1 (")
    assert all(words in message for words in says), message


def test_recipes_need_the_parameters():
    with pytest.raises(lm.RuleError, match=r"rule 0 .*'norms_only' needs the parameters: pass par"):
        lm.Rules.from_dict([{"recipe": "norms_only"}])
    with pytest.raises(lm.RuleError, match="needs the parameters"):
        load('[{"recipe": "norms_only"}]')


# ---- configurations -----------------------------------------------------------------------------


@dataclasses.dataclass
class Stack:
    stack: str
    below: list[Any] | None = None
    above: list[Any] | None = None


@dataclasses.dataclass
class RuleConfig:
    target: Any
    multiplier: Any = None
    rows: Any = None
    axis: int | None = None
    index: Any = None
    optional: bool = False


@dataclasses.dataclass
class Decay:
    decay: float
    depths: Any
    recipe: str = "layer_decay"


@dataclasses.dataclass
class RulesConfig:
    rules: list[Any]


@dataclasses.dataclass
class Config:
    rate: float
    rules: Any


RECORDS = RulesConfig(
    [
        RuleConfig("encoder"),
        RuleConfig("embed", 2.0, rows=[0, 1]),
        RuleConfig("attention", 0.5, axis=1, index=":2", optional=True),
        RuleConfig({"regex": "a"}, lm.During(1, 5)),
    ]
)
OF_RECORDS = (
    lm.Rules([("encoder", None), (lm.rows("embed", [0, 1]), 2)])
    + lm.optional([(lm.along("attention", 1, slice(2)), 0.5)])
    + lm.Rules([(re.compile("a"), lm.During(1, 5))])
)


def test_dataclasses():
    assert_same(lm.Rules.from_dict(RECORDS), OF_RECORDS)
    assert_same(lm.Rules.from_dict(RECORDS.rules), OF_RECORDS)
    assert_same(lm.Rules.from_dict(dataclasses.asdict(RECORDS)), OF_RECORDS)
    with pytest.raises(lm.RuleError, match="'rate'"):
        lm.Rules.from_dict(Config(0.1, []))


def test_dataclasses_of_recipes():
    table = Decay(0.5, Stack("layers", below=["embed"], above=[["norm", "head"]]))
    groups = recipes.depths(PARAMS, "layers", below=["embed"], above=[["norm", "head"]])
    wanted = recipes.layer_decay(PARAMS, 0.5, groups)
    assert lm.Rules.from_dict(RulesConfig([dataclasses.asdict(table)]), PARAMS) == wanted
    assert lm.Rules.from_dict(RulesConfig([table]), PARAMS) == wanted


def test_a_dataclass_that_holds_rules():
    config = Config(0.1, OF_RECORDS + [(lm.elements("w", EYE), None)])
    data = dataclasses.asdict(config)
    assert data == {"rate": 0.1, "rules": config.rules}
    assert dataclasses.replace(config, rate=0.2).rules == config.rules
    config = Config(0.1, config.rules.to_dict())
    assert_same(lm.Rules.from_dict(dataclasses.asdict(config)["rules"]), data["rules"])


def test_ml_collections():
    data = OF_RECORDS.to_dict()
    config = ml_collections.ConfigDict({"rate": 0.1} | data)
    assert_same(lm.Rules.from_dict(config.rules), OF_RECORDS)
    assert_same(lm.Rules.from_dict(ml_collections.ConfigDict(data)), OF_RECORDS)
    config.lock()
    assert_same(lm.Rules.from_dict(config.rules), OF_RECORDS)
    assert_same(lm.Rules.from_dict(json.loads(config.to_json())["rules"]), OF_RECORDS)
    assert_same(lm.Rules.from_dict(config.to_dict()["rules"]), OF_RECORDS)
    tables = [ml_collections.ConfigDict(table) for table in data["rules"]]
    assert_same(lm.Rules.from_dict(ml_collections.ConfigDict({"rules": tables})), OF_RECORDS)


def test_frozen_config_dicts():
    """Their lists are tuples, and hold no tables: one rule is a whole one."""
    for rule in OF_RECORDS + [(("a", 0, "b"), 1), (lm.neurons("w", [True, False]), 2)]:
        [table] = lm.Rules([rule]).to_dict()["rules"]
        frozen = ml_collections.FrozenConfigDict(table)
        assert_same(lm.Rules.from_dict([frozen]), lm.Rules([rule]))
        assert_same(lm.Rules.from_dict((frozen,)), lm.Rules([rule]))
    frozen = ml_collections.FrozenConfigDict(
        {"recipe": "freeze_to", "n": 1, "groups": {"stack": "layers", "above": [["head"], "**"]}}
    )
    assert isinstance(frozen.groups.above, tuple)
    params = {"layers": PARAMS["layers"], "head": PARAMS["head"]}
    groups = recipes.depths(params, "layers", above=["head", "**"])
    assert lm.Rules.from_dict([frozen], params) == recipes.freeze_to(params, 1, groups)


def test_the_formats_are_those_of_other_readers():
    """A file can be read and changed by other programs."""
    data = FILES.to_dict()
    assert tomllib.loads(tomli_w.dumps(data)) == data
    assert yaml.safe_load(yaml.safe_dump(data)) == data
    assert json.loads(json.dumps(data)) == data


def test_what_is_read_already_stays():
    rules = lm.Rules([("a", 1)])
    assert lm.Rules.from_dict(rules) is rules
    part = lm.rows("a", [1, 2])
    assert lm.Rules.from_dict([{"target": part, "multiplier": 2}]) == lm.Rules([(part, 2)])


def test_yaml_merges_tables(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(
        "rules:\n"
        "- &slow {target: a, multiplier: 0.1}\n"
        "- {<<: *slow, target: b}\n"
        "- {<<: *slow, target: c, multiplier: frozen}\n"
    )
    assert lm.load_rules(file) == lm.Rules([("a", 0.1), ("b", 0.1), ("c", None)])
