"""Checkpoints, read for what they hold: paths, shapes and dtypes at once, numbers when asked.

The reader of a format makes of a file a tree of dicts and lists in which a `Stored` stands for each
array. It reads what describes the arrays and skips the arrays themselves, so that neither time nor
memory depends on how large these are.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import math
import os
import pathlib
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from lrmult._errors import LrmultError, listing, shorten, show, spec
from lrmult._levels import PyTree
from lrmult._patterns import escape
from lrmult._resolving import Resolver

Array: TypeAlias = npt.NDArray[Any]
Names: TypeAlias = tuple[str, ...]


class CheckpointError(LrmultError):
    """A file that is no checkpoint, or a broken one."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a checkpoint.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        load: reads its numbers.
    """

    shape: tuple[int, ...]
    dtype: Any
    load: Callable[[], Array]


# JAX walks trees by recursion. Where that ends at Python's limit, the interpreter can call nothing
# from then on.
_DEEPEST = 400

# Dicts and lists; at their ends `Stored` arrays and numbers, None in holes, and texts.
Tree: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: where it is.
        kind: its format, in words.
        is_flat: whether the format knows no trees, so that each array has a whole path as its name.
        entries: by the names along its path, each array; None where there is a hole, and an empty
            container where one holds nothing.
    """

    path: str
    kind: str
    is_flat: bool
    entries: Mapping[Names, Any]

    @functools.cached_property
    def arrays(self) -> dict[str, Stored]:
        """The arrays by path, as `lrmult.paths` would list these."""
        return {
            "/".join(map(escape, names)): entry
            for names, entry in self.entries.items()
            if isinstance(entry, Stored)
        }

    @functools.cached_property
    def shapes(self) -> PyTree:
        """A tree of dicts, with a `jax.ShapeDtypeStruct` for each array."""
        above: dict[str, Any] = {}  # holds the tree
        for names, entry in self.entries.items():
            line = ("", *names)
            node = functools.reduce(lambda node, name: node.setdefault(name, {}), line[:-1], above)
            is_array = isinstance(entry, Stored)
            node[line[-1]] = jax.ShapeDtypeStruct(entry.shape, entry.dtype) if is_array else entry
        return above[""]

    def read(self, path: str) -> Array:
        """The numbers of one array."""
        with _blamed(self.path, self.kind):
            return self.arrays[path].load()

    def at(self, target: str) -> "Checkpoint":
        """The part of it that a path leads to.

        Raises:
            CheckpointError: if nothing is there, or if several parts may be meant.
        """
        call = f"{self.path}, at {target!r}"
        view = Resolver(self.shapes, None)
        try:
            chosen = view.resolve(target, call)
        except LrmultError as error:
            raise CheckpointError(str(error)) from error
        if chosen.node is not None:
            top = view.names_at(chosen.node)
        elif chosen.leaf is not None:
            top = view.names(chosen.leaf)
        else:
            one = view.path(next(iter(chosen.parts)))
            raise CheckpointError(f"{call}: write the path of one subtree, such as {one!r}")
        inside = {
            names[len(top) :]: entry
            for names, entry in self.entries.items()
            if names[: len(top)] == top
        }
        return dataclasses.replace(self, entries=inside)


def read_checkpoint(path: str | os.PathLike[str], *, separator: str | None = None) -> Checkpoint:
    """Read what a checkpoint holds, but not the numbers.

    Its contents tell which format it has, not its name. In the formats that know trees (Orbax,
    msgpack) a dict with one array under the key ``value``, and with nothing else, stands for that
    array: so a box is saved, an NNX ``Variable`` or a Linen ``Partitioned``, and boxes do not show
    in the paths of a model either.

    Args:
        path: an Orbax checkpoint, a ``.safetensors`` or ``.npz`` file, or a ``.msgpack`` file of
            Flax; a directory with one checkpoint in it, and no more, stands for that one.
        separator: what separates the names along a path in flat formats, beside ``/``.

    Returns:
        The checkpoint, with its arrays in the order of their paths.

    Raises:
        CheckpointError: if it cannot be read, with what was seen.
    """
    path = os.fspath(path)
    with _blamed(path, "a checkpoint"):
        kind = _kind_of(path)
    with _blamed(path, kind.name):
        tree = kind.read(path)
        separator = separator if kind.is_flat else None
        found = _unique(path, _ends(tree, separator=separator, has_boxes=not kind.is_flat))
    return Checkpoint(path, kind.name, kind.is_flat, dict(sorted(found.items())))


