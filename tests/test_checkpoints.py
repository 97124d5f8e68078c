import importlib
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile

import flax.linen as nn
import flax.serialization
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx
from flax.training import train_state
from hypothesis import given, settings

import lrmult as lm
from lrmult._checkpoints import CheckpointError, read_checkpoint

PARAMS = {
    "embed": {"embedding": jnp.arange(12, dtype=jnp.bfloat16).reshape(6, 2)},
    "layers_0": {"kernel": jnp.array([[1.0, -0.0], [jnp.nan, 2.0]]), "bias": jnp.ones(2)},
    "layers_1": {"kernel": jnp.ones((2, 2), jnp.float16), "bias": jnp.zeros(2)},
    "count": jnp.array(3, jnp.int32),
    "mask": jnp.array([True, False, True]),
    "nothing": jnp.zeros((0, 4)),
    "odd {name}*": jnp.ones(1, jnp.uint8),
}


def flat(tree, separator="/"):
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def save_orbax(tree, path):
    import orbax.checkpoint as ocp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(path), tree)


def save_msgpack(tree, path):
    path.write_bytes(flax.serialization.to_bytes(tree))


def save_npz(tree, path):
    np.savez(path, **flat(tree))


def save_compressed(tree, path):
    np.savez_compressed(path, **flat(tree))


def save_safetensors(tree, path):
    safetensors.flax.save_file(flat(tree), path)


FORMATS = {
    "orbax": (save_orbax, "orbax"),
    "msgpack": (save_msgpack, "model.msgpack"),
    "npz": (save_npz, "model.npz"),
    "compressed": (save_compressed, "compressed.npz"),
    "safetensors": (save_safetensors, "model.safetensors"),
}
FILES = [name for name in FORMATS if name != "orbax"]


def save(name, tree, folder):
    write, file = FORMATS[name]
    path = pathlib.Path(folder, file)
    write(tree, path)
    return path


def described(tree):
    read = jax.tree.leaves(tree)
    return {path: (leaf.shape, leaf.dtype) for path, leaf in zip(lm.paths(tree), read, strict=True)}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_is_what_was_saved(name, tmp_path):
    params = PARAMS
    if name == "orbax":  # which refuses arrays without elements
        params = {key: value for key, value in PARAMS.items() if key != "nothing"}
    checkpoint = read_checkpoint(save(name, params, tmp_path))
    assert described(checkpoint.shapes) == described(params)
    assert list(checkpoint.arrays) == lm.paths(params)
    for path, saved in zip(lm.paths(params), jax.tree.leaves(params), strict=True):
        found = checkpoint.read(path)
        assert found.dtype == saved.dtype, path
        assert np.asarray(found).tobytes() == np.asarray(saved).tobytes(), path


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.relu(nn.Dense(4, kernel_init=init)(x))
        return nn.Dense(3, param_dtype=jnp.bfloat16)(x)


@pytest.fixture(scope="module")
def linen_params():
    return Mlp().init(jax.random.key(0), jnp.ones((1, 2)))["params"]


