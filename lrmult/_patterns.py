"""Parse the text of a target into steps. Knows segments of text only: no trees, no arrays.

A pattern is a tuple of steps, read from the root downwards:

* `Names`: one segment, one of these names (wildcards allowed);
* `Indexed`: ``name[i]``, a child of the node of that name, or a member of its family;
* `At`: a child by position, of the node reached so far;
* `ANY_DEPTH`: any number of segments.
"""

import dataclasses
import enum
import functools
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

from lrmult._errors import PatternError, shorten, show

_SPECIAL: Final = re.compile(r"[\\*{}\[\]]")
_MOST_ALTERNATIVES: Final = 1000
_MOST_STEPS: Final = 10_000
_MOST_DIGITS: Final = 1000  # Python refuses to show ints of a few thousand


class Span(NamedTuple):
    """A slice of positions; hashable, which a `slice` is only from Python 3.12 on."""

    start: int | None
    stop: int | None
    step: int | None


Position: TypeAlias = int | Span


@dataclasses.dataclass(frozen=True)
class Names:
    """The names that one segment may have.

    Each alternative is a tuple of the fixed texts between its ``*``: ``("kernel",)`` is that name
    alone, ``("block_", "")`` is ``block_*``.
    """

    alternatives: tuple[tuple[str, ...], ...]

    @property
    def is_literal(self) -> bool:
        """Whether this is one name, without a wildcard."""
        return len(self.alternatives) == 1 and len(self.alternatives[0]) == 1

    @property
    def literals(self) -> Iterator[str]:
        return (parts[0] for parts in self.alternatives if len(parts) == 1)

    @functools.cached_property
    def globs(self) -> tuple["Glob", ...]:
        return tuple(Glob(parts) for parts in self.alternatives if len(parts) > 1)


@dataclasses.dataclass(frozen=True)
class Glob:
    """A name with at least one ``*`` in it, as the fixed texts between the stars."""

    parts: tuple[str, ...]

    def match(self, name: str) -> bool:
        """Whether a name fits."""
        first, *middle, last = self.parts
        at, end = len(first), len(name) - len(last)
        if at > end or not name.startswith(first) or not name.endswith(last):
            return False
        # Each fixed text is taken where it first occurs and never reconsidered, which is enough for
        # stars, and keeps the time linear where the regular expression `.*a.*a.*a` would explode.
        for part in middle:
            at = name.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


@dataclasses.dataclass(frozen=True)
class Indexed:
    """``name[position]``."""

    names: Names
    position: Position


@dataclasses.dataclass(frozen=True)
class At:
    """``[position]`` among the children of the node reached so far."""

    position: Position


class _AnyDepth(enum.Enum):
    ANY_DEPTH = "**"


