"""The site's sources: no dead link, nothing of one machine in an output, a map and a citation in step, the address filled in and taken out again."""

import base64, configparser, json, os, re, shutil, subprocess, sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "nbs").is_dir(), reason="needs the repository, not an installed package"
)


def notebooks() -> list[Path]:
    return [
        p
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if not any(q.startswith((".", "_")) for q in p.relative_to(ROOT / "nbs").parts)
    ]


def cells(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def slug(heading: str) -> str:
    "The anchor that Pandoc makes of a heading."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda m: m[1] or "", heading)
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))


def anchors(path: Path) -> set[str]:
    return {
        slug(m[1])
        for c in cells(path)
        if c["cell_type"] == "markdown"
        for m in re.finditer(r"(?m)^#{1,6} (.+?)(?: \{[^}]*\})?$", "".join(c["source"]))
    }


def links(path: Path):
    "Targets of links and pictures in the prose, code fences left out."
    for c in cells(path):
        if c["cell_type"] != "markdown":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]+\$", "", "".join(c["source"]), flags=re.S)
        yield from re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text)
        yield from re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_links_lead_somewhere(path):
    dead = []
    for link in links(path):
        if re.match(r"(https?|mailto|attachment):", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if target and there.suffix == ".html" and not there.exists():
            there = there.with_suffix(".ipynb")
        if not there.exists():
            dead.append(link)
        elif anchor and there.suffix == ".ipynb" and anchor not in anchors(there):
            dead.append(link)
    assert not dead, f"dead links: {', '.join(dead)}"


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_is_fit_to_be_read(path):
    found = cells(path)
    assert len(found) <= 70, "split it: no notebook has more than 70 cells"
    first = next(("".join(c["source"]) for c in found if c["cell_type"] == "markdown"), "")
    assert first.startswith("# "), "begins with a title"
    for c in found:
        assert not c["metadata"], "cell metadata that `nbdev_clean` takes away; run it"
        for out in c.get("outputs", []):
            text = json.dumps(
                [
                    out.get("text"),
                    {k: v for k, v in out.get("data", {}).items() if not k.startswith("image/")},
                ]
            )
            assert not (m := re.search(r"(?<![\w…])/(tmp|root|home|work|Users)/[\w.-]+/?", text)), (
                f"a path of one machine in an output: {m[0]}"
            )


def page(path: Path) -> str:
    "A notebook's page on the site, as nbdev names it."
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem) + ".html").as_posix()


def test_every_page_has_a_name_of_its_own():
    pages = [page(p.relative_to(ROOT / "nbs")) for p in notebooks()]
    titles = [
        next("".join(c["source"]).splitlines()[0] for c in cells(p) if c["cell_type"] == "markdown")
        for p in notebooks()
    ]
    assert len(set(pages)) == len(pages) and len(set(titles)) == len(titles), sorted(
        t for t in titles if titles.count(t) > 1
    )


def script(root: Path, name: str, *args: str):
    return subprocess.run(
        [sys.executable, str(root / "scripts" / name), *args],
        capture_output=True,
        text=True,
        cwd=root,
    )


def test_map_for_language_models_is_in_step():
    done = script(ROOT, "make_llms.py", "--check")
    assert done.returncode == 0, done.stderr
    text = (ROOT / "nbs/llms.txt").read_text()
    assert text.startswith("# tipr_nb\n\n> ") and all(
        f"({page(p.relative_to(ROOT / 'nbs'))})" in text for p in notebooks()
    )


def site_config() -> dict:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def test_no_format_deletes_its_own_pages():
    "With `keep-md: false` Quarto removes STEM.html.md, which for a notebook without a number is the CommonMark output itself, and then fails."
    formats = site_config()["format"]
    kept = [f for f in formats.values() if isinstance(f, dict)]
    assert "commonmark" not in formats or not any(f.get("keep-md") is False for f in kept)


def test_navigation_names_every_notebook_once():
    "Each notebook is reached from the sidebar, and what the sidebar names is there."

    def entries(item):
        if isinstance(item, str):
            return [item]
        if isinstance(item, list):
            return [e for i in item for e in entries(i)]
        return entries(item.get("contents", [])) + ([item["href"]] if "href" in item else [])

    nbs = ROOT / "nbs"
    named = [
        p.relative_to(nbs).as_posix()
        for e in entries(site_config()["website"]["sidebar"]["contents"])
        for p in sorted(nbs.glob(e)) or [nbs / f"missing: {e}"]
    ]
    assert sorted(named) == sorted(p.relative_to(nbs).as_posix() for p in notebooks())


