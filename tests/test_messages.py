"""The catalogue of mistaken rule lists: each is answered by its class and by a useful message.

Every message is one short paragraph that says what failed, which rule (its index and its text),
what was seen, and what to write instead; and what it says to write has to work.
"""

import ast
import dataclasses
import functools
import inspect
import math
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lrmult as lm

# ---- trees --------------------------------------------------------------------------------------


def array(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def dense() -> dict[str, np.ndarray]:
    return {"kernel": array(4, 3), "bias": array(3)}


def encoder_layer() -> dict[str, Any]:
    heads = {name: dense() for name in ("query", "key", "value", "out")}
    return {"attention": heads, "norm": {"scale": array(4), "bias": array(4)}, "mlp": dense()}


class Linear(NamedTuple):
    weight: np.ndarray
    bias: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Transformer:
    layers: tuple[Linear, ...]
    norm: Linear
    head: Linear


MLP = {"params": {f"Dense_{i}": dense() for i in range(11)}}
ENCODER = {
    "params": {
        "embed": {"embedding": array(10, 4)},
        "encoder": {f"layers_{i}": encoder_layer() for i in range(12)},
        "head": dense(),
    }
}
NNX = {"embed": {"embedding": array(10, 4)}, "layers": {i: dense() for i in range(12)}}
HAIKU = {f"mlp/~/linear_{i}": {"w": array(4, 4), "b": array(4)} for i in range(3)}
HAIKU_ROOT = {name: {"w": array(4, 4), "b": array(4)} for name in ("linear", "linear_1")}
EQUINOX = Transformer(
    layers=tuple(Linear(array(4, 4), array(4)) for _ in range(3)),
    norm=Linear(array(4), array(4)),
    head=Linear(array(2, 4), array(2)),
)
SEQUENTIAL = {"params": {"layers_0": dense(), "layers_2": dense()}}  # a relu stood between them
CONVS = {"params": {"conv1": dense(), "conv2": dense(), "head": dense()}}
TWO_FAMILIES = {"params": {"conv1": dense(), "conv_2": dense()}}
CLASH = {"a/b": array(2), "a": {"b": array(3)}}
NESTED = {"a": array(2), "a/b": array(3)}
FILTERED = {"mlp": {"activation": nn.relu, "weight": array(4, 4)}}  # one leaf is no array


# ---- predicates and schedules -------------------------------------------------------------------


def returns_none(path, leaf):
    leaf.ndim == 1  # noqa: B015  (the `return` was forgotten)


def returns_text(path, leaf):
    return "frozen" if leaf.ndim == 1 else "trained"


def returns_match(path, leaf):
    return re.search("bias", path)


def raises(path, leaf):
    return leaf.shape[1] > 2


def looks_at_values(path, leaf):
    return (leaf > 0).all()


def never(path, leaf):
    return False


def takes_path(path):
    return path.endswith("bias")


def takes_leaf_first(leaf, path):
    return leaf.ndim == 1


# ---- the catalogue ------------------------------------------------------------------------------


class Case(NamedTuple):
    rules: Any
    params: Any
    error: type[lm.LrmultError]
    at: int | None  # the index of the rule to blame; None where it is the list or the tree
    says: tuple[str, ...]


class Optional(list):
    """A list of rules to be marked optional, which may itself raise."""


CATALOGUE: dict[str, Case] = {}


def mistake(name, rules, params, error, *says, at: int | None = 0) -> None:
    assert name not in CATALOGUE, name
    CATALOGUE[name] = Case(rules, params, error, at, says)


HEAD = "params/head"

Unmatched = lm.UnmatchedRuleError
Shadowed = lm.ShadowedRuleError
Pattern = lm.PatternError
Multiplier = lm.MultiplierError
Order = lm.PositionError
Range = lm.IndexRangeError
Wrong = lm.RuleError
Axis = lm.AxisError
Mask = lm.MaskError

# Names that are misspelt.
mistake("typo", [("params/hed", 10)], ENCODER, Unmatched, "'params/head'")
mistake(
    "typo-deep",
    [(HEAD, 10), ("params/encoder/layers_3/atention/query", 0.1)],
    ENCODER,
    Unmatched,
    "'params/encoder/layers_3/attention/query'",
    at=1,
)
mistake("typo-first", [("param/head", 10)], ENCODER, Unmatched, "'params/head'")
mistake("typo-all", [("param/hed/kernle", 1)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("typo-of-many", [("**/bias", 1), ("typo", 2), ("**/kernel", 3)], MLP, Unmatched, at=1)
mistake("typo-below-stars", [("**/kernal", 10)], ENCODER, Unmatched, "'**/kernel'")
mistake("typo-between-stars", [("*/hed/*", 10)], ENCODER, Unmatched, "'*/head/*'")
mistake("typo-in-braces", [("params/{hed,tail}", 10)], ENCODER, Unmatched, "'params/head'")
mistake("typo-in-tuple", [(("params", "hed"), 1)], ENCODER, Unmatched, "('params', 'hed')", "head'")
mistake("typo-in-position", [("params/Dens[-1]", 10)], MLP, Unmatched, "'params/Dense[-1]'")
mistake("wrong-case", [("params/Head", 10)], ENCODER, Unmatched, "'params/head'")
mistake("wrong-case-position", [("params/dense[0]", 10)], MLP, Unmatched, "'params/Dense[0]'")
mistake("wrong-case-star", [("**/dense_*", 10)], MLP, Unmatched, "'**/Dense_*'")
mistake("singular", [("layer/0", 10)], NNX, Unmatched, "'layers/0'")
mistake("singular-position", [("layer[:4]", 10)], NNX, Unmatched, "'layers[:4]'")
mistake("plural", [("**/biases", 10)], NNX, Unmatched, "'**/bias'")
mistake("spaces", [(" params/head ", 10)], ENCODER, Unmatched, "'params/head'")
mistake("hyphen", [("params/Dense-0", 10)], MLP, Unmatched, "'params/Dense_0'")
mistake("number-glued", [("params/Dense0", 10)], MLP, Unmatched, "'params/Dense_0'")
mistake("number-too-high", [("params/Dense_11", 10)], MLP, Unmatched, "'Dense_10'")
mistake("key-too-high", [("layers/12/kernel", 10)], NNX, Unmatched, "11")
mistake("key-too-high-tuple", [(("layers", "12"), 1)], NNX, Unmatched, "('layers', '12')", "11")
mistake("key-for-number", [("params/encoder/layers/0", 0)], ENCODER, Unmatched, "layers_0'")
mistake("number-for-key", [("layers_0", 10)], NNX, Unmatched, "'layers/0'")
mistake("family-as-node", [("params/Dense/kernel", 10)], MLP, Unmatched, "Dense_*", "kernel")
mistake("torch-weight", [("params/head/weight", 10)], ENCODER, Unmatched, "'kernel'", "'bias'")
mistake("torch-any-weight", [("**/weight", 10)], ENCODER, Unmatched, "kernel'")
mistake("flax-kernel", [("layers/0/kernel", 10)], EQUINOX, Unmatched, "weight'")
mistake("haiku-kernel", [("mlp/~/linear_0/kernel", 10)], HAIKU, Unmatched, "w'")
mistake("format-left-out", [("params/Dense_{}", 10)], MLP, Unmatched, "Dense_0'")
mistake("f-left-out", [("params/Dense_{i}", 10)], MLP, Unmatched, "Dense_0'")
mistake("nothing-alike", [("xyzzy", 10)], ENCODER, Unmatched, "'params", "lrmult.paths(")
mistake("no-array", [("mlp/activation", 10)], FILTERED, Unmatched, "array")

# Parts of arrays.
KERNEL = "params/head/kernel"
EVEN = np.arange(10) % 2 == 0
mistake("part-of-typo", [(lm.rows("params/hed", 0), 1)], ENCODER, Unmatched, "'params/head'")
mistake("part-too-high", [(lm.along(KERNEL, 1, 3), 1)], ENCODER, Range, KERNEL, "axis 1", "size 3")
mistake("part-too-low", [(lm.rows(KERNEL, [0, -5]), 1)], ENCODER, Range, KERNEL, "-5", "size 4")
mistake(
    "part-empty-slice", [(lm.rows(KERNEL, slice(4, 9)), 1)], ENCODER, Range, "nothing", "size 4"
)
mistake("part-empty-list", [(lm.neurons(HEAD, []), 1)], ENCODER, Range, "nothing", "size 3")
mistake("part-empty-bools", [(lm.rows(KERNEL, [False] * 4), 1)], ENCODER, Range, "nothing")
mistake("part-nowhere", [(lm.rows("**", 99), 1)], ENCODER, Range, "99", "out of range")
mistake("neuron-too-high", [(HEAD, 2), (lm.neurons(HEAD, 3), 1)], ENCODER, Range, "size 3", at=1)
mistake("bools-too-long", [(lm.rows(KERNEL, EVEN), 1)], ENCODER, Mask, "10", "size 4", KERNEL)
mistake("mask-shape", [(lm.elements(KERNEL, EVEN), 1)], ENCODER, Mask, "bool[10]", "float32[4,3]")
mistake(
    "mask-of-layer", [(lm.elements(HEAD, np.eye(4, 3) > 0), 1)], ENCODER, Mask, "'params/head/b"
)
mistake("unit-as-position", [("params/head[0]", 1)], ENCODER, Order, "lrmult.neurons('params/head'")
STACK = {"net": {"layers": {"fc": {"kernel": array(12, 4, 4), "bias": array(12, 4)}}}}
mistake("stack-not-said", [("net/layers[:4]", 1)], STACK, Order, "stacked={'net/layers': 0}")
mistake("no-such-axis", [(lm.along(KERNEL, 2, 0), 1)], ENCODER, Axis, "no axis 2", "float32[4,3]")
mistake("no-axis-anywhere", [(lm.along("**", 7, 0), 1)], ENCODER, Axis, "no axis 7")
mistake("neurons-of-embed", [(lm.neurons("params/embed", 0), 1)], ENCODER, Axis, "axis=", "[10,4]")
mistake("neurons-of-all", [(lm.neurons(..., 0), 1)], ENCODER, Axis, "axis=", "embedding")
mistake("neurons-of-inputs", [(lm.neurons(HEAD, 0, axis=0), 1)], ENCODER, Axis, "one layer")
mistake("neurons-axis", [(lm.neurons(HEAD, 0, axis=2), 1)], ENCODER, Axis, "no axis 2")
mistake(
    "part-shadowed",
    [(lm.rows(KERNEL, [0, 1]), None), (lm.rows(KERNEL, 2), 3), (lm.rows(KERNEL, 0), 1)],
    ENCODER,
    Shadowed,
    "rule 0 (rows(",
    "every element",
    at=2,
)

# The right name in the wrong place.
mistake("no-params", [("head", 10)], ENCODER, Unmatched, "'params/head'")
mistake("no-params-deep", [("head/kernel", 10)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("no-params-slice", [("encoder/layers[:4]", 0)], ENCODER, Unmatched, "/encoder/layers[:4]'")
mistake("no-params-star", [("encoder/*/norm", 1)], ENCODER, Unmatched, "/encoder/*/norm'")
mistake("no-params-tuple", [(("head", "kernel"), 1)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("no-params-typo", [("hed/kernel", 10)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("params-too-much", [("params/layers[0]", 10)], NNX, Unmatched, "'layers[0]'")
mistake("gap-in-path", [("params/layers[0]", 0)], ENCODER, Unmatched, "/**/layers[0]'")
mistake("last-name-only", [("bias", 10)], ENCODER, Unmatched, "'**/bias'")
mistake("last-names-only", [("norm/scale", 10)], ENCODER, Unmatched, "'**/norm/scale'")
mistake("one-star-for-two", [("*/bias", 10)], ENCODER, Unmatched, "'**/", "/bias'")
mistake("star-across-slash", [("*kernel", 10)], ENCODER, Unmatched, "'**/*kernel'")
mistake("star-across-within", [("params/encoder*kernel", 1)], ENCODER, Unmatched, "/**/")
mistake("below-an-array", [("params/head/kernel/0", 10)], ENCODER, Unmatched, "kernel'?")
mistake("kernel-value", [("params/head/kernel/value", 10)], ENCODER, Unmatched, "kernel'?")
mistake("star-value", [("**/bias/value", 10)], NNX, Unmatched, "'**/bias'")
mistake("haiku-last-name", [("linear_0", 10)], HAIKU, Unmatched, "'mlp/~/linear_0'")
mistake("haiku-no-tilde", [("mlp/linear_0", 10)], HAIKU, Unmatched, "'mlp/~/linear_0'")

# Other notations.
mistake("dots", [("params.head.kernel", 10)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("dots-no-params", [("head.kernel", 10)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("dots-number", [("layers.0.kernel", 10)], NNX, Unmatched, "'layers/0/kernel'")
mistake("dots-torch", [("encoder.layers.0", 0)], ENCODER, Unmatched, "'params/encoder/layers_0'")
mistake("dots-equinox", [(".layers[0].weight", 10)], EQUINOX, Pattern, "'.weight'", "'/'")
mistake("dot-slash", [("./params/head", 10)], ENCODER, Unmatched, "'params/head'")
mistake("backslashes", [(r"params\head\kernel", 1)], ENCODER, Unmatched, "'params/head/kernel'")
mistake("keystr", [("['params']['head']", 10)], ENCODER, Pattern, "['params']", "'/'")
mistake("keystr-after-name", [("params['head']", 10)], ENCODER, Pattern, "['head']", "'/'")
mistake("regex-as-text", [(".*/kernel", 10)], ENCODER, Unmatched, "re.compile('.*/kernel')")
mistake("regex-digits", [(r"params/Dense_\d+/bias", 10)], MLP, Unmatched, "re.compile(")
mistake("regex-anchors", [("^params/head$", 10)], ENCODER, Unmatched, "'params/head'")
mistake("regex-or", [("**/(kernel|bias)", 10)], ENCODER, Unmatched, "'**/{kernel,bias}'")
mistake("regex-class", [("params/Dense_[0-3]", 10)], MLP, Pattern, "[0-3]", "slice")
mistake("question-mark", [("params/Dense_?", 10)], MLP, Unmatched, "'params/Dense_*'")
mistake("quoted-dots", [("...", 0.1)], ENCODER, Unmatched, "...", "without quotes")
mistake("quoted-dots-inside", [("params/.../bias", 1)], ENCODER, Unmatched, "'params/**/bias'")
mistake("star-in-tuple", [(("params", "*", "kernel"), 1)], ENCODER, Unmatched, "'params/*/kernel'")
mistake("stars-in-tuple", [(("**", "bias"), 1)], ENCODER, Unmatched, "'**/bias'")
mistake("brackets-in-tuple", [(("layers[0]", "kernel"), 1)], NNX, Unmatched, "'layers[0]/kernel'")
mistake("parentheses", [("layers(0)", 1)], NNX, Unmatched, "'layers[0]'")

# Regular expressions and predicates.
mistake("regex-part", [(re.compile("kernel"), 1)], ENCODER, Unmatched, "whole path", "'.*kernel'")
mistake("regex-start", [(re.compile("head/.*"), 1)], ENCODER, Unmatched, "whole", "'.*head/.*'")
mistake("regex-node", [(re.compile("params/head"), 1)], ENCODER, Unmatched, "'params/head.*'")
mistake("regex-flags", [(re.compile("HEAD/.*", re.I), 1)], ENCODER, Unmatched, "'.*HEAD/.*'")
mistake("regex-choice", [(re.compile("kernel|bias"), 1)], ENCODER, Unmatched, "(?:kernel|bias)")
mistake(
    "regex-typo", [(re.compile(".*/kernal"), 1)], ENCODER, Unmatched, "whole path", "lrmult.paths("
)
mistake("regex-dots", [(re.compile(r".*\.kernel"), 1)], ENCODER, Unmatched, "'params/")
mistake("regex-bytes", [(re.compile(b".*/kernel"), 1)], ENCODER, Pattern, "bytes", "drop the b")
mistake("never", [(never, 1)], ENCODER, Unmatched, "never", "False for all 147 arrays")
mistake(
    "returns-none", [(returns_none, 1)], ENCODER, Wrong, "returns_none", "None", "True or False"
)
mistake("returns-text", [(returns_text, 1)], ENCODER, Wrong, "'trained'", "True or False")
mistake("returns-match", [(returns_match, 1)], ENCODER, Wrong, "None", "True or False")
mistake("raises", [(raises, 1)], ENCODER, Wrong, "raises", "IndexError", "'params/", "/bias'")
mistake("raises-name", [(lambda p, x: x.ndm, 1)], ENCODER, Wrong, "lambda", "AttributeError", "ndm")
mistake("raises-value", [(looks_at_values, 1)], ENCODER, Wrong, "TypeError", "ShapeDtypeStruct")
mistake("takes-path", [(takes_path, 1)], ENCODER, Wrong, "TypeError", "(path: str, leaf: ")
mistake("takes-leaf-first", [(takes_leaf_first, 1)], ENCODER, Wrong, "'str'", "(path: str, leaf: ")

# Text that cannot be read.
mistake("empty-text", [("", 1)], ENCODER, Pattern, "empty", "...")
mistake("empty-tuple", [((), 1)], ENCODER, Pattern, "empty", "...")
mistake("leading-slash", [("/params/head", 1)], ENCODER, Pattern, "begins with a '/'")
mistake("trailing-slash", [("params/head/", 1)], ENCODER, Pattern, "ends with a '/'")
mistake("double-slash", [("params//head", 1)], ENCODER, Pattern, "two '/'")
mistake("slash-alone", [("/", 1)], ENCODER, Pattern, "'/'", "...")
mistake("trailing-backslash", [("params/head\\", 1)], ENCODER, Pattern, "backslash")
mistake("stars-within", [("params/layers**kernel", 1)], ENCODER, Pattern, "'**'", "14", "alone")
mistake("stars-at-end", [("params/encoder**", 1)], ENCODER, Pattern, "'**'", "alone", "'*'")
mistake("three-stars", [("***", 1)], ENCODER, Pattern, "'**'")
mistake("brace-open", [("params/{head", 1)], ENCODER, Pattern, "'{'", "8", "never closed", r"\{")
mistake("brace-close", [("params/head}", 1)], ENCODER, Pattern, "'}'", "12", r"\}")
mistake("brace-slash", [("{params/head,a}", 1)], ENCODER, Pattern, "'/'", "braces", "one rule for")
mistake("brace-many", [("params/" + "{a,b}" * 12, 1)], ENCODER, Pattern, "1000", "several rules")
mistake("bracket-open", [("layers[0", 1)], NNX, Pattern, "'['", "7", "never closed", r"\[")
mistake("bracket-close", [("layers0]", 1)], NNX, Pattern, "']'", "8", r"\]")
mistake("bracket-empty", [("layers[]", 1)], NNX, Pattern, "[]", "[:4]")
mistake("bracket-name", [("layers[first]", 1)], NNX, Pattern, "[first]", "[2]")
mistake("bracket-key", [("params[head]", 1)], ENCODER, Pattern, "[head]", "'/'")
mistake("bracket-list", [("layers[0,1]", 1)], NNX, Pattern, "[0,1]", "several rules")
mistake("bracket-zero-step", [("layers[0:4:0]", 1)], NNX, Pattern, "[0:4:0]", "step of 0")
mistake("bracket-four-parts", [("layers[0:1:2:3]", 1)], NNX, Pattern, "[0:1:2:3]", "slice")
mistake("bracket-float", [("layers[1.0]", 1)], NNX, Pattern, "[1.0]", "int")
mistake("bracket-star", [("layers[*]", 1)], NNX, Pattern, "[*]", "slice")
mistake("bracket-dots", [("layers[...]", 1)], NNX, Pattern, "[...]", "slice")
mistake("bracket-then-text", [("layers[0]kernel", 1)], NNX, Pattern, "'kernel'", "'/'")
mistake("malformed-second", {"head": 1, "layers[": 2}, NNX, Pattern, "'['", at=1)
mistake("malformed-optional", Optional([("layers[0", 1)]), NNX, Pattern, "'['")

# Objects that are no targets.
mistake("target-none", [(None, 0.1)], ENCODER, Pattern, "None", "... for everything")
mistake("target-bool", [(True, 0.1)], ENCODER, Pattern, "True (bool)", "path")
mistake("target-float", [(0.5, 0.1)], ENCODER, Pattern, "0.5 (float)", "path")
mistake("target-list", [(["params", "head"], 1)], ENCODER, Pattern, "list", "a tuple of names")
mistake("target-set", [({"params/head"}, 1)], ENCODER, Pattern, "set", "path")
mistake("target-dict", [({"params": "head"}, 1)], ENCODER, Pattern, "dict", "path")
mistake("target-bytes", [(b"params/head", 1)], ENCODER, Pattern, "bytes", "path")
mistake("target-path", [(pathlib.PurePosixPath(HEAD), 1)], ENCODER, Pattern, "a path such as")
mistake("target-array", [(array(3), 1)], ENCODER, Pattern, "array", "path")
mistake("target-class", [(nn.LayerNorm, 1)], ENCODER, Pattern, "LayerNorm", "path")
mistake("target-nnx-class", [(nnx.LoRAParam, 1)], NNX, Pattern, "LoRAParam", "path")
mistake("target-module", [(nn.Dense(3), 1)], ENCODER, Pattern, "Dense", "path")
mistake(
    "target-model", [(nn.Sequential([nn.Dense(3)]), 1)], ENCODER, Wrong, "Sequential", "(path: str"
)
mistake("target-slice", [(slice("a", "b"), 1)], NNX, Pattern, "slice('a', 'b', None)", "ints")
mistake("target-zero-step", [(slice(0, 4, 0), 1)], NNX, Pattern, "slice(0, 4, 0)", "step of 0")
mistake("tuple-none", [(("params", None), 1)], ENCODER, Pattern, "('params', None)", "...")
mistake("tuple-bool", [(("params", True), 1)], ENCODER, Pattern, "('params', True)", "name")
mistake("tuple-float", [(("layers", 1.0), 1)], NNX, Pattern, "('layers', 1.0)", "int")
mistake("tuple-empty-name", [(("params", ""), 1)], ENCODER, Pattern, "('params', '')", "empty")
mistake("tuple-nested", [(("params", ("head", "a")), 1)], ENCODER, Pattern, "('head', 'a')", "name")
mistake("tuple-list", [(("layers", [0, 1]), 1)], NNX, Pattern, "[0, 1]", "int")
mistake("tuple-zero-step", [(("layers", slice(0, 4, 0)), 1)], NNX, Pattern, "step of 0")
mistake(
    "tuple-of-jax-keys",
    [(jax.tree_util.tree_flatten_with_path(ENCODER)[0][0][0], 1)],
    ENCODER,
    Pattern,
    "DictKey(key='params')",
    "name",
)
mistake("swapped", [(0.5, HEAD)], ENCODER, Pattern, "('params/head', 0.5)")
mistake("swapped-none", [(None, HEAD)], ENCODER, Pattern, "('params/head', None)")
mistake("swapped-int", [(10, HEAD)], ENCODER, Multiplier, "('params/head', 10)")

# Multipliers.
mistake("nan", [(HEAD, math.nan)], ENCODER, Multiplier, "nan", "finite", "None")
mistake("inf", [(HEAD, math.inf)], ENCODER, Multiplier, "inf", "finite", "None")
mistake(
    "minus-inf", [("**/bias", 1), (HEAD, -math.inf)], ENCODER, Multiplier, "-inf is", "finite", at=1
)
mistake("true", [(HEAD, True)], ENCODER, Multiplier, "True", "write 1", "None")
mistake("false", [(HEAD, False)], ENCODER, Multiplier, "False", "None for what is frozen")
mistake("complex", [(HEAD, 1j)], ENCODER, Multiplier, "1j (complex)", "real")
mistake("text-number", [(HEAD, "0.1")], ENCODER, Multiplier, "'0.1'", "write 0.1, without quotes")
mistake(
    "text-frozen", [(HEAD, "frozen")], ENCODER, Multiplier, "'frozen'", "None for what is frozen"
)
mistake(
    "text-freeze", [(HEAD, "freeze")], ENCODER, Multiplier, "'freeze'", "None for what is frozen"
)
mistake("text-none", [(HEAD, "None")], ENCODER, Multiplier, "'None'", "None for what is frozen")
mistake("text-nan", [(HEAD, "nan")], ENCODER, Multiplier, "'nan'", "None for what is frozen")
mistake("text-inf", [(HEAD, "inf")], ENCODER, Multiplier, "'inf'", "number")
mistake("text-name", [("encoder", "head")], ENCODER, Multiplier, "'head' (str)", "number")
mistake("list-multiplier", [(HEAD, [0.1, 0.2])], ENCODER, Multiplier, "list", "number")
mistake("tuple-multiplier", [(HEAD, (0.1,))], ENCODER, Multiplier, "(0.1,) (tuple)", "number")
mistake("jax-complex", [(HEAD, jnp.complex64(0.1))], ENCODER, Multiplier, "one real number")
mistake("jax-array", [(HEAD, jnp.ones(3))], ENCODER, Multiplier, "float32[3]", "number")
mistake("numpy-array", [(HEAD, np.ones(3))], ENCODER, Multiplier, "float64[3]", "number")
mistake("numpy-bool", [(HEAD, np.bool_(True))], ENCODER, Multiplier, "np.True_", "write 1", "None")
mistake("numpy-nan", [(HEAD, np.float32("nan"))], ENCODER, Multiplier, "nan", "finite")
mistake("huge-int", [(HEAD, 10**400)], ENCODER, Multiplier, "too large")
mistake("huger-int", [(HEAD, 10**5000)], ENCODER, Multiplier, "too large")
mistake("no-schedule", [(HEAD, lambda path, leaf: 1)], ENCODER, Multiplier, "step -> multiplier")
mistake("ellipsis-multiplier", [(HEAD, ...)], ENCODER, Multiplier, "Ellipsis", "None")
mistake(
    "optimizer-multiplier", [(HEAD, optax.sgd(1))], ENCODER, Multiplier, "Transformation", "0.1"
)
mistake("class-multiplier", [(HEAD, float)], ENCODER, Multiplier, "class float", "number")
mistake("dict-multiplier", [(HEAD, {"kernel": 0.1})], ENCODER, Multiplier, "'params/head/kernel'")
mistake("nested-mapping", {"params": {"head": 0.1}}, ENCODER, Multiplier, "'params/head'")
mistake("label-tree", {"params": {"head": "frozen"}}, ENCODER, Multiplier, "'params/head'")
mistake("params-for-rules", ENCODER, [(HEAD, 0.1)], Multiplier, "'params'", "dict")

# Lists that are no lists of pairs.
mistake("rules-none", None, ENCODER, Wrong, "None", "[]", "[(..., None)]", at=None)
mistake(
    "rules-text", HEAD, ENCODER, Wrong, "'params/head'", "list of (target, multiplier)", at=None
)
mistake("rules-bytes", b"params/head", ENCODER, Wrong, "b'", "list of (target, ", at=None)
mistake("rules-pair", (HEAD, 0.1), ENCODER, Wrong, "[('params/head', 0.1)]", at=None)
mistake("rules-list-pair", [HEAD, None], ENCODER, Wrong, "'params/head', None", at=None)
mistake("rules-two-names", ["params/embed", HEAD], ENCODER, Wrong, "pair", at=None)
mistake("rules-two-numbers", [0.1, 0.2], ENCODER, Wrong, "pair", at=None)
mistake("rules-two-dicts", [{HEAD: 1}, {"params/embed": 2}], ENCODER, Wrong, "pair", at=None)
mistake("rules-set", {(HEAD, 0.1)}, ENCODER, Wrong, "set", "order", "list", at=None)
mistake("rules-frozenset", frozenset({(HEAD, 1)}), ENCODER, Wrong, "set", "order", at=None)
mistake("rules-function", raises, ENCODER, Wrong, "raises", "list of (target, ", at=None)
mistake("rules-ellipsis", ..., ENCODER, Wrong, "Ellipsis", "list of (target, ", at=None)
mistake("rules-array", array(3), ENCODER, Wrong, "pair", at=None)
mistake("rules-optimizer", optax.sgd(0.1), ENCODER, Wrong, "list of (target, ", at=None)
mistake("rules-true", True, ENCODER, Multiplier, "True", "1", at=None)
mistake("rules-false", False, ENCODER, Multiplier, "False", "[(..., None)]", at=None)
mistake("rules-nan", math.nan, ENCODER, Multiplier, "nan", "[(..., None)]", at=None)
mistake("rules-complex", 1j, ENCODER, Multiplier, "1j", "real", at=None)
mistake("item-text", [HEAD], ENCODER, Wrong, "'params/head'", "pair", "None) to freeze")
mistake("item-two-letters", ["ab"], ENCODER, Wrong, "'ab'", "pair")
mistake("item-none", [(HEAD, 1), None], ENCODER, Wrong, "None", "pair", at=1)
mistake("item-number", [(HEAD, 1), 0.1], ENCODER, Wrong, "0.1", "pair", at=1)
mistake("item-triple", [("params", "head", 0.1)], ENCODER, Wrong, "('params', 'head', 0.1)", "pair")
mistake("item-single", [(HEAD,)], ENCODER, Wrong, "('params/head',)", "pair")
mistake("item-empty", [()], ENCODER, Wrong, "()", "pair")
mistake("item-dict", [{HEAD: 1, "**/bias": 2}], ENCODER, Wrong, "'params/head': 1", "pair")
mistake("item-set", [{"params", "head"}], ENCODER, Wrong, "'params'", "pair")
mistake("item-list", [[(HEAD, 1), ("**/bias", 2)]], ENCODER, Wrong, "'params/head'", "pair")
mistake("item-rules", [lm.Rules([(HEAD, 1), ("**/bias", 2)])], ENCODER, Wrong, "Rules(", "+")

# Rules that can never apply.
mistake("dots-first", [(..., 0.1), (HEAD, 0)], ENCODER, Shadowed, "rule 0 (...", "before", at=1)
mistake("stars-first", [("**", 0.1), (HEAD, 0)], ENCODER, Shadowed, "rule 0 ('**'", "before", at=1)
mistake("number-first", [*lm.Rules(0.1), (HEAD, 0)], ENCODER, Shadowed, "rule 0 (...", at=1)
mistake("dots-between", [("**/bias", 1), (..., 2), ("**/kernel", 3)], MLP, Shadowed, "rule 1", at=2)
mistake("in-mapping", {"**": 0.1, HEAD: 10}, ENCODER, Shadowed, "rule 0 ('**'", "before", at=1)
mistake(
    "concatenated",
    lm.Rules([("**/bias", 1), (..., 2)]) + {HEAD: 3},
    ENCODER,
    Shadowed,
    "rule 1 (...",
    "before",
    at=2,
)
mistake("parent-first", [("params", 1), (HEAD, 10)], ENCODER, Shadowed, "rule 0 ('params'", at=1)
mistake(
    "two-together",
    [("**/kernel", 0.1), ("**/bias", 0.2), (HEAD, 10)],
    ENCODER,
    Shadowed,
    "rule 0 ('**/kernel'",
    "rule 1 ('**/bias'",
    "before",
    at=2,
)
mistake(
    "many-together",
    [*((f"params/Dense_{i}", 0.1) for i in range(11)), ("params", 1)],
    MLP,
    Shadowed,
    "rule 0 ('params/Dense_0'",
    "remove",
    at=11,
)
mistake("duplicate", [(HEAD, 1), ("**/scale", 1), (HEAD, 1)], ENCODER, Shadowed, "rule 0", at=2)
mistake("duplicate-other", [(HEAD, 1), (HEAD, 2)], ENCODER, Shadowed, "rule 0", "remove", at=1)
mistake("duplicate-child", [("layers/11", 0), ("layers[-1]", 1)], NNX, Shadowed, "/11'", at=1)
mistake("slice-first", [("layers[:4]", 0), ("layers[2]", 1)], NNX, Shadowed, "'layers[:4]'", at=1)
mistake(
    "regex-first",
    [(re.compile(".*kernel"), 0), ("params/Dense_0/kernel", 1)],
    MLP,
    Shadowed,
    "re.compile('.*kernel')",
    at=1,
)
mistake(
    "predicate-first",
    [(lambda path, leaf: leaf.ndim == 1, 0), ("params/Dense_0/bias", 1)],
    MLP,
    Shadowed,
    "lambda",
    at=1,
)

# Positions among children without an order.
mistake("unlike", [("params[-1]", 1)], ENCODER, Order, "'params'", "'embed'", "'head'", "the name")
mistake("unlike-slice", [("params[:2]", 1)], ENCODER, Order, "'embed'", "name")
mistake("unlike-root", [(0, 1)], NNX, Order, "at the root", "'embed'", "'layers'", "the name")
mistake("unlike-root-slice", [(slice(0, 1), 1)], NNX, Order, "slice(0, 1, None)", "at the root")
mistake("unlike-layer", [("params/Dense_0[0]", 1)], MLP, Order, "'kernel'", "'bias'", "the name")
mistake("unlike-stars", [("**/norm[0]", 1)], ENCODER, Order, "'scale'", "'bias'", "the name")
mistake("unlike-segment", [("params/[0]", 1)], ENCODER, Order, "'embed'", "the name")
mistake("unlike-tuple", [(("params", 0), 1)], ENCODER, Order, "('params', 0)", "'embed'")
mistake("unlike-optional", Optional([("params[0]", 1)]), ENCODER, Order, "'embed'", "the name")
mistake("only-child", [(0, 1)], MLP, Order, "at the root", "'params'", "name")
mistake("two-families", [("params/conv[0]", 1)], TWO_FAMILIES, Order, "'conv1'", "'conv_2'", "name")
mistake("child-of-array", [("params/head/kernel[0]", 1)], ENCODER, Order, "float32[4,3]", "whole")
mistake("child-of-array-tuple", [(("embed", "embedding", 0), 1)], NNX, Order, "is an array")
mistake("hole-negative", [("params/layers[-1]", 1)], SEQUENTIAL, Order, "0, 2", "the number")
mistake("hole-open", [("params/layers[1:]", 1)], SEQUENTIAL, Order, "0, 2", "slice with an end")
mistake("hole-negative-stop", [("params/layers[:-1]", 1)], SEQUENTIAL, Order, "0, 2")

# Positions where nothing stands.
mistake("hole-hit", [("params/layers[1]", 1)], SEQUENTIAL, Range, "[1]", "0, 2")
mistake("too-high", [("layers[12]", 1)], NNX, Range, "[12]", "'layers'", "from 0 to 11")
mistake("too-high-family", [("params/Dense[11]", 1)], MLP, Range, "[11]", "from 0 to 10")
mistake("too-high-inside", [("params/Dense[11]/kernel", 1)], MLP, Range, "from 0 to 10")
mistake("too-high-tuple", [(("layers", 12), 1)], NNX, Range, "('layers', 12)", "from 0 to 11")
mistake("too-high-equinox", [("layers[3]", 1)], EQUINOX, Range, "from 0 to 2")
mistake("too-high-haiku", [("mlp/~/linear[3]", 1)], HAIKU, Range, "from 0 to 2")
mistake("too-high-haiku-root", [("linear[2]", 1)], HAIKU_ROOT, Range, "'linear'", "from 0 to 1")
mistake("too-high-stars", [("**/layers[12]", 1)], ENCODER, Range, "'params/encoder'", "0 to 11")
mistake("too-high-children", [("params/encoder[12]", 1)], ENCODER, Range, "from 0 to 11")
mistake("too-low", [("layers[-13]", 1)], NNX, Range, "[-13]", "12 members")
mistake("too-low-family", [("params/Dense[-12]", 1)], MLP, Range, "[-12]", "11 members")
mistake("from-one", [("params/conv[0]", 1)], CONVS, Range, "[0]", "numbered from 1")
mistake("slice-too-high", [("layers[12:]", 1)], NNX, Range, "[12:]", "nothing", "from 0 to 11")
mistake("slice-too-high-tuple", [(("layers", slice(12, None)), 1)], NNX, Range, "from 0 to 11")
mistake("slice-backwards", [("layers[8:4]", 1)], NNX, Range, "[8:4]", "nothing")
mistake("slice-empty", [("layers[4:4]", 1)], NNX, Range, "[4:4]", "nothing")
mistake("slice-wrong-step", [("layers[0:4:-1]", 1)], NNX, Range, "[0:4:-1]", "nothing")

# Trees that rules cannot speak about.
mistake("empty-tree", [("head", 1)], {}, Unmatched, "no arrays")
mistake("no-array-at-all", [("head", 1)], {"head": nn.relu}, Unmatched, "no arrays")
mistake("same-path", [("a", 1)], CLASH, Wrong, "two arrays", "'a/b'", "rename", at=None)
mistake("array-above-array", [("a", 1)], NESTED, Wrong, "'a'", "'a/b'", "rename", at=None)
mistake("bare-array", [("kernel", 1)], array(2), Unmatched, "...")


# ---- what holds for all of them -----------------------------------------------------------------

each = pytest.mark.parametrize("name", CATALOGUE)


def rules_of(name: str) -> Any:
    rules = CATALOGUE[name].rules
    return lm.optional(list(rules)) if isinstance(rules, Optional) else rules


@functools.cache
def error(name: str) -> ValueError:
    """What `compile_rules` raises for a case."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (tests below look at it closely)
        lm.compile_rules(rules_of(name), CATALOGUE[name].params)
    return caught.value


def near_misses(message: str) -> list[Any]:
    """The targets that stand after "did you mean"."""
    offered = "".join(re.findall(r"did you mean (.*)\?", message, re.IGNORECASE))
    found = re.findall(r"(re\.compile\()?('(?:[^'\\]|\\.)*')(, re\.\w+)?", offered)
    flags = {text: getattr(re, text[5:]) for *_, text in found if text}
    return [
        re.compile(ast.literal_eval(text), flags.get(flag, 0)) if regex else ast.literal_eval(text)
        for regex, text, flag in found
    ]


@each
def test_class(name):
    assert type(error(name)) is CATALOGUE[name].error, str(error(name))


@each
def test_is_a_value_error_of_this_package(name):
    assert isinstance(error(name), lm.LrmultError), str(error(name))
    assert isinstance(error(name), ValueError)
    assert not isinstance(error(name), LookupError | AssertionError | TypeError)


@each
def test_names_the_rule(name):
    rules, _, _, at, _ = CATALOGUE[name]
    if at is None:
        return
    message = str(error(name))
    assert re.search(rf"\brule {at}\b", message, re.IGNORECASE), message
    items = rules.items() if isinstance(rules, Mapping) else rules
    match list(items)[at] if isinstance(items, Iterable) else None:
        case (str() as target, _) | lm.Rule(target=str() as target):
            assert repr(target) in message


@each
def test_says(name):
    message = str(error(name))
    missing = [text for text in CATALOGUE[name].says if text not in message]
    assert not missing, message


@each
def test_is_one_short_paragraph(name):
    message = str(error(name))
    assert 20 < len(message) <= 600, message
    assert "\n" not in message, message
    assert message == message.strip()
    assert "PyTreeDef" not in message
    assert not re.search(r"\bat 0x[0-9a-f]", message), message


@each
def test_near_misses_work(name):
    for target in near_misses(str(error(name))):
        lm.compile_rules([(target, 0.5)], CATALOGUE[name].params)


@each
def test_offers_no_option_that_does_not_exist(name):
    message = str(error(name))
    options = {
        name
        for function in (lm.compile_rules, lm.neurons, lm.Structure)
        for name in inspect.signature(function).parameters
    }
    for option in re.findall(r"\b(structure|order|shared|stacked|axis|compact)=", message):
        assert option in options, message
    for public in re.findall(r"\b(?:lm|lrmult)\.(\w+)", message):
        assert hasattr(lm, public), message


@pytest.mark.parametrize("name", [k for k, case in CATALOGUE.items() if case.error is Shadowed])
def test_moving_a_shadowed_rule_works(name):
    rules = list(lm.Rules(rules_of(name)))
    moved = rules.pop(CATALOGUE[name].at)
    lm.compile_rules(rules, CATALOGUE[name].params)  # "or remove it"
    before = re.search(r"put it before rule (\d+)", str(error(name)))
    if before:
        rules.insert(int(before[1]), moved)
        lm.compile_rules(rules, CATALOGUE[name].params)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name.startswith("rules-")])
def test_brackets_around_one_rule_work(name):
    written = re.search(r"is one rule.*write (\[.*\])$", str(error(name)))
    if written:
        lm.Rules(ast.literal_eval(written[1]))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name.startswith("text-")])
def test_multiplier_without_quotes_works(name):
    written = re.search(r"write (\S+), without quotes", str(error(name)))
    if written:
        lm.Rules([(HEAD, float(written[1]))])


def test_predicates_own_error_is_the_cause():
    assert isinstance(error("raises").__cause__, IndexError)
    assert isinstance(error("raises-name").__cause__, AttributeError)


def test_catalogue_is_long_and_holds_every_error_class():
    classes = [value for value in vars(lm).values() if inspect.isclass(value)]
    raised = {value for value in classes if issubclass(value, lm.LrmultError)}
    # The last two are about parameters and features, not rules.
    raised -= {lm.LrmultError, lm.FrozenError, lm.FeaturesError}
    assert {case.error for case in CATALOGUE.values()} == raised
    assert len(CATALOGUE) >= 60


# ---- the same message wherever the mistake shows ------------------------------------------------

early = [
    name
    for name, case in CATALOGUE.items()
    if case.error in (Pattern, Multiplier) or name.startswith(("rules-", "item-"))
]
late = [name for name in CATALOGUE if name not in early]
forgivable = [name for name in late if CATALOGUE[name].error in (Unmatched, Shadowed)]
traceable = [
    name
    for name in late
    if name != "empty-tree"  # `init` lets it pass: see `test_placeholder_of_optax_is_no_mistake`
    and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(CATALOGUE[name].params))
]


def raised(function, *arguments) -> tuple[type, str]:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the caller looks at it closely)
        function(*arguments)
    return type(caught.value), str(caught.value)


def expected(name: str) -> tuple[type, str]:
    return type(error(name)), str(error(name))


@pytest.mark.parametrize("function", [lm.Rules, lm.optional, lm.scale_by_rules, lm.trainable_mask])
@pytest.mark.parametrize("name", early)
def test_at_once(name, function):
    assert raised(lambda: function(rules_of(name))) == expected(name)


@pytest.mark.parametrize("name", early)
def test_at_once_when_concatenated(name):
    assert raised(lambda: lm.Rules() + rules_of(name)) == expected(name)


@pytest.mark.parametrize("name", traceable)
def test_from_init_and_update_eager_and_jitted(name):
    tx = lm.scale_by_rules(rules_of(name))
    params, state = CATALOGUE[name].params, optax.EmptyState()
    assert raised(tx.init, params) == expected(name)
    assert raised(tx.update, params, state) == expected(name)
    assert raised(jax.jit(tx.init), params) == expected(name)
    assert raised(jax.jit(tx.update), params, state) == expected(name)


@pytest.mark.parametrize("name", traceable)
def test_from_a_jitted_step_of_a_chain(name):
    tx = optax.chain(optax.sgd(0.1), lm.scale_by_rules(rules_of(name)))
    params = CATALOGUE[name].params
    state = (optax.sgd(0.1).init(params), optax.EmptyState())
    assert raised(jax.jit(tx.update), params, state, params) == expected(name)


@pytest.mark.parametrize("name", late)
def test_from_the_mask(name):
    assert raised(lm.trainable_mask(rules_of(name)), CATALOGUE[name].params) == expected(name)


@pytest.mark.parametrize("name", traceable)
def test_from_shapes_alone(name):
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), CATALOGUE[name].params
    )
    assert raised(lm.compile_rules, rules_of(name), shapes) == expected(name)


def test_first_mistake_is_the_one_that_is_raised():
    rules = [("params/head", 2), ("hed", 1), ("tail", 3), ("params[0]", 4)]
    with pytest.raises(lm.UnmatchedRuleError, match=r"(?i)rule 1 \('hed'"):
        lm.compile_rules(rules, ENCODER)


# ---- not strict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", forgivable)
def test_lax_warns_with_the_same_text(name):
    with pytest.warns(UserWarning, match="rule") as caught:
        plan = lm.compile_rules(rules_of(name), CATALOGUE[name].params, strict=False)
    assert isinstance(plan, lm.Plan)
    assert [str(warning.message) for warning in caught] == [str(error(name))]
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in forgivable])
def test_lax_forgives_nothing_else(name):
    lax = functools.partial(lm.compile_rules, strict=False)
    assert raised(lambda: lax(rules_of(name), CATALOGUE[name].params)) == expected(name)


@pytest.mark.parametrize("name", [name for name in forgivable if name in traceable])
def test_lax_transformation_warns_with_the_same_text(name):
    # Plans are cached by rules and shapes, and only making one warns: take shapes of its own.
    wider = list(CATALOGUE).index(name) + 1
    params = jax.tree.map(
        lambda leaf: array(*leaf.shape[:-1], leaf.shape[-1] + wider), CATALOGUE[name].params
    )
    tx = lm.scale_by_rules(rules_of(name), strict=False)
    with pytest.warns(UserWarning, match=re.escape(str(error(name)))):
        state = tx.init(params)
    jax.jit(tx.update)(params, state)  # warns no more


def test_lax_warns_of_each_mistake():
    rules = [("hed", 1), ("**", 0.1), ("params/head", 2), ("tail", 3)]
    with pytest.warns(UserWarning, match="rule") as caught:
        plan = lm.compile_rules(rules, ENCODER, strict=False)
    texts = [str(warning.message) for warning in caught]
    assert [re.findall(r"(?i)\brule (\d)", text)[0] for text in texts] == ["0", "2", "3"]
    assert set(jax.tree.leaves(plan.multipliers)) == {0.1}


def test_lax_warns_for_every_transformation():
    for _ in range(2):
        tx = lm.scale_by_rules([("hed", 1)], strict=False)
        with pytest.warns(UserWarning, match="'head'"):
            tx.init({"head": array(7)})


@pytest.mark.parametrize(
    ("use", "size"),  # a size each, since plans are cached
    [
        (lambda rules, params: lm.scale_by_rules(rules, strict=False).init(params), 8),
        (lambda rules, params: lm.trainable_mask(rules, strict=False)(params), 9),
    ],
    ids=["init", "mask"],
)
def test_lax_warning_points_at_the_caller(use, size):
    with pytest.warns(UserWarning, match="'head'") as caught:
        use([("hed", 1)], {"head": array(size)})
    package = pathlib.Path(lm.__file__).parent
    assert package not in pathlib.Path(caught[0].filename).parents


def test_warnings_can_be_made_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rule 0 "):
            lm.compile_rules([("hed", 1)], ENCODER, strict=False)


@pytest.mark.parametrize("name", ["typo", "duplicate-other", "dots-first", "too-high"])
def test_optional_forgives(name):
    rules, params, *_ = CATALOGUE[name]
    lm.compile_rules(lm.Rules(rules[:-1]) + lm.optional(rules[-1:]), params)


# ---- what is no mistake -------------------------------------------------------------------------

FINE: dict[str, tuple[Any, Any]] = {
    "empty": ([], ENCODER),
    "number": (0.1, ENCODER),
    "mapping": ({HEAD: 1, "**": None}, ENCODER),
    "items": ({HEAD: 1, "**": None}.items(), ENCODER),
    "generator": ((pair for pair in [(HEAD, 1), (..., None)]), ENCODER),
    "zip": (zip([HEAD, "**"], [1, None], strict=True), ENCODER),
    "tuple-of-pairs": (((HEAD, 1), (..., None)), ENCODER),
    "lists-as-pairs": ([[HEAD, 1], ["**", None]], ENCODER),
    "numpy-numbers": ([(HEAD, np.float32(0.1)), ("**/bias", np.int64(2))], ENCODER),
    "numpy-positions": ([(np.int64(0), 3), (("1", np.int32(0)), 2)], [[array(2)], [array(2)]]),
    "fraction": ([(HEAD, Fraction(1, 3))], ENCODER),
    "negative": ([(HEAD, -1)], ENCODER),
    "big-int": ([(HEAD, 10**30)], ENCODER),
    "closing-dots": ([("params", 0.1), (..., 2)], ENCODER),
    "closing-stars": ([("params", 0.1), ("**", 2)], ENCODER),
    "optional": (lm.optional([("hed", 1), ("layers[40]", 2)]), NNX),
    "numpy-predicate": ([(lambda path, leaf: np.bool_(leaf.ndim == 1), 1)], ENCODER),
    "regex": ([(re.compile(r"params/Dense_\d/kernel"), 1)], MLP),
    "path-in-tuple": ([(("params/head", "kernel"), 1)], ENCODER),
    "haiku-key-in-tuple": ([(("mlp/~/linear_0", "w"), 1)], HAIKU),
    "equinox": ([("layers[:2]/weight", 1), ("head", 2), ("norm", 3)], EQUINOX),
    "family-from-one": ([("params/conv[1]", 1), ("params/conv[-1]", 1)], CONVS),
    "hole-hit": ([("params/layers[2]", 1), ("params/layers[0]", 2)], SEQUENTIAL),
    "hole-in-all": ([("params/layers[:]", 1)], SEQUENTIAL),
    "none-leaf": ([("head/kernel", 1)], {"body": dense(), "head": None}),
    "masked-leaf": ([("head/kernel", 1)], {"body": dense(), "head": optax.MaskedNode()}),
    "empty-tree": ([], {}),
    "empty-tree-all": (0.1, {}),
}


@pytest.mark.parametrize("name", FINE)
def test_no_mistake(name):
    lm.compile_rules(*FINE[name])


def test_placeholder_of_optax_is_no_mistake():
    """`optax.tree.map_params` calls `init` with a tree that has no leaves."""
    tx = optax.chain(optax.adam(0.1), lm.scale_by_rules([("params/head", 10)]))
    optax.tree.map_params(tx, lambda leaf: leaf, tx.init(ENCODER))


# ---- long trees, long rules ---------------------------------------------------------------------

MANY = {
    "params": {
        f"transformer_block_number_{i}": {f"projection_{j}": array(1) for j in range(10)}
        for i in range(100)
    }
}
NUMBERED = {f"transformer_block_{i}": array(1) for i in range(1000)}
UNLIKE = {f"a_rather_long_name_{'x' * i}": array(1) for i in range(1000)}
EVEN = {f"block_{2 * i}": array(1) for i in range(1000)}
DEEP = functools.reduce(lambda tree, _: {"params": tree}, range(200), {"x": dense()})
NAMES = [f"a_long_segment_{i}" for i in range(300)]
LONG = "/".join(NAMES)


def explodes(path, leaf):
    raise KeyError("x" * 5000)


def explodes_in_lines(path, leaf):
    raise ValueError("one line\n" * 10)


LENGTHY: dict[str, tuple[Any, Any, type[lm.LrmultError]]] = {
    "typo": ([("params/transformer_blok_number_7", 1)], MANY, Unmatched),
    "no-params": ([("transformer_block_number_7", 1)], MANY, Unmatched),
    "last-name": ([("projection_7", 1)], MANY, Unmatched),
    "nothing-alike": ([("zzz", 1)], UNLIKE, Unmatched),
    "text": ([(LONG, 1)], MANY, Unmatched),
    "dots": ([(LONG.replace("/", "."), 1)], MANY, Unmatched),
    "tuple": ([(tuple(NAMES), 1)], MANY, Unmatched),
    "name": ([(("params", "x" * 5000), 1)], MANY, Unmatched),
    "braces": ([(f"{{{','.join(NAMES)}}}", 1)], MANY, Unmatched),
    "regex": ([(re.compile("|".join(NAMES)), 1)], MANY, Unmatched),
    "malformed": ([(LONG + "[", 1)], MANY, Pattern),
    "position": ([("layers[" + "1" * 5000 + "]", 1)], NNX, Pattern),
    "list-target": ([(NAMES, 1)], MANY, Pattern),
    "array-target": ([(np.arange(1e4), 1)], MANY, Pattern),
    "nested-tuple-target": ([(("params", tuple(NAMES)), 1)], MANY, Pattern),
    "array-multiplier": ([("params", np.arange(1e4))], MANY, Multiplier),
    "jax-multiplier": ([("params", jnp.arange(1e4))], MANY, Multiplier),
    "list-multiplier": ([("params", NAMES)], MANY, Multiplier),
    "text-multiplier": ([("params", LONG)], MANY, Multiplier),
    "int-multiplier": ([("params", 10**3000)], MANY, Multiplier),
    "tree-for-rules": (MANY, MANY, Multiplier),
    "text-for-rules": (LONG, MANY, Wrong),
    "list-for-rules": (NAMES, MANY, Wrong),
    "item": ([tuple(NAMES)], MANY, Wrong),
    "tree-item": ([MANY], MANY, Wrong),
    "shadowed": ([*((f"params/*_{i}", 1) for i in range(100)), ("params", 1)], MANY, Shadowed),
    "shadowed-by-long": ([(f"{{params,{','.join(NAMES)}}}", 1), ("*/*", 1)], MANY, Shadowed),
    "shadowed-by-tuple": ([(("params",), 1), (("params", *[...] * 300), 1)], MANY, Shadowed),
    "unlike": ([("[0]", 1)], UNLIKE, Order),
    "unlike-deep": ([("params/" * 200 + "x[0]", 1)], DEEP, Order),
    "child-of-array": ([("transformer_block_999[0]", 1)], NUMBERED, Order),
    "holes": ([("block[-1]", 1)], EVEN, Order),
    "two-families": (
        [("block[0]", 1)],
        {f"block{'_' * (i % 2)}{i}": array(1) for i in range(1000)},
        Order,
    ),
    "hole-hit": ([("block[1]", 1)], EVEN, Range),
    "too-high": ([("transformer_block[1000]", 1)], NUMBERED, Range),
    "same-path": ([], {LONG + "/b": array(1), LONG: {"b": array(1)}}, Wrong),
    "array-above-array": ([], {LONG: array(1), LONG + "/b": array(1)}, Wrong),
    "explodes": ([(explodes, 1)], MANY, Wrong),
    "explodes-in-lines": ([(explodes_in_lines, 1)], MANY, Wrong),
    "returns-text": ([(lambda path, leaf: LONG, 1)], MANY, Wrong),
}


@pytest.mark.parametrize("name", LENGTHY)
def test_stays_short(name):
    rules, params, cause = LENGTHY[name]
    found, message = raised(lm.compile_rules, rules, params)
    assert found is cause, message
    assert 20 < len(message) <= 600
    assert "\n" not in message, message
    assert "PyTreeDef" not in message
    for target in near_misses(message):
        lm.compile_rules([(target, 0.5)], params)
