"""Galleries that answer: sentences, pictures, filters, engines, copies, and everything one can ask wrongly."""

import html.parser, json, os, shutil, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gallery_pictures import archive, figure
from tipr_nb.core import TiprError, shipped_weights
from tipr_nb.search import FIGURE_COLOURS, ColourModel
from tipr_nb.search import Page, Question, read_manifest
from tipr_nb.search.storage import write_manifest
from tipr_nb.search import (
    DEFAULT_MODEL,
    Gallery,
    Hit,
    HitProbabilities,
    Hits,
    expanded_query,
    hits_html,
    mix_query,
    model_for,
    printable,
    query_words,
    reranked,
    search_box,
    smoothed_scores,
    unit_rows,
)

PATTERN = r"(?P<camera>c\d)/"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return archive(tmp_path_factory.mktemp("archive") / "p")


@pytest.fixture(scope="module")
def gallery(shelf, tmp_path_factory):
    return Gallery.build(
        shelf, ColourModel(), tmp_path_factory.mktemp("galleries") / "g", pattern=PATTERN
    )


@pytest.fixture
def own(tmp_path):
    "A gallery and photos that a test may change."
    shelf = archive(tmp_path / "p")
    return Gallery.build(shelf, ColourModel(), tmp_path / "g", pattern=PATTERN), shelf


def names(hits):
    return [h.path.name for h in hits]


def test_every_person_is_found_by_a_sentence(gallery):
    for coat in FIGURE_COLOURS:
        for legs in FIGURE_COLOURS:
            hits = gallery.search(f"a {coat} coat and {legs} trousers", k=3)
            assert (
                hits[0].path.name == f"{coat}-{legs}-0.png"
                and hits[0].score > 0.99
                and [h.rank for h in hits] == [1, 2, 3]
            )
            assert (
                all(a.score >= b.score for a, b in zip(hits, hits[1:]))
                and hits[0].metadata["camera"] == hits[0].path.parent.name
            )


def test_by_picture_row_hit_and_path(gallery, shelf):
    hit = gallery.search("a red coat and blue trousers")[0]
    by_row, by_hit = gallery.search(image=hit.row, k=5), gallery.search(image=hit, k=5)
    assert names(by_row) == names(by_hit) and hit.row not in [h.row for h in by_row]
    by_path, by_picture = (
        gallery.search(image=hit.path, k=5),
        gallery.search(image=hit.picture(), k=5),
    )
    assert names(by_path) == names(by_picture) and by_path[0].row == hit.row
    assert names(
        gallery.search(image=[hit.row, gallery.search("a red coat and green trousers")[0].row], k=1)
    )[0].startswith("red-")


def test_text_and_picture_together(gallery):
    hit = gallery.search("a red coat and blue trousers")[0]
    hits = gallery.search("a green coat and blue trousers", image=hit, k=6)
    assert any(n.endswith("-blue-0.png") for n in names(hits)[:3])
    assert names(
        gallery.search("a green coat and blue trousers", image=hit, image_weight=0.0, k=1)
    ) == ["green-blue-0.png"]


def test_several_sentences_and_absent_things(gallery):
    assert names(
        gallery.search(["a red coat and red trousers", "red coat and red trousers"], k=1)
    ) == ["red-red-0.png"]
    plain = {h.path.name: h.rank for h in gallery.search("a red coat and white trousers", k=36)}
    less = {
        h.path.name: h.rank
        for h in gallery.search(
            "a red coat and white trousers", k=36, without="a white coat and white trousers"
        )
    }
    assert less["white-white-0.png"] > plain["white-white-0.png"] and less["red-white-0.png"] <= 3


def test_filters_and_engines_agree(own):
    gallery, _ = own
    for name, options in [
        ("flat", dict(quantise="fp16")),
        ("ivf", dict(nlist=1)),
        ("hnsw", dict(quantise=None)),
        ("milvus", {}),
    ]:
        gallery.add_engine(name, default=False, **options)
    again = Gallery(gallery.folder, ColourModel())
    assert set(again.engines) == {"exact", "flat", "ivf", "hnsw", "milvus"}
    for where in (
        None,
        "camera == 'c2'",
        "not camera in ['c1', 'c2']",
        "path.startswith('c1/') and width == 48",
        "camera == 'c9'",
    ):
        answers = {
            e: [
                (h.row, round(h.score, 4))
                for h in again.search("a green coat and black trousers", 6, where=where, engine=e)
            ]
            for e in again.engines
        }
        assert len({tuple(a) for a in answers.values()}) == 1, (where, answers)
        if where == "camera == 'c2'":
            assert {h.metadata["camera"] for h in again.search("a green coat", 6, where=where)} == {
                "c2"
            }
    assert (
        again.recall(["a red coat"], engine="hnsw") == 1.0
        and again.search("a red coat", where="camera == 'c9'") == []
        and "only 0 people pass the filter"
        in again.search("a red coat", where="camera == 'c9'").notes
    )
    again.close()
    gallery.close()


