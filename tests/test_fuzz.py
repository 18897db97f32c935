"""Every reader, with inputs that were damaged by a fixed seed: it returns, or raises one line of `TiprError`, within ten seconds.

`make test` tries a few of each reader; the rest, some 24,000, take more than five minutes and are marked `full` for that reason alone. FUZZ_SEED=1 tries other inputs of the same kinds.
"""

import io
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from PIL import Image

import layouts
from mutations import mutate_bytes, mutate_json, mutate_lines, mutate_table, mutate_text, time_limit
from tipr_nb.core import (
    TiprError,
    read_csv,
    read_json,
    read_jsonl,
    read_npy,
    read_parquet,
    read_rows,
    read_toml,
)

QUICK, MANY, SECONDS = 8, 320, 10
SEED = os.environ.get("FUZZ_SEED", "")  # other inputs of the same kinds
SURFACES: dict[str, Callable[[Path], "Surface"]] = {}


@dataclass
class Surface:
    "Something that is read: a file that is there, or a text."

    use: Callable[[Any], Any]  # takes the path, or the text
    mutate: Callable[[Any, random.Random], Any]
    path: Path | None = None  # the file that is damaged
    text: str = ""  # or the text


def surface(make: Callable[[Path], Surface]):
    SURFACES[make.__name__] = make
    return make


def file(folder: Path, name: str, data: bytes | str, mutate, use) -> Surface:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return Surface(use, mutate, path)


def written(path: Path, mutate, use) -> Surface:
    return Surface(use, mutate, path)


# the common readers


@surface
def json_file(folder):
    return file(folder, "a.json", '{"a": [1, 2.5, "x"], "b": {"c": null}}', mutate_json, read_json)


@surface
def jsonl_file(folder):
    return file(
        folder, "a.jsonl", '{"a": 1}\n{"a": "b"}\n', mutate_lines, lambda p: list(read_jsonl(p))
    )


@surface
def toml_file(folder):
    return file(folder, "a.toml", 'a = 1\n[b]\nc = "x"\nd = 2020-01-01\n', mutate_table, read_toml)


@surface
def csv_file(folder):
    return file(folder, "a.csv", 'a,b\n1,"x, y"\n2,z\n', mutate_table, lambda p: list(read_csv(p)))


@surface
def rows_csv(folder):
    return file(folder, "a.csv", "image;id\na.jpg;7\n", mutate_table, lambda p: list(read_rows(p)))


def parquet_bytes(**columns) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


@surface
def parquet_file(folder):
    data = parquet_bytes(image=["a.jpg", "b.jpg"], id=[7, 8], box=[[1.0, 2.0, 3.0, 4.0]] * 2)
    return file(folder, "a.parquet", data, mutate_bytes, lambda p: read_parquet(p).to_pylist())


