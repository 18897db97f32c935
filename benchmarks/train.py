"""One training step of this package against a checkout of IRRA or SEN: the same architecture, weights, batch and device, in one run.

    python -m benchmarks.train --peer PATH                         # ViT-B/16 at 384x128, batch 4, on a CPU in fp32
    python -m benchmarks.train --peer PATH --device cuda --batch 128   # ours in bf16 autocast, theirs in the half precision they were released with

The peer's own code builds its model, its optimizer and its losses. What has to be switched off so that it runs without a network, or without a GPU, is printed and kept in the result. Its
towers' weights are copied into ours before the first step, and losses that both compute are compared: the work is the same, not only the architecture.
"""

from __future__ import annotations

import argparse, contextlib, importlib, io, sys, time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import interleave, medians, run, set_threads, show, write_result
from benchmarks.sen import captions
from tipr_nb.core import TiprError
from tipr_nb.data import Batch
from tipr_nb.training import peak_bytes
from tipr_nb.interop import recognise
from tipr_nb.training import (
    RECIPES,
    Recipe,
    Retriever,
    build_encoder,
    build_objectives,
    make_optimizer,
)
from tipr_nb.training import NaNGuard

VIT_B_16 = dict(
    embed_dim=512,
    vision_layers=12,
    vision_width=768,
    vision_patch_size=16,
    context_length=77,
    vocab_size=49408,
    transformer_width=512,
    transformer_heads=8,
    transformer_layers=12,
)
TINY = VIT_B_16 | dict(
    vision_layers=2, vision_width=128, transformer_layers=2
)  # for trying this file out
N_IDS = 11003  # CUHK-PEDES' training identities

# peer's class -> (our recipe, losses that correspond, losses as released, the command line it was released with, our objective that computes the same number from the same weights)
CASES = {
    "SEN": (
        "sen",
        "sdm+mae+id+tri",
        "sdm+mae+id+tri",
        ["--need_MAE", "--mae_loss_weight", "10", "--tri_loss_weight", "10", "--mask_ratio", "0.7"],
    ),
    "IRRA": ("sdm-id", "sdm+id", "sdm+id+mlm", ["--MLM"]),
}


class Half:
    "`torch` as a module of the peer sees it on a CPU: its hard-coded half precision is single precision."

    float16 = half = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


class Peer:
    "A peer's model and optimizer, built by its own code."

    def __init__(
        self,
        folder: Path,
        losses: str | None,
        batch: int,
        device: str,
        size: dict,
        image_size: tuple[int, int],
    ):
        self.off, self.device = [], device
        sys.dont_write_bytecode = True
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            self.build, solver, options = (
                importlib.import_module(m) for m in ("model.build", "solver", "utils.options")
            )
        except ImportError as e:
            raise TiprError(
                f"{folder.name}: not a checkout of IRRA or SEN ({e}); give the folder that holds its train.py"
            ) from None
        self.name = next((n for n in CASES if hasattr(self.build, n)), "")
        if not self.name:
            raise TiprError(
                f"{folder.name}: neither IRRA nor SEN in model/build.py; give a checkout of one of them"
            )
        self.recipe, self.common, self.released, flags = CASES[self.name]
        self.losses = losses or self.common
        argv, sys.argv = (
            sys.argv,
            [
                "train.py",
                "--batch_size",
                str(batch),
                "--lr",
                "1e-5",
                "--img_aug",
                "--loss_names",
                self.losses,
                *flags,
            ],
        )
        try:
            args = options.get_args()
        finally:
            sys.argv = argv
        args.img_size = image_size
        self.patch(size, image_size)
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = self.build.build_model(args, N_IDS).to(device).train()
            self.optimizer = solver.build_optimizer(args, self.model)

    def patch(self, size: dict, image_size: tuple[int, int]):
        "Random weights instead of a download; on a CPU single precision instead of half."
        clip = importlib.import_module("model.clip_model").CLIP
        cfg = size | dict(image_resolution=image_size, stride_size=size["vision_patch_size"])
        self.build.build_CLIP_from_openai_pretrained = lambda *a, **k: (clip(**cfg), cfg)
        self.off.append("the download of OpenAI's weights (its own CLIP class, random weights)")
        if self.device != "cpu":
            return
        self.build.convert_weights, self.build.torch = (lambda model: None), Half()
        torch.Tensor.half = lambda x, *a, **k: x.float()  # type: ignore[method-assign]
        self.off.append(
            "half precision written into its model (convert_weights, .half(), torch.float16), which a CPU cannot run: fp32 as ours"
        )

    def step(self, batch: dict):
        "A step in the order of its training loop, with its wait for the loss."
        batch = {k: v.to(self.device) for k, v in batch.items()}
        told = self.model(batch)
        total = sum(v for k, v in told.items() if "loss" in k)
        total.item()
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()


