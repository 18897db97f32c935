"""One process of a parallel training run: `python parallel_run.py DATA OUT OBJECTIVE STEPS` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set."""
import json, os, sys
from pathlib import Path

import torch

from tipr_nb.data import load_dataset
from tipr_nb.training import Callback, RECIPES, train


class Losses(Callback):
    "Losses of each step, and the end after so many."
    def __init__(self, steps): self.steps, self.seen = steps, []

    def on_step(self, trainer, losses):
        self.seen.append({k: float(v) for k, v in losses.items()})
        trainer.stop = trainer.step >= self.steps


def main(data, out, objective, steps):
    torch.set_num_threads(1)
    recipe = RECIPES["clip-tiny"].but(objectives=[tuple(o) for o in json.loads(objective)], arch="tipr-nano", pretrained=None, precision="no", batch_size=16, sampler="identity",
                                      lr=1e-3, eps=1e-6, warmup_epochs=0., epochs=50)
    dataset = load_dataset("synth-pedes", data)
    watch = Losses(int(steps))
    train(recipe, dataset, out, device="cpu", callbacks=[watch], verbose=False)
    if int(os.environ.get("RANK", 0)) == 0: Path(out, "losses.json").write_text(json.dumps(watch.seen))


if __name__ == "__main__": main(*sys.argv[1:])
