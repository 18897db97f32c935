"Captions enriched by pictures: the mean against formulas, the gate in the checkpoint, the cache by caption, the objective."

from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image
from torch.nn import functional as F

from tipr_nb.core import TiprError
from tipr_nb.methods import build_objective
from tipr_nb.models import Features, PersonCLIP, tal_loss, unit
from tipr_nb.data import Batch, normalise
from tipr_nb.evaluation import SplitFeatures, encode_split, evaluate, evaluate_weights
from tipr_nb.evaluation import toy_features
from tipr_nb.generation import PersonGenerator, generate_split
from tipr_nb.methods import (
    Gate,
    QueryEnricher,
    TGTE,
    attach_gate,
    attend,
    drawn_features,
    enhance,
    gate_of,
    picture_feature,
    picture_features,
)
from tipr_nb.training import choose_weight, query_kinds, query_ms, with_pictures
import tipr_nb

CAPTIONS = ["a woman in red", "a man in blue", "a person with a hat"]


def units(*shape, seed=0):
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


class Colours:
    "Stands for a generator: a plain picture whose colour depends on the caption; counts."

    def __init__(self, salt=0):
        self.n, self.salt = 0, salt

    def generate(self, captions):
        self.n += len(captions)
        return [
            Image.new(
                "RGB",
                (32, 96),
                tuple(np.random.default_rng([self.salt, *c.encode()]).integers(0, 256, 3).tolist()),
            )
            for c in captions
        ]

    def settings(self):
        return dict(salt=self.salt)


@pytest.fixture()
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano").eval()


def batch_of(model, n=6):
    g = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (2, n, 3, *model.image_size), generator=g, dtype=torch.uint8)
    words = [f"person number {i} in {'red blue green'.split()[i % 3]}" for i in range(n)]
    return Batch(
        normalise(raw[0]),
        model.tokenize(words),
        torch.arange(n) // 2,
        words,
        extra={"generated": normalise(raw[1])},
    )


def test_names_are_importable():
    assert (
        tipr_nb.PersonGenerator is PersonGenerator
        and tipr_nb.generate_split is generate_split
        and tipr_nb.enhance is enhance
    )


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_enhance_is_the_formula(w):
    t, g = units(5, 8), units(5, 8, seed=1)
    want = torch.stack([F.normalize((1 - w) * a + w * b, dim=0) for a, b in zip(t, g)])
    assert torch.allclose(enhance(t, g, w), want, atol=1e-6) and torch.allclose(
        enhance(t, g, torch.full((5, 1), w)), want, atol=1e-6
    )
    assert torch.allclose(enhance(t, g, w).norm(dim=1), torch.ones(5))


def test_several_pictures():
    t, gs = units(4, 8), units(4, 3, 8, seed=1)
    assert torch.allclose(enhance(t, gs, 1.0), unit(gs.mean(1)), atol=1e-6) and torch.allclose(
        enhance(t, gs[:, :1], 0.4), enhance(t, gs[:, 0], 0.4), atol=1e-6
    )
    best = gs[torch.arange(4), (gs * t[:, None]).sum(-1).argmax(1)]
    assert torch.allclose(
        enhance(t, gs, 1.0, temperature=1e-4), best, atol=1e-4
    ) and torch.allclose(attend(t, gs, share=0.3), best, atol=1e-6)


@pytest.mark.parametrize(
    "bad, says",
    [
        (lambda t, g: enhance(t, g, 1.2), r"weight=1.2.*\[0, 1\]"),
        (lambda t, g: enhance(t, g, -0.1), "weight"),
        (lambda t, g: enhance(t, g[:2]), "one picture's feature per caption"),
        (lambda t, g: attend(t, g[:, None], share=0), "share"),
        (lambda t, g: Gate(8, start=1.0), "start"),
    ],
)
def test_bad_input(bad, says):
    with pytest.raises(TiprError, match=says) as e:
        bad(units(4, 8), units(4, 8, seed=1))
    assert "\n" not in str(e.value)


