"""Types: the package says it is typed, what `import tipr_nb` offers has types for checkers and editors, and mypy agrees with the annotations."""

import importlib, re, subprocess, sys, tomllib
from pathlib import Path

import pytest

import tipr_nb

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "pyproject.toml"
pytestmark = pytest.mark.skipif(
    not SETTINGS.exists(), reason="needs the repository, not an installed package"
)


def exempt() -> list[str]:
    "Modules whose errors mypy does not report yet."
    return [
        m
        for o in tomllib.loads(SETTINGS.read_text())["tool"]["mypy"]["overrides"]
        if o.get("ignore_errors")
        for m in o["module"]
    ]


@pytest.mark.parametrize(
    "door",
    [
        "",
        ".core",
        ".data",
        ".synth",
        ".models",
        ".generation",
        ".methods",
        ".evaluation",
        ".training",
        ".search",
        ".interop",
    ],
)
def test_every_offered_name_is_there_once(door):
    package = importlib.import_module(f"tipr_nb{door}")
    assert len(set(package.__all__)) == len(package.__all__)
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert not missing


def test_exempt_modules_exist():
    assert all((ROOT / (m.replace(".", "/") + ".py")).exists() for m in exempt())


def mypy(*args: str):
    pytest.importorskip("mypy", reason="the development tools are not installed")
    return subprocess.run(
        [sys.executable, "-m", "mypy", *args], capture_output=True, text=True, cwd=ROOT
    )


USER = """
from tipr_nb import PersonCLIP, Recipe, TiprError, evaluate, load_dataset
data = load_dataset("synth-pedes")
model = PersonCLIP.from_pretrained("clip-synth-pedes")
reveal_type(data.test)
reveal_type(evaluate(model, data.test).r1)
reveal_type(model.encode_text(["a man in a red coat"]))
Recipe(lr="high")
"""


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_mypy_finds_nothing(tmp_path):
    "Five minutes without a cache on two busy cores (torch is read), ten seconds with one."
    done = mypy()
    assert done.returncode == 0, done.stdout
    (tmp_path / "user.py").write_text(USER)
    told = mypy(str(tmp_path / "user.py")).stdout
    assert (
        re.search(r'"tipr_nb\.data\.corpora\.Split"', told)
        and '"float"' in told
        and '"torch._tensor.Tensor"' in told
    ), told
    assert 'Argument "lr" to "Recipe" has incompatible type "str"' in told, told