def npy_bytes(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@surface
def npy_file(folder):
    return file(folder, "a.npy", npy_bytes(np.arange(20.0).reshape(4, 5)), mutate_bytes, read_npy)


@surface
def npy_mapped(folder):
    return file(
        folder,
        "a.npy",
        npy_bytes(np.arange(20.0).reshape(4, 5)),
        mutate_bytes,
        lambda p: np.array(read_npy(p, mmap=True)),
    )


# datasets


@surface
def cuhk_annotation(folder):
    from tipr_nb.data import load_dataset

    home = layouts.cuhk_pedes(folder, {"train": 2, "val": 1, "test": 1})
    return written(
        home / "reid_raw.json", mutate_json, lambda p: load_dataset("cuhk-pedes", p.parent)
    )


@surface
def captions_table(folder):
    from tipr_nb.data import load_dataset

    home = layouts.own_photos(folder, 3)
    return written(home / "captions.csv", mutate_table, lambda p: load_dataset("folder", p.parent))


@surface
def captions_lines(folder):
    from tipr_nb.data import load_dataset

    home = layouts.own_photos(folder, 3, kind="jsonl")
    return written(
        next(home.glob("*.jsonl")), mutate_lines, lambda p: load_dataset("folder", p.parent)
    )


@surface
def captions_checked(folder):
    from tipr_nb.data import check_dataset

    home = layouts.own_photos(folder, 3)
    return written(
        home / "captions.csv",
        mutate_table,
        lambda p: check_dataset("folder", p.parent, verify=False, lengths=None).to_dict(),
    )


@surface
def attributes(folder):
    from tipr_nb.data import load_dataset

    home = layouts.cuhk_pedes(folder, {"train": 2, "val": 1, "test": 1})
    records = json.loads((home / "reid_raw.json").read_text())
    side = {
        r["file_path"]: {
            "coat": "red",
            "box": [1, 2, 3, 4],
            "captions": [{"caption": c, "words": 3} for c in r["captions"]],
        }
        for r in records
    }
    (home / "attributes.json").write_text(json.dumps(side))
    return written(
        home / "attributes.json", mutate_json, lambda p: load_dataset("cuhk-pedes", p.parent)
    )


@surface
def skip_report(folder):
    from tipr_nb.data import read_skip

    return file(
        folder,
        "report.json",
        '{"missing": ["a.jpg"], "unreadable": ["b.jpg"]}',
        mutate_json,
        read_skip,
    )


@surface
def imported_parquet(folder):
    from tipr_nb.interop import import_dataset

    png = io.BytesIO()
    Image.new("RGB", (8, 16)).save(png, "PNG")
    rows = dict(
        image=[{"bytes": png.getvalue(), "path": "a.png"}] * 2,
        identity=[0, 1],
        captions=[["a man"], ["a woman", "two"]],
        coat=["red", "blue"],
    )
    return file(
        folder,
        "d/data/train-0.parquet",
        parquet_bytes(**rows),
        mutate_bytes,
        lambda p: import_dataset(p.parent.parent, folder / "pictures"),
    )


@surface
def imported_facts(folder):
    from tipr_nb.interop import import_dataset

    imported_parquet(folder)
    return file(
        folder,
        "d/tipr.json",
        '{"format": 1, "name": "x", "notes": ["a"], "splits": ["train"]}',
        mutate_json,
        lambda p: repr(import_dataset(p.parent, folder / "pictures")),
    )


# runs, recipes, grids, metrics


@surface
def recipe(folder):
    from tipr_nb.training import Recipe, get_recipe

    get_recipe("sen-tiny").save(folder / "recipe.json")
    return written(folder / "recipe.json", mutate_json, lambda p: Recipe.load(p).hash())


@surface
def recipe_irra(folder):
    from tipr_nb.training import Recipe, get_recipe

    get_recipe("irra").save(folder / "recipe.json")
    return written(folder / "recipe.json", mutate_json, lambda p: Recipe.load(p).hash())


@surface
def run_json(folder):
    from tipr_nb.training.runs import read_run_file

    good = dict(
        status="running", step=3, best={"step": 2, "value": 0.5}, seconds=1.0, max_seconds=None
    )
    return file(
        folder, "run.json", json.dumps(good), mutate_json, lambda p: read_run_file(p.parent)
    )


@surface
def grid_toml(folder):
    from tipr_nb.training import read_grid

    good = 'dataset = "synth-world"\nseeds = [0, 1]\ntrain_share = 0.5\n\n[set]\nepochs = 2\nlr = 1e-4\n\n[[rows]]\nname = "a"\nrecipe = "sen-tiny"\n\n[[rows]]\nname = "b"\nrecipe = "clip-tiny"\nset = {batch_size = 8}\n'
    return file(folder, "grid.toml", good, mutate_table, read_grid)


@surface
def grid_json(folder):
    from tipr_nb.training import read_grid

    good = dict(
        seeds=[0, 1],
        set=dict(epochs=2),
        rows=[
            dict(name="a", recipe="sen-tiny"),
            dict(name="b", recipe="clip-tiny", set=dict(lr=1e-4)),
        ],
    )
    return file(folder, "grid.json", json.dumps(good), mutate_json, read_grid)


@surface
def grid_table(folder):
    from tipr_nb.training import GridTable

    good = "row,seed,recipe_hash,data_hash,setup,split,captions,query,r1,mAP,status\na,0,ab12,cd34,x,val,all,text,50.5,40.2,done\na,1,ab12,cd34,x,val,all,text,51.5,41.2,done\n"
    return file(
        folder,
        "grid.csv",
        good,
        mutate_table,
        lambda p: GridTable(p).done(("a", 0, "ab12", "cd34", "x")),
    )


@surface
def history(folder):
    from tipr_nb.models.storage import History

    def use(p):
        h = History(p)
        h.load()
        h.frame()

    return file(
        folder,
        "history.jsonl",
        '{"step": 1, "loss": 2.5}\n{"step": 2, "mAP": 1}\n',
        mutate_lines,
        use,
    )


def some_metrics():
    from tipr_nb.evaluation import rank_metrics

    rng = np.random.default_rng(0)
    x, ids = rng.normal(size=(12, 4)).astype(np.float32), np.arange(12) // 2
    return rank_metrics(x, x, ids, ids, per_query=True, n_boot=20)


@surface
def metrics_json(folder):
    from tipr_nb.evaluation import load_metrics, save_metrics

    save_metrics(some_metrics(), folder / "m.json")
    return written(folder / "m.json", mutate_json, lambda p: repr(load_metrics(p)))


@surface
def metrics_npz(folder):
    from tipr_nb.evaluation import load_metrics, save_metrics

    save_metrics(some_metrics(), folder / "m.json")
    return written(
        folder / "m.npz", mutate_bytes, lambda p: repr(load_metrics(p.with_suffix(".json")))
    )


@surface
def calibration(folder):
    from tipr_nb.evaluation import Calibration

    Calibration((1.0, 2.0), 0.5, (0.0, 0.0), (1.0, 1.0), 0.5).save(folder / "c.json")
    return written(
        folder / "c.json", mutate_json, lambda p: Calibration.load(p).probability(0.5, 0.1)
    )


@surface
def features_npz(folder):
    from tipr_nb.evaluation import read_features

    out = io.BytesIO()
    np.savez(out, features=np.ones((3, 4), np.float32), ids=np.arange(3))
    return file(folder, "f.npz", out.getvalue(), mutate_bytes, read_features)


@surface
def features_npy(folder):
    from tipr_nb.evaluation import read_features

    return file(
        folder, "f.npy", npy_bytes(np.ones((3, 4), np.float32)), mutate_bytes, read_features
    )


def tensors_bytes() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"features": torch.ones(3, 4), "ids": torch.arange(3)}, {"a": "b"})


