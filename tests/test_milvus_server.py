"""Milvus Lite as a server of its own: writers truly at once, kills, a server that goes away, wrong credentials."""

import json
import os
import random
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tipr_nb.core import TiprError
from tipr_nb.search import Gallery, Milvus, MilvusStore, import_features, open_store, publish

pytest.importorskip("milvus_lite")
from milvus_server import LiteServer, denying_server, free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = LiteServer(tmp_path_factory.mktemp("server"))
    yield one
    Milvus.release(one.uri)
    one.stop()


def gallery_of(folder, n, seed=0, dim=16, fingerprint="ab" * 16, **columns):
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    names = [f"{folder.name}/{i}.png" for i in range(n)]
    import_features(folder, x, names, fingerprint, root=folder.parent, columns=columns)
    return Gallery(folder).view.files


def sent(files, uri, **options):
    return publish(uri, files.items, files.features, files.manifest, **options)[1]


CHILD = textwrap.dedent("""
    import json, os, signal, sys
    from functools import partial
    from tipr_nb.search import Gallery, MilvusStore, publish, publishing, sync_store

    def send(folder, uri, name, stop=None):
        files = Gallery(folder).view.files
        upsert, calls = MilvusStore.upsert, []

        def noted(store, keys, *args, **kwargs):
            if stop is not None and len(calls) == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(len(keys))
            return upsert(store, keys, *args, **kwargs)

        MilvusStore.upsert = noted
        publishing.sync_store = partial(sync_store, batch=100)
        report = publish(uri, files.items, files.features, files.manifest, name)[1]
        return vars(report)
""")


