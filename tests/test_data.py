"""Readers, checks, image cache, transforms, samplers and loader of `tipr_nb.data`."""

import json, multiprocessing, os, shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from mutations import ODD_BYTES
from tipr_nb.data import readers
from tipr_nb.data import crops
from tipr_nb.core import TiprError, ensure_torchvision
from tipr_nb.data import (
    Batch,
    CAPTION_TRANSFORMS,
    DatasetError,
    EvalTransform,
    IdentitySampler,
    ImageCache,
    ImageFiles,
    RandomSampler,
    RoundsSampler,
    Split,
    TrainTransform,
    check_dataset,
    has_side,
    image_batches,
    load_dataset,
    make_loader,
    normalise,
    picture_formats,
    read_image,
    stack_images,
    swap_sides,
    uniforms,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    return load_dataset(
        "cuhk-pedes",
        layouts.cuhk_pedes(
            tmp_path_factory.mktemp("cuhk"), {"train": 12, "val": 3, "test": 4}, photos=3
        ),
    )


def tokenize(captions: list[str]):
    "Lengths of words, between 99 and 100, padded to 40."
    rows = [[99, *(len(w) for w in c.split()), 100] for c in captions]
    return torch.tensor([r + [0] * (40 - len(r)) for r in rows])


def refused(match: str, *args, **kwargs) -> str:
    with pytest.raises(DatasetError, match=match) as e:
        load_dataset(*args, **kwargs)
    assert "\n" not in str(e.value) and ";" in str(e.value), "one line, with a remedy"
    return str(e.value)


# the four public layouts


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_public_layouts(name, tmp_path):
    folder = layouts.LAYOUTS[name](tmp_path)
    d = load_dataset(name, folder)
    assert np.array_equal(np.unique(d.train.image_ids), np.arange(d.train.n_ids))
    ids = [set(s.image_columns["source_id"].tolist()) for s in d.splits.values()]
    assert (
        all(len(i) > 1 for i in ids)
        and not ids[0] & ids[1]
        and not ids[0] & ids[2]
        and not ids[1] & ids[2]
    )
    for s in d.splits.values():
        assert all(p.is_file() for p in s.images) and all(c == c.strip() and c for c in s.captions)
        assert np.array_equal(s.caption_ids, s.image_ids[s.caption_image])
        assert all(len(v) == len(s.images) for v in s.image_columns.values()) and all(
            len(v) == len(s) for v in s.caption_columns.values()
        )
    annotation = next(folder.glob("*.json"))
    for root in (tmp_path, annotation, str(folder)):
        assert load_dataset(name, root).test.captions == d.test.captions
    report = check_dataset(name, folder, lengths=None)
    assert (
        report.usable
        and report.remedy == ""
        and {c.check for c in report.checks}
        >= {"annotation", "missing images", "duplicate images", "identities"}
    )


def test_cuhk_quirks(cuhk):
    assert cuhk.train.image_columns["source_id"].min() == 1 and cuhk.train.image_ids.min() == 0
    assert (
        Counter(cuhk.train.caption_image.tolist())[0] == 10
        and cuhk.test.n_ids == 4
        and not cuhk.notes
    )


def test_icfg_holds_out_identities(tmp_path):
    folder = layouts.icfg_pedes(tmp_path)
    d = load_dataset("icfg-pedes", folder)
    assert (
        d.val.n_ids == 2
        and d.train.n_ids == 38
        and "held out" in d.notes[0]
        and "seed 0" in d.notes[0]
    )
    again, other = load_dataset("icfg-pedes", folder), load_dataset("icfg-pedes", folder, seed=1)
    assert again.val.captions == d.val.captions != other.val.captions
    assert load_dataset("icfg-pedes", folder, val_share=0.25).val.n_ids == 10
    last = load_dataset("icfg-pedes", folder, val="last-epoch")
    assert last.train.n_ids == 40 and len(last.val) == 0 and "last epoch" in last.notes[0]
    assert any("train" in p.parts for p in d.test.images) and any(
        "test" in p.parts for p in d.train.images
    )  # MSMT17's folders are not the split


@pytest.mark.parametrize("variant", ["ICFG_PEDES.json", "icfg-pedes.json"])
def test_icfg_file_names(tmp_path, variant):
    folder = layouts.icfg_pedes(tmp_path, annotation=variant)
    assert variant in load_dataset("icfg-pedes", tmp_path).notes[0]
    report = check_dataset("icfg-pedes", folder, lengths=None)
    assert (
        report.usable
        and report.problems[0].check == "annotation"
        and "rename" in report.problems[0].remedy
    )


def test_annotations_folder_and_lower_case(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    (folder / "annotations").mkdir()
    (folder / "reid_raw.json").rename(folder / "annotations/reid_raw.json")
    folder.rename(tmp_path / "cuhk_pedes")
    assert (
        len(load_dataset("cuhk-pedes", tmp_path).train)
        and check_dataset("cuhk-pedes", tmp_path, lengths=None).usable
    )


def test_ufine_in_its_bench(tmp_path):
    layouts.ufine6926(tmp_path / "UFineBench")
    assert load_dataset("ufine6926", tmp_path).test.n_ids == 4


def test_identity_numbers_that_start_again(tmp_path):
    folder = layouts.icfg_pedes(tmp_path)

    def restart(records):
        for r in records:
            r["id"] -= 40 * (r["split"] == "test")
            new = f"{r['split']}_/{Path(r['file_path']).name}"
            (folder / "imgs" / new).parent.mkdir(exist_ok=True)
            (folder / "imgs" / r["file_path"]).rename(folder / "imgs" / new)
            r["file_path"] = new

    layouts.edit(folder / "ICFG-PEDES.json", restart)
    assert any("start again" in n for n in load_dataset("icfg-pedes", folder).notes)


def test_old_rstpreid_is_told(tmp_path):
    folder = layouts.rstpreid(tmp_path, {"train": 5, "val": 100, "test": 100}, photos=1)
    assert "old release" in load_dataset("rstpreid", folder).notes[0]
    report = check_dataset("rstpreid", folder, verify=False, lengths=None)
    assert report.usable and any("old release" in p.remedy for p in report.problems)


# what is refused


def first(**change):
    return lambda folder, r: r[0].update(change)


def cut_json(folder, r):
    text = json.dumps(r)
    r.clear()
    (folder / "reid_raw.json").write_text(text[: len(text) // 2])


def no_json(folder, r):
    r.clear()
    (folder / "reid_raw.json").unlink()


def one_identity(folder, r):
    [x.update(id=1 if x["split"] == "train" else 2 if x["split"] == "val" else 3) for x in r]


def unsplit(folder, r):
    r.clear()
    (folder / "reid_raw.json").rename(folder / "caption_all.json")


def drop_image(folder, r):
    (folder / "imgs" / r[2]["file_path"]).unlink()


def drop_all(folder, r):
    shutil.rmtree(folder / "imgs")


BAD = {
    "truncated JSON": (cut_json, "not complete JSON"),
    "no annotation": (no_json, "no reid_raw.json"),
    "no splits": (unsplit, "no splits"),
    "no field": (lambda f, r: r[3].pop("captions"), r"row 3: no field 'captions'"),
    "id text": (first(id="p1"), r"row 0: id 'p1' is not a whole number"),
    "id missing": (first(id=None), "id None"),
    "id half": (first(id=1.5), "id 1.5"),
    "id yes": (first(id=True), "id True"),
    "id huge": (first(id=1e300), "whole number"),
    "empty caption": (first(captions=["", "a man"]), "row 0: empty caption"),
    "blank caption": (first(captions=[" \n"]), "empty caption"),
    "no captions": (first(captions=[]), "empty caption"),
    "caption not a list": (first(captions="a man"), "must be a list"),
    "caption number": (first(captions=[3]), "must be a list"),
    "unknown split": (first(split="gallery"), "split 'gallery'"),
    "identity in two splits": (lambda f, r: r[-1].update(id=1), "identity 1 is in test and"),
    "no test": (lambda f, r: [x.update(split="train") for x in r], "no test split"),
    "one identity": (one_identity, "only one identity in train"),
    "image missing": (drop_image, "is missing under"),
    "no images": (drop_all, "unpack the images there"),
    "not records": (lambda f, r: r.__setitem__(0, "a"), "row 0: expected a record"),
    "path up": (first(file_path="../x.png"), "leads out"),
    "path up inside": (first(file_path="a/../../x.png"), "leads out"),
    "path absolute": (first(file_path="/etc/passwd"), "leads out"),
    "path drive": (first(file_path="C:\\x.png"), "leads out"),
    "path up windows": (first(file_path="..\\x.png"), "leads out"),
    "path zero": (first(file_path="a\0.png"), "not a file name"),
    "path number": (first(file_path=3), "not a file name"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_annotation(what, tmp_path):
    change, match = BAD[what]
    folder = layouts.cuhk_pedes(tmp_path)
    records = json.loads((folder / "reid_raw.json").read_text())
    change(folder, records)
    if records:
        (folder / "reid_raw.json").write_text(json.dumps(records))
    refused(match, "cuhk-pedes", folder)
    report = check_dataset("cuhk-pedes", folder, verify=False, lengths=None)
    assert (
        not report.usable
        and report.remedy
        and "\n" not in report.remedy
        and report.to_dict()["usable"] is False
    )


def test_bad_arguments(tmp_path):
    refused("unknown dataset 'cuhk'", "cuhk", tmp_path)
    refused("no such folder", "cuhk-pedes", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="needs root"):
        load_dataset("cuhk-pedes")
    with pytest.raises(DatasetError, match="needs root"):
        check_dataset("rstpreid")
    with pytest.raises(DatasetError, match="val='none'"):
        load_dataset("cuhk-pedes", tmp_path, val="none")
    with pytest.raises(DatasetError, match="val_share=2"):
        load_dataset("cuhk-pedes", tmp_path, val_share=2)
    layouts.rstpreid(tmp_path)
    refused("load it as 'rstpreid'", "cuhk-pedes", tmp_path / "RSTPReid")


def test_drop_empty_and_skip(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    layouts.edit(folder / "reid_raw.json", lambda r: r[1].update(captions=["", "a man"]))
    whole = load_dataset("cuhk-pedes", folder, drop_empty=True)
    gone = whole.train.images[3]
    gone.unlink()
    refused("is missing", "cuhk-pedes", folder, drop_empty=True)
    for skip in ([str(gone)], [str(gone.relative_to(folder / "imgs"))]):
        less = load_dataset("cuhk-pedes", folder, drop_empty=True, skip=skip)
        assert len(less.train.images) == len(whole.train.images) - 1 and "left out" in less.notes[0]
    assert whole.train.captions.count("a man") == 1 and len(
        load_dataset("cuhk-pedes", folder, drop_empty=True, check_files=False).train.images
    ) == len(whole.train.images)


def test_needs(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    layouts.edit(folder / "reid_raw.json", lambda r: [x for x in r if x["split"] == "train"])
    only = load_dataset("cuhk-pedes", folder, need=("train",))
    assert only.train.n_ids == 8 and len(only.val) == len(only.test) == 0


# people's own data


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_photos(kind, tmp_path):
    folder = layouts.own_photos(tmp_path, 12, kind=kind)
    d = load_dataset("folder", folder)
    assert (
        load_dataset(kind, folder / f"captions.{kind}").test.captions
        == d.test.captions
        != load_dataset("folder", folder, seed=3).test.captions
    )
    assert (
        "drawn for test" in d.notes[0]
        and sum(len(s.images) for s in d.splits.values()) == 24
        and sum(map(len, d.splits.values())) == 48
    )
    assert set(d.train.image_columns["camera"]) == {"c0", "c1"} and d.train.caption_columns[
        "when"
    ].tolist()[:2] == [0, 1]
    assert check_dataset("folder", folder, lengths=None).usable
    split = load_dataset("folder", layouts.own_photos(tmp_path / "s", kind=kind, split=True))
    assert split.test.image_columns["source_id"].min() == 5


def test_boxes_cut_people_out(tmp_path):
    scenes, alone = (
        load_dataset("folder", layouts.own_photos(tmp_path / "a", scenes=True), val="last-epoch"),
        load_dataset("folder", layouts.own_photos(tmp_path / "b"), val="last-epoch"),
    )
    assert scenes.train.captions == alone.train.captions and scenes.train.image_columns[
        "box"
    ].shape == (len(scenes.train.images), 4)
    a, b = (
        ImageCache.build(d.train, (100, 40)).batch(np.arange(4)).float() for d in (scenes, alone)
    )
    assert (a - b).abs().mean() < 4  # the same people but for a second JPEG
    assert torch.equal(
        ImageFiles(scenes.train, (100, 40)).batch([1]),
        ImageCache.build(scenes.train, (100, 40)).batch([1]),
    )
    report = check_dataset("folder", tmp_path / "a/mine", lengths=None)
    assert report.usable and not any(c.check == "image sizes" for c in report.problems)
    with pytest.raises(DatasetError, match="lies outside the image"):
        read_image(scenes.train.images[0], (900, 0, 10, 10))
    assert read_image(scenes.train.images[0], (-20, -20, 40, 40)).size == (20, 20)


@pytest.mark.parametrize(
    "line,match",
    [
        ("photos/00-0.jpg,a man,x", "id 'x'"),
        ("photos/00-0.jpg,,1", "empty caption"),
        ("../a.jpg,a man,1", "leads out"),
        ("photos/00-0.jpg,a man,7", "one image is one person"),
        ("photos/zz.jpg,a man,1", "is missing"),
        ("photos/00-0.jpg", "no field 'caption'"),
        ("photos/00-0.jpg,a man,0,,2,x,3,4", "box"),
        ("photos/00-0.jpg,a man,0,,2,2,0,4", "no area"),
        ("photos/00-0.jpg,a man,0,train", "no split though"),
    ],
)
def test_bad_table(line, match, tmp_path):
    folder = layouts.own_photos(tmp_path)
    rows = "".join(
        f"photos/{i:02d}-{j}.jpg,a man number {i},{i}\n" for i in range(8) for j in range(2)
    )
    (folder / "captions.csv").write_text(f"image,caption,id,split,x,y,w,h\n{rows}{line}\n")
    if "box" in match or "area" in match:
        (folder / "captions.csv").write_text(
            (folder / "captions.csv").read_text().replace("photos/00-0.jpg,a man number 0,0\n", "")
        )
    refused(match, "csv", folder)
    assert not check_dataset("csv", folder, verify=False, lengths=None).usable


def test_bad_table_files(tmp_path):
    refused("no such folder or table", "folder", tmp_path / "x")
    refused("no table in it", "folder", tmp_path)
    folder = layouts.own_photos(tmp_path)
    table = folder / "captions.csv"
    shutil.copy(table, folder / "other.csv")
    table.rename(folder / "some.csv")
    refused("several tables", "folder", folder)
    for name, text, match in [
        ("a.csv", "image,caption,id\n", "no rows"),
        ("b.jsonl", '{"image": "a', "line 1: not complete JSON"),
        ("c.json", "[]", "empty one"),
        ("d.jsonl", "[1]", "expected a record"),
        ("e.csv", b"image,caption,id\n\xff\xfe,b,c", "UTF-8"),
        ("f.csv", "file,text\na,b\n", "no field 'id'"),
    ]:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(match, "csv", tmp_path / name)
        assert not check_dataset("csv", tmp_path / name, lengths=None).usable
    few = layouts.own_photos(tmp_path / "few", 1)
    refused("only 1 identity", "folder", few)
    assert "only 1 identity" in check_dataset("folder", few, lengths=None).remedy


# deliveries as they come


def test_the_file_that_was_named_is_read(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    records = json.loads((folder / "reid_raw.json").read_text())
    for r in records:
        r["captions"] = ["Somebody else's words."]
    (folder / "annotations").mkdir()
    for mine in (folder / "mine.json", folder / "annotations/mine.json"):
        mine.write_text(json.dumps(records))
        d = load_dataset("cuhk-pedes", mine)
        assert (
            set(d.train.captions) == {"Somebody else's words."}
            and "named mine.json" in d.notes[0]
            and check_dataset("cuhk-pedes", mine, lengths=None).usable
        )
    assert "Somebody else's words." not in load_dataset("cuhk-pedes", folder).train.captions
    (folder / "half.json").write_text("[{")
    refused("half.json: not complete JSON", "cuhk-pedes", folder / "half.json")
    refused("not UTF-8|zero bytes", "cuhk-pedes", next((folder / "imgs").rglob("*.png")))


def test_a_file_for_each_split(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    records = json.loads((folder / "reid_raw.json").read_text())
    want = load_dataset("cuhk-pedes", folder)
    (folder / "reid_raw.json").unlink()
    (folder / "annotations").mkdir()
    for split in ("train", "val", "test"):
        mine = [
            {k: v for k, v in r.items() if k != "split"} for r in records if r["split"] == split
        ]
        (folder / f"annotations/{split}.json").write_text(json.dumps(mine))
    d = load_dataset("cuhk-pedes", folder)
    assert (
        d.test.captions == want.test.captions
        and d.train.captions == want.train.captions
        and "annotation in train.json, val.json, test.json" in d.notes[0]
    )
    assert check_dataset("cuhk-pedes", tmp_path, lengths=None).usable
    (folder / "annotations/test.json").unlink()
    refused("no reid_raw.json", "cuhk-pedes", folder)


def test_a_record_for_each_caption(tmp_path):
    "Such files are read as the dataset 'folder', and the message says so."
    folder = layouts.cuhk_pedes(tmp_path)
    records = json.loads((folder / "reid_raw.json").read_text())
    want = load_dataset("cuhk-pedes", folder)
    for name in ("captions", "caption", "sentence"):
        (folder / "reid_raw.json").write_text(
            json.dumps(
                [
                    dict(split=r["split"], id=r["id"], file_path=r["file_path"], **{name: c})
                    for r in records
                    for c in r["captions"]
                ]
            )
        )
        refused("record per caption is read as the dataset 'folder'", "cuhk-pedes", folder)
        d = load_dataset("folder", folder / "reid_raw.json")
        assert sorted(d.test.captions) == sorted(want.test.captions) and len(d.test.images) == len(
            want.test.images
        )


def test_names_that_differ_in_case(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    pictures = sorted((folder / "imgs").rglob("*.jpg"))
    for p in pictures:
        p.rename(p.with_suffix(".JPG"))
    message = refused("is missing under", "cuhk-pedes", folder)
    assert "JPG is there, rename it" in message
    for p in sorted(p for p in (folder / "imgs").rglob("*.*") if p.suffix != ".JPG"):
        p.rename(p.with_suffix(p.suffix.upper()))
    assert "is there" in refused("unpack the images there", "cuhk-pedes", folder)
    assert (
        "rename such files" in check_dataset("cuhk-pedes", folder, lengths=None).remedy
        or "is there" in check_dataset("cuhk-pedes", folder, lengths=None).remedy
    )


def test_identities_that_start_again_where_nobody_can_tell(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    layouts.edit(
        folder / "reid_raw.json",
        lambda r: [x.update(id=x["id"] - 11) for x in r if x["split"] == "test"] and r,
    )
    assert "number on" in refused("identity 1 is in test", "cuhk-pedes", folder)


def test_incomplete_deliveries(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    whole = load_dataset("cuhk-pedes", folder)
    gone = [
        p.relative_to(folder / "imgs").as_posix()
        for p in (*whole.train.images[3:5], whole.test.images[0])
    ]
    for name in gone:
        (folder / "imgs" / name).unlink()
    assert "skip_missing=N (--skip FILE, --skip-missing N)" in refused(
        r"\(and 2 more\) is missing", "cuhk-pedes", folder
    )
    refused("is missing", "cuhk-pedes", folder, skip_missing=2)
    for wrong in (-1, True, "3", None):
        refused("skip_missing=", "cuhk-pedes", folder, skip_missing=wrong)
    d = load_dataset("cuhk-pedes", folder, skip_missing=5)
    assert (
        len(d.train.images) == len(whole.train.images) - 2
        and len(d.test.images) == len(whole.test.images) - 1
    )
    assert any(
        "3 images that are not there left out (at most 5 allowed)" in n and gone[0] in n
        for n in d.notes
    )
    lost, report = tmp_path / "lost.txt", tmp_path / "report.json"
    lost.write_text("\ufeff# lost\n" + "\r\n".join(gone) + "\nnever/there.jpg\n", encoding="utf-8")
    checked = check_dataset("cuhk-pedes", folder, lengths=None)
    assert (
        not checked.usable
        and sorted(checked.missing) == sorted(gone)
        and check_dataset("cuhk-pedes", folder, lengths=None, skip_missing=3).usable
    )
    report.write_text(json.dumps(checked.to_dict()))
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(gone))
    for skip in (lost, str(lost), report, listed, gone, tuple(gone)):
        less = load_dataset("cuhk-pedes", folder, skip=skip)
        assert less.train.captions == d.train.captions and any(
            "3 images left out on request" in n for n in less.notes
        )
        assert check_dataset("cuhk-pedes", folder, lengths=None, skip=skip).usable
    assert any(
        "1 names of skip are no image" in n and "never/there.jpg" in n
        for n in load_dataset("cuhk-pedes", folder, skip=lost).notes
    )
    refused("no such file", "cuhk-pedes", folder, skip=tmp_path / "none.txt")
    listed.write_text('{"missing": [3]}')
    refused("no list of image paths", "cuhk-pedes", folder, skip=listed)


def test_a_dataset_of_ones_own(tmp_path, monkeypatch, cuhk):
    (tmp_path / "my_sets.py").write_text(
        "from tipr_nb.data import load_dataset\nfrom tipr_nb.data import DatasetError\ndef photos(root, **kwargs): return load_dataset('cuhk-pedes', root, **kwargs)\n"
        "def broken(root, **kwargs): raise DatasetError('no; nothing')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_dataset("my_sets:photos", cuhk.root).test.captions == cuhk.test.captions
    report = check_dataset("my_sets:photos", cuhk.root, lengths=None)
    assert report.usable and {"missing images", "identities", "duplicate images"} <= {
        c.check for c in report.checks
    }
    assert not check_dataset("my_sets:broken", cuhk.root).usable
    refused("has no photo", "my_sets:photo", cuhk.root)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8])
def test_wrong_pairs(fraction, tmp_path):
    folder = layouts.cuhk_pedes(tmp_path, {"train": 12, "val": 3, "test": 4})
    clean = load_dataset("cuhk-pedes", folder)
    noisy, again, other = (
        load_dataset("cuhk-pedes", folder, wrong_pairs=fraction, seed=s) for s in (0, 0, 1)
    )
    assert (
        noisy.train.captions == again.train.captions
        and noisy.test.captions == clean.test.captions
        and noisy.val.captions == clean.val.captions
    )
    assert sorted(noisy.train.captions) == sorted(clean.train.captions) and np.array_equal(
        noisy.train.caption_ids, clean.train.caption_ids
    )
    if not fraction:
        assert (
            noisy.train.captions == clean.train.captions
            and "wrong_pair" not in noisy.train.caption_columns
        )
        return
    wrong = noisy.train.caption_columns["wrong_pair"]
    assert (
        wrong.sum() == round(fraction * len(wrong))
        and other.train.captions != noisy.train.captions
        and f"{100 * fraction:g} % of training captions" in noisy.notes[-1]
    )
    whose = {}
    for c, i in zip(clean.train.captions, clean.train.caption_ids):
        whose.setdefault(c, set()).add(int(i))
    assert all(w or a == b for w, a, b in zip(wrong, noisy.train.captions, clean.train.captions))
    assert all(
        a != b
        for w, a, b in zip(wrong, noisy.train.captions, clean.train.captions)
        if w and "walks" not in a
    )


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_wrong_pairs_out_of_range(cuhk, fraction):
    with pytest.raises(DatasetError, match="wrong_pairs="):
        cuhk.train.with_wrong_pairs(fraction)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_folders_under_the_names_of_images(tmp_path):
    "Nothing waits for ever."
    folder = layouts.cuhk_pedes(tmp_path)
    d = load_dataset("cuhk-pedes", folder)
    pipe, inner = d.train.images[0], d.train.images[1]
    pipe.unlink(), inner.unlink()
    os.mkfifo(pipe), inner.mkdir()
    for path in (pipe, inner):
        with pytest.raises(DatasetError, match="not a file"):
            read_image(path)
    report = check_dataset("cuhk-pedes", folder, lengths=None)
    assert len(report.unreadable) == 2


def test_folders_that_may_not_be_listed(tmp_path, monkeypatch):
    folder = layouts.cuhk_pedes(tmp_path)
    listdir = os.listdir

    def refuse(path, *args):
        if str(path).endswith("cam_a"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path, *args)

    monkeypatch.setattr(os, "listdir", refuse)
    assert "cam_a: Permission denied" in refused("make it readable", "cuhk-pedes", folder)
    assert "cam_a: Permission denied" in check_dataset("cuhk-pedes", folder, lengths=None).remedy


# odd values in every field

ODD_FIELDS = {
    "id digits": (dict(id="7" * 5000), "whole number"),
    "id huge number": (dict(id=10**400), "whole number"),
    "id nan": (dict(id=float("nan")), "whole number"),
    "id list": (dict(id=[1]), "whole number"),
    "split list": (dict(split=[1]), "split"),
    "split dict": (dict(split={"a": "b" * 5000}), "split"),
    "long path": (dict(file_path="a/" + "n" * 300 + ".jpg"), "not a file name"),
    "long folder": (dict(file_path="n" * 300 + "/a.jpg"), "not a file name"),
    "path of half a character": (dict(file_path="\ud83d.jpg"), "not a file name"),
    "caption of half a character": (dict(captions=["a \ud83d man"]), "list of sentences"),
    "caption dict": (dict(captions=[{"a": 1}]), "list of sentences"),
    "captions long": (dict(captions={"a": "b" * 5000}), "list of sentences"),
}


@pytest.mark.parametrize("what", ODD_FIELDS)
def test_odd_fields(what, tmp_path):
    change, match = ODD_FIELDS[what]
    folder = layouts.cuhk_pedes(tmp_path)
    layouts.edit(folder / "reid_raw.json", lambda r: r[0].update(change))
    if "digits" in what or "huge" in what:
        try:
            json.loads((folder / "reid_raw.json").read_text())
        except ValueError:
            match = "not JSON that can be read"
    assert len(refused(match, "cuhk-pedes", folder)) < 600
    assert not check_dataset("cuhk-pedes", folder, verify=False, lengths=None).usable


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"id": 1}', "no field 'image'"),
        ('{"image": "a.jpg", "caption": "x", "id": 1, "box": "a,b"}', "box"),
        ('{"image": "a.jpg", "caption": "x", "id": 1, "box": [1e400, 0, 1, 1]}', "no area"),
        (
            '{"image": "a.jpg", "caption": "x", "id": 1, "box": [1' + "0" * 400 + ", 0, 1, 1]}",
            "not four numbers",
        ),
        ('{"image": "a.jpg", "caption": "x", "id": 1, "box": {"x": 1}}', "box"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"image": "a.jpg", "caption": "x", "id": ' + "1" * 5000 + "}",
            "not JSON that can be read",
        ),
        ('"image"', "expected a record"),
        ("null", "expected a record"),
    ],
)
def test_odd_lines(text, match, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    refused(match, "jsonl", tmp_path / "a.jsonl")


@pytest.mark.parametrize("root", ["n" * 300, "~nobody-of-that-name/x", "a\0b", "~", ""])
def test_roots_nobody_has(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("cuhk-pedes", "folder"):
        with pytest.raises(DatasetError) as e:
            load_dataset(name, root)
        assert "\n" not in str(e.value) and not check_dataset(name, root).usable


@pytest.mark.parametrize(
    "odd",
    [
        '{"a": 1',
        "[]",
        '{"cam_a/001_0.bmp": 3}',
        '{"CUHK01/0000001_0.png": 3}',
        '{"CUHK01/00000010.png": {"captions": 7}}',
        '{"CUHK01/00000010.png": {"captions": [1, 2]}}',
    ],
)
def test_odd_side_files(odd, tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    first = json.loads((folder / "reid_raw.json").read_text())[0]["file_path"]
    (folder / "attributes.json").write_text(
        odd.replace("CUHK01/00000010.png", first).replace("CUHK01/0000001_0.png", first)
    )
    if odd == '{"cam_a/001_0.bmp": 3}':
        return
    with pytest.raises(TiprError, match="attributes.json.*make the dataset again") as e:
        load_dataset("cuhk-pedes", folder)
    assert "\n" not in str(e.value)


def test_other_encodings(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    text = (folder / "reid_raw.json").read_text()
    (folder / "reid_raw.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(load_dataset("cuhk-pedes", folder).train)
    for encoding in ("utf-16", "utf-16-le"):
        (folder / "reid_raw.json").write_bytes(text.encode(encoding))
        refused("UTF-8", "cuhk-pedes", folder)
    mine = layouts.own_photos(tmp_path)
    table = (mine / "captions.csv").read_text()
    want = load_dataset("folder", mine).test.captions
    for name, data in (
        ("captions.csv", ("\ufeff" + table.replace("\n", "\r\n")).encode()),
        (
            "captions.csv",
            table.replace('","', '";"')
            .replace(",", ";", table.partition("\n")[0].count(","))
            .encode(),
        ),
    ):
        (mine / name).write_bytes(data)
        assert load_dataset("folder", mine).test.captions == want
    for encoding in ("utf-16", "latin-1", "gbk"):
        (mine / "captions.csv").write_bytes(
            (table + 'photos/00-0.jpg,"Köln 北门",0\n')
            .replace("北门" if encoding == "latin-1" else "ö", "")
            .encode(encoding)
        )
        refused("UTF-8", "folder", mine)


def test_tables_in_parquet(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    mine = layouts.own_photos(tmp_path, kind="jsonl")
    want = load_dataset("folder", mine)
    rows = [json.loads(line) for line in (mine / "captions.jsonl").read_text().splitlines()]
    (mine / "captions.jsonl").unlink()
    parquet.write_table(arrow.Table.from_pylist(rows), mine / "captions.parquet")
    d = load_dataset("folder", mine)
    assert (
        d.test.captions == want.test.captions
        and d.train.image_columns["camera"].tolist() == want.train.image_columns["camera"].tolist()
    )
    (mine / "captions.parquet").write_bytes((mine / "captions.parquet").read_bytes()[:-50])
    refused("captions.parquet", "folder", mine)


def test_zeros_in_front_stay(tmp_path):
    mine = layouts.own_photos(tmp_path)
    table = (mine / "captions.csv").read_text().splitlines()
    (mine / "captions.csv").write_text(
        "\n".join([table[0] + ",badge", *(line + ",007" for line in table[1:])])
    )
    assert set(load_dataset("folder", mine).train.image_columns["badge"]) == {"007"}


@pytest.mark.full
def test_mutated_annotations_never_raise_anything_else(tmp_path):
    "A small fuzzer with a fixed seed, over the annotation of each layout and the tables of one's own."
    import random

    rng = random.Random(0)
    folders = [(name, make(tmp_path / name)) for name, make in layouts.LAYOUTS.items()] + [
        ("folder", layouts.own_photos(tmp_path / k, kind=k)) for k in ("csv", "jsonl")
    ]
    for name, folder in folders:
        path = next(p for p in folder.iterdir() if p.suffix in (".json", ".csv", ".jsonl"))
        good = path.read_bytes()
        for _ in range(150):
            data = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.randint(0, 5)] = rng.choice(
                    [*ODD_BYTES, bytes([rng.randrange(256)])]
                )
            path.write_bytes(bytes(data))
            try:
                load_dataset(name, folder)
            except TiprError as e:
                assert "\n" not in str(e) and len(str(e)) < 1500
            check_dataset(name, folder, verify=False, lengths=None)
        path.write_bytes(good)


# splits


def test_split_selections(cuhk):
    t = cuhk.train
    some = t.subset_ids([3, 7])
    assert (
        some.n_ids == 2
        and set(some.image_ids) == {0, 1}
        and set(some.image_columns["source_id"]) == {4, 8}
        and some.captions == [c for c, i in zip(t.captions, t.caption_ids) if i in (3, 7)]
    )
    assert set(t.subset_ids([3, 7], relabel=False).image_ids) == {3, 7}
    queries = cuhk.test.subset_captions(np.arange(len(cuhk.test)) < 3)
    assert len(queries) == 3 and queries.images == cuhk.test.images
    half = cuhk.test.subset_images(np.arange(0, len(cuhk.test.images), 2))
    assert (
        len(half.images) == 6
        and [half.images[i] for i in half.caption_image[:2]] == [cuhk.test.images[0]] * 2
    )
    with pytest.raises(DatasetError, match="one identity per image"):
        Split("x", [Path("a")], [0, 1], [], [], [])
    with pytest.raises(DatasetError, match="differ in length"):
        Split("x", [Path("a")], [0], ["a"], [0], [])
    assert (
        "12 ids" in repr(cuhk)
        and "ids" in cuhk._repr_html_()
        and cuhk.summary().loc["test", "ids"] == 4
    )


# checks


def test_doctor_finds_it_all(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    records = json.loads((folder / "reid_raw.json").read_text())
    at = lambda i: folder / "imgs" / records[i]["file_path"]
    at(0).write_bytes(b"")
    at(1).write_bytes(at(1).read_bytes()[:200])
    at(2).write_text("this is no picture")
    at(4).rename(at(4).with_suffix(".PNG"))
    shutil.copy(at(5), at(-1))  # train picture in test
    shutil.copy(at(6), at(8))  # two identities
    records[9]["captions"] = ["一个穿红衣的人", "<b>man</b>", "a man, " * 50]
    records[10]["captions"] = records[12]["captions"] = ["a man in red", "man"]
    records[11]["captions"] = ["  "]
    records[13]["id"] = "x"
    (folder / "reid_raw.json").write_text(json.dumps(records))
    report = check_dataset("cuhk-pedes", folder)
    found = {c.check: c for c in report.checks}
    assert (
        not report.usable
        and len(report.unreadable) == 3
        and "skip=report.unreadable" in found["unreadable images"].remedy
    )
    assert "1 of" in found["missing images"].found and ".PNG" in found["missing images"].remedy
    assert {c.found[2:] for c in report.checks if c.check == "duplicate images"} == {
        "in several splits",
        "under several identities",
    }
    assert {
        "shared captions",
        "non-Latin captions",
        "code in captions",
        "short captions",
        "captions per image",
        "caption lengths",
        "empty captions",
        "records",
        "counts, train",
    } <= set(found)
    assert (
        "longer than 77" in found["caption lengths"].found
        and max(map(max, report.lengths.values())) > 77
    )
    text, html = repr(report), report._repr_html_()
    assert (
        "not usable" in text
        and "<b>man</b>" not in html
        and "&lt;b&gt;man" in html
        and len(report.table()) == len(report.checks)
    )
    ax = report.plot()
    assert "77" in ax.texts[0].get_text()
    json.dumps(report.to_dict())


def test_unreadable_images_can_be_skipped(tmp_path):
    folder = layouts.cuhk_pedes(tmp_path)
    bad = load_dataset("cuhk-pedes", folder).train.images[2]
    bad.write_bytes(bad.read_bytes()[:-60])
    with pytest.raises(DatasetError, match=bad.name) as e:
        ImageCache.build(load_dataset("cuhk-pedes", folder).train, (96, 32))
    assert "skip=" in str(e.value) and not list((tmp_path / "cache/images").glob("*.u8"))
    report = check_dataset("cuhk-pedes", folder, lengths=None)
    assert not report.usable
    assert (
        len(
            ImageCache.build(
                load_dataset("cuhk-pedes", folder, skip=report.unreadable).train, (96, 32)
            )
        )
        == 15
    )


def test_published_counts(tmp_path, monkeypatch):
    folder = layouts.rstpreid(tmp_path)
    monkeypatch.setitem(
        readers.LAYOUTS,
        "rstpreid",
        replace(
            readers.LAYOUTS["rstpreid"],
            official={"train": (8, 40, 80), "val": (3, 15, 30), "test": (4, 20, 40)},
        ),
    )
    report = check_dataset("rstpreid", folder, lengths=None)
    assert not report.problems and "as published" in next(
        c.found for c in report.checks if c.check == "counts, test"
    )
    layouts.edit(folder / "data_captions.json", lambda r: r[:-1])
    assert [p.check for p in check_dataset("rstpreid", folder, lengths=None).problems] == [
        "counts, test"
    ]


def test_ufine_captions_are_cut(tmp_path):
    report = check_dataset("ufine6926", layouts.ufine6926(tmp_path))
    assert report.usable and "100.0 %" in next(
        p.found for p in report.problems if p.check == "caption lengths"
    )


def test_scenes_are_noticed(tmp_path):
    folder = layouts.own_photos(tmp_path)
    for p in (folder / "photos").iterdir():
        Image.open(p).resize((200, 100)).save(p)
    assert "boxes" in next(
        p.remedy
        for p in check_dataset("folder", folder, lengths=None).problems
        if p.check == "image sizes"
    )


# pictures


def test_resize_equals_torchvision(tmp_path):
    ensure_torchvision()
    from torchvision.transforms import v2

    for (w, h), size in [
        ((64, 192), (96, 32)),
        ((50, 120), (384, 128)),
        ((500, 301), (378, 126)),
        ((32, 96), (96, 32)),
    ]:
        im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (h, w, 3), dtype=np.uint8))
        want = v2.functional.pil_to_tensor(v2.Resize(size)(im))
        assert torch.equal(stack_images([im], size)[0], want)
        images, pixels = EvalTransform(size)(im)
        assert torch.allclose(
            images,
            v2.functional.normalize(want.float() / 255, crops.CLIP_MEAN, crops.CLIP_STD),
            atol=1e-5,
        ) and torch.equal(pixels, want / 255)
    im.save(tmp_path / "a.png")
    assert torch.equal(
        EvalTransform(size)([tmp_path / "a.png", im])[0][0],
        EvalTransform(size)(str(tmp_path / "a.png"))[0],
    )


def test_odd_pictures(tmp_path):
    rgba, grey = Image.new("RGBA", (10, 30), (255, 0, 0, 128)), Image.new("L", (10, 30), 90)
    lying = Image.new("RGB", (30, 10))
    lying.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name, im, kw in [
        ("a.png", rgba, {}),
        ("b.png", grey, {}),
        ("c.png", lying, dict(exif=exif)),
    ]:
        im.save(tmp_path / name, **kw)
    sizes = [read_image(tmp_path / n).size for n in ("a.png", "b.png", "c.png")]
    assert sizes == [(10, 30)] * 3 and stack_images([rgba, grey], (6, 2)).shape == (2, 3, 6, 2)
    for bad in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DatasetError):
            read_image(bad)


def test_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (300, 300)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match="big.png: not a readable image"):
        read_image(tmp_path / "big.png")


@pytest.mark.parametrize(
    "size,pad", [((96, 32), None), ((384, 128), None), ((378, 126), 10), ((24, 48), 0)]
)
def test_augmentation_equals_torchvision(size, pad):
    ensure_torchvision()
    from torchvision.transforms.v2 import functional as F

    t = TrainTransform(size, pad=pad)
    raw = torch.randint(
        0, 256, (12, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    d = t.draw(uniforms(5, 1, np.arange(12), t.n_draws))
    want = torch.stack(
        [
            F.crop(
                F.pad(F.horizontal_flip(x) if f else x, [t.pad])
                if t.pad
                else F.horizontal_flip(x)
                if f
                else x,
                int(a),
                int(b),
                *size,
            )
            for x, f, a, b in zip(raw, d.flip, d.top, d.left)
        ]
    )
    assert torch.equal(t.geometry(raw, d), want)
    images, pixels = t(raw, seed=5, epoch=1)
    assert torch.equal(pixels, want / 255)
    expect = F.normalize(pixels, crops.CLIP_MEAN, crops.CLIP_STD)
    for i, (a, b, c, e) in enumerate(d.erase.tolist()):
        expect[i] = F.erase(expect[i], a, b, c - a, e - b, torch.zeros(3, 1, 1))
    assert torch.allclose(images, expect, atol=1e-5)
    one, _ = t(raw[7], seed=5, epoch=1, positions=[7])
    assert torch.equal(one, images[7])


def test_what_is_drawn_is_even():
    t = TrainTransform((96, 32), flip=0.3, erase=0.7)
    d = t.draw(uniforms(0, 0, np.arange(20000), t.n_draws))
    area = (d.erase[:, 2] - d.erase[:, 0]) * (d.erase[:, 3] - d.erase[:, 1]) / (96 * 32)
    assert abs(d.flip.mean() - 0.3) < 0.02 and abs((area > 0).mean() - 0.7) < 0.02
    assert (
        d.top.min() == d.left.min() == 0
        and d.top.max() == d.left.max() == 2 * t.pad
        and abs(np.bincount(d.top) / 20000 - 1 / (2 * t.pad + 1)).max() < 0.02
    )
    assert (
        area.max() < 0.45
        and area[area > 0].min() > 0.01
        and (d.erase[:, 2] <= 96).all()
        and (d.erase[:, 3] <= 32).all()
    )
    assert (
        not TrainTransform((96, 32), flip=0, erase=0, pad=0)
        .draw(uniforms(0, 0, np.arange(99), 26))
        .erase.any()
    )
    assert not np.array_equal(
        uniforms(0, 0, np.arange(9), 3), uniforms(1, 0, np.arange(9), 3)
    ) and not np.array_equal(
        uniforms(0, 0, np.arange(9), 3), uniforms(0, 0, np.arange(9), 3, stream=1)
    )


@pytest.mark.parametrize(
    "said,mirrored",
    [
        ("his left hand", "his right hand"),
        ("Right-handed, LEFT shoe", "Left-handed, RIGHT shoe"),
        ("leftmost and rightwards", "rightmost and leftwards"),
        ("a bright upright man in leftovers", None),
        ("left left right", "right right left"),
    ],
)
def test_swap_sides(said, mirrored):
    assert (
        swap_sides(said) == (mirrored or said)
        and has_side(said) == (mirrored is not None)
        and swap_sides(swap_sides(said)) == said
    )


# cache


def test_cache_equals_files_and_is_built_once(cuhk, monkeypatch):
    cache, index = ImageCache.build(cuhk.train, (96, 32)), np.array([5, 0, 5, 2])
    assert (
        torch.equal(cache.batch(index), ImageFiles(cuhk.train, (96, 32)).batch(index))
        and cache.image_size == (96, 32)
        and cache[3].shape == (3, 96, 32)
    )
    walked = [(i, x) for i, x in image_batches(cuhk.train, (96, 32), batch_size=7)]
    assert torch.equal(
        torch.cat([x for _, x in walked]), normalise(cache.batch(np.arange(len(cache))))
    ) and np.concatenate([i for i, _ in walked]).tolist() == list(range(len(cache)))
    monkeypatch.setattr(crops, "read_image", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(ImageCache.build(cuhk.train, (96, 32)).batch(index), cache.batch(index))
    assert len(ImageCache.build([], (96, 32))) == 0


def test_cache_notices_changes(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(130)]
    for i, p in enumerate(paths):
        Image.new("RGB", (8, 24), (i, 0, 0)).save(p)
    old = ImageCache.build(paths, (24, 8))
    Image.new("RGB", (8, 24), (0, 255, 0)).save(paths[70])
    os.utime(paths[3], (1, 1))
    decoded, real = [], crops.read_image
    monkeypatch.setattr(
        crops, "read_image", lambda p, box=None: decoded.append(Path(p).name) or real(p, box)
    )
    new = ImageCache.build(paths, (24, 8))
    assert (
        sorted(decoded) == ["3.png", "70.png"]
        and new[70][1, 0, 0] == 255
        and old[70][1, 0, 0] == 0
        and torch.equal(new[69], old[69])
    )
    assert ImageCache.build(paths, (12, 4)).image_size == (12, 4) and ImageCache.build(
        paths[:2], (24, 8), cache_dir=tmp_path / "elsewhere"
    ).image_size == (24, 8)
    assert (
        len(list((tmp_path / "cache/images").glob("*.u8"))) == 2
        and len(list((tmp_path / "elsewhere").glob("*.u8"))) == 1
    )
    paths[5].unlink()
    with pytest.raises(DatasetError, match="5.png: no such image"):
        ImageCache.build(paths, (24, 8))


def test_cache_survives_damage(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for p in paths:
        Image.new("RGB", (8, 24), (200, 0, 0)).save(p)
    want = ImageCache.build(paths, (24, 8)).batch(np.arange(5)).clone()
    (file,) = (tmp_path / "cache/images").glob("*.u8")
    for content in (b"", file.read_bytes()[:-5]):
        file.write_bytes(content)
        assert torch.equal(ImageCache.build(paths, (24, 8)).batch(np.arange(5)), want)
    before, left = file.read_bytes(), file.parent / f".{file.name}.abc"
    left.mkdir()  # of a build that was killed
    (left / file.name).write_bytes(b"half")
    paths[1].write_bytes(b"x")
    with pytest.raises(DatasetError, match="1.png: not a readable image"):
        ImageCache.build(paths, (24, 8))
    assert file.read_bytes() == before and [
        p.name for p in file.parent.iterdir() if not p.name.startswith(".")
    ] == [file.name]


def test_cache_needs_room(cuhk, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(crops.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 10})())
        with pytest.raises(DatasetError, match="needs .* GiB and the disk has less"):
            ImageCache.build(cuhk.train, (96, 32))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(TiprError):
        ImageCache.build(cuhk.train, (96, 32), cache_dir=blocked)


def build_in_process(paths, cache, queue):
    os.environ["TIPR_CACHE"] = cache
    queue.put(int(ImageCache.build(paths, (48, 16)).batch(np.arange(len(paths))).sum()))


def test_two_processes_build_one_cache(cuhk, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, paths = context.Queue(), [str(p) for p in cuhk.train.images]
    jobs = [
        context.Process(target=build_in_process, args=(paths, str(tmp_path / "shared"), queue))
        for _ in range(2)
    ]
    for j in jobs:
        j.start()
    sums = [queue.get(timeout=100) for _ in jobs]
    for j in jobs:
        j.join()
    assert (
        sums[0] == sums[1] == int(ImageFiles(paths, (48, 16)).batch(range(len(paths))).sum())
        and len(list((tmp_path / "shared/images").glob("*.u8"))) == 1
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_dying_at_every_point_of_a_cache(tmp_path):
    "Whatever is left, the next build gives the right pixels and leaves nothing lying about."
    from crash_points import crashes

    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, p in enumerate(paths):
        Image.new("RGB", (16, 48), (40 * i, 0, 0)).save(p)
    home = tmp_path / "images"
    home.mkdir()
    build = lambda: ImageCache.build(paths, (48, 16), cache_dir=home, workers=1)
    for changed in (False, True):
        if changed:
            build()
            Image.new("RGB", (16, 48), (7, 0, 0)).save(paths[2])
        for n in crashes(build, home):
            assert build().batch(range(5))[:, 0, 0, 0].tolist() == [
                0,
                40,
                7 if changed else 80,
                120,
                160,
            ], n
            assert [
                p.suffix for p in home.rglob("*") if p.is_file() and p.name != ".writing"
            ].count(
                ".u8"
            ) == 1  # a death after the rename leaves an empty folder until the next write


# one reader of pictures


def stored_pictures(folder: Path) -> dict[str, Path]:
    "The same two-coloured person in every way that pictures are kept."
    plain = Image.new("RGB", (40, 100), (120, 130, 140))
    plain.paste((200, 40, 40), (10, 20, 30, 60))
    grey, clear = plain.convert("L"), plain.convert("RGBA")
    clear.putalpha(Image.fromarray((np.asarray(plain)[..., 0] > 150).astype(np.uint8) * 255))
    note = Image.Exif()
    note[0x0112] = 6
    deep = np.asarray(grey).astype(np.uint16) * 257
    pictures = {
        "rgb.png": plain,
        "grey.png": grey,
        "alpha.png": clear,
        "alpha.webp": clear,
        "la.png": clear.convert("LA"),
        "palette.png": plain.quantize(8),
        "palette.gif": plain.quantize(8),
        "cmyk.tif": plain.convert("CMYK"),
        "cmyk.jpg": plain.convert("CMYK"),
        "deep.png": Image.fromarray(deep),
        "deep.tif": Image.fromarray(deep),
        "bits.png": grey.point(lambda v: 255 * (v > 100)).convert("1"),
        "ycc.jpg": plain,
        "wide.tif": Image.fromarray(deep.astype(np.int32)),
        "float.tif": Image.fromarray(np.asarray(grey).astype(np.float32) / 255),
    }
    for name, picture in pictures.items():
        picture.save(
            folder / name,
            **(
                {"lossless": True}
                if name.endswith("webp")
                else {"quality": 95}
                if name.endswith("jpg")
                else {}
            ),
        )
    key = plain.quantize(8)
    key.save(folder / "key.png", transparency=key.getpixel((0, 0)))
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=note, quality=95)
    return {p.name: p for p in sorted(folder.iterdir())}


def test_a_picture_is_the_same_however_it_is_kept(tmp_path):
    (tmp_path / "p").mkdir()
    for name, path in stored_pictures(tmp_path / "p").items():
        im = read_image(path)
        assert im.mode == "RGB" and im.size == (40, 100), name
        ground, coat = np.array(im.getpixel((2, 2)), int), np.array(im.getpixel((20, 40)), int)
        white, grey = (
            name.startswith(("alpha", "la", "key")),
            name.startswith(("grey", "deep", "wide", "float", "bits")),
        )
        if name == "bits.png":
            continue
        assert abs(ground - (255 if white else 128 if grey else (120, 130, 140))).max() <= 8, (
            name,
            ground,
        )
        assert abs(coat - (88 if grey or name == "la.png" else (200, 40, 40))).max() <= 10, (
            name,
            coat,
        )
        same_way = [
            ImageFiles([path], (48, 16)).batch([0]),
            ImageCache.build([path], (48, 16)).batch([0]),
            stack_images([path], (48, 16)),
            stack_images([crops.picture_header(path)], (48, 16)),
            stack_images([crops.picture_header(path.read_bytes())], (48, 16)),
        ]
        assert all(torch.equal(a, same_way[0]) for a in same_way) and torch.equal(
            normalise(same_way[0]), EvalTransform((48, 16))(path)[0][None]
        ), name


def test_only_pictures_are_opened(tmp_path, monkeypatch):
    "An EPS named .jpg never reaches Ghostscript, nor anything else that is no picture."
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called")
    )
    (tmp_path / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    (tmp_path / "y.jpg").write_bytes(b"%PDF-1.4\n")
    for name in ("x.jpg", "y.jpg"):
        with pytest.raises(DatasetError, match="not a readable image") as e:
            read_image(tmp_path / name)
        assert "\n" not in str(e.value)
    assert not {"EPS", "PDF", "WMF", "FPX", "MIC"} & set(picture_formats())


def test_damaged_notes_of_orientation(tmp_path):
    "A header that cannot be parsed is none."
    note = Image.Exif()
    note[0x0112] = 99
    Image.new("RGB", (30, 60), "red").save(tmp_path / "a.jpg", exif=note)
    Image.new("RGB", (30, 60), "red").save(
        tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
    )
    assert all(read_image(tmp_path / f"{n}.jpg").size == (30, 60) for n in "ab")


@pytest.mark.skipif(os.name == "nt", reason="rights of files")
def test_the_cache_is_its_owners(cuhk, tmp_path):
    ImageCache.build(cuhk.train, (48, 16))
    (file,) = (tmp_path / "cache/images").glob("*.u8")
    assert file.stat().st_mode & 0o777 == 0o600


# samplers


def people(n_ids=40, photos=3, captions=2):
    image = np.repeat(np.arange(n_ids * photos), captions)
    return image // photos, image


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: RandomSampler(240, **kw),
        lambda **kw: IdentitySampler(people()[0], images=people()[1], k=2, **kw),
        lambda **kw: IdentitySampler(
            people()[0], images=people()[1], k=3, groups=np.arange(40) // 4, **kw
        ),
    ],
    ids=["random", "identity", "families"],
)
def test_sharding_and_epochs(make):
    whole, parts = (
        make(batch_size=24, seed=1),
        [make(batch_size=8, seed=1, rank=r, world_size=3) for r in range(3)],
    )
    orders = []
    for epoch in (0, 1):
        for s in (whole, *parts):
            s.set_epoch(epoch)
        assert np.array_equal(np.sort(whole.sequence), np.arange(240)) and len(whole) == 10
        for b in range(10):
            shards = [p.batch(b) for p in parts]
            assert np.array_equal(
                np.concatenate([s[0] for s in shards]), whole.batch(b)[0]
            ) and np.array_equal(np.concatenate([s[1] for s in shards]), whole.batch(b)[1])
        orders.append(whole.sequence.copy())
    again = make(batch_size=24, seed=1)
    again.set_epoch(1)
    assert (
        np.array_equal(again.sequence, orders[1])
        and not np.array_equal(*orders)
        and not np.array_equal(make(batch_size=24, seed=2).sequence, orders[0])
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_identity_visits(k):
    ids, image = people()
    s = IdentitySampler(ids, 24, k=k, images=image, seed=0)
    for batch in s:
        for i, n in Counter(ids[batch].tolist()).items():
            mine = image[batch][ids[batch] == i]
            assert n <= 2 * k and (
                n > k or len(np.unique(mine)) == n
            )  # different photos within a visit
        assert len(np.unique(ids[batch])) >= 24 // k - 1
    assert np.mean([len(np.unique(ids[b])) for b in s]) > 0.9 * 24 / k


def test_identities_of_different_size():
    ids = np.repeat(np.arange(30), np.arange(1, 31))
    s = IdentitySampler(ids, 15, k=2, images=np.arange(len(ids)), seed=0)
    assert np.array_equal(np.sort(s.sequence), np.arange(len(ids)))
    at = [
        np.flatnonzero(ids[s.sequence] == 29).mean() / len(ids),
        np.flatnonzero(ids[s.sequence] == 28).mean() / len(ids),
    ]
    assert all(0.35 < a < 0.65 for a in at)  # spread over the epoch, not at its end
    one_photo = IdentitySampler(
        ids, 15, k=2, images=ids, seed=0
    )  # one photo with all captions: still every caption once
    assert np.array_equal(np.sort(one_photo.sequence), np.arange(len(ids)))


def test_families_share_a_batch():
    ids, image = people()
    family = np.arange(40) // 4
    together = lambda s: np.mean(
        [
            np.mean([(family[ids[b]] == family[i]).sum() > (ids[b] == i).sum() for i in ids[b]])
            for b in s
        ]
    )
    s = IdentitySampler(ids, 24, k=2, images=image, groups=family, seed=0)
    assert together(s) > 0.95 > 0.7 > together(IdentitySampler(ids, 24, k=2, images=image, seed=0))
    mixed = IdentitySampler(
        ids, 24, k=2, images=image, groups=dict(enumerate(np.where(family < 2, family, -1))), seed=0
    )  # -1: no family
    assert np.array_equal(np.sort(mixed.sequence), np.arange(240))


def test_bad_samplers():
    for make, match in [
        (lambda: RandomSampler(10, 11), "choose at most 10"),
        (lambda: RandomSampler(10, 6, world_size=2), "choose at most 5"),
        (lambda: RandomSampler(10, 0), "at least 1"),
        (lambda: RandomSampler(10, 2, rank=2, world_size=2), "rank=2"),
        (lambda: IdentitySampler(np.zeros(8, int), 2), "two identities"),
        (lambda: IdentitySampler(np.arange(8), 2, k=3), "k=3"),
    ]:
        with pytest.raises(DatasetError, match=match):
            make()


# loader

OPTIONS = dict(image_size=(48, 16), batch_size=8, seed=3)


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.pixels, b.pixels)
        and torch.equal(a.tokens, b.tokens)
        and a.captions == b.captions
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.image_index, b.image_index)
        and all(torch.equal(a.extra[k], b.extra[k]) for k in a.extra)
    )


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_batches_do_not_depend_on_who_makes_them(cuhk, sampler):
    make = lambda **kw: make_loader(
        cuhk.train, tokenize, **OPTIONS | dict(sampler=sampler, extra_fields=["other"]) | kw
    )
    base, workers, parts = (
        make(),
        make(num_workers=2),
        [make(batch_size=4, rank=r, world_size=2) for r in range(2)],
    )
    for l in (base, workers, *parts):
        l.set_epoch(2)
    want = list(base)
    assert len(want) == len(base) == len(cuhk.train) // 8 and all(map(same, want, workers))
    uncached = make(cache=False)
    uncached.set_epoch(2)
    assert all(map(same, want, uncached))
    for b, (x, y) in enumerate(zip(*parts)):
        assert (
            torch.equal(torch.cat([x.images, y.images]), want[b].images)
            and x.captions + y.captions == want[b].captions
        )
    assert all(map(same, want[3:], base.batches(start=3))) and all(
        map(same, want[3:], workers.batches(start=3))
    )
    assert sorted(i for b in want for i in b.caption_index.tolist()) == sorted(
        {i for b in want for i in b.caption_index.tolist()}
    )
    base.set_epoch(3)
    assert not same(base[0], want[0])


def test_batch_contents(cuhk):
    loader = make_loader(cuhk.train, tokenize, **OPTIONS)
    b = loader[1]
    assert (
        b.images.shape == b.pixels.shape == (8, 3, 48, 16)
        and b.images.dtype == b.pixels.dtype == torch.float32
        and 0 <= b.pixels.min()
        and b.pixels.max() <= 1
    )
    assert (
        b.ids.tolist()
        == cuhk.train.caption_ids[b.caption_index].tolist()
        == cuhk.train.image_ids[b.image_index].tolist()
    )
    assert (
        b.tokens.dtype == torch.int64
        and b.tokens.shape[1] == (b.tokens != 0).sum(1).max()
        and torch.equal(b.tokens, tokenize(b.captions)[:, : b.tokens.shape[1]])
    )
    erased = b.images == 0
    back = b.images * torch.tensor(crops.CLIP_STD).view(3, 1, 1) + torch.tensor(
        crops.CLIP_MEAN
    ).view(3, 1, 1)
    assert torch.allclose(back[~erased], b.pixels[~erased], atol=1e-5) and erased.any()
    part, moved = b[2:4], b.to("cpu")
    assert (
        part.captions == b.captions[2:4]
        and torch.equal(part.images, b.images[2:4])
        and torch.equal(moved.images, b.images)
        and "8 pairs" in repr(b)
    )
    by_hand = Batch(
        torch.zeros(2, 3, 8, 4),
        torch.ones(2, 3, dtype=torch.long),
        torch.tensor([0, 1]),
        ["a", "b"],
    )
    assert (
        by_hand.pixels is None
        and by_hand[torch.tensor([1])].captions == ["b"]
        and len(by_hand.to("cpu")) == 2
    )


def test_evaluation_order_is_plain(cuhk):
    batches = list(make_loader(cuhk.test, tokenize, (48, 16), 5, train=False))
    assert [c for b in batches for c in b.captions] == cuhk.test.captions and [
        i for b in batches for i in b.caption_index.tolist()
    ] == list(range(len(cuhk.test)))
    want = EvalTransform((48, 16))([cuhk.test.images[i] for i in cuhk.test.caption_image])[0]
    assert torch.equal(torch.cat([b.images for b in batches]), want)


def test_mirrored_captions(cuhk):
    loader = make_loader(cuhk.train, tokenize, **OPTIONS, augment=dict(flip=1.0, pad=0, erase=0))
    plain = make_loader(cuhk.train, tokenize, **OPTIONS, augment=dict(flip=0.0, pad=0, erase=0))
    field = make_loader(
        cuhk.train, tokenize, **OPTIONS, augment=dict(flip=1.0, pad=0, erase=0), swap_sides=False
    )
    for a, b, c in zip(loader, plain, field):
        assert (
            torch.equal(a.pixels, b.pixels.flip(-1))
            and a.captions == [swap_sides(x) for x in b.captions]
            and c.captions == b.captions
            and torch.equal(a.pixels, c.pixels)
        )
        assert torch.equal(a.tokens, tokenize(a.captions)[:, : a.tokens.shape[1]])
    assert any("right hand" in x for x in loader[0].captions + loader[1].captions)


def test_extra_fields(cuhk):
    pictures = torch.arange(len(cuhk.train), dtype=torch.uint8)[:, None, None, None].repeat(
        1, 3, 48, 16
    )
    pictures[..., :8] = 0  # left half dark
    loader = make_loader(
        cuhk.train,
        tokenize,
        **OPTIONS,
        extra_fields={
            "generated": lambda i: pictures[i],
            "length": lambda i: torch.tensor([len(cuhk.train.captions[j]) for j in i]),
            "other": True,
        },
    )
    flips = 0
    for b in loader:
        shown = pictures[b.caption_index]
        flipped = torch.tensor(
            [c != cuhk.train.captions[i] for c, i in zip(b.captions, b.caption_index)]
        )
        for g, s, f, c in zip(b.extra["generated"], shown, flipped, b.captions):
            if has_side(c):
                assert torch.equal(g, normalise((s.flip(-1) if f else s)[None])[0])
                flips += int(f)
        assert b.extra["length"].tolist() == [len(cuhk.train.captions[i]) for i in b.caption_index]
        other = b.extra["other_index"]
        assert (
            (cuhk.train.image_ids[other] == b.ids.numpy()).all()
            and (other != b.image_index).all()
            and b.extra["other"].shape == b.images.shape
        )
    assert flips > 0
    seen = {
        (int(i), int(o))
        for e in range(8)
        for b in (loader.set_epoch(e) or loader)
        for i, o in zip(b.image_index, b.extra["other_index"])
    }
    assert len(seen) == 2 * len(cuhk.train.images)  # three photos each: both others are met
    alone = cuhk.train.subset_images(cuhk.train.caption_image[[0, 40]])
    lone = make_loader(alone, tokenize, (48, 16), 4, extra_fields=["other"])[0]
    assert torch.equal(lone.extra["other_index"], lone.image_index)


def test_caption_transforms(cuhk, monkeypatch):
    monkeypatch.setitem(
        CAPTION_TRANSFORMS,
        "cut",
        lambda n=2: lambda caption, rng: " ".join(caption.split()[: n + rng.randrange(2)]),
    )
    make = lambda **kw: make_loader(cuhk.train, tokenize, **OPTIONS, **kw)
    a, b = (
        make(caption_transform=("cut", {"n": 1})),
        make(caption_transform=("cut", {"n": 1}), num_workers=1),
    )
    assert all(map(same, a, b)) and {len(c.split()) for x in a for c in x.captions} == {1, 2}
    first = [x.captions for x in a]
    a.set_epoch(1)
    a.set_epoch(0)
    assert [x.captions for x in a] == first and max(x.tokens.shape[1] for x in a) == 4
    assert (
        make(caption_transform="cut")[0].captions != make()[0].captions
        and make(caption_transform=lambda c, rng: "x")[0].captions == ["x"] * 8
    )
    with pytest.raises(TiprError, match="unknown caption transform 'prnue'"):
        make(caption_transform="prnue")


# token transforms


class Hide:
    "Every token behind 1 with probability `p`, start and end kept, and told."

    on_tokens = True

    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, tokens, caption, rng):
        assert len(caption.split()) + 2 == len(tokens)
        hidden = np.array(
            [0 < i < len(tokens) - 1 and rng.random() < self.p for i in range(len(tokens))]
        )
        return np.where(hidden, 1, tokens), np.where(hidden, tokens, -100)


class DropSome:
    on_tokens = True

    def __call__(self, tokens, caption, rng):
        return tokens[[i for i, t in enumerate(tokens) if t >= 99 or rng.random() < 0.5]]


class Bound:
    on_tokens = True

    def bind(self, tokenize):
        made = Bound()
        made.mark = int(tokenize(["mask"])[0, 1])
        return made

    def __call__(self, tokens, caption, rng):
        return np.full_like(tokens, self.mark)


def same_tokens(a, b):
    labels = (a.mask_labels is None) == (b.mask_labels is None) and (
        a.mask_labels is None or torch.equal(a.mask_labels, b.mask_labels)
    )
    return same(a, b) and torch.equal(a.tokens_original, b.tokens_original) and labels


def test_token_transforms(cuhk, monkeypatch):
    monkeypatch.setitem(CAPTION_TRANSFORMS, "hide", Hide)
    monkeypatch.setitem(
        CAPTION_TRANSFORMS,
        "cut",
        lambda n=2: lambda caption, rng: " ".join(caption.split()[: n + rng.randrange(2)]),
    )
    make = lambda **kw: make_loader(cuhk.train, tokenize, **OPTIONS | kw)
    spec = ["hide", ("cut", {"n": 4})]  # text first, whatever the order
    base, workers, text = (
        make(caption_transform=spec),
        make(caption_transform=spec, num_workers=2),
        make(caption_transform=("cut", {"n": 4})),
    )
    parts = [make(caption_transform=spec, batch_size=4, rank=r, world_size=2) for r in range(2)]
    for l in (base, workers, text, *parts):
        l.set_epoch(1)
    want = list(base)
    assert all(map(same_tokens, want, workers)) and all(
        map(same_tokens, want[2:], base.batches(start=2))
    )
    for b, plain, x, y in zip(want, text, *parts):
        assert b.captions == plain.captions and torch.equal(
            b.tokens_original, plain.tokens
        )  # what the text transform draws stays the same beside a token transform
        asked = b.mask_labels != -100
        assert (
            0 < asked.float().mean() < 1
            and (b.tokens[asked] == 1).all()
            and torch.equal(b.mask_labels[asked], b.tokens_original[asked])
        )
        assert (
            torch.equal(b.tokens[~asked], b.tokens_original[~asked])
            and x.captions + y.captions == b.captions
        )
        assert x.mask_labels[0].tolist() == b.mask_labels[0, : x.tokens.shape[1]].tolist()
    part = want[0][2:5].to("cpu")
    assert (
        torch.equal(part.mask_labels, want[0].mask_labels[2:5])
        and torch.equal(part.tokens_original, want[0].tokens_original[2:5])
        and "tokens changed" in repr(part)
    )
    base.set_epoch(2)
    assert not torch.equal(base[0].tokens, want[0].tokens)
    assert (
        make()[0].mask_labels is None
        and make()[0].tokens_original is not None
        and make(train=False, caption_transform=spec)[0].mask_labels is None
    )


def test_token_transforms_that_drop_or_are_bound(cuhk):
    make = lambda *spec: make_loader(cuhk.train, tokenize, **OPTIONS, caption_transform=list(spec))[
        0
    ]
    dropped = make(DropSome())
    assert (
        dropped.mask_labels is None
        and (dropped.tokens != 0).sum() < (dropped.tokens_original != 0).sum()
        and torch.equal(
            dropped.tokens_original, make_loader(cuhk.train, tokenize, **OPTIONS)[0].tokens
        )
    )
    assert set(make(Bound()).tokens.unique().tolist()) == {0, 4}
    both = make(Hide(1.0), Hide(1.0))
    assert torch.equal(
        both.mask_labels[both.mask_labels != -100], both.tokens_original[both.mask_labels != -100]
    )  # the first label of a place stays
    with pytest.raises(TiprError, match="DropSome drops tokens that were masked before"):
        make(Hide(), DropSome())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: np.r_[t, t],
        lambda t: t / 2,
        lambda t: t[:0],
        lambda t: (t, t[:1]),
        lambda t: t[None],
    ],
)
def test_token_transforms_gone_wrong(cuhk, wrong):
    def change(tokens, caption, rng):
        return wrong(tokens)

    change.on_tokens = True
    with pytest.raises(TiprError, match="caption transform change returned") as e:
        make_loader(cuhk.train, tokenize, **OPTIONS, caption_transform=change)[0]
    assert "\n" not in str(e.value)


def test_arguments_a_transform_has_not(cuhk, monkeypatch):
    monkeypatch.setitem(CAPTION_TRANSFORMS, "hide", Hide)
    with pytest.raises(TiprError, match="caption transform 'hide'.*share"):
        make_loader(cuhk.train, tokenize, **OPTIONS, caption_transform=["hide", {"share": 2}])


def test_whole_padding(cuhk):
    assert (
        make_loader(cuhk.train, tokenize, **OPTIONS, trim=False)[0].tokens.shape[1]
        == 40
        > make_loader(cuhk.train, tokenize, **OPTIONS)[0].tokens.shape[1]
    )


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_odd_captions_at_the_end(cuhk, sampler):
    n = len(cuhk.train)
    whole = make_loader(cuhk.train, tokenize, (48, 16), 7, sampler=sampler, drop_last=False)
    assert (
        n % 7
        and len(whole) == n // 7 + 1
        and sorted(i for b in whole for i in b.caption_index.tolist()) == list(range(n))
    )
    assert (
        len(make_loader(cuhk.train, tokenize, (48, 16), 7, sampler=sampler)) == n // 7
        and len(make_loader(cuhk.train, tokenize, (48, 16), 7, train=False, drop_last=True))
        == n // 7
    )


def test_one_or_two_pairs_a_visit():
    "As many identities in a batch as SEN's released sampler brings (95 in 128, 86 to 112); a visit may show one photo twice."
    rng = np.random.default_rng(0)
    photos = rng.integers(
        1, 6, 4000
    )  # CUHK-PEDES has about three photos of a person and two captions a photo
    ids, image = np.repeat(np.arange(4000), 2 * photos), np.repeat(np.arange(photos.sum()), 2)
    s = IdentitySampler(ids, 128, k=(1, 2), seed=3)
    met = [len(np.unique(ids[b])) for b in s]
    assert (
        92 < np.mean(met) < 98
        and 82 <= min(met)
        and max(met) <= 114
        and np.array_equal(np.sort(s.sequence), np.arange(len(ids)))
    )
    beside = [np.unique(ids[b], return_counts=True)[1] for b in s]
    assert (
        0.45 < np.mean([c[c > 1].sum() / 128 for c in beside]) < 0.6
    )  # half of the samples have a partner
    twice = lambda s: np.mean([len(b) - len(np.unique(image[b])) for b in s])
    assert twice(s) > 0 and twice(
        IdentitySampler(ids, 128, k=(1, 2), images=image, seed=3)
    ) < twice(s)
    before = s.sequence
    s.set_epoch(1)
    assert not np.array_equal(before, s.sequence)
    with pytest.raises(DatasetError, match=r"k=\(1, 2, 3\)"):
        IdentitySampler(ids, 128, k=(1, 2, 3))
    with pytest.raises(DatasetError, match="k='two'"):
        IdentitySampler(ids, 128, k="two")


def ended(pid: int) -> bool:
    "Whether a process has gone, or is only still listed."
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_workers_end_with_their_parent(tmp_path):
    "A killed training leaves no loader process and no open pipe."
    import signal, subprocess, sys, time

    script = tmp_path / "job.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import layouts, torch, time
from tipr_nb.data import load_dataset, make_loader
d = load_dataset("cuhk-pedes", layouts.cuhk_pedes(__import__("pathlib").Path({str(tmp_path)!r})))
l = make_loader(d.train, lambda c: torch.ones(len(c), 4, dtype=torch.long), (48, 16), 4, num_workers=2)
it = l.batches(); next(it)
import multiprocessing; print(*[p.pid for p in multiprocessing.active_children()], flush=True); time.sleep(100)
""")
    for how in (signal.SIGKILL, signal.SIGTERM):
        job = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        pids = [int(p) for p in job.stdout.readline().split()]
        assert len(pids) == 2
        job.send_signal(how)
        start = time.time()
        assert (
            job.stdout.read() == "" and time.time() - start < 2.5
        )  # the pipe is closed by everybody
        while not all(ended(p) for p in pids):
            assert time.time() - start < 2.5


def test_captions_are_tokenized_once(cuhk):
    calls = []
    loader = make_loader(cuhk.train, lambda c: calls.extend(c) or tokenize(c), **OPTIONS)
    for e in range(4):
        loader.set_epoch(e)
        for _ in loader:
            pass
    assert max(Counter(calls).values()) == 1 and set(cuhk.train.captions) <= set(calls)


def test_groups_by_column(cuhk):
    split = replace(
        cuhk.train,
        image_columns=cuhk.train.image_columns
        | {"family": np.array([f"f{i // 3}" for i in cuhk.train.image_ids])},
    )
    b = make_loader(split, tokenize, (48, 16), 6, sampler="identity", groups="family", k=2)[0]
    assert len({int(i) // 3 for i in b.ids}) == 1 and len(set(b.ids.tolist())) == 3
    with pytest.raises(DatasetError, match="no image column 'clan'"):
        make_loader(split, tokenize, (48, 16), 6, sampler="identity", groups="clan")


def test_bad_loaders(cuhk):
    for kw, match in [
        (dict(sampler="best"), "sampler='best'"),
        (dict(batch_size=10**6), "choose at most"),
    ]:
        with pytest.raises(DatasetError, match=match):
            make_loader(cuhk.train, tokenize, **OPTIONS | kw)
    with pytest.raises(DatasetError, match="no captions"):
        make_loader(cuhk.train.subset_captions([]), tokenize)


def test_disk_full_while_writing(cuhk, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(crops, "resize_image", full)
    with pytest.raises(TiprError, match="no space left"):
        ImageCache.build(cuhk.train, (96, 32))
    assert not [p for p in (tmp_path / "cache/images").iterdir() if not p.name.endswith(".lock")]


@pytest.mark.full
def test_killed_builds_leave_nothing_wrong(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(1500)]
    for i, p in enumerate(paths):
        Image.new("RGB", (64, 192), (i % 256, 0, 0)).save(p)
    for delay in (0.02, 0.1, 0.3):
        job = multiprocessing.get_context("fork").Process(
            target=ImageCache.build, args=(paths, (96, 32))
        )
        job.start()
        job.join(delay)
        job.kill()
        job.join()
    cache = ImageCache.build(paths, (96, 32))
    assert cache.batch(np.arange(1500))[:, 0, 0, 0].tolist() == [i % 256 for i in range(1500)]
    assert [
        p.suffix for p in (tmp_path / "cache/images").iterdir() if not p.name.endswith(".lock")
    ] == [".u8"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(cuhk):
    for workers in (0, 1):
        for b in make_loader(
            cuhk.train,
            tokenize,
            **OPTIONS,
            num_workers=workers,
            pin_memory=True,
            extra_fields=["other"],
        ):
            there = b.to("cuda")
            assert (
                b.raw.is_pinned()
                and there.images.is_cuda
                and torch.allclose(there.images.cpu(), b.images, atol=1e-5)
                and torch.allclose(there.pixels.cpu(), b.pixels)
            )
            assert (
                torch.equal(there.extra["other"].cpu(), b.extra["other"])
                and there.captions == b.captions
            )


# the embedded benchmark


def test_synth_pedes_brings_its_columns(tmp_path):
    synth = pytest.importorskip("tipr_nb.synth")
    root = synth.make_synth_pedes(tmp_path / "s", n_ids=(6, 4, 10), workers=1)
    d = load_dataset("synth-pedes", root)
    assert d.train.n_ids == 6 and d.test.n_ids == 10 and not d.notes
    assert (
        set(d.test.image_columns["gallery"]) <= set(range(5))
        and d.test.caption_columns["gallery"].tolist()
        == d.test.image_columns["gallery"][d.test.caption_image].tolist()
    )
    assert (
        set(d.train.caption_columns["kind"]) == {"complete", "incomplete"}
        and 0 < d.train.caption_columns["completeness"].min() <= 1
    )
    assert {"camera", "view", "family", "lookalike", "attributes"} <= set(
        d.train.image_columns
    ) and isinstance(d.train.image_columns["attributes"][0], dict)
    assert (
        load_dataset("cuhk-pedes", root).test.captions == d.test.captions
    )  # any reader of CUHK-PEDES reads it
    assert check_dataset("synth-pedes", root, lengths=None).usable
    (root / "attributes.json").write_text("{")
    with pytest.raises(TiprError, match="attributes.json"):
        load_dataset("synth-pedes", root)


def crowd_of(n=4000, seed=0):
    "Identities and photos of the captions of a set like CUHK-PEDES: about three photos of a person and two captions a photo."
    photos = np.random.default_rng(seed).integers(1, 6, n)
    return np.repeat(np.arange(n), 2 * photos), np.repeat(np.arange(photos.sum()), 2)


@pytest.mark.parametrize("k", [2, 4, (1, 2)])
def test_rounds_hold_different_identities_and_whole_visits(k):
    ids, image = crowd_of(300)
    high = k if isinstance(k, int) else k[1]
    s = RoundsSampler(ids, 32, k=k, seed=3)
    for epoch in range(3):
        s.set_epoch(epoch)
        assert len(s.sequence) == s.n and len(list(s)) == len(s) == s.n // 32
        visits = np.split(s.sequence, np.flatnonzero(np.diff(ids[s.sequence])) + 1)[
            :-1
        ]  # the end may cut a visit
        sizes = {len(v) for v in visits}
        if isinstance(k, int):
            assert all(size % k == 0 for size in sizes)
        people = [ids[v[0]] for v in visits]
        if high == k:
            assert all(
                len(set(people[a : a + 32 // high])) >= 32 // high - 1
                for a in range(0, len(people) - 64, 32 // high)
            )
    again = RoundsSampler(ids, 32, k=k, seed=3)
    again.set_epoch(2)
    assert np.array_equal(again.sequence, s.sequence)
    parts = [RoundsSampler(ids, 16, k=k, seed=3, rank=r, world_size=2) for r in range(2)]
    for part in parts:
        part.set_epoch(2)
    assert all(np.array_equal(np.concatenate([a, b]), c) for a, b, c in zip(*parts, s))


def test_rounds_prefer_other_photos_where_asked_and_fill_up_small_identities():
    ids, image = crowd_of(300)
    twice = lambda s: np.mean([len(b) - len(np.unique(image[b])) for b in s])
    assert twice(RoundsSampler(ids, 32, k=2, images=image)) < twice(RoundsSampler(ids, 32, k=2))
    lonely = np.arange(40)  # one caption each
    assert np.array_equal(
        np.unique(RoundsSampler(lonely, 8, k=2).sequence, return_counts=True)[1].max(), 2
    )


def test_rounds_refuse_what_they_cannot_do():
    ids, image = crowd_of(20)
    with pytest.raises(DatasetError, match="32 identities a round and the split has 20"):
        RoundsSampler(ids, 64, k=2)
    with pytest.raises(DatasetError, match="an epoch of rounds has only"):
        RoundsSampler(np.repeat(np.arange(4), 3), 9, k=(1, 2))
    one = Split(
        "train", [Path("x")] * 20, np.arange(20), ["red"] * 20, np.arange(20), np.arange(20)
    )
    for settings, message in [
        (dict(sampler="rounds", groups=np.zeros(20)), "look-alike"),
        (dict(sampler="round"), "random, identity, rounds"),
    ]:
        with pytest.raises(DatasetError, match=message):
            make_loader(one, tokenize, **settings)