@contextlib.contextmanager
def _blamed(path: str, kind: str) -> Iterator[None]:
    """Make one error of all that is raised for a file that is broken or out of reach."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, numpy, json and orbax raise what they like
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise CheckpointError(
            f"{path} cannot be read as {kind}; it is cut off or broken ({reason})"
        ) from error


def _ends(
    tree: Tree, names: Names = (), *, separator: str | None = None, has_boxes: bool = False
) -> Iterator[tuple[Names, Any]]:
    """The arrays, holes and empty containers of a tree, with the names on the way."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, bool | int | float | complex):
        number = np.asarray(tree)
        tree = Stored((), number.dtype, lambda: number)
    if isinstance(tree, Stored) or tree in (None, {}):
        yield names, tree
    elif not isinstance(tree, dict):
        return  # a text, which is no parameter
    elif has_boxes and names and [*tree] == ["value"] and isinstance(tree["value"], Stored):
        yield names, tree["value"]
    else:
        for key, child in tree.items():
            text = str(key).replace(separator, "/") if separator else str(key)
            below = (*names, *text.split("/"))
            yield from _ends(child, below, separator=separator, has_boxes=has_boxes)


def _unique(path: str, entries: Iterable[tuple[Names, Any]]) -> dict[Names, Any]:
    """The entries by name, if no name stands for two of them."""
    found: dict[Names, Any] = {}
    for names, entry in entries:
        if names in found:
            raise CheckpointError(f"{path} has two entries called {shorten('/'.join(names))!r}")
        found[names] = entry
    for names in found:
        if len(names) > _DEEPEST:
            shown = shorten("/".join(names))
            raise CheckpointError(
                f"{path} has a path of {len(names):,} names, {shown!r}; more than {_DEEPEST} are "
                "too many for JAX"
            )
        for depth in range(len(names)):
            if names[:depth] in found:
                above, below = (shorten("/".join(each)) for each in (names[:depth], names))
                raise CheckpointError(
                    f"{path} has an entry at {above!r} and another below it, at {below!r}; rename "
                    "one of them"
                )
    if not any(isinstance(entry, Stored) for entry in found.values()):
        raise CheckpointError(f"{path} holds no arrays")
    return found


# ---- which format a file has


@dataclasses.dataclass(frozen=True)
class _Kind:
    name: str
    is_flat: bool
    read: Callable[[str], Tree]


_EXPECTED = "an Orbax directory, a .safetensors or .npz file, or a .msgpack file of Flax"

# How files begin that are taken for checkpoints now and then, and what to do about it.
_FOREIGN = (
    (b"\x80", "a pickle, which one would have to run to read it; convert it to .safetensors"),
    (b"\x93NUMPY", "a single array (.npy); save a dict of arrays with numpy.savez"),
    (b"\x89HDF", "an HDF5 file; load it and save its arrays with numpy.savez"),
    (b"\x1f\x8b", "compressed (gzip); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); unpack it first"),
    (b"\x89PNG", "a PNG image"),
    (b"GGUF", "a GGUF file"),
)
_MOST_HEADER = 100_000_000  # bytes; what the safetensors library allows


def _kind_of(path: str) -> _Kind:
    os.stat(path)  # raises if there is nothing
    if os.path.isdir(path):
        return _Kind("an Orbax checkpoint", False, _read_orbax)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is neither a file nor a directory")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is an empty file; expected {_EXPECTED}")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _Kind("an .npz file", True, _read_npz)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER:
        return _Kind("a .safetensors file", True, _read_safetensors)
    seen = next((what for start, what in _FOREIGN if head.startswith(start)), None)
    if seen is None and (0x80 < head[0] < 0x90 or head[0] in (0xDE, 0xDF)):  # a map
        return _Kind("a .msgpack file of Flax", False, _read_msgpack)
    if seen is None:
        text = head.decode("utf-8", "ignore")
        is_text = text and all(char.isprintable() or char.isspace() for char in text)
        seen = f"{'text' if is_text else 'something else, or cut off'} (it begins {head[:12]!r})"
    raise CheckpointError(f"{path} is no checkpoint: expected {_EXPECTED}, and it is {seen}")


