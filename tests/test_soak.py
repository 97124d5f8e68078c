"""A training whose processes are killed ends as one that is left alone."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed there with SIGKILL")
def test_a_short_soak(tmp_path):
    # What a killed process leaves half written in a cache, no other test should read.
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, FILE, "--steps", "300", "--kills", "2", "--seed", "53"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes killed: 2\n" in done.stdout
    [resumed] = re.findall(r"others went on from steps (\d+), (\d+)\n", done.stdout)
    assert max(map(int, resumed)) > 60  # in a stage for which a state was migrated
    assert "8 of 9 arrays changed; all that was frozen did not" in done.stdout
    assert "bit for bit" in done.stdout
