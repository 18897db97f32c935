"""Finding and opening people's own photos: what a disk can throw at us."""
import io, json, os, struct, time, zlib
from pathlib import Path

import pytest
from PIL import Image

from gallery_pictures import figure
from tipr_nb.core import TiprError
from tipr_nb.core import need
from tipr_nb.search import (MAX_PIXELS, PhotoError, column_name, decode_picture, find_photos, is_picture, looks_like_scene, open_ahead,
    open_photo, open_picture, read_table, scene_warning, tidy_table, walk_folder)


def png(picture) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def shelf(tmp_path):
    for c in ("c1", "c2"):
        (tmp_path/"p"/c).mkdir(parents=True)
        for i, coat in enumerate(("red", "blue", "green")): figure(coat, "black").save(tmp_path/"p"/c/f"{i}.png")
    return tmp_path/"p"


def test_folder_glob_list_and_single(shelf):
    names = [p.name for p in find_photos(shelf)]
    assert names == sorted(names) and len(names) == 6
    assert [p.path for p in find_photos(str(shelf/"*"/"1.png"))] == [str(shelf/"c1"/"1.png"), str(shelf/"c2"/"1.png")]
    assert len(find_photos(str(shelf/"**"/"*.png"))) == 6
    assert [p.name for p in find_photos([shelf/"c1"/"0.png", shelf/"c2"/"2.png"])] == ["c1/0.png", "c2/2.png"]
    assert len(find_photos(shelf/"c1"/"0.png")) == 1
    assert len(find_photos([shelf, shelf/"c1"])) == 6      # each photo once


def test_relative_paths_become_absolute(shelf, monkeypatch):
    monkeypatch.chdir(shelf.parent)
    assert [p.path for p in find_photos("p/c1")] == [str(shelf/"c1"/f"{i}.png") for i in range(3)]


def test_csv_of_photos_with_columns_and_boxes(shelf):
    (shelf/"list.csv").write_text("image,camera,x0,y0,x1,y1\nc1/0.png,left,0,0,20,40\nc1/0.png,right,20,0,40,40\nc2/1.png,left,1,1,30,60\n")
    photos = find_photos(shelf/"list.csv")
    assert [(p.name, len(p.boxes), p.rows) for p in photos] == [("c1/0.png", 2, (0, 1)), ("c2/1.png", 1, (2,))]
    assert photos.listing.to_pydict() == {"camera": ["left", "right", "left"]}


@pytest.mark.parametrize("content", [{"c1/0.png": [[0, 0, 20, 40]]}, [{"path": "c1/0.png", "box": [0, 0, 20, 40]}], [{"file": "c1/0.png", "x0": 0, "y0": 0, "x1": 20, "y1": 40}],
                                     {"images": [{"id": 5, "file_name": "c1/0.png"}], "annotations": [{"image_id": 5, "bbox": [0, 0, 20, 40], "score": .9}]}])
def test_boxes_in_json_and_coco(shelf, content):
    (shelf.parent/"boxes.json").write_text(json.dumps(content))
    photos = find_photos(shelf, boxes=shelf.parent/"boxes.json")
    assert [(p.name, p.boxes) for p in photos] == [("c1/0.png", ((0, 0, 20, 40),))]
    assert len(photos.problems) == 5 and "no box" in photos.problems[0][1]


@pytest.mark.parametrize("text,why", [("path,x0,y0,x1,y1\nc1/0.png,5,5,5,9\n", "row 1: box"), ("path,x0,y0,x1,y1\nc1/0.png,a,5,5,9\n", "row 1: a box is four numbers"),
                                      ("path,camera\nc1/0.png\n", "not a readable table"), ("camera,day\n1,2\n", "no column of file names"), ("path,camera\n", "has no rows"), ("", "not a readable table")])
def test_bad_tables_are_one_line(shelf, text, why):
    (shelf.parent/"bad.csv").write_text(text)
    with pytest.raises(TiprError, match=why) as e: find_photos(shelf, boxes=shelf.parent/"bad.csv")
    assert "bad.csv" in str(e.value) and "\n" not in str(e.value)


