"""The strict checks: a rule that says nothing, or can never be heard, is a mistake.

The messages are made here, from the rule and the tree, and only when something is wrong.
"""

import re
import warnings
from collections.abc import Iterator

from lrmult._errors import (
    IndexRangeError,
    LrmultError,
    PatternError,
    ShadowedRuleError,
    UnmatchedRuleError,
    listing,
    near_misses,
)
from lrmult._matching import Matches, find
from lrmult._paths import ParamTree
from lrmult._patterns import (
    ANY_DEPTH,
    Indexed,
    Names,
    Pattern,
    Step,
    literal,
    parse,
    show_pattern,
)
from lrmult._positions import base_names, stems
from lrmult._rules import Rule, Rules, name_rule

_MOST_SUGGESTIONS = 2


def check(rules: Rules, tree: ParamTree, matches: Matches, *, strict: bool) -> None:
    """Raise for the first rule that is a mistake; if not strict, warn of those that do nothing.

    Raises:
        PositionError: if what a position means cannot be told, or nothing stands there.
        RuleError: if a predicate failed.
        UnmatchedRuleError: if a rule matches nothing.
        ShadowedRuleError: if earlier rules claim all that a rule matches.
    """
    rows = set(matches.rows)
    matched = {rule for row in rows for rule in row}
    claiming = {row[0] for row in rows if row}
    for index, rule in enumerate(rules):
        error = _mistake(index, rules, tree, matches, matched, claiming)
        if error is None:
            continue
        if strict or not isinstance(error, UnmatchedRuleError | ShadowedRuleError):
            raise type(error)(f"{_name(index, rule)}: {error}") from error.__cause__
        warnings.warn(f"{_name(index, rule)}: {error}", stacklevel=4)


def _name(index: int, rule: Rule) -> str:
    return name_rule(index, rule.target, rule.multiplier)


def _mistake(
    index: int,
    rules: Rules,
    tree: ParamTree,
    matches: Matches,
    matched: set[int],
    claiming: set[int],
) -> LrmultError | None:
    rule = rules[index]
    if index in matches.errors:
        return matches.errors[index]
    if index in claiming or index in matches.in_holes or _closes(index, rules):
        return None
    unresolved = matches.unresolved.get(index)
    if index not in matched and unresolved is not None:
        forgiven = rule.optional and isinstance(unresolved, IndexRangeError)
        return None if forgiven else unresolved
    if rule.optional:
        return None
    if index in matched:
        return ShadowedRuleError(_explain_shadowed(index, rules, tree, matches))
    return UnmatchedRuleError(_explain_unmatched(rule, tree))


def _closes(index: int, rules: Rules) -> bool:
    """Whether the rule is a catch-all with no other rule of the user's after it."""
    selector = rules[index].selector
    return (
        isinstance(selector, Pattern)
        and selector.is_everything
        and all(later.optional for later in rules[index + 1 :])
    )


def _explain_shadowed(index: int, rules: Rules, tree: ParamTree, matches: Matches) -> str:
    lost = [leaf for leaf, row in enumerate(matches.rows) if index in row]
    winners = sorted({matches.rows[leaf][0] for leaf in lost})
    example = tree.text(tree.places[lost[0]] or 0)
    named = [_name(winner, rules[winner]) for winner in winners[:3]]
    if len(winners) > 3:
        named.append(f"{len(winners) - 3} more")
    count = f"all {len(lost)} arrays" if len(lost) > 1 else "the one array"
    return (
        f"it can never apply, because the first rule that matches wins and {' and '.join(named)} "
        f"already {'claim' if len(winners) > 1 else 'claims'} {count} that it matches"
        + (f" (such as {example!r})" if example else "")
        + f"; put it before rule {winners[0]}, or remove it"
    )


def _explain_unmatched(rule: Rule, tree: ParamTree) -> str:
    total = sum(1 for _ in tree.arrays())
    if not total:
        return "the tree has no arrays to match"
    selector = rule.selector
    if isinstance(selector, Pattern):
        seen = f"no path matches {show_pattern(selector)!r}"
        suggestions = [repr(near) for near in _nearby(rule.target, selector, tree)]
        suggestions += _other_readings(rule.target, tree)
    elif isinstance(selector, re.Pattern):
        seen = f"the regular expression {selector.pattern!r} matches no whole path"
        suggestions = _wider(selector, tree)
    else:
        return (
            f"its predicate returned False for all {total} arrays (the first is "
            f"{_some_paths(tree, 1)}); lrmult.paths(params) lists what it is asked about"
        )
    if suggestions:
        return f"{seen}; did you mean {' or '.join(suggestions[:_MOST_SUGGESTIONS])}?"
    return f"{seen}; the paths are {_some_paths(tree, 4)} (lrmult.paths(params) lists them all)"


