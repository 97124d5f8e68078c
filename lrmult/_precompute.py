"""A loss function in two: what its frozen part makes of a batch, and what trains on that."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lrmult._arguments import (
    NUMBERS,
    Abstract,
    Form,
    abstract,
    example_axes,
    flattened,
    number_of_examples,
    paths_of,
    random_states,
    with_examples,
)
from lrmult._cuts import Examples
from lrmult._errors import FeaturesError, show, spec
from lrmult._levels import PyTree
from lrmult._plan import Plan, cached_plan, warned
from lrmult._programs import Program, Still, Value, read
from lrmult._rules import Rules, RulesLike
from lrmult._splitting import Feature, Split
from lrmult._structure import Structure, read_structure

LossFn: TypeAlias = Callable[..., PyTree]


class _Traced(NamedTuple):
    """A loss function as it was traced, in two."""

    split: Split
    results: Any  # the structure of what it returns


class Precomputed:
    """A loss function in two. Made by `precompute`.

    ``print(precomputed)`` shows what the front hands on to the rest, and how much of the work of
    the forward pass is in front.

    Attributes:
        features: what is handed on for the batch that it was made with, array by array.
        gains: whether any work is in front.
        reason: why nothing is gained; no text if something is.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        plan: Callable[[PyTree], Plan],
        batch: PyTree,
        args: tuple[Any, ...],
        batch_axis: Any,
    ) -> None:
        self._loss_fn, self._plan = loss_fn, plan
        self._batch, self._args = jax.tree.map(abstract, (batch, args))
        self._axes, self._why = example_axes(self._batch, batch_axis)
        self._known: dict[Any, _Traced] = {}
        self._wanted: list[str] | None = None
        arrays, form = flattened(params)
        self.cut = self._traced(form, arrays, self._batch, self._args).split
        self._wanted = self.cut.stored_marks
        self.features: tuple[Feature, ...] = self.cut.features
        self.gains = self.cut.gains
        self.reason = "" if self.gains else self._reason()

    def _reason(self) -> str:
        obstacle = self.cut.obstacle()
        return (
            "nothing is gained by computing ahead: "
            + (f"{obstacle}, and no work is before it" if obstacle else "there is no work to save")
            + "; take lrmult.wrap alone"
        )

    @property
    def batch(self) -> PyTree:
        """The batch that it was made with, as shapes."""
        return self._batch

    @property
    def example_axes(self) -> tuple[int | None, ...]:
        """Per array of a batch the axis along which its examples lie; None if it has none.

        Raises:
            FeaturesError: if that is not known.
        """
        if self._why:
            raise FeaturesError(self._why)
        return self._axes

    def fingerprints(self, params: PyTree) -> dict[str, str]:
        """A fingerprint of each frozen parameter that the front reads, by its path."""
        arrays, form = flattened(params)
        tree = form.tree(arrays)
        leaves = dict(zip(paths_of(tree), jax.tree.leaves(tree), strict=True))
        numbers = {path: repr(leaf) for path, leaf in leaves.items() if isinstance(leaf, NUMBERS)}
        return self.cut.marks(leaves) | numbers

    def front(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, ...]:
        """What the frozen part makes of a batch. Compiled.

        Args:
            params: the parameters, of which only what is frozen is read.
            batch: a batch, also of another size.

        Returns:
            The features: the arrays that `rest` needs, and that are no parameters.
        """
        arrays, form = flattened(params)
        split = self._traced(form, arrays, batch, self._args).split
        found = split.front([arrays[i] for i in split.front_params], jax.tree.leaves(batch))
        return tuple(found)

    def rest(self, params: PyTree, features: Sequence[Any], *args: Any) -> PyTree:
        """What the loss function returns, from features.

        It stands for the loss function in a step: to be differentiated with respect to the
        parameters, and compiled. The gradient of a frozen array is zero.

        Args:
            params: the parameters.
            features: what `front` returned, or the same in narrower dtypes.
            *args: the further arguments of the loss function, if it has any.

        Returns:
            What the loss function returns for the batch that the features are of. An NNX module
            is changed as the loss function changes it.

        Raises:
            FeaturesError: if the features are not such as `front` returns.
        """
        features = tuple(features)
        arrays, form = flattened(params)
        wanted: Any = jax.tree.structure(self._args)
        if wanted != jax.tree.structure(args):
            raise FeaturesError(
                f"rest needs the further arguments of loss_fn, behind the features: "
                f"{len(self._args)}, as precompute got them, not {len(args)}"
            )
        shapes = [np.shape(feature) for feature in features]
        batch = self._batch_of(shapes)
        split, results = self._traced(form, arrays, batch, args)
        if shapes != [feature.shape for feature in split.features]:
            raise FeaturesError(
                "loss_fn does other things with such features than with the batch that precompute "
                "was given; call precompute with a batch of this size"
            )
        found = split.rest(arrays, features, jax.tree.leaves(args))
        changed = split.changed(results.num_leaves)
        if changed:
            form.update(params, {i: found[results.num_leaves + i] for i in changed})
        return results.unflatten(found[: results.num_leaves])

    def _batch_of(self, shapes: Sequence[tuple[int, ...]]) -> PyTree:
        """The batch, as shapes, of which features have these shapes."""
        if shapes == [feature.shape for feature in self.features]:
            return self._batch
        if len(shapes) == len(self.features):
            for shape, feature in zip(shapes, self.features, strict=True):
                if feature.axis is not None and len(shape) > feature.axis:
                    count = shape[feature.axis] // feature.rows
                    if shapes == [each.shape_of(count) for each in self.features]:
                        return with_examples(self._batch, self._axes, count)
        wanted = ", ".join(spec(each.shape, each.dtype) for each in self.features)
        seen = ", ".join(map(str, shapes))
        why = f" (another number of examples is not possible: {self._why})" if self._why else ""
        raise FeaturesError(f"front returns {wanted}, but the features have the shapes {seen}{why}")

    def _traced(
        self, form: Form, arrays: Sequence[Any], batch: PyTree, args: tuple[Any, ...]
    ) -> _Traced:
        arrays, batch, args = jax.tree.map(abstract, (list(arrays), batch, args))
        leaves, treedef = jax.tree.flatten((arrays, batch, args))
        key = form, treedef, tuple([(x.shape, x.dtype, x.weak_type, x.sharding) for x in leaves])
        try:
            hash(key)
        except TypeError:  # a static field of a module that cannot be hashed
            return self._trace(form, arrays, batch, args)
        if key not in self._known:
            self._known[key] = self._trace(form, arrays, batch, args)
        return self._known[key]

    def _trace(
        self, form: Form, arrays: Sequence[Any], batch: PyTree, args: tuple[Any, ...]
    ) -> _Traced:
        tree = form.tree(arrays)
        plan = self._plan(tree)
        paths = paths_of(tree)
        frozen = plan.treedef.flatten_up_to(plan.frozen)
        facts = [
            (_RANDOM if is_random else still, path)
            for still, path, is_random, leaf in zip(
                frozen, paths, random_states(tree), jax.tree.leaves(tree), strict=True
            )
            if isinstance(leaf, Abstract)
        ]
        program, results = self._program(form, arrays, facts, batch, args)
        size, examples = number_of_examples(batch, self._axes), None
        if not size:
            raise FeaturesError("the batch is empty; pass one of two examples or more")
        if not self._why:
            doubled = with_examples(batch, self._axes, 2 * size)
            try:
                other, _ = self._program(form, arrays, facts, doubled, args)
                examples = Examples(program, other)
            except Exception as error:  # whatever loss_fn raises
                why = (
                    f"it is not clear where examples lie in what loss_fn computes, since it does "
                    f"other things with {2 * size} of them than with {size} ({show(error)}); it is "
                    "to do the same for any number of two or more, along the axes that batch_axis= "
                    f"tells ({', '.join(map(str, self._axes))})"
                )
                if self._wanted is not None:
                    raise FeaturesError(why) from error
                self._why = why
        names = [name for _, name in facts]
        names += [f"batch/{path}" if path else "batch" for path in paths_of(batch)]
        if examples is None:
            examples = Examples(program, program)
        cut = Split(program, names, len(arrays), examples, size, self._wanted)
        return _Traced(cut, results)

    def _program(
        self,
        form: Form,
        arrays: Sequence[Any],
        facts: Sequence[tuple[Any, str]],
        batch: PyTree,
        args: tuple[Any, ...],
    ) -> tuple[Program, Any]:
        """What the loss function does, and the structure of what it returns."""
        results = []

        def flat(arrays: list[Any], batch: PyTree, args: tuple[Any, ...]) -> list[Any]:
            params = form.params(arrays)
            leaves, treedef = jax.tree.flatten(self._loss_fn(params, batch, *args))
            results.append(treedef)
            return [*leaves, *form.after(params)]

        closed = jax.make_jaxpr(flat)(arrays, batch, args)
        avals = closed.in_avals
        count = len(arrays), len(jax.tree.leaves(batch))
        inputs = [_param(aval, *each) for aval, each in zip(avals, facts, strict=False)]
        inputs += [Value(aval, known=True, of_batch=True) for aval in avals[count[0] :][: count[1]]]
        inputs += [_argument(aval, place) for place, aval in enumerate(avals[sum(count) :])]
        return read(closed, inputs), results[0]

    def __str__(self) -> str:
        from lrmult._report import render

        return render(self)

    def __rich__(self) -> Any:
        from lrmult._report import lined

        rows = []
        for each in self.features:
            size = f"{each.size:,}" if each.axis is not None else f"{each.size:,} in all"
            rows.append(((each.origin, spec(each.shape, each.dtype), size), ""))
        columns = {"feature": "left", "array": "left", "bytes per example": "right"}
        return lined(columns, rows, self._notes())

    def _notes(self) -> list[str]:
        if not self.gains:
            return [self.reason]
        notes = []
        if not self._why:
            size = sum(feature.size for feature in self.features if feature.axis is not None)
            notes.append(f"{size:,} bytes per example")
        front, rest = self.cut.work()
        notes.append(f"{front / (front + rest):.1%} of the work of the forward pass is in front")
        return notes

    def __repr__(self) -> str:
        return f"<lrmult.Precomputed with {len(self.features)} features; print it for a table>"


