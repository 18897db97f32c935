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


def test_division_by_an_evaluation_before_each_epoch(nano, monkeypatch):
    from tipr_nb.methods import ccd

    seen = []

    def every_fourth_is_noisy(losses, fine=False):
        seen.append(losses)
        return np.arange(len(losses)) % 4 != 0

    monkeypatch.setattr(ccd, "clean_pairs", every_fourth_is_noisy)
    objective = build_objective("CCD", nano, 8, tse=False, division="evaluation")
    batches = [batch_of(nano, rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]

    def passes():
        with torch.no_grad():
            yield from [(nano(b), b) for b in batches]

    objective.eval().before_epoch(nano, passes, 0)
    labels = [0, 1, 1, 1, 0, 1, 1, 1]
    assert objective.labels.tolist() == labels and len(seen) == 2
    each = [tal_loss(f.image, f.text, f.ids, reduction="none") for f, _ in passes()]
    assert np.allclose(seen[0], torch.cat(each).numpy(), atol=1e-5)
    objective.train()
    for b in batches * 2:
        objective(nano(b), b, nano)  # steps divide nothing here
    assert objective.labels.tolist() == labels and len(seen) == 2
    objective.before_epoch(nano, passes, 0)  # a run that goes on inside the epoch
    assert len(seen) == 2 and int(objective.epoch) == 1
    objective.before_epoch(nano, passes, 1)
    assert len(seen) == 4 and int(objective.epoch) == 2


def test_warmup_of_the_evaluated_division(nano):
    objective = build_objective("CCD", nano, 8, tse=False, division="evaluation", warmup=1)
    passed = []

    def passes():
        passed.append(1)
        batch = batch_of(nano, list(range(8)))
        with torch.no_grad():
            yield nano(batch), batch

    objective.before_epoch(nano, passes, 0)
    assert not passed and not len(objective.labels)
    objective.before_epoch(nano, passes, 1)
    assert passed and 0 < objective.labels.sum() < 8


def test_a_run_with_evaluated_divisions_goes_on_exactly(tmp_path):
    "Stopped at the end of an epoch and inside one: the same weights and losses as in one go."
    from tipr_nb.data import load_dataset
    from tipr_nb.methods import ccd
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, Callback, train

    folder = make_synth_pedes(tmp_path / "data", n_ids=(12, 4, 5), workers=1)
    data = load_dataset("synth-pedes", folder)
    recipe = RECIPES["tal-tiny"].replace(
        arch="tipr-nano",
        pretrained=None,
        precision="no",
        batch_size=8,
        epochs=3,
        caption_transform=("mask", dict(flavour="rde")),
        objectives=[("CCD", dict(tse=False, division="evaluation"))],
    )
    divided = []

    class StopAt(Callback):
        def __init__(self, step):
            self.step = step

        def on_step(self, trainer, losses):
            trainer.stop = trainer.step == self.step

    def run(name, *callbacks):
        out = tmp_path / name
        return train(recipe, data, out, device="cpu", verbose=False, callbacks=callbacks)

    divide = ccd.CCD.divide

    def counted(self):
        divide(self)
        divided.append(self.labels.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ccd.CCD, "divide", counted)
        whole = run("whole")
        assert len(divided) == 3 and 0 < divided[-1].mean() < 1
        steps = int(whole.history["step"].max()) // 3
        for stop in (steps, steps + 1):
            del divided[3:]
            run(f"stopped {stop}", StopAt(stop))
            again = run(f"stopped {stop}")
            assert len(divided) == 6  # none of them twice
            assert all(torch.equal(a, b) for a, b in zip(divided[:3], divided[3:]))
            pairs = zip(whole.model.parameters(), again.model.parameters())
            assert all(torch.equal(a, b) for a, b in pairs)


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
    with pytest.raises(TiprError, match="warmup=-1"):
        build_objective("CCD", nano, 2, warmup=-1, division="evaluation")
    with pytest.raises(TiprError, match="division of CCD 'epochs'"):
        build_objective("CCD", nano, 2, division="epochs")


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
