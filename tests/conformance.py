"""Which optimizer of optax does what under rules: the rows of docs/optimizers.md, by running them.

``python tests/conformance.py`` writes the table anew; ``tests/test_optimizers.py`` holds every row
against a fresh run.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import lrmult as lm

STEPS = 6
RATIO = 0.3
RATE_TOLERANCE = 2e-5
REST_TOLERANCE = 1e-5

SHAPE = (4, 3)
FROZEN_ROWS = np.array([True, True, False, False])[:, None]
FROZEN = [("**/frozen", None), (lm.rows("**/part", [0, 1]), None)]
RATES = [("**/slow", RATIO)]
RULES = {"all": FROZEN + RATES, "frozen": FROZEN, "rates": RATES, "again": FROZEN}
TRAINED = ("bias", "slow")


def _leaf(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values + np.sign(values) * np.float32(0.3)


def _params() -> dict[str, np.ndarray]:
    params = {name: _leaf(i) for i, name in enumerate(("frozen", "part", "slow"))}
    params["frozen"][1, 1] = params["part"][0, 2] = -0.0
    return {"bias": _leaf(9, (3,)), **params}


def _wave(angles: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.cos(angles).astype(np.float32).reshape(shape)


PARAMS = _params()
GRADS = [
    {
        name: _wave(1.7 * np.arange(p.size) + i, p.shape)
        + np.float32(0.6) * _wave(2.3 * step + 0.7 * np.arange(p.size), p.shape)
        for i, (name, p) in enumerate(PARAMS.items())
    }
    for step in range(STEPS)
]
GOALS = {n: 0.5 * _wave(2.0 * np.arange(p.size), p.shape) for n, p in PARAMS.items()}
STEEP = {n: 0.5 + 0.25 * _wave(np.arange(p.size), p.shape) for n, p in PARAMS.items()}
VALUES = np.float32([3.0, 2.0, 2.5, 2.4, 2.6, 1.0])
NOTHING_FROZEN = {name: np.zeros((1,) * p.ndim, bool) for name, p in PARAMS.items()}
WHOLE_FROZEN = {**NOTHING_FROZEN, "frozen": np.ones((1, 1), bool)}
ALL_FROZEN = {**WHOLE_FROZEN, "part": FROZEN_ROWS}


# What an optimizer is given ------------------------------------------------------------------


@jax.custom_jvp
def _spoiled(x: Any, factor: Any) -> Any:
    """The value as it is, with its derivative multiplied."""
    del factor
    return x


_spoiled.defjvp(lambda primals, tangents: (primals[0], tangents[0] * primals[1]))


def loss(params: Any, factors: Any, step: Any) -> Any:
    """A sum of squares to whose minimum each element goes on its own."""
    apart = {n: _spoiled(p, factors[n]) - GOALS[n] - 0.02 * step for n, p in params.items()}
    return sum(jnp.sum(STEEP[n] * apart[n] ** 2) for n in sorted(apart))


Given = Literal["grads", "value", "value_fn", "obj_fn", "grad_fn", "per_example"]


def _inputs(given: Given, params: Any, batch: Any, widen: Callable[[Any], Any]) -> Any:
    """The gradients, and the extra arguments of `update`."""
    step, grads, value, factors = batch
    if given == "per_example":
        return {n: jnp.stack([g, -0.5 * g, g * g, 0.3 * g]) for n, g in grads.items()}, {}
    if given == "grads":
        return grads, {}
    if given == "value":
        return grads, {"value": value}
    if given == "grad_fn":

        def grad_fn(at: Any, i: Any) -> Any:
            del i
            return {n: g + 0.5 * at[n] * factors[n] for n, g in grads.items()}

        return grads, {"grad_fn": grad_fn}

    def value_fn(at: Any) -> Any:
        return loss(widen(at), factors, step)

    if given == "obj_fn":
        return grads, {"obj_fn": value_fn}
    found, grads = jax.value_and_grad(value_fn)(params)
    return grads, {"value": found, "grad": grads, "value_fn": value_fn}


# Rows ----------------------------------------------------------------------------------------

Which = Literal["all", "frozen", "rates", "again"]
Around = Callable[[Any, Which], Any]


@dataclass(frozen=True)
class Row:
    """An optimizer, or a way to use it.

    Attributes:
        name: as shown; up to a parenthesis it is what optax calls it.
        place: makes it for a learning rate, with rules around what they belong around: all rules,
            or those that freeze (perhaps again, at the end), or those that do not.
        given: what `update` is given.
        rate: the learning rate.
        jit: whether all steps are jitted, since eagerly they would compile at each.
        notes: which remarks apply.
        look: the parameters are `optax.LookaheadParams`.
    """

    name: str
    place: Callable[[Any, Around], Any]
    given: Given = "grads"
    rate: float = 0.05
    jit: bool = False
    notes: tuple[str, ...] = ()
    look: bool = False

    @property
    def export(self) -> str:
        """What optax calls it."""
        return self.name.split("(")[0]


ROWS: dict[str, Row] = {}


def _add_placed(name: str, place: Any, notes: str = "", **options: Any) -> None:
    assert name not in ROWS
    ROWS[name] = Row(name, place, notes=tuple(notes.split()), **options)


def _add(name: str, make: Callable[[Any], Any], notes: str = "", **options: Any) -> None:
    """A row for an optimizer with all rules after it, or around it."""
    _add_placed(name, lambda rate, around: around(make(rate), "all"), notes, **options)


def _add_plain(names: str, module: Any = optax, notes: str = "", **arguments: Any) -> None:
    """Rows for optimizers that differ in their names."""
    prefix = "contrib." if module is optax.contrib else ""
    for name in names.split():
        make = functools.partial(_make, module, name, arguments)
        _add(prefix + name, make, notes)


def _make(module: Any, name: str, arguments: Any, rate: Any) -> Any:
    return getattr(module, name)(rate, **arguments)


def _quiet(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _sam(rate: Any, around: Around, which: Which, **options: Any) -> Any:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.2))
    return optax.contrib.sam(around(optax.sgd(rate), which), adversary, **options)


def _sophia(rate: Any) -> Any:
    hessian = optax.contrib.hutchinson_estimator_diag_hessian(_key())
    return optax.contrib.sophia(
        rate, gamma=0.5, update_interval=2, weight_decay=0.1, hessian_diagonal_fn=hessian
    )


def _key() -> Any:
    return jax.random.key(0, impl="rbg")  # compiles in a fraction of the time


def _plain(tx: Any, which: Which) -> Any:
    del which
    return tx


def _add_all() -> None:
    c = optax.contrib
    decay = {"weight_decay": 0.1}
    small = {"min_dim_size_to_factor": 2}
    _add_plain(
        "adabelief adagrad adam adamax amsgrad nadam optimistic_adam_v2 "
        "optimistic_gradient_descent radam rmsprop sgd sign_sgd signum yogi"
    )
    _add_plain("adamaxw adamw adan lion nadamw", **decay)
    _add_plain("sm3 novograd", notes="array")
    _add_plain("lamb", notes="array", **decay)
    _add_plain("fromage", notes="rate array")
    _add("noisy_sgd", lambda rate: optax.noisy_sgd(rate, key=_key()))
    _add_plain("acprop ademamix", c, **decay)
    _add_plain("adopt simplified_ademamix", c)
    _add_plain("madgrad", c, notes="rate", **decay)
    _add("adadelta", lambda rate: optax.adadelta(rate, **decay), rate=10.0)
    _add("sgd(momentum)", lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True))
    _add("lars", lambda rate: optax.lars(rate, trust_coefficient=0.5, **decay), "array")
    _add("adafactor", lambda rate: optax.adafactor(rate, **small), "array")
    _add(
        "adafactor(weight_decay_rate)",
        lambda rate: optax.adafactor(rate, weight_decay_rate=0.02, **small),
        "adafactor array",
    )
    _add_placed(
        "adafactor(decay after the rates)",
        lambda rate, around: around(
            optax.chain(
                around(optax.adafactor(rate, **small), "rates"), optax.add_decayed_weights(-0.02)
            ),
            "frozen",
        ),
        "adafactor array",
    )
    _add("rprop", optax.rprop, "rprop")
    _add("rprop(at its clamps)", lambda rate: optax.rprop(rate, max_step_size=0.055), "rprop")
    _add("optimistic_adam", lambda rate: _quiet(lambda: optax.optimistic_adam(rate)), "optimism")
    _add(
        "optimistic_adam(optimism)",
        lambda rate: _quiet(lambda: optax.optimistic_adam(rate, optimism=0.05)),
        "optimism",
    )
    _add("polyak_sgd", optax.polyak_sgd, "estimate norm", given="value")
    _add(
        "lbfgs",
        lambda rate: optax.lbfgs(rate, memory_size=1),
        "lbfgs norm",
        given="value_fn",
        jit=True,
    )
    _add(
        "lbfgs(linesearch=None)",
        lambda rate: optax.lbfgs(rate, memory_size=1, linesearch=None),
        "lbfgs norm",
        given="value_fn",
        jit=True,
    )
    _add("lookahead", lambda rate: optax.lookahead(optax.sgd(rate), 2, 0.5), "lookahead", look=True)
    _add_placed(
        "lookahead(rules inside)",
        lambda rate, around: optax.lookahead(around(optax.sgd(rate), "all"), 2, 0.5),
        "inside lookahead",
        look=True,
    )
    _add_placed(
        "lookahead(rules inside, frozen ones again after)",
        lambda rate, around: around(
            optax.lookahead(around(optax.sgd(rate), "all"), 2, 0.5), "again"
        ),
        "lookahead",
        look=True,
    )
    _add(
        "MultiSteps",
        lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(),
        jit=True,
    )
    _add(
        "apply_if_finite",
        lambda rate: optax.apply_if_finite(optax.sgd(rate), 100),
        "finite",
        jit=True,
    )
    _add("contrib.muon", lambda rate: c.muon(rate, **decay), "array", jit=True)
    _add("contrib.galore", lambda rate: c.galore(rate, 2, 2), "array", jit=True)
    _add("contrib.cocob", lambda rate: c.cocob(rate, alpha=2.0, **decay), "estimate", rate=1.0)
    for name, make in {
        "dadapt_adamw": lambda rate: c.dadapt_adamw(rate, estim_lr0=0.003, **decay),
        "prodigy": lambda rate: c.prodigy(rate, estim_lr0=0.01, estim_lr_coef=30.0),
        "dog": lambda rate: c.dog(rate, ("distance", 0.1), **decay),
        "dowg": lambda rate: c.dowg(rate, 0.1, **decay),
        "mechanize": lambda rate: c.mechanize(optax.sgd(rate), s_init=0.3),
    }.items():
        _add(f"contrib.{name}", make, "estimate norm", rate=1.0)
    _add("contrib.momo", lambda rate: c.momo(rate, **decay), "estimate norm", given="value")
    _add(
        "contrib.momo_adam", lambda rate: c.momo_adam(rate, **decay), "estimate norm", given="value"
    )
    _add(
        "contrib.dpsgd",
        lambda rate: _quiet(lambda: c.dpsgd(rate, 1.0, 0.1, seed=0)),
        "dpsgd norm",
        given="per_example",
    )
    _add(
        "contrib.sophia",
        _sophia,
        "sophia",
        given="obj_fn",
        jit=True,
    )
    _add(
        "contrib.reduce_on_plateau",
        lambda rate: optax.chain(optax.sgd(rate), c.reduce_on_plateau(0.5, patience=1)),
        "plateau",
        given="value",
        jit=True,
    )
    _add("contrib.sam", lambda rate: _sam(rate, _plain, "all"), "sam norm")
    _add_placed(
        "contrib.sam(rates inside)",
        lambda rate, around: around(_sam(rate, around, "rates"), "frozen"),
        "sam norm",
    )
    _add(
        "contrib.sam(opaque_mode)",
        lambda rate: _sam(rate, _plain, "all", opaque_mode=True),
        "opaque norm",
        given="grad_fn",
    )
    _add("contrib.schedule_free", lambda rate: c.schedule_free(optax.sgd(rate), rate), "free")
    _add("contrib.schedule_free_sgd", lambda rate: c.schedule_free_sgd(rate, **decay), "free")
    _add("contrib.schedule_free_adamw", lambda rate: c.schedule_free_adamw(rate, **decay), "free")
    _add_placed(
        "contrib.schedule_free(rules inside)",
        lambda rate, around: c.schedule_free(around(optax.sgd(rate), "all"), rate),
        "inside free",
    )
    _add_placed(
        "contrib.schedule_free(rules inside, frozen ones again after)",
        lambda rate, around: around(c.schedule_free(around(optax.sgd(rate), "all"), rate), "again"),
        "free",
    )


_add_all()


# Runs ----------------------------------------------------------------------------------------


class Runner:
    """An optimizer with its rules, ready to train.

    Args:
        row: which.
        around: how rules are put around it.
        rate: multiplies the learning rate of the row.
        jit: whether `init` and each step are jitted; if not, steps are where the row says so.
        hand: a view of the parameters that replaces them.
    """

    def __init__(
        self, row: Row, around: Around, rate: float = 1.0, jit: bool = False, hand: Any = None
    ) -> None:
        self.row, self.hand = row, hand or SimpleNamespace(narrow=_as_is, widen=_as_is)
        self.tx = optax.with_extra_args_support(row.place(rate * row.rate, around))
        self._init = jax.jit(self._begin) if jit else self._begin
        self._step = jax.jit(self._go) if jit or row.jit else self._go

    def path(self, frozen: dict[str, np.ndarray] = NOTHING_FROZEN, bad: float = 1.0) -> list[Any]:
        """The parameters before the first step and after each.

        Args:
            frozen: where gradients are multiplied.
            bad: by what.
        """
        factors = {n: np.where(frozen[n], np.float32(bad), np.float32(1)) for n in PARAMS}
        params = jax.tree.map(jnp.asarray, self.hand.narrow(PARAMS))
        if self.row.look:
            params = optax.LookaheadParams.init_synced(params)
        state, path = self._init(params), [params]
        for i in range(STEPS):
            grads = self.hand.narrow({n: g * factors[n] for n, g in GRADS[i].items()})
            batch = np.float32(i), grads, VALUES[i], factors
            params, state = self._step(params, state, batch)
            path.append(params)
        return jax.tree.map(np.asarray, path)

    def _begin(self, params: Any) -> Any:
        return _strong(self.tx.init(params))

    def _go(self, params: Any, state: Any, batch: Any) -> Any:
        grads, extra = _inputs(self.row.given, params, batch, self.hand.widen)
        updates, state = self.tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), _strong(state)


def _as_is(tree: Any) -> Any:
    return tree


def _strong(state: Any) -> Any:
    """A state without weak types, which would cost another compilation."""

    def one(leaf: Any) -> Any:
        if not jax.typeof(leaf).weak_type:
            return leaf
        return jax.lax.convert_element_type(leaf, np.dtype(leaf.dtype))

    return jax.tree.map(one, state)


def _get(params: Any, name: str) -> list[np.ndarray]:
    return (
        [p[name] for p in params] if isinstance(params, optax.LookaheadParams) else [params[name]]
    )


def _far(path: list[Any], other: list[Any], name: str, part: Any = slice(None)) -> float:
    """The greatest difference between two paths, as a fraction of how far the second leads."""
    apart = gone = np.float32(0)
    for params, others in zip(path, other, strict=True):
        pairs = zip(_get(params, name), _get(others, name), _get(other[0], name), strict=True)
        for leaf, wanted, start in pairs:
            wanted, start = wanted[-len(leaf[part]) :], start[-len(leaf[part]) :]
            apart = np.maximum(apart, np.abs(leaf[part] - wanted).max())
            gone = np.maximum(gone, np.abs(wanted - start).max())
    return float(apart / gone) if np.isfinite(apart) and gone else np.inf


KEPT = ["yes", "value", "nearly", "no"]


def _kept(paths: list[list[Any]], name: str, part: Any) -> str:
    """Whether all that is frozen keeps every bit, or how much of it is kept."""
    found = "yes"
    for path in paths:
        for params in path[1:]:
            for leaf, start in zip(_get(params, name), _get(path[0], name), strict=True):
                found = max(found, _kept_by(leaf[part], start[part]), key=KEPT.index)
    return found


def _kept_by(leaf: np.ndarray, start: np.ndarray) -> str:
    if leaf.shape != start.shape:
        return "no"
    if leaf.tobytes() == start.tobytes():
        return "yes"
    if (leaf == start).all():
        return "value"
    return "nearly" if np.allclose(leaf, start, rtol=1e-6, atol=0) else "no"


def _same(path: list[Any], other: list[Any]) -> bool:
    """Whether all that trains has the same bits, all of them finite."""
    return all(
        np.isfinite(leaf[part]).all() and leaf[part].tobytes() == wanted[part].tobytes()
        for params, others in zip(path, other, strict=True)
        for name in (*TRAINED, "part")
        for leaf, wanted in zip(_get(params, name), _get(others, name), strict=True)
        for part in [slice(2, None) if name == "part" else slice(None)]
    )


def _by_hand(compact: bool) -> Any:
    """What `wrap` should come to: the tree without what is frozen, scaled and masked by hand."""

    def narrow(tree: Any) -> Any:
        part = tree["part"][2:] if compact else np.where(FROZEN_ROWS, 0, tree["part"])
        return {**{n: tree[n] for n in TRAINED}, "part": np.asarray(part, np.float32)}

    def widen(tree: Any) -> Any:
        part = tree["part"]
        part = jnp.concatenate([jnp.zeros_like(part), part]) if compact else part
        part = jnp.where(FROZEN_ROWS, PARAMS["part"], part)
        return {**tree, "part": part, "frozen": PARAMS["frozen"]}

    def scaled(which: Which, updates: Any, params: Any) -> Any:
        slow, part = updates["slow"], updates["part"]
        if which != "frozen":
            slow = RATIO * slow
        if which != "rates" and not compact:
            part = jnp.where(FROZEN_ROWS, 0, part)
        return {**updates, "slow": slow, "part": part}

    def around(tx: Any, which: Which) -> Any:
        if which == "again":  # here it is zero, and zero it stays
            return tx
        return optax.chain(tx, optax.stateless(functools.partial(scaled, which)))

    return SimpleNamespace(narrow=narrow, widen=widen, around=around)


def chained(tx: Any, which: Which) -> Any:
    return optax.chain(tx, lm.scale_by_rules(RULES[which]))


def _wrapped(compact: bool) -> Around:
    def around(tx: Any, which: Which) -> Any:
        if which in ("rates", "again"):
            return chained(tx, which)
        return lm.wrap(tx, RULES[which], compact=compact)

    return around


Log = Callable[[str], None]


def run(row: Row, log: Log = lambda line: None) -> list[str]:
    """The cells of a row, after its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [*_run_chained(row, log), *_run_wrapped(row, log), *_run_compact(row, log)]