def _stored(
    path: str, name: str, shape: Sequence[int], dtype: Any, start: int, size: int
) -> Stored:
    """An array whose bytes stand in a file as they are."""
    shape = tuple(shape)
    is_shape = all(type(length) is int and length >= 0 for length in shape)
    if not is_shape or (0 in shape and max(shape) > _LONGEST_EMPTY):
        raise CheckpointError(f"{path}: {shorten(name)!r} has the shape {show(list(shape))}")
    if math.prod(shape) * dtype.itemsize != size:
        raise CheckpointError(
            f"{path}: {shorten(name)!r} should be {spec(shape, dtype)}, but has {size:,} bytes"
        )

    def load() -> Array:
        if not size:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", start, shape)

    return Stored(shape, dtype, load)


_LONGEST_EMPTY = (
    2**24
)  # axis of an empty array: what looks at places along it takes memory for them


def _is_known(dtype: Any) -> bool:
    """Whether JAX has a dtype."""
    most = 16 if dtype.kind == "c" else 8
    is_number = dtype == np.bool_ or jnp.issubdtype(dtype, np.number)
    return bool(is_number) and dtype.itemsize <= most


def _cut_off(path: str, end: int, size: int) -> CheckpointError:
    seen = shorten(f"{end:,}", 40)
    return CheckpointError(f"{path} is cut off: it should have {seen} bytes, and has {size:,}")


# ---- .safetensors: the length of a header, the header in JSON, the bytes of the arrays

_SAFETENSORS = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def _read_safetensors(path: str) -> Tree:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise _cut_off(path, start, size)
        header = json.loads(file.read(start - 8), object_pairs_hook=_without_repeats)
    found: dict[str, Any] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise CheckpointError(f"{path}: {shorten(name)!r} has the dtype {entry['dtype']!r}")
        dtype = jnp.dtype(_SAFETENSORS[entry["dtype"]])
        first, end = entry["data_offsets"]
        if start + end > size:
            raise _cut_off(path, start + end, size)
        if first < 0:
            raise CheckpointError(f"{path}: {shorten(name)!r} starts at byte {first}")
        found[name] = _stored(path, name, entry["shape"], dtype, start + first, end - first)
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


# ---- .npz: a zip of .npy files


def _read_npz(path: str) -> Tree:
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        foreign = [name for name in archive.namelist() if not name.endswith(".npy")]
        if foreign:
            is_torch = any(name.endswith("data.pkl") for name in foreign)
            advice = "; it is a file of PyTorch: convert it to .safetensors" * is_torch
            raise CheckpointError(
                f"{path} is a zip, but no .npz, which holds nothing but .npy files: it has "
                f"{listing(map(shorten, foreign), 2)}{advice}"
            )
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                head = io.BytesIO(file.read(_MOST_NPY_HEADER))
            shape, dtype = _npy_header(head)
            size = member.file_size - head.tell()
            if dtype.kind in "SUmM":  # texts and times, which are no parameters
                continue
            dtype = _dtype_of_npy(path, name, dtype)
            checked = _stored(path, name, shape, dtype, 0, size)
            load = functools.partial(_load_npy, path, member.filename, dtype)
            if name in found:
                raise CheckpointError(f"{path} has two arrays called {shorten(name)!r}")
            found[name] = dataclasses.replace(checked, load=load)
    return found


_MOST_NPY_HEADER = 2**16  # bytes, of which NumPy takes fewer; a header may claim gigabytes


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    formats = np.lib.format
    is_first = formats.read_magic(file) == (1, 0)
    read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _dtype_of_npy(path: str, name: str, dtype: np.dtype[Any]) -> Any:
    if dtype.hasobject:
        raise CheckpointError(
            f"{path}: {shorten(name)!r} is an array of Python objects, a pickle that one would "
            "have to run to read it; save arrays of numbers"
        )
    if dtype == np.dtype("V2"):  # what NumPy writes for the one dtype of JAX that has two bytes
        return jnp.dtype("bfloat16")
    if not _is_known(dtype):
        raise CheckpointError(
            f"{path}: {shorten(name)!r} has the dtype {dtype}, which JAX has not; NumPy loses the "
            "dtypes of 8-bit floats, which .safetensors keeps"
        )
    return dtype.newbyteorder("=")


def _load_npy(path: str, member: str, dtype: Any) -> Array:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(dtype) if array.dtype.kind == "V" else array.astype(dtype, copy=False)


