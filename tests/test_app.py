"""The search page: its answers and what it hands out; `test_page.py` walks through it in a browser."""

import os, re, shutil, socket, subprocess, sys, threading, time, urllib.error, urllib.parse, urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gallery_pictures import archive, figure
from tipr_nb.search import (
    Answer,
    Page,
    Question,
    check_port,
    few_words,
    gallery_facts,
    joined_filter,
    match_map,
    search_page,
    serve,
    warmed,
)
from tipr_nb.core import TiprError
from tipr_nb.search import parse_filter
from tipr_nb.search import ColourModel
from tipr_nb.search import Gallery, HitProbabilities, unit_rows


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    home = tmp_path_factory.mktemp("app")
    shelf = archive(home / "p")
    (home / "secret.txt").write_text("nobody may read this")
    (home / "secret.png").write_bytes((shelf / "c1" / "red-red-0.png").read_bytes())
    return Gallery.build(shelf, ColourModel(), home / "g", pattern=r"(?P<camera>c\d)/")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "question",
    [
        Question(),
        Question(
            "a man & a woman\nin red",
            "a hat",
            "camera == 'c2'",
            "0123456789abcdef01234567-1-2-30-60",
            12,
            "expand",
            1,
        ),
        Question("漢字 é “quotes”", where="note == '#?&'"),
    ],
)
def test_questions_survive_the_address(question):
    params = {
        k: v[0]
        for k, v in urllib.parse.parse_qs(question.link()[1:], keep_blank_values=True).items()
    }
    assert Question.of(params) == question


def test_bad_addresses_become_plain_questions():
    assert (
        Question.of(dict(k="many", like="../../etc/passwd", q="x", other="y")) == Question("x")
        and Question.of(dict(k="-5")).k == 1
        and Question.of(dict(k="99999")).k == 200
    )
    assert len(Question.of(dict(q="x" * 10**6)).q) == 2000


def test_answers(gallery):
    page = Page(gallery)
    answer = page.ask(Question("a red coat and blue trousers", k=5))
    assert (
        len(answer.tiles) == 5
        and answer.tiles[0][1].startswith("score 1.000 · camera c")
        and "5 of 36 people" in answer.note
        and not answer.wrong
    )
    like = page.ask(Question(like=answer.keys[0], k=5))
    assert answer.keys[0] not in like.keys and "most like the one you picked" in like.note
    by_picture = page.ask(Question(k=3), picture=figure("green", "white"))
    assert answer.linked and not by_picture.linked  # no address holds an uploaded picture
    assert gallery.find(by_picture.keys[0]).path.name == "green-white-0.png"
    person, heat, facts = page.look(answer.keys[0], answer.query)
    assert (
        person.height >= 256
        and heat.size[1] >= 192
        and "red-blue-0.png" in facts
        and "1.000" in facts
    )


def test_an_imagined_picture(gallery):
    class Imagines:
        model = ColourModel()

        def encode_text(self, texts):
            self.imagined = [figure("green", "yellow") for _ in texts]
            return unit_rows(
                0.1 * self.model.encode_text(texts) + 0.9 * self.model.encode_image(self.imagined)
            )

    page = Page(gallery, lambda: Gallery(gallery.folder, Imagines()))
    with_it, without = (
        page.ask(Question("somebody", k=3, imagine=1)),
        page.ask(Question("somebody", k=3)),
    )
    assert (
        with_it.imagined.size == (48, 96)
        and without.imagined is None
        and "imagine=1" in Question("x", imagine=1).link()
    )
    assert gallery.find(
        with_it.keys[0]
    ).path.name == "green-yellow-0.png" and with_it.query @ gallery.features[
        gallery.find(with_it.keys[0]).row
    ] == pytest.approx(float(with_it.tiles[0][1].split()[1]), abs=1e-3)
    assert (
        page.ask(Question(like=gallery.hits([3])[0].key, imagine=1)).imagined is None
        and Page(gallery).ask(Question("x", imagine=1)).imagined is None
    )


@pytest.mark.parametrize(
    "question,note",
    [
        (Question(), "Type a sentence"),
        (Question("x", where="camera = 1"), "filter"),
        (Question(like="0" * 24), "the gallery has changed; ask again"),
        (Question("x", where="camera == 'c9'"), "Nobody found"),
        (Question("x", rerank="magic"), "neighbours or expand"),
    ],
)
def test_mistakes_become_sentences(gallery, question, note):
    answer = Page(gallery).ask(question)
    assert note in answer.note and "\n" not in answer.note and not answer.tiles


def test_our_own_failures_do_not_show_their_trace(gallery, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "search", lambda *a, **k: 1 / 0)
    answer = Page(gallery).ask(Question("x"))
    assert (
        answer.wrong
        and "ZeroDivisionError" in answer.note
        and "Traceback" not in answer.note
        and "Traceback" in capsys.readouterr().err
    )


