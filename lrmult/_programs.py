"""A jaxpr as operations on values, its calls opened, and which of them are known ahead.

A value is known if it depends on nothing that trains: on frozen parameters, constants and the
batch alone. Calls by `jax.jit`, `jax.checkpoint` and rules of differentiation are opened where they
hold both, and so are loops (`jax.lax.scan`) and branches (`jax.lax.cond`) if there is work in them
that is known; all else is kept whole. A part of the operations can be taken (`needed`) and run.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from lrmult._regions import Bools
from lrmult._work import Kind, kind_of, work_of


class Still(NamedTuple):
    """Which places along an axis of a parameter are frozen."""

    axis: int
    places: Bools


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array in a program. Two are equal only if they are one.

    Attributes:
        aval: its shape and dtype.
        known: whether it depends on nothing that trains.
        given: whether parameters and constants tell it without work: there is no need to hand it
            on.
        of_batch: whether it depends on the batch.
        of_params: whether it depends on parameters.
        still: the frozen places along an axis, of what is known in part.
        cause: what keeps it from being known, the first of all.
        kinds: what kinds of things do: "trains", "argument", "random".
        lengths: of the loops that compute it anew each time.
        source: the operation that makes it; None for what a program or the body of a loop is given.
        number: its place in the program.
    """

    aval: Any
    known: bool
    given: bool = False
    of_batch: bool = False
    of_params: bool = False
    still: Still | None = None
    cause: str = ""
    kinds: frozenset[str] = frozenset()
    lengths: tuple[int, ...] = ()
    source: "Op | None" = None
    number: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, with a place for each time that it is computed."""
        return (*self.lengths, *self.aval.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * int(self.aval.dtype.itemsize)


Env: TypeAlias = dict[Value, Any]
Values: TypeAlias = frozenset[Value]


@dataclasses.dataclass(frozen=True, eq=False)
class Remat:
    """A region that is computed again when it is differentiated: one call of `jax.checkpoint`."""

    policy: Any
    prevent_cse: Any


class Op:
    """An operation.

    Attributes:
        reads: the values that it takes.
        makes: the values that it makes.
        remats: the regions that it is in, from the outside.
    """

    reads: Sequence[Value]
    makes: Sequence[Value]
    remats: tuple[Remat, ...]

    def part(self, need: AbstractSet[Value], stops: Values, ahead: bool | None) -> "Op | None":
        """What of it computes the values that are needed and do not stop here; None if nothing."""
        return self if any(v in need and v not in stops for v in self.makes) else None

    def run(self, env: Env) -> None:
        """Compute what it makes."""
        raise NotImplementedError


class Equation(Op):
    """An equation of a jaxpr, kept whole."""

    def __init__(
        self, eqn: Any, jaxpr: Any, env: Mapping[Any, Value], remats: tuple[Remat, ...]
    ) -> None:
        variables = dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal))
        self.eqn = eqn
        self.name: str = eqn.primitive.name
        self.free = kind_of(self.name) <= Kind.ELEMENTS
        self.reads = [env[v] for v in variables]
        self.makes: list[Value] = []
        self.remats = remats
        self._variables = list(variables)
        self._jaxpr = jaxpr

    def part(self, need: AbstractSet[Value], stops: Values, ahead: bool | None) -> "Op | None":
        if self.eqn.effects:  # what it does happens once: ahead, where all that it reads is known
            return self if ahead in (None, all(v.known for v in self.reads)) else None
        return super().part(need, stops, ahead)

    @property
    def work(self) -> int:
        """The floating-point operations that it takes, in all runs of the loops around it."""
        return math.prod(self.makes[0].lengths if self.makes else ()) * work_of(self.eqn)

    def operands(self) -> list[Value | Any]:
        """What it takes, in order: values, and literals."""
        values = dict(zip(self._variables, self.reads, strict=True))
        return [atom if isinstance(atom, Literal) else values[atom] for atom in self.eqn.invars]

    def run(self, env: Env) -> None:
        outputs = [v for v in self.eqn.outvars if type(v).__name__ != "DropVar"]
        alone = self._jaxpr.replace(
            constvars=[],
            invars=self._variables,
            outvars=outputs,
            eqns=[self.eqn],
            effects=self.eqn.effects,
        )
        found = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*[env[v] for v in self.reads])
        made = dict(zip(outputs, found, strict=True))
        for variable, value in zip(self.eqn.outvars, self.makes, strict=True):
            if variable in made:
                env[value] = made[variable]


class Stack(Op):
    """What the body of a loop makes each time, as one array."""

    def __init__(self, inside: Value, outside: Value, repeats: int, remats: Any) -> None:
        self.reads, self.makes, self.remats = [inside], [outside], remats
        self.repeats = repeats  # of what is the same each time; 0 if it is stacked already

    def run(self, env: Env) -> None:
        [inside], [outside] = self.reads, self.makes
        array = env[inside]
        if self.repeats:
            array = jnp.broadcast_to(array, (self.repeats, *inside.aval.shape))
        env[outside] = array


@dataclasses.dataclass(eq=False)
class Loop(Op):
    """A scan, of whose body some values can be kept from one run for another.

    Attributes:
        eqn: the equation that it was.
        operands: what that took.
        xs: what is scanned over, and the value in the body that is a slice of it.
        inits: the carry before the first time.
        carries: the carry as the body gets it.
        results: the carry as the body leaves it.
        finals: the carry after the last time.
        body: the operations.
        members: the values that the body computes.
        places: what of the carry, and of what is scanned over, its values are.
        keeps: those of them that are stacked, for use outside.
        takes: those of them that it is given, stacked.
    """

    eqn: Any
    operands: list[Value]
    remats: tuple[Remat, ...]
    xs: list[tuple[Value, Value]]
    inits: list[Value]
    carries: list[Value]
    results: list[Value]
    finals: list[Value]
    body: list[Op]
    members: Values
    places: dict[Value, str]
    keeps: list[Value] = dataclasses.field(default_factory=list)
    takes: list[Value] = dataclasses.field(default_factory=list)
    reads: Sequence[Value] = ()

    @property
    def makes(self) -> list[Value]:  # type: ignore[override]
        return [*self.finals, *self.keeps]

    def part(self, need: AbstractSet[Value], stops: Values, ahead: bool | None) -> "Op | None":
        keeps = frozenset((need & self.members) - stops)
        places = {i for i, v in enumerate(self.finals) if v in need and v not in stops}
        if not keeps and not places:
            return None
        while True:
            wanted = keeps | {self.results[i] for i in places}
            body, wanted = needed(self.body, wanted, stops, ahead)
            more = {i for i, carry in enumerate(self.carries) if carry in wanted - stops}
            if more <= places:
                break
            places |= more
        xs = [(outside, x) for outside, x in self.xs if x in wanted - stops]
        chosen = sorted(places)

        def pick(values: list[Value]) -> list[Value]:
            return [values[i] for i in chosen]

        reads = (wanted - self.members) | {self.inits[i] for i in places} | {x for x, _ in xs}
        takes = wanted & self.members & stops
        return dataclasses.replace(
            self,
            xs=xs,
            inits=pick(self.inits),
            carries=pick(self.carries),
            results=pick(self.results),
            finals=pick(self.finals),
            body=body,
            keeps=in_order(keeps),
            takes=in_order(takes),
            reads=in_order(reads | takes),
        )

    def run(self, env: Env) -> None:
        def body(carry: Any, slices: Any) -> Any:
            inside = env | dict(zip(self.carries, carry, strict=True))
            inside |= dict(zip([x for _, x in self.xs] + self.takes, slices, strict=True))
            run(self.body, inside, [*self.results, *self.keeps])
            carry = [_typed(inside[v], v) for v in self.results]
            return carry, [inside[v] for v in self.keeps]

        names = "length", "reverse", "unroll", "_split_transpose"
        settings = {name: self.eqn.params[name] for name in names if name in self.eqn.params}
        slices = [env[outside] for outside, _ in self.xs] + [env[v] for v in self.takes]
        inits = [_typed(env[v], v) for v in self.inits]
        finals, kept = jax.lax.scan(body, inits, slices, **settings)
        env |= dict(zip(self.makes, [*finals, *kept], strict=True))


class Branch(NamedTuple):
    """One of the branches of a `Switch`, with what it computes and returns."""

    body: list[Op]
    members: Values
    results: list[Value]


@dataclasses.dataclass(eq=False)
class Switch(Op):
    """A choice between branches that is known, with work in them that is known."""

    eqn: Any
    operands: list[Value]
    branches: list[Branch]
    finals: list[Value]
    remats: tuple[Remat, ...]
    keeps: list[Value] = dataclasses.field(default_factory=list)
    reads: Sequence[Value] = ()

    @property
    def index(self) -> Value:
        """Which of the branches it is."""
        return self.operands[0]

    @property
    def makes(self) -> list[Value]:  # type: ignore[override]
        return [*self.finals, *self.keeps]

    def part(self, need: AbstractSet[Value], stops: Values, ahead: bool | None) -> "Op | None":
        places = [i for i, v in enumerate(self.finals) if v in need and v not in stops]
        members = [branch.members for branch in self.branches]
        keeps = frozenset((need & frozenset().union(*members)) - stops)
        if not places and not keeps:
            return None
        branches = []
        reads = frozenset([self.index])
        for branch in self.branches:
            results = [branch.results[i] for i in places]
            wanted = (keeps & branch.members) | set(results)
            body, wanted = needed(branch.body, wanted, stops, ahead)
            reads |= wanted - (branch.members - stops)
            branches.append(Branch(body, branch.members, results))
        return dataclasses.replace(
            self,
            branches=branches,
            finals=[self.finals[i] for i in places],
            keeps=in_order(keeps),
            reads=in_order(reads),
        )

    def run(self, env: Env) -> None:
        def run_branch(branch: Branch) -> Any:
            inside = dict(env)
            run(branch.body, inside, [*branch.results, *self.keeps])
            kept = [
                inside[v] if v in branch.members else jnp.zeros(v.shape, v.aval.dtype)
                for v in self.keeps
            ]
            finals = zip(branch.results, self.finals, strict=True)
            return [*[_typed(inside[v], final) for v, final in finals], *kept]

        branches = [functools.partial(run_branch, branch) for branch in self.branches]
        found = jax.lax.switch(env[self.index], branches)
        env |= dict(zip(self.makes, found, strict=True))


@dataclasses.dataclass
class Program:
    """What a function computes.

    Attributes:
        inputs: its arguments.
        outputs: its results.
        constants: the values that are there from the beginning.
        ops: what it does, in order.
    """

    inputs: list[Value]
    outputs: list[Value]
    constants: Env
    ops: list[Op]


def in_order(values: Iterable[Value]) -> list[Value]:
    """Values in the order of their program."""
    return sorted(values, key=lambda value: value.number)


def walk(ops: Iterable[Op]) -> Iterator[Op]:
    """All operations, those in the bodies of loops and in branches too."""
    for op in ops:
        yield op
        if isinstance(op, Loop):
            yield from walk(op.body)
        elif isinstance(op, Switch):
            for branch in op.branches:
                yield from walk(branch.body)


def needed(
    ops: Sequence[Op], wanted: Iterable[Value], stops: Values, ahead: bool | None
) -> tuple[list[Op], Values]:
    """The operations that compute some values from others, and all values that they read.

    Args:
        ops: the operations of a program.
        wanted: what is to be computed.
        stops: what there is no need to compute.
        ahead: whether effects that are known are wanted, or the others; None for all of them.
    """
    found = []
    need = set(wanted)
    for op in reversed(ops):
        part = op.part(need, stops, ahead)
        if part is not None:
            found.append(part)
            need.update(part.reads)
    return found[::-1], frozenset(need)


def run(ops: Iterable[Op], env: Env, wanted: Sequence[Value], depth: int = 0) -> None:
    """Compute what operations make. What is wanted is there afterwards, all else may be too."""
    regions = itertools.groupby(ops, lambda op: op.remats[depth] if op.remats[depth:] else None)
    groups = [(region, list(group)) for region, group in regions]
    for place, (region, group) in enumerate(groups):
        if region is None:
            for op in group:
                op.run(env)
            continue
        made = {v for op in group for v in op.makes}
        reads = in_order({v for op in group for v in op.reads} - made)
        later = {v for _, others in groups[place + 1 :] for op in others for v in op.reads}
        results = in_order(made & later.union(wanted))
        again = _function(group, reads, results, depth + 1)
        region_again = jax.checkpoint(again, prevent_cse=region.prevent_cse, policy=region.policy)
        env |= dict(zip(results, region_again(*[env[v] for v in reads]), strict=True))


def _function(
    ops: list[Op], reads: list[Value], results: list[Value], depth: int
) -> Callable[..., Any]:
    def function(*arrays: Any) -> list[Any]:
        env = dict(zip(reads, arrays, strict=True))
        run(ops, env, results, depth)
        return [env[v] for v in results]

    return function


def _typed(array: Any, like: Value) -> Any:
    """The array without a weak type, which all branches and all times of a loop must agree on."""
    dtype = like.aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return array
    return jax.lax.convert_element_type(array, dtype)


# Reading.


class _Scope:
    """Where operations are added: a program, the body of a loop, or a branch."""

    def __init__(self, lengths: tuple[int, ...], is_loop: bool = False) -> None:
        self.lengths = lengths
        self.is_loop = is_loop
        self.ops: list[Op] = []
        self.members: set[Value] = set()
        self.hoisted: list[Op] = []  # what is the same each time, for the scope around
        self.remats: tuple[Remat, ...] = ()


def read(closed: Any, inputs: Sequence[Value]) -> Program:
    """Read a jaxpr.

    Args:
        closed: the jaxpr of a function.
        inputs: what is known of its arguments.
    """
    reader = _Reader()
    scope = _Scope(())
    for value in inputs:
        reader.enter(value, scope)
    outputs = reader.closed(closed, list(inputs), scope)
    ops, _ = needed(scope.ops, outputs, frozenset(), None)
    return Program(list(inputs), outputs, reader.constants, ops)


class _Reader:
    def __init__(self) -> None:
        self.constants: Env = {}
        self._numbers = itertools.count()

    def enter(self, value: Value, scope: _Scope) -> Value:
        value.number = next(self._numbers)
        scope.members.add(value)
        return value

    def constant(self, array: Any, aval: Any) -> Value:
        value = Value(aval, known=_is_array(aval), given=True, number=next(self._numbers))
        self.constants[value] = array
        return value

    def closed(self, closed: Any, inputs: Sequence[Value], scope: _Scope) -> list[Value]:
        """Add what a jaxpr does; the values that it returns."""
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, array in zip(jaxpr.constvars, consts, strict=True):
            env[variable] = self.constant(array, variable.aval)
        for eqn in jaxpr.eqns:
            values = [self._value(atom, env) for atom in eqn.invars]
            makes = self._equation(eqn, jaxpr, values, scope)
            env |= dict(zip(eqn.outvars, makes, strict=True))
        return [self._value(atom, env) for atom in jaxpr.outvars]

    def _value(self, atom: Any, env: Mapping[Any, Value]) -> Value:
        return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else env[atom]

    def _equation(self, eqn: Any, jaxpr: Any, values: list[Value], scope: _Scope) -> list[Value]:
        is_known = all(v.known for v in values)
        is_mixed = not is_known and any(v.known or v.still for v in values)
        name = eqn.primitive.name
        if name in _CALLS and (is_known or (is_mixed and name not in _OWN_DERIVATIVE)):
            return self._call(eqn, values, scope, is_known)
        found = None
        if is_mixed and name == "scan" and not eqn.effects:
            found = self._halved(eqn, values, scope) or self._loop(eqn, values, scope)
        if is_mixed and name == "cond" and values[0].known and not eqn.effects:
            found = self._switch(eqn, values, scope)
        return found or self._whole(eqn, jaxpr, values, scope)

    def _call(self, eqn: Any, values: list[Value], scope: _Scope, is_known: bool) -> list[Value]:
        closed = next(eqn.params[key] for key in _CALLED if key in eqn.params)
        around = scope.remats
        if eqn.primitive.name in _REMATS and not is_known:
            scope.remats += (_remat(eqn),)
        found = self.closed(closed, values, scope)
        scope.remats = around
        return found

    def _whole(self, eqn: Any, jaxpr: Any, values: list[Value], scope: _Scope) -> list[Value]:
        pairs = zip(eqn.invars, values, strict=True)
        env = {atom: value for atom, value in pairs if not isinstance(atom, Literal)}
        op = Equation(eqn, jaxpr, env, scope.remats)
        read = op.reads
        arrays = all(_is_array(v.aval) for v in (*eqn.invars, *eqn.outvars))
        known = arrays and all(v.known for v in read)
        of_params, of_batch = any(v.of_params for v in read), any(v.of_batch for v in read)
        given = arrays and op.free and all(v.given for v in read)
        cause = next((v.cause for v in read if v.cause), "" if arrays else "a mutable array")
        still = _still(eqn, read[0]) if len(read) == 1 and read[0].still else None
        if given and still and still.places.all():
            known, still = True, None
        kinds = frozenset() if known else frozenset().union(*[v.kinds for v in read])
        if kinds == {"argument"} and op.name in RANDOM:
            kinds = frozenset(["random"])
        hoist = known and scope.is_loop and not eqn.effects and scope.members.isdisjoint(read)
        lengths = scope.lengths[:-1] if hoist else scope.lengths
        for variable in eqn.outvars:
            facts = (known, given, of_batch, of_params, still, "" if known else cause, kinds)
            op.makes.append(Value(variable.aval, *facts, lengths, op, next(self._numbers)))
        self._add(op, scope, hoist)
        return list(op.makes)

    def _add(self, op: Op, scope: _Scope, hoist: bool = False) -> None:
        if hoist:
            op.remats = ()
            scope.hoisted.append(op)
        else:
            scope.ops.append(op)
            scope.members.update(op.makes)

    def _enclose(self, inside: _Scope, scope: _Scope) -> None:
        """Take what stands in a body for a part of the scope around it."""
        for op in inside.hoisted:
            again = scope.is_loop and scope.members.isdisjoint(op.reads)
            for value in op.makes:
                value.lengths = scope.lengths[:-1] if again else scope.lengths
            self._add(op, scope, again)
        scope.members |= inside.members

    def _loop(self, eqn: Any, values: list[Value], scope: _Scope) -> list[Value] | None:
        """Add a scan whose body is opened; None if nothing is gained by that."""
        _, inits, scanned = split_scan(eqn, values)
        known = [v.known for v in inits]
        while True:
            inside, carries, xs, outputs = self._body(eqn, values, known, scope.lengths)
            results, ys = outputs[: len(inits)], outputs[len(inits) :]
            still = [a and b.known for a, b in zip(known, results, strict=True)]
            if still == known:
                break
            known = still
        if not any(is_work(op) for op in walk(inside.ops + inside.hoisted)):
            return None
        self._enclose(inside, scope)
        finals = [self.enter(dataclasses.replace(v, lengths=scope.lengths), scope) for v in carries]
        loop = Loop(
            eqn,
            values,
            scope.remats,
            [*zip(scanned, xs, strict=True)],
            inits,
            carries,
            results,
            finals,
            inside.ops,
            frozenset(inside.members),
            {
                value: f"{what} {i}"
                for what, values in (("carry", carries), ("slice", xs), ("final", finals))
                for i, value in enumerate(values)
            },
        )
        for value in finals:
            value.source = loop
        self._add(loop, scope)
        return finals + [self._stacked(y, eqn, loop, scope) for y in ys]

    def _body(
        self, eqn: Any, values: list[Value], known: Sequence[bool], around: tuple[int, ...]
    ) -> tuple[_Scope, list[Value], list[Value], list[Value]]:
        """Read the body of a scan, if so much of its carry is known.

        Returns:
            Its scope; the carry and the slices that it gets; what it returns.
        """
        fixed, inits, scanned = split_scan(eqn, values)
        inside = _Scope((*around, eqn.params["length"]), is_loop=True)
        variables = eqn.params["jaxpr"].jaxpr.invars[len(fixed) :]
        cause = next((v.cause for v in values if v.cause), "")
        carries, xs = [], []
        for variable, init, is_known in zip(variables, inits, known, strict=False):
            # What is carried hangs on all that the loop takes.
            carry = Value(
                variable.aval,
                is_known,
                of_batch=any(v.of_batch for v in values),
                of_params=any(v.of_params for v in values),
                cause="" if is_known else init.cause or cause,
                lengths=inside.lengths,
            )
            if not is_known:
                carry.kinds = frozenset().union(*[v.kinds for v in values])
            carries.append(self.enter(carry, inside))
        for variable, value in zip(variables[len(inits) :], scanned, strict=True):
            xs.append(self.enter(_slice_of(value, variable.aval, inside.lengths), inside))
        outputs = self.closed(eqn.params["jaxpr"], [*fixed, *carries, *xs], inside)
        return inside, carries, xs, outputs

    def _stacked(self, inside: Value, eqn: Any, loop: Loop, scope: _Scope) -> Value:
        is_member = inside in loop.members
        length = eqn.params["length"]
        aval = jax.core.ShapedArray((length, *inside.aval.shape), inside.aval.dtype)
        found = dataclasses.replace(inside, aval=aval, still=None, lengths=scope.lengths)
        op = Stack(inside, found, 0 if is_member else length, scope.remats)
        found.source = op
        self.enter(found, scope)
        self._add(op, scope)
        return found

    def _halved(self, eqn: Any, values: list[Value], scope: _Scope) -> list[Value] | None:
        """Add a scan as two, of which the first runs over frozen layers of stacked parameters."""
        _, _, scanned = split_scan(eqn, values)
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        frozen = [v.still.places for v in scanned if v.still and v.still.axis == 0]
        lines = [places[::-1] if reverse else places for places in frozen]
        counts = [int(np.argmin(line)) for line in lines if line[0]]
        if not counts or not 0 < min(counts) < length:
            return None
        count = min(counts)
        halves = functools.partial(_scan_in_two, eqn, length - count if reverse else count)
        avals = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
            for v in values
        ]
        mark = len(scope.ops), set(scope.members), list(scope.hoisted)
        found = self.closed(jax.make_jaxpr(halves)(*avals), values, scope)
        if any(is_work(op) for op in walk(scope.ops[mark[0] :])):
            return found
        del scope.ops[mark[0] :]
        scope.members, scope.hoisted = mark[1], mark[2]
        return None

    def _switch(self, eqn: Any, values: list[Value], scope: _Scope) -> list[Value] | None:
        """Add a choice whose branches are opened; None if nothing is gained by that."""
        index, *operands = values
        insides, branches = [], []
        for closed in eqn.params["branches"]:
            inside = _Scope(scope.lengths)
            results = self.closed(closed, operands, inside)
            insides.append(inside)
            branches.append(Branch(inside.ops, frozenset(inside.members), results))
        if not any(is_work(op) for inside in insides for op in walk(inside.ops)):
            return None
        switch = Switch(eqn, values, branches, [], scope.remats)
        for place, variable in enumerate(eqn.outvars):
            found = [branch.results[place] for branch in branches]
            value = Value(
                variable.aval,
                known=all(v.known for v in found),
                of_batch=index.of_batch or any(v.of_batch for v in found),
                of_params=index.of_params or any(v.of_params for v in found),
                cause=next((v.cause for v in found if v.cause), ""),
                kinds=frozenset().union(*[v.kinds for v in found]),
                lengths=scope.lengths,
                source=switch,
            )
            switch.finals.append(self.enter(value, scope))
        for inside in insides:
            self._enclose(inside, scope)
        self._add(switch, scope)
        return list(switch.finals)


RANDOM = frozenset(
    ["random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"]
)


def is_work(op: Op) -> bool:
    """Whether it computes something ahead that is worth to be kept."""
    return (
        isinstance(op, Equation) and not op.free and any(v.known and not v.given for v in op.makes)
    )


def _is_array(aval: Any) -> bool:
    return isinstance(getattr(aval, "aval", aval), jax.core.ShapedArray)


def _remat(eqn: Any) -> Remat:
    return Remat(eqn.params["policy"], eqn.params["prevent_cse"])


def split_scan(eqn: Any, values: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The constants of a scan, its carry before the first time, and what it scans over."""
    # Versions of JAX call the numbers of these differently; what is cut into slices tells them.
    body = eqn.params["jaxpr"]
    second = len(values) - _count_cut(eqn.invars, body.in_avals)
    first = second - len(eqn.outvars) + _count_cut(eqn.outvars, body.out_avals)
    return values[:first], values[first:second], values[second:]