def test_gate_travels(nano, tmp_path):
    assert gate_of(nano) is None
    gate = attach_gate(nano, start=0.2)
    t, g = units(3, nano.dim), units(3, nano.dim, seed=1)
    assert torch.allclose(gate(t, g), torch.full((3, 1), 0.2))
    torch.nn.init.normal_(gate.net[-1].weight)
    nano.save_pretrained(tmp_path)
    back = PersonCLIP.from_pretrained(tmp_path)
    assert not back.addons and torch.allclose(
        back.encode_text(CAPTIONS), nano.encode_text(CAPTIONS)
    )
    assert torch.equal(gate_of(back)(t, g), gate(t, g)) and attach_gate(back) is gate_of(back)


def test_queries_that_imagine(nano, tmp_path):
    draw = Colours()
    query = QueryEnricher(nano, draw, weight=0.4, cache=tmp_path / "p.safetensors")
    got = query.encode_text(CAPTIONS + CAPTIONS[:1])
    want = enhance(nano.encode_text(CAPTIONS), nano.encode_image(draw.generate(CAPTIONS)), 0.4)
    assert draw.n == 6 and torch.allclose(got[:3], want, atol=1e-5) and torch.equal(got[3], got[0])
    query.encode_text(CAPTIONS)
    query.save()
    again = QueryEnricher(nano, Colours(), weight=0.4, cache=tmp_path / "p.safetensors")
    assert (
        torch.allclose(again.encode_text(CAPTIONS), want, atol=1e-5)
        and again.generator.n == 0
        and draw.n == 6
    )
    for other in (
        lambda: QueryEnricher(nano, Colours(salt=1), cache=query.path),
        lambda: QueryEnricher(PersonCLIP("tipr-nano"), Colours(), cache=query.path),
        lambda: QueryEnricher(nano, Colours(), share=0.3, cache=query.path),
    ):
        with pytest.raises(TiprError, match="another model, generator or form"):
            other()
    query.path.write_bytes(query.path.read_bytes()[:100])
    with pytest.raises(TiprError, match="not a complete safetensors"):
        QueryEnricher(nano, Colours(), cache=query.path)
    with pytest.raises(TiprError, match="weight"):
        QueryEnricher(nano, draw, weight=2.0)
    plain = QueryEnricher(nano, Colours(), weight=0.0)
    assert (
        torch.equal(plain.encode_text(CAPTIONS), nano.encode_text(CAPTIONS))
        and plain.generator.n == 0
    )


def test_gate_decides_at_query_time(nano):
    attach_gate(nano, start=0.9)
    query = QueryEnricher(nano, draw := Colours())
    assert query.gate is not None
    assert torch.allclose(
        query.encode_text(CAPTIONS),
        enhance(nano.encode_text(CAPTIONS), nano.encode_image(draw.generate(CAPTIONS)), 0.9),
        atol=1e-5,
    )


def test_token_form(nano):
    x, t = torch.randn(3, 3, *nano.image_size), units(3, nano.dim)
    with torch.no_grad():
        tokens = nano.image_features(x)[1]
        assert torch.allclose(
            picture_feature(nano, x, t, share=0.3), attend(t, tokens[:, 1:], 0.3, 0.1), atol=1e-6
        )
        assert torch.allclose(picture_feature(nano, x), nano.encode_image(x), atol=1e-6)


