"""Rules as plain data: dicts, lists, text and numbers, for configurations and files."""

import base64
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lrmult.recipes as recipes
from lrmult._errors import LrmultError, MultiplierError, PatternError, RuleError, show
from lrmult._levels import PyTree
from lrmult._multipliers import is_array, is_schedule
from lrmult._of_type import OfType
from lrmult._patterns import Span
from lrmult._regions import Flags, Index
from lrmult._rules import Rule, Rules, name_rule
from lrmult._schedules import During
from lrmult._structure import Structure
from lrmult._targets import Along, Elements, Neurons, Part, Target, along, elements, neurons, rows

_PARTS = ("neurons", "rows", "elements", "axis", "index")
_MOST_REPEATED = 1_000_000
_EXAMPLES = {
    "rule": ", such as {'target': 'head', 'multiplier': 10}",
    "file of rules": ": {'rules': [{'target': 'head', 'multiplier': 10}]}",
}
# Possessive, so that a long text of spaces is read in one go.
_SLICE = re.compile(r"\s*+(-?[0-9]+)?\s*+:\s*+(-?[0-9]+)?\s*+(?::\s*+(-?[0-9]+)?\s*+)?")
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}
# Those that return one list of rules.
_RECIPES: dict[str, Callable[..., Rules]] = {
    name: getattr(recipes, name)
    for name in recipes.__all__
    if name not in ("depths", "unfreezing_stages")
}


def write_rules(rules: Rules) -> dict[str, Any]:
    """What `Rules.to_dict` returns."""
    return {"rules": [_write_rule(index, rule) for index, rule in enumerate(rules)]}


def read_rules(data: Any, params: PyTree, structure: Structure | None) -> Rules:
    """What `Rules.from_dict` returns."""
    if isinstance(data, Rules):
        return data
    items = data if _is_list(data) else _table(data, "file of rules", {"rules"}).get("rules")
    if items is None or not _is_list(items):
        raise RuleError(
            f"{show(data)} holds no list of rules; write one under 'rules', such as {{'rules': "
            "[{'target': 'head', 'multiplier': 10}]}"
        )
    _check_repeats(items)
    found: list[Rule] = []
    for index, item in enumerate(items):
        try:
            found.extend(_read_item(item, params, structure))
        except LrmultError as error:
            raise type(error)(f"rule {index} ({show(item)}): {error}") from error.__cause__
        except RecursionError:
            raise RuleError(f"rule {index} is nested too deeply") from None
    return Rules(found)


def _check_repeats(data: Any) -> None:
    """Refuse data that holds parts of itself so many times over that it could never be read.

    Raises:
        RuleError: if it does.
    """
    counts: dict[int, int] = {}  # by container, how many values it stands for
    written = 0

    def count(value: Any) -> int:
        nonlocal written
        if id(value) in counts:
            return counts[id(value)]
        written += 1
        if not isinstance(value, list | tuple | Mapping):
            return 1
        counts[id(value)] = 0  # what a container within itself adds
        inside = value.values() if isinstance(value, Mapping) else value
        counts[id(value)] = 1 + sum(map(count, inside))
        return counts[id(value)]

    try:
        repeated = count(data) - written
    except RecursionError:
        raise RuleError("the rules are nested too deeply") from None
    if repeated > _MOST_REPEATED:
        raise RuleError(
            f"the same lists or tables stand in the rules so often (aliases in YAML) that they add "
            f"more than {_MOST_REPEATED:,} values; write fewer of them"
        )


