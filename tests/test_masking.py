"""Token masking in three flavours: rates, labels, seeds, vocabularies with and without a mask word, and the whole way through a loader."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tipr_nb.core import TiprError
from tipr_nb.data import IGNORED, CaptionTransforms, load_dataset, make_loader
from tipr_nb.methods import FLAVOURS, PEERS_MASK, TokenMasker, read_vocabulary
from tipr_nb.models import PersonCLIP
from open_clip.tokenizer import SimpleTokenizer

CAPTION = (
    "a young woman with long brown hair wears a hooded jacket , black jeans and white sneakers"
)


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ids(tokenizer):
    row = tokenizer([CAPTION])[0].numpy()
    return row[: row.argmax() + 1]


def many(masker, ids, n=4000, seed=0):
    rng = random.Random(seed)
    found = [masker(ids.copy(), CAPTION, rng) for _ in range(n)]
    return [r if isinstance(r, tuple) else (r, None) for r in found]


def close(count, n, p, sigmas=4.5):
    return abs(count / n - p) < sigmas * math.sqrt(p * (1 - p) / n)


def test_irra_rates_and_labels(tokenizer, ids):
    results = many(TokenMasker("irra").bind(tokenizer), ids)
    words = len(ids) - 2
    n = words * len(results)
    asked = sum((labels != IGNORED).sum() for _, labels in results)
    hidden = sum((new == PEERS_MASK).sum() for new, _ in results)
    first = (
        1 - 0.15
    ) ** words / words  # one caption in so many has its first word hidden for want of another
    assert close(asked, n, 0.15 + first) and close(hidden, n, 0.12 + first)
    for new, labels in results[:200]:
        assert len(new) == len(labels) == len(ids) and (labels != IGNORED).any()
        at = labels != IGNORED
        assert np.array_equal(labels[at], ids[at]) and np.array_equal(new[~at], ids[~at])
        assert new[0] == ids[0] and new[-1] == ids[-1] and not at[0] and not at[-1]
    exchanged = [
        new[i]
        for new, labels in results
        for i in np.flatnonzero((new != ids) & (new != PEERS_MASK))
    ]
    assert close(len(exchanged), n, 0.015) and 1 <= min(exchanged) and max(exchanged) < PEERS_MASK


def test_sen_hides_nouns_and_adjectives(tokenizer, ids):
    masker = TokenMasker("sen").bind(tokenizer)
    chances = {
        tokenizer.decoder[i].removesuffix("</w>"): masker.chance(i) for i in ids[1:-1].tolist()
    }
    assert {w for w, p in chances.items() if p == 0.3} >= {
        "young",
        "woman",
        "long",
        "brown",
        "hair",
        "jacket",
        "black",
        "jeans",
        "white",
        "sneakers",
    }
    assert all(chances[w] == 0.05 for w in ("a", "with", "wears", "and", ","))
    results = many(masker, ids)
    asked = np.mean([labels != IGNORED for _, labels in results], 0)[1:-1]
    wanted = np.array([masker.chance(i) for i in ids[1:-1].tolist()])
    assert np.abs(asked - wanted).max() < 0.04


def test_a_piece_of_a_word_is_no_noun(tokenizer):
    masker = TokenMasker("sen").bind(tokenizer)
    piece = tokenizer.encoder["hood"]
    assert (
        piece in masker.vocabulary.pieces
        and masker.chance(piece) == 0.05
        and masker.chance(tokenizer.encoder["hood</w>"]) == 0.3
    )


def test_rde_drops_and_asks_nothing(tokenizer, ids):
    results = many(TokenMasker("rde").bind(tokenizer), ids)
    n = (len(ids) - 2) * len(results)
    assert all(labels is None for _, labels in results)
    assert close(sum(len(ids) - len(new) for new, _ in results), n, 0.04)
    assert close(sum((new == PEERS_MASK).sum() for new, _ in results), n, 0.12)
    assert all(new[0] == ids[0] and new[-1] == ids[-1] for new, _ in results)


def test_settings_override_a_flavour(tokenizer, ids):
    none = TokenMasker("rde", fraction=0.0).bind(tokenizer)
    assert np.array_equal(none(ids.copy(), CAPTION, random.Random(0)), ids)
    half = many(
        TokenMasker("sen", fraction=0.5, content=0.0, labels=False).bind(tokenizer), ids, 1000
    )
    share = np.mean([new == PEERS_MASK for new, _ in half], 0)
    assert (
        all(labels is None for _, labels in half) and share[1] > 0.3 and share[3] == 0
    )  # "a" often, "woman" never


def test_at_least_one_word_and_empty_captions(tokenizer, ids):
    never = TokenMasker("irra", fraction=0.0).bind(tokenizer)
    new, labels = never(ids.copy(), CAPTION, random.Random(0))
    assert (labels != IGNORED).sum() == 1 and labels[1] == ids[1] and new[1] == PEERS_MASK
    empty = tokenizer([""])[0].numpy()[:2]
    new, labels = never(empty.copy(), "", random.Random(0))
    assert np.array_equal(new, empty) and (labels == IGNORED).all()


def test_same_seed_same_words(tokenizer, ids):
    masker = TokenMasker("sen").bind(tokenizer)
    a, b = (masker(ids.copy(), CAPTION, random.Random(3)) for _ in range(2))
    other = masker(ids.copy(), CAPTION, random.Random(4))
    assert (
        np.array_equal(a[0], b[0])
        and np.array_equal(a[1], b[1])
        and not np.array_equal(a[0], other[0])
    )


def test_small_vocabulary_masks_with_a_word_that_no_text_holds():
    model = PersonCLIP("tipr-nano")
    vocabulary = read_vocabulary(model.tokenize)
    assert (
        model.tokenizer.decoder[vocabulary.mask] == "Ā</w>"
        and vocabulary.mask < model.tokenizer.sot_token_id
    )
    tokens = model.tokenize([CAPTION, "\x00 red"])
    assert not (tokens[0] == vocabulary.mask).any()
    assert (
        vocabulary.mask not in vocabulary.others()
        and not set(vocabulary.others()) & vocabulary.special
    )


class HuggingFace:
    "Stands for a tokenizer of transformers."

    all_special_ids = [0, 1, 2]

    def __init__(self, mask):
        self.mask_token_id = mask

    def __len__(self):
        return 6

    def convert_ids_to_tokens(self, ids):
        return [["[PAD]", "[CLS]", "[SEP]", "[MASK]", "coat", "##s"][i] for i in ids]


def test_a_tokenizer_with_and_without_a_mask_word():
    own = read_vocabulary(SimpleNamespace(tokenizer=HuggingFace(3)))
    assert own.mask == 3 and own.words[4] == "coat" and own.pieces == {5}
    with pytest.raises(TiprError, match="no mask word; give mask_id="):
        TokenMasker().bind(SimpleNamespace(tokenizer=HuggingFace(None)))
    assert (
        TokenMasker(mask_id=4).bind(SimpleNamespace(tokenizer=HuggingFace(None))).vocabulary.mask
        == 4
    )


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda: TokenMasker("bert"), "unknown flavour of masking 'bert'"),
        (lambda: TokenMasker("irra", fraction=1.0), "fraction=1.0"),
        (lambda: TokenMasker("irra", fraction=-0.1), "fraction=-0.1"),
        (lambda: TokenMasker("sen", content=1.0), "content=1.0"),
        (lambda: TokenMasker().bind(len), "no vocabulary"),
        (lambda: TokenMasker(mask_id=49407).bind(SimpleTokenizer()), "mask_id=49407"),
        (lambda: TokenMasker(mask_id=-1).bind(SimpleTokenizer()), "mask_id=-1"),
        (lambda: TokenMasker()(np.array([1, 2]), "", random.Random(0)), "no tokenizer yet"),
    ],
)
def test_bad_input(bad, says):
    with pytest.raises(TiprError) as e:
        bad()
    assert says in str(e.value) and "\n" not in str(e.value)


def test_through_a_loader(tmp_path):
    from tipr_nb.synth import make_synth_pedes

    data = load_dataset(
        "synth-pedes", make_synth_pedes(tmp_path / "data", n_ids=(12, 4, 5), workers=1)
    )
    model = PersonCLIP("tipr-nano")

    def batch(workers=0, seed=0):
        loader = make_loader(
            data.train,
            model.tokenize,
            model.image_size,
            batch_size=8,
            seed=seed,
            caption_transform=["prune", ("mask", {"flavour": "sen"})],
            num_workers=workers,
        )
        return next(iter(loader))

    first, again, other = batch(), batch(), batch(seed=1)
    at = first.mask_labels != IGNORED
    assert torch.equal(first.tokens, again.tokens) and torch.equal(
        first.mask_labels, again.mask_labels
    )
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)
    assert at.any(1).all() and torch.equal(first.mask_labels[at], first.tokens_original[at])
    assert torch.equal(first.tokens[~at], first.tokens_original[~at])


def test_flavours_are_the_released_ones():
    assert (FLAVOURS["irra"].fraction, FLAVOURS["sen"].content, FLAVOURS["rde"].drop) == (
        0.15,
        0.30,
        0.2,
    )
    assert CaptionTransforms([("mask", {"flavour": "rde"})], SimpleTokenizer()).on_tokens
