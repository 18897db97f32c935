"""Search at scale against the bare libraries in the same run: latency, recall, filters, opening, indexing throughput, cold starts.

python -m benchmarks.search                         # a million features (about five minutes on two free cores, 6 GB)
python -m benchmarks.search --only cold,indexing    # these rows anew, the others of results/search.json stay
python -m benchmarks.search --rows 100000           # a try; written to results/search-partial.json
"""

from __future__ import annotations

import argparse, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import (
    free_memory_gb,
    interleave,
    medians,
    peak_memory,
    run,
    seconds,
    set_threads,
    show,
    write_result,
)
from tipr_nb.search import ExactEngine, overlap
from tipr_nb.search import import_features, index_photos
from tipr_nb.search import find_photos
from tipr_nb.search import Gallery

TARGET = 0.97


def clustered(
    n: int,
    d: int,
    centres: int,
    path: Path,
    seed: int = 0,
    noise: float = 0.6,
    block: int = 1 << 16,
) -> np.memmap:
    "Unit features in clusters: cosine about .86 to their centre, as pictures of people in similar clothes."
    rng = np.random.default_rng(seed)
    c = rng.standard_normal((centres, d), dtype=np.float32)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
    for i in range(0, n, block):
        m = min(block, n - i)
        x = c[rng.integers(centres, size=m)] + noise / np.sqrt(d) * rng.standard_normal(
            (m, d), dtype=np.float32
        )
        out[i : i + m] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out


def queries_near(x: np.ndarray, n: int, seed: int = 1, noise: float = 0.3) -> np.ndarray:
    "Rows of the gallery, disturbed."
    rng = np.random.default_rng(seed)
    q = np.asarray(x[np.sort(rng.choice(len(x), n, replace=False))]) + noise / np.sqrt(
        x.shape[1]
    ) * rng.standard_normal((n, x.shape[1]), dtype=np.float32)
    return (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32)[rng.permutation(n)]


def one_by_one(cases: dict, queries, repeats: int = 1) -> dict[str, tuple[float, np.ndarray]]:
    "Median milliseconds of a query asked alone, and the rows found; the cases take turns at every query."
    times, rows = {k: [] for k in cases}, {k: [] for k in cases}
    for r in range(repeats):
        for q in queries:
            for k, search in cases.items():
                start = time.perf_counter()
                found = search(q[None])
                times[k].append(time.perf_counter() - start)
                if not r:
                    rows[k].append(found)
    return {k: (1000 * median(times[k]), np.concatenate(rows[k])) for k in cases}


