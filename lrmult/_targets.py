"""Targets: which parameters a rule speaks of, and which part of them."""

import contextlib
import dataclasses
import functools
import hashlib
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import jax
import numpy as np

from lrmult._errors import AxisError, LrmultError, MaskError, PatternError, shorten, show, spec
from lrmult._of_type import OfType
from lrmult._patterns import (
    ANY_DEPTH,
    At,
    Indexed,
    Names,
    Pattern,
    Span,
    check_magnitude,
    parse,
    pattern_from_tuple,
    position_from_python,
)
from lrmult._regions import Flags, Index, Region, Shape, factor

Predicate: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], bool]


Selector: TypeAlias = Pattern | re.Pattern[str] | Predicate | OfType
# What users write: text, a tuple, an int, a slice, `...`, a compiled regular expression, a
# predicate or a part; `EllipsisType` and `slice` in a union are of no help to anyone, hence `Any`.
Target: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Along:
    """The places that an index means along an axis."""

    axis: int
    index: Index


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The output units of a layer that an index means; None is the axis that its layout tells."""

    axis: int | None
    index: Index


@dataclasses.dataclass(frozen=True)
class Elements:
    """The true elements of a mask; `region` is None if there are none."""

    shape: Shape
    digest: bytes
    region: Region | None = dataclasses.field(compare=False)


Restriction: TypeAlias = Along | Neurons | Elements


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A target that speaks of part of what another target speaks of.

    Attributes:
        target: the other target.
        restriction: the part.
        text: how messages show it.
        by_rows: whether it was written with `rows`, which is `along` the first axis.
    """

    target: Target
    restriction: Restriction
    text: str
    by_rows: bool = False

    def __repr__(self) -> str:
        return self.text


def along(target: Target, axis: int, index: Any) -> Part:
    """Name the part of arrays that lies at some places along an axis.

    One attention head, an input channel, one layer of a scanned stack. Axes are those of the arrays
    as they stand in the tree.

    Args:
        target: any target, another part too: what both allow is meant.
        axis: an axis of every array that `target` matches; negative ones count from the last.
        index: an int, a slice, a sequence of ints, or a boolean vector as long as the axis.
            Negative ints count from the end.

    Returns:
        A target for a rule. Where it names arrays by wildcards, a regular expression or a
        predicate, those are passed over that have no such axis or place, unless that leaves none.

    Raises:
        PatternError: if `index` is none of the above.
        AxisError: if `axis` is no int; from `compile_rules` if an array does not have the axis.
        IndexRangeError: from `compile_rules`, if an index lies outside, or selects nothing.
        MaskError: from `compile_rules`, if a boolean vector has another size than the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"key": jnp.ones((64, 8, 16)), "query": jnp.ones((64, 8, 16))}
        >>> head = lm.along("query", 1, 2)  # of input, heads, head size
        >>> print(lm.compile_rules([(head, None)], params))
        parameters   arrays          size                 multiplier   rule
        --------------------------------------------------------------------------------------
        key          f32[64,8,16]   8,192                          1   none
        query        f32[64,8,16]   8,192   [:, 2, :] frozen; rest 1   0: along('query', 1, 2)
        <BLANKLINE>
        2 arrays, 16,384 parameters: 15,360 train, 1,024 frozen
    """
    with _reading("along", target, axis, index):
        read = Along(_read_axis(axis), _read_index(index))
    return Part(target, read, f"along({show_target(target)}, {axis}, {_show_index(read.index)})")


def rows(target: Target, index: Any) -> Part:
    """Name rows of arrays, such as those of new tokens in an embedding.

    What is frozen keeps its place in the state of the optimizer.

    Args:
        target: any target.
        index: as for `along`; a tuple of two ints is two rows, no span.

    Returns:
        A target for a rule: that of ``along(target, 0, index)``.

    Raises:
        LrmultError: as `along` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"embed": {"embedding": jnp.ones((100, 8))}}
        >>> rules = [(lm.rows("embed/embedding", slice(-10, None)), 1), (..., None)]
        >>> print(lm.compile_rules(rules, params).leaves[0].trained)
        80
    """
    with _reading("rows", target, index):
        read = Along(0, _read_index(index))
    text = f"rows({show_target(target)}, {_show_index(read.index)})"
    return Part(target, read, text, by_rows=True)