def load_rules(
    path: str | os.PathLike[str], params: PyTree = None, *, structure: Structure | None = None
) -> Rules:
    """Read rules from a file: TOML, YAML (with PyYAML) or JSON, as its name ends.

    The file holds what `Rules.to_dict` returns, whose docstring describes it.

    Args:
        path: the file.
        params: the parameters, or their shapes; for recipes that are called by name.
        structure: as for `compile_rules`; for these too.

    Returns:
        The rules.

    Raises:
        RuleError: if the file cannot be read, or holds something else.
        LrmultError: as `Rules` and the recipes do.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lrmult as lm
        >>> file = Path(tempfile.mkdtemp(), "rules.toml")
        >>> _ = file.write_text('''
        ... [[rules]]
        ... target = "encoder/layers[:4]"
        ... multiplier = "frozen"
        ...
        ... [[rules]]
        ... target = "embed"
        ... rows = "-10:"
        ... multiplier = 10
        ... ''')
        >>> lm.load_rules(file)
        Rules([('encoder/layers[:4]', None), (rows('embed', slice(-10, None)), 10.0)])
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in _PARSERS:
        raise RuleError(
            f"{str(file)!r}: its name ends in {file.suffix!r}, and rules are read from "
            f"{', '.join(_PARSERS)}"
        )
    try:
        data = _PARSERS[kind](file.read_text(encoding="utf-8-sig"))
        return read_rules(data, params, structure)
    except LrmultError as error:
        raise type(error)(f"{str(file)!r}: {error}") from error.__cause__
    except OSError as error:
        raise RuleError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise RuleError(f"{str(file)!r} is nested too deeply") from None
    except ValueError as error:
        name = {".yml": "YAML"}.get(kind, kind[1:].upper())
        hint = " (quote patterns that begin with *)" if "alias" in str(error) else ""
        raise RuleError(f"{str(file)!r} is no {name}: {error}{hint}") from error


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RuleError("to read YAML takes PyYAML: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> Any:
        merge = "tag:yaml.org,2002:merge"
        keys = [loader.construct_object(key) for key, _ in node.value if key.tag != merge]
        _without_repeats([(key, None) for key in keys])
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    def number(read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        # YAML 1.1 counts to the base of 60: it would read the slice 1:30 as 90.
        return lambda loader, node: node.value if ":" in node.value else read(loader, node)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for name, read in [("int", Loader.construct_yaml_int), ("float", Loader.construct_yaml_float)]:
        Loader.add_constructor(f"tag:yaml.org,2002:{name}", number(read))
    try:
        return yaml.load(text, Loader)
    except (LrmultError, RecursionError):
        raise
    except Exception as error:  # PyYAML raises whatever a wrong tag leads to: !!bool x a KeyError
        raise ValueError(str(error) or type(error).__name__) from error


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
}


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict; where JSON and YAML would keep the last of two values of one key, an error."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RuleError(f"the key {show(key)} stands twice in one table")
        found[key] = value
    return found


def _write_rule(index: int, rule: Rule) -> dict[str, Any]:
    try:
        found = _write_part(rule.target)
        found["multiplier"] = _write_multiplier(rule.multiplier)
    except LrmultError as error:
        raise type(error)(f"{name_rule(index, *rule)} cannot be written: {error}") from None
    if rule.optional:
        found["optional"] = True
    return found


def _write_multiplier(multiplier: Any) -> Any:
    if isinstance(multiplier, During):
        fields = dataclasses.asdict(multiplier)
        return {name: value for name, value in fields.items() if value is not None}
    if is_schedule(multiplier):
        raise MultiplierError("a function is no data; of schedules lrmult.During can be written")
    if is_array(multiplier):
        raise MultiplierError("an array of JAX is known at run time only; write float(...) of it")
    return "frozen" if multiplier is None else multiplier


def _write_part(target: Target) -> dict[str, Any]:
    """A table with a target, and what part of it is meant."""
    if not isinstance(target, Part):
        return {"target": _write_target(target)}
    inner = target.target
    table = {"target": _write_part(inner) if isinstance(inner, Part) else _write_target(inner)}
    match target.restriction:
        case Elements() as mask:
            table["elements"] = _write_mask(mask)
        case Neurons(axis, index):
            table["neurons"] = _write_index(index)
            if axis is not None:
                table["axis"] = axis
        case Along(axis, index) if not target.by_rows:
            table |= {"axis": axis, "index": _write_index(index)}
        case Along(_, index):
            table["rows"] = _write_index(index)
    return table


def _write_target(target: Target) -> Any:
    if isinstance(target, str):
        return str(target)
    if isinstance(target, OfType):
        return {"types": target.text, "paths": sorted(map(list, target.paths))}
    if target is ...:
        return {"everything": True}
    if isinstance(target, tuple):
        return {"path": [*map(_write_target, target)]}
    if isinstance(target, slice):
        ends = target.start, target.stop, target.step
        return {"slice": _write_span(Span(*(None if end is None else int(end) for end in ends)))}
    if isinstance(target, re.Pattern):
        flags = "".join(letter for letter, flag in _FLAGS.items() if target.flags & flag)
        return {"regex": target.pattern} | ({"flags": flags} if flags else {})
    if callable(target):
        raise PatternError(
            "a function is no data; write a pattern, such as '**/bias', or a regular expression"
        )
    return int(target)


def _write_index(index: Index) -> Any:
    if isinstance(index, Span):
        return _write_span(index)
    if isinstance(index, Flags):
        return index.vector.tolist()
    return list(index) if isinstance(index, tuple) else index


def _write_span(span: Span) -> str:
    ends = span if span.step is not None else span[:2]
    return ":".join("" if end is None else str(end) for end in ends)


def _write_mask(mask: Elements) -> dict[str, Any]:
    dense = np.zeros(mask.shape, np.bool_) if mask.region is None else mask.region.dense(mask.shape)
    bits = base64.b64encode(np.packbits(dense).tobytes()).decode()
    return {"shape": [*mask.shape], "bits": bits}


def _read_item(item: Any, params: PyTree, structure: Structure | None) -> Rules:
    """The rule that a table is, or those of a recipe."""
    if isinstance(item, Rule):
        return Rules([item])
    table = _table(item, "rule")
    if "recipe" in table:
        return _read_recipe(table, params, structure)
    table = _table(item, "rule", {"target", *_PARTS, "multiplier", "optional"})
    for key in ("target", "multiplier"):
        if key not in table:
            raise RuleError(f"it has no {key!r}; write {{'target': 'head', 'multiplier': 10}}")
    is_optional = table.pop("optional", None)
    is_optional = False if is_optional is None else is_optional
    if not isinstance(is_optional, bool):
        raise RuleError(f"'optional' is {show(is_optional)}; write true or false")
    multiplier = _read_multiplier(table.pop("multiplier"))
    return Rules([Rule(_read_part(table), multiplier, optional=is_optional)])


def _read_multiplier(value: Any) -> Any:
    if value is None or value == "frozen":
        return None
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            raise MultiplierError(
                f"the multiplier {value!r} is text, not a number; write {number!r} without quotes "
                "(YAML takes 1e-3 for text, and 1.0e-3 for a number)"
            )
        raise MultiplierError(f"{value!r} is no multiplier; write a number, or 'frozen'")
    if _is_table(value):
        table = _table(value, "multiplier", {"multiplier", "start", "stop"})
        start = table.get("start")
        return During(
            table.get("multiplier", 1.0), 0 if start is None else start, table.get("stop")
        )
    return value


def _read_part(table: dict[str, Any]) -> Target:
    """The target that a table names, or the part of it."""
    value = table["target"]
    target = _read_target(value)
    given = {name: table[name] for name in _PARTS if table.get(name) is not None}
    if not given:
        return target
    axis: Any = given.get("axis")
    match sorted(given):
        case ["neurons"] | ["axis", "neurons"]:
            return neurons(target, _read_index(given["neurons"]), axis)
        case ["rows"]:
            return rows(target, _read_index(given["rows"]))
        case ["axis", "index"]:
            return along(target, axis, _read_index(given["index"]))
        case ["elements"]:
            return elements(target, _read_mask(given["elements"]))
    raise RuleError(
        f"it has {', '.join(map(repr, given))}; a part is 'axis' and 'index', or 'rows', or "
        "'neurons' (with or without 'axis'), or 'elements'; a part of a part has a table with the "
        "other part as its 'target'"
    )


def _read_target(value: Any) -> Target:
    if isinstance(value, Part | OfType | re.Pattern | slice) or value is ...:
        return value  # in a configuration that is a program
    if not _is_table(value):
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise PatternError(
            f"{show(value)} is no target; write a path or a pattern such as '**/bias', or a table: "
            "{'path': ['encoder', 'head']}, {'regex': '...'}, {'slice': '0:4'}, {'everything': "
            "true}"
        )
    table = _table(value, "target")
    if "target" in table:
        return _read_part(_table(value, "target", {"target", *_PARTS}))
    match sorted(table) if all(isinstance(key, str) for key in table) else []:
        case ["everything"] if table["everything"] is True:
            return ...
        case ["path"] if _is_list(table["path"]):
            return tuple(map(_read_target, table["path"]))
        case ["slice"] if isinstance(table["slice"], str):
            return _read_index(table["slice"])
        case ["regex"] | ["flags", "regex"]:
            return _read_regex(table["regex"], table.get("flags", ""))
        case ["paths", "types"] if _are_paths(table["paths"]) and isinstance(table["types"], str):
            return OfType(frozenset(map(tuple, table["paths"])), table["types"])
    raise PatternError(
        f"{show(value)} is no target; a table is one of {{'path': [...]}}, {{'regex': '...'}}, "
        "{'slice': '0:4'}, {'everything': true}, or holds a 'target' and a part of it"
    )


def _are_paths(value: Any) -> bool:
    """Whether it is a list of lists of text."""
    return _is_list(value) and all(
        _is_list(path) and all(isinstance(name, str) for name in path) for path in value
    )


def _read_regex(pattern: Any, letters: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise PatternError(f"'regex' is {show(pattern)}; write text, such as '.*/bias'")
    flags = re.NOFLAG
    for letter in letters if isinstance(letters, str) else [None]:
        if letter not in _FLAGS:
            raise PatternError(f"'flags' is {show(letters)}; write some of {''.join(_FLAGS)}")
        flags |= _FLAGS[letter]
    try:
        return re.compile(pattern, flags)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise PatternError(f"{show(pattern)} is no regular expression: {error}") from None


def _read_index(value: Any) -> Any:
    if not isinstance(value, str):
        return list(value) if _is_list(value) else value
    found = _SLICE.fullmatch(value)
    try:
        if found is None:
            raise ValueError
        return slice(*(None if end is None else int(end) for end in found.groups()))
    except ValueError:  # of an int of thousands of digits too
        raise PatternError(
            f"{show(value)} is no index; write an int, a list of ints, or a slice as text: '-10:'"
        ) from None


def _read_mask(value: Any) -> Any:
    if not _is_table(value):
        return value
    table = _table(value, "elements", {"shape", "bits"})
    try:
        shape = tuple(map(_read_size, table["shape"]))
        packed = np.frombuffer(base64.b64decode(table["bits"], validate=True), np.uint8)
        size = math.prod(shape)
        if packed.size != -(-size // 8):
            raise ValueError(f"{size} bits are no {packed.size} bytes")
        return np.unpackbits(packed, count=size).view(np.bool_).reshape(shape)
    except (KeyError, ValueError, TypeError) as error:
        raise PatternError(
            f"'elements' is {show(value)}, which is no mask ({error}); write lists of booleans, as "
            "deep as the array has axes"
        ) from None


def _read_size(value: Any) -> int:
    """The size of an axis."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{show(value)} is no size of an axis")
    return value


