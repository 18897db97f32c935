"""Exact metrics against slow references, ties, streaming, intervals, comparisons, and every kind of bad input."""

import itertools, json, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.metrics import average_precision_score

from tipr_nb.core import TiprError
from tipr_nb.data import Split
from tipr_nb.evaluation import (
    HEADLINE,
    TIES,
    Metrics,
    SplitFeatures,
    bootstrap,
    compare,
    encode_split,
    encode_texts,
    evaluate,
    evaluate_weights,
    load_metrics,
    rank_metrics,
    rank_similarity,
    read_features,
    save_metrics,
)
from tipr_nb.methods import picture_features
from tipr_nb.models import fingerprint


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def toy(n_ids=40, images=3, captions=5, d=24, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    people, gid, qid = (
        rng.normal(size=(n_ids, d)),
        np.repeat(np.arange(n_ids), images),
        np.repeat(np.arange(n_ids), captions),
    )
    return (
        unit(people[qid] + noise * rng.normal(size=(len(qid), d))),
        unit(people[gid] + noise * rng.normal(size=(len(gid), d))),
        qid,
        gid,
    )


def by_sorting(sim, qid, gid):
    "R@1, R@5, R@10, mAP, mINP from a stable sort of each row."
    rows = []
    for s, q in zip(sim, qid):
        r = np.flatnonzero(gid[np.argsort(-s, kind="stable")] == q) + 1
        if len(r):
            rows.append(
                [
                    r[0] <= 1,
                    r[0] <= 5,
                    r[0] <= 10,
                    np.mean(np.arange(1, len(r) + 1) / r),
                    len(r) / r[-1],
                ]
            )
    return 100 * np.mean(np.array(rows, float), 0)


def headline(m):
    return np.array([getattr(m, k) for k in HEADLINE])


# exact values


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    "shape", [(40, 3, 5), (7, 1, 1), (3, 90, 2), (2, 600, 1), (1, 5, 3), (60, 4, 20)]
)
def test_equals_sorting(shape, backend):
    q, g, qid, gid = toy(*shape)
    assert np.allclose(
        headline(rank_metrics(q, g, qid, gid, backend=backend)),
        by_sorting(q @ g.T, qid, gid),
        atol=1e-6,
    )


def test_equals_sklearn_and_direction():
    q, g, qid, gid = toy()
    rows = rank_metrics(q, g, qid, gid, per_query=True).per_query
    assert np.allclose(
        rows.AP, [100 * average_precision_score(gid == i, g @ x) for x, i in zip(q, qid)], atol=1e-6
    )
    assert np.allclose(
        headline(rank_metrics(g, q, gid, qid, direction="i2t")),
        by_sorting(g @ q.T, gid, qid),
        atol=1e-6,
    )


def test_blocks_do_not_matter(monkeypatch):
    q, g, qid, gid = toy(n_ids=300, captions=4)
    wanted = headline(rank_metrics(q, g, qid, gid))
    for mb in (0.01, 0.1, 1):
        assert np.allclose(headline(rank_metrics(q, g, qid, gid, memory_mb=mb)), wanted, atol=1e-9)
    for mb in (0.02, 0.3):
        assert np.allclose(
            headline(rank_metrics(q, 3 * g, qid, gid, memory_mb=mb)), wanted, atol=1e-4
        )  # scaled rows come in tiles
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert np.allclose(headline(rank_metrics(q, g, qid, gid)), wanted, atol=1e-9)


def test_memory_is_bounded():
    seen, n_q, n_g = [], 1500, 20000
    rng = np.random.default_rng(0)

    def sim(rows, cols):
        seen.append(len(rows) * len(cols) * 8)
        return rng.random((len(rows), len(cols)))

    m = rank_similarity(sim, np.arange(n_q) % 1000, np.arange(n_g) % 1000, memory_mb=4)
    assert max(seen) <= 4 * 2**20 and sum(seen) == n_q * n_g * 8 and m.n_queries == n_q


def test_many_ks():
    q, g, qid, gid = toy()
    m = rank_metrics(q, g, qid, gid, ks=(3, 20))
    assert (
        set(m.recall) == {1, 3, 5, 10, 20}
        and m.r1 <= m.recall[3] <= m.r5 <= m.r10 <= m.recall[20]
        and m.to_dict()["r20"] == m.recall[20]
    )


# ties


def every_order(sim, hit):
    "Mean scores of one query over all orders of its gallery that sorting could give."
    n, rows = len(sim), []
    for p in itertools.permutations(range(n)):
        p = np.array(p)
        rows.append(by_sorting(sim[None, p], [1], hit[p].astype(int)))
    return np.mean(rows, 0)


