"""Killed before every change of the file system: what training, grids, indexing, rebuilding, generating and rendering leave behind is never wrong, and the same command cures it.

`make test` tries some of the points; all of them, several hundred, take tens of minutes and are marked `full` for that reason alone. How many were tried stands at the end of pytest's report.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from crash_points import count_changes, crashes, kill_after
from gallery_pictures import ByColour, figure, walking
from layouts import NANO
from tipr_nb.core import TiprError, read_json
from tipr_nb.models import Checkpoints, PersonCLIP
from tipr_nb.search import ColourModel, Gallery, find_photos, index_photos, read_manifest
from tipr_nb.training import RECIPES, best_weights, has_best_weights, run_grid, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def some(step: int):
    "Every `step`-th point in the quick tests, all of them in the full ones (with CRASH_EVERY=5 every fifth, where there is less time)."
    return pytest.mark.parametrize(
        "every", [step, pytest.param(int(os.environ.get("CRASH_EVERY", 1)), marks=pytest.mark.full)]
    )


@pytest.fixture
def tried(record_property):
    "Counts crash points for the report at the end."

    def count(job: str, n: int):
        record_property("crash_points", (job, n))

    return count


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    "Nothing is lost here by a power failure, and ten thousand calls of fsync take minutes; `test_core` sees to it that they are made."
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# training


def weights(folder: Path) -> dict:
    return {f.name: load_file(f) for f in sorted(folder.glob("*.safetensors"))}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]) for f in a
    )


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@some(53)
def test_training(people, tmp_path, every, tried):
    recipe = RECIPES["clip-tiny"].replace(
        name="nano", objectives=["SDM", ("CMT", {"log_every": 3})], sampler="identity", **NANO
    )
    home = tmp_path / "home"
    home.mkdir()
    job = lambda: train(recipe, people, home / "run", device="cpu", save_steps=6, verbose=False)
    calm = train(recipe, people, tmp_path / "calm", device="cpu", save_steps=6, verbose=False)
    last, best = weights(Checkpoints(calm.path).newest()), weights(best_weights(calm.path))
    rows = calm.history.drop(columns="seconds")
    points = 0
    for n in crashes(job, home, every):
        points += 1
        newest = Checkpoints(home / "run").newest()
        if newest is not None:
            weights(newest), read_json(newest / "state.json")  # whole, or not there
        if has_best_weights(home / "run"):
            PersonCLIP.from_pretrained(best_weights(home / "run"))
        again = job()
        assert same(weights(Checkpoints(again.path).newest()), last) and same(
            weights(best_weights(again.path)), best
        ), n
        assert (
            again.history.drop(columns="seconds").equals(rows)
            and again.best == calm.best
            and again.status == "done"
        ), n
        assert listing(home / "run") == listing(calm.path), n
    assert points > (100 if every == 1 else 2)
    tried("train", points)


@some(71)
def test_a_grid(people, tmp_path, every, tried):
    "One row is done, another is added."
    home = tmp_path / "home"
    home.mkdir()
    grid = dict(
        seeds=[0],
        set={**NANO, "epochs": 1},
        rows=[dict(name="ITC", recipe="clip-tiny"), dict(name="TAL", recipe="tal-tiny")],
    )

    def job(folder=home):
        return run_grid(grid, folder / "t.csv", dataset=people, device="cpu", verbose=False)

    run_grid(
        dict(grid, rows=grid["rows"][:1]),
        home / "t.csv",
        dataset=people,
        device="cpu",
        verbose=False,
    )
    shutil.copytree(home, tmp_path / "calm")
    timed = ["train_seconds", "eval_seconds", "commit"]
    want = job(tmp_path / "calm").drop(columns=timed)
    breakdown = pd.read_csv(tmp_path / "calm" / "t-by.csv").drop(columns="commit")
    points = 0
    for n in crashes(job, home, every):
        points += 1
        assert set(pd.read_csv(home / "t.csv").row) in ({"ITC"}, {"ITC", "TAL"}), (
            n
        )  # a table is whole
        assert job().drop(columns=timed).equals(want), n
        assert (
            pd.read_csv(home / "t-by.csv")
            .drop(columns="commit")
            .sort_values(["row", "column", "value"])
            .equals(breakdown.sort_values(["row", "column", "value"]))
        ), n
        assert listing(home) == listing(tmp_path / "calm"), n
    assert points > (100 if every == 1 else 1)
    tried("grid", points)


# generating and rendering


@some(9)
def test_generating(tmp_path, every, tried):
    from tipr_nb.generation import PersonGenerator, generate_split, open_pictures, toy_pipeline

    generator = PersonGenerator.from_pretrained(
        toy_pipeline(tmp_path / "toy"), device="cpu", steps=2, guidance=2.0, batch_size=2
    )
    split = SimpleNamespace(
        captions=[
            "a woman in a red coat",
            "a man with a blue backpack",
            "somebody in white trousers",
            "a tall man",
            "a girl in green",
        ]
    )
    home = tmp_path / "home"
    home.mkdir()

    def job(folder=home):
        return generate_split(generator, split, folder / "out", report=lambda line: None)

    job(tmp_path / "calm")
    made = {p.name: p.read_bytes() for p in (tmp_path / "calm").rglob("*.png")}
    assert len(made) == 5
    points = 0
    for n in crashes(job, home, every):
        points += 1
        for p in (home / "out").rglob("*.png"):
            if not any(part.startswith(".") for part in p.relative_to(home).parts):
                assert p.read_bytes() == made[p.name], n
        job()
        pictures = open_pictures(home / "out")
        assert all(pictures.has(c) for c in split.captions), n
        assert {p.name: p.read_bytes() for p in home.rglob("*.png")} == made, n
    assert points > (20 if every == 1 else 2)
    tried("generate", points)


@some(37)
def test_rendering_with_several_workers(tmp_path, every, tried):
    from tipr_nb.synth import make_synth_pedes

    home = tmp_path / "home"
    home.mkdir()

    def job(folder=home):
        return make_synth_pedes(folder / "few", n_ids=(30, 5, 5), seed=2, workers=2)

    calm = job(tmp_path)
    want = {str(p.relative_to(calm)): p.read_bytes() for p in calm.rglob("*") if p.is_file()}
    points = 0
    for n in crashes(job, home, every):
        points += 1
        if (home / "few").exists():
            assert {
                str(p.relative_to(home / "few")): p.read_bytes()
                for p in (home / "few").rglob("*")
                if p.is_file()
            } == want, n
        job()
        assert {
            str(p.relative_to(home / "few")): p.read_bytes()
            for p in (home / "few").rglob("*")
            if p.is_file()
        } == want, n
        assert sorted(p.name for p in home.iterdir()) == [".few.lock", "few"], n
    assert points > (100 if every == 1 else 2)
    tried("synth", points)


# galleries

COLOURS = ("red", "blue", "green")
SENTENCES = (
    "a red coat and blue trousers",
    "a green coat and red trousers",
    "a blue coat and green trousers",
)


def pictures(folder: Path) -> Path:
    for a in COLOURS:
        for b in COLOURS:
            (folder / a).mkdir(parents=True, exist_ok=True)
            figure(a, b).save(folder / a / f"{b}.png")
    return folder


class Turned(ColourModel):
    "Another model: features in another order, so that its texts rank the first model's pictures wrongly."

    fingerprint = "colours-turned"

    def unit(self, colours):
        return super().unit(colours)[:, ::-1].copy()


class Tower:
    "What ONNX would be: a text tower that lies in the gallery and knows its fingerprint."

    models = {m.fingerprint: m for m in (ColourModel(), Turned())}

    def __init__(self, folder, fingerprint=None):
        found = (Path(folder) / "text.onnx").read_text()
        if fingerprint and found != fingerprint:
            raise TiprError("the text tower is another model's")
        self.model = self.models[found]

    def encode_text(self, texts):
        return self.model.encode_text(texts)


def export(model, folder, fingerprint=None):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "text.onnx").write_text(model.fingerprint)
    (folder / "text.json").write_text(
        json.dumps(dict(fingerprint=model.fingerprint, n_bytes=len(model.fingerprint)))
    )
    return folder


@pytest.fixture
def towers(monkeypatch):
    import tipr_nb.search.views, tipr_nb.search.indexing

    monkeypatch.setattr(tipr_nb.search.views, "TextTower", Tower)
    monkeypatch.setattr(tipr_nb.search.indexing, "export_text_tower", export)


def ranking(gallery: Gallery) -> list:
    return [[h.name for h in gallery.search(s, k=4)] for s in SENTENCES]


def right(gallery: Gallery):
    "Every sentence finds its person first, by whatever tower and features lie there."
    for s in SENTENCES:
        words = [w for w in s.split() if w in COLOURS]
        hit = gallery.search(s, k=1)[0]
        if hit.name != f"{words[0]}/{words[1]}.png" or hit.score < 0.999:
            return False
    return True


def index(folder, photos, model=None, **kwargs):
    return index_photos(
        folder, find_photos(photos), model or ColourModel(), batch_size=4, checkpoint=0.0, **kwargs
    )


def change(photos: Path):
    figure("white", "white", (40, 90)).save(photos / "red" / "new.png")
    (photos / "blue" / "blue.png").unlink()


def first(folder, photos):
    index(folder, photos)


def update(folder, photos):
    index(folder, photos)


def rebuild(folder, photos):
    index(folder, photos, Turned(), rebuild=True)


def with_engine(folder, photos):
    index(folder, photos, engines={"ivf": dict(nlist=1)})


@some(7)
@pytest.mark.parametrize(
    "run,before", [(first, False), (update, True), (rebuild, True), (with_engine, True)]
)
def test_a_gallery(tmp_path, towers, run, before, every, tried):
    photos = pictures(tmp_path / "p")
    trial = tmp_path / "t"
    trial.mkdir()
    job = lambda: run(trial / "g", photos)
    if before:
        index(trial / "g", photos)
        change(photos)
    old = ranking(Gallery(trial / "g")) if before else None
    whole = tmp_path / "whole"
    shutil.copytree(trial, whole)
    assert count_changes(lambda: run(whole / "g", photos), whole) > 10
    after = ranking(Gallery(whole / "g"))
    seen, points = set(), 0
    opened = Gallery(trial / "g") if before else None  # somebody has the gallery open all the while
    for n in crashes(job, trial, every):
        points += 1
        try:
            found = ranking(Gallery(trial / "g"))
        except TiprError as e:
            assert not before and "\n" not in str(e), (n, e)
            found = None
        assert found in ((old, after) if before else (None, after)), n
        if found is not None:
            assert right(Gallery(trial / "g")), n
        if opened is not None:
            assert ranking(opened) in (old, after) and right(opened), n
        seen.add(str(found))
        job()  # the same command again always cures it
        assert ranking(Gallery(trial / "g")) == after and right(Gallery(trial / "g")), n
        names = sorted(p.name for p in (trial / "g").iterdir())
        manifest = read_manifest(trial / "g")
        assert names == sorted(
            [".lock", manifest["generation"], "gallery.json", manifest["text_tower"]]
        ), (n, names)
    if every == 1:
        assert len(seen) == 2  # both sides of the switch were met
    tried(run.__name__, points)


# films


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Six seconds of two people who pass each other."
    pytest.importorskip("av", reason="films need the extra `video`")
    from tipr_nb.search.video import write_film

    path = tmp_path_factory.mktemp("films") / "gate_2024-05-01_10-00-00.mp4"
    write_film(path, (walking(i / 5) for i in range(30)), rate=5)
    return path


def from_film(film: Path, folder: Path, delay: float = 0.0) -> Gallery:
    "A gallery of a film's people, made or brought to its end; a checkpoint after every batch."
    options = dict(every="1s", detector=ByColour(delay=delay), batch_size=2, checkpoint=0.0)
    return Gallery.build(film, ColourModel(delay / 10), folder, **options)


def contents(folder: Path) -> tuple:
    "All that a gallery holds, without names of generations and times of day."
    gallery = Gallery(folder, ColourModel())
    hits = gallery.hits(range(len(gallery)), [0.0] * len(gallery))
    rows = [hit.to_dict() for hit in hits]
    frames = sorted(p.name for p in folder.rglob("*.jsonl"))
    count = len(list(folder.iterdir()))
    return rows, gallery.features.tobytes(), gallery.skipped, frames, count, ranking(gallery)


@some(6)
def test_a_film(film, tmp_path, every, tried):
    from_film(film, tmp_path / "calm")
    want = contents(tmp_path / "calm")
    assert len(want[0]) == 12 and want[0][0]["track"]  # two people in each of six frames
    trial = tmp_path / "t"
    trial.mkdir()
    points = 0
    for n in crashes(lambda: from_film(film, trial / "g"), trial, every):
        points += 1
        try:
            found = contents(trial / "g")
        except TiprError as e:
            assert "\n" not in str(e), (n, e)
            found = None
        assert found is None or found[:3] == want[:3], n  # whole, or not there
        from_film(film, trial / "g")
        assert contents(trial / "g") == want, n
    assert points > (20 if every == 1 else 2)
    tried("film", points)


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.full)])
def test_a_film_killed_at_random_moments(film, tmp_path, kills, tried):
    "Killed again and again, each time at another moment, until it comes to its end."
    started = time.perf_counter()
    from_film(film, tmp_path / "calm", delay=0.02)
    took = time.perf_counter() - started
    want = contents(tmp_path / "calm")
    moments = random.Random(kills)
    killed = 0
    round = 0
    while killed < kills:
        round += 1
        folder = tmp_path / f"g{round}"
        for _ in range(3):
            if kill_after(lambda: from_film(film, folder, delay=0.02), moments.uniform(0, took)):
                break
            killed += 1
        from_film(film, folder, delay=0.02)
        assert contents(folder) == want, round
    tried("film, at random moments", killed)
