"""Whether a recipe is the paper's method: the released classes of IRRA, SEN or RDE beside ours, on the same weights, pictures, captions, identities and random draws.

    python -m benchmarks.parity --peer CHECKOUT                   # ViT-B/16 at 384x128, fp32, batch 8, five steps
    python -m benchmarks.parity --peer CHECKOUT --arch small        # CLIP's layout with 2 layers of width 256: the same code in seconds
    python -m benchmarks.parity --peer CHECKOUT --only settings     # no steps: settings, batches of an epoch, masked captions
    python -m benchmarks.parity --peer CHECKOUT --evaluate --arch small   # their evaluator against ours, on one model

Compares features, losses, gradients, the learning rate and decay of every parameter, the schedule and weights after some steps of Adam; then, setting by setting, its options and ours, the batches that its sampler and ours draw, and the captions that its helper and ours mask.
Everything else comes from the recipe as shipped and from the checkout's own options; what had to be patched to run its code on a CPU is listed.
The checkout is run, so take it from its authors. Results go to benchmarks/results/parity-NAME.json and settings-NAME.json.
"""

from __future__ import annotations

import argparse, ast, contextlib, hashlib, importlib.util, random, re, sys, tempfile, types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np, torch
from torch import Tensor, nn

from benchmarks.common import run, set_threads, show, write_result
from tipr_nb.core import TiprError
from tipr_nb.data import Batch, IGNORED, PersonDataset, Split, TrainTransform, load_dataset
from tipr_nb.evaluation import evaluate
from tipr_nb.methods import TokenMasker, pattern_tagger
from tipr_nb.models import PersonCLIP, write_safetensors
from tipr_nb.synth import make_synth_pedes
from tipr_nb.training import (
    RECIPES,
    Recipe,
    Retriever,
    TrainStep,
    build_encoder,
    lr_factor,
    make_accelerator,
    make_train_loader,
    param_groups,
)

TOWER = (
    "visual.",
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_scale",
)

DECODER = {
    "norm_1": "image_norm",
    "norm_2": "text_norm",
    "decoder_embed": "embed",
    "mask_token": "mask_token",
    "norm_4": "query_norm",
    "cross_attn_Text": "cross_attention",
    "norm_6": "joint_norm",
    "cross_modal_transformer_mae": "cross_transformer",
    "norm_7": "final_norm",
    "decoder_pred": "head",
}
GUESSER = {
    "ln_pre_t": "text_norm",
    "ln_pre_i": "image_norm",
    "cross_attn": "cross_attention",
    "cross_modal_transformer": "cross_transformer",
    "ln_post": "final_norm",
    "mlm_head.dense": "dense",
    "mlm_head.ln": "head_norm",
    "mlm_head.fc": "head",
}


@dataclass
class Peer:
    "A project whose released code is known here."

    name: str
    recipe: str  # ours
    folder: str  # of its code, inside the checkout
    model: str  # class in model/build.py
    options: str  # its run script's
    names: dict[str, str]  # beginning of a parameter's name there -> here; the towers' are added
    losses: dict[str, str]  # there -> here
    sampler: str = ""  # class in datasets/sampler.py; empty: a shuffled order
    columns: int = 4  # of its records
    masker: tuple[str, str] | None = (
        None  # class and method in datasets/bases.py that mask a caption's ids
    )