@surface
def features_tensors(folder):
    from tipr_nb.evaluation import read_features

    return file(folder, "f.safetensors", tensors_bytes(), mutate_bytes, read_features)


# weights and checkpoints


@surface
def safetensors_header(folder):
    from tipr_nb.models.storage import read_metadata, read_safetensors

    return file(
        folder,
        "f.safetensors",
        tensors_bytes(),
        mutate_bytes,
        lambda p: (read_safetensors(p), read_metadata(p)),
    )


def checkpoint_bytes(legacy=False) -> bytes:
    import torch
    from collections import OrderedDict

    out = io.BytesIO()
    state = OrderedDict((f"module.a.{i}.weight", torch.randn(2, 3)) for i in range(4))
    torch.save(
        dict(state_dict=state, epoch=3, args=dict(path="x", lr=0.1), best=np.float64(1.5)),
        out,
        _use_new_zipfile_serialization=not legacy,
    )
    return out.getvalue()


@surface
def checkpoint_zip(folder):
    from tipr_nb.interop import read_checkpoint

    return file(folder, "c.pth", checkpoint_bytes(), mutate_bytes, read_checkpoint)


@surface
def checkpoint_pickle(folder):
    "The pickle inside the archive, which a change of the archive's bytes would only fail the checksum of."
    import zipfile
    from tipr_nb.interop import read_checkpoint

    good = zipfile.ZipFile(io.BytesIO(checkpoint_bytes()))
    members = {n: good.read(n) for n in good.namelist()}
    name = next(n for n in members if n.endswith("data.pkl"))

    def mutate(_, rng):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as z:
            for n, data in members.items():
                z.writestr(n, mutate_bytes(data, rng) if n == name else data)
        return out.getvalue()

    return file(folder, "c.pth", checkpoint_bytes(), mutate, read_checkpoint)


