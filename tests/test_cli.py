"""The `tipr` command: what it prints, how it fails, and that it starts quickly."""

import json, os, random, resource, shutil, signal, socket, subprocess, sys, time

import pytest
import typer
from typer.testing import CliRunner

from tipr_nb import cli
from tipr_nb.cli.data import length_bars
from tipr_nb.core import TiprError

NANO = [
    w
    for kv in (
        "epochs=2",
        "batch_size=16",
        "arch=tipr-nano",
        "pretrained=None",
        "precision=no",
        "lr=0.002",
    )
    for w in ("--set", kv)
]


def busy() -> float:
    "Seconds that finished child processes spent on the processor: unlike the clock, no affair of what else the machine does."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tipr(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words], prog_name="tipr")


def refused(result, *says):
    "Exit code 2, one line on stderr that says all of this, nothing of a traceback."
    assert result.exit_code == 2, result.output
    assert (
        result.stderr.startswith("tipr: ")
        and result.stderr.count("\n") == 1
        and "Traceback" not in result.output
    )
    for text in says:
        assert text in result.stderr
    return result


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    old, os.environ["TIPR_CACHE"] = (
        os.environ.get("TIPR_CACHE"),
        str(tmp_path_factory.mktemp("cache")),
    )
    yield
    if old is None:
        del os.environ["TIPR_CACHE"]
    else:
        os.environ["TIPR_CACHE"] = old


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "A small set of the benchmark's kind."
    from tipr_nb.synth import make_synth_pedes

    return make_synth_pedes(tmp_path_factory.mktemp("data") / "few", n_ids=(24, 4, 10))


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    "A run of a tiny model on it."
    out = tmp_path_factory.mktemp("runs") / "few"
    result = tipr("train", "clip-tiny", "--root", few, "--out", out, *NANO)
    assert result.exit_code == 0, result.output
    assert "recipe clip-tiny" in result.stdout and f"tipr evaluate {out / 'best'}" in result.stdout
    return out


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A pipeline in Stable Diffusion's layout that draws noise."
    from tipr_nb.generation import toy_pipeline

    return toy_pipeline(tmp_path_factory.mktemp("pipeline") / "toy", codec="kl")


# starting up


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys, tipr_nb.cli as c; c.app; heavy = [m for m in ('torch', 'pandas', 'matplotlib', 'numpy', 'open_clip') if m in sys.modules]; assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
    before = busy()
    done = subprocess.run(
        [sys.executable, "-m", "tipr_nb.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "search" in done.stdout and busy() - before < 1.0


@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["data"],
        ["data", "synth"],
        ["data", "check"],
        ["data", "world"],
        ["data", "stats"],
        ["train"],
        ["evaluate"],
        ["grid"],
        ["index"],
        ["search"],
        ["app"],
        ["convert"],
        ["card"],
        ["models"],
        ["push"],
        ["data", "export"],
    ],
)
def test_every_command_helps(words):
    result = tipr(*words, "--help")
    assert result.exit_code == 0
    if words != ["data"]:
        assert "Example: tipr " + " ".join(words) in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert "..." not in tipr(*words[:-1], "--help").stdout.split("Commands:")[-1], (
        "summaries of commands are cut short"
    )


def test_version_and_no_command():
    from tipr_nb import __version__

    assert tipr("--version").stdout == f"tipr_nb {__version__}\n"
    bare = tipr()
    assert bare.exit_code == 2 and "Commands:" in bare.output


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train"],
        ["train", "clip-tiny", "--epochs", "3"],
        ["evaluate", "x", "--batch-size", "many"],
        ["index", "photos"],
        ["index", "--gallery", "g"],
        ["search", "a man"],
        ["search", "a man", "--gallery", "g", "-k", "0"],
        ["search", "a man", "--gallery", "g", "--weight", "2"],
        ["app"],
        ["app", "--gallery", "g", "--port", "many"],
    ],
)
def test_wrong_usage(words):
    result = tipr(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output


# how failures are told


@pytest.mark.parametrize(
    "error, code, says",
    [
        (TiprError("a.csv: row 3\nis odd"), 2, "a.csv: row 3 is odd"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(28, "No space", "runs/x"), 2, "runs/x: no space left"),
        (PermissionError(13, "denied", "runs/x"), 2, "runs/x: no permission"),
        (MemoryError("alloc of 9 GB"), 2, "smaller batch"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried"),
            2,
            "CUDA out of memory",
        ),
    ],
)
def test_expected_failures_are_one_line(error, code, says):
    app = typer.Typer(pretty_exceptions_enable=False)

    @cli.register_command(app)
    def fail():
        raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == code and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), FileNotFoundError(2, "No such file", "inner.bin")]
)
def test_bugs_are_not_hidden(error):
    app = typer.Typer(pretty_exceptions_enable=False)

    @cli.register_command(app)
    def fail():
        raise error

    assert CliRunner().invoke(app, []).exception is error


