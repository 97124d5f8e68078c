"""Known methods of fine-tuning, as rules.

Each function returns plain `Rules`, which can be printed, saved, and joined with others by ``+``.
Those that need the tree take `params` first (shapes are enough), and check their paths against it
at once; what they return is optional, so rules in front of it override it:
``lm.Rules([("head", None)]) + recipes.layer_decay(...)``.

Several take *groups*: a list, from the input of the model to its output, of targets or lists of
targets that together name every parameter. `depths` makes such a list for a stack of layers. The
multipliers are those of a learning rate that is set elsewhere: 1 is the full rate.
"""

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeGuard

import jax

from lrmult._errors import (
    AxisError,
    LrmultError,
    PatternError,
    RuleError,
    ShadowedRuleError,
    listing,
    show,
)
from lrmult._levels import PyTree
from lrmult._multipliers import Multiplier
from lrmult._orders import Orders
from lrmult._paths import ParamTree
from lrmult._patterns import literal_path
from lrmult._plan import Plan, compile_rules
from lrmult._rules import Rules, optional
from lrmult._schedules import During
from lrmult._structure import Structure, read_structure
from lrmult._structured import add_structure
from lrmult._targets import Target, along, neurons, rows

__all__ = [
    "bitfit",
    "depths",
    "discriminative",
    "freeze_to",
    "gradual_unfreezing",
    "layer_decay",
    "linear_probe",
    "lora_plus",
    "mup",
    "new_tokens",
    "norms_only",
    "progressive_freezing",
    "unfreezing_stages",
]

# A target, or a list of targets (a tuple is one target).
Targets = Target
Groups = Sequence[Targets]


def depths(
    params: PyTree,
    stack: str,
    *,
    below: Groups = (),
    above: Groups = (),
    with_last: Targets | None = None,
    axis: int | None = None,
    structure: Structure | None = None,
) -> list[list[Target]]:
    """List the layers of a stack, and what lies below and above it, from input to output.

    Args:
        params: the parameters, or their shapes.
        stack: the path whose children are the layers, or the name of their family:
            ``"encoder/layers"``, or ``"encoder/block"`` for ``encoder/block_0``, ``block_1``, ...
        below: the groups before the first layer, each a target or a list of targets.
        above: the groups after the last layer.
        with_last: what else is in the group of the last layer, such as a final norm: a target or a
            list of targets.
        axis: the axis along which the layers are stacked, if each array holds all of them, as
            `flax.linen.scan` leaves them, and no `structure` tells it.
        structure: as for `compile_rules`.

    Returns:
        A list of lists of targets, one for each group and each layer that has parameters.

    Raises:
        LrmultError: if there is no such stack, or its layers have no order.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> blocks = {f"block_{i}": {"kernel": jnp.ones((2, 2))} for i in range(2)}
        >>> params = {"embed": jnp.ones(3), **blocks, "head": jnp.ones(2)}
        >>> recipes.depths(params, "block", below=["embed"], above=["head"])
        [['embed'], ['block_0'], ['block_1'], ['head']]
    """
    layers: list[Target]
    if axis is None:
        layers = _layers(params, stack, structure)
    else:
        layers = [along(stack, axis, i) for i in range(_size(params, stack, axis, structure))]
    found = [[layer] for layer in layers]
    found[-1] += _as_list(with_last)
    return [*_read(below, "below"), *found, *_read(above, "above")]