def test_evaluate_with_pictures():
    text, image, ids, image_ids = (
        torch.as_tensor(x) for x in toy_features(n_ids=20, images=2, captions=2)
    )
    from tipr_nb.data import Split

    split = Split(
        "test",
        [f"{i}.jpg" for i in range(len(image))],
        image_ids.numpy(),
        [f"c{i}" for i in range(len(text))],
        ids.numpy(),
        np.array([int((image_ids == i).nonzero()[0]) for i in ids]),
    )
    first = image[torch.as_tensor(split.caption_image)]
    features = SplitFeatures(image, text)
    found = evaluate_weights(split, features, first, enhance, (0.0, 0.5), n_boot=0)
    several = evaluate_weights(
        split, features, first[:, None].repeat(1, 3, 1), enhance, (0.5,), n_boot=0
    )
    assert found[0.5].mAP > found[0.0].mAP and abs(several[0.5].mAP - found[0.5].mAP) < 1e-6
    assert found[0.0].to_dict() == evaluate(None, split, features=features, n_boot=0).to_dict()


def test_both_ways_to_ask_with_pictures_agree(nano, few):
    painter, split = Colours(), few.val
    asked = evaluate(QueryEnricher(nano, painter, weight=0.3), split, n_boot=0)
    stored, pictures = encode_split(nano, split), picture_features(nano, painter, split.captions)
    assert (
        evaluate_weights(split, stored, pictures, enhance, (0.3,), n_boot=0)[0.3].to_dict()
        == asked.to_dict()
    )
    assert painter.n == 2 * len(set(split.captions)) and asked.n_queries == len(split)


def test_features_of_another_weight_or_generator_are_not_taken(nano, few, tmp_path):
    split, path = few.val, tmp_path / "features.safetensors"
    first = encode_split(QueryEnricher(nano, Colours(), weight=0.3), split, path=path)
    painter = Colours()
    again = encode_split(QueryEnricher(nano, painter, weight=0.3), split, path=path)
    assert painter.n == 0 and torch.equal(first.text, again.text)
    for other in (
        QueryEnricher(nano, Colours(), weight=0.4),
        QueryEnricher(nano, Colours(salt=1), weight=0.3),
        nano,
    ):
        assert not torch.equal(encode_split(other, split, path=path).text, first.text)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes

    return load_dataset(
        "synth-pedes", make_synth_pedes(tmp_path_factory.mktemp("data") / "few", n_ids=(12, 4, 5))
    )


def test_kinds_of_queries(nano, few):
    painter, split = Colours(), few.val
    told = query_kinds(nano, split, painter, 0.3)
    assert painter.n == len(set(split.captions)) and "caption + picture, gate" not in told
    weights = {k: columns["weight"] for k, (_, columns) in told.items()}
    assert (
        weights["caption"] == 0
        and weights["picture alone"] == 1
        and {w for k, w in weights.items() if "+" in k} == {0.3}
    )
    asked = {k: a["features"].text for k, (a, _) in told.items()}
    drawn, text = asked["picture alone"], asked["caption"]
    assert torch.equal(text, encode_split(nano, split).text)
    assert torch.allclose(asked["caption + picture"], enhance(text, drawn, 0.3), atol=1e-6)
    ids, whole = (
        torch.as_tensor(split.caption_ids),
        query_kinds(nano, split, painter, 1.0),
    )  # at weight 1 the second feature is alone
    second = {k: a["features"].text for k, (a, _) in whole.items()}
    for k, source in (("+ shuffled picture", drawn), ("+ shuffled caption", text)):
        at = torch.cdist(second[k], source).argmin(1)
        assert (at != torch.arange(len(at))).all() and len(set(at.tolist())) == len(at)
        assert torch.allclose(asked[k], enhance(text, source[at], 0.3), atol=1e-5)
    mate = torch.cdist(second["+ second caption"], text).argmin(1)
    assert (ids[mate] == ids).all() and (mate != torch.arange(len(mate))).all()
    assert query_kinds(nano, split, Colours(), 0.3)["+ shuffled picture"][0]["features"].text.equal(
        asked["+ shuffled picture"]
    )
    attach_gate(nano, 0.4)
    gated, columns = query_kinds(nano, split, painter, 0.3)["caption + picture, gate"]
    assert abs(columns["weight"] - 0.4) < 1e-4
    constant = evaluate_weights(split, encode_split(nano, split), drawn, enhance, (0.4,), n_boot=0)[
        0.4
    ]
    assert abs(evaluate(None, split, n_boot=0, **gated).mAP - constant.mAP) < 1e-3


