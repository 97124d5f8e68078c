"""Rules: what to say, and how it is read."""

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast, overload

import jax
import numpy as np

from lrmult._errors import (
    LrmultError,
    MultiplierError,
    PatternError,
    RuleError,
    shorten,
    show,
)
from lrmult._patterns import (
    ANY_DEPTH,
    At,
    Pattern,
    parse,
    pattern_from_tuple,
    position_from_python,
)

Predicate: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], bool]
Selector: TypeAlias = Pattern | re.Pattern[str] | Predicate
# What users write. A target is text, a tuple, an int, a slice, `...`, a compiled regular expression
# or a predicate; `EllipsisType` and `slice` in a union are of no help to anyone, hence `Any`.
Target: TypeAlias = Any
Multiplier: TypeAlias = float | None
RulesLike: TypeAlias = "Rules | Iterable[Any] | Mapping[Any, Any] | float"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Rule:
    """One rule: a target and the multiplier of what it matches.

    Unpacks as a pair: ``for target, multiplier in rules``.

    Attributes:
        target: what the rule speaks of, as it was written.
        multiplier: a finite float, or None for frozen (a multiplier of 0 becomes None).
        optional: whether the rule may claim nothing.
        selector: the target as it was understood.
        text: the target as messages show it.

    Raises:
        PatternError: if the target cannot be read.
        MultiplierError: if the multiplier is not a finite number or None.

    Example:
        >>> import lrmult as lm
        >>> target, multiplier = lm.Rule("encoder/layers[:4]", 0)
        >>> print(target, multiplier)
        encoder/layers[:4] None
    """

    target: Target = dataclasses.field(compare=False)  # a slice in it could not be hashed
    multiplier: Multiplier
    optional: bool = False
    selector: Selector = dataclasses.field(init=False)
    text: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", show_target(self.target))
        object.__setattr__(self, "selector", _read_target(self.target))
        object.__setattr__(self, "multiplier", _read_multiplier(self.multiplier))

    def __iter__(self) -> Iterator[Any]:
        yield self.target
        yield self.multiplier

    def __repr__(self) -> str:
        return f"({show_target(self.target)}, {self.multiplier!r})"

    def __str__(self) -> str:
        return show_rule(self.target, self.multiplier)


class Rules(Sequence[Rule]):
    """An ordered, immutable list of rules; the first that matches wins.

    A rule is a pair of a target (which parameters) and a multiplier (how fast they learn). What no
    rule matches has the multiplier 1. Nothing but the order decides between two rules that match
    the same parameter.

    Targets:
        * ``"head"``, ``"encoder/head/kernel"``: that node, from the root, and all below it;
        * ``"layers[2]"``, ``"layers[-1]"``, ``"layers[:4]"``: children by position, as in Python;
        * ``"**/bias"``, ``"*/kernel"``, ``"block_{a,b}/*_scale"``: ``*`` within one segment, ``**``
          any number of segments, ``{a,b}`` either; a backslash takes the meaning off the next
          character;
        * ``("encoder", "layers", 2)``: literal names, positions, and ``...`` for any depth;
        * ``2``, ``-1``, ``slice(0, 4)``: children of the root by position;
        * ``re.compile(r".*/kernel")``: matched against the whole path of an array;
        * ``lambda path, leaf: leaf.ndim == 1``: a predicate of an array's path, as `paths` lists
          it, and its `jax.ShapeDtypeStruct`. Its answers are cached, so it must depend on nothing
          else;
        * ``...`` or ``"**"``: everything.

    Multipliers:
        * a finite number, negative too (gradient ascent);
        * ``None`` or 0: frozen. The update is replaced, not multiplied, so that it is zero where a
          gradient is NaN.

    Args:
        rules: pairs of target and multiplier, a mapping from the one to the other, one number for
            everything, or other `Rules`.

    Raises:
        PatternError: if a target cannot be read.
        MultiplierError: if a multiplier is not a finite number or None.
        RuleError: if `rules` is none of the above. ``None`` is an error: no rules are ``[]``, and
            ``[(..., None)]`` freezes everything.

    Example:
        >>> import lrmult as lm
        >>> rules = lm.Rules([("head", 10), ("encoder/layers[:4]", None)])
        >>> rules + [(..., 0.1)]
        Rules([('head', 10.0), ('encoder/layers[:4]', None), (..., 0.1)])

    The semantics are those of the option `LearningRateMultipliers` of the Wolfram Language;
    positions count from 0 here and spans exclude their end.
    """

    __slots__ = ("_rules",)

    def __init__(self, rules: RulesLike = ()) -> None:
        self._rules = tuple(_read_rules(rules))

    def __len__(self) -> int:
        return len(self._rules)

    @overload
    def __getitem__(self, index: int) -> Rule: ...
    @overload
    def __getitem__(self, index: slice) -> "Rules": ...
    def __getitem__(self, index: int | slice) -> "Rule | Rules":
        found = self._rules[index]
        return Rules(found) if isinstance(found, tuple) else found

    def __add__(self, other: RulesLike) -> "Rules":
        return Rules(self._rules + Rules(other)._rules)

    def __radd__(self, other: RulesLike) -> "Rules":
        return Rules(other) + self

    def __eq__(self, other: object) -> bool:
        return self._rules == other._rules if isinstance(other, Rules) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._rules)

    def __repr__(self) -> str:
        if not any(rule.optional for rule in self):
            return f"Rules([{', '.join(map(repr, self))}])"
        shown = [
            f"optional([{rule!r}])" if rule.optional else f"Rules([{rule!r}])" for rule in self
        ]
        return " + ".join(shown)


