"""Recipes, the loop, checkpoints, resume, grids."""

import dataclasses, errno, json, os, random, re, signal, subprocess, sys, time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from layouts import NANO
from parallel_run import drawn

from tipr_nb.methods import OBJECTIVES, Objective, register_objective
from tipr_nb.models import PersonCLIP
from tipr_nb.core import TiprError, load_object, read_json, shipped_weights
from tipr_nb.training import RECIPES, Recipe, get_recipe
from tipr_nb.data import dataset_from_arrays
from tipr_nb.training import (
    Callback,
    NaNGuard,
    Retriever,
    TrainStep,
    build_encoder,
    build_objectives,
    lr_factor,
    param_groups,
)
from tipr_nb.figures import learning_curve
from tipr_nb.models import Checkpoints
from tipr_nb.training import best_weights, data_hash
from tipr_nb.training.runs import check_same_run
from tipr_nb.training import (
    GridTable,
    grid_differences,
    grid_summary,
    read_grid,
    run_grid,
    share_of_ids,
    train,
)

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def nano():
    return RECIPES["clip-tiny"].replace(name="nano", **NANO)


def go(recipe, people, path, **kw):
    return train(recipe, people, path, device="cpu", **{"verbose": False} | kw)


def last_weights(path):
    return {f.name: load_file(f) for f in Checkpoints(path).newest().glob("*.safetensors")}


def same(a, b):
    assert a.keys() == b.keys()
    for f in a:
        assert a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]), f


class Trip(Callback):
    "Leave the loop by an error at given steps, as a killed process does: nothing is saved on the way out."

    def __init__(self, *at):
        self.at = at

    def on_step(self, trainer, losses):
        if trainer.step in self.at:
            raise InterruptedError


class TestRecipe:
    def test_round_trip(self, tmp_path):
        for r in RECIPES.values():
            r.save(tmp_path / "r.json")
            assert (
                Recipe.load(tmp_path / "r.json") == r
                and Recipe.load(tmp_path / "r.json").hash() == r.hash()
            )

    def test_hash_is_stable(self):
        r = Recipe("a", [("SDM", {}), ("ID", {"weight": 2})], epochs=10, warmup_epochs=1)
        code = "from tipr_nb.training import Recipe; print(Recipe('b', ['SDM', ['ID', {'weight': 2}]], warmup_epochs=1., epochs=10, seed=3).hash())"
        assert (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
            == r.hash()
            == "e0ccee239921"
        )

    def test_hash_tells_settings_apart(self):
        r = Recipe()
        changed = [
            r.replace(lr=2e-5),
            r.replace(objectives=["SDM"]),
            r.replace(objectives=[("ITC", {"weight": 2.0})]),
            r.replace(image_size=(224, 224)),
            r.replace(groups=[("bias$", {"lr_scale": 2.0})]),
            r.replace(augment={"erase": 0}),
        ]
        assert len({r.hash(), *(c.hash() for c in changed)}) == len(changed) + 1
        assert r.hash() == r.replace(name="x", seed=4, log_every=3, grad_checkpoint=True).hash()

    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: Recipe("x", ["SMD"]), "did you mean 'SDM'"),
            (lambda: Recipe("x", [("ITC", 3)]), "arguments"),
            (lambda: Recipe("x", []), "objectives"),
            (lambda: Recipe("x", batch_size=1), "batch_size"),
            (lambda: Recipe("x", precision="bf8"), "did you mean 'bf16'"),
            (lambda: Recipe("x", image_size=(0, 32)), "image_size"),
            (lambda: Recipe("x", lr=0), "lr"),
            (lambda: Recipe("x", ema=1.5), "ema"),
            (lambda: Recipe("x", groups=[("bias", {"lr": 2})]), "lr_scale"),
            (lambda: Recipe().replace(epoch=3), "did you mean 'epochs'"),
            (lambda: Recipe.from_dict({"sead": 1}), "did you mean 'seed'"),
            (lambda: get_recipe("sdmid"), "did you mean 'sdm-id'"),
            (lambda: get_recipe("nothing.json"), "no such file"),
        ],
    )
    def test_slips(self, make, words):
        with pytest.raises(TiprError, match=words) as e:
            make()
        assert "\n" not in str(e.value)

    def test_truncated_file(self, tmp_path):
        (tmp_path / "r.json").write_text('{"name": "x", "obj')
        with pytest.raises(TiprError, match="not complete JSON"):
            Recipe.load(tmp_path / "r.json")

    def test_tiny_keeps_the_method(self):
        "What the papers' methods are, with a small fusion for a small tower; released habits (fixed scale, masking) are the plain recipes' alone."
        for n, of in (
            ("clip", "clip"),
            ("sdm-id", "sdm-id"),
            ("tal", "tal"),
            ("sen", "sen-plus"),
            ("gea", "gea"),
            ("gea-sen", "gea-sen"),
        ):
            a, b = RECIPES[of], RECIPES[f"{n}-tiny"]
            method = lambda r: (
                [
                    (o, {k: v for k, v in kw.items() if k not in ("layers", "temperature")})
                    for o, kw in r.objectives
                ],
                r.sampler,
                r.extra_fields,
            )
            assert method(a) == method(b) and (
                a.caption_transform == b.caption_transform or n == "gea"
            )
            assert b.arch == "tipr-tiny" and b.image_size == (96, 32)

    def test_hashes_of_stored_results_stay(self):
        "They stand in result tables and beside the shipped weights."
        want = {
            "sdm-id": "5451a117792f",
            "sen-plus": "b80b6cd264c4",
            "gea-sen": "ad490cb9a315",
            "clip-tiny": "b9b4d1eafb54",
            "sdm-id-tiny": "e1684e63bdd0",
            "tal-tiny": "0b0e4c2c4ff3",
            "sen-tiny": "3d56edd289f7",
            "gea-tiny": "fd4ffacbd835",
            "gea-sen-tiny": "02602ff30a99",
            "pretrain-tiny": "ac33cefa61ea",
            "synth-world-pretrain": "ac33cefa61ea",
        }
        assert {n: RECIPES[n].hash() for n in want} == want

    @pytest.mark.parametrize(
        "settings",
        [
            {"epochs": "10"},
            {"epochs": 10.0},
            {"epochs": True},
            {"lr": "1e-5"},
            {"lr": float("nan")},
            {"lookalikes": 1},
            {"arch": 3},
            {"image_size": "384"},
            {"image_size": [384, 128, 3]},
            {"image_size": [384.0, 128]},
            {"betas": [0.9, 1.0]},
            {"betas": 0.9},
            {"freeze": [3]},
            {"freeze": "visual"},
            {"augment": ["erase"]},
            {"augment": {"flipp": 0.5}},
            {"objectives": "ITC"},
            {"objectives": [["ITC", {"weight": "2"}]]},
            {"objectives": [3]},
            {"groups": [["bias(", {"lr_scale": 2.0}]]},
            {"groups": [["bias", {"lr_scale": "2"}]]},
            {"extra_fields": "other"},
            {"caption_transform": 3},
            {"caption_transform": [3]},
            {"per_id": [1, 0]},
            {"per_id": "2"},
            {"seed": None},
            {"seed": -1},
            {"ema": "no"},
            {"eval_ids": 2.5},
            {"positions": "cubic"},
            {"schedule": "epoch"},
            {"max_seconds": 3},
            {"lr": 10**400},
            {"seed": 10**400},
            {"objectives": [["ITC", {"temperature": "x"}]]},
            {"objectives": [["ITC", {"weight": 10**400}]]},
            {"objectives": [["GIF", {"layers": 1.5}]]},
            {"augment": {"flip": "x"}},
            {"augment": {"area": [1, 2, 3]}},
            {"arch": ["x"] * 5000},
            {"sampler": "x" * 5000},
        ],
    )
    def test_wrong_values_from_a_file(self, settings, tmp_path):
        (tmp_path / "r.json").write_text(json.dumps(settings))
        with pytest.raises(TiprError, match="r.json") as e:
            get_recipe(str(tmp_path / "r.json"))
        assert (
            "\n" not in str(e.value)
            and len(str(e.value)) < 600
            and (
                next(iter(settings)) in str(e.value)
                or "did you mean" in str(e.value)
                or "write it as" in str(e.value)
            )
        )

    @pytest.mark.parametrize("content", ["[]", "3", "null", '"clip"'])
    def test_a_file_that_is_no_recipe(self, content, tmp_path):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(TiprError, match="a table of settings"):
            get_recipe(tmp_path / "r.json")

    def test_lists_of_transforms_survive(self, tmp_path):
        r = Recipe("x", caption_transform=["prune", ["mask", {"flavour": "sen"}]], per_id=[1, 2])
        r.save(tmp_path / "r.json")
        assert (
            Recipe.load(tmp_path / "r.json") == r
            and r.per_id == (1, 2)
            and Recipe("x", caption_transform=["prune"]).hash()
            == Recipe("x", caption_transform="prune").hash()
        )

    @pytest.mark.parametrize("name", ["clip-tiny", "sen-tiny", "gea-sen-tiny"])
    def test_a_recipe_file_with_the_former_name_of_weights_is_the_same_recipe(self, name, tmp_path):
        today = RECIPES[name]
        old = today.to_dict() | dict(pretrained="synth-world")
        (tmp_path / "recipe.json").write_text(json.dumps(old))
        read = Recipe.load(tmp_path / "recipe.json")
        assert read == today and read.pretrained == "clip-synth-world"
        assert read.hash() == today.hash()
        check_same_run(tmp_path, today, {})  # a run of that time goes on

    def test_a_grid_row_with_the_former_name_of_its_hook_is_the_same_row(self):
        rows = [
            dict(
                dataset="synth-pedes",
                rows=[dict(name="GEA", recipe="gea-tiny", hook=hook)],
            )
            for hook in (
                "tipr_nb.tgte:with_pictures",
                "tipr_nb.training.controls:with_pictures",
            )
        ]
        (old,), (new,) = map(read_grid, rows)
        assert old.setup == new.setup

    def test_a_grid_row_with_the_former_name_of_weights_is_the_same_row(self):
        rows = [
            dict(rows=[dict(name="TAL", recipe="tal-tiny", set=dict(pretrained=name))])
            for name in ("synth-world", "clip-synth-world")
        ]
        (old,), (new,) = map(read_grid, rows)
        assert old.recipe == new.recipe and old.setup == new.setup

    def test_shipped_weights_say_how_they_were_made(self):
        made = Recipe.load(shipped_weights()["clip-synth-world"] / "recipe.json")
        assert (
            made.hash() == RECIPES["pretrain-tiny"].hash() == RECIPES["synth-world-pretrain"].hash()
        )
        tuned = Recipe.load(shipped_weights()["clip-synth-pedes"] / "recipe.json")
        assert tuned.pretrained == "clip-synth-world"


