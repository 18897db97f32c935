"""The demo: its page, its numbers, and that it goes on after a kill."""

import html.parser, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from tipr_nb import demo
from tipr_nb.core import TiprError, read_json

TINY = dict(
    n_ids=(40, 8, 25),
    changes=dict(
        epochs=2, batch_size=16, arch="tipr-nano", pretrained=None, precision="no", lr=2e-3
    ),
    picture_people=10,
    queries=4,
    depth=6,
    quick=True,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    old, os.environ["TIPR_CACHE"] = os.environ.get("TIPR_CACHE"), str(folder / "cache")
    said = []
    page = demo.run_demo(folder / "out", demo.DemoPlan(**TINY), said.append)
    yield folder / "out", page.read_text(encoding="utf-8"), said
    if old is None:
        del os.environ["TIPR_CACHE"]
    else:
        os.environ["TIPR_CACHE"] = old


class Reader(html.parser.HTMLParser):
    "Collects tags and looks whether they close."

    VOID = {"meta", "link", "img", "br", "path", "use", "rect", "image"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def test_page_is_whole_and_alone(made):
    _, page, _ = made
    reader = Reader()
    reader.feed(page)
    assert not reader.open and page.startswith("<!doctype html>")
    for tag, attrs in reader.seen:
        assert tag != "script"
        for name in ("src", "href", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), attrs[name][:80]
        if tag == "img":
            assert attrs["alt"] and attrs["width"] and attrs["height"]
    assert (
        not re.search(r"url\(\s*['\"]?http|@import", page)
        and "prefers-color-scheme: dark" in page
        and 'name="viewport"' in page
    )
    assert len(page) < 3e6


def test_page_shows_what_was_measured(made):
    out, page, _ = made
    numbers = read_json(out / "metrics.json")
    text = page.replace("&nbsp;", " ")
    for k in ("r1", "r5", "r10", "mAP", "mINP"):
        low, high = numbers["test"]["intervals"][k]
        assert (
            f">{numbers['test'][k]:.1f}<small>" in text
            and f"{low:.1f} to {high:.1f}" in text
            and low <= numbers["test"][k] <= high
        )
    assert (
        page.count('<article class="query">') == 4
        and page.count('class="shot hit') + page.count('class="shot miss') == 2 * 4 * 6
        and page.count(">generated<") == 4
    )
    assert "quick" in page and f"seed {0}" in page


def test_numbers(made):
    out, _, _ = made
    m = read_json(out / "metrics.json")
    assert {"r1", "r5", "r10", "mAP", "mINP", "chance_r1", "intervals"} <= set(m["test"])
    assert {
        "test",
        "val",
        "breakdowns",
        "pictures",
        "recipe",
        "recipe_hash",
        "seed",
        "seconds",
        "peak_memory_mib",
        "versions",
        "command",
        "splits",
    } <= set(m)
    assert (
        m["quick"] is True
        and set(m["breakdowns"]["kind"]) == {"complete", "incomplete"}
        and m["splits"]["test"]["identities"] == 25
    )
    assert sum(v for k, v in m["seconds"].items() if k != "total") == pytest.approx(
        m["seconds"]["total"], abs=0.051 * len(m["seconds"])
    )  # each is rounded to a tenth


def test_ranking_agrees_with_evaluation(made):
    from tipr_nb.models import PersonCLIP
    from tipr_nb.evaluation import encode_split, evaluate

    out, _, _ = made
    data = demo.demo_data(demo.DemoPlan(**TINY))
    features = encode_split(
        PersonCLIP.from_pretrained(str(next(out.glob("tal-tiny-*/best")))), data.test
    )
    m = evaluate(None, data.test, features=features)
    for q in range(0, len(data.test), 7):
        order, hits, rank = demo.top_pictures(features, data.test, q, 5)
        assert rank == pytest.approx(m.per_query["rank"].iloc[q]) and len(order) == 5
        assert all(
            data.test.image_columns["gallery"][order] == data.test.caption_columns["gallery"][q]
        )


def test_queries_are_drawn_evenly_and_again_the_same(made):
    data = demo.demo_data(demo.DemoPlan(**TINY))
    a = demo.draw_queries(data.test, 10, seed=3)
    assert a == demo.draw_queries(data.test, 10, seed=3) != demo.draw_queries(data.test, 10, seed=4)
    kinds = data.test.caption_columns["kind"][a]
    assert (
        len(set(data.test.caption_ids[a])) == 10
        and (kinds == "complete").sum() == (kinds == "incomplete").sum() == 5
    )
    assert len(demo.draw_queries(data.test, 1000)) == data.test.n_ids


def test_again_trains_nothing(made):
    out, page, _ = made
    before = read_json(out / "metrics.json")
    state = [p.stat().st_mtime_ns for p in sorted(out.glob("tal-tiny-*/best/*"))]
    demo.run_demo(out, demo.DemoPlan(**TINY), lambda line: None)
    after = read_json(out / "metrics.json")
    assert (
        after["test"] == before["test"]
        and after["train_seconds"] == before["train_seconds"]
        and after["pictures"] == before["pictures"]
    )
    assert state == [p.stat().st_mtime_ns for p in sorted(out.glob("tal-tiny-*/best/*"))]


def test_other_plan_in_the_same_folder(made):
    out, _, _ = made
    demo.run_demo(
        out,
        demo.DemoPlan(**TINY | dict(changes=TINY["changes"] | dict(epochs=1))),
        lambda line: None,
    )
    assert len(list(out.glob("tal-tiny-*"))) == 2


def test_only_whole_demos_are_kept(made, tmp_path):
    out, _, _ = made
    with pytest.raises(TiprError, match="quick"):
        demo.keep_results(out, tmp_path)
    with pytest.raises(TiprError, match="tipr demo"):
        demo.keep_results(tmp_path / "none", tmp_path)
    assert not list(tmp_path.iterdir())


def test_log_of_a_broken_file(tmp_path):
    (tmp_path / "diary.json").write_text('{"key": "a", "seco')
    log = demo.StageLog(tmp_path / "diary.json", "a")
    with log.stage("x", "after a broken file"):
        pass
    assert set(read_json(tmp_path / "diary.json")["seconds"]) == {"x"}


def test_nothing_is_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build_page", lambda *a: 1 / 0)
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ZeroDivisionError):
        demo.run_demo(
            tmp_path / "out",
            demo.DemoPlan(**TINY | dict(changes=TINY["changes"] | dict(epochs=1))),
            lambda line: None,
        )
    assert (
        not (tmp_path / "out" / "index.html").exists()
        and not (tmp_path / "out" / "metrics.json").exists()
    )


@pytest.mark.full
def test_killed_demo_goes_on(tmp_path):
    "kill -9 at several moments, then the same call: the numbers of an undisturbed run."
    code = f"import sys; from tipr_nb.demo import *; p = dict({TINY!r}); p['changes'] = p['changes'] | dict(epochs=30); run_demo(sys.argv[1], DemoPlan(**p))"
    env = os.environ | {"TIPR_CACHE": str(tmp_path / "cache")}
    start = lambda out: subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path / out)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    with start("whole") as p:
        assert p.wait(timeout=600) == 0
    for sign in ("[1/5]", "epoch 3 of", "epoch 17 of", "[3/5]", "[4/5]", "[5/5]"):
        with start("killed") as p:
            for line in p.stdout:
                if sign in line:
                    break
            os.kill(p.pid, signal.SIGKILL)
            p.wait()
    with start("killed") as p:
        assert p.wait(timeout=600) == 0
    a, b = (
        read_json(tmp_path / "whole" / "metrics.json"),
        read_json(tmp_path / "killed" / "metrics.json"),
    )
    assert a["test"] == b["test"] and a["pictures"] == b["pictures"]


