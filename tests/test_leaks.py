"""Nothing piles up: caches are bounded, and what they let go of is freed."""

import importlib.util
import pathlib
import pkgutil
import sys

import lrmult as lm

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "leaks.py"


def test_caches_are_bounded():
    for module in pkgutil.iter_modules(lm.__path__, "lrmult."):
        importlib.import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("lrmult.")]
    caches = {
        each: each.cache_parameters()["maxsize"]
        for module in modules
        for each in vars(module).values()
        if hasattr(each, "cache_parameters")
    }
    assert len(caches) > 5
    assert None not in caches.values()


def test_compiling_for_other_trees_keeps_memory_flat():
    spec = importlib.util.spec_from_file_location("leaks", FILE)
    leaks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(leaks)
    first, last = leaks.growth(450)
    # Of patterns and names thousands are kept: a few objects for each tree are in order. A plan
    # is hundreds.
    assert (last.objects - first.objects) / 300 < 30
    assert last.megabytes - first.megabytes < 30