@pytest.mark.parametrize(
    "words, says",
    [
        (["train", "clip-tinny"], ["clip-tinny", "did you mean 'clip-tiny'"]),
        (["train", "nothing-like-it.json"], ["nothing-like-it.json: no such file"]),
        (
            ["train", "clip-tiny", "--data", "cuhk_pedes"],
            ["unknown dataset 'cuhk_pedes'", "did you mean 'cuhk-pedes'"],
        ),
        (["train", "clip-tiny", "--data", "cuhk-pedes"], ["--root"]),
        (["train", "clip-tiny", "--data", "rstpreid", "--root", "nowhere"], ["nowhere", "--root"]),
        (["train", "clip-tiny", "--resume", "--fresh"], ["--resume and --fresh"]),
        (["train", "clip-tiny", "--set", "epochs"], ["key=value"]),
        (["train", "clip-tiny", "--set", "epoch=3"], ["epoch", "did you mean 'epochs'"]),
        (["train", "clip-tiny", "--set", "epochs=many"], ["epochs"]),
        (["train", "clip-tiny", "--set", "CMT.margin=1"], ["no objective or dictionary 'CMT'"]),
        (["evaluate", "no/such/run", "--data", "synth-pedes"], ["no/such/run"]),
        (["evaluate", "x", "--data", "folder"], ["--root"]),
        (["grid", "none.toml"], ["none.toml: no such file"]),
        (["data", "stats", "cuhk"], ["did you mean 'cuhk-pedes'"]),
        (["data", "check", "icfg-pedes"], ["--root"]),
        (["data", "check", "icfg-pedes", "--root", "nowhere"], ["nowhere"]),
        (["data", "synth", "--ids", "100"], ["--root"]),
        (["data", "synth", "--root", "x", "--size", "big"], ["--size big"]),
        (["data", "synth", "--root", "x", "--ids", "3"], ["n_ids=3"]),
    ],
)
def test_bad_input(words, says, tmp_path, monkeypatch, few):
    monkeypatch.chdir(tmp_path)
    if words[0] in ("train", "evaluate") and "--data" not in words or "synth-pedes" in words:
        words = [*words, "--root", few]
    refused(tipr(*words), *says)
    assert not list(tmp_path.iterdir()), "a refused command writes nothing"


# what the verbs do


def test_data_synth_and_stats(tmp_path, few):
    assert (
        tipr("data", "synth", "--root", tmp_path / "a", "--ids", 14).exit_code == 0
        and (tmp_path / "a" / "reid_raw.json").exists()
    )
    out = tipr("data", "stats", "synth-pedes", "--root", few)
    assert out.exit_code == 0 and all(name in out.stdout for name in ("train", "val", "test"))


def test_data_world_and_training_on_it(tmp_path):
    out = tipr("data", "world", "--root", tmp_path / "w", "--images", 80)
    assert out.exit_code == 0 and out.stdout.startswith("synth-world") and "train" in out.stdout
    trained = tipr(
        "train",
        "pretrain-tiny",
        "--data",
        "synth-world",
        "--root",
        tmp_path / "w",
        "--out",
        tmp_path / "run",
        *NANO,
        "--set",
        "epochs=1",
        "--max-seconds",
        "60",
    )
    assert (
        trained.exit_code == 0
        and "synth-world" in trained.stdout
        and (tmp_path / "run" / "best").is_dir()
    )


def test_data_check(few, tmp_path):
    out = tipr("data", "check", "synth-pedes", "--root", few, "--plot", tmp_path / "lengths.png")
    assert (
        out.exit_code == 0
        and "usable" in out.stdout
        and "caption lengths in tokens" in out.stdout
        and "###" in out.stdout
    )
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads(tipr("data", "check", "synth-pedes", "--root", few, "--json", "--fast").stdout)[
            "usable"
        ]
        is True
    )


def test_data_check_of_a_broken_set(tmp_path):
    from tipr_nb.synth import make_synth_pedes

    root = make_synth_pedes(tmp_path / "broken", n_ids=(8, 2, 5))
    records = json.loads((root / "reid_raw.json").read_text())
    (root / "imgs" / records[0]["file_path"]).unlink()
    out = tipr("data", "check", "synth-pedes", "--root", root)
    assert (
        out.exit_code == 2
        and records[0]["file_path"] in out.stdout
        and out.stderr.count("\n") == 1
        and "not usable" in out.stderr
    )
    (root / "reid_raw.json").write_text((root / "reid_raw.json").read_text()[:500])
    refused(tipr("train", "clip-tiny", "--root", root, "--out", tmp_path / "run"), "reid_raw.json")


def test_length_bars():
    text = length_bars({"train": [5, 6, 7, 80], "val": []})
    assert (
        "25.0 %" in text
        and sum(int(line.split()[-1].replace(",", "")) for line in text.splitlines()[1:]) == 4
    )
    assert length_bars({}) == "" and "0.0 %" in length_bars({"train": [9]})


def test_settings_are_typed():
    from tipr_nb.training import RECIPES

    r = cli.parse_settings(
        [
            "lr=1e-4",
            "augment.erase=0.2",
            "SDM.temperature=0.05",
            "caption_transform=prune",
            "clip_grad=null",
            "betas=[0.9,0.98]",
        ],
        RECIPES["sdm-id-tiny"],
    )
    assert (
        r.lr,
        r.augment["erase"],
        dict(r.objectives)["SDM"],
        r.caption_transform,
        r.clip_grad,
        tuple(r.betas),
    ) == (1e-4, 0.2, {"temperature": 0.05}, "prune", None, (0.9, 0.98))
    assert dict(RECIPES["sdm-id-tiny"].objectives)["SDM"] == {}, (
        "the recipe in the table is not changed"
    )


def test_train_goes_on_and_starts_over(run, few, tmp_path):
    again = tipr("train", "clip-tiny", "--root", few, "--out", run, *NANO, "--resume")
    assert again.exit_code == 0 and "done after" in again.stdout
    refused(
        tipr("train", "clip-tiny", "--root", few, "--out", run, *NANO, "--set", "lr=0.1"),
        "another recipe",
    )
    refused(
        tipr("train", "clip-tiny", "--root", few, "--out", tmp_path / "new", *NANO, "--resume"),
        "nothing to resume",
    )
    refused(
        tipr(
            "train",
            "clip-tiny",
            "--root",
            few,
            "--out",
            tmp_path / "b",
            *NANO,
            "--set",
            "batch_size=100000",
        ),
        "batch_size",
    )