@pytest.mark.parametrize("seed", range(8))
def test_expected_rank_is_the_mean_over_orders(seed):
    rng = np.random.default_rng(seed)
    sim, hit = (
        rng.integers(0, 3, 6).astype(np.float32),
        rng.permutation([1, 1, 0, 0, 0, seed % 2]).astype(bool),
    )
    assert np.allclose(
        headline(rank_similarity(sim[None], [1], hit.astype(int))), every_order(sim, hit), atol=1e-9
    )


@pytest.mark.parametrize("seed", range(6))
def test_ties_do_not_follow_the_order(seed):
    rng = np.random.default_rng(seed)
    n_q, n_g, levels = rng.integers(1, 40), rng.integers(2, 150), rng.integers(1, 6)
    sim, qid, gid = (
        rng.integers(0, levels, (n_q, n_g)).astype(np.float32),
        rng.integers(0, 6, n_q),
        rng.integers(0, 6, n_g),
    )
    if not np.isin(qid, gid).any():
        qid[0] = gid[0]
    for ties in TIES:
        wanted = headline(rank_similarity(sim, qid, gid, ties=ties))
        for _ in range(3):
            p, r = rng.permutation(n_g), rng.permutation(n_q)
            assert np.allclose(
                headline(rank_similarity(sim[r][:, p], qid[r], gid[p], ties=ties)),
                wanted,
                atol=1e-9,
            )
            assert np.allclose(
                headline(rank_similarity(sim[r][:, p], qid[r], gid[p], ties=ties, backend="torch")),
                wanted,
                atol=1e-9,
            )


@pytest.mark.parametrize("n_q", [1, 2, 9, 70])
def test_duplicate_images_stay_tied_wherever_they_stand(n_q):
    "Products in blocks of any shape must give identical rows identical similarities."
    rng = np.random.default_rng(n_q)
    g, q = unit(rng.normal(size=(301, 64))), unit(rng.normal(size=(n_q, 64)))
    gid, qid = np.arange(602), rng.integers(0, 301, n_q)
    g = np.concatenate([g, g])  # image i + 301 is a copy of image i under another identity
    wanted = headline(rank_metrics(q, g, qid, gid))
    for _ in range(4):
        p = rng.permutation(602)
        assert np.allclose(
            headline(rank_metrics(q, g[p], qid, gid[p], memory_mb=rng.choice([0.05, 1]))),
            wanted,
            atol=1e-9,
        )
    assert (
        headline(rank_metrics(q, g, qid, gid, ties="pessimistic"))[3]
        < wanted[3]
        < headline(rank_metrics(q, g, qid, gid, ties="optimistic"))[3]
    )


def test_a_constant_model_gets_chance():
    _, _, qid, gid = toy()
    for backend in ("numba", "torch"):
        m = rank_similarity(np.full((len(qid), len(gid)), 0.3), qid, gid, backend=backend)
        assert np.isclose(m.r1, m.chance_r1) and np.isclose(m.chance_r1, 100 * 3 / 120)
    assert rank_similarity(np.zeros((len(qid), len(gid))), qid, gid, ties="pessimistic").r10 == 0


def test_minus_infinity_is_a_score():
    sim = np.array([[-np.inf, 1, -np.inf, -np.inf], [0, -np.inf, 2, 1]])
    for backend in ("numba", "torch"):
        m = rank_similarity(sim, [0, 1], [0, 1, 0, 1], per_query=True, backend=backend)
        assert np.allclose(
            m.per_query["rank"], [1 + 4 / 3, 2]
        )  # 1 above, then 2 hits among 3 level; 1 above


# queries without a match, galleries


def test_unmatched_queries_are_left_out_and_counted():
    q, g, qid, gid = toy()
    lost = qid.copy()
    lost[:10] = 777
    m = rank_metrics(q, g, lost, gid, per_query=True)
    assert (
        m.n_unmatched == 10 and m.n_queries == len(qid) and "10 queries without a match" in m.note()
    )
    assert np.allclose(headline(m), headline(rank_metrics(q[10:], g, qid[10:], gid)))
    assert m.per_query.AP[:10].isna().all() and m.per_query.n_hits[:10].sum() == 0


