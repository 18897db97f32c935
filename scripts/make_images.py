"""The pictures of the front page, from synth-pedes, the library and its shipped weights: `python scripts/make_images.py`."""

import argparse
import io
from pathlib import Path

import numpy as np
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from tipr_nb.core import atomic_path
from tipr_nb.data import load_dataset
from tipr_nb.demo import top_pictures
from tipr_nb.evaluation import encode_split
from tipr_nb.figures import COLORS, HIT, INK, LINE, MISS, MUTED, diagram, place, sheet, style, wrap
from tipr_nb.methods import OBJECTIVES
from tipr_nb.models import PersonCLIP

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def keep(fig, name: str):
    "Save a figure: as a JPEG, or as a PNG with a palette where that is smaller."
    IMAGES.mkdir(exist_ok=True)
    png = fig.png(150)
    with atomic_path(IMAGES / name) as new:
        if name.endswith("jpg"):
            picture = Image.open(io.BytesIO(png)).convert("RGB")
            picture.save(new, "JPEG", quality=88, subsampling=0, optimize=True)
        else:
            new.write_bytes(png)


def chosen(split, features) -> int:
    "The first complete caption of fitting length whose four right pictures are among the first six, not alone."
    for q in np.flatnonzero(split.caption_columns["kind"] == "complete"):
        _, hits, _ = top_pictures(features, split, q)
        if hits[0] and hits[:6].sum() == 4 and 110 < len(split.captions[q]) < 170:
            return int(q)
    raise SystemExit("no caption fits; widen the choice")


def hero(split, features, columns: int = 12, rows: int = 3):
    "A caption, part of a gallery, and the pictures ranked first."
    q = chosen(split, features)
    ranked, hits, _ = top_pictures(features, split, q, 6)
    rng = np.random.default_rng(1)
    rest = np.setdiff1d(np.arange(len(split.images)), ranked)
    others = rng.permutation(rest)[: columns * rows - len(ranked)]
    crowd = rng.permutation([*others, *ranked])
    found = set(ranked[hits])
    with style():
        fig, ax = sheet(11.6, 3.6)
        rounded = "round,pad=0,rounding_size=.1"
        ax.add_patch(
            FancyBboxPatch((0.12, 0.62), 2.6, 2.2, boxstyle=rounded, fc="#f6f7f9", ec=LINE)
        )
        lines = wrap(f"“{split.captions[q]}”", 2.3, 10.5, max_lines=9)
        text = dict(va="top", parse_math=False, color=INK, fontsize=10.5)
        for k, line in enumerate(lines):
            ax.text(0.27, 1.72 + (k - len(lines) / 2) * 0.21, line, **text)
        for n, i in enumerate(crowd):
            row, column = divmod(n, columns)
            frame = HIT if i in found else None
            place(
                ax, split.images[i], 3.3 + column * 0.345, 0.2 + row * 1.03, 0.32, 0.96, frame=frame
            )
        for n, (i, hit) in enumerate(zip(ranked[:5], hits)):
            frame, mark = (HIT, "hit") if hit else (MISS, "miss")
            x = 8.1 + n * 0.69
            place(ax, split.images[i], x, 0.78, 0.61, 1.83, frame=frame, mark=mark)
        for x in (2.8, 7.52):
            ax.annotate(
                "",
                (x + 0.4, 1.72),
                (x, 1.72),
                arrowprops=dict(arrowstyle="-|>", color=MUTED, lw=1.6),
            )
        gallery = f"the gallery: {len(crowd)} of {len(split.images):,} pictures"
        result = "ranked first: the person described, and one other"
        for x, words in ((0.12, "a caption"), (3.3, gallery), (8.1, result)):
            ax.text(x, 3.45, words, fontsize=9.5, color=MUTED, va="center")
    return fig


def in_lines(words: list[str], n: int) -> str:
    "The words in `n` lines of about equal length."
    size = -(-len(words) // n)
    return "\n".join(" ".join(words[i : i + size]) for i in range(0, len(words), size))


def architecture():
    "The folders of the library, and what they pass to each other."
    data, method, use = COLORS[:3]
    top, bottom = 0.7, 2.1
    boxes = {
        "data": (1.25, top, "data\nsplits, checks, batches", data),
        "synth": (1.25, bottom, "synth\nthe embedded benchmark", data),
        "models": (3.85, top, "models\none pass, all features", data),
        "generation": (3.85, bottom, "generation\npictures from captions", data),
        "methods": (6.55, top, f"methods\n{in_lines(list(OBJECTIVES), 2)}", method),
        "training": (9.35, top, "training\nrecipe in, checkpoint out", method),
        "evaluation": (9.35, bottom, "evaluation\nR@k, mAP, mINP", use),
        "search": (6.55, bottom, "search\ngalleries, page, command", use),
    }
    arrows = [
        ("synth", "data"),
        ("data", "models", "Batch"),
        ("models", "methods", "Features"),
        ("generation", "methods", "pictures"),
        ("methods", "training", "losses"),
        ("training", "evaluation", "model"),
        ("training", "search", "model"),
    ]
    return diagram(boxes, arrows, 10.75, 2.8)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="?", choices=["architecture", "hero"], help="both when left out"
    )
    only = parser.parse_args().only
    if only != "hero":
        keep(architecture(), "architecture.png")
    if only != "architecture":
        val = load_dataset("synth-pedes").val
        model = PersonCLIP.from_pretrained("clip-synth-world").eval()
        keep(hero(val, encode_split(model, val)), "hero.jpg")


if __name__ == "__main__":
    main()