def test_copies_are_one_hit(own):
    gallery, shelf = own
    for i in range(4):
        shutil.copy(shelf / "c1" / "red-red-0.png", shelf / "c3" / f"copy{i}.png")
    gallery = Gallery.build(shelf, ColourModel(), gallery.folder, pattern=PATTERN)
    hits = gallery.search("a red coat and red trousers", k=5)
    assert (
        len(hits) == 5
        and sorted(d.name for d in hits[0].duplicates) == [f"copy{i}.png" for i in range(4)]
        and len({h.path.name for h in hits}) == 5
    )
    assert (
        len(
            [
                h
                for h in gallery.search("a red coat and red trousers", k=5, unique=False)
                if h.score > 0.999
            ]
        )
        == 5
    )
    assert (
        gallery.search("a red coat and red trousers", k=1, where="camera == 'c3'")[0].path.name
        == "copy0.png"
    )
    assert not {h.path.name for h in gallery.search(image=hits[0], k=40)} & {
        "red-red-0.png",
        *(f"copy{i}.png" for i in range(4)),
    }


def test_a_running_search_sees_a_new_generation(own):
    gallery, shelf = own
    reader = Gallery(gallery.folder, ColourModel())
    (shelf / "c1" / "red-red-0.png").unlink()
    figure("red", "red", (40, 80)).save(shelf / "c2" / "later.png")
    Gallery.build(shelf, ColourModel(), gallery.folder, pattern=PATTERN)
    assert (
        names(reader.search("a red coat and red trousers", k=1)) == ["later.png"]
        and not reader.refresh()
    )


def test_searching_while_indexing(own):
    "A reader asks all the time while an indexer replaces generations; every answer is whole."
    gallery, shelf = own
    reader, stop, failures, answers = (
        Gallery(gallery.folder, ColourModel()),
        threading.Event(),
        [],
        [0],
    )

    def ask():
        while not stop.is_set():
            try:
                assert (
                    len(
                        reader.search(
                            "a green coat and white trousers",
                            k=5,
                            where="camera in ['c1', 'c2', 'c3']",
                        )
                    )
                    == 5
                )
                answers[0] += 1
            except Exception as e:
                failures.append(repr(e))

    thread = threading.Thread(target=ask)
    thread.start()
    for i in range(5):
        figure("white", "white", (40 + i, 90)).save(shelf / "c1" / f"later{i}.png")
        Gallery.build(shelf, ColourModel(), gallery.folder, pattern=PATTERN)
    stop.set()
    thread.join()
    assert not failures and answers[0] > 5


def test_outputs(gallery, tmp_path):
    hits = gallery.search(
        "a red <b>coat</b> & blue trousers", k=4, where="camera == 'c1'", without="a hat"
    )
    facts = json.loads(hits.to_json())
    assert (
        facts["query"]["text"] == ["a red <b>coat</b> & blue trousers"]
        and len(facts["hits"]) == 4
        and facts["hits"][0]["camera"] == "c1"
        and set(facts["seconds"]) == {"encode", "search"}
    )
    table = hits.table().splitlines()
    assert table[0].split() == ["rank", "score", "photo", "camera"] and len(table) == 5
    page = hits.to_html(tmp_path / "sheet.html")
    assert (
        (tmp_path / "sheet.html").read_text() == page
        and page.count("<figure>") == 4
        and page.count("data:image/webp;base64,") == 4
        and "<b>coat</b>" not in page
        and "http" not in page
    )
    html.parser.HTMLParser().feed(page)
    assert "nobody found" in Hits().table() and "nobody found" in Hits().to_html()


def test_nothing_from_a_file_name_reaches_the_page_or_the_terminal(tmp_path):
    (tmp_path / "p").mkdir()
    for i, name in enumerate(
        [
            "<img src=x onerror=alert(1)>.png",
            "\x1b[2Jclear.png",
            os.fsdecode(b"caf\xe9.png"),
            "a\nb.png",
        ]
    ):
        figure(list(FIGURE_COLOURS)[i], "red").save(tmp_path / "p" / name)
    (tmp_path / "t.csv").write_text(
        "path,note\np/a\nb.png,x\n".replace("p/a\nb.png", '"p/a\nb.png"').replace(
            ",x", ",<script>alert(2)</script>"
        )
    )
    gallery = Gallery.build(
        tmp_path / "p", ColourModel(), tmp_path / "g", metadata=tmp_path / "t.csv"
    )
    hits = gallery.search("a red coat", k=9)
    assert len(hits) == 4 and all(h.picture().size == (48, 96) for h in hits)
    page, table = hits.to_html(), hits.table()
    assert (
        "<script>alert" not in page
        and "<img src=x" not in page
        and "\x1b" not in table
        and len(table.splitlines()) == 6
    )
    json.loads(hits.to_json().encode("utf-8"))
    page.encode("utf-8"), table.encode("utf-8")


def test_photos_that_moved_or_vanished(own, tmp_path):
    gallery, shelf = own
    hit = gallery.search("a red coat and red trousers", k=1)[0]
    shelf.rename(tmp_path / "elsewhere")
    with pytest.raises(TiprError, match="was it moved"):
        hit.picture()
    assert "the photo is gone" in gallery.search("a red coat", k=2).to_html()
    moved = Gallery(gallery.folder, ColourModel(), root=tmp_path / "elsewhere")
    assert moved.search("a red coat and red trousers", k=1)[0].picture().size == (48, 96)


