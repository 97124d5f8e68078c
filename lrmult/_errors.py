"""The exceptions. A message says what failed, where, what was seen, and what to write instead."""

import difflib
from collections.abc import Iterable


class LrmultError(ValueError):
    """Base of every error that lrmult raises for something the caller wrote."""


class RuleError(LrmultError):
    """A rule, a list of rules, or a parameter tree that rules cannot speak about."""


class PatternError(RuleError):
    """A target that cannot be read: malformed text, or an object that is no target."""


class MultiplierError(RuleError):
    """A multiplier that is neither a finite number nor ``None``."""


class UnmatchedRuleError(LrmultError):
    """A rule whose target matches no parameter."""


class ShadowedRuleError(LrmultError):
    """A rule that can never apply, because earlier rules claim all that it matches."""


class PositionError(LrmultError):
    """A position among children that have no order, or whose order cannot be known."""


class IndexRangeError(PositionError):
    """A position or an index that lies outside what is there."""


def did_you_mean(candidates: Iterable[str]) -> str:
    """Phrase near misses as a question, or as nothing if there are none."""
    quoted = [repr(candidate) for candidate in candidates]
    return f" Did you mean {' or '.join(quoted)}?" if quoted else ""


def near_misses(word: str, known: Iterable[str], most: int = 2) -> list[str]:
    """The known words that look like `word`, best first."""
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    found = difflib.get_close_matches(word.casefold(), list(folded), n=most, cutoff=0.6)
    return [folded[name] for name in found]


def listing(names: Iterable[str], most: int = 6) -> str:
    """Quote the first few names and count the rest."""
    quoted = [repr(name) for name in names]
    shown = ", ".join(quoted[:most])
    return f"{shown} and {len(quoted) - most} more" if len(quoted) > most else shown