def layer_decay(
    params: PyTree, decay: float, depths: Groups, *, structure: Structure | None = None
) -> Rules:
    """Let each layer learn more slowly than the one above it.

    Depth i of n gets ``decay ** (n - 1 - i)``: the last gets 1. Depths are counted as they are
    listed, whatever is frozen by rules in front; an empty list is a depth without parameters.

    Args:
        params: the parameters, or their shapes.
        decay: the factor between neighbours, such as 0.75.
        depths: the groups, from input to output (see `depths`). A parameter in none is an error.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if a parameter belongs to no depth, or `decay` is not positive.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> two = [jnp.ones(2), jnp.ones(2)]
        >>> params = {"embed": jnp.ones(3), "layers": two, "head": jnp.ones(1)}
        >>> recipes.layer_decay(params, 0.5, ["embed", "layers[0]", "layers[1]", "head"])
        optional([('embed', 0.125), ('layers[0]', 0.25), ('layers[1]', 0.5), ('head', 1.0)])

    From ELECTRA (Clark et al. 2020, arXiv:2003.10555; two steps lie between the last layer and the
    task's head: ``[..., "layers[-1]", [], "head"]``), BEiT (Bao et al. 2021, arXiv:2106.08254; the
    final norm is in the depth of the head) and timm (in that of the last block). There a parameter
    that no pattern knows silently gets 1, and schedules with a floor undo the ratio; here neither
    can happen.
    """
    if not _is_positive(decay):
        raise RuleError(f"layer_decay: decay is {show(decay)}; write a positive number, as 0.75")
    groups = _read(depths, "depths")
    try:
        scales = [float(decay) ** (len(groups) - 1 - i) for i in range(len(groups))]
    except OverflowError:
        scales = [0.0]
    if not all(scales):
        raise RuleError(
            f"layer_decay: {show(decay)} to the power of {len(groups) - 1} is no float; write a "
            "decay nearer to 1"
        )
    return _grouped("layer_decay", params, groups, scales, structure)


def discriminative(
    params: PyTree,
    lo: float | None,
    hi: float,
    groups: Groups,
    *,
    structure: Structure | None = None,
) -> Rules:
    """Spread multipliers geometrically over groups, from the first to the last.

    Args:
        params: the parameters, or their shapes.
        lo: the multiplier of the first group; None for a tenth of `hi` for all but the last.
        hi: the multiplier of the last group.
        groups: the groups, from input to output (see `depths`). A parameter in none is an error.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if a parameter belongs to no group, or a multiplier is not positive.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"body": jnp.ones(3), "neck": jnp.ones(3), "head": jnp.ones(1)}
        >>> recipes.discriminative(params, 0.01, 1, ["body", "neck", "head"])
        optional([('body', 0.01), ('neck', 0.1), ('head', 1.0)])

    The learning rates ``slice(lo, hi)`` and ``slice(hi)`` of fastai (Howard and Gugger 2020,
    arXiv:2002.04688), after the discriminative fine-tuning of ULMFiT (Howard and Ruder 2018,
    arXiv:1801.06146), which is ``layer_decay(params, 1 / 2.6, groups)``. These are rates there and
    multipliers here.
    """
    for name, value in {"lo": hi if lo is None else lo, "hi": hi}.items():
        if not _is_positive(value):
            raise RuleError(f"discriminative: {name} is {show(value)}; write a positive number")
    listed = _read(groups, "groups")
    last, hi = len(listed) - 1, float(hi)
    if lo is None:
        scales = [hi / 10] * last + [hi]
    else:
        lo = float(lo)
        scales = [lo * (hi / lo) ** (i / last) if 0 < i < last else lo for i in range(last)] + [hi]
    return _grouped("discriminative", params, listed, scales[: len(listed)], structure)


def freeze_to(
    params: PyTree, n: int, groups: Groups, *, structure: Structure | None = None
) -> Rules:
    """Freeze all groups before the n-th; say nothing of the others.

    Args:
        params: the parameters, or their shapes.
        n: how many of the groups are frozen; negative: how many are not.
        groups: the groups, from input to output (see `depths`). A parameter in none is an error.
        structure: as for `compile_rules`.

    Returns:
        Optional rules, for use in front of others.

    Raises:
        RuleError: if a parameter belongs to no group, or there are not as many groups.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"body": jnp.ones(3), "neck": jnp.ones(3), "head": jnp.ones(1)}
        >>> groups = ["body", "neck", "head"]
        >>> recipes.freeze_to(params, -1, groups) + recipes.discriminative(params, 0.1, 1, groups)
        optional([('body', None), ('neck', None), ('body', 0.1), ('neck', 0.316227766016838),
        ('head', 1.0)])

    The ``Learner.freeze_to`` of fastai; its ``freeze`` is ``freeze_to(params, -1, groups)``. There
    normalization layers of frozen groups go on training (``train_bn``); here write a rule for them
    in front. A number beyond the groups is a warning there.
    """
    listed = _read(groups, "groups")
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise RuleError(f"freeze_to: n is {show(n)}; write an int, such as -1")
    if not -len(listed) <= n <= len(listed):
        raise RuleError(f"freeze_to: n is {n}, and there are {len(listed)} groups")
    checked = _grouped("freeze_to", params, listed, [None] * len(listed), structure)
    until = sum(map(len, listed[: int(n)]))
    return checked[:until]