def child(code, *args):
    "A process of its own that runs a piece of code with `send`."
    command = [sys.executable, "-c", CHILD + textwrap.dedent(code), *map(str, args)]
    quiet = os.environ | dict(TIPR_QUIET="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=quiet, text=True)


@pytest.mark.parametrize("columns", ["the same", "their own"])
def test_two_processes_at_once_lose_nothing_and_nothing_is_there_twice(server, tmp_path, columns):
    name = "both_" + columns.split()[-1]
    extra = [{}, {}] if columns == "the same" else [dict(zone=["z"] * 700), dict(age=[3] * 500)]
    files = [
        gallery_of(tmp_path / who, n, n, **more)
        for who, n, more in zip(("one", "two"), (700, 500), extra)
    ]
    code = """
        sys.stdin.readline()
        print(json.dumps(send(*sys.argv[1:4])))
    """
    command = [sys.executable, "-c", CHILD + textwrap.dedent(code)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writers = [
        subprocess.Popen([*command, str(tmp_path / who), server.uri, name], **pipes)
        for who in ("one", "two")
    ]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.wait(500)
    assert [w.returncode for w in writers] == [0, 0]
    store = open_store(server.uri, name)
    assert store.count() == 1200 and len(store.states()) == 1200
    for one in files:
        report = sent(one, server.uri, name=name)
        assert (report.upserted, report.deleted) == (0, 0)
    if columns == "their own":
        assert store.count("zone == 'z'") == 700 and store.count("age == 3") == 500


@pytest.mark.parametrize("at", ["before the switch", "after the switch"])
def test_a_collection_made_anew_meanwhile_loses_no_writers_rows(server, tmp_path, monkeypatch, at):
    name = "anew_" + at.split()[0]
    first = gallery_of(tmp_path / "first", 50, 1)
    late = gallery_of(tmp_path / "late", 40, 2)
    wide = gallery_of(tmp_path / "wide", 30, 3, zone=["z"] * 30)
    sent(first, server.uri, name=name)
    activate = MilvusStore.activate
    calls = []

    def slow(store, drop_old=True):
        if calls:
            return activate(store, drop_old)
        calls.append(1)
        if at == "before the switch":
            sent(late, server.uri, name=name)
            return activate(store, drop_old)
        sent(late, server.uri, name=name)
        activate(store, drop_old)

    monkeypatch.setattr(MilvusStore, "activate", slow)
    sent(wide, server.uri, name=name)
    monkeypatch.undo()
    store = open_store(server.uri, name)
    assert store.count() == 120 and store.count("zone == 'z'") == 30
    for files in (first, late, wide):
        assert sent(files, server.uri, name=name).upserted == 0


@pytest.mark.full
def test_twenty_kills_between_batches_and_the_next_run_ends_equal(server, tmp_path):
    files = gallery_of(tmp_path / "mine", 950, 4)
    other = gallery_of(tmp_path / "other", 300, 5)
    sent(other, server.uri, name="kills")
    numbers = random.Random(7)
    stops = [numbers.randrange(10) for _ in range(20)]
    code = """
        folder, uri, name, stops = sys.argv[1:5]
        for stop in json.loads(stops):  # gRPC is started in the forked process alone
            pid = os.fork()
            if not pid:
                send(folder, uri, name, stop)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """
    run = child(code, tmp_path / "mine", server.uri, "kills", json.dumps(stops))
    codes = [int(line) for line in run.communicate(timeout=3000)[0].split()]
    assert len(codes) == 20 and set(codes) <= {-9, 0} and -9 in codes
    report = sent(files, server.uri, name="kills")
    assert report.unchanged + report.upserted == 950 and report.deleted == 0
    store = open_store(server.uri, "kills")
    assert store.count() == 1250 and len(store.states()) == 1250
    again = sent(files, server.uri, name="kills")
    assert (again.upserted, again.deleted) == (0, 0)
    for row in (0, 499, 949):
        found = store.search(np.asarray(files.features[row])[None], 1)[0][0]
        assert found.columns["path"] == files.items.take([row])[0]["path"]


def test_a_server_that_goes_away_in_the_middle(tmp_path, monkeypatch):
    server = LiteServer(tmp_path / "server")
    files = gallery_of(tmp_path / "one", 2500, 6)
    upsert = MilvusStore.upsert
    calls = []

    def dies(store, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            server.kill()
        return upsert(store, *args, **kwargs)

    monkeypatch.setattr(MilvusStore, "upsert", dies)
    with pytest.raises(TiprError, match="the server does not answer") as e:
        sent(files, server.uri)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    server.start()
    said = "does not answer"
    end = time.monotonic() + 60
    while "does not answer" in said and time.monotonic() < end:  # gRPC waits before it tries again
        Milvus.release(server.uri)
        time.sleep(0.5)
        with pytest.raises(TiprError) as e:
            open_store(server.uri)
        said = str(e.value)
    assert "no gallery of that name" in said, said
    report = sent(files, server.uri)
    assert report.upserted + report.unchanged == 2500
    assert open_store(server.uri).count() == 2500
    Milvus.release(server.uri)
    server.stop()


def test_wrong_credentials_are_one_line(tmp_path, monkeypatch):
    server, uri = denying_server()
    monkeypatch.setenv("TIPR_MILVUS_TOKEN", "root:wrong")
    with pytest.raises(TiprError, match="not accepted; set TIPR_MILVUS_TOKEN=USER:PASSWORD") as e:
        open_store(uri, trusted=True)
    assert "\n" not in str(e.value) and "wrong" not in str(e.value)
    server.stop(None)


def test_nobody_at_the_address():
    with pytest.raises(TiprError, match="the server does not answer; is it running") as e:
        open_store(f"http://127.0.0.1:{free_port()}")
    assert "\n" not in str(e.value)


def test_another_dimension_and_somebody_elses_collection(server, tmp_path):
    files = gallery_of(tmp_path / "one", 20, 7)
    sent(files, server.uri, name="dims")
    other = gallery_of(tmp_path / "two", 20, 8, dim=8, fingerprint="cd" * 16)
    with pytest.raises(TiprError, match="made by another model"):
        sent(other, server.uri, name="dims")
    assert open_store(server.uri, "dims").count() == 20
    client = Milvus.at(server.uri)
    client.create_collection("theirs", dimension=4)
    with pytest.raises(TiprError) as e:
        sent(files, server.uri, name="theirs")
    assert "\n" not in str(e.value) and client.has_collection("theirs")
    client.create_alias("theirs", "borrowed")
    with pytest.raises(TiprError, match="not a collection of this package"):
        sent(files, server.uri, name="borrowed")
