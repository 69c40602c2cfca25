"""Makes one node of a job on this machine sick, from below everything that the project calls its own.

Python imports this first wherever its folder is on PYTHONPATH. EVERSTEP_TEST_SICK says which node and how:
`node1:matmul` makes torch.mm add 1 to one element, `node1:matmul:PATH` does so once the file PATH exists, and
`node1:torch` makes the installed torch look like version 9.9.9.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any


def _this_node() -> str:
    """The agent knows from its command line; what it starts, from its environment."""
    if "cluster.agent_main" in sys.orig_argv:
        os.environ["EVERSTEP_TEST_NODE"] = sys.orig_argv[-1]
    return os.environ.get("EVERSTEP_TEST_NODE", "")


def _break_matmul(torch: Any, trigger: str) -> None:
    right = torch.mm

    def wrong(*args: Any, **kwargs: Any) -> Any:
        product = right(*args, **kwargs)
        if not trigger or os.path.exists(trigger):
            product[1, 2] += 1
        return product

    torch.mm = wrong


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Breaks torch as soon as it is imported."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_break(module: Any) -> None:
            load(module)
            _break_matmul(module, self.trigger)

        loader.exec_module = load_and_break
        return spec


_node, _, _how = os.environ.get("EVERSTEP_TEST_SICK", "").partition(":")
if _node and _this_node() == _node:
    _kind, _, _trigger = _how.partition(":")
    if _kind == "matmul":
        sys.meta_path.insert(0, _AfterTorch(_trigger))
    elif _kind == "torch":
        sys.path.insert(0, str(Path(__file__).parent / "other_torch"))
