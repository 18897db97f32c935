"""Finding and opening people's own photos: what a disk can throw at us."""

import io, json, os, struct, time, zlib
from pathlib import Path

import pytest
from PIL import Image

from gallery_pictures import figure
from tipr_nb.core import TiprError
from tipr_nb.core import need
from tipr_nb.search import (
    MAX_PIXELS,
    PhotoError,
    column_name,
    decode_picture,
    ColourModel,
    find_photos,
    Gallery,
    is_picture,
    looks_like_scene,
    open_ahead,
    open_photo,
    open_picture,
    read_table,
    scene_warning,
    tidy_table,
    walk_folder,
)


def png(picture) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def shelf(tmp_path):
    for c in ("c1", "c2"):
        (tmp_path / "p" / c).mkdir(parents=True)
        for i, coat in enumerate(("red", "blue", "green")):
            figure(coat, "black").save(tmp_path / "p" / c / f"{i}.png")
    return tmp_path / "p"


def test_folder_glob_list_and_single(shelf):
    names = [p.name for p in find_photos(shelf)]
    assert names == sorted(names) and len(names) == 6
    assert [p.path for p in find_photos(str(shelf / "*" / "1.png"))] == [
        str(shelf / "c1" / "1.png"),
        str(shelf / "c2" / "1.png"),
    ]
    assert len(find_photos(str(shelf / "**" / "*.png"))) == 6
    assert [p.name for p in find_photos([shelf / "c1" / "0.png", shelf / "c2" / "2.png"])] == [
        "c1/0.png",
        "c2/2.png",
    ]
    assert len(find_photos(shelf / "c1" / "0.png")) == 1
    assert len(find_photos([shelf, shelf / "c1"])) == 6  # each photo once


def test_relative_paths_become_absolute(shelf, monkeypatch):
    monkeypatch.chdir(shelf.parent)
    assert [p.path for p in find_photos("p/c1")] == [
        str(shelf / "c1" / f"{i}.png") for i in range(3)
    ]


def test_csv_of_photos_with_columns_and_boxes(shelf):
    (shelf / "list.csv").write_text(
        "image,camera,x0,y0,x1,y1\nc1/0.png,left,0,0,20,40\nc1/0.png,right,20,0,40,40\nc2/1.png,left,1,1,30,60\n"
    )
    photos = find_photos(shelf / "list.csv")
    assert [(p.name, len(p.boxes), p.rows) for p in photos] == [
        ("c1/0.png", 2, (0, 1)),
        ("c2/1.png", 1, (2,)),
    ]
    assert photos.listing.to_pydict() == {"camera": ["left", "right", "left"]}


@pytest.mark.parametrize(
    "content",
    [
        {"c1/0.png": [[0, 0, 20, 40]]},
        [{"path": "c1/0.png", "box": [0, 0, 20, 40]}],
        [{"file": "c1/0.png", "x0": 0, "y0": 0, "x1": 20, "y1": 40}],
        {
            "images": [{"id": 5, "file_name": "c1/0.png"}],
            "annotations": [{"image_id": 5, "bbox": [0, 0, 20, 40], "score": 0.9}],
        },
    ],
)
def test_boxes_in_json_and_coco(shelf, content):
    (shelf.parent / "boxes.json").write_text(json.dumps(content))
    photos = find_photos(shelf, boxes=shelf.parent / "boxes.json")
    assert [(p.name, p.boxes) for p in photos] == [("c1/0.png", ((0, 0, 20, 40),))]
    assert len(photos.problems) == 5 and "no box" in photos.problems[0][1]


@pytest.mark.parametrize(
    "text,why",
    [
        ("path,x0,y0,x1,y1\nc1/0.png,5,5,5,9\n", "row 1: box"),
        ("path,x0,y0,x1,y1\nc1/0.png,a,5,5,9\n", "row 1: a box is four numbers"),
        ("path,camera\nc1/0.png\n", "not a readable table"),
        ("camera,day\n1,2\n", "no column of file names"),
        ("path,camera\n", "has no rows"),
        ("", "not a readable table"),
    ],
)
def test_bad_tables_are_one_line(shelf, text, why):
    (shelf.parent / "bad.csv").write_text(text)
    with pytest.raises(TiprError, match=why) as e:
        find_photos(shelf, boxes=shelf.parent / "bad.csv")
    assert "bad.csv" in str(e.value) and "\n" not in str(e.value)


def test_bad_json_tables(shelf):
    for text, why in [
        ("[1, 2]", "expected"),
        ('{"c1/0.png": [[1, 2]]}', "four numbers"),
        ('{"c1/0.png": ', "not complete JSON"),
    ]:
        (shelf.parent / "bad.json").write_text(text)
        with pytest.raises(TiprError, match=why):
            find_photos(shelf, boxes=shelf.parent / "bad.json")


