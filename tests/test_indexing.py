"""Galleries on disk: incremental, resumable at any kill, never half there."""

import json, os, random, shutil, signal, subprocess, sys, textwrap, threading, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gallery_pictures import archive, figure
from tipr_nb.core import TiprError
from tipr_nb.search import (
    ColourModel,
    Journal,
    Snapshot,
    index_photos,
    indexing_lock,
    load_features,
    read_manifest,
    read_skipped,
)
from tipr_nb.search import find_photos

PATTERN = r"(?P<camera>c\d)/"


def index(gallery, photos, model=None, **kwargs):
    kwargs = dict(text_tower=False, batch_size=8) | kwargs
    found = find_photos(
        photos, **{k: kwargs.pop(k) for k in ("boxes", "metadata", "pattern") if k in kwargs}
    )
    return index_photos(gallery, found, model or ColourModel(), **kwargs)


def rows(gallery, *columns):
    return Snapshot.open(gallery).items.table(list(columns)).to_pylist()


@pytest.fixture
def shelf(tmp_path):
    return archive(tmp_path / "p")


@pytest.fixture
def gallery(tmp_path):
    return tmp_path / "g"


def test_files_on_disk_are_as_documented(shelf, gallery):
    report = index(gallery, shelf, pattern=PATTERN)
    facts = read_manifest(gallery)
    assert sorted(p.name for p in gallery.iterdir()) == [".lock", "g000001", "gallery.json"]
    assert sorted(p.name for p in (gallery / "g000001").iterdir()) == [
        "features.npy",
        "items.parquet",
        "skipped.parquet",
    ]
    x = np.load(gallery / "g000001" / "features.npy")
    assert (
        x.shape == (36, 16)
        and x.dtype == np.float32
        and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    )
    import pandas as pd

    table = pd.read_parquet(gallery / "g000001" / "items.parquet")
    assert (
        list(table.path) == sorted(table.path)
        and list(table.camera) == [p[:2] for p in table.path]
        and table.file[0].decode() == str(shelf / table.path[0])
    )
    assert (report.people, report.new, report.encoded, facts["count"], facts["fingerprint"]) == (
        36,
        36,
        36,
        36,
        "colours-v1",
    )
    assert isinstance(load_features(gallery / "g000001", facts), np.memmap)


def test_half_precision(shelf, gallery, tmp_path):
    index(gallery, shelf, dtype="float16")
    index(tmp_path / "full", shelf)
    a, b = Snapshot.open(gallery).features, Snapshot.open(tmp_path / "full").features
    assert a.dtype == np.float16 and np.abs(a - b).max() < 1e-3
    index(gallery, shelf)  # keeps its precision
    assert Snapshot.open(gallery).features.dtype == np.float16
    with pytest.raises(TiprError, match="kept as float16"):
        index(gallery, shelf, dtype="float32")
    with pytest.raises(TiprError, match="float32 or float16"):
        index(gallery, shelf, dtype="int8")