def local_addresses(text: str) -> list[str]:
    "Addresses of one machine: whoever opens the page would knock at a port of their own computer."
    return re.findall(
        r"(?:https?|wss?)://(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1\]|192\.168\.[\d.]+|10\.\d+\.[\d.]+)[^\s\"'<>)]*",
        text,
    )


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_outputs_name_no_local_address(path):
    for c in cells(path):
        for out in c.get("outputs", []):
            shown = {k: v for k, v in out.get("data", {}).items() if not k.startswith("image/")}
            found = local_addresses(json.dumps([out.get("text"), shown]))
            live = [a for a in found if not c_prints(out, a)]
            assert not live, (
                f"the cell that begins {''.join(c['source']).splitlines()[0][:50]!r} stores {live[0]}; keep such output out of the notebook"
            )


def c_prints(out: dict, address: str) -> bool:
    "Whether an address is plain printed text, which no browser opens by itself."
    printed = json.dumps([out.get("text", ""), out.get("data", {}).get("text/plain", "")])
    markup = json.dumps(
        [
            v
            for k, v in out.get("data", {}).items()
            if k not in ("text/plain",) and not k.startswith("image/")
        ]
    )
    return address in printed and address not in markup


def stored_bytes(path: Path) -> int:
    "What a notebook's outputs weigh on its page: pictures with a palette, as `make docs` gives them, and text."
    from run_nbs import with_palette

    total = 0
    for out in (o for c in cells(path) for o in c.get("outputs", [])):
        for kind, value in out.get("data", {}).items():
            text = "".join(value) if not isinstance(value, dict) else json.dumps(value)
            total += len(with_palette(base64.b64decode(text))) if kind == "image/png" else len(text)
    return total


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_pages_stay_light(path, monkeypatch):
    "A page weighs 1.5 MB at most; the frame of a page and the code of a long notebook take some 300 kB of it."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    if path.stat().st_size > 1.2e6:
        assert stored_bytes(path) < 1.2e6, "smaller figures, or fewer pictures in them"


def test_links_to_methods_lead_to_their_class(monkeypatch):
    "nbdev links every name in back-ticks; methods and private names have no anchor of their own."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import living

    ids = {"a/x.html": {"gallery"}, "b/y.html": set()}
    assert living("../a/x.html#gallery.search", "b/y.html", ids) == "../a/x.html#gallery"
    assert living("../a/x.html#_count", "b/y.html", ids) == "../a/x.html"
    assert living("#z", "a/x.html", ids) == "x.html"
    for kept in ("../a/x.html#gallery", "#gallery", "https://a.org#b", "../c.html#d"):
        assert living(kept, "a/x.html", ids) == kept


def test_documentation_can_be_copied(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import quoted

    given = "```python\ndef demo(\n    quick:Annotated=False, root:Annotated\n):\n```\n\nWith --quick less; `--out` is kept, a-b--c too.\n\nExample: tipr demo --quick"
    wanted = "```python\ndef demo(\n    quick=False, root\n):\n```\n\nWith `--quick` less; `--out` is kept, a-b--c too.\n\nExample: `tipr demo --quick`"
    assert quoted(given) == wanted


def test_tables_can_be_copied(tmp_path, monkeypatch):
    "What a cell shows as Markdown is set by Pandoc too: `--model` must not become a dash."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import light

    data = {
        "text/markdown": ["| what --model takes |"],
        "text/html": ["<td>59.9 ± 0.2</td>", '<td class="a">1.9 to 4.9</td><td>8 to be</td>'],
    }
    output = {"output_type": "display_data", "data": data}
    book = {"cells": [{"cell_type": "code", "source": [], "outputs": [output]}]}
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(book))
    light(path)
    shown = cells(path)[0]["outputs"][0]["data"]
    assert shown["text/markdown"] == "| what `--model` takes |"
    wanted = '<td>59.9 ± 0.2</td><td class="a">1.9 to 4.9</td><td>8 to be</td>'
    assert shown["text/html"] == wanted.replace(" ± ", "\u00a0±\u00a0").replace(
        "1.9 to 4.9", "1.9\u00a0to\u00a04.9"
    )


def measured(
    values: dict[str, list[float] | None], most: Annotated[int, "limit"] = 3
) -> dict[str, Path]:
    return {name: Path(name) for name in values if most}


def writes(path: str | Path):
    Path(path)

    def inner():
        return 1


class Counter:
    def __init__(self, kind: Literal["a", "b"] | None = None):
        self.kind = kind


