"synth: the frozen benchmark, what a view shows, captions, building on disk, bad input."

import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
import PIL

from tipr_nb import synth
from tipr_nb.synth import benchmark, oracles, views, worlds
from tipr_nb.core import TiprError

SMALL = "bd8225119eb1030bf3eec225aa80ba0554a39054902654d678e5d87cb267f40a"  # content of n_ids=60
SEALED = "98bbd72f1d49a681926fd4bd66c159c3e6be072cc81f0c17b06f6d486d5d2191"
WORLD = "584b7e6f8528c66ed804f45aac6d40064e05ac9e1bb3b790b392d057715f42f8"  # content of the first 600 photos
PIXELS = "d2e22c36d48630a0fa61496d4ccdefbf686b949cde181b944b986cf5d0921c01"  # every 250th photo of v1, before JPEG
PIXELS_384 = (
    "6eedddc643ed325e550b0cd2a9b1850b226413e18b34c310ba8943e03b89ecfb"  # every 2000th at 384x128
)
WORLD_PIXELS = "8fb739a4175b4c0a1a3eb95b0ac3a73950e0a7e106721cb83f104e5d3f59d6a5"


@pytest.fixture(scope="module")
def v1():
    return synth.synth_pedes_records()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return synth.make_synth_pedes(tmp_path_factory.mktemp("synth") / "small", n_ids=60, workers=1)


def test_v1_is_frozen(v1):
    assert (
        worlds.content_hash(v1)
        == worlds.V1_HASH
        == "d8785df4bf82bfe1a10482180dccb629be79dd9afb9d40aef35c96151cf63428"
    )
    assert worlds.content_hash(synth.synth_pedes_records(60)) == SMALL


def test_pixels_are_frozen(v1):
    "Exact with the Pillow the benchmark was frozen with; drawing and filters may move by a grey level elsewhere."
    if PIL.__version__.split(".")[0] != "12":
        pytest.skip(f"frozen with Pillow 12, this is {PIL.__version__}")
    assert worlds.pixel_hash(synth.SYNTH_PEDES, v1[::250]) == PIXELS
    assert worlds.pixel_hash(synth.SYNTH_PEDES, v1[::2000], (384, 128)) == PIXELS_384


def test_world_and_sealed_gallery_are_frozen():
    records = synth.world_records(600)
    assert worlds.content_hash(records) == WORLD
    if PIL.__version__.startswith("12."):
        assert worlds.pixel_hash(synth.SYNTH_WORLD, records[::30]) == WORLD_PIXELS
    assert (
        worlds.content_hash(
            synth.annotate(worlds.SYNTH_SEALED, "test", 300, (4, 4), 1, worlds.N_GALLERIES)
        )
        == SEALED
    )


def test_sizes(v1):
    ids = {s: {r["id"] for r in v1 if r["split"] == s} for s in ("train", "val", "test")}
    assert [len(ids[s]) for s in ids] == [3000, 300, 1500]
    assert not ids["train"] & ids["val"] and not ids["val"] & ids["test"] and min(ids["train"]) == 1
    assert len({r["file_path"] for r in v1}) == len(v1)
    for g in range(5):
        part = [r for r in v1 if r["gallery"] == g]
        assert len(part) == 1200 and len({r["id"] for r in part}) == 300
    train = [r for r in v1 if r["split"] == "train"]
    assert 2.4 < len(train) / 3000 < 2.6
    cameras = {}
    for r in v1:
        cameras.setdefault(r["id"], []).append(r["camera"])
    assert all(len(set(c)) == len(c) for c in cameras.values())


def test_lookalikes_in_every_split_and_same_gallery(v1):
    for split in ("train", "val", "test"):
        kinds = {r["lookalike"] for r in v1 if r["split"] == split}
        assert kinds == {"none", *views.LOOKALIKES}
    families = {}
    for r in v1:
        families.setdefault(r["family"], []).append(r)
    for members in families.values():
        ids = {r["id"]: r["attributes"] for r in members}
        assert len({r["gallery"] for r in members}) == 1
        assert (len(ids) == 1) == (members[0]["lookalike"] == "none")
        if len(ids) > 1:
            assert len({json.dumps(a) for a in ids.values()}) == len(ids)
            differ = {f for f in synth.FIELDS if len({a[f] for a in ids.values()}) > 1}
            assert differ == set(members[0]["differs"])
            if members[0]["lookalike"] == "left_right":
                assert differ <= {"bag_side", "held_side"}
            if members[0]["lookalike"] == "colour_swap":
                assert differ <= {"upper_colour", "lower_colour", "shoe_colour"}


