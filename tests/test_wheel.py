"""What is published: the wheel holds all that the package needs and nothing else, and a missing extra is one line."""

import subprocess, sys, tomllib, zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists() or not (ROOT / ".git").exists(),
    reason="needs the repository, not an installed package",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from what git knows, so that nothing lying about on this machine gets in."
    pytest.importorskip(
        "setuptools", minversion="77", reason="the development tools are not installed"
    )
    pytest.importorskip("build", reason="the development tools are not installed")
    home = tmp_path_factory.mktemp("wheel")
    for name in subprocess.run(
        ["git", "ls-files", "tipr_nb", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.split("\n"):
        if name and (ROOT / name).exists():
            (home / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "src" / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "-o",
            str(home / "dist"),
            str(home / "src"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (home / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_what_the_package_needs(wheel):
    inside = {n.removeprefix("tipr_nb/") for n in wheel.namelist() if n.startswith("tipr_nb/")}
    here = {
        str(p.relative_to(ROOT / "tipr_nb"))
        for folder in ("archs", "weights", "templates")
        for p in (ROOT / "tipr_nb" / folder).rglob("*")
        if p.is_file()
    }
    modules = {
        str(p.relative_to(ROOT / "tipr_nb"))
        for kind in ("*.py", "*.pyi")
        for p in (ROOT / "tipr_nb").rglob(kind)
    }
    assert inside == here | modules | {"py.typed"}
    assert {
        "weights/clip-synth-world/model.safetensors",
        "weights/clip-synth-pedes/model.safetensors",
        "archs/tipr-tiny.json",
        "archs/words.txt",
        "templates/page.css",
    } <= inside
    assert all(wheel.getinfo(f"tipr_nb/{n}").file_size > 0 for n in inside if n != "py.typed")


def test_wheel_holds_nothing_else(wheel):
    "No notebooks, tests, drawings or bytecode; small enough for a package index."
    others = [
        n for n in wheel.namelist() if not n.startswith("tipr_nb/") and ".dist-info/" not in n
    ]
    assert not others and not [n for n in wheel.namelist() if n.endswith((".ipynb", ".pyc"))]
    assert sum(i.compress_size for i in wheel.infolist()) < 30e6


def test_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    text = wheel.read(name).decode()
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    assert "Requires-Python: >=3.11" in text and "License-Expression: Apache-2.0" in text
    assert (
        all(f"Provides-Extra: {e}\n" in text for e in extras)
        and {"search", "app", "milvus", "onnx", "peft", "hub", "dev"} <= extras
    )
    assert (
        "tipr = tipr_nb.cli:main"
        in wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    )


EXTRAS = {
    "search": (
        "pyarrow",
        "from tipr_nb.search import indexing_lock\nwith indexing_lock('g'): pass",
    ),
    "milvus": ("pymilvus", "from tipr_nb.search import Milvus\nMilvus.at('m.db')"),
    "detect": ("cv2", "from tipr_nb.search import find_detector\nfind_detector('hog')"),
    "video": ("av", "from tipr_nb.search.video import FilmReader\nFilmReader('a.mp4')"),
    "onnx": (
        "onnxscript",
        "from tipr_nb.search.towers import trace_onnx\ntrace_onnx(None, None, None, 'i.onnx', 'images', {})",
    ),
    "peft": (
        "peft",
        "from types import SimpleNamespace\nimport torch\nfrom tipr_nb.generation.pipelines import add_pipeline_lora\nadd_pipeline_lora(SimpleNamespace(unet=torch.nn.Linear(1, 1)), '.')",
    ),
    "hub": (
        "datasets",
        "import numpy as np\nfrom tipr_nb.data import Split\nfrom tipr_nb.interop.parquet import split_features\nsplit_features(Split('test', [], np.zeros(0, int), [], np.zeros(0, int), np.zeros(0, int)))",
    ),
    "app": ("gradio", "from tipr_nb.search import search_page\nsearch_page(None)"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_missing_extra_is_one_line_with_the_remedy(extra, monkeypatch, tmp_path):
    "As in an environment without it: the import of the library fails."
    from tipr_nb.core import TiprError

    library, code = EXTRAS[extra]
    for name in [m for m in sys.modules if m == library or m.startswith(library + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TiprError) as e:
        exec(code, {})
    assert (
        f"pip install 'tipr_nb[{extra}]'" in str(e.value)
        and library in str(e.value)
        and "\n" not in str(e.value)
    )
    assert not list(tmp_path.iterdir())  # nothing was begun
