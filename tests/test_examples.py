"""The examples run, and show what they promise."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_transfer_learning(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, ROOT / "examples" / "transfer_learning.py", "--output", picture]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    text = done.stdout
    assert "0: 'layers[9]'" in text  # the plan's table
    kept, of = re.search(r"(\d+) of (\d+) frozen arrays are identical", text).groups()
    assert kept == of == "60"
    assert "only layers/9/bias and layers/9/kernel changed" in text
    [digits] = re.findall(r"digits held out: ([0-9.]+)%", text)
    [untrained] = re.findall(r"untrained trunk ([0-9.]+)%", text)
    [trained] = re.findall(r" trained trunk ([0-9.]+)%", text)
    assert float(digits) > 95
    assert float(trained) > float(untrained) > 100 / 3
