"""Small pictures of people in two colours and a film of two of them, for the tests of search."""

import time

import numpy as np
from PIL import Image

from tipr_nb.search import colour_archive as archive
from tipr_nb.search import colour_figure as figure

__all__ = ["archive", "ByColour", "figure", "walking"]

COATS = {coat: figure(coat, "black").getpixel((24, 40)) for coat in ("red", "blue")}


def walking(seconds):
    "Red walks right, blue walks left; blue leaves after eight seconds."
    picture = Image.new("RGB", (320, 160), "#dfe6ea")
    picture.paste(figure("red", "black", (32, 96)), (int(10 + 20 * seconds), 10))
    if seconds < 8:
        picture.paste(figure("blue", "black", (32, 96)), (int(280 - 20 * seconds), 60))
    return picture


class ByColour:
    "Boxes around coats; counts its calls, and stops when told to."

    name = "by-colour"

    def __init__(self, stop=None, delay=0.0):
        self.calls, self.stop, self.delay = 0, stop, delay

    def __call__(self, picture):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.delay)
        pixels, boxes = np.asarray(picture, int), []
        for coat in COATS.values():
            rows, columns = np.nonzero((np.abs(pixels - coat) < 45).all(2))
            if len(rows) > 100:
                boxes.append(
                    (columns.min() - 6, rows.min() - 18, columns.max() + 6, rows.min() + 78, 0.8)
                )
        return boxes
