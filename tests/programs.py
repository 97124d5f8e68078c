"""What a program that JAX lowered or compiled is made of."""

import collections
import re

import numpy as np

_CONSTANT = re.compile(
    r"stablehlo\.constant dense(_resource)?<(.)[^\n]*> : tensor<((?:\d+x)*)(complex<)?[a-z]+(\d+)"
)
_COLLECTIVE = re.compile(
    r"= (.*?) ((?:all-(?:gather|reduce|to-all)|reduce-scatter|collective-\w+)(?:-start)?)\("
)


def constants(lowered):
    """The bytes of each constant of a lowered program; 0 for one value repeated."""
    text = lowered.as_text()
    found = _CONSTANT.findall(text)
    assert len(found) == len(re.findall(r"stablehlo\.constant|dense_resource<", text))
    sizes = []
    for resource, first, shape, is_complex, bits in found:
        count = int(np.prod([int(size) for size in shape.split("x")[:-1]], dtype=int))
        size = count * max(int(bits) // 8, 1) * (2 if is_complex else 1)
        sizes.append(size if resource or first in '["' else 0)
    return sizes


def collectives(compiled):
    """How many arrays of which type each kind of collective of a compiled program handles."""
    return collections.Counter(
        f"{kind} {array}"
        for result, kind in _COLLECTIVE.findall(compiled.as_text())
        for array in re.findall(r"\w+\[[\d,]*\]", result)
    )