class Ours:
    "This package's step, as its training loop takes it."

    def __init__(self, recipe: Recipe, device: str):
        torch.manual_seed(0)
        self.recipe, self.device = recipe, device
        encoder = build_encoder(recipe)
        self.model = Retriever(encoder, build_objectives(recipe, encoder, N_IDS)).to(device).train()
        self.optimizer = make_optimizer(self.model, recipe)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.guard, self.at = NaNGuard([*self.model.objectives, "gradient"], device), 0

    def step(self, batch: Batch):
        batch = batch.map(lambda t: t).to(
            self.device
        )  # a batch of its own, whose pictures are made from bytes again
        with torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            total, losses, _ = self.model(batch)
        total.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        self.guard.watch([*losses.values(), norm], self.at)
        if self.device == "cpu" or self.at % 50 == 0:
            self.guard.check()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at += 1


def batches(ours: Ours, b: int) -> tuple[Batch, dict]:
    "The same pairs for both: bytes and tokens as long as the longest here, normalised floats and 77 tokens there."
    encoder, size = ours.model.encoder, ours.recipe.image_size
    generator, texts = torch.Generator().manual_seed(0), captions(b)
    raw, tokens = (
        torch.randint(0, 256, (b, 3, *size), dtype=torch.uint8, generator=generator),
        encoder.tokenize(texts),
    )
    batch, padded = (
        Batch(None, tokens, torch.arange(b) // 2, texts, torch.arange(b), torch.arange(b), raw=raw),
        torch.zeros(b, 77, dtype=torch.long),
    )
    padded[:, : tokens.shape[1]] = tokens
    masked, labels = padded.clone(), torch.zeros_like(padded)
    chosen = (torch.rand(b, 77, generator=generator) < 0.15) & (padded > 0) & (padded < 49405)
    labels[chosen], masked[chosen] = padded[chosen], 49405
    return batch, dict(
        images=batch.images.clone(),
        caption_ids=padded,
        pids=batch.ids,
        image_ids=batch.image_index,
        mlm_ids=masked,
        mlm_labels=labels,
    )


def agree(ours: Ours, peer: Peer, batch: Batch, theirs: dict) -> dict[str, tuple[float, float]]:
    "Losses of both from the same weights, where both compute the same; in evaluation mode, where nothing is drawn at random."
    _, core, rest = recognise(
        {k: v.detach().float().cpu() for k, v in peer.model.state_dict().items()}, peer.name
    )
    ours.model.encoder.clip.load_state_dict(core, strict=False)
    if "classifier.weight" in rest:
        ours.model.objectives["ID"].classifier.load_state_dict(
            {k: rest[f"classifier.{k}"] for k in ("weight", "bias")}
        )
    with torch.no_grad():
        told = peer.model({k: v.to(peer.device) for k, v in theirs.items()})
        _, losses, _ = ours.model(batch.map(lambda t: t).to(ours.device))
    return {
        n: (told[k].item(), losses[n].item())
        for n, k in {"SDM": "sdm_loss", "ID": "id_loss"}.items()
        if n in losses
    }


def timed(f, cpu: list[float]):
    "Run `f` and note its processor time, which other programs disturb less than the clock."
    start = time.process_time()
    f()
    cpu.append(time.process_time() - start)


def bench(args, losses: str | None = None) -> list[dict]:
    "Our step and the peer's, in turns."
    size, arch, image = (
        (TINY, None, (64, 32)) if args.tiny else (VIT_B_16, "ViT-B-16-quickgelu", (384, 128))
    )
    torch.manual_seed(0)
    peer = Peer(args.peer, losses, args.batch, args.device, size, image)
    precision = "no" if args.device == "cpu" else "bf16"
    recipe = RECIPES[peer.recipe].replace(
        pretrained=None, precision=precision, image_size=image, **({"arch": arch} if arch else {})
    )
    ours = Ours(recipe, args.device) if arch else tiny(recipe, args.device, size)
    batch, theirs = batches(ours, args.batch)
    if not losses:
        print(f"\n{peer.name}, switched off:" + "".join(f"\n   - {o}" for o in peer.off))
        for n, (a, b) in agree(ours, peer, batch, theirs).items():
            print(f"   same weights, same batch: {n} {a:.4f} there, {b:.4f} here")
    comparable = peer.losses == peer.common
    calls = {
        f"{peer.name}: {peer.losses}": lambda: peer.step(theirs),
        f"tipr_nb: {peer.recipe}": lambda: ours.step(batch),
    }
    cpu: dict[str, list[float]] = {k: [] for k in calls}
    times = interleave(
        {k: partial(timed, f, cpu[k]) for k, f in calls.items()}, args.repeats, warmup=1
    )
    peer.optimizer.zero_grad()  # between its steps the peer keeps its gradients; both start without
    peaks = {k: peak_bytes(f) / 2**30 for k, f in calls.items()}
    busy, first, last = {k: median(v[1:]) for k, v in cpu.items()}, *calls
    wall = medians(times)
    return [
        dict(
            case=f"{peer.name} {peer.losses}, {args.device}",
            peer=peer.name,
            who=k.split(":")[0],
            what=k.split(": ")[1],
            same_losses=comparable,
            device=args.device,
            batch=args.batch,
            precision="fp32" if args.device == "cpu" else "bf16" if k == last else "fp16",
            tokens=batch.tokens.shape[1] if k == last else 77,
            seconds=round(wall[k], 3),
            speedup=round(wall[first] / wall[k], 3),
            cpu_seconds=round(busy[k], 3),
            cpu_speedup=round(busy[first] / busy[k], 3),
            peak_gib=round(peaks[k], 3),
            times=[round(t, 3) for t in times[k]],
            switched_off=peer.off if k == first else [],
        )
        for k in calls
    ]


def tiny(recipe: Recipe, device: str, size: dict) -> Ours:
    "Our side at the size used to try this file out."
    from tipr_nb.training import loop
    from tipr_nb.models import PersonCLIP

    cfg = dict(
        embed_dim=size["embed_dim"],
        quick_gelu=True,
        vision_cfg=dict(
            image_size=64, layers=size["vision_layers"], width=size["vision_width"], patch_size=16
        ),
        text_cfg=dict(
            context_length=77,
            vocab_size=size["vocab_size"],
            width=size["transformer_width"],
            heads=size["transformer_heads"],
            layers=size["transformer_layers"],
        ),
    )
    globals()["build_encoder"] = lambda r: PersonCLIP("ViT-B-16-quickgelu", r.image_size, cfg)
    return Ours(recipe, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", type=Path, required=True, help="folder of a checkout of IRRA or SEN"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=4, help="pairs in the batch")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="towers of two layers and small pictures, to try this out; writes nothing",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TiprError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if not args.peer.is_dir():
        raise TiprError(
            f"--peer {args.peer.name}: no such folder; clone IRRA or SEN and give its folder"
        )
    args.peer = args.peer.resolve()
    set_threads(args.threads)
    rows = bench(args)
    name = rows[0]["peer"]
    if CASES[name][1] != CASES[name][2]:
        rows += bench(args, CASES[name][2])
    show(
        [
            {
                k: v
                for k, v in r.items()
                if k not in ("times", "case", "switched_off", "peer", "device")
            }
            for r in rows
        ],
        f"a training step, batch {args.batch}, {args.device}",
    )
    print(
        f"   tipr_nb's {rows[1]['what']} takes {rows[1]['speedup']:.2f}x less time than {name}'s {rows[0]['what']} ({rows[1]['cpu_speedup']:.2f}x less processor time), and {rows[1]['peak_gib'] / rows[0]['peak_gib']:.0%} of the memory"
    )
    if not args.tiny:
        print(f"written to {write_result('train', rows, key='case').name}")


if __name__ == "__main__":
    run(main)