def _read_recipe(table: dict[str, Any], params: PyTree, structure: Structure | None) -> Rules:
    name = table.pop("recipe")
    recipe = _RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        raise RuleError(f"there is no recipe {show(name)}{_near(name, _RECIPES)}")
    if params is None:
        raise RuleError(f"the recipe {name!r} needs the parameters: pass params")
    known = [each for each in inspect.signature(recipe).parameters if each != "params"]
    table = _table(table, f"call of {name}", {*known} - {"structure"})
    arguments = {
        key: _ARGUMENTS.get(key, lambda given: _read_argument(given, params, structure))(value)
        for key, value in table.items()
    }
    try:
        inspect.signature(recipe).bind(params, **arguments)
    except TypeError as error:
        raise RuleError(f"the recipe {name!r}: {error}") from None
    return recipe(params, **arguments, structure=structure)


def _read_argument(value: Any, params: PyTree, structure: Structure | None) -> Any:
    """A number, a target, a list of some, or the groups of a stack."""
    if _is_list(value):
        read: list[Any] = []
        for each in value:
            found = _read_argument(each, params, structure)
            is_stack = _is_table(each) and "stack" in _table(each, "stack")
            read += found if is_stack else [found]
        return read
    if not _is_table(value):
        return value
    if "stack" not in _table(value, "stack"):
        return _read_target(value)
    table = _table(value, "stack", {"stack", "below", "above", "with_last", "axis"})
    arguments = {key: _read_argument(each, params, structure) for key, each in table.items()}
    return recipes.depths(params, arguments.pop("stack"), **arguments, structure=structure)


