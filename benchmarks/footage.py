"""People in a real surveillance film: found, followed, searched; against background subtraction, an untrained model and chance.

    python -m benchmarks.footage                       # vtest.avi of Debian's package opencv-doc (about ten minutes on two busy cores)
    python -m benchmarks.footage --only detector       # this part anew, the others of results/footage.json stay
    python -m benchmarks.footage --detect FOLDER       # another detector: hub id, folder or module:function

One camera, one afternoon: bags, hair and sex are not tested, and colours are decided by a rule on pixels, not by people.
In vtest.avi `hog` takes a parked white van for a person in every frame (80 of 534 boxes), which the sentence on the white jacket mostly
finds: leave it out of a mean (nbs/tutorials/real_footage.ipynb shows it).
"""

from __future__ import annotations

import argparse, sys, tempfile, time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import run, set_threads, show, write_result
from tipr_nb.search import DEFAULT_MODEL, find_detector, find_media, open_ahead
from tipr_nb.search.detectors import Found, detected_people
from tipr_nb.search.photos import Photo
from tipr_nb.search.video import TRACK_EVERY, FilmReader, film_people, film_times, follow

FILM = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
WARM_UP = 5.0  # seconds until the background is learned


def iou(a, b) -> float:
    "Overlap of two boxes as a fraction of their union."
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def moving_people(film: Path, every: float) -> dict[float, list[tuple]]:
    "Boxes of what moves and has a person's shape: time -> boxes. Standing people and pairs are not in it."
    import cv2

    reader = FilmReader(film)
    rate = float(reader.stream.average_rate)
    background = cv2.createBackgroundSubtractorMOG2(
        history=500, varThreshold=32, detectShadows=True
    )
    step = round(every * rate)
    found = {}
    for i, seconds in enumerate(film_times(reader, 1 / rate)):
        mask = (background.apply(np.asarray(reader.picture(seconds))[:, :, ::-1]) == 255).astype(
            np.uint8
        ) * 255
        if seconds < WARM_UP or i % step:
            continue
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3)))
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((15, 7)))
        stats = cv2.connectedComponentsWithStats(mask)[2][1:]
        found[seconds] = [
            (x, y, x + w, y + h)
            for x, y, w, h, area in stats
            if area > 600 and h > 45 and 1.4 < h / w < 4.5
        ]
    return found


def detector_rows(film: Path, name: str) -> list[dict]:
    "Recall of a detector against what moves; how many boxes it adds (standing people among them)."
    detector, truth = find_detector(name), moving_people(film, 1.0)
    reader, hits, loose, boxes, start = FilmReader(film), 0, 0, 0, time.perf_counter()
    for seconds, people in truth.items():
        found = detected_people(detector, reader.picture(seconds))
        best = [max((iou(p, f.box) for f in found), default=0.0) for p in people]
        hits += sum(b >= 0.5 for b in best)
        loose += sum(b >= 0.4 for b in best)
        boxes += len(found)
    n = sum(map(len, truth.values()))
    spent = (time.perf_counter() - start) / len(truth)
    return [
        dict(
            what=f"detector {detector.name}",
            frames=len(truth),
            people=n,
            recall_iou_50=round(hits / n, 3),
            recall_iou_40=round(loose / n, 3),
            boxes=boxes,
            seconds_a_frame=round(spent, 2),
        )
    ]


def track_rows(film: Path) -> list[dict]:
    "Links between successive sampled frames against tracks at the film's own rate; boxes of what moves in both."
    rate = float(FilmReader(film).stream.average_rate)
    truth = moving_people(film, 1 / rate)
    times = sorted(truth)
    people = [[Found(b) for b in truth[t]] for t in times]
    reference, rows = follow(people, 1 / rate), []
    for every in (TRACK_EVERY, 1.0):
        step = round(every * rate)
        ours, true = follow(people[::step], every), reference[::step]
        right = linked = real = 0
        for a in range(len(ours) - 1):
            for i in range(len(true[a])):
                for j in range(len(true[a + 1])):
                    same, said = true[a][i] == true[a + 1][j], ours[a][i] == ours[a + 1][j]
                    real, linked, right = real + same, linked + said, right + (same and said)
        rows.append(
            dict(
                what=f"tracks every {every:g} s",
                frames=len(ours),
                people=sum(map(len, ours)),
                links=real,
                recall=round(right / real, 3),
                precision=round(right / linked, 3),
                tracks=max((max(t, default=0) for t in ours), default=0),
                reference_tracks=max(max(t, default=0) for t in reference),
            )
        )
    return rows


# What a rule on pixels says of coat and trousers; the words are looked for in sentences.
SENTENCES = {
    "a person in a red jacket": ("red", None),
    "a person in a black coat and black trousers": ("black", "black"),
    "a person in blue jeans and a black jacket": ("black", "blue"),
    "a person in a white jacket": ("white", None),
    "a person in blue jeans": (None, "blue"),
}