@pytest.mark.parametrize("name", ["msgpack", "orbax"])
def test_a_train_state_of_linen(name, linen_params, tmp_path):
    state = train_state.TrainState.create(apply_fn=None, params=linen_params, tx=optax.adamw(1e-3))
    checkpoint = read_checkpoint(save(name, state, tmp_path))
    assert {path.partition("/")[0] for path in checkpoint.arrays} == {"params", "opt_state", "step"}
    inside = checkpoint.at("params")
    assert described(inside.shapes) == described(linen_params)  # boxes do not show
    [saved] = jax.tree.leaves(linen_params["Dense_0"]["kernel"])
    assert inside.read("Dense_0/kernel").tobytes() == np.asarray(saved).tobytes()
    assert list(checkpoint.at("opt_state/0/mu/Dense_1").arrays) == ["bias", "kernel"]
    assert list(checkpoint.at("opt_state[0]/mu/Dense[-1]").arrays) == ["bias", "kernel"]
    assert list(checkpoint.at("params/Dense_1/bias").arrays) == [""]
    assert lm.paths(checkpoint.at("params/Dense_1/bias").shapes) == [""]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.value = nnx.Linear(2, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


@pytest.mark.parametrize("kind", [nnx.Param, ...])
def test_a_state_of_nnx(kind, tmp_path):
    net = Net(nnx.Rngs(0))
    checkpoint = read_checkpoint(save("orbax", nnx.state(net, kind), tmp_path))
    params = nnx.state(net, nnx.Param)
    found = described(checkpoint.shapes)
    assert {path: found[path] for path in lm.paths(params)} == described(params)
    assert len(found) == len(jax.tree.leaves(nnx.state(net, kind)))
    rules = [("layers[-1]", None), ("value", 2), ("layers[:10]", 3)]
    plan, there = (lm.compile_rules(rules, tree) for tree in (params, checkpoint.shapes))
    multipliers = {leaf.path: leaf.multiplier for leaf in there.leaves}
    assert {leaf.path: multipliers[leaf.path] for leaf in plan.leaves} == {
        leaf.path: leaf.multiplier for leaf in plan.leaves
    }


def test_a_module_called_value_is_no_box(tmp_path):
    params = {"attention": {"value": {"kernel": jnp.ones(2)}}, "value": jnp.ones(3)}
    for name in FORMATS:
        checkpoint = read_checkpoint(save(name, params, tmp_path))
        assert list(checkpoint.arrays) == ["attention/value/kernel", "value"]
    alone = read_checkpoint(save("msgpack", {"value": jnp.ones(3)}, tmp_path))
    assert list(alone.arrays) == ["value"]
    flat_names = read_checkpoint(save("npz", {"a": {"value": jnp.ones(3)}}, tmp_path))
    assert list(flat_names.arrays) == ["a/value"]


@pytest.mark.parametrize("name", ["msgpack", "orbax"])
def test_lists_are_positions(name, tmp_path):
    params = {"layers": [{"w": jnp.full(1, i)} for i in range(12)]}
    checkpoint = read_checkpoint(save(name, params, tmp_path))
    rules = [("layers[:3]", None), ("layers[-1]", 2), ("layers/10", 3)]
    plans = [lm.compile_rules(rules, tree) for tree in (params, checkpoint.shapes)]
    of_path = [{leaf.path: leaf.multiplier for leaf in plan.leaves} for plan in plans]
    assert of_path[0] == of_path[1]
    assert checkpoint.read("layers/11/w") == [11]


def test_msgpack_of_all_kinds(tmp_path):
    tree = {
        "int": 3,
        "negative": -7,
        "large": [-200, -40_000, -3_000_000_000, 200, 40_000, 3_000_000_000, 2**63],
        "float": 1.5,
        "bool": True,
        "complex": 1 + 2j,
        "scalar": np.float32(2.5),
        "text": "a" * 40,
        "long text": "b" * 70_000,
        "bytes": b"c" * 300,
        "none": None,
        "empty": {},
        "many": {f"k{i}": np.int8(i) for i in range(20)},
        "wide": np.ones((3, 70_000), np.int8),
    }
    path = tmp_path / "all.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    checkpoint = read_checkpoint(path)
    given = {key: value for key, value in tree.items() if "text" not in key and key != "bytes"}
    assert list(checkpoint.arrays) == sorted(flat(given), key=lambda path: path.split("/"))
    for name, value in flat(given).items():
        assert np.array_equal(checkpoint.read(name), value), name
    assert checkpoint.shapes["none"] is None
    assert checkpoint.shapes["empty"] == {}


def test_arrays_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    params = {"large": jnp.arange(300.0).reshape(3, 100), "small": jnp.ones(2)}
    path = save("msgpack", params, tmp_path)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    checkpoint = read_checkpoint(path)
    assert described(checkpoint.shapes) == described(params)
    assert np.array_equal(checkpoint.read("large"), params["large"])


def test_npz_of_all_kinds(tmp_path):
    path = tmp_path / "all.npz"
    arrays = {
        "swapped": np.arange(3, dtype=">f4"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "complex": np.ones(2, np.complex64),
        "text": np.array(["a", "b"]),
        "when": np.array("2020-01-01", "datetime64[D]"),
    }
    np.savez(path, **arrays)
    checkpoint = read_checkpoint(path)
    assert list(checkpoint.arrays) == ["complex", "fortran", "swapped"]
    assert checkpoint.arrays["swapped"].dtype == np.float32
    assert checkpoint.read("swapped").dtype == np.float32
    for name in checkpoint.arrays:
        assert np.array_equal(checkpoint.read(name), arrays[name])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}, 1], object), "'a' is an array of Python objects, a pickle"),
        (np.ones(2, jnp.float8_e4m3fn), r"'a' has the dtype \|V1, which JAX has not"),
        (np.ones(2, np.longdouble), "'a' has the dtype float128"),
        (np.zeros(2, [("x", "f4")]), "'a' has the dtype"),
    ],
)
def test_npz_of_what_is_no_parameter(array, message, tmp_path):
    np.savez(tmp_path / "a.npz", a=array)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.npz")


def test_separators_of_flat_names(tmp_path):
    arrays = {"model.layers.0.weight": np.ones(2), "model.layers.1.weight": np.ones(3)}
    for name in ("npz", "safetensors"):
        path = save(name, arrays, tmp_path)
        assert list(read_checkpoint(path).arrays) == list(arrays)
        split = read_checkpoint(path, separator=".")
        assert list(split.arrays) == ["model/layers/0/weight", "model/layers/1/weight"]
        assert list(split.at("model/layers[-1]").arrays) == ["weight"]
        assert split.read("model/layers/1/weight").shape == (3,)
    nested = save("msgpack", {"a.b": jnp.ones(2)}, tmp_path)
    assert list(read_checkpoint(nested, separator=".").arrays) == ["a.b"]