def _count_cut(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values have other axes outside of a scan than in its body."""

    def axes(aval: Any) -> int:
        return len(getattr(aval, "shape", ()))

    return sum(axes(v.aval) != axes(aval) for v, aval in zip(outside, inside, strict=True))


def _slice_of(value: Value, aval: Any, lengths: tuple[int, ...]) -> Value:
    still = value.still
    if still:
        still = Still(still.axis - 1, still.places) if still.axis else None
    return dataclasses.replace(value, aval=aval, still=still, lengths=lengths, source=None)


def _scan_in_two(eqn: Any, place: int, *arrays: Any) -> list[Any]:
    """What a scan computes, by one over the first places and one over the others."""
    fixed, carry, xs = split_scan(eqn, list(arrays))
    body = jaxpr_as_fun(eqn.params["jaxpr"])
    reverse = eqn.params["reverse"]

    def step(carry: Any, slices: Any) -> Any:
        found = body(*fixed, *carry, *slices)
        return found[: len(carry)], found[len(carry) :]

    halves = [slice(place), slice(place, None)]
    lengths = [place, eqn.params["length"] - place]
    found = {}
    for half in (1, 0) if reverse else (0, 1):
        part = [x[halves[half]] for x in xs]
        carry, found[half] = jax.lax.scan(
            step, carry, part, length=lengths[half], reverse=reverse, unroll=eqn.params["unroll"]
        )
    ys = [jnp.concatenate(pair) for pair in zip(found[0], found[1], strict=True)]
    return [*carry, *ys]


def _still(eqn: Any, value: Value) -> Still | None:
    """The frozen places of what an equation makes of a parameter that is frozen along an axis."""
    if value.still is None:
        return None
    (axis, places), params = value.still, eqn.params
    name = eqn.primitive.name
    before, after = value.aval.shape, eqn.outvars[0].aval.shape
    if name in _LIKE:
        return value.still
    if name == "transpose":
        return Still(params["permutation"].index(axis), places)
    if name == "broadcast_in_dim":
        to = params["broadcast_dimensions"][axis]
        return Still(to, places) if after[to] == len(places) else None
    if name == "squeeze":
        gone = {each % len(before) for each in params["dimensions"]}
        return None if axis in gone and not places.all() else _moved(axis, gone, places)
    if name == "slice":
        step = (params["strides"] or [1] * len(before))[axis]
        part = slice(params["start_indices"][axis], params["limit_indices"][axis], step)
        return Still(axis, places[part])
    if name == "dynamic_slice":
        starts = eqn.invars[1:]
        if not isinstance(starts[axis], Literal):
            return None
        start = min(max(int(starts[axis].val), 0), before[axis] - after[axis])
        return Still(axis, places[start : start + after[axis]])
    if name == "reshape" and params.get("dimensions") is None:
        ahead = math.prod(before[:axis])
        found = [
            i for i, n in enumerate(after) if n == len(places) and math.prod(after[:i]) == ahead
        ]
        return Still(found[0], places) if found else None
    return None


def _moved(axis: int, gone: set[int], places: Bools) -> Still:
    """A line of places where some axes are gone; if that is the line's own, all are frozen."""
    return Still(0 if axis in gone else axis - sum(each < axis for each in gone), places)


_LIKE = frozenset(["convert_element_type", "copy", "reduce_precision", "stop_gradient"])

_REMATS = frozenset(["checkpoint", "remat", "remat2"])
_OWN_DERIVATIVE = frozenset(
    ["custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"]
)  # to open it would lose its rule, where something in it trains
_CALLS = frozenset(["jit", "pjit", "closed_call", "core_call", *_REMATS, *_OWN_DERIVATIVE])
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
