"""Python runs this file by itself at its start, in all processes of a job whose tests put its folder on PYTHONPATH.

It wraps `trainer.loop.run_step`, once that is imported, with what `tests.chaos.plants` was told to plant. The product
has no hook for it and knows nothing of it.
"""

import importlib.abc
import importlib.util
import os
import sys


class _WhenImported(importlib.abc.MetaPathFinder):
    """Lets the step loop be imported as ever, and then hands the module over."""

    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != "trainer.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            from tests.chaos.plants import take_root

            run(module)
            take_root(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "EVERSTEP_TEST_PLANTS" in os.environ:
    sys.meta_path.insert(0, _WhenImported())
