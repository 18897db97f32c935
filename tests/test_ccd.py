"""RDE's division of pairs: noise, mixture, consensus, labels over epochs, resume."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tipr_nb.core import TiprError
from tipr_nb.data import PersonDataset, Split
from tipr_nb.methods import build_objective, clean_pairs, consensus
from tipr_nb.models import PersonCLIP, tal_loss

N = 40


def split_of(n=N):
    ids = np.arange(n)
    return Split(
        "train",
        [""] * n,
        ids,
        [f"caption {i}" for i in range(n)],
        ids,
        ids,
        {},
        {"kind": ids.astype(str)},
    )


@pytest.mark.parametrize("fraction", [0, 0.2, 0.5, 0.8])
def test_wrong_pairs_exchange_captions_and_nothing_else(fraction):
    before = split_of()
    after = before.with_wrong_pairs(fraction, seed=3)
    moved = np.array([a != b for a, b in zip(before.captions, after.captions)])
    assert sorted(after.captions) == sorted(before.captions)
    assert np.array_equal(after.caption_ids, before.caption_ids)
    assert np.array_equal(after.caption_columns["wrong_pair"], moved)
    assert moved.sum() == round(fraction * N)
    assert [f"caption {k}" for k in after.caption_columns["kind"]] == after.captions
    assert before.with_wrong_pairs(fraction, seed=3).captions == after.captions
    assert before.captions == split_of().captions


@pytest.mark.parametrize("fine", [False, True])
def test_mixture_divides_two_humps(fine):
    rng = np.random.default_rng(0)
    wrong = np.arange(2000) < 600
    losses = np.where(wrong, rng.normal(9, 1, 2000), rng.normal(3, 1, 2000))
    assert (clean_pairs(losses, fine) == ~wrong).mean() > 0.99
    assert clean_pairs(np.ones(10)).all()


def test_consensus():
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    kept = np.array([consensus(a, b, seed=s) for s in range(400)])
    assert (
        kept[:, 0].all()
        and not kept[:, 3].any()
        and 0.4 < kept[:, 1].mean() < 0.6
        and 0.4 < kept[:, 2].mean() < 0.6
    )


@pytest.fixture()
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano")


def batch_of(model, rows):
    tokens = model.tokenize([f"person number {i} in red" for i in rows])
    images = torch.randn(
        len(rows), 3, *model.image_size, generator=torch.Generator().manual_seed(int(rows[0]))
    )
    return SimpleNamespace(
        images=images, tokens=tokens, ids=torch.tensor(rows), caption_index=torch.tensor(rows)
    )


def test_first_epoch_is_tal_on_all_pairs(nano):
    batch = batch_of(nano, list(range(8)))
    f = nano(batch)
    objective = build_objective("CCD", nano, 8, tse=False)
    assert torch.allclose(objective(f, batch, nano), tal_loss(f.image, f.text, f.ids), atol=1e-4)
    assert tal_loss(f.image, f.text, f.ids, reduction="none").shape == (8,)


def test_labels_after_an_epoch_and_resume(nano, monkeypatch):
    from tipr_nb.methods import ccd

    monkeypatch.setattr(
        ccd, "clean_pairs", lambda losses, fine=False: np.arange(len(losses)) % 4 != 0
    )
    objective = build_objective("CCD", nano, 8, tse=False)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = batch_of(nano, rows)
        objective(nano(batch), batch, nano)
    assert objective.labels.tolist() == [1] * 8 and int(objective.epoch) == 0
    state = {k: v.clone() for k, v in objective.state_dict().items()}
    batch = batch_of(nano, [0, 1, 2, 3])
    loss = objective(nano(batch), batch, nano)
    assert (
        objective.labels.tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
        and int(objective.epoch) == 1
        and objective.logs["kept"] == 0.75
    )
    f = nano(batch)
    each = tal_loss(f.image, f.text, f.ids, reduction="none")
    assert torch.allclose(loss, each[1:].sum(), atol=1e-4)
    again = build_objective("CCD", nano, 8, tse=False)
    again.load_state_dict(state)
    assert torch.allclose(again(nano(batch), batch, nano), loss, atol=1e-5) and torch.equal(
        again.labels, objective.labels
    )


def test_an_epoch_is_over_though_its_last_batch_was_dropped(nano):
    "With `drop_last` some pairs are met in the second epoch for the first time; the division must not wait for them."
    ccd = build_objective("CCD", nano, 8, tse=False).train()

    def epochs_after(rows):
        batch = batch_of(nano, rows)
        ccd(nano(batch), batch, nano)
        return int(ccd.epoch)

    assert [epochs_after(rows) for rows in ([0, 1], [2, 3], [4, 5])] == [
        0,
        0,
        0,
    ]  # 6 and 7: dropped
    assert epochs_after([1, 3, 6]) == 1
    assert epochs_after([0, 7]) == 1


def test_nothing_is_remembered_in_evaluation(nano):
    objective = build_objective("CCD", nano, 8, tse=False)
    batch = batch_of(nano, [0, 1, 2, 3])
    objective(nano(batch), batch, nano)
    objective.eval()
    before = objective.record.clone()
    objective(nano(batch), batch, nano)
    assert torch.equal(before, objective.record) and int(objective.epoch) == 0


def test_bad_input(nano):
    batch = batch_of(nano, [0, 1])
    batch.caption_index = None
    with pytest.raises(TiprError, match="caption_index"):
        build_objective("CCD", nano, 2, tse=False)(nano(batch), batch, nano)
    with pytest.raises(TiprError, match="warmup=0"):
        build_objective("CCD", nano, 2, warmup=0)


def test_trains_on_noisy_data(tmp_path):
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, train

    data = load_dataset(
        "synth-pedes", make_synth_pedes(tmp_path / "data", n_ids=(12, 4, 5), workers=1)
    )
    recipe = RECIPES["tal-tiny"].replace(
        arch="tipr-nano",
        pretrained=None,
        precision="no",
        batch_size=8,
        epochs=2,
        objectives=["CCD"],
    )
    run = train(
        recipe,
        replace(data, train=data.train.with_wrong_pairs(0.5)),
        tmp_path / "run",
        device="cpu",
        verbose=False,
    )
    assert run.history["loss/CCD"].dropna().ge(0).all()


def test_an_epoch_ends_although_its_last_odd_pairs_were_left_out(tmp_path):
    "With drop_last a batch of the next epoch holds pairs that were never met; the division happens all the same."
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, train

    data = load_dataset(
        "synth-pedes", make_synth_pedes(tmp_path / "data", n_ids=(12, 4, 5), workers=1)
    )
    n = len(data.train)
    batch = next(b for b in range(n // 4, 2, -1) if n % b > b // 2)  # many are left out
    recipe = RECIPES["tal-tiny"].replace(
        arch="tipr-nano",
        pretrained=None,
        precision="no",
        batch_size=batch,
        epochs=3,
        objectives=["CCD"],
    )
    seen = []
    import tipr_nb.methods.ccd as ccd

    divide = ccd.CCD.divide
    try:
        ccd.CCD.divide = lambda self: (seen.append(1), divide(self))[1]
        train(recipe, data, tmp_path / "run", device="cpu", verbose=False)
    finally:
        ccd.CCD.divide = divide
    assert recipe.drop_last and len(seen) == 2