def test_evaluate(run, few, tmp_path):
    whole = tipr("evaluate", run, "--root", few, "--by", "kind", "--out", tmp_path / "m.json")
    assert whole.exit_code == 0 and "R@1" in whole.stdout and "incomplete" in whole.stdout
    assert json.loads((tmp_path / "m.json").read_text())["n_queries"] > 0
    best = json.loads(tipr("evaluate", run / "best", "--root", few, "--json").stdout)
    assert (
        0 < best["r1"] <= best["r5"] <= best["r10"] <= 100
        and set(best["intervals"]) >= {"r1", "mAP"}
        and best["chance_r1"] > 0
    )
    assert (
        json.loads(
            tipr(
                "evaluate", run, "--root", few, "--split", "val", "--direction", "i2t", "--json"
            ).stdout
        )["direction"]
        == "i2t"
    )
    assert "mSD" not in best
    asked = json.loads(tipr("evaluate", run / "best", "--root", few, "--msd", "--json").stdout)
    assert 0 < asked["mSD"] < 100 and asked["r1"] == best["r1"]
    assert "mSD" in tipr("evaluate", run, "--root", few, "--msd").stdout
    refused(
        tipr("evaluate", run, "--root", few, "--split", "tset"),
        "unknown split",
        "did you mean 'test'",
    )
    refused(tipr("evaluate", run, "--root", few, "--by", "hue"), "hue")
    refused(tipr("evaluate", run, "--root", few, "--direction", "t2t"), "t2t")
    refused(tipr("evaluate", run, "--root", few, "--out", tmp_path / "m.txt"), ".json")


def test_weights_with_a_longer_context_are_trained_and_read(few, tmp_path):
    from tipr_nb.models import PersonCLIP

    long = tmp_path / "long"
    PersonCLIP("tipr-nano").resize_context(120).save_pretrained(long)
    more = ["--set", f"pretrained={long}", "--set", "epochs=1"]
    result = tipr("train", "clip-tiny", "--root", few, "--out", tmp_path / "run", *NANO, *more)
    assert result.exit_code == 0, result.output
    assert PersonCLIP.from_pretrained(tmp_path / "run" / "best").context_length == 120


def test_evaluate_refuses_pickles_and_other_files(tmp_path, few):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    refused(tipr("evaluate", tmp_path / "model.pt", "--root", few), "model.pt")
    (tmp_path / "empty").mkdir()
    refused(tipr("evaluate", tmp_path / "empty", "--root", few), "empty")


def test_hub_id_without_network_fails_at_once(few):
    start = time.perf_counter()
    refused(tipr("evaluate", "someone/some-model", "--root", few), "someone/some-model")
    assert time.perf_counter() - start < 20


def test_output_that_cannot_be_written(few, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(
        tipr("train", "clip-tiny", "--root", few, "--out", tmp_path / "file" / "run", *NANO), "file"
    )


LATE = {  # command: what would be loaded or computed before anything is written
    ("demo", "--out", "OUT"): "tipr_nb.demo:demo_data",
    ("data", "synth", "--ids", "40", "--root", "OUT"): "tipr_nb.synth:make_synth_pedes",
    ("data", "world", "--images", "40", "--root", "OUT"): "tipr_nb.synth:make_synth_world",
    ("data", "export", "synth-pedes", "OUT"): "tipr_nb.data:load_dataset",
    ("train", "sdm-id-tiny", "--out", "OUT"): "tipr_nb.data:load_dataset",
    ("generate", "a man", "--out", "OUT"): "tipr_nb.generation:PersonGenerator",
    ("generate", "--out", "OUT"): "tipr_nb.generation:PersonGenerator",
    ("generate", "--train", "--out", "OUT"): "tipr_nb.generation.training:train_small",
    ("index", "PHOTOS", "--gallery", "OUT"): "tipr_nb.search:Gallery",
    ("index", "PHOTOS", "--part", "1/2", "--gallery", "OUT"): "tipr_nb.search:index_part",
    ("convert", "clip-synth-world", "OUT"): "tipr_nb.interop.exports:open_weights",
    ("convert", "clip-synth-world", "OUT", "--to", "onnx"): "tipr_nb.interop.exports:open_weights",
    ("grid", "GRID", "--runs", "OUT"): "tipr_nb.training.grid:GridRunner",
}
LATE_FILES = {
    ("evaluate", "clip-synth-world", "--out", "OUT"): "tipr_nb.interop:open_weights",
    ("grid", "GRID", "--out", "OUT"): "tipr_nb.training.grid:GridRunner",
    ("data", "check", "synth-pedes", "--plot", "OUT"): "tipr_nb.data:check_dataset",
    ("search", "a man", "--gallery", "PHOTOS", "--html", "OUT"): "tipr_nb.search:Gallery",
    ("search", "a man", "--gallery", "PHOTOS", "--csv", "OUT"): "tipr_nb.search:Gallery",
    ("search", "a man", "--gallery", "PHOTOS", "--zip", "OUT"): "tipr_nb.search:Gallery",
}


@pytest.mark.parametrize(
    "words, late, folder",
    [(w, late, True) for w, late in LATE.items()]
    + [(w, late, False) for w, late in LATE_FILES.items()],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, tuple) else None,
)
def test_an_output_is_refused_before_the_work(tmp_path, monkeypatch, words, late, folder):
    import importlib

    module, name = late.split(":")

    def too_late(*args, **kwargs):
        raise AssertionError("began to work")

    monkeypatch.setattr(importlib.import_module(module), name, too_late)
    (tmp_path / "photos").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "grid.toml").write_text('[[rows]]\nname = "a"\nrecipe = "sdm-id-tiny"\n')
    outputs = {
        "x" * 300: "longer than this file system allows",
        "file.txt/run": "a part of this path is a file",
        "file.txt" if folder else "photos": "of that name is in the way",
    }
    if words[:2] == ("convert", "clip-synth-world") or words[:2] == ("data", "export"):
        outputs["file.txt"] = ""  # said in words of its own
    for output, says in outputs.items():
        places = dict(
            OUT=tmp_path / output, PHOTOS=tmp_path / "photos", GRID=tmp_path / "grid.toml"
        )
        refused(tipr(*(places.get(w, w) for w in words)), says, str(tmp_path / output)[:80])
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["file.txt", "grid.toml", "photos"]


