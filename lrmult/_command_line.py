"""The command line: what rules do to a checkpoint before a job starts, and what it did after."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax

from lrmult import __version__
from lrmult._checkpoints import Checkpoint, CheckpointError, Stored, read_checkpoint
from lrmult._errors import LrmultError, in_bytes, listing, shorten, spec
from lrmult._folding import Answer
from lrmult._freezing import differing
from lrmult._parts import Parts
from lrmult._plan import LeafPlan, Plan, compile_rules
from lrmult._report import answers
from lrmult._rule_files import load_rules
from lrmult._wrap import wrap

Array = npt.NDArray[Any]

_FINE, _WRONG, _TROUBLE, _INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = """\
Say what rules do to the parameters in a checkpoint: an Orbax directory, a .safetensors or .npz
file, or a .msgpack file of Flax."""

_EPILOG = """\
examples:
  lrmult paths checkpoints/100/default --at params
  lrmult explain checkpoints/100/default --at params --rules rules.toml
  lrmult explain model.safetensors --separator . --rules rules.yaml --optimizer lion --json
  lrmult diff checkpoints/0/default checkpoints/100/default --at params --rules rules.toml

In a job script, so that no job starts with rules that do nothing:
  lrmult explain init.msgpack --rules rules.toml && python train.py
"""

_EXPLAIN = """\
Print what every parameter gets, which rule says so, how many parameters train, and how much state
of an optimizer lrmult.wrap saves. Only paths, shapes and dtypes are read, and no weights."""

_EXPLAIN_EPILOG = """\
exit status:
  0  the rules are fine
  1  a rule is malformed, matches nothing, or can never apply, or the file holds no rules
  2  the arguments are wrong, or the checkpoint cannot be read
"""

_PATHS = """\
List the paths that rules can speak of, with the dtype and the shape of each array."""

_DIFF = """\
Tell which arrays of two checkpoints differ, bit by bit: a NaN equals itself, and -0.0 is not 0.0.
With rules, tell which of the differences are in what the rules freeze."""

_DIFF_EPILOG = """\
exit status:
  0  nothing frozen differs
  1  something frozen differs, or is in one of the two only, or has another shape or dtype
  2  there is no answer: the arguments or the rules are wrong, or a checkpoint cannot be read