def test_signatures_say_whole_types(monkeypatch):
    "fastcore alone shows `dict` for a dict of paths, `Annotated=3` for an option, and classes as functions."
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from fastcore.docments import DocmentText
    from make_docs import api_faults, type_name

    shown = {f: " ".join(str(DocmentText(f)).split()) for f in (measured, writes, Counter)}
    assert (
        shown[measured]
        == "def measured( values:dict[str, list[float] | None], most:int=3 )->dict[str, Path]:"
    )
    assert shown[writes] == "def writes( path:str | Path )->None:"
    assert shown[Counter] == "class Counter( kind:Literal['a', 'b'] | None=None ):"
    assert type_name(Callable[[list[str]], Path]) == "Callable[[list[str]], Path]"
    assert type_name(tuple[int, ...]) == "tuple[int, ...]"
    for f in shown:
        assert not api_faults(f"```python\n{DocmentText(f)}\n```")
    faulty = "```python\ndef demo(\n    quick:Annotated=False\n):\n```\n\nWith --quick less."
    assert api_faults(faulty) == [
        "demo: Annotated without what it holds",
        "demo: no return type",
        "--quick outside of back-ticks",
    ]


def dead_anchors(root: Path) -> list[str]:
    "Links within the processed site to headings that no page has."
    dead = []
    for path in (root / "_proc").rglob("*.ipynb"):
        for link in links(path):
            target, _, anchor = link.partition("#")
            if not anchor or re.match(r"(https?|mailto|attachment):", link):
                continue
            there = (
                path
                if not target
                else next(
                    (
                        q
                        for q in (root / "_proc").rglob("*.ipynb")
                        if page(q.relative_to(root / "_proc"))
                        == os.path.normpath(
                            os.path.join(path.parent.relative_to(root / "_proc"), target)
                        ).removeprefix("./")
                        or q == (path.parent / target).resolve()
                    ),
                    None,
                )
            )
            if there is not None and anchor not in anchors(there) | ids(there):
                dead.append(f"{path.name}: {link}")
    return dead


def ids(path: Path) -> set[str]:
    "Anchors set by hand or by nbdev's documentation of functions."
    text = "".join("".join(c["source"]) + json.dumps(c.get("outputs", [])) for c in cells(path))
    return {a or b for a, b in re.findall(r"""\{#([\w.-]+)|id=\\?["']([\w.-]+)""", text)}


