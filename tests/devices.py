"""Code run where there are several devices: JAX counts them once per process."""

import os
import subprocess
import sys


def printed_on_four_devices(code):
    """What the code prints in a process with four virtual CPU devices; its errors fail the test."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
