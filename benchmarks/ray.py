"""Photos encoded by one and by two Ray workers, beside an indexing without Ray; `--cold ADDRESS` times searches by address."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


from benchmarks.common import run, set_threads, show, write_result
from tipr_nb.core import TiprError

COMMAND = "import sys; from tipr_nb.cli import main; sys.exit(main())"


def drawn_photos(folder: Path, n: int) -> Path:
    "Pictures of random pixels at the size of a person's crop."
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for i in range(n):
        pixels = numbers.integers(0, 256, (96, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 384)).save(folder / f"{i:05d}.jpg")
    return folder


def ray_rates(n: int, batch_size: int, arch: str, repeats: int, workers: int) -> list[dict]:
    "Pictures a second: without Ray, with one worker, with several; in turns."
    import torch
    from tipr_nb.models import PersonCLIP
    from tipr_nb.search import RayCluster

    class Timed(RayCluster):
        "Notes when each picture comes back."

        def _arrivals(self, *args):
            self.times = []
            for one in super()._arrivals(*args):
                self.times.append(time.perf_counter())
                yield one

    torch.manual_seed(0)
    model = PersonCLIP(arch).eval()
    if n <= 2 * batch_size * workers:
        raise TiprError(f"--photos {n}: give more than two batches for each worker")
    with tempfile.TemporaryDirectory() as home:
        return _rates(Path(home), n, model, batch_size, repeats, workers, Timed)


def _rates(home, n, model, batch_size, repeats, workers, timed) -> list[dict]:
    from tipr_nb.search import Gallery, RayCluster

    photos = drawn_photos(home / "photos", n)
    more = dict(batch_size=batch_size, text_tower=False)
    rates: dict[str, list[float]] = {"without Ray": []}
    totals: dict[str, list[float]] = {"without Ray": []}
    equal = {}
    with RayCluster("local", workers=workers).connected():
        for i in range(repeats):
            started = time.perf_counter()
            alone = Gallery.build(photos, model, home / f"alone{i}", workers=1, **more)
            totals["without Ray"].append(time.perf_counter() - started)
            rates["without Ray"].append(n / totals["without Ray"][-1])
            for count in dict.fromkeys((1, workers)):
                cluster = timed("local", workers=count)
                started = time.perf_counter()
                folder = home / f"ray{count}-{i}"
                made = Gallery.build(photos, model, folder, cluster=cluster, **more)
                name = f"{count} worker" + "s" * (count > 1)
                totals.setdefault(name, []).append(time.perf_counter() - started)
                first, last = cluster.times[0], cluster.times[-1]
                waited = sum(t <= first + 1e-3 for t in cluster.times)
                rates.setdefault(name, []).append((n - waited) / (last - first))
                equal[name] = float(abs(made.features[:] - alone.features[:]).max())
    rows = []
    for name, values in rates.items():
        row = dict(case=name, pictures_a_second=round(median(values), 2))
        row["ratio_to_one_worker"] = round(median(values) / median(rates["1 worker"]), 3)
        row["seconds_with_start"] = round(median(totals[name]), 2)
        row["largest_difference"] = equal.get(name, 0.0)
        rows.append(row)
    return rows


def cold_searches(address: str, repeats: int) -> list[dict]:
    "Seconds of a search by a new process in an empty folder, and of further searches in one process."
    from tipr_nb.search import ServedGallery

    command = [sys.executable, "-c", COMMAND, "search", "a person in red", "--milvus-uri", address]
    walls, cpus = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as empty:
            before = os.times()
            subprocess.run([*command, "--json"], cwd=empty, check=True, stdout=subprocess.DEVNULL)
            after = os.times()
        walls.append(after.elapsed - before.elapsed)
        used = after.children_user + after.children_system
        cpus.append(used - before.children_user - before.children_system)
    served = ServedGallery(address)
    warm = []
    for i in range(20 + repeats):
        started = time.perf_counter()
        served.search(f"a person with bag {i}", 10)
        warm.append(time.perf_counter() - started)
    served.close()
    return [
        dict(case="cold, wall", seconds=round(median(walls), 3)),
        dict(case="cold, processor", seconds=round(median(cpus), 3)),
        dict(case="warm, wall", seconds=round(median(warm[1:]), 4)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--arch", default="ViT-B-16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", metavar="ADDRESS", help="time searches by address instead")
    args = parser.parse_args()
    set_threads(1)
    if args.cold:
        served = args.cold if "://" in args.cold else os.path.abspath(args.cold)
        rows = cold_searches(served, args.repeats)
        show(rows, "searches by address, 1 thread")
        print(f"written to {write_result('served', rows, module='ray').name}")
        return
    rows = ray_rates(args.photos, args.batch_size, args.arch, args.repeats, args.workers)
    show(rows, f"{args.photos} pictures, {args.arch}, 1 thread each")
    print(f"written to {write_result('ray', rows).name}")


if __name__ == "__main__":
    run(main)
