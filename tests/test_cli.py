"""The `tipr` command: what it prints, how it fails, and that it starts quickly."""
import json, os, signal, subprocess, sys, time

import pytest
import typer
from typer.testing import CliRunner

from tipr_nb import cli
from tipr_nb.core import TiprError

NANO = [w for kv in ("epochs=2", "batch_size=16", "arch=tipr-nano", "pretrained=None", "precision=no", "lr=0.002") for w in ("--set", kv)]


def tipr(*words): return CliRunner().invoke(cli.app, [str(w) for w in words], prog_name="tipr")


def refused(result, *says):
    "Exit code 2, one line on stderr that says all of this, nothing of a traceback."
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("tipr: ") and result.stderr.count("\n") == 1 and "Traceback" not in result.output
    for text in says: assert text in result.stderr
    return result


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    old, os.environ["TIPR_CACHE"] = os.environ.get("TIPR_CACHE"), str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None: del os.environ["TIPR_CACHE"]
    else: os.environ["TIPR_CACHE"] = old


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "A small set of the benchmark's kind."
    from tipr_nb.synth import make_synth_pedes
    return make_synth_pedes(tmp_path_factory.mktemp("data")/"few", n_ids=(24, 4, 10))


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    "A run of a tiny model on it."
    out = tmp_path_factory.mktemp("runs")/"few"
    result = tipr("train", "clip-tiny", "--root", few, "--out", out, *NANO)
    assert result.exit_code == 0, result.output
    assert "recipe clip-tiny" in result.stdout and f"tipr evaluate {out/'best'}" in result.stdout
    return out


# starting up

def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys, tipr_nb.cli as c; heavy = [m for m in ('torch', 'pandas', 'matplotlib', 'numpy', 'open_clip') if m in sys.modules]; assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "tipr_nb.cli", "--help"], capture_output=True, text=True)
        taken.append(time.perf_counter() - start)
    assert done.returncode == 0 and min(taken) < 1., taken


@pytest.mark.parametrize("words", [["demo"], ["data"], ["data", "synth"], ["data", "check"], ["data", "world"], ["data", "stats"], ["train"], ["evaluate"], ["grid"]])
def test_every_command_helps(words):
    result = tipr(*words, "--help")
    assert result.exit_code == 0
    if words != ["data"]: assert "Example: tipr " + " ".join(words) in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert "..." not in tipr(*words[:-1], "--help").stdout.split("Commands:")[-1], "summaries of commands are cut short"


def test_version_and_no_command():
    from tipr_nb import __version__
    assert tipr("--version").stdout == f"tipr_nb {__version__}\n"
    bare = tipr()
    assert bare.exit_code == 2 and "Commands:" in bare.output


