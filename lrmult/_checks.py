"""The strict checks: a rule that says nothing, or can never be heard, is a mistake."""

from lrmult._errors import (
    IndexRangeError,
    LrmultError,
    ShadowedRuleError,
    UnmatchedRuleError,
    shorten,
)
from lrmult._matching import Matches
from lrmult._paths import ParamTree
from lrmult._patterns import Pattern
from lrmult._rules import Rule, Rules, name_rule
from lrmult._suggest import explain_unmatched


def check(rules: Rules, tree: ParamTree, matches: Matches, *, strict: bool) -> list[str]:
    """Raise for the first rule that is a mistake; if not strict, return what to warn of instead.

    Raises:
        PositionError: if what a position means cannot be told, or nothing stands there.
        RuleError: if a predicate failed.
        UnmatchedRuleError: if a rule matches nothing.
        ShadowedRuleError: if earlier rules claim all that a rule matches.
    """
    rows = set(matches.rows)
    matched = {rule for row in rows for rule in row}
    claiming = {row[0] for row in rows if row}
    warnings = []
    for index, rule in enumerate(rules):
        error = _mistake(index, rules, tree, matches, matched, claiming)
        if error is None:
            continue
        message = f"{_name(index, rule)}: {error}"
        if strict or not isinstance(error, UnmatchedRuleError | ShadowedRuleError):
            raise type(error)(message) from error.__cause__
        warnings.append(message)
    return warnings


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
    return UnmatchedRuleError(explain_unmatched(rule, tree))


def _closes(index: int, rules: Rules) -> bool:
    """Whether the rule is a catch-all with no other rule of the user's after it."""
    selector = rules[index].selector
    return (
        isinstance(selector, Pattern)
        and selector.is_everything
        and all(later.optional for later in rules[index + 1 :])
    )


def _explain_shadowed(index: int, rules: Rules, tree: ParamTree, matches: Matches) -> str:
    lost = {leaf for leaf, row in enumerate(matches.rows) if index in row}
    winners = sorted({matches.rows[leaf][0] for leaf in lost})
    # Moving the rule up helps only if it leaves something to each of those that it then precedes.
    left = {row[0] for leaf, row in enumerate(matches.rows) if row and leaf not in lost}
    named = [_name(winner, rules[winner]) for winner in winners[:2]]
    if len(winners) > 2:
        named.append(f"{len(winners) - 2} more")
    example = shorten(tree.text(tree.places[min(lost)] or 0))
    what = f"all {len(lost)} arrays that it matches" if len(lost) > 1 else "all that it matches"
    if left.issuperset(winners):
        remedy = f"put it before rule {winners[0]}, or remove it"
    elif len(winners) == 1:
        remedy = f"it matches all that rule {winners[0]} has; remove one of the two"
    else:
        remedy = "remove it, or those rules"
    return (
        f"it can never apply, because the first rule that matches wins and {' and '.join(named)} "
        f"already {'claims' if len(winners) == 1 else 'claim'} {what}"
        + (f" ({'such as ' * (len(lost) > 1)}{example!r})" if example else "")
        + f"; {remedy}"
    )
