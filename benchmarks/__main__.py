"""All benchmarks, one after the other, each in a process of its own.

    python -m benchmarks [--quick] [--only NAME ...] [--output results]

What each prints is shown, and kept in a Markdown file, and its figures in a JSON file, both with
the machine and the versions. ``--quick`` takes under two minutes on a quiet machine, and leaves out
those that take longer. Exits with 1 if a bound is missed.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

ROOT = pathlib.Path(__file__).parent.parent


class Benchmark(NamedTuple):
    """A module, and what to pass it for a quick look (None: it takes too long)."""

    module: str
    quick: tuple[str, ...] | None


BENCHMARKS = [
    Benchmark("updates", ("--quick", "--pairs", "24")),
    Benchmark(
        "compile_rules", ("--pairs", "5", "--few", "1", "--rules", "200", "--trees", "transformer")
    ),
    Benchmark("parts", None),
    Benchmark("freezing", ("--only", "head", "--variants", "step", "--pairs", "2", "--depth", "5")),
    Benchmark("precompute", None),
    Benchmark("bandwidth", ("--elements", "4_000_000", "--pairs", "9")),
    Benchmark("explain", None),
    Benchmark("import_time", ("--runs", "2")),
]
PACKAGES = "jax", "jaxlib", "optax", "flax", "numpy", "lrmult"


def processor() -> str:
    """The name of the processor, where the system tells it."""
    facts = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", facts.read_text()) if facts.exists() else []
    return next(iter(names), platform.machine())


def machine() -> dict[str, Any]:
    """What is measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def run(benchmark: Benchmark, quick: bool) -> dict[str, Any]:
    """What a benchmark prints, its figures, and whether its bounds hold."""
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder, "figures.json")
        command = [sys.executable, "-m", f"benchmarks.{benchmark.module}"]
        command += benchmark.quick or () if quick else ()
        command += ["--json", str(figures)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return {
            "seconds": round(time.perf_counter() - start, 1),
            "holds": done.returncode == 0,
            "failed": not figures.exists(),
            "printed": done.stdout + (done.stderr if done.returncode else ""),
            "figures": json.loads(figures.read_text().replace(str(figures), figures.name))
            if figures.exists()
            else None,
        }


def markdown(about: dict[str, Any], results: dict[str, Any]) -> str:
    """All that was printed, on one page."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in about.items())
    verdicts = "\n".join(
        f"| [{name}](#{name}) | {'yes' if each['holds'] else '**no**'} | {each['seconds']} |"
        for name, each in results.items()
    )
    pages = "\n".join(
        f"## {name}\n\n```\n{each['printed'].rstrip()}\n```\n" for name, each in results.items()
    )
    return (
        f"# What was measured\n\n| | |\n| --- | --- |\n{facts}\n\n"
        f"| benchmark | bounds hold | seconds |\n| --- | --- | --- |\n{verdicts}\n\n{pages}"
    )


def main() -> int:
    """Run, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [each.module for each in BENCHMARKS]
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", default="results", help="NAME.md and NAME.json (%(default)s)")
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or this process had most of a GPU
    about, results = machine(), {}
    chosen = [each for each in BENCHMARKS if each.module in (options.only or names)]
    if options.quick:
        chosen = [each for each in chosen if each.quick is not None]
    if not chosen:
        parser.error(f"{', '.join(options.only)} cannot be had with --quick")
    for benchmark in chosen:
        results[benchmark.module] = found = run(benchmark, options.quick)
        print(f"== {benchmark.module} ({found['seconds']} s)\n{found['printed']}", flush=True)
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(markdown(about, results))
    output.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1))
    failed = [name for name, found in results.items() if found["failed"]]
    missed = [name for name, found in results.items() if not found["holds"]]
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(f"bounds missed in: {', '.join(missed)}" if missed else "all bounds hold")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
