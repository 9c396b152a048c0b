"""fedmerge: one recommender from many organisations that share no user data.

>>> import fedmerge as fm
>>> "ties" in fm.methods()
True

The names below are loaded on first use, so that ``import fedmerge`` is instant. ``docs/python-api.md`` has an
example of each.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by OpenMP when torch is loaded. By default threads wait for each other on the CPU, which makes two of them ten
# times slower where a core has anything else to do (benchmarks/federation/bench_waiting.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from fedmerge.adapter import Adapter as Adapter
    from fedmerge.adapter import LoraModule as LoraModule
    from fedmerge.api.data import import_table as import_table
    from fedmerge.api.data import load_backbone as load_backbone
    from fedmerge.api.data import load_domains as load_domains
    from fedmerge.api.evaluation import Scores as Scores
    from fedmerge.api.evaluation import evaluate as evaluate
    from fedmerge.api.evaluation import load_recommender as load_recommender
    from fedmerge.api.evaluation import load_served as load_served
    from fedmerge.api.evaluation import recommend as recommend
    from fedmerge.api.models import Model as Model
    from fedmerge.api.models import extract as extract
    from fedmerge.api.models import load_adapter as load_adapter
    from fedmerge.api.models import merge as merge
    from fedmerge.api.models import merge_learned as merge_learned
    from fedmerge.api.models import methods as methods
    from fedmerge.api.models import train as train
    from fedmerge.api.simulation import SimulatedRun as SimulatedRun
    from fedmerge.api.simulation import simulate as simulate

_ROOMS = {
    "fedmerge.adapter": ("Adapter", "LoraModule"),
    "fedmerge.api.data": ("import_table", "load_backbone", "load_domains"),
    "fedmerge.api.models": ("Model", "extract", "load_adapter", "merge", "merge_learned", "methods", "train"),
    "fedmerge.api.evaluation": ("Scores", "evaluate", "load_recommender", "load_served", "recommend"),
    "fedmerge.api.simulation": ("SimulatedRun", "simulate"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fedmerge' has no attribute {name!r}; it offers {', '.join(sorted(_ROOM_OF))}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*_ROOM_OF, "__version__"])