def _run_chained(row: Row, log: Log) -> list[str]:
    runner = Runner(row, chained)
    clean, plain = runner.path(), Runner(row, _plain, rate=RATIO).path()
    whole, both = runner.path(WHOLE_FROZEN, np.nan), runner.path(ALL_FROZEN, np.nan)
    gone = [_gone(plain, name) for name in PARAMS] + [_gone(clean, name) for name in TRAINED]
    assert min(gone) > 1e-3, "so little happens that nothing is shown"
    far = _far(clean, plain, "slow")
    log(f"{row.name}: {far:.1e} from the multiplied learning rate; {min(gone):.3f} gone")
    paths = [clean, whole, both]
    return [
        "yes" if far < RATE_TOLERANCE else "no",
        _kept(paths, "frozen", ...),
        _kept(paths, "part", slice(0, 2)),
        "yes" if _same(both, clean) else "array" if _same(whole, clean) else "no",
    ]


def _run_wrapped(row: Row, log: Log) -> list[str]:
    around = _wrapped(compact=False)
    try:
        jitted = Runner(row, around, jit=True)
        paths = [jitted.path(ALL_FROZEN, 1e6), jitted.path(ALL_FROZEN, np.nan)]
        if not row.jit:
            paths.append(Runner(row, around).path(ALL_FROZEN, np.nan))
    except (TypeError, ValueError, lm.LrmultError) as error:
        log(f"  wrap: {type(error).__name__}: {error}")
        return ["error"] * 3
    kept = [_kept(paths, "frozen", ...), _kept(paths, "part", slice(0, 2))]
    alone = _as_alone(row, paths[-1], compact=False, log=log)
    return [max(kept, key=KEPT.index), "yes" if _same(*paths[:2]) else "no", alone]