def test_photos_that_are_gone(tmp_path):
    gallery = Gallery.build(archive(tmp_path / "p"), ColourModel(), tmp_path / "g")
    for p in (tmp_path / "p").rglob("*.png"):
        p.unlink()
    page = Page(gallery)
    answer = page.ask(Question("a red coat", k=3))
    assert len(answer.tiles) == 3 and "was it moved" in page.look(answer.keys[0], answer.query)[2]


def test_a_gallery_without_its_model_still_shows_people(gallery):
    orphan = Gallery(gallery.folder)
    person, heat, facts = Page(orphan).look(orphan.hits([0])[0].key, np.ones(16, np.float32) / 4)
    assert person is not None and heat is None and "does not say where its model is" in facts


def test_filters_from_lists():
    assert (
        joined_filter("", {}) == ""
        and joined_filter(" x0 > 1 ", {}) == "x0 > 1"
        and joined_filter("", dict(camera=["c1", 'it\'s "odd"']))
        == "camera in ['c1', 'it\\'s \"odd\"']"
    )
    text = joined_filter("a == 1 or b == 2", dict(camera=["c1"], day=[]))
    assert text == "(a == 1 or b == 2) and camera in ['c1']" and parse_filter(text)
    with pytest.raises(TiprError):
        parse_filter(joined_filter("a == 1) or (b == 2", dict(camera=["c1"])) + ")")


def test_gallery_facts(gallery):
    facts = gallery_facts(gallery)
    assert few_words(gallery) == ["camera"] and "c1 12, c2 12, c3 12" in facts and "36" in facts


def test_match_map_points_at_what_matters():
    model, picture = ColourModel(), figure("red", "green")
    for sentence, rows in (("a red coat and green trousers", slice(2, 11)),):
        heat = match_map(model.encode_image, picture, model.encode_text([sentence])[0])
        assert (
            heat.shape == (12, 4)
            and heat.min() >= 0
            and heat[rows].mean() > 3 * heat[[0, 11]].mean()
        )
    assert warmed(picture, np.zeros((12, 4))).size[1] >= 192


def test_ports():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(TiprError, match="in use; choose another"):
            check_port("127.0.0.1", s.getsockname()[1])
    for port in (0, -1, 70_000):
        with pytest.raises(TiprError, match="between 1 and 65535"):
            check_port("127.0.0.1", port)
    with pytest.raises(TiprError, match="cannot be|assign|requested"):
        check_port("192.0.2.1", free_port())