def colour(pixels: np.ndarray) -> str:
    "The colour of most of a patch, by hue, saturation and value; '' where it is none of ours."
    import cv2

    h, s, v = (
        cv2.cvtColor(pixels[:, :, ::-1].copy(), cv2.COLOR_BGR2HSV).reshape(-1, 3).astype(int).T
    )
    shares = dict(
        black=(v < 65),
        white=(v > 165) & (s < 45),
        red=((h < 9) | (h > 168)) & (s > 95) & (v > 60),
        blue=(h > 95) & (h < 130) & (s > 50) & (v > 45),
    )
    name = max(shares, key=lambda n: shares[n].mean())
    return name if shares[name].mean() > 0.4 else ""


def clothes(crop: Image.Image) -> tuple[str, str]:
    "Colours of coat and trousers."
    pixels = np.asarray(crop)
    h, w = pixels.shape[:2]
    return colour(pixels[int(0.2 * h) : int(0.45 * h), int(0.3 * w) : int(0.7 * w)]), colour(
        pixels[int(0.55 * h) : int(0.8 * h), int(0.3 * w) : int(0.7 * w)]
    )


def sentence_row(
    sentence: str,
    wanted: tuple,
    seen: list[tuple[str, str]],
    scores: np.ndarray,
    untrained: np.ndarray,
) -> dict | None:
    "Precision of the first ten and AP (percent) of one sentence's scores, with an untrained model's AP and chance; None where nobody wears it."
    from sklearn.metrics import average_precision_score

    coat, trousers = wanted
    true = np.array([(coat in (None, c)) and (trousers in (None, t)) for c, t in seen])
    if not true.any():
        return None
    first = np.argsort(-scores)[:10]
    return dict(
        what=sentence,
        people=len(seen),
        right=int(true.sum()),
        chance=round(100 * true.mean(), 1),
        ap=round(100 * average_precision_score(true, scores), 1),
        first_ten=round(100 * true[first].mean()),
        ap_untrained=round(100 * average_precision_score(true, untrained), 1),
    )


def search_rows(film: Path, name: str, keep: str) -> list[dict]:
    "From film to features, stage by stage; then sentences, judged by the rule on colours."
    import torch
    from tipr_nb.models import PersonCLIP
    from tipr_nb.search.towers import as_numpy

    torch.manual_seed(0)
    detector = find_detector(name)
    times = {}
    start = time.perf_counter()
    facts = film.stat()
    photo = Photo(str(film.parent), film.name, facts.st_size, facts.st_mtime_ns)
    film_people(photo, TRACK_EVERY, detector, keep)
    times["detect"] = time.perf_counter() - start
    start = time.perf_counter()
    photos = find_media(film, every="1s", detector=detector, keep=keep)
    times["track"] = time.perf_counter() - start
    model = PersonCLIP.from_pretrained(DEFAULT_MODEL).eval()
    start = time.perf_counter()
    opened = list(open_ahead(photos, model.image_size))
    people = [p for o in opened for p in o.people]
    times["open"] = time.perf_counter() - start
    start = time.perf_counter()
    features = np.concatenate(
        [
            as_numpy(model.encode_image([p.picture for p in people[i : i + 64]]))
            for i in range(0, len(people), 64)
        ]
    )
    times["encode"] = time.perf_counter() - start
    tracks = len(set(photos.listing["track"].to_pylist()))
    rows = [
        dict(
            what=f"stage {n}",
            frames=len(photos),
            people=len(people),
            tracks=tracks,
            seconds=round(t, 1),
            people_a_second=round(len(people) / max(t, 1e-9), 1),
        )
        for n, t in times.items()
    ]
    whole = [clothes(p.picture.resize((64, 128))) for p in people]
    untrained = PersonCLIP(model.arch, image_size=model.image_size).eval()
    plain = np.concatenate(
        [
            as_numpy(untrained.encode_image([p.picture for p in people[i : i + 64]]))
            for i in range(0, len(people), 64)
        ]
    )
    for sentence, (coat, trousers) in SENTENCES.items():
        random = plain @ as_numpy(untrained.encode_text([sentence]))[0]
        row = sentence_row(
            sentence,
            (coat, trousers),
            whole,
            features @ as_numpy(model.encode_text([sentence]))[0],
            random,
        )
        if row is not None:
            rows.append(row)
    aps = [r["ap"] for r in rows if "ap" in r]
    return rows + [dict(what="mean of the sentences", ap=round(float(np.mean(aps)), 1))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--film", type=Path, default=FILM)
    parser.add_argument("--detect", default="hog")
    parser.add_argument("--only", default="detector,tracks,search")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.film.is_file():
        sys.exit(f"{args.film}: no such film; apt-get install opencv-doc, or give --film")
    set_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as keep:
        for part in args.only.split(","):
            new = dict(
                detector=lambda: detector_rows(args.film, args.detect),
                tracks=lambda: track_rows(args.film),
                search=lambda: search_rows(args.film, args.detect, keep),
            )[part]()
            show(new, part)
            rows += new
    print(write_result("footage", rows, key="what"))


if __name__ == "__main__":
    run(main)