@surface
def checkpoint_legacy(folder):
    from tipr_nb.interop import read_checkpoint

    return file(folder, "c.pth", checkpoint_bytes(True), mutate_bytes, read_checkpoint)


@surface
def checkpoint_config(folder):
    from tipr_nb.interop import read_checkpoint

    (folder / "model.safetensors").write_bytes(tensors_bytes())
    return file(
        folder,
        "config.json",
        '{"model_type": "clip", "text_config": {"hidden_size": 4}}',
        mutate_json,
        lambda p: read_checkpoint(p.parent),
    )


@surface
def checkpoint_index(folder):
    from tipr_nb.interop import read_checkpoint

    (folder / "m-1.safetensors").write_bytes(tensors_bytes())
    return file(
        folder,
        "model.safetensors.index.json",
        '{"metadata": {}, "weight_map": {"features": "m-1.safetensors", "ids": "m-1.safetensors"}}',
        mutate_json,
        lambda p: read_checkpoint(p.parent),
    )


@surface
def open_clip_config(folder):
    from tipr_nb.interop import load_peer

    (folder / "open_clip_model.safetensors").write_bytes(tensors_bytes())
    good = dict(
        model_cfg=dict(
            embed_dim=4,
            vision_cfg=dict(image_size=224, layers=1, width=8, patch_size=16),
            text_cfg=dict(context_length=77, vocab_size=100, width=8, heads=1, layers=1),
        ),
        preprocess_cfg=dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
    )
    return file(
        folder,
        "open_clip_config.json",
        json.dumps(good),
        mutate_json,
        lambda p: load_peer(p.parent),
    )


@surface
def model_config(folder):
    "A saved model of our own: its configuration."
    from tipr_nb.core import shipped_weights
    from tipr_nb.models import PersonCLIP

    home = shipped_weights()["clip-synth-world"]
    for p in home.iterdir():
        (folder / p.name).symlink_to(p) if p.name != "config.json" else shutil.copy(
            p, folder / p.name
        )
    return written(
        folder / "config.json", mutate_json, lambda p: PersonCLIP.from_pretrained(str(p.parent))
    )


# galleries


def gallery_folder(folder: Path) -> Path:
    from tipr_nb.search import ColourModel, colour_archive, find_photos, index_photos

    index_photos(folder / "g", find_photos(colour_archive(folder / "photos")), ColourModel())
    return folder / "g"


def snapshot(gallery: Path) -> Path:
    from tipr_nb.search.storage import read_manifest, snapshot_folder

    return snapshot_folder(gallery, read_manifest(gallery))


def ask(gallery: Path):
    from tipr_nb.search import ColourModel, Gallery

    g = Gallery(gallery, ColourModel())
    g.search("a red coat and blue trousers", k=3)
    g.search("a red coat", k=2, where="height > 3")
    return repr(g), g.skipped


@surface
def gallery_manifest(folder):
    return written(gallery_folder(folder) / "gallery.json", mutate_json, lambda p: ask(p.parent))


@surface
def gallery_features(folder):
    home = gallery_folder(folder)
    return written(snapshot(home) / "features.npy", mutate_bytes, lambda p: ask(home))