def test_headline_is_the_mean_over_galleries():
    q, g, qid, gid = toy()
    qg, gg = np.where(qid < 10, "small", "large"), np.where(gid < 10, "small", "large")
    m = rank_metrics(q, g, qid, gid, query_groups=qg, gallery_groups=gg, n_boot=50)
    parts = [
        rank_metrics(q[qg == k], g[gg == k], qid[qg == k], gid[gg == k]) for k in ("small", "large")
    ]
    assert (
        m.n_galleries == 2
        and np.allclose(headline(m), np.mean([headline(p) for p in parts], 0))
        and np.isclose(m.chance_r1, np.mean([p.chance_r1 for p in parts]))
    )
    sim = rank_similarity(q @ g.T, qid, gid, query_groups=qg, gallery_groups=gg)
    assert np.allclose(headline(sim), headline(m), atol=1e-6)
    f = rank_similarity(
        lambda rows, cols: torch.from_numpy(q[rows] @ g[cols].T),
        qid,
        gid,
        query_groups=qg,
        gallery_groups=gg,
    )
    assert np.allclose(headline(f), headline(m), atol=1e-6)


# kinds of input


def test_features_of_every_kind(tmp_path):
    from safetensors.torch import save_file

    q, g, qid, gid = toy()
    wanted = rank_metrics(q, g, qid, gid).to_dict()
    np.savez(tmp_path / "q.npz", features=q, ids=qid)
    np.save(tmp_path / "g.npy", g)
    save_file(
        {"features": torch.from_numpy(g), "ids": torch.from_numpy(gid)}, tmp_path / "g.safetensors"
    )
    assert rank_metrics(tmp_path / "q.npz", tmp_path / "g.npy", gallery_ids=gid).to_dict() == wanted
    assert (
        rank_metrics(str(tmp_path / "q.npz"), str(tmp_path / "g.safetensors")).to_dict() == wanted
    )
    assert (
        rank_metrics(
            torch.from_numpy(q).requires_grad_(),
            torch.from_numpy(g),
            torch.from_numpy(qid),
            gid.tolist(),
        ).to_dict()
        == wanted
    )
    assert rank_metrics(q, g, qid.astype(str), gid.astype(str)).to_dict() == wanted
    assert isinstance(read_features(tmp_path / "g.npy")[0], np.memmap)


@pytest.mark.parametrize("kind", [np.float16, np.float64, torch.bfloat16, torch.float16])
def test_features_are_scaled_to_unit_length(kind):
    q, g, qid, gid = toy(noise=0.6)
    sizes = np.random.default_rng(0).uniform(0.1, 30, (len(g), 1)).astype(np.float32)
    cast = (
        (lambda x: torch.from_numpy(x).to(kind))
        if isinstance(kind, torch.dtype)
        else (lambda x: x.astype(kind))
    )
    wanted, got = (
        headline(rank_metrics(q, g, qid, gid)),
        headline(rank_metrics(cast(5 * q), cast(sizes * g), qid, gid)),
    )
    assert np.abs(got - wanted).max() < (2 if kind == torch.bfloat16 else 0.3)
    if kind == np.float64:
        assert np.allclose(got, wanted, atol=1e-6)


def test_a_row_of_zeros_is_defined():
    q, g, qid, gid = toy()
    g[0] = 0
    assert np.isfinite(headline(rank_metrics(q, g, qid, gid))).all()