def test_grid(few, tmp_path):
    settings = dict(w.split("=") for w in NANO[1::2]) | dict(
        epochs=1, batch_size=16, lr=2e-3, pretrained=None
    )
    spec = dict(
        dataset=dict(name="synth-pedes", root=str(few)),
        rows=[dict(name="itc", recipe="clip-tiny"), dict(name="sdm", recipe="sdm-id-tiny")],
        seeds=[0],
        set=settings,
    )
    (tmp_path / "grid.json").write_text(json.dumps(spec))
    out = tipr("grid", tmp_path / "grid.json", "--device", "cpu")
    assert out.exit_code == 0, out.output
    assert (
        "itc" in out.stdout
        and "sdm" in out.stdout
        and "test, mean ± standard deviation over seeds" in out.stdout
        and str(tmp_path / "grid.csv") in out.stdout.replace("\n", "")
        and (tmp_path / "grid.csv").exists()
    )
    (tmp_path / "bad.json").write_text(
        json.dumps(
            spec
            | dict(rows=[dict(name="undrawn", recipe="clip-tiny", set=dict(objectives=["TGTE"]))])
        )
    )
    refused(
        tipr("grid", tmp_path / "bad.json", "--device", "cpu"), "bad.csv", "runs that failed: 1"
    )
    (tmp_path / "grid.json").write_text(json.dumps(spec | dict(rows=[dict(recipe="clip-tinny")])))
    refused(tipr("grid", tmp_path / "grid.json"), "did you mean 'clip-tiny'")


def test_interrupt_is_tidy_and_goes_on(few, tmp_path):
    words = [
        sys.executable,
        "-m",
        "tipr_nb.cli",
        "train",
        "clip-tiny",
        "--root",
        str(few),
        "--out",
        str(tmp_path / "run"),
        *NANO,
        "--set",
        "epochs=400",
    ]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as p:
        for line in p.stdout:
            if "epoch 2 of" in line:
                break
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    assert (
        p.returncode == 130
        and "Traceback" not in err
        and err.strip().splitlines()[-1].startswith("tipr: stopped")
    )
    assert (tmp_path / "run" / "recipe.json").exists()


# photos, galleries, the page

PATTERN = r"(?P<camera>c\d)/"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    from gallery_pictures import archive

    return archive(tmp_path_factory.mktemp("archive") / "photos")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    "A run's folder with a (random) model in it."
    import torch
    from tipr_nb.models import PersonCLIP

    torch.manual_seed(0)
    PersonCLIP("tipr-nano").save_pretrained((out := tmp_path_factory.mktemp("nano")) / "best")
    return out


@pytest.fixture(scope="module")
def people(shelf, nano, tmp_path_factory):
    "A gallery made by the command."
    folder = tmp_path_factory.mktemp("galleries") / "people"
    out = tipr("index", shelf, "--gallery", folder, "--model", nano, "--pattern", PATTERN)
    assert (
        out.exit_code == 0
        and "36 people from 36 photos: 36 new" in out.stdout
        and f"--gallery {folder}" in out.stdout
    )
    return folder


def test_index_again_changes_engines_and_lists_what_it_skips(shelf, people, tmp_path):
    mine = tmp_path / "photos"
    shutil.copytree(shelf, mine)
    shutil.copytree(people, tmp_path / "g")
    for i in range(7):
        (mine / f"broken{i}.jpg").write_bytes(b"\xff\xd8" + bytes(i))
    out = tipr(
        "index",
        mine,
        "--gallery",
        tmp_path / "g",
        "--pattern",
        PATTERN,
        "--engine",
        "ivf",
        "--quantise",
        "none",
        "--nlist",
        "2",
    )  # no --model: the gallery knows it
    assert (
        out.exit_code == 0
        and "36 new" in out.stdout
        and "36 gone" in out.stdout
        and "0 encoded" in out.stdout
        and "7 skipped" in out.stdout
        and "engine ivf" in out.stdout
    )
    assert out.stdout.count("  skipped ") == 5
    every = tipr("index", mine, "--gallery", tmp_path / "g", "--pattern", PATTERN, "--skipped")
    assert (
        every.stdout.count("  skipped ") == 6
        and "36 as before" in every.stdout
        and "engine ivf" in every.stdout
    )
    report = json.loads(
        tipr(
            "index", shelf, "--gallery", tmp_path / "g", "--pattern", PATTERN, "--add", "--json"
        ).stdout
    )
    assert report["people"] == 72 and report["duplicates"] == 36 and report["encoded"] == 0