def _run_compact(row: Row, log: Log) -> list[str]:
    try:
        path = Runner(row, _wrapped(compact=True)).path(ALL_FROZEN, np.nan)
    except (TypeError, ValueError, lm.LrmultError) as error:
        log(f"  compact: {type(error).__name__}: {error}")
        return ["error"]
    kept = max(_kept([path], "frozen", ...), _kept([path], "part", slice(0, 2)), key=KEPT.index)
    return [kept if kept != "yes" else _as_alone(row, path, compact=True, log=log)]


def _as_alone(row: Row, path: list[Any], compact: bool, log: Log) -> str:
    """Whether what trains goes where it goes in a tree without what is frozen."""
    hand = _by_hand(compact)
    alone = Runner(row, hand.around, hand=hand).path()
    far = [_far(path, alone, name) for name in TRAINED]
    far.append(_far(path, alone, "part", slice(2, None)))
    log(f"  {'compact' if compact else 'wrap'}: {max(far):.1e} from training the rest alone")
    return "yes" if max(far) < REST_TOLERANCE else "no"


def _gone(path: list[Any], name: str) -> float:
    pairs = zip(_get(path[-1], name), _get(path[0], name), strict=True)
    return float(np.max([np.abs(leaf - start).max() for leaf, start in pairs]))


