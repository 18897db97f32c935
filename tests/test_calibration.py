"""Best hits with and without the person, calibrated probabilities, open-set figures, run files, mSD."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tipr_nb.core import TiprError
from tipr_nb.data import Split
from tipr_nb.evaluation import (
    Calibration,
    SplitFeatures,
    best_hits,
    evaluate,
    mean_similarity_distribution,
    open_set,
    toy_features,
    write_qrels,
    write_trec,
)


def toy(seed=0, n_ids=60, noise=1.0, galleries=1):
    text, image, text_ids, image_ids = toy_features(
        n_ids=n_ids, images=3, captions=4, noise=noise, seed=seed
    )
    first = np.array([int(np.flatnonzero(image_ids == i)[0]) for i in text_ids])
    columns = (
        ({}, {})
        if galleries == 1
        else ({"gallery": image_ids % galleries}, {"gallery": text_ids % galleries})
    )
    split = Split(
        "val",
        [Path(f"{i}.jpg") for i in range(len(image))],
        image_ids,
        [f"c{i}" for i in range(len(text))],
        text_ids,
        first,
        *columns,
    )
    return SplitFeatures(torch.as_tensor(image), torch.as_tensor(text)), split


@pytest.mark.parametrize("galleries", [1, 2])
def test_best_hits_by_brute_force(galleries):
    features, split = toy(galleries=galleries)
    hits = best_hits(features, split)
    for q in range(0, len(hits), 17):
        mine = (
            np.ones(len(split.image_ids), bool)
            if galleries == 1
            else split.image_columns["gallery"] == split.caption_columns["gallery"][q]
        )
        best = {
            i: float(
                (
                    features.image[torch.as_tensor(mine & (split.image_ids == i))]
                    @ features.text[q]
                ).max()
            )
            for i in np.unique(split.image_ids[mine])
        }
        ranked = sorted(best, key=best.get, reverse=True)
        absent = [i for i in ranked if i != split.caption_ids[q]]
        row = hits.iloc[q]
        assert row["query"] == q and row.right == (ranked[0] == split.caption_ids[q])
        assert np.isclose(row.score, best[ranked[0]], atol=1e-5) and np.isclose(
            row.lead, best[ranked[0]] - best[ranked[1]], atol=1e-5
        )
        assert np.isclose(row.absent_score, best[absent[0]], atol=1e-5) and np.isclose(
            row.absent_lead, best[absent[0]] - best[absent[1]], atol=1e-5
        )
    assert np.isclose(
        100 * hits.right.mean(), evaluate(None, split, features=features, n_boot=0).r1, atol=1.0
    )


def test_probabilities_hold_on_other_people(tmp_path):
    calibration = Calibration.fit(best_hits(*toy(0)))
    other = best_hits(*toy(1))
    p = np.concatenate(
        [
            calibration.probability(other.score, other.lead),
            calibration.probability(other.absent_score, other.absent_lead),
        ]
    )
    right = np.concatenate([other.right, np.zeros(len(other), bool)])
    assert ((p >= 0) & (p <= 1)).all() and abs(p.mean() - right.mean()) < 0.08
    assert p[right].mean() > p[~right].mean() + 0.3 and (
        (p - right) ** 2
    ).mean() < 0.8 * right.mean() * (1 - right.mean())
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(TiprError, match="not a calibration"):
        Calibration.load(tmp_path / "c.json")


def test_fewer_present_makes_it_more_careful():
    hits = best_hits(*toy(0))
    usual, rare = (Calibration.fit(hits, present=p).probability(0.55, 0.1) for p in (0.5, 0.05))
    assert rare < usual


def test_open_set():
    hits = pd.DataFrame(
        dict(
            score=[0.9, 0.8, 0.7, 0.2],
            right=[True, True, False, True],
            absent_score=[0.1, 0.3, 0.5, 0.75],
        )
    )
    table = open_set(hits, (0, 0.25, 1.0))
    assert table.threshold.tolist() == [0.75, 0.5, 0.1] and table["true hits, %"].tolist() == [
        50,
        50,
        75,
    ]
    for bad, says in ((dict(by="rank"), "by="), (dict(false_alarms=(2,)), "false_alarms=2")):
        with pytest.raises(TiprError, match=says):
            open_set(hits, **bad)


def test_bad_input():
    features, split = toy()
    hits = best_hits(features, split)
    for call, says in (
        (lambda: best_hits(features, toy(0, 20)[1]), "encode this split"),
        (lambda: best_hits(*toy(0, 2)), "three or more"),
        (lambda: Calibration.fit(hits, present=0), "present=0"),
        (lambda: Calibration.fit(hits.assign(right=False)), "no best hit is right"),
    ):
        with pytest.raises(TiprError, match=says):
            call()


@pytest.mark.parametrize("galleries", [1, 2])
def test_run_files_say_what_evaluate_says(tmp_path, galleries):
    features, split = toy(n_ids=12, galleries=galleries)
    write_trec(None, split, tmp_path / "run.txt", tmp_path / "qrels.txt", features=features)
    run = pd.read_csv(
        tmp_path / "run.txt", sep=" ", names=["query", "Q0", "item", "rank", "score", "tag"]
    )
    relevant = pd.read_csv(
        tmp_path / "qrels.txt", sep=" ", names=["query", "0", "item", "relevance"]
    )
    joined = (
        run.merge(relevant, on=["query", "item"], how="left")
        .fillna(0)
        .sort_values(["query", "rank"])
    )
    precision = []
    for _, part in joined.groupby("query"):
        hits = part.relevance.to_numpy()
        assert (np.diff(part.score) <= 0).all() and hits.sum() == 3 and len(hits) == 36 // galleries
        precision.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits > 0].mean())
    whole = pd.DataFrame(dict(AP=precision)).AP.mean()
    assert abs(100 * whole - evaluate(None, split, features=features, n_boot=0).mAP) < 1e-6
    write_qrels(split, tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == (tmp_path / "qrels.txt").read_bytes()
    write_trec(None, split, tmp_path / "short.txt", features=features, depth=5, tag="mine")
    assert len((tmp_path / "short.txt").read_text().splitlines()) == 5 * len(split) and (
        tmp_path / "short.txt"
    ).read_text().endswith("mine\n")
    for bad, says in ((dict(depth=0), "depth=0"), (dict(tag="two words"), "one word")):
        with pytest.raises(TiprError, match=says):
            write_trec(None, split, tmp_path / "run.txt", features=features, **bad)


def test_msd():
    query, gallery, query_ids, gallery_ids = toy_features(n_ids=15)
    values = []
    for q, i in zip(query, query_ids):
        s = (1 + gallery @ q) / 2
        order = np.argsort(-s)
        s, hit = s[order], (gallery_ids == i)[order]
        shares = [s[: r + 1][hit[: r + 1]].sum() / s[: r + 1].sum() for r in np.flatnonzero(hit)]
        values.append(np.mean(shares) * (1 - np.exp(-s[hit].mean() / s[~hit].mean())))
    assert np.isclose(
        mean_similarity_distribution(query, gallery, query_ids, gallery_ids),
        100 * np.mean(values),
        atol=1e-4,
    )
    order = np.random.default_rng(0).permutation(len(gallery))
    assert np.isclose(
        mean_similarity_distribution(query, gallery[order], query_ids, gallery_ids[order]),
        100 * np.mean(values),
        atol=1e-4,
    )
    tied = mean_similarity_distribution(np.ones((1, 2)), np.ones((4, 2)), [0], [0, 1, 2, 3])
    assert np.isclose(tied, 100 * 0.25 * (1 - np.exp(-1)))  # a constant model: its hit stands last
    with pytest.raises(TiprError, match="no identity in common"):
        mean_similarity_distribution(query, gallery, query_ids + 99, gallery_ids)
