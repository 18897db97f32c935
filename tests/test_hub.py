"""Cards are filled from what a run wrote; uploads are asked for and refused in one line; a split goes to Parquet and comes back as it was."""

import re

import numpy as np
import pytest

from tipr_nb.core import TiprError, write_json
from tipr_nb.data import DatasetError, PersonDataset, Split, load_dataset, toy_people
from tipr_nb.interop import (
    export_dataset,
    import_dataset,
    model_card,
    pack_run,
    push_to_hub,
    read_run,
    upload,
    write_split,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run's folder, without the minutes of training it."
    import torch
    from tipr_nb.models import PersonCLIP
    from tipr_nb.evaluation import rank_metrics, save_metrics
    from tipr_nb.training import RECIPES

    folder = tmp_path_factory.mktemp("runs") / "nano"
    torch.manual_seed(0)
    PersonCLIP("tipr-nano").save_pretrained(folder / "best")
    recipe = RECIPES["clip-tiny"].replace(name="nano", arch="tipr-nano", pretrained=None, epochs=2)
    recipe.save(folder / "recipe.json")
    write_json(
        folder / "run.json",
        dict(
            status="done",
            best=dict(step=20, epoch=2.0, r1=41.0, mAP=40.0),
            dataset="synth-pedes",
            data_hash="0123456789ab",
            train_seconds=90.0,
            notes=["val: 5 % held out"],
            environment=dict(tipr_nb="0.1.0"),
        ),
    )
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(10), 2)
    x = rng.normal(size=(20, 8)).astype(np.float32)
    save_metrics(
        rank_metrics(
            x, x + 0.5 * rng.normal(size=x.shape).astype(np.float32), ids, ids, n_boot=200
        ),
        folder / "test.json",
    )
    return folder


def test_card_says_recipe_data_metrics_and_limits(run):
    from huggingface_hub import ModelCard

    recipe, facts, metrics = read_run(run)
    text = model_card(run, repo="me/nano", notes=["drawn"])
    for words in (
        recipe.hash(),
        "`synth-pedes`",
        "0123456789ab",
        "tipr-nano",
        "96 x 32",
        "random weights",
        "- val: 5 % held out",
        "- drawn",
        "1.5 minutes",
        "epoch 2 of 2",
        "by R@1 on val",
        'from_pretrained("me/nano")',
        "## Limits",
    ):
        assert words in text, words
    m = metrics["test"]
    assert (
        f"{m.r1:.2f} [{m.intervals['r1'][0]:.2f}, {m.intervals['r1'][1]:.2f}]" in text
        and not re.search(r"\{[a-z_]+\}", text)
    )
    data = ModelCard(text).data
    assert (
        data.license == "apache-2.0"
        and [r.metric_value for r in data.eval_results][0] == round(m.r1, 2)
        and data.eval_results[0].dataset_type == "synth-pedes"
    )
    assert "Not evaluated yet" in model_card(run, metrics={})


def test_pack_and_load_again(run, tmp_path):
    from tipr_nb.models import PersonCLIP

    out = pack_run(run, tmp_path / "nano-packed")
    assert (
        sorted(p.name for p in out.iterdir())
        == ["README.md", "config.json", "model.safetensors", "recipe.json"]
        and "# nano-packed" in (out / "README.md").read_text()
    )
    assert PersonCLIP.from_pretrained(out).arch == "tipr-nano"


class Api:
    calls: list = []

    def create_repo(self, repo, **kwargs):
        self.calls.append(("create", repo, kwargs))

    def upload_folder(self, **kwargs):
        self.calls.append(
            (
                "upload",
                sorted(p.name for p in __import__("pathlib").Path(kwargs["folder_path"]).iterdir()),
                kwargs,
            )
        )
        return f"https://hub/{kwargs['repo_id']}"