def neurons(target: Target, index: Any, axis: int | None = None) -> Part:
    """Name output units of layers: the columns of their kernels, and their biases.

    The index is that of every array below the target, along its output axis. That axis is the last
    of ``kernel``, ``w``, ``bias``, ``b``, ``scale`` and ``offset`` (Flax, Haiku), and the first of
    the ``weight`` and ``bias`` of Equinox's layers. In a layer with several output axes, such as
    the query of an attention layer (input, heads, head size), it is the last of them.

    Where that is not known, `axis` must be given: for embeddings and other names, and for kernels
    of three and more axes whose bias does not tell it (there is none, or the last two axes are of
    one size: a transposed convolution may hold its outputs in the last axis but one). Layers that
    are stacked must be known as such: see `Structure`.

    Args:
        target: any target, a part too.
        index: as for `along`.
        axis: the output axis, of the array with the most axes in each layer as it stands in the
            tree. Arrays of one axis beside it are taken along that.

    Returns:
        A target for a rule.

    Raises:
        PatternError: if `index` cannot be read.
        AxisError: if `axis` is no int; from `compile_rules` if the output axis is not known, or the
            arrays of one layer have unlike sizes along it.
        IndexRangeError: from `compile_rules`, as for `along`.
        MaskError: from `compile_rules`, as for `along`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"fc1": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}}
        >>> rules = [(lm.neurons("fc1", [0, 1, 2]), None), ("fc1", 0.1)]
        >>> print(lm.compile_rules(rules, params).multipliers["fc1"])
        {'bias': array([0. , 0. , 0. , 0.1]), 'kernel': array([[0. , 0. , 0. , 0.1]])}
    """
    with _reading("neurons", target, index):
        read = Neurons(None if axis is None else _read_axis(axis), _read_index(index))
    given = "" if axis is None else f", axis={axis}"
    return Part(target, read, f"neurons({show_target(target)}, {_show_index(read.index)}{given})")


def elements(target: Target, mask: Any) -> Part:
    """Name the elements of arrays where a boolean array is true.

    A mask that is an outer product of vectors costs as much as those. Any other is kept as bits, in
    the state of the transformation, eight to a byte along the last axis: where that axis is
    sharded, give each device a multiple of eight places, or the bits have to be sent around.

    Args:
        target: any target, a part too.
        mask: a boolean array of the shape of every array that `target` matches. It is copied.

    Returns:
        A target for a rule.

    Raises:
        MaskError: if `mask` is no boolean array; from `compile_rules` if an array has another
            shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> pruned = lm.elements("w", params["w"] == 0)
        >>> lm.compile_rules([(pruned, None)], params).multipliers["w"]
        Parts(2 of 4 elements frozen; rest 1)
    """
    with _reading("elements", target, mask):
        found = _concrete(mask)
        if found is None or found.dtype != np.bool_:
            raise MaskError(
                f"{_seen(mask)} is no mask; write a boolean array, such as weights == 0, that is "
                "known before anything is traced"
            )
    digest = hashlib.blake2b(np.packbits(found).tobytes()).digest()
    region = factor(found) if found.any() or found.size == 0 else None
    text = f"elements({show_target(target)}, {spec(found.shape, 'bool')})"
    return Part(target, Elements(found.shape, digest, region), text)


@contextlib.contextmanager
def _reading(function: str, target: Target, *arguments: Any) -> Iterator[None]:
    """Check a target, and name the call in errors."""
    try:
        read_target(target)
        yield
    except LrmultError as error:
        call = ", ".join([show_target(target), *map(_seen, arguments)])
        raise type(error)(f"{function}({call}): {error}") from None


def _concrete(value: Any) -> np.ndarray[Any, Any] | None:
    """A NumPy array of the value; None if there is none."""
    if isinstance(value, jax.core.Tracer):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return None


