"""Lines whose loss nobody noticed: each of these tests fails when its line is taken out (tried by hand)."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gallery_pictures import archive
from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, Page, Question, open_picture
from tipr_nb.search.app import Answer, _note, facts_table, uploaded_picture

BAD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    home = tmp_path_factory.mktemp("guards")
    return Gallery.build(archive(home/"p"), ColourModel(), home/"g")


# everything that the page says is escaped

def escaped(html: str) -> bool: return "<img" not in html and "&lt;img" in html


def test_facts_escape_names_and_values():
    assert escaped(facts_table({BAD: 1})) and escaped(facts_table({"name": BAD}))


def test_notes_and_advice_are_escaped():
    assert escaped(_note(Answer(note=BAD))) and escaped(_note(Answer(note="fine", advice=[BAD])))
    assert escaped(_note(Answer(note="fine", keys=["a"]), Question("a man" + BAD)).replace("%3Cimg", "&lt;img"))


def test_what_went_wrong_with_a_person_is_escaped(gallery, monkeypatch):
    page = Page(gallery)
    key = page.ask(Question("a red coat", k=1)).keys[0]

    def fails(*args): raise TiprError(BAD)

    with monkeypatch.context() as m:
        m.setattr(page.gallery, "find", fails)
        assert escaped(page.look(key, None)[2])
    monkeypatch.setattr("tipr_nb.search.app.match_map", fails)
    assert escaped(page.look(key, np.ones(16, np.float32)/4)[2])


# pictures within limits

def test_pictures_between_our_limit_and_pillows(tmp_path):
    "A hundred million pixels are refused before they are decoded; Pillow itself would only refuse 179 million."
    path = tmp_path/"big.png"
    Image.new("1", (12_000, 9_000)).save(path)
    with pytest.raises(TiprError, match="more than 100 million"): open_picture(path.read_bytes())
    Image.new("1", (100, 100)).save(path)
    with pytest.raises(TiprError, match="100 x 100 pixels"): open_picture(path.read_bytes(), 9_999)
    assert open_picture(path.read_bytes(), 10_000).size == (100, 100)


def test_uploads_have_narrower_limits(tmp_path):
    path = tmp_path/"up.png"
    Image.new("1", (8_000, 7_000)).save(path)
    with pytest.raises(TiprError, match="your picture: .*more than 50 million"): uploaded_picture(path)
    Image.new("RGB", (20, 40)).save(path)
    assert uploaded_picture(path).size == (20, 40)
    with open(path, "ab") as f: f.truncate(21 << 20)
    with pytest.raises(TiprError, match="your picture: larger than 20 MB"): uploaded_picture(path)


def test_indexing_obeys_its_limit(tmp_path):
    shelf = archive(tmp_path/"p")
    Image.new("RGB", (400, 300)).save(shelf/"wide.png")
    known = Gallery.build(shelf, ColourModel(), tmp_path/"g", max_pixels=100_000)
    skipped = " ".join(known.report.lines())
    assert len(known) == 36 and "wide.png" in skipped + " ".join(map(str, known.report.__dict__.values()))


# a run beside other programs

def test_threads_follow_other_programs_while_a_run_trains(tmp_path, monkeypatch):
    "Two processors: two threads, one while another program is busy, two again when it has gone."
    import psutil, torch
    from tipr_nb.core import machine
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, Callback, train
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 0.)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    clock, free, seen = dict(now=0., idle=0.), [2.], []

    def look(self):
        clock["now"] += 1
        clock["idle"] += free[0]
        self.every = float("-inf")
        return clock["now"], clock["idle"], 0.

    class Watch(Callback):
        def on_step(self, trainer, losses):
            seen.append(torch.get_num_threads())
            free[0] = 1. if 3 <= trainer.step < 8 else 2.

    monkeypatch.setattr(machine.FreeThreads, "look", look)
    data = load_dataset("synth-pedes", make_synth_pedes(tmp_path/"few", n_ids=(24, 6, 5), seed=1, workers=1))
    recipe = RECIPES["clip-tiny"].replace(arch="tipr-nano", pretrained=None, precision="no", batch_size=16, epochs=2, warmup_epochs=1.)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try: train(recipe, data, tmp_path/"run", device="cpu", callbacks=[Watch()], verbose=False)
    finally: torch.set_num_threads(before)
    assert seen[:3] == [2, 2, 2] and seen[3:8] == [1]*5 and set(seen[8:]) == {2}, seen


@pytest.mark.full
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_threads_beside_busy_processes(tmp_path):
    "The same with real ones: as many busy processes as processors start in the middle of a run (full: it needs half a minute and a machine to itself)."
    code = f"""
    import os, subprocess, sys, time, torch
    from tipr_nb.core import machine
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, Callback, train
    busy, seen = [], []
    class Crowd(Callback):
        def on_start(self, trainer): self.began = time.monotonic()
        def on_step(self, trainer, losses):
            for threads in machine._following: threads.every = 1.
            seen.append(torch.get_num_threads())
            if len(seen) == 20: busy.extend(subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count()))
            if time.monotonic() - self.began > 20 and len(seen) > 40: trainer.stop = True
    data = load_dataset("synth-pedes", make_synth_pedes({str(tmp_path/'few')!r}, n_ids=(24, 6, 5), seed=1, workers=1))
    recipe = RECIPES["clip-tiny"].replace(arch="tipr-nano", pretrained=None, batch_size=16, epochs=5000, precision="no")
    try: train(recipe, data, {str(tmp_path/'run')!r}, device="cpu", callbacks=[Crowd()], verbose=False)
    finally:
        for p in busy: p.kill()
    print(os.cpu_count(), min(seen[21:]), seen)
    """
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | dict(PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    processors, fewest = map(int, done.stdout.split()[:2])
    assert fewest < processors, done.stdout


# settings from outside are one line when they are wrong

VALUES = ['"10"', "10.", "true", "null", "[]", "{}", '""', "x", "[1", "[[[[1]]]]", "1e999", "NaN", "9"*5000, "1" + "0"*400, "-1", "[null]", '["a"]', '[["a",3]]', '[["ITC",{"weight":NaN}]]', '[["ITC",{"temperature":"x"}]]',
          '{"erase":"x"}', '[["bias",{"lr_scale":null}]]', '[["bias",[1]]]', "\0", "["*100_000, '{"a":'*5000, '[["",{}]]', '["a:b"]', '[[["ITC"]]]', "[NaN,128]", "[1e20,128]", '[["mask",{"flavour":3}]]', "[0,0]", "=", '"\\ud800"']


def test_wrong_settings_are_one_line():
    "Every setting with every kind of wrong value, in `--set` and in a grid: accepted, or a short line that names it; nothing else is raised."
    import dataclasses, json
    from tipr_nb import cli
    from tipr_nb.training import RECIPES, Recipe, read_grid
    keys = [f.name for f in dataclasses.fields(Recipe)] + ["SDM.weight", "TIR.mask_ratio", "augment.erase", "augment.x", "lr.x", ".", "", "a.b.c"]

    def plain(text):
        try: return json.loads(text)
        except (ValueError, RecursionError): return text

    tried = wrong = 0
    for key in keys:
        for value in VALUES:
            for attempt in (lambda: cli.parse_settings([f"{key}={value}"], RECIPES["sen-tiny"]), lambda: read_grid(dict(rows=[dict(name="a", recipe="sen-tiny", set={key: plain(value)})]))):
                tried += 1
                try: attempt()
                except TiprError as e:
                    wrong += 1
                    assert "\n" not in str(e) and len(str(e)) < 800, (key, value[:40], str(e)[:200])
    for key in ("name", "recipe", "set", "seeds", "dataset", "train_share", "max_seconds", "splits", "by", "evaluate", "hook", "hook_args", "keep", "rows"):
        for value in VALUES:
            try: read_grid(dict(rows=[dict(name="a", recipe="clip-tiny")]) | {key: plain(value)})
            except TiprError as e: assert "\n" not in str(e), (key, value[:40])
    assert wrong > tried/2
