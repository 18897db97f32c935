"""README.md from nbs/index.ipynb: `python scripts/make_readme.py`, or `--check` to fail when they are out of step."""

import argparse, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from check_sync import descriptions

ROOT = Path(__file__).resolve().parent.parent


def visible(cell) -> bool:
    return not re.search(r"^#\|\s*(hide|exporti?|default_exp)\b", cell.source, re.M)


def prepare(nb):
    "Drop hidden cells and directives; the pictures' descriptions are kept in `nb.metadata`."
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [
        c for c in nb.cells if c.cell_type != "raw" and (c.cell_type == "markdown" or visible(c))
    ]
    nb.metadata["alts"] = [
        text for c in nb.cells if c.cell_type == "code" for text in descriptions(c.source)[0]
    ]
    for c in nb.cells:
        if c.cell_type != "code":
            continue
        if re.search(r"^#\|\s*echo:\s*false", c.source, re.M):
            c.metadata["transient"] = {"remove_source": True}
        c.source = "\n".join(line for line in c.source.splitlines() if not line.startswith("#|"))
    return nb


def from_root(text: str) -> str:
    "Links are relative to nbs/ in the notebook and to the top folder in the README."

    def fix(m):
        target = m[2]
        if re.match(r"[a-z]+:|#|/", target):
            return m[0]
        target = target[3:] if target.startswith("../") else f"nbs/{target}"
        return f"{m[1]}{target}{m[3]}"

    text = re.sub(r"(\]\()([^)\s]+)(\))", fix, text)
    return re.sub(r"""((?:src|href|srcset)=")([^"]+)(")""", fix, text)


def tag_fences(text: str) -> str:
    "Untagged fences hold what a command printed."
    out, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            if not inside and line.strip() == "```":
                line = "```text"
            inside = not inside
        out.append(line)
    return "\n".join(out)


def indented_to_fence(text: str) -> str:
    "nbconvert shows plain outputs as indented blocks; fences read better."

    def fence(m):
        return (
            "\n```text\n" + re.sub(r"^ {4}", "", m[0].strip("\n"), flags=re.M).rstrip() + "\n```\n"
        )

    return re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*\n)+(?:\n(?: {4}.*\n)+)*", fence, text)


def readme() -> tuple[str, dict[str, bytes]]:
    "The text, and the pictures among the outputs (a README shows files, not data), named in order."
    nb = prepare(nbformat.read(ROOT / "nbs/index.ipynb", as_version=4))
    text, resources = MarkdownExporter(
        exclude_input_prompt=True, exclude_output_prompt=True
    ).from_notebook_node(nb)
    pictures, alts = {}, iter(nb.metadata["alts"])
    for n, (old, data) in enumerate(resources.get("outputs", {}).items(), 1):
        new = f"images/index-{n}{Path(old).suffix}"
        text, pictures[new] = (
            text.replace(f"![png]({old})", f"![{next(alts, 'what the cell above shows')}]({new})"),
            data,
        )
    text = re.sub(r"^[ \t]+$", "", text, flags=re.M)
    text = from_root(tag_fences(indented_to_fence(text)))
    return "<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n\n" + re.sub(
        r"\n{3,}", "\n\n", text
    ).strip() + "\n", pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    (new, pictures), path = readme(), ROOT / "README.md"
    files = {ROOT / "nbs" / name: data for name, data in pictures.items()}
    if parser.parse_args().check:
        if (
            not path.exists()
            or path.read_text(encoding="utf-8") != new
            or any(not f.exists() or f.read_bytes() != data for f, data in files.items())
        ):
            sys.exit("README.md is out of step with nbs/index.ipynb; run `make readme`")
    else:
        path.write_text(new, encoding="utf-8")
        for f, data in files.items():
            f.write_bytes(data)
