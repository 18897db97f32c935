"""The pictures of the front page, drawn from synth-pedes by the library and its shipped weights: `python scripts/make_images.py`."""
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from tipr_nb.methods import OBJECTIVES
from tipr_nb.models import PersonCLIP
from tipr_nb.core import atomic_path
from tipr_nb.data import load_dataset
from tipr_nb.demo import top_pictures
from tipr_nb.evaluation import encode_split
from tipr_nb.figures import COLORS, HIT, INK, LINE, MISS, MUTED, diagram, place, sheet, style, wrap
from tipr_nb.training import OBJECTIVE_HOMES

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def keep(fig, name: str):
    IMAGES.mkdir(exist_ok=True)
    picture = Image.open(io.BytesIO(fig.png(150))).convert("RGB")
    with atomic_path(IMAGES / name) as new: picture.save(new, "JPEG" if name.endswith("jpg") else "PNG", quality=88, subsampling=0, optimize=True)


def chosen(split, features) -> int:
    "The first complete sentence of fitting length with all four right pictures among the first six, and someone else among them too."
    for q in np.flatnonzero(split.caption_columns["kind"] == "complete"):
        _, hits, _ = top_pictures(features, split, q)
        if hits[0] and hits[:6].sum() == 4 and 110 < len(split.captions[q]) < 170: return int(q)
    raise SystemExit("no sentence fits; widen the choice")


def hero(split, features, columns: int = 12, rows: int = 3):
    "A sentence, part of a gallery, and the pictures ranked first."
    q = chosen(split, features)
    ranked, hits, _ = top_pictures(features, split, q, 6)
    rng = np.random.default_rng(1)
    others = rng.permutation(np.setdiff1d(np.arange(len(split.images)), ranked))[:columns * rows - len(ranked)]
    crowd, found = rng.permutation([*others, *ranked]), set(ranked[hits])
    with style():
        fig, ax = sheet(11.6, 3.6)
        ax.add_patch(FancyBboxPatch((.12, .62), 2.6, 2.2, boxstyle="round,pad=0,rounding_size=.1", fc="#f6f7f9", ec=LINE))
        lines = wrap(f"“{split.captions[q]}”", 2.3, 10.5, max_lines=9)
        for k, line in enumerate(lines): ax.text(.27, 1.72 + (k - len(lines) / 2) * .21, line, fontsize=10.5, color=INK, va="top", parse_math=False)
        for n, i in enumerate(crowd): place(ax, split.images[i], 3.3 + n % columns * .345, .2 + n // columns * 1.03, .32, .96, frame=HIT if i in found else None)
        for n, (i, hit) in enumerate(zip(ranked[:5], hits)): place(ax, split.images[i], 8.1 + n * .69, .78, .61, 1.83, frame=HIT if hit else MISS, mark="hit" if hit else "miss")
        for x in (2.8, 7.52): ax.annotate("", (x + .4, 1.72), (x, 1.72), arrowprops=dict(arrowstyle="-|>", color=MUTED, lw=1.6))
        for x, text in ((.12, "a sentence"), (3.3, f"the gallery: {len(crowd)} of {len(split.images):,} pictures"), (8.1, "ranked first: the person described, and one other")): ax.text(x, 3.45, text, fontsize=9.5, color=MUTED, va="center")
    return fig


def architecture():
    "The rooms of the library, and what they hand to each other."
    first, method, use = COLORS[0], COLORS[1], COLORS[2]
    names = dict.fromkeys([*OBJECTIVES, *(n for n, home in OBJECTIVE_HOMES.items() if find_spec(f"tipr_nb.{home}"))])
    half = -(-len(names) // 2)
    objectives = " ".join([*names][:half]) + "\n" + " ".join([*names][half:])
    boxes = {"data": (1.2, .62, "data\nsplits, checks, batches", first), "synth": (1.2, 2.0, "synth\nthe drawn benchmark", first), "clip": (3.75, .62, "clip\none pass, all features", first),
             "losses": (6.3, .62, f"objectives\n{objectives}", method), "training": (8.95, .62, "training\nrecipe in, checkpoint out", method),
             "evaluation": (8.95, 2.0, "evaluation\nR@k, mAP, mINP", use), "search": (6.3, 2.0, "search\na gallery of photos", use), "app": (3.75, 2.0, "app, tipr\na page and a command", use)}
    arrows = [("synth", "data"), ("data", "clip", "Batch"), ("clip", "losses", "Features"), ("losses", "training", "losses"), ("training", "evaluation"), ("evaluation", "search", "model"), ("search", "app", "hits")]
    return diagram(boxes, arrows, 10.35, 2.6)


if __name__ == "__main__":
    keep(architecture(), "architecture.png")
    val = load_dataset("synth-pedes").val
    keep(hero(val, encode_split(PersonCLIP.from_pretrained("synth-world").eval(), val)), "hero.jpg")