def test_metadata_and_pattern(shelf):
    (shelf / "facts.csv").write_text(
        "path,when,night\nc1/0.png,2024-05-01 10:00:00,true\nc2/2.png,2024-06-01 10:00:00,false\n"
    )
    photos = find_photos(
        shelf, metadata=shelf / "facts.csv", pattern=r"(?P<camera>c\d)/(?P<number>\d)"
    )
    rows = photos.metadata.to_pylist()
    assert (
        rows[0]["night"] is True
        and rows[0]["camera"] == "c1"
        and rows[0]["number"] == 0
        and rows[1]["night"] is None
        and rows[5]["when"].month == 6
    )
    for bad, why in [
        (dict(pattern="(c1"), "pattern"),
        (dict(pattern="c1"), "no named group"),
        (dict(metadata=shelf / "nothing.csv"), "no such file"),
    ]:
        with pytest.raises(TiprError, match=why):
            find_photos(shelf, **bad)
    (shelf / "other.csv").write_text("path,day\nelsewhere.png,3\n")
    with pytest.raises(TiprError, match="no row speaks of a photo"):
        find_photos(shelf, metadata=shelf / "other.csv")


def test_nothing_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for what, why in [
        (tmp_path, "no pictures there"),
        (tmp_path / "gone", "no such file or folder"),
        (str(tmp_path / "*.jpg"), "nothing matches"),
    ]:
        with pytest.raises(TiprError, match=why):
            find_photos(what)


def test_links_pipes_and_unreadable_names(shelf):
    (shelf / "loop").symlink_to(shelf)
    (shelf / "c1" / "up").symlink_to("..")
    (shelf / "self.png").symlink_to("self.png")
    (shelf / "dangling.png").symlink_to("nowhere.png")
    (shelf / "linked.png").symlink_to("c1/0.png")
    (shelf / "zero.jpg").write_bytes(b"")
    os.mkfifo(shelf / "pipe.jpg")
    odd = [
        os.fsdecode(b"caf\xe9.png"),
        "new\nline.png",
        " space .png",
        "q'uo\"te.png",
        "漢字.png",
        os.fsdecode(b"\xff\xfe.png"),
        "-rf.png",
        "a" * 200 + ".png",
    ]
    for name in odd:
        figure("red", "blue").save(shelf / "c2" / name)
    photos = find_photos(shelf)
    names = {p.name for p in photos}
    assert (
        {f"c2/{n}" for n in odd} <= names
        and "linked.png" in names
        and not any(n.startswith(("loop", "c1/up")) for n in names)
    )
    why = {os.path.basename(p): w for p, w in photos.problems}
    assert why == {
        "self.png": "a link that leads back to itself",
        "dangling.png": "not there (a link to nothing?)",
        "zero.jpg": "empty file (0 bytes)",
        "pipe.jpg": "not a regular file",
    }
    assert all(not o.problems for o in open_ahead(photos, (32, 16)))


