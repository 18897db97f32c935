"""Build the site from the notebooks' stored outputs. Without Quarto on the PATH only nbdev's own processing runs, so that broken notebooks are still found."""

import ast, inspect, json, os, re, shutil, subprocess, sys, textwrap, types, typing, warnings
from pathlib import Path

import fastcore.docments
import nbdev.processors

ROOT = Path(__file__).resolve().parent.parent
_would_run, _annotations, _parse, _signature = (
    nbdev.processors._do_eval,
    inspect.get_annotations,
    fastcore.docments._parses,
    fastcore.docments.DocmentText.__str__,
)


def runs(cell) -> bool:
    """Whether nbdev may run a cell to render the API's signatures: definitions and pure imports only.

    nbdev itself runs every cell that holds an import, lessons too, without the values that the cells before it made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not _would_run(cell):
            return False
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}:
        return True
    trees = cell.parsed_()
    return all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in trees) or bool(
        nbdev.processors._show_docs(trees)
    )


def annotations(obj, *, globals=None, locals=None, eval_str=False):
    "As `inspect`'s, but a type in quotes that is defined further down, or for type checkers only, stays the text it is."
    try:
        return _annotations(obj, globals=globals, locals=locals, eval_str=eval_str)
    except NameError:
        return _annotations(obj, globals=globals, locals=locals)


def parses(source):
    "As fastcore's, but a method whose source ends in an odd indentation (matplotlib's `Figure.__init__`) has no comments to read."
    try:
        return _parse(source)
    except SyntaxError:
        return ast.parse("def unreadable(): ...")


def type_name(kind) -> str:
    "A type as a signature says it: with what it holds, without modules. fastcore's says `dict` where we say `dict[str, float]`."
    if kind is inspect.Parameter.empty:
        return ""
    if kind in (None, types.NoneType):
        return "None"
    if kind is Ellipsis:
        return "..."
    if isinstance(kind, (list, tuple)):
        return f"[{', '.join(map(type_name, kind))}]"
    origin, held = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_name(held[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, held))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, held))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, held))}]"
    return getattr(kind, "__name__", None) or str(kind)


def gives_nothing(function) -> bool:
    "Whether a function has no `return` of a value and no `yield`."
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    inner = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))][1:]
    within = {id(n) for i in inner for n in ast.walk(i)}
    gives = (ast.Return, ast.Yield, ast.YieldFrom)
    found = [n for n in ast.walk(tree) if isinstance(n, gives) and id(n) not in within]
    return not any(n.value is not None or not isinstance(n, ast.Return) for n in found)


def signature(shown: fastcore.docments.DocmentText) -> str:
    "As fastcore's, but a class is called one and has no return type, and a function that gives nothing says so."
    text = _signature(shown)
    if inspect.isclass(shown.obj):
        return re.sub(r"\)->None:$", "):", re.sub("^def ", "class ", text))
    if inspect.isfunction(shown.obj) and text.endswith("):") and gives_nothing(shown.obj):
        return text[:-1] + "->None:"
    return text


# At the top level: nbdev's worker processes import this script.
nbdev.processors._do_eval = runs
inspect.get_annotations = annotations
fastcore.docments._parses = parses
fastcore.docments._maybe_nm = type_name
fastcore.docments.DocmentText.__str__ = signature


def notebooks() -> list[Path]:
    nbs = ROOT / "nbs"
    return [
        p
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(q.startswith((".", "_")) for q in p.relative_to(nbs).parts)
    ]


def tidy(text: str) -> str:
    "A processed notebook without `__main__.` before types (cells were run as a program of their own), and without links to source files while the repository has no address."
    return re.sub(r"\[source\]\(/blob/[^)]*\)\{[^}]*\}|__main__\.(?=[A-Z])", "", text)


def quoted(text: str) -> str:
    "Documentation whose example commands and options stand in back-ticks: Pandoc makes a long dash of `--`, which nobody can copy. Types that only a command reads are left out of signatures."
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        part = re.sub(r"(?m)^(Examples?: )(tipr .+)$", r"\1`\2`", parts[i])
        spans = re.split(r"(`[^`\n]*`)", part)
        spans[::2] = [re.sub(r"(?<![\w`-])(--[a-z][\w-]*)", r"`\1`", span) for span in spans[::2]]
        parts[i] = "".join(spans)
    parts[1::2] = [re.sub(r":Annotated(?=[=,)\n])", "", part) for part in parts[1::2]]
    return "".join(parts)


def api_faults(text: str) -> list[str]:
    "What of a definition's documentation cannot be read or copied: half a type, no return type, an option that Pandoc writes with a long dash."
    found = []
    for code in re.findall(r"```python\n((?:async )?(?:def|class) .*?)\n```", text, flags=re.S):
        plain = re.sub(r" # .*", "", code)
        name = re.split(r"[ (]", plain.removeprefix("async "))[1]
        halves = re.findall(r"(?::|->)(?:typing\.)?(Annotated|Union|Optional)\b", plain)
        found += [f"{name}: {half} without what it holds" for half in halves]
        if "def " in plain and "->" not in plain.rpartition(")")[2]:
            found.append(f"{name}: no return type")
    outside = "".join(re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)[::2])
    options = re.findall(r"(?<![\w-])--[a-z][\w-]*", outside)
    return found + [f"{option} outside of back-ticks" for option in options]


def light(path: Path):
    "A processed notebook's pictures with a palette, so that its page stays light; its documentation fit to be copied."
    from run_nbs import shrink

    book = json.loads(tidy(path.read_text(encoding="utf-8")))
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = described("".join(cell["source"])).splitlines(keepends=True)
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            shrink(data)
            if "text/markdown" in data:
                data["text/markdown"] = quoted("".join(data["text/markdown"]))
            for kind in data.keys() & {"text/markdown", "text/html"}:
                data[kind] = unbroken("".join(data[kind]))
    path.write_text(json.dumps(book, ensure_ascii=False, indent=1), encoding="utf-8")


def unbroken(text: str) -> str:
    "Tables whose values with a spread or an interval stay on one line: `59.9 ± 0.2`, `1.9 to 4.9`."
    text = re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", text)
    return re.sub(r"(<td[^>]*>[-+\d.]+) to ([-+\d.]+</td>)", "\\1\u00a0to\u00a0\\2", text)


def described(text: str) -> str:
    "Markdown whose pictures keep their words as alternative text: Quarto takes the words of a picture on its own line for a caption."
    return re.sub(r'!\[([^\]"]+)\]\(([^)\s]+)\)(?!\{)', r'![\1](\2){fig-alt="\1"}', text)


def mend_anchors(site: Path) -> int:
    """Links to places that no page has, led to the class instead of its method, or else to the top of the page; returns how many.

    nbdev links every name in back-ticks, methods and private names too, and gives anchors to public functions and classes only."""
    from walk_site import Marks, all_pages

    ids = {name: Marks((site / name).read_text(encoding="utf-8")).ids for name in all_pages(site)}
    count = 0
    for name in ids:
        path = site / name
        text = path.read_text(encoding="utf-8")
        for link in set(re.findall(r'<a [^>]*?href="([^"]*#[^"]+)"', text)):
            better = living(link, name, ids)
            if better != link:
                count += text.count(f'href="{link}"')
                text = text.replace(f'href="{link}"', f'href="{better}"')
        path.write_text(text, encoding="utf-8")
    return count


def living(link: str, page: str, ids: dict[str, set[str]]) -> str:
    "A link of a page, without its anchor or with that of the class where its own is nowhere."
    from walk_site import is_remote

    target, _, anchor = link.partition("#")
    there = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
    if is_remote(link) or there not in ids or anchor in ids[there]:
        return link
    owner = anchor.partition(".")[0]
    return f"{target}#{owner}" if owner in ids[there] else target or os.path.basename(page)


def process() -> int:
    "nbdev's processing of every notebook into _proc; returns how many came out."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    refresh_quarto_yml()
    proc_nbs(force=True, n_workers=2)
    done = list((ROOT / "_proc").rglob("*.ipynb"))
    if len(done) != len(notebooks()):
        sys.exit(
            f"nbdev processed {len(done)} of {len(notebooks())} notebooks; is the checkout inside a folder whose name starts with a dot?"
        )
    for path in done:
        light(path)
    return len(done)


def main():
    link = ROOT / "nbs" / "_quarto.yml"
    if not link.exists():
        link.symlink_to("../_quarto.yml")
    count = process()
    if not shutil.which("quarto"):
        print(
            f"{count} notebooks processed into _proc; no site: Quarto is not on the PATH (get it from https://quarto.org/docs/get-started, then `make docs` again)"
        )
        return
    done = subprocess.run(["quarto", "render", "--no-cache"], cwd=ROOT / "_proc").returncode
    if done:
        sys.exit(done)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(ROOT / "_proc" / "_docs", ROOT / "_docs")
    mended = mend_anchors(ROOT / "_docs")
    print(
        f"{count} notebooks rendered, {mended} links to methods and private names led to their class or page; open _docs/index.html"
    )


if __name__ == "__main__":
    main()