def optional(rules: RulesLike) -> Rules:
    """Mark rules that may claim nothing.

    A rule that matches no parameter, or only what earlier rules have claimed, is an error. Marked
    as optional it is passed over instead, so that one list of rules can serve several models, or
    carry defaults that a user's own rules may override in full. A position that has no order is an
    error all the same.

    Args:
        rules: as for `Rules`.

    Returns:
        The same rules, optional.

    Raises:
        RuleError: as `Rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> rules = lm.optional([("adapter", 10), ("head", 2)])
        >>> lm.compile_rules(rules, {"head": jnp.ones(3)}).multipliers
        {'head': 2.0}
    """
    return Rules([Rule(rule.target, rule.multiplier, optional=True) for rule in Rules(rules)])


def name_rule(index: int, target: Target, multiplier: Any) -> str:
    """Name a rule in a message by its place in the list and its text."""
    return f"rule {index} ({show_rule(target, multiplier)})"


def show_rule(target: Target, multiplier: Any) -> str:
    """A rule in a message or a table."""
    return f"{show_target(target)} -> {show_multiplier(multiplier)}"


def show_multiplier(multiplier: Any) -> str:
    """A multiplier in a message or a table: ``frozen``, or a number."""
    if multiplier is None:
        return "frozen"
    return f"{multiplier:.12g}" if isinstance(multiplier, float) else show(multiplier)


def show_target(target: Target) -> str:
    """Write a target as it stands in Python source, as far as it can be."""
    if target is ...:
        return "..."
    if isinstance(target, tuple):
        shown = [show_target(part) for part in target[:20]] + ["..."] * (len(target) > 20)
        return shorten(f"({', '.join(shown)}{',' * (len(target) == 1)})")
    if callable(target) and not isinstance(target, type):
        name = getattr(target, "__qualname__", None)
        return f"<predicate {shorten(name)}>" if name else show(target)
    return show(target)


def _read_rules(rules: Any) -> Iterator[Rule]:
    if isinstance(rules, Rules):
        yield from rules
        return
    if rules is None:
        raise RuleError(
            "None is no list of rules: write [] for no rules (everything learns at the full rate), "
            "or [(..., None)] to freeze everything"
        )
    if isinstance(rules, numbers.Number) or getattr(rules, "ndim", None) == 0:
        try:
            yield _read_rule(0, (..., rules))
        except MultiplierError as error:
            raise MultiplierError(f"{error} ([(..., None)] freezes everything)") from None
        return
    if isinstance(rules, Mapping):
        rules = rules.items()
    elif isinstance(rules, set | frozenset):
        raise RuleError(
            "a set of rules has no order, and the first rule that matches wins; write a list"
        )
    elif (
        isinstance(rules, str | bytes)
        or hasattr(rules, "_fields")
        or not isinstance(rules, Iterable)
    ):
        raise RuleError(
            f"{show(rules)} is no list of rules; write a list of (target, multiplier) pairs, such "
            "as [('head', 10.0), (..., 0.1)]"
        )
    elif _looks_like_one_rule(rules):
        raise RuleError(f"{show(rules)} is one rule, not a list of rules; write [{show(rules)}]")
    for index, item in enumerate(rules):
        yield _read_rule(index, item)


def _looks_like_one_rule(rules: Any) -> bool:
    """Whether a pair was passed where a list of pairs is meant."""
    if isinstance(rules, Rule):
        return True
    if not isinstance(rules, tuple | list) or len(rules) != 2:
        return False
    target, multiplier = rules
    if multiplier is not None and not isinstance(multiplier, numbers.Number | str):
        return False
    if isinstance(target, tuple):
        return isinstance(rules, tuple)
    return target is ... or isinstance(target, str) != isinstance(multiplier, str)


