"""What importing lrmult adds to importing jax and optax.

    python benchmarks/import_time.py [--runs 15]

In fresh processes, in turns. The bound is 10 % for ``import lrmult``. The rest of the package is
imported when the first of its names is asked for; what that costs is told too.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

CODE = """
from time import process_time as now
a = now(); import jax, optax; b = now(); import lrmult; c = now(); lrmult.Rules; d = now()
print(b - a, c - b, d - b)
"""
BOUND = 0.10


def main():
    """Measure, print, and say by the exit status whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="where the shares are kept")
    options = parser.parse_args()
    alone, used = [], []
    for _ in range(options.runs):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
        both, *added = map(float, done.stdout.split())
        for shares, each in zip((alone, used), added, strict=True):
            shares.append(each / both)
    figures = {"import lrmult": alone, "and the first name": used}
    for name, shares in figures.items():
        print(
            f"{name:20} {statistics.median(shares):6.1%} ({min(shares):.1%} to {max(shares):.1%})"
        )
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(figures))
    sys.exit(statistics.median(alone) > BOUND)


if __name__ == "__main__":
    main()
