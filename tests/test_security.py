"""A gallery, picture or page from elsewhere, as somebody who means ill would make it."""
import html
import json
import subprocess

import pytest

from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, Page, Question, colour_archive, find_photos, index_photos
from tipr_nb.search.milvus import Milvus

ELSEWHERE = "http://elsewhere.example:19530"


@pytest.fixture
def sent(monkeypatch):
    "The tokens that are sent, and where to."
    pytest.importorskip("pymilvus")
    given = []

    def connect(uri, token="", timeout=0):
        given.append((uri, token))
        raise RuntimeError("nobody answers")

    monkeypatch.setattr("pymilvus.MilvusClient", connect)
    monkeypatch.setattr(Milvus, "clients", {})
    monkeypatch.setenv("TIPR_MILVUS_TOKEN", "secret")
    monkeypatch.delenv("TIPR_MILVUS_URI", raising=False)
    return given


def gallery_from_elsewhere(tmp_path, **more):
    "A gallery whose file names somebody's server."
    index_photos(tmp_path / "g", find_photos(colour_archive(tmp_path / "photos")), ColourModel())
    file = tmp_path / "g/gallery.json"
    manifest = json.loads(file.read_text())
    built = dict(uri=ELSEWHERE, collection="tipr_x", **more)
    manifest["engines"] = {"exact": {}, "milvus": dict(uri=ELSEWHERE, built=built, **more)}
    file.write_text(json.dumps(manifest))
    return tmp_path / "g"


@pytest.mark.parametrize("more", [{}, dict(trusted=True), dict(token=None, trusted=1), dict(token="theirs", trusted=True)])
def test_an_address_from_a_file_gets_no_token(tmp_path, sent, monkeypatch, more):
    folder = gallery_from_elsewhere(tmp_path, **more)
    with pytest.raises(TiprError, match="no token was sent"): Gallery(folder, ColourModel()).engine("milvus")
    assert sent == [(ELSEWHERE, "")], "nothing of the file makes an address trusted"
    monkeypatch.setenv("TIPR_MILVUS_URI", ELSEWHERE)        # the user's word
    with pytest.raises(TiprError, match="cannot be opened"): Gallery(folder, ColourModel()).engine("milvus")
    assert sent[-1] == (ELSEWHERE, "secret")


def test_indexing_a_gallery_from_elsewhere_sends_no_token(tmp_path, sent):
    folder = gallery_from_elsewhere(tmp_path, trusted=True)
    next((tmp_path / "photos").rglob("*.png")).unlink()
    try: index_photos(folder, find_photos(tmp_path / "photos"), ColourModel())
    except TiprError: pass
    assert sent and not any(token for _, token in sent)


@pytest.mark.parametrize("built", [3, [], {"uri": 3, "collection": "x"}, {"uri": ELSEWHERE}, {"uri": ELSEWHERE, "collection": []}])
def test_odd_engines_are_one_line(tmp_path, sent, built):
    folder = gallery_from_elsewhere(tmp_path)
    manifest = json.loads((folder / "gallery.json").read_text())
    manifest["engines"]["milvus"]["built"] = built
    (folder / "gallery.json").write_text(json.dumps(manifest))
    with pytest.raises(TiprError, match="gallery.json") as e: Gallery(folder, ColourModel()).engine("milvus")
    assert "\n" not in str(e.value) and not sent


BAD = "<script>alert(1)</script>"
FIELDS = ["path", "table", "column", "query", "filter"]