def test_index_cuts_people_out(shelf, nano, tmp_path, monkeypatch):
    from PIL import Image
    from gallery_pictures import figure

    scene = Image.new("RGB", (300, 100), "#888888")
    for i, c in enumerate(("red", "green")):
        scene.paste(figure(c, "blue"), (20 + 100 * i, 2))
    (tmp_path / "scenes").mkdir()
    scene.save(tmp_path / "scenes" / "a.png")
    assert (
        "warning: 1 of 1 pictures look like full scenes"
        in tipr(
            "index", tmp_path / "scenes", "--gallery", tmp_path / "whole", "--model", nano
        ).stdout
    )
    (tmp_path / "boxes.csv").write_text("path,x0,y0,x1,y1\na.png,20,2,68,98\na.png,120,2,168,98\n")
    assert (
        "2 people from 1 photos"
        in tipr(
            "index",
            tmp_path / "scenes",
            "--gallery",
            tmp_path / "boxed",
            "--model",
            nano,
            "--boxes",
            tmp_path / "boxes.csv",
        ).stdout
    )
    (tmp_path / "mine.py").write_text(
        "def people(picture): return [(20, 2, 68, 98), (120, 2, 168, 98)]\nnobody = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert (
        "2 people from 1 photos"
        in tipr(
            "index", "scenes", "--gallery", "found", "--model", nano, "--detector", "mine:people"
        ).stdout
    )
    for wrong in ("mine:person", "nothing_like_it:people", "mine", "mine:nobody"):
        refused(
            tipr("index", "scenes", "--gallery", "other", "--model", nano, "--detector", wrong),
            f"--detector {wrong}",
        )
    assert not (tmp_path / "other").exists()


def test_search_by_everything(people, shelf, tmp_path):
    def ask(*words):
        return json.loads(tipr("search", *words, "--gallery", people, "--json").stdout)

    plain = ask("a red coat", "-k", 5)
    assert [h["rank"] for h in plain["hits"]] == [1, 2, 3, 4, 5] and plain["query"]["text"] == [
        "a red coat"
    ]
    assert {h["camera"] for h in ask("a red coat", "--where", "camera == 'c2'")["hits"]} == {"c2"}
    like = ask("--like", 4, "-k", 3)
    assert 4 not in [h["row"] for h in like["hits"]] and like["query"]["image"] == "row 4"
    picture = shelf / "c1" / "red-red-0.png"
    assert ask("--image", picture, "-k", 1)["hits"][0]["path"] == str(picture)
    both = ask(
        "a red coat",
        "a tall man",
        "--image",
        picture,
        "--without",
        "a hat",
        "--rerank",
        "expand",
        "-k",
        2,
    )
    assert (
        both["query"]["text"] == ["a red coat", "a tall man"]
        and both["query"]["without"] == ["a hat"]
        and both["query"]["rerank"] == "expand"
    )
    sheet = tipr(
        "search", "a red coat", "--gallery", people, "--html", tmp_path / "sheet.html", "-k", 3
    )
    assert (
        sheet.stdout.split()[:4] == ["rank", "score", "photo", "camera"]
        and (tmp_path / "sheet.html").read_text().count("data:image/webp") == 3
    )
    assert ask("a red coat", "--image-weight", "0", "--like", 4)["hits"][0][
        "score"
    ] == pytest.approx(
        max(h["score"] for h in ask("a red coat", "-k", 36)["hits"] if h["row"] != 4), abs=1e-5
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["index", "nowhere", "--gallery", "g"], ["nowhere: no such file or folder"]),
        (["index", "*.none", "--gallery", "g"], ["*.none: nothing matches"]),
        (["index", "EMPTY", "--gallery", "g"], ["no pictures there"]),
        (["index", "SHELF", "--gallery", "FILE"], ["a file of that name is in the way"]),
        (["index", "SHELF", "--gallery", "SHELF"], ["holds other files", "choose a new folder"]),
        (["index", "SHELF", "--gallery", "g", "--model", "no-such-weights"], ["no-such-weights"]),
        (["index", "SHELF", "--gallery", "g", "--engine", "ivff"], ["did you mean 'ivf'"]),
        (
            ["index", "SHELF", "--gallery", "g", "--engine", "exact", "--nlist", "3"],
            ["--nlist goes with --engine ivf"],
        ),
        (
            ["index", "SHELF", "--gallery", "g", "--engine", "ivf", "--quantise", "4bit"],
            ["unknown quantiser"],
        ),
        (
            ["index", "SHELF", "--gallery", "g", "--model", "NANO", "--dtype", "int8"],
            ["float32 or float16"],
        ),
        (["index", "SHELF", "--gallery", "g", "--pattern", "(?P<camera"], ["pattern"]),
        (
            ["index", "SHELF", "--gallery", "g", "--metadata", "none.csv"],
            ["none.csv: no such file"],
        ),
        (["search", "a man", "--gallery", "nowhere"], ["nowhere: no gallery there", "tipr index"]),
        (["search", "--gallery", "PEOPLE"], ["give a sentence or a picture"]),
        (["search", " ", "--gallery", "PEOPLE"], ["empty sentence"]),
        (["search", "x", "--gallery", "PEOPLE", "--where", "camera = 'c2'"], ["invalid syntax"]),
        (
            [
                "search",
                "x",
                "--gallery",
                "PEOPLE",
                "--where",
                "__import__('os').system('touch owned')",
            ],
            ["filter"],
        ),
        (
            ["search", "x", "--gallery", "PEOPLE", "--where", "camra == 'c2'"],
            ["did you mean camera"],
        ),
        (["search", "x", "--gallery", "PEOPLE", "--engine", "hnsw"], ["this gallery has exact"]),
        (["search", "x", "--gallery", "PEOPLE", "--rerank", "magic"], ["neighbours or expand"]),
        (["search", "--like", "99", "--gallery", "PEOPLE"], ["rows 0 to 35"]),
        (
            ["search", "--image", "nowhere.png", "--gallery", "PEOPLE"],
            ["nowhere.png: cannot be read"],
        ),
        (["app", "--gallery", "nowhere"], ["nowhere: no gallery there"]),
        (["app", "--gallery", "PEOPLE", "--port", "0"], ["between 1 and 65535"]),
    ],
)
def test_wrong_questions_about_photos(words, says, tmp_path, monkeypatch, shelf, people, nano):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    names = dict(SHELF=shelf, PEOPLE=people, NANO=nano, EMPTY="empty", FILE="file")
    refused(tipr(*(names.get(w, w) for w in words)), *says)
    assert {p.name for p in tmp_path.iterdir()} <= {"empty", "file", "g"} and not (
        tmp_path / "g" / "gallery.json"
    ).exists(), "a refused command makes no gallery"