"""


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a command has to say.

    Attributes:
        shown: lines of text, and plans.
        data: the same for programs.
        status: the exit status.
    """

    shown: Sequence[Any]
    data: dict[str, Any]
    status: int = _FINE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; if left out, those of the process.

    Returns:
        The exit status. Where arguments cannot be read, argparse exits.
    """
    options = _parser().parse_args(argv)
    # Nothing here needs a device, and those that there are may be at work for others. (Orbax asks
    # for them.)
    jax.config.update("jax_platforms", "cpu")
    try:
        answer: _Answer = options.run(options)
        _print(answer, options.json)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except LrmultError as error:
        _say("error", error)
        is_of_rules = options.run is _explain and not isinstance(error, CheckpointError)
        return _WRONG if is_of_rules else _TROUBLE
    except Exception:  # Python would exit with 1, which has a meaning here
        traceback.print_exc()
        return _TROUBLE
    return answer.status


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "lrmult", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=plain
    )
    parser.add_argument("--version", action="version", version=f"lrmult {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Any], _Answer], description: str, epilog: str) -> Any:
        command = commands.add_parser(
            name, help=_HELP[name], description=description, epilog=epilog, formatter_class=plain
        )
        command.set_defaults(run=run)
        return command

    explain = add("explain", _explain, _EXPLAIN, _EXPLAIN_EPILOG)
    explain.add_argument("checkpoint", metavar="CHECKPOINT", help=_HELP["checkpoint"])
    explain.add_argument("--rules", metavar="FILE", required=True, help=_HELP["rules"])
    explain.add_argument(
        "--optimizer", metavar="NAME", type=_optimizer, default="adamw", help=_HELP["optimizer"]
    )
    paths = add("paths", _paths, _PATHS, "")
    paths.add_argument("checkpoint", metavar="CHECKPOINT", help=_HELP["checkpoint"])
    diff = add("diff", _diff, _DIFF, _DIFF_EPILOG)
    diff.add_argument("before", metavar="A", help=_HELP["checkpoint"])
    diff.add_argument("after", metavar="B", help="another one; the rules are held against A")
    diff.add_argument("--rules", metavar="FILE", help=_HELP["rules"])
    for command in (explain, diff):
        command.add_argument(
            "--no-strict", dest="strict", action="store_false", help=_HELP["no-strict"]
        )
    for command in (explain, paths, diff):
        command.add_argument("--at", metavar="PATH", help=_HELP["at"])
        command.add_argument("--separator", metavar="TEXT", type=_text, help=_HELP["separator"])
        command.add_argument("--json", action="store_true", help=_HELP["json"])
    return parser


_HELP = {
    "explain": "what every parameter gets, and what freezing saves",
    "paths": "the paths that rules can speak of",
    "diff": "what two checkpoints differ in, and whether it was frozen",
    "checkpoint": "a directory of Orbax, or a .safetensors, .npz or .msgpack file",
    "rules": "the rules, in TOML, YAML or JSON, as lrmult.load_rules reads them",
    "no-strict": "rules that match nothing or can never apply are warnings, not errors",
    "at": "the part of the checkpoint that holds the parameters, such as params; the paths of "
    "rules start there",
    "separator": "what separates the names along a path in .safetensors and .npz files, beside /",
    "optimizer": "the optimizer of optax whose state is counted (default: adamw)",
    "json": "print one JSON object",
}


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("it is empty; write the text, such as .")
    return value


# ---- output


def _print(answer: _Answer, as_json: bool) -> None:
    out: Any = sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")  # names may hold what a terminal cannot show
    try:
        if as_json:
            print(json.dumps(answer.data, allow_nan=False))
        elif out.isatty():
            from rich.console import Console

            for each in answer.shown:
                Console(width=10_000, highlight=False).print(each, soft_wrap=True, markup=False)
        else:
            print(*answer.shown, sep="\n")
        out.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough. Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _say(kind: str, message: object) -> None:
    print(f"lrmult: {kind}: {message}", file=sys.stderr)


@contextlib.contextmanager
def _saying_warnings() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                _say("warning", warning.message)


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text in which the columns stand below one another."""
    shown = [[c if c.isprintable() else repr(c)[1:-1] for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["   ".join(map(str.ljust, row, widths)).rstrip() for row in shown]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


# ---- what all commands do


def _open(path: str, options: argparse.Namespace) -> Checkpoint:
    checkpoint = read_checkpoint(path, separator=options.separator)
    return checkpoint if options.at is None else checkpoint.at(options.at)


def _compiled(checkpoint: Checkpoint, options: argparse.Namespace) -> Plan:
    try:
        with _saying_warnings():
            rules = load_rules(options.rules, checkpoint.shapes)
            return compile_rules(rules, checkpoint.shapes, strict=options.strict)
    except LrmultError as error:
        hints = "".join(f"\n{hint}" for hint in _hints(checkpoint, options))
        raise type(error)(f"{error}{hints}") from error


def _hints(checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[str]:
    """Options that were perhaps forgotten."""
    names = [names for names in checkpoint.entries if names]
    if options.at is None and {"params", "opt_state"} <= {each[0] for each in names}:
        yield f"{checkpoint.path} has more than parameters in it; for these alone, add --at params"
    has_dots = checkpoint.is_flat and all(len(each) == 1 for each in names)
    if has_dots and options.separator is None and any("." in name for [name] in names):
        yield f"names in {checkpoint.path} hold dots, and no '/'; to split them, add --separator ."


def _of_array(array: Stored) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


# ---- lrmult paths


def _paths(options: argparse.Namespace) -> _Answer:
    checkpoint = _open(options.checkpoint, options)
    rows = [
        (path, str(array.dtype), f"[{','.join(map(str, array.shape))}]")
        for path, array in checkpoint.arrays.items()
    ]
    leaves = [{"path": path, **_of_array(array)} for path, array in checkpoint.arrays.items()]
    data = {"checkpoint": checkpoint.path, "at": options.at, "leaves": leaves}
    return _Answer(_columns(rows), data)


# ---- lrmult explain


def _explain(options: argparse.Namespace) -> _Answer:
    checkpoint = _open(options.checkpoint, options)
    plan = _compiled(checkpoint, options)
    for hint in _hints(checkpoint, options):
        _say("note", hint)
    name, optimizer = options.optimizer
    memory = _memory(optimizer, plan, checkpoint.shapes)
    data = {
        "checkpoint": checkpoint.path,
        "at": options.at,
        "leaves": [
            _of_leaf(record, answer)
            for record, answer in zip(plan.leaves, answers(plan).values(), strict=True)
        ],
        "arrays": len(plan.leaves),
        "trained": sum(record.trained for record in plan.leaves),
        "frozen": sum(record.frozen for record in plan.leaves),
        "optimizer": name,
        "state_bytes": memory,
        "warnings": list(plan.warnings),
    }
    return _Answer([plan, *_memory_lines(name, memory)], data)


def _of_leaf(record: LeafPlan, answer: Answer) -> dict[str, Any]:
    multiplier = record.multiplier if isinstance(record.multiplier, float) else answer[0]
    return {
        "path": record.path,
        "shape": list(record.shape),
        "dtype": str(record.dtype),
        "rules": [list(claim) for claim in record.rules],
        "multiplier": multiplier,
        "trained": record.trained,
        "frozen": record.frozen,
    }


def _memory(
    optimizer: optax.GradientTransformation, plan: Plan, shapes: Any
) -> dict[str, int] | None:
    """The bytes of an optimizer's state: alone, in `wrap`, and there in the compact form.

    The last is told only where arrays are frozen in part; without them it is the same.
    """
    wrapped = functools.partial(wrap, optimizer, plan.rules, strict=False)
    found = {"alone": optimizer, "wrap": wrapped()}
    if any(record.trained and record.frozen for record in plan.leaves):
        found["compact"] = wrapped(compact=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the rules has been told
            return {name: _statein_bytes(each, shapes) for name, each in found.items()}
    except Exception as error:  # what optax raises where arrays do not suit an optimizer
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        _say("warning", f"the optimizer does not take these arrays ({reason})")
        return None


def _statein_bytes(optimizer: optax.GradientTransformation, shapes: Any) -> int:
    state = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state)


def _memory_lines(name: str, memory: dict[str, int] | None) -> list[str]:
    if memory is None:
        return []
    alone = memory["alone"]
    rows = [(f"state of {name}", in_bytes(alone), "")]
    for form, text in (("wrap", "in lrmult.wrap"), ("compact", "there with compact=True")):
        saved = alone - memory.get(form, alone)
        share = f" ({saved / alone:.0%})" if saved > 0 else ""
        gain = f"{in_bytes(abs(saved))} {'more' if saved < 0 else 'less'}{share}"
        if form in memory:
            rows.append((text, in_bytes(memory[form]), gain))
    return _columns(rows)


def _optimizer(name: str) -> tuple[str, optax.GradientTransformation]:
    """The optax optimizer of that name."""
    known = _optimizers(optax)
    if name not in known:
        known |= _optimizers(importlib.import_module("optax.contrib"))
    if name not in known:
        near = listing(difflib.get_close_matches(name, known)) or listing(sorted(known), 60)
        raise argparse.ArgumentTypeError(
            f"optax has no {name!r} that takes a learning rate and needs nothing else; it has "
            f"{near}"
        )
    return name, known[name](learning_rate=1.0)


def _optimizers(module: Any) -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The functions of a module that make an optimizer of a learning rate alone."""
    found: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        parameters = inspect.signature(function).parameters
        needed = {key for key, each in parameters.items() if each.default is each.empty}
        needed -= {"kwargs"}
        is_alias = not name.startswith(("_", "scale_by_"))
        if is_alias and "learning_rate" in parameters and needed <= {"learning_rate"}:
            found[name] = function
    return found


# ---- lrmult diff


@dataclasses.dataclass(frozen=True)
class _Difference:
    """How one array differs between two checkpoints.

    Attributes:
        path: its path.
        before: the array in the first of them, if there is one.
        after: the array in the second.
        changed: how many elements differ; None where the arrays cannot be held side by side.
        largest: the largest absolute difference; NaN where none can be told.
        frozen: how many elements that are frozen differ, or stand in an array that does.
        first: the first of them, and both its values.
    """

    path: str
    before: Stored | None
    after: Stored | None
    changed: int | None = None
    largest: float = math.nan
    frozen: int = 0
    first: str = ""


def _diff(options: argparse.Namespace) -> _Answer:
    before, after = _open(options.before, options), _open(options.after, options)
    frozen = _frozen(before, after, options)
    found = []
    paths = dict.fromkeys([*before.arrays, *after.arrays])
    for path in paths:
        difference = _difference(path, before, after, *frozen.get(path, (False, 0)))
        if difference:
            found.append(difference)
    hurt = [each for each in found if each.frozen]
    same = len(paths) - len(found)
    total = f"{_counted(len(paths), 'array')}: {len(found):,} differ, {same:,} are equal bit by bit"
    if options.rules:
        total += f"; {len(hurt):,} differ in what is frozen"
    data = {
        "before": before.path,
        "after": after.path,
        "at": options.at,
        "differences": [_of_difference(each) for each in found],
        "arrays": len(paths),
        "equal": same,
        "frozen_differ": len(hurt) if options.rules else None,
    }
    rows = [("parameters", "array", "differ", "by at most", "frozen"), *map(_row, found)]
    shown = [*_columns(rows), "", total] if found else [total]
    return _Answer(shown, data, _WRONG if hurt else _FINE)


def _frozen(
    before: Checkpoint, after: Checkpoint, options: argparse.Namespace
) -> dict[str, tuple[Any, int]]:
    """By path, the mask of what is frozen, and how many elements that are."""
    if not options.rules:
        return {}
    found = {}
    # The rules are held against the first; the second has a say only in what is new there.
    if after.arrays.keys() - before.arrays.keys():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rules = load_rules(options.rules, before.shapes)
            with contextlib.suppress(LrmultError):  # of what is new there it has no say then
                found = _masks(compile_rules(rules, after.shapes, strict=False))
    return found | _masks(_compiled(before, options))


def _masks(plan: Plan) -> dict[str, tuple[Any, int]]:
    masks = plan.treedef.flatten_up_to(plan.frozen)
    return {
        record.path: (masks[index], record.frozen)
        for (index, _), record in zip(plan.tree.arrays(), plan.leaves, strict=True)
    }


def _difference(
    path: str, before: Checkpoint, after: Checkpoint, mask: Any, frozen: int
) -> _Difference | None:
    """How the arrays at a path differ; None if they do not."""
    first, second = before.arrays.get(path), after.arrays.get(path)
    if first is None or second is None or _of_array(first) != _of_array(second):
        return _Difference(path, first, second, frozen=frozen)
    then, now = (each.read(path).reshape(-1) for each in (before, after))
    dense = mask.dense() if isinstance(mask, Parts) else mask
    still = np.broadcast_to(dense, first.shape).flat
    changed = hurt = 0
    largest, example = math.nan, ""
    for start in range(0, then.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        places = start + np.flatnonzero(differing(then[block], now[block]))
        changed += len(places)
        largest = float(np.fmax(largest, _largest(then[places], now[places])))
        places = places[still[places]]
        hurt += len(places)
        if len(places) and not example:
            example = f"{then[places[0]]} became {now[places[0]]}"
            if first.shape:
                index = map(int, np.unravel_index(places[0], first.shape))
                example = f"at [{', '.join(map(str, index))}]: {example}"
    return _Difference(path, first, second, changed, largest, hurt, example) if changed else None


_BLOCK = 1_000_000  # elements that are compared at a time


def _largest(then: Array, now: Array) -> float:
    """The largest absolute difference; NaN if none is a number."""
    if not then.size:
        return math.nan
    with np.errstate(all="ignore"):
        if then.dtype.kind in "iu":  # what overflows is right once it is read without a sign
            gap: Any = np.maximum(then, now) - np.minimum(then, now)
            return float(gap.view(f"u{gap.itemsize}").max())
        wide = complex if then.dtype.kind == "c" else float
        return float(np.fmax.reduce(np.abs(then.astype(wide) - now.astype(wide))))


def _row(found: _Difference) -> tuple[str, ...]:
    """The line of the table."""
    array = next(each for each in (found.before, found.after) if each is not None)
    differ, largest, frozen = "", "", ""
    if found.changed is not None:
        differ = f"{found.changed:,} of {math.prod(array.shape):,}"
        largest = f"{found.largest:.3g}"
        frozen = f"{found.frozen:,}, {found.first}" if found.frozen else ""
    elif found.before and found.after:
        differ = f"became {spec(found.after.shape, found.after.dtype)}"
    else:
        differ = f"only in {'A' if found.before else 'B'}"
    if found.frozen and not frozen:
        frozen = f"{found.frozen:,}"
    return found.path, spec(array.shape, array.dtype), differ, largest, frozen


def _of_difference(found: _Difference) -> dict[str, Any]:
    largest = found.largest if math.isfinite(found.largest) else str(found.largest)
    return {
        "path": found.path,
        "before": found.before and _of_array(found.before),
        "after": found.after and _of_array(found.after),
        "changed": found.changed,
        "largest": None if found.changed is None else largest,  # JSON has no NaN
        "frozen": found.frozen,
    }
