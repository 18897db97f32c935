"""How dense the code is: `python scripts/measure_style.py [folder or notebook ...]` prints the figures for the library and for the cells that readers see."""

import argparse
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r"^#\|\s*(hide|default_exp|eval:\s*false)", re.M)


def code_lines(source: str) -> list[str]:
    "Lines that are neither blank nor comments."
    return [
        line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")
    ]


def parsed(source: str) -> ast.Module | None:
    "The syntax tree; None for a cell that is not plain Python."
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def is_parallel(node: ast.AST) -> bool:
    "Whether it is an assignment such as `a, b = x, y`."
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def density(sources: list[str]) -> dict[str, float]:
    "Figures of a list of sources."
    kept = [(s, t) for s in sources if (t := parsed(s)) is not None]
    lines = [line for s, _ in kept for line in code_lines(s)]
    nodes = [n for _, t in kept for n in ast.walk(t)]
    lengths = [len(line) for line in lines] or [0]
    count = max(1, len(lines))
    thousand = 1000 / count
    return {
        "lines": len(lines),
        "median length": statistics.median(lengths),
        "over 120, %": 100 * sum(n > 120 for n in lengths) / count,
        "over 100, %": 100 * sum(n > 100 for n in lengths) / count,
        "nodes a line": sum(isinstance(n, (ast.expr, ast.stmt)) for n in nodes) / count,
        "ternaries per 1,000": thousand * sum(isinstance(n, ast.IfExp) for n in nodes),
        "parallel assignments per 1,000": thousand * sum(map(is_parallel, nodes)),
        "comprehensions per 1,000": thousand
        * sum(
            isinstance(n, (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp))
            for n in nodes
        ),
        "Any per 1,000": thousand * sum(isinstance(n, ast.Name) and n.id == "Any" for n in nodes),
    }


def text(cell: dict) -> str:
    return "".join(cell["source"])


def is_exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and bool(re.search(r"^#\|\s*exporti?\b", text(cell), re.M))


def definitions(cell: dict) -> int:
    "Functions and classes that a cell defines at its top level."
    tree = parsed(text(cell))
    return sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in tree.body) if tree else 0


def is_demonstration(cell: dict) -> bool:
    return cell["cell_type"] == "code" and not is_exported(cell) and not SKIPPED.search(text(cell))


def cell_figures(notebooks: list[Path]) -> dict[str, float]:
    "How definitions are laid out in exported cells."
    many = followed = total = 0
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell, after in zip(cells, [*cells[1:], None]):
            n = definitions(cell) if is_exported(cell) else 0
            total += n > 0
            many += n > 1
            followed += n > 0 and after is not None and is_demonstration(after)
    return {
        "cells that define": total,
        "define more than one thing, %": 100 * many / max(1, total),
        "followed by a demonstration, %": 100 * followed / max(1, total),
    }


def shown_cells(notebooks: list[Path]) -> list[str]:
    return [
        text(c)
        for p in notebooks
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
        if is_demonstration(c)
    ]


def exported_cells(notebooks: list[Path]) -> list[str]:
    return [
        text(c)
        for p in notebooks
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
        if is_exported(c)
    ]


def found(names: list[str]) -> list[Path]:
    paths = [Path(n) for n in names] or [ROOT / "nbs"]
    books = [q for p in paths for q in (sorted(p.rglob("*.ipynb")) if p.is_dir() else [p])]
    return [b for b in books if not any(part.startswith((".", "_")) for part in b.parts[-4:])]


def report(title: str, figures: dict[str, float]):
    print(title)
    for name, value in figures.items():
        print(f"  {name:<34}{value:>10,.1f}".rstrip("0").rstrip("."))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="notebooks or folders; all of nbs when left out")
    notebooks = found(parser.parse_args().paths)
    report("library (exported cells)", density(exported_cells(notebooks)))
    report("cells that readers see", density(shown_cells(notebooks)))
    report("definitions", cell_figures(notebooks))


if __name__ == "__main__":
    main()
