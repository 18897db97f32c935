"""Epochs through the image cache against decoding, resizing and converting every image every time, in one run.

    python -m benchmarks.data                  # people drawn at about the size of CUHK-PEDES' crops, made 96x32 and 384x128
    python -m benchmarks.data --root DIR       # a real dataset in CUHK-PEDES' layout instead

The reference does what the field's loaders do before augmentation (Pillow's decode, resize, to-tensor); the cached epoch does all there is to do: look up, flip, pad, crop,
erase, normalise, captions and tokens. A second reference adds the same augmentation by torchvision, one image at a time.
"""

from __future__ import annotations

import argparse, os, tempfile, time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import interleave, machine, medians, run, set_threads, show, write_result
from tipr_nb.core import ensure_torchvision
from tipr_nb.data import (
    CLIP_MEAN,
    CLIP_STD,
    PairLoader,
    Split,
    keep_memory,
    load_dataset,
    make_loader,
)


def decode(split: Split, loader: PairLoader, size: tuple[int, int], augment: bool):
    "One epoch the usual way, over the loader's own batches: every image opened, decoded, resized and made a tensor."
    from torchvision.transforms import v2

    steps = [v2.Resize(size), v2.PILToTensor()]
    if augment:
        steps = [
            v2.Resize(size),
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(10),
            v2.RandomCrop(size),
            v2.PILToTensor(),
        ]
    steps += [v2.ToDtype(torch.float32, scale=True)]
    if augment:
        steps += [
            v2.Normalize(CLIP_MEAN, CLIP_STD),
            v2.RandomErasing(0.5, scale=(0.02, 0.4), value=CLIP_MEAN),
        ]
    transform = v2.Compose(steps)
    for b in range(len(loader)):
        index, _ = loader.sampler.batch(b)
        torch.stack(
            [
                transform(Image.open(split.images[i]).convert("RGB"))
                for i in split.caption_image[index]
            ]
        )


def lengths(captions: list[str]) -> torch.Tensor:
    "A stand-in for a tokenizer: tokens are made once and looked up afterwards, whoever makes them."
    rows = [[1, *(len(w) + 1 for w in c.split()[:75]), 99] for c in captions]
    return torch.tensor([r + [0] * (77 - len(r)) for r in rows])


def on_cpu(f, seconds: list[float]):
    "Run `f` and note the processor time it took, which other programs on the machine disturb less than the clock."
    start = time.process_time()
    f()
    seconds.append(time.process_time() - start)


def epoch(loader: PairLoader, finish: bool = True):
    for batch in loader:
        _ = batch.images if finish else batch.raw


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", help="a dataset in CUHK-PEDES' layout; default: people drawn for this run"
    )
    parser.add_argument("--images", type=int, default=512, help="how many images to use")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    set_threads(args.threads)
    ensure_torchvision()
    keep_memory()  # for both sides
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        os.environ["TIPR_CACHE"] = tmp
        root = args.root
        if not root:
            from tipr_nb.synth import make_synth_pedes

            root = make_synth_pedes(
                Path(tmp) / "drawn",
                n_ids=(max(8, args.images * 2 // 5), 4, 5),
                image_size=(264, 104),
            )
        split = load_dataset("cuhk-pedes", root).train
        split = split.subset_images(range(min(args.images, len(split.images))))
        sizes = sorted(Image.open(p).size[::-1] for p in split.images[:200])
        print(
            f"{len(split.images):,} images ({sizes[len(sizes) // 2][0]}x{sizes[len(sizes) // 2][1]} in the middle), {len(split):,} pairs, {args.threads} thread(s)"
        )
        for size in ((96, 32), (384, 128)):
            start = time.perf_counter()
            loader = make_loader(split, lengths, size, args.batch_size)
            built = time.perf_counter() - start
            plain = make_loader(
                split, lengths, size, args.batch_size, augment=dict(flip=0, pad=0, erase=0)
            )
            cases = {
                "decode + resize + to-tensor": partial(decode, split, loader, size, False),
                "decode + torchvision's augmentation": partial(decode, split, loader, size, True),
                "cached epoch, augmented, normalised": partial(epoch, loader),
                "cached epoch, no augmentation": partial(epoch, plain),
                "cached epoch, bytes for the GPU": partial(epoch, loader, False),
            }
            cpu: dict[str, list[float]] = {k: [] for k in cases}
            times = medians(
                interleave(
                    {k: partial(on_cpu, f, cpu[k]) for k, f in cases.items()},
                    args.repeats,
                    warmup=1,
                )
            )
            pairs, first, busy = len(loader) * args.batch_size, next(iter(cases)), medians(cpu)
            rows += [
                dict(
                    size=f"{size[0]}x{size[1]}",
                    case=k,
                    images_per_second=round(pairs / t),
                    ms_per_batch=round(1000 * t / len(loader), 2),
                    speedup=round(times[first] / t, 2),
                    cpu_ms_per_batch=round(1000 * busy[k] / len(loader), 2),
                    cpu_speedup=round(busy[first] / busy[k], 2),
                    build_seconds=round(built, 2) if k.startswith("cached") else None,
                )
                for k, t in times.items()
            ]
    show(rows, "images per second")
    for row in rows:
        if row["case"].startswith("cached epoch, aug"):
            print(
                f"{row['size']}: {row['speedup']:.1f}x decoding every time, {row['cpu_speedup']:.1f}x in processor time (wanted: at least 5x)"
            )
    print(
        f"written to {write_result('data', rows, images=len(split.images), source='drawn' if not args.root else Path(args.root).name, source_size=list(sizes[len(sizes) // 2])).name}; {machine()['cpu']}"
    )


if __name__ == "__main__":
    run(main)
