"""What masking captions costs a training step: batch and step with and without it, in turns, and the masking alone.

    python -m benchmarks.masking                 # the tiny tower at batch 128, ViT-B/16 at 384x128 and batch 4
    python -m benchmarks.masking --only tiny

Processor time on one thread. The batch is made by the recipe's own loader in the same process, which is masking's worst case: with `num_workers` it is another process's work.
"""

from __future__ import annotations

import argparse, tempfile, time
from collections.abc import Callable
from functools import partial

from benchmarks.common import interleave, medians, run, set_threads, show, write_result
from tipr_nb.data import PairLoader, PersonDataset, load_dataset
from tipr_nb.methods import FLAVOURS
from tipr_nb.synth import make_synth_pedes
from tipr_nb.training import (
    RECIPES,
    Recipe,
    TrainStep,
    build_encoder,
    make_accelerator,
    make_train_loader,
)

SIZES = {  # of the model: what the recipe `sdm-id` is changed by
    "tiny": dict(arch="tipr-tiny", image_size=(96, 32), batch_size=128),
    "ViT-B/16": dict(arch="ViT-B-16-quickgelu", image_size=(384, 128), batch_size=4),
}


def loaders(recipe: Recipe, data: PersonDataset, tokenize: Callable) -> dict[str, PairLoader]:
    "The recipe's loader without masking, and with each flavour of it."
    found = {"none": make_train_loader(recipe, data.train, tokenize)}
    for flavour in FLAVOURS:
        masked = recipe.replace(caption_transform=("mask", dict(flavour=flavour)))
        found[flavour] = make_train_loader(masked, data.train, tokenize)
    return found


def token_work(loader: PairLoader, number: int):
    "The part of a batch that masking is in: captions and their token ids."
    index, places = loader.sampler.batch(number)
    streams = loader.streams(places)
    loader.token_fields(loader.captions(index, None, streams), streams)


def processor_seconds(cases: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    "Processor time of each case, in turns: other programs disturb it less than the clock."
    found: dict[str, list[float]] = {name: [] for name in cases}

    def timed(name: str):
        start = time.process_time()
        cases[name]()
        found[name].append(time.process_time() - start)

    interleave({name: partial(timed, name) for name in cases}, repeats, warmup=1)
    return {name: values[1:] for name, values in found.items()}  # the first was to warm up


def bench(size: str, data: PersonDataset, repeats: int) -> list[dict]:
    "Rows of one size of the model."
    recipe = RECIPES["sdm-id"].replace(pretrained=None, precision="no", **SIZES[size])
    step = TrainStep(
        recipe, build_encoder(recipe), data.train.n_ids, make_accelerator(recipe, "cpu")
    )
    step.retriever.train()
    found = loaders(recipe, data, step.retriever.encoder.tokenize)
    numbers = dict.fromkeys(found, 0)

    def whole(name: str):
        "One batch and one step on it."
        number = numbers[name]
        numbers[name] += 1
        step(iter([found[name][number % len(found[name])]]), number, 0.5)

    def alone(name: str):
        "The token work of ten batches."
        for number in range(10):
            token_work(found[name], number % len(found[name]))

    steps = processor_seconds({k: partial(whole, k) for k in found}, repeats)
    tokens = processor_seconds({k: partial(alone, k) for k in found}, 11)
    seconds = medians(steps)
    work = {k: v / 10 for k, v in medians(tokens).items()}
    rows = []
    for name in FLAVOURS:
        own = work[name] - work["none"]
        rows.append(
            dict(
                case=f"{size}, {name}",
                size=size,
                flavour=name,
                batch=recipe.batch_size,
                seconds=round(seconds[name], 4),
                seconds_without=round(seconds["none"], 4),
                step_ratio=round(seconds[name] / seconds["none"], 4),
                microseconds=round(1e6 * own / recipe.batch_size, 2),
                percent=round(100 * own / seconds["none"], 4),
                times=[round(t, 4) for t in steps[name]],
                times_without=[round(t, 4) for t in steps["none"]],
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SIZES), help="one size of the model")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as home:
        folder = make_synth_pedes(home, n_ids=(200, 4, 5), seed=0, workers=1)
        data = load_dataset("synth-pedes", folder)
        rows = []
        for size in SIZES:
            if args.only in (None, size):
                rows += bench(size, data, args.repeats)
    hidden = ("times", "times_without", "case")
    show([{k: v for k, v in r.items() if k not in hidden} for r in rows], "masking in a step")
    print(f"written to {write_result('masking', rows, key='case').name}")


if __name__ == "__main__":
    run(main)
