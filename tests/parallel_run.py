"""One process of a training run: `python parallel_run.py DATA OUT OBJECTIVES EPOCHS [SAVE_EVERY [SETTINGS]]`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set where there are several."""

import json, os, sys
from pathlib import Path

import torch

from tipr_nb.core import write_json
from tipr_nb.data import load_dataset
from tipr_nb.training import Callback, RECIPES, train


class Losses(Callback):
    "Keeps the losses of each step."

    def __init__(self):
        self.seen = []

    def on_step(self, trainer, losses):
        self.seen.append({k: float(v) for k, v in losses.items()})


def drawn(index):
    "Stand-ins for drawn pictures, the same for the same captions whoever asks."
    return torch.stack(
        [torch.randn(3, 96, 32, generator=torch.Generator().manual_seed(int(i))) for i in index]
    )


def main(data, out, objectives, epochs, save_steps="0", settings="{}"):
    torch.set_num_threads(1)
    objectives = json.loads(objectives)
    gea = bool({name for name, _ in objectives} & {"TGTE", "GIF"})
    recipe = RECIPES["clip-tiny"].replace(
        **dict(
            objectives=objectives,
            arch="tipr-nano",
            pretrained=None,
            precision="no",
            batch_size=16,
            sampler="identity",
            lr=5e-4,
            eps=1e-6,
            warmup_epochs=0.0,
            epochs=int(epochs),
            extra_fields=("generated", "other") if gea else (),
        )
        | json.loads(settings)
    )
    watch = Losses()
    train(
        recipe,
        load_dataset("synth-pedes", data),
        out,
        device="cpu",
        callbacks=[watch],
        save_steps=int(save_steps) or None,
        verbose=False,
        extra={"generated": drawn} if gea else None,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(Path(out, "losses.json"), watch.seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