def test_a_port_in_use(people):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        refused(
            tipr("app", "--gallery", people, "--port", s.getsockname()[1]), "in use; choose another"
        )


def test_search_starts_quickly_and_without_torch(nano, tmp_path):
    "Ten thousand people, a cold process; time on the processor, since the machine may be busy."
    import numpy as np
    from tipr_nb.models import PersonCLIP
    from tipr_nb.core import write_json
    from tipr_nb.search import import_features
    from tipr_nb.search import export_text_tower, model_fingerprint

    model, n = PersonCLIP.from_pretrained(nano / "best"), 10_000
    x = np.random.default_rng(0).standard_normal((n, model.dim)).astype(np.float32)
    facts = import_features(
        tmp_path / "g",
        x / np.linalg.norm(x, axis=1, keepdims=True),
        (f"{i}.jpg" for i in range(n)),
        model_fingerprint(model),
        columns=dict(camera=[f"c{i % 4}" for i in range(n)]),
    )
    export_text_tower(model, tmp_path / "g" / "text", facts["fingerprint"])
    write_json(tmp_path / "g" / "gallery.json", facts | dict(engine="exact", text_tower=True))
    code = """import sys
from tipr_nb.cli import app
app(sys.argv[1:], standalone_mode=False)
assert not (found := [m for m in ("torch", "torchvision", "open_clip", "transformers", "pandas", "matplotlib") if m in sys.modules]), found"""
    before = busy()
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "search",
            "a man in a red coat",
            "--gallery",
            str(tmp_path / "g"),
            "-k",
            "3",
            "--where",
            "camera == 'c2'",
        ],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and out.stdout.count("c2") == 3, out.stderr
    assert busy() - before < 4


def test_the_page_from_the_command(people, tmp_path):
    import urllib.request

    (tmp_path / "tmp").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "tipr_nb.cli", "app", "--gallery", str(people), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"}
        | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path / "tmp")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as p:
        lines = []
        for line in p.stdout:
            lines.append(line)
            if f"127.0.0.1:{port}" in line:
                break
        assert "36 people" in lines[0], p.communicate()
        assert (
            b"People search"
            in urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read()
        )
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    assert "Traceback" not in err and not list((tmp_path / "tmp").iterdir()), (
        "thumbnails go with the process"
    )