# What optax exports --------------------------------------------------------------------------

# Parts of optimizers, and wrappers that pass on what another optimizer does.
BUILDING_BLOCKS = frozenset(
    """
adaptive_grad_clip add_decayed_weights add_noise apply_every centralize chain clip
    clip_by_block_rms clip_by_global_norm conditionally_mask conditionally_transform ema
    flatten freeze identity inject_hyperparams inject_stateful_hyperparams
    keep_params_nonnegative masked measure_with_ema multi_transform named_chain
    normalize_by_update_norm partition scale scale_by_adadelta scale_by_adam scale_by_adamax
    scale_by_adan scale_by_amsgrad scale_by_backtracking_linesearch scale_by_belief
    scale_by_distance_over_gradients scale_by_factored_rms scale_by_lbfgs
    scale_by_learning_rate scale_by_lion scale_by_novograd scale_by_optimistic_gradient
    scale_by_param_block_norm scale_by_param_block_rms scale_by_polyak scale_by_radam
    scale_by_rms scale_by_rprop scale_by_rss scale_by_schedule scale_by_sign scale_by_sm3
    scale_by_stddev scale_by_trust_ratio scale_by_yogi scale_by_zoom_linesearch
    selective_transform set_to_zero snapshot stateless stateless_with_tree_map trace
    with_extra_args_support zero_nans contrib.differentially_private_aggregate
    contrib.hutchinson_estimator_diag_hessian contrib.normalize contrib.scale_by_acprop
    contrib.scale_by_ademamix contrib.scale_by_adopt contrib.scale_by_cocob
    contrib.scale_by_galore contrib.scale_by_madgrad contrib.scale_by_muon
    contrib.scale_by_simplified_ademamix contrib.split_real_and_imaginary
    """.split()  # noqa: SIM905
)


