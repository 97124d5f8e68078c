"""Which axis of an array is that of its layer's outputs. Knows names and shapes only.

A layer is what one node of a tree holds directly: a kernel, mostly, and a bias. Shapes are those of
one layer, without the axes along which layers are stacked.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

from lrmult._errors import AxisError

Shape: TypeAlias = tuple[int, ...]

_KERNELS = ("kernel", "w")  # (..., inputs, outputs), unless it is a transposed convolution
_VECTORS = ("bias", "b", "scale", "offset")  # outputs last
_WEIGHT = "weight"

# The names that Linen and Haiku give by themselves to layers of a known layout.
_CONVOLUTION = re.compile(r"(Conv|ConvLocal)_[0-9]+|conv[123]_d(_[0-9]+)?")
_DENSE = re.compile(r"Dense_[0-9]+")
_GENERAL = re.compile(r"DenseGeneral_[0-9]+")
_EINSUM = re.compile(r"Einsum(_[0-9]+)?")
_ATTENTION = ("query", "key", "value", "out")

_ASK = "write axis=, such as axis=-1 for the last"
_STACKED = (
    "if these are several layers, say along which axis they are stacked, with "
    "structure=lrmult.Structure(stacked=...)"
)


def output_axis(
    name: str, layer: Mapping[str, Shape], called: str, beside: Mapping[str, object]
) -> int:
    """The output axis of one array of a layer, from the conventions of the libraries.

    Args:
        name: the name of the array.
        layer: the shapes of all arrays of the layer, by name.
        called: the name of the layer itself.
        beside: the names of what stands beside the layer.

    Raises:
        AxisError: if it is not known; with the cause alone.
    """
    shape = layer[name]
    if name not in (*_KERNELS, *_VECTORS, _WEIGHT):
        if name.startswith("embedding"):
            raise AxisError(
                "it is an embedding; write lrmult.rows(target, index) for its tokens, or axis=-1 "
                "for its features"
            )
        known = ", ".join((*_KERNELS, _WEIGHT, *_VECTORS))
        raise AxisError(f"it is called none of {known}; {_ASK}")
    if not shape:
        raise AxisError("it has no axes; name arrays that have")
    if len(shape) == 1:
        return 0
    if name == _WEIGHT:
        return _of_weight(shape, layer)
    if _EINSUM.fullmatch(called):
        raise AxisError(f"which axes of an Einsum are its outputs is in its code; {_ASK}")
    bias = layer.get("bias", layer.get("b"))
    kernel = layer.get("kernel", layer.get("w"))
    attention = called in _ATTENTION and all(other in beside for other in _ATTENTION)
    several = _GENERAL.fullmatch(called) is not None
    several |= attention and kernel is not None and len(kernel) == 3
    if kernel and bias and len(kernel) == 3 and bias == kernel[1:]:
        several = not _DENSE.fullmatch(called)  # a DenseGeneral by another name
    if several:
        if kernel is None or bias is None or bias == kernel[-len(bias) :]:
            return len(shape) - 1
        raise AxisError(f"its bias is not as its kernel; {_ASK}, or {_STACKED}")
    if name in _VECTORS:
        return _of_vector(shape, layer)
    if bias is not None and len(_wide(bias)) > 1:
        raise AxisError(f"its bias has several axes; {_ASK}, or {_STACKED}")
    is_known = len(shape) == 2 or _CONVOLUTION.fullmatch(called) is not None
    return _of_kernel(shape, bias, is_known)


def _wide(shape: Shape) -> list[int]:
    """The axes that have more than one place."""
    return [axis for axis, size in enumerate(shape) if size > 1]


def outputs_first(name: str, shape: Shape, most: int) -> int:
    """The output axis of an array of a layer of Equinox, whose weight has that many axes.

    Raises:
        AxisError: if the array is not what such a layer holds; with the cause alone.
    """
    if name not in (_WEIGHT, "bias"):
        raise AxisError(f"a layer of Equinox holds a weight and a bias; {_ASK}")
    expected = most if name == _WEIGHT else most - 1
    if len(shape) != expected:
        raise AxisError(f"in such a layer it has {expected} axes; {_STACKED}")
    return 0


def layer_axis(name: str, layer: Mapping[str, Shape], axis: int) -> int:
    """The axis of one array that goes with a given axis of the layer's largest array.

    Raises:
        AxisError: if there is none; with the cause alone.
    """
    shape = layer[name]
    most = max(map(len, layer.values()))
    if not -most <= axis < most:
        raise AxisError(f"its layer has no axis {axis}, but {most} axes")
    if not shape:
        raise AxisError("it has no axes; name arrays that have")
    front = axis % most
    if len(shape) in (1, most):
        return front if len(shape) == most else 0
    wide = _wide(shape)
    if len(wide) == 1:
        return wide[0]  # such as (out, 1, 1)
    # A smaller array beside it: PyTorch and Equinox pad its shape behind, the others in front.
    place = front if _WEIGHT in layer else front - most + len(shape)
    if not 0 <= place < len(shape):
        raise AxisError(
            f"it has {len(shape)} axes, and which of them goes with axis {axis} of an array of "
            f"{most} is not known; write lrmult.along(target, axis, index) for each array"
        )
    return place


def _of_vector(shape: Shape, layer: Mapping[str, Shape]) -> int:
    """Of a bias or a scale with several axes, only one of which may matter."""
    wide = _wide(shape)
    if len(wide) > 1:
        raise AxisError(f"it has several axes; {_ASK}, or {_STACKED}")
    if _WEIGHT in layer:
        if len(layer[_WEIGHT]) == len(shape) + 1 and set(wide) <= {0}:
            return 0  # PyTorch: (out, 1, 1) beside (out, in, 3, 3)
        raise AxisError(f"nothing tells which of its axes is that of the outputs; {_ASK}")
    return wide[0] if wide else len(shape) - 1


def _of_kernel(shape: Shape, bias: Shape | None, is_known: bool) -> int:
    """Of a kernel; `is_known` if it cannot be that of a transposed convolution.

    Those are what an array does not tell by itself: their outputs are the last axis but one.
    """
    last = len(shape) - 1
    if not bias:
        if is_known or shape[last] == shape[last - 1] == 1:
            return last
        raise AxisError(
            "there is no bias that could tell its outputs from its inputs, which a transposed "
            "convolution may hold last; write axis=-1 if the outputs are last, axis=-2 if not; or "
            f"{_STACKED}"
        )
    size = max(bias)
    found = [axis for axis in (last, last - 1) if shape[axis] == size]
    if is_known:
        found = [axis for axis in found if axis == last]
    if not found:
        raise AxisError(f"its bias has {size} outputs, which its shape does not bear out; {_ASK}")
    if len(found) == 1 or size == 1:
        return found[0]
    raise AxisError(
        f"its last two axes are both of size {size}, and a transposed convolution may hold its "
        "inputs last; write axis=-1 if the outputs are last, axis=-2 if not"
    )


def _of_weight(shape: Shape, layer: Mapping[str, Shape]) -> int:
    """Of a weight whose layer is of no known class: the one axis that has the size of its bias."""
    bias = layer.get("bias")
    if bias is not None and len(bias) == 1:
        found = [axis for axis, size in enumerate(shape) if size == bias[0]]
        if len(found) == 1:
            return found[0]
    raise AxisError(
        "neither the class of its layer nor the size of a bias tells its output axis (that of "
        "PyTorch's and Equinox's layers is axis=0); write axis="
    )