@pytest.mark.parametrize("words", [["trian"], ["train"], ["train", "clip-tiny", "--epochs", "3"], ["evaluate", "x", "--batch-size", "many"]])
def test_wrong_usage(words):
    result = tipr(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output


# how failures are told

@pytest.mark.parametrize("error, code, says", [(TiprError("a.csv: row 3\nis odd"), 2, "a.csv: row 3 is odd"), (KeyboardInterrupt(), 130, "stopped"), (OSError(28, "No space", "runs/x"), 2, "runs/x: no space left"),
                                               (PermissionError(13, "denied", "runs/x"), 2, "runs/x: no permission"), (MemoryError("alloc of 9 GB"), 2, "smaller batch"), (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried"), 2, "CUDA out of memory")])
def test_expected_failures_are_one_line(error, code, says):
    app = typer.Typer(pretty_exceptions_enable=False)
    @cli.command(app)
    def fail(): raise error
    result = CliRunner().invoke(app, [])
    assert result.exit_code == code and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(2, "No such file", "inner.bin")])
def test_bugs_are_not_hidden(error):
    app = typer.Typer(pretty_exceptions_enable=False)
    @cli.command(app)
    def fail(): raise error
    assert CliRunner().invoke(app, []).exception is error


@pytest.mark.parametrize("words, says", [
    (["train", "clip-tinny"], ["clip-tinny", "did you mean 'clip-tiny'"]),
    (["train", "nothing-like-it.json"], ["nothing-like-it.json: no such file"]),
    (["train", "clip-tiny", "--data", "cuhk_pedes"], ["unknown dataset 'cuhk_pedes'", "did you mean 'cuhk-pedes'"]),
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
])
def test_bad_input(words, says, tmp_path, monkeypatch, few):
    monkeypatch.chdir(tmp_path)
    if words[0] in ("train", "evaluate") and "--data" not in words or "synth-pedes" in words: words = [*words, "--root", few]
    refused(tipr(*words), *says)
    assert not list(tmp_path.iterdir()), "a refused command writes nothing"


# what the verbs do

def test_data_synth_and_stats(tmp_path, few):
    assert tipr("data", "synth", "--root", tmp_path/"a", "--ids", 14).exit_code == 0 and (tmp_path/"a"/"reid_raw.json").exists()
    out = tipr("data", "stats", "synth-pedes", "--root", few)
    assert out.exit_code == 0 and all(name in out.stdout for name in ("train", "val", "test"))


def test_data_world_and_training_on_it(tmp_path):
    out = tipr("data", "world", "--root", tmp_path/"w", "--images", 80)
    assert out.exit_code == 0 and out.stdout.startswith("synth-world") and "train" in out.stdout
    trained = tipr("train", "pretrain-tiny", "--data", "synth-world", "--root", tmp_path/"w", "--out", tmp_path/"run", *NANO, "--set", "epochs=1", "--max-seconds", "60")
    assert trained.exit_code == 0 and "synth-world" in trained.stdout and (tmp_path/"run"/"best").is_dir()


def test_data_check(few, tmp_path):
    out = tipr("data", "check", "synth-pedes", "--root", few, "--plot", tmp_path/"lengths.png")
    assert out.exit_code == 0 and "usable" in out.stdout and "caption lengths in tokens" in out.stdout and "###" in out.stdout
    assert (tmp_path/"lengths.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(tipr("data", "check", "synth-pedes", "--root", few, "--json", "--fast").stdout)["usable"] is True


def test_data_check_of_a_broken_set(tmp_path):
    from tipr_nb.synth import make_synth_pedes
    root = make_synth_pedes(tmp_path/"broken", n_ids=(8, 2, 5))
    records = json.loads((root/"reid_raw.json").read_text())
    (root/"imgs"/records[0]["file_path"]).unlink()
    out = tipr("data", "check", "synth-pedes", "--root", root)
    assert out.exit_code == 2 and records[0]["file_path"] in out.stdout and out.stderr.count("\n") == 1 and "not usable" in out.stderr
    (root/"reid_raw.json").write_text((root/"reid_raw.json").read_text()[:500])
    refused(tipr("train", "clip-tiny", "--root", root, "--out", tmp_path/"run"), "reid_raw.json")


def test_length_bars():
    text = cli.length_bars({"train": [5, 6, 7, 80], "val": []})
    assert "25.0 %" in text and sum(int(line.split()[-1].replace(",", "")) for line in text.splitlines()[1:]) == 4
    assert cli.length_bars({}) == "" and "0.0 %" in cli.length_bars({"train": [9]})


def test_settings_are_typed():
    from tipr_nb.training import RECIPES
    r = cli.parse_settings(["lr=1e-4", "augment.erase=0.2", "SDM.temperature=0.05", "caption_transform=prune", "clip_grad=null", 'betas=[0.9,0.98]'], RECIPES["sdm-id-tiny"])
    assert (r.lr, r.augment["erase"], dict(r.objectives)["SDM"], r.caption_transform, r.clip_grad, tuple(r.betas)) == (1e-4, .2, {"temperature": .05}, "prune", None, (.9, .98))
    assert dict(RECIPES["sdm-id-tiny"].objectives)["SDM"] == {}, "the recipe in the table is not changed"


def test_train_goes_on_and_starts_over(run, few, tmp_path):
    again = tipr("train", "clip-tiny", "--root", few, "--out", run, *NANO, "--resume")
    assert again.exit_code == 0 and "done after" in again.stdout
    refused(tipr("train", "clip-tiny", "--root", few, "--out", run, *NANO, "--set", "lr=0.1"), "another recipe")
    refused(tipr("train", "clip-tiny", "--root", few, "--out", tmp_path/"new", *NANO, "--resume"), "nothing to resume")
    refused(tipr("train", "clip-tiny", "--root", few, "--out", tmp_path/"b", *NANO, "--set", "batch_size=100000"), "batch_size")


def test_evaluate(run, few, tmp_path):
    whole = tipr("evaluate", run, "--root", few, "--by", "kind", "--out", tmp_path/"m.json")
    assert whole.exit_code == 0 and "R@1" in whole.stdout and "incomplete" in whole.stdout
    assert json.loads((tmp_path/"m.json").read_text())["n_queries"] > 0
    best = json.loads(tipr("evaluate", run/"best", "--root", few, "--json").stdout)
    assert 0 < best["r1"] <= best["r5"] <= best["r10"] <= 100 and set(best["intervals"]) >= {"r1", "mAP"} and best["chance_r1"] > 0
    assert json.loads(tipr("evaluate", run, "--root", few, "--split", "val", "--direction", "i2t", "--json").stdout)["direction"] == "i2t"
    refused(tipr("evaluate", run, "--root", few, "--split", "tset"), "unknown split", "did you mean 'test'")
    refused(tipr("evaluate", run, "--root", few, "--by", "hue"), "hue")
    refused(tipr("evaluate", run, "--root", few, "--direction", "t2t"), "t2t")
    refused(tipr("evaluate", run, "--root", few, "--out", tmp_path/"m.txt"), ".json")


def test_evaluate_refuses_pickles_and_other_files(tmp_path, few):
    (tmp_path/"model.pt").write_bytes(b"\x80\x04.")
    refused(tipr("evaluate", tmp_path/"model.pt", "--root", few), "model.pt")
    (tmp_path/"empty").mkdir()
    refused(tipr("evaluate", tmp_path/"empty", "--root", few), "empty")


def test_hub_id_without_network_fails_at_once(few):
    start = time.perf_counter()
    refused(tipr("evaluate", "someone/some-model", "--root", few), "someone/some-model")
    assert time.perf_counter() - start < 20


def test_output_that_cannot_be_written(few, tmp_path):
    (tmp_path/"file").write_text("in the way")
    refused(tipr("train", "clip-tiny", "--root", few, "--out", tmp_path/"file"/"run", *NANO), "file")


def test_grid(few, tmp_path):
    settings = dict(w.split("=") for w in NANO[1::2]) | dict(epochs=1, batch_size=16, lr=2e-3, pretrained=None)
    spec = dict(dataset=dict(name="synth-pedes", root=str(few)), rows=[dict(name="itc", recipe="clip-tiny"), dict(name="sdm", recipe="sdm-id-tiny")], seeds=[0], set=settings)
    (tmp_path/"grid.json").write_text(json.dumps(spec))
    out = tipr("grid", tmp_path/"grid.json", "--device", "cpu")
    assert out.exit_code == 0, out.output
    assert "itc" in out.stdout and "sdm" in out.stdout and (tmp_path/"grid.csv").exists()
    (tmp_path/"grid.json").write_text(json.dumps(spec | dict(rows=[dict(recipe="clip-tinny")])))
    refused(tipr("grid", tmp_path/"grid.json"), "did you mean 'clip-tiny'")


def test_interrupt_is_tidy_and_goes_on(few, tmp_path):
    words = [sys.executable, "-m", "tipr_nb.cli", "train", "clip-tiny", "--root", str(few), "--out", str(tmp_path/"run"), *NANO, "--set", "epochs=400"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as p:
        for line in p.stdout:
            if "epoch 2 of" in line: break
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err and err.strip().splitlines()[-1].startswith("tipr: stopped")
    assert (tmp_path/"run"/"recipe.json").exists()
