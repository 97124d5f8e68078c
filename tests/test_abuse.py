"""Whatever is given: a result or an `LrmultError`, in a time that grows in proportion."""

import contextlib
import functools
import io
import json
import re
import string
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import zipfile
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import lrmult as lm
from lrmult import _patterns
from lrmult._command_line import main
from lrmult._patterns import Glob

PARAMS = {
    "a": {"b": np.zeros(2), "c*": np.zeros(2)},
    "layers_0": np.zeros(2),
    "layers_1": np.zeros(2),
    "head": np.zeros((2, 3)),
}


def outcome(function):
    """What it returns, or the error of the package that it raises; no other error."""
    try:
        return function()
    except lm.LrmultError as error:
        return error


def seconds(function):
    """The time that a call takes of this process, whatever others do meanwhile."""
    _patterns.parse.cache_clear()
    start = time.process_time()
    function()
    return time.process_time() - start


def assert_linear(run, size, most=20):
    """Ten times as much takes at most about twenty times as long."""
    short = min(seconds(lambda: run(size)) for _ in range(3))
    long = [seconds(lambda: run(10 * size))]
    while min(long) > most * max(short, 2e-3):
        assert len(long) < 3, (short, long)
        long.append(seconds(lambda: run(10 * size)))


# ---- text ---------------------------------------------------------------------------------------

PIECES = ["*", "**", "/", "{", "}", ",", "[", "]", "\\", ":", "-", "0", "1", "a", "layers", "head"]
PIECES += [
    ".",
    "...",
    "(",
    ")",
    "|",
    "+",
    "?",
    "^",
    "$",
    "\0",
    "\n",
    "é",
    "\ud800",
    " ",
    "\\d",
    "#",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


@settings(max_examples=400)
@given(texts)
def test_any_text_is_a_target_or_a_mistake(text):
    outcome(lambda: lm.compile_rules([(text, 1)], PARAMS))
    outcome(lambda: lm.extract(PARAMS, text))
    outcome(lambda: lm.Structure(order={text: ["a", "b"]}, shared=[[text, "head"]]))


parts = st.one_of(
    texts,
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**30), 10**5000, ..., None, True, 1.5, b"a", (), ("a",), ["a"]]),
    st.builds(slice, *[st.sampled_from([None, 0, -1, 1, 2, 10**20, 10**5000, "a"])] * 3),
)


@settings(max_examples=300)
@given(st.one_of(parts, st.lists(parts, max_size=5).map(tuple)), parts)
def test_so_is_any_tuple(target, index):
    outcome(lambda: lm.compile_rules([(target, 1)], PARAMS))
    outcome(lambda: lm.compile_rules([(lm.rows(target, index), 1)], PARAMS))
    outcome(lambda: lm.compile_rules([(lm.along(target, index, 0), 1)], PARAMS))


LONG: dict[str, Any] = {
    "name": lambda n: "a" * n,
    "stars": lambda n: "*a" * (n // 2),
    "starred segments": lambda n: "*/" * (n // 2) + "a",
    "segments": lambda n: "a/" * (n // 2) + "a",
    "any depth": lambda n: "**/" * (n // 3) + "a",
    "any depth between": lambda n: "**/a/" * (n // 5) + "a",
    "open braces": lambda n: "{" * n,
    "closed braces": lambda n: "}" * n,
    "empty braces": lambda n: "{}" * (n // 2),
    "braces in braces": lambda n: "{" * (n // 2) + "a" + "}" * (n // 2),
    "idle braces": lambda n: "{a*}" * (n // 4),
    "a name in braces in braces": lambda n: "{a*" * (n // 4) + "}" * (n // 4),
    "many braces": lambda n: "{a,b}" * (n // 5),
    "commas": lambda n: "{" + "," * n + "}",
    "commas without braces": lambda n: "a," * (n // 2),
    "alternatives": lambda n: "{" + ",".join(f"x{i}" for i in range(n // 5)) + "}",
    "alternatives in alternatives": lambda n: "{a," * (n // 4) + "b" + "}" * (n // 4),
    "long alternatives": lambda n: "{a,b}{c,d}{e,f}" + "*a" * (n // 2),
    "open brackets": lambda n: "[" * n,
    "closed brackets": lambda n: "]" * n,
    "positions": lambda n: "a" + "[0]" * (n // 3),
    "slices": lambda n: "layers[:]" + "[::]" * (n // 4),
    "positions of segments": lambda n: "a[0]" + "/[0]" * (n // 4),
    "digits": lambda n: "a[" + "1" * n + "]",
    "backslashes": lambda n: "\\\\" * (n // 2),
    "escapes": lambda n: "\\a" * (n // 2),
    "escaped stars": lambda n: "\\*" * (n // 2),
    "dots": lambda n: "a." * (n // 2),
    "dots alone": lambda n: "." * n,
    "spaces": lambda n: "a b/" * (n // 4) + "c",
    "regex of stars": lambda n: ".*" * (n // 2),
    "regex of groups": lambda n: "(" * n,
    "regex of choices": lambda n: "(a|b)" * (n // 5),
    "misspelt": lambda n: "layers_o/" * (n // 9) + "a",
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_take_a_time_in_proportion(name):
    assert_linear(lambda n: outcome(lambda: lm.compile_rules([(LONG[name](n), 1)], PARAMS)), 1000)


@pytest.mark.parametrize(
    "text", ["(a*)*b", "(a|a)*b", "(a*)\\\\1*b", "a*a*a*a*a*a*a*a*b", ".*.*.*.*.*.*.*b", "(?:a*)*b"]
)
def test_a_text_is_not_tried_as_a_regex_that_explodes(text):
    tree = {"a" * 60: np.zeros(2)}
    start = time.process_time()
    outcome(lambda: lm.compile_rules([(text, 1)], tree))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "parts",
    [("", "") * 40, ("", *["a"] * 40, "b"), ("", "a" * 500 + "b", ""), ("", "ab" * 250, "b")],
)
def test_long_names_take_a_time_in_proportion(parts):
    assert_linear(lambda n: Glob(parts).match("a" * n), 30_000)


@given(
    st.lists(st.text("ab", max_size=3), min_size=2, max_size=5).map(tuple),
    st.text("ab", max_size=8),
)
def test_globs_match_as_regular_expressions_do(parts, name):
    pattern = ".*".join(map(re.escape, parts))
    assert Glob(parts).match(name) == (re.fullmatch(pattern, name, re.DOTALL) is not None)


def test_a_long_text_is_short_in_its_message():
    for name, make in LONG.items():
        found = outcome(lambda make=make: lm.compile_rules([(make(2000), 1)], PARAMS))
        assert isinstance(found, lm.Plan) or len(str(found)) < 700, name


