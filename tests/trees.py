"""Trees of shapes, for tests of rules alone."""

import functools

import jax
import jax.numpy as jnp


def tree_of(shapes, dtype=jnp.float32):
    """{"a/b": (2, 3)} as nested dicts of shapes."""
    tree = {}
    for path, shape in shapes.items():
        *above, name = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)
        node[name] = jax.ShapeDtypeStruct(shape, dtype)
    return tree
