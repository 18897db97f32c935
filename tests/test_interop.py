"""Peers' checkpoints, built in their layouts with random weights, give the features of the original architecture; what is unsafe or broken is refused in one line."""

import argparse, math, os, sys, types, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tipr_nb.interop import read_checkpoint, read_pickle, read_script
from tipr_nb.data import CLIP_MEAN, CLIP_STD
from tipr_nb.models import PersonCLIP
from tipr_nb.core import TiprError
from tipr_nb.interop import convert_file, load_peer, save_hf, save_onnx, save_open_clip
from tipr_nb.interop import (
    IMAGENET,
    PEERS,
    from_hf,
    guess_grid,
    model_config,
    name_arch,
    recognise,
    to_hf,
)

import open_clip
from open_clip.model import CLIP

SMALL = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=(96, 32), patch_size=16, width=128, layers=2),
    text_cfg=dict(context_length=20, vocab_size=700, width=64, heads=1, layers=2),
    quick_gelu=True,
)
TEXTS = ["a man in a red coat", "woman", "a person with a bag"]


class PlainBlock(nn.Module):
    "The block of OpenAI's CLIP as its paper and every peer's code have it, on torch's own attention."

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = (
            nn.MultiheadAttention(width, heads),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.mlp = nn.ModuleDict(
            dict(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x, mask=None):  # (l, b, d)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=True, attn_mask=mask)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class Blocks(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for b in self.resblocks:
            x = b(x, mask)
        return x


class PlainVision(nn.Module):
    def __init__(self, size=(96, 32), patch=16, width=128, layers=2, dim=64):
        super().__init__()
        n = (size[0] // patch) * (size[1] // patch)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding, self.positional_embedding, self.proj = (
            nn.Parameter(torch.randn(*s) * 0.1) for s in ((width,), (n + 1, width), (width, dim))
        )
        self.ln_pre, self.ln_post, self.transformer = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            Blocks(width, width // 64, layers),
        )

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = self.ln_pre(
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
            + self.positional_embedding
        )
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return (self.ln_post(x) @ self.proj)[:, 0]


class PlainText(nn.Module):
    def __init__(self, length=20, vocab=700, width=64, layers=2, dim=64):
        super().__init__()
        self.token_embedding, self.ln_final = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.positional_embedding, self.text_projection = (
            nn.Parameter(torch.randn(length, width) * 0.1),
            nn.Parameter(torch.randn(width, dim) * 0.1),
        )
        self.transformer = Blocks(width, width // 64, layers)

    def text(self, tokens):
        mask = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = (
            self.ln_final(self.transformer(x.transpose(0, 1), mask).transpose(0, 1))
            @ self.text_projection
        )
        return x[torch.arange(len(x)), tokens.argmax(1)]


class PlainCLIP(PlainText):
    "OpenAI's layout: the image tower under `visual.`, the text tower bare."

    def __init__(self, size=(96, 32), patch=16):
        super().__init__()
        self.visual = PlainVision(size, patch)


def heads(name, d=64):
    attention = {
        "in_proj_weight": torch.randn(3 * d, d),
        "in_proj_bias": torch.randn(3 * d),
        "out_proj.weight": torch.randn(d, d),
        "out_proj.bias": torch.randn(d),
    }
    classifier = {"classifier.weight": torch.randn(11, d), "classifier.bias": torch.randn(11)}
    return {
        "IRRA": classifier
        | {f"cross_attn.{k}": v for k, v in attention.items()}
        | {
            "mlm_head.dense.weight": torch.randn(d, d),
            "mlm_head.fc.weight": torch.randn(700, d),
            "ln_post.weight": torch.ones(d),
            "cross_modal_transformer.resblocks.0.ln_1.weight": torch.ones(d),
        },
        "SEN": classifier
        | {
            "mask_token": torch.zeros(1, 1, d),
            "decoder_pos_embed": torch.zeros(1, 13, d),
            "decoder_embed.weight": torch.randn(d, d),
            "decoder_pred.weight": torch.randn(768, d),
            "norm_6.weight": torch.ones(d),
            "cross_modal_transformer_mae.resblocks.0.ln_1.weight": torch.ones(d),
        }
        | {
            f"cross_attn_{t}.{k}": v
            for t in ("Text", "Image", "TextImage")
            for k, v in attention.items()
        },
        "RDE": {
            f"{t}.{k}": v
            for t in ("visul_emb_layer", "texual_emb_layer")
            for k, v in {
                "linear.weight": torch.randn(2 * d, d),
                "mlp.layers.0.weight": torch.randn(d, d),
                "mlp.bns.1.running_var": torch.ones(d),
            }.items()
        },
        "TBPS-CLIP": {
            "simclr_mlp.0.weight": torch.randn(d, d),
            "simclr_mlp.2.bias": torch.randn(d),
            "logit_scale": torch.tensor(2.5),
        },
    }[name]


def peer_state(name, model):
    state = model.state_dict()
    if name == "TBPS-CLIP":
        return {
            (k if k.startswith("visual.") else f"encode_text.{k}"): v for k, v in state.items()
        } | heads(name)
    return {f"base_model.{k}": v for k, v in state.items()} | heads(name)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return PlainCLIP().eval()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(1)
    return CLIP(**SMALL).eval()


@pytest.fixture(scope="module")
def irra(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("irra") / "best.pth"
    torch.save(
        {
            "model": peer_state("IRRA", plain),
            "optimizer": {"state": {}, "param_groups": []},
            "scheduler": {"last_epoch": 3},
            "epoch": 3,
            "iteration": 0,
        },
        path,
    )
    return path


def same(a, b, tol=1e-5):
    with torch.no_grad():
        return (
            float((F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)).abs().max())
            < tol
        )


def pixels(size=(96, 32), n=3):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))


def full_tokens(model, texts=TEXTS):
    return model.tokenizer(texts)


@pytest.mark.parametrize("name", ["IRRA", "SEN", "RDE", "TBPS-CLIP"])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_peers_features_equal_the_original_forward(name, wrapped, plain, tmp_path):
    torch.save(
        {"model": {wrapped + k: v for k, v in peer_state(name, plain).items()}, "epoch": 7},
        tmp_path / "best.pth",
    )
    said = []
    model = load_peer(tmp_path / "best.pth", say=said.append)
    assert (
        model.image_size == (96, 32)
        and not model.training
        and model.origin.peer == name
        and model.origin.quick_gelu
    )
    images = pixels()
    theirs = images
    if name == "TBPS-CLIP":
        (m, s), (mean, std) = (
            [torch.tensor(v).view(3, 1, 1) for v in pair]
            for pair in ((CLIP_MEAN, CLIP_STD), IMAGENET)
        )
        theirs = (images * s + m - mean) / std
    with torch.no_grad():
        assert same(model.encode_image(images), plain.visual(theirs)) and same(
            model.encode_text(TEXTS), plain.text(full_tokens(model))
        )
    heads_left = {
        "IRRA": ["identity classifier (2 tensors)", "masked language modelling (MLM)"],
        "SEN": ["identity classifier", "image restoration (MAE)"],
        "RDE": ["token selection (TSE) (6 tensors)", "RDE ranks by the mean"],
        "TBPS-CLIP": ["SimCLR projection", "ImageNet"],
    }
    for words in [*heads_left[name], "epoch"]:
        assert words in said[0]
    scale = float(model.clip.logit_scale.detach().exp())
    assert scale == pytest.approx(math.exp(2.5) if name == "TBPS-CLIP" else 50, rel=1e-5)


def test_half_precision_and_other_wrappers(plain, tmp_path):
    half = {f"clip.{k}": (v.half() if v.ndim > 1 else v) for k, v in plain.state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "any.pth")
    with pytest.raises(TiprError, match="quick_gelu=True"):
        load_peer(tmp_path / "any.pth", say=None)
    model = load_peer(tmp_path / "any.pth", quick_gelu=True, say=None)
    assert model.clip.visual.proj.dtype == torch.float32
    with torch.no_grad():
        assert same(model.encode_image(pixels()), plain.visual(pixels()), 5e-3)


def test_tbps_settings_of_a_class_that_is_not_here(plain, tmp_path, monkeypatch):
    EasyDict = type("EasyDict", (dict,), dict(__module__="easydict"))
    monkeypatch.setitem(sys.modules, "easydict", types.SimpleNamespace(EasyDict=EasyDict))
    config = EasyDict(device=5)
    config.experiment = EasyDict(input_resolution=[96, 32])
    torch.save(
        {
            "model": peer_state("TBPS-CLIP", plain),
            "config": config,
            "args": argparse.Namespace(lr=1e-4),
            "r1": np.float64(73.0),
        },
        tmp_path / "best.pth",
    )
    monkeypatch.delitem(sys.modules, "easydict")
    found = read_checkpoint(tmp_path / "best.pth")
    assert (
        found.beside == ["config", "args", "r1"] and recognise(found.tensors)[0].name == "TBPS-CLIP"
    )


@pytest.mark.parametrize("size", [(32, 32), (96, 32)])
def test_openai_torchscript(size, tmp_path):
    torch.manual_seed(2)
    clip = CLIP(**SMALL | dict(vision_cfg=SMALL["vision_cfg"] | dict(image_size=size))).eval()
    for k, v in dict(input_resolution=32, context_length=20, vocab_size=700).items():
        if hasattr(clip, k):
            delattr(clip, k)
        clip.register_buffer(k, torch.tensor(v))
    tokens = torch.randint(1, 690, (2, 20), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(clip, (pixels(size, 2), tokens), strict=False).save(tmp_path / "clip.pt")
        loaded = torch.jit.load(tmp_path / "clip.pt")
        image, text = loaded(pixels(size, 2), tokens)[:2]
    ours, theirs = read_script(tmp_path / "clip.pt"), loaded.state_dict()
    assert set(theirs) <= set(ours) and all(torch.equal(ours[k], v) for k, v in theirs.items())
    model = load_peer(tmp_path / "clip.pt", say=None)
    assert model.origin.peer == "OpenAI CLIP" and model.image_size == size
    assert same(model.encode_image(pixels(size, 2)), image) and same(
        model.encode_text(tokens), text
    )


def test_openai_state_dict_and_open_clip_files(reference, tmp_path):
    state = reference.state_dict()
    torch.save(
        state
        | {
            "input_resolution": torch.tensor(96),
            "context_length": torch.tensor(20),
            "vocab_size": torch.tensor(700),
        },
        tmp_path / "openai.pt",
    )
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        tmp_path / "epoch_3.pt",
    )
    tokens = full_tokens(load_peer(tmp_path / "openai.pt", say=None))
    with torch.no_grad():
        image, text = reference.encode_image(pixels()), reference.encode_text(tokens)
    for name, kwargs in {"openai.pt": {}, "epoch_3.pt": dict(quick_gelu=True)}.items():
        model = load_peer(tmp_path / name, say=None, **kwargs)
        assert same(model.encode_image(pixels()), image) and same(model.encode_text(TEXTS), text)
    wrong = load_peer(tmp_path / "epoch_3.pt", quick_gelu=False, say=None)
    assert not same(wrong.encode_image(pixels()), image, 1e-4)


def test_resnet(tmp_path):
    torch.manual_seed(3)
    cfg = dict(
        embed_dim=64,
        vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=64, patch_size=None),
        text_cfg=SMALL["text_cfg"],
        quick_gelu=True,
    )
    clip = CLIP(**cfg).eval()
    torch.save(clip.state_dict(), tmp_path / "rn.pt")
    model = load_peer(tmp_path / "rn.pt", quick_gelu=True, say=None)
    with torch.no_grad():
        assert model.image_size == (64, 64) and same(
            model.encode_image(pixels((64, 64))), clip.encode_image(pixels((64, 64)))
        )


