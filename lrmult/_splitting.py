"""A program in two: what is known ahead, and the rest."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._cuts import Examples, to_hand_on
from lrmult._errors import FeaturesError, spec
from lrmult._marks import fingerprint, marks_of
from lrmult._programs import (
    Equation,
    Program,
    Value,
    in_order,
    is_work,
    needed,
    run,
    walk,
)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One of the arrays that a front hands on.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        axis: the axis along which examples lie; None if it is the same for all of them.
        rows: how many places on this axis are one example's.
        origin: what computes it, or its path in the batch.
        is_computed: whether it is computed, and no part of the batch.
    """

    shape: tuple[int, ...]
    dtype: Any
    axis: int | None
    rows: int
    origin: str
    is_computed: bool

    @property
    def size(self) -> int:
        """Its bytes for one example; all its bytes, if it is the same for all."""
        shape = [self.rows if i == self.axis else n for i, n in enumerate(self.shape)]
        return int(np.prod(shape, dtype=int)) * int(self.dtype.itemsize)

    def shape_of(self, examples: int) -> tuple[int, ...]:
        """Its shape for so many examples."""
        rows = self.rows * examples
        return tuple([rows if i == self.axis else n for i, n in enumerate(self.shape)])


class Split:
    """A program, cut behind what is known ahead.

    Attributes:
        features: what is handed on.
        examples: how values hang on examples.
        stored_marks: what computes each of the features.
        front_params: the parameters that the front reads, by number.
        front_ops: what is done ahead.
        rest_ops: what is not.
        gains: whether there is any work in that.

    Args:
        program: the program. Its inputs are parameters, batch and further arguments.
        names: what to call its inputs, but for further arguments.
        params: how many of its inputs are parameters.
        examples: how its values hang on examples.
        size: how many examples the batch has.
        wanted: what computes the features of another program, if this is to have the same.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        params: int,
        examples: Examples,
        size: int,
        wanted: Sequence[str] | None = None,
    ) -> None:
        self._program, self._params, self._names = program, params, names
        self._batch = range(params, len(names))
        self.examples = examples
        pairs = zip(program.inputs, names, strict=False)
        labels = {value: name for value, name in pairs if value.known or value.still}
        marks = marks_of(program, labels, examples.twins, size)
        if wanted is None:
            wanted = [marks[value] for value in in_order(to_hand_on(program, examples, size))]
        self.stored_marks = [*dict.fromkeys(wanted)]
        self._stored = _found(self.stored_marks, marks)
        stored = [values[0] for values in self._stored]
        stops = frozenset().union(*self._stored)
        self.front_ops, reads = needed(program.ops, stored, frozenset(), True)
        self.rest_ops, read = needed(program.ops, program.outputs, stops, False)
        if any(program.inputs[i] in read - stops for i in self._batch):
            raise FeaturesError(_OTHER)
        self.front_params = [i for i in range(params) if program.inputs[i] in reads]
        self.gains = any(is_work(op) for op in walk(self.front_ops))
        called = dict(zip(program.inputs, names, strict=False))
        self.features = tuple([self._feature(value, called, size) for value in stored])
        self.front = jax.jit(self._front)

    def _feature(self, value: Value, names: dict[Value, str], size: int) -> Feature:
        axes = self.examples.axes.get(value, ())
        axis = axes[0] if len(axes) == 1 and value.shape[axes[0]] % size == 0 else None
        rows = 1 if axis is None else value.shape[axis] // size
        origin = names.get(value) or origin_of(value)
        return Feature(value.shape, value.aval.dtype, axis, rows, origin, value not in names)

    def mixed(self) -> Value | None:
        """A feature in which examples have come together; None if there is none."""
        for (value, *_), feature in zip(self._stored, self.features, strict=True):
            odd = feature.axis is None and self.examples.axes.get(value)
            if odd or value in self.examples.mixes:
                return value
        return None

    def _front(self, params: Sequence[Any], batch: Sequence[Any]) -> tuple[Any, ...]:
        inputs = self._program.inputs
        env = dict(self._program.constants)
        env |= {inputs[i]: array for i, array in zip(self.front_params, params, strict=True)}
        env |= {inputs[i]: array for i, array in zip(self._batch, batch, strict=True)}
        stored = [values[0] for values in self._stored]
        run(self.front_ops, env, stored)
        return tuple([env[value] for value in stored])

    def rest(
        self, params: Sequence[Any], features: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        """The results of the program."""
        program = self._program
        env = dict(program.constants)
        for value, array in zip(program.inputs, params, strict=False):
            still = value.known and jnp.issubdtype(value.aval.dtype, jnp.inexact)
            env[value] = jax.lax.stop_gradient(array) if still else array
        env |= dict(zip(program.inputs[self._batch.stop :], args, strict=True))
        for values, array in zip(self._stored, features, strict=True):
            env |= dict.fromkeys(values, _as_feature(array, values[0]))
        run(self.rest_ops, env, program.outputs)
        return [
            jnp.asarray(env[value]) if value in program.constants else env[value]
            for value in program.outputs
        ]

    def changed(self, outputs: int) -> list[int]:
        """Which of the parameters the program returns changed, behind its first outputs."""
        pairs = zip(self._program.outputs[outputs:], self._program.inputs, strict=False)
        return [i for i, (after, before) in enumerate(pairs) if after is not before]

    def obstacle(self) -> str:
        """What the first work on the batch needs that is not known ahead; no text if nothing."""
        for op in walk(self._program.ops):
            if isinstance(op, Equation) and not op.free and any(v.of_batch for v in op.reads):
                cause = next((v.cause for v in op.reads if v.cause), "")
                if cause:
                    return f"{origin_of(op.makes[0])} needs {cause}"
        return ""

    def mark(self) -> str:
        """A fingerprint of what the front does, but for parameters and data: of any batch size."""
        kept = [(str(each.dtype), each.axis, each.rows) for each in self.features]
        text = f"{self.stored_marks} {kept}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def marks(self, params: Mapping[str, Any]) -> dict[str, str]:
        """A fingerprint of each parameter that the front reads, or of its frozen part, by path.

        Args:
            params: the parameters by path; those that are missing have none.
        """
        found = {}
        for i in self.front_params:
            path, still = self._names[i], self._program.inputs[i].still
            if path in params:
                array = params[path]
                if still:
                    array = np.compress(still.places, np.asarray(array), still.axis)
                found[path] = fingerprint(array)
        return found

    def work(self) -> tuple[int, int]:
        """The floating-point operations of the front and of the rest, going forward, roughly."""
        front, rest = (
            sum(op.work for op in walk(ops) if isinstance(op, Equation))
            for ops in (self.front_ops, self.rest_ops)
        )
        return front, rest


_OTHER = (
    "loss_fn computes other things now than when it was cut, so features from there do not fit: "
    "the model is in another mode (train() and eval() are two), a parameter has another dtype, or "
    "it does other things at this batch size; call precompute again, with the model, the "
    "parameters and a batch as they are used"
)


def _found(wanted: Sequence[str], marks: Mapping[Value, str]) -> list[list[Value]]:
    """The values that have these marks: all that the same computes.

    Raises:
        FeaturesError: if there are none.
    """
    values: dict[str, list[Value]] = {}
    for value in in_order(marks):
        values.setdefault(marks[value], []).append(value)
    if not values.keys() >= {*wanted}:
        raise FeaturesError(_OTHER)
    return [values[mark] for mark in wanted]


def _as_feature(array: Any, value: Value) -> Any:
    dtype = value.aval.dtype
    given = jnp.result_type(array)
    if given == dtype:
        return array
    if not (jnp.issubdtype(given, jnp.inexact) and jnp.issubdtype(dtype, jnp.inexact)):
        raise FeaturesError(
            f"a feature is {spec(np.shape(array), given)} where front returns {dtype}"
        )
    return jnp.asarray(array).astype(dtype)


def origin_of(value: Value) -> str:
    """What makes a value, and where that was written."""
    op = value.source
    if not isinstance(op, Equation):
        return "a loop" if value.lengths or op is not None else "an argument"
    place = str(op.eqn.source_info.name_stack) or _line(op)
    return f"{op.name} in {place}" if place else op.name


def _line(op: Equation) -> str:
    """The innermost line of the caller's own code, or of a library other than JAX."""
    frames = getattr(op.eqn.source_info.traceback, "frames", ())
    for frame in frames:
        if not frame.file_name.startswith((_JAX, _HERE)):
            line = getattr(frame, "start_line", None) or getattr(frame, "line_num", 0)
            return f"{os.path.basename(frame.file_name)}:{line}"
    return ""


_JAX, _HERE = (os.path.dirname(os.path.abspath(file)) for file in (jax.__file__, __file__))