ANY_DEPTH: Final = _AnyDepth.ANY_DEPTH
Step: TypeAlias = Names | Indexed | At | _AnyDepth


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A target that speaks of nodes by their path from the root; it covers all below them."""

    steps: tuple[Step, ...]

    @property
    def is_everything(self) -> bool:
        return self.steps == (ANY_DEPTH,)


@functools.lru_cache(maxsize=65536)
def escape(name: str) -> str:
    """Write a name as the segment of a pattern that matches this name alone."""
    return _SPECIAL.sub(r"\\\g<0>", name) if name else "{}"


def literal(name: str) -> Names:
    """The step that matches one name, none of whose characters is special."""
    return Names(((name,),))


def show_position(position: Position) -> str:
    """Write a position as it stands in a pattern: ``[2]``, ``[:4]``."""
    if isinstance(position, int):
        return f"[{position}]"
    ends = ["" if end is None else str(end) for end in position]
    return f"[{':'.join(ends if ends[2] else ends[:2])}]"


def show_pattern(pattern: Pattern) -> str:
    """Write a pattern as text that parses to the same pattern."""
    text = ""
    for step in pattern.steps:
        if isinstance(step, At):
            glued = text.endswith("]") or not text
            text += ("" if glued else "/") + show_position(step.position)
        else:
            text += "/" if text else ""
            text += step.value if step is ANY_DEPTH else _show_names(step)
    return text


def _show_names(step: Names | Indexed) -> str:
    if isinstance(step, Indexed):
        return _show_names(step.names) + show_position(step.position)
    shown = ["*".join(_SPECIAL.sub(r"\\\g<0>", p) for p in parts) for parts in step.alternatives]
    if len(shown) == 1:
        return shown[0] or "{}"
    return "{" + ",".join(name.replace(",", r"\,") for name in shown) + "}"


def literal_path(text: str) -> tuple[str, ...] | None:
    """The names along a path, without escapes; None if it has a wildcard or a position.

    Raises:
        PatternError: if it cannot be read.
    """
    steps = parse(text).steps
    names = [step for step in steps if isinstance(step, Names) and step.is_literal]
    return tuple(name.alternatives[0][0] for name in names) if len(names) == len(steps) else None


def pattern_from_tuple(parts: tuple[Any, ...]) -> Pattern:
    """Read ``("encoder", 2, "weight")``: literal names, positions, and ``...`` for any depth."""
    if not parts:
        raise PatternError("an empty tuple names nothing; write ... for everything")
    steps: list[Step] = []
    for part in parts:
        if part is ...:
            steps.append(ANY_DEPTH)
        elif isinstance(part, str):
            # Keys of a tree that hold a "/" are split, so names that hold one are split too.
            names = part.split("/")
            if not all(names):
                raise PatternError(f"{shorten(part)!r} in a tuple has an empty name; leave it out")
            steps.extend(literal(name) for name in names)
        else:
            position = position_from_python(part)
            if steps and isinstance(steps[-1], Names):
                steps[-1] = Indexed(steps[-1], position)
            else:
                steps.append(At(position))
    return _pattern(steps)


def position_from_python(value: Any) -> Position:
    """Read an int or a slice of ints; NumPy's integers too."""
    ends = (value.start, value.stop, value.step) if isinstance(value, slice) else (value,)
    try:
        if any(isinstance(end, bool) for end in ends):
            raise TypeError
        numbers = [None if end is None else operator.index(end) for end in ends]
    except TypeError:
        raise PatternError(
            f"{show(value)} is neither a name, an int, a slice of ints nor ..., which is all that "
            "a position or a tuple may hold"
        ) from None
    for number in numbers:
        check_magnitude(number)
    if isinstance(value, slice):
        return _span(numbers[0], numbers[1], numbers[2], repr(value))
    if numbers[0] is None:
        raise PatternError("None is no position; write ... for any depth")
    return numbers[0]


def check_magnitude(number: int | None) -> None:
    """Refuse a position, an index or an axis that no message could show.

    Raises:
        PatternError: if it is of that kind.
    """
    if number is not None and abs(number) >= 10**_MOST_DIGITS:
        raise PatternError(f"an int of more than {_MOST_DIGITS} digits is no position or index")


def _span(start: int | None, stop: int | None, step: int | None, text: str) -> Span:
    if step == 0:
        raise PatternError(f"{text} has a step of 0; leave the step out, or write another")
    return Span(start, stop, step)


def _pattern(steps: list[Step]) -> Pattern:
    kept = [s for i, s in enumerate(steps) if not (s is ANY_DEPTH and steps[i - 1 : i] == [s])]
    if len(kept) > _MOST_STEPS:  # the sets of states that they make grow with their square
        raise PatternError(
            f"it has {len(kept):,} segments and positions, of {_MOST_STEPS:,} at most; no tree is "
            "that deep"
        )
    return Pattern(tuple(kept))


class _Token(NamedTuple):
    text: str  # one special character, or a run of plain ones
    special: bool
    column: int  # counted from 1


_TOKEN: Final = re.compile(r"(?P<escaped>\\.)|(?P<special>[*{},\[\]/])|[^\\*{},\[\]/]+", re.DOTALL)