@surface
def gallery_items(folder):
    home = gallery_folder(folder)
    return written(snapshot(home) / "items.parquet", mutate_bytes, lambda p: ask(home))


@surface
def gallery_skipped(folder):
    home = gallery_folder(folder)
    return written(snapshot(home) / "skipped.parquet", mutate_bytes, lambda p: ask(home))


@surface
def gallery_unsummed(folder):
    "Features and table where the manifest has no checksums, as in a gallery of an earlier version."
    home = gallery_folder(folder)
    manifest = json.loads((home / "gallery.json").read_text())
    manifest.pop("sha256", None)
    (home / "gallery.json").write_text(json.dumps(manifest))
    return written(snapshot(home) / "items.parquet", mutate_bytes, lambda p: ask(home))


@surface
def indexed_again(folder):
    "Indexing over a damaged manifest."
    from tipr_nb.search import ColourModel, find_photos, index_photos
    from tipr_nb.search.practice import colour_figure

    home = gallery_folder(folder)
    shutil.rmtree(folder / "photos")
    (folder / "photos").mkdir()
    colour_figure("red", "blue").save(folder / "photos/a.png")
    good = shutil.copytree(home, folder / "good")

    def use(p):
        data = p.read_bytes()
        shutil.rmtree(home)
        shutil.copytree(good, home)
        p.write_bytes(data)
        return index_photos(home, find_photos(folder / "photos"), ColourModel())

    return written(home / "gallery.json", mutate_json, use)


# tables of boxes and facts


def photos_with(folder: Path, name: str, data, mutate, **options) -> Surface:
    from tipr_nb.search import find_photos

    Image.new("RGB", (64, 128), "red").save(folder / "a.jpg")
    return file(
        folder,
        name,
        data,
        mutate,
        lambda p: find_photos(folder / "a.jpg", **{options.get("as_", "boxes"): p}),
    )


@surface
def boxes_csv(folder):
    return photos_with(
        folder,
        "boxes.csv",
        "file,x0,y0,x1,y1,score,when\na.jpg,1,2,30,60,0.5,2024-05-01 10:00\na.jpg,3,4,20,50,0.25,2024-05-02\n",
        mutate_table,
    )


@surface
def boxes_list(folder):
    return photos_with(
        folder,
        "boxes.jsonl",
        '{"file": "a.jpg", "bbox": [1, 2, 30, 60], "id": 3}\n{"file": "a.jpg", "bbox": [1, 2, 20, 50], "id": 4}\n',
        mutate_lines,
    )


@surface
def boxes_coco(folder):
    good = dict(
        images=[dict(id=1, file_name="a.jpg", width=64, height=128)],
        categories=[dict(id=1, name="person")],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 30, 60], score=0.5)],
    )
    return photos_with(folder, "coco.json", json.dumps(good), mutate_json)


@surface
def boxes_megadetector(folder):
    good = dict(
        images=[
            dict(file="a.jpg", detections=[dict(category="1", conf=0.9, bbox=[0.1, 0.1, 0.5, 0.5])])
        ],
        detection_categories={"1": "person"},
        info=dict(format_version="1.3"),
    )
    return photos_with(folder, "md.json", json.dumps(good), mutate_json)


@surface
def boxes_mot(folder):
    Image.new("RGB", (64, 128)).save(folder / "000001.jpg")
    return photos_with(
        folder,
        "det.txt",
        "1,-1,1,2,30,60,0.9,-1,-1,-1\n1,-1,3,4,20,50,0.8,-1,-1,-1\n",
        mutate_table,
    )


@surface
def facts_csv(folder):
    return photos_with(
        folder,
        "facts.csv",
        "file,camera,when,age\na.jpg,c2,2024-05-01 10:00:00Z,31\n",
        mutate_table,
        as_="metadata",
    )