def hf_model(act="quick_gelu", eos=699):
    from transformers import CLIPConfig, CLIPModel

    both = dict(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=32,
    )
    torch.manual_seed(4)
    return CLIPModel(
        CLIPConfig(
            text_config=both
            | dict(vocab_size=700, max_position_embeddings=20, bos_token_id=698, eos_token_id=eos),
            vision_config=both | dict(image_size=48, patch_size=16, num_attention_heads=4),
            projection_dim=32,
        )
    ).eval()


def hf_features(model, images, tokens):
    with torch.no_grad():
        return model.visual_projection(
            model.vision_model(pixel_values=images).pooler_output
        ), model.text_projection(model.text_model(input_ids=tokens).pooler_output)


@pytest.mark.parametrize(
    "act,eos,shards", [("quick_gelu", 699, False), ("gelu", 2, False), ("gelu", 699, True)]
)
def test_hugging_face_folders(act, eos, shards, tmp_path):
    theirs = hf_model(act, eos)
    theirs.save_pretrained(tmp_path, **(dict(max_shard_size="100KB") if shards else {}))
    assert (tmp_path / "model.safetensors").exists() != shards
    model = load_peer(tmp_path, say=None)
    tokens = torch.tensor([[698, 5, 6, 7, 699, 0], [698, 8, 699, 0, 0, 0]])
    image, text = hf_features(theirs, pixels((48, 48)), tokens)
    assert model.origin.quick_gelu == (act == "quick_gelu") and model.image_size == (48, 48)
    assert same(model.encode_image(pixels((48, 48))), image) and same(
        model.encode_text(tokens), text
    )
    assert load_peer(tmp_path, image_size=(96, 32), say=None).encode_image(pixels()).shape == (
        3,
        32,
    )


