"""Settings of every test."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

from tests.flags import FLAGS

# Most of the time of a run goes into compiling small functions that run once. JAX reads these when
# it is imported. Each worker has a folder of its own, since two that write and read one file at a
# time get in each other's way. With XLA_FLAGS set, to anything, code is optimized as ever.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    compiled = tempfile.mkdtemp(prefix="lrmult-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("XLA_FLAGS", FLAGS)

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", max_examples=20_000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
