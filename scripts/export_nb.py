"""Export one notebook to its module, leaving the others and the index alone: `python scripts/export_nb.py nbs/00_core/01_errors.ipynb`."""

import sys
from nbdev.export import nb_export

if __name__ == "__main__":
    for nb in sys.argv[1:]:
        nb_export(nb, lib_path="tipr_nb")
