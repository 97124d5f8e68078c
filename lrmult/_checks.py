"""The strict checks: a rule that says nothing, or can never be heard, is a mistake."""

from collections.abc import Iterator

from lrmult._claims import Matched, claiming_rules
from lrmult._errors import (
    IndexRangeError,
    LrmultError,
    PositionError,
    ShadowedRuleError,
    UnmatchedRuleError,
    shorten,
)
from lrmult._matching import Matches
from lrmult._paths import ParamTree
from lrmult._patterns import Pattern
from lrmult._rules import Rule, Rules, name_rule
from lrmult._suggest import explain_unmatched


def check(
    rules: Rules,
    tree: ParamTree,
    matches: Matches,
    matched: Matched,
    *,
    strict: bool,
) -> list[str]:
    """Raise for the first rule that is a mistake; if not strict, return what to warn of instead.

    Raises:
        PositionError: if what a position means cannot be told, or nothing stands there.
        AxisError: if the part that a rule names lies along an axis that is not there or not known.
        MaskError: if a mask does not fit.
        RuleError: if a predicate failed.
        UnmatchedRuleError: if a rule matches nothing.
        ShadowedRuleError: if earlier rules claim all that a rule matches.
    """
    warnings = []
    for index, error in mistakes(rules, tree, matches, matched):
        message = f"{_name(index, rules[index])}: {error}"
        if strict or not isinstance(error, UnmatchedRuleError | ShadowedRuleError):
            raise type(error)(message) from error.__cause__
        warnings.append(message)
    return warnings


def mistakes(
    rules: Rules, tree: ParamTree, matches: Matches, matched: Matched
) -> Iterator[tuple[int, LrmultError]]:
    """The rules that are mistakes, and why; messages do not name the rule."""
    matching = {rule for row in set(matched.rows) for rule in row}
    overruled = {rule for lost in matched.overruled.values() for rule in lost}
    # In a hole a rule may apply; one that has lost all that is there, if no earlier rule claims
    # all that may be in the hole too.
    in_holes = {
        index
        for index, rows in matches.in_holes.items()
        if index not in matching
        or not all(any(i < index and not rules[i].restrictions for i in row) for row in rows)
    }
    heard = claiming_rules(matched.claims) | overruled | in_holes
    last = max((index for index, rule in enumerate(rules) if not rule.optional), default=0)
    explained = 0
    for index, rule in enumerate(rules):
        error = matches.errors.get(index, matched.errors.get(index))
        if error is None and index not in heard and not (index >= last and _is_catch_all(rule)):
            if index not in matching:
                error = matched.nothing.get(index, matches.unresolved.get(index))
            if error is None and not rule.optional:
                explained += 1
                in_full = explained <= _MOST_EXPLAINED
                error = (
                    ShadowedRuleError(_explain_shadowed(index, rules, tree, matched, in_full))
                    if index in matching
                    else UnmatchedRuleError(explain_unmatched(rule, tree, in_full))
                )
        if error is not None and not (rule.optional and isinstance(error, _FORGIVEN)):
            hinted = type(error)(f"{error}{_hint(error, tree)}")
            hinted.__cause__ = error.__cause__
            yield index, hinted


def _hint(error: LrmultError, tree: ParamTree) -> str:
    """What else may have been meant by a position where children have no order."""
    node = error.node if isinstance(error, PositionError) else None
    if not node:
        return ""
    path = shorten(tree.text(node))
    shapes = [tree.shapes[leaf] for leaf, place in tree.arrays() if node in tree.line(place)]
    axes = [len(shape) for shape in shapes]
    if len({shape[:1] for shape in shapes}) == 1 and min(axes) > 1 and max(axes) > 2:
        return (
            "; or, if these are layers in a stack, say so with "
            f"structure=lrmult.Structure(stacked={{{path!r}: 0}})"
        )
    if not {"kernel", "w", "weight"}.isdisjoint(tree.children[node]):
        return f"; output units of a layer are lrmult.neurons({path!r}, index)"
    return ""


# What each of very many mistakes may be due to, nobody reads, and it takes a walk over the tree.
_MOST_EXPLAINED = 5
_FORGIVEN = (UnmatchedRuleError, IndexRangeError)  # of an optional rule


def _name(index: int, rule: Rule) -> str:
    return name_rule(index, rule.target, rule.multiplier)


def _is_catch_all(rule: Rule) -> bool:
    selector = rule.selector
    return isinstance(selector, Pattern) and selector.is_everything and not rule.restrictions


def _explain_shadowed(
    index: int, rules: Rules, tree: ParamTree, matched: Matched, in_full: bool
) -> str:
    if not in_full:
        return "earlier rules claim all that it matches"
    lost = {leaf for leaf, row in enumerate(matched.rows) if index in row}
    winners = sorted({rule for leaf in lost for rule in matched.holders(leaf, index)})
    # Moving the rule up helps only if it leaves something to each of those that it then precedes.
    left = {
        piece.rule for leaf, row in enumerate(matched.claims) if leaf not in lost for piece in row
    }
    for leaf in lost:
        row = (index, *(rule for rule in matched.rows[leaf] if rule != index))
        left.update(piece.rule for piece in matched.first_match(leaf, row))
    named = [_name(winner, rules[winner]) for winner in winners[:2]]
    if len(winners) > 2:
        named.append(f"{len(winners) - 2} more")
    example = shorten(tree.path(min(lost)))
    what = f"all {len(lost)} arrays that it matches" if len(lost) > 1 else "all that it matches"
    if any(not matched.regions(leaf, index)[0].is_whole for leaf in lost):
        what = "every element that it names"
        lost = {min(lost)}
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
