"""Photos below the address of an object store: the same gallery as from the folder, and every mistake one line."""

import pytest

from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, colour_archive
from tipr_nb.search.remote import find_remote, is_remote, shown_address


@pytest.fixture
def photos(tmp_path):
    colour_archive(tmp_path / "photos", 1)
    (tmp_path / "photos" / "torn.png").write_bytes(b"no picture")
    (tmp_path / "photos" / "empty.png").touch()
    (tmp_path / "photos" / "notes.txt").write_text("no picture either")
    (tmp_path / "photos" / ".hidden").mkdir()
    (tmp_path / "photos" / ".hidden" / "a.png").write_bytes(b"x")
    return tmp_path / "photos"


def test_an_address_gives_the_gallery_of_the_folder(photos, tmp_path):
    address = f"file://{photos}"
    table = tmp_path / "facts.csv"
    table.write_text("path,zone\nc1/red-red-0.png,north\n")
    more = dict(pattern=r"c(?P<camera>\d)/", metadata=table)
    here = Gallery.build(photos, ColourModel(), tmp_path / "here", **more)
    there = Gallery.build(address, ColourModel(), tmp_path / "there", **more)
    assert (here.features[:] == there.features[:]).all()
    for column in ("path", "sha256", "size", "camera", "zone"):
        assert here.items.table([column]).equals(there.items.table([column])), column
    assert [why for _, why in here.skipped] == [why for _, why in there.skipped]
    again = Gallery.build(address, ColourModel(), tmp_path / "there")
    assert again.report.encoded == 0 and again.report.unchanged == 36
    next((photos / "c2").glob("*.png")).unlink()
    assert Gallery.build(address, ColourModel(), tmp_path / "there").report.removed == 1


@pytest.mark.parametrize(
    "address,why",
    [
        ("ftp://host/photos", "a scheme is one of s3"),
        ("file:///nowhere/at/all", "cannot be listed"),
        ("s3://key:secret@archive/photos", "leave keys out"),
    ],
)
def test_bad_addresses_are_one_line(address, why, tmp_path):
    with pytest.raises(TiprError, match=why) as e:
        Gallery.build(address, ColourModel(), tmp_path / "g")
    assert "\n" not in str(e.value) and "secret" not in str(e.value)


def test_what_an_address_does_not_take(photos, tmp_path):
    address = f"file://{photos}"
    with pytest.raises(TiprError, match="in two runs"):
        Gallery.build([address, str(photos)], ColourModel(), tmp_path / "g")
    with pytest.raises(TiprError, match="this machine's folders"):
        Gallery.build(address, ColourModel(), tmp_path / "g", every=1)
    assert is_remote(address) and not is_remote(str(photos)) and not is_remote(photos)
    assert shown_address("s3://k:s@b/p?region=x") == "s3://b/p"


def test_a_photo_that_goes_away_is_listed(photos, tmp_path, monkeypatch):
    from tipr_nb.search import remote

    found = find_remote(f"file://{photos}")
    monkeypatch.setattr(remote, "find_remote", lambda *a: found)
    (photos / "c1" / "red-red-0.png").unlink()
    made = Gallery.build(f"file://{photos}", ColourModel(), tmp_path / "g")
    assert any("cannot be read from the store" in why for _, why in made.skipped)
