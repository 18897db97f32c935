"""Predicted pictures: the network, its file, the model around a model, and what galleries remember of it."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tipr_nb.core import TiprError, shipped_weights
from tipr_nb.evaluation import encode_texts
from tipr_nb.methods import (
    PREDICTED_SUFFIX,
    PicturePredictor,
    PredictedQuery,
    enhance,
    fit_predictor,
    load_predictor,
    predictor_of,
    save_predictor,
)
from tipr_nb.models import PersonCLIP, fingerprint, unit
from tipr_nb.search import Gallery

WORDS = ["a woman in a red coat", "a man with a blue bag, seen from behind"]


@pytest.fixture(scope="module")
def shipped():
    return PredictedQuery.from_pretrained("clip-synth-pedes")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (96, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_learns_the_mean_of_what_it_was_shown():
    rng = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=rng))
    texts = unit(torch.randn(2000, 8, generator=rng))
    means = texts @ turn
    shown = unit(means + 0.3 * torch.randn(2000, 8, generator=rng))
    net, losses = fit_predictor(texts, shown, hidden=0, epochs=30, batch_size=200, lr=0.02)
    assert (net(texts) * means).sum(1).mean() > 0.99 > (shown * means).sum(1).mean()
    assert losses[-1] < losses[0]


def test_same_seed_same_network_and_the_global_seed_is_left_alone():
    texts = unit(torch.randn(50, 8))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (fit_predictor(texts, texts.flip(0), hidden=4, epochs=2)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("name", ["clip-synth-world", "clip-synth-pedes"])
def test_shipped_ones_load_and_are_small(name):
    folder = shipped_weights()[name]
    predictor, weight = load_predictor(folder, PersonCLIP.from_pretrained(name))
    assert 0 < weight < 1 and predictor.hidden
    assert (folder / "picture_predictor.safetensors").stat().st_size < 2**20


def test_shipped_weights_stay_small():
    size = sum(
        f.stat().st_size
        for folder in shipped_weights().values()
        for f in folder.rglob("*")
        if f.is_file()
    )
    assert size < 40 * 2**20


def test_another_models_file_is_refused(tmp_path, shipped):
    save_predictor(shipped.predictor, tmp_path, shipped.model, 0.2)
    with pytest.raises(TiprError, match="learned for other weights"):
        load_predictor(tmp_path, PersonCLIP.from_pretrained("clip-synth-world"))
    with pytest.raises(TiprError, match="fit_predictor"):
        load_predictor(tmp_path / "none", shipped.model)
    kept, weight = load_predictor(tmp_path, shipped.model)
    assert weight == 0.2 and kept.hidden == shipped.predictor.hidden


def test_a_file_cut_short_is_one_line(tmp_path, shipped):
    file = save_predictor(shipped.predictor, tmp_path, shipped.model)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TiprError, match="picture_predictor.safetensors"):
        load_predictor(tmp_path, shipped.model)


def test_bad_arguments(shipped):
    with pytest.raises(TiprError, match="weight=2"):
        PredictedQuery(shipped.model, shipped.predictor, 2)
    with pytest.raises(TiprError, match="dimensions"):
        PredictedQuery(shipped.model, PicturePredictor(7), 0.2)
    with pytest.raises(TiprError, match="pairs"):
        fit_predictor(torch.ones(3, 4), torch.ones(2, 4))


def test_queries_are_the_mixture_and_photos_the_models_own(shipped):
    text = shipped.model.encode_text(WORDS)
    with torch.no_grad():
        want = enhance(text, shipped.predictor(text), float(shipped.weight))
    assert torch.allclose(shipped.encode_text(WORDS), want, atol=1e-6)
    assert torch.allclose(encode_texts(shipped, WORDS), want, atol=1e-5)
    x = torch.zeros(1, 3, *shipped.image_size)
    assert torch.equal(shipped.encode_image(x), shipped.model.encode_image(x))
    plain = PredictedQuery(shipped.model, shipped.predictor, 0.0)
    assert torch.allclose(plain.encode_text(WORDS), text, atol=1e-6)
    assert fingerprint(plain) != fingerprint(shipped)


def test_a_gallery_remembers_it_and_its_tower_predicts(photos, shipped, tmp_path):
    gallery = Gallery.build(photos, shipped, tmp_path / "g")
    later = Gallery(tmp_path / "g")  # by the exported tower
    found = later.search(WORDS[0], 6)
    images = shipped.encode_image([h.path for h in found])
    scores = (images @ shipped.encode_text([WORDS[0]]).T).squeeze(1)
    assert np.allclose([h.score for h in found], scores, atol=1e-4)
    again = Gallery.build(photos, None, tmp_path / "g")  # loads the model by its name
    assert again.report.encoded == 0
    assert len(later.search(image=[found[0].path], k=3)) == 3
    gallery.close()


def test_a_plain_gallery_can_be_asked_with_it(photos, shipped, tmp_path):
    Gallery.build(photos, "clip-synth-pedes", tmp_path / "g")
    asked = Gallery(tmp_path / "g", shipped).search(WORDS[1], 6)
    plain = Gallery(tmp_path / "g").search(WORDS[1], 6)
    assert [h.score for h in asked] != [h.score for h in plain]
    other = PredictedQuery.from_pretrained("clip-synth-world")
    with pytest.raises(TiprError, match="made by another model"):
        Gallery(tmp_path / "g", other).search(WORDS[1], 1)


def test_in_the_terminal(photos, tmp_path):
    from tipr_nb.cli import app

    def tipr(*words):
        found = CliRunner().invoke(app, [str(w) for w in words])
        assert found.exit_code == 0, found.output
        return found.output

    tipr("index", photos, "--gallery", tmp_path / "with", "--predict")
    tipr("index", photos, "--gallery", tmp_path / "without")
    asked = ["search", WORDS[0], "--json", "--gallery"]
    first = tipr(*asked, tmp_path / "with")
    second = tipr(*asked, tmp_path / "without", "--predict")
    plain = tipr(*asked, tmp_path / "without")

    def scores(output):
        import json

        hits = json.loads(output)
        hits = hits["hits"] if isinstance(hits, dict) else hits
        return [h["score"] for h in hits]

    assert np.allclose(scores(first), scores(second), atol=1e-4)
    assert not np.allclose(scores(first), scores(plain), atol=1e-4)


def test_the_name_says_it():
    assert (
        PredictedQuery.from_pretrained("clip-synth-pedes" + PREDICTED_SUFFIX).source
        == "clip-synth-pedes+predicted"
    )


def test_a_predictor_trained_along_is_asked_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = PersonCLIP("tipr-nano")
    own = predictor_of(model, hidden=16)
    model.save_pretrained(tmp_path / "run")
    query = PredictedQuery.from_pretrained(tmp_path / "run")
    text = unit(torch.randn(4, model.dim))
    assert torch.allclose(query.predictor(text), own(text), atol=1e-6)
    assert not query.training and query.predictor.hidden == 16