@functools.cache
def exports() -> frozenset[str]:
    """The names under which optax exports what makes a gradient transformation."""
    return frozenset(
        prefix + name
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, value in inspect.getmembers(module)
        if not name.startswith("_") and _makes_transformation(value)
    )


def _makes_transformation(value: Any) -> bool:
    if inspect.isclass(value):
        return hasattr(value, "gradient_transformation")
    if not (inspect.isfunction(value) or isinstance(value, functools.partial)):
        return False
    signature = inspect.signature(value)
    annotation = signature.return_annotation
    if annotation is not signature.empty:
        return "GradientTransformation" in str(annotation)
    required = [
        0.1
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    try:  # it says nothing: see what it does
        return isinstance(value(*required), optax.GradientTransformation)
    except Exception:
        return False


# The page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
COLUMNS = {
    "rate": "In `chain(optimizer(lr), scale_by_rules([(array, r)]))` the array goes where "
    "`optimizer(lr * r)` takes it, with equal gradients.",
    "frozen": "In that chain, frozen arrays keep every bit.",
    "part": "In that chain, the frozen rows of an array keep every bit.",
    "apart": "In that chain, a NaN in every frozen gradient changes no bit of what trains. `array`:"
    " it reaches the rest of an array that is frozen in part, but no other array.",
    "`wrap`: frozen": "In `wrap(optimizer, rules)`, frozen arrays and rows keep every bit.",
    "`wrap`: apart": "There, frozen gradients that are NaN or a million times larger change no bit "
    "of what trains.",
    "`wrap`: alone": "There, what trains goes where it goes without the frozen arrays in the tree, "
    "and with zeros for frozen rows.",
    "compact": "In `wrap(optimizer, rules, compact=True)`, what is frozen keeps every bit, NaN in "
    "its gradients or not, and the rest goes where it goes without it, frozen rows cut out.",
}
HEADER = ["optimizer", *COLUMNS, "notes"]
NOTES = {
    "array": "Within one array everything counts: a norm, a factored moment, an orthogonal basis. "
    "After the optimizer, gradients of the frozen part of an array change how the rest of that "
    "array trains. `wrap` stops it. Other arrays are never touched.",
    "norm": "One norm (or inner product) of all gradients counts for all. After the optimizer, "
    "frozen gradients still count in it, and a NaN in one ruins the whole model. `wrap` stops it.",
    "estimate": "The step size is estimated during training. A multiplier other than 0 or 1 "
    "still scales every step, but the estimate answers to it: it is no learning rate.",
    "rate": "The learning rate is more than a factor of the update. A multiplier scales the "
    "update, which is not the same.",
    "adafactor": "`weight_decay_rate` is not multiplied by adafactor's learning rate, but a "
    "multiplier after it scales the decay too. To keep the decay as it is, put it after the rates: "
    "`chain(adafactor(lr), scale_by_rules(rates), add_decayed_weights(-rate), "
    "scale_by_rules(frozen))`, or `wrap(..., frozen)` around the first three.",
    "rprop": "The learning rate is only the first step size. A multiplier stands for it until a "
    "step size meets `min_step_size` or `max_step_size`, which are multiplied too.",
    "optimism": "An explicit `optimism` is not part of the learning rate, but is multiplied too. "
    "Leave it out, or take `optimistic_adam_v2`. (optax calls `optimistic_adam` deprecated.)",
    "lbfgs": "A multiplier other than 0 or 1 changes the step after the search has found it. "
    "Freeze with `wrap`. Pass `value`, `grad` and `value_fn`, and get the first two from "
    "`jax.value_and_grad`: `optax.value_and_grad_from_state` raises a TypeError under `wrap`.",
    "finite": "A NaN in a frozen gradient makes it reject the step for the whole model. Write "
    "`wrap(apply_if_finite(...), rules)`.",
    "dpsgd": "`update` takes gradients per example; in `wrap`, pass the parameters too. Its noise "
    "is drawn for what it sees.",
    "lookahead": "Its updates must not be scaled. Put the rules inside, around the fast optimizer, "
    "and the frozen ones again at the end: "
    "`chain(lookahead(chain(sgd(lr), scale_by_rules(rules)), ...), scale_by_rules(frozen))`; "
    "`wrap(sgd(lr), rules)` inside does too. At the end, patterns must match `fast/...` and "
    "`slow/...`: begin them with `**/`. `wrap` does not go around it.",
    "sam": "Transparent mode shows its adversarial steps as updates: they must not be scaled. Put "
    "the rates inside and the freezing outside: "
    "`wrap(sam(chain(sgd(lr), scale_by_rules(rates)), adversary), frozen)`.",
    "opaque": "Pass `grad_fn`, a function of all parameters.",
    "free": "It computes the parameters itself. Put the rules inside, and the frozen ones again at "
    "the end: "
    "`chain(schedule_free(chain(sgd(lr), scale_by_rules(rules)), lr), scale_by_rules(frozen))`. "
    "With the rules only after it, `schedule_free_eval_params` moves what is frozen; with `wrap` "
    "around it, that function raises a TypeError. With them inside, evaluation parameters that are "
    "frozen are right to rounding.",
    "inside": "Rules inside alone are not enough for every bit: the wrapper around them computes "
    "the parameters anew, which loses the sign of a zero (`value`) or a last bit at some steps, "
    "which adds up (`nearly`).",
    "sophia": "Pass `obj_fn`, a function of all parameters.",
    "plateau": "Run as `chain(sgd(lr), reduce_on_plateau(...))`. Pass `value`.",
    "value": "Pass `value`.",
}

PAGE_TEXT = """# Optimizers

What holds for each optimizer of optax, by running it. Look up yours. If it says *yes* everywhere,
there is nothing to know. The notes say what to write where it does not.

In short:

- **Freezing after the optimizer**, `optax.chain(optimizer, lm.scale_by_rules(rules))`, keeps
  every bit under every optimizer, with weight decay, momentum and NaN gradients.
- **If frozen gradients may be NaN or large**, or if the optimizer takes a norm of all gradients (or
  you clip by one), use `lm.wrap(optimizer, rules)`: what is frozen is then not seen at all. Only
  `lookahead` does not go into `wrap`; it goes around it.
- **A multiplier is a learning rate** where *rate* says yes. Elsewhere use None, 0 and 1 only, or
  do what the note says.
- **`schedule_free`, `lookahead` and `sam`** want the rates inside.

## Columns

@COLUMNS@

Other words: `value`: values stay, but -0.0 becomes 0.0. `nearly`: values stay to one part in a
million in these few steps. `error`: it raises.

"Rules inside" and the like are ways of writing, and the notes spell them out. In their rows, the
chain and `wrap` stand where the name says.

## Table

@TABLE@

## Notes

@NOTES@

## What was run

jax @JAX@, optax @OPTAX@, float32, on CPU. Four arrays: one is frozen, one is frozen in two of
its four rows, one has a multiplier of @RATIO@. @STEPS@ steps. Weights of -0.0 are among the frozen
ones. Frozen gradients are as they come, NaN, and (under `wrap`) a million times as large. Weight
decay is on wherever there is any. A row counts only if everything that trains moves, and what is
frozen moves too if there are no rules. `wrap` runs jitted and eagerly.

*rate* allows a difference of @RATE@ of the distance that the array has moved, *alone* @REST@.
Everything else is compared bit for bit.

Hyperparameters are chosen so that things happen in a few steps: learning rates are high, estimates
start large, and clamps are met where the name says so. Small arrays are factored by `adafactor`.

Write this page anew with

```sh
python tests/conformance.py
```

`tests/test_optimizers.py` compares each row with a fresh run, and fails if optax exports an
optimizer that is not here.
"""


def page(log: Log) -> str:
    """The whole page."""
    used: list[str] = []
    for row in sorted(ROWS.values(), key=_place):
        used += [note for note in _notes(row) if note not in used]
    table = [HEADER]
    for row in sorted(ROWS.values(), key=_place):
        marks = ", ".join(f"[{used.index(note) + 1}](#note-{note})" for note in _notes(row))
        table.append([shown(row), *map(_emphasized, run(row, log)), marks])
    assert set(used) == set(NOTES)
    values = {
        "TABLE": _table(table),
        "NOTES": "\n".join(
            f'{i}. <a id="note-{note}"></a>{NOTES[note]}' for i, note in enumerate(used, 1)
        ),
        "COLUMNS": _table([["column", "*yes* means"], *map(list, COLUMNS.items())]),
        "JAX": jax.__version__,
        "OPTAX": optax.__version__,
        "RATIO": str(RATIO),
        "STEPS": str(STEPS),
        "RATE": f"{RATE_TOLERANCE:f}".rstrip("0"),
        "REST": f"{REST_TOLERANCE:f}".rstrip("0"),
    }
    text = PAGE_TEXT
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _place(row: Row) -> tuple[bool, str, str]:
    name, _, variant = row.name.partition("(")
    return name.startswith("contrib."), name.lower(), variant


def _table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _notes(row: Row) -> list[str]:
    return [*row.notes, *(["value"] if row.given == "value" and "plateau" not in row.notes else [])]


def shown(row: Row) -> str:
    name, parenthesis, variant = row.name.partition("(")
    return f"`{name}`" + f", {variant.removesuffix(')')}" * bool(parenthesis)


def _emphasized(cell: str) -> str:
    return cell if cell == "yes" else f"**{cell}**"


def read_page() -> dict[str, list[str]]:
    """The cells of each row of the page, by what stands first in it."""
    rows = {}
    for line in PAGE.read_text().split("## Table")[1].split("## Notes")[0].splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(HEADER) and not set(cells[0]) <= {"-"} and cells != HEADER:
            rows[cells[0]] = cells[1:-1]
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(print))
