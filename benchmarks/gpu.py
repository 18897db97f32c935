"""What a GPU should say in under ten minutes: steps against a peer, the full-data rows of the saturation grid, and generating pictures. One command, with a limit that it keeps itself:

    python -m benchmarks.gpu --peer PATH_OF_IRRA --peer PATH_OF_SEN        # on a machine with a GPU
    python -m benchmarks.gpu --device cpu --limit 240 --small             # to try this file out: tiny towers, few steps; writes nothing

Each part runs in a process of its own and is ended when its share of the time is used up; what ended early says so. The result names the card, the date and the command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import run, show, write_result

ROOT = Path(__file__).resolve().parent.parent
TRAIN = """
import json, sys, tempfile
from pathlib import Path
from tipr_nb import RECIPES, evaluate, load_dataset, train
spec = json.loads(sys.argv[1])
data = load_dataset("synth-pedes")
recipe = RECIPES[spec["recipe"]].replace(epochs=spec["epochs"], eval_every=max(1, spec["epochs"]//5), seed=spec["seed"])
with tempfile.TemporaryDirectory() as home:
    run = train(recipe, data, Path(home)/"run", device=spec["device"], max_seconds=spec["seconds"], verbose=False)
    scores = evaluate(run.model, data.test, n_boot=0)
print(json.dumps(dict(status=run.status, kept_epoch=run.best.get("epoch"), train_seconds=run.train_seconds, r1=scores.r1, mAP=scores.mAP, mINP=scores.mINP)))
"""
STEP = """
import json, sys, time
import torch
from tipr_nb.data import Batch
from tipr_nb.training import RECIPES, Retriever, build_encoder, build_objectives, make_optimizer
spec = json.loads(sys.argv[1])
device = torch.device(spec["device"])
changes = dict(pretrained=None)
recipe = RECIPES[spec["recipe"]].replace(**changes)
encoder = build_encoder(recipe)
model = Retriever(encoder, build_objectives(recipe, encoder, 11003)).to(device).train()
optimizer = make_optimizer(model, recipe)
h, w = recipe.image_size
n = spec["batch"]
torch.manual_seed(0)
pictures = torch.randn(n, 3, h, w, device=device)
captions = ["a woman in a red coat with a black bag and white shoes"]*n
words = encoder.tokenize(captions).to(device)
ids = torch.arange(n, device=device)//2
batch = Batch(pictures, words, ids, captions, pixels=pictures.sigmoid(), extra=dict(generated=pictures, other=pictures))
def step():
    with torch.autocast(device.type, torch.bfloat16, enabled=spec["bf16"]):
        total = model(batch)[0]
    total.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda": torch.cuda.synchronize()
times = []
for _ in range(spec["repeats"]):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
peak = torch.cuda.max_memory_allocated()/2**30 if device.type == "cuda" else None
print(json.dumps(dict(seconds=sorted(times)[len(times)//2], peak_gib=peak)))
"""
DRAW = """
import json, sys, time
from tipr_nb import PersonGenerator
spec = json.loads(sys.argv[1])
generator = PersonGenerator.from_pretrained("generator-synth-world", device=spec["device"])
captions = [f"a man in a {c} coat, number {i}" for i in range(spec["pictures"]//4) for c in ("red", "blue", "green", "black")]
generator.generate(captions[:8])
start = time.perf_counter()
generator.generate(captions)
print(json.dumps(dict(pictures_per_second=len(captions)/(time.perf_counter() - start))))
"""


@dataclass
class Part:
    "One measurement: a program, what it is told, and the seconds it may take."

    what: str
    code: str
    spec: dict
    seconds: float


def run_part(part: Part) -> dict:
    "The part's figures, or why there are none."
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", part.code, json.dumps(part.spec)],
            capture_output=True,
            text=True,
            timeout=part.seconds,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return dict(what=part.what, failed=f"ended after {part.seconds:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return dict(what=part.what, failed=reason[0][:200])
    return dict(
        what=part.what, **json.loads(lines[-1]), wall_seconds=round(time.perf_counter() - start, 1)
    )


def peer_part(path: Path, device: str, batch: int, seconds: float, small: bool) -> dict:
    "A step beside a peer's, by `benchmarks.train`, which prints what it had to switch off."
    command = [
        sys.executable,
        "-m",
        "benchmarks.train",
        "--peer",
        str(path),
        "--device",
        device,
        "--batch",
        str(batch),
        *(["--tiny"] if small else []),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return dict(what=f"step beside {path.name}", failed=f"ended after {seconds:.0f} s")
    if done.returncode:
        return dict(
            what=f"step beside {path.name}",
            failed=(done.stderr.strip().splitlines() or ["?"])[-1][:200],
        )
    return dict(what=f"step beside {path.name}", printed=done.stdout.strip().splitlines()[-12:])


def parts(device: str, small: bool) -> list[Part]:
    "What is measured, the most valuable first."
    bf16 = device == "cuda"
    suffix = "-tiny" if small else ""
    steps = [
        Part(
            f"step of {r}{suffix}, batch {b}",
            STEP,
            dict(
                recipe=f"{r}{suffix}", batch=b, bf16=bf16, device=device, repeats=3 if small else 8
            ),
            90,
        )
        for r in ("sen", "gea")
        for b in ((8,) if small else (64, 128))
    ]
    epochs = 1 if small else 10
    rows = [
        Part(
            f"{r}, all identities, {epochs} epochs, seed {s}",
            TRAIN,
            dict(recipe=r, epochs=epochs, seed=s, device=device, seconds=20 if small else 60),
            120,
        )
        for s in ((0,) if small else (0, 1, 2))
        for r in (("tal-tiny",) if small else ("tal-tiny", "sen-tiny"))
    ]
    draw = Part("generated pictures", DRAW, dict(device=device, pictures=16 if small else 4096), 60)
    return [*steps, draw, *rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer",
        type=Path,
        action="append",
        default=[],
        help="folder of a checkout of IRRA or SEN; may be given twice",
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=540, help="seconds that all of it may take")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny towers and few steps, to try this out; writes nothing",
    )
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; try the file with --device cpu --small")
    end = time.perf_counter() + args.limit
    rows = []
    for peer in args.peer:
        rows.append(
            peer_part(
                peer,
                args.device,
                4 if args.small else 64,
                min(120, end - time.perf_counter()),
                args.small,
            )
        )
    for part in parts(args.device, args.small):
        left = end - time.perf_counter()
        if left < 15:
            rows.append(dict(what=part.what, failed="no time left"))
            continue
        part.seconds = min(part.seconds, left)
        rows.append(run_part(part))
        print(rows[-1], flush=True)
    show(rows)
    if not args.small:
        write_result("gpu", rows)


if __name__ == "__main__":
    run(main)