class TestParts:
    def test_groups(self, people, nano):
        r = nano.replace(objectives=["ITC", "ID"], weight_decay=0.1, freeze=["visual.transformer"])
        model = Retriever(enc := build_encoder(r), build_objectives(r, enc, people.train.n_ids))
        groups = param_groups(model, r)
        names = [n for g in groups for n in g["names"]]
        assert len(names) == len(set(names)) and not any("visual.transformer" in n for n in names)
        assert not any(
            p.requires_grad for n, p in model.named_parameters() if "visual.transformer" in n
        )
        of = {n: g for g in groups for n in g["names"]}
        assert (
            of["objectives.ID.classifier.weight"]["lr"] == pytest.approx(5 * r.lr)
            and of["objectives.ID.classifier.bias"]["weight_decay"] == 0
        )
        assert (
            of["encoder.clip.ln_final.weight"]["weight_decay"] == 0
            and of["encoder.clip.token_embedding.weight"]["weight_decay"] == 0.1
        )

    def test_lr(self):
        values = [lr_factor(x / 100, 0.1, 0.1, 0.02) for x in range(101)]
        assert (
            values[0] == pytest.approx(0.1)
            and max(values) == values[10] == pytest.approx(1)
            and values[-1] == pytest.approx(0.02)
        )
        assert np.all(np.diff(values[:11]) > 0) and np.all(np.diff(values[10:]) < 0)

    def test_guard_names_the_first(self):
        g = NaNGuard(["a", "b"])
        g.watch([torch.tensor(1.0), torch.tensor(2.0)], 0)
        assert g.check() is None
        g.watch([torch.tensor(1.0), torch.tensor(float("nan"))], 1)
        g.watch([torch.tensor(float("inf")), torch.tensor(1.0)], 2)
        assert g.check() == (1, ["b"])

    def test_an_objective_twice(self, nano, people):
        r = nano.replace(objectives=["TAL", ("TAL", {"margin": 0.2, "weight": 3})])
        built = build_objectives(r, build_encoder(r), people.train.n_ids)
        assert (
            list(built) == ["TAL", "TAL2"]
            and built["TAL2"][1] == 3
            and built["TAL2"][0].margin == 0.2
        )

    def test_objective_argument(self, nano, people):
        with pytest.raises(TiprError, match="margn"):
            build_objectives(
                nano.replace(objectives=[("TAL", {"margn": 0.2})]),
                build_encoder(nano),
                people.train.n_ids,
            )

    def test_share_of_ids_nests(self, people):
        few, more = (share_of_ids(people, s, seed=2) for s in (0.25, 0.5))
        assert few.train.n_ids == 6 and set(few.train.image_columns["source_id"]) < set(
            more.train.image_columns["source_id"]
        )
        assert set(few.train.image_ids) == set(range(6)) and few.test is people.test
        with pytest.raises(TiprError, match="train_share"):
            share_of_ids(people, 0)