_RANDOM = "random"  # in place of what is frozen: it is another at each step


def _param(aval: Any, frozen: Any, path: str) -> Value:
    if frozen is True:
        return Value(aval, known=True, given=True, of_params=True)
    name = repr(path) if path else "the array"
    if frozen is _RANDOM:
        kinds, cause = frozenset(["random"]), f"{name}, the state of random numbers"
        return Value(aval, known=False, given=True, of_params=True, cause=cause, kinds=kinds)
    value = Value(
        aval,
        known=False,
        given=True,
        of_params=True,
        cause=f"{name}, which trains",
        kinds=frozenset(["trains"]),
    )
    if isinstance(frozen, np.ndarray):
        axes = [axis for axis, size in enumerate(frozen.shape) if size > 1]
        if len(axes) == 1:
            value.still = Still(axes[0], frozen.reshape(-1))
            value.cause = f"{name}, of which a part trains"
    return value


def _argument(aval: Any, place: int) -> Value:
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    kind = "a random key" if is_key else spec(aval.shape, aval.dtype)
    cause = f"a further argument of loss_fn ({kind}), which may be another at each step"
    return Value(
        aval, known=False, cause=cause, kinds=frozenset(["random" if is_key else "argument"])
    )


def precompute(
    loss_fn: LossFn,
    params: PyTree,
    rules: RulesLike,
    batch: PyTree,
    *args: Any,
    batch_axis: Any = None,
    structure: Structure | None = None,
    strict: bool = True,
) -> Precomputed:
    """Cut a loss function behind its frozen part, whose output for an example never changes.

    What depends only on frozen parameters and on the batch is split off from what depends on
    something that trains, whatever the library of the model: the jaxpr of the loss function is cut
    in two. Then ``rest(params, front(params, batch))`` is ``loss_fn(params, batch)``, and so are
    the gradients of what trains; `CachedFeatures` computes the features of a data set once.

    Args:
        loss_fn: a function ``loss_fn(params, batch, *args)`` that `jax.jit` could compile. It
            returns any pytree of arrays, such as ``(loss, metrics)``.
        params: the parameters, as `loss_fn` takes them: a pytree, an Equinox module, an NNX module
            or state; shapes are enough.
        rules: see `Rules`. An array that trains in part counts as one that trains, but where it
            is frozen along one axis: slices of it that are frozen are known ahead, as the lower
            layers of a scanned stack.
        batch: a batch of examples, or its shapes.
        *args: what else `loss_fn` takes, such as a random key for dropout: what may be another at
            each step, and is given to ``rest``.
        batch_axis: the axis along which the examples of the batch lie, or a tree of axes that is a
            prefix of it, with None for what holds no examples. By default it is found out: the
            first one, if all arrays have one size there, or the one size that all have.
        structure: as for `compile_rules`.
        strict: as for `compile_rules`.

    Returns:
        The two functions, ``front`` and ``rest``, as methods of a `Precomputed`, and what is handed
        on between them. All work that can be done ahead is in front. Behind it the cut is where
        the fewest bytes are handed on: what is no work to compute from them (element by element,
        or by moving data) is computed in the rest if that saves bytes, as a one-hot vector from
        its label. If no work is in front there is a warning, and ``rest`` does it all.

    Raises:
        LrmultError: what `compile_rules` raises.
        FeaturesError: if `batch_axis` does not fit the batch.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lrmult as lm
        >>> params = {"trunk": jnp.ones((64, 64)), "head": jnp.ones((64, 2))}
        >>> def loss_fn(params, batch):
        ...     hidden = jax.nn.relu(batch["x"] @ params["trunk"])
        ...     return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)
        >>> batch = {"x": jnp.ones((8, 64)), "y": jnp.ones((8, 2))}
        >>> split = lm.precompute(loss_fn, params, [("trunk", None)], batch)
        >>> features = split.front(params, batch)
        >>> bool(split.rest(params, features) == loss_fn(params, batch))
        True
        >>> print(jax.grad(split.rest)(params, features)["head"][0])
        [262080. 262080.]
    """
    read_rules, facts = Rules(rules), read_structure(structure)
    arrays, form = flattened(params)
    warned(cached_plan(read_rules, form.tree(arrays), facts, strict))

    def plan(tree: PyTree) -> Plan:
        return cached_plan(read_rules, tree, facts, strict)

    split = Precomputed(loss_fn, params, plan, batch, args, batch_axis)
    if not split.gains:
        warnings.warn(split.reason, stacklevel=2)
    return split
