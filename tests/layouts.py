"""Small copies of the public datasets as they lie on disk, for tests: true file names, fields, folders and quirks, drawn people.

Each builder fills `root` with the dataset's folder, returns that folder, and takes the number of identities per split.
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw

# A training of seconds: the smallest tower, two epochs, the first of them warm-up.
NANO = dict(
    arch="tipr-nano",
    pretrained=None,
    precision="no",
    batch_size=16,
    epochs=2,
    warmup_epochs=1.0,
    lr=1e-3,
    log_every=2,
)

COLOURS = {
    "red": (200, 40, 40),
    "blue": (50, 70, 190),
    "green": (40, 140, 70),
    "black": (30, 30, 30),
    "white": (235, 235, 235),
    "yellow": (225, 195, 50),
    "purple": (130, 50, 150),
}


def draw(path: Path, i: int, photo: int, size=(40, 100)):
    "A person of two colours on a background that differs by photo, so that no two files are equal."
    names, (w, h) = list(COLOURS), size
    im = Image.new("RGB", size, (150 + 7 * photo % 60, 150, 160 - 5 * photo % 60))
    d = ImageDraw.Draw(im)
    d.rectangle((0.3 * w, 0.22 * h, 0.7 * w, 0.58 * h), COLOURS[names[i % 7]])
    d.rectangle((0.33 * w, 0.58 * h, 0.67 * w, 0.95 * h), COLOURS[names[(i // 7 + i + 1) % 7]])
    d.ellipse((0.38 * w, 0.05 * h, 0.62 * w, 0.22 * h), (222, 180, 150))
    d.point((photo % w, i % h), (i % 256, photo % 256, i // 256 % 256))
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, quality=95)


def sentences(i: int, n: int = 2) -> list[str]:
    names = list(COLOURS)
    upper, lower = names[i % 7], names[(i // 7 + i + 1) % 7]
    return [
        f"A man wearing a {upper} shirt and {lower} pants, holding a bag in his left hand. ",
        f"The pedestrian wears {lower} trousers with a {upper} top.",
        f"Person number {i} walks.",
    ][:n]


def tokens(captions: list[str]) -> list[list[str]]:
    return [c.lower().replace(",", "").replace(".", "").split() for c in captions]


def people(n_ids: dict, first: int):
    "Identity numbers and their split, in the order of the file."
    i = first
    for split, n in n_ids.items():
        for _ in range(n):
            yield split, i
            i += 1


def write(folder: Path, name: str, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    return folder


CUHK = (
    "cam_a/{:03d}_{}.bmp",
    "CUHK01/{:07d}{}.png",
    "CUHK03/{:04d}_{}.png",
    "Market/{:04d}_c3s1_{}.jpg",
    "test_query/p{}_s{}.jpg",
    "train_query/p{}_s{}.jpg",
)


def cuhk_pedes(root: Path, n_ids={"train": 8, "val": 3, "test": 4}, photos=2) -> Path:
    "CUHK-PEDES: reid_raw.json, six source folders under imgs/, ids from 1, captions with a trailing blank; the first image has 10 captions."
    folder, records = Path(root) / "CUHK-PEDES", []
    for split, i in people(n_ids, 1):
        for j in range(photos):
            path = CUHK[i % 6].format(i, j)
            draw(folder / "imgs" / path, i, j)
            captions = (
                sentences(i)
                if (i, j) != (1, 0)
                else [f"{s} Seen {k} times." for k in range(5) for s in sentences(i)]
            )
            records.append(
                dict(
                    split=split,
                    captions=captions,
                    file_path=path,
                    processed_tokens=tokens(captions),
                    id=i,
                )
            )
    return write(folder, "reid_raw.json", records)


def icfg_pedes(
    root: Path, n_ids={"train": 40, "test": 5}, photos=2, annotation="ICFG-PEDES.json"
) -> Path:
    "ICFG-PEDES: no val, one caption an image, ids from 0; imgs/train and imgs/test are MSMT17's folders and not the split."
    folder, records = Path(root) / "ICFG-PEDES", []
    for split, i in people(n_ids, 0):
        for j in range(photos):
            path = f"{('test', 'train')[i % 2]}/{i + 600:04d}/{i + 600:04d}_{j:03d}_05_0303afternoon_1591_{j}.jpg"
            draw(folder / "imgs" / path, i, j)
            records.append(
                dict(
                    split=split,
                    captions=sentences(i, 1),
                    file_path=path,
                    processed_tokens=tokens(sentences(i, 1)),
                    id=i,
                )
            )
    return write(folder, annotation, records)


def rstpreid(root: Path, n_ids={"train": 8, "val": 3, "test": 4}, photos=5) -> Path:
    "RSTPReid: data_captions.json with img_path, five photos of each, flat imgs/; a caption shared by two people, one with CJK characters and one with code."
    folder, records = Path(root) / "RSTPReid", []
    for split, i in people(n_ids, 0):
        for j in range(photos):
            path, captions = f"{i:04d}_c{j + 1}_{j + 17:04d}.jpg", sentences(i)
            draw(folder / "imgs" / path, i, j)
            if (i, j) in ((0, 0), (1, 0)):
                captions[1] = "The man walks along the street."
            if (i, j) == (2, 0):
                captions[1] = "The man wears a 黑色 jacket and jeans."
            if (i, j) == (2, 1):
                captions[1] = "<p>The man wears a jacket</p> {color: black}"
            records.append(dict(id=i, img_path=path, captions=captions, split=split))
    return write(folder, "data_captions.json", records)


def ufine6926(
    root: Path, n_ids={"train": 8, "test": 4}, photos=2, annotation="UFine6926.json"
) -> Path:
    "UFine6926: paths relative to the dataset's folder, ids from 1, captions of about 81 words."
    folder, records, n = Path(root) / "UFine6926", [], 0
    for split, i in people(n_ids, 1):
        for j in range(photos):
            n += 1
            draw(folder / f"images/{n}.jpg", i, j)
            captions = [
                " ".join(
                    [s.strip()]
                    + [
                        "He walks forward with a confident gait, past a shop window and a parked bicycle, on a busy street."
                    ]
                    * 4
                )
                for s in sentences(i)
            ]
            records.append(dict(split=split, id=i, file_path=f"images/{n}.jpg", captions=captions))
    return write(folder, annotation, records)


def own_photos(root: Path, n_ids: int = 8, photos=2, kind="csv", split=False, scenes=False) -> Path:
    "Somebody's folder: images beside a table of image, caption, id (one line per caption); with `scenes`, two people in one picture and boxes."
    folder, rows = Path(root) / "mine", []
    for i in range(n_ids):
        for j in range(photos):
            path, box = f"photos/{i:02d}-{j}.jpg", {}
            if scenes:
                path, left = f"photos/{i // 2:02d}-{j}.jpg", 60 * (i % 2)
                scene = folder / path
                draw(folder / "one.jpg", i, j)
                im = (
                    Image.open(scene)
                    if scene.exists()
                    else Image.new("RGB", (160, 110), (90, 90, 90))
                )
                im.paste(Image.open(folder / "one.jpg"), (left + 10, 5))
                scene.parent.mkdir(parents=True, exist_ok=True)
                im.save(scene, quality=95)
                box = dict(x=left + 10, y=5, w=40, h=100)
            else:
                draw(folder / path, i, j)
            for k, s in enumerate(sentences(i)):
                rows.append(
                    dict(image=path, caption=s.strip(), id=i)
                    | (dict(split="train" if i < n_ids - 3 else "test") if split else {})
                    | box
                    | dict(camera=f"c{j}", when=k)
                )
    (folder / "one.jpg").unlink(missing_ok=True)
    if kind == "csv":
        text = (
            "\n".join([",".join(rows[0])] + [",".join(f'"{v}"' for v in r.values()) for r in rows])
            + "\n"
        )
    else:
        text = "\n".join(json.dumps(r) for r in rows) + "\n"
    (folder / f"captions.{kind}").write_text(text, encoding="utf-8")
    return folder


LAYOUTS = {
    "cuhk-pedes": cuhk_pedes,
    "icfg-pedes": icfg_pedes,
    "rstpreid": rstpreid,
    "ufine6926": ufine6926,
}


def edit(path: Path, change) -> Path:
    "Apply `change` to the records of a JSON annotation in place."
    records = json.loads(Path(path).read_text())
    path.write_text(json.dumps(change(records) or records))
    return path