def test_bad_json_tables(shelf):
    for text, why in [("[1, 2]", "expected"), ('{"c1/0.png": [[1, 2]]}', "four numbers"), ('{"c1/0.png": ', "not complete JSON")]:
        (shelf.parent/"bad.json").write_text(text)
        with pytest.raises(TiprError, match=why): find_photos(shelf, boxes=shelf.parent/"bad.json")


def test_metadata_and_pattern(shelf):
    (shelf/"facts.csv").write_text("path,when,night\nc1/0.png,2024-05-01 10:00:00,true\nc2/2.png,2024-06-01 10:00:00,false\n")
    photos = find_photos(shelf, metadata=shelf/"facts.csv", pattern=r"(?P<camera>c\d)/(?P<number>\d)")
    rows = photos.metadata.to_pylist()
    assert rows[0]["night"] is True and rows[0]["camera"] == "c1" and rows[0]["number"] == 0 and rows[1]["night"] is None and rows[5]["when"].month == 6
    for bad, why in [(dict(pattern="(c1"), "pattern"), (dict(pattern="c1"), "no named group"), (dict(metadata=shelf/"nothing.csv"), "no such file")]:
        with pytest.raises(TiprError, match=why): find_photos(shelf, **bad)
    (shelf/"other.csv").write_text("path,day\nelsewhere.png,3\n")
    with pytest.raises(TiprError, match="no row speaks of a photo"): find_photos(shelf, metadata=shelf/"other.csv")


def test_nothing_there(tmp_path):
    (tmp_path/"notes.txt").write_text("x")
    for what, why in [(tmp_path, "no pictures there"), (tmp_path/"gone", "no such file or folder"), (str(tmp_path/"*.jpg"), "nothing matches")]:
        with pytest.raises(TiprError, match=why): find_photos(what)


def test_links_pipes_and_unreadable_names(shelf):
    (shelf/"loop").symlink_to(shelf)
    (shelf/"c1"/"up").symlink_to("..")
    (shelf/"self.png").symlink_to("self.png")
    (shelf/"dangling.png").symlink_to("nowhere.png")
    (shelf/"linked.png").symlink_to("c1/0.png")
    (shelf/"zero.jpg").write_bytes(b"")
    os.mkfifo(shelf/"pipe.jpg")
    odd = [os.fsdecode(b"caf\xe9.png"), "new\nline.png", " space .png", "q'uo\"te.png", "漢字.png", os.fsdecode(b"\xff\xfe.png"), "-rf.png", "a" * 200 + ".png"]
    for name in odd: figure("red", "blue").save(shelf/"c2"/name)
    photos = find_photos(shelf)
    names = {p.name for p in photos}
    assert {f"c2/{n}" for n in odd} <= names and "linked.png" in names and not any(n.startswith(("loop", "c1/up")) for n in names)
    why = {os.path.basename(p): w for p, w in photos.problems}
    assert why == {"self.png": "a link that leads back to itself", "dangling.png": "not there (a link to nothing?)", "zero.jpg": "empty file (0 bytes)", "pipe.jpg": "not a regular file"}
    assert all(not o.problems for o in open_ahead(photos, (32, 16)))