def test_hugging_face_unknown_activation(tmp_path):
    hf_model("relu").save_pretrained(tmp_path)
    with pytest.raises(TiprError, match="hidden_act relu"):
        load_peer(tmp_path, say=None)


def test_export_open_clip(irra, tmp_path):
    model = load_peer(irra, say=None)
    theirs = open_clip.create_model(f"local-dir:{save_open_clip(model, tmp_path / 'oc')}").eval()
    with torch.no_grad():
        assert same(model.encode_image(pixels()), theirs.encode_image(pixels())) and same(
            model.encode_text(TEXTS), theirs.encode_text(full_tokens(model))
        )
    again = load_peer(tmp_path / "oc", say=None)
    assert again.image_size == (96, 32) and torch.equal(
        again.encode_image(pixels()), model.encode_image(pixels())
    )
    with pytest.raises(TiprError, match="own"):
        save_open_clip(PersonCLIP("tipr-nano"), tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_export_hugging_face(irra, tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    hf_model().save_pretrained(tmp_path / "in")
    model = load_peer(tmp_path / "in", say=None)
    theirs = CLIPModel.from_pretrained(save_hf(model, tmp_path / "out")).eval()
    tokens = CLIPTokenizer.from_pretrained(tmp_path / "out")(
        TEXTS, padding=True, truncation=True, return_tensors="pt"
    )["input_ids"]
    image, text = hf_features(theirs, pixels((48, 48)), tokens)
    assert same(model.encode_image(pixels((48, 48))), image) and same(
        model.encode_text(TEXTS), text
    )
    with pytest.raises(TiprError, match="square"):
        save_hf(load_peer(irra, say=None), tmp_path / "tall")
    tall = save_hf(load_peer(irra, say=None), tmp_path / "tall", image_size=(64, 64))
    image, text = hf_features(
        CLIPModel.from_pretrained(tall).eval(), pixels((64, 64)), torch.tensor([[698, 5, 699]])
    )
    resampled = load_peer(irra, image_size=(64, 64), say=None)
    assert same(resampled.encode_image(pixels((64, 64))), image) and same(
        resampled.encode_text(torch.tensor([[698, 5, 699]])), text
    )


def test_export_onnx_runs_without_torch(irra, tmp_path):
    from PIL import Image
    from tipr_nb.search import ImageTower
    from tipr_nb.search import TextTower

    model = load_peer(irra, say=None)
    save_onnx(model, tmp_path)
    people = [Image.new("RGB", (40, 110), c) for c in ("red", "navy", "grey")] + [
        Image.effect_noise((30, 90), 60)
    ]
    assert (
        np.abs(ImageTower(tmp_path).encode_image(people) - model.encode_image(people).numpy()).max()
        < 1e-4
    )
    assert (
        np.abs(
            ImageTower(tmp_path).encode_image(people[:1]) - model.encode_image(people[:1]).numpy()
        ).max()
        < 1e-4
    )
    assert (
        np.abs(TextTower(tmp_path).encode_text(TEXTS) - model.encode_text(TEXTS).numpy()).max()
        < 1e-4
    )


def test_convert_and_load_our_own(irra, tmp_path):
    said = []
    convert_file(irra, tmp_path / "ours", say=said.append)
    assert (
        "IRRA" in said[0]
        and "model.safetensors" in said[-1]
        and "IRRA" in (tmp_path / "ours" / "README.md").read_text()
    )
    for model in (PersonCLIP.from_pretrained(tmp_path / "ours"), load_peer(tmp_path / "ours")):
        assert same(model.encode_text(TEXTS), load_peer(irra, say=None).encode_text(TEXTS), 1e-7)
    assert load_peer("clip-synth-world").arch == "tipr-tiny"
    with pytest.raises(TiprError, match="something in it"):
        convert_file(irra, tmp_path / "ours", say=None)
    with pytest.raises(TiprError, match="choose tipr, open_clip, hf, onnx"):
        convert_file(irra, tmp_path / "x", "keras", say=None)
    assert not (tmp_path / "x").exists()


def test_names_of_known_architectures():
    assert name_arch(open_clip.get_model_config("ViT-B-16"), True) == ("ViT-B-16-quickgelu", None)
    assert name_arch(open_clip.get_model_config("ViT-B-32"), False) == ("ViT-B-32", None)
    name, cfg = name_arch(open_clip.get_model_config("ViT-g-14"), True)
    assert cfg is None or (cfg["quick_gelu"] and cfg["vision_cfg"]["head_width"] == 88)
    for arch in ("ViT-B-16", "ViT-L-14", "RN50"):  # shapes alone, on the meta device
        with torch.device("meta"):
            state = CLIP(
                **{k: v for k, v in open_clip.get_model_config(arch).items() if k != "quick_gelu"}
            ).state_dict()
        assert name_arch(model_config(state), False)[0] == arch
    assert [guess_grid(n) for n in (192, 243, 196, 128, 310, 0)] == [
        (24, 8),
        (27, 9),
        (14, 14),
        (16, 8),
        None,
        None,
    ]


def test_hugging_face_names_there_and_back(reference):
    state = reference.state_dict()
    there = to_hf(state)
    assert set(there) == {k for k in there} and len(there) == len(state) + 4 * 2 * 2
    back = from_hf(there)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Eval:
    def __reduce__(self):
        return eval, ("open('sprung', 'w')",)


@pytest.mark.parametrize("where", ["beside", "inside", "alone", "folder"])
def test_a_pickle_with_code_is_refused_and_not_run(where, plain, tmp_path):
    trap = Trap(tmp_path / "sprung")
    found = {
        "beside": {"model": peer_state("IRRA", plain), "args": trap},
        "inside": {"model": peer_state("IRRA", plain) | {"x": trap}},
        "alone": trap,
        "folder": {"a": trap},
    }[where]
    path = tmp_path / ("pytorch_model.bin" if where == "folder" else "best.pth")
    torch.save(found, path)
    with pytest.raises(TiprError, match="refused.*system.*can run code") as e:
        load_peer(tmp_path if where == "folder" else path, say=None)
    assert not (tmp_path / "sprung").exists() and "\n" not in str(e.value)


def test_builtins_and_scripts_with_code_are_refused(tmp_path):
    import zipfile

    torch.save({"model": {"x": Eval()}}, tmp_path / "eval.pth")
    with pytest.raises(TiprError, match="refused.*eval"):
        read_pickle(tmp_path / "eval.pth")
    with zipfile.ZipFile(
        tmp_path / "clip.pt", "w"
    ) as z:  # a TorchScript archive whose data.pkl is a trap
        import pickle

        z.writestr("clip/constants.pkl", b"")
        z.writestr("clip/data.pkl", pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    with pytest.raises(TiprError, match="refused.*system"):
        read_checkpoint(tmp_path / "clip.pt")
    assert not (tmp_path / "sprung").exists()


def test_bad_input_is_one_line(irra, plain, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fails(match, path, **kwargs):
        with pytest.raises(TiprError, match=match) as e:
            load_peer(path, say=None, **kwargs)
        assert "\n" not in str(e.value)

    def saved(name, obj):
        torch.save(obj, tmp_path / name)
        return tmp_path / name

    fails("no such file", tmp_path / "none.pth")
    fails("cannot be reached", "someone/their-clip")
    fails("no such folder", tmp_path / "nowhere" / "deep")
    data = irra.read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
        fails("not a complete checkpoint", tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    fails("not a complete safetensors", tmp_path / "cut.safetensors")
    fails("multiple of the patch size 16; use 96x32", irra, image_size=(100, 30))
    state = peer_state("IRRA", plain)
    fails(
        "no grid.*image_size",
        saved(
            "stride.pth", state | {"base_model.visual.positional_embedding": torch.randn(311, 128)}
        ),
    )
    fails(
        "no grid.*do not fit 96x32",
        saved(
            "stride.pth", state | {"base_model.visual.positional_embedding": torch.randn(311, 128)}
        ),
        image_size=(96, 32),
    )
    fails(
        "looks like IRRA, but text_projection missing",
        saved("part.pth", {k: v for k, v in state.items() if "text_projection" not in k}),
    )
    fails(
        "resblocks.1.ln_1.weight is missing",
        saved(
            "hole.pth",
            {
                k: v
                for k, v in state.items()
                if k != "base_model.transformer.resblocks.1.ln_1.weight"
            },
        ),
    )
    fails(
        "nearest is.*visual.proj",
        saved(
            "text.pth",
            {k: v for k, v in reference.state_dict().items() if not k.startswith("visual")},
        ),
    )
    fails("no CLIP in it", saved("linear.pth", nn.Linear(3, 3).state_dict()))
    fails("no tensors by name", saved("list.pth", [torch.zeros(3)]))
    (tmp_path / "folder").mkdir()
    fails("download the whole repository", tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    fails("not complete JSON", tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../x.safetensors"}}'
    )
    fails("not an index", tmp_path / "folder")
    fails("does not say which activation", saved("bare.pth", reference.state_dict()))


def test_every_peer_is_tried_and_named():
    assert {"IRRA", "SEN", "RDE", "TBPS-CLIP", "OpenAI CLIP", "Hugging Face CLIPModel"} <= {
        p.name for p in PEERS
    }


# pickles as other people's machines write them, and within limits


class Named:
    "Pickles as an instance or a call of a class that is not here."

    def __init__(self, module, name, args=()):
        self.module, self.name, self.args = module, name, args

    def __reduce__(self):
        made = types.ModuleType(self.module)
        parts = self.module.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        made = sys.modules[self.module]
        if not hasattr(made, self.name):
            cls = type(self.name, (), {"__module__": self.module})
            cls.__qualname__ = self.name
            setattr(made, self.name, cls)
        return getattr(made, self.name), self.args


@pytest.fixture
def clean_modules():
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


BESIDE = {
    "posix path": lambda: argparse.Namespace(root=__import__("pathlib").PurePosixPath("/data")),
    "windows path": lambda: argparse.Namespace(root=Named("pathlib", "WindowsPath", ("C:\\data",))),
    "path of Python 3.13": lambda: Named("pathlib._local", "WindowsPath", ("C:\\data",)),
    "NumPy numbers": lambda: [np.float64(73.4), np.float32(1), np.int64(4), np.bool_(True)],
    "NumPy arrays": lambda: {
        "w": np.arange(5.0),
        "state": np.random.get_state(),
        "generator": np.random.default_rng(0),
    },
    "defaultdict": lambda: __import__("collections").defaultdict(list, loss=[1.0]),
    "dates": lambda: [
        __import__("datetime").datetime(2024, 1, 2),
        __import__("datetime").timedelta(3),
    ],
    "sets": lambda: [{1, 2}, frozenset("ab")],
    "torch's own": lambda: [
        torch.device("cpu"),
        torch.float16,
        torch.Size([2]),
        torch.get_rng_state(),
    ],
    "a config class": lambda: Named("their.config", "CfgNode"),
    "tuples as keys": lambda: {(1, 2): 3},
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_lies_beside_the_weights_is_read_as_data(
    what, protocol, plain, tmp_path, clean_modules
):
    torch.save(
        {"model": peer_state("IRRA", plain), "extra": BESIDE[what](), "epoch": 3},
        tmp_path / "best.pth",
        pickle_protocol=protocol,
    )
    found = read_checkpoint(tmp_path / "best.pth")
    assert found.beside == ["extra", "epoch"] and torch.equal(
        found.tensors["base_model.visual.proj"], plain.visual.proj
    )


@pytest.mark.parametrize(
    "form",
    ["before 2020", "whole module", "NumPy weights", "parameters", "module and compile prefixes"],
)
def test_other_forms_of_the_same_weights(form, plain, tmp_path):
    state = plain.state_dict()
    saved = {
        "whole module": plain,
        "NumPy weights": {"state_dict": {k: v.numpy() for k, v in state.items()}},
        "parameters": dict(plain.named_parameters()),
        "module and compile prefixes": {
            "model": {f"module._orig_mod.{k}": v for k, v in state.items()}
        },
    }.get(form, {"model": state})
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=form != "before 2020")
    found = read_checkpoint(tmp_path / "x.pth").tensors
    assert set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)


def quickly(path, match, seconds=5.0):
    import time

    start = time.perf_counter()
    with pytest.raises(TiprError, match=match) as e:
        load_peer(path, say=None)
    assert time.perf_counter() - start < seconds and "\n" not in str(e.value)


def archive(path, pickled, **storages):
    import zipfile

    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", pickled)
        for k, v in storages.items():
            z.writestr(f"x/data/{k.strip('_')}", v)
    return path


def test_small_files_cannot_take_long_or_much(tmp_path, plain):
    import tracemalloc, zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", b"}" * 50_000_000)
    tracemalloc.start()
    quickly(tmp_path / "bomb.pth", "unpack to far more")
    quickly(
        archive(tmp_path / "hash.pth", b"\x80\x02}(" + b")" + b"2\x86" * 60 + b"K\x01u."),
        "no tensors by name",
    )
    quickly(
        archive(tmp_path / "many.pth", b"\x80\x02" + b"}0" * 2_000_000 + b"}."),
        "unpack to far more",
        20.0,
    )
    quickly(
        archive(tmp_path / "deep.pth", b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."),
        "no tensors by name",
    )
    wide = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(J\x00\x00\x00\x10J\x00\x00\x00\x10t(K\x00K\x00t\x89c collections\nOrderedDict\n)Rt Rs."
    quickly(
        archive(
            tmp_path / "wide.pth",
            wide.replace(b"t R", b"tR").replace(b"c collections", b"ccollections"),
            _0=b"\0" * 4,
        ),
        "not a complete checkpoint",
    )
    assert tracemalloc.get_traced_memory()[1] < 600e6
    tracemalloc.stop()
    prefixes = {f"p{i}.visual.conv1.weight": torch.zeros(1) for i in range(3000)}
    torch.save(prefixes, tmp_path / "prefixes.pth")
    quickly(tmp_path / "prefixes.pth", "no CLIP|unknown layout|missing", 20.0)


def test_crafted_shapes_build_nothing(tmp_path, plain):
    state = peer_state("IRRA", plain)
    torch.save(
        state | {"base_model.token_embedding.weight": torch.zeros(200_000_000, 0)},
        tmp_path / "vocab.pth",
    )
    quickly(tmp_path / "vocab.pth", "not the weights of|builds no model")
    torch.save(
        state | {"base_model.visual.conv1.weight": torch.zeros(60_000, 3, 1, 1)},
        tmp_path / "width.pth",
    )
    quickly(tmp_path / "width.pth", "not the weights of|builds no model|no grid")


# SigLIP, Long-CLIP, any name


def siglip_model():
    from transformers import SiglipConfig, SiglipModel

    both = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(5)
    return SiglipModel(
        SiglipConfig(
            text_config=both | dict(vocab_size=700, max_position_embeddings=16, projection_size=64),
            vision_config=both | dict(image_size=48, patch_size=16),
        )
    ).eval()


def test_siglip_of_any_size(tmp_path):
    theirs = siglip_model()
    theirs.save_pretrained(tmp_path / "siglip")
    model = load_peer(tmp_path / "siglip", say=None)
    images, tokens = (
        pixels((48, 48)),
        torch.randint(1, 690, (3, 16), generator=torch.Generator().manual_seed(0)),
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        assert same(
            model.encode_image(images),
            theirs.vision_model(pixel_values=(images * std + mean - 0.5) / 0.5).pooler_output,
        )
        assert same(model.encode_text(tokens), theirs.text_model(input_ids=tokens).pooler_output)
    assert load_peer(tmp_path / "siglip", image_size=(96, 32), say=None).encode_image(
        pixels()
    ).shape == (3, 64)
    with pytest.raises(TiprError, match="without its tokenizer"):
        model.encode_text(TEXTS)
    model.save_pretrained(tmp_path / "ours")
    again = PersonCLIP.from_pretrained(tmp_path / "ours")
    assert same(again.encode_image(images), model.encode_image(images), 1e-7)


@pytest.mark.parametrize("inside", ["", "base_model."])
def test_long_clip_uses_both_tables(inside, tmp_path):
    torch.manual_seed(6)
    text = PlainText(length=60)
    state = PlainCLIP().state_dict() | text.state_dict()
    second = torch.randn(60, 64) * 0.1
    torch.save(
        {
            "model": {
                inside + k: v for k, v in (state | {"positional_embedding_res": second}).items()
            }
        },
        tmp_path / "long.pt",
    )
    model = load_peer(tmp_path / "long.pt", say=None)
    first = torch.zeros(60, 1)
    first[:20] = 1
    text.positional_embedding.data = text.positional_embedding.data * first + second * (1 - first)
    tokens = torch.tensor([[698, *range(5, 50), 699], [698, *[7] * 10, 699, *[0] * 35]])
    with torch.no_grad():
        assert same(model.encode_text(tokens), text.text(tokens))
    torch.save(
        {
            "model": {
                inside + k: v
                for k, v in (state | {"positional_embedding_res": second[:30]}).items()
            }
        },
        tmp_path / "odd.pt",
    )
    with pytest.raises(TiprError, match="tables of positions"):
        load_peer(tmp_path / "odd.pt", say=None)


def test_one_name_for_every_kind_of_weights(irra, reference, tmp_path, monkeypatch):
    from tipr_nb.interop import open_weights

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = open_weights(irra)
    assert vars(model)["source"] == str(irra)
    save_open_clip(model, tmp_path / "oc")
    model.save_pretrained(tmp_path / "run" / "best")
    hf_model().save_pretrained(tmp_path / "hf")
    for name in (tmp_path / "oc", tmp_path / "run"):
        assert same(open_weights(name).encode_image(pixels()), model.encode_image(pixels()), 1e-6)
    assert (
        open_weights(tmp_path / "hf").image_size == (48, 48)
        and open_weights("clip-synth-world").arch == "tipr-tiny"
    )
    torch.save(reference.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(TiprError, match="quick_gelu"):
        open_weights(tmp_path / "bare.pt")
    assert open_weights(f"ViT-B-16-quickgelu:{tmp_path / 'bare.pt'}").origin.quick_gelu
    with pytest.raises(TiprError):
        open_weights(f"ViT-B-61:{tmp_path / 'bare.pt'}")
    for name, words in {
        "ViT-B-16": "which weights",
        "ViT-B/32:opnai": "its tags are openai",
        "hf-hub:someone/clip": "hf download someone/clip",
        "nothing-like-it": "tipr models",
        "": "empty name",
    }.items():
        with pytest.raises(TiprError, match=words) as e:
            open_weights(name)
        assert "\n" not in str(e.value)


def test_a_folder_with_several_layouts_takes_the_one_of_its_configuration(irra, tmp_path):
    model = load_peer(irra, say=None)
    save_open_clip(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        b"\x10\0\0\0\0\0\0\0{"
    )  # timm's own, beside open_clip's
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_clip_224"}')
    assert same(load_peer(tmp_path, say=None).encode_text(TEXTS), model.encode_text(TEXTS), 1e-6)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "[]"),
        ("config.json", '{"vision_config": 3, "text_config": {}}'),
        ("open_clip_config.json", '{"model_cfg": []}'),
        (
            "open_clip_config.json",
            '{"model_cfg": {"vision_cfg": {"width": "x"}, "text_cfg": {}, "embed_dim": 64}}',
        ),
        ("open_clip_config.json", '{"model_cfg": {"vision_cfg": 5}}'),
        ("config.json", "[" * 100_000),
        ("config.json", '{"a": ' + "9" * 10_000 + "}"),
    ],
)
def test_odd_configurations_are_one_line(name, text, reference, tmp_path):
    from safetensors.torch import save_file

    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(text)
    with pytest.raises(TiprError) as e:
        load_peer(tmp_path, say=None)
    assert "\n" not in str(e.value)


def test_known_weights_say_what_was_not_tried():
    from tipr_nb.interop import known_weights

    rows = known_weights()
    assert (
        len(rows) > 5
        and not any(w.downloaded for w in rows)
        and all(w.address.startswith("https://") and w.source for w in rows)
    )


def test_rde_keeps_its_token_selection(plain, tmp_path):
    "A whole checkpoint searches by both features, as its own evaluation does, and converts with them."
    from tipr_nb.methods import TokenSelection, attach_selection

    torch.manual_seed(3)
    branches = TokenSelection(64, 128)
    for name, value in branches.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    parts = {"hidden": "mlp.layers.0", "norm": "mlp.bns.0", "out": "mlp.layers.1"}
    heads = {}
    for ours, theirs, linear in (
        ("image", "visul_emb_layer", "fc"),
        ("text", "texual_emb_layer", "linear"),
    ):
        for k, v in getattr(branches, ours).state_dict().items():
            part, _, kind = k.rpartition(".")
            heads[f"{theirs}.{parts.get(part, linear)}.{kind}"] = v
    heads["visul_emb_layer.linear.weight"] = torch.randn(128, 64)  # there, and never used
    state = {f"base_model.{k}": v for k, v in plain.state_dict().items()}
    torch.save({"model": state | heads, "epoch": 3}, tmp_path / "best.pth")
    said = []
    model = load_peer(tmp_path / "best.pth", say=said.append)
    assert (
        model.feature_dim == 64 + 128
        and "side by side" in said[0]
        and "published numbers" not in said[0]
    )
    with torch.no_grad():
        got = model.encode_text(TEXTS)
        assert same(got[:, :64], plain.text(full_tokens(model)))  # the global feature is as it was
        attach_selection(model).load_state_dict(branches.state_dict())
        assert torch.equal(model.encode_text(TEXTS), got)
    model.save_pretrained(tmp_path / "ours")
    again = load_peer(tmp_path / "ours", say=None)
    with torch.no_grad():
        assert torch.equal(again.encode_text(TEXTS), got)
    heads.pop("texual_emb_layer.mlp.bns.0.running_var")
    torch.save({"model": state | heads, "epoch": 3}, tmp_path / "part.pth")
    partly = load_peer(tmp_path / "part.pth", say=said.append)
    assert partly.feature_dim == 64 and "not all there" in said[-1]
    assert convert_file(
        tmp_path / "best.pth", tmp_path / "towers", "open_clip", say=said.append
    ).is_dir() and any("no place for" in s for s in said)