def gradual_unfreezing(
    params: PyTree,
    groups: Groups,
    every: int | Sequence[int],
    *,
    multipliers: Sequence[float] | None = None,
    structure: Structure | None = None,
) -> Rules:
    """Train the last group first, and thaw one more group at a time.

    The multipliers are schedules (`During`): nothing is compiled again when a group thaws, and the
    state of the optimizer keeps its form. It has moments for all groups from the start, which see
    the gradients of frozen groups too. To pay for no more than trains, see `unfreezing_stages`.

    Args:
        params: the parameters, or their shapes.
        groups: the groups, from input to output (see `depths`). A parameter in none is an error.
        every: how many steps lie between two thaws; or the steps at which the last group but one,
            the one before it, and so on thaw.
        multipliers: one for each group, once it trains; 1 for all if it is None.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if a parameter belongs to no group, or a length or a step does not fit.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"body": jnp.ones(3), "neck": jnp.ones(3), "head": jnp.ones(1)}
        >>> recipes.gradual_unfreezing(params, ["body", "neck", "head"], 100)
        optional([('body', During(1.0, start=200)), ('neck', During(1.0, start=100)),
        ('head', 1.0)])

    From ULMFiT (Howard and Ruder 2018, arXiv:1801.06146), which thaws one layer per epoch and
    combines it with `discriminative` rates: give those as `multipliers`.
    """
    call = "gradual_unfreezing"
    listed = _read(groups, "groups")
    starts = _thaws(every, len(listed) - 1)
    return _grouped(
        call,
        params,
        listed,
        [
            During(full, start=start) if start and full else full
            for full, start in zip(_full(call, multipliers, listed), starts, strict=True)
        ],
        structure,
    )


def unfreezing_stages(
    params: PyTree,
    groups: Groups,
    *,
    multipliers: Sequence[float] | None = None,
    structure: Structure | None = None,
) -> list[Rules]:
    """List the rules of each stage in which one more group trains, the last group first.

    For `wrap`, with `migrate` between two stages: a stage computes and keeps only what it trains.

    Args:
        params: the parameters, or their shapes.
        groups: as for `gradual_unfreezing`.
        multipliers: as for `gradual_unfreezing`.
        structure: as for `compile_rules`.

    Returns:
        For each group one list of optional rules.

    Raises:
        LrmultError: as `gradual_unfreezing` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"body": jnp.ones(3), "head": jnp.ones(1)}
        >>> for rules in recipes.unfreezing_stages(params, ["body", "head"]):
        ...     print(rules)
        optional([('body', None), ('head', 1.0)])
        optional([('body', 1.0), ('head', 1.0)])

    From ULMFiT, as `gradual_unfreezing`. There the moments of a group begin with it; as they do
    here, and not where multipliers are schedules.
    """
    call = "unfreezing_stages"
    listed = _read(groups, "groups")
    full = _full(call, multipliers, listed)
    return [
        _grouped(call, params, listed, [*[None] * frozen, *full[frozen:]], structure)
        for frozen in range(max(len(listed), 1) - 1, -1, -1)
    ]


