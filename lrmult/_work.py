"""How much work the equations of a jaxpr are."""

import enum
import math
from collections.abc import Iterator
from typing import Any


class Kind(enum.IntEnum):
    """Kinds of equations, from the cheapest on."""

    MOVES = 0  # data alone
    ELEMENTS = 1  # computes element by element
    REDUCES = 2  # one pass over the data
    WORKS = 3  # all else: products of matrices, convolutions, loops


def kind_of(name: str) -> Kind:
    """What kind of work a primitive of that name does."""
    if name in _MOVES:
        return Kind.MOVES
    if name in _ELEMENTS:
        return Kind.ELEMENTS
    return Kind.REDUCES if name.startswith(_REDUCES) else Kind.WORKS


def work_of(eqn: Any) -> int:
    """The floating-point operations of an equation, roughly.

    A product of matrices or a convolution takes two for each pair of factors; all else one for each
    element of the largest array. The body of a ``while`` counts once, of branches the costliest.
    """
    name, params = eqn.primitive.name, eqn.params
    if kind_of(name) == Kind.MOVES:
        return 0
    inner = [sum(map(work_of, jaxpr.eqns)) for jaxpr in jaxprs_in(params.values())]
    if inner:
        return int(params.get("length", 1)) * (max(inner) if name == "cond" else sum(inner))
    largest = max((_size(atom) for atom in (*eqn.invars, *eqn.outvars)), default=0)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return int(2 * _size(eqn.outvars[0]) * depth)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1]
        outputs = kernel.aval.shape[params["dimension_numbers"].rhs_spec[0]]
        return int(2 * _size(eqn.outvars[0]) * _size(kernel) // max(outputs, 1))
    return largest


def jaxprs_in(params: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for param in params:
        if isinstance(param, tuple | list):
            yield from jaxprs_in(param)
        else:
            jaxpr = getattr(param, "jaxpr", param)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


_MOVES = frozenset(
    """
    bitcast_convert_type broadcast broadcast_in_dim concatenate convert_element_type copy copy_p
    dynamic_slice dynamic_update_slice empty expand_dims gather iota name optimization_barrier pad
    reduce_precision reshape reshard rev select_n sharding_constraint slice split squeeze
    stop_gradient transpose
    """.split()  # noqa: SIM905
)
_ELEMENTS = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz complex conj cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le
    lgamma log log1p logistic lt max min mul ne neg nextafter not or population_count pow real rem
    round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub
    tan tanh xor
    """.split()  # noqa: SIM905
)
_REDUCES = ("reduce_", "argmax", "argmin", "cum")