@pytest.mark.parametrize("field", FIELDS)
def test_nothing_becomes_part_of_a_page(tmp_path, field):
    "The printed page of hits, the facts of a person and the gallery's own, with one field hostile at a time."
    shelf = colour_archive(tmp_path / "p")
    first = sorted(shelf.rglob("*.png"))[0]
    if field == "path": first = first.rename(first.with_name(f"{BAD.replace('/', '')}.png"))
    name = f'"{BAD}"' if field == "column" else "note"
    value = BAD if field == "table" else "plain"
    rows = [f'"{p.relative_to(shelf)}","{value}"' for p in sorted(shelf.rglob("*.png"))]
    (tmp_path / "t.csv").write_text(f"path,{name}\n" + "\n".join(rows) + "\n")
    gallery = Gallery.build(shelf, ColourModel(), tmp_path / "g", metadata=tmp_path / "t.csv")
    query = BAD if field == "query" else "a red coat"
    column = "note" if field != "column" else next(c for c in gallery.items if "script" in c)
    where = f"{column} != '{BAD}'" if field == "filter" else None
    hits = gallery.search(query, k=36, where=where)
    shown = [hits._repr_html_()]
    hits.to_html(tmp_path / "hits.html")
    shown.append((tmp_path / "hits.html").read_text(encoding="utf-8"))
    page = Page(gallery)
    keys = page.ask(Question("a man", k=36)).keys
    shown += [str(page.look(key, None)[2]) for key in keys]
    from tipr_nb.search import gallery_facts
    shown.append(gallery_facts(gallery))
    assert not any("<script>alert" in text for text in shown)
    assert any(html.escape(BAD)[:12] in text or "script" in text for text in shown)


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    "An EPS under every name of a picture: indexed, asked with, checked."
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    shelf = colour_archive(tmp_path / "p")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"
    for ending in ("jpg", "png", "webp", "bmp", "tif", "gif", "ppm", "jp2"): (shelf / f"x.{ending}").write_bytes(eps)
    gallery = Gallery.build(shelf, ColourModel(), tmp_path / "g")
    reasons = {str(name).rsplit(".", 1)[1]: why for name, why in gallery.skipped}
    assert reasons and all("not a picture" in why for why in reasons.values())
    answer = Page(gallery).ask(Question(k=3), shelf / "x.jpg")
    assert answer.wrong and "not a picture" in answer.note


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return Gallery.build(colour_archive(folder / "p"), ColourModel(), folder / "g")


def test_names_of_columns_are_escaped():
    "A gallery from elsewhere can name its columns as it likes."
    from tipr_nb.search.app import facts_table
    assert BAD not in facts_table({BAD: "x"}) and BAD not in facts_table({"x": BAD})


def test_reasons_are_escaped(people, monkeypatch):
    "What went wrong is said with the words of a file, a name or a question."
    import numpy as np
    from tipr_nb.search import app

    def fail(*args, **kwargs): raise TiprError(f"{BAD}.jpg: not there")

    page = Page(people)
    key = page.ask(Question("a man", k=3)).keys[0]
    monkeypatch.setattr(app, "match_map", fail)
    facts = page.look(key, np.ones(people.manifest["dim"], np.float32))[2]
    assert "no map of what matched" in facts and BAD not in facts
    monkeypatch.setattr(page, "_look", fail)
    assert "not there" in page.look(key, None)[2] and BAD not in page.look(key, None)[2]


def test_title_of_the_page_is_escaped(people):
    gradio = pytest.importorskip("gradio")
    from tipr_nb.search import search_page
    blocks = search_page(people, title=BAD)
    said = [b.value for b in blocks.blocks.values() if isinstance(b, gradio.Markdown)]
    assert said and not any(BAD in str(text) for text in said)


def test_advice_is_escaped(people):
    from tipr_nb.search.app import _note
    answer = Page(people).ask(Question("a man", k=3))
    answer.advice, answer.note = [BAD], BAD
    assert BAD not in _note(answer, Question(f'{BAD}" onclick="x'))


def test_the_box_of_a_notebook_is_escaped(people, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    from tipr_nb.search import search_box

    class Broken:
        def search(self, *args, **kwargs): raise TiprError(BAD)

    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.extend(a))
    box = search_box(Broken())
    found, todo = [], [b for b in [box, *shown] if b is not None]
    while todo:
        widget = todo.pop()
        found.append(widget)
        todo.extend(getattr(widget, "children", ()))
    next(w for w in found if isinstance(w, widgets.Button)).click()
    values = [w.value for w in found if isinstance(w, widgets.HTML)]
    assert values and not any(BAD in v for v in values) and any("script" in v for v in values)
