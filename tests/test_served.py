"""A gallery published to Milvus: one row for one photo, parts of several writers, kills, and searches with the address alone."""

import json
import os
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from tipr_nb.core import TiprError
from tipr_nb.search import (
    ColourModel,
    Gallery,
    Milvus,
    MilvusStore,
    ServedGallery,
    colour_archive,
    import_features,
    open_store,
    publish,
)

pytest.importorskip("milvus_lite")


@pytest.fixture
def uri(tmp_path):
    path = str(tmp_path / "people.db")
    yield path
    Milvus.release(path)


class Noted:
    "Counts the rows that a store is sent."

    def __init__(self, monkeypatch):
        self.sent = []
        self.deleted = []
        self.stop_after = None
        upsert, delete = MilvusStore.upsert, MilvusStore.delete

        def noted_upsert(store, keys, *args, **kwargs):
            if self.stop_after is not None and len(self.sent) >= self.stop_after:
                raise KeyboardInterrupt
            self.sent.append(len(keys))
            return upsert(store, keys, *args, **kwargs)

        def noted_delete(store, keys, **kwargs):
            self.deleted.append(len(keys))
            return delete(store, keys, **kwargs)

        monkeypatch.setattr(MilvusStore, "upsert", noted_upsert)
        monkeypatch.setattr(MilvusStore, "delete", noted_delete)

    def take(self):
        out = sum(self.sent), sum(self.deleted)
        self.sent.clear()
        self.deleted.clear()
        return out


@pytest.fixture
def photos(tmp_path):
    colour_archive(tmp_path / "photos", 42)  # 1,500 and a few
    return tmp_path / "photos"


def build(photos, folder, uri, **options):
    return Gallery.build(
        photos, ColourModel(), folder, engine="milvus", engine_options=dict(uri=uri) | options
    )


def test_one_photo_more_or_less_is_one_row(photos, tmp_path, uri, monkeypatch):
    noted = Noted(monkeypatch)
    gallery = build(photos, tmp_path / "g", uri)
    n = len(gallery)
    assert n >= 1500 and noted.take() == (n, 0)
    new = photos / "c1" / "new.png"
    shutil.copy(next(photos.rglob("*.png")), new)
    assert len(build(photos, tmp_path / "g", uri)) == n + 1 and noted.take() == (1, 0)
    new.unlink()
    build(photos, tmp_path / "g", uri)
    assert noted.take() == (0, 1) and open_store(uri).count() == n
    build(photos, tmp_path / "g", uri)
    assert noted.take() == (0, 0)
    again = Gallery.build(
        photos, ColourModel(), tmp_path / "g"
    )  # the address comes from gallery.json
    assert noted.take() == (0, 0) and again.manifest["engine"] == "milvus"
    hits = again.search("a man in blue", 5)
    assert np.allclose(
        [h.score for h in hits],
        [h.score for h in again.search("a man in blue", 5, engine="exact")],
        atol=1e-5,
    )


def features(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def gallery_of(folder, n, seed=0, **columns):
    import_features(
        folder,
        features(n, seed),
        [f"{folder.name}/{i}.png" for i in range(n)],
        "ab" * 16,
        root=folder.parent,
        columns=columns,
    )
    return Gallery(folder).view.files


def sent(files, uri, **options):
    return publish(uri, files.items, files.features, files.manifest, **options)[1]


def test_two_writers_lose_nothing_and_send_nothing_twice(tmp_path, uri):
    one = gallery_of(tmp_path / "one", 700, 1, camera=["c1"] * 700)
    two = gallery_of(tmp_path / "two", 500, 2, zone=[str(i) for i in range(500)])
    assert sent(one, uri).upserted == 700 and sent(two, uri).upserted == 500
    for files, n in ((one, 700), (two, 500), (one, 700)):
        report = sent(files, uri)
        assert (report.upserted, report.deleted, report.unchanged) == (0, 0, n)
    store = open_store(uri)
    assert (
        store.count() == 1200
        and store.count("camera == 'c1'") == 700
        and store.count("zone is not None") == 500
    )
    for files in (one, two):
        for row in (0, 17, 499):
            found = store.search(np.asarray(files.features[row])[None], 1)[0][0]
            assert (
                found.columns["path"] == files.items.take([row])[0]["path"]
                and abs(found.score - 1) < 1e-5
            )


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_killed_between_batches_the_next_run_ends_equal(tmp_path, uri, monkeypatch, after):
    one = gallery_of(tmp_path / "one", 300, 1)
    sent(one, uri)
    two = gallery_of(
        tmp_path / "two", 3500, 2, zone=["z"] * 3500
    )  # a column more: a new collection
    noted = Noted(monkeypatch)
    noted.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        sent(two, uri)
    assert open_store(uri).count() == 300, "nothing half visible"
    noted.stop_after = None
    sent(two, uri)
    store = open_store(uri)
    assert store.count() == 3800 and len(set(store.states())) == 3800
    assert sent(two, uri).unchanged == 3500 and sent(one, uri).unchanged == 300


def test_a_killed_gallery_is_finished_by_the_same_command(photos, tmp_path, uri, monkeypatch):
    noted = Noted(monkeypatch)
    noted.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "g", uri)
    with pytest.raises(TiprError, match="no gallery of that name"):
        open_store(uri)
    noted.stop_after = None
    gallery = build(photos, tmp_path / "g", uri)
    assert gallery.report.encoded == 0 and open_store(uri).count() == len(gallery)