def test_bombs_and_broken_pictures(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    header = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
        for t, d in [
            (b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
            (b"IDAT", b""),
        ]
    )
    good = png(figure("red", "blue"))
    cases = {
        "more than": bomb.getvalue(),
        "pixels": header,
        "not a picture": b"hello",
        "cannot be decoded": good[: len(good) // 2],
        "only 2 x 2": png(Image.new("RGB", (2, 2))),
    }
    for why, data in cases.items():
        start = time.monotonic()
        with pytest.raises(PhotoError, match=why):
            open_picture(data)
        assert time.monotonic() - start < 2
    assert open_picture(good).size == (48, 96)


def test_the_limit_of_a_pictures_size():
    "Ours, which is below the size that Pillow refuses by itself."
    small = png(figure("red", "blue"))  # 48 x 96
    assert decode_picture(small, max_pixels=48 * 96).picture.size == (48, 96)
    with pytest.raises(PhotoError, match="48 x 96 pixels, more than"):
        decode_picture(small, max_pixels=48 * 96 - 1)
    with pytest.raises(PhotoError, match="12000 x 9000 pixels, more than 100 million"):
        open_picture(png(Image.new("1", (12_000, 9_000))))


def test_modes_orientation_and_time():
    for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
        picture = (
            Image.new("L", (20, 40), 200).convert("I;16" if mode == "I;16" else mode)
            if mode != "I;16"
            else Image.new("I;16", (20, 40), 50_000)
        )
        out = io.BytesIO()
        picture.save(out, "TIFF")
        got = open_picture(out.getvalue())
        assert got.mode == "RGB" and got.size == (20, 40)
        if mode in ("L", "RGBA", "I;16", "CMYK"):
            assert abs(got.getpixel((5, 5))[0] - (50_000 / 256 if mode == "I;16" else 200)) < 8
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2024:05:01 10:20:30"
    Image.new("RGB", (400, 200), "red").save(out, "JPEG", exif=exif)
    picture, full, taken = decode_picture(out.getvalue(), shrink_to=(16, 32))
    assert (
        full == (200, 400)
        and picture.height > picture.width
        and taken.isoformat() == "2024-05-01T10:20:30"
    )
    torn = out.getvalue().replace(b"2024:05:01", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    assert decode_picture(torn)[2] is None


def test_shrinking_while_decoding_changes_little(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    smooth = Image.fromarray((rng.random((30, 15, 3)) * 255).astype("uint8")).resize(
        (1200, 2400), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "big.jpg", quality=95)
    small = open_photo(find_photos(tmp_path / "big.jpg").items[0], (96, 32)).people[0]
    plain = (
        Image.open(tmp_path / "big.jpg").convert("RGB").resize((32, 96), Image.Resampling.BILINEAR)
    )
    assert (small.width, small.height) == (1200, 2400) and np.abs(
        np.asarray(small.picture, float) - np.asarray(plain, float)
    ).mean() < 3


def test_boxes_are_clipped_and_bad_ones_listed(tmp_path):
    scene = Image.new("RGB", (300, 120), "grey")
    scene.paste(figure("red", "blue"), (10, 10))
    scene.save(tmp_path / "s.png")
    (tmp_path / "b.json").write_text(
        json.dumps(
            {
                "s.png": [
                    [10, 10, 58, 106],
                    [290, 100, 900, 900],
                    [400, 0, 500, 100],
                    [299, 0, 310, 100],
                ]
            }
        )
    )
    opened = open_photo(
        find_photos(tmp_path / "s.png", boxes=tmp_path / "b.json").items[0], (32, 16)
    )
    assert [p.box for p in opened.people] == [(10, 10, 58, 106), (290, 100, 300, 120)] and len(
        opened.problems
    ) == 2
    assert opened.people[0].picture.size == (16, 32)


def test_detectors(tmp_path):
    scene = Image.new("RGB", (200, 120))
    scene.save(tmp_path / "s.png")
    photo = find_photos(tmp_path).items[0]
    assert [
        p.box
        for p in open_photo(
            photo, (32, 16), detector=lambda p: [(1.2, 2, 40.4, 100, 0.9), [50, 2, 90, 100]]
        ).people
    ] == [(1, 2, 40, 100), (50, 2, 90, 100)]
    assert open_photo(photo, (32, 16), detector=lambda p: []).problems == ["no person found in it"]
    assert "detector failed" in open_photo(photo, (32, 16), detector=lambda p: 1 / 0).problems[0]
    assert "detector failed" in open_photo(photo, (32, 16), detector=lambda p: [("a",)]).problems[0]


def test_files_that_vanish_or_change(shelf):
    photos = find_photos(shelf)
    os.unlink(photos.items[0].path)
    figure("white", "white", (60, 100)).save(photos.items[1].path)
    opened = list(open_ahead(photos, (32, 16), workers=3, ahead=2))
    assert "not there" in opened[0].problems[0] and opened[1].photo.size == os.path.getsize(
        photos.items[1].path
    )
    assert [o.photo.name for o in opened] == [p.name for p in photos]


def test_scene_warning():
    assert not looks_like_scene(128, 256) and looks_like_scene(640, 480)
    assert (
        scene_warning(1, 20, "x") is None
        and scene_warning(0, 0, "x") is None
        and "give boxes" in scene_warning(5, 20, "x")
    )


def test_columns_and_types():
    import pyarrow as pa

    table = tidy_table(
        pa.table(
            {
                "Camera ID": ["a"],
                "class": [1],
                "2nd": [0.5],
                "camera_id": pa.array([None], pa.null()),
                "": [True],
                "list": [[1, 2]],
            }
        )
    )
    assert table.column_names == ["Camera_ID", "class_", "_2nd", "camera_id", "column", "list"]
    assert [str(t) for t in table.schema.types] == [
        "string",
        "int64",
        "double",
        "string",
        "bool",
        "string",
    ]
    assert (
        column_name("path", {"path"}) == "path_"
        and is_picture("A.JPG")
        and not is_picture("a.jpg.txt")
    )


def test_missing_library_names_the_extra():
    for extra in ("search", "milvus", "app"):
        with pytest.raises(TiprError, match=rf"pip install 'tipr_nb\[{extra}\]'"):
            need("no_such_module_here", extra, "this")


def boxed(photos):
    return {p.name: p.boxes for p in photos}


@pytest.fixture
def street(tmp_path):
    folder = tmp_path / "street"
    (folder / "img1").mkdir(parents=True)
    for i in (1, 2, 3):
        Image.new("RGB", (320, 160), "grey").save(folder / "img1" / f"{i:06d}.jpg")
    return folder


ONE = (100, 40, 140, 140)
SHAPES = {
    "corners.csv": "path,x0,y0,x1,y1,score\nimg1/000001.jpg,100,40,140,140,.9\n",
    "two_corners.csv": "path,x1,y1,x2,y2,score\nimg1/000001.jpg,100,40,140,140,.9\n",
    "sizes.csv": "file,x,y,w,h,conf\nimg1/000001.jpg,100,40,40,100,.9\n",
    "left_width.csv": "file,left,top,width,height,score\nimg1/000001.jpg,100,40,40,100,.9\n",
    "prefix.csv": "file,bbox_x,bbox_y,bbox_w,bbox_h,score\nimg1/000001.jpg,100,40,40,100,.9\n",
    "centre.csv": "file,cx,cy,w,h,score\nimg1/000001.jpg,120,90,40,100,.9\n",
    "fractions.csv": "file,x,y,w,h,score\nimg1/000001.jpg,.3125,.25,.125,.625,.9\n",
    "yolo.csv": "file,x_center,y_center,width,height,confidence\nimg1/000001.jpg,.375,.5625,.125,.625,.9\n",
    "bbox.csv": 'file,bbox,score\nimg1/000001.jpg,"[100, 40, 40, 100]",.9\n',
    "windows.csv": "file;x0;y0;x1;y1;score\nimg1\\000001.jpg;100;40;140;140;0,9\n",
    "labels.csv": "file,label,x0,y0,x1,y1,score\nimg1/000001.jpg,Person,100,40,140,140,.9\nimg1/000001.jpg,car,0,0,90,50,.9\n",
    "lines.jsonl": '{"file": "img1/000001.jpg", "bbox": [100, 40, 40, 100], "score": 0.9}\n\n',
    "lists.jsonl": '{"file": "img1/000001.jpg", "detections": [{"box": [100, 40, 140, 140], "label": "person", "score": 0.9}, {"box": [0, 0, 90, 50], "label": "dog", "score": 0.9}]}\n',
    "pipeline.json": json.dumps(
        [
            {
                "image": "img1/000001.jpg",
                "objects": [
                    {
                        "score": 0.9,
                        "label": "person",
                        "box": {"xmin": 100, "ymin": 40, "xmax": 140, "ymax": 140},
                    }
                ],
            }
        ]
    ),
    "torch.json": json.dumps(
        [
            {
                "file": "img1/000001.jpg",
                "boxes": [[100, 40, 140, 140], [0, 0, 90, 50]],
                "scores": [0.9, 0.8],
                "labels": ["person", "bus"],
            }
        ]
    ),
    "mega.json": json.dumps(
        {
            "images": [
                {
                    "file": "img1/000001.jpg",
                    "detections": [
                        {"category": "2", "conf": 0.9, "bbox": [0.3125, 0.25, 0.125, 0.625]},
                        {"category": "1", "conf": 0.9, "bbox": [0, 0, 0.5, 0.5]},
                    ],
                },
                {"file": "img1/000002.jpg", "failure": "broken", "detections": None},
            ],
            "detection_categories": {"1": "animal", "2": "person", "3": "vehicle"},
        }
    ),
    "coco.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "img1/000001.jpg"}],
            "categories": [{"id": 9, "name": "car"}, {"id": 4, "name": "person"}],
            "annotations": [
                {"image_id": 1, "category_id": 4, "bbox": [100, 40, 40, 100], "score": 0.9},
                {"image_id": 1, "category_id": 9, "bbox": [0, 0, 90, 50]},
                {"image_id": 1, "category_id": 4, "bbox": [0, 0, 300, 150], "iscrowd": 1},
                {"image_id": 7, "category_id": 4, "bbox": [0, 0, 30, 90]},
            ],
        }
    ),
    "det.txt": "1,-1,100,40,40,100,0.9,-1,-1,-1\n",
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_common_shape_of_boxes_is_read(street, name):
    (street / name).write_text(SHAPES[name])
    photos = (
        find_photos(street / "img1", boxes=street / name)
        if not name.endswith("csv")
        else find_photos(street, boxes=street / name)
    )
    assert list(boxed(photos).values()) == [(ONE,)]
    assert photos.listing["confidence"].to_pylist() == [0.9]
    assert len(photos.problems) == 2 and all("no box" in why for _, why in photos.problems)


@pytest.mark.parametrize(
    "text,why",
    [
        ("path,xmin,ymin,xmax\nimg1/000001.jpg,1,2,3\n", "look like a part of a box"),
        ("path,camera\nimg1/000001.jpg,c1\n", "no columns of boxes"),
        ('path,bbox\nimg1/000001.jpg,"[10, 10, 60, 100]"\n', "box_format"),
        ('path,bbox\nimg1/000001.jpg,"[10, 10, 60]"\n', "row 1: a box is four numbers"),
        ("path,label,x0,y0,x1,y1\nimg1/000001.jpg,car,1,1,30,90\n", "names no person"),
        ("path,x0,y0,x1,y1\nother.jpg,1,1,30,90\n", "no row speaks of a photo"),
        ("path,x0,y0,x1,y1\nimg1/000001.jpg,1,1,1e300,90\n", "row 1: a box is four numbers"),
        (f"path,x0,y0,x1,y1\nimg1/000001.jpg,1,1,{10**400},90\n", "row 1: a box is four numbers"),
        ("path,x0,y0,x1,y1\n,1,1,30,90\n", "row 1 has no file name"),
    ],
)
def test_boxes_that_cannot_be_understood_are_refused(street, text, why):
    (street / "b.csv").write_text(text)
    for kwargs in (dict(sources=street / "img1", boxes=street / "b.csv"),):
        with pytest.raises(TiprError, match=why) as e:
            find_photos(**kwargs)
        assert "b.csv" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


def test_no_table_with_boxes_ever_means_whole_pictures(street):
    for text in (
        "path,bbox_x1,bbox_y1,bbox_x2\nimg1/000001.jpg,1,2,3\n",
        "path,xmin,ymin\nimg1/000001.jpg,1,2\n",
    ):
        (street / "list.csv").write_text(text)
        with pytest.raises(TiprError, match="part of a box"):
            find_photos(street / "list.csv")
    (street / "list.csv").write_text(
        "path,x0,y0,x1,y1\nimg1/000001.jpg,1,1,30,90\nimg1/000002.jpg,,,,\n"
    )
    photos = find_photos(street / "list.csv")
    assert [p.name for p in photos] == ["000001.jpg"] and [
        os.path.basename(p) for p, _ in photos.problems
    ] == ["000002.jpg"]


def test_bbox_is_decided_by_all_values_pictures_or_word(street):
    rows = "".join(f'img1/000001.jpg,"[{x}, 10, {x + 30}, 100]"\n' for x in range(8))
    (street / "b.csv").write_text("path,bbox\n" + rows)
    photos = find_photos(street, boxes=street / "b.csv")
    assert photos.items[0].boxes[7] == (7, 10, 37, 100) and "read as corners" in " ".join(
        photos.notes
    )
    (street / "b.csv").write_text('path,bbox\nimg1/000001.jpg,"[10, 10, 60, 155]"\n')
    assert find_photos(street, boxes=street / "b.csv").items[0].boxes == (
        (10, 10, 60, 155),
    )  # as a height it would leave the picture
    (street / "b.csv").write_text('path,bbox\nimg1/000001.jpg,"[10, 10, 60, 100]"\n')
    assert find_photos(street, boxes=street / "b.csv", box_format="xywh").items[0].boxes == (
        (10, 10, 70, 110),
    )
    with pytest.raises(TiprError, match="box_format"):
        find_photos(street, boxes=street / "b.csv", box_format="polar")


def test_mot_ground_truth_and_sequences(street):
    (street / "gt").mkdir()
    (street / "gt" / "gt.txt").write_text(
        "1,7,100,40,40,100,1,1,0.8\n1,8,0,0,40,100,0,1,0.5\n2,7,104,40,40,100,1,1,0.8\n2,9,0,0,50,50,1,3,1\n3,8,0,0,40,100,1,7,1\n9,7,0,0,40,100,1,1,1\n"
    )
    photos = find_photos(street, boxes=street / "gt" / "gt.txt")
    assert boxed(photos) == {
        "img1/000001.jpg": (ONE,),
        "img1/000002.jpg": ((104, 40, 144, 140),),
        "img1/000003.jpg": ((0, 0, 40, 100),),
    }
    assert (
        photos.listing["track"].to_pylist() == [7, 7, 8, 7]
        and "2 rows of a MOT ground truth" in photos.notes[0]
        and "1 of 4 rows" in photos.notes[1]
    )
    (street / "img2").mkdir()
    Image.new("RGB", (320, 160)).save(street / "img2" / "000001.jpg")
    with pytest.raises(TiprError, match="frame 1 may be"):
        find_photos(street, boxes=street / "gt" / "gt.txt")


def test_what_is_left_out_is_counted(street):
    (street / "coco.json").write_text(SHAPES["coco.json"])
    notes = " ".join(find_photos(street, boxes=street / "coco.json").notes)
    for words in (
        "of car left out",
        "of crowds left out",
        "of pictures that the file does not name",
    ):
        assert words in notes
    (street / "b.csv").write_text(
        "path,x0,y0,x1,y1\nimg1/000001.jpg,1,1,30,90\ngone.jpg,1,1,30,90\nimg1/000001.jpg,1,1,30,90\n"
    )
    photos = find_photos(street, boxes=street / "b.csv")
    assert "1 of 3 rows" in photos.notes[0] and photos.items[0].boxes == (
        (1, 1, 30, 90),
    )  # said twice, meant once
    (street / "no.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "img1/000001.jpg"}],
                "categories": [{"id": 1, "name": "car"}],
                "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
            }
        )
    )
    with pytest.raises(TiprError, match="no category is called person"):
        find_photos(street, boxes=street / "no.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_facts_lose_nothing(shelf, encoding, separator):
    rows = [
        ["path", "camera", "note", "taken", "score"],
        ["c1/0.png", "007", "back\\slash \\n", "2024-05-01 10:00", "1"],
        ["c1/1.png", "012", "Café", "2024-05-02", "2"],
    ]
    (shelf / "facts.csv").write_text(
        "\n".join(separator.join(r) for r in rows) + "\n", encoding=encoding
    )
    facts = find_photos(shelf, metadata=shelf / "facts.csv").metadata
    assert facts.to_pydict()["camera"] == ["007", "012"] and facts["note"].to_pylist() == [
        "back\\slash \\n",
        "Café",
    ]
    assert str(facts["taken"].type) == "timestamp[us]" and str(facts["score"].type) == "int64"


def test_text_in_a_code_page_is_one_line(shelf):
    for name, kind in (
        ("facts.csv", "metadata"),
        ("b.csv", "boxes"),
        ("b.jsonl", "boxes"),
        ("b.txt", "boxes"),
    ):
        (shelf / name).write_bytes("path,place\nc1/0.png,Café\n".encode("cp1252"))
        with pytest.raises(TiprError, match="not UTF-8 text at byte .*save it as UTF-8") as e:
            find_photos(shelf, **{kind: shelf / name})
        assert name in str(e.value)


def test_a_photo_on_two_rows(shelf):
    (shelf / "facts.csv").write_text("path,place\nc1/0.png,gate\nc1/0.png,gate\n")
    assert find_photos(shelf, metadata=shelf / "facts.csv").metadata.num_rows == 2
    (shelf / "facts.csv").write_text("path,place\nc1/0.png,gate\nc1/1.png,\nc1/0.png,yard\n")
    with pytest.raises(
        TiprError, match="rows 1 and 3 speak twice of the photo c1/0.png and differ in place"
    ):
        find_photos(shelf, metadata=shelf / "facts.csv")
    with pytest.raises(TiprError, match="differ in place"):
        find_photos(shelf / "facts.csv")


def test_numbers_and_dates_too_large(shelf):
    import pyarrow as pa

    (shelf / "facts.csv").write_text(
        f"path,n,big,when\nc1/0.png,{2**63},{10**30},9999-12-31\nc1/1.png,1,2,0001-01-01\n"
    )
    facts = find_photos(shelf, metadata=shelf / "facts.csv").metadata
    assert facts["n"].to_pylist()[0] == str(2**63) and str(facts["when"].type) == "timestamp[us]"
    assert tidy_table(pa.table({"n": pa.array([2**63], pa.uint64())}))["n"].to_pylist() == [
        str(2**63)
    ]
    for unit in ("s", "ms"):
        with pytest.raises(TiprError, match="times beyond the years"):
            tidy_table(pa.table({"t": pa.array([2**60], pa.timestamp(unit))}))
    (shelf / "deep.json").write_text("[" * 100_000)
    with pytest.raises(TiprError):
        find_photos(shelf, metadata=shelf / "deep.json")
    name = "x" * 300 + ".png"
    (shelf / "long.csv").write_text(f"path,n\n{name},1\nc1/0.png,2\n")
    assert (
        "longer than the file system allows"
        in dict(find_photos(shelf / "long.csv").problems)[str(shelf / name)]
    )
    with pytest.raises(TiprError, match="no such file"):
        find_photos(name)


def test_frames_of_pandas_and_arrow(shelf):
    import pandas as pd, pyarrow as pa

    boxes = pd.DataFrame(
        {"path": ["c1/0.png"], "x": [0], "y": [0], "w": [20], "h": [40], "score": [0.5]}
    )
    facts = pa.table({"path": ["c1/0.png"], "place": ["gate"]})
    photos = find_photos(
        shelf,
        boxes=boxes.assign(path=[str(shelf / "c1" / "0.png")]),
        metadata=facts.set_column(0, "path", pa.array([str(shelf / "c1" / "0.png")])),
    )
    assert boxed(photos) == {"c1/0.png": ((0, 0, 20, 40),)} and photos.metadata[
        "place"
    ].to_pylist() == ["gate"]
    assert len(find_photos(boxes.assign(path=[str(shelf / "c1" / "0.png")]))) == 1
    with pytest.raises(TiprError, match="give a folder"):
        find_photos(5)


def test_hidden_files_and_thumbnails_are_left_out(shelf):
    for name in (
        "@eaDir/0.png",
        ".thumbnails/0.png",
        "c1/._0.png",
        "__MACOSX/c1/0.png",
        "c1/.hidden.png",
    ):
        (shelf / name).parent.mkdir(exist_ok=True, parents=True)
        figure("red", "blue").save(shelf / name)
    photos = find_photos(shelf)
    assert len(photos) == 6 and any("5 hidden or excluded" in n for n in photos.notes)
    assert len(find_photos(str(shelf / "**" / "*.png"))) == 6
    assert (
        len(find_photos(shelf, exclude=())) == 11
        and len(find_photos(shelf, exclude=("c2", ".*", "@*", "__*"))) == 3
    )
    assert len(find_photos(shelf / "c1" / "._0.png")) == 1  # named by itself


def test_formats_beyond_jpeg_are_read_or_counted(shelf):
    from PIL import features

    (shelf / "raw.cr2").write_bytes(b"x")
    for name in ("a.jfif", "b.jp2", "c.avif"):
        kind = {"jfif": "JPEG", "jp2": "JPEG2000", "avif": "AVIF"}[name[2:]]
        if kind != "AVIF" or features.check("avif"):
            figure("red", "blue").save(shelf / name, kind)
    (shelf / "p.heic").write_bytes(b"x")
    photos = find_photos(shelf)
    assert {"a.jfif", "b.jp2"} <= {p.name for p in photos} and any(
        "1 .cr2" in n for n in photos.notes
    )
    assert all(o.people for o in open_ahead(photos, (32, 16)) if o.photo.name != "p.heic")
    assert any(p.name == "p.heic" for p in photos) or any(
        "1 HEIC pictures are left out" in n for n in photos.notes
    )


def test_heic_is_read_where_the_plug_in_is(shelf):
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    heif.from_pillow(figure("red", "blue").resize((96, 192))).save(shelf / "phone.heic")
    opened = open_photo(find_photos(shelf / "phone.heic").items[0], (32, 16))
    assert opened.people and opened.people[0].width == 96


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_a_picture_is_the_same_in_training_and_in_the_gallery(tmp_path, mode):
    import numpy as np
    from tipr_nb.data import read_image

    grey = np.linspace(0, 255, 800).reshape(40, 20)
    picture = (
        Image.fromarray((grey * 257).astype(np.uint16))
        if mode == "I;16"
        else Image.fromarray(grey.astype(np.uint8)).convert(mode)
    )
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray((grey.T.reshape(40, 20)).astype(np.uint8)))
    picture.save(tmp_path / "p.tif")
    gap = np.abs(
        np.asarray(read_image(tmp_path / "p.tif"), int)
        - np.asarray(open_picture((tmp_path / "p.tif").read_bytes()), int)
    )
    assert gap.max() == 0  # one reader


def test_pictures_are_read_without_torch():
    import subprocess, sys

    code = "import sys; from tipr_nb.search import open_picture; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


KINDS = {  # what a folder of somebody's may hold: Pillow's kinds, with the endings that people use
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("mpo",),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "PPM": ("ppm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpx"),
    "AVIF": ("avif",),
    "TGA": ("tga",),
    "ICO": ("ico",),
    "ICNS": ("icns",),
    "PCX": ("pcx",),
    "SGI": ("sgi",),
    "DDS": ("dds",),
    "EPS": ("eps",),
    "QOI": ("qoi",),
}
SEVERAL = {"pages.tif": "TIFF", "moving.gif": "GIF", "moving.webp": "WEBP", "two.mpo": "MPO"}


def one_of_each(folder):
    "A picture of every kind that Pillow writes here, some with several pages, and some that are broken."
    from PIL import features

    person = figure("red", "blue", (64, 128))
    for kind, endings in KINDS.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        for ending in endings:
            person.save(folder / f"a.{ending}", kind)
    for name, kind in SEVERAL.items():
        other = figure("green", "white", (64, 128))
        person.save(folder / name, kind, save_all=True, append_images=[other])
    whole = (folder / "a.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "wrong.png").write_bytes(b"this is text")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "tga.jpg").write_bytes((folder / "a.tga").read_bytes())
    (folder / "notes.txt").write_text("no picture")


def test_every_picture_is_indexed_or_counted_with_its_reason(tmp_path):
    from tipr_nb.search.photos import SUFFIXES, UNREAD_SUFFIXES

    (tmp_path / "p").mkdir()
    one_of_each(tmp_path / "p")
    gallery = Gallery.build(tmp_path / "p", ColourModel(), tmp_path / "g", dtype="float32")
    names = {h.path.name for h in gallery.hits(range(len(gallery)))}
    reasons = {Path(path).name: why for path, why in gallery.skipped}
    notes = " ".join([*gallery.report.notes, *gallery.report.warnings])
    for path in sorted((tmp_path / "p").iterdir()):
        if path.name == "notes.txt":
            continue
        seen = (path.name in names, path.name in reasons, path.suffix in UNREAD_SUFFIXES)
        assert sum(seen) == 1, (path.name, seen)
        assert not seen[2] or f"1 {path.suffix}" in notes, path.name
        assert seen[2] or path.suffix in SUFFIXES
    assert reasons.keys() == {"cut.jpg", "wrong.png", "empty.webp", "tga.jpg"}
    assert all(reasons.values()) and "0 bytes" in reasons["empty.webp"]
    first = gallery.search("a red coat and blue trousers", k=len(gallery), unique=False)
    assert (
        min(h.score for h in first) > 0.99
    )  # the first page or frame of each, and its true colours


def test_every_ending_that_pillow_knows_is_read_or_counted():
    from tipr_nb.search.photos import FILM_SUFFIXES, SUFFIXES, UNREAD_SUFFIXES

    Image.init()
    no_pictures = {".pdf", ".h5", ".hdf", ".grib", ".bufr", ".mpeg", ".mpg", ".palm", ".vst"}
    known = SUFFIXES | UNREAD_SUFFIXES | FILM_SUFFIXES | no_pictures
    assert not set(Image.EXTENSION) - known
    assert not SUFFIXES & UNREAD_SUFFIXES and not FILM_SUFFIXES & (SUFFIXES | UNREAD_SUFFIXES)


def test_postscript_by_any_name_starts_nothing(shelf, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", None)
    (shelf / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n"
    )
    assert open_photo(find_photos(shelf / "x.jpg").items[0], (32, 16)).problems == [
        "not a picture, or of an unknown kind"
    ]


def test_find_detector():
    from tipr_nb.search import find_detector

    own = find_detector("test_photos:middle", score=0.5, min_height=10)
    photo = Image.new("RGB", (200, 120))
    assert own.name == "test_photos:middle score=0.5 min_height=10" and json.dumps(own.settings)
    from tipr_nb.search.detectors import detected_people

    assert [p.box for p in detected_people(own, photo)] == [(10, 10, 30, 60), (50, 10, 80, 100)]
    for name, kwargs, why in [
        ("no.such:thing", {}, "not found"),
        ("json:__name__", {}, "not a function"),
        ("test_photos:middle", dict(score="x"), "score=x"),
        ("test_photos:middle", dict(score=10**400), "score="),
        ("/no/such/folder", {}, "no detector could be loaded"),
    ]:
        with pytest.raises(TiprError, match=why) as e:
            find_detector(name, **kwargs)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500


def middle(picture):
    return [
        (50, 10, 80, 100, 0.9),
        (10, 10, 30, 60, 0.6),
        (90, 10, 99, 100, 0.2),
        (100, 10, 190, 15, 0.9),
    ]


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory):
    from tipr_nb.core import ensure_torchvision

    ensure_torchvision()
    import torch
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
    )

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=16,
        d_model=16,
        num_queries=12,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        decoder_layers=1,
        num_denoising=0,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16],
        id2label={0: "person", 1: "car"},
        label2id={"person": 0, "car": 1},
    )
    model = RTDetrForObjectDetection(config)
    for head in model.model.decoder.class_embed:
        head.bias.data[:] = torch.tensor([0.0, -1.0])
    folder = tmp_path_factory.mktemp("rtdetr")
    model.save_pretrained(folder)
    RTDetrImageProcessor(size=dict(height=64, width=64)).save_pretrained(folder)
    return folder


