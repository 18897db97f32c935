"""The bench beside the released code: what it refuses, its statistics, and the stored results of all four recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import parity
from tipr_nb.core import TiprError
from tipr_nb.training import RECIPES

RESULTS = Path(parity.__file__).parent / "results"
NAMES = ["clip", "irra", "rde", "sen"]


def checkout(home, cls, folder=".", files=parity.CODE):
    "A folder that looks like a project's."
    for name in files:
        path = home / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"class {cls}(object): pass\n" if name == "model/build.py" else "", encoding="utf-8"
        )
    return home


def test_refuses_what_is_no_checkout(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TiprError, match="neither IRRA, SEN nor RDE") as e:
            parity.find_peer(str(place), None)
        assert "\n" not in str(e.value)
    checkout(tmp_path, "CLIP4Clip")
    with pytest.raises(TiprError, match="neither IRRA, SEN nor RDE"):
        parity.find_peer(str(tmp_path), None)


@pytest.mark.parametrize(
    "cls, folder, other",
    [("IRRA", ".", "sen"), ("SEN", ".", "rde"), ("RDE", "2024-CVPR-RDE", "irra")],
)
def test_refuses_another_revision_a_part_and_another_recipe(cls, folder, other, tmp_path):
    checkout(tmp_path, cls, folder)
    with pytest.raises(TiprError, match=f"{cls} at another revision") as e:
        parity.find_peer(str(tmp_path), None)
    assert parity.REVISIONS[cls] in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(TiprError, match="neither"):
        parity.find_peer(str(tmp_path), other)
    (tmp_path / folder / "solver" / "build.py").unlink()
    with pytest.raises(TiprError, match="without solver/build.py; give a whole checkout"):
        parity.find_peer(str(tmp_path), None)


def test_the_command_refuses_in_one_line(tmp_path):
    import subprocess, sys

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.parity", "--peer", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(parity.__file__).parent.parent,
    )
    assert (
        done.returncode == 1
        and done.stderr.strip().endswith("give the folder of a checkout of one of them")
        and "Traceback" not in done.stderr
    )


def test_batch_statistics():
    ids, photos = np.array([0, 0, 1, 2]), np.array([0, 0, 1, 2])
    got = parity.batch_statistics([np.array([0, 1, 2, 3]), np.array([2, 3])], ids, photos)
    assert got == dict(
        batches=2, last=2, identities=2.5, least=2, most=3, with_partner=0.25, same_photo=0.25
    )


def test_distance_is_relative_and_over_all_tensors():
    a, b = (
        {"x": torch.tensor([3.0, 0.0]), "only here": torch.ones(1)},
        {"x": torch.tensor([3.0, 4.0])},
    )
    assert parity.distance(a, b) == pytest.approx(0.8) and parity.distance(b, b) == 0


def test_packed_attention_is_unpacked():
    value = torch.arange(12.0).reshape(6, 2)
    got = parity.unpacked("a.in_proj_weight", value, {"a.query.weight"})
    assert torch.equal(got["a.query.weight"], value[:2]) and torch.equal(
        got["a.key_value.weight"], value[2:]
    )
    assert parity.unpacked("a.in_proj_weight", value, {"a.in_proj_weight"}) == {
        "a.in_proj_weight": value
    }
    assert (
        parity.our_name("base_model.visual.proj", {}) == "encoder.clip.visual.proj"
        and parity.our_name("bottleneck", {}) is None
    )


def test_a_method_is_taken_by_its_source(tmp_path):
    path = tmp_path / "bases.py"
    path.write_text(
        "import not_installed\nclass A:\n    def f(self, x):\n        return x + self.y\ndef g(x): return T(x)\n",
        encoding="utf-8",
    )
    assert parity.method_of(path, "A", "f", {})(type("B", (), {"y": 2}), 1) == 3
    assert parity.function_of(path, "g", {"T": str})(5) == "5"


@pytest.mark.parametrize("name", NAMES)
def test_stored_comparisons_hold(name):
    "All four recipes equal the released code at ViT-B/16, by the limits of the bench."
    found = json.loads((RESULTS / f"parity-{name}.json").read_text(encoding="utf-8"))
    limits = {"features": 1e-5, "loss": 1e-6, "update": 1e-3}
    assert (
        found["arch"] == "ViT-B-16-quickgelu"
        and found["image_size"] == [384, 128]
        and found["batch"] == 8
    )
    assert found["revision"] == parity.REVISIONS[found["project"]]
    for row in found["rows"]:
        assert row["holds"] and row["value"] <= row["limit"], row
        for start, limit in limits.items():
            if row["what"].startswith(start):
                assert row["limit"] == limit
    assert any("another learning rate" in r["what"] and r["value"] == 0 for r in found["rows"])


@pytest.mark.parametrize("name", NAMES)
def test_our_samplers_draw_as_the_released_ones(name):
    "By the numbers that the released class gave to the bench, on the same identities."
    stored = {
        r["statistic"]: r
        for r in json.loads((RESULTS / f"settings-{name}.json").read_text(encoding="utf-8"))[
            "batches"
        ]
    }
    ids, photos = parity.crowd_of()
    ours = parity.batch_statistics(
        parity.our_batches(RECIPES[name], ids, photos, seed=7), ids, photos
    )
    for key in ("batches", "identities", "with_partner", "same_photo"):
        row = stored[key]
        room = max(5 * row["theirs_sd"], 0.006 * row["theirs"])
        assert abs(ours[key] - row["theirs"]) <= room, (key, ours[key], row)


@pytest.mark.parametrize("name", NAMES)
def test_only_named_settings_differ(name):
    "What the page on fidelity gives a reason for; anything else is as released."
    rows = json.loads((RESULTS / f"settings-{name}.json").read_text(encoding="utf-8"))["rows"]
    assert {r["setting"] for r in rows if not r["same"]} <= {
        "best epoch by",
        "colour of what is erased",
    }


@pytest.mark.parametrize("name", ["clip", "rde"])
def test_stored_ranks_equal_the_released_evaluators(name):
    "R@1, R@5, R@10, mAP and mINP of one trained model, to a ten-thousandth of a per cent point."
    found = json.loads((RESULTS / f"ranks-{name}.json").read_text(encoding="utf-8"))
    assert found["revision"] == parity.REVISIONS[found["project"]]
    rows = found["rows"]
    features = {"global", "global + TSE"} if name == "rde" else {"global"}
    assert {r["feature"] for r in rows} == features and len(rows) == 5 * len(features)
    for row in rows:
        assert row["holds"] and abs(row["ours"] - row["theirs"]) <= 1e-4, row
    best = next(r for r in rows if r["metric"] == "mAP")
    assert best["ours"] > 2 * 100 / best["gallery"]  # above chance: the ranks say something


def test_stored_division_equals_the_released_one():
    found = json.loads((RESULTS / "ranks-rde.json").read_text(encoding="utf-8"))["division"]
    assert len(found) == 11 and all(r["holds"] for r in found)
    for row in found:
        if row["what"].endswith("their losses"):
            assert row["value"] == 0 and 0 < row["clean"] < row["of"]
    assert "division" in dict(RECIPES["rde"].objectives)["CCD"]