def test_an_address_is_enough(photos, tmp_path, uri):
    local = build(photos, tmp_path / "g", uri)
    served = ServedGallery(uri, model=ColourModel())
    for text, where in (
        ("a woman in red", None),
        ("a man in blue", "width > 5"),
        ("green", "path.startswith('c1')"),
    ):
        ours, theirs = (
            local.search(text, 9, where=where, engine="exact"),
            served.search(text, 9, where=where),
        )
        assert len(ours) == len(theirs) == 9
        assert np.allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-5)
        assert all(h.path.is_file() and local.find(h.key).name == h.name for h in theirs)
    like = served.search(image=theirs[0].key, k=3)
    assert theirs[0].key not in [h.key for h in like] and like[0].score > 0.9
    assert len(served) == len(local) and "sha256" not in served.columns


def test_features_in_random_directions_give_the_same_rows(tmp_path, uri):
    files = gallery_of(tmp_path / "one", 900, 5)
    sent(files, uri)
    local = Gallery(tmp_path / "one")
    queries = features(20, 9)
    exact = local.engine("exact").search(queries, 10)[1]
    names = [[i["path"] for i in files.items.take(rows)] for rows in exact]
    found = open_store(uri).search(queries, 10)
    assert [[h.columns["path"] for h in hits] for hits in found] == names


def test_copies_are_folded(photos, tmp_path, uri):
    first = sorted(photos.rglob("*.png"))[0]
    shutil.copy(first, photos / "c1" / "copy.png")
    local = build(photos, tmp_path / "g", uri)
    served = ServedGallery(uri, model=ColourModel())
    n = len(local)
    once, each = served.search("red", n), served.search("red", n, unique=False)
    assert (len(each), len(once)) == (n, n - local.manifest["duplicates"])
    assert sum(len(h.duplicates) for h in once) == local.manifest["duplicates"]


def test_tokens_go_only_where_this_call_says(photos, tmp_path, uri, monkeypatch):
    given = []
    at = Milvus.at.__func__

    def noted(cls, uri, token=None, trusted=False):
        given.append(trusted)
        return at(cls, uri, token, trusted)

    gallery = build(photos, tmp_path / "g", uri)
    gallery.close()
    monkeypatch.setattr(Milvus, "at", classmethod(noted))
    again = Gallery.build(photos, ColourModel(), tmp_path / "g")
    again.search("red", 3)
    assert given and not any(given), "an address out of gallery.json"
    given.clear()
    build(photos, tmp_path / "g", uri)
    assert given and all(given)
    assert "secret" not in (tmp_path / "g" / "gallery.json").read_text()


def test_password_in_an_address_is_not_kept(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tipr_nb.search.indexing.publish",
        lambda uri, *a, **k: (dict(uri=uri, collection="people"), None),
    )
    gallery = Gallery.build(
        photos,
        ColourModel(),
        tmp_path / "g",
        engine="milvus",
        engine_options=dict(uri="http://root:secret@10.0.0.1:19530"),
    )
    assert "secret" not in json.dumps(gallery.manifest["engines"]["milvus"]["uri"])


BAD = [
    (dict(uri="10.0.0.1:19530"), "needs its scheme"),
    (dict(uri="http://127.0.0.1:9"), "cannot be opened|refused"),
    (dict(uri="{uri}", index="annoy"), "choose flat"),
    (dict(uri="{uri}", name="a b"), "letters, digits"),
]


