"""Where in each array the parts lie that rules speak of, and which rule has which element."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import TypeAlias

from lrmult._errors import (
    AxisError,
    IndexRangeError,
    LrmultError,
    MaskError,
    UnmatchedRuleError,
    spec,
)
from lrmult._layouts import layer_axis, output_axis, outputs_first
from lrmult._matching import Matches
from lrmult._paths import ParamTree
from lrmult._regions import WHOLE, FirstMatch, Region, Shape, select
from lrmult._rules import Rule, Rules
from lrmult._targets import Along, Elements, Neurons, Restriction, is_wild


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Elements of an array that one rule claims.

    Attributes:
        rule: the index of the rule; None if no rule matches them.
        region: where they lie. Of what an earlier piece holds too, that piece has it.
        count: how many they are; None for all elements of the array.
    """

    rule: int | None
    region: Region = WHOLE
    count: int | None = None


Pieces: TypeAlias = tuple[Piece, ...]


def claiming_rules(claims: Iterable[Pieces]) -> set[int | None]:
    """The rules that have at least one element; None is among them if no rule has some."""
    distinct = {id(pieces): pieces for pieces in claims}  # many arrays share theirs
    return {piece.rule for pieces in distinct.values() for piece in pieces}


class Matched:
    """What rules match, element by element.

    Attributes:
        rows: per leaf, the rules that match at least one of its elements, in order.
        claims: per leaf, who has which elements: the first rule that matches.
        overruled: per leaf that is shared, the rules that lost it to rules that match others of its
            paths alone.
        errors: per rule, why it cannot be applied.
        nothing: per rule, why it matches nothing after all.
    """

    def __init__(self, rules: Rules, tree: ParamTree, matches: Matches) -> None:
        self._rules = rules
        self._tree = tree
        self._regions = dict(matches.slices)
        self.rows = matches.rows
        self._routes = matches.routes
        self.errors: dict[int, LrmultError] = {}
        self.nothing: dict[int, LrmultError] = {}
        # By rule, given axis and layer: the size along the axis, and the array that has it.
        self._sizes: dict[tuple[int, int | None, int], tuple[int, int]] = {}
        restricted = {i: rule for i, rule in enumerate(rules) if rule.restrictions}
        if not restricted:
            return
        leaves: dict[int, list[int]] = {index: [] for index in restricted}
        for leaf, row in enumerate(matches.rows):
            for index in leaves.keys() & row:
                leaves[index].append(leaf)
        lost: dict[int, set[int]] = {}  # leaf -> rules that match none of its elements after all
        for index, rule in restricted.items():
            found = self._restrict(index, rule, leaves[index]) if leaves[index] else {}
            for leaf in leaves[index]:
                if leaf in found:
                    self._regions[leaf, index] = found[leaf]
                else:
                    lost.setdefault(leaf, set()).add(index)
        self.rows = list(matches.rows)
        for leaf, rules_lost in lost.items():
            self.rows[leaf] = tuple(i for i in self.rows[leaf] if i not in rules_lost)

    def regions(self, leaf: int, rule: int) -> list[Region]:
        """The parts of an array that a rule matches."""
        return self._regions.get((leaf, rule), [WHOLE])

    @functools.cached_property
    def claims(self) -> list[Pieces]:
        # What one rule has as a whole is shared by all arrays where it is so.
        whole: dict[tuple[int, ...], Pieces] = {
            row: (Piece(row[0] if row else None),) for row in set(self.rows)
        }
        found = [whole[row] for row in self.rows]
        for leaf in {leaf for leaf, _ in self._regions}:
            found[leaf] = self.first_match(leaf, self.rows[leaf])
        return found

    def first_match(self, leaf: int, row: tuple[int, ...]) -> Pieces:
        """Who has which elements of an array, if these rules stand in this order."""
        shape = self._tree.shapes[leaf]
        candidates: list[tuple[int, Region]] = []
        for rule in row:
            regions = self.regions(leaf, rule)
            candidates += [(rule, region) for region in regions]
            if regions[0].is_whole:
                break
        if math.prod(shape) == 0 or (candidates and candidates[0][1].is_whole):
            return (Piece(row[0] if row else None),)
        match = FirstMatch(shape, [region for _, region in candidates])
        pieces = [
            Piece(rule, region, count)
            for (rule, region), count in zip(candidates, match.counts, strict=True)
            if count
        ]
        if match.left:
            pieces.append(Piece(None, WHOLE, match.left))
        return tuple(pieces)

    @functools.cached_property
    def overruled(self) -> dict[int, list[int]]:
        return {leaf: self._overruled(leaf) for leaf in self._routes}

    def _overruled(self, leaf: int) -> list[int]:
        routes = self._routes[leaf].values()
        winners = claiming_rules([self.claims[leaf]])
        found = []
        for rule in self.rows[leaf]:
            here = [rules for rules in routes if rule in rules]
            if here and rule not in winners:
                holders = self.holders(leaf, rule)
                if any(not any(holder in rules for rules in here) for holder in holders):
                    found.append(rule)
        return found

    def holders(self, leaf: int, rule: int) -> set[int]:
        """The rules that have the elements of an array that another rule matches."""
        shape, pieces = self._tree.shapes[leaf], self.claims[leaf]
        found: set[int] = set()
        for region in self.regions(leaf, rule):
            shared = [region.within(piece.region) for piece in pieces]
            counts = FirstMatch(shape, shared).counts if math.prod(shape) else [1] * len(pieces)
            for piece, count in zip(pieces, counts, strict=True):
                if count and piece.rule is not None:
                    found.add(piece.rule)
        return found

    def _restrict(self, index: int, rule: Rule, leaves: list[int]) -> dict[int, list[Region]]:
        """The parts of arrays to which the restrictions of a rule lead."""
        found: dict[int, list[Region]] = {}
        passed: list[LrmultError] = []
        for leaf in leaves:
            regions = self.regions(leaf, index)
            try:
                for restriction in rule.restrictions:
                    more = self._region(leaf, restriction, index)
                    regions = [region.within(more) for region in regions if more]
            except LrmultError as error:
                if is_wild(rule.selector) and _may_be_passed(error, restriction):
                    passed.append(error)
                    continue
                self.errors[index] = error
                return {}
            regions = [r for r in regions if not r.is_empty(self._tree.shapes[leaf])]
            if regions:
                found[leaf] = regions
        if not found:
            passed.sort(key=lambda error: not isinstance(error, IndexRangeError))
            self.nothing[index] = passed[0] if passed else _empty(rule, self._tree.show(leaves[0]))
        return found

    def _region(self, leaf: int, restriction: Restriction, rule: int) -> Region | None:
        """The part of an array that a restriction allows.

        Raises:
            LrmultError: if it does not apply there.
        """
        tree = self._tree
        shape = tree.shapes[leaf]
        if isinstance(restriction, Elements):
            if restriction.shape != shape:
                raise MaskError(
                    f"its mask {spec(restriction.shape, 'bool')} does not fit "
                    f"{tree.show(leaf)}; {self._fitting(restriction.shape, rule)}"
                )
            return restriction.region
        axis = self.axis_of(leaf, restriction, rule)
        vector = select(restriction.index, shape[axis], f"axis {axis} of {tree.show(leaf)}")
        return WHOLE.along(axis, vector)

    def axis_of(self, leaf: int, restriction: Along | Neurons, rule: int) -> int:
        """The axis of an array along which a restriction chooses.

        Raises:
            AxisError: if it has none, or that is not known.
        """
        shape = self._tree.shapes[leaf]
        if isinstance(restriction, Neurons):
            return self._output_axis(leaf, restriction.axis, rule)
        if -len(shape) <= restriction.axis < len(shape):
            return restriction.axis % len(shape)
        wild = is_wild(self._rules[rule].selector)
        raise AxisError(
            f"{self._tree.show(leaf)} has no axis {restriction.axis}; name arrays that have it"
            + ("" if wild else ", or write a wildcard, which passes over the others")
        )

    def _fitting(self, shape: Shape, rule: int) -> str:
        """What to write where a mask of that shape does not fit."""
        tree = self._tree
        for leaf, row in enumerate(self.rows):
            if rule in row and tree.shapes[leaf] == shape:
                return f"write the path of the one array that it is for, such as {tree.show(leaf)}"
        return "it must have the shape of every array that the target matches"

    def _output_axis(self, leaf: int, given: int | None, rule: int) -> int:
        """The axis of an array that is that of its layer's outputs.

        Raises:
            AxisError: if it is not known, or another array of the layer has another size.
        """
        tree = self._tree
        place = tree.places[leaf] or 0
        owner = tree.parents[place]
        layer = self._layers[owner]
        kept = {name: self._unstacked_axes(member) for name, member in layer.items()}
        shapes = {
            name: tuple(tree.shapes[member][axis] for axis in kept[name])
            for name, member in layer.items()
        }
        name = tree.names[place]
        try:
            if given is not None:
                largest = max(layer, key=lambda each: len(shapes[each]))
                most = len(tree.shapes[layer[largest]])
                if not -most <= given < most:
                    raise AxisError(
                        f"{tree.show(layer[largest])}, the largest array of its layer, has no axis "
                        f"{given}"
                    )
                if given % most not in kept[largest]:
                    raise AxisError(f"axis {given} is that along which layers are stacked")
                inner = layer_axis(name, shapes, kept[largest].index(given % most))
            elif owner in self._outputs_first:
                inner = outputs_first(name, shapes[name], self._outputs_first[owner])
            else:
                beside = tree.children[tree.parents[owner]]
                inner = output_axis(name, shapes, tree.names[owner], beside)
        except AxisError as error:
            raise AxisError(f"the output axis of {tree.show(leaf)} is not known: {error}") from None
        axis = kept[name][inner]
        seen = tree.shapes[leaf][axis], leaf
        size, first = self._sizes.setdefault((rule, given, owner), seen)
        if size != tree.shapes[leaf][axis]:
            raise AxisError(
                f"{tree.show(first)} has {size} outputs and {tree.show(leaf)} has "
                f"{tree.shapes[leaf][axis]}, but they are of one layer; write "
                f"{'another' if given is not None else 'the'} axis=, or lrmult.along(target, axis, "
                "index) for each"
            )
        return axis

    @functools.cached_property
    def _layers(self) -> dict[int, dict[str, int]]:
        """The arrays that each node holds directly, by name."""
        found: dict[int, dict[str, int]] = {}
        for leaf, place in self._tree.arrays():
            layer = found.setdefault(self._tree.parents[place], {})
            layer[self._tree.names[place]] = leaf
        return found

    @functools.cached_property
    def _outputs_first(self) -> dict[int, int]:
        return self._tree.layers_with_outputs_first()

    def _unstacked_axes(self, leaf: int) -> list[int]:
        """The axes of an array but those along which layers are stacked."""
        stacked = {axis for at in self._tree.slices.get(leaf, {}).values() for axis in at}
        return [axis for axis in range(len(self._tree.shapes[leaf])) if axis not in stacked]


def _may_be_passed(error: LrmultError, restriction: Restriction) -> bool:
    """Whether an array to which a restriction does not apply is passed over by wildcards."""
    if isinstance(restriction, Along) and isinstance(error, AxisError):
        return True
    return isinstance(error, IndexRangeError)


def _empty(rule: Rule, array: str) -> UnmatchedRuleError:
    masks = [each for each in rule.restrictions if isinstance(each, Elements)]
    if any(mask.region is None for mask in masks):
        return UnmatchedRuleError(
            f"its mask is false everywhere, so it names nothing in {array}; write another, or "
            "leave it out"
        )
    return UnmatchedRuleError(
        f"the parts that it names have no element of {array} in common; a part of a part is what "
        "both name, and for what either names write two rules"
    )