def test_a_path_that_leads_nowhere(tmp_path):
    path = save("npz", PARAMS, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"model.npz, at 'layer_0': .* did you mean 'layers_0'"
    ):
        read_checkpoint(path).at("layer_0")
    with pytest.raises(CheckpointError, match="write the path of one subtree, such as 'count'"):
        read_checkpoint(path).at("*")
    with pytest.raises(CheckpointError, match=r"at 'a\['"):
        read_checkpoint(path).at("a[")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": 1.0, "a/b": 2.0}, "an entry at 'a' and another below it, at 'a/b'"),
        ({"a.b": 1.0, "a/b": 2.0}, "two entries called 'a/b'"),
        ({}, "holds no arrays"),
    ],
)
def test_names_that_clash(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.npz", separator=".")


# ---- directories of Orbax


def test_the_one_checkpoint_in_a_directory(tmp_path):
    save("orbax", PARAMS["layers_0"], tmp_path)
    (tmp_path / "run" / "5").mkdir(parents=True)
    shutil.move(tmp_path / "orbax", tmp_path / "run" / "5" / "default")
    for path in ("run", "run/5", "run/5/default"):
        assert list(read_checkpoint(tmp_path / path).arrays) == ["bias", "kernel"]
        assert read_checkpoint(tmp_path / path).read("bias").tolist() == [1, 1]
    shutil.copytree(tmp_path / "run" / "5", tmp_path / "run" / "10")
    with pytest.raises(CheckpointError, match=r"2 checkpoints; write the path of one: .*/10/.*/5/"):
        read_checkpoint(tmp_path / "run")
    shutil.move(tmp_path / "run" / "10", tmp_path / "run" / "10.orbax-checkpoint-tmp")
    assert list(read_checkpoint(tmp_path / "run").arrays) == ["bias", "kernel"]
    with pytest.raises(CheckpointError, match="did not finish"):
        read_checkpoint(tmp_path / "run" / "10.orbax-checkpoint-tmp")


def test_other_directories(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of Orbax: it has nothing"):
        read_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"it has 'notes\.txt'"):
        read_checkpoint(tmp_path)
    save("npz", PARAMS, tmp_path)
    with pytest.raises(CheckpointError, match=r"write the path of a file: '.*model\.npz'"):
        read_checkpoint(tmp_path)


READ_ALL = """
import pathlib, sys
from lrmult._checkpoints import CheckpointError, read_checkpoint

for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        checkpoint = read_checkpoint(folder)
        for path in checkpoint.arrays:
            checkpoint.read(path).tobytes()
        print(folder.name, "whole")
    except CheckpointError as error:
        print(folder.name, str(folder) in str(error))
"""


def test_broken_orbax_checkpoints(tmp_path):
    whole = save("orbax", PARAMS["layers_0"], tmp_path)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    for i, file in enumerate(files):
        for keep in (0.5, None):
            broken = tmp_path / "broken" / f"{i}-{keep}"
            shutil.copytree(whole, broken)
            data = (broken / file).read_bytes()
            if keep is None:
                (broken / file).unlink()
            else:
                (broken / file).write_bytes(data[: int(len(data) * keep)])
    # In a process of its own: threads of Orbax go on and complain after it has failed.
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path / "broken")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(lm.__file__).parents[1])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    outcomes = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(outcomes) == 2 * len(files)
    assert set(outcomes) == {"whole", "True"}


def test_orbax_where_it_is_not_installed(tmp_path, monkeypatch):
    path = save("orbax", PARAMS["layers_0"], tmp_path)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(CheckpointError, match="pip install orbax-checkpoint"):
        read_checkpoint(path)


def test_large_orbax_checkpoints_are_read_group_by_group(tmp_path, monkeypatch):
    monkeypatch.setattr("lrmult._checkpoints._GROUP", 40)
    params = {f"a{i:02}": jnp.full(i, float(i)) for i in range(1, 16)}
    checkpoint = read_checkpoint(save("orbax", params, tmp_path))
    for path in [*params, *reversed(params)]:
        assert np.array_equal(checkpoint.read(path), params[path])


# ---- what is no checkpoint, or a broken one


def read_or_refuse(path):
    """Read all there is; any exception but a CheckpointError goes through."""
    try:
        checkpoint = read_checkpoint(path)
        for name in checkpoint.arrays:
            np.asarray(checkpoint.read(name)).tobytes()
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        return False
    return True