def test_incremental(shelf, gallery, tmp_path):
    model = ColourModel()
    index(gallery, shelf, model, pattern=PATTERN)
    before = {r["path"]: f for r, f in zip(rows(gallery, "path"), Snapshot.open(gallery).features)}
    model.seen = 0
    report = index(gallery, shelf, model, pattern=PATTERN)
    assert model.seen == 0 and (report.unchanged, report.new, report.changed, report.removed) == (
        36,
        0,
        0,
        0,
    )
    (shelf / "c1" / "red-red-0.png").unlink()
    os.utime(shelf / "c3" / "red-green-0.png", ns=(1, 1))  # touched, same content
    (shelf / "c2" / "red-blue-0.png").rename(shelf / "c2" / "moved.png")
    figure("white", "red").save(shelf / "c1" / "green-red-0.png")  # replaced
    shutil.copy(shelf / "c2" / "moved.png", shelf / "c3" / "copy.png")
    figure("black", "yellow").resize((50, 100)).save(shelf / "c3" / "new.png")
    report = index(gallery, shelf, model, pattern=PATTERN)
    assert model.seen == 2 and (
        report.new,
        report.changed,
        report.unchanged,
        report.removed,
        report.duplicates,
    ) == (3, 2, 32, 2, 1)
    after = {
        r["path"]: (f, r["camera"])
        for r, f in zip(rows(gallery, "path", "camera"), Snapshot.open(gallery).features)
    }
    assert set(after) == {os.path.relpath(p, shelf) for p in shelf.rglob("*.png")}
    assert (
        all(
            (after[p][0] == before[p]).all()
            for p in after
            if p in before and p != "c1/green-red-0.png"
        )
        and (after["c2/moved.png"][0] == before["c2/red-blue-0.png"]).all()
    )
    assert (after["c3/copy.png"][0] == after["c2/moved.png"][0]).all() and after["c3/copy.png"][
        1
    ] == "c3"
    same = {r["path"]: r["same_as"] for r in rows(gallery, "path", "same_as")}
    assert (
        same["c3/copy.png"] == [r["path"] for r in rows(gallery, "path")].index("c2/moved.png")
        and same["c2/moved.png"] is None
    )
    fresh = tmp_path / "fresh"
    index(fresh, shelf, pattern=PATTERN)
    columns = ["path", "sha256", "camera", "same_as", "width", "height"]
    assert rows(gallery, *columns) == rows(fresh, *columns) and np.allclose(
        Snapshot.open(gallery).features, Snapshot.open(fresh).features, atol=1e-6
    )


def test_add_keeps_the_others(shelf, gallery, tmp_path):
    archive(tmp_path / "q")
    (tmp_path / "q.csv").write_text(
        "path,shop,camera\n"
        + "".join(
            f"q/{p.relative_to(tmp_path / 'q')},north,x\n" for p in (tmp_path / "q").rglob("*.png")
        )
    )
    index(gallery, shelf, pattern=PATTERN)
    model = ColourModel()
    report = index(gallery, tmp_path / "q.csv", model, keep=True)
    table = rows(gallery, "root", "path", "camera", "shop", "same_as")
    assert (
        len(table) == 72 and report.removed == 0 and model.seen == 0
    )  # the same bytes: nothing to encode
    assert {r["camera"] for r in table if r["root"] == str(shelf)} == {"c1", "c2", "c3"} and {
        r["shop"] for r in table
    } == {None, "north"}
    assert sum(r["same_as"] is not None for r in table) == 36
    assert {r["camera"] for r in table if r["root"] == str(tmp_path / "q")} == {"x"}


def test_columns_change_without_encoding(shelf, gallery, tmp_path):
    model = ColourModel()
    index(gallery, shelf, model)
    (tmp_path / "facts.csv").write_text(
        "path,path_note,sha256\n"
        + "".join(
            f"{p.relative_to(shelf)},note {i},{i}\n"
            for i, p in enumerate(sorted(shelf.rglob("*.png")))
        )
    )
    index(gallery, shelf, model, metadata=tmp_path / "facts.csv")
    assert model.seen == 36 and [r["path_note"] for r in rows(gallery, "path_note")] == [
        f"note {i}" for i in range(36)
    ]
    assert [r["sha256_"] for r in rows(gallery, "sha256_")] == list(
        range(36)
    )  # our own names are not overwritten
    index(gallery, shelf, model)
    assert [r["path_note"] for r in rows(gallery, "path_note")] == [
        f"note {i}" for i in range(36)
    ]  # kept where this run says nothing


