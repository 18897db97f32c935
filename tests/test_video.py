"""Films: moments decoded on demand, people followed, every step resumable."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from gallery_pictures import ByColour, figure, walking as scene
from tipr_nb.core import TiprError
from tipr_nb.search import find_media, open_ahead, read_moment

pytest.importorskip("av", reason="films need the extra `video`")
from tipr_nb.search.photos import Photo, PhotoError
from tipr_nb.search.video import (
    DetectionLog,
    FilmReader,
    film_people,
    film_start,
    follow,
    in_order,
    moment_key,
    parse_every,
    write_film,
)
from tipr_nb.search.detectors import Found


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "gate_2024-05-01_10-00-00.mp4"
    write_film(path, (scene(i / 10) for i in range(100)))
    return path


def as_photo(film):
    facts = film.stat()
    return Photo(str(film.parent), film.name, facts.st_size, facts.st_mtime_ns)


def test_moments_in_any_order_are_the_right_frames(film):
    for seconds in (0.0, 7.3, 2.5, 2.5, 9.9, 0.0):
        shown = np.asarray(read_moment(f"{film}#t={seconds:.3f}"), float)
        gaps = {
            t: np.abs(shown - np.asarray(scene(t), float)).mean()
            for t in (seconds, seconds + 0.4, max(0, seconds - 0.4))
        }
        assert gaps[seconds] < 6 and gaps[seconds] == min(gaps.values())


def test_a_damaged_or_missing_film_is_a_reason(film, tmp_path):
    (tmp_path / "none.mp4").write_bytes(b"hello")
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:2000])
    for path, why in [
        (tmp_path / "none.mp4", "cannot be opened"),
        (tmp_path / "cut.mp4", "cannot be"),
        (tmp_path / "gone.mp4", "not there"),
        (film, "the film ends before 90.0 s"),
    ]:
        with pytest.raises(PhotoError, match=why):
            read_moment(f"{path}#t=90.000")
    write_film(tmp_path / "half.avi", (scene(i / 10) for i in range(100)))
    whole = (tmp_path / "half.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    photos = find_media(tmp_path, every="1s", detector=ByColour(), keep=tmp_path / "keep")
    why = {os.path.basename(p): w for p, w in photos.problems}
    assert {"none.mp4", "cut.mp4"} <= set(why) and 3 <= len(photos) <= 7
    assert all(not o.problems for o in open_ahead(photos, (96, 32)))


def test_a_file_with_such_a_name_is_a_file(tmp_path):
    figure("red", "black").save(tmp_path / "a.png#t=1.000", "PNG")
    assert read_moment(tmp_path / "a.png#t=1.000").size == (48, 96)


def test_listing_tracks_and_content_keys(film, tmp_path):
    photos = find_media(film.parent, every=2, detector=ByColour(), keep=tmp_path)
    rows = photos.listing.to_pylist()
    assert [p.name for p in photos][:2] == [f"{film.name}#t=0.000", f"{film.name}#t=2.000"]
    assert all(len(p.boxes) == len(p.rows) for p in photos)
    assert {r["camera"] for r in rows} == {"gate"} and {r["confidence"] for r in rows} == {0.8}
    assert rows[photos.items[1].rows[0]]["taken"].isoformat() == "2024-05-01T10:00:02"
    assert {r["track"] for r in rows} == {f"{film.name}#1", f"{film.name}#2"}
    coats = {}
    for opened in open_ahead(photos, (96, 32)):
        for person in opened.people:
            pixel = person.picture.getpixel((16, 36))
            coats.setdefault(rows[opened.photo.rows[person.at]]["track"], set()).add(
                "red" if pixel[0] > pixel[2] else "blue"
            )
    assert all(len(c) == 1 for c in coats.values()) and len(coats) == 2
    copy = tmp_path / "moved.mp4"
    copy.write_bytes(film.read_bytes())
    one, other = (as_photo(p)._replace(name=f"{p.name}#t=2.000", seconds=2.0) for p in (film, copy))
    assert moment_key(one) == moment_key(other)


def test_stopped_at_any_frame_equals_undisturbed(film, tmp_path):
    calm = find_media(film, every="1s", detector=ByColour(), keep=tmp_path / "calm")
    total = 0
    for stop in range(0, 20, 3):
        keep = tmp_path / f"stop{stop}"
        broken = ByColour(stop)
        with pytest.raises(KeyboardInterrupt):
            find_media(film, every="1s", detector=broken, keep=keep)
        log = next(keep.glob("*.jsonl"))
        log.write_bytes(log.read_bytes() + b'{"t": 3.0, "peo')  # and a line was torn
        again = ByColour()
        photos = find_media(film, every="1s", detector=again, keep=keep)
        assert photos.items == calm.items and photos.listing.equals(calm.listing)
        total = broken.calls + again.calls
        assert total == 20  # every half second for the tracks, none twice
    assert total


def test_nothing_is_detected_twice_and_settings_count(film, tmp_path):
    detector = ByColour()
    film_people(as_photo(film), 1.0, detector, tmp_path)
    film_people(as_photo(film), 1.0, detector, tmp_path)
    assert detector.calls == 10
    film_people(as_photo(film), 2.0, detector, tmp_path)
    detector.name = "by-colour, other settings"
    film_people(as_photo(film), 1.0, detector, tmp_path)
    assert detector.calls == 10 + 5 + 10
    with pytest.raises(TiprError, match="the detector failed"):
        film_people(as_photo(film), 1.0, lambda picture: 1 / 0, tmp_path)


def test_whole_frames_metadata_and_pattern(film, tmp_path):
    (tmp_path / "facts.csv").write_text(f"path,place\n{film},yard\n")
    photos = find_media(
        film, every="4s", metadata=tmp_path / "facts.csv", pattern=r"(?P<gate>gate)"
    )
    assert [p.seconds for p in photos] == [0.0, 4.0, 8.0] and all(p.boxes is None for p in photos)
    assert photos.metadata.to_pylist() == [{"place": "yard", "gate": "gate"}] * 3
    assert photos.listing["track"].to_pylist() == [None] * 3


def test_films_beside_pictures_and_tables(film, tmp_path):
    figure("red", "black").save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,shelf\na.png,7\n")
    photos = find_media(
        [tmp_path / "list.csv", film], every="5s", detector=ByColour(), keep=tmp_path / "keep"
    )
    rows = photos.listing.to_pylist()
    by_name = {p.name: [rows[r] for r in p.rows] for p in photos}
    assert by_name["a.png"][0]["shelf"] == 7 and by_name["a.png"][0]["track"] is None
    assert (
        by_name[f"{film.name}#t=5.000"][0]["track"]
        and by_name[f"{film.name}#t=5.000"][0]["shelf"] is None
    )
    assert "films left out" in " ".join(find_media([tmp_path, film]).notes)


def test_bad_input_is_one_line(film, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(film.read_bytes())
    for kwargs, why in [
        (dict(every="often"), "every"),
        (dict(every=0), "every"),
        (dict(every=10**400), "every"),
        (dict(every="1s", start="soon"), "start"),
        (dict(every="1s", start="2024-05-01"), "2 films have no time"),
    ]:
        with pytest.raises(TiprError, match=why) as e:
            find_media(tmp_path, **kwargs)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300
    photos = find_media(tmp_path / "a.mp4", every="5s", start="2024-05-01 10:00", camera="c7")
    assert (
        photos.listing.to_pylist()[1]["taken"].isoformat() == "2024-05-01T10:00:05"
        and photos.listing["camera"][0].as_py() == "c7"
    )
    with pytest.raises(TiprError, match="say how often"):
        find_media(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "name,start,camera",
    [
        ("c3_20240501_100203.mp4", "2024-05-01T10:02:03", "c3"),
        ("2024-05-01 10.02.03.mov", "2024-05-01T10:02:03", "2024-05-01 10.02.03"),
        ("door/20240501T1002.mkv", "2024-05-01T10:02:00", "door"),
        ("x_20241399_1000.mp4", None, "x_20241399_1000"),
        ("yard.avi", None, "yard"),
    ],
)
def test_start_and_camera_from_names(name, start, camera):
    found = film_start(name)
    assert (found[0].isoformat() if found[0] else None, found[1]) == (start, camera)


def test_tracks_name_the_first_sighting_and_those_seen_once():
    walks = [
        [Found((10 + 12 * i, 10, 40 + 12 * i, 100))]
        + ([Found((200, 10, 230, 100))] if i == 3 else [])
        for i in range(6)
    ]
    assert follow(walks, 0.5) == [[1], [1], [1], [1, 2], [1], [1]]
    assert follow([[], []], 0.5) == [[], []] and follow([], 0.5) == []
    assert in_order([[-1, 5], [5, -1]]) == [[1, 2], [2, 3]] and parse_every("250ms") == 0.25


def test_a_log_of_another_kind_is_begun_anew(tmp_path):
    log = DetectionLog(tmp_path / "a.jsonl", dict(film="a"))
    log.add(dict(t=0.0, people=[]))
    for damage in (
        b"\x00\xff garbage\n",
        b"[1]\n",
        b"",
        json.dumps(dict(film="b")).encode() + b"\n",
    ):
        (tmp_path / "a.jsonl").write_bytes(damage)
        assert DetectionLog(tmp_path / "a.jsonl", dict(film="a")).frames == []


FOOTAGE = "/usr/share/doc/opencv-doc/examples/data/vtest.avi"


@pytest.mark.skipif(not os.path.exists(FOOTAGE), reason="needs Debian's opencv-doc")
def test_a_real_film_and_the_detector_without_download(tmp_path):
    pytest.importorskip("cv2", reason="needs the extra `detect`")
    from tipr_nb.search import find_detector
    from tipr_nb.search.detectors import detected_people

    reader = FilmReader(FOOTAGE)
    assert 79 < reader.seconds < 80 and reader.picture(40.0).size == (768, 576)
    people = detected_people(find_detector("hog"), reader.picture(40.0))
    walker = (277, 203, 302, 281)  # as background subtraction sees him
    assert 3 <= len(people) <= 12
    assert any(
        max(p.box[0], walker[0]) < min(p.box[2], walker[2]) and abs(p.box[3] - walker[3]) < 12
        for p in people
    )


def test_detectors_without_confidence_are_not_asked_twice():
    from tipr_nb.search.video import is_frame

    assert is_frame({"t": 0.0, "people": [[1, 2, 3, 4, None], [1, 2, 3, 4, 0.5]]})
    assert not is_frame({"t": 0.0, "people": [[1, 2, None, 4, 0.5]]})
    assert not is_frame({"t": 0.0, "people": [[1, 2, 3, 4, "high"]]})


def test_a_log_of_detections_nested_too_deeply_is_made_anew(tmp_path):
    head = dict(film="x", every=1.0)
    lines = [json.dumps(head), '{"t": 0.0, "people": []}', '{"t": ' + "[" * 100_000]
    (tmp_path / "f.jsonl").write_text("\n".join(lines) + "\n")
    log = DetectionLog(tmp_path / "f.jsonl", head)
    assert (tmp_path / "f.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    assert log.people() is not None