def test_push_creates_a_private_repository_and_sends_all(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("tipr_nb.interop.hub.hub_answers", lambda timeout=3.0: True)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    Api.calls = []
    assert push_to_hub(run, "me/nano") == "https://hub/me/nano"
    (_, repo, made), (_, names, sent) = Api.calls
    assert (
        repo == "me/nano"
        and made == dict(repo_type="model", private=True, exist_ok=True)
        and names == ["README.md", "config.json", "model.safetensors", "recipe.json"]
        and sent["repo_type"] == "model"
    )

    def refuse(self, repo, **kwargs):
        raise RuntimeError("401 Unauthorized\nmore")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(TiprError, match="the hub refused.*401.*hf auth login") as e:
        push_to_hub(run, "me/nano")
    assert "\n" not in str(e.value)


def test_push_offline_and_other_mistakes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    packed = pack_run(run, tmp_path / "packed")
    for match, args in {
        "cannot be reached; the folder": (packed, "me/x"),
        "not a hub id": (packed, "x"),
        "no card": (tmp_path, "me/x"),
        "choose model or dataset": (packed, "me/x", "space"),
    }.items():
        with pytest.raises(TiprError, match=match):
            upload(*args)
    with pytest.raises(TiprError, match="no run.json"):
        model_card(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{}")
    with pytest.raises(TiprError, match="best/model.safetensors"):
        model_card(tmp_path / "half")


def same_split(a: Split, b: Split):
    assert (
        a.captions == b.captions
        and np.array_equal(a.image_ids, b.image_ids)
        and np.array_equal(a.caption_image, b.caption_image)
    )
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(a.images, b.images, strict=True))
    for mine, theirs in (
        (a.image_columns, b.image_columns),
        (a.caption_columns, b.caption_columns),
    ):
        for k, v in mine.items():
            if v.dtype.kind == "f":
                np.testing.assert_array_equal(v, theirs[k])
            elif v.dtype != object:
                assert v.tolist() == theirs[k].tolist(), k


def test_there_and_back(tmp_path):
    data = load_dataset("cuhk-pedes", toy_people(tmp_path / "toy", 12, 5, photos=3))
    n, m = len(data.test.images), len(data.test)
    data.test.image_columns |= {
        "camera": np.array([f"c{i % 3}" for i in range(n)]),
        "box": np.where(np.arange(n)[:, None] % 2, np.nan, np.arange(4.0)),
        "sure": np.arange(n) % 2 == 0,
    }
    data.test.caption_columns |= {
        "completeness": np.linspace(0, 1, m),
        "kind": np.array(["complete", "incomplete"] * (m // 2)),
        "gallery": np.arange(m),
    }
    export_dataset(data, tmp_path / "out", shard_rows=7, chunk=4)
    assert len(list((tmp_path / "out/data").glob("train-*"))) == -(-len(data.train.images) // 7)
    back = import_dataset(tmp_path / "out", tmp_path / "pictures")
    assert back.name == data.name and back.notes == data.notes
    for name, split in data.splits.items():
        same_split(split, back.splits[name])
    import_dataset(
        tmp_path / "out", tmp_path / "pictures"
    )  # pictures that are there are left alone
    with pytest.raises(TiprError, match="something in it"):
        export_dataset(data, tmp_path / "out")
    with pytest.raises(DatasetError, match="no split 'dev'"):
        export_dataset(data, tmp_path / "x", splits=["dev"])
    assert not (tmp_path / "x").exists()


def test_datasets_reads_what_we_write(tmp_path):
    import datasets

    data = load_dataset("cuhk-pedes", toy_people(tmp_path / "toy", 6, 4))
    export_dataset(data, tmp_path / "toy-people")
    theirs = datasets.load_dataset(str(tmp_path / "toy-people"), cache_dir=str(tmp_path / "cache"))
    assert {"train", "validation", "test"} >= set(theirs) and {"train", "test"} <= set(theirs)
    row = theirs["test"][0]
    assert (
        row["image"].size == (64, 192)
        and row["captions"] == data.test.captions[: len(row["captions"])]
        and row["identity"] == int(data.test.image_ids[0])
    )


def test_captions_in_any_order_and_images_without_one(tmp_path):
    from PIL import Image

    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, p in enumerate(paths):
        Image.new("RGB", (8, 16), (80 * i, 0, 0)).save(p)
    split = Split(
        "test",
        paths,
        np.array([5, 6, 7]),
        ["for two", "for zero", "two again"],
        np.array([7, 5, 7]),
        np.array([2, 0, 2]),
    )
    write_split(split, tmp_path / "out")
    back = import_dataset(tmp_path / "out", tmp_path / "pictures").test
    assert (
        back.captions == ["for zero", "for two", "two again"]
        and back.caption_image.tolist() == [0, 2, 2]
        and len(back.images) == 3
    )


def test_parquet_from_elsewhere(tmp_path, monkeypatch):
    import pyarrow as pa, pyarrow.parquet as pq

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def folder(name, rows):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "test.parquet")
        return tmp_path / name

    good = dict(
        image={"bytes": b"\x89PNG", "path": "../../etc/cron.d/x"}, identity=1, captions=["a"]
    )
    back = import_dataset(folder("path", [good]), tmp_path / "pictures")
    assert (
        back.test.images[0].parent == tmp_path / "pictures" / "test"
    )  # a path from elsewhere leads nowhere
    for match, source in {
        "no column 'captions'": folder(
            "lacking", [{k: v for k, v in good.items() if k != "captions"}]
        ),
        "no picture in it": folder("empty", [good | dict(image={"bytes": None, "path": "x"})]),
        "cannot be reached": "someone/their-people",
        "not a hub id": str(tmp_path / "none"),
        "no .parquet files": tmp_path / "pictures",
    }.items():
        with pytest.raises(DatasetError, match=match):
            import_dataset(source, tmp_path / "p2")
    data = (folder("cut", [good] * 50) / "test.parquet").read_bytes()
    (tmp_path / "cut" / "test.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match="not a complete Parquet"):
        import_dataset(tmp_path / "cut", tmp_path / "p3")


def test_missing_picture_leaves_nothing(tmp_path):
    data = load_dataset("cuhk-pedes", toy_people(tmp_path / "toy", 6, 4))
    data.test.images[3].unlink()
    with pytest.raises(DatasetError, match="restore the image"):
        export_dataset(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_extra(tmp_path, monkeypatch):
    import tipr_nb.interop.parquet

    def absent(module, extra, why):
        raise TiprError(f"{why} needs {module}; pip install 'tipr_nb[{extra}]'")

    monkeypatch.setattr(tipr_nb.interop.parquet, "need", absent)
    data = load_dataset("cuhk-pedes", toy_people(tmp_path / "toy", 6, 4))
    with pytest.raises(TiprError, match=r"tipr_nb\[hub\]"):
        export_dataset(data, tmp_path / "out")