def test_boxes_and_detectors(gallery, tmp_path):
    (tmp_path / "s").mkdir()
    for n in range(3):
        scene = Image.new("RGB", (260, 110), (200, 200, 200 + n))
        for i, coat in enumerate(("red", "blue", "green", "yellow")):
            scene.paste(figure(coat, "black"), (10 + 60 * i, 8))
        scene.save(tmp_path / "s" / f"{n}.png")
    report = index(gallery, tmp_path / "s")
    assert (
        len(report.warnings) == 1 and "3 of 3 pictures look like full scenes" in report.warnings[0]
    )
    boxes = [[10 + 60 * i, 8, 58 + 60 * i, 104] for i in range(4)]
    (tmp_path / "b.csv").write_text(
        "path,x0,y0,x1,y1,track\n"
        + "".join(
            f"s/{n}.png,{','.join(map(str, b))},{n * 10 + i}\n"
            for n in range(3)
            for i, b in enumerate(boxes)
        )
        + "s/2.png,900,0,950,90,99\n"
    )
    model = ColourModel()
    report = index(gallery, tmp_path / "s", model, boxes=tmp_path / "b.csv")
    assert (report.people, report.changed, report.warnings, len(report.skipped)) == (
        12,
        3,
        [],
        1,
    ) and "outside" in report.skipped[0][1]
    assert [r["track"] for r in rows(gallery, "track")] == [
        0,
        1,
        2,
        3,
        10,
        11,
        12,
        13,
        20,
        21,
        22,
        23,
    ]
    found = Snapshot.open(gallery)
    assert (found.features @ model.encode_text(["green coat black trousers"])[0]).argmax() in (
        2,
        6,
        10,
    )
    model.seen = 0
    report = index(gallery, tmp_path / "s", model, boxes=tmp_path / "b.csv")
    assert (
        model.seen == 0 and report.unchanged == 3 and len(report.skipped) == 1
    )  # remembered, not cut again
    (tmp_path / "b.csv").write_text(
        "path,x0,y0,x1,y1,track\ns/0.png,10,8,58,104,5\ns/1.png,70,8,118,104,6\ns/2.png,70,8,118,104,7\n"
    )
    report = index(gallery, tmp_path / "s", model, boxes=tmp_path / "b.csv")
    assert report.people == 3 and report.changed == 3

    calls = []

    def finder(picture):
        calls.append(picture.size)
        return boxes[:2] if len(calls) != 2 else []

    report = index(tmp_path / "d", tmp_path / "s", model, detector=finder)
    assert (report.people, len(calls)) == (4, 3) and report.skipped[0][1] == "no person found in it"
    report = index(tmp_path / "d", tmp_path / "s", model, detector=finder)
    assert len(calls) == 3 and report.unchanged == 3 and len(report.skipped) == 1

    def other(picture):
        return boxes

    assert index(tmp_path / "d", tmp_path / "s", model, detector=other).people == 12


def test_bad_files_are_listed_and_skipped(shelf, gallery):
    for i in range(300):
        (shelf / "c1" / f"bad{i}.jpg").write_bytes(
            b"" if i % 3 == 0 else b"\xff\xd8\xff\xe0 torn" if i % 3 == 1 else bytes(range(256))
        )
    report = index(gallery, shelf)
    assert (
        report.people == 36
        and len(report.skipped) == 300
        and len(read_skipped(gallery / "g000001")) == 300
    )
    assert "300 skipped, such as" in "\n".join(report.lines())
    assert index(gallery, shelf).people == 36


@pytest.mark.full
def test_ten_thousand_bad_files(shelf, gallery):
    for i in range(10_000):
        (shelf / "c1" / f"bad{i}.jpg").write_bytes(b"" if i % 2 else b"\xff\xd8\xff\xe0 torn")
    start = time.monotonic()
    report = index(gallery, shelf)
    assert report.people == 36 and len(report.skipped) == 10_000 and time.monotonic() - start < 60


def test_nothing_usable_leaves_the_gallery_alone(shelf, gallery, tmp_path):
    index(gallery, shelf)
    before = (gallery / "gallery.json").read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"junk")
    with pytest.raises(TiprError, match="none of 1 pictures could be used"):
        index(gallery, tmp_path / "bad")
    assert (gallery / "gallery.json").read_bytes() == before and index(
        gallery, shelf
    ).unchanged == 36


