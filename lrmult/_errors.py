"""The exceptions. A message says what failed, where, what was seen, and what to write instead."""

import re
from collections.abc import Iterable, Mapping
from typing import Any


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

    node: int | None = None  # of the tree at hand, where its children have none


class IndexRangeError(PositionError):
    """A position or an index that lies outside what is there."""


class AxisError(LrmultError):
    """An axis that an array does not have, or an output axis that is not known."""


class MaskError(LrmultError):
    """An element mask, or a boolean index, of another shape or dtype than the part it is for."""


class FrozenError(LrmultError, AssertionError):
    """Something frozen that changed."""


class FeaturesError(LrmultError):
    """Features that do not fit, that would not stay what they are, or that are out of date."""


def shorten(text: str, most: int = 80) -> str:
    """One line of at most that many characters."""
    line = " ".join(text.split()) if "\n" in text else text
    return line if len(line) <= most else f"{line[: most - 20]}...{line[-17:]}"


def show(value: Any) -> str:
    """How a message shows an object that somebody passed: on one line, without addresses."""
    if type(value) is str:
        return shorten(repr(value))
    is_class = isinstance(value, type)
    if not is_class and hasattr(value, "dtype") and getattr(value, "shape", ()) != ():
        return f"an array {spec(value.shape, value.dtype)}"
    if callable(value) and hasattr(value, "__qualname__"):
        kind = "class" if is_class else "function"
        return f"the {kind} {value.__qualname__}"
    if not _is_short(value):
        return f"a {type(value).__name__} of {len(value)} items"
    try:
        text = repr(value)
    except Exception:
        return f"an object of type {type(value).__name__}"
    return shorten(re.sub(r" at 0x[0-9a-f]+", "", text))


def _is_short(value: Any, most: int = 100_000) -> bool:
    """Whether the text of a container is at most about so long.

    One that holds another many times over, as aliases in YAML can make it, may fill the memory.
    """
    pending = [value]
    while pending and most > 0:
        each = pending.pop()
        if isinstance(each, Mapping | list | tuple | set | frozenset):
            most -= len(each)
            pending += [*each, *each.values()] if isinstance(each, Mapping) else each
        elif each is not value:
            most -= len(each) if isinstance(each, str | bytes) else 1
    return most > 0


def spec(shape: Iterable[int], dtype: Any) -> str:
    """How a message shows a shape and a dtype: ``float32[10,4]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def listing(names: Iterable[str], most: int = 6) -> str:
    """Quote the first few names and count the rest."""
    quoted = [repr(name) for name in names]
    if len(quoted) > most:
        return f"{', '.join(quoted[:most])} and {len(quoted) - most} more"
    return " and ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))


def in_bytes(size: int) -> str:
    """How much so many bytes are: ``1.5 GB``."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 0.9995 * 1000**power:
            return f"{size / 1000**power:.3g} {unit}"
    return f"{size} B"