@pytest.mark.parametrize("options,why", BAD, ids=[w for _, w in BAD])
def test_bad_addresses_and_options_are_one_line(photos, tmp_path, uri, options, why):
    options = {k: v.format(uri=uri) for k, v in options.items()}
    with pytest.raises(TiprError, match=why) as e:
        build(photos, tmp_path / "g", **options)
    assert "\n" not in str(e.value)


def test_another_model_and_another_kind_of_column(tmp_path, uri):
    files = gallery_of(tmp_path / "one", 50, zone=["a"] * 50)
    sent(files, uri)
    with pytest.raises(TiprError, match="made by another model .*--milvus-name"):
        publish(uri, files.items, files.features, files.manifest | dict(fingerprint="cd" * 16))
    other = gallery_of(tmp_path / "two", 5, zone=[1] * 5)
    with pytest.raises(TiprError, match="column zone: int here, text in the store"):
        sent(other, uri)
    publish(
        uri, files.items, files.features, files.manifest | dict(fingerprint="cd" * 16), rebuild=True
    )
    assert open_store(uri, fingerprint="cd" * 16).count() == 50
    with pytest.raises(TiprError, match="another model"):
        ServedGallery(uri, model=ColourModel())


def test_server_away_in_the_middle(tmp_path, uri, monkeypatch):
    files = gallery_of(tmp_path / "one", 2500)
    upsert = MilvusStore.upsert
    calls = []

    def fails(store, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            from pymilvus.exceptions import MilvusException

            monkeypatch.setattr(
                store.client,
                "upsert",
                lambda *a, **k: (_ for _ in ()).throw(MilvusException(2, "server unavailable")),
            )
        return upsert(store, *args, **kwargs)

    monkeypatch.setattr(MilvusStore, "upsert", fails)
    with pytest.raises(TiprError, match="the server does not answer") as e:
        sent(files, uri)
    assert "\n" not in str(e.value)
    with pytest.raises(TiprError, match="no gallery of that name"):
        open_store(uri)


def test_the_command_line(tmp_path, monkeypatch):
    from tipr_nb.cli import app

    run = CliRunner().invoke
    out = run(app, ["search", "red"])
    assert "--gallery DIR or --milvus-uri" in out.output + str(out.exception)
    out = run(app, ["search", "red", "--milvus-uri", "x.db", "--rerank", "expand"])
    assert "--rerank needs the gallery's folder" in out.output + str(out.exception)
    out = run(app, ["search", "red", "--milvus-uri", "x.db", "--gallery", "g"])
    assert "not both" in out.output + str(out.exception)
    out = run(app, ["search", "red", "--milvus-uri", "x.db", "--search-params", "ef"])
    assert "such as ef=200" in out.output + str(out.exception)


def test_searching_by_address_from_the_command_line(tmp_path, uri, monkeypatch):
    from tipr_nb import cli
    from tipr_nb.cli import search as commands

    monkeypatch.setattr(commands, "open_model", lambda name: ColourModel())
    colour_archive(tmp_path / "photos", 1)
    local = build(tmp_path / "photos", tmp_path / "g", uri)
    local.close()
    run = CliRunner().invoke
    base = ["search", "--milvus-uri", uri, "--model", "colours"]
    out = run(cli.app, [*base, "a woman in red", "-k", "3", "--json"])
    assert out.exit_code == 0, out.output + str(out.exception)
    paths = [hit["path"] for hit in json.loads(out.output)["hits"]]
    assert len(paths) == 3 and all(os.path.isfile(p) for p in paths)
    moved = run(cli.app, [*base, "a woman in red", "--root", "/mnt/here", "--filepath-only"])
    assert moved.exit_code == 0 and moved.output.startswith("/mnt/here/c")
    like = run(cli.app, [*base, "--image", paths[0], "-k", "2"])
    assert like.exit_code == 0, like.output + str(like.exception)
    for more in (
        ["--rerank", "expand"],
        ["--engine", "flat"],
        ["--imagine"],
        ["--predict"],
        ["--min-probability", "0.5"],
    ):
        out = run(cli.app, [*base, "red", *more])
        said = out.output + str(out.exception)
        assert out.exit_code and f"{more[0]} needs the gallery's folder" in said