def test_missing_gradio_names_the_extra(gallery, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(TiprError, match=r"tipr_nb\[app\]"):
        search_page(gallery)


@pytest.fixture(scope="module")
def address(gallery):
    blocks, address = serve(gallery, port=free_port(), wait=False)
    yield address
    blocks.close()


def fetch(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=10).status
    except urllib.error.HTTPError as e:
        return e.code


def test_thumbnails_stay_private(address):
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.name.startswith("tipr-page-") and folder.stat().st_mode & 0o077 == 0


def test_only_loopback_listens(address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    assert fetch(address) == 200 and address.startswith("http://127.0.0.1:")
    own = next(
        (
            a[4][0]
            for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
            if not a[4][0].startswith("127.")
        ),
        None,
    )
    if own:
        with pytest.raises(OSError), socket.create_connection((own, port), timeout=2):
            pass


def test_no_file_can_be_named(address, gallery):
    home = gallery.folder.parent
    files = [
        home / "secret.txt",
        home / "secret.png",
        gallery.folder / "gallery.json",
        gallery.hits([0])[0].path,
        Path("/etc/passwd"),
        Path(__file__),
    ]
    for file in files:
        for way in (
            str(file),
            "/" + str(file),
            f"../../../../../../../..{file}",
            urllib.parse.quote(str(file), safe=""),
            f"..%2f..%2f..%2f..%2f..%2f..{file}",
            f"%2e%2e/%2e%2e/%2e%2e/%2e%2e{file}",
            f"file://{file}",
            f"{gallery.folder}/../{file.name}",
        ):
            for route in (
                "gradio_api/file=",
                "file=",
                "gradio_api/file/",
                "static/",
                "assets/",
                "gradio_api/proxy=",
                "theme.css/",
            ):
                status = fetch(f"{address}{route}{way}")
                assert status in (400, 403, 404, 405, 422), (route, way, status)


def test_many_at_once(gallery):
    page, out = Page(gallery), []

    def ask(i):
        out.append(
            page.ask(
                Question(
                    "a red coat and blue trousers",
                    k=1 + i % 5,
                    where="camera == 'c2'" if i % 2 else "",
                )
            )
        )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(out) == 24 and not any(a.wrong for a in out)


def test_clicks_and_links_while_somebody_indexes(tmp_path):
    "Two hundred clicks, links and likes made before a re-index: the right person, or a sentence that says the gallery has changed; never somebody else."
    import random

    shelf = archive(tmp_path / "p")
    for i in range(12):
        figure("white", "white", (40 + i, 90)).save(shelf / "c1" / f"extra{i}.png")
    gallery, r = (
        Gallery.build(shelf, ColourModel(), tmp_path / "g", pattern=r"(?P<camera>c\d)/"),
        random.Random(0),
    )
    page, right, gone = Page(gallery), 0, 0
    for round in range(10):
        known = {h.key: h for h in page.gallery.hits(range(len(page.gallery)))}
        old = page.ask(Question("a red coat and blue trousers", k=30))
        moving = sorted(shelf.rglob("*.png"))
        for p in r.sample(moving, 4):
            p.rename(p.with_name(f"{r.choice('abyz')}{round}-{p.name}"))
        r.choice(sorted(shelf.rglob("*.png"))).unlink()
        figure("black", "white", (30 + round, 70)).save(
            shelf / f"c{1 + round % 3}" / f"{r.choice('az')}new{round}.png"
        )
        Gallery.build(shelf, ColourModel(), gallery.folder)
        for key in r.sample(old.keys, 20):
            person, _, facts = page.look(key, old.query)
            like = page.ask(
                Question.of(
                    {
                        k: v[0]
                        for k, v in urllib.parse.parse_qs(
                            Question(like=key, k=3).link()[1:]
                        ).items()
                    }
                )
            )
            if "the gallery has changed; ask again" in facts:
                gone += 1
                assert person is None and like.wrong and "ask again" in like.note
                continue
            right += 1
            assert np.array_equal(
                np.asarray(person),
                np.asarray(
                    known[key].picture().resize(person.size, 3)
                    if known[key].path.exists()
                    else person
                ),
            )
            assert (
                page.gallery.find(key).key == key
                and not like.wrong
                and key not in like.keys
                and known[key].path.name in page.gallery.find(key).path.name
            )
    assert right + gone == 200 and gone > 0
    assert (
        page.ask(Question("a red coat", where="camera == 'c9'")).note.startswith("Nobody")
        and "rows" not in page.look("f" * 24, None)[2]
    )


def test_nothing_of_a_table_or_a_name_becomes_part_of_the_page(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    shelf = archive(tmp_path / "p")
    first = sorted(shelf.rglob("*.png"))[0]
    first.rename(first.with_name(f"{bad}.png"))
    lines = [
        f'"{p.relative_to(shelf)}","{bad if i % 2 else "<b>plain</b>"}"'
        for i, p in enumerate(sorted(shelf.rglob("*.png")))
    ]
    (tmp_path / "t.csv").write_text('path,"<i>note</i>"\n' + "\n".join(lines) + "\n")
    gallery = Gallery.build(shelf, ColourModel(), tmp_path / "g", metadata=tmp_path / "t.csv")
    page = Page(gallery)
    for key in page.ask(Question("a man", k=36)).keys:
        facts = page.look(key, None)[2]
        assert "<img src" not in facts and "<b>" not in facts and "<i>" not in facts
    assert "<img src" not in gallery_facts(gallery) and "&lt;img src" in gallery_facts(gallery)
    from tipr_nb.search.app import _note

    for answer in (
        page.ask(Question("a man", where=f"note == '{bad}' and")),
        page.ask(Question(bad, where=bad)),
    ):
        assert "<img src" not in _note(answer, Question(bad, where=bad))


@pytest.mark.parametrize(
    "data,why",
    [
        (b"nothing", "not a picture"),
        (b"", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (None, "million pixels|more than"),
    ],
)
def test_uploads_are_limited_before_they_are_decoded(gallery, tmp_path, data, why):
    path = tmp_path / "x.png"
    if data is None:
        Image.new("L", (20_000, 20_000)).save(path)
    else:
        path.write_bytes(data)
    answer = Page(gallery).ask(Question(k=3), path)
    assert (
        answer.wrong
        and answer.note.startswith("your picture: ")
        and re.search(why, answer.note)
        and "\n" not in answer.note
    )
    figure("green", "white").save(path)
    assert (
        gallery.find(Page(gallery).ask(Question(k=3), path).keys[0]).path.name
        == "green-white-0.png"
    )


def request(address, host=None, **headers):
    r = urllib.request.Request(address, headers=({"Host": host} if host else {}) | headers)
    try:
        return urllib.request.urlopen(r, timeout=10).status
    except urllib.error.HTTPError as e:
        return e.code


def test_the_page_answers_its_own_names_alone(address):
    port = address.rstrip("/").rsplit(":", 1)[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert request(address, host) == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        f"localhost.evil.example:{port}",
        "192.168.1.7",
    ):
        for path in ("", "config", "gradio_api/info", "gradio_api/file=x"):
            assert request(address + path, host) == 421, (host, path)
    assert (
        request(address, Origin="http://evil.example") == 421
        and request(address, Origin=address.rstrip("/")) == 200
    )


def test_beyond_loopback_a_password_is_wanted(gallery, capsys):
    blocks, address = serve(gallery, host="0.0.0.0", port=free_port(), wait=False)
    try:
        said = capsys.readouterr().err
        port = address.rstrip("/").rsplit(":", 1)[1]
        assert "the name tipr and the password" in said
        assert (
            request(f"http://127.0.0.1:{port}/config") == 401
            and request(f"http://127.0.0.1:{port}/config", "evil.example") == 421
        )
        data = urllib.parse.urlencode(dict(username="tipr", password=said.split()[-1])).encode()
        assert (
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/login", data), timeout=10
            ).status
            == 200
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(
                urllib.request.Request(
                    f"http://127.0.0.1:{port}/login", data.replace(b"password=", b"password=x")
                ),
                timeout=10,
            )
    finally:
        blocks.close()


def test_a_proxy_in_the_environment_is_no_hindrance(gallery, monkeypatch):
    dead = f"http://127.0.0.1:{free_port()}"
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.setenv(name, dead)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    blocks, address = serve(gallery, port=free_port(), wait=False)
    try:
        assert (
            urllib.request.build_opener(urllib.request.ProxyHandler({}))
            .open(address, timeout=10)
            .status
            == 200
        )
    finally:
        blocks.close()


@pytest.fixture(scope="module")
def calibrated(gallery):
    "The gallery, scores of .9 and more being probable."
    known = HitProbabilities(
        gallery.manifest["fingerprint"], "coloured figures", 0.5, [8.0, 0], 0.0, [0.9, 0], [0.1, 1]
    )
    copy = gallery.folder.parent / "calibrated"
    shutil.copytree(gallery.folder, copy)
    known.save(copy / "calibration.json")
    return Gallery(copy, ColourModel())


def test_probabilities_are_shown_where_they_are_known(gallery, calibrated, tmp_path):
    question = Question("a red coat and blue trousers", k=8)
    assert "probability" not in str(Page(gallery).ask(question).tiles)
    page = Page(calibrated)
    answer = page.ask(question)
    chances = [h.probability for h in calibrated.search(question.q, k=8)]
    for (_, words), p in zip(answer.tiles, chances):
        assert f" · probability {p:.2f} · " in words
    facts = page.look(answer.keys[2], answer.query, answer.best, explain=False)[2]
    assert f"<th>probability</th><td>{chances[2]:.2f}</td>" in facts
    file, problem = page.export(
        answer.keys[2:3], "csv", answer.query, tmp_path, answer.best, answer.words
    )
    assert not problem and f",{chances[2]:.4f}"[:5] in Path(file).read_text()
    file, _ = page.export(answer.keys, "html", answer.query, tmp_path, answer.best, answer.words)
    assert question.q in Path(file).read_text() and "probability 1.00" in Path(file).read_text()
    assert page.export([], "csv", None, tmp_path) == (None, "nobody to write: search first")


def test_hiding_the_improbable(gallery, calibrated):
    sure = Question("a red coat and blue trousers", k=8, probable=90)
    page = Page(calibrated)
    answer = page.ask(sure)
    assert 0 < len(answer.tiles) < 8 and "probability 0.90 or more" in answer.note
    assert any("fitted on coloured figures" in n for n in answer.advice)
    like = page.ask(replace(sure, q="", like=answer.keys[0]))
    assert len(like.tiles) == 8 and any("nobody was hidden" in n for n in like.advice)
    assert len(Page(gallery).ask(sure).tiles) == 8  # not calibrated: there is nothing to hide by
    nobody = page.ask(replace(sure, where="camera == 'c9'"))
    assert not nobody.tiles and nobody.note.startswith("Nobody")
    assert Question.of(dict(probable="400")).probable == 100


def test_a_guess_at_an_enriched_question_is_refused(calibrated):
    class Enriches:
        model = ColourModel()

        def encode_text(self, texts):
            return self.model.encode_text(texts)

    wrapped = Gallery(calibrated.folder, Enriches())
    assert wrapped.search("a red coat", k=2)[0].probability is None
    with pytest.raises(TiprError, match="min_probability: .* picture enriches"):
        wrapped.search("a red coat", k=2, min_probability=0.5)
