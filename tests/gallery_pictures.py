"""Small pictures of people in two colours, for the tests of photos, indexing, search and page."""

from tipr_nb.search import colour_archive as archive
from tipr_nb.search import colour_figure as figure

__all__ = ["archive", "figure"]
