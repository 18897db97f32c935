"""Memory and time of a training step at full size (ViT-B/16, 384x128), by what a recipe does to save memory.

    python -m benchmarks.memory                              # on a CPU, one and three pairs: what a pair adds, from which larger batches are extrapolated
    python -m benchmarks.memory --device cuda --batch 16 64  # on a GPU, as the allocator sees it

Two things are counted: what is kept for the backward pass when the forward pass ends (what a pair adds is its slope), and the peak of a whole step, gradients included. Neither depends on the machine's
load. In a small batch the whole step's peak says little about a large one: gradients appear while activations go.
"""

from __future__ import annotations

import argparse, re, time

import torch

from benchmarks.common import run, set_threads, show, write_result
from benchmarks.sen import captions
from tipr_nb.core import TiprError
from tipr_nb.data import Batch
from tipr_nb.training import add_lora, cached_backward, peak_bytes
from tipr_nb.training import RECIPES, Recipe, Retriever, build_encoder, build_objectives

N_IDS = 11003
SETTINGS: dict[str, tuple[str, dict]] = {  # what it is called -> recipe, settings
    "plain": ("sdm-id", {}),
    "grad_checkpoint": ("sdm-id", dict(grad_checkpoint=True)),
    "grad_cache": ("sdm-id", dict(grad_cache=1)),
    "grad_cache + grad_checkpoint": ("sdm-id", dict(grad_cache=1, grad_checkpoint=True)),
    "lora 8": ("sdm-id", dict(lora=8)),
    "lora 8 + grad_checkpoint": ("sdm-id", dict(lora=8, grad_checkpoint=True)),
    "image tower frozen": ("sdm-id", dict(freeze=("clip.visual",))),
    "sen": ("sen", {}),
    "sen + grad_checkpoint": ("sen", dict(grad_checkpoint=True)),
    "sen + grad_cache": ("sen", dict(grad_cache=1)),
}


def build(recipe: Recipe, device: str) -> Retriever:
    "The recipe's model with random weights, ready for a step."
    torch.manual_seed(0)
    encoder = build_encoder(recipe)
    if recipe.grad_checkpoint:
        encoder.set_grad_checkpointing(True)
    if recipe.lora:
        add_lora(encoder, recipe.lora)
    model = Retriever(encoder, build_objectives(recipe, encoder, N_IDS)).to(device).train()
    for n, p in model.named_parameters():
        if any(re.search(f, n) for f in recipe.freeze):
            p.requires_grad_(False)
    return model


def forward(model: Retriever, batch: Batch, device: str) -> torch.Tensor:
    "The weighted loss of a batch, with its graph."
    with torch.autocast(device, torch.bfloat16):
        return model(batch.map(lambda t: t))[0]


def step(model: Retriever, recipe: Recipe, batch: Batch, chunk: int, device: str):
    "Losses and gradients of a batch."
    if recipe.grad_cache:
        cached_backward(
            model.encoder,
            model.objectives,
            model.weights,
            batch.map(lambda t: t),
            chunk,
            context=lambda: torch.autocast(device, torch.bfloat16),
        )
    else:
        forward(model, batch, device).backward()


def measure(name: str, sizes: list[int], chunk: int, device: str) -> dict:
    "One setting at each batch size, gradients cleared in between."
    recipe_name, settings = SETTINGS[name]
    recipe = RECIPES[recipe_name].replace(pretrained=None, precision="bf16", **settings)
    model, kept, (h, w) = build(recipe, device), [], recipe.image_size
    for b in sizes:
        texts = captions(b)
        batch = Batch(
            None,
            model.encoder.tokenize(texts),
            torch.arange(b) // 2,
            texts,
            torch.arange(b),
            torch.arange(b),
            raw=torch.zeros(b, 3, h, w, dtype=torch.uint8),
        ).to(device)
        if not recipe.grad_cache:
            kept.append(peak_bytes(lambda batch=batch: forward(model, batch, device)))
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    peak = peak_bytes(lambda: step(model, recipe, batch, chunk, device))
    seconds, pair = clock() - start, (kept[-1] - kept[0]) / (sizes[-1] - sizes[0]) if kept else None
    return dict(
        setting=name,
        recipe=recipe_name,
        device=device,
        precision="bf16",
        sizes=sizes,
        chunk=chunk if recipe.grad_cache else None,
        weights=sum(p.numel() for p in model.parameters()),
        learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        kept_mib=[round(k / 2**20, 1) for k in kept],
        pair_mib=None if pair is None else round(pair / 2**20, 2),
        base_mib=None if pair is None else round((kept[0] - pair * sizes[0]) / 2**20, 1),
        step_peak_mib=round(peak / 2**20, 1),
        seconds=round(seconds, 2),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs=2, default=[1, 3], help="two batch sizes")
    parser.add_argument(
        "--chunk", type=int, default=1, help="pairs in a chunk, for gradient caching"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="some settings only")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TiprError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if args.batch[0] >= args.batch[1]:
        raise TiprError(f"--batch {args.batch[0]} {args.batch[1]}: give a smaller and a larger one")
    set_threads(args.threads)
    rows = [measure(name, args.batch, args.chunk, args.device) for name in args.only or SETTINGS]
    show(
        [{k: v for k, v in r.items() if k not in ("precision", "device", "recipe")} for r in rows],
        "memory of a training step, ViT-B/16 at 384x128",
    )
    print(f"written to {write_result('memory', rows, key='setting').name}")


if __name__ == "__main__":
    run(main)