def _read_rule(index: int, item: Any) -> Rule:
    if isinstance(item, Rule):
        return item
    nested = isinstance(item, Rules) or (
        isinstance(item, tuple | list)
        and len(item) > 0
        and all(isinstance(part, tuple | list | Rule) for part in item)
    )
    if nested:
        raise RuleError(
            f"rule {index} is {show(item)}, a list of rules and no (target, multiplier) pair; join "
            "lists of rules with +, or take the inner brackets off"
        )
    if not isinstance(item, tuple | list) or len(item) != 2:
        target = item if isinstance(item, str) else "head"
        raise RuleError(
            f"rule {index} is {show(item)}, which is no (target, multiplier) pair; write for "
            f"instance ({show(target)}, 10.0), or ({show(target)}, None) to freeze"
        )
    target, multiplier = item
    try:
        return Rule(target, multiplier)
    except LrmultError as error:
        cause = _misplaced(target, multiplier) or error
        raise type(error)(f"{name_rule(index, target, multiplier)}: {cause}") from None


def _misplaced(target: Any, multiplier: Any) -> str | None:
    """What to say of a pair that is the wrong way round, or holds further rules."""
    if isinstance(multiplier, str) and (target is None or isinstance(target, numbers.Real)):
        return f"the target comes first; write ({show(multiplier)}, {show(target)})"
    if isinstance(multiplier, Mapping):
        names = [target, *list(multiplier)[:1]]
        example = "/".join(names) if all(isinstance(name, str) for name in names) else "head/bias"
        return (
            "a multiplier is a number or None, not a dict; rules do not nest, so write the path in "
            f"full, such as {shorten(example)!r}"
        )
    return None


def _read_multiplier(value: Any) -> Multiplier:
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool | np.bool_):
        raise MultiplierError(
            f"{value!r} is no multiplier; write 1 for what trains at the full rate, or None for "
            "what is frozen"
        )
    if not isinstance(value, numbers.Real):
        raise MultiplierError(_wrong_multiplier(value))
    try:
        number = float(value)
    except OverflowError:
        raise MultiplierError(f"{show(value)} is too large for a float") from None
    if not math.isfinite(number):
        raise MultiplierError(
            f"{show(value)} is not finite; write a finite number, or None for what is frozen"
        )
    if number == 0 and value != 0:
        raise MultiplierError(f"{show(value)} is too small for a float; write None for frozen")
    return number or None


def _wrong_multiplier(value: Any) -> str:
    shown = show(value)
    if not shown.startswith(("an ", "the ")):
        shown = f"{shown} ({type(value).__name__})"
    seen = f"a multiplier is one number or None, not {shown}"
    if isinstance(value, str):
        try:
            if math.isfinite(float(value)):
                return f"{seen}; write {float(value)!r}, without quotes"
        except ValueError:
            pass
        return f"{seen}; write None for what is frozen, or a finite number such as 0.1"
    if isinstance(value, numbers.Complex):
        return f"{seen}; write its real part"
    if getattr(value, "shape", None) == ():
        return f"{seen}; write float(...) of it"
    if callable(value) and not isinstance(value, type):
        return f"{seen}; schedules are not supported, so write the number to use"
    return f"{seen}; write a number such as 0.1, or None for what is frozen"


def _read_target(target: Any) -> Selector:
    if isinstance(target, str):
        return parse(target)
    if target is ...:
        return Pattern((ANY_DEPTH,))
    if isinstance(target, tuple):
        return pattern_from_tuple(target)
    if isinstance(target, re.Pattern):
        if isinstance(target.pattern, bytes):
            raise PatternError("a regular expression of bytes cannot match a path; drop the b")
        return target
    if isinstance(target, slice) or (
        isinstance(target, numbers.Integral) and not isinstance(target, bool)
    ):
        return Pattern((At(position_from_python(target)),))
    if callable(target) and not isinstance(target, type):
        # A module of Equinox or NNX is callable too, but it is a tree of arrays.
        is_partial = isinstance(target, functools.partial)
        if is_partial or not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(target)):
            return cast(Predicate, target)
        raise PatternError(
            f"a module ({type(target).__name__}) is no target; write its path, as "
            "lrmult.paths(...) lists it"
        )
    raise PatternError(
        f"{show(target)} ({type(target).__name__}) is no target; write a path such as "
        "'encoder/head' or a tuple of names for one part, ... for everything, a compiled regular "
        "expression, or a predicate (path, leaf) -> bool"
    )