@pytest.mark.parametrize("busy, wanted", [(20.0, 2), (50.0, 1), (98.0, 1)])
def test_threads_give_way_to_other_work(monkeypatch, busy, wanted):
    import psutil, torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with demo.few_threads():
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == before


def test_what_it_will_take_is_measured(tmp_path, monkeypatch):
    "Twice the epochs, twice the training; nothing of it stays in the folder or in the random numbers."
    import torch

    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    plan = demo.DemoPlan(**TINY)
    data, state = demo.demo_data(plan), torch.random.get_rng_state()
    monkeypatch.setattr(demo, "step_seconds", lambda recipe, data, n=2: (0.5, 10 * recipe.epochs))
    few, many = (
        demo.expected_seconds(p, data)
        for p in (plan, demo.DemoPlan(**TINY | dict(changes=TINY["changes"] | dict(epochs=4))))
    )
    assert (
        set(few) == {"training", "test", "pictures"} <= set(demo.DEMO_STAGES)
        and 10 < few["training"] < 13
        and 20 < many["training"] < 25
    )
    line = demo.expectation(dict(a=300.0, b=240.0))
    assert line.startswith("about 9 minutes") and "(a: 300 s)" in line
    monkeypatch.undo()
    from tipr_nb.training import get_recipe

    seconds, n = demo.step_seconds(get_recipe(plan.recipe).replace(**plan.changes), data)
    assert (
        0 < seconds < 60
        and n == 2 * (len(data.train) // 16)
        and torch.equal(torch.random.get_rng_state(), state)
    )


def test_the_same_model_is_asked_with_and_without_a_picture(made):
    "Same sentences, same gallery; each difference is paired and has its interval."
    out, _, _ = made
    page = (out / "index.html").read_text(
        encoding="utf-8"
    )  # as it is now: another test runs another plan in this folder
    m = read_json(out / "metrics.json")["pictures"]
    ways, gains = m["ways"], m["against_sentence_alone"]
    assert list(ways) == [demo.ALONE, demo.WITH, demo.SHUFFLED] and list(gains) == [
        demo.WITH,
        demo.SHUFFLED,
    ]
    assert len({w["n_queries"] for w in ways.values()}) == 1
    row = next(r for r in gains[demo.WITH]["rows"] if r["metric"] == "mAP")
    assert (
        row["difference"]
        == pytest.approx(ways[demo.WITH]["mAP"] - ways[demo.ALONE]["mAP"], abs=1e-6)
        and row["lo"] <= row["difference"] <= row["hi"]
    )
    shown = [
        tuple(map(float, m))
        for m in re.findall(r"([+-]\d+\.\d\d) \[([+-]\d+\.\d\d), ([+-]\d+\.\d\d)\]", page)
    ]
    stored = (
        row["difference"],
        row["lo"],
        row["hi"],
    )  # rounded once in the file and once on the page
    assert any(s == pytest.approx(stored, abs=0.011) for s in shown) and "shuffled picture" in page


@pytest.mark.parametrize(
    "lo, hi, words",
    [(0.1, 0.9, "helps"), (-0.9, -0.1, "harms"), (-0.1, 0.4, "no difference can be told")],
)
def test_the_verdict_follows_the_interval(lo, hi, words):
    import pandas as pd
    from types import SimpleNamespace

    gain = SimpleNamespace(
        table=pd.DataFrame([dict(difference=(lo + hi) / 2, lo=lo, hi=hi)], index=["mAP"]), n_ids=40
    )
    assert words in demo.verdict(gain) and f"{lo:+.2f} to {hi:+.2f}" in demo.verdict(gain)


def test_nobody_keeps_their_own_picture():
    for n in (2, 3, 50):
        assert (demo.shuffled(n) != np.arange(n)).all() and sorted(demo.shuffled(n)) == list(
            range(n)
        )
