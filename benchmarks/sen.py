"""What SEN costs: a training step of `sen` and of its parts against the baseline `sdm-id`, the same batch, in one run.

python -m benchmarks.sen                    # the tiny architecture at batch 128, ViT-B/16 at 384x128 at batch 8
python -m benchmarks.sen --only tiny --repeats 9
"""

from __future__ import annotations

import argparse
from statistics import median

import numpy as np, torch

from benchmarks.common import interleave, medians, run, seconds, set_threads, show, write_result
from tipr_nb.data import Batch
from tipr_nb.methods import CaptionPruner
from tipr_nb.methods.pruning import _pruned
from tipr_nb.training import (
    RECIPES,
    Recipe,
    Retriever,
    build_encoder,
    build_objectives,
    make_optimizer,
)

SIZES = {
    "tiny": ("sen-tiny", 128, 3000, 7, 1.8),
    "vit-b-16": ("sen", 8, 11003, 3, 1.5),
}  # recipe, batch, training identities, repeats, limit
WORDS = "man woman wearing a the black white striped hooded jacket with blue jeans and red shoes carrying two bags in her left hand short brown hair plaid shirt without hat".split()


def captions(n: int, seed: int = 0) -> list[str]:
    "Sentences of 15 to 35 words, about a caption's length."
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(15, 36))) + "." for _ in range(n)]


CASES = {
    "baseline": (("SDM", "ID"), 0.7),
    "+ CMT": (("SDM", "ID", "CMT"), 0.7),
    "+ TIR": (("SDM", "ID", "TIR"), 0.7),
    "sen": (("SDM", "ID", "TIR", "CMT"), 0.7),
    "sen, nothing dropped": (("SDM", "ID", "TIR", "CMT"), 0.001),
}  # objectives, share of patches dropped before the second image pass


def make_steps(
    recipe: Recipe, n_ids: int, raw: torch.Tensor, texts: list[str], device: str
) -> dict:
    "One closure per case, each a whole training step: features, losses, backward pass, optimizer. They share one model, whose unused weights get no gradient and no update."
    torch.manual_seed(0)
    encoder = build_encoder(recipe.replace(pretrained=None)).to(device).train()
    model = Retriever(encoder, build_objectives(recipe, encoder, n_ids)).to(device).train()
    optimizer, b = make_optimizer(model, recipe), len(raw)
    tokens, ids, erase = (
        encoder.tokenize(texts),
        torch.arange(b) // 2,
        torch.tensor([[10, 5, 30, 20]]).expand(b, -1),
    )

    def step(names, mask_ratio):
        model.objectives["TIR"].mask_ratio = mask_ratio
        batch = Batch(
            None, tokens, ids, texts, torch.arange(b), torch.arange(b), raw=raw, erase=erase
        ).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
            features = model.encode(batch)
            total = sum(
                model.weights[name] * model.objectives[name](features, batch, encoder)
                for name in names
            )
        total.backward()
        if recipe.clip_grad:
            torch.nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.grad is not None], recipe.clip_grad
            )
        optimizer.step()
        optimizer.zero_grad()

    return {case: lambda settings=settings: step(*settings) for case, settings in CASES.items()}


def pruning_seconds(n: int, p: float = 0.2) -> tuple[float, float]:
    "Seconds that a batch of `n` captions spends in the pruner: the first time, and from the cache."
    texts, pruner = captions(n, seed=1), CaptionPruner(p)
    run = lambda: [pruner(c, rng) for rng in [np.random.default_rng(0)] for c in texts]
    run()  # the tagger itself is loaded

    def fresh():
        _pruned.cache_clear()
        return seconds(run)

    return median(fresh() for _ in range(5)), median(seconds(run) for _ in range(5))


def bench(size: str, batch: int | None, repeats: int | None, device: str) -> list[dict]:
    "Step costs of one size, printed and as rows."
    recipe_name, default_batch, n_ids, rounds, limit = SIZES[size]
    recipe, b = RECIPES[recipe_name], batch or default_batch
    steps = make_steps(
        recipe,
        n_ids,
        torch.randint(0, 256, (b, 3, *recipe.image_size), dtype=torch.uint8),
        captions(b),
        device,
    )
    times = medians(interleave(steps, repeats or rounds, warmup=1))
    first, cached = pruning_seconds(b)
    rows = [
        dict(
            size=size,
            batch=b,
            precision=recipe.precision,
            case=case,
            seconds=round(t, 4),
            ratio=round(t / times["baseline"], 3),
        )
        for case, t in times.items()
    ]
    rows += [
        dict(
            size=size,
            batch=b,
            case=case,
            seconds=round(t, 6),
            ratio=round(t / times["baseline"], 6),
        )
        for case, t in {"pruning, first epoch": first, "pruning, cached": cached}.items()
    ]
    show(rows, f"{recipe.arch} at {recipe.image_size[0]}x{recipe.image_size[1]}, batch {b}")
    sen = times["sen"] / times["baseline"]
    print(
        f"   sen: {sen:.2f}x the baseline's step, limit {limit}: {'within' if sen <= limit else 'NOT within'}; dropping 70 % of the patches saves {1 - times['sen'] / times['sen, nothing dropped']:.0%} of it"
    )
    print(
        f"   pruning: {cached / times['sen']:.3%} of a step from the cache, {first / times['sen']:.2%} in the first epoch, limit 2 %: {'within' if first <= 0.02 * times['sen'] else 'NOT within'}"
    )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SIZES), help="one size only")
    parser.add_argument("--batch", type=int, help="pairs in the batch")
    parser.add_argument("--repeats", type=int, help="steps of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    set_threads(args.threads)
    write_result(
        "sen",
        [
            row
            for size in SIZES
            if args.only in (None, size)
            for row in bench(size, args.batch, args.repeats, args.device)
        ],
    )


if __name__ == "__main__":
    run(main)
