"""Galleries of drawn pictures for tests of who makes them: one process, parts, or the workers of a cluster."""

import shutil
from pathlib import Path

from tipr_nb.search import ColourModel, Gallery


def same_gallery(a: Gallery, b: Gallery):
    "The same people, features and skipped files."
    assert a.features.shape == b.features.shape and (a.features[:] == b.features[:]).all()
    for column in ("path", "sha256", "at", "x0", "same_as"):
        assert a.items.table([column]).equals(b.items.table([column]))
    assert a.skipped == b.skipped


def grown_archive(
    photos: Path, home: Path
) -> tuple[Path, Gallery, int]:  # copy of the photos, gallery of a part, how many came later
    "A gallery of two thirds of the photos; the others came after it."
    folder = home / "some"
    shutil.copytree(photos, folder)
    late = sorted(folder.rglob("*.png"))[::3]
    kept = {p: p.read_bytes() for p in late}
    for p in late:
        p.unlink()
    gallery = Gallery.build(folder, ColourModel(), home / "g")
    for p, data in kept.items():
        p.write_bytes(data)
    return folder, gallery, len(late)