def _seen(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return "a traced array"
    return "a shape" if isinstance(value, jax.ShapeDtypeStruct) else show(value)


def _read_axis(axis: Any) -> int:
    try:
        if isinstance(axis, bool | np.bool_):
            raise TypeError
        number = operator.index(axis)
        check_magnitude(number)
        return number
    except TypeError:
        raise AxisError(f"{show(axis)} is no axis; write an int, such as 0 or -1") from None


def _read_index(index: Any) -> Index:
    if isinstance(index, slice):
        return position_from_python(index)
    if isinstance(index, numbers.Integral) and not isinstance(index, bool | np.bool_):
        check_magnitude(int(index))
        return int(index)
    readable = not isinstance(index, str | bytes | set | frozenset)
    found = _concrete(index) if readable else None
    if readable and isinstance(index, Sequence) and len(index) == 0:
        return ()
    if found is not None and found.dtype == np.bool_ and found.ndim == 1:
        return Flags(found)
    if found is not None and found.dtype == np.bool_ and found.ndim > 1:
        raise MaskError(
            f"{_seen(index)} is no index along one axis; for a mask of single elements write "
            "elements(target, mask)"
        )
    if isinstance(index, Sequence) and any(isinstance(each, bool | np.bool_) for each in index):
        raise PatternError(f"{_seen(index)} mixes ints and bools; write the one or the other")
    if found is not None and found.dtype.kind in "iu" and found.ndim < 2:
        return tuple(found.tolist()) if found.ndim else int(found)
    if found is not None and found.dtype.kind in "fciu" and found.ndim > 0:
        seen = spec(found.shape, found.dtype)
        raise PatternError(f"an array {seen} is no index; write ints or bools, along one axis")
    raise PatternError(
        f"{_seen(index)} is no index; write an int, a slice, a list of ints or a boolean vector, "
        "known before anything is traced"
    )


def _show_index(index: Index) -> str:
    if isinstance(index, Flags):
        return f"bool[{len(index.vector)}]"
    if isinstance(index, Span):
        ends = index if index.step is not None else index[:2]
        return f"slice({', '.join(map(str, ends))})"
    if isinstance(index, int):
        return str(index)
    if len(index) > 8:
        if index == tuple(range(index[0], index[-1] + 1)):
            return f"range({index[0]}, {index[-1] + 1})"
        return f"[{', '.join(map(str, index[:4]))}, ... {index[-1]}: {len(index)} ints]"
    return f"[{', '.join(map(str, index))}]"


def read_target(target: Target) -> tuple[Selector, tuple[Restriction, ...]]:
    """What a target selects, and to which part of that its restrictions lead, innermost first.

    Raises:
        PatternError: if it cannot be read.
    """
    restrictions: list[Restriction] = []
    part = target
    while isinstance(part, Part):
        restrictions.insert(0, part.restriction)
        part = part.target
    return _read_selector(whole_target(target)), tuple(restrictions)


def whole_target(target: Target) -> Target:
    """The target that names arrays, of which a part is part."""
    while isinstance(target, Part):
        target = target.target
    return target


def _read_selector(target: Target) -> Selector:
    if isinstance(target, str):
        return parse(target)
    if isinstance(target, OfType):
        return target
    if target is ...:
        return Pattern((ANY_DEPTH,))
    if isinstance(target, tuple):
        return pattern_from_tuple(target)
    if isinstance(target, re.Pattern):
        if isinstance(target.pattern, bytes):
            raise PatternError("a regular expression of bytes cannot match a path; drop the b")
        return target
    if isinstance(target, slice) or (
        isinstance(target, numbers.Integral) and not isinstance(target, bool)
    ):
        return Pattern((At(position_from_python(target)),))
    if callable(target) and not isinstance(target, type):
        # A module of Equinox or NNX is callable too, but it is a tree of arrays.
        is_partial = isinstance(target, functools.partial)
        if is_partial or not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(target)):
            return cast(Predicate, target)
        raise PatternError(
            f"a module ({type(target).__name__}) is no target; write its path, as "
            "lrmult.paths(...) lists it"
        )
    raise PatternError(
        f"{show(target)} ({type(target).__name__}) is no target; write a path such as "
        "'encoder/head' or a tuple of names for one part, ... for everything, a compiled regular "
        "expression, or a predicate (path, leaf) -> bool"
    )


def is_wild(selector: Selector) -> bool:
    """Whether it finds arrays by more than their full names and positions."""
    if not isinstance(selector, Pattern):
        return True
    return any(
        step is ANY_DEPTH
        or (isinstance(step, Names) and not step.is_literal)
        or (isinstance(step, Indexed) and not step.names.is_literal)
        for step in selector.steps
    )


def _plain(end: Any) -> Any:
    """An int of Python for one of NumPy."""
    return int(end) if isinstance(end, numbers.Integral) and not isinstance(end, bool) else end


def show_target(target: Target) -> str:
    """Write a target as it stands in Python source, as far as it can be."""
    if target is ...:
        return "..."
    if isinstance(target, OfType):
        return target.text
    if isinstance(target, str):
        return show(str(target))  # of NumPy's text too
    if isinstance(target, numbers.Integral) and not isinstance(target, bool):
        return show(int(target))
    if isinstance(target, slice):
        return show(slice(*map(_plain, (target.start, target.stop, target.step))))
    if isinstance(target, tuple):
        # A tuple in a tuple is no target, and may hold itself many times over.
        shown = [show(p) if isinstance(p, tuple) else show_target(p) for p in target[:20]]
        shown += ["..."] * (len(target) > 20)
        return shorten(f"({', '.join(shown)}{',' * (len(target) == 1)})")
    if callable(target) and not isinstance(target, type):
        name = getattr(target, "__qualname__", None)
        return f"<predicate {shorten(name)}>" if name else show(target)
    return show(target)
