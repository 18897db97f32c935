"""Small pictures of people in two colours, for the tests of photos, indexing, search and page."""
from pathlib import Path

from PIL import Image, ImageDraw

from tipr_nb.search import COLOURS


def figure(coat: str, legs: str, size=(48, 96)) -> Image.Image:
    w, h = size
    picture = Image.new("RGB", size, "#c9d2d6")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((w*.36, h*.04, w*.64, h*.18), fill="#c99a7a")
    pen.rectangle((w*.2, h*.19, w*.8, h*.56), fill=COLOURS[coat])
    pen.rectangle((w*.26, h*.56, w*.74, h*.96), fill=COLOURS[legs])
    return picture


def archive(folder: Path, repeat: int = 1) -> Path:
    "All pairs of two colours over three cameras: `folder/c1/red-blue-0.png`."
    for i, (a, b, r) in enumerate((a, b, r) for r in range(repeat) for a in COLOURS for b in COLOURS):
        file = folder/f"c{i % 3 + 1}"/f"{a}-{b}-{r}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = figure(a, b)
        picture.putpixel((0, 0), (r, i % 256, 7))   # every file its own content
        picture.save(file)
    return folder
