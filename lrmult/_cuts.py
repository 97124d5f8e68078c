"""Where to cut a program in two: what to hand on of what is known ahead."""

import collections
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lrmult._programs import (
    Equation,
    Loop,
    Op,
    Program,
    Stack,
    Switch,
    Value,
    needed,
    split_scan,
    walk,
)
from lrmult._work import Kind, kind_of


class Examples:
    """How the values of a program hang on the examples of a batch.

    Attributes:
        axes: per value that depends on the batch, the axes along which its examples lie.
        sized: the values that are larger for a larger batch.
        mixes: per value in which several examples have come together, the equation where they did;
            None where that is a loop over examples.
        twins: per operation, the equation in its place in the other program.

    Args:
        program: a program.
        doubled: the program of the same function for a batch of twice the size.

    Raises:
        ValueError: if the two are not the same but for sizes.
    """

    def __init__(self, program: Program, doubled: Program) -> None:
        self.axes: dict[Value, tuple[int, ...]] = {}
        self.sized: set[Value] = set()
        self.mixes: dict[Value, Equation | None] = {}
        self.twins: dict[Op, Any] = {}
        for one, two in zip(program.inputs, doubled.inputs, strict=True):
            self._compare(one, two)
        self._follow(program.ops, doubled.ops)

    def _compare(self, one: Value, two: Value) -> None:
        if len(one.shape) != len(two.shape):
            raise ValueError("shapes of other lengths")
        pairs = enumerate(zip(one.shape, two.shape, strict=True))
        differ = [axis for axis, (before, after) in pairs if before != after]
        if differ:
            self.sized.add(one)
        if one.of_batch:
            # Where sizes are not in proportion, there is no axis of examples.
            apart = all(one.shape[axis] * 2 == two.shape[axis] for axis in differ)
            self.axes[one] = tuple(differ) if apart else ()

    def _follow(self, ops: Sequence[Op], doubled: Sequence[Op]) -> None:
        if len(ops) != len(doubled):
            raise ValueError("other operations")
        for one, two in zip(ops, doubled, strict=True):
            if type(one) is not type(two):
                raise ValueError("other operations")
            self.twins[one] = getattr(two, "eqn", None)
            if isinstance(one, Equation) and isinstance(two, Equation):
                self._equation(one, two)
            elif isinstance(one, Loop) and isinstance(two, Loop):
                self._loop(one, two)
            elif isinstance(one, Switch) and isinstance(two, Switch):
                for branch, other in zip(one.branches, two.branches, strict=True):
                    self._follow(branch.body, other.body)
                    if one.index in self.mixes:  # examples choose a branch for others
                        for value in branch.members:
                            self._inherit(value, [one.index])
                for place, final in enumerate(one.finals):
                    self._compare(final, two.finals[place])
                    self._inherit(final, [one.index, *[b.results[place] for b in one.branches]])
            else:
                for value, twin in zip(one.makes, two.makes, strict=True):
                    self._compare(value, twin)
                    self._inherit(value, one.reads)

    def _equation(self, op: Equation, other: Equation) -> None:
        if op.name != other.name:
            raise ValueError("other operations")
        is_batched = any(self.axes.get(v) for v in op.reads)
        by_size = _numbers(op) != _numbers(other)
        for value, twin in zip(op.makes, other.makes, strict=True):
            self._compare(value, twin)
            self._inherit(value, op.reads)
            if value not in self.mixes and value.of_batch and is_batched:
                apart = len(self.axes[value]) == 1 and not self._is_along(op, other)
                if by_size or not apart:
                    self.mixes[value] = op

    def _is_along(self, op: Equation, other: Equation) -> bool:
        """Whether an equation that keeps shapes goes along the examples."""
        params, first = op.eqn.params, op.reads[0]
        axes = [axis - len(first.lengths) for axis in self.axes.get(first, ())]
        if op.name == "scan":
            _, carry, _ = split_scan(op.eqn, [*op.eqn.invars])
            return bool(params["length"] != other.eqn.params["length"] and carry)
        if op.name == "conv_general_dilated":
            return params["dimension_numbers"].lhs_spec[0] not in axes
        if op.name == "fft":
            ahead = len(first.aval.shape) - len(params["fft_lengths"])
            return any(axis >= ahead for axis in axes)
        if op.name.startswith("reduce_window"):
            return any(params["window_dimensions"][axis] > 1 for axis in axes)
        along = {"rev": "dimensions", "sort": "dimension"}.get(op.name)
        along = "axis" if op.name.startswith("cum") else along
        if along is None:
            return False
        found = params[along] if isinstance(params[along], tuple) else (params[along],)
        return any(axis in axes for axis in found)

    def _loop(self, loop: Loop, other: Loop) -> None:
        over_examples = loop.eqn.params["length"] != other.eqn.params["length"]
        for (outside, x), (_, twin) in zip(loop.xs, other.xs, strict=True):
            self._compare(x, twin)
            self._inherit(x, [outside])
        for place, carry in enumerate(loop.carries):
            self._compare(carry, other.carries[place])
            self._inherit(carry, [loop.inits[place]])
            if over_examples and carry.of_batch:
                self.mixes.setdefault(carry, None)
        self._follow(loop.body, other.body)
        again = [
            carry
            for carry, result in zip(loop.carries, loop.results, strict=True)
            if result in self.mixes and carry not in self.mixes
        ]
        if again:
            for carry, result in zip(loop.carries, loop.results, strict=True):
                self._inherit(carry, [result])
            self._follow(loop.body, other.body)
        for place, final in enumerate(loop.finals):
            self._compare(final, other.finals[place])
            self._inherit(final, [loop.results[place], loop.carries[place]])

    def _inherit(self, value: Value, sources: Iterable[Value]) -> None:
        found = [source for source in sources if source in self.mixes]
        if found and value.of_batch:
            self.mixes.setdefault(value, self.mixes[found[0]])