def test_odd_names(gallery, tmp_path):
    odd = [
        b"caf\xe9.png",
        b"new\nline.png",
        b"\xff\xfe.png",
        "漢字.png".encode(),
        b"tab\t.png",
        b" .png",
    ]
    (tmp_path / "o").mkdir()
    for i, name in enumerate(odd):
        figure(["red", "blue", "green", "white", "black", "yellow"][i], "red").save(
            os.fsdecode(os.fsencode(tmp_path / "o") + b"/" + name)
        )
    index(gallery, tmp_path / "o")
    assert {os.path.basename(r["file"]) for r in rows(gallery, "file")} == set(odd)
    assert "caf\\xe9.png" in [r["path"] for r in rows(gallery, "path")]
    assert index(gallery, tmp_path / "o").unchanged == 6


def test_most_photos_gone_is_a_warning(shelf, gallery):
    index(gallery, shelf)
    for p in sorted(shelf.rglob("*.png"))[:30]:
        p.unlink()
    report = index(gallery, shelf)
    assert report.removed == 30 and "disk was not mounted" in report.warnings[0]


def test_another_model_is_refused(shelf, gallery):
    class Other(ColourModel):
        fingerprint = "other"

    index(gallery, shelf)
    with pytest.raises(TiprError, match="made by another model"):
        index(gallery, shelf, Other())
    assert (
        index(gallery, shelf, Other(), rebuild=True).new == 36
        and read_manifest(gallery)["fingerprint"] == "other"
    )


def test_a_model_that_fails_loses_nothing(shelf, gallery):
    class Fails(ColourModel):
        def encode_image(self, pictures):
            if self.seen >= 16:
                raise RuntimeError("out of memory")
            return super().encode_image(pictures)

    with pytest.raises(RuntimeError):
        index(gallery, shelf, Fails(), checkpoint=0.0)
    with pytest.raises(TiprError, match="was not finished"):
        read_manifest(gallery)
    model = ColourModel()
    report = index(gallery, shelf, model)
    assert report.resumed == 16 and model.seen == 20 and report.people == 36

    class Nonsense(ColourModel):
        def encode_image(self, pictures):
            return super().encode_image(pictures) * np.nan

    with pytest.raises(TiprError, match="no usable features"):
        index(gallery.parent / "g2", shelf, Nonsense())


def test_foreign_folders_are_refused(shelf, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(TiprError, match="holds other files"):
        index(tmp_path / "mine", shelf)
    with pytest.raises(TiprError, match="holds other files"):
        index(shelf, shelf)
    with pytest.raises(TiprError, match="a file, not a folder"):
        index(tmp_path / "mine" / "thesis.txt", shelf)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.txt"]


def test_one_indexer_at_a_time(shelf, gallery):
    with indexing_lock(gallery):
        with pytest.raises(TiprError, match="another process is indexing"):
            index(gallery, shelf)
    held = threading.Event()

    def hold():
        with indexing_lock(gallery):
            held.set()
            time.sleep(0.4)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert index(gallery, shelf, wait=20).people == 36  # waits when asked to
    other.join()


@pytest.mark.parametrize("damage", ["gallery.json", "features.npy", "items.parquet", "gone"])
def test_damaged_galleries_say_so_and_are_made_anew(shelf, gallery, damage):
    index(gallery, shelf)
    path = gallery / damage if damage == "gallery.json" else gallery / "g000001" / damage
    if damage == "gone":
        shutil.rmtree(gallery / "g000001")
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TiprError) as e:
        Snapshot.open(gallery)
    assert "\n" not in str(e.value) and "tipr index" in str(e.value)
    report = index(gallery, shelf)
    assert (
        report.people == 36
        and "damaged" in report.warnings[0]
        and len(Snapshot.open(gallery).items) == 36
    )
    assert sorted(p.name for p in gallery.iterdir() if p.is_dir()) == [
        read_manifest(gallery)["generation"]
    ]


