"""RDE's token selection: the recorded attention, the order of sorted batches, one dot product, checkpoints, a run."""

import pytest
import torch

from tipr_nb.core import TiprError
from tipr_nb.data import load_dataset
from tipr_nb.evaluation import evaluate
from tipr_nb.methods import LastAttention, attach_selection, build_objective
from tipr_nb.models import PersonCLIP


@pytest.fixture()
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano").eval()


def sentences(n):
    garments = "red coat,blue jeans,white shoes,a black bag,long hair,a hat".split(",")
    return [f"person {i} in " + " and ".join(garments[: 1 + i * 7 % 6]) for i in range(n)]


def test_attention_of_the_photo_is_the_towers_own(nano):
    x = torch.randn(4, 3, *nano.image_size)
    recorder = LastAttention(nano)
    with recorder.record():
        nano.image_features(x)
    want = nano.attention(x)[:, -1].mean(1)[:, 0]
    assert torch.allclose(recorder.row("image", torch.zeros(4, dtype=torch.long)), want, atol=1e-5)


@pytest.mark.parametrize("n", [3, 70])  # 70: the tower runs captions of like length together
def test_a_captions_feature_does_not_depend_on_its_batch(nano, n):
    attach_selection(nano).eval()
    words = sentences(n)
    together = nano.encode_text(words)
    alone = torch.cat([nano.encode_text(words[i]) for i in (0, 1, n - 1)])
    assert torch.allclose(together[[0, 1, n - 1]], alone, atol=1e-4)


def test_nothing_is_kept_outside_a_recorded_pass(nano):
    recorder = LastAttention(nano)
    nano.encode_text(sentences(4))
    assert recorder.pieces == dict(image=[], text=[])
    with pytest.raises(TiprError, match="no pass was recorded"):
        recorder.row("image", torch.zeros(1, dtype=torch.long))


def test_travels_with_the_checkpoint(nano, tmp_path):
    build_objective("TSE", nano, 4, width=48)
    nano.save_pretrained(tmp_path)
    back = PersonCLIP.from_pretrained(tmp_path)
    assert "tse" in back.addons and not back.unclaimed_addons and back.config()["addons"] == ["tse"]
    assert back.feature_dim == nano.dim + 48 and back.dim == nano.dim
    nano.eval()
    assert torch.equal(back.encode_text(sentences(3)), nano.encode_text(sentences(3)))
    assert torch.allclose(back.encode_text(sentences(3)).norm(dim=1), torch.ones(3), atol=1e-5)
    assert back.encode_text([]).shape == (0, back.feature_dim)
    plain = PersonCLIP("tipr-nano")
    assert plain.readout is None and plain.feature_dim == plain.dim
    again = build_objective("TSE", back, 4)  # goes on with the branches that it has
    assert back.addons["tse"].width == 48 and not list(again.parameters())


def test_one_dot_product_is_the_mean_of_both_cosines(nano):
    selection = attach_selection(nano).eval()
    x = torch.randn(3, 3, *nano.image_size)
    with torch.no_grad():
        both = nano.encode_text(sentences(3)) @ nano.encode_image(x).T
        recorder = LastAttention(nano)
        with recorder.record():
            _, tokens = nano.image_features(x)
        z = selection.image_feature(tokens, recorder.row("image", torch.zeros(3, dtype=torch.long)))
        ids = nano.tokenize(sentences(3))
        with recorder.record():
            _, states, mask = nano.text_features(ids)
        w = selection.text_feature(
            states, recorder.row("text", mask.sum(1) - 1, mask.sum(1)), mask, 77
        )
        cosine = torch.nn.functional.cosine_similarity
        first = cosine(nano.text_features(ids)[0][:, None], nano.image_features(x)[0][None], dim=-1)
        second = cosine(w[:, None], z[None], dim=-1)
    assert torch.allclose(both, (first + second) / 2, atol=1e-5)


def test_an_averaged_copy_reads_out_too(nano):
    import copy

    build_objective("TSE", nano, 4)
    twin = copy.deepcopy(nano)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    assert twin.encode_text(sentences(2)).shape == (2, nano.feature_dim)
    assert not torch.equal(twin.encode_text(sentences(2)), nano.encode_text(sentences(2)))