def test_the_weight_is_chosen_on_the_split(nano, few):
    class Photos:
        "Draws the very photo: the more of it, the better."

        def __init__(self, split):
            self.of = {c: split.images[i] for c, i in zip(split.captions, split.caption_image)}

        def generate(self, captions):
            return [Image.open(self.of[c]).convert("RGB") for c in captions]

    class Black:
        def generate(self, captions):
            return [Image.new("RGB", (32, 96))] * len(captions)

    assert (
        choose_weight(nano, few.val, Photos(few.val)) == 0.5
        and choose_weight(nano, few.val, Black(), (0.0,)) == 0.0
    )
    assert query_ms(nano, few.val.captions, n=3) > 0


def test_hook_of_the_grid(few, tmp_path, monkeypatch):
    from tipr_nb.training import controls, run_grid

    asked = []

    class Drawn(Colours):
        def field(self, split, size, shuffle=None, choose="random"):
            asked.append(("field", split.name, shuffle))
            return lambda index: torch.zeros(len(index), 3, *size, dtype=torch.uint8)

    monkeypatch.setattr(controls.PersonGenerator, "from_pretrained", lambda source=None: source)
    monkeypatch.setattr(
        controls,
        "pictures_for",
        lambda dataset, splits, source, per_caption=1: asked.append(splits) or Drawn(),
    )
    nano = dict(
        arch="tipr-nano", pretrained=None, precision="no", epochs=1, batch_size=8, eval_every=1
    )
    spec = dict(
        seeds=[0],
        splits=["test"],
        hook="tipr_nb.training.controls:with_pictures",
        set=nano,
        rows=[
            dict(name="plain", recipe="tal-tiny"),
            dict(name="GEA", recipe="gea-tiny", hook_args=dict(shuffle=3)),
            dict(name="bad", recipe="tal-tiny", hook_args=dict(shufle=3)),
        ],
    )
    t = run_grid(spec, tmp_path / "gea.csv", dataset=few, verbose=False)
    assert (
        asked[0] == ["val", "test"]
        and asked[1] == ["train", "val", "test"]
        and ("field", "train", 3) in asked
    )
    good = t[t.status == "done"]
    assert set(good["query"]) == {
        "caption",
        "caption + picture",
        "+ shuffled picture",
        "picture alone",
        "+ shuffled caption",
        "+ second caption",
    }
    assert (
        (good.groupby("row").size() == 6 * 3).all()
        and (good.query_ms > 0).all()
        and good.weight[good["query"] == "caption"].eq(0).all()
    )
    assert (
        "shufle" in t[t.row == "bad"].reason.iloc[0]
        and "did you mean 'shuffle'" in t[t.row == "bad"].reason.iloc[0]
    )


def test_objective(nano):
    batch = batch_of(nano)
    f = nano(batch)
    assert torch.allclose(
        TGTE(nano, 3, picture_weight=0.0)(f, batch, nano), tal_loss(f.image, f.text, f.ids)
    )
    assert torch.allclose(
        TGTE(nano, 3, as_photos=0.5)(f, batch, nano) - TGTE(nano, 3)(f, batch, nano),
        0.5 * tal_loss(f.drawn[0], f.text, f.ids),
        atol=1e-4,
    )
    assert drawn_features(f, batch, nano)[0] is drawn_features(f, batch, nano)[0]  # encoded once
    objective = build_objective("TGTE", nano, 3, gate=True, share=0.5)
    loss = objective(f, batch, nano)
    loss.backward()
    assert (
        loss.ndim == 0
        and nano.addons["tgte_gate"].net[-1].weight.grad.abs().sum() > 0
        and abs(objective.logs["w"] - 0.3) < 0.01
    )
    with pytest.raises(TiprError, match="no drawn pictures"):
        TGTE(nano, 3)(
            nano(batch), Batch(batch.images, batch.tokens, batch.ids, batch.captions), nano
        )
    with pytest.raises(TiprError, match="picture_weight"):
        TGTE(nano, 3, picture_weight=2.0)
    with pytest.raises(TiprError, match="as_photos"):
        TGTE(nano, 3, as_photos=-1.0)