def _read_path(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_shapes(value: Any) -> PyTree:
    """A tree of shapes, by path."""
    try:
        return {
            _read_path(path): jax.ShapeDtypeStruct(tuple(map(_read_size, shape)), np.float32)
            for path, shape in _table(value, "base").items()
        }
    except (TypeError, ValueError):
        raise RuleError(
            f"'base' is {show(value)}; write a table with the shape of every array of the base "
            "model, by its path: {'head/kernel': [64, 10]}"
        ) from None


# How the arguments of recipes are read that are neither numbers nor targets.
_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "index": _read_index,
    "base": _read_shapes,
    "every": lambda value: list(value) if _is_list(value) else value,
}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_table(value: Any) -> bool:
    if isinstance(value, type):
        return False
    is_config = hasattr(value, "items") and hasattr(value, "keys")  # as those of ml_collections
    is_record = dataclasses.is_dataclass(value)
    return isinstance(value, Mapping) or is_config or is_record


def _table(value: Any, what: str, known: set[str] | None = None) -> dict[str, Any]:
    """A dict of what a table holds; what a dataclass leaves None is not there."""
    if isinstance(value, str) or not _is_table(value):
        raise RuleError(f"{show(value)} is no table, and a {what} is one" + _EXAMPLES.get(what, ""))
    if dataclasses.is_dataclass(value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        kept = ("multiplier",)
        found = {key: each for key, each in fields.items() if each is not None or key in kept}
    else:
        found = dict(value.items())
    for key in found:
        if known is not None and key not in known:
            raise RuleError(f"a {what} has no {show(key)}{_near(key, known)}")
    return found


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(name if isinstance(name, str) else "", sorted(known), 1)
    listed = ", ".join(map(repr, sorted(known)))
    return f"; did you mean {near[0]!r}?" if near else f"; there are {listed}"
