"""What a target names in a parameter tree or a module: nodes, arrays, or parts of arrays."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lrmult._checks import mistakes
from lrmult._claims import Matched
from lrmult._errors import LrmultError, UnmatchedRuleError
from lrmult._levels import PyTree, children_of
from lrmult._libraries import is_module, is_nnx_module, loaded_nnx
from lrmult._matching import find, match
from lrmult._modules import members
from lrmult._paths import ParamTree
from lrmult._patterns import At, Indexed, Pattern, Span, escape
from lrmult._regions import Flags, Index
from lrmult._rules import Rule, Rules
from lrmult._structure import Structure, read_structure
from lrmult._structure_of import structure_of
from lrmult._structured import add_structure
from lrmult._subarrays import Places, SubArray
from lrmult._suggest import explain_unmatched
from lrmult._targets import Elements, Target, is_wild


@dataclasses.dataclass
class Chosen:
    """What a target names in a tree.

    Attributes:
        parts: the arrays, by leaf, each with what of it is meant.
        leaf: the one array that it names, if it does that, or of which it names a part. That array
            may be at several leaves.
        node: the one node with arrays below that it names, if it does that.
    """

    parts: dict[int, SubArray]
    leaf: int | None = None
    node: int | None = None


class Resolver:
    """A tree or a module, as a target is resolved in it."""

    def __init__(self, params: PyTree, structure: Structure | None) -> None:
        structure = read_structure(structure)
        if is_module(params):
            structure = structure_of(params) | structure
        self._given = params
        self._state = loaded_nnx().state(params) if is_nnx_module(params) else params
        self.leaves = jax.tree.leaves(self._state)
        self._tree = ParamTree(self._state)
        add_structure(self._tree, structure)

    def resolve(self, target: Target, call: str) -> Chosen:
        """Resolve a target.

        Raises:
            LrmultError: if that is a mistake; `call` is how messages name it.
        """
        tree = self._tree
        try:
            rules = Rules([Rule(target, 1.0)])
            matches = match([rules[0].selector], tree)
            matched = Matched(rules, tree, matches)
            for _, error in mistakes(rules, tree, matches, matched):
                raise error
            leaves = [leaf for leaf, row in enumerate(matched.rows) if row]
            selector, restrictions = rules[0].selector, rules[0].restrictions
            if not leaves and not (isinstance(selector, Pattern) and selector.is_everything):
                raise UnmatchedRuleError(explain_unmatched(rules[0], tree))
        except LrmultError as error:
            raise type(error)(f"{call}: {error}") from error.__cause__
        nodes = find(selector, tree) if isinstance(selector, Pattern) else []
        has_span = isinstance(selector, Pattern) and _has_span(selector)
        parts = {
            leaf: self._part(leaf, self._layers(leaf, nodes), restrictions, matched, has_span)
            for leaf in leaves
        }
        if not nodes or is_wild(selector) or has_span:
            return Chosen(parts)
        [node] = nodes
        if node in self._ends:
            return Chosen(parts, leaf=self._ends[node])
        if not restrictions and all(part.is_whole for part in parts.values()):
            return Chosen(parts, node=node)
        return Chosen(parts, leaf=leaves[0] if len(leaves) == 1 else None)

    def _layers(self, leaf: int, nodes: Sequence[int]) -> list[dict[int, int]]:
        """The layers of stacks that some nodes stand for, of an array; none if it is all of it.

        Each is an index for some of its axes.
        """
        tree = self._tree
        copies = tree.slices.get(leaf, {})
        line = tree.line(tree.places[leaf] or 0)
        if not copies or any(node in line for node in nodes):
            return []
        found = []
        for node in nodes:
            inside = [set(at.items()) for copy, at in copies.items() if node in tree.line(copy)]
            if inside:
                found.append(dict(set.intersection(*inside)))
        return found

    def _part(
        self,
        leaf: int,
        layers: Sequence[Mapping[int, int]],
        restrictions: Sequence[Any],
        matched: Matched,
        has_span: bool,
    ) -> SubArray:
        shape = self._tree.shapes[leaf]
        places: dict[int, Places] = {}
        mask = None
        if layers:
            at = {axis: sorted({each.get(axis, -1) for each in layers}) for axis in layers[0]}
            if len(layers) == math.prod(map(len, at.values())) and not any(
                -1 in p for p in at.values()
            ):
                places = {
                    axis: p[0] if len(p) == 1 and not has_span else p for axis, p in at.items()
                }
            else:  # layers of stacks in stacks that are no rectangle
                mask = np.zeros(shape, np.bool_)
                for each in layers:
                    mask[tuple(each.get(axis, slice(None)) for axis in range(len(shape)))] = True
        for restriction in restrictions:
            if isinstance(restriction, Elements):
                more = np.ones(shape, np.bool_)
                if restriction.region is not None:
                    more = restriction.region.dense(shape)
                mask = more if mask is None else mask & more
                continue
            axis = matched.axis_of(leaf, restriction, 0)
            places[axis] = _both(places.get(axis), _places(restriction.index, shape[axis]))
        if mask is not None:
            for axis, wanted in places.items():
                vector = np.zeros(shape[axis], np.bool_)
                vector[wanted] = True
                mask = mask & vector.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            return SubArray(mask=mask)
        return SubArray(places)

    def why_not(self, path: str) -> str:
        """Why a path leads to nothing."""
        return explain_unmatched(Rule(path, 1.0), self._tree) if path else "it is no bare array"

    def at(self, node: int) -> Any:
        """What stands at a node with arrays below it."""
        below = any(node in self._tree.line(place) for _, place in self._tree.arrays())
        if not below and not is_module(self._given):  # only other paths of arrays lead there
            inside = self.below(node).items()
            return {"/".join(map(escape, names)): self.leaves[leaf] for names, leaf in inside}
        return _descend(self._given, self.names_at(node))

    @functools.cached_property
    def _ends(self) -> dict[int, int]:
        """The nodes at which arrays stand, and the leaf of each."""
        aliases = self._tree.aliases.items()
        found = {node: leaf for leaf, nodes in aliases for node in nodes}
        return found | {place: leaf for leaf, place in self._tree.arrays()}

    def names_at(self, node: int) -> tuple[str, ...]:
        """The names along the path of a node."""
        return tuple(self._tree.names[each] for each in self._tree.line(node)[1:])

    def names(self, leaf: int) -> tuple[str, ...]:
        """The names along the path of an array."""
        return self.names_at(self._tree.places[leaf] or 0)

    def all_names(self, leaf: int) -> list[tuple[str, ...]]:
        """The names along its path and along its other paths."""
        return [self.names(leaf), *map(self.names_at, self._tree.aliases.get(leaf, ()))]

    def path(self, leaf: int) -> str:
        """The path of an array."""
        return self._tree.path(leaf)

    def below(self, node: int) -> dict[tuple[str, ...], int]:
        """The arrays below a node, by the names on the way."""
        depth = len(self.names_at(node))
        return {
            self.names_at(end)[depth:]: leaf
            for end, leaf in self._ends.items()
            if node in self._tree.line(end)
        }

    def is_there(self, names: tuple[str, ...]) -> bool:
        """Whether an array stands at a path, or at another of its paths only."""
        return self._tree.node_at(names) in self._tree.places

    def mates(self, leaf: int) -> list[int]:
        """The other leaves that hold the same array."""
        return [
            other for other, nodes in self._tree.aliases.items() if self._tree.places[leaf] in nodes
        ]

    def names_of(self, path: Any) -> tuple[str, ...]:
        """The names along the first path of the array that a path leads to."""
        leaf = self._leaves_by_path.get(path)
        return (str(path),) if leaf is None else self.names(leaf)

    def first_of(self, paths: Sequence[tuple[str, ...]]) -> int | None:
        """The array at the first of some paths that leads to one; None if none does."""
        nodes = map(self._tree.node_at, paths)
        return next((self._ends[node] for node in nodes if node in self._ends), None)

    @functools.cached_property
    def _leaves_by_path(self) -> dict[str, int]:
        return {self._tree.text(end): leaf for end, leaf in self._ends.items()}

    def show(self, leaf: int, part: SubArray) -> str:
        """How a message shows a part of an array."""
        seen = self._tree.show(leaf)
        if part.is_whole:
            return seen
        return f"of {seen}, a part of shape {list(part.shape(self.leaves[leaf]))}"

    def with_leaves(self, changes: Mapping[int, Any]) -> Any:
        """The tree or module with other arrays."""
        leaves = [changes.get(leaf, array) for leaf, array in enumerate(self.leaves)]
        state = jax.tree.unflatten(jax.tree.structure(self._state), leaves)
        if self._state is self._given:
            return state
        loaded_nnx().update(self._given, state)
        return self._given


def _places(index: Index, size: int) -> Places:
    """The places that an index means, in its order."""
    if isinstance(index, Flags):
        return np.flatnonzero(index.vector).tolist()
    if isinstance(index, Span):
        return list(range(size)[slice(*index)])
    return index % size if isinstance(index, int) else [place % size for place in index]


def _both(known: Places | None, more: Places) -> Places:
    """The places that both mean, in the order of the first."""
    if known is None:
        return more
    if isinstance(known, int) or isinstance(more, int):
        return known if isinstance(known, int) else more
    return [place for place in known if place in more]


def _has_span(pattern: Pattern) -> bool:
    return any(
        isinstance(step, At | Indexed) and isinstance(step.position, Span) for step in pattern.steps
    )


def _descend(value: Any, names: tuple[str, ...]) -> Any:
    """What stands at a path; a dict, where that is within a key, or within several."""
    found = list(_stand(value, names))
    if len(found) == 1 and not found[0][0]:
        return found[0][1]
    merged = {}
    for rest, each in found:
        inside = {rest: each} if rest else _inside(each)
        merged.update({"/".join(segments): child for segments, child in inside.items()})
    return merged


def _stand(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All that a path leads to or into, with what is left of its key."""
    if not names:
        yield (), value
        return
    for segments, child in _inside(value).items():
        if names[: len(segments)] == segments:
            yield from _stand(child, names[len(segments) :])
        elif segments[: len(names)] == names:
            yield segments[len(names) :], child


def _inside(value: Any) -> dict[tuple[str, ...], Any]:
    if is_module(value):  # which may hold an array or a module that its tree has elsewhere
        return {tuple(name.split("/")): each for name, each in members(value).items()}
    return children_of(value)