# Functions that return objects of gradio, matplotlib or NumPy and do not say so in their source.
UNTYPED = (
    "sweep open_npy search_box search_page serve style demo_data overview_figure draw_overview"
)
UNSAID = {f"{name}: no return type" for name in UNTYPED.split()}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_site_is_processed(tmp_path, monkeypatch):
    "Three minutes: every notebook comes out of nbdev's processing, and where Quarto is there, of its rendering; no link of the outcome is dead."
    pytest.importorskip("nbdev", reason="the development tools are not installed")
    root = tmp_path / "site"
    for name in ("settings.ini", "_quarto.yml", "README.md", "pyproject.toml"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("nbs", "scripts", "tipr_nb", "benchmarks"):
        shutil.copytree(
            ROOT / name,
            root / name,
            ignore=shutil.ignore_patterns("__pycache__", "_quarto.yml", ".ipynb_checkpoints"),
        )
    done = subprocess.run(
        [sys.executable, "scripts/make_docs.py"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        f"{len(notebooks())} notebooks" in done.stdout
        and len(done.stdout.strip().splitlines()) == 1
        or shutil.which("quarto")
    )
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_docs import api_faults

    dead, pages = [], {page(p.relative_to(ROOT / "nbs")) for p in notebooks()}
    for path in (root / "_proc").rglob("*.ipynb"):
        for out in (o for c in cells(path) for o in c.get("outputs", [])):
            text = "".join(out.get("data", {}).get("text/markdown", ""))
            faults = api_faults(text) if "```python\n" in text else []
            faults = [f for f in faults if f not in UNSAID]
            assert not faults, f"{path.name}: {'; '.join(faults[:5])}"
        named = re.search(r"output-file: (.+)", "".join(cells(path)[0]["source"]))
        assert "](/blob/" not in path.read_text(encoding="utf-8"), (
            f"{path.name}: a link to source files of a repository without an address"
        )
        assert named and named[1] == Path(page(path)).name, (
            f"{path.name}: its page is called {named and named[1]}"
        )
        for link in links(path):
            target = link.partition("#")[0]
            if (
                re.match(r"(https?|mailto|attachment):", link)
                or not target
                or target.lstrip("/") in pages
            ):
                continue
            there = (path.parent / target).resolve()
            if not there.exists() and not there.with_suffix(".ipynb").exists():
                dead.append(f"{path.name}: {link}")
    dead += dead_anchors(root)
    for path in (root / "_docs").rglob("*.html") if shutil.which("quarto") else []:
        for link in re.findall(
            r"""<(?:a|img)[^>]+(?:href|src)=["']([^"'#?]+)""", path.read_text(encoding="utf-8")
        ):
            if (
                not re.match(r"(https?|mailto|data|javascript):", link)
                and not (path.parent / link).exists()
            ):
                dead.append(f"{path.name}: {link}")
    assert not dead, ", ".join(dead[:20])


def test_citation_and_versions_agree():
    import tipr_nb

    text = (ROOT / "CITATION.cff").read_text()
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    assert (
        re.search(r"(?m)^version: (.+)$", text)[1]
        == tipr_nb.__version__
        == config["DEFAULT"]["version"]
    )
    try:
        import yaml
    except ImportError:
        return
    d = yaml.safe_load(text)
    assert (
        d["cff-version"] == "1.2.0"
        and {"title", "authors", "message"} <= set(d)
        and len(d["references"]) == 2
    )


def test_typed():
    assert (ROOT / "tipr_nb/py.typed").exists() and "py.typed" in (
        ROOT / "pyproject.toml"
    ).read_text()


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="the development tools are not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "copy"
    for name in ("settings.ini", "pyproject.toml", "CITATION.cff", "_quarto.yml", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in (
        "index.ipynb",
        "00_core/01_errors.ipynb",
        "09_interop/04_loading.ipynb",
        "datasets/rstpreid.ipynb",
    ):
        (root / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nbs" / name, root / "nbs" / name)
    (root / "nbs/images").mkdir()
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    assert (
        script(root, "make_llms.py").returncode == 0
        and script(root, "make_readme.py").returncode == 0
    )
    return root


def everything(root: Path) -> dict[str, object]:
    return {
        str(p.relative_to(root)): json.loads(p.read_text())
        if p.suffix == ".ipynb"
        else p.read_bytes()
        if p.suffix == ".png"
        else p.read_text()
        for p in sorted(root.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.skipif(
    not (ROOT / "README.md").exists() or not (ROOT / "nbs/index.ipynb").exists(),
    reason="no README yet",
)
def test_address_is_filled_in_and_taken_out(copy):
    blank = everything(copy)
    assert not re.search(
        r"colab-badge|git_url = \S",
        json.dumps(blank["nbs/00_core/01_errors.ipynb"]) + str(blank["settings.ini"]),
    )
    for _ in range(2):  # again changes nothing
        done = script(
            copy,
            "set_address.py",
            "--git",
            "https://github.com/someone/tipr_nb",
            "--docs",
            "https://someone.github.io/tipr_nb",
            "--root",
            str(copy),
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("nothing")
    now = everything(copy)
    assert (
        "git_url = https://github.com/someone/tipr_nb\n" in now["settings.ini"]
        and "doc_baseurl = /tipr_nb\n" in now["settings.ini"]
        and "user = someone\n" in now["settings.ini"]
    )
    import tomllib

    assert (
        tomllib.loads(now["pyproject.toml"])["project"]["urls"]["Documentation"]
        == "https://someone.github.io/tipr_nb"
    )
    assert (
        'repository-code: "https://github.com/someone/tipr_nb"' in now["CITATION.cff"]
        and "repo-url: https://github.com/someone/tipr_nb" in now["_quarto.yml"]
        and "https://someone.github.io/tipr_nb/00_core/errors.html" in now["nbs/llms.txt"]
    )
    core = now["nbs/00_core/01_errors.ipynb"]["cells"]
    assert (
        "".join(core[0]["source"]).startswith("# ")
        and "colab.research.google.com/github/someone/tipr_nb/blob/main/nbs/00_core/01_errors.ipynb"
        in "".join(core[1]["source"])
        and "eval: false" in "".join(core[2]["source"])
    )
    assert "colab-badge" not in json.dumps(
        now["nbs/datasets/rstpreid.ipynb"]
    ) and "colab-badge" not in json.dumps(now["nbs/index.ipynb"])
    assert script(copy, "set_address.py", "--clear", "--root", str(copy)).returncode == 0
    assert everything(copy) == blank


def test_wrong_address_is_refused(copy):
    before = everything(copy)
    for args in (
        ["--git", "someone/tipr_nb"],
        ["--git", "https://github.com/someone/tipr_nb", "--docs", "someone.github.io"],
    ):
        done = script(copy, "set_address.py", *args, "--root", str(copy))
        assert (
            done.returncode == 1
            and "write it like https://" in done.stderr
            and "Traceback" not in done.stderr
        )
    assert everything(copy) == before


def test_pictures_keep_their_words(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_docs

    assert make_docs.described("![A man](a.png)") == '![A man](a.png){fig-alt="A man"}'
    assert make_docs.described('![A man](a.png){width="50%"}') == '![A man](a.png){width="50%"}'
    assert (
        make_docs.described("![](a.png) and [a link](b.html)") == "![](a.png) and [a link](b.html)"
    )