def test_boxes_in_hits(tmp_path):
    scene = Image.new("RGB", (260, 110), (200, 200, 200))
    for i, coat in enumerate(("red", "blue", "green", "yellow")):
        scene.paste(figure(coat, "black"), (10 + 60 * i, 8))
    (tmp_path / "s").mkdir()
    scene.save(tmp_path / "s" / "s.png")
    (tmp_path / "b.json").write_text(
        json.dumps({"s.png": [[10 + 60 * i, 8, 58 + 60 * i, 104] for i in range(4)]})
    )
    gallery = Gallery.build(tmp_path / "s", ColourModel(), boxes=tmp_path / "b.json")
    hit = gallery.search("a green coat and black trousers")[0]
    assert (
        hit.box == (130, 8, 178, 104)
        and hit.picture().size == (48, 96)
        and hit.picture().getpixel((24, 36)) == FIGURE_COLOURS["green"]
        and "(130, 8, 178, 104)" in gallery.search("a green coat", 1).table()
    )


def test_save_add_and_open(own, tmp_path):
    gallery, shelf = own
    with pytest.raises(TiprError, match="is there already"):
        gallery.save(shelf)
    copy = Gallery.open(gallery.save(tmp_path / "copy"), ColourModel())
    assert names(copy.search("a red coat", 4)) == names(gallery.search("a red coat", 4))
    (tmp_path / "q").mkdir()
    figure("white", "white", (40, 80)).save(tmp_path / "q" / "added.png")
    copy.add(tmp_path / "q")
    assert len(copy) == 37 and copy.report.encoded == 1 and len(Gallery(gallery.folder)) == 36
    temporary = Gallery.build(shelf, ColourModel())
    folder = temporary.folder
    temporary.save(tmp_path / "kept")
    assert len(temporary) == 36 and folder.exists() and len(Gallery(tmp_path / "kept")) == 36
    del temporary
    import gc

    gc.collect()
    assert not folder.exists()


class Imagines:
    "A model that enriches sentences by a picture, as `QueryEnricher` does; the gallery's own model is inside."

    def __init__(self, model, weight):
        self.model, self.weight, self.asked = model, weight, []

    def encode_text(self, texts):
        self.asked += texts
        self.imagined = [figure("green", "yellow") for _ in texts]
        return unit_rows(
            (1 - self.weight) * self.model.encode_text(texts)
            + self.weight * self.model.encode_image(self.imagined)
        )

    def encode_image(self, pictures):
        return self.model.encode_image(pictures)


def test_a_model_that_enriches_queries(gallery):
    enricher = Imagines(ColourModel(), 0.9)
    enriched = Gallery(gallery.folder, enricher)
    hits = enriched.search("somebody", k=3)
    assert (
        hits[0].path.name == "green-yellow-0.png"
        and hits.imagined[0].size == (48, 96)
        and enricher.asked == ["somebody"]
    )
    assert (
        np.allclose(gallery.features[hits[0].row] @ hits.vector, hits[0].score, atol=1e-5)
        and hits_html(hits).count("data:image/webp") == 4
        and "imagined from the sentence" in hits_html(hits)
    )
    assert (
        gallery.search("somebody", k=1).imagined is None
        and enriched.search(image=hits[0], k=1).imagined is None
    )
    assert names(
        Gallery(gallery.folder, Imagines(ColourModel(), 0.0)).search(
            "a red coat and red trousers", k=1
        )
    ) == ["red-red-0.png"]

    class Other(ColourModel):
        fingerprint = "another"

    with pytest.raises(TiprError, match="made by another model"):
        Gallery(gallery.folder, Imagines(Other(), 0.3))


def test_mixing_queries():
    rng = np.random.default_rng(0)
    t, v, n = (unit_rows(rng.standard_normal((2, 16))) for _ in range(3))
    assert (
        np.isclose(np.linalg.norm(mix_query(t, v, n)), 1)
        and np.allclose(mix_query(t[:1]), t[0])
        and np.allclose(mix_query(image=v[:1]), v[0])
    )
    q = mix_query(t[:1], without=n[:1], without_weight=0.5)
    assert q @ n[0] < t[0] @ n[0] and np.allclose(
        mix_query(t[:1], without=t[:1]), t[0]
    )  # what the query says itself is not taken away
    with pytest.raises(TiprError, match="give a sentence or a picture"):
        mix_query()


def test_reranking_keeps_the_rows():
    rng = np.random.default_rng(1)
    x, q = unit_rows(rng.standard_normal((500, 16))), unit_rows(rng.standard_normal((1, 16)))[0]
    rows = np.argsort(-(x @ q))[:100]
    for how in ("neighbours", "expand"):
        assert (
            sorted(reranked(how, q, rows, x)) == sorted(rows)
            and (reranked(how, q, rows[:1], x) == rows[:1]).all()
        )
    with pytest.raises(TiprError, match="neighbours or expand"):
        reranked("magic", q, rows, x)
    assert np.allclose(smoothed_scores(x @ q, x, n=1), x @ q, atol=1e-5) and np.allclose(
        expanded_query(q, x[:3], np.zeros(3)), q
    )


def test_reranking_in_a_gallery(gallery):
    for how in ("neighbours", "expand"):
        hits = gallery.search("a red coat and red trousers", k=5, rerank=how)
        assert (
            len(hits) == 5
            and hits[0].path.name == "red-red-0.png"
            and all(-1 <= h.score <= 1.0001 for h in hits)
        )


