"""What `lrmult explain` costs on a checkpoint of 2 GB, in every format that it reads.

Of each format a checkpoint of a transformer is made, of about 400 arrays in bfloat16 and float32,
and the command is run on it several times, in turns with a process that only imports what the
command needs (jax, optax, lrmult, and for Orbax its library). Two figures, medians over the runs:

* the time that the command takes beyond that of the imports: under 3 s;
* the memory at its peak: under 300 MB, of which importing jax takes most.

Run with ``python benchmarks/explain.py``; exits with 1 if a bound is missed.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import safetensors.numpy

BOUNDS = {"seconds beyond imports": 3.0, "peak memory in MB": 300.0}

RULES = """\
[[rules]]
target = "embed"
multiplier = "frozen"

[[rules]]
target = "layer[:14]"
multiplier = "frozen"

[[rules]]
target = "layer[20]/mlp/fc1"
neurons = [0, 1, 2]
multiplier = "frozen"

[[rules]]
target = "**/{bias,scale}"
multiplier = 0.5

[[rules]]
target = {everything = true}
multiplier = 0.1
"""

COMMAND = """\
import sys
from lrmult._command_line import main
status = main()
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak, file=sys.stderr)
sys.exit(status)
"""


def transformer(layers: int, width: int) -> Any:
    """The parameters of a transformer, 14 arrays a layer; all of them views of the same numbers."""
    numbers = np.random.default_rng(0).bytes(2 * max(4 * width * width, 32_000 * width))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
        return np.frombuffer(numbers, dtype, int(np.prod(shape))).reshape(shape)

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": array(inputs, outputs), "bias": array(outputs)}

    def layer() -> dict[str, Any]:
        return {
            "attention": {name: dense(width, width) for name in ("key", "out", "query", "value")},
            "mlp": {"fc1": dense(width, 4 * width), "fc2": dense(4 * width, width)},
            "norm": {name: array(width, dtype=np.float32) for name in ("scale", "bias")},
        }

    return {"embed": array(32_000, width)} | {f"layer_{i}": layer() for i in range(layers)}


def write_orbax(params: Any, path: pathlib.Path) -> None:
    """As `orbax.checkpoint` does it by itself."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)


def write_safetensors(params: Any, path: pathlib.Path) -> None:
    """With the library of that name."""
    safetensors.numpy.save_file(flat(params), path)


def write_npz(params: Any, path: pathlib.Path) -> None:
    """Uncompressed."""
    np.savez(path, **flat(params))


def write_compressed_npz(params: Any, path: pathlib.Path) -> None:
    """Compressed; random numbers stay as large as they are."""
    np.savez_compressed(path, **flat(params))


def write_msgpack(params: Any, path: pathlib.Path) -> None:
    """With Flax."""
    path.write_bytes(flax.serialization.to_bytes(params))


FORMATS: dict[str, tuple[Callable[[Any, pathlib.Path], None], str]] = {
    "Orbax": (write_orbax, "orbax"),
    "safetensors": (write_safetensors, "model.safetensors"),
    "npz": (write_npz, "model.npz"),
    "npz, compressed": (write_compressed_npz, "compressed.npz"),
    "msgpack": (write_msgpack, "model.msgpack"),
}


def flat(params: Any) -> dict[str, np.ndarray]:
    """Arrays by path."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def size_of(path: pathlib.Path) -> int:
    """The bytes of a file, or of all below a directory."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)


def run(*arguments: str) -> tuple[float, str]:
    """How long a Python process takes, and what it writes to stderr."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, done.stderr


def measure(path: pathlib.Path, rules: pathlib.Path, imports: str, runs: int) -> dict[str, Any]:
    """Run the command and the imports alone in turns; the first pair does not count."""
    whole, beyond, peaks = [], [], []
    for _ in range(runs + 1):
        alone, _ = run("-c", f"import {imports}")
        seconds, written = run("-c", COMMAND, "explain", str(path), "--rules", str(rules))
        whole.append(seconds)
        beyond.append(seconds - alone)
        peaks.append(int(written.split()[-1]) * 1024 / 1e6)
    return {
        "seconds": statistics.median(whole[1:]),
        "seconds beyond imports": statistics.median(beyond[1:]),
        "range": [min(beyond[1:]), max(beyond[1:])],
        "peak memory in MB": statistics.median(peaks[1:]),
    }


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="200 MB in place of 2 GB")
    parser.add_argument("--json", metavar="PATH", help="write the figures there too")
    options = parser.parse_args()
    params = transformer(28, 512) if options.quick else transformer(28, 1664)
    arrays = len(jax.tree.leaves(params))
    needed = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    report, missed = {}, False
    print(f"{'':16}{'size':>9}{'whole':>9}{'beyond imports':>26}{'peak memory':>15}")
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} are needed")
        rules = pathlib.Path(folder, "rules.toml")
        rules.write_text(RULES)
        for name, (write, file) in FORMATS.items():
            path = pathlib.Path(folder, file)
            write(params, path)
            imports = "jax, optax, lrmult" + ", orbax.checkpoint" * (name == "Orbax")
            found = measure(path, rules, imports, options.runs)
            found |= {"bytes": size_of(path), "arrays": arrays}
            report[name] = found
            missed |= any(found[figure] > most for figure, most in BOUNDS.items())
            low, high = found["range"]
            print(
                f"{name:16}{found['bytes'] / 1e9:>6.2f} GB{found['seconds']:>7.2f} s"
                f"{found['seconds beyond imports']:>9.2f} s ({low:.2f} to {high:.2f})"
                f"{found['peak memory in MB']:>12.0f} MB",
                flush=True,
            )
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    most = ", ".join(f"{figure} under {bound:g}" for figure, bound in BOUNDS.items())
    print(f"{arrays} arrays; bounds: {most}")
    if options.json:
        versions = {"jax": jax.__version__, "orbax": orbax.checkpoint.__version__}
        text = json.dumps({"versions": versions, "bounds": BOUNDS, "formats": report}, indent=2)
        pathlib.Path(options.json).write_text(text + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