def _tokens(text: str) -> list[_Token]:
    tokens = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise PatternError(
                "it ends in a backslash, which takes the meaning off the next character; "
                "for a backslash itself write two"
            )
        plain = found["escaped"][1] if found["escaped"] else found[0]
        tokens.append(_Token(plain, found["special"] is not None, at + 1))
        at = found.end()
    return tokens


# What makes a text more than names, stars and choices, or is a mistake in it.
_MARKED: Final = re.compile(r"[\\\[\]]|[^/]\*\*|\*\*[^/]|//|^/|/\Z")
_CHOICE: Final = re.compile(r"([^{},]*)\{([^{}]*)\}([^{},]*)")


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Read the text of a target, such as ``"encoder/layers[:4]/**/bias"``.

    Raises:
        PatternError: with the cause alone; whoever knows the rule adds where it stands.
    """
    if not text.strip("/"):
        seen = f"{shorten(text)!r}" if text else "an empty text"
        raise PatternError(f"{seen} names nothing; write ... for everything")
    if not _MARKED.search(text):  # `_parse` would take several times as long to say the same
        quick = [_quick_step(segment) for segment in text.split("/")]
        known = [step for step in quick if step is not None]
        if len(known) == len(quick):
            return _pattern(known)
    return _parse(text)


def _quick_step(segment: str) -> Step | None:
    """The step of a segment with one choice at most; None for any other."""
    if segment == "**":
        return ANY_DEPTH
    names = [segment]
    if "{" in segment or "}" in segment:
        found = _CHOICE.fullmatch(segment)
        before, choices, after = found.groups() if found else ("", "", "")
        if not 1 <= choices.count(",") < _MOST_ALTERNATIVES:
            return None
        names = [before + choice + after for choice in choices.split(",")]
    return Names(tuple(dict.fromkeys([tuple(name.split("*")) for name in names])))


def _parse(text: str) -> Pattern:
    segments: list[list[_Token]] = [[]]
    braces = 0
    for token in _tokens(text):
        if token.special and token.text == "/":
            if braces > 0:
                raise PatternError(
                    f"the '/' at character {token.column} stands inside braces, which choose "
                    "within one segment; write one rule for each path"
                )
            segments.append([])
        else:
            braces += token.special and (token.text == "{") - (token.text == "}")
            segments[-1].append(token)
    steps: list[Step] = []
    for segment in segments:
        if not segment:
            where = "begins with" if not segments[0] else "ends with"
            doubled = segments[0] and segments[-1]
            raise PatternError(
                ("it has two '/' in a row" if doubled else f"it {where} a '/'")
                + "; paths start at the root, with one '/' between names"
            )
        steps.extend(_parse_segment(segment))
    return _pattern(steps)


def _parse_segment(tokens: list[_Token]) -> Iterator[Step]:
    marks = [token.text if token.special else "" for token in tokens]
    if marks == ["*", "*"]:
        yield ANY_DEPTH
        return
    bracket = marks.index("[") if "[" in marks else len(tokens)
    positions = _parse_brackets(tokens[bracket:])
    if bracket:
        names = Names(_parse_name(tokens[:bracket]))
        yield Indexed(names, positions.pop(0)) if positions else names
    yield from (At(position) for position in positions)


def _parse_name(tokens: list[_Token]) -> tuple[tuple[str, ...], ...]:
    """Expand braces into alternatives, each the fixed texts between its stars."""
    current: list[tuple[str, ...]] = [("",)]
    # For each open brace: what stands before it, and its finished branches.
    opened: list[tuple[list[tuple[str, ...]], list[tuple[str, ...]]]] = []
    for is_brace, run in itertools.groupby(_with_choices(tokens), _is_of_braces):
        if not is_brace:  # as one: to join them one by one would take a time that grows faster
            current = _join(current, [_fixed_texts(run)])
            continue
        for token in run:
            if token.text == "{":
                opened.append((current, []))
                current = [("",)]
            elif token.text == ",":
                opened[-1][1].extend(current)
                current = [("",)]
            else:
                before, branches = opened.pop()
                current = _join(before, branches + current)
    return tuple(dict.fromkeys(current))


def _is_of_braces(token: _Token) -> bool:
    return token.special and token.text in "{,}"


def _fixed_texts(tokens: Iterable[_Token]) -> tuple[str, ...]:
    """The texts between the stars."""
    texts: list[list[str]] = [[]]
    for token in tokens:
        if token.special:
            texts.append([])
        else:
            texts[-1].append(token.text)
    return tuple("".join(text) for text in texts)


def _with_choices(tokens: list[_Token]) -> list[_Token]:
    """A name whose braces all hold a comma, and whose commas all stand in braces.

    Other braces choose between nothing: they become empty texts, and other commas plain ones.

    Raises:
        PatternError: if something in it is out of place.
    """
    found = list(tokens)
    opened: list[int] = []
    choosing: set[int] = set()  # of the open braces, those that hold a comma
    choices = 0
    star_before = False
    for at, token in enumerate(tokens):
        mark = token.text if token.special else ""
        if mark == "*" and star_before:
            raise PatternError(
                f"the '**' at character {token.column - 1} is part of a longer name; it stands "
                "alone between slashes ('a/**/b'), and '*' matches within a name"
            )
        if mark == "{":
            opened.append(at)
        elif mark == "," and opened:
            choosing.add(opened[-1])
            choices += 1
        elif mark == ",":
            found[at] = token._replace(special=False)
        elif mark in ("}", "]") and (mark == "]" or not opened):
            raise PatternError(
                f"the {mark!r} at character {token.column} closes nothing; for the character "
                f"itself write '\\{mark}'"
            )
        elif mark == "}" and opened[-1] in choosing:
            opened.pop()
        elif mark == "}":
            for brace in (opened.pop(), at):
                found[brace] = tokens[brace]._replace(text="", special=False)
        star_before = mark == "*"
    if opened:
        raise PatternError(
            f"the '{{' at character {tokens[opened[-1]].column} is never closed; for the character "
            "itself write '\\{'"
        )
    _check_alternatives(choices + 1)
    return found


def _check_alternatives(count: int) -> None:
    if count > _MOST_ALTERNATIVES:
        raise PatternError(
            f"its braces stand for more than {_MOST_ALTERNATIVES} names; write '*' or several rules"
        )


def _join(heads: list[tuple[str, ...]], tails: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    _check_alternatives(len(heads) * len(tails))
    return [(*head[:-1], head[-1] + tail[0], *tail[1:]) for head in heads for tail in tails]


_NUMBER: Final = r"-?[0-9]{1,18}"
_POSITION: Final = re.compile(
    rf"(?P<index>{_NUMBER})|(?P<start>{_NUMBER})?:(?P<stop>{_NUMBER})?(?::(?P<step>{_NUMBER})?)?"
)


def _parse_brackets(tokens: list[_Token]) -> list[Position]:
    positions: list[Position] = []
    inside: list[str] | None = None
    opened = 0
    for token in tokens:
        mark = token.text if token.special else ""
        if inside is None:
            if mark != "[":
                raise PatternError(
                    f"{shorten(token.text)!r} follows a ']'; a position ends its segment, so a '/' "
                    "(or nothing) comes next"
                )
            inside, opened = [], token.column
        elif mark == "]":
            positions.append(_parse_position("".join(inside)))
            inside = None
        else:
            inside.append(token.text)
    if inside is not None:
        raise PatternError(
            f"the '[' at character {opened} is never closed; for the character itself write '\\['"
        )
    return positions


def _parse_position(text: str) -> Position:
    found = _POSITION.fullmatch(text)
    if found is None:
        raise PatternError(
            f"[{shorten(text)}] is no position; write one int or slice, such as [2], [-1] or [:4] "
            "(several positions are several rules); a name goes after a '/', and for the character "
            "itself write '\\['"
        )
    if found["index"] is not None:
        return int(found["index"])
    start, stop, step = (int(end) if end else None for end in found.group("start", "stop", "step"))
    return _span(start, stop, step, f"[{text}]")