def with_prefix(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {k: f"{prefix}.{v}" for k, v in names.items()}


BRANCH = {"mlp.layers.0": "hidden", "mlp.bns.0": "norm", "mlp.layers.1": "out"}
RDE_NAMES = {
    f"visul_emb_layer.{k}": f"encoder.addons.tse.image.{v}"
    for k, v in ({"fc": "linear"} | BRANCH).items()
} | {
    f"texual_emb_layer.{k}": f"encoder.addons.tse.text.{v}"
    for k, v in ({"linear": "linear"} | BRANCH).items()
}
CLASSIFIER = {"classifier": "objectives.ID.classifier"}
PEERS = [
    Peer(
        "irra",
        "irra",
        ".",
        "IRRA",
        "--img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id --num_epoch 60",
        CLASSIFIER | with_prefix("objectives.IRR.guesser", GUESSER),
        {"sdm_loss": "SDM", "id_loss": "ID", "mlm_loss": "IRR"},
        masker=("ImageTextMLMDataset", "_build_random_masked_tokens_and_labels"),
    ),
    Peer(
        "clip",
        "clip",
        ".",
        "IRRA",
        "--img_aug --batch_size 64 --loss_names itc --num_epoch 60",
        {},
        {"itc_loss": "ITC"},
    ),
    Peer(
        "sen",
        "sen",
        ".",
        "SEN",
        "--img_aug --batch_size 128 --need_MAE --mae_loss_weight 10 --tri_loss_weight 10 --mask_ratio 0.7 --lr 1e-5 --loss_names sdm+mae+id+tri --num_epoch 60 --lrscheduler cosine",
        CLASSIFIER | with_prefix("objectives.TIR.decoder", DECODER),
        {"sdm_loss": "SDM", "id_loss": "ID", "mae_loss": "TIR", "tri_loss": "CMT"},
        "RandomIdnumSampler",
        masker=("ImageTextMAEDataset", "_build_random_masked_tokens_and_labels"),
    ),
    Peer(
        "rde",
        "rde",
        "2024-CVPR-RDE",
        "RDE",
        "--img_aug --txt_aug --batch_size 64 --select_ratio 0.3 --tau 0.015 --margin 0.1 --loss_names TAL+sr0.3_tau0.015_margin0.1_n0.0 --num_epoch 60",
        RDE_NAMES,
        {"bge_loss+tse_loss": "CCD"},
        masker=("ImageTextDataset", "txt_data_aug"),
    ),
]
CODE = (
    "model/build.py",
    "model/clip_model.py",
    "model/objectives.py",
    "solver/build.py",
    "solver/lr_scheduler.py",
    "datasets/sampler.py",
    "datasets/build.py",
    "utils/options.py",
)
REVISIONS = {"IRRA": "3d8705306d6a", "SEN": "57420976021f", "RDE": "deb346b17b55"}


SMALL = dict(
    embed_dim=512,
    quick_gelu=True,
    vision_cfg=dict(image_size=224, layers=2, width=256, head_width=64, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=256, heads=4, layers=2),
)


def register_small(home: Path) -> str:
    "A small tower of CLIP's layout, known to open_clip under the name that is returned."
    import json, open_clip

    (home / "parity-small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(home / "parity-small.json")
    return "parity-small"


def revision_of(folder: Path) -> str:
    "Twelve hex digits of the code that is compared."
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def find_peer(checkout: str, recipe: str | None) -> tuple[Peer, Path]:
    "Which project a checkout is; another one, or another revision, is a `TiprError`."
    for peer in PEERS:
        folder = Path(checkout) / peer.folder
        build = folder / "model" / "build.py"
        if (
            recipe not in (None, peer.recipe)
            or not build.is_file()
            or f"class {peer.model}(" not in build.read_text(encoding="utf-8")
        ):
            continue
        missing = [name for name in CODE if not (folder / name).is_file()]
        if missing:
            raise TiprError(f"{checkout}: {peer.model} without {missing[0]}; give a whole checkout")
        found = revision_of(folder)
        if found != REVISIONS[peer.model]:
            raise TiprError(
                f"{checkout}: {peer.model} at another revision ({found}) than the one compared here ({REVISIONS[peer.model]}); check out the revision named in benchmarks/README.md"
            )
        if peer.recipe not in RECIPES:
            raise TiprError(
                f"{peer.recipe}: no such recipe in this version; choose another checkout or --recipe"
            )
        return peer, folder
    raise TiprError(
        f"{checkout}: neither IRRA, SEN nor RDE; give the folder of a checkout of one of them"
    )


def load_file(path: Path, name: str) -> ModuleType:
    "A module of the checkout by its file."
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_package(folder: Path, name: str) -> ModuleType:
    "A package of the checkout, under its own name."
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


PATCHES = [
    "weights stay fp32: convert_weights does nothing",
    "Tensor.half() and Tensor.to(float16) give fp32",
    "Tensor.cuda() stays on the CPU",
]


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    "What the released code computes in half precision or on a GPU, in fp32 on a CPU."
    to = torch.Tensor.to

    instead = {torch.float16: torch.float32, "cuda": "cpu"}

    def full(self, *args, **kwargs):
        return to(self, *(instead.get(a, a) for a in args), **kwargs)

    with (
        mock.patch.object(torch.Tensor, "half", torch.Tensor.float),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *a, **k: self),
        mock.patch.object(torch.Tensor, "to", full),
    ):
        yield


@contextlib.contextmanager
def drawn(noise: Tensor) -> Iterator[None]:
    "torch.rand gives this noise to whoever asks for a number per patch; a further column, for CLS, is in front."
    real, (b, n) = torch.rand, noise.shape

    def rand(*size, **kwargs):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if shape == (b, n):
            return noise.clone()
        if shape == (b, n + 1):
            return torch.cat([torch.zeros(b, 1), noise], 1)
        return real(*size, **kwargs)

    with mock.patch.object(torch, "rand", rand):
        yield


def options_of(
    folder: Path, peer: Peer, weights: Path, image_size: tuple[int, int], patch: int
) -> argparse.Namespace:
    "The checkout's own options, as its run script gives them."
    module = load_file(folder / "utils" / "options.py", "peer_options")
    with mock.patch.object(sys, "argv", ["train.py", *peer.options.split()]):
        args = module.get_args()
    args.pretrain_choice, args.img_size, args.stride_size = str(weights), tuple(image_size), patch
    return args


def our_name(theirs: str, names: dict[str, str]) -> str | None:
    "The name here of a parameter there; None where there is none."
    if theirs.startswith("base_model."):
        return "encoder.clip." + theirs.removeprefix("base_model.")
    for start in sorted(names, key=len, reverse=True):
        if theirs == start or theirs.startswith(start + "."):
            return names[start] + theirs[len(start) :]
    return None


def unpacked(name: str, value: Tensor, ours: set[str]) -> dict[str, Tensor]:
    "A packed attention's tensor under the names of our separate maps."
    stem, _, last = name.rpartition(".")
    if name in ours:
        return {name: value}
    if last in ("in_proj_weight", "in_proj_bias"):
        kind, d = last.removeprefix("in_proj_"), len(value) // 3
        return {f"{stem}.query.{kind}": value[:d], f"{stem}.key_value.{kind}": value[d:]}
    if ".out_proj." in name:
        return {name.replace(".out_proj.", ".out."): value}
    return {}


class Pairing:
    "Their parameters under our names."

    def __init__(self, theirs: nn.Module, ours: nn.Module, names: dict[str, str]):
        self.theirs, self.names = theirs, names
        self.shapes = {n: p.shape for n, p in ours.named_parameters()}

    def tensors(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        "A tensor of each of their parameters (the weight, its gradient), as ours are cut and named."
        found = {}
        for name, p in self.theirs.named_parameters():
            value, own = of(p), our_name(name, self.names)
            if value is None or own is None:
                continue
            found |= {
                k: v.detach().clone().reshape(self.shapes[k])
                for k, v in unpacked(own, value, set(self.shapes)).items()
                if k in self.shapes
            }
        return found

    def settings(self, groups: list[dict]) -> dict[str, tuple[float, float]]:
        "(learning rate, decay) by our name."
        rule = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        found = {}
        for name, p in self.theirs.named_parameters():
            own = our_name(name, self.names)
            if id(p) in rule and own is not None:
                found |= dict.fromkeys(unpacked(own, p, set(self.shapes)), rule[id(p)])
        return found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    "Norm of the difference over the norm of `b`, over all tensors that both have."
    both = a.keys() & b.keys()
    apart = sum(float((a[k].detach().double() - b[k].double()).square().sum()) for k in both)
    return (apart / max(sum(float(b[k].double().square().sum()) for k in both), 1e-300)) ** 0.5


def their_batch(batch: Batch) -> dict[str, Tensor]:
    "A batch as the released code takes it: captions at 77 tokens, label 0 where no word is asked."
    full = torch.zeros(len(batch), 77, dtype=torch.long)
    full[:, : batch.tokens.shape[1]] = batch.tokens
    out = {
        "images": batch.images,
        "caption_ids": full,
        "pids": batch.ids,
        "label_hat": torch.ones(len(batch)),
    }
    if batch.mask_labels is not None:
        labels = torch.zeros_like(full)
        labels[:, : batch.mask_labels.shape[1]] = batch.mask_labels.masked_fill(
            batch.mask_labels == IGNORED, 0
        )
        out |= {"mlm_ids": full.clone(), "mlm_labels": labels}
    return out


def batch_statistics(
    batches: list[np.ndarray], ids: np.ndarray, photos: np.ndarray
) -> dict[str, float]:
    "Of the batches of an epoch: how many identities, how many rows with a partner, how many partners show the same photo."
    count, partner, same = [], [], []
    for rows in batches:
        _, at, n = np.unique(ids[rows], return_inverse=True, return_counts=True)
        count.append(len(n))
        partner.append((n[at] > 1).mean())
        _, at, n = np.unique(photos[rows], return_inverse=True, return_counts=True)
        same.append((n[at] > 1).mean())
    return dict(
        batches=len(batches),
        last=len(batches[-1]),
        identities=round(float(np.mean(count)), 2),
        least=int(min(count)),
        most=int(max(count)),
        with_partner=round(float(np.mean(partner)), 3),
        same_photo=round(float(np.mean(same)), 3),
    )


def crowd_of(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Identities and photos of the captions of a set like CUHK-PEDES: about three photos of a person and two captions a photo."
    photos = np.random.default_rng(seed).integers(1, 6, n)
    return np.repeat(np.arange(n), 2 * photos), np.repeat(np.arange(photos.sum()), 2)


def our_batches(recipe: Recipe, ids: np.ndarray, photos: np.ndarray, seed: int) -> list[np.ndarray]:
    "Caption indices of the batches of an epoch, as the recipe's loader draws them."
    count = photos.max() + 1
    person = np.zeros(count, np.int64)
    person[photos] = ids
    blank = np.zeros((count, 16, 8, 3), np.uint8)
    split = Split(
        "train",
        [Path(f"{i}.png") for i in range(count)],
        person,
        ["a person"] * len(ids),
        ids,
        photos,
        {"pixels": blank},
    )
    r = recipe.replace(caption_transform=None, image_size=(16, 8), seed=seed)
    return list(
        make_train_loader(
            r, split, lambda captions: torch.ones(len(captions), 1, dtype=torch.long)
        ).sampler
    )


def their_batches(
    peer: Peer, folder: Path, args: argparse.Namespace, ids: np.ndarray, seed: int
) -> list[np.ndarray]:
    "The same by the checkout's sampler, cut into batches as a DataLoader does it."
    order = np.random.default_rng(seed).permutation(len(ids))
    if peer.sampler:
        random.seed(seed)
        np.random.seed(seed)
        records = [(int(i), *[None] * (peer.columns - 1)) for i in ids]
        sampler = getattr(
            load_file(folder / "datasets" / "sampler.py", "peer_sampler"), peer.sampler
        )
        order = np.array(list(sampler(records, args.batch_size, args.num_instance)))
    return [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]


def batches_table(
    peer: Peer, folder: Path, args: argparse.Namespace, recipe: Recipe, epochs: int = 5
) -> list[dict]:
    "Mean and standard deviation over some epochs of what their batches hold and what ours do."
    ids, photos = crowd_of()
    theirs = [
        batch_statistics(their_batches(peer, folder, args, ids, seed), ids, photos)
        for seed in range(epochs)
    ]
    ours = [
        batch_statistics(our_batches(recipe, ids, photos, seed), ids, photos)
        for seed in range(epochs)
    ]
    rows = []
    for name in theirs[0]:
        a, b = (np.array([r[name] for r in results], float) for results in (theirs, ours))
        spread = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / epochs)
        apart = abs(a.mean() - b.mean())
        rows.append(
            dict(
                statistic=name,
                theirs=round(a.mean(), 4),
                theirs_sd=round(a.std(ddof=1), 4),
                ours=round(b.mean(), 4),
                ours_sd=round(b.std(ddof=1), 4),
                holds=bool(apart <= max(4 * spread, 0.005 * abs(a.mean()))),
            )
        )
    return rows


def method_of(path: Path, cls: str, name: str, space: dict) -> Callable:
    "A method of a class in a file that cannot be imported here, by its source alone."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls).body
    found = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return space[name]


def function_of(path: Path, name: str, space: dict) -> Callable:
    "The same for a function."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return space[name]


def masked_shares(before: list[np.ndarray], after: list[np.ndarray], mask: int) -> dict[str, float]:
    "Per cent of the words that are hidden and gone, and of the captions that changed."
    words = sum(len(ids) - 2 for ids in before)
    return {
        "hidden": 100 * sum(int((ids == mask).sum()) for ids in after) / words,
        "dropped": 100 * sum(len(a) - len(b) for a, b in zip(before, after)) / words,
        "captions changed": 100
        * np.mean([not np.array_equal(a, b) for a, b in zip(before, after)]),
    }


def masking_table(peer: Peer, folder: Path, captions: list[str]) -> list[dict]:
    "What their helper and our transform do to the same captions; NLTK's tagger is replaced by ours on both sides."
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer, tag = SimpleTokenizer(), pattern_tagger()
    encoder = dict(tokenizer.encoder) | {"<|mask|>": 49405}
    known: dict[str, list] = {}

    def pos_tag(words: list[str]) -> list:
        if words[0] not in known:
            known[words[0]] = tag(words[0]) if words[0] else []
        return [known[words[0]][0] if known[words[0]] else (words[0], "")]

    space = dict(random=random, np=np, torch=torch, nltk=types.SimpleNamespace(pos_tag=pos_tag))
    method = method_of(folder / "datasets" / "bases.py", *peer.masker, space)
    owner = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(encoder=encoder, decoder=tokenizer.decoder)
    )
    masker = TokenMasker(peer.name).bind(tokenizer)
    random.seed(0)
    before, theirs, ours = [], [], []
    for i, caption in enumerate(captions):
        ids = tokenizer([caption])[0].numpy()
        before.append(ids[: ids.argmax() + 1].copy())
        changed = method(owner, ids.copy())
        changed = np.asarray(changed[0] if isinstance(changed, tuple) else changed)
        theirs.append(changed[: int((changed != 0).sum())])
        new = masker(before[-1].copy(), caption, random.Random(i))
        ours.append(new[0] if isinstance(new, tuple) else new)
    a, b = masked_shares(before, theirs, 49405), masked_shares(before, ours, 49405)
    return [
        dict(statistic=k, theirs=round(a[k], 3), ours=round(b[k], 3), captions=len(captions))
        for k in a
    ]