# ---- .msgpack: maps, in which an extension of type 1 is an array: its shape, dtype and bytes


class _Bytes(NamedTuple):
    """Where some bytes stand in a file that were not read."""

    start: int
    size: int


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# What a byte announces, and how the length of that is written, or the number itself.
_ANNOUNCED = {
    0xC4: ("bytes", ">B"),
    0xC5: ("bytes", ">H"),
    0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"),
    0xC8: ("extension", ">H"),
    0xC9: ("extension", ">I"),
    0xCA: ("number", ">f"),
    0xCB: ("number", ">d"),
    0xCC: ("number", ">B"),
    0xCD: ("number", ">H"),
    0xCE: ("number", ">I"),
    0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"),
    0xD1: ("number", ">h"),
    0xD2: ("number", ">i"),
    0xD3: ("number", ">q"),
    0xD9: ("text", ">B"),
    0xDA: ("text", ">H"),
    0xDB: ("text", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def _read_msgpack(path: str) -> Tree:
    with open(path, "rb") as file:
        walk = _Msgpack(path, file, os.path.getsize(path))
        tree = walk.value()
        if file.tell() < walk.size:
            raise ValueError(f"it goes on after its end at byte {file.tell():,}")
    return tree


@dataclasses.dataclass(frozen=True)
class _Msgpack:
    """A walk through a msgpack file, in which the bytes of arrays are skipped."""

    path: str
    file: BinaryIO
    size: int

    def value(self) -> Any:
        """The value that comes next."""
        [code] = self._read(1)
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        kind, count = self._announced(code)
        if kind == "map":
            found = {self._key(): self.value() for _ in range(count)}
            return self._joined(found) if "__msgpack_chunked_array__" in found else found
        if kind == "list":
            return [self.value() for _ in range(count)]
        if kind == "text":
            return self._read(count).decode()
        if kind == "bytes":
            return self._skip(count)
        if kind == "extension":
            return self._extension(count)
        return count

    def _announced(self, code: int) -> tuple[str, Any]:
        """What is announced, and its length; or a number."""
        if code < 0x90:
            return "map", code - 0x80
        if code < 0xA0:
            return "list", code - 0x90
        if code < 0xC0:
            return "text", code - 0xA0
        if 0xD4 <= code <= 0xD8:
            return "extension", 1 << (code - 0xD4)
        kind, layout = _ANNOUNCED[code]
        [number] = struct.unpack(layout, self._read(struct.calcsize(layout)))
        return kind, number

    def _key(self) -> str | int:
        key = self.value()
        if not isinstance(key, str | int):
            raise ValueError(f"a key of type {type(key).__name__}")
        return key

    def _extension(self, size: int) -> Stored | complex:
        [code] = self._read(1)
        end = self.file.tell() + size
        found: Stored | complex
        if code == 2:
            found = complex(*self.value())
        elif code in (1, 3):  # 3 is a scalar of NumPy
            shape, dtype, data = self.value()
            if not _is_known(jnp.dtype(dtype)):
                raise ValueError(f"an array of dtype {dtype}")
            found = _stored(self.path, "an array", shape, jnp.dtype(dtype), *data)
        else:
            raise ValueError(f"an extension of type {code}, which Flax does not write")
        if self.file.tell() != end:
            raise ValueError(f"an array that does not end at byte {end:,}")
        return found

    def _joined(self, chunked: dict[str | int, Any]) -> Stored:
        """An array that Flax wrote in pieces, since it is too large for msgpack."""
        shape = tuple(_listed(chunked["shape"]))
        chunks = _listed(chunked["chunks"])
        if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the pieces of an array do not add up to the shape {shape}")

        def load() -> Array:
            return np.concatenate([chunk.load() for chunk in chunks]).reshape(shape)

        return Stored(shape, chunks[0].dtype, load)

    def _read(self, size: int) -> bytes:
        start, _ = self._skip(size)
        self.file.seek(start)
        return self.file.read(size)

    def _skip(self, size: int) -> _Bytes:
        start = self.file.tell()
        if start + size > self.size:
            raise _cut_off(self.path, start + size, self.size)
        self.file.seek(size, os.SEEK_CUR)
        return _Bytes(start, size)


def _listed(numbered: dict[str, Any]) -> list[Any]:
    return [numbered[str(index)] for index in range(len(numbered))]


# ---- Orbax: directories, which its own library reads

_GROUP = 64_000_000  # bytes that are read at once: each call of Orbax takes a while


def _read_orbax(path: str) -> Tree:
    try:
        library = importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a directory; to read it as an Orbax checkpoint, pip install "
            f"orbax-checkpoint ({error})"
        ) from error
    return _Orbax(library, _orbax_directory(path)).tree


def _orbax_directory(path: str) -> str:
    """The one checkpoint in a directory: itself, an item, a step, or an item of a step."""
    top = pathlib.Path(path)
    marks = [mark for depth in ("", "*/", "*/*/") for mark in top.glob(f"{depth}_METADATA")]
    found = [mark.parent for mark in marks if ".orbax-checkpoint-tmp" not in str(mark)]
    if top in found or len(found) == 1:
        return os.path.abspath(found[0])
    if found:
        newest = sorted(map(str, found), key=_by_numbers, reverse=True)
        raise CheckpointError(
            f"{path} holds {len(found)} checkpoints; write the path of one: {listing(newest)}"
        )
    if marks or ".orbax-checkpoint-tmp" in path:
        raise CheckpointError(f"{path} is a checkpoint that Orbax did not finish writing")
    files = [str(each) for each in top.iterdir() if each.suffix in _SUFFIXES]
    if files:
        raise CheckpointError(
            f"{path} is a directory; write the path of a file: {listing(sorted(files))}"
        )
    inside = listing(sorted(each.name for each in top.iterdir()), 3) or "nothing"
    raise CheckpointError(f"{path} is a directory, but no checkpoint of Orbax: it has {inside}")


_SUFFIXES = (".safetensors", ".npz", ".msgpack")


def _by_numbers(path: str) -> list[Any]:
    """A key to sort by, in which numbers count as such."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", path)]


class _Orbax:
    """An Orbax checkpoint.

    Attributes:
        tree: what it holds.
    """

    def __init__(self, library: Any, directory: str) -> None:
        self._library, self._directory = library, directory
        # A checkpointer would log what is wrong with a checkpoint, and return nothing.
        with _quiet(), contextlib.closing(library.PyTreeCheckpointHandler()) as handler:
            metadata = handler.metadata(pathlib.Path(directory)).tree
        leaves = jax.tree.leaves(metadata)
        self._treedef: Any = jax.tree.structure(metadata)
        arrays = [self._stored(index, leaf) for index, leaf in enumerate(leaves)]
        self.tree: Tree = jax.tree.unflatten(self._treedef, arrays)
        self._groups = _groups(arrays)
        self._held: tuple[range, list[Any]] = range(0), []

    def _stored(self, index: int, leaf: Any) -> Stored | str:
        if getattr(leaf, "shape", None) is None or getattr(leaf, "dtype", None) is None:
            return ""  # a text
        return Stored(tuple(leaf.shape), jnp.dtype(leaf.dtype), lambda: self._load(index))

    def _load(self, index: int) -> Array:
        group = next(group for group in self._groups if index in group)
        if self._held[0] != group:
            self._held = range(0), []  # not two of them at a time
            self._held = group, self._restore(group)
        return np.asarray(self._held[1][index])

    def _restore(self, group: range) -> list[Any]:
        library, count = self._library, self._treedef.num_leaves
        wanted = [0 if i in group else library.PLACEHOLDER for i in range(count)]
        kinds = [library.RestoreArgs(restore_type=np.ndarray)] * count
        request = library.args.PyTreeRestore(
            item=self._treedef.unflatten(wanted), restore_args=self._treedef.unflatten(kinds)
        )
        with _quiet(), library.PyTreeCheckpointer() as reader:
            restored = reader.restore(self._directory, args=request)
        return list(self._treedef.flatten_up_to(restored))


def _groups(arrays: Sequence[Stored | str]) -> list[range]:
    """Neighbours that are to be read together."""
    groups, start, size = [], 0, 0
    for index, array in enumerate(arrays):
        own = 0 if isinstance(array, str) else math.prod(array.shape) * array.dtype.itemsize
        if size and size + own > _GROUP:
            groups.append(range(start, index))
            start, size = index, 0
        size += own
    return [*groups, range(start, len(arrays))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Orbax has to say about its own workings out of the output."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def ignore_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loops
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        # Not where it failed: other threads of it go on, and complain for a while.
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)