def test_a_newer_format_is_left_alone(shelf, gallery):
    index(gallery, shelf)
    facts = json.loads((gallery / "gallery.json").read_text()) | dict(format=99)
    (gallery / "gallery.json").write_text(json.dumps(facts))
    with pytest.raises(TiprError, match="format 99"):
        index(gallery, shelf)


def test_a_full_disk_is_one_line(shelf, gallery, monkeypatch):
    index(gallery, shelf)
    figure("white", "white").save(shelf / "new.png")
    import tipr_nb.search.indexing as module

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_features", full)
    with pytest.raises(TiprError, match="no space left"):
        index(gallery, shelf)
    monkeypatch.undo()
    assert len(Snapshot.open(gallery).items) == 36
    model = ColourModel()
    assert (
        index(gallery, shelf, model).people == 37 and model.seen == 0
    )  # the journal kept the new one


CHILD = textwrap.dedent("""
    import sys
    from tipr_nb.search import ColourModel, index_photos
    from tipr_nb.search import find_photos
    photos = find_photos(sys.argv[1], pattern=r"(?P<camera>c\\d)/")
    print("ready", flush=True)
    index_photos(sys.argv[2], photos, ColourModel(delay=float(sys.argv[3])), batch_size=4, checkpoint=0., text_tower=False)
    print("done", flush=True)
""")


