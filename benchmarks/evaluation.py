"""Exact retrieval metrics: `rank_metrics` against sorting the whole matrix and against the bare matrix product, in one run.

python -m benchmarks.evaluation                       # sizes of CUHK-PEDES and ICFG-PEDES, and a slice of 100,000 x 1,000,000
python -m benchmarks.evaluation --peer PATH           # also times `rank` of an IRRA checkout at PATH
python -m benchmarks.evaluation --only cuhk
"""

from __future__ import annotations

import argparse, importlib.util, sys, types
from pathlib import Path

import numpy as np, torch

from benchmarks.common import (
    free_memory_gb,
    interleave,
    machine,
    medians,
    peak_memory,
    set_threads,
    write_result,
)
from tipr_nb.core import TiprError
from tipr_nb.evaluation import HEADLINE, rank_metrics

SIZES = {
    "cuhk": (6156, 3074, 512, 3),
    "icfg": (19848, 19848, 512, 20),
}  # queries, gallery, dimensions, gallery images per identity


def features(
    n_q: int, n_g: int, d: int, per_id: int, seed: int = 0, noise: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    "Unit features in which identities form loose clusters, so that the metrics stand neither at 0 nor at 100."
    g = torch.Generator().manual_seed(seed)
    n_ids = -(-n_g // per_id)
    gallery_ids, query_ids = np.arange(n_g) % n_ids, np.arange(n_q) % n_ids
    people = torch.randn(n_ids, d, generator=g)

    def make(ids):
        return torch.nn.functional.normalize(
            people[ids] + noise * torch.randn(len(ids), d, generator=g), dim=1
        )

    return make(query_ids), make(gallery_ids), query_ids, gallery_ids


def full_sort(query, gallery, query_ids, gallery_ids, parts: int = 1) -> dict[str, float]:
    "The usual way: the whole similarity matrix, a full argsort, cumulative sums; in several parts where memory is short (no slower so)."
    sums = {k: 0.0 for k in HEADLINE}
    for q, ids in zip(query.tensor_split(parts), np.array_split(query_ids, parts)):
        order = (q @ gallery.T).argsort(dim=1, descending=True)
        hits = torch.from_numpy(gallery_ids)[order] == torch.from_numpy(ids)[:, None]
        del order
        n, rank = hits.sum(1), torch.arange(1, hits.shape[1] + 1)
        found = hits.cumsum(1)
        last = hits.shape[1] - hits.flip(1).int().argmax(1)
        sums["mAP"] += (((found / rank) * hits).sum(1, dtype=torch.float64) / n).sum().item()
        sums["mINP"] += (n / last.double()).sum().item()
        for k in (1, 5, 10):
            sums[f"r{k}"] += (found[:, k - 1] > 0).sum().item()
    return {k: 100 * v / len(query_ids) for k, v in sums.items()}


def blocked_product(query, gallery, rows: int = 1024):
    "The floor: every similarity computed once by PyTorch, and thrown away."
    out = torch.empty(rows, len(gallery))
    for a in range(0, len(query), rows):
        torch.mm(query[a : a + rows], gallery.T, out=out[: len(query[a : a + rows])])


def blocked_product_numpy(query, gallery, rows: int = 1024):
    "The same by NumPy, which brings its own library."
    q, g, out = query.numpy(), gallery.numpy(), np.empty((rows, len(gallery)), np.float32)
    for a in range(0, len(q), rows):
        np.matmul(q[a : a + rows], g.T, out=out[: len(q[a : a + rows])])


def load_peer(path: str):
    "`rank` of an IRRA checkout; its table printer is replaced by an empty stand-in when it is not installed."
    file = Path(path) / "utils" / "metrics.py"
    if not file.is_file():
        raise TiprError(f"{path}: no utils/metrics.py in it; give the folder of an IRRA checkout")
    if importlib.util.find_spec("prettytable") is None:
        sys.modules["prettytable"] = types.SimpleNamespace(PrettyTable=object)
    spec = importlib.util.spec_from_file_location("peer_metrics", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rank


def at_size(name: str, repeats: int, sorts: int, peer=None, spare_gb: float = 2) -> dict:
    "One size: times, ratios, memory, and the largest difference from the reference."
    n_q, n_g, d, per_id = SIZES[name]
    data = features(n_q, n_g, d, per_id)
    rank_metrics(data[0][:64], data[1], data[2][:64], data[3])  # compile
    with peak_memory() as ours:
        m = rank_metrics(*data)
    got, parts = {}, 1
    cases = {
        "ours": lambda: got.update(ours=rank_metrics(*data)),
        "product": lambda: blocked_product(data[0], data[1]),
        "product_numpy": lambda: blocked_product_numpy(data[0], data[1]),
        "sort": lambda: got.update(sort=full_sort(*data, parts=parts)),
    }
    count = {
        "ours": repeats,
        "product": repeats,
        "product_numpy": repeats,
        "sort": sorts,
        "peer": 1,
    }

    def fits(what: str, bytes_per_pair: int) -> bool:
        need, free = n_q * n_g * bytes_per_pair / 2**30, free_memory_gb()
        if free < need + spare_gb:
            print(f"{name}: {what} needs about {need:.0f} GiB and {free:.0f} are free")
        return free >= need + spare_gb

    if not sorts:
        del cases["sort"]
    elif not fits("sorting at once", 27):
        parts = 8
    if peer and fits("the peer's rank", 40):
        tensors = dict(q_pids=torch.from_numpy(data[2]), g_pids=torch.from_numpy(data[3]))
        cases["peer"] = lambda: got.update(peer=peer(data[0] @ data[1].T, **tensors))
    times = interleave(cases, count)
    t = medians(times)
    row = dict(
        size=f"{n_q:,} x {n_g:,} x {d}",
        hits=per_id,
        ours_s=t["ours"],
        product_s=t["product"],
        product_numpy_s=t["product_numpy"],
        over_faster_product=t["ours"] / min(t["product"], t["product_numpy"]),
        extra_memory_gb=ours["gb"],
        mAP=m.mAP,
        r1=m.r1,
    )
    if "sort" in t:
        row |= dict(
            sort_s=t["sort"],
            sort_parts=parts,
            times_faster=t["sort"] / t["ours"],
            difference=max(abs(getattr(m, k) - got["sort"][k]) for k in HEADLINE),
        )
    if "peer" in t:
        row |= dict(
            peer_s=t["peer"],
            times_faster_than_peer=t["peer"] / t["ours"],
            peer_difference=abs(float(got["peer"][1]) - m.mAP),
        )
    return row | dict(all_seconds=times)


def a_slice(
    n_q: int = 100_000, n_g: int = 1_000_000, d: int = 64, part: int = 1024, per_id: int = 20
) -> dict:
    "The first queries of a large job against its whole gallery: time per query, memory, and what the whole would take."
    query, gallery, query_ids, gallery_ids = features(part, n_g, d, per_id)
    rank_metrics(query[:8], gallery, query_ids[:8], gallery_ids)
    with peak_memory() as mem:
        m = rank_metrics(query, gallery, query_ids, gallery_ids)
    times = interleave(
        {
            "ours": lambda: rank_metrics(query, gallery, query_ids, gallery_ids),
            "product": lambda: blocked_product(query, gallery, 32),
            "product_numpy": lambda: blocked_product_numpy(query, gallery, 32),
        },
        3,
    )
    t = medians(times)
    return dict(
        size=f"{part:,} of {n_q:,} x {n_g:,} x {d}",
        hits=per_id,
        ours_s=t["ours"],
        product_s=t["product"],
        product_numpy_s=t["product_numpy"],
        over_faster_product=t["ours"] / min(t["product"], t["product_numpy"]),
        extra_memory_gb=mem["gb"],
        mAP=m.mAP,
        ms_per_query=1000 * t["ours"] / part,
        whole_job_minutes=t["ours"] / part * n_q / 60,
        all_seconds=times,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="rounds of ours and of the bare product; medians are reported",
    )
    parser.add_argument(
        "--sorts",
        type=int,
        default=1,
        help="rounds of the full sort at ICFG-PEDES size (about 40 s and 10 GB each on 2 quiet cores); 0 leaves it out",
    )
    parser.add_argument(
        "--spare-gb",
        type=float,
        default=2,
        help="memory to leave to others; with less than the sort needs beyond it, the sort goes in 8 parts",
    )
    parser.add_argument("--peer", help="folder of an IRRA checkout whose own `rank` is timed too")
    parser.add_argument("--only", choices=[*SIZES, "slice"])
    args = parser.parse_args()
    set_threads(args.threads)
    peer, jobs = load_peer(args.peer) if args.peer else None, {}
    for name in SIZES:
        jobs[name] = lambda name=name: at_size(
            name,
            args.repeats if name == "icfg" else 2 * args.repeats + 1,
            args.sorts if name == "icfg" else args.repeats,
            peer,
            args.spare_gb,
        )
    for name, job in (jobs | {"slice": a_slice}).items():
        if args.only not in (None, name):
            continue
        facts = machine()
        row = (
            dict(name=name)
            | job()
            | dict(
                date=facts["date"],
                threads=args.threads,
                load_at_start=facts["load"][0],
                load_at_end=machine()["load"][0],
            )
        )
        path = write_result("evaluation", [row], key="name")
        print(
            "\n".join(
                f"{k:>22}  {v:.4g}" if isinstance(v, float) else f"{k:>22}  {v}"
                for k, v in row.items()
                if k != "all_seconds"
            ),
            "\n",
        )
    print(f"\nwritten: {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    try:
        main()
    except TiprError as e:
        sys.exit(f"{e}")