def test_selected_words_are_the_attended_ones(nano):
    selection = attach_selection(nano, fraction=0.04)  # int(75 * .04) = 3 words
    tokens, attention = (
        torch.randn(1, 8, nano.dim),
        torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.4, 0.3, 0.9, 0.9]]),
    )
    mask = torch.tensor([[True] * 7 + [False]])  # start, five words, end, padding
    got = selection.eval().text_feature(tokens, attention, mask, 77)
    for i in (1, 3):  # the words attended to least change nothing
        assert torch.equal(
            selection.text_feature(
                tokens.index_fill(1, torch.tensor([i]), 7.0), attention, mask, 77
            ),
            got,
        )
    for i in (0, 6, 7):  # nor do start, end and padding
        assert torch.equal(
            selection.text_feature(
                tokens.index_fill(1, torch.tensor([i]), 7.0), attention, mask, 77
            ),
            got,
        )
    assert not torch.equal(
        selection.text_feature(tokens.index_fill(1, torch.tensor([2]), 7.0), attention, mask, 77),
        got,
    )


def test_bad_input(nano):
    with pytest.raises(TiprError, match="fraction=0"):
        build_objective("TSE", nano, 4, fraction=0)
    with pytest.raises(TiprError, match="use a plain ViT"):
        LastAttention(PersonCLIP("RN50", (256, 128)))


def test_trains_and_evaluates(tmp_path):
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
        epochs=1,
        objectives=["TAL", "TSE"],
        caption_transform=("mask", {"flavour": "rde"}),
    )
    run = train(recipe, data, tmp_path / "run", device="cpu", verbose=False)
    assert run.history["loss/TSE"].dropna().gt(0).all()
    model = PersonCLIP.from_pretrained(tmp_path / "run" / "best")
    kept = evaluate(model, data.val, n_boot=0, per_query=False)
    assert (
        kept.n_queries == len(data.val)
        and run.model.feature_dim == model.feature_dim == 3 * model.dim
    )
    assert (
        abs(kept.mAP - run.best["mAP"]) < 1e-3
    )  # validation while training searched by both features
    del model.addons["tse"]
    assert abs(evaluate(model, data.val, n_boot=0, per_query=False).mAP - run.best["mAP"]) > 1e-3


def released_text_feature(branch, states, attention, mask, k):
    "RDE's text branch, step by step: padding fills up the chosen tokens and enters the normalisation."
    words = mask.sum(1) - 2
    rank = attention.clone()
    rank[:, 0] = -1
    rank[torch.arange(len(mask)), mask.sum(1) - 1] = -1
    rank = rank * mask
    at = rank.topk(k, dim=1).indices
    picked = states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))
    x = picked / (picked.norm(dim=-1, keepdim=True) + 1e-8)
    flat = x.reshape(-1, x.shape[-1])
    out = branch.out(torch.relu(branch.norm(branch.hidden(flat)))).reshape(
        *at.shape, -1
    ) + branch.linear(x)
    return torch.stack([row[: min(k, int(n))].amax(0) for row, n in zip(out, words)])


def test_padding_enters_the_normalisation_where_asked(nano):
    selection = attach_selection(nano, fraction=0.3).train()
    torch.manual_seed(1)
    mask = torch.arange(77) < torch.tensor([[9], [31], [77], [5]])
    states = torch.randn(4, 77, nano.dim)
    attention = torch.rand(4, 77) * mask
    got = selection.text_feature(states, attention, mask, 77, attend_padding=True)
    want = released_text_feature(selection.text, states, attention, mask, 22)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(selection.text_feature(states, attention, mask, 77), want, atol=1e-3)


@pytest.mark.parametrize(
    "n", [8, 70]
)  # 70: captions of like length run together unless padding is asked for
def test_full_captions_keep_the_states_of_their_padding(nano, n):
    tokens = nano.tokenize(sentences(n))
    full = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
    _, states, mask = nano.text_features(full)
    _, alone, _ = nano.text_features(full[:4])
    assert torch.allclose(states[:4], alone, atol=1e-4) and not mask[:, -1].any()
    assert states[~mask].norm(dim=-1).min() > 0.1 and states[0, -1].ne(states[0, -2]).any()