def test_a_detector_of_transformers_by_folder(tiny_detector, shelf):
    from tipr_nb.search import find_detector
    from tipr_nb.search.detectors import detected_people

    detector = find_detector(str(tiny_detector), score=0.0, min_height=0)
    people = detected_people(detector, Image.new("RGB", (320, 160), "grey"))
    assert (
        people
        and all(0 < p.confidence < 1 for p in people)
        and max(p.box[2] for p in people) > 64
        and people == sorted(people)
    )
    assert (
        len(
            detected_people(
                find_detector(str(tiny_detector), score=0.0, min_height=10**5),
                Image.new("RGB", (320, 160)),
            )
        )
        == 0
    )
    Image.new("RGB", (640, 320), "grey").save(shelf / "a_scene.png")
    opened = open_photo(find_photos(shelf / "a_scene.png").items[0], (32, 16), detector=detector)
    assert opened.people and opened.people[0].confidence
    with pytest.raises(TiprError, match="knows no label 'pedestrian'"):
        find_detector(str(tiny_detector), label="pedestrian")


def test_hog_finds_its_people():
    pytest.importorskip("cv2", reason="needs the extra `detect`")
    from tipr_nb.search import find_detector
    from tipr_nb.search.detectors import detected_people

    hog = find_detector("hog")
    assert (
        detected_people(hog, Image.new("RGB", (320, 240), "grey")) == []
        and hog.settings["name"] == "hog"
    )
