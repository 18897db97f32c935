"""The figures of density hold: `scripts/measure_style.py` over all notebooks, with the limits of the house."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "scripts/measure_style.py").is_file():
    pytest.skip("not a checkout", allow_module_level=True)
spec = importlib.util.spec_from_file_location("measure_style", ROOT / "scripts/measure_style.py")
style = importlib.util.module_from_spec(spec)
spec.loader.exec_module(style)

LIBRARY = {
    "over 120, %": 0,
    "over 100, %": 5,
    "nodes a line": 7.5,
    "ternaries per 1,000": 40,
    "parallel assignments per 1,000": 15,
}
SHOWN = {
    "over 120, %": 0.2,
    "over 100, %": 5,
    "nodes a line": 8,
    "ternaries per 1,000": 40,
    "parallel assignments per 1,000": 15,
}
LAYOUT = {
    "define more than one thing, %": 15,
    "followed by a demonstration, %": 75,
}


@pytest.fixture(scope="module")
def notebooks():
    return style.found([])


@pytest.mark.parametrize(
    "limits,sources",
    [(LIBRARY, style.exported_cells), (SHOWN, style.shown_cells)],
    ids=["library", "shown"],
)
def test_lines_say_one_thing(notebooks, limits, sources):
    figures = style.density(sources(notebooks))
    over = {
        name: round(figures[name], 1) for name, limit in limits.items() if figures[name] > limit
    }
    assert not over, f"over the limit: {over}"


def test_definitions_stand_alone_and_are_shown(notebooks):
    figures = style.cell_figures(notebooks)
    assert figures["define more than one thing, %"] <= LAYOUT["define more than one thing, %"]
    assert figures["followed by a demonstration, %"] >= LAYOUT["followed by a demonstration, %"]