def test_annotators_held_out(v1):
    who = {
        s: {c["annotator"] for r in v1 if r["split"] == s for c in r["captions"]}
        for s in ("train", "val", "test")
    }
    assert (
        len(who["train"]) == 8
        and who["val"] == who["train"]
        and len(who["test"]) == 4
        and not who["test"] & who["train"]
    )
    world = {w.name for w in synth.SYNTH_WORLD.annotators["world"]}
    plans = lambda writers: {p for w in writers for p in w.plans}
    assert not world & (who["train"] | who["test"])
    assert not plans(synth.SYNTH_WORLD.annotators["world"]) & (
        plans(worlds._TRAIN_WRITERS) | plans(worlds._TEST_WRITERS)
    )
    looks = lambda w: {(c.tint, c.exposure) for c in w.cameras}
    assert not looks(synth.SYNTH_WORLD) & looks(synth.SYNTH_PEDES)


def test_captions_tell_only_what_is_seen(v1):
    for r in v1[::7]:
        seen = views.observe(r["attributes"], r["view"], r["occluder"])
        assert set(r["visible"]) == set(views.describable(seen))
        for c in r["captions"]:
            said = {f: v for f, v in c["mentioned"].items() if f in synth.FIELDS}
            assert all(seen.get(f) == v for f, v in said.items())
            share = sum(f in r["visible"] for f in said) / len(r["visible"])
            assert abs(share - c["completeness"]) < 1e-3
            if c["kind"] == "complete":
                assert c["completeness"] >= 0.9
            else:
                assert 0.25 <= c["completeness"] <= 0.7


def test_captions_are_grammatical(v1):
    wrong = re.compile(
        r"\ban? (a|an|the) |\ba [aeiou](?!ne-)|\ban [^aeiouA]|  | [,.]|\.\.|\band and\b|[Nn]one\b|\b(\w+) \2\b|[Tt]hey (is|has|wears|carries|holds|does)\b|, \."
    )
    bad = [
        c["caption"]
        for r in v1
        for c in r["captions"]
        if wrong.search(c["caption"])
        or not c["caption"][0].isupper()
        or not c["caption"].endswith(".")
    ]
    assert not bad, bad[:3]
    texts = [c["caption"] for r in v1 for c in r["captions"]]
    assert len(set(texts)) > 0.9 * len(texts)
    assert (
        any("two bags" in t for t in texts)
        and any("not wearing a hat" in t for t in texts)
        and any("left hand" in t for t in texts)
    )


def test_left_and_right():
    a = synth.sample_person(synth.SYNTH_PEDES, 0).attributes | dict(
        held="handbag",
        held_side="left",
        held_colour="red",
        bag="none",
        bag_colour="none",
        bag_side="none",
        upper="coat",
        upper_colour="grey",
        lower="trousers",
        lower_colour="navy",
    )
    who = synth.Person(a, "mild", "office", 1)

    def centre(view):
        _, regions = synth.draw_person(who, view, seed=3, return_regions=True)
        return np.nonzero(regions["held"])[1].mean() if regions["held"].any() else None

    assert (
        centre("front") > 16 > centre("back")
    )  # their left is the picture's right when they face us
    assert centre("left") is not None and centre("right") is None
    assert "held" in views.observe(a, "left") and "held" not in views.observe(a, "right")
    assert "held" not in views.observe(a, "front", "person right") and "held" in views.observe(
        a, "front", "person left"
    )


def test_what_a_view_hides():
    a = synth.sample_person(synth.SYNTH_PEDES, 0).attributes | dict(
        upper="t-shirt",
        pattern="logo",
        pattern_colour="white",
        glasses="glasses",
        hat="none",
        shoes="boots",
    )
    assert "pattern" in views.observe(a, "front") and "pattern" not in views.observe(a, "back")
    assert "glasses" not in views.observe(a, "back") and "shoes" not in views.observe(
        a, "front", "bench"
    )
    assert "hair" not in views.observe(a | dict(hat="hood", upper="hoodie"), "front")


def test_what_is_visible_is_drawn(v1):
    for r in [r for r in v1 if r["split"] == "train"][:240:2]:
        _, regions = synth.draw_record(synth.SYNTH_PEDES, r, return_regions=True)
        for region, name in (
            ("held", "held"),
            ("bag", "bag"),
            ("shoes", "shoes"),
            ("scarf", "scarf"),
            ("hat", "hat"),
            ("inner", "inner"),
        ):
            if name in r["visible"]:
                assert regions[region].sum() >= 3, (r["file_path"], name, r["attributes"][name])