def _some_paths(tree: ParamTree, most: int) -> str:
    return listing([tree.text(node) for _, node in tree.arrays()], most)


def _nearby(target: object, pattern: Pattern, tree: ParamTree) -> list[str]:
    """The texts of patterns that do match, and that one slip turns into this one."""
    for slip in (_wrong_root, _other_separator, _misspelt, _below_an_array):
        found = [near for near in slip(target, pattern, tree) if find(near, tree)]
        if found:
            return list(dict.fromkeys(show_pattern(near) for near in found))
    return []


def _wrong_root(target: object, pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    yield from _anywhere(pattern.steps, tree)
    rest = pattern.steps[1:]
    if any(isinstance(step, Names | Indexed) for step in rest):
        yield Pattern(rest)


def _anywhere(steps: tuple[Step, ...], tree: ParamTree) -> Iterator[Pattern]:
    """The same steps from any depth: the paths in full, if they are few."""
    if steps[0] is ANY_DEPTH:
        return
    anywhere = Pattern((ANY_DEPTH, *steps))
    nodes = find(anywhere, tree)
    if len(nodes) <= _MOST_SUGGESTIONS and all(isinstance(step, Names) for step in steps):
        yield from (parse(tree.text(node)) for node in nodes)
    else:
        yield anywhere


def _misspelt(target: object, pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    respelt = list(_respell(pattern.steps, tree))
    yield from (Pattern(steps) for steps in respelt)
    if not respelt and pattern.steps[0] is not ANY_DEPTH:
        for steps in _respell((ANY_DEPTH, *pattern.steps), tree):
            yield from _anywhere(steps[1:], tree)


def _respell(steps: tuple[Step, ...], tree: ParamTree) -> Iterator[tuple[Step, ...]]:
    """Replace the first name that leads nowhere by names that do stand there."""
    for k, step in enumerate(steps):
        if find(Pattern(steps[: k + 1]), tree):
            continue
        if isinstance(step, Names | Indexed):
            known: set[str] = set()
            for node in _reached(steps[:k], tree):
                known.update(tree.children[node])
                for stem in stems(tree.children[node]) if isinstance(step, Indexed) else ():
                    known.update(base_names(stem)[-1:])
            names = step.names if isinstance(step, Indexed) else step
            for name in near_misses("*".join(names.alternatives[0]), sorted(known)):
                new = literal(name)
                fixed = Indexed(new, step.position) if isinstance(step, Indexed) else new
                yield (*steps[:k], fixed, *steps[k + 1 :])
        return


def _other_separator(target: object, pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    if isinstance(target, str):
        for text in (target.replace(".", "/"), target.replace("\\", "")):
            yield from _parsed(text)
    elif isinstance(target, tuple) and all(isinstance(part, str) for part in target):
        yield from _parsed("/".join(target))  # names in a tuple are literal: no wildcards


def _below_an_array(target: object, pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    for cut in range(len(pattern.steps) - 1, 0, -1):
        above = Pattern(pattern.steps[:cut])
        if not any(tree.children[node] for node in find(above, tree)):
            yield above


def _parsed(text: str) -> Iterator[Pattern]:
    try:
        yield parse(text)
    except PatternError:
        return


def _reached(steps: tuple[Step, ...], tree: ParamTree) -> list[int]:
    if not steps:
        return [0]
    if steps[-1] is ANY_DEPTH:
        return list(range(len(tree.names)))
    return find(Pattern(steps), tree)


def _other_readings(target: object, tree: ParamTree) -> list[str]:
    """What was perhaps meant if the text is no path at all."""
    if target == "...":
        return ["... (without quotes)"]
    if isinstance(target, str) and re.search(r"[.^$+()|]", target):
        try:
            regex = re.compile(target)
        except re.error:
            return []
        if any(regex.fullmatch(tree.raw_text(node)) for _, node in tree.arrays()):
            return [f"re.compile({target!r})"]
    return []


def _wider(regex: re.Pattern[str], tree: ParamTree) -> list[str]:
    paths = [tree.raw_text(node) for _, node in tree.arrays()]
    found = []
    for text in (f".*{regex.pattern}", f"{regex.pattern}.*", f".*{regex.pattern}.*"):
        try:
            wider = re.compile(text, regex.flags)
        except re.error:
            continue
        if any(map(wider.fullmatch, paths)):
            found.append(f"re.compile({text!r})")
    return found[:1]