BAD = {
    "nan": (
        lambda q, g, a, b: rank_metrics(
            np.where(np.arange(len(q))[:, None] == 7, np.nan, q), g, a, b
        ),
        "query: row 7",
    ),
    "infinity": (
        lambda q, g, a, b: rank_metrics(
            q, np.where(np.arange(len(g))[:, None] == 3, np.inf, g), a, b
        ),
        "gallery: row 3",
    ),
    "dimensions": (lambda q, g, a, b: rank_metrics(q[:, :9], g, a, b), "9 dimensions"),
    "one axis": (lambda q, g, a, b: rank_metrics(q[0], g, a, b), "one row per item"),
    "empty": (lambda q, g, a, b: rank_metrics(q[:0], g, a[:0], b), "empty"),
    "empty gallery": (lambda q, g, a, b: rank_metrics(q, g[:0], a, b[:0]), "gallery: features"),
    "too few ids": (lambda q, g, a, b: rank_metrics(q, g, a[:-1], b), "query_ids"),
    "ids of two axes": (lambda q, g, a, b: rank_metrics(q, g, a, b[:, None]), "gallery_ids"),
    "no ids": (lambda q, g, a, b: rank_metrics(q, g), "query_ids"),
    "nan id": (
        lambda q, g, a, b: rank_metrics(q, g, np.where(a == 2, np.nan, a), b),
        "not a number",
    ),
    "nobody in common": (
        lambda q, g, a, b: rank_metrics(q, g, a + 500, b),
        "no identity in common",
    ),
    "nobody in one gallery": (
        lambda q, g, a, b: rank_metrics(
            q, g, a, b, query_groups=(a > 5).astype(int), gallery_groups=(b < 5).astype(int)
        ),
        "in gallery",
    ),
    "one side of groups": (
        lambda q, g, a, b: rank_metrics(q, g, a, b, query_groups=a),
        "both or none",
    ),
    "words": (lambda q, g, a, b: rank_metrics(q.astype(str), g, a, b), "not numbers"),
    "ties": (lambda q, g, a, b: rank_metrics(q, g, a, b, ties="lucky"), "ties='lucky'"),
    "backend": (lambda q, g, a, b: rank_metrics(q, g, a, b, backend="gpu"), "backend"),
    "k": (lambda q, g, a, b: rank_metrics(q, g, a, b, ks=(0,)), "k starts at 1"),
    "memory": (lambda q, g, a, b: rank_metrics(q, g, a, b, memory_mb=0), "memory_mb"),
    "missing file": (lambda q, g, a, b: rank_metrics("nowhere.npy", g, a, b), "nowhere.npy"),
    "column": (lambda q, g, a, b: rank_metrics(q, g, a, b, columns={"rank": a}), "rename yours"),
    "column length": (
        lambda q, g, a, b: rank_metrics(q, g, a, b, columns={"kind": a[:3]}),
        "one per query",
    ),
    "sim nan": (
        lambda q, g, a, b: rank_similarity(np.full((len(a), len(b)), np.nan), a, b),
        "NaN in row 0",
    ),
    "sim shape": (lambda q, g, a, b: rank_similarity(q[0], a, b), "one row per query"),
    "sim ids": (lambda q, g, a, b: rank_similarity((q @ g.T)[:, :-1], a, b), "gallery_ids"),
    "sim function": (
        lambda q, g, a, b: rank_similarity(lambda r, c: np.zeros(3), a, b),
        "one number per pair",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    call, says = BAD[case]
    with pytest.raises(TiprError) as e:
        call(*toy())
    assert says in str(e.value) and "\n" not in str(e.value)


def test_broken_files(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{")
    (tmp_path / "features.pkl").write_bytes(b"\x80\x04.")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", image=np.ones((2, 2)), text=np.ones((2, 2)))
    for name, says in {
        "cut.npz": "that can be read",
        "cut.safetensors": "that can be read",
        "features.pkl": "convert",
        "pickle.npy": "that can be read",
        "two.npz": "several arrays (image, text)",
    }.items():
        with pytest.raises(TiprError) as e:
            read_features(tmp_path / name)
        assert says in str(e.value) and name in str(e.value) and "\n" not in str(e.value)
    assert read_features(tmp_path / "two.npz", "text")[0].shape == (2, 2)
    with pytest.raises(TiprError, match="no array 'both'"):
        read_features(tmp_path / "two.npz", "both")


# intervals and breakdowns


def test_bootstrap_draws_identities():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(200), 5)
    x = (rng.normal(0, 3, 200)[ids] + rng.normal(0, 0.1, len(ids)))[:, None]
    mean, draws = bootstrap(x, ids, n_boot=2000)
    per_id = x[:, 0].reshape(200, 5).mean(1)
    assert (
        np.allclose(mean, x.mean())
        and abs(draws.std() / (per_id.std() / np.sqrt(200)) - 1) < 0.1
        and abs(draws.mean() - x.mean()) < 0.05
    )
    assert np.array_equal(draws, bootstrap(x, ids, n_boot=2000)[1]) and not np.array_equal(
        draws, bootstrap(x, ids, n_boot=2000, seed=1)[1]
    )


def test_intervals_hold_the_headline():
    q, g, qid, gid = toy()
    m = rank_metrics(q, g, qid, gid, n_boot=300, ks=(20,))
    assert set(m.intervals) == {"r1", "r5", "r10", "r20", "mAP", "mINP"}
    assert all(m.intervals[k][0] < getattr(m, k) < m.intervals[k][1] for k in ("r1", "mAP", "mINP"))
    json.dumps(m.to_dict())
    assert "95 %" in m._repr_html_() and "[" in repr(m)


def test_breakdown_rows():
    q, g, qid, gid = toy()
    kind, share = (
        np.where(np.arange(len(qid)) % 2, "complete", "incomplete"),
        np.linspace(0, 1, len(qid)),
    )
    m = rank_metrics(
        q,
        g,
        qid,
        gid,
        n_boot=50,
        columns={"kind": kind, "share": share, "empty": np.array([""] * len(qid))},
        breakdown={"kind": None, "share": None, "empty": None},
    )
    part = rank_metrics(q[kind == "complete"], g, qid[kind == "complete"], gid)
    assert np.allclose(
        m.by["kind"].loc["complete", list(HEADLINE)].astype(float), headline(part)
    ) and m.by["kind"].queries.sum() == len(qid)
    assert list(m.by["share"].index) == [
        "0 to 0.2",
        "0.2 to 0.4",
        "0.4 to 0.6",
        "0.6 to 0.8",
        "0.8 to 1",
    ] and list(m.by["empty"].index) == ["none"]
    assert (m.by["kind"].r1_lo <= m.by["kind"].r1).all() and (
        m.by["kind"].r1 <= m.by["kind"].r1_hi
    ).all()


def test_breakdown_by_attribute(split):
    split.caption_columns["mentioned"] = np.array(
        [
            dict(zip(("upper", "lower"), c.split(" over ")))
            if k == "complete"
            else {"upper": c.split()[0]}
            for c, k in zip(split.captions, split.caption_columns["kind"])
        ],
        dtype=object,
    )
    m = evaluate(Model(), split, breakdown=("kind", "mentioned", "mentioned.upper"), n_boot=20)
    assert list(m.by["mentioned"].index) == ["upper", "lower"] and np.allclose(
        m.by["mentioned"].loc["lower"], m.by["kind"].loc["complete"]
    )
    assert (
        set(m.by["mentioned.upper"].index) == set(COLOURS)
        and m.by["mentioned.upper"].queries.sum() == 24
    )
    assert (compare(m, m, by="mentioned").table.difference == 0).all() and json.dumps(m.to_dict())


# comparisons


def run(noise, seed, **kw):
    people, images, qid, gid = toy(n_ids=120, noise=0.0, d=24)
    rng = np.random.default_rng(seed)
    return rank_metrics(
        people + noise * rng.normal(size=people.shape),
        images + 0.16 * np.random.default_rng(99).normal(size=images.shape),
        qid,
        gid,
        per_query=True,
        **kw,
    )


def test_compare_finds_what_is_there():
    a, b = run(0.30, 1), run(0.20, 2)
    c = compare(a, b, names=("baseline", "method"))
    row = c.table.loc["R@1"]
    assert (
        np.isclose(row.difference, b.r1 - a.r1)
        and 0 < row.lo < row.difference < row.hi
        and row.p < 0.05
        and 0 < row.detectable < row.difference
    )
    assert (
        "one run each" in c.note()
        and "method minus baseline" in repr(c)
        and json.dumps(c.to_dict())
    )
    back = compare(b, a).table.loc["R@1"]
    assert np.isclose(back.difference, -row.difference) and np.isclose(back.lo, -row.hi, atol=0.2)


def test_compare_with_itself():
    a = run(0.25, 1)
    t = compare(a, a).table
    assert (
        (t.difference == 0).all()
        and (t.lo == 0).all()
        and (t.p == 1).all()
        and (t.detectable == 0).all()
    )


def test_compare_over_seeds():
    a, b = [run(0.25, s) for s in range(4)], [run(0.25, 10 + s) for s in range(4)]
    c = compare(a, b)
    assert (
        c.seeds == (4, 4)
        and c.table.loc["mAP", "lo"] < 0 < c.table.loc["mAP", "hi"]
        and "4 and 4 runs" in c.note()
    )
    unequal = compare(a, b[:3]).table.loc["mAP"]
    assert (
        np.isclose(
            unequal.difference, np.mean([m.mAP for m in b[:3]]) - np.mean([m.mAP for m in a])
        )
        and unequal.lo < unequal.hi
    )
    shifted = [
        Metrics(0, 0, 0, 0, 0, 1, 1, per_query=m.per_query.assign(AP=m.per_query.AP + s))
        for s, m in zip((-6, 0, 6, 0), b)
    ]
    assert (
        compare(a, shifted).table.loc["mAP", "detectable"] > 2 * c.table.loc["mAP", "detectable"]
    )  # seeds that scatter cost power


def test_compare_keeps_its_promise():
    "Differences of zero, seeds and people both random: about 5 % of the intervals leave zero out."

    def trial(seed):
        rng, ids = np.random.default_rng(seed), np.repeat(np.arange(80), 3)
        person, method = rng.normal(0, 20, 80)[ids], [rng.normal(0, 10, 80)[ids] for _ in range(2)]

        def one(k):
            return Metrics(
                0,
                0,
                0,
                0,
                0,
                len(ids),
                1,
                per_query=pd.DataFrame(
                    dict(
                        id=ids,
                        gallery=0,
                        n_hits=1,
                        r1=50 + person + method[k] + rng.normal() + rng.normal(0, 20, len(ids)),
                    )
                ),
            )

        row = compare(
            [one(0) for _ in range(4)],
            [one(1) for _ in range(4)],
            metrics=("r1",),
            n_boot=400,
            seed=seed,
        ).table.iloc[0]
        return row.lo > 0 or row.hi < 0

    assert 0.01 < np.mean([trial(s) for s in range(200)]) < 0.11


def test_compare_by_column():
    qid = toy(n_ids=120)[2]
    kind = np.where(np.arange(len(qid)) % 2, "complete", "incomplete")
    a, b = [run(n, 1, columns={"kind": kind}) for n in (0.25, 0.22)]
    t = compare(a, b, by="kind", metrics=("r1",)).table
    at = kind == "complete"
    assert (
        np.isclose(
            t.loc[("complete", "R@1"), "difference"],
            b.per_query.r1[at].mean() - a.per_query.r1[at].mean(),
        )
        and len(t) == 2
    )


def test_compare_bad_input():
    a = run(0.25, 1)
    plain = rank_metrics(*toy())
    for call, says in (
        (lambda: compare(a, plain), "per_query=True"),
        (lambda: compare(a, []), "run_b"),
        (lambda: compare(a, rank_metrics(*toy(), per_query=True)), "same split"),
        (lambda: compare(a, a, by="hat"), "by='hat'"),
        (
            lambda: compare(a, Metrics(0, 0, 0, 0, 0, 1, 1, per_query=a.per_query.iloc[::-1])),
            "different queries",
        ),
    ):
        with pytest.raises(TiprError) as e:
            call()
        assert says in str(e.value) and "\n" not in str(e.value)


def test_save_and_load(tmp_path):
    m = run(
        0.25,
        1,
        n_boot=20,
        columns={"kind": np.array(["x", "y"] * 300)},
        breakdown={"kind": None},
        name="val",
    )
    save_metrics(m, tmp_path / "val.json")
    back = load_metrics(tmp_path / "val.json")
    assert (
        back.to_dict() == m.to_dict() and (compare(m, back, by="kind").table.difference == 0).all()
    )
    (tmp_path / "val.json").write_text('{"r1": 3')
    with pytest.raises(TiprError, match="not complete JSON"):
        load_metrics(tmp_path / "val.json")
    (tmp_path / "val.json").write_text('{"r1": 3}')
    with pytest.raises(TiprError, match="evaluate again"):
        load_metrics(tmp_path / "val.json")
    with pytest.raises(TiprError, match="saved as .json"):
        save_metrics(m, tmp_path / "val.csv")


# evaluate

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 40, 200),
    "white": (240, 240, 240),
}


@pytest.fixture
def split(tmp_path):
    "Twelve people of two colours, two images and two captions each, in two galleries."
    images, captions, ids, where, kinds = [], [], [], [], []
    for pid, (a, b) in enumerate(itertools.permutations(COLOURS, 2)):
        for shot in range(2):
            im = Image.new("RGB", (8, 24), COLOURS[a])
            im.paste(COLOURS[b], (0, 12, 8, 24))
            images.append(tmp_path / f"{pid}_{shot}.png")
            im.save(images[-1])
            ids.append(pid)
        for kind, text in (("complete", f"{a} over {b}"), ("incomplete", f"{a} over something")):
            captions.append(text)
            kinds.append(kind)
            where.append(len(images) - 1)
    ids, where = np.array(ids), np.array(where)
    return Split(
        "test",
        images,
        ids,
        captions,
        ids[where],
        where,
        {"gallery": ids % 2},
        {"gallery": ids[where] % 2, "kind": np.array(kinds)},
    )


class Model:
    "Colours from words and pixels, by rule; counts what it is asked."

    def __init__(self):
        self.texts, self.images = 0, 0

    def encode_text(self, captions):
        self.texts += len(captions)
        x = torch.tensor(
            [[float(c in part) for part in t.split(" over ") for c in COLOURS] for t in captions]
        )
        return torch.nn.functional.normalize(x, dim=1)

    def encode_image(self, images):
        self.images += len(images)
        p = torch.stack(
            [
                torch.from_numpy(
                    np.array(im if isinstance(im, Image.Image) else Image.open(im))
                ).float()
                for im in images
            ]
        )
        halves = torch.stack([p[:, 3:9].mean((1, 2)), p[:, 15:21].mean((1, 2))], 1)
        away = (halves[:, :, None] - torch.tensor(list(COLOURS.values())).float()).norm(dim=-1)
        return torch.nn.functional.normalize(
            (-away / 10).softmax(-1).round(decimals=2).flatten(1), dim=1
        )


class Painter:
    def __init__(self):
        self.drawn = []

    def generate(self, captions):
        self.drawn += captions

        def paint(c):
            im = Image.new("RGB", (8, 24), COLOURS[c.split(" over ")[0]])
            im.paste(COLOURS.get(c.split(" over ")[1], (120, 120, 120)), (0, 12, 8, 24))
            return im

        return [paint(c) for c in captions]


def blend(t, g, w):
    return torch.nn.functional.normalize((1 - w) * t + w * g, dim=1)


def test_evaluate_headline_galleries_breakdown(split):
    m = evaluate(Model(), split, n_boot=100, batch_size=5)
    assert (
        m.n_galleries == 2
        and m.n_queries == 24
        and m.n_gallery == 24
        and m.by["kind"].loc["complete", "r1"] == 100
    )
    one = evaluate(Model(), split, galleries="none", n_boot=0)
    by_hand = (
        np.mean(
            [
                1 / sum(split.captions[2 * i + 1] == split.captions[2 * j + 1] for j in range(12))
                for i in range(12)
            ]
        )
        * 100
    )
    assert (
        one.n_galleries == 1
        and np.isclose(one.by["kind"].loc["incomplete", "r1"], by_hand)
        and not one.intervals
    )
    assert m.name == "test" and {"kind", "gallery", "id", "rank"} <= set(m.per_query)


def test_evaluate_image_to_text(split):
    m = evaluate(Model(), split, direction="i2t", n_boot=0)
    assert (
        m.direction == "i2t"
        and m.n_queries == 24
        and m.r1 == 100
        and np.isclose(m.chance_r1, 100 * 2 / 12)
    )


def test_captions_are_encoded_once_and_in_order(split):
    model = Model()
    x = encode_texts(model, split.captions + split.captions[::-1], batch_size=3)
    assert (
        model.texts == len(set(split.captions))
        and torch.equal(x[:24], x[24:].flip(0))
        and torch.equal(x[:24], Model().encode_text(split.captions))
    )


class Enriched(Model):
    "A model around a model: its captions come with their pictures mixed in."

    def __init__(self, painter, weight):
        super().__init__()
        self.painter, self.weight = painter, weight

    def encode_text(self, captions):
        text = super().encode_text(captions)
        return (
            blend(text, picture_features(self, self.painter, captions), self.weight)
            if self.weight
            else text
        )


def test_weights_on_stored_features_equal_a_model_that_mixes(split):
    painter, plain = Painter(), evaluate(Model(), split, n_boot=0)
    assert (
        evaluate(Enriched(painter, 0.0), split, n_boot=0).to_dict() == plain.to_dict()
        and not painter.drawn
    )
    mixed = evaluate(Enriched(painter, 0.3), split, n_boot=0)
    assert (
        sorted(painter.drawn) == sorted(set(split.captions))
        and mixed.by["kind"].loc["complete", "r1"] == 100
    )
    f, pictures = encode_split(Model(), split), picture_features(Model(), Painter(), split.captions)
    found = evaluate_weights(split, f, pictures, blend, (0.0, 0.3), n_boot=0)
    assert found[0.3].to_dict() == mixed.to_dict() and found[0.0].to_dict() == plain.to_dict()
    with pytest.raises(TiprError, match="one for each caption"):
        evaluate_weights(split, f, pictures[:3], blend, (0.3,))


def test_picture_cache(split):
    known, painter, model = {}, Painter(), Model()
    a = picture_features(model, painter, split.captions, cache=known)
    b = picture_features(model, painter, split.captions[::-1], cache=known)
    assert len(painter.drawn) == len(set(split.captions)) == len(known) and torch.equal(
        a, b.flip(0)
    )


class Tiny(torch.nn.Module):
    image_size = (24, 8)

    def __init__(self):
        super().__init__()
        self.image, self.text, self.drop, self.seen = (
            torch.nn.Linear(3 * 24 * 8, 6),
            torch.nn.Embedding(128, 6),
            torch.nn.Dropout(0.5),
            [],
        )

    def encode_image(self, x):
        self.seen.append((type(x), self.training))
        return torch.nn.functional.normalize(self.drop(self.image(x.flatten(1))), dim=1)

    def encode_text(self, texts):
        return torch.nn.functional.normalize(
            torch.stack(
                [self.text(torch.tensor([ord(c) % 128 for c in t])).mean(0) for t in texts]
            ),
            dim=1,
        )


def test_modules_run_in_eval_mode_from_the_cache(split, tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = Tiny().train()
    a, b = [evaluate(model, split, n_boot=0) for _ in range(2)]
    assert (
        a.to_dict() == b.to_dict()
        and model.training
        and all(t is torch.Tensor and not training for t, training in model.seen)
        and any((tmp_path / "cache").rglob("*"))
    )


def test_saved_features_follow_model_and_split(split, tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    model, path = Tiny(), tmp_path / "features.safetensors"
    f = encode_split(model, split, path=path)
    n = len(model.seen)
    again = encode_split(model, split, path=path)
    assert (
        len(model.seen) == n
        and torch.equal(f.image, again.image)
        and f.fingerprint == fingerprint(model) != ""
    )
    with torch.no_grad():
        model.image.weight[0, 0] += 1
    changed = encode_split(model, split, path=path)
    assert len(model.seen) > n and changed.fingerprint != f.fingerprint
    smaller = split.subset_ids(range(6))
    assert len(encode_split(model, smaller, path=path).text) == len(smaller)
    assert evaluate(None, smaller, features=SplitFeatures.load(path), n_boot=0).n_queries == len(
        smaller
    )
    path.write_bytes(b"not features")
    with pytest.raises(TiprError, match="encode again"):
        SplitFeatures.load(path)
    with pytest.raises(TiprError, match="no such file"):
        SplitFeatures.load(tmp_path / "none.safetensors")


def test_boxes_are_cut_out(tmp_path):
    scene = Image.new("RGB", (40, 24), (0, 0, 0))
    for i, c in enumerate(("red", "blue")):
        scene.paste(COLOURS[c], (8 + 16 * i, 0, 16 + 16 * i, 24))
    scene.save(tmp_path / "scene.png")
    boxes = np.array([[8, 0, 8, 24], [24, 0, 8, 24]])
    s = Split(
        "test",
        [tmp_path / "scene.png"] * 2,
        [0, 1],
        ["red over red", "blue over blue"],
        [0, 1],
        [0, 1],
        {"box": boxes},
    )
    assert evaluate(Model(), s, n_boot=0).r1 == 100


EVALUATE_BAD = {
    "dataset": (lambda s: evaluate(Model(), "synth-pedes"), "takes a split"),
    "no encoder": (lambda s: evaluate(object(), s), "encode_image"),
    "direction": (lambda s: evaluate(Model(), s, direction="t2t"), "direction"),
    "not a generator": (lambda s: picture_features(Model(), object(), s.captions), "no generate"),
    "not an encoder": (lambda s: picture_features(object(), Painter(), s.captions), "encode_image"),
    "column": (lambda s: evaluate(Model(), s, breakdown=("hat",)), "breakdown='hat'"),
    "half a gallery": (
        lambda s: evaluate(
            Model(),
            Split(
                "test",
                s.images,
                s.image_ids,
                s.captions,
                s.caption_ids,
                s.caption_image,
                s.image_columns,
            ),
        ),
        "'gallery'",
    ),
    "other features": (
        lambda s: evaluate(None, s.subset_ids(range(3)), features=encode_split(Model(), s)),
        "encode this split",
    ),
    "batch size": (lambda s: evaluate(Model(), s, batch_size=0), "batch_size"),
    "empty": (lambda s: evaluate(Model(), Split("test", [], [], [], [], [])), "empty"),
}


@pytest.mark.parametrize("case", EVALUATE_BAD)
def test_evaluate_bad_input(case, split):
    call, says = EVALUATE_BAD[case]
    with pytest.raises(TiprError) as e:
        call(split)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_wrong_shapes_from_an_encoder(split):
    class Short(Model):
        def encode_text(self, captions):
            return super().encode_text(captions)[:-1]

    with pytest.raises(TiprError, match="one row per item"):
        evaluate(Short(), split)

    class Broken(Model):
        def encode_image(self, images):
            return super().encode_image(images) * float("nan")

    with pytest.raises(TiprError, match="NaN"):
        evaluate(Broken(), split)


def test_names_are_there_and_no_objective_is_imported():
    code = (
        "import sys; from tipr_nb.evaluation import *; assert Metrics and rank_metrics and compare and evaluate; "
        "print([m for m in sys.modules if m in ('tipr_nb.training', 'diffusers') or m.startswith('tipr_nb.methods.')])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_peers_way_agrees(monkeypatch):
    "Full sort in float32, as the benchmark times it."
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from benchmarks.evaluation import features, full_sort

    data = features(200, 300, 32, 5)
    m, ref = rank_metrics(*data), full_sort(*data)
    assert all(abs(getattr(m, k) - ref[k]) < 1e-5 for k in HEADLINE)