def test_bombs_and_broken_pictures(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    header = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in [(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)), (b"IDAT", b"")])
    good = png(figure("red", "blue"))
    cases = {"more than": bomb.getvalue(), "pixels": header, "not a picture": b"hello", "cannot be decoded": good[:len(good)//2], "only 2 x 2": png(Image.new("RGB", (2, 2)))}
    for why, data in cases.items():
        start = time.monotonic()
        with pytest.raises(PhotoError, match=why): open_picture(data)
        assert time.monotonic() - start < 2
    assert open_picture(good).size == (48, 96)


def test_modes_orientation_and_time():
    for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
        picture = Image.new("L", (20, 40), 200).convert("I;16" if mode == "I;16" else mode) if mode != "I;16" else Image.new("I;16", (20, 40), 50_000)
        out = io.BytesIO()
        picture.save(out, "TIFF")
        got = open_picture(out.getvalue())
        assert got.mode == "RGB" and got.size == (20, 40)
        if mode in ("L", "RGBA", "I;16", "CMYK"): assert abs(got.getpixel((5, 5))[0] - (50_000/256 if mode == "I;16" else 200)) < 8
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2024:05:01 10:20:30"
    Image.new("RGB", (400, 200), "red").save(out, "JPEG", exif=exif)
    picture, full, taken = decode_picture(out.getvalue(), shrink_to=(16, 32))
    assert full == (200, 400) and picture.height > picture.width and taken.isoformat() == "2024-05-01T10:20:30"
    torn = out.getvalue().replace(b"2024:05:01", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    assert decode_picture(torn)[2] is None


def test_shrinking_while_decoding_changes_little(tmp_path):
    import numpy as np
    rng = np.random.default_rng(0)
    smooth = Image.fromarray((rng.random((30, 15, 3))*255).astype("uint8")).resize((1200, 2400), Image.Resampling.BICUBIC)
    smooth.save(tmp_path/"big.jpg", quality=95)
    small = open_photo(find_photos(tmp_path/"big.jpg").items[0], (96, 32)).people[0]
    plain = Image.open(tmp_path/"big.jpg").convert("RGB").resize((32, 96), Image.Resampling.BILINEAR)
    assert (small.width, small.height) == (1200, 2400) and np.abs(np.asarray(small.picture, float) - np.asarray(plain, float)).mean() < 3


def test_boxes_are_clipped_and_bad_ones_listed(tmp_path):
    scene = Image.new("RGB", (300, 120), "grey")
    scene.paste(figure("red", "blue"), (10, 10))
    scene.save(tmp_path/"s.png")
    (tmp_path/"b.json").write_text(json.dumps({"s.png": [[10, 10, 58, 106], [290, 100, 900, 900], [400, 0, 500, 100], [299, 0, 310, 100]]}))
    opened = open_photo(find_photos(tmp_path/"s.png", boxes=tmp_path/"b.json").items[0], (32, 16))
    assert [p.box for p in opened.people] == [(10, 10, 58, 106), (290, 100, 300, 120)] and len(opened.problems) == 2
    assert opened.people[0].picture.size == (16, 32)


def test_detectors(tmp_path):
    scene = Image.new("RGB", (200, 120))
    scene.save(tmp_path/"s.png")
    photo = find_photos(tmp_path).items[0]
    assert [p.box for p in open_photo(photo, (32, 16), detector=lambda p: [(1.2, 2, 40.4, 100, .9), [50, 2, 90, 100]]).people] == [(1, 2, 40, 100), (50, 2, 90, 100)]
    assert open_photo(photo, (32, 16), detector=lambda p: []).problems == ["no person found in it"]
    assert "detector failed" in open_photo(photo, (32, 16), detector=lambda p: 1/0).problems[0]
    assert "detector failed" in open_photo(photo, (32, 16), detector=lambda p: [("a",)]).problems[0]


def test_files_that_vanish_or_change(shelf):
    photos = find_photos(shelf)
    os.unlink(photos.items[0].path)
    figure("white", "white", (60, 100)).save(photos.items[1].path)
    opened = list(open_ahead(photos, (32, 16), workers=3, ahead=2))
    assert "not there" in opened[0].problems[0] and opened[1].photo.size == os.path.getsize(photos.items[1].path)
    assert [o.photo.name for o in opened] == [p.name for p in photos]


def test_scene_warning():
    assert not looks_like_scene(128, 256) and looks_like_scene(640, 480)
    assert scene_warning(1, 20, "x") is None and scene_warning(0, 0, "x") is None and "give boxes" in scene_warning(5, 20, "x")


def test_columns_and_types():
    import pyarrow as pa
    table = tidy_table(pa.table({"Camera ID": ["a"], "class": [1], "2nd": [.5], "camera_id": pa.array([None], pa.null()), "": [True], "list": [[1, 2]]}))
    assert table.column_names == ["Camera_ID", "class_", "_2nd", "camera_id", "column", "list"]
    assert [str(t) for t in table.schema.types] == ["string", "int64", "double", "string", "bool", "string"]
    assert column_name("path", {"path"}) == "path_" and is_picture("A.JPG") and not is_picture("a.jpg.txt")


def test_missing_library_names_the_extra():
    for extra in ("search", "milvus", "app"):
        with pytest.raises(TiprError, match=rf"pip install 'tipr_nb\[{extra}\]'"): need("no_such_module_here", extra, "this")
