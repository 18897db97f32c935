"""A Milvus store: what changed alone is sent, names are switched when a rebuild is whole, tokens stay at home."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tipr_nb.core import TiprError
from tipr_nb.search import (
    Column,
    ExactEngine,
    Milvus,
    MilvusStore,
    Selection,
    StoreEngine,
    StoreFacts,
    create_store,
    open_store,
    sync_store,
)
from tipr_nb.search.milvus import (
    check_uri,
    cut_text,
    index_kind,
    like_pattern,
    public_uri,
    row_state,
    store_index,
    store_schema,
)

pytest.importorskip("milvus_lite")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def table(rows):
    return {n: Column.of(pa.chunked_array([[r[n] for r in rows]])) for n in rows[0]}


def person(i, **more):
    note = [None, "100%_sure", "back\\slash", "new\nline", 'says "hi"', "plain"][i % 6]
    return (
        dict(
            camera=[None, "c1", "c2"][i % 3], x0=i % 50, score_=i / 7, indoor=bool(i % 2), note=note
        )
        | more
    )


KINDS = dict(camera="text", x0="int", score_="float", indoor="bool", note="text")


@pytest.fixture
def uri(tmp_path):
    path = str(tmp_path / "m.db")
    yield path
    Milvus.release(path)


@pytest.fixture
def people():
    rng = np.random.default_rng(0)
    rows = [person(i) for i in range(1500)]
    return [f"k{i}" for i in range(1500)], unit(rng.standard_normal((1500, 16))), rows


def filled(uri, people, name="people", fingerprint="f" * 32, **kwargs):
    keys, x, rows = people
    store = create_store(uri, name, StoreFacts(fingerprint, 16, KINDS), **kwargs)
    sync_store(store, keys, x, table(rows))
    store.activate()
    return store


def test_one_photo_more_or_less_is_one_row(uri, people, monkeypatch):
    keys, x, rows = people
    store = filled(uri, people)
    sent, gone = [], []
    upsert, delete = store.client.upsert, store.client.delete
    monkeypatch.setattr(
        store.client, "upsert", lambda c, data, **k: sent.append(len(data)) or upsert(c, data, **k)
    )
    monkeypatch.setattr(
        store.client, "delete", lambda c, ids, **k: gone.append(len(ids)) or delete(c, ids=ids, **k)
    )
    report = sync_store(store, [*keys, "new"], np.vstack([x, x[:1]]), table([*rows, person(0)]))
    assert (report.upserted, report.deleted, report.unchanged, sent, gone) == (1, 0, 1500, [1], [])
    report = sync_store(store, keys, x, table(rows))
    assert (report.upserted, report.deleted, sent, gone) == (0, 1, [1], [1])
    report = sync_store(store, keys, x, table([person(0, camera="moved"), *rows[1:]]))
    assert (report.upserted, report.deleted, sent) == (1, 0, [1, 1])
    assert store.count() == 1500 and store.search(x[:1], 1, "camera == 'moved'")[0][0].key == "k0"


def test_killed_between_any_two_messages_the_next_run_ends_equal(uri, people, monkeypatch):
    keys, x, rows = people
    store = create_store(uri, "people", StoreFacts("f" * 32, 16, KINDS))
    upsert, count = store.client.upsert, [0]

    def stops(collection, data, **kwargs):
        count[0] += 1
        if count[0] % 3 == 0:
            raise KeyboardInterrupt
        return upsert(collection, data, **kwargs)

    monkeypatch.setattr(store.client, "upsert", stops)
    for _ in range(20):
        try:
            again = create_store(uri, "people", StoreFacts("f" * 32, 16, KINDS))
            assert again.collection == store.collection  # the unfinished one goes on
            sync_store(again, keys, x, table(rows), batch=100)
            break
        except KeyboardInterrupt:
            with pytest.raises(TiprError, match="no gallery of that name"):
                open_store(uri, "people")  # nothing half visible
    again.activate()
    assert again.count() == 1500 and set(again.states()) == set(keys)


def test_two_writers_with_parts_of_their_own(uri, people):
    keys, x, rows = people
    store = create_store(uri, "people", StoreFacts("f" * 32, 16, KINDS))
    mine = [i for i, r in enumerate(rows) if r["indoor"]]
    yours = [i for i, r in enumerate(rows) if not r["indoor"]]
    for part, where in ((mine, "indoor"), (yours, "not indoor"), (mine, "indoor")):
        report = sync_store(
            store, [keys[i] for i in part], x[part], table([rows[i] for i in part]), where=where
        )
        assert report.deleted == 0
    assert report.unchanged == len(mine) and set(store.states()) == set(keys)
    assert (
        sync_store(
            store,
            [keys[i] for i in mine[1:]],
            x[mine[1:]],
            table([rows[i] for i in mine[1:]]),
            where="indoor",
        ).deleted
        == 1
    )
    assert store.count() == 1499


def test_rebuild_is_seen_when_it_is_whole(uri, people):
    keys, x, rows = people
    old = filled(uri, people)
    new = create_store(uri, "people", StoreFacts("0" * 32, 16, KINDS))
    sync_store(new, keys[:10], x[:10], table(rows[:10]))
    assert open_store(uri, "people").collection == old.collection
    new.activate()
    assert (
        open_store(uri, "people").collection == new.collection
        and old.collection not in new.client.list_collections()
    )
    with pytest.raises(TiprError, match="another model"):
        open_store(uri, "people", fingerprint="f" * 32)
    again = create_store(uri, "people", StoreFacts("0" * 32, 16, KINDS), rebuild=True)
    assert again.collection != new.collection and again.count() == 0
    more = create_store(uri, "people", StoreFacts("0" * 32, 16, KINDS | dict(zone="text")))
    assert more.collection not in (
        again.collection,
        new.collection,
    )  # other columns need another collection


FILTERS = [
    "camera == 'c1'",
    "camera != 'c1'",
    "camera is None",
    "x0 in [1, 2]",
    "x0 not in [1, 2]",
    "3 <= x0 < 9 or indoor",
    "not (indoor or x0 > 4)",
    "note.contains('%')",
    "note.contains('_')",
    "not note.contains('_')",
    "note.startswith('back\\\\')",
    "note.endswith('slash')",
    "note == 'new\\nline'",
    "note == 'says \"hi\"'",
    "note.contains('\\n')",
    "score_ > 100.5",
    "camera == '\" or x0 >= 0 or camera == \"'",
]


def test_filters_and_scores_are_the_exact_engines(uri, people):
    keys, x, rows = people
    engine, exact, columns = StoreEngine(filled(uri, people), keys), ExactEngine(x), table(rows)
    for where in [None, *FILTERS]:
        allowed = None if where is None else Selection(where, columns)
        (s, r), (ts, tr) = engine.search(x[:3], 7, allowed), exact.search(x[:3], 7, allowed)
        assert (r == tr).all() and np.allclose(s, ts, atol=1e-5), where
    for bad, why in [
        ("camra == 'c1'", "did you mean camera"),
        ("x0 == 'a'", "whole numbers"),
        (f"x0 > {10**50}", "64 bits"),
    ]:
        with pytest.raises(TiprError, match=why):
            engine.store.search(x[:1], 3, bad)


def test_an_address_is_enough_to_search(uri, people):
    store = filled(uri, people)
    Milvus.release(uri)
    hit = open_store(uri, "people").search(people[1][5:6], 1)[0][0]
    assert hit.key == "k5" and hit.columns == people[2][5] and abs(hit.score - 1) < 1e-5
    assert store.facts.kinds == open_store(uri, "people").facts.kinds


def test_texts_too_long_and_keys_twice(uri):
    store = create_store(uri, "people", StoreFacts("f" * 32, 4, {"note": "text"}))
    x = unit(np.eye(4))
    sync_store(store, list("abcd"), x, table([dict(note="é" * 70_000)] * 4))
    note = store.search(x[:1], 1)[0][0].columns["note"]
    assert len(note.encode()) <= 65_535 and cut_text("é", 1) == ""
    assert sync_store(store, list("abcd"), x, table([dict(note="é" * 70_000)] * 4)).unchanged == 4
    with pytest.raises(TiprError, match="two people have the key a"):
        sync_store(store, list("aabc"), x, table([dict(note="")] * 4))


class FakeSchema:
    def __init__(self, **kwargs):
        self.kwargs, self.fields = kwargs, []

    def add_field(self, name, kind, **kwargs):
        self.fields.append((name, kind.name, kwargs))


class FakeServer:
    "Notes what is sent; answers like an empty server."

    def __init__(self):
        self.sent, self.indices = [], []

    def create_schema(self, **kwargs):
        return FakeSchema(**kwargs)

    def prepare_index_params(self):
        return SimpleNamespace(add_index=lambda field, **k: self.indices.append((field, k)))

    def search(self, collection, **kwargs):
        self.sent.append((collection, kwargs))
        return [[]]

    def upsert(self, collection, records):
        self.sent.append((collection, records))


@pytest.mark.parametrize(
    "name,milvus,build,search",
    [
        ("hnsw", "HNSW", dict(M=16, efConstruction=200), dict(ef=100)),
        ("ivf", "IVF_FLAT", dict(nlist=1024), dict(nprobe=32)),
        ("diskann", "DISKANN", {}, dict(search_list=100)),
        (
            "ivf_rabitq",
            "IVF_RABITQ",
            dict(nlist=1024, refine=True, refine_type="FP16"),
            dict(nprobe=64, refine_k=4),
        ),
        ("auto", "AUTOINDEX", {}, {}),
        ("flat", "FLAT", {}, {}),
    ],
)
def test_requests_for_what_lite_cannot_do(name, milvus, build, search):
    server = FakeServer()
    facts = StoreFacts("f" * 32, 8, KINDS, index=name, half=True)
    schema = store_schema(server, facts)
    assert (
        schema.fields[1] == ("tipr_feature", "FLOAT16_VECTOR", dict(dim=8))
        and ("x0", "INT64", dict(nullable=True)) in schema.fields
    )
    assert StoreFacts.of(schema.kwargs["description"], "") == facts
    store_index(server, index_kind(name))
    assert server.indices == [
        ("tipr_feature", dict(index_type=milvus, metric_type="IP", params=build))
    ]
    store = MilvusStore(server, "http://milvus:19530", "people", "people_f_1", facts)
    store.search(np.ones((1, 8)), 5, "camera == 'c1'")
    sent = server.sent[-1][1]
    assert (
        sent["search_params"] == dict(metric_type="IP", params=search)
        and sent["data"][0].dtype == np.float16
        and sent["filter"] == '(camera is not null and camera == "c1")'
    )
    store.search(np.ones((1, 8)), 500)
    assert all(
        v >= 500
        for k, v in server.sent[-1][1]["search_params"]["params"].items()
        if k in ("ef", "search_list")
    )
    store.upsert(["a"], np.ones((1, 8), np.float32), [dict(camera="c1")])
    record = server.sent[-1][1][0]
    assert (
        record["tipr_feature"].dtype == np.float16
        and record["tipr_key"] == "a"
        and record["x0"] is None
    )


def test_tokens_stay_at_home(monkeypatch):
    given = []
    monkeypatch.setattr(
        "pymilvus.MilvusClient",
        lambda uri, token="", timeout=0: (
            given.append((uri, token)) or SimpleNamespace(close=lambda: None)
        ),
    )
    monkeypatch.setenv("TIPR_MILVUS_TOKEN", "secret")
    monkeypatch.setattr(Milvus, "clients", {})
    Milvus.at("http://from-a-file:19530")
    Milvus.at("http://mine:19530", trusted=True)
    Milvus.at("http://other:19530", token="other")
    monkeypatch.setenv("TIPR_MILVUS_URI", "http://from-a-file:19530")
    Milvus.at("http://from-a-file:19530")
    assert given == [
        ("http://from-a-file:19530", ""),
        ("http://mine:19530", "secret"),
        ("http://other:19530", "other"),
        ("http://from-a-file:19530", "secret"),
    ]
    assert public_uri("https://root:pw@h:1") == "https://h:1" and public_uri("g/m.db") == "g/m.db"


@pytest.mark.parametrize(
    "uri,why",
    [
        ("milvus:19530", "write http://milvus:19530"),
        ("10.0.0.1:19530", "needs its scheme"),
        ("  ", "is empty"),
    ],
)
def test_addresses_without_scheme(uri, why):
    with pytest.raises(TiprError, match=why):
        check_uri(uri)


@pytest.mark.parametrize(
    "call,why",
    [
        (lambda: index_kind("annoy"), "choose flat"),
        (lambda: index_kind("hnsw", {"M": 10**400}), "index parameter M"),
        (lambda: index_kind("ivf", None, {"nprobe": []}), "search parameter"),
        (lambda: index_kind("ivf", {"a b": 1}), "index parameter"),
        (lambda: StoreFacts.of("hello", "x"), "not a collection of this package"),
        (
            lambda: StoreFacts.of('{"format": 9, "fingerprint": "", "dim": 1, "kinds": {}}', "x"),
            "of format 9",
        ),
    ],
)
def test_bad_options_are_one_line(call, why):
    with pytest.raises(TiprError, match=why) as e:
        call()
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_names_patterns_and_states(uri):
    for name in ("a b", "1a", "a-b", "", "x" * 200):
        with pytest.raises(TiprError, match="letters, digits"):
            open_store(uri, name)
    with pytest.raises(TiprError, match="no gallery of that name"):
        open_store(uri, "nobody")
    assert like_pattern("startswith", "50%_\\") == "50\\%\\_\\\\%"
    assert (
        row_state(dict(a=1, b=None)) == row_state(dict(b=None, a=1)) != row_state(dict(a=2, b=None))
    )