def shown_transforms(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    "What their augmentation does, by the steps that torchvision names."
    import torchvision.transforms as T

    steps = function_of(folder / "datasets" / "build.py", "build_transforms", dict(T=T))(
        args.img_size, args.img_aug
    ).transforms
    found = {type(step).__name__: step for step in steps}
    erase = found["RandomErasing"]
    return {
        "mirrored": f"{found['RandomHorizontalFlip'].p:g}",
        "padding before the crop": f"{found['Pad'].padding:g}",
        "erased": f"{erase.p:g}, {erase.scale[0]:g} to {erase.scale[1]:g} of the picture, height over width {erase.ratio[0]:g} to {erase.ratio[1]:g}",
        "colour of what is erased": ", ".join(f"{v:.2g}" for v in erase.value)
        + " deviations from the mean",
    }


def their_losses(peer: Peer, args: argparse.Namespace) -> str:
    "Losses with their factors, as the options have them."
    names = {
        "sdm": "SDM",
        "id": "ID",
        "mlm": "IRR",
        "itc": "ITC",
        "mae": "TIR",
        "tri": "CMT",
        "TAL": "TAL, global + TSE",
    }
    found = []
    for part in args.loss_names.split("+"):
        if part not in names:
            continue
        weight = getattr(args, f"{part}_loss_weight", 1.0)
        found.append((names[part], weight))
    return ", ".join(f"{n} {w:g}" for n, w in sorted(found))


def our_losses(recipe: Recipe) -> str:
    "Losses with their factors, as the recipe has them."
    names = {"CCD": "TAL, global + TSE"}
    return ", ".join(
        f"{names.get(n, n)} {kw.get('weight', 1.0):g}"
        for n, kw in sorted(recipe.objectives, key=lambda o: names.get(o[0], o[0]))
    )


def settings_table(
    peer: Peer, folder: Path, args: argparse.Namespace, recipe: Recipe
) -> list[dict]:
    "Every option of theirs that can move a result, beside ours, from the options, the optimizer and the source."
    solver = load_package(folder, "solver")
    tiny = nn.ModuleDict({"x": nn.Linear(2, 2)})
    optimizer = solver.build_optimizer(args, tiny)
    d = optimizer.defaults
    source = (folder / "datasets" / "build.py").read_text(encoding="utf-8")
    training = source[source.index("if args.training") : source.index("val_img_loader")]
    theirs = {
        "losses": their_losses(peer, args),
        "batch": args.batch_size,
        "sampler": args.sampler
        if not peer.sampler
        else f"{peer.sampler}, up to {args.num_instance} pairs",
        "last odd batch": "left out" if "drop_last=True" in training else "kept",
        "captions masked": "yes" if peer.masker else "no",
        "epochs": args.num_epoch,
        "picture": "x".join(map(str, args.img_size)),
        "words read": args.text_length,
        "optimizer": type(optimizer).__name__,
        "learning rate": args.lr,
        "betas": f"{d['betas'][0]:g}, {d['betas'][1]:g}",
        "eps": d["eps"],
        "decay": args.weight_decay,
        "biases": f"{args.bias_lr_factor:g}x, decay {args.weight_decay_bias:g}",
        "warm-up, epochs": args.warmup_epochs,
        "warm-up from": args.warmup_factor,
        "schedule": args.lrscheduler,
        "last learning rate": args.target_lr,
        "learning rate moves": "once an epoch",
        "best epoch by": args.val_dataset,
        "left and right in mirrored photos": "unchanged",
    } | shown_transforms(folder, args)
    transform = TrainTransform(recipe.image_size, **recipe.augment)
    low, high = transform.area
    bias = next(rule for pattern, rule in recipe.groups if re.search(pattern, "x.bias"))
    pairs = max(recipe.per_id) if isinstance(recipe.per_id, tuple) else recipe.per_id
    samplers = {
        "random": "random",
        "rounds": f"RandomIdnumSampler, up to {pairs} pairs",
        "identity": f"evenly spread, {pairs} pairs",
    }
    masked = any(part == "mask" or part[0] == "mask" for part in caption_parts(recipe))
    ours = {
        "losses": our_losses(recipe),
        "batch": recipe.batch_size,
        "sampler": samplers[recipe.sampler],
        "last odd batch": "left out" if recipe.drop_last else "kept",
        "captions masked": "yes" if masked else "no",
        "epochs": recipe.epochs,
        "picture": "x".join(map(str, recipe.image_size)),
        "words read": 77,
        "optimizer": recipe.optimizer.capitalize(),
        "learning rate": recipe.lr,
        "betas": f"{recipe.betas[0]:g}, {recipe.betas[1]:g}",
        "eps": recipe.eps,
        "decay": recipe.weight_decay,
        "biases": f"{bias['lr_scale']:g}x, decay {bias['weight_decay']:g}",
        "warm-up, epochs": recipe.warmup_epochs,
        "warm-up from": recipe.warmup_start,
        "schedule": "cosine",
        "last learning rate": recipe.final_lr,
        "learning rate moves": {"epochs": "once an epoch", "steps": "every step"}[recipe.schedule],
        "best epoch by": "val",
        "left and right in mirrored photos": "exchanged" if recipe.swap_sides else "unchanged",
        "mirrored": f"{transform.flip:g}",
        "padding before the crop": f"{transform.pad:g}",
        "erased": f"{transform.erase:g}, {low:g} to {high:g} of the picture, height over width {transform.aspect[0]:g} to {transform.aspect[1]:g}",
        "colour of what is erased": "0, 0, 0 deviations from the mean",
    }
    return [
        dict(setting=k, theirs=theirs[k], ours=ours[k], same=is_same(theirs[k], ours[k]))
        for k in theirs
    ]


def caption_parts(recipe: Recipe) -> list:
    "The parts of a recipe's caption transform."
    from tipr_nb.data import caption_specs

    return caption_specs(recipe.caption_transform)


def is_same(a: object, b: object) -> bool:
    "Whether two settings are one."
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return bool(np.isclose(a, b, rtol=1e-6, atol=0))
    return a == b


def schedule_difference(folder: Path, args: argparse.Namespace, recipe: Recipe) -> float:
    "Largest difference between the factors on the learning rate, epoch by epoch."
    module, weight = (
        load_file(folder / "solver" / "lr_scheduler.py", "peer_schedule"),
        nn.Parameter(torch.zeros(1)),
    )
    optimizer = torch.optim.Adam([weight], lr=1.0)
    scheduler = module.LRSchedulerWithWarmup(
        optimizer,
        milestones=args.milestones,
        gamma=args.gamma,
        warmup_factor=args.warmup_factor,
        warmup_epochs=args.warmup_epochs,
        warmup_method=args.warmup_method,
        total_epochs=args.num_epoch,
        mode=args.lrscheduler,
        target_lr=args.target_lr,
        power=args.power,
    )
    worst = 0.0
    for epoch in range(args.num_epoch):
        own = lr_factor(
            epoch / recipe.epochs,
            recipe.warmup_epochs / recipe.epochs,
            recipe.warmup_start,
            recipe.final_lr,
        )
        worst = max(worst, abs(optimizer.param_groups[0]["lr"] - own))
        optimizer.step()
        scheduler.step()
    return worst


def compare(
    peer: Peer,
    folder: Path,
    arch: str,
    image_size: tuple[int, int],
    batch_size: int,
    steps: int,
    n_ids: int,
) -> list[dict]:
    "Rows of the comparison."
    home = Path(tempfile.mkdtemp())
    data = load_dataset(
        "synth-pedes", make_synth_pedes(home / "data", n_ids=(n_ids, 4, 5), seed=0, workers=1)
    )
    if arch == "small":
        arch = register_small(home)
    torch.manual_seed(0)
    source = PersonCLIP(arch, (224, 224))
    state = {
        k: v.detach().clone() for k, v in source.clip.state_dict().items() if k.startswith(TOWER)
    }
    torch.save(state, home / "clip.pt")
    write_safetensors(home / "clip.safetensors", state)
    recipe = RECIPES[peer.recipe].replace(
        arch=arch, pretrained=str(home / "clip.safetensors"), image_size=image_size, precision="no"
    )
    args = options_of(folder, peer, home / "clip.pt", image_size, source.patch_size[0])
    build, solver = load_package(folder, "model.build"), load_package(folder, "solver")
    build.convert_weights = lambda model: None
    with on_a_cpu():
        theirs = build.build_model(args, num_classes=data.train.n_ids).train()
    torch.manual_seed(0)
    step = TrainStep(
        recipe, build_encoder(recipe), data.train.n_ids, make_accelerator(recipe, "cpu")
    )
    ours = step.retriever.train()
    pairing = Pairing(theirs, ours, peer.names)
    start = pairing.tensors(lambda p: p)
    own = dict(ours.named_parameters())
    new = [k for k in own if not k.startswith("encoder.clip.")]
    with torch.no_grad():
        for k in new:
            if k in start:
                own[k].copy_(start[k])
    rows = [
        dict(
            what="weights at the start, towers",
            value=distance({k: own[k] for k in own if k.startswith("encoder.clip.")}, start),
            limit=1e-6,
        ),
        dict(
            what="parameters of ours that they do not have",
            value=sum(
                k not in start
                for k in own
                if own[k].requires_grad and k != "encoder.clip.logit_scale"
            ),
            limit=0,
        ),
    ]
    names = {id(p): n for n, p in own.items()}
    with on_a_cpu():
        optimizer = solver.build_optimizer(args, theirs)
    wanted = pairing.settings(optimizer.param_groups)
    have = {
        names[id(p)]: (g["lr"], g["weight_decay"])
        for g in param_groups(ours, recipe)
        for p in g["params"]
    }
    other = {
        k: (have[k], wanted[k])
        for k in have.keys() & wanted.keys()
        if not np.allclose(have[k], wanted[k], rtol=1e-6, atol=0)
    }
    rows.append(
        dict(
            what="parameters with another learning rate or decay",
            value=len(other),
            limit=0,
            of=len(have.keys() & wanted.keys()),
        )
    )
    for k, (a, b) in list(other.items())[:5]:
        print(f"   {k}: ours {a}, theirs {b}")
    loader = make_train_loader(
        recipe.replace(batch_size=batch_size, augment={}), data.train, ours.encoder.tokenize
    )
    for g in optimizer.param_groups:
        g["initial"] = g["lr"]
    factor = lr_factor(0.0, recipe.warmup_epochs / recipe.epochs, recipe.warmup_start)
    n = ours.encoder.grid[0] * ours.encoder.grid[1]
    for number in range(steps):
        batch = loader[number]
        noise = torch.rand(len(batch), n, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        with on_a_cpu(), drawn(noise):
            result = theirs(their_batch(batch))
            total = sum(v for k, v in result.items() if "loss" in k)
            total.backward()
        seen: dict[str, dict] = {}

        def watch(losses, norm, b, seen=seen):
            seen.update(
                losses={k: float(v.detach()) for k, v in losses.items()},
                grads={k: p.grad.detach().clone() for k, p in own.items() if p.grad is not None},
            )

        if number == 0:
            with torch.no_grad(), on_a_cpu():
                image, text = (
                    f(x)
                    for f, x in (
                        (theirs.encode_image, batch.images),
                        (theirs.encode_text, their_batch(batch)["caption_ids"]),
                    )
                )
                f = ours.encode(batch)
            for name, a, b in (("image", f.image_raw, image), ("text", f.text_raw, text)):
                rows.append(
                    dict(
                        what=f"features, {name}", value=float((a - b).norm() / b.norm()), limit=1e-5
                    )
                )
        with drawn(noise):
            step(iter([batch]), number, 0.0, watch=watch)
        if number == 0:
            for there, here in peer.losses.items():
                if here not in seen["losses"]:
                    continue
                a, b = (
                    ours.weights[here] * seen["losses"][here],
                    float(sum(result[k].detach() for k in there.split("+"))),
                )
                rows.append(
                    dict(
                        what=f"loss {here}",
                        value=abs(a - b) / abs(b),
                        limit=1e-6,
                        ours=round(a, 6),
                        theirs=round(b, 6),
                    )
                )
            rows.append(
                dict(
                    what="gradient",
                    value=distance(seen["grads"], pairing.tensors(lambda p: p.grad)),
                    limit=1e-4,
                )
            )
        for g in optimizer.param_groups:
            g["lr"] = g["initial"] * factor
        optimizer.step()
        print(
            f"   step {number + 1}: loss {float(sum(ours.weights[k] * v for k, v in seen['losses'].items())):.5f}, theirs {float(total.detach()):.5f}",
            flush=True,
        )
    end = pairing.tensors(lambda p: p)
    moved = {k: end[k] - start[k] for k in end}
    mine = {k: own[k].detach() - start[k] for k in end if k in own}
    rows.append(dict(what=f"update after {steps} steps", value=distance(mine, moved), limit=1e-3))
    rows.append(
        dict(
            what="learning rate, epoch by epoch",
            value=schedule_difference(folder, args, recipe),
            limit=1e-9,
        )
    )
    return rows


def compare_settings(peer: Peer, folder: Path) -> dict[str, list[dict]]:
    "Settings, batches and masked captions, theirs and ours."
    recipe = RECIPES[peer.recipe]
    args = options_of(folder, peer, Path("clip.pt"), recipe.image_size, 16)
    out = {
        "settings": settings_table(peer, folder, args, recipe),
        "batches": batches_table(peer, folder, args, recipe),
    }
    if peer.masker:
        with tempfile.TemporaryDirectory() as home:
            data = load_dataset(
                "synth-pedes",
                make_synth_pedes(Path(home) / "many", n_ids=(600, 4, 5), seed=0, workers=1),
            )
        captions = data.train.captions
        out["masking"] = masking_table(
            peer, folder, (captions * (1 + 10_000 // len(captions)))[:10_000]
        )
    return out


class Table:
    "Stands in for prettytable's, which their evaluators only print with."

    def __init__(self, *args):
        self.custom_format: dict = {}

    def add_row(self, row):
        pass


@contextlib.contextmanager
def without_extras() -> Iterator[None]:
    "Packages that their modules import and that nothing compared here needs."
    names = dict(
        prettytable=("PrettyTable", Table), easydict=("EasyDict", dict), nltk=("nltk", None)
    )
    stand_ins = {}
    for package, (name, value) in names.items():
        stand_ins[package] = types.ModuleType(package)
        setattr(stand_ins[package], name, value)
    with mock.patch.dict(sys.modules, stand_ins):
        yield


def trained(recipe: Recipe, data: PersonDataset, steps: int, lr: float = 5e-4) -> Retriever:
    "Our encoder and objectives after some steps, so that its ranks are above chance."
    torch.manual_seed(0)
    quick = recipe.replace(lr=lr, eps=1e-8, batch_size=32, augment={})
    encoder = build_encoder(quick)
    step = TrainStep(quick, encoder, data.train.n_ids, make_accelerator(quick, "cpu"))
    step.retriever.train()
    loader = make_train_loader(quick, data.train, step.retriever.encoder.tokenize)
    for number in range(steps):
        loader.set_epoch(number // len(loader))
        step(iter([loader[number % len(loader)]]), number, 0.5)
    return step.retriever.eval()


def hand_over(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> int:
    "Copy our weights and running means into their model; how many tensors were copied."
    state = theirs.state_dict()
    own = ours.state_dict()
    there = {k: our_name(k, names) for k in state}
    found = {k: own[n].reshape(state[k].shape) for k, n in there.items() if n in own}
    theirs.load_state_dict(state | found)
    return len(found)


def their_metrics(
    folder: Path, theirs: nn.Module, data: PersonDataset, size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    "What their evaluator finds on the test split, with their datasets, tokenizer and transform: feature -> metrics."
    import torchvision.transforms as T

    with without_extras():
        metrics = load_file(folder / "utils" / "metrics.py", "peer_metrics")
        load_package(folder, "utils")
        sys.path.insert(0, str(folder))
        try:
            bases = load_file(folder / "datasets" / "bases.py", "peer_bases")
        finally:
            sys.path.remove(str(folder))
    transforms = function_of(folder / "datasets" / "build.py", "build_transforms", dict(T=T))
    test = data.test
    images = bases.ImageDataset(
        test.image_ids.tolist(), [str(p) for p in test.images], transforms(size, is_train=False)
    )
    texts = bases.TextDataset(test.caption_ids.tolist(), test.captions)
    loaders = [torch.utils.data.DataLoader(d, batch_size=64) for d in (images, texts)]
    seen = []
    rank = metrics.rank

    def watched(*args, **kwargs):
        found = rank(*args, **kwargs)
        seen.append(found)
        return found

    with mock.patch.object(metrics, "rank", watched), on_a_cpu():
        metrics.Evaluator(*loaders).eval(theirs.eval())
    names = ["global", "TSE", "global + TSE"] if len(seen) == 3 else ["global"]
    found = {}
    for name, (cmc, mean_ap, mean_inp, _) in zip(names, seen):
        ranks = {f"r{k}": float(cmc[k - 1]) for k in (1, 5, 10)}
        found[name] = ranks | dict(mAP=float(mean_ap), mINP=float(mean_inp))
    return found


def our_metrics(encoder: PersonCLIP, data: PersonDataset) -> dict[str, dict[str, float]]:
    "What `evaluate` finds on the same split as one gallery: feature -> metrics."
    found = {}
    plain = PersonCLIP(encoder.arch, encoder.image_size)
    plain.clip.load_state_dict(encoder.clip.state_dict())
    models = {"global": plain.eval()}
    if encoder.readout is not None:
        models["global + TSE"] = encoder.eval()
    for name, model in models.items():
        m = evaluate(model, data.test, galleries="none", n_boot=0, breakdown=())
        found[name] = {k: float(getattr(m, k)) for k in ("r1", "r5", "r10", "mAP", "mINP")}
    return found


def compare_division(
    folder: Path, theirs: nn.Module, ours: Retriever, recipe: Recipe, data: PersonDataset
) -> list[dict]:
    "RDE's division of the training pairs and ours, over the same batches: losses, and who is called clean."
    from sklearn.mixture import GaussianMixture
    from tipr_nb.methods import ccd

    mixtures: dict[str, list] = {"theirs": [], "ours": []}

    def mixture(who: str) -> Callable:
        "A mixture that starts from the same draw on both sides, noted."

        def build(n_components, random_state=0, **settings):
            mixtures[who].append(dict(n_components=n_components, **settings))
            return GaussianMixture(n_components, random_state=0, **settings)

        return build

    loader = make_train_loader(recipe.replace(batch_size=32), data.train, ours.encoder.tokenize)
    batches = list(loader)
    for batch in batches:
        batch.tokens = their_batch(batch)["caption_ids"]
    kept: list[Tensor] = []
    names = ("split_prob", "get_loss")
    log = types.SimpleNamespace(
        getLogger=lambda name: types.SimpleNamespace(info=lambda text: None)
    )
    space = dict(torch=torch, np=np, logging=log, GaussianMixture=mixture("theirs"))
    space["print"] = lambda *args: None
    for name in names:
        function_of(folder / "processor" / "processor.py", name, space)

    class Fed:
        "Their loader, as far as it is asked."

        dataset = types.SimpleNamespace(
            real_correspondences=None, __len__=lambda: len(data.train.captions)
        )

        def __iter__(self):
            return iter(their_batch(b) | {"index": b.caption_index} for b in batches)

    per_loss = theirs.compute_per_loss

    def watched(batch):
        found = per_loss(batch)
        kept.append(torch.stack(found[:2]))
        return found

    objective: Any = ours.objectives["CCD"]
    ours.eval()
    with torch.no_grad():
        measured = [objective.measured(ours.encode(b), b, ours.encoder) for b in batches]
    own = torch.cat([torch.stack(m[1:]) for m in measured], 1)
    index = torch.cat([m[0] for m in measured])
    rows = []
    for fine in (False, True):
        kept.clear()
        theirs.args.noisy_rate = 0.5 if fine else 0.0
        with mock.patch.object(theirs, "compute_per_loss", watched), on_a_cpu():
            masks = torch.stack(space["get_loss"](theirs, Fed())).bool()
        losses = torch.cat(kept, 1)
        with mock.patch("sklearn.mixture.GaussianMixture", mixture("ours")):
            by_theirs = [ccd.clean_pairs(x.numpy(), fine) for x in at(losses, index)]
            by_ours = [ccd.clean_pairs(x.numpy(), fine) for x in at(own, index)]
        there = masks[:, index.sort().values].numpy()
        label = "fine" if fine else "coarse"
        for branch, name in enumerate(("global", "TSE")):
            if not fine:
                apart = (own[branch] - losses[branch]).norm() / losses[branch].norm()
                rows.append(dict(what=f"loss of each pair, {name}", value=float(apart), limit=1e-5))
            for whose, mine in (("their losses", by_theirs), ("our losses", by_ours)):
                rows.append(
                    dict(
                        what=f"pairs divided otherwise, {name}, {label}, from {whose}",
                        value=int((there[branch] != mine[branch]).sum()),
                        limit=0 if whose == "their losses" else len(index) // 100,
                        clean=int(there[branch].sum()),
                        of=len(index),
                    )
                )
    same = mixtures["theirs"][:2] == mixtures["ours"][:2]
    same &= mixtures["theirs"][2:] == mixtures["ours"][4:6]
    rows.append(dict(what="mixtures with other settings", value=int(not same), limit=0))
    return [r | dict(holds=bool(r["value"] <= r["limit"])) for r in rows]


def at(losses: Tensor, index: Tensor) -> Tensor:
    "Losses (2, n) in the order of the pairs' numbers."
    return losses[:, index.argsort()]


def compare_evaluation(
    peer: Peer, folder: Path, arch: str, image_size: tuple[int, int], steps: int, n_ids: int
) -> dict[str, list[dict]]:
    "Their evaluator on their model and our `evaluate` on ours, with the same weights: rows per feature and metric."
    home = Path(tempfile.mkdtemp())
    sizes = (n_ids, 4, 40)
    data = load_dataset(
        "synth-pedes", make_synth_pedes(home / "data", n_ids=sizes, seed=0, workers=1)
    )
    if arch == "small":
        arch = register_small(home)
    recipe = RECIPES[peer.recipe].replace(
        arch=arch, pretrained=None, image_size=image_size, precision="no"
    )
    ours = trained(recipe, data, steps)
    clip = ours.encoder.clip.state_dict()
    torch.save({k: v for k, v in clip.items() if k.startswith(TOWER)}, home / "clip.pt")
    args = options_of(folder, peer, home / "clip.pt", image_size, ours.encoder.patch_size[0])
    build = load_package(folder, "model.build")
    build.convert_weights = lambda model: None
    with on_a_cpu():
        theirs = build.build_model(args, num_classes=data.train.n_ids)
    copied = hand_over(ours, theirs, peer.names)
    there = their_metrics(folder, theirs, data, image_size)
    here = our_metrics(ours.encoder, data)
    queries = len(data.test.captions)
    rows = []
    for feature, metrics in here.items():
        for name, value in metrics.items():
            rows.append(
                dict(
                    feature=feature,
                    metric=name,
                    theirs=there[feature][name],
                    ours=value,
                    apart=abs(value - there[feature][name]),
                    holds=bool(abs(value - there[feature][name]) <= 1e-4),
                    queries=queries,
                    gallery=len(data.test.images),
                    tensors=copied,
                )
            )
    found = dict(rows=rows)
    if "CCD" in ours.objectives:
        found["division"] = compare_division(folder, theirs, ours, recipe, data)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="folder of a checkout of IRRA, SEN or RDE")
    parser.add_argument(
        "--recipe", help="which of our recipes, where the project gives several (irra, clip)"
    )
    parser.add_argument("--arch", default="ViT-B-16-quickgelu")
    parser.add_argument("--image-size", type=int, nargs=2, default=(384, 128), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ids", type=int, default=24, help="rendered identities to train on")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="their evaluator against ours instead, on a model trained for --train steps",
    )
    parser.add_argument("--train", type=int, default=60, help="steps before --evaluate")
    parser.add_argument("--only", choices=("steps", "settings"), help="one half of the comparison")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    set_threads(args.threads)
    peer, folder = find_peer(args.peer, args.recipe)
    about = dict(module="parity", project=peer.model, revision=REVISIONS[peer.model])
    size = tuple(args.image_size)
    if args.evaluate:
        found = compare_evaluation(peer, folder, args.arch, size, args.train, args.ids)
        for name, table in found.items():
            title = "evaluator" if name == "rows" else name
            show(table, f"{peer.recipe}: {peer.model}'s {title} and ours, {args.arch}")
        write_result(
            f"ranks-{peer.name}",
            found.pop("rows"),
            **found,
            arch=args.arch,
            image_size=list(size),
            train_steps=args.train,
            patched=PATCHES,
            **about,
        )
        return
    if args.only != "settings":
        rows = compare(peer, folder, args.arch, size, args.batch, args.steps, args.ids)
        for r in rows:
            r["holds"] = bool(r["value"] <= r["limit"])
        show(
            rows,
            f"{peer.recipe} against {peer.model} ({REVISIONS[peer.model]}): {args.arch} at {args.image_size[0]}x{args.image_size[1]}, fp32, batch {args.batch}",
        )
        print("patched: " + "; ".join(PATCHES))
        write_result(
            f"parity-{peer.name}",
            rows,
            arch=args.arch,
            image_size=list(args.image_size),
            batch=args.batch,
            patched=PATCHES,
            **about,
        )
    if args.only != "steps":
        found = compare_settings(peer, folder)
        for name, table in found.items():
            show(table, f"{peer.recipe}: {name}")
        write_result(f"settings-{peer.name}", found.pop("settings"), **found, **about)


if __name__ == "__main__":
    run(main)
