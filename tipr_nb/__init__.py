"""Text-to-image person retrieval, taught and shipped from notebooks. Importing this package loads no torch."""
__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

_HOMES = {
    "core": ["TiprError"],
    "data": ["load_dataset", "check_dataset", "Split", "PersonDataset", "DatasetError"],
    "synth": ["make_synth_pedes"],
    "clip": ["PersonCLIP", "Features"],
    "tgte": ["PersonGenerator", "generate_split", "enhance"],
    "pruning": ["prune_caption", "CaptionPruner"],
    "evaluation": ["rank_metrics", "evaluate", "compare", "Metrics"],
    "training": ["Recipe", "RECIPES", "train", "run_grid"],
    "search": ["Gallery"],
    "interop": ["load_peer"],
}
if TYPE_CHECKING:  # what `_HOMES` says, in the form that type checkers and editors read
    from .clip import Features as Features, PersonCLIP as PersonCLIP
    from .core import TiprError as TiprError
    from .data import DatasetError as DatasetError, PersonDataset as PersonDataset, Split as Split, check_dataset as check_dataset, load_dataset as load_dataset
    from .evaluation import Metrics as Metrics, compare as compare, evaluate as evaluate, rank_metrics as rank_metrics
    from .interop import load_peer as load_peer
    from .pruning import CaptionPruner as CaptionPruner, prune_caption as prune_caption
    from .search import Gallery as Gallery
    from .synth import make_synth_pedes as make_synth_pedes
    from .tgte import PersonGenerator as PersonGenerator, enhance as enhance, generate_split as generate_split
    from .training import RECIPES as RECIPES, Recipe as Recipe, run_grid as run_grid, train as train
_LAZY = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_LAZY)


def __getattr__(name):
    if name in _LAZY: return getattr(_import_module(f"tipr_nb.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'tipr_nb' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *__all__])