def bare_faiss(x: np.ndarray, nlist: int):
    "What a user of the bare library writes: IVF, fp16, trained on FAISS's usual sample, filled in blocks."
    import faiss

    index = faiss.index_factory(x.shape[1], f"IVF{nlist},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 10
    rng = np.random.default_rng(0)
    index.train(
        np.ascontiguousarray(x[np.sort(rng.choice(len(x), min(len(x), 64 * nlist), replace=False))])
    )
    for i in range(0, len(x), 1 << 17):
        index.add(np.ascontiguousarray(x[i : i + (1 << 17)]))
    return index


def vectors(home: Path, n: int, d: int, n_queries: int, repeats: int) -> list[dict]:
    "Engines on clustered features."
    import faiss

    x = clustered(n, d, max(50, n // 100), home / "features.npy")
    q = queries_near(x, n_queries)
    truth = ExactEngine(x).search(q, 10)[1]
    nlist = 4096 if n >= 1_000_000 else 2 ** round(np.log2(4 * n**0.5))
    rows, bare = [], None

    start = time.perf_counter()
    bare = bare_faiss(x, nlist)
    bare_build = time.perf_counter() - start
    rng = np.random.default_rng(2)
    start = time.perf_counter()
    cameras = np.char.add("c", rng.integers(0, 100, n).astype(str))
    import_features(
        home / "gallery",
        x,
        (f"{i // 1000:04d}/{i % 1000:03d}.jpg" for i in range(n)),
        "benchmark",
        columns=dict(camera=cameras.tolist(), day=rng.integers(0, 365, n)),
    )
    imported = time.perf_counter() - start
    gallery = Gallery(home / "gallery")
    with peak_memory() as memory:
        start = time.perf_counter()
        built = gallery.add_engine("ivf", quantise="fp16", nlist=nlist, recall=TARGET + 0.005)
        build = time.perf_counter() - start
    rows += [
        dict(what="build IVF-fp16, bare FAISS", seconds=bare_build),
        dict(
            what="build IVF-fp16, Gallery.add_engine (with calibration)",
            seconds=build,
            peak_gb=memory["gb"],
            note=built["recipe"],
        ),
        dict(what="import features and table", seconds=imported),
    ]

    # the least effort of the bare index that reaches the target, as ours finds its own
    for nprobe in (*range(1, 17), *range(18, 256, 4)):
        params = faiss.SearchParametersIVF(nprobe=nprobe)
        if overlap(bare.search(q, 10, params=params)[1], truth) >= TARGET:
            break
    engine = gallery.engine("ivf")
    same = faiss.SearchParametersIVF(nprobe=engine.effort)
    ivf = {
        "bare FAISS at the target": lambda v: bare.search(v, 10, params=params)[1],
        "bare FAISS at the engine's effort": lambda v: bare.search(v, 10, params=same)[1],
        "engine": lambda v: engine.search(v, 10)[1],
        "Gallery, hits with paths and columns": lambda v: np.array(
            [[h.row for h in gallery.hits(engine.search(v, 10)[1][0])]]
        ),
    }
    effort = {"bare FAISS at the target": nprobe}
    rows += [
        dict(
            what=f"query, {k}",
            ms=t,
            recall=overlap(found, truth),
            effort=effort.get(k, engine.effort),
        )
        for k, (t, found) in one_by_one(ivf, q, repeats).items()
    ]

    def product(v):
        s = x @ v[0]
        top = np.argpartition(s, -10)[-10:]
        return top[np.argsort(-s[top])][None]

    exact, few = ExactEngine(gallery.features), q[: max(5, n_queries // 20)]
    both = {"bare product and top 10": product, "exact engine": lambda v: exact.search(v, 10)[1]}
    rows += [
        dict(what=f"exact, {k}", ms=t, recall=overlap(found, truth[: len(few)]))
        for k, (t, found) in one_by_one(both, few, repeats).items()
    ]

    for where in ("camera == 'c7'", "camera == 'c7' and day < 180", "day < 36", "day < 180"):
        mask = gallery.where(where).mask
        true_rows = exact.search(few, 10, gallery.where(where))[1]

        def ask(v, name, where=where):
            gallery.view.engines._selections.clear()  # the filter is decided anew each time
            return gallery.engine(name).search(v, 10, gallery.where(where))[1]

        answers = one_by_one(
            {name: lambda v, name=name, ask=ask: ask(v, name) for name in ("ivf", "exact")}, few
        )
        rows += [
            dict(
                what=f"filter {where} ({mask.mean():.1%}), {name}",
                ms=t,
                recall=overlap(found, true_rows),
            )
            for name, (t, found) in answers.items()
        ]

    code = "import sys, time; import numpy as np; from tipr_nb.search import Gallery; t = time.perf_counter(); g = Gallery(sys.argv[1]); o = time.perf_counter(); e = g.engine('ivf'); p = time.perf_counter(); e.search(np.eye(1, g.features.shape[1], dtype=np.float32), 10); print(o - t, p - o, time.perf_counter() - p)"
    opened = [
        list(
            map(
                float,
                subprocess.run(
                    [sys.executable, "-c", code, str(home / "gallery")],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.split(),
            )
        )
        for _ in range(repeats)
    ]
    for i, what in enumerate(("open the gallery", "open its index (mapped)", "first query")):
        rows.append(dict(what=what, seconds=median(o[i] for o in opened)))
    return [dict(rows=n, dims=d, **r) for r in rows]


def indexing(home: Path, n: int, repeats: int) -> list[dict]:
    "People a second through `index_photos` against the encoder alone, on decoded pictures."
    import torch
    from tipr_nb.models import PersonCLIP
    from tipr_nb.data import EvalTransform, stack_images

    torch.manual_seed(0)
    model = PersonCLIP("tipr-tiny").eval()
    photos = find_photos(pictures(home / "photos", n))
    raw = stack_images([p.path for p in photos], model.image_size)
    prepare = EvalTransform(model.image_size)

    def alone():
        with torch.no_grad():
            for i in range(0, n, 64):
                model.encode_image(prepare(raw[i : i + 64])[0])

    def index():
        shutil.rmtree(home / "g", ignore_errors=True)
        index_photos(home / "g", photos, model, text_tower=False)

    times = medians(
        interleave(
            {"encoder alone, decoded pictures": alone, "index_photos, from JPEG": index}, repeats
        )
    )
    base = n / times["encoder alone, decoded pictures"]
    return [
        dict(what=f"indexing: {k}", per_second=n / t, share=n / t / base) for k, t in times.items()
    ]


def pictures(folder: Path, n: int) -> Path:
    "Noisy JPEGs of people's shape and size."
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    base = [
        Image.fromarray(rng.integers(0, 255, (24, 8, 3), dtype=np.uint8)).resize(
            (64, 192), Image.Resampling.BICUBIC
        )
        for _ in range(64)
    ]
    for i in range(n):
        p = base[i % 64].copy()
        p.putpixel((i % 64, i // 64 % 192), (i % 256, i // 256 % 256, 77))
        p.save(folder / f"{i:06d}.jpg", quality=90)
    return folder


def cold(home: Path, n: int, repeats: int) -> list[dict]:
    "A sentence to a gallery of `n` people: the whole process, and once more in a running one."
    import torch
    from tipr_nb.models import PersonCLIP
    from tipr_nb.search import export_image_tower, export_text_tower, model_fingerprint

    torch.manual_seed(0)
    model = PersonCLIP("tipr-tiny").eval()
    x = np.random.default_rng(0).standard_normal((n, model.dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    facts = import_features(
        home / "g",
        x,
        (f"{i}.jpg" for i in range(n)),
        model_fingerprint(model),
        columns=dict(camera=[f"c{i % 4}" for i in range(n)]),
    )
    export_text_tower(model, home / "g" / "text", facts["fingerprint"])
    from tipr_nb.core import write_json

    write_json(home / "g" / "gallery.json", facts | dict(engine="exact", text_tower=True))
    ask = [
        sys.executable,
        "-m",
        "tipr_nb.cli",
        "search",
        "a man in a red coat with a backpack",
        "--gallery",
        str(home / "g"),
        "--where",
        "camera == 'c2'",
    ]
    export_image_tower(model, facts["fingerprint"])
    example = next(pictures(home / "example", 1).iterdir())
    by_picture = [*ask[:4], "--image", str(example), *ask[5:]]
    commands = {
        "tipr search": ask,
        "tipr search --image, its tower in the cache": by_picture,
        "tipr index with nothing to do": nothing_to_do(home, n),
        "bare import of torch and open_clip": [
            sys.executable,
            "-c",
            "from tipr_nb.core import ensure_torchvision; ensure_torchvision(); import torch, open_clip",
        ],
    }
    times, cpu = {k: [] for k in commands}, {k: [] for k in commands}
    for _ in range(repeats):
        for k, command in commands.items():
            before = _busy()
            times[k].append(
                seconds(
                    lambda command=command: subprocess.run(command, check=True, capture_output=True)
                )
            )
            cpu[k].append(_busy() - before)
    gallery, warm = Gallery(home / "g"), []
    for i in range(200):
        start = time.perf_counter()
        gallery.search(f"a person in a red coat, number {i}", 10, where="camera == 'c2'")
        warm.append(time.perf_counter() - start)
    return [
        *(
            dict(
                what=f"cold process: {k}",
                people=n,
                seconds=median(times[k]),
                cpu_seconds=median(cpu[k]),
            )
            for k in commands
        ),
        dict(what="running process: sentence to hits", people=n, ms=1000 * median(warm)),
    ]


def nothing_to_do(home: Path, n: int) -> list[str]:
    "The command that brings a gallery of `n` photos up to date, after it was made; 64 pictures, each with many names."
    photos = home / "photos"
    originals = sorted(pictures(home / "originals", 64).iterdir())
    photos.mkdir()
    for i in range(n):
        shutil.copyfile(originals[i % 64], photos / f"{i:06d}.jpg")
    command = [sys.executable, "-m", "tipr_nb.cli", "index", str(photos)]
    command += ["--gallery", str(home / "update")]
    subprocess.run(command, check=True, capture_output=True)
    return command


def _busy() -> float:
    "Processor seconds of finished child processes."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="vectors,indexing,cold")
    parser.add_argument("--scratch", help="folder for a few GB of temporary files")
    args = parser.parse_args()
    set_threads(args.threads)
    import faiss

    faiss.omp_set_num_threads(args.threads)
    need = args.rows * args.dims * 4 * 4 / 2**30 + 1
    if free_memory_gb() and free_memory_gb() < need:
        sys.exit(
            f"{args.rows:,} rows need about {need:.0f} GB of free memory; give --rows a smaller number"
        )
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for name in args.only.split(","):
            home = Path(scratch) / name
            home.mkdir()
            if name == "vectors":
                rows += vectors(home, args.rows, args.dims, args.queries, args.repeats)
            if name == "indexing":
                rows += indexing(home, args.pictures, args.repeats)
            if name == "cold":
                rows += cold(home, 10_000, max(3, args.repeats))
            rows = [
                r if "load" in r else r | dict(load=round(os.getloadavg()[0], 1)) for r in rows
            ]  # how busy the machine was
            if args.rows == parser.get_default("rows"):
                write_result("search", rows, key="what")
    show(rows, "search")
    print(
        write_result(
            "search" if args.rows == parser.get_default("rows") else "search-partial",
            rows,
            key="what",
        )
    )


if __name__ == "__main__":
    run(main)
