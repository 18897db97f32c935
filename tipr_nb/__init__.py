"""Text-to-image person retrieval, taught and shipped from notebooks. Importing this package loads no torch."""
__version__ = "0.1.0"

from importlib import import_module as _import_module

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
_LAZY = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_LAZY)


def __getattr__(name):
    if name in _LAZY: return getattr(_import_module(f"tipr_nb.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'tipr_nb' has no attribute {name!r}")


def __dir__(): return sorted([*globals(), *__all__])
