"""What importing lrmult adds to importing jax and optax.

    python benchmarks/import_time.py [--runs 15]

In fresh processes, in turns. The bound is 10 % for ``import lrmult``. The rest of the package is
imported when the first of its names is asked for; what that costs is told too.
"""

import argparse
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
    runs = []
    for _ in range(parser.parse_args().runs):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
        both, alone, used = map(float, done.stdout.split())
        runs.append((alone / both, used / both))
    for name, shares in zip(
        ("import lrmult", "and the first name"), zip(*runs, strict=True), strict=True
    ):
        print(
            f"{name:20} {statistics.median(shares):6.1%} ({min(shares):.1%} to {max(shares):.1%})"
        )
    sys.exit(statistics.median(share for share, _ in runs) > BOUND)


if __name__ == "__main__":
    main()