def progressive_freezing(
    params: PyTree,
    groups: Groups,
    steps: int,
    *,
    start: float = 0.5,
    level: float = 1.0,
    structure: Structure | None = None,
) -> Rules:
    """Freeze one group after the other, from the input on, while training goes on.

    From the share `start` of all steps on, the number of frozen groups grows linearly, to reach the
    share `level` of all groups but the last after the last step.

    Args:
        params: the parameters, or their shapes.
        groups: the groups, from input to output (see `depths`). A parameter in none is an error.
        steps: the number of steps of the whole run.
        start: the share of steps before the first group may freeze, from 0 to below 1.
        level: the share of groups that are frozen after the last step, from 0 to 1.
        structure: as for `compile_rules`.

    Returns:
        Optional rules, with schedules (`During`).

    Raises:
        RuleError: if a parameter belongs to no group, or a number lies outside its range.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"body": jnp.ones(3), "neck": jnp.ones(3), "head": jnp.ones(1)}
        >>> recipes.progressive_freezing(params, ["body", "neck", "head"], 100, start=0.2)
        optional([('body', During(1.0, stop=60)), ('neck', 1.0), ('head', 1.0)])

    The ``LayerFreezing`` of Composer, after FreezeOut (Brock et al. 2017, arXiv:1706.04983). There
    the number is worked out at the end of each epoch, over all modules without children; here at
    every step, over the groups. As there, the number is rounded down.
    """
    call = "progressive_freezing"
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise RuleError(f"{call}: steps is {show(steps)}; write the number of steps")
    if not (_is_number(start) and 0 <= start < 1):
        raise RuleError(f"{call}: start is {show(start)}; write a share from 0 to below 1")
    if not (_is_number(level) and 0 <= level <= 1):
        raise RuleError(f"{call}: level is {show(level)}; write a share from 0 to 1")
    listed = _read(groups, "groups")

    first, most = Fraction(str(float(start))), Fraction(str(float(level)))  # as they are written

    def frozen_at(step: int) -> int:
        elapsed = (Fraction(step, int(steps)) - first) / (1 - first)
        return int(most * elapsed * (len(listed) - 1)) if elapsed > 0 else 0

    stops = [_first(lambda step, i=i: frozen_at(step) > i, int(steps)) for i in range(len(listed))]
    scales = [1.0 if stop is None else During(1.0, stop=stop) for stop in stops]
    return _grouped(call, params, listed, scales, structure)


def linear_probe(params: PyTree, head: Targets, *, structure: Structure | None = None) -> Rules:
    """Train the head alone.

    Args:
        params: the parameters, or their shapes.
        head: what trains: a target or a list of targets.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> recipes.linear_probe({"trunk": jnp.ones(3), "head": jnp.ones(1)}, "head")
        optional([('head', 1.0), (..., None)])

    Alain and Bengio 2016, arXiv:1610.01644. A probe in their sense does not change the trunk's
    statistics either: run normalization layers in their inference mode.
    """
    return _only("linear_probe", params, [], head, structure)


def bitfit(
    params: PyTree,
    *,
    head: Targets | None = None,
    biases: Targets = "**/{bias,bias_n,b,offset}",
    structure: Structure | None = None,
) -> Rules:
    """Train the biases alone, and the head.

    Args:
        params: the parameters, or their shapes.
        head: what else trains: a target or a list of targets.
        biases: the biases, those of normalization layers included: by default what Flax, Equinox
            and Haiku call so.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> trunk = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> recipes.bitfit({"trunk": trunk, "head": jnp.ones((2, 2))}, head="head")
        optional([('head', 1.0), ('**/{bias,bias_n,b,offset}', 1.0), (..., None)])

    Ben Zaken et al. 2021, arXiv:2106.10199, which trains the task's head as well.
    """
    return _only("bitfit", params, _as_list(biases), head, structure)


def norms_only(
    params: PyTree,
    *,
    head: Targets | None = None,
    norms: Targets | None = None,
    structure: Structure | None = None,
) -> Rules:
    """Train the scales and biases of normalization layers alone, and the head.

    Args:
        params: the parameters, or their shapes.
        head: what else trains: a target or a list of targets.
        norms: the normalization layers: a target or a list of targets. By default the nodes that
            hold nothing but a ``scale`` and perhaps a ``bias`` or an ``offset`` (Flax, Haiku), or a
            ``weight`` of one axis, or a ``bias`` of the same shape beside it (Equinox). What that
            misses is frozen, such as a norm with no more than a bias: name them then, as with
            `lrmult.of_type`.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if there is no such layer.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> norms = {f"norm_{i}": {"scale": jnp.ones(2), "bias": jnp.ones(2)} for i in range(2)}
        >>> params = {"dense": {"kernel": jnp.ones((2, 2))}, **norms}
        >>> recipes.norms_only(params)
        optional([('norm_*', 1.0), (..., None)])

    After Frankle et al. 2020, arXiv:2003.00152, who train those of BatchNorm in networks of random
    weights.
    """
    found = _norms(params) if norms is None else _as_list(norms)
    return _only("norms_only", params, found, head, structure)