def _numbers(op: Equation) -> list[str]:
    """The floating-point numbers among what an equation takes."""
    literals = [each for each in op.operands() if not isinstance(each, Value)]
    return [str(each.val) for each in literals if each.aval.dtype.kind in "fc"]


def to_hand_on(program: Program, examples: Examples, size: int) -> set[Value]:
    """The values that are to be handed on from what is known ahead to the rest.

    All work that can be done ahead is. Of the ways to cut behind it, this is one with the fewest
    bytes, and of those the last. A value may be computed again in the rest if that makes less to
    hand on: by moving data, element by element or by a reduction, as long as all that is little
    beside what is saved. Values in which examples are mixed are handed on only where other work
    depends on them; a batch is reduced again in the rest.

    Args:
        program: a program.
        examples: how its values hang on examples.
        size: how many examples the batch has.
    """
    mixes = examples.mixes
    odd = {  # there is not one place for each example
        value
        for value, axes in examples.axes.items()
        if axes and (len(axes) > 1 or value.shape[axes[0]] != size)
    }
    known = sum(op.work for op in _known(program.ops))
    stored: set[Value] = set()
    for most in (Kind.REDUCES, Kind.ELEMENTS, Kind.MOVES):
        stored = _cut(program, mixes, odd, most)
        rest, _ = needed(program.ops, program.outputs, frozenset(stored), False)
        again = [op for op in _known(rest) if mixes.keys().isdisjoint(op.makes)]
        if sum(op.work for op in again) <= _LITTLE * known:
            break
    return stored


_LITTLE = 0.05


def _known(ops: Iterable[Op]) -> Iterator[Equation]:
    """The equations that could be done ahead, and are to be."""
    for op in walk(ops):
        if isinstance(op, Equation) and any(v.known and not v.given for v in op.makes):
            yield op


