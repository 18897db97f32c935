"""Run notebooks in place and keep their outputs: `python scripts/run_nbs.py [notebook or folder ...] [--flags slow,gpu]`.

Honours nbdev's directives: cells with `#| eval: false`, or with a flag of `tst_flags` that was not asked for, are not run; what they printed before stays, and they are
listed at the end. Front matter `skip_exec: true` skips a notebook. Any error stops with the cell's number and leaves the file as it was.
"""
import argparse, base64, io, os, re, sys, time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent


def known_flags() -> set[str]:
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return {f.strip() for f in re.split(r"[|,\s]+", config["DEFAULT"].get("tst_flags", "")) if f.strip()}


def directives(cell) -> set[str]:
    return {line.strip()[2:].strip() for line in cell.source.splitlines() if line.strip().startswith("#|")}


def why_skipped(cell, wanted: set[str]) -> str | None:
    found = directives(cell)
    if any(re.fullmatch(r"eval:\s*false", d) for d in found): return "eval: false"
    held = {d for d in found if d in known_flags()} - wanted
    return ", ".join(sorted(held)) or None


class Runner(NotebookClient):
    wanted: set[str] = set()
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left_alone = []

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type == "code" and (reason := why_skipped(cell, self.wanted)):
            self.left_alone.append((cell_index, reason, bool(cell.get("outputs"))))
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def with_palette(png: bytes) -> bytes:
    "A PNG in 256 colours where that is smaller: a third of its size for pictures of people, and no visible loss at a figure's size."
    from PIL import Image

    full = Image.open(io.BytesIO(png))
    if full.mode == "P" or len(png) < 20_000:
        return png
    buffer = io.BytesIO()
    few = full.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    few.save(buffer, "PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)


def shrink(data: dict):
    "An output's PNG with a palette, in place."
    if "image/png" in data:
        png = base64.b64decode("".join(data["image/png"]))
        data["image/png"] = base64.b64encode(with_palette(png)).decode()


def clean(nb):
    "Leave what a reader sees and nothing that changes from run to run."
    nb.metadata = nbformat.NotebookNode(kernelspec=dict(display_name="python3", language="python", name="python3"))
    for i, cell in enumerate(nb.cells):
        cell.metadata = nbformat.NotebookNode()
        cell["id"] = f"cell-{i:03d}"
        if cell.cell_type != "code": continue
        cell.execution_count = None
        kept = []
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr": continue
            if "execution_count" in out: out.execution_count = None
            if "metadata" in out: out.metadata = nbformat.NotebookNode()
            data = out.get("data", {})
            shrink(data)
            for key in [k for k in data if "widget" in k]: del data[key]
            for key, value in data.items():
                if isinstance(value, str): data[key] = re.sub(r" at 0x[0-9a-fA-F]+", "", value)
            kept.append(out)
        cell.outputs = kept


def run(path: Path, wanted: set[str], timeout: int) -> bool:
    start, nb = time.time(), nbformat.read(path, as_version=4)
    head = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "raw" else ""
    if re.search(r"skip_exec:\s*true", head):
        print(f"{path.relative_to(ROOT)}: skipped (skip_exec)")
        return True
    runner = Runner(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, record_timing=False)
    runner.wanted = wanted
    try: runner.execute()
    except CellExecutionError as e:
        print(f"{path.relative_to(ROOT)}: FAILED\n{e}", file=sys.stderr)
        return False
    clean(nb)
    tmp = path.with_suffix(".ipynb.tmp")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)
    print(f"{path.relative_to(ROOT)}: {time.time() - start:.0f} s")
    for index, reason, stored in runner.left_alone: print(f"   cell {index} not run ({reason}); {'stored output kept' if stored else 'no stored output'}")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["nbs"])
    parser.add_argument("--flags", default="", help="flags of settings.ini's tst_flags to run too, e.g. slow,gpu")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds a cell may take")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    os.environ["TIPR_QUIET"] = "1"
    found = []
    for p in map(Path, args.paths):
        found += sorted(q for q in p.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in q.relative_to(p).parts)) if p.is_dir() else [p]
    if not found: sys.exit(f"no notebooks under {', '.join(args.paths)}")
    failed = [p for p in found if not run(p.resolve(), set(filter(None, args.flags.split(","))), args.timeout)]
    if failed: sys.exit(f"{len(failed)} of {len(found)} notebooks failed: {', '.join(p.name for p in failed)}")
    print(f"{len(found)} notebooks run")


if __name__ == "__main__": main()