def lora_plus(
    params: PyTree,
    ratio: float = 16.0,
    *,
    head: Targets | None = None,
    a: Targets = "**/*{lora_a,lora_A,lora_embedding_A}",
    b: Targets = "**/*{lora_b,lora_B,lora_embedding_B}",
    structure: Structure | None = None,
) -> Rules:
    """Train low-rank adapters alone, B faster than A by a fixed ratio, and the head.

    Args:
        params: the parameters, or their shapes.
        ratio: the learning rate of B over that of A.
        head: what else trains, at the rate of A: a target or a list of targets.
        a: the first matrices, from the input to the rank. What is named otherwise is frozen.
        b: the second matrices, from the rank to the output.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if `ratio` is not positive.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> lora = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 4))}
        >>> params = {"kernel": jnp.ones((4, 4)), "lora": lora}
        >>> recipes.lora_plus(params, 8)
        optional([('**/*{lora_b,lora_B,lora_embedding_B}', 8.0),
        ('**/*{lora_a,lora_A,lora_embedding_A}', 1.0), (..., None)])

    Hayou, Ghosh and Yu 2024, arXiv:2402.12354. Their code gives the larger rate to all vectors that
    train as well, and a rate of its own to adapters of embeddings; here write a rule in front.
    """
    if not _is_positive(ratio):
        raise RuleError(f"lora_plus: ratio is {show(ratio)}; write a positive number, such as 16")
    first = [(each, float(ratio)) for each in _as_list(b)] + [(each, 1.0) for each in _as_list(a)]
    rest = [*[(each, 1.0) for each in _as_list(head)], (..., None)]
    return _checked("lora_plus", params, first + rest, structure)[0]


def new_tokens(
    params: PyTree,
    embedding: Targets,
    index: Any,
    *,
    head: Targets | None = None,
    structure: Structure | None = None,
) -> Rules:
    """Train some rows of an embedding alone, such as those of tokens that were added to it.

    Args:
        params: the parameters, or their shapes.
        embedding: the array that has a row for each token; or a list, for an output layer that is
            not tied to it (its own axis of tokens may differ: see `along`).
        index: the rows, as for `rows`: ``slice(-10, None)`` are the last ten.
        head: what else trains: a target or a list of targets.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> params = {"embed": jnp.ones((100, 8)), "trunk": jnp.ones((8, 8))}
        >>> recipes.new_tokens(params, "embed", slice(-10, None))
        optional([(rows('embed', slice(-10, None)), 1.0), (..., None)])

    The trainable tokens of PEFT (``trainable_token_indices``), which keeps the rows that train in
    an array of their own; with ``wrap(..., compact=True)`` so do the moments here.
    """
    tokens = [rows(each, index) for each in _as_list(embedding)]
    return _only("new_tokens", params, tokens, head, structure)