def killed_until_done(shelf, gallery, tmp_path, kills, delay, seed):
    (tmp_path / "child.py").write_text(CHILD)
    r, left = random.Random(seed), kills
    while True:
        child = subprocess.Popen(
            [sys.executable, str(tmp_path / "child.py"), str(shelf), str(gallery), str(delay)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout.readline() == "ready\n"
        if left:
            left -= 1
            try:
                child.wait(timeout=r.random() * 0.5)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
            child.communicate()
            if (gallery / "gallery.json").exists():
                assert len(Snapshot.open(gallery).items) in (36, 72, 108)  # whole or not there
            continue
        out, err = child.communicate()
        assert out == "done\n", err
        return


def same_galleries(a, b):
    a, b = Snapshot.open(a), Snapshot.open(b)
    assert (a.features == b.features).all() and a.items.table().equals(b.items.table())
    assert {k: v for k, v in a.manifest.items() if k not in ("id", "updated", "generation")} == {
        k: v for k, v in b.manifest.items() if k not in ("id", "updated", "generation")
    }


def test_killed_and_resumed_is_the_same_gallery(shelf, gallery, tmp_path):
    killed_until_done(shelf, gallery, tmp_path, kills=4, delay=0.01, seed=0)
    index(tmp_path / "calm", shelf, batch_size=4, pattern=PATTERN)
    same_galleries(gallery, tmp_path / "calm")
    assert (
        sorted(p.name for p in gallery.iterdir())
        == sorted(p.name for p in (tmp_path / "calm").iterdir())
        or read_manifest(gallery)["generation"] != "g000001"
    )


STEPS = [
    "Indexer.encode",
    "Indexer.write",
    "write_skipped",
    "sync_folder",
    "build_engine",
    "write_manifest",
    "drop_engines",
    "sweep",
]


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_at_every_step(shelf, gallery, step, monkeypatch):
    import tipr_nb.search.indexing as module

    index(gallery, shelf, engines={"ivf": {}})
    owner, name = (module.Indexer, step.split(".")[1]) if "." in step else (module, step)
    real = getattr(owner, name)
    for before in (True, False):
        new = figure("white", "white").resize((40, 90 + before))  # each time there is work to do
        new.save(shelf / "c1" / f"new-{before}.png")

        def stop(*args, **kwargs):
            if not before:
                real(*args, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            index(gallery, shelf)
        monkeypatch.setattr(owner, name, real)
        assert len(Snapshot.open(gallery).items) in (36, 37, 38)
    assert index(gallery, shelf).people == 38
    facts = read_manifest(gallery)
    assert (
        sorted(p.name for p in gallery.iterdir()) == [".lock", facts["generation"], "gallery.json"]
        and (gallery / facts["generation"] / "index-ivf.faiss").exists()
    )


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_killed_often_while_photos_come_and_go(tmp_path, seed):
    shelf, gallery = archive(tmp_path / "p", 3), tmp_path / "g"
    killed_until_done(shelf, gallery, tmp_path, kills=8, delay=0.004, seed=seed)
    for p in sorted(shelf.rglob("*.png"))[seed::3]:
        p.unlink()
    archive(shelf, 3)
    shutil.copy(sorted(shelf.rglob("*.png"))[5], shelf / "c1" / "copy.png")
    killed_until_done(shelf, gallery, tmp_path, kills=0, delay=0, seed=seed)
    index(tmp_path / "calm", shelf, batch_size=4, pattern=PATTERN)
    a, b = Snapshot.open(gallery), Snapshot.open(tmp_path / "calm")
    assert np.allclose(a.features, b.features, atol=1e-6)
    columns = [c for c in b.items.file.schema_arrow.names if c != "mtime"]
    assert a.items.table(columns).equals(b.items.table(columns))


def test_two_processes_at_once(shelf, gallery, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    first = subprocess.Popen(
        [sys.executable, str(tmp_path / "child.py"), str(shelf), str(gallery), ".05"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "ready\n"
    while not (gallery / ".work").exists():
        time.sleep(0.01)
    with pytest.raises(TiprError, match="another process is indexing"):
        index(gallery, shelf)
    first.send_signal(signal.SIGKILL)  # the system frees the lock of a dead process
    first.communicate()
    assert index(gallery, shelf).people == 36


def test_journal_of_another_model_is_forgotten(tmp_path):
    Journal(tmp_path, dict(model="a")).write(
        [dict(file=b"x", feature=0, at=0)], np.ones((1, 4), np.float32)
    )
    assert Journal(tmp_path, dict(model="a")).n == 1
    (tmp_path / ".work" / "000001.npy").write_bytes(
        b"half"
    )  # killed between the two files of an entry
    assert Journal(tmp_path, dict(model="a")).n == 1
    assert Journal(tmp_path, dict(model="b")).n == 0 and Journal(tmp_path, dict(model="a")).n == 0


def test_decoding_overlaps_with_encoding(tmp_path, monkeypatch):
    shelf = archive(tmp_path / "p")
    import tipr_nb.search.detectors as module

    slow = module.decode_picture

    def sleepy(*args, **kwargs):
        time.sleep(0.02)
        return slow(*args, **kwargs)

    monkeypatch.setattr(module, "decode_picture", sleepy)
    start = time.monotonic()
    index(tmp_path / "g", shelf, ColourModel(delay=0.02), workers=2)
    took = time.monotonic() - start
    assert took < 36 * 0.02 + 36 * 0.02 / 2 + 0.35  # far less than one after the other (1.44 s)


def test_engines_are_kept_up_to_date(shelf, gallery):
    index(gallery, shelf, engines={"ivf": dict(quantise="fp16"), "milvus": {}})
    assert read_manifest(gallery)["engine"] == "ivf"
    figure("white", "white").resize((40, 90)).save(shelf / "c1" / "new.png")
    index(gallery, shelf)
    facts = read_manifest(gallery)
    assert (
        set(facts["engines"]) == {"ivf", "milvus"}
        and facts["count"] == 37
        and (gallery / facts["generation"] / "index-ivf.faiss").exists()
    )
    with pytest.raises(TiprError, match="choose exact"):
        index(gallery, shelf, engines={"annoy": {}})
    assert read_manifest(gallery)["generation"] == facts["generation"]


@pytest.mark.parametrize(
    "name", ["key.json", "000000.parquet", "000000.npy", "000001.npy", ".work"]
)
@pytest.mark.parametrize("how", ["cut", "flipped", "folder"])
def test_a_damaged_journal_never_blocks(shelf, gallery, name, how, tmp_path):
    class Fails(ColourModel):
        def encode_image(self, pictures):
            if self.seen >= 24:
                raise RuntimeError("out of memory")
            return super().encode_image(pictures)

    with pytest.raises(RuntimeError):
        index(gallery, shelf, Fails(), checkpoint=0.0)
    path = gallery / name if name == ".work" else gallery / ".work" / name
    data = path.read_bytes() if path.is_file() else b"x"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            data[:-20]
            if how == "cut"
            else data[:-3] + bytes([data[-3] ^ 1 if len(data) > 2 else 0]) + data[-2:]
        )
    model = ColourModel()
    assert index(gallery, shelf, model).people == 36
    index(tmp_path / "calm", shelf)
    same_galleries(gallery, tmp_path / "calm")


@pytest.mark.parametrize(
    "name", ["gallery.json", "features.npy", "items.parquet", "skipped.parquet"]
)
@pytest.mark.parametrize("how", ["flipped", "noise", "empty", "folder"])
def test_damaged_files_never_block_indexing(shelf, gallery, name, how):
    (shelf / "c1" / "broken.png").write_bytes(b"no picture")
    index(gallery, shelf)
    path = gallery / name if name == "gallery.json" else gallery / "g000001" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(dict(flipped=bytes(data), noise=b"\x00\xff" * 300, empty=b"")[how])
    if how == "folder" and name == "gallery.json":
        with pytest.raises(TiprError):
            index(gallery, shelf)
        return
    if name in ("features.npy", "items.parquet"):
        with pytest.raises(TiprError, match="tipr index") as e:
            Snapshot.open(gallery)
        assert "\n" not in str(e.value)
    assert index(gallery, shelf).people == 36 and Snapshot.open(gallery).features.shape == (36, 16)
    assert index(gallery, shelf, rebuild=True).people == 36


def test_files_are_private(shelf, gallery):
    old = os.umask(0o022)
    (
        gallery.parent / "own"
    ).mkdir()  # a folder of the user's keeps its rights, what we put into it is private
    try:
        for folder in (gallery, gallery.parent / "own"):
            index(folder, shelf)
    finally:
        os.umask(old)
    assert gallery.stat().st_mode & 0o077 == 0
    for folder in (gallery, gallery.parent / "own"):
        for part in (folder / "g000001", folder / "gallery.json"):
            assert part.stat().st_mode & 0o077 == 0


def test_a_moved_folder_is_known_by_its_content(shelf, gallery, tmp_path):
    (tmp_path / "empty").mkdir()
    calls = []

    def finder(picture):
        calls.append(1)
        return [] if len(calls) == 3 else [(4, 4, 40, 90), (2, 2, 44, 94)]

    model = ColourModel()
    index(gallery, shelf, model, detector=finder)
    before = Snapshot.open(gallery).features.copy()
    shelf.rename(tmp_path / "elsewhere")
    for p in (tmp_path / "elsewhere").rglob("*.png"):
        os.utime(p)
    model.seen = 0
    report = index(gallery, tmp_path / "elsewhere", model, detector=finder)
    assert (
        len(calls) == 36
        and model.seen == 0
        and report.moved == 36
        and report.people == 70
        and len(report.skipped) == 1
    )
    assert (Snapshot.open(gallery).features == before).all() and {
        r["root"] for r in rows(gallery, "root")
    } == {str(tmp_path / "elsewhere")}


def test_when_a_picture_was_taken_can_be_told(shelf, gallery, tmp_path):
    first = sorted(shelf.rglob("*.png"))[0].relative_to(shelf)
    (tmp_path / "t.csv").write_text(f"path,taken\n{first},2024-05-01 10:30:00\n")
    index(gallery, shelf, metadata=tmp_path / "t.csv")
    table = rows(gallery, "path", "taken")
    assert (
        str(table[0]["taken"]) == "2024-05-01 10:30:00"
        and table[1]["taken"] is None
        and "taken_" not in Snapshot.open(gallery).items.names
    )
