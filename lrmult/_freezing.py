"""What is frozen, outside an optimizer: in a loss, and in a test."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._errors import FrozenError, RuleError, listing, spec
from lrmult._levels import PyTree
from lrmult._libraries import is_nnx_module, is_variable, loaded_nnx
from lrmult._parts import Parts
from lrmult._paths import ParamTree, is_array
from lrmult._plan import cached_plan, warned
from lrmult._rules import Rules, RulesLike
from lrmult._running import RunTime
from lrmult._scaling import is_opaque, select
from lrmult._structure import Structure, read_structure


def stop_frozen(
    params: PyTree,
    rules: RulesLike,
    *,
    structure: Structure | None = None,
    strict: bool = True,
) -> PyTree:
    """Stop gradients into what is frozen, for use inside a loss.

    Values stay what they are. The gradient of what is frozen becomes zero, and where whole arrays
    are frozen no work is done for it. `wrap` alone saves that work if gradients are computed and
    applied in one ``jit``, since XLA drops what nobody reads; this saves it also where gradients
    leave the ``jit``: if the update is compiled apart, or gradients are logged, or their norm is
    taken. For parts of arrays it cuts the gradient, but saves nothing.

    Only a static multiplier of zero counts as frozen, as for `Plan.frozen`: a schedule that is 0
    at a step does not. Element masks that are no outer product of vectors become constants of the
    compiled program, with one bit for each element.

    Args:
        params: the parameters, as the loss gets them.
        rules: see `Rules`.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        The parameters. An NNX module is changed in place, as by `flax.nnx.update`, and returned; so
        it must be an argument of what is differentiated or compiled, as NNX wants it.

    Raises:
        LrmultError: what `compile_rules` raises.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"trunk": jnp.array([1.0, 2.0]), "head": jnp.array([3.0, 4.0])}
        >>> rules = [("trunk", None), (lm.rows("head", 0), None)]
        >>> def loss(params):
        ...     params = lm.stop_frozen(params, rules)
        ...     return (params["trunk"] * params["head"]).sum()
        >>> grads = jax.grad(loss)(params)
        >>> print(grads["trunk"], grads["head"])
        [0. 0.] [0. 2.]
    """
    nnx = loaded_nnx()
    module = params if is_nnx_module(params) else None
    if module is not None:
        params = nnx.state(module)
    read = Rules(rules)
    plan = warned(cached_plan(read, params, read_structure(structure), strict))
    packed = RunTime(read).packed
    leaves = jax.tree.leaves(params)
    for i, (leaf, scales) in enumerate(zip(leaves, plan.scales, strict=True)):
        if is_array(leaf) and not is_opaque(leaf):
            leaves[i] = select(scales, packed, jax.lax.stop_gradient(leaf), leaf)
    stopped = jax.tree.unflatten(plan.treedef, leaves)
    if module is None:
        return stopped
    # What a copy of the module counted or drew at random would be lost.
    nnx.update(module, stopped)
    return module


def assert_frozen(
    before: PyTree,
    after: PyTree,
    rules: RulesLike,
    *,
    structure: Structure | None = None,
    strict: bool = True,
) -> None:
    """Raise if a bit of what is frozen changed.

    For tests, and for a look now and then in mid-run: every frozen array, and every frozen part of
    one, is compared bit by bit, on the host. ``-0.0`` and ``0.0`` differ, and a NaN equals itself.
    Where arrays are split among processes, each process compares what it holds.

    Args:
        before: the parameters before training; a copy of them, where training overwrites them: NNX
            changes its modules in place, and states of them with it (take ``nnx.clone(model)``),
            and a donated array is gone (take ``jax.tree.map(jnp.copy, params)``).
        after: the parameters after it, with the same paths, shapes and dtypes.
        rules: see `Rules`.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Raises:
        FrozenError: with the path, the index and both values of the first element that changed; or
            if the two trees do not hold the same arrays. It is an AssertionError too.
        RuleError: if `before` cannot tell what was: if it shares its NNX variables with `after`,
            was donated, or is split among processes in another way.
        LrmultError: what `compile_rules` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> before = {"trunk": jnp.array([1.0, 2.0]), "head": jnp.array([3.0])}
        >>> after = {"trunk": jnp.array([1.0, 2.5]), "head": jnp.array([4.0])}
        >>> lm.assert_frozen(before, after, [(lm.rows("trunk", 0), None)])
        >>> lm.assert_frozen(before, after, [("trunk", None)])
        Traceback (most recent call last):
            ...
        lrmult.FrozenError: 'trunk' float32[2] is frozen, but changed at [1]: 2.0 became 2.5
    """
    plan = warned(cached_plan(Rules(rules), before, read_structure(structure), strict))
    if _variables(before) & _variables(after):
        raise RuleError(
            "before and after share their NNX variables, so nothing can be seen to change; keep a "
            "copy before training: nnx.clone(model)"
        )
    then, now = (_by_path(tree, jax.tree.leaves(tree)) for tree in (before, after))
    if then.keys() != now.keys():
        lost, new = then.keys() - now.keys(), now.keys() - then.keys()
        raise FrozenError(
            "before and after are not the same parameters: "
            + "; ".join(
                f"only {when} has {listing(sorted(names), 3)}"
                for when, names in (("before", lost), ("after", new))
                if names
            )
        )
    for path, still in _by_path(before, plan.treedef.flatten_up_to(plan.frozen)).items():
        _compare(path, then[path], now[path], still)


def _by_path(tree: PyTree, leaves: Sequence[Any]) -> dict[str, Any]:
    """What stands for each array of a tree."""
    read = ParamTree(tree)
    return {read.text(node): leaves[index] for index, node in read.arrays()}


def _variables(tree: PyTree) -> set[int]:
    """The NNX variables in a tree, by identity."""
    nodes = jax.tree.leaves(tree, is_leaf=is_variable)
    return {id(node) for node in nodes if is_variable(node)}


def _compare(path: str, before: Any, after: Any, frozen: Any) -> None:
    """Raise if one of the elements that are frozen is not what it was."""
    then, now = (_read(path, each) for each in (before, after))
    # That of a key is its own dtype: on the host it is the bytes that it holds.
    dtypes = [getattr(each, "dtype", None) for each in (before, after)]
    name = f"{path!r} {spec(then.shape, dtypes[0] or then.dtype)}"
    if (then.shape, then.dtype) != (now.shape, now.dtype):
        seen = spec(now.shape, dtypes[1] or now.dtype)
        raise FrozenError(f"{name} became {seen}; the parameters must keep shapes and dtypes")
    if frozen is False:
        return
    then, now = _on_host(path, then, now)
    changed = differing(then, now)
    changed &= frozen.dense() if isinstance(frozen, Parts) else frozen
    places = np.argwhere(changed)
    if len(places):
        index = tuple(places[0].tolist())
        more = f", and so did {len(places) - 1:,} more of its elements" * (len(places) > 1)
        at = f" at [{', '.join(map(str, index))}]" * bool(index)
        raise FrozenError(
            f"{name} is frozen, but changed{at}: {then[index]!s} became {now[index]!s}{more}"
        )


def differing(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which elements of two arrays of one shape and dtype have not the same bits."""
    if not one.itemsize:  # float0
        return np.zeros(one.shape, np.bool_)
    width = min(one.itemsize, 8)
    bits = [np.ascontiguousarray(each).reshape(-1).view(f"u{width}") for each in (one, other)]
    words = (bits[0] != bits[1]).reshape(one.size, one.itemsize // width)
    return np.asarray(words.any(-1)).reshape(one.shape)


def _read(path: str, array: Any) -> Any:
    """The array on the host, or as it is where other processes hold parts of it."""
    if isinstance(array, jax.core.Tracer):
        raise RuleError("assert_frozen compares bits on the host; call it outside of jax.jit")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise RuleError(
            f"{path!r} was donated, and is gone; keep a copy before training: "
            "jax.tree.map(jnp.copy, params)"
        )
    if jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key):
        array = jax.random.key_data(array)
        if array.is_fully_addressable:
            words = np.asarray(array)
            array = words.view(np.dtype((np.void, words.itemsize * words.shape[-1])))[..., 0]
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array
    return np.asarray(array)


def _on_host(path: str, before: Any, after: Any) -> list[np.ndarray[Any, Any]]:
    """Both arrays on the host, zero in both where only other processes can compare them."""
    split = [each for each in (before, after) if isinstance(each, jax.Array)]
    if not split:
        return [before, after]
    if not split[0].sharding.is_equivalent_to(split[-1].sharding, split[0].ndim):
        raise RuleError(
            f"{path!r} is split among processes otherwise after than before, so that none can "
            "compare it; put one where the other is, with jax.device_put"
        )
    return [_held(array, split[0]) for array in (before, after)]


def _held(array: Any, split: jax.Array) -> np.ndarray[Any, Any]:
    """What this process holds of an array that is split among processes, and zeros."""
    copy = np.zeros(split.shape, split.dtype)
    if isinstance(array, jax.Array):
        for shard in array.addressable_shards:
            copy[shard.index] = shard.data
    else:
        for shard in split.addressable_shards:
            copy[shard.index] = array[shard.index]
    return copy