def _cut(program: Program, mixes: Mapping[Value, Any], odd: set[Value], most: Kind) -> set[Value]:
    """What is handed on, if equations of that kind or a cheaper one are done again."""
    loops = [op for op in walk(program.ops) if isinstance(op, Loop)]
    slices = {x: outside for loop in loops for outside, x in loop.xs}
    mixing = set(filter(None, mixes.values()))

    def recipe(value: Value) -> list[Value] | None:
        op = value.source
        if value in slices:
            return [slices[value]]
        again = isinstance(op, Stack)
        if isinstance(op, Equation):
            kind = kind_of(op.name)
            again = kind <= most
            if value in mixes:
                again |= kind <= Kind.REDUCES or (op in mixing and op.name == "dot_general")
        return [v for v in op.reads if not v.given] if again and op is not None else None

    wanted = {v for v in _reads_of_rest(program) if v.known and not v.given}
    recipes: dict[Value, list[Value] | None] = {}
    left = list(wanted)
    while left:
        value = left.pop()
        if value not in recipes:
            recipes[value] = recipe(value)
            left += recipes[value] or []
    # Where bytes are equal, parts of the batch as they are come first, and then fewer values. One
    # of those that are rather not handed on weighs more than all others.
    batch = set(program.inputs)
    costs = {value: value.size * (len(recipes) + 1) + (value not in batch) for value in recipes}
    most_costly = sum(costs.values()) + 1
    avoided = odd.union(mixes)
    costs = {value: cost + most_costly * (value in avoided) for value, cost in costs.items()}
    return cheapest_cut(costs, recipes, wanted)


def _reads_of_rest(program: Program) -> set[Value]:
    """All that operations read which are not known themselves."""
    found = set(program.outputs)
    for op in walk(program.ops):
        if isinstance(op, Loop):
            for init, carry, result in zip(op.inits, op.carries, op.results, strict=True):
                found |= set() if carry.known else {init, result}
        elif isinstance(op, Switch):
            found.add(op.index)
            for place, final in enumerate(op.finals):
                found |= set() if final.known else {branch.results[place] for branch in op.branches}
        elif not all(v.known for v in op.makes) or (not op.makes and not _all_known(op.reads)):
            found.update(op.reads)
    return found


def _all_known(values: Iterable[Value]) -> bool:
    return all(value.known for value in values)


Node = Hashable


def cheapest_cut(
    sizes: Mapping[Any, int],
    recipes: Mapping[Any, Sequence[Any] | None],
    wanted: Iterable[Any],
) -> set[Any]:
    """The cheapest set of values from which all that is wanted can be computed.

    Of several such sets it is the one that is nearest to what is wanted. (The minimum cut of a
    network, by the shortest augmenting paths of Edmonds and Karp.)

    Args:
        sizes: what each value costs.
        recipes: what each can be computed from; None if it can only be bought.
        wanted: the values that are to be there in the end.
    """
    source, sink = object(), object()
    endless = sum(sizes.values()) + 1
    room: dict[Node, dict[Node, int]] = collections.defaultdict(dict)

    def connect(start: Node, end: Node, capacity: int) -> None:
        room[start][end] = capacity
        room[end].setdefault(start, 0)

    for value, size in sizes.items():
        connect((value, False), (value, True), size)
        recipe = recipes[value]
        for each in [source] if recipe is None else [(other, True) for other in recipe]:
            connect(each, (value, False), endless)
    for value in wanted:
        connect((value, True), sink, endless)

    while True:
        before = _reached(sink, lambda node, other: room[other][node] > 0, room)
        if source not in before:
            return {
                value for value in sizes if (value, True) in before and (value, False) not in before
            }
        line: list[Node] = [source]
        while line[-1] is not sink:
            line.append(before[line[-1]])
        flow = min(room[a][b] for a, b in itertools.pairwise(line))
        for a, b in itertools.pairwise(line):
            room[a][b] -= flow
            room[b][a] += flow


def _reached(start: Node, is_open: Any, neighbours: Mapping[Node, Mapping[Node, int]]) -> Any:
    """The nodes that a search in breadth reaches, each with the one that it came from."""
    found: dict[Node, Node] = {start: start}
    queue = collections.deque([start])
    while queue:
        node = queue.popleft()
        for other in neighbours[node]:
            if other not in found and is_open(node, other):
                found[other] = node
                queue.append(other)
    return found
