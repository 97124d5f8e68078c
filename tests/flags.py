"""Settings of XLA that spare time where compiled code runs once; jax must not be imported here."""

from importlib.metadata import version

OPTIONS = {"xla_backend_optimization_level": 0}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later versions do not know it
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
