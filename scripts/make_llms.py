"""nbs/llms.txt, a map of the notebooks for language models, from their titles and first lines: `python scripts/make_llms.py`, or `--check` to fail when it is out of step."""

import argparse, configparser, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    "tutorials": "Tutorials",
    ".": "The library, in reading order",
    "papers": "The papers, each told end to end",
    "datasets": "The real datasets",
}
FIRST = (
    "index",
    "tutorials/quickstart",
    "tutorials/own_photos",
    "tutorials/real_footage",
    "papers/sen",
    "papers/gea",
    "papers/ablation",
)  # these come first in their folder, in this order


def address(root: Path) -> str:
    "Where the site is, with a slash at its end; nothing while nobody has published it (links are then relative)."
    config = configparser.ConfigParser()
    config.read(root / "settings.ini")
    host, base = (config["DEFAULT"].get(k, "").strip() for k in ("doc_host", "doc_baseurl"))
    return f"{host.rstrip('/')}/{base.strip('/')}".rstrip("/") + "/" if host else ""


def title(path: Path) -> tuple[str, str]:
    "A notebook's title and its one line."
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] != "markdown":
            continue
        lines = "".join(c["source"]).strip().splitlines()
        if lines and lines[0].startswith("# "):
            return lines[0][2:].strip(), " ".join(
                " ".join(
                    line.lstrip("> ").strip() for line in lines[1:] if line.startswith(">")
                ).split()
            )
        break
    return path.stem, ""


def page(path: Path) -> Path:
    "Where a notebook's page lies on the site: nbdev leaves out the number that orders the notebooks."
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem) + ".html")


def section(path: Path) -> str:
    "The section of a notebook, given by its path in nbs/: a folder, or `.` for the numbered ones of the library."
    return path.parts[0] if path.parts[0] in SECTIONS else "."


def reading_order(nbs: Path) -> list[Path]:
    "All notebooks of a folder, relative to it, section by section; the library's in the order of their numbers."
    found = [p.relative_to(nbs) for p in nbs.rglob("*.ipynb")]
    found = [p for p in found if not any(q.startswith((".", "_")) for q in p.parts)]
    sections = list(SECTIONS)

    def key(path: Path):
        name = path.with_suffix("").as_posix()
        first = FIRST.index(name) if name in FIRST else len(FIRST)
        return sections.index(section(path)), first, not name[0].isdigit(), name

    return sorted(found, key=key)


def llms(root: Path = ROOT) -> str:
    home, nbs = address(root), root / "nbs"
    config = configparser.ConfigParser()
    config.read(root / "settings.ini")
    out = [
        f"# {config['DEFAULT']['title']}",
        "",
        f"> {config['DEFAULT']['description']}.",
        "",
        "Every page is a notebook that is also the source of a module of the Python package `tipr_nb`; a notebook imports only those before it. Pages show code, its output, and what goes wrong with bad input.",
        "",
    ]
    for folder, heading in SECTIONS.items():
        found = [nbs / p for p in reading_order(nbs) if section(p) == folder]
        if not found:
            continue
        out += [f"## {heading}", ""]
        for p in found:
            name, line = title(p)
            link = home + page(p.relative_to(nbs)).as_posix()
            out.append(f"- [{name}]({link})" + (f": {re.sub(r'[*`]', '', line)}" if line else ""))
        out.append("")
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    new, path = llms(), ROOT / "nbs/llms.txt"
    if parser.parse_args().check:
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            sys.exit("nbs/llms.txt is out of step with the notebooks' titles; run `make readme`")
    else:
        path.write_text(new, encoding="utf-8")