def mup(
    params: PyTree,
    base: PyTree,
    optimizer: Literal["adam", "sgd"] = "adam",
    *,
    output: Targets | None = None,
    structure: Structure | None = None,
) -> Rules:
    """Give each array the multiplier by which its best learning rate moves as a model gets wider.

    An axis that has another size than in a base model is a width. With Adam, arrays with two widths
    (hidden weights) get 1 / r, where r is the ratio of their inputs to those of the base; all
    others get 1. With SGD, arrays with one width (input weights, biases, scales) get its ratio,
    arrays with two get the ratio of their outputs over that of their inputs.

    The multipliers are one part of the parametrization. The others are up to the model: hidden
    weights that start with a variance of 1 / inputs, attention scaled by 1 / size of a head, and
    outputs divided by r (arrays of one width as above) or, in place of that, output weights that
    start with a variance of 1 / inputs squared, and are named here as `output`.

    Args:
        params: the parameters, or their shapes.
        base: those of the base model, with the same paths.
        optimizer: ``"adam"``, also for its relatives that divide by the size of the gradient, or
            ``"sgd"``.
        output: the weights of the output layer, if the model does not divide its outputs by r: a
            target or a list of targets. They get 1 / r with both optimizers. So do hidden weights
            of which the inputs alone are wider; name those too.
        structure: as for `compile_rules`.

    Returns:
        Optional rules.

    Raises:
        RuleError: if the models have different paths, an array has more than two widths, or an
            array named as `output` has not one.
        AxisError: if two widths differ, and which of them is that of the inputs is not known.
        LrmultError: as `compile_rules` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrmult import recipes
        >>> def shapes(width):
        ...     return {"in": jnp.ones((3, width)), "mid": jnp.ones((width, width))}
        >>> recipes.mup(shapes(256), shapes(64))
        optional([('in', 1.0), ('mid', 0.25)])

    Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466: table 8, as in the ``MuAdam`` and
    ``MuSGD`` of the package ``mup``, and for `output` table 3. That package also scales weight
    decay, against the learning rate; `lrmult.scale_decay` does so by rules of its own.
    """
    if optimizer not in ("adam", "sgd"):
        raise RuleError(f"mup: optimizer is {show(optimizer)}; write 'adam' or 'sgd'")
    plan = compile_rules([], params, structure=structure)
    ratios = _width_ratios(plan, compile_rules([], base, structure=structure))
    outputs = set()
    if output is not None:
        named = _checked("mup", params, [(each, None) for each in _as_list(output)], structure)[1]
        outputs = {leaf.path for leaf in named.leaves if leaf.frozen}
    found: dict[str, float] = {}
    for path, grown in ratios.items():
        widths = list(grown.values())
        if path in outputs and len(grown) > 1:
            raise RuleError(
                f"mup: {path!r} is no output weight: {len(grown)} of its axes are wider than in "
                "the base model"
            )
        if len(grown) > 2:
            raise RuleError(
                f"mup: {path!r} has {len(grown)} axes that are wider than in the base model; the "
                "rules of the paper are for one and two: keep one fixed, such as the size of heads"
            )
        if path in outputs:
            found[path] = 1 / widths[0] if widths else 1.0
        elif len(grown) == 2:
            inputs, out = widths
            if inputs != out:
                axis = _output_axis(path, params, structure)
                if abs(axis - min(grown)) < abs(axis - max(grown)):
                    inputs, out = out, inputs
            found[path] = 1 / inputs if optimizer == "adam" else out / inputs
        else:
            found[path] = widths[0] if widths and optimizer == "sgd" else 1.0
    pairs = [
        (pattern, value)
        for value in dict.fromkeys(found.values())
        for pattern in _patterns(params, found, value)
    ]
    return _checked("mup", params, pairs, structure)[0]


def _as_python(value: Any) -> Any:
    """Numbers of Python for arrays whose values are known."""
    is_array = hasattr(value, "tolist") and not isinstance(value, jax.core.Tracer)
    return value.tolist() if is_array else value


def _is_number(value: Any) -> bool:
    value = _as_python(value)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    """Whether it is a positive number that a float can hold."""
    try:
        return _is_number(value) and 0 < float(value) < math.inf
    except OverflowError:
        return False


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _as_list(targets: Targets | None) -> list[Target]:
    return targets if isinstance(targets, list) else [] if targets is None else [targets]


def _read(groups: Any, name: str) -> list[list[Target]]:
    if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
        raise RuleError(
            f"{name} is {show(groups)}; write a list, from the input of the model to its output, "
            "of targets or lists of targets"
        )
    found = [*groups]
    if None in found:
        raise RuleError(f"{name} has None in it; write [] for a depth without parameters")
    return [[*_as_list(group)] for group in found]