def test_painted_colours_can_be_read_back():
    right = []
    for i in range(40):
        who = synth.sample_person(synth.SYNTH_PEDES, i)
        img, regions = synth.draw_person(who, "back", seed=i, return_regions=True)
        if who.attributes["pattern"] == "plain" and regions["upper"].sum() > 20:
            right.append(
                synth.nearest_colour(np.median(np.asarray(img)[regions["upper"]], 0))
                == who.attributes["upper_colour"]
            )
    assert len(right) > 10 and np.mean(right) > 0.7
    assert synth.nearest_colour((250, 10, 10)) == "red" and synth.nearest_colour(
        [(0, 0, 0), (255, 255, 255)]
    ) == ["black", "white"]


def test_prior_has_structure():
    people = [synth.sample_person(synth.SYNTH_PEDES, i) for i in range(1500)]
    share = lambda ok, given: np.mean([ok(p.attributes) for p in people if given(p)])
    assert share(lambda a: a["shoes"] == "sneakers", lambda p: p.role == "jogger") > 0.8
    assert share(lambda a: a["upper"] == "coat", lambda p: p.season == "winter") > 10 * share(
        lambda a: a["upper"] == "coat", lambda p: p.season == "summer"
    )


def test_oracles(v1):
    part = [r for r in v1 if r["gallery"] == 0 and r["id"] <= 3300 + 100]
    table = synth.oracle_table(part)
    r1 = table.groupby("kind")[["mention", "bayes"]].mean()
    assert r1.loc["complete", "mention"] > 0.93 and r1.loc["complete", "bayes"] > 0.98
    assert 0.6 < r1.loc["incomplete", "mention"] < 0.95
    assert r1.loc["incomplete", "bayes"] > r1.loc["incomplete", "mention"] + 0.02
    ids = np.array([r["id"] for r in part])
    np.testing.assert_allclose(
        oracles.rank1(np.zeros((1, 4)), np.array([1]), np.array([1, 1, 2, 3])), [0.5]
    )
    assert len(table) == 2 * len(ids)


def test_build_layout(small):
    raw, side = (
        json.loads((small / "reid_raw.json").read_text()),
        json.loads((small / "attributes.json").read_text()),
    )
    assert {r["split"] for r in raw} == {"train", "val", "test"} and set(raw[0]) == {
        "split",
        "captions",
        "file_path",
        "processed_tokens",
        "id",
    }
    assert all(len(r["captions"]) == 2 for r in raw) and min(r["id"] for r in raw) == 1
    assert set(side) == {r["file_path"] for r in raw}
    for r in raw:
        assert [c["caption"] for c in side[r["file_path"]]["captions"]] == r["captions"]
    assert Image.open(small / "imgs" / raw[0]["file_path"]).size == (32, 96)
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["content"] == SMALL and manifest["n_images"] == len(raw)


