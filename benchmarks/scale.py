"""Bringing a large gallery up to date where nothing, or little, has changed: time and memory a row, listing apart from planning.

    python -m benchmarks.scale                              # 100,000 and 1,000,000 rows; a folder of as many files, made of hard links
    python -m benchmarks.scale --rows 100000 --dims 64      # a try; written to results/scale-partial.json

The gallery is made by import, the state of every file is written into its table, and a process of its own brings it up to date with a model that encodes nothing. Memory is what the process holds beyond
memory-mapped files (RssAnon), at its highest, less what it held before; it does not depend on the machine's load.
"""

from __future__ import annotations

import argparse, json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np

from benchmarks.common import run, show, write_result
from tipr_nb.core import read_json, write_json
from tipr_nb.search import find_photos, import_features, index_photos

LINKS = 30_000  # names of one file: file systems allow some 65,000
FOLDER = 1000  # files in a folder


class Still:
    "A model that is never asked, and says so if it is."

    image_size = (384, 128)
    fingerprint = "benchmark"
    arch = "imported"

    def __init__(self, dim: int):
        self.dim = dim

    def encode_image(self, pictures):
        "Constant features, for the few photos that were added."
        x = np.ones((len(pictures), self.dim), np.float32)
        return x / np.sqrt(self.dim)


def make_files(folder: Path, n: int):
    "`n` names of a few small pictures."
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(n):
        if i % LINKS == 0:
            original = folder.parent / f"original-{i}.jpg"
            Image.new("RGB", (64, 192), (i // LINKS * 7 % 256, 0, 0)).save(original)
        if i % FOLDER == 0:
            (folder / f"{i // FOLDER:06d}").mkdir()
        os.link(original, folder / f"{i // FOLDER:06d}" / f"{i % FOLDER:03d}.jpg")


def make_gallery(home: Path, n: int, dims: int):
    "Imported features whose table knows the state of every file."
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tipr_nb.search.storage import file_sums

    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(home / "x.npy", mode="w+", dtype=np.float32, shape=(n, dims))
    for i in range(0, n, 1 << 16):
        block = rng.standard_normal((min(1 << 16, n - i), dims), dtype=np.float32)
        x[i : i + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    photos = list(find_photos(home / "photos"))
    import_features(
        home / "gallery", x, [p.name for p in photos], "benchmark", root=str(home / "photos")
    )
    snapshot = home / "gallery" / "g000001"
    table = pq.read_table(snapshot / "items.parquet")
    known = dict(
        size=pa.array([p.size for p in photos]),
        mtime=pa.array([p.mtime for p in photos]),
        sha256=pa.array([f"{i:064x}" for i in range(n)]),
        request=pa.array(["whole"] * n),
        at=pa.array(np.zeros(n, np.int64)),
        width=pa.array(np.full(n, 64)),
        height=pa.array(np.full(n, 192)),
    )
    for name, column in known.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, snapshot / "items.parquet", row_group_size=4096, compression="zstd")
    manifest = read_json(home / "gallery" / "gallery.json")
    write_json(home / "gallery" / "gallery.json", manifest | dict(sha256=file_sums(snapshot)))
    (home / "x.npy").unlink()


class Watch:
    "Seconds of a block, and its memory at the highest beyond memory-mapped files (Linux)."

    def __enter__(self):
        self.before = self.peak = self._anonymous()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        self.start = time.perf_counter()
        self.cpu_start = time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.cpu = time.process_time() - self.cpu_start
        self.over.set()
        self.thread.join()
        self.bytes = max(self.peak, self._anonymous()) - self.before

    def _look(self):
        while not self.over.wait(0.003):
            self.peak = max(self.peak, self._anonymous())

    @staticmethod
    def _anonymous() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def update(home: Path, dims: int):
    "One update in this process; a line of JSON."
    model = Still(dims)
    (home / "few").mkdir(exist_ok=True)
    if not (
        home / "few" / "gallery"
    ).exists():  # imports and thread pools are no part of the figures
        make_files(home / "few" / "photos", 10)
        make_gallery(home / "few", 10, dims)
    index_photos(
        home / "few" / "gallery", find_photos(home / "few" / "photos"), model, text_tower=False
    )
    before = read_json(home / "gallery" / "gallery.json")
    with Watch() as listing:
        photos = find_photos(home / "photos")
    with Watch() as planning:
        report = index_photos(home / "gallery", photos, model, text_tower=False)
    after = read_json(home / "gallery" / "gallery.json")
    written = [
        p.stat().st_size
        for p in (home / "gallery" / after["generation"]).iterdir()
        if after["generation"] != before["generation"]
    ]
    facts = dict(
        listing=(listing.seconds, listing.cpu, listing.bytes),
        planning=(planning.seconds, planning.cpu, planning.bytes),
        new=report.new,
        unchanged=report.unchanged,
        removed=report.removed,
        written=sum(written),
    )
    print(json.dumps(facts))


def rows_of(what: str, n: int, dims: int, facts: dict) -> list[dict]:
    "Lines of the table."
    rows = []
    for step, about in (("listing", "listing the folder"), ("planning", "index_photos")):
        seconds, cpu, memory = facts[step]
        rows.append(
            dict(
                what=f"{what}, {n:,} rows: {about}",
                rows=n,
                dims=dims,
                us_per_row=round(1e6 * seconds / n, 2),
                cpu_us_per_row=round(1e6 * cpu / n, 2),
                bytes_per_row=round(memory / n, 1),
                written_mb=round(facts["written"] / 1e6, 2) if step == "planning" else None,
            )
        )
    return rows


def in_process(home: Path, dims: int) -> dict:
    "An update in a process of its own."
    command = [sys.executable, "-m", "benchmarks.scale", "--update", str(home), "--dims", str(dims)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(home: Path, n: int, dims: int, added: int) -> list[dict]:
    "No-op update, then some photos added, then the same removed."
    make_files(home / "photos", n)
    make_gallery(home, n, dims)
    rows = rows_of("nothing changed", n, dims, in_process(home, dims))
    more = home / "photos" / "added"
    more.mkdir()
    original = next(home.glob("original-*.jpg")).read_bytes()
    for i in range(added):
        (more / f"{i}.jpg").write_bytes(original + bytes(f"{i}", "ascii"))
    rows += rows_of(f"{added} photos added", n, dims, in_process(home, dims))
    for path in more.iterdir():
        path.unlink()
    rows += rows_of(f"{added} photos removed", n, dims, in_process(home, dims))
    return [r | dict(load=round(os.getloadavg()[0], 1)) for r in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--added", type=int, default=100)
    parser.add_argument("--scratch", help="folder for a few GB of temporary files")
    parser.add_argument("--update", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.update:
        return update(Path(args.update), args.dims)
    rows: list[dict] = []
    for n in args.rows:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            rows += measure(Path(scratch), n, args.dims, args.added)
    usual = set(args.rows) <= set(parser.get_default("rows"))
    whole = usual and args.dims == parser.get_default("dims")
    show(rows, "updates")
    print(write_result("scale" if whole else "scale-partial", rows, key="what", module="scale"))


if __name__ == "__main__":
    run(main)
