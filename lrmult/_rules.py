"""Rules: what to say, and how it is read."""

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from lrmult._errors import LrmultError, MultiplierError, RuleError, shorten, show
from lrmult._multipliers import (
    Dynamic,
    Multiplier,
    is_array,
    is_schedule,
    read_multiplier,
    show_multiplier,
)
from lrmult._of_type import OfType
from lrmult._targets import (
    Part,
    Restriction,
    Selector,
    Target,
    read_target,
    show_target,
)

if TYPE_CHECKING:
    from lrmult._structure import Structure

RulesLike: TypeAlias = "Rules | Iterable[Any] | Mapping[Any, Any] | float"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Rule:
    """One rule: a target and the multiplier of what it matches.

    Unpacks as a pair: ``for target, multiplier in rules``.

    Attributes:
        target: what the rule speaks of, as it was written.
        multiplier: a finite float, None for frozen (a multiplier of 0 becomes None), a schedule, or
            an array.
        optional: whether the rule may claim nothing.
        selector: the arrays that the target names, as it was understood.
        restrictions: the part of them that it names, innermost first.
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
    multiplier: Multiplier = dataclasses.field(compare=False)  # nor could an array
    optional: bool = False
    selector: Selector = dataclasses.field(init=False)
    restrictions: tuple[Restriction, ...] = dataclasses.field(init=False)
    text: str = dataclasses.field(init=False)
    _identity: Hashable = dataclasses.field(init=False)  # of the multiplier

    def __post_init__(self) -> None:
        selector, restrictions = read_target(self.target)
        multiplier = read_multiplier(self.multiplier)
        values = {
            "text": show_target(self.target),
            "selector": selector,
            "restrictions": restrictions,
            "multiplier": multiplier,
            "_identity": _identity(multiplier),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        # What is derived from these may hang on the identity of objects: it is derived anew.
        return Rule, (self.target, self.multiplier, self.optional)

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
        * ``...`` or ``"**"``: everything;
        * `of_type`: the arrays of a type of variable, or of a class of modules;
        * `neurons`, `rows`, `along`, `elements`: part of what another target names. The elements
          that a rule leaves go on to the next rules.

    Multipliers:
        * a finite number, negative too (gradient ascent);
        * ``None`` or 0: frozen. The update is replaced, not multiplied, so that it is zero where a
          gradient is NaN;
        * an `optax.Schedule`, from the number of updates so far to a multiplier. Where it gives 0,
          the update is replaced as well;
        * a JAX array of one number, traced or not: a value that is known at run time. It is always
          multiplied, also if it happens to be 0, so that one can differentiate with respect to it.

    Args:
        rules: pairs of target and multiplier, a mapping from the one to the other, one number for
            everything, or other `Rules`.

    Raises:
        PatternError: if a target cannot be read.
        MultiplierError: if a multiplier is none of the above.
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

    def __init__(self, rules: RulesLike = ()) -> None:
        self._rules = tuple(_read_rules(rules))

    @functools.cached_property
    def abstract(self) -> "Rules":
        """The rules with a stand-in for each schedule and array.

        Those that differ in nothing else are equal here: plans are cached by them.
        """
        numbers: dict[Hashable, int] = {}  # of schedules: equal ones are evaluated once
        found = []
        for index, rule in enumerate(self._rules):
            multiplier = rule.multiplier
            if is_schedule(multiplier) or is_array(multiplier):
                number = index
                if is_schedule(multiplier):
                    number = numbers.setdefault(rule._identity, index)
                stand_in = Dynamic(number, is_schedule(multiplier), show_multiplier(multiplier))
                rule = dataclasses.replace(rule, multiplier=stand_in)
            found.append(rule)
        return Rules(found)

    def to_dict(self) -> dict[str, Any]:
        """Write the rules as dicts, lists, text, numbers and booleans.

        Those can be written to JSON, YAML and TOML, and kept beside the configuration of an
        experiment; `from_dict` and `load_rules` give the same rules back. ::

            {"rules": [RULE, ...]}

            RULE        {"target": TARGET, "multiplier": MULTIPLIER}, with or without PART and
                        "optional": true; from_dict takes {"recipe": name, ...} too
            TARGET      text               a path or a pattern: "encoder/layers[:4]"
                        int                a child of the root by position
                        {"path": [...]}    names, ints and these tables, as in a tuple
                        {"slice": "0:4"}   children of the root by position
                        {"regex": text}    with or without "flags": some letters of "aimsx"
                        {"everything": true}
                        {"types": text, "paths": [...]}    what `of_type` found
                        {"target": TARGET, PART}           a part, of which the rule has a part
            PART        "rows": INDEX, or "axis": int, "index": INDEX, or "neurons": INDEX with or
                        without "axis": int, or "elements": MASK
            INDEX       int, list of ints or of booleans, or a slice as text: "-10:", "0:12:2"
            MASK        lists of booleans, or {"shape": [...], "bits": base64 of packed bits}
            MULTIPLIER  a number, "frozen" (in JSON and YAML null too), or the schedule
                        {"multiplier": number, "start": int, "stop": int} (see `During`)

        The arguments of a recipe stand beside its name; `params` is not among them. Targets are
        written as above, and groups as lists of targets and of lists of targets, or as what
        `lrmult.recipes.depths` takes: ``{"stack": "encoder/layers", "below": [...], "above":
        [...]}``.

        Returns:
            A dict of new objects.

        Raises:
            PatternError: if a target is a predicate.
            MultiplierError: if a multiplier is a function or an array.

        Example:
            >>> import lrmult as lm
            >>> rules = lm.Rules([("encoder", None), (lm.rows("embed", slice(-10, None)), 10)])
            >>> for rule in rules.to_dict()["rules"]:
            ...     print(rule)
            {'target': 'encoder', 'multiplier': 'frozen'}
            {'target': 'embed', 'rows': '-10:', 'multiplier': 10.0}
        """
        from lrmult._rule_files import write_rules

        return write_rules(self)

    @classmethod
    def from_dict(
        cls, data: Any, params: Any = None, *, structure: "Structure | None" = None
    ) -> "Rules":
        """Read what `to_dict` writes.

        Args:
            data: a dict as described there, or the list in it. Tables may be dicts, dataclasses, or
                `ml_collections.ConfigDict`.
            params: the parameters, or their shapes; for recipes that are called by name.
            structure: as for `compile_rules`; for these too.

        Returns:
            The rules.

        Raises:
            RuleError: if it is something else.
            LrmultError: as `Rules` and the recipes do.

        Example:
            >>> import jax.numpy as jnp
            >>> import lrmult as lm
            >>> params = {"layers": [jnp.ones(2), jnp.ones(2)], "head": jnp.ones(1)}
            >>> lm.Rules.from_dict(
            ...     [{"recipe": "layer_decay", "decay": 0.5,
            ...       "depths": {"stack": "layers", "above": ["head"]}}],
            ...     params,
            ... )
            optional([('layers/0', 0.25), ('layers/1', 0.5), ('head', 1.0)])
        """
        from lrmult._rule_files import read_rules

        return read_rules(data, params, structure)

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
        shown = [
            f"{'optional' if optional else 'Rules'}([{', '.join(map(repr, rules))}])"
            for optional, rules in itertools.groupby(self, lambda rule: rule.optional)
        ]
        return " + ".join(shown) or "Rules([])"


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


def _identity(multiplier: Multiplier) -> Hashable:
    """What equal multipliers have in common; no value of an array is looked at."""
    if is_array(multiplier):
        return "array", id(multiplier)
    try:
        hash(multiplier)
    except TypeError:
        return "object", id(multiplier)
    return multiplier


def name_rule(index: int, target: Target, multiplier: Any) -> str:
    """Name a rule in a message by its place in the list and its text."""
    return f"rule {index} ({show_rule(target, multiplier)})"


def show_rule(target: Target, multiplier: Any) -> str:
    """A rule in a message or a table."""
    return f"{show_target(target)} -> {show_multiplier(multiplier)}"


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
    allowed = isinstance(multiplier, numbers.Number | str | None)
    if not (allowed or is_array(multiplier) or is_schedule(multiplier)):
        return False
    if isinstance(target, Part | OfType):
        return True
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
