# The names that the package offers; they are imported when they are first asked for.
from .core import TiprError as TiprError
from .data import Batch as Batch
from .data import DatasetError as DatasetError
from .data import PersonDataset as PersonDataset
from .data import Split as Split
from .data import check_dataset as check_dataset
from .data import load_dataset as load_dataset
from .synth import make_synth_pedes as make_synth_pedes
from .models import Features as Features
from .models import PersonCLIP as PersonCLIP
from .generation import PersonGenerator as PersonGenerator
from .generation import generate_split as generate_split
from .methods import CaptionPruner as CaptionPruner
from .methods import Objective as Objective
from .methods import enhance as enhance
from .methods import prune_caption as prune_caption
from .methods import register_objective as register_objective
from .evaluation import Metrics as Metrics
from .evaluation import compare as compare
from .evaluation import evaluate as evaluate
from .evaluation import rank_metrics as rank_metrics
from .training import Callback as Callback
from .training import RECIPES as RECIPES
from .training import Recipe as Recipe
from .training import run_grid as run_grid
from .training import train as train
from .search import Gallery as Gallery
from .interop import load_peer as load_peer

__version__: str
