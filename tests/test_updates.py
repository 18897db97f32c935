"Bringing a gallery up to date where nothing, or one thing, has changed."

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gallery_pictures import archive, figure
from tipr_nb.search import ColourModel, Snapshot, find_photos, index_photos, read_manifest

PATTERN = r"(?P<camera>c\d)/"


@pytest.fixture
def photos(tmp_path):
    folder = archive(tmp_path / "p")
    (folder / "c1" / "torn.png").write_bytes(b"no picture")
    (folder / "c1" / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture
def gallery(tmp_path):
    return tmp_path / "g"


def index(gallery, photos, model=None, pattern=PATTERN, metadata=None, boxes=None, **settings):
    found = find_photos(photos, pattern=pattern, metadata=metadata, boxes=boxes)
    settings = dict(text_tower=False) | settings
    return index_photos(gallery, found, model or ColourModel(), **settings)


def files(gallery: Path) -> dict:
    "Every file with its content and when it was written."
    found = [p for p in gallery.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in found}


def detector(picture):
    return [(0, 0, 20, 60), (10, 20, 40, 90)]


@pytest.mark.parametrize(
    "settings", [{}, dict(engines={"ivf": {}}), dict(detector=detector), dict(pattern=None)]
)
def test_nothing_to_do_writes_nothing(photos, gallery, settings):
    first = index(gallery, photos, **settings)
    before = files(gallery)
    model = ColourModel()
    again = index(gallery, photos, model, **settings)
    assert files(gallery) == before and model.seen == 0
    same = ("people", "photos", "duplicates", "skipped", "warnings")
    assert {k: getattr(again, k) for k in same} == {k: getattr(first, k) for k in same}
    assert (again.new, again.changed, again.removed, again.unchanged) == (0, 0, 0, 36)


def touched(photos):
    os.utime(photos / "c1" / "torn.png", ns=(1, 1))


def emptied(photos):
    (photos / "c1" / "torn.png").write_bytes(b"")


def mended(photos):
    figure("white", "red").save(photos / "c1" / "torn.png")


def gone(photos):
    sorted(photos.rglob("*-*.png"))[-1].unlink()


def first_gone(photos):
    sorted(photos.rglob("*-*.png"))[0].unlink()


def no_longer_torn(photos):
    (photos / "c1" / "torn.png").unlink()


def one_more(photos):
    figure("white", "red").save(photos / "zzz.png")


@pytest.mark.parametrize(
    "change", [touched, emptied, mended, gone, first_gone, no_longer_torn, one_more]
)
def test_one_difference_is_seen(photos, gallery, tmp_path, change):
    index(gallery, photos)
    change(photos)
    index(gallery, photos)
    index(tmp_path / "calm", photos)
    a, b = Snapshot.open(gallery), Snapshot.open(tmp_path / "calm")
    assert a.folder.name == "g000002" and (a.features == b.features).all()
    assert a.items.table().equals(b.items.table()) and a.skipped == b.skipped


def test_tables_are_compared(photos, gallery, tmp_path):
    names = [p.name for p in find_photos(photos)]
    table = pd.DataFrame(dict(path=names, floor=range(len(names))))
    index(gallery, photos, metadata=table)
    before = files(gallery)
    index(gallery, photos, metadata=table)
    assert files(gallery) == before
    table.loc[3, "floor"] = 99
    model = ColourModel()
    index(gallery, photos, model, metadata=table)
    assert (
        model.seen == 0 and 99 in Snapshot.open(gallery).items.table(["floor"])["floor"].to_pylist()
    )


def test_boxes_are_compared(photos, gallery):
    names = [p.name for p in find_photos(photos) for _ in range(2)]
    boxes = pd.DataFrame(dict(path=names, x0=[0, 5] * len(names[::2]), y0=0, x1=30, y1=80))
    boxes["score"] = np.linspace(0, 1, len(names))
    index(gallery, photos, boxes=boxes)
    before = files(gallery)
    report = index(gallery, photos, boxes=boxes)
    assert files(gallery) == before and report.people == 72
    boxes.loc[4, "x0"] = 7
    assert index(gallery, photos, boxes=boxes).changed == 1


def test_a_damaged_index_is_made_anew(photos, gallery):
    index(gallery, photos, engines={"ivf": {}})
    path = gallery / "g000001" / "index-ivf.faiss"
    path.write_bytes(b"\0" * path.stat().st_size)
    index(gallery, photos)
    assert read_manifest(gallery)["generation"] == "g000002"
    assert len(Snapshot.open(gallery).features) == 36


def test_what_only_the_manifest_says(photos, gallery):
    index(gallery, photos, engines={"exact": {}, "flat": {}})
    before = files(gallery)
    index(gallery, photos, source="elsewhere", default="flat", made=[])
    after = files(gallery)
    manifest = read_manifest(gallery)
    assert (manifest["model"], manifest["engine"], manifest["made"]) == ("elsewhere", "flat", [])
    assert {p for p in after if after[p] != before.get(p)} == {gallery / "gallery.json"}