@pytest.mark.full
def test_killed_index_command_resumes_to_the_same_gallery(nano, tmp_path):
    from gallery_pictures import archive

    shelf, r = archive(tmp_path / "photos", repeat=20), random.Random(0)
    command = [
        sys.executable,
        "-m",
        "tipr_nb.cli",
        "index",
        str(shelf),
        "--model",
        str(nano),
        "--pattern",
        PATTERN,
        "--batch-size",
        "8",
    ]
    subprocess.run([*command, "--gallery", str(tmp_path / "calm")], check=True, capture_output=True)
    for _ in range(8):
        p = subprocess.Popen(
            [*command, "--gallery", str(tmp_path / "killed")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            p.wait(timeout=2 + 8 * r.random())
        except subprocess.TimeoutExpired:
            p.kill()
        p.wait()
        asked = tipr("search", "--like", 3, "--gallery", tmp_path / "killed", "--json")
        assert asked.exit_code in (0, 2) and "Traceback" not in asked.output
    last = subprocess.run(
        [*command, "--gallery", str(tmp_path / "killed")], capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    one, two = (
        json.loads(
            tipr("search", "--like", 3, "-k", 700, "--gallery", tmp_path / g, "--json").stdout
        )["hits"]
        for g in ("calm", "killed")
    )
    assert [(h["path"], h["camera"]) for h in one] == [(h["path"], h["camera"]) for h in two] and [
        h["score"] for h in one
    ] == pytest.approx([h["score"] for h in two], abs=1e-4)


# drawing


def test_generate_sentences(toy, tmp_path):
    words = [
        "generate",
        "a man in red",
        "a woman",
        "a man in red",
        "--generator",
        toy,
        "--steps",
        2,
        "--size",
        "48x16",
        "--out",
        tmp_path / "drawn",
        "--per-caption",
        2,
        "--device",
        "cpu",
    ]
    result = tipr(*words)
    assert result.exit_code == 0, result.output
    assert (
        len(list((tmp_path / "drawn").rglob("*.png"))) == 4
        and "pictures/s" in result.stdout
        and result.stdout.count("a man in red") == 1
    )
    assert "0 for this process" in tipr(*words).stdout
    refused(tipr(*words[:-1], "cpu", "--guidance", 7), "guidance", "another folder")


def test_generate_a_split_and_train_on_it(few, toy, tmp_path):
    result = tipr(
        "generate",
        "--root",
        few,
        "--split",
        "train",
        "--generator",
        toy,
        "--steps",
        1,
        "--size",
        "96x32",
        "--out",
        tmp_path / "drawn",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0 and "tipr train gea-tiny" in result.stdout, result.output
    (kept := next((tmp_path / "drawn").rglob("*.png"))).rename(tmp_path / "kept.png")
    gea = [
        "train",
        "gea-tiny",
        "--root",
        few,
        "--out",
        tmp_path / "gea",
        "--pictures",
        tmp_path / "drawn",
        *NANO,
        "--set",
        "epochs=1",
    ]
    refused(tipr(*gea), "1 of the training captions", "finish the `tipr generate`")
    (tmp_path / "kept.png").rename(kept)
    assert (result := tipr(*gea)).exit_code == 0, result.output
    refused(
        tipr("evaluate", tmp_path / "gea", "--root", few, "--pictures", tmp_path / "drawn"),
        "no picture of",
        "tipr generate",
    )
    assert (
        tipr(
            "generate",
            "--root",
            few,
            "--split",
            "test",
            "--generator",
            toy,
            "--steps",
            1,
            "--size",
            "96x32",
            "--out",
            tmp_path / "drawn",
            "--device",
            "cpu",
        ).exit_code
        == 0
    )
    plain, drawn = (
        json.loads(tipr("evaluate", tmp_path / "gea", "--root", few, "--json", *more).stdout)
        for more in ([], ["--pictures", tmp_path / "drawn", "--weight", 0.5])
    )
    assert plain["mAP"] != drawn["mAP"]


def test_generate_learns(few, toy, tmp_path, monkeypatch):
    from tipr_nb.generation import training as generator

    asked, real = [], generator.train_small
    monkeypatch.setattr(
        generator,
        "train_small",
        lambda out, recipe, max_seconds=None: (
            asked.append((out, recipe))
            or real(out, photos=12, recipe=recipe, width=32, max_seconds=max_seconds)
        ),
    )
    monkeypatch.setattr(generator, "SMALL", generator.GeneratorRecipe(batch_size=4, warmup=1))
    result = tipr("generate", "--train", "--out", tmp_path / "small", "--updates", 2, "--seed", 3)
    assert (
        result.exit_code == 0
        and asked[0][1].updates == 2
        and asked[0][1].seed == 3
        and (tmp_path / "small" / "pipeline" / "model_index.json").exists()
    ), result.output
    result = tipr(
        "generate",
        "--train",
        "--out",
        tmp_path / "tuned",
        "--updates",
        2,
        "--root",
        few,
        "--generator",
        toy,
        "--lora-rank",
        2,
        "--size",
        "96x32",
    )
    assert (
        result.exit_code == 0
        and f"--lora {tmp_path / 'tuned' / 'lora'}" in result.stdout
        and list((tmp_path / "tuned" / "lora").glob("*.safetensors"))
    ), result.output
    refused(tipr("generate", "a man", "--train"), "takes no sentences")


@pytest.mark.parametrize(
    "words, says",
    [
        (["generate", " "], ["empty"]),
        (["generate", "a man", "--generator", "nowhere/pipeline"], ["nowhere/pipeline"]),
        (["generate", "a man", "--size", "tall"], ["--size tall"]),
        (["generate", "--data", "cuhk-pedes"], ["--root"]),
        (["train", "gea-tiny", "--pictures", "nowhere"], ["nowhere", "tipr generate"]),
    ],
)
def test_generate_refuses(words, says, few, toy):
    more = [] if "--generator" in words or words[0] == "train" else ["--generator", toy]
    if "cuhk-pedes" not in words:
        more += ["--root", few]
    refused(tipr(*words, *more), *says)


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_wait_asleep_unless_told_otherwise(monkeypatch, given):
    monkeypatch.setattr("tipr_nb.cli.commands.app", lambda prog_name: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")


# weights of any name, parts of one's own, files left out


def test_models_lists_what_is_known_and_what_was_not_tried():
    out = tipr("models")
    assert (
        out.exit_code == 0
        and "clip-synth-world" in out.stdout
        and "ViT-B-16:openai" in out.stdout
        and out.stdout.count("not tried here") > 5
    )
    rows = json.loads(tipr("models", "--json").stdout)
    assert {
        "name",
        "address",
        "licence",
        "parameters",
        "trained_on",
        "figures",
        "source",
        "downloaded",
    } <= set(rows["known"][0])


def test_a_loss_and_a_transform_of_ones_own(few, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text("""
from tipr_nb.methods import Objective

class Gentle(Objective):
    "One minus the cosine of each pair."
    def __init__(self, *args, push=1., **kwargs):
        super().__init__(*args, **kwargs)
        self.push = push

    def forward(self, features, batch, encoder):
        return self.push*(1 - (features.image*features.text).sum(1)).mean()
""")
    monkeypatch.chdir(tmp_path)
    own = ["--set", 'objectives=["my_parts:Gentle"]', "--set", "my_parts:Gentle.push=2"]
    out = tipr("train", "clip-tiny", "--root", few, "--out", tmp_path / "run", *NANO, *own)
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["objectives"] == [
        ["my_parts:Gentle", {"push": 2}]
    ]
    refused(
        tipr(
            "train",
            "clip-tiny",
            "--root",
            few,
            "--out",
            tmp_path / "b",
            *NANO,
            "--set",
            'objectives=["my_parts:Gone"]',
        ),
        "my_parts",
    )


def test_missing_images_are_left_out_when_asked(tmp_path):
    from tipr_nb.synth import make_synth_pedes

    root = make_synth_pedes(tmp_path / "broken", n_ids=(8, 2, 5))
    records = json.loads((root / "reid_raw.json").read_text())
    (root / "imgs" / records[0]["file_path"]).unlink()
    refused(tipr("data", "stats", "synth-pedes", "--root", root), "--skip")
    out = tipr("data", "stats", "synth-pedes", "--root", root, "--skip-missing", "1")
    assert out.exit_code == 0 and "note: " in out.stdout
    (tmp_path / "skip.txt").write_text(records[0]["file_path"] + "\n")
    assert (
        tipr(
            "data", "stats", "synth-pedes", "--root", root, "--skip", tmp_path / "skip.txt"
        ).exit_code
        == 0
    )
    refused(
        tipr("data", "stats", "synth-pedes", "--root", root, "--skip", tmp_path / "none.txt"),
        "none.txt",
    )


def test_a_gallery_of_somebody_elses_weights(shelf, tmp_path):
    import torch
    from tipr_nb.models import PersonCLIP
    from open_clip.model import CLIP

    torch.manual_seed(0)
    clip = CLIP(
        embed_dim=32,
        vision_cfg=dict(image_size=(96, 32), patch_size=16, width=64, layers=1),
        text_cfg=dict(context_length=77, vocab_size=600, width=64, heads=1, layers=1),
        quick_gelu=True,
    )
    torch.save(
        {"model": {f"base_model.{k}": v for k, v in clip.state_dict().items()}},
        tmp_path / "best.pth",
    )
    out = tipr("index", shelf, "--gallery", tmp_path / "g", "--model", tmp_path / "best.pth")
    assert out.exit_code == 0 and "36 people" in out.stdout, out.output
    assert tipr("index", shelf, "--gallery", tmp_path / "g").exit_code == 0
    assert tipr("search", "a red coat", "--gallery", tmp_path / "g", "-k", 3).exit_code == 0
    picture = sorted(shelf.rglob("*.png"))[0]
    paths = tipr(
        "search", "--image", picture, "--gallery", tmp_path / "g", "-k", 2, "--filepath-only"
    ).stdout.split()
    assert len(paths) == 2 and str(picture) in paths
    for wrong in ("ViT-B-16", "ViT-B-16:opnai", "nothing-like-it"):
        refused(
            tipr("index", shelf, "--gallery", tmp_path / "h", "--model", wrong),
            wrong.split(":")[-1],
        )
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_that_cannot_show_a_name(people, encoding):
    code = "import sys; from tipr_nb import cli; from tipr_nb.cli import commands; sys.argv = ['tipr']; commands.app = lambda prog_name: (cli.say('żółw 北门'), cli.say_json({'name': '北😀'})); cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    shown = (
        "utf-8" if encoding == "ascii" else encoding
    )  # click writes UTF-8 where a stream says ASCII
    assert json.loads(done.stdout.decode(shown).splitlines()[-1]) == {"name": "北😀"}


def test_names_in_any_locale(shelf, nano, tmp_path):
    "Python that reads file names as ASCII: folders and pictures with other names are read and written all the same."
    photos = tmp_path / "北门"
    photos.mkdir()
    for picture, name in zip(sorted(shelf.rglob("*.png")), ("żółw", "b")):
        shutil.copy(picture, photos / f"{name}.png")
    own = tmp_path / "мои"
    own.mkdir()
    rows = []
    for n, (split, picture) in enumerate(
        zip(["train", "val", "test"] * 2, sorted(shelf.rglob("*.png")))
    ):
        shutil.copy(picture, own / f"ż{n}.png")
        rows.append(dict(image=f"ż{n}.png", id=n, caption="кто-то в красном", split=split))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (own / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bare = os.environ | dict(
        LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1"
    )
    bare.pop("PYTHONIOENCODING", None)

    def run(*words):
        done = subprocess.run(
            [sys.executable, "-m", "tipr_nb.cli", *map(os.fsencode, words)],
            cwd=tmp_path,
            env=bare,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    run("index", "北门", "--gallery", "гал", "--model", nano)
    found = run("search", "a red coat", "--gallery", "гал", "--filepath-only").decode()
    assert sorted(os.path.basename(line) for line in found.splitlines()) == ["b.png", "żółw.png"]
    assert b"train" in run("data", "stats", "folder", "--root", "мои")


def test_training_a_generator_on_a_split_that_is_not_there(few, tmp_path):
    words = ("generate", "--train", "--generator", "nowhere", "--root", few, "--out", tmp_path / "g")
    refused(tipr(*words, "--split", "tset"), "tset", "test")


def test_a_part_of_a_name_is_no_name_of_a_dataset(monkeypatch):
    from tipr_nb.cli import options

    monkeypatch.setattr(options, "offered_names", lambda what: {"my-pedes": None})
    with pytest.raises(TiprError, match="pedes"):
        options.check_place("pedes", None)
    options.check_place("my-pedes", None)