def _checked(
    call: str, params: PyTree, rules: Iterable[Any], structure: Structure | None
) -> tuple[Rules, Plan]:
    """The rules, optional, and their plan.

    Raises:
        LrmultError: if one is dead.
    """
    try:
        read = Rules(rules)
        return optional(read), compile_rules(read, params, structure=structure)
    except LrmultError as error:
        raise type(error)(f"{call}: {error}") from error.__cause__


def _grouped(
    call: str,
    params: PyTree,
    groups: list[list[Target]],
    multipliers: Sequence[Multiplier],
    structure: Structure | None,
) -> Rules:
    """A rule for each target of each group.

    Raises:
        RuleError: if a parameter belongs to no group.
    """
    pairs = [
        (target, multiplier)
        for group, multiplier in zip(groups, multipliers, strict=True)
        for target in group
    ]
    rules, plan = _checked(call, params, pairs, structure)
    forgotten = [
        plan.tree.path(leaf)
        for leaf, _ in plan.tree.arrays()
        if any(piece.rule is None for piece in plan.claims[leaf])
    ]
    if forgotten:
        verb = "belongs" if len(forgotten) == 1 else "belong"
        raise RuleError(
            f"{call}: {listing(forgotten)} {verb} to no group, wholly or in part; list what is to "
            "go with them, or ... as a last target for all the rest"
        )
    return rules


def _only(
    call: str,
    params: PyTree,
    targets: list[Target],
    head: Targets | None,
    structure: Structure | None,
) -> Rules:
    """Rules that train some targets, and freeze all else."""
    pairs = [(each, 1.0) for each in [*_as_list(head), *targets]]
    if not pairs:
        raise RuleError(f"{call}: nothing is named that is to train, and all would be frozen")
    try:
        return _checked(call, params, [*pairs, (..., None)], structure)[0]
    except ShadowedRuleError as error:
        raise ShadowedRuleError(
            f"{call}: there is nothing for it to train outside the head ({error})"
        ) from error


def _layers(params: PyTree, stack: str, structure: Structure | None) -> list[Target]:
    """The paths of the layers of a stack that have parameters."""
    names = literal_path(stack) if isinstance(stack, str) and stack else ()
    if names is None or not isinstance(stack, str):
        raise PatternError(
            f"depths: {show(stack)} is no path of a stack; write one such as 'encoder/layers'"
        )
    _checked("depths", params, [(f"{stack}[:]", 1.0)], structure)
    tree = ParamTree(params)
    add_structure(tree, read_structure(structure))
    above = tree.node_at(names[:-1]) or 0
    _, children, family = Orders(tree).counted(above, names[-1] if names else None)
    in_order = family.in_order() if family else []
    return [tree.text(children[name]) for name in in_order if name in children]


def _size(params: PyTree, stack: str, axis: int, structure: Structure | None) -> int:
    """How many layers are stacked along an axis."""
    plan = _checked("depths", params, [(along(stack, axis, 0), None)], structure)[1]
    sizes = {leaf.shape[axis]: leaf.path for leaf in plan.leaves if leaf.frozen}
    if len(sizes) > 1:
        seen = listing([f"{size} in {path!r}" for size, path in sizes.items()])
        raise RuleError(f"depths: along axis {axis} of {stack!r} there are {seen} layers")
    return next(iter(sizes))


def _full(call: str, multipliers: Sequence[float] | None, groups: Sequence[Any]) -> Sequence[float]:
    if multipliers is None:
        return [1.0] * len(groups)
    multipliers = _as_python(multipliers)
    if not isinstance(multipliers, Sequence) or len(multipliers) != len(groups):
        raise RuleError(
            f"{call}: multipliers is {show(multipliers)}; write a list with one for each of the "
            f"{len(groups)} groups"
        )
    return multipliers


def _thaws(every: int | Sequence[int], most: int) -> list[int]:
    """The steps at which groups thaw, from input to output."""
    every = _as_python(every)
    if _is_int(every) and every > 0:
        return [int(every) * i for i in range(most, -1, -1)]
    steps = every if isinstance(every, list | tuple) and all(map(_is_int, every)) else []
    if len(steps) != most or steps is not every or sorted(steps) != [*steps]:
        raise RuleError(
            f"gradual_unfreezing: every is {show(every)}; write a number of steps, or {most} "
            "steps that do not fall: one for each group but the last, the last but one first"
        )
    return [*reversed(steps), 0]


