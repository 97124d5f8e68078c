"""What was perhaps meant by a rule that matches nothing. Runs only when an error is made.

Whatever is suggested has been tried: it does match something.
"""

import bisect
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator

from lrmult._errors import PatternError, listing, shorten
from lrmult._matching import find
from lrmult._of_type import OfType
from lrmult._paths import ParamTree
from lrmult._patterns import (
    ANY_DEPTH,
    Indexed,
    Names,
    Pattern,
    Step,
    escape,
    parse,
    show_pattern,
)
from lrmult._positions import base_names, stems
from lrmult._rules import Rule
from lrmult._targets import show_target, whole_target

_MOST = 2
_CUTOFF = 0.7
# The time to find what was meant grows with the length of a target faster than in proportion.
_LONGEST = 500
_MOST_WORDS = 4

# Other systems' ways to write a path, and how they are written here.
_NOTATIONS = (
    (re.compile(r"\.\.\."), "**"),
    (re.compile(r"[\s.\\:/^$]+"), "/"),
    (re.compile(r"\?"), "*"),
    (re.compile(r"\(([^()]*\|[^()]*)\)"), lambda found: f"{{{found[1].replace('|', ',')}}}"),
    (re.compile(r"\((-?[0-9:]+)\)"), r"[\1]"),
    (re.compile(r"\*+"), "/**/"),
)


def explain_unmatched(rule: Rule, tree: ParamTree, in_full: bool = True) -> str:
    """Say that a rule matches nothing, what it was held against, and what would match.

    If not in full, that it matches nothing.
    """
    if not in_full:
        return "it matches nothing"
    arrays = [node for _, node in tree.arrays()]
    if not arrays:
        return "the tree has no arrays to match"
    selector = rule.selector
    if isinstance(selector, Pattern):
        there = find(selector, tree)
        if there:
            return f"{shorten(tree.text(there[0]))!r} is in the tree, but holds no array"
        if arrays == [0]:
            return "the tree is one bare array, which has no path; the target ... reaches it"
        target = whole_target(rule.target)
        seen = f"no path matches {show_target(target)}"
        suggestions = _suggestions(target, selector, tree) if _is_short(target) else []
    elif isinstance(selector, re.Pattern):
        seen = f"the regular expression {shorten(selector.pattern)!r} matches no whole path"
        suggestions = _wider(selector, tree) if _is_short(selector.pattern) else []
    elif isinstance(selector, OfType):
        if not selector.paths:
            return "the model that it was given has nothing of that type"
        some = listing(sorted(map("/".join, selector.paths)), 2)
        return f"of what it names ({some}), nothing is in the tree"
    else:
        return (
            f"its predicate returned False for all {len(arrays)} arrays (the first is "
            f"{shorten(tree.text(arrays[0]))!r}); lrmult.paths(params) lists what it is asked about"
        )
    if suggestions:
        return f"{seen}; did you mean {' or '.join(suggestions[:_MOST])}?"
    reached = _reached_at_least(selector, tree) if isinstance(selector, Pattern) else None
    if reached:
        inside = _in_short(tree.children[reached])
        return f"{seen}; {shorten(tree.text(reached))!r} is there, and holds {inside}"
    some = listing([shorten(tree.text(node)) for node in arrays], 4)
    return f"{seen}; the paths are {some} (lrmult.paths(params) lists them all)"


def _is_short(target: object) -> bool:
    """Whether a target is of a length that people write."""
    parts = target if isinstance(target, tuple) else (target,)
    return sum(len(part) if isinstance(part, str) else 1 for part in parts) <= _LONGEST


def _suggestions(target: object, pattern: Pattern, tree: ParamTree) -> list[str]:
    """What to write instead, likeliest first; all of one kind."""
    if target == "...":
        return ["... (without quotes)"]
    others = list(_other_notations(target))
    kinds: list[Iterable[Pattern]] = [_wrong_root(pattern, tree)]
    if isinstance(target, str) and _is_regex(target, tree):
        return [f"re.compile({shorten(target)!r})"]
    for other in others:
        kinds += [[other], _wrong_root(other, tree)]
    kinds += [_below_an_array(pattern, tree)]
    kinds += [_misspelt(each, tree) for each in [*others[:1], pattern]]
    for kind in kinds:
        found: dict[tuple[int, ...], str] = {}  # what would match -> how to write it
        for near in kind:
            found.setdefault(tuple(find(near, tree)), repr(shorten(show_pattern(near))))
        found.pop((), None)
        if found:
            return list(found.values())
    return []


