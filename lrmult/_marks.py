"""What computes the values of a program, as marks that are the same for every batch size."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lrmult._errors import spec
from lrmult._programs import Equation, Loop, Op, Program, Switch, Value


def fingerprint(array: Any) -> str:
    """A fingerprint of the values of an array, with its shape and dtype."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    found = np.ascontiguousarray(array)
    mark = hashlib.blake2b(spec(found.shape, found.dtype).encode(), digest_size=16)
    mark.update(found.reshape(-1).view(np.uint8).data)
    return mark.hexdigest()


def marks_of(
    program: Program, labels: Mapping[Value, str], twins: Mapping[Op, Any], size: int
) -> dict[Value, str]:
    """A mark of each value that depends on nothing but some inputs and on constants.

    Two values have one mark if the same computes them, of the same inputs. Numbers in it that are
    in proportion to the batch are written so.

    Args:
        program: a program.
        labels: the inputs, by name.
        twins: the equation in the place of an operation in a program for a batch of twice the size.
        size: how many examples the batch has.
    """
    marks = dict(labels)

    def mark(value: Value) -> str | None:
        if value not in marks and value in program.constants:
            marks[value] = fingerprint(jnp.asarray(program.constants[value]))
        return marks.get(value)

    def follow(ops: Sequence[Op], place: str) -> None:
        for op in ops:
            known = [each if isinstance(each, Literal) else mark(each) for each in _operands(op)]
            if None in known and not isinstance(op, Loop | Switch):
                continue
            operands = [_text(each) if isinstance(each, Literal) else str(each) for each in known]
            eqn = getattr(op, "eqn", None)
            what = "stack" if eqn is None else _of_any_size(eqn, twins.get(op, eqn), size)
            base = _hash(place, what, *operands)
            named = op.places if isinstance(op, Loop) else {}
            for value, name in [*named.items(), *((v, str(i)) for i, v in enumerate(op.makes))]:
                if value.known or value.still:
                    marks.setdefault(value, _hash(base, name))
            if isinstance(op, Loop):
                follow(op.body, base)
            elif isinstance(op, Switch):
                for i, branch in enumerate(op.branches):
                    follow(branch.body, _hash(base, str(i)))

    follow(program.ops, "")
    return marks


def _operands(op: Op) -> Sequence[Any]:
    if isinstance(op, Equation):
        return op.operands()
    return op.operands if isinstance(op, Loop | Switch) else op.reads


def _hash(*texts: str) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


def _of_any_size(eqn: Any, twin: Any, size: int) -> str:
    """What an equation does, in a text in which sizes of a batch are multiples of n."""
    one, two = _text(eqn), _text(twin)
    if one == two:
        return one
    parts, others = (re.split(r"(?<![\w.])(\d+)(?![\w.])", text) for text in (one, two))
    if len(parts) != len(others):
        return one
    return "".join(
        a if a == b or not (a.isdigit() and b.isdigit()) else _in_proportion(int(a), int(b), size)
        for a, b in zip(parts, others, strict=True)
    )


def _in_proportion(one: int, two: int, size: int) -> str:
    return f"{Fraction(two - one, size)}n+{2 * one - two}"


def _text(what: Any) -> str:
    """An equation, a parameter of one, a literal or a jaxpr as text, with all values in it."""
    return " ".join(_words(what))


def _words(what: Any) -> Iterator[str]:
    jaxpr = getattr(what, "jaxpr", what)
    if isinstance(what, Literal):
        yield from _words(what.val)
        yield str(what.aval)
    elif hasattr(what, "primitive") and hasattr(what, "outvars"):
        yield what.primitive.name
        for name, param in sorted(what.params.items()):
            yield name
            yield from _words(param)
        yield str([str(variable.aval) for variable in what.outvars])
    elif hasattr(jaxpr, "eqns"):
        for const in getattr(what, "consts", ()):
            yield fingerprint(jnp.asarray(const))
        numbers: dict[Any, int] = {}
        for variable in (*jaxpr.constvars, *jaxpr.invars):
            numbers[variable] = len(numbers)
        for eqn in jaxpr.eqns:
            yield from _atoms(eqn.invars, numbers)
            yield from _words(eqn)
            for variable in eqn.outvars:
                numbers[variable] = len(numbers)
        yield from _atoms(jaxpr.outvars, numbers)
    elif isinstance(what, tuple | list):
        yield "("
        for each in what:
            yield from _words(each)
        yield ")"
    elif isinstance(what, np.ndarray | jax.Array) and np.ndim(what):
        yield fingerprint(what)
    else:
        yield re.sub(r" at 0x[0-9a-f]+", "", str(what))


def _atoms(atoms: Sequence[Any], numbers: Mapping[Any, int]) -> Iterator[str]:
    for atom in atoms:
        if isinstance(atom, Literal):
            yield from _words(atom)
        else:
            yield f"v{numbers[atom]}"