def _first(holds: Callable[[int], bool], stop: int) -> int | None:
    """The first step before `stop` from which on something holds; None if there is none."""
    low, high = 0, stop
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if low < stop else None


def _norms(params: PyTree) -> list[Target]:
    """Patterns of the normalization layers."""
    tree = ParamTree(params)
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for leaf, node in tree.arrays():
        layers.setdefault(tree.parents[node], {})[tree.names[node]] = tree.shapes[leaf]
    found = {
        tree.text(node): _is_norm(layer)
        and not any(tree.children[child] for child in tree.children[node].values())
        for node, layer in layers.items()
        if node
    }
    if not any(found.values()):
        raise RuleError(
            "norms_only: no layer looks like a normalization layer (a 'scale', or a 'weight' of "
            "one axis, and perhaps a bias beside it); name them: norms=[...]"
        )
    return _patterns(params, found, True)


def _is_norm(layer: dict[str, tuple[int, ...]]) -> bool:
    if "weight" in layer:
        alone = layer.keys() == {"weight"} and len(layer["weight"]) == 1
        return alone or (layer.keys() == {"weight", "bias"} and len({*layer.values()}) == 1)
    known = {"scale", "bias", "offset", "mean", "var"}  # the last two are statistics of NNX
    return "scale" in layer and layer.keys() <= known


def _patterns(params: PyTree, values: Mapping[str, Any], wanted: Any) -> list[Target]:
    """Patterns for the nodes that have a value: numbers give way to ``*`` where that is as good."""
    having: dict[str, set[Any]] = {}
    for path, value in values.items():
        having.setdefault(_numberless(path), set()).add(value)
    exact = [path for path, value in values.items() if value == wanted]
    short = {pattern for pattern, found in having.items() if len(found) == 1}
    found = [each if (each := _numberless(path)) in short else path for path in exact]
    patterns: list[Target] = [*dict.fromkeys(found)]
    # A star may have caught a name that has no number.
    return patterns if _named(params, patterns) == _named(params, exact) else [*exact]


def _numberless(path: str) -> str:
    return re.sub(r"[0-9]+(?=/|$)", "*", path)


def _named(params: PyTree, targets: Iterable[Target]) -> tuple[bool, ...]:
    return compile_rules(optional([(each, None) for each in targets]), params).trains


def _width_ratios(plan: Plan, base: Plan) -> dict[str, dict[int, float]]:
    """For each path and each axis that is wider than in the base model, by which factor."""
    shapes = {leaf.path: leaf.shape for leaf in base.leaves}
    paths = {leaf.path for leaf in plan.leaves}
    if paths != shapes.keys():
        raise RuleError(
            f"mup: only one of the two models has {listing(sorted(paths ^ shapes.keys()))}; the "
            "base model must differ in widths alone"
        )
    found = {}
    for leaf in plan.leaves:
        shape = shapes[leaf.path]
        if len(shape) != len(leaf.shape):
            raise RuleError(
                f"mup: {leaf.path!r} has the shape {leaf.shape}, and in the base model {shape}"
            )
        if 0 in shape and shape != leaf.shape:
            raise RuleError(f"mup: {leaf.path!r} has no elements in the base model: {shape}")
        sizes = enumerate(zip(leaf.shape, shape, strict=True))
        found[leaf.path] = {axis: new / old for axis, (new, old) in sizes if new != old}
    return found


def _output_axis(path: str, params: PyTree, structure: Structure | None) -> int:
    """The axis of an array's outputs, as `neurons` finds it."""
    try:
        plan = compile_rules([(neurons(path, 0), None)], params, structure=structure)
    except AxisError as error:
        raise AxisError(
            f"mup: two axes of {path!r} grow by unlike ratios, and which of them is that of the "
            "inputs is not known; let both grow alike, or write the rule for it by hand"
        ) from error
    piece = next(piece for pieces in plan.claims for piece in pieces if piece.rule == 0)
    return next(iter(piece.region.vectors), -1)  # of one output unit it is all