def a_zip(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"something")
    return out.getvalue()


def an_npy():
    out = io.BytesIO()
    np.save(out, np.ones(3))
    return out.getvalue()


def a_safetensors(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


FOREIGN = {
    "empty": (b"", "is an empty file; expected an Orbax directory, a .safetensors"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "it is a PNG image"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "it is an HDF5 file"),
    "pickle": (pickle.dumps({"a": 1}), "it is a pickle.*convert it to .safetensors"),
    "npy": (an_npy(), r"a single array \(.npy\)"),
    "text": (b"learning_rate: 0.1\n", "it is text"),
    "zeros": (b"\0" * 100, "something else, or cut off"),
    "torch": (a_zip(["archive/data.pkl", "archive/data/0"]), "a file of PyTorch: convert it to"),
    "zip": (a_zip(["a.txt"]), r"no .npz, which holds nothing but .npy files: it has 'a\.txt'"),
    "zip of npy": (a_zip(["a.npy"]), "cannot be read as an .npz file; it is cut off or broken"),
    "short": (a_safetensors({"a": ENTRY}, b"\0" * 15), "should have 86 bytes, and has 85"),
    "header": (a_safetensors({"a": ENTRY})[:30], "is cut off"),
    "dtype": (a_safetensors({"a": {**ENTRY, "dtype": "F4"}}), "'a' has the dtype 'F4'"),
    "size": (a_safetensors({"a": {**ENTRY, "shape": [5]}}), r"should be float32\[5\], but has 16"),
    "shape": (a_safetensors({"a": {**ENTRY, "shape": [-4, -1]}}), r"has the shape \[-4, -1\]"),
    "start": (a_safetensors({"a": {**ENTRY, "data_offsets": [-16, 0]}}), "starts at byte -16"),
    "no offsets": (a_safetensors({"a": {"dtype": "F32"}}), "KeyError: 'data_offsets'"),
    "no entry": (a_safetensors({"a": []}), "cut off or broken"),
    "twice": (a_safetensors(b'{"a": 1, "a": 2}'), "a name stands there twice"),
    "no json": (a_safetensors(b'{"a":'), "cut off or broken"),
    "metadata": (a_safetensors({"__metadata__": {"x": "y"}}), "holds no arrays"),
    "no code": (b"\x81\xa1a\xc1", "cut off or broken"),
    "extension": (b"\x81\xa1a\xd4\x09\x00", "an extension of type 9"),
    "goes on": (b"\x81\xa1a\x01\x02", "it goes on after its end at byte 4"),
    "key": (b"\x81\xc0\x01", "a key of type NoneType"),
    "long": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "should have 4,294,967,303 bytes, and has 8"),
    "deep": (b"\x81\xa1a" * 5000, "cut off or broken"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_something_else(name, tmp_path):
    data, message = FOREIGN[name]
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file"):
        read_checkpoint(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        read_checkpoint(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path):
    path = save("npz", PARAMS, tmp_path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {name: save(name, PARAMS, folder).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_files_cut_off_anywhere(name, whole_files, tmp_path):
    data = whole_files[name]
    path = tmp_path / "cut"
    for length in range(0, len(data), 7 if len(data) > 700 else 1):
        path.write_bytes(data[:length])
        assert not read_or_refuse(path), length


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_files_with_wrong_bytes(name, data, whole_files, tmp_path_factory):
    broken = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"wrong bytes in {name}"
    path.write_bytes(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile and numpy warn of some damages
        read_or_refuse(path)


# ---- what is not read


def bytes_read():
    """How many bytes this process has asked the system for."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="nothing counts what is read")
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_not_read(name, tmp_path):
    numbers = np.random.default_rng(0).bytes(4_000_000)
    tree = {f"layer_{i}": np.frombuffer(numbers, np.float32).reshape(1000, -1) for i in range(4)}
    path = save(name, tree, tmp_path)
    read_checkpoint(path)  # imports what it needs
    before = bytes_read()
    checkpoint = read_checkpoint(path)
    assert bytes_read() - before < 1_000_000
    assert described(checkpoint.shapes) == described(tree)


@pytest.mark.skipif(sys.platform != "linux", reason="files may not be sparse")
def test_a_file_of_100_gigabytes(tmp_path):
    path = tmp_path / "sparse.safetensors"
    size = 10**10
    header = {
        f"layer_{i}": {
            "dtype": "BF16",
            "shape": [10**5, 50_000],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(10)
    }
    path.write_bytes(a_safetensors(header, b""))
    os.truncate(path, path.stat().st_size + 10 * size)
    checkpoint = read_checkpoint(path)
    assert len(checkpoint.arrays) == 10
    assert checkpoint.arrays["layer_9"].shape == (10**5, 50_000)
    assert checkpoint.read("layer_9")[-1, -1] == 0
