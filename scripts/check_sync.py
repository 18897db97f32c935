"""Are notebooks, library and README in step? Exports into a copy and compares; checks that notebooks carry outputs. `python scripts/check_sync.py`."""

import filecmp, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["settings.ini", "pyproject.toml", "README.md", "nbs", "tipr_nb"]


def exported_elsewhere(folder: Path) -> list[str]:
    "Modules that `nbdev_export` would write differently from what is committed."
    for name in NEEDED:
        src, dst = ROOT / name, folder / name
        if src.is_dir():
            shutil.copytree(
                src,
                dst,
                ignore=shutil.ignore_patterns("__pycache__", "weights", ".ipynb_checkpoints"),
            )
        elif src.exists():
            shutil.copy(src, dst)
    subprocess.run(
        [str(Path(sys.executable).parent / "nbdev_export")],
        cwd=folder,
        check=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
    )
    ours, theirs = [
        {p.relative_to(base / "tipr_nb") for p in (base / "tipr_nb").rglob("*.py")}
        for base in (ROOT, folder)
    ]
    return sorted(
        f"tipr_nb/{p}"
        for p in ours | theirs
        if p not in ours
        or p not in theirs
        or not filecmp.cmp(ROOT / "tipr_nb" / p, folder / "tipr_nb" / p, shallow=False)
    )


def descriptions(source: str) -> tuple[list[str], str]:
    "What `#| fig-alt:` says of each picture of a cell, and what is wrong with the line."
    line = re.search(r"^#\|\s*fig-alt:\s*(.+)$", source, re.M)
    if not line:
        return [], ""
    try:
        said = json.loads(line[1])
    except ValueError:
        return [], " (not a quoted text)"
    return ([said] if isinstance(said, str) else said), ""


def notebook_findings() -> list[str]:
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        name = path.relative_to(ROOT)
        if any(p.startswith((".", "_")) for p in name.parts):
            continue
        code = [
            c
            for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code"
        ]
        source = lambda c: "".join(c["source"])
        shown = [
            c
            for c in code
            if source(c).strip()
            and not re.search(r"#\|\s*(exporti?|hide|default_exp|eval:\s*false)", source(c))
        ]
        if shown and not any(c.get("outputs") for c in shown):
            found.append(f"{name}: no cell carries an output; run `make nbs`")
        if any(o.get("output_type") == "error" for c in code for o in c.get("outputs", [])):
            found.append(f"{name}: a cell holds an error")
        if any(isinstance(c["source"], str) and "\n" in c["source"] for c in code):
            found.append(f"{name}: a cell's source is one string; save it with nbformat")
        for c in code:
            pictures, (said, wrong) = (
                sum(
                    any(kind.startswith("image/") for kind in o.get("data", {}))
                    for o in c.get("outputs", [])
                ),
                descriptions(source(c)),
            )
            if (pictures or said) and (
                wrong or len(said) != pictures or not all(s.strip() for s in said)
            ):
                found.append(
                    f"""{name}: the cell that begins {source(c).splitlines()[0][:50]!r} shows {pictures} pictures and describes {len(said)}{wrong}; one `#| fig-alt: "..."` for each picture shown (a list for several), and a cell that shows none has lost it"""
                )
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as tmp:
        stale = exported_elsewhere(Path(tmp))
    findings = [
        f"{s} differs from what its notebook exports; run `nbdev_export`" for s in stale
    ] + notebook_findings()
    if subprocess.run([sys.executable, str(ROOT / "scripts/make_readme.py"), "--check"]).returncode:
        findings.append("README.md: see above")
    for f in findings:
        print(f, file=sys.stderr)
    if findings:
        sys.exit(1)
    print("notebooks, library and README are in step")
