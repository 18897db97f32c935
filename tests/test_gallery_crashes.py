"""A gallery is one snapshot: an indexing stopped before any change of the file system leaves the old gallery or the new one, and the next run cures it."""
import os, shutil
from pathlib import Path

import numpy as np
import pytest

from gallery_stops import Killed, stopped_after
from gallery_pictures import figure
from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, find_photos, index_photos, read_manifest

COLOURS = ("red", "blue", "green")
SENTENCES = ("a red coat and blue trousers", "a green coat and red trousers", "a blue coat and green trousers")


def pictures(folder: Path) -> Path:
    for a in COLOURS:
        for b in COLOURS:
            (folder/a).mkdir(parents=True, exist_ok=True)
            figure(a, b).save(folder/a/f"{b}.png")
    return folder


class Turned(ColourModel):
    "Another model: features in another order, so that its texts rank the first model's pictures wrongly."
    fingerprint = "colours-turned"
    def unit(self, colours): return super().unit(colours)[:, ::-1].copy()


class Tower:
    "What ONNX would be: a text tower that lies in the gallery and knows its fingerprint."
    models = {m.fingerprint: m for m in (ColourModel(), Turned())}
    def __init__(self, folder, fingerprint=None):
        found = (Path(folder)/"text.onnx").read_text()
        if fingerprint and found != fingerprint: raise TiprError("the text tower is another model's")
        self.model = self.models[found]
    def encode_text(self, texts): return self.model.encode_text(texts)


def export(model, folder, fingerprint=None):
    import json
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder/"tokenizer.json").write_text("{}")
    (folder/"text.onnx").write_text(model.fingerprint)
    (folder/"text.json").write_text(json.dumps(dict(fingerprint=model.fingerprint, n_bytes=len(model.fingerprint))))
    return folder


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    import tipr_nb.search.views, tipr_nb.search.indexing
    monkeypatch.setattr(tipr_nb.search.views, "TextTower", Tower)
    monkeypatch.setattr(tipr_nb.search.indexing, "export_text_tower", export)
    monkeypatch.setattr(os, "fsync", lambda handle: None)     # nothing is lost here by a power failure; a hundred thousand of them take minutes


def ranking(gallery: Gallery) -> list:
    return [[h.name for h in gallery.search(s, k=4)] for s in SENTENCES]


def right(gallery: Gallery):
    "Every sentence finds its person first, by whatever tower and features lie there."
    for s in SENTENCES:
        words = [w for w in s.split() if w in COLOURS]
        hit = gallery.search(s, k=1)[0]
        if hit.name != f"{words[0]}/{words[1]}.png" or hit.score < .999: return False
    return True


def index(folder, photos, model=None, **kwargs):
    return index_photos(folder, find_photos(photos), model or ColourModel(), batch_size=4, checkpoint=0., **kwargs)


def change(photos: Path):
    figure("white", "white", (40, 90)).save(photos/"red"/"new.png")
    (photos/"blue"/"blue.png").unlink()


def first(folder, photos): index(folder, photos)
def update(folder, photos): index(folder, photos)
def rebuild(folder, photos): index(folder, photos, Turned(), rebuild=True)
def with_engine(folder, photos): index(folder, photos, engines={"ivf": dict(nlist=1)})


@pytest.mark.parametrize("run,before", [(first, False), (update, True), (rebuild, True), (with_engine, True)])
def test_stopped_before_every_change(tmp_path, run, before):
    photos = pictures(tmp_path/"p")
    base = tmp_path/"base"
    base.mkdir()
    if before:
        index(base/"g", photos)
        change(photos)
    trial = tmp_path/"t"
    shutil.copytree(base, trial)
    with stopped_after(tmp_path) as counter: run(trial/"g", photos)
    n, after = counter.count, ranking(Gallery(trial/"g"))
    old = ranking(Gallery(base/"g")) if before else None
    assert n > 10
    seen = set()
    for stop in range(n):
        shutil.rmtree(trial)
        shutil.copytree(base, trial)
        opened = Gallery(trial/"g") if before else None       # somebody has the gallery open all the while
        with pytest.raises(Killed), stopped_after(tmp_path, stop): run(trial/"g", photos)
        try: found = ranking(Gallery(trial/"g"))
        except TiprError as e:
            assert not before and "\n" not in str(e), (stop, e)
            found = None
        assert found in ((old, after) if before else (None, after)), stop
        if found is not None: assert right(Gallery(trial/"g")), stop
        if opened is not None:
            assert ranking(opened) in (old, after) and right(opened), stop
        seen.add(str(found))
        run(trial/"g", photos)                                 # the same command again always cures it
        assert ranking(Gallery(trial/"g")) == after and right(Gallery(trial/"g")), stop
        names = sorted(p.name for p in (trial/"g").iterdir())
        manifest = read_manifest(trial/"g")
        assert names == sorted([".lock", manifest["generation"], "gallery.json", manifest["text_tower"]]), (stop, names)
    assert len(seen) == 2        # both sides of the switch were met