class TestTrain:
    def test_learns_and_leaves_what_it_says(self, people, nano, tmp_path):
        run = go(
            nano.replace(epochs=6, objectives=["ITC", "ID"], augment=dict(erase=0.0, flip=0.0)),
            people,
            tmp_path / "r",
        )
        losses = run.history["loss/ITC"].dropna()
        assert run.status == "done" and losses.iloc[-3:].mean() < losses.iloc[:3].mean()
        assert (
            run.best["r1"] == run.history["val/r1"].max()
            and not run.model.training
            and run.train_seconds > 0
        )
        info = json.loads((tmp_path / "r" / "run.json").read_text())
        assert (
            info["status"] == "done"
            and info["recipe_hash"] == run.recipe.hash()
            and info["data_hash"] == data_hash(people)
            and "torch" in info["environment"]
        )
        again = PersonCLIP.from_pretrained(tmp_path / "r" / "best")
        assert torch.equal(again.encode_text(["a red coat"]), run.model.encode_text(["a red coat"]))
        assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))
        learning_curve(run).savefig(tmp_path / "curve.png")

    @pytest.mark.parametrize(
        "settings",
        [
            dict(objectives=["SDM", "ID"], sampler="identity"),
            dict(ema=0.9, accumulate=2, batch_size=8, clip_grad=0.5, patch_dropout=0.25),
            dict(precision="bf16", optimizer="adam"),
        ],
    )
    def test_resume_is_exact(self, people, nano, tmp_path, settings):
        r, rng = nano.replace(epochs=3, **settings), random.Random(5)
        calm = go(r, people, tmp_path / "calm")
        total = int(calm.history.step.max())
        for at in sorted(rng.sample(range(2, total), 3)):
            with pytest.raises(InterruptedError):
                go(
                    r,
                    people,
                    tmp_path / "tripped",
                    save_steps=rng.choice([1, 2, 3]),
                    callbacks=[Trip(at)],
                )
        tripped = go(r, people, tmp_path / "tripped", save_steps=2)
        same(last_weights(calm.path), last_weights(tripped.path))
        assert calm.best == tripped.best and calm.history.drop(columns="seconds").equals(
            tripped.history.drop(columns="seconds")
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(calm.model.state_dict().values(), tripped.model.state_dict().values())
        )

    @pytest.mark.parametrize(
        "objectives, logged",
        [
            (["SDM", ("CMT", {"log_every": 3})], ["CMT/gradient_share"]),
            (
                [("GIF", {"layers": 1, "log_every": 3})],
                ["GIF/relies_on_photo", "GIF/relies_on_caption", "GIF/relies_on_picture"],
            ),
        ],
    )
    def test_diagnostics_continue_exactly(self, people, nano, tmp_path, objectives, logged):
        "What an objective measures every so many calls: the same values at the same steps, whatever kill lies between."
        gif = objectives[0][0] == "GIF"
        r = nano.replace(
            objectives=objectives,
            sampler="identity",
            log_every=1,
            extra_fields=("generated", "other") if gif else (),
        )
        extra = dict(generated=drawn) if gif else None
        calm = go(r, people, tmp_path / "calm", extra=extra)
        for at in (2, 5, 7):
            with pytest.raises(InterruptedError):
                go(r, people, tmp_path / "tripped", save_steps=2, callbacks=[Trip(at)], extra=extra)
        tripped = go(r, people, tmp_path / "tripped", extra=extra)
        assert all(calm.history[name].nunique() > 2 for name in logged), list(calm.history)
        assert calm.history.drop(columns="seconds").equals(tripped.history.drop(columns="seconds"))
        same(last_weights(calm.path), last_weights(tripped.path))

    def test_a_row_that_validation_closed_after_the_checkpoint_is_written_once(
        self, people, nano, tmp_path
    ):
        "A checkpoint at the end of an epoch, in the middle of a row; validation closes the row; a kill. The row is dropped and written again."
        calm = go(nano.replace(log_every=5), people, tmp_path / "calm")
        epoch = int(calm.history.step.max()) // 2
        assert epoch % 5, epoch
        with pytest.raises(InterruptedError):
            go(
                nano.replace(log_every=5),
                people,
                tmp_path / "tripped",
                save_steps=epoch,
                callbacks=[Trip(epoch + 1)],
            )
        tripped = go(nano.replace(log_every=5), people, tmp_path / "tripped")
        assert calm.history.drop(columns="seconds").equals(tripped.history.drop(columns="seconds"))

    def test_the_newest_checkpoints(self, people, nano, tmp_path):
        with pytest.raises(InterruptedError):
            go(nano, people, tmp_path / "a", save_steps=2, callbacks=[Trip(9)])
        assert [p.name for p in Checkpoints(tmp_path / "a").saved()] == [
            "last-00000008",
            "last-00000006",
        ]
        assert len(Checkpoints(go(nano, people, tmp_path / "a").path).saved()) == 1

    def test_leftovers_of_killed_writes_are_swept(self, people, nano, tmp_path):
        go(nano, people, tmp_path / "a")
        for name in (
            ".run.json.0",
            ".history.jsonl.1",
            ".recipe.json.2",
            ".last-00000004.0",
            ".best.0",
        ):
            (tmp_path / "a" / name).mkdir()
            (tmp_path / "a" / name / "half").write_text("x")
        (tmp_path / "a" / ".mine.0").mkdir()
        go(nano, people, tmp_path / "a")
        assert sorted(p.name for p in (tmp_path / "a").glob(".*")) == [".lock", ".mine.0"]

    def test_one_place_knows_where_the_best_weights_are(self):
        package = HERE.parent / "tipr_nb"
        knows = [
            str(p.relative_to(package))
            for p in package.rglob("*.py")
            if re.search(r'/ ?"best"', p.read_text(encoding="utf-8"))
        ]
        assert knows == ["models/storage.py"]

    def test_one_place_writes_safetensors(self):
        package = HERE.parent / "tipr_nb"
        writes = [
            str(p.relative_to(package))
            for p in package.rglob("*.py")
            if re.search(r"import save_file|save_file\(", p.read_text(encoding="utf-8"))
        ]
        assert writes == ["models/storage.py"]

    @pytest.mark.skipif(not (HERE.parent / ".git").exists(), reason="needs a checkout")
    def test_the_commit_stands_beside_the_numbers(self, people, nano, tmp_path):
        want = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout[:12]
        go(nano.replace(epochs=1), people, tmp_path / "a")
        assert read_json(tmp_path / "a" / "run.json")["commit"].rstrip("+") == want

    def test_looking_at_val_changes_nothing(self, people, nano, tmp_path):
        a, b = (
            go(nano, people, tmp_path / "a"),
            go(nano.replace(eval_every=2), people, tmp_path / "b"),
        )
        same(last_weights(a.path), last_weights(b.path))

    @pytest.mark.parametrize("native", [True, False])
    def test_bf16_only_where_it_is_native(
        self, people, nano, tmp_path, monkeypatch, capsys, native
    ):
        import tipr_nb.core.machine as core

        monkeypatch.setattr(core, "native_bf16", lambda device: native)
        recipe, seen = nano.replace(precision="bf16", epochs=1), []

        class Look(Callback):
            def on_step(self, trainer, losses):
                seen.append(trainer.accelerator.mixed_precision)

        run = go(recipe, people, tmp_path / "a", callbacks=[Look()], verbose=True)
        used = "bf16" if native else "fp32"
        assert set(seen) == {"bf16" if native else "no"} and run.recipe.precision == "bf16"
        told = read_json(tmp_path / "a" / "run.json")
        assert (
            told["precision"] == dict(asked="bf16", used=used, steps=[[0, used]])
            and told["recipe_hash"] == recipe.hash()
        )
        assert capsys.readouterr().out.count(f"nano: in {used}, ") == 1
        if not native:
            same(
                last_weights(tmp_path / "a"),
                (go(nano.replace(epochs=1), people, tmp_path / "b"), last_weights(tmp_path / "b"))[
                    1
                ],
            )

    def test_bf16_goes_on_where_it_is_not_native(self, people, nano, tmp_path, monkeypatch):
        "Half of a run on one machine, half on another: it ends, and run.json says which steps ran in what."
        import tipr_nb.core.machine as core

        class Stop(Callback):
            def on_step(self, trainer, losses):
                trainer.stop = trainer.step == 3

        recipe = nano.replace(precision="bf16")
        monkeypatch.setattr(core, "native_bf16", lambda device: True)
        assert go(recipe, people, tmp_path / "a", callbacks=[Stop()]).status == "stopped"
        monkeypatch.setattr(core, "native_bf16", lambda device: False)
        assert go(recipe, people, tmp_path / "a", resume="must").status == "done"
        assert read_json(tmp_path / "a" / "run.json")["precision"] == dict(
            asked="bf16", used="fp32", steps=[[0, "bf16"], [3, "fp32"]]
        )

    def test_seed_matters(self, people, nano, tmp_path):
        a, b = go(nano, people, tmp_path / "a"), go(nano.replace(seed=1), people, tmp_path / "b")
        assert a.recipe.hash() == b.recipe.hash() and not a.history["loss"].equals(
            b.history["loss"]
        )

    def test_callers_random_numbers_are_left_alone(self, people, nano, tmp_path):
        torch.manual_seed(3)
        want = torch.rand(2)
        torch.manual_seed(3)
        go(nano.replace(epochs=1), people, tmp_path / "a")
        assert torch.equal(torch.rand(2), want)

    def test_finished_run_is_taken_as_it_is(self, people, nano, tmp_path):
        a = go(nano, people, tmp_path / "a")
        for p in (tmp_path / "a").glob("last-*"):
            __import__("shutil").rmtree(p)
        b = go(nano, people, tmp_path / "a", callbacks=[Trip(*range(100))])
        assert (
            b.best == a.best and b.history.equals(a.history) and b.train_seconds == a.train_seconds
        )

    def test_cap_and_going_on(self, people, nano, tmp_path):
        r = nano.replace(epochs=4)
        capped = go(r, people, tmp_path / "a", max_seconds=1e-3)
        assert (
            capped.status == "capped"
            and capped.history.step.max() < 12
            and (tmp_path / "a" / "best").is_dir()
        )
        assert (
            go(r, people, tmp_path / "a", max_seconds=1e-3, callbacks=[Trip(*range(100))]).status
            == "capped"
        )
        done = go(r, people, tmp_path / "a", max_seconds=600)
        assert done.status == "done"
        same(last_weights(done.path), last_weights(go(r, people, tmp_path / "b").path))

    def test_schedule_by_time(self, people, nano, tmp_path):
        r = nano.replace(epochs=500, schedule="time", warmup_epochs=0)
        run = go(r, people, tmp_path / "a", max_seconds=1.5)
        assert run.status == "done" and run.history.lr.dropna().iloc[-1] < 0.5 * r.lr
        with pytest.raises(TiprError, match="max_seconds"):
            go(r, people, tmp_path / "b")

    def test_schedule_by_epoch_is_level_within_one(self, people, nano, tmp_path):
        rates = []

        class Look(Callback):
            def on_step(self, trainer, losses):
                rates.append(
                    (int((trainer.step - 1) // trainer.epoch_steps), trainer.train_step.lr)
                )

        go(nano.replace(epochs=4, schedule="epochs"), people, tmp_path / "a", callbacks=[Look()])
        assert (
            len(set(rates)) == 4
            and dict(rates)[0] == pytest.approx(0.1 * nano.lr)
            and dict(rates)[1] == pytest.approx(nano.lr)
        )
        assert dict(rates)[2] == pytest.approx(nano.lr * 0.5 * (1 + np.cos(np.pi / 3)))

    @pytest.mark.parametrize(
        "name",
        [
            "sen",
            pytest.param("irra", marks=pytest.mark.full),
            pytest.param("rde", marks=pytest.mark.full),
        ],
    )
    def test_released_recipe_resumes_exactly(self, people, nano, tmp_path, name):
        sen = RECIPES[name]
        keep = {
            k: getattr(sen, k)
            for k in (
                "objectives",
                "caption_transform",
                "sampler",
                "per_id",
                "same_photo",
                "drop_last",
                "trim_captions",
                "swap_sides",
                "positions",
                "groups",
                "eps",
                "schedule",
            )
        }
        r = nano.replace(**keep)
        calm = go(r, people, tmp_path / "calm")
        with pytest.raises(InterruptedError):
            go(r, people, tmp_path / "tripped", save_steps=2, callbacks=[Trip(3)])
        same(last_weights(calm.path), last_weights(go(r, people, tmp_path / "tripped").path))
        assert all(calm.history[f"loss/{n}"].notna().any() for n, _ in sen.objectives)

    def test_stop_from_a_callback(self, people, nano, tmp_path):
        class Stop(Callback):
            def on_step(self, trainer, losses):
                trainer.stop = trainer.step == 2

        assert go(nano, people, tmp_path / "a", callbacks=[Stop()]).status == "stopped"
        same(
            last_weights(go(nano, people, tmp_path / "a").path),
            last_weights(go(nano, people, tmp_path / "b").path),
        )

    def test_without_val_the_last_weights_are_kept(self, people, nano, tmp_path):
        none = dataclasses.replace(
            people, val=people.val.subset_captions(np.zeros(len(people.val), bool))
        )
        run = go(nano, none, tmp_path / "a")
        assert "no val split" in run.notes[-1] and run.best["epoch"] == 2
        same(
            {"model.safetensors": load_file(tmp_path / "a" / "best" / "model.safetensors")},
            {"model.safetensors": last_weights(run.path)["model.safetensors"]},
        )

    def test_from_arrays(self, nano, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 255, (20, 96, 32, 3), dtype=np.uint8)
        run = go(
            nano.replace(epochs=1),
            dataset_from_arrays(
                pixels, [["a man in red", "a woman in blue"]] * 20, np.arange(20) // 2
            ),
            tmp_path / "a",
        )
        assert run.status == "done" and run.history.step.max() == 2

    def test_given_encoder(self, people, nano, tmp_path):
        torch.manual_seed(1)
        encoder = PersonCLIP("tipr-nano")
        before = encoder.clip.ln_final.weight.detach().clone()
        run = go(nano.replace(epochs=1), people, tmp_path / "a", encoder=encoder)
        assert run.model is encoder and not torch.equal(before, encoder.clip.ln_final.weight)

    def test_tensorboard(self, people, nano, tmp_path):
        go(nano.replace(epochs=1), people, tmp_path / "a", trackers=["tensorboard"])
        assert list((tmp_path / "a").rglob("events.out.tfevents*"))

    def test_only_named_rooms_are_imported(self):
        code = "import sys, tipr_nb.training as t; print([m for m in ('tir', 'cmt', 'tgte', 'gif', 'pruning') if f'tipr_nb.{m}' in sys.modules])"
        assert (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
            == "[]"
        )


class TestBadInput:
    @pytest.fixture
    def nan_at(self):
        @register_objective("Broken")
        class Broken(Objective):
            def __init__(self, encoder, n_ids, at: int = 3, gradient: bool = False):
                super().__init__(encoder, n_ids)
                self.at, self.gradient, self.seen = at, gradient, 0

            def forward(self, features, batch, encoder):
                self.seen += 1
                zero = (features.image * 0).sum()
                if self.seen <= self.at:
                    return zero
                return (zero**2).sqrt() if self.gradient else zero + float("nan")

        yield
        OBJECTIVES.pop("Broken")

    @pytest.mark.parametrize("gradient", [False, True])
    def test_nan_names_the_objective_and_keeps_the_last_good_checkpoint(
        self, people, nano, tmp_path, nan_at, gradient
    ):
        with pytest.raises(TiprError, match="Broken not finite at step 3.*last-00000002") as e:
            go(
                nano.replace(objectives=["ITC", ("Broken", dict(at=3, gradient=gradient))]),
                people,
                tmp_path / "a",
                save_steps=2,
            )
        assert "ITC" not in str(e.value) and ("gradient" in str(e.value)) == gradient
        assert all(
            v.isfinite().all() for w in last_weights(tmp_path / "a").values() for v in w.values()
        )

    def test_mixing(self, people, nano, tmp_path):
        go(nano, people, tmp_path / "a")
        fewer = dataclasses.replace(people, train=people.train.subset_ids(range(20)))
        for change, words in [
            (dict(recipe=nano.replace(lr=2e-3)), "different lr"),
            (dict(recipe=nano.replace(seed=1)), "different seed"),
            (dict(people=fewer), "other data"),
        ]:
            with pytest.raises(TiprError, match=words) as e:
                go(**dict(recipe=nano, people=people, path=tmp_path / "a") | change)
            assert "resume='never'" in str(e.value) and "\n" not in str(e.value)
        assert go(nano.replace(lr=2e-3), people, tmp_path / "a", resume="never").status == "done"

    def test_resume_word(self, people, nano, tmp_path):
        with pytest.raises(TiprError, match="nothing to resume"):
            go(nano, people, tmp_path / "a", resume="must")
        with pytest.raises(TiprError, match="'auto', 'must' or 'never'"):
            go(nano, people, tmp_path / "a", resume=True)

    def test_two_at_once(self, people, nano, tmp_path):
        from filelock import FileLock

        (tmp_path / "a").mkdir()
        with (
            FileLock(str(tmp_path / "a" / ".lock")),
            pytest.raises(TiprError, match="another process"),
        ):
            go(nano, people, tmp_path / "a")

    def test_wrong_architecture(self, people, nano, tmp_path):
        PersonCLIP("tipr-tiny").save_pretrained(tmp_path / "tiny")
        with pytest.raises(TiprError, match="tipr-tiny"):
            go(nano.replace(pretrained=str(tmp_path / "tiny")), people, tmp_path / "a")
        with pytest.raises(TiprError, match="wants arch"):
            go(nano, people, tmp_path / "b", encoder=PersonCLIP("tipr-tiny"))
        with pytest.raises(TiprError, match="wants image_size"):
            go(nano, people, tmp_path / "c", encoder=PersonCLIP("tipr-nano", (64, 32)))
        with pytest.raises(TiprError):
            go(nano.replace(arch="tipr-nanno"), people, tmp_path / "d")

    def test_damaged_checkpoint(self, people, nano, tmp_path):
        "The message says which folder to delete and from where the run then starts again; doing so ends as if nothing had happened."
        calm = go(nano, people, tmp_path / "calm")
        with pytest.raises(InterruptedError):
            go(nano, people, tmp_path / "a", save_steps=2, callbacks=[Trip(5)])
        two, four = Checkpoints(tmp_path / "a").saved()[::-1]
        assert (two.name, four.name) == ("last-00000002", "last-00000004")
        whole = (four / "model.safetensors").read_bytes()
        for spoil in (
            lambda: (four / "model.safetensors").write_bytes(whole[:1000]),
            lambda: (four / "state.json").write_text("{}"),
            lambda: (four / "state.json").write_text("{"),
            lambda: (four / "optimizer.safetensors").unlink(),
        ):
            spoil()
            with pytest.raises(
                TiprError, match="delete this folder to start again from step 2"
            ) as e:
                go(nano, people, tmp_path / "a")
            assert "\n" not in str(e.value) and str(four) in str(e.value)
        __import__("shutil").rmtree(four)
        same(last_weights(calm.path), last_weights(go(nano, people, tmp_path / "a").path))
        assert [p.name for p in Checkpoints(tmp_path / "a").saved()] == [
            Checkpoints(calm.path).newest().name
        ]

    def test_the_only_checkpoint_is_damaged(self, people, nano, tmp_path):
        with pytest.raises(InterruptedError):
            go(nano, people, tmp_path / "a", save_steps=2, callbacks=[Trip(3)])
        (Checkpoints(tmp_path / "a").newest() / "state.json").write_text("[]")
        with pytest.raises(
            TiprError, match="delete this folder to start again from the beginning"
        ) as e:
            go(nano, people, tmp_path / "a")
        __import__("shutil").rmtree(str(e.value).split(": a checkpoint")[0])
        same(
            last_weights(go(nano, people, tmp_path / "a").path),
            last_weights(go(nano, people, tmp_path / "b").path),
        )

    @pytest.mark.parametrize(
        "name, text, words",
        [
            ("run.json", "{", "delete this file"),
            ("run.json", "{}", "delete this file"),
            ("run.json", "[]", "delete this file"),
            ("best/metrics.json", "{", "delete the folder best"),
        ],
    )
    def test_a_damaged_file_of_a_run(self, people, nano, tmp_path, name, text, words):
        "What the message advises works."
        with pytest.raises(InterruptedError):
            go(nano, people, tmp_path / "a", save_steps=2, callbacks=[Trip(9)])
        assert (tmp_path / "a" / "best").is_dir()
        (tmp_path / "a" / name).write_text(text)
        with pytest.raises(TiprError, match=words) as e:
            go(nano, people, tmp_path / "a")
        assert "\n" not in str(e.value)
        if name == "run.json":
            (tmp_path / "a" / name).unlink()
        else:
            __import__("shutil").rmtree(tmp_path / "a" / "best")
        assert (
            go(nano, people, tmp_path / "a").status == "done"
            and best_weights(tmp_path / "a").is_dir()
        )

    def test_a_checkpoint_that_cannot_be_read_back_removes_no_older_one(
        self, people, nano, tmp_path, monkeypatch
    ):
        import tipr_nb.models.storage as storage

        real = storage.read_metadata

        def damaged(file):
            if "last-00000004" in str(file):
                raise TiprError(f"{file}: not a complete safetensors file")
            return real(file)

        monkeypatch.setattr(storage, "read_metadata", damaged)
        with pytest.raises(TiprError, match="not a complete"):
            go(nano, people, tmp_path / "a", save_steps=1)
        assert [p.name for p in Checkpoints(tmp_path / "a").saved()] == [
            "last-00000004",
            "last-00000003",
            "last-00000002",
        ]

    def test_data(self, people, nano, tmp_path):
        one = dataclasses.replace(people, train=people.train.subset_ids([0]))
        none = dataclasses.replace(
            people, train=people.train.subset_captions(np.zeros(len(people.train), bool))
        )
        gaps = dataclasses.replace(
            people, train=people.train.subset_ids(range(1, 24), relabel=False)
        )
        for data, words in (
            (one, "one training identity"),
            (none, "no training captions"),
            (gaps, "renumber"),
        ):
            with pytest.raises(TiprError, match=words):
                go(nano, data, tmp_path / "a")
        with pytest.raises(TiprError, match="larger than the"):
            go(nano.replace(batch_size=4096), people, tmp_path / "a")
        with pytest.raises(TiprError, match="accumulate"):
            go(nano.replace(accumulate=1000), people, tmp_path / "a")
        with pytest.raises(TiprError, match="generated"):
            go(nano.replace(extra_fields=("generated",)), people, tmp_path / "a")
        with pytest.raises(TiprError, match="fp16"):
            go(nano.replace(precision="fp16"), people, tmp_path / "a")

    def test_output_below_a_file(self, people, nano, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(TiprError, match="file"):
            go(nano, people, tmp_path / "file" / "run")

    @pytest.mark.parametrize("how", ["safetensors", "os"])
    def test_disk_full_keeps_the_last_checkpoint(self, people, nano, tmp_path, monkeypatch, how):
        import safetensors.torch
        from safetensors import SafetensorError

        real, calls = safetensors.torch.save_file, []

        def full(tensors, path, **kw):
            calls.append(path)
            if len(calls) > 4:
                Path(path).write_bytes(b"half")
                raise (
                    SafetensorError(
                        "Error while serializing: I/O error: No space left on device (os error 28)"
                    )
                    if how == "safetensors"
                    else OSError(errno.ENOSPC, "No space left on device")
                )
            return real(tensors, path, **kw)

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(TiprError, match="no space left") as e:
            go(nano, people, tmp_path / "a", save_steps=2)
        assert "\n" not in str(e.value)
        monkeypatch.undo()
        left = [p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(("last", ".last"))]
        assert left == ["last-00000002"]
        same(
            last_weights(go(nano, people, tmp_path / "a").path),
            last_weights(go(nano, people, tmp_path / "b").path),
        )

    def test_half_swapped_best_is_mended(self, tmp_path):
        c = Checkpoints(tmp_path)
        aside = tmp_path / ".best.abc" / "old"
        aside.mkdir(parents=True)
        (aside / "metrics.json").write_text("{}")
        (tmp_path / ".last-00000004.xyz").mkdir()
        c.recover()
        assert [p.name for p in tmp_path.iterdir()] == ["best"] and (
            tmp_path / "best" / "metrics.json"
        ).exists()


class TestGrid:
    @pytest.fixture
    def grid(self):
        return dict(
            seeds=[0, 1],
            set={k: v for k, v in NANO.items() if k != "epochs"} | dict(epochs=1),
            rows=[dict(name="ITC", recipe="clip-tiny"), dict(name="TAL", recipe="tal-tiny")],
        )

    def test_runs_skips_and_goes_on(self, people, grid, tmp_path):
        out = tmp_path / "t.csv"
        first = run_grid(dict(grid, seeds=[0]), out, dataset=people, device="cpu", verbose=False)
        alone = first[first.captions == "all"]
        assert (
            list(alone.row) == ["ITC", "TAL"]
            and alone.r1.notna().all()
            and (alone.status == "done").all()
            and alone.recipe_hash.nunique() == 2
        )
        when = out.stat().st_mtime_ns
        again = run_grid(dict(grid, seeds=[0]), out, dataset=people, device="cpu", verbose=False)
        assert out.stat().st_mtime_ns == when and again.equals(first)
        wider = run_grid(grid, out, dataset=people, device="cpu", verbose=False)
        assert len(wider[wider.captions == "all"]) == 4
        summary = grid_summary(wider)
        assert (
            list(summary.index) == ["ITC", "TAL"]
            and (summary.seeds == 2).all()
            and "±" in summary.r1["ITC"]
        )
        asked = pd.concat(
            [wider.assign(query=q, r1=wider.r1 + i) for i, q in enumerate(("caption", "picture"))]
        )
        ways = grid_summary(asked)
        assert (
            list(ways.index)
            == [("ITC", "caption"), ("TAL", "caption"), ("ITC", "picture"), ("TAL", "picture")]
            and (ways.seeds == 2).all()
            and ways.r1["TAL", "caption"] == summary.r1["TAL"]
        )
        assert (
            not list((tmp_path / "t-runs").rglob("last-*"))
            and len(list((tmp_path / "t-runs").rglob("test.json"))) == 4
        )

    def test_every_row_s_first_seed_comes_first(self, grid):
        jobs = read_grid(
            dict(
                grid,
                seeds=[3, 1],
                rows=[*grid["rows"], dict(name="lone", recipe="clip-tiny", seeds=[7])],
            )
        )
        n = len(grid["rows"])
        assert [j.recipe.seed for j in jobs] == [3] * n + [7] + [1] * n and [
            j.row for j in jobs[:n]
        ] == [j.row for j in jobs[n + 1 :]]

    def test_differences_are_paired_by_seed(self):
        from scipy.stats import ttest_rel

        rng = np.random.default_rng(0)
        x, y = rng.normal(50, 3, 5), rng.normal(0, 0.4, 5) + 0.5
        t = pd.DataFrame(
            [
                dict(row=r, query=q, seed=s, captions="all", split="test", status="done", r1=v[s])
                for r, q, v in (
                    ("a", "caption", x),
                    ("b", "caption", x + y),
                    ("b", "picture", x + 2 * y),
                )
                for s in range(5)
                if (r, q, s) != ("b", "picture", 4)
            ]
        )
        t = pd.concat([t, t.assign(status="failed", r1=0.0, seed=9)])
        d = grid_differences(t, ("a", "caption"), by=["row", "query"])
        want = ttest_rel(x + y, x).confidence_interval()
        assert d.loc[("b", "caption"), ["lo", "hi"]].tolist() == pytest.approx(
            [want.low, want.high]
        ) and d.seeds.tolist() == [5, 4]
        assert (d.detectable > d.hi - d.difference).all()
        one = grid_differences(t[t.seed == 0], ("a", "caption"), by=["row", "query"])
        assert one.lo.isna().all() and one.difference.notna().all() and (one.seeds == 1).all()
        with pytest.raises(TiprError, match="no such line"):
            grid_differences(t, ("c", "caption"), by=["row", "query"])
        with pytest.raises(TiprError, match="more than one row"):
            grid_differences(t, "a")

    def test_killed_between_training_and_writing(self, people, grid, tmp_path, monkeypatch):
        grid = dict(grid, seeds=[0], rows=grid["rows"][:1])

        def die(*a):
            raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(GridTable, "add", die)
            run_grid(grid, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        steps = []
        monkeypatch.setattr(TrainStep, "__call__", lambda *a: steps.append(1))
        t = run_grid(grid, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        assert not steps and t.r1.notna().all()

    def test_breakdowns_are_there_before_a_run_counts_as_done(
        self, people, grid, tmp_path, monkeypatch
    ):
        grid, real, calls = dict(grid, seeds=[0], rows=grid["rows"][:1]), GridTable.add, []

        def dies(table, key, rows):
            calls.append(table.path.name)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(table, key, rows)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(GridTable, "add", dies)
            run_grid(grid, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        assert calls == ["t-by.csv", "t.csv"] and not (tmp_path / "t.csv").exists()
        run_grid(grid, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        by = pd.read_csv(tmp_path / "t-by.csv")
        assert len(by) and not by.duplicated(["row", "seed", "split", "column", "value"]).any()

    def test_stored_tables_are_recognised_as_done(self):
        "Nothing is run: rows of the papers' grids against the tables beside them, whatever hooks are called today."
        papers, found = HERE.parent / "nbs" / "papers", {}
        for spec in sorted((papers / "grids").glob("*.toml")):
            tables = [p for p in papers.glob(f"*/{spec.stem}.csv")]
            assert tables, spec
            t = pd.concat([GridTable(p).read() for p in tables])
            known = set(zip(t.row, t.seed.astype(int), t.recipe_hash, t.setup))
            jobs = read_grid(spec)
            for j in jobs:  # the first trials of GIF are older than its switch photo_gradient, and were made as if it were on
                if spec.stem == "gea-tuning":
                    j.recipe = j.recipe.replace(
                        objectives=[
                            (n, {k: v for k, v in kw.items() if k != "photo_gradient"})
                            for n, kw in j.recipe.objectives
                        ]
                    )
            found[spec.stem] = (
                sum((j.row, j.recipe.seed, j.recipe.hash(), j.setup) in known for j in jobs),
                len(jobs),
            )
        assert all(have == n for have, n in found.values()), found

    def test_failures_are_rows_and_are_tried_again(self, people, grid, tmp_path):
        bad = dict(
            grid,
            seeds=[0],
            rows=[grid["rows"][0], dict(name="big", recipe="clip-tiny", set=dict(batch_size=4096))],
        )
        t = run_grid(bad, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        failed = t[t.status == "failed"]
        assert (
            list(failed.row) == ["big"]
            and "batch_size" in failed.reason.iloc[0]
            and (t[t.row == "ITC"].status == "done").all()
        )
        assert len(
            run_grid(bad, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        ) == len(t)

    def test_evaluation_is_part_of_the_key(self, people, grid, tmp_path):
        grid = dict(grid, seeds=[0], rows=grid["rows"][:1])
        a = run_grid(grid, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        b = run_grid(
            dict(grid, splits=["val", "test"]),
            tmp_path / "t.csv",
            dataset=people,
            device="cpu",
            verbose=False,
        )
        assert (
            set(a.split) == {"test"}
            and set(b.split) == {"val", "test"}
            and a.r1.iloc[0] == b[b.split == "test"].r1.iloc[0]
        )

    def test_share_hook_and_columns(self, people, grid, tmp_path, monkeypatch):
        (tmp_path / "hooks.py").write_text(
            "def extra(job, dataset): return dict(columns={'ids': dataset.train.n_ids}, after=lambda run: {'query_ms': 1.5})\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        spec = dict(
            grid,
            seeds=[0],
            hook="hooks:extra",
            rows=[dict(name="half", recipe="clip-tiny", train_share=0.5)],
        )
        t = run_grid(spec, tmp_path / "t.csv", dataset=people, device="cpu", verbose=False)
        assert (t.ids == 12).all() and (t.query_ms == 1.5).all()
        with pytest.raises(TiprError, match="hook"):
            load_object("hooks:nothing", "hook")

    def test_files_of_other_kinds(self, tmp_path):
        "UTF-16 and code pages are named, a byte-order mark is nothing; a table cut inside a quote is one line."
        text = '[[rows]]\nname = "Größe"\nrecipe = "clip-tiny"\n'
        (tmp_path / "bom.toml").write_bytes(text.encode("utf-8-sig"))
        assert [j.row for j in read_grid(tmp_path / "bom.toml")] == ["Größe"]
        for name, data, words in (
            ("a.toml", text.encode("utf-16"), "UTF-16"),
            ("b.toml", text.encode("latin-1"), "save it as UTF-8"),
            ("c.json", b"[" * 100_000, "nested too deeply"),
            ("d.toml", b"rows = " + b"[" * 100_000, "TOML"),
        ):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(TiprError, match=words) as e:
                read_grid(tmp_path / name)
            assert "\n" not in str(e.value)
        for data, words in (
            (b'row,seed,recipe_hash,data_hash,setup,status\n"a,0,b,c,d,done\n', "not a CSV file"),
            ("row,größe\n".encode("latin-1"), "save it as UTF-8"),
            ("row,seed\n".encode("utf-16"), "UTF-16"),
        ):
            (tmp_path / "t.csv").write_bytes(data)
            with pytest.raises(TiprError, match=words) as e:
                GridTable(tmp_path / "t.csv").read()
            assert "\n" not in str(e.value)

    def test_a_run_has_a_lock(self, people, grid, tmp_path, monkeypatch):
        "A second process leaves a run alone that another is at, and does the others."
        from filelock import FileLock
        from tipr_nb.training.grid import GridRunner, run_folder

        one, two = read_grid(dict(grid, seeds=[0]))
        runner = GridRunner(tmp_path / "t.csv", tmp_path / "runs", people, "cpu")
        key = runner.key(one)
        (tmp_path / "runs").mkdir()
        with FileLock(str(tmp_path / "runs" / f".{run_folder(key)}.lock")):
            assert (
                runner.run(one) is None
                and not (tmp_path / "t.csv").exists()
                and not (tmp_path / "runs" / run_folder(key)).exists()
            )
            assert "r1" in runner.run(two)
        assert "r1" in runner.run(one)

    def test_two_writers_lose_no_row(self, tmp_path):
        "Each row is added to what the table holds at that moment, under its lock."
        from threading import Thread
        import time as clock

        table, real = GridTable(tmp_path / "t.csv"), GridTable.read

        class Slow(GridTable):
            def read(self):
                t = real(self)
                clock.sleep(0.02)
                return t

        def add(name):
            for seed in range(5):
                Slow(table.path).add(
                    (name, seed, "a", "b", "c"), [dict(captions="all", status="done", r1=1.0)]
                )

        writers = [Thread(target=add, args=(name,)) for name in "xyz"]
        for w in writers:
            w.start()
        for w in writers:
            w.join()
        assert len(table.read()) == 15

    def test_files(self, tmp_path):
        (tmp_path / "g.toml").write_text(
            'seeds = [0, 1]\n[set]\nepochs = 3\n[[rows]]\nrecipe = "clip-tiny"\n[[rows]]\nname = "b"\nrecipe = "tal-tiny"\nset = {lr = 1e-4}\n'
        )
        jobs = read_grid(tmp_path / "g.toml")
        assert [(j.row, j.recipe.seed, j.recipe.epochs, j.recipe.lr) for j in jobs] == [
            ("clip-tiny", 0, 3, 1e-4),
            ("b", 0, 3, 1e-4),
            ("clip-tiny", 1, 3, 1e-4),
            ("b", 1, 3, 1e-4),
        ]
        (tmp_path / "bad.toml").write_text("rows = [")
        for name, words in (
            ("bad.toml", "not a TOML file"),
            ("none.toml", "no such file"),
            ("none.json", "no such file"),
        ):
            with pytest.raises(TiprError, match=words):
                read_grid(tmp_path / name)

    @pytest.mark.parametrize(
        "slip, words",
        [
            (dict(seeds="0"), "seeds"),
            (dict(seeds=[0.5]), "seeds"),
            (dict(seeds=["0"]), "seeds"),
            (dict(max_seconds="900"), "max_seconds"),
            (dict(splits="test"), "splits"),
            (dict(by=[3]), "by"),
            (dict(train_share="0.1"), "train_share"),
            (dict(hook=3), "hook"),
            (dict(evaluate=[1]), "evaluate"),
            (dict(rows="clip"), "no rows"),
            (dict(rows=["clip-tiny"]), "not a table"),
            (dict(set=3), "set"),
            (dict(set=dict(epochs="3")), "row 1.*epochs"),
            (dict(keep="last"), "keep"),
            (dict(row=1), "did you mean 'rows'"),
            (dict(rows=[]), "no rows"),
            (dict(rows=[dict(name="x")]), "no recipe"),
            (dict(rows=[dict(recipe="clip-tinny")]), "clip-tiny"),
            (dict(rows=[dict(recipe="clip-tiny")] * 2), "its own name"),
            (dict(set=dict(epoch=1)), "did you mean 'epochs'"),
            (dict(set=dict(objectives=["ITD"])), "objective"),
        ],
    )
    def test_slips(self, grid, slip, words):
        with pytest.raises(TiprError, match=words):
            read_grid(grid | slip)

    def test_foreign_table(self, people, grid, tmp_path):
        (tmp_path / "t.csv").write_text("a,b\n1,2\n")
        with pytest.raises(TiprError, match="not the table of a grid"):
            run_grid(grid, tmp_path / "t.csv", dataset=people)
        assert (tmp_path / "t.csv").read_text() == "a,b\n1,2\n"
        with pytest.raises(TiprError, match="out_csv"):
            run_grid(grid)


def launch(home, out, objectives, epochs, world=1, save=0, port=29500, settings=None):
    env = os.environ | dict(
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(HERE.parent),
        TIPR_CACHE=str(home / "cache"),
        TIPR_QUIET="1",
    )
    dist = lambda rank: (
        dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        if world > 1
        else {}
    )
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "parallel_run.py"),
                str(home / "people"),
                str(out),
                json.dumps(objectives),
                str(epochs),
                str(save),
                json.dumps(settings or {}),
            ],
            env=env | dist(rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def wait(processes):
    for p in processes:
        _, err = p.communicate(timeout=float(os.environ.get("TEST_WAIT", 240)))
        assert p.returncode == 0, err[-2000:]


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


ALL_LOSSES = [["ITC", {}], ["SDM", {}], ["ID", {}], ["TAL", {"weight": 0.1}]]
SEN_LOSSES = [["SDM", {}], ["ID", {}], ["TIR", {"weight": 10.0}], ["CMT", {"weight": 10.0}]]
METHODS = {
    "clip": (ALL_LOSSES, {}),
    "sen": (SEN_LOSSES, dict(caption_transform="prune", eps=1e-3)),
    "gea": ([["TGTE", {}], ["GIF", {}]], dict(eps=1e-3, lr=1e-4)),
    "chunks": (SEN_LOSSES, dict(grad_cache=3, lora=2, patch_dropout=0.25, eps=1e-3)),
}


def losses_of(run):
    return json.loads((run / "losses.json").read_text())


def nearly_same(one, two, shared):
    "Two runs, of one process and of two, say: the losses named in `shared` step by step, and the last weights."
    for a, b in zip(losses_of(one), losses_of(two)):
        assert {k: b[k] for k in shared} == {
            k: pytest.approx(a[k], rel=1e-5, abs=1e-6) for k in shared
        }
    a, b = last_weights(one), last_weights(two)
    for f in ("model.safetensors", "objectives.safetensors"):
        assert not a[f] or max((a[f][k] - b[f][k]).abs().max() for k in a[f]) < 1e-5


@pytest.mark.parametrize(
    "method, epochs", [("clip", 4), ("sen", 1), pytest.param("gea", 1, marks=pytest.mark.full)]
)
def test_two_processes_equal_one(home, people, method, epochs, tmp_path):
    losses, settings = METHODS[method]
    wait(
        launch(home, tmp_path / "one", losses, epochs, settings=settings)
        + launch(home, tmp_path / "two", losses, epochs, 2, port=free_port(), settings=settings)
    )
    one, two = (losses_of(tmp_path / n) for n in ("one", "two"))
    shared = [
        k for k in one[0] if k.startswith("loss/") and k != "loss/TIR"
    ]  # each process restores its own pairs: only the mean over processes is one process's
    assert len(one) == len(two) >= 5 * epochs and shared
    nearly_same(tmp_path / "one", tmp_path / "two", shared)


class Machine(NamedTuple):
    "One of two machines: how a command is started there, and its place in the network."

    prefix: list[str]
    address: str
    interface: str


@pytest.fixture
def two_machines():
    "Two network namespaces joined by a virtual cable, where the kernel allows them; else two addresses of this machine."
    names = [f"tipr{os.getpid()}{end}" for end in "ab"]
    cables = [f"t{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    run = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
    try:
        for name in names:
            run("netns", "add", name)
        run("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, addresses):
            run("link", "set", cable, "netns", name)
            run("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            run("-n", name, "link", "set", cable, "up")
            run("-n", name, "link", "set", "lo", "up")  # the main process speaks to itself too
        prefixes = [["ip", "netns", "exec", name] for name in names]
        yield [Machine(*facts) for facts in zip(prefixes, addresses, cables)]
    except (OSError, subprocess.CalledProcessError):
        yield [Machine([], f"127.0.0.{i}", "lo") for i in (1, 2)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def launch_on(machines, home, out, objectives, epochs, port, settings):
    "A process on each machine, as `torchrun --nnodes 2 --node-rank RANK --nproc-per-node 1` starts it."
    arguments = [home / "people", out, json.dumps(objectives), epochs, 0, json.dumps(settings)]
    command = [sys.executable, str(HERE / "parallel_run.py"), *map(str, arguments)]
    shared = dict(
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(HERE.parent),
        TIPR_QUIET="1",
        LOCAL_RANK="0",
        WORLD_SIZE=str(len(machines)),
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR=machines[0].address,
        MASTER_PORT=str(port),
    )
    processes = []
    for rank, machine in enumerate(machines):
        own = dict(
            RANK=str(rank),
            GROUP_RANK=str(rank),
            GLOO_SOCKET_IFNAME=machine.interface,
            TIPR_CACHE=str(home / f"cache-of-{rank}"),  # the machines share no cache
        )
        processes.append(
            subprocess.Popen(
                [*machine.prefix, *command],
                env=os.environ | shared | own,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


@pytest.mark.full
def test_two_machines_equal_one(home, people, two_machines, tmp_path):
    "The odd last batch of an epoch, which two processes cannot share, is left out on both alike."
    losses, _ = METHODS["clip"]
    odd = dict(batch_size=14, sampler="random")
    assert len(people.train) % odd["batch_size"], "choose a batch size that leaves an odd batch"
    more = odd | dict(drop_last=False)
    wait(
        launch(home, tmp_path / "one", losses, 1, 2, port=free_port(), settings=odd)
        + launch_on(two_machines, home, tmp_path / "two", losses, 1, free_port(), more)
    )
    one, two = (losses_of(tmp_path / n) for n in ("one", "two"))
    assert len(one) == len(two) == len(people.train) // odd["batch_size"]
    shared = [k for k in one[0] if k.startswith("loss/")]
    nearly_same(tmp_path / "one", tmp_path / "two", shared)


def kill_and_go_on(home, folder, method, world, epochs, kills, rng):
    "Kill a run at random moments again and again; the run that is left alone afterwards is compared with one that never was."
    losses, settings = METHODS[method]
    start = lambda out: launch(home, out, losses, epochs, world, 1, free_port(), settings)
    wait(start(folder / "calm"))
    for _ in range(kills):
        seen, running, began = (
            Checkpoints(folder / "killed").newest(),
            start(folder / "killed"),
            time.time(),
        )
        while (
            Checkpoints(folder / "killed").newest() == seen
            and time.time() - began < 120
            and any(p.poll() is None for p in running)
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        for p in running:
            p.send_signal(signal.SIGKILL)
        for p in running:
            p.communicate()
    wait(start(folder / "killed"))
    same(last_weights(folder / "calm"), last_weights(folder / "killed"))


def test_kill_9_once(home, people, tmp_path):
    kill_and_go_on(home, tmp_path, "sen", 1, 2, 1, random.Random(0))


@pytest.mark.full
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_at_random_steps(home, people, world, method, tmp_path):
    kill_and_go_on(
        home, tmp_path, method, world, 16 if method == "clip" else 4, 3, random.Random(world)
    )


@pytest.mark.parametrize(
    "call", [5, pytest.param(4, marks=pytest.mark.full)]
)  # of the second checkpoint: optimizer.safetensors, objectives.safetensors
def test_killed_while_a_checkpoint_is_written(home, people, nano, tmp_path, call):
    code = f"""
import os, signal, sys
sys.argv = ["parallel_run.py"]
sys.path.insert(0, {str(HERE)!r})
import tipr_nb.training.steps as steps, parallel_run
real, calls = steps.write_safetensors, []
def dies(path, tensors):
    calls.append(path)
    real(path, tensors)
    if len(calls) == {call - 1}:
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
steps.write_safetensors = dies
parallel_run.main({str(home / "people")!r}, {str(tmp_path / "a")!r}, '[["ITC", {{}}], ["ID", {{}}]]', 1, 2)
"""
    env = os.environ | dict(
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(HERE.parent),
        TIPR_CACHE=str(home / "cache"),
        TIPR_QUIET="1",
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode
        == -signal.SIGKILL
    )
    left = Checkpoints(tmp_path / "a").newest()
    assert left.name == "last-00000002" and set(load_file(left / "objectives.safetensors")) == {
        "ID.classifier.weight",
        "ID.classifier.bias",
    }
    for out in ("a", "b"):
        wait(launch(home, tmp_path / out, [["ITC", {}], ["ID", {}]], 1, save=2))
    same(last_weights(tmp_path / "a"), last_weights(tmp_path / "b"))


@pytest.mark.full
def test_two_processes_share_a_grid(home, people, tmp_path):
    spec = dict(
        seeds=[0, 1, 2],
        set=NANO,
        rows=[dict(name="ITC", recipe="clip-tiny"), dict(name="TAL", recipe="tal-tiny")],
        dataset=dict(name="synth-pedes", root=str(home / "people")),
    )
    (tmp_path / "g.json").write_text(json.dumps(spec))
    code = f"from tipr_nb.training import run_grid; run_grid({str(tmp_path / 'g.json')!r}, device='cpu')"
    env = os.environ | dict(
        PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS="1", TIPR_CACHE=str(home / "cache")
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=300) for p in both]
    assert all(p.returncode == 0 for p in both), said
    t = pd.read_csv(tmp_path / "g.csv")
    assert (
        len(t[t.captions == "all"]) == 6
        and not t.duplicated(["row", "seed", "captions"]).any()
        and (t.status == "done").all()
    )
    assert all("r1" in out for out, _ in said)


def test_threads_follow_what_is_free_all_through_a_training(people, nano, tmp_path, monkeypatch):
    "Looked at after every step and validation batch, not only at the start."
    import psutil
    import tipr_nb.core.machine as machine

    looked = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr(machine.FreeThreads, "use", lambda self, free: self.most)
    monkeypatch.setattr(machine.FreeThreads, "follow", lambda self: looked.append(self.most))
    with machine.free_threads(2):  # as the demo does
        run = go(nano.replace(epochs=1), people, tmp_path / "a")
    steps = int(run.history.step.max())
    assert len(looked) > steps and set(looked) == {2}  # more: validation looks, too


def test_one_run_in_a_folder_at_a_time(tmp_path):
    from tipr_nb.training.loop import only_run_in

    with only_run_in(tmp_path / "a"):
        with pytest.raises(TiprError, match="another process is training here"):
            with only_run_in(tmp_path / "a"):
                pass
    with only_run_in(tmp_path / "a"):
        pass


def test_the_moving_average_follows_the_weights(people, nano, tmp_path):
    from tipr_nb.training import Trainer

    trainer = Trainer(nano.replace(ema=0.5), people, tmp_path / "a", device="cpu")
    step = trainer.train_step
    step.retriever.train()
    seen = []
    for _ in range(2):
        trainer.one_step(trainer.loader.batches())
        seen.append([p.detach().clone() for p in step.retriever.encoder.parameters()])
    moved = 0
    for first, second, average in zip(*seen, step.ema.module.parameters()):
        torch.testing.assert_close(average, (first + second) / 2)
        moved += int(not torch.equal(first, second))
    assert moved
