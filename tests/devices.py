"""Code run where there are several devices: JAX counts them once per process."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def printed_on_devices(count, *arguments):
    """What Python prints where there are so many virtual CPU devices; its errors fail the test."""
    [printed] = printed_together((count, *arguments))
    return printed


def printed_together(*processes):
    """The same for several processes at a time; an error of one shows what all of them printed."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda process: _run(*process), processes))
    assert not any(code for code, _, _ in done), "\n".join(
        f"-- process {rank} ended with {code}\n{printed}{errors}"
        for rank, (code, printed, errors) in enumerate(done)
    )
    return [printed for _, printed, _ in done]


def _run(count, *arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            cwd=ROOT,
            text=True,
            check=False,
            timeout=240,
        )
    except subprocess.TimeoutExpired as late:
        printed = [(each or b"").decode(errors="replace") for each in (late.stdout, late.stderr)]
        return "a timeout", *printed
    return done.returncode, done.stdout, done.stderr


def printed_on_four_devices(code):
    """What the code prints in a process with four virtual CPU devices; its errors fail the test."""
    return printed_on_devices(4, "-c", code)