@surface
def facts_parquet(folder):
    data = parquet_bytes(file=["a.jpg"], camera=["c2"], age=[31], tags=[["a", "b"]])
    return photos_with(folder, "facts.parquet", data, mutate_bytes, as_="metadata")


# texts


def table_of_columns():
    import datetime
    import pyarrow as pa
    from tipr_nb.search import Column

    t = pa.table(
        dict(
            camera=["c1", "c2", None],
            x0=[1, 2, 3],
            score=[0.5, None, 2.0],
            turned=[True, False, True],
            time=[datetime.datetime(2024, 5, 1, 10)] * 3,
        )
    )
    return {n: Column.of(t[n]) for n in t.column_names}


def filter_with(text: str) -> Surface:
    from tipr_nb.search import Selection

    columns = table_of_columns()

    def use(text):
        return Selection(text, columns).rows

    return Surface(use, mutate_text, text=text)


@surface
def filter_words(folder):
    return filter_with("camera == 'c2' and x0 > 10 or not (score <= 0.5)")


@surface
def filter_lists(folder):
    return filter_with(
        "camera in ['c1', 'c2'] and camera.startswith('c') and turned == True and x0 not in [1, 2]"
    )


@surface
def filter_times(folder):
    return filter_with(
        "time >= '2024-05-01 10:00' and time < '2024-05-02T00:00:00+02:00' and 1 < x0 <= 3"
    )


@surface
def start_of_film(folder):
    from tipr_nb.search.video import parse_start

    return Surface(parse_start, mutate_text, text="2024-05-01 10:00:00+02:00")


@surface
def every_of_film(folder):
    from tipr_nb.search.video import parse_every

    return Surface(parse_every, mutate_text, text="500ms")


@surface
def name_of_film(folder):
    from tipr_nb.search.video import film_start

    return Surface(film_start, mutate_text, text="gate_2024-05-01_10-00-07.avi")


@surface
def moment_path(folder):
    from tipr_nb.search import read_moment

    Image.new("RGB", (64, 128)).save(folder / "a.jpg")
    return Surface(lambda t: read_moment(t), mutate_text, text=f"{folder}/a.jpg#t=1.5")


@surface
def caption_text(folder):
    from tipr_nb.models import PersonCLIP

    tokenize = PersonCLIP.from_pretrained("clip-synth-world").tokenize
    return Surface(
        lambda t: tokenize([t]),
        mutate_text,
        text="A man in a red coat and blue trousers, holding a bag.",
    )


@surface
def name_of_model(folder):
    from tipr_nb.core import resolve_model

    return Surface(lambda t: resolve_model(t), mutate_text, text="owner/name-of-model")


@surface
def name_of_recipe(folder):
    from tipr_nb.training import get_recipe

    return Surface(lambda t: get_recipe(t), mutate_text, text="sen-tiny.json")


@surface
def root_of_dataset(folder):
    from tipr_nb.data import load_dataset

    return Surface(
        lambda t: load_dataset("cuhk-pedes", t),
        mutate_text,
        text=str(folder / "CUHK-PEDES/reid_raw.json"),
    )


# pictures, films and what was generated


def picture_bytes(kind: str, **options) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 255, (40, 20, 3), dtype=np.uint8))
    if kind == "JPEG":
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x0132] = "2024:05:01 10:00:00"
        options["exif"] = exif
    im.save(out, kind, **options)
    return out.getvalue()


def picture(kind: str, **options):
    def make(folder):
        from tipr_nb.data import read_image
        from tipr_nb.search import decode_picture
        from tipr_nb.search.photos import picture_size

        def use(p):
            for read in (
                read_image,
                picture_size,
                lambda p: decode_picture(p.read_bytes(), shrink_to=(8, 16)),
            ):
                try:
                    read(p)
                except TiprError as e:
                    one_line(e)
                except OSError as e:  # how the loaders say that a picture cannot be read; they name the file and go on
                    if read is not read_image:
                        raise
                    one_line(e)

        return file(folder, f"a.{kind.lower()}", picture_bytes(kind, **options), mutate_bytes, use)

    make.__name__ = f"picture_{kind.lower()}"
    return surface(make)