def test_gradient_flows_through_text_photo_and_picture(nano):
    batch = batch_of(nano)
    for x in (batch.extra["generated"],):
        x.requires_grad_()
    f = nano(batch)
    TGTE(nano, 3)(f, batch, nano).backward()
    assert (
        batch.extra["generated"].grad.abs().sum() > 0
        and nano.clip.text_projection.grad.abs().sum() > 0
    )


def test_any_encoder_can_be_enriched_and_shows_its_pictures():
    class Mean:
        "A model of two methods: mean colours of pictures, and of words."

        def encode_image(self, images):
            return np.stack([np.asarray(im, np.float32).mean((0, 1)) / 255 for im in images])

        def encode_text(self, captions):
            return np.array(
                [[1, 0.1, 0.1] if "red" in c else [0.1, 0.1, 1] for c in captions], np.float32
            )

    painter = Colours()
    query = QueryEnricher(Mean(), painter, weight=0.5)
    got = query.encode_text(CAPTIONS[:2])
    g = torch.as_tensor(Mean().encode_image(painter.generate(CAPTIONS[:2])))
    assert (
        torch.allclose(got, enhance(torch.as_tensor(Mean().encode_text(CAPTIONS[:2])), g, 0.5))
        and query.model.__class__ is Mean
    )
    drawn = painter.n
    assert [im.getpixel((0, 0)) for im in query.imagined] == [
        im.getpixel((0, 0)) for im in Colours().generate(CAPTIONS[:2])
    ] and painter.n == drawn
    assert (
        QueryEnricher(Mean(), painter).gate is None
        and query.device == torch.device("cpu")
        and not query.training
    )


def test_pictures_to_show_are_kept_within_bounds(monkeypatch):
    from tipr_nb.methods import enricher

    monkeypatch.setattr(enricher, "_KEPT", 3)
    painter = Colours()
    query = QueryEnricher(PersonCLIP("tipr-nano"), painter, weight=0.5)
    for i in range(5):
        query.encode_text([f"person {i}", f"person {i + 1}"])
    assert len(query._drawn) <= 3 and painter.n == 6 and len(query.known) == 6
    query.encode_text(["person 0"])
    assert (
        painter.n == 6 and len(query.imagined) == 1 and painter.n == 7
    )  # the feature was known, its picture is drawn again to be shown


def test_pictures_as_photos_is_the_switch_of_old_recipes(nano):
    from tipr_nb.training import RECIPES

    batch = batch_of(nano)
    f = nano(batch)
    alone = build_objective("PicturesAsPhotos", nano, 3)(f, batch, nano)
    assert torch.allclose(alone, tal_loss(f.drawn[0], f.text, f.ids))
    assert torch.allclose(
        alone,
        TGTE(nano, 3, picture_weight=0.0, as_photos=1.0)(f, batch, nano)
        - tal_loss(f.image, f.text, f.ids),
        atol=1e-3,
    )
    old = RECIPES["gea-tiny"].replace(
        objectives=[("TGTE", dict(picture_weight=0.0, as_photos=0.3))]
    )
    new = RECIPES["gea-tiny"].replace(objectives=["TAL", ("PicturesAsPhotos", dict(weight=0.3))])
    assert old.objectives[0][1]["as_photos"] == 0.3 and old.hash() != new.hash()
    with pytest.raises(TiprError, match="no generated pictures|no drawn pictures"):
        build_objective("PicturesAsPhotos", nano, 3)(
            nano(batch), Batch(batch.images, batch.tokens, batch.ids, batch.captions), nano
        )
