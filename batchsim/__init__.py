"""BatchSim predicts what a CPU/GPU batching pipeline will do, and proves it on the GPU.

    chat = batchsim.load("scenarios/serving_512_128.yaml", max_num_seqs=64)
    run = batchsim.run(chat)
    run.frame()      # every figure of each schedule, with its 90% interval
    run.figure()

What is in `__all__` is imported when it is first asked for: `import batchsim` takes no time, and needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchsim.api import LoadedScenario, explain, load, plan, run, sweep, tiles
    from batchsim.errors import BatchSimError, InputError, RunError
    from batchsim.explain.result import Explanation
    from batchsim.plan.result import PlanResult
    from batchsim.sweep.result import SweepResult
    from batchsim.views import RunView, TilesView

__version__ = "0.1.0"

__all__ = [
    "BatchSimError",
    "Explanation",
    "InputError",
    "LoadedScenario",
    "PlanResult",
    "RunError",
    "RunView",
    "SweepResult",
    "TilesView",
    "__version__",
    "explain",
    "load",
    "plan",
    "run",
    "sweep",
    "tiles",
]

_PLACES = {
    "batchsim.api": ("LoadedScenario", "explain", "load", "plan", "run", "sweep", "tiles"),
    "batchsim.errors": ("BatchSimError", "InputError", "RunError"),
    "batchsim.explain.result": ("Explanation",),
    "batchsim.plan.result": ("PlanResult",),
    "batchsim.sweep.result": ("SweepResult",),
    "batchsim.views": ("RunView", "TilesView"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


class _Package(ModuleType):
    """This package: imports its public names when they are asked for.

    `sweep`, `plan` and others are functions here, and subpackages as well; importing a subpackage would put it in the
    function's place. `from batchsim.sweep.result import ...` imports it all the same.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _PLACE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module(_PLACE_OF[name]), name)
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
