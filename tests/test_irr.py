"""IRRA's guessing of hidden words: against a plain loop, padding, gradients, its own masking, and a run."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tipr_nb.core import TiprError
from tipr_nb.data import IGNORED
from tipr_nb.methods import build_objective
from tipr_nb.models import PersonCLIP

CAPTIONS = [
    "a man in a red coat and blue jeans",
    "a woman with a black bag",
    "a person in white",
    "green trousers and a hat",
]


@pytest.fixture()
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano")


def batch_of(model, hide=(2, 3)):
    tokens = model.tokenize(CAPTIONS)
    labels = torch.full(tokens.shape, IGNORED)
    masked = tokens.clone()
    for i in hide:
        labels[:, i] = tokens[:, i]
        masked[:, i] = 444
    images = torch.randn(4, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        images=images,
        tokens=masked,
        tokens_original=tokens,
        mask_labels=labels,
        ids=torch.arange(4),
    )


def test_loss_is_the_mean_over_hidden_words(nano):
    batch = batch_of(nano)
    f = nano(batch)
    objective = build_objective("IRR", nano, 4, depth=1).eval()
    loss = objective(f, batch, nano)
    total = []
    for i in range(4):
        for j in (2, 3):
            where = torch.zeros_like(f.text_mask)
            where[i, j] = True
            logits = objective.guesser(f.text_tokens, f.text_mask, f.image_tokens, where)
            total.append(F.cross_entropy(logits, batch.mask_labels[i, j][None]))
    assert (
        torch.allclose(loss, torch.stack(total).mean(), atol=1e-5)
        and 0 <= objective.logs["guessed"] <= 1
    )
    loss.backward()
    assert (
        nano.clip.visual.proj.grad.abs().sum() > 0
        and nano.clip.token_embedding.weight.grad.abs().sum() > 0
    )


def test_padding_is_not_read_unless_asked_for(nano):
    batch = batch_of(nano)
    f = nano(batch)
    changed = f.text_tokens.masked_fill(~f.text_mask[..., None], 50.0)
    where = batch.mask_labels != IGNORED
    ours, released = (
        build_objective("IRR", nano, 4, depth=1, attend_padding=a).guesser.eval()
        for a in (False, True)
    )
    assert torch.allclose(
        ours(f.text_tokens, f.text_mask, f.image_tokens, where),
        ours(changed, f.text_mask, f.image_tokens, where),
        atol=1e-4,
    )
    assert not torch.allclose(
        released(f.text_tokens, f.text_mask, f.image_tokens, where),
        released(changed, f.text_mask, f.image_tokens, where),
        atol=1e-2,
    )


def test_nothing_hidden_gives_zero(nano):
    batch = batch_of(nano, hide=())
    objective = build_objective("IRR", nano, 4, depth=1)
    loss = objective(nano(batch), batch, nano)
    loss.backward()
    assert loss == 0


def test_own_mask_leaves_captions_whole(nano):
    batch = batch_of(nano)
    plain = SimpleNamespace(images=batch.images, tokens=batch.tokens_original, ids=batch.ids)
    objective = build_objective("IRR", nano, 4, depth=1, own_mask=True)
    torch.manual_seed(3)
    a = objective(nano(plain), plain, nano)
    torch.manual_seed(3)
    b = objective(nano(plain), plain, nano)
    tokens, labels = objective.hide(plain.tokens)
    at = labels != IGNORED
    assert a == b and torch.equal(plain.tokens, nano.tokenize(CAPTIONS)) and at.any(1).all()
    assert torch.equal(labels[at], plain.tokens[at]) and torch.equal(tokens[~at], plain.tokens[~at])


def test_bad_input(nano):
    batch = batch_of(nano)
    del batch.mask_labels
    with pytest.raises(TiprError, match="caption_transform='mask'"):
        build_objective("IRR", nano, 4, depth=1)(nano(batch), batch, nano)
    with pytest.raises(TiprError, match="needs token features"):
        build_objective("IRR", SimpleNamespace(has_tokens=False, arch="swin"), 4)
    with pytest.raises(TiprError, match="heads=5"):
        build_objective("IRR", nano, 4, heads=5)


def test_find_objective_from_python_and_recipe(tmp_path, monkeypatch):
    from tipr_nb.methods import find_objective
    from tipr_nb.training import Recipe

    (tmp_path / "lossless.py").write_text(
        "from tipr_nb.methods import Objective\nclass Nothing(Objective):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        find_objective("lossless:Nothing").__name__ == "Nothing"
        and find_objective("IRR").__name__ == "IRR"
    )
    recipe = Recipe("mine", ["ITC", ("lossless:Nothing", {"weight": 0.5})])
    recipe.save(tmp_path / "mine.json")
    assert Recipe.load(tmp_path / "mine.json").objectives[1] == (
        "lossless:Nothing",
        {"weight": 0.5},
    )
    for name, says in (
        ("IIR", "IRR"),
        ("lossless:Absent", "has no Absent"),
        ("torch.nn:Linear", "no subclass"),
    ):
        with pytest.raises(TiprError, match=says):
            find_objective(name)


def test_an_installed_package_offers_an_objective(monkeypatch):
    from importlib import metadata
    from tipr_nb.methods import find_objective

    entry = metadata.EntryPoint("THEIRS", "tipr_nb.methods.cmt:CMT", "tipr_nb.objectives")
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda group=None: [entry] if group == "tipr_nb.objectives" else [],
    )
    assert find_objective("THEIRS").__name__ == "CMT"