@pytest.mark.parametrize(
    "ask,why",
    [
        (dict(), "give a sentence or a picture"),
        (dict(text=""), "empty sentence"),
        (dict(text=["a man", " "]), "empty sentence"),
        (dict(text="x", without=""), "empty sentence"),
        (dict(text=5), "empty sentence"),
        (dict(text="x", k=0), "one person or more"),
        (dict(text="x", k=True), "one person"),
        (dict(text="x", k=2.5), "one person"),
        (dict(text="x", where="camera = 'c2'"), "filter"),
        (dict(text="x", where="nope == 1"), "no column nope"),
        (dict(image=999), "rows 0 to 35"),
        (dict(image=-1), "rows 0 to 35"),
        (dict(image="nowhere.png"), "cannot be read"),
        (dict(text="x", engine="annoy"), "this gallery has exact"),
        (dict(text="x", rerank="magic"), "neighbours or expand"),
        (dict(text="x", image_weight=-0.1), "between 0 and 1"),
        (dict(text="x", without_weight="much"), "between 0 and 1"),
    ],
)
def test_bad_questions_are_one_line(gallery, ask, why):
    with pytest.raises(TiprError, match=why) as e:
        gallery.search(**ask)
    assert "\n" not in str(e.value)


def test_pictures_that_are_none(gallery, tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(TiprError, match="x.png: not a picture"):
        gallery.search(image=tmp_path / "x.png")


def test_galleries_that_cannot_be_opened(gallery, tmp_path):
    class Other(ColourModel):
        fingerprint = "another"

    with pytest.raises(TiprError, match="made by another model"):
        Gallery(gallery.folder, Other())
    with pytest.raises(TiprError, match="no gallery there"):
        Gallery(tmp_path)
    with pytest.raises(TiprError, match="no gallery there"):
        Gallery(tmp_path / "nowhere")
    (tmp_path / ".work").mkdir()
    with pytest.raises(TiprError, match="was not finished"):
        Gallery(tmp_path)
    with pytest.raises(TiprError, match="does not say where its model is"):
        Gallery(gallery.folder).search("a man")


def test_more_hits_than_people(gallery):
    hits = gallery.search("a man", k=500)
    assert len(hits) == 36 and hits.notes == ["only 36 people are there"]


def test_search_box(gallery):
    box = search_box(gallery, 3)
    box.text.value = "a red coat and blue trousers"
    assert "red-blue-0.png" in box.out.value and box.out.value.count("<figure>") == 3
    box.where.value = "camera = 1"
    assert "<figure>" not in box.out.value and "filter" in box.out.value


def test_missing_extras_are_one_line(gallery, monkeypatch):
    for module, extra, do in [
        ("faiss", "search", lambda: gallery.add_engine("ivf")),
        ("pymilvus", "milvus", lambda: gallery.add_engine("milvus", uri="http://127.0.0.1:1")),
        ("ipywidgets", "app", lambda: search_box(gallery)),
        ("pyarrow", "search", lambda: Gallery(gallery.folder)),
    ]:
        monkeypatch.setitem(sys.modules, module, None)
        for name in [m for m in sys.modules if m.startswith(module + ".")]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(TiprError, match=rf"{module}.*tipr_nb\[{extra}\]") as e:
            do()
        assert "\n" not in str(e.value)
        monkeypatch.undo()


@pytest.fixture(scope="module")
def real(shelf, tmp_path_factory):
    "A gallery of a (random) CLIP model, with its text tower."
    import torch
    from tipr_nb.models import PersonCLIP

    home = tmp_path_factory.mktemp("real")
    old = os.environ.get("TIPR_CACHE")
    os.environ["TIPR_CACHE"] = str(home / "cache")
    torch.manual_seed(0)
    PersonCLIP("tipr-nano").save_pretrained(home / "model")
    try:
        gallery = Gallery.build(shelf, home / "model", home / "g", pattern=PATTERN)
    finally:
        os.environ.pop("TIPR_CACHE") if old is None else os.environ.update(TIPR_CACHE=old)
    return gallery


def test_the_model_of_a_gallery_comes_before_the_default(real, tmp_path):
    assert DEFAULT_MODEL in shipped_weights()
    assert (
        model_for()
        == model_for(tmp_path / "none")
        == model_for(real.folder, rebuild=True)
        == DEFAULT_MODEL
    )
    assert (
        model_for(real.folder) == real.manifest["model"]
        and model_for(real.folder, "another") == "another"
    )


def test_a_gallery_that_names_its_model_as_it_was_called_once(real, tmp_path):
    old = shutil.copytree(real.folder, tmp_path / "old")
    for former, today in (
        ("synth-pedes", "clip-synth-pedes"),
        ("synth-world+predicted", "clip-synth-world+predicted"),
    ):
        write_manifest(old, read_manifest(old) | dict(model=former))
        assert (
            read_manifest(old)["model"] == today == model_for(old) == Gallery(old).manifest["model"]
        )


def test_a_cold_search_needs_no_torch(real):
    code = f"""
import sys
from tipr_nb.search import Gallery
hits = Gallery({str(real.folder)!r}).search("a man in a red coat", 3, where="camera == 'c2'")
assert not (found := [m for m in ("torch", "torchvision", "open_clip", "transformers", "pandas") if m in sys.modules]), found
print(hits.to_json())"""
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    cold, here = (
        json.loads(out.stdout)["hits"],
        real.search("a man in a red coat", 3, where="camera == 'c2'"),
    )
    assert [h["row"] for h in cold] == [h.row for h in here] and np.allclose(
        [h["score"] for h in cold], [h.score for h in here], atol=1e-4
    )
    assert time.monotonic() - start < 15  # a busy machine; benchmarks/search.py measures


def test_a_cold_gallery_loads_its_model_for_pictures(real):
    gallery = Gallery(real.folder)
    hit = gallery.search("a man in a red coat")[0]
    assert (
        gallery.view.encoder.loaded is None
        and gallery.search(image=hit, k=2)[0].row != hit.row
        and gallery.view.encoder.loaded is None
    )
    assert (
        gallery.search(image=hit.path, k=1)[0].row == hit.row
        and gallery.view.encoder.loaded is not None
    )
    assert np.allclose(
        gallery.features,
        np.asarray(real.model.encode_image([h.picture() for h in gallery.hits(range(36))])),
        atol=1e-5,
    )


def test_a_gallery_of_a_changed_model_is_refused(real, shelf, tmp_path):
    import torch
    from tipr_nb.models import PersonCLIP

    torch.manual_seed(1)
    PersonCLIP("tipr-nano").save_pretrained(tmp_path / "other")
    with pytest.raises(TiprError, match="made by another model"):
        Gallery(real.folder, tmp_path / "other").search(image=Image.new("RGB", (32, 96)))
    with pytest.raises(TiprError, match="made by another model"):
        Gallery.build(shelf, tmp_path / "other", real.folder)


def test_damaged_text_tower(real, tmp_path):
    copy = real.save(tmp_path / "c")
    next(copy.glob("text-*/text.onnx")).write_bytes(b"half")
    with pytest.raises(TiprError, match="4 bytes instead of"):
        Gallery(copy).search("a man")


def test_words_and_printing():
    assert (
        query_words(dict(text=["a", "b"], image=None, without=["c"])) == "a; b, without c"
        and printable("a\tb\x1b") == "a\\tb\\x1b"
        and printable(None) == ""
    )
    assert "person at rank" not in hits_html(Hits([Hit(Path("/nowhere/x.png"), 0.5, 1, 0)]))


def test_keys_find_the_same_person_after_changes(own):
    gallery, shelf = own
    keys = {h.key: h.path for h in gallery.hits(range(36))}
    assert len(keys) == 36
    figure("white", "white", (40, 80)).save(shelf / "c1" / "aaa.png")
    gone = sorted(shelf.rglob("*.png"))[5]
    gone.unlink()
    Gallery.build(shelf, ColourModel(), gallery.folder)
    for key, path in keys.items():
        if path == gone:
            with pytest.raises(TiprError, match="ask again"):
                gallery.find(key)
            with pytest.raises(TiprError, match="ask again"):
                gallery.search(image=key)
        else:
            assert gallery.find(key).path == path and path not in [
                h.path for h in gallery.search(image=key, k=36)
            ]
    hit = Gallery(gallery.folder, ColourModel()).search("a red coat and blue trousers", k=1)[0]
    figure("white", "white", (40, 81)).save(shelf / "c1" / "aab.png")
    Gallery.build(shelf, ColourModel(), gallery.folder)
    assert gallery.search(image=hit, k=36)[-1].path != hit.path and hit.path not in [
        h.path for h in gallery.search(image=hit, k=36)
    ]


def test_a_gallery_remembers_how_it_was_made(tmp_path):
    scene = Image.new("RGB", (260, 110), (200, 200, 200))
    for i, coat in enumerate(("red", "blue", "green", "yellow")):
        scene.paste(figure(coat, "black"), (10 + 60 * i, 8))
    (tmp_path / "s" / "c1").mkdir(parents=True)
    scene.save(tmp_path / "s" / "c1" / "s.png")
    (tmp_path / "b.json").write_text(
        json.dumps({"s/c1/s.png": [[10 + 60 * i, 8, 58 + 60 * i, 104] for i in range(4)]})
    )
    model = ColourModel()
    first = Gallery.build(
        tmp_path / "s", model, tmp_path / "g", boxes=tmp_path / "b.json", pattern=PATTERN
    )
    assert len(first) == 4
    again = Gallery.build(tmp_path / "s", model, tmp_path / "g")
    assert len(again) == 4 and again.report.encoded == 0 and "camera" in again.items.own
    shutil.move(tmp_path / "s", tmp_path / "moved")
    (tmp_path / "b.json").write_text(
        json.dumps({"moved/c1/s.png": [[10 + 60 * i, 8, 58 + 60 * i, 104] for i in range(4)]})
    )
    moved = Gallery.build(tmp_path / "moved", model, tmp_path / "g")
    assert len(moved) == 4 and moved.report.encoded == 0 and moved.report.moved == 1
    with pytest.raises(TiprError, match="--recut") as e:
        Gallery.build(
            tmp_path / "moved", model, tmp_path / "g", detector=lambda picture: [(0, 0, 40, 100)]
        )
    assert "\n" not in str(e.value) and "by boxes" in str(e.value)
    assert len(Gallery(tmp_path / "g")) == 4
    assert len(Gallery.build(tmp_path / "moved", model, tmp_path / "g", recut=True)) == 1
    Gallery.build(tmp_path / "moved", model, tmp_path / "g", boxes=tmp_path / "b.json", recut=True)
    (tmp_path / "b.json").unlink()
    with pytest.raises(TiprError, match="are gone"):
        Gallery.build(tmp_path / "moved", model, tmp_path / "g")
    assert len(Gallery(tmp_path / "g")) == 4


def test_an_open_gallery_meets_a_rebuild_with_another_model(own):
    gallery, shelf = own

    class Turned(ColourModel):
        fingerprint = "turned"

        def unit(self, colours):
            return super().unit(colours)[:, ::-1].copy()

    Gallery.build(shelf, Turned(), gallery.folder, rebuild=True)
    with pytest.raises(TiprError, match="another model|where its model is"):
        gallery.search("a red coat and blue trousers")


def test_one_hit_per_track(tmp_path):
    shelf = archive(tmp_path / "p", 3)
    tracks = {p: f"t{p.stem.rsplit('-', 1)[0]}" for p in shelf.rglob("*.png")}
    (tmp_path / "t.csv").write_text(
        "path,track\n"
        + "".join(
            f"{p.relative_to(shelf)},{t}\n" for p, t in tracks.items() if "white-white" not in t
        )
    )
    gallery = Gallery.build(shelf, ColourModel(), tmp_path / "g", metadata=tmp_path / "t.csv")
    hits = gallery.search("a red coat and blue trousers", k=6, group="track")
    assert (
        len({h.metadata["track"] for h in hits}) == 6
        and hits[0].frames == 3
        and hits[0].score
        == max(h.score for h in gallery.search("a red coat and blue trousers", k=1))
    )
    assert (
        len(gallery.search("a man", k=100, group="track")) == 35 + 3
    )  # without a track everybody stands alone
    with pytest.raises(TiprError, match="no such column"):
        gallery.search("a man", group="film")


def test_many_questions_and_frames_of_data(gallery, tmp_path):
    many = gallery.search_many(
        ["a red coat and blue trousers", "a green coat and red trousers"], k=3, where="width > 3"
    )
    assert [names(h)[0] for h in many] == ["red-blue-0.png", "green-red-0.png"] and names(
        many[0]
    ) == names(gallery.search("a red coat and blue trousers", k=3))
    frame = many[0].to_pandas()
    assert (
        list(frame["rank"]) == [1, 2, 3]
        and list(frame["key"]) == [h.key for h in many[0]]
        and "camera" in frame.columns
        and len(Hits().to_pandas()) == 0
    )
    many[0].to_zip(tmp_path / "h.zip")
    import zipfile

    assert (
        len([n for n in zipfile.ZipFile(tmp_path / "h.zip").namelist() if n.endswith(".png")]) == 3
    )
    assert all((p.stat().st_mode & 0o077) == 0 for p in (tmp_path / "h.zip",))


def test_everything_from_outside_is_escaped(tmp_path):
    "A file name, a column's name, its values, a query and a note, each hostile, in every report."
    bad = "<img src=x onerror=alert(1)>"
    hits = Hits(
        [Hit(tmp_path / f"{bad}.png", 0.5, 1, 0, metadata={bad: bad}, name=f"{bad}.png")],
        query=dict(text=[bad], where=bad, without=[bad], image=bad),
        notes=[bad],
    )
    for page in (hits.to_html(), hits._repr_html_()):
        assert "<img src=x" not in page and page.count("&lt;img src=x") >= 5
    table = Hits(
        [Hit(Path("a.png"), 0.5, 1, 0, metadata=dict(note="=1+1", other="@x", number=-4))]
    ).to_csv()
    assert "'=1+1" in table and "'@x" in table and ",-4" in table


def test_what_the_default_weights_are_is_said(shelf, tmp_path):
    "At index, in notes, JSON, table and page; not where the weights are the user's choice."
    from tipr_nb.search import Page, Question

    gallery = Gallery.build([*shelf.rglob("c1/*.png")], folder=tmp_path / "g")
    hits = gallery.search("a man in a red coat", k=2)
    places = [
        *gallery.report.lines(),
        hits.to_json(),
        hits.table(),
        hits.to_html(),
        *Page(gallery).ask(Question("a man in a red coat", k=2)).advice,
    ]
    assert sum("trained on rendered people" in p and "--model" in p for p in places) == 5
    other = Gallery.build([*shelf.rglob("c1/*.png")], ColourModel(), tmp_path / "o")
    assert not other.search("a man", k=2).notes and not other.report.notes


def test_sentences_that_cannot_be_understood_are_noted(real, gallery):
    assert any("--without" in n for n in gallery.search("a man not wearing a hat", k=2).notes)
    assert any(
        "English" in n for n in gallery.search("une femme en manteau rouge", k=2).notes
    ) and any("English" in n for n in gallery.search("戴帽子的男人", k=2).notes)
    long = Gallery(real.folder).search("a man in a red coat " * 30, k=2).notes
    assert (
        any("tokens were left out" in n for n in long)
        and not Gallery(real.folder).search("a man in a red coat", k=2).notes
    )


def calibrated(gallery: Gallery) -> HitProbabilities:
    "Scores of .9 and more are probable, those below are not."
    known = HitProbabilities(
        gallery.manifest["fingerprint"],
        "coloured figures",
        0.5,
        [8.0, 0.0],
        0.0,
        [0.9, 0.0],
        [0.1, 1.0],
    )
    known.save(gallery.folder / "calibration.json")
    return known


def test_probabilities_of_hits(own):
    gallery, _ = own
    assert gallery.search("a red coat")[0].probability is None
    with pytest.raises(TiprError, match="not calibrated; gallery.calibrate"):
        gallery.search("a red coat", min_probability=0.5)
    known = calibrated(gallery)
    gallery = Gallery(gallery.folder, ColourModel())
    hits = gallery.search("a red coat and blue trousers", k=8)
    assert (
        np.allclose([h.probability for h in hits], known.of([h.score for h in hits]))
        and hits[0].probability > 0.99
    )
    assert "probability" in hits.table().splitlines()[0] and hits.to_pandas().probability[0] > 0.99
    some = gallery.search("a red coat and blue trousers", k=8, min_probability=0.9)
    assert 0 < len(some) < 8 and min(h.probability for h in some) >= 0.9
    assert any("coloured figures" in n for n in some.notes) and any(
        "have a probability of 0.9 or more" in n for n in some.notes
    )


def test_probabilities_where_they_mean_nothing(own):
    gallery, _ = own
    calibrated(gallery)
    gallery = Gallery(gallery.folder, ColourModel())
    for asked in (
        dict(text=["a red coat", "blue trousers"]),
        dict(image=3),
        dict(text="a red coat", without="blue trousers"),
    ):
        assert all(h.probability is None for h in gallery.search(**asked))
        with pytest.raises(TiprError, match="for one sentence alone"):
            gallery.search(**asked, min_probability=0.5)
    with pytest.raises(TiprError, match="min_probability=2: a weight between 0 and 1"):
        gallery.search("a man", min_probability=2)
    other = HitProbabilities(
        "another-model", "others", 0.5, [1.0, 0.0], 0.0, [0.0, 0.0], [1.0, 1.0]
    )
    other.save(gallery.folder / "calibration.json")
    assert Gallery(gallery.folder, ColourModel()).search("a red coat")[0].probability is None
    (gallery.folder / "calibration.json").write_text('{"weights": 3}')
    with pytest.raises(TiprError, match="calibration.json: not a calibration of hits"):
        Gallery(gallery.folder, ColourModel()).search("a red coat")


def test_nobody_fits(own):
    gallery, shelf = own
    calibrated(gallery)
    for path in shelf.rglob("red-*.png"):
        path.unlink()
    gallery = Gallery.build(shelf, ColourModel(), gallery.folder)
    assert any(
        n.startswith("probably nobody here is meant")
        for n in gallery.search("a red coat and yellow trousers").notes
    )
    assert not any("nobody" in n for n in gallery.search("a green coat and yellow trousers").notes)


def test_shipped_probabilities_are_those_of_the_shipped_weights():
    from tipr_nb.models import PersonCLIP
    from tipr_nb.search import model_fingerprint

    known = HitProbabilities.load(shipped_weights()["clip-synth-pedes"] / "calibration.json")
    assert known.fingerprint == model_fingerprint(PersonCLIP.from_pretrained("clip-synth-pedes")), (
        "run nbs/08_search/15_probabilities.ipynb with --flags slow"
    )
    assert "rendered people" in known.fitted_on


class Tower:
    "An image tower of the cache."

    def __init__(self):
        self.model = ColourModel()

    def encode_image(self, pictures):
        return self.model.encode_image(pictures)


def test_a_picture_needs_no_model_where_its_tower_is_kept(gallery, shelf, monkeypatch):
    import tipr_nb.search.views

    def no_model(name):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(tipr_nb.search.views, "image_tower", lambda fingerprint: Tower())
    quick = Gallery(gallery.folder, "a-name", loader=no_model)
    assert names(quick.search(image=shelf / "c1" / "red-red-0.png", k=1)) == ["red-red-0.png"]
    monkeypatch.setattr(tipr_nb.search.views, "image_tower", lambda fingerprint: None)
    kept = []
    monkeypatch.setattr(
        tipr_nb.search.views,
        "export_image_tower",
        lambda model, fingerprint: kept.append(fingerprint),
    )
    slow = Gallery(gallery.folder, "a-name", loader=lambda name: ColourModel())
    assert names(slow.search(image=shelf / "c1" / "red-red-0.png", k=1)) == ["red-red-0.png"]
    slow.keep_picture_tower()
    assert kept == ["colours-v1"]
    slow = Gallery(gallery.folder, "a-name", loader=no_model)
    slow.keep_picture_tower()  # nothing was loaded, so nothing is kept
    assert kept == ["colours-v1"]


def test_pictures_in_memory(tmp_path):
    pictures = [figure(coat, "black") for coat in FIGURE_COLOURS]
    model = ColourModel()
    gallery = Gallery.build(pictures, model, tmp_path / "g")
    assert len(gallery) == len(pictures) and names(
        gallery.search("a green coat and black trousers", 1)
    ) == ["000002.png"]
    model.seen = 0
    again = Gallery.build(iter([*pictures, figure("green", "yellow")]), model, tmp_path / "g")
    assert model.seen == 1 and len(again) == len(pictures) + 1
    fewer = Gallery.build(tuple(pictures[:2]), model, tmp_path / "g")
    assert len(fewer) == 2 and len(list((tmp_path / "g" / "pictures").iterdir())) == 2
    more = Gallery.build(pictures[3], model, tmp_path / "g", add=True)
    assert len(more) == 3 and model.seen == 1 + 1
    with pytest.raises(TiprError, match="give folder="):
        Gallery.build(pictures, model)
    with pytest.raises(TiprError, match="picture 1: str, no PIL picture"):
        Gallery.build([pictures[0], "a.png"], model, tmp_path / "h")
    with pytest.raises(TiprError):
        Gallery.build([], model, tmp_path / "i")


def test_paths_from_an_iterator(shelf, tmp_path):
    assert (
        len(
            Gallery.build(
                (p for p in sorted(shelf.rglob("red-*.png"))), ColourModel(), tmp_path / "g"
            )
        )
        == 6
    )


def test_boxes_and_metadata_as_data_frames(shelf, tmp_path):
    import pandas as pd

    boxes = pd.DataFrame(
        dict(path=["c1/red-red-0.png"] * 2, x0=[0, 8], y0=[0, 8], x1=[40, 40], y1=[90, 80])
    )
    facts = pd.DataFrame(dict(path=["c1/red-red-0.png"], shop=["north"]))
    gallery = Gallery.build(shelf, ColourModel(), tmp_path / "g", boxes=boxes, metadata=facts)
    hits = gallery.search("a red coat", k=2).to_pandas()
    assert len(gallery) == 2 and list(hits.shop) == ["north"] * 2 and hits.box.map(len).eq(4).all()


def test_hits_for_fiftyone(gallery, monkeypatch):
    import types

    hits = gallery.search("a red coat and blue trousers", k=3)
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(
        TiprError, match="need fiftyone, which is not installed; pip install fiftyone"
    ):
        hits.to_fiftyone()

    class Dataset(list):
        def __init__(self, name):
            self.name = name

        def add_sample(self, sample):
            self.append(sample)

    record = lambda **fields: types.SimpleNamespace(**fields)  # noqa: E731
    stand_in = types.SimpleNamespace(
        Dataset=Dataset, Sample=record, Detections=record, Detection=record
    )
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    dataset = hits.to_fiftyone("people")
    assert dataset.name == "people" and len(dataset) == 3
    first = dataset[0].people.detections[0]
    assert (
        dataset[0].filepath == str(hits[0].path)
        and first.bounding_box == [0, 0, 1, 1]
        and first.camera == hits[0].metadata["camera"]
    )


def test_clicks_and_permalinks_while_somebody_indexes(own):
    "A key found before an update names the same person after it, or nobody: never somebody else, in 200 clicks."
    gallery, shelf = own
    rng = np.random.default_rng(0)
    page = Page(gallery)
    spare = shelf.parent / "spare"
    spare.mkdir()
    right = gone = 0
    for turn in range(10):
        hits = gallery.search("a red coat and blue trousers", k=20)
        known = {h.key: h.picture().tobytes() for h in hits}
        files = sorted(shelf.rglob("*.png"))
        for path in rng.choice(files, 4, replace=False):
            path.rename(spare / f"{turn}-{path.name}")
        for n in range(4):
            figure("white", "green", (50 + turn, 99 + n)).save(shelf / "c1" / f"aa-{turn}-{n}.png")
        Gallery.build(shelf, ColourModel(), gallery.folder)  # another process would do the same
        for key, before in known.items():
            shown, _, words = page.look(key, hits.vector)
            answer = page.ask(Question(like=key))
            if shown is None:
                gone += 1
                assert (
                    "the gallery has changed; ask again" in words
                    and "the gallery has changed" in answer.note
                )
                continue
            right += 1
            assert (
                gallery.find(key).picture().tobytes() == before
                and not answer.wrong
                and key not in answer.keys
            )
    assert right + gone == 200 and right > 100 and gone > 0


def test_an_update_with_nothing_to_do_loads_no_model(tmp_path, monkeypatch):
    from tipr_nb.models import PersonCLIP

    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    weights, loaded = tmp_path / "weights", []
    shutil.copytree(shipped_weights()["clip-synth-pedes"], weights)

    def loader(name):
        loaded.append(name)
        return PersonCLIP.from_pretrained(name)

    shelf = archive(tmp_path / "p")
    build = lambda: Gallery.build(shelf, str(weights), tmp_path / "g", loader=loader)
    first = build()
    again = build()
    assert len(loaded) == 1 and again.report.unchanged == 36 and again.report.encoded == 0
    assert again.manifest["model"] == first.manifest["model"]
    best = [h.key for h in first.search("a red coat", k=5)]
    assert [h.key for h in again.search("a red coat", k=5)] == best and len(loaded) == 1
    figure("white", "white", (44, 90)).save(shelf / "c1" / "new.png")
    assert build().report.encoded == 1 and len(loaded) == 2  # now it is needed
    os.utime(weights / "model.safetensors", (1, 1))
    build()
    assert len(loaded) == 3  # these files may hold something else


def test_tables_with_odd_first_lines():
    from tipr_nb.search.tables import parse_csv

    old_mac = parse_csv("path,camera\ra.png,c1\rb.png,c2\r")
    assert old_mac.column_names == ["path", "camera"] and old_mac.num_rows == 2
    with pytest.raises(TiprError, match="first line"):
        parse_csv("path," + "x" * 200_000 + "\na.png,1\n", "t.csv")