for _kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
    picture(_kind)


@surface
def pictures_manifest(folder):
    from tipr_nb.generation import open_pictures

    return file(
        folder,
        "manifest.json",
        '{"settings": {"seed": 0, "size": [32, 64]}, "per_caption": 2}',
        mutate_json,
        lambda p: open_pictures(p.parent, {"seed": 0, "size": [32, 64]}),
    )


@surface
def generated_picture(folder):
    from tipr_nb.generation import Pictures

    path = Pictures(folder, 1).path("a man")
    path.parent.mkdir(parents=True)
    path.write_bytes(picture_bytes("PNG"))
    return written(
        path,
        mutate_bytes,
        lambda p: (Pictures(folder, 1).has("a man"), Pictures(folder, 1).open("a man")),
    )


@surface
def listed_pictures(folder):
    from tipr_nb.generation.pictures import _listed

    return file(
        folder, "captions.csv", "caption,picture\na man,pictures/a.png\n", mutate_table, _listed
    )


@surface
def portraits_table(folder):
    from tipr_nb.generation.portraits import Pairs, _read_pairs, _write_pairs

    settings = dict(seed=0, regions=True)
    _write_pairs(
        folder,
        Pairs(
            np.zeros((2, 8, 4, 3), np.uint8),
            ["a", "b"],
            np.array([0, 1]),
            [{}, {}],
            np.zeros((2, 8, 4), np.uint8),
        ),
        settings,
    )
    return written(folder / "pairs.json", mutate_json, lambda p: _read_pairs(folder, settings))


@surface
def film(folder):
    from tipr_nb.search.video import FilmReader, write_film

    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    write_film(
        folder / "f.mp4",
        [Image.fromarray(rng.integers(0, 255, (64, 48, 3), dtype=np.uint8)) for _ in range(12)],
    )

    def use(p):
        reader = FilmReader(p)
        try:
            return reader.seconds, reader.picture(0.2)
        finally:
            reader.close()

    return written(folder / "f.mp4", mutate_bytes, use)


@surface
def detections(folder):
    from tipr_nb.search.video import DetectionLog

    head = dict(film="x", every=1.0)
    good = "".join(
        json.dumps(r) + "\n"
        for r in (
            head,
            dict(t=0.0, people=[[1, 2, 3, 4, 0.5]]),
            dict(t=1.0, people=[]),
            dict(end=1),
        )
    )
    return file(folder, "f.jsonl", good, mutate_lines, lambda p: DetectionLog(p, head).people())


# the test


def one_line(e: Exception):
    text = str(e)
    assert text and "\n" not in text and len(text) < 5000, text[:300]


def try_cases(what: Surface, cases: range, name: str, state: Path):
    good = what.path.read_bytes() if what.path else what.text
    wrong = []
    for case in cases:
        rng = random.Random(f"{SEED}{name} {case}")
        given = what.mutate(good, rng)
        if what.path:
            what.path.write_bytes(given)
        try:
            with time_limit(SECONDS):
                what.use(what.path if what.path else given)
        except TiprError as e:
            one_line(e)
        except (Exception, BaseException) as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            wrong.append(f"case {case}: {type(e).__name__}: {str(e)[:200]}")
    assert not wrong, f"{len(wrong)} of {len(cases)}: " + " | ".join(wrong[:5])


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(range(QUICK), id="few"),
        pytest.param(range(QUICK, MANY), id="many", marks=pytest.mark.full),
    ],
)
def test_damaged_inputs_are_one_line(tmp_path, monkeypatch, name, cases):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "f"
    folder.mkdir()
    try_cases(SURFACES[name](folder), cases, name, tmp_path)