def _wrong_root(pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    """The path starts below the root, or above it, or leaves out a level."""
    steps = pattern.steps
    if steps[0] is not ANY_DEPTH:
        yield from _in_full(steps, 0, tree)
    if any(isinstance(step, Names | Indexed) for step in steps[1:]):
        yield Pattern(steps[1:])
    if ANY_DEPTH not in steps:
        for k in range(1, min(_leading(steps, tree) + 1, len(steps))):
            yield from _in_full(steps, k, tree)


def _in_full(steps: tuple[Step, ...], k: int, tree: ParamTree) -> Iterator[Pattern]:
    """The same steps with any depth before step k: as full paths, if these are few."""
    anywhere = Pattern((*steps[:k], ANY_DEPTH, *steps[k:]))
    nodes = find(anywhere, tree)
    above = {tree.parents[node] for node in nodes}
    if len(nodes) <= _MOST and all(isinstance(step, Names) for step in steps):
        yield from (parse(tree.text(node)) for node in nodes)
    elif len(above) == 1 and len(steps) == 1 and above != {0}:
        yield Pattern((*parse(tree.text(above.pop())).steps, *steps))
    else:
        yield anywhere


def _other_notations(target: object) -> Iterator[Pattern]:
    if isinstance(target, tuple) and all(isinstance(part, str) for part in target):
        target = "/".join(target)  # the names of a tuple are literal; here wildcards count
        yield from _parsed(target)
    if isinstance(target, str):
        for notation, ours in _NOTATIONS:
            if notation.search(target):
                yield from _parsed(re.sub("/+", "/", notation.sub(ours, target)).strip("/"))


def _parsed(text: str) -> Iterator[Pattern]:
    try:
        yield parse(text)
    except PatternError:
        return


# Regular expressions that take a time that explodes: with a group that is repeated, what a group
# found, or many repetitions.
_UNTAME = re.compile(r"\)[*+?{]|\\[1-9]|\(\?|(?:[*+?{].*){4}", re.DOTALL)


def _is_regex(text: str, tree: ParamTree) -> bool:
    """Whether a text matches as a regular expression, and looks like one."""
    if not re.search(r"[*+^$|\\(]", text) or _UNTAME.search(text):
        return False
    try:
        regex = re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return any(regex.fullmatch(tree.raw_text(node)) for _, node in tree.arrays())


def _wider(regex: re.Pattern[str], tree: ParamTree) -> list[str]:
    """Regular expressions that match a whole path around what this one matches."""
    paths = [tree.raw_text(node) for _, node in tree.arrays()]
    inner = f"(?:{regex.pattern})" if "|" in regex.pattern else regex.pattern
    for text in (f".*{inner}", f"{inner}.*", f".*{inner}.*"):
        try:
            wider = re.compile(text, regex.flags)
        except (re.error, RecursionError):
            continue
        if any(map(wider.fullmatch, paths)):
            return [shorten(repr(wider), 120)]
    return []


def _below_an_array(pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    """The path goes on below an array, as with a final `value`."""
    for cut in range(min(_leading(pattern.steps, tree), len(pattern.steps) - 1), 0, -1):
        above = Pattern(pattern.steps[:cut])
        if not any(tree.children[node] for node in find(above, tree)):
            yield above


def _misspelt(pattern: Pattern, tree: ParamTree) -> Iterator[Pattern]:
    """Patterns that are spelt alike: whole paths, or with wildcards name by name."""
    if not all(isinstance(step, Names) and step.is_literal for step in pattern.steps):
        yield from _respell(pattern.steps, tree)
        if pattern.steps[0] is not ANY_DEPTH:
            yield from _respell((ANY_DEPTH, *pattern.steps), tree)
        return
    word = show_pattern(pattern)
    length = len(pattern.steps)
    tails: dict[str, list[str]] = {}  # the ends of paths, about as long as the word
    for node in tree.nodes[1:]:
        path = tree.text(node)
        segments = path.split("/")
        for size in {len(segments), length - 1, length, length + 1}:
            if 0 < size <= len(segments) <= length + 2 or size == length <= len(segments):
                tails.setdefault("/".join(segments[-size:]), []).append(path)
    for near in _alike(word, tails):
        paths = tails.get(near, [near])
        for path in paths if len(paths) <= _MOST else [f"**/{near}"]:
            yield from _parsed(path)
        if near not in tails:  # a family, which may stand below the root
            yield from _parsed(f"**/{near}")


def _respell(steps: tuple[Step, ...], tree: ParamTree) -> Iterator[Pattern]:
    """Replace the first name that leads nowhere by what does stand there."""
    k = _leading(steps, tree)
    step = steps[k] if k < len(steps) else None
    if not isinstance(step, Names | Indexed):
        return
    known: dict[str, None] = {}
    for node in _reached(steps[:k], tree):
        names = tree.children[node]
        known.update(dict.fromkeys(map(escape, names)))
        if isinstance(step, Indexed):
            families = (base_names(stem)[-1] for stem in stems(names))
            known.update(dict.fromkeys(escape(name) for name in families if name))
    names_of = step.names if isinstance(step, Indexed) else step
    words = ["*".join(parts) for parts in names_of.alternatives[:_MOST_WORDS]]
    for name in dict.fromkeys(near for word in words for near in _alike(word, known)):
        [new, *_] = parse(name).steps
        if isinstance(step, Indexed) and isinstance(new, Names):
            yield Pattern((*steps[:k], Indexed(new, step.position), *steps[k + 1 :]))
        else:
            yield Pattern((*steps[:k], new, *steps[k + 1 :]))


def _alike(word: str, known: Iterable[str]) -> Iterator[str]:
    """The texts that are spelt like a word, best first.

    Numbers are no matter of spelling: they must agree, or be left out of the word, which then
    stands for all members of a family.
    """
    shapes: dict[str, list[str]] = {}
    for text in known:
        shapes.setdefault(_shape(text), []).append(text)
    numbers = re.findall("[0-9]+", word)
    for shape in difflib.get_close_matches(_shape(word), list(shapes), 2 * _MOST, _CUTOFF):
        if not _name_by_name(_shape(word), shape):
            continue
        members = shapes[shape]
        same = [text for text in members if re.findall("[0-9]+", text) == numbers]
        if same:
            yield same[0]
        elif not numbers:
            if "*" not in word:
                yield members[0]
            yield re.sub("[0-9]+", "*", members[0])


def _name_by_name(one: str, other: str) -> bool:
    """Whether two paths are alike not only because they share a beginning."""
    pairs = list(itertools.zip_longest(one.split("/"), other.split("/")))
    if any(None in pair for pair in pairs):
        return difflib.SequenceMatcher(None, one, other).ratio() > 0.8
    return all(difflib.SequenceMatcher(None, *pair).ratio() > 0.6 for pair in pairs)


def _shape(text: str) -> str:
    return re.sub(r"[0-9]+|\*+", "#", text.casefold())


def _leading(steps: tuple[Step, ...], tree: ParamTree) -> int:
    """How many of the first steps lead somewhere."""
    cuts = range(1, len(steps) + 1)
    return bisect.bisect_left(cuts, True, key=lambda cut: not find(Pattern(steps[:cut]), tree))


def _reached(steps: tuple[Step, ...], tree: ParamTree) -> list[int]:
    if not steps:
        return [0]
    if steps[-1] is ANY_DEPTH:
        return list(tree.nodes)
    return find(Pattern(steps), tree)


def _reached_at_least(pattern: Pattern, tree: ParamTree) -> int | None:
    """The first node that a pattern reaches before it goes astray; None if that is the root."""
    for cut in range(min(_leading(pattern.steps, tree), len(pattern.steps) - 1), 0, -1):
        if pattern.steps[cut - 1] is not ANY_DEPTH:
            nodes = [n for n in find(Pattern(pattern.steps[:cut]), tree) if tree.children[n]]
            if nodes:
                return nodes[0]
    return None


def _in_short(names: Iterable[str]) -> str:
    """List names, of each family only the first and the last."""
    families = [family for family in stems(names).values() if len(family) > _MOST]
    alone = [name for name in names if not any(name in family for family in families)]
    shown = [listing([shorten(name) for name in alone])] if alone else []
    for family in families:
        first, *_, last = sorted(family, key=lambda name: (len(name), name))
        shown.append(f"{shorten(first)!r} to {shorten(last)!r}")
    return ", ".join(shown)