def test_second_call_finds_it_done(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert synth.make_synth_pedes(small, n_ids=60, workers=1) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_workers_do_not_matter(small, tmp_path):
    other = synth.make_synth_pedes(tmp_path / "two", n_ids=60, workers=2)
    files = lambda root: {
        p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()
    }
    assert files(other) == files(small)


def test_world_arrays(tmp_path):
    pixels, captions, ids = benchmark.world_arrays(300, workers=1)
    assert (
        pixels.shape == (300, 96, 32, 3)
        and pixels.dtype == np.uint8
        and len(captions) == 300
        and set(map(len, captions)) == {3}
    )
    assert ids.min() == 0 and ids.max() == 149 and (np.bincount(ids) == 2).all()
    again, texts, ids2 = benchmark.world_arrays(300, workers=2, path=tmp_path / "w")
    assert (
        isinstance(again, np.memmap)
        and np.array_equal(again, pixels)
        and texts == captions
        and np.array_equal(ids, ids2)
    )
    more, _, _ = benchmark.world_arrays(20, workers=1)
    assert np.array_equal(more, pixels[:20])
    folder = synth.make_synth_world(tmp_path / "world", 20, workers=1)
    raw = json.loads((folder / "reid_raw.json").read_text())
    assert len(raw) == 20 and {r["split"] for r in raw} == {"train"}
    assert np.array_equal(np.asarray(Image.open(folder / "imgs" / raw[3]["file_path"])), pixels[3])


def test_sealed_gallery_is_other_people(tmp_path, v1):
    root = synth.make_sealed_gallery(tmp_path / "sealed", n_ids=10, workers=1)
    side = json.loads((root / "attributes.json").read_text())
    assert (
        len(side) == 40
        and {r["split"] for r in side.values()} == {"test"}
        and {r["gallery"] for r in side.values()} == {5}
    )
    known = {json.dumps(r["attributes"]) for r in v1}
    assert sum(json.dumps(r["attributes"]) in known for r in side.values()) == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: synth.make_synth_pedes(d / "a", n_ids=5), "too small"),
        (lambda d: synth.make_synth_pedes(d / "a", n_ids=(10, 2, 7)), "multiple of 5"),
        (lambda d: synth.make_synth_pedes(d / "a", n_ids=60, image_size=(96,)), "(height, width)"),
        (lambda d: synth.make_synth_pedes(d / "a", n_ids=60, image_size=(9000, 32)), "between"),
        (lambda d: synth.make_synth_world(d / "a", 1), "at least 2"),
        (
            lambda d: synth.draw_person(synth.sample_person(synth.SYNTH_PEDES), "above"),
            "view='above'",
        ),
    ],
)
def test_bad_arguments(tmp_path, call, words):
    with pytest.raises(TiprError) as e:
        call(tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_other_folders_are_not_touched(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(TiprError, match="choose another folder"):
        synth.make_synth_pedes(tmp_path / "mine", n_ids=60)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(TiprError, match="another build"):
        synth.make_synth_pedes(small, n_ids=61)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TiprError, match="is a file"):
        synth.make_synth_pedes(tmp_path / "file", n_ids=60)


@pytest.mark.full
def test_killed_build_leaves_nothing_half_made(tmp_path):
    root = tmp_path / "v1"
    code = f"from tipr_nb.synth import make_synth_pedes; make_synth_pedes({str(root)!r}, n_ids=1200, workers=1)"
    p = subprocess.Popen([sys.executable, "-c", code])
    while p.poll() is None and not list(tmp_path.glob(".v1.*/v1/imgs/train/*")):
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not root.exists()
    assert (
        synth.make_synth_pedes(root, n_ids=60, workers=1) == root
        and (root / "manifest.json").exists()
    )
    assert not [q for q in tmp_path.glob(".v1.*") if q.is_dir()]


def files(root: Path) -> dict[Path, bytes]:
    "The content of every file of a folder."
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def started(call: str, **kwargs) -> subprocess.Popen:
    "Another process that builds something with several workers."
    code = f"from tipr_nb.synth import *; from tipr_nb.synth.benchmark import *; {call}"
    return subprocess.Popen([sys.executable, "-c", code], **kwargs)


def children(pid: int) -> list[int]:
    "Process ids of a process's children."
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    "Whether a process runs; one that waits to be buried does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "call", ["make_synth_pedes({}, 2400, workers=3)", "world_arrays(9999, workers=3, path={})"]
)
def test_workers_end_with_their_parent(tmp_path, how, call):
    "Two seconds after the parent's end no worker is left, and nothing holds its pipe open."
    p = started(call.format(repr(str(tmp_path / "new"))), stdout=subprocess.PIPE)
    until = time.time() + 120
    while len(children(p.pid)) < 3 and time.time() < until:
        time.sleep(0.05)
    workers = children(p.pid)
    assert len(workers) >= 3 and p.poll() is None
    p.send_signal(how)
    p.wait()
    until = time.time() + 2
    while any(map(alive, workers)) and time.time() < until:
        time.sleep(0.02)
    left = [w for w in workers if alive(w)]
    for w in left:
        os.kill(w, signal.SIGKILL)
    assert not left
    os.set_blocking(p.stdout.fileno(), False)
    assert p.stdout.read() == b""  # the end of the pipe, not one that is still open (None)


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_random_kills(small, tmp_path, how):
    "Killed at 20 random moments with several workers: nothing half made, and the next call ends equal."
    rng = np.random.default_rng(int(how))
    whole = files(small)
    root = tmp_path / "new"
    call = f"make_synth_pedes({str(root)!r}, 60, workers=2)"
    start = time.time()
    started(call).wait()
    seconds = time.time() - start
    assert files(root) == whole
    done = 0
    for _ in range(20):
        shutil.rmtree(root, ignore_errors=True)
        p = started(call)
        time.sleep(seconds * rng.random())
        p.send_signal(how)
        p.wait()
        done += root.exists()
        assert not root.exists() or files(root) == whole
        assert synth.make_synth_pedes(root, 60, workers=2) == root and files(root) == whole
        assert not [q for q in tmp_path.glob(".new.*") if q.is_dir()]
    assert done < 20


@pytest.mark.full
def test_killed_arrays_leave_nothing_behind(tmp_path):
    "The next call of `world_arrays` sweeps what a killed one left."
    root = tmp_path / "world"
    p = started(f"world_arrays(5000, workers=2, path={str(root)!r})")
    while p.poll() is None and not list(tmp_path.glob(".world.*/world/images.npy")):
        time.sleep(0.02)
    p.kill()
    p.wait()
    assert not root.exists() and [q for q in tmp_path.glob(".world.*") if q.is_dir()]
    pixels, _, _ = benchmark.world_arrays(64, workers=1, path=root)
    assert len(pixels) == 64 and not [q for q in tmp_path.glob(".world.*") if q.is_dir()]
