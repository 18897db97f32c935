"""Parts of an archive encoded by several processes and joined: nothing lost, nothing twice, every mistake one line."""

import json
import shutil

import pytest
from galleries import grown_archive, same_gallery
from typer.testing import CliRunner

from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, colour_archive, index_part, parse_part
from tipr_nb.search.indexing import BatchEncoder, part_lock


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive") / "photos"
    colour_archive(folder, 5)
    return folder


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    return Gallery.build(photos, ColourModel(), tmp_path_factory.mktemp("whole") / "g")


def encode(photos, folder, parts, **more):
    return [index_part(photos, folder, part, ColourModel(), **more) for part in parts]


def join(photos, folder):
    return Gallery.build(photos, ColourModel(), folder, join=True)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_joined_parts_are_the_gallery_of_one_process(photos, whole, tmp_path, n):
    reports = encode(photos, tmp_path / "g", [f"{i}/{n}" for i in range(1, n + 1)])
    with pytest.raises(TiprError, match="no gallery|not finished"):
        Gallery(tmp_path / "g")
    joined = join(photos, tmp_path / "g")
    assert joined.report.encoded == 0 and sum(r.photos for r in reports) == joined.report.photos
    same_gallery(joined, whole)
    assert not (tmp_path / "g" / "parts").exists()


def test_a_killed_part_goes_on_and_an_existing_gallery_is_extended(photos, tmp_path, monkeypatch):
    few, first, _ = grown_archive(photos, tmp_path)
    add = BatchEncoder.add
    calls = []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 9:
            self.flush()
            raise KeyboardInterrupt
        return add(self, *args)

    monkeypatch.setattr(BatchEncoder, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(few, tmp_path / "g", ["1/2"])
    with pytest.raises(TiprError, match="part 1/2 was not finished"):
        join(few, tmp_path / "g")
    reports = encode(few, tmp_path / "g", ["1/2", "2/2"])
    assert reports[0].resumed >= 8 and len(Gallery(tmp_path / "g")) == len(first)
    again = encode(few, tmp_path / "g", ["2/2"])[0]
    assert again.encoded == 0
    joined = join(few, tmp_path / "g")
    assert joined.report.encoded == 0
    same_gallery(joined, Gallery.build(few, ColourModel(), tmp_path / "anew"))


def test_photos_that_came_after_the_parts_are_encoded_at_the_join(photos, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    encode(more, tmp_path / "g", ["1/2", "2/2"])
    shutil.copy(sorted(more.rglob("*.png"))[0], more / "zz.png")
    same_gallery(join(more, tmp_path / "g"), Gallery.build(more, ColourModel(), tmp_path / "anew"))


def test_mistakes_at_the_join_are_one_line(photos, tmp_path):
    folder = tmp_path / "g"
    with pytest.raises(TiprError, match="no parts to join"):
        join(photos, folder)
    encode(photos, folder, ["1/3", "3/3"])
    with pytest.raises(TiprError, match="part 2/3 is missing; run `tipr index` with --part 2/3"):
        join(photos, folder)
    parts = folder / "parts"
    shutil.copytree(parts / "000003-of-000003", parts / "000002-of-000003")
    with pytest.raises(TiprError, match="part 2/3 holds part 3 a second time"):
        join(photos, folder)
    encode(photos, folder, ["2/3"])
    encode(photos, folder, ["1/2"])
    with pytest.raises(TiprError, match="parts of 2 and 3"):
        join(photos, folder)
    shutil.rmtree(parts / "000001-of-000002")
    mark = parts / "000001-of-000003" / ".part.json"
    known = json.loads(mark.read_text())
    mark.write_text(json.dumps(known | dict(key=known["key"] | dict(fingerprint="other"))))
    with pytest.raises(TiprError, match="part 1/3 was made with another model"):
        join(photos, folder)


def test_a_part_named_twice_at_once(photos, tmp_path):
    with part_lock(tmp_path / "g", parse_part("1/2")):
        with pytest.raises(TiprError, match="part 1/2 is being indexed by another process"):
            encode(photos, tmp_path / "g", ["1/2"])
        assert encode(photos, tmp_path / "g", ["2/2"])[0].encoded


def test_parts_do_not_go_into_a_folder_of_other_files(photos, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TiprError, match="holds other files"):
        encode(photos, tmp_path, ["1/2"])


def test_the_command_line_says_what_goes_together(photos, tmp_path):
    from tipr_nb.cli import app

    base = ["index", str(photos), "--gallery", str(tmp_path / "g")]
    for more, why in (
        (["--part", "3/2"], "from 1/64 to 64/64"),
        (["--part", "1/2", "--join"], "--part only encodes"),
        (["--part", "1/2", "--engine", "ivf"], "--part only encodes"),
    ):
        out = CliRunner().invoke(app, base + more)
        assert out.exit_code and why in out.output + str(out.exception)
