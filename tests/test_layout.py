"""The house: a folder of notebooks imports only lower ones, and notebooks and modules have the same names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
pytestmark = pytest.mark.skipif(
    not NBS.exists(), reason="needs the repository, not an installed package"
)


def floors() -> dict[str, int]:
    "Module or sub-package of tipr_nb -> its floor, the number of its notebook or folder."
    numbered = [p for p in NBS.iterdir() if re.match(r"\d\d_", p.name)]
    return {p.stem[3:]: int(p.name[:2]) for p in numbered}


def modules() -> list[Path]:
    return [
        p for p in sorted((ROOT / "tipr_nb").rglob("*.py")) if p.stem not in ("__init__", "_modidx")
    ]


def imported(path: Path) -> set[str]:
    "First names below tipr_nb that a module imports, also inside functions."
    depth = len(path.relative_to(ROOT / "tipr_nb").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tipr_nb.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        name = node.module or ""
        if node.level == depth:
            found |= {name.split(".")[0]} if name else {a.name for a in node.names}
        elif node.level == 0 and name == "tipr_nb":
            found |= {a.name for a in node.names}
        elif node.level == 0 and name.startswith("tipr_nb."):
            found.add(name.split(".")[1])
    return found


@pytest.mark.parametrize(
    "path", modules(), ids=lambda p: p.relative_to(ROOT / "tipr_nb").as_posix()
)
def test_imports_only_lower_floors(path):
    known = floors()
    home = path.relative_to(ROOT / "tipr_nb").parts[0].removesuffix(".py")
    upward = sorted(name for name in imported(path) if name in known and known[name] > known[home])
    assert not upward, (
        f"{home} (floor {known[home]}) imports {', '.join(upward)}, which stand higher"
    )


@pytest.mark.parametrize(
    "folder", sorted(p.name for p in NBS.glob("[0-9][0-9]_*") if p.is_dir()) if NBS.exists() else []
)
def test_notebooks_are_numbered_from_one(folder):
    numbers = [int(p.name[:2]) for p in sorted((NBS / folder).glob("*.ipynb"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_notebook_has_the_module_of_its_name():
    for path in NBS.glob("[0-9][0-9]_*/*.ipynb"):
        module = ROOT / "tipr_nb" / path.parent.name[3:] / f"{path.stem[3:]}.py"
        assert module.exists(), f"{path.relative_to(NBS)} exports no {module.relative_to(ROOT)}"


FORMER = (
    "app backbones bodies checkpoints clip cmt corpora crops drawing engines generator gif hub indexing losses memory metrics peers people photos pictures pipelines pruning ranking recipes runs "
    "loop tgte tir tokens towers wording worlds"
).split()


def test_former_import_paths_are_gone():
    "Modules lay flat in the package once; nothing may still import them from there."
    pattern = re.compile(rf"(?:from|import) tipr_nb\.(?:{'|'.join(FORMER)})\b")
    files = [
        p
        for kind in (
            "nbs/**/*.ipynb",
            "tests/*.py",
            "scripts/*.py",
            "benchmarks/*.py",
            "tipr_nb/**/*.py",
        )
        for p in ROOT.glob(kind)
    ]
    found = [
        p.relative_to(ROOT).as_posix()
        for p in files
        if p != Path(__file__).resolve()
        and "_proc" not in p.parts
        and pattern.search(p.read_text(encoding="utf-8"))
    ]
    assert not found, ", ".join(found)
