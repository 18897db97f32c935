"""The encoder: towers against open_clip's own forward, checkpoints and errors, losses against loops, two processes."""

import json, math, os, subprocess, sys, time, warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tipr_nb.models import backbones as B
from tipr_nb.models import clip as C
from tipr_nb.models import tokens as T
from tipr_nb.methods import OBJECTIVES, Objective, build_objective, register_objective
from tipr_nb.models import (
    Features,
    PersonCLIP,
    id_loss,
    interaction_maps,
    itc_loss,
    sdm_loss,
    tal_loss,
    unit,
)
from tipr_nb.models import SelfAttention, gather_features, overlay
from tipr_nb.models import weights as W
from tipr_nb.core import TiprError
from tipr_nb.data import CLIP_MEAN, CLIP_STD
from tipr_nb.search.probabilities import hit_probabilities
from tipr_nb.training import RECIPES, build_encoder

import open_clip

torch.set_num_threads(1)
CAPTIONS = ["A woman in a red coat carries a backpack over her left shoulder.", "Blue jeans!!", ""]


def small(**kw):
    "A small configuration in open_clip's format."
    cfg = dict(
        embed_dim=24,
        vision_cfg=dict(image_size=64, layers=2, width=32, head_width=16, patch_size=16),
        text_cfg=dict(vocab_size=1024, width=32, heads=2, layers=2),
    )
    for k, v in kw.items():
        cfg[k] = cfg[k] | v if isinstance(v, dict) else v
    return cfg


def images(n=3, size=(96, 32), seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def batch(model, n=4, seed=0):
    texts = [f"{CAPTIONS[0]} Number {i}." for i in range(n)]
    return SimpleNamespace(
        images=images(n, model.image_size, seed),
        tokens=model.tokenize(texts),
        ids=torch.arange(n) // 2,
    )


def fails(match, f, *args, **kw):
    with pytest.raises(TiprError, match=match) as e:
        f(*args, **kw)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano").eval()


# --- architectures, stem, tokenizer


def test_registering_twice_changes_nothing():
    before = open_clip.list_models()
    B.register_archs()
    B.register_archs()
    assert open_clip.list_models() == before and {"tipr-tiny", "tipr-nano"} <= set(before)


def test_tiny_sizes():
    m = PersonCLIP("tipr-tiny")
    assert (m.image_size, m.patch_size, m.grid, m.dim) == ((96, 32), (8, 8), (12, 4), 128)
    vision = sum(p.numel() for p in m.clip.visual.parameters())
    assert 1.5e6 < vision < 2e6 and sum(p.numel() for p in m.parameters()) - vision < 1.2e6


@pytest.mark.parametrize("arch, patch", [("tipr-tiny", 8), ("tipr-nano", 16)])
def test_no_patch_sees_another(arch, patch):
    visual, x = PersonCLIP(arch).clip.visual, images(1).requires_grad_()
    tokens = visual.conv1(x)
    for r, c in ((0, 0), (2, 1), (tokens.shape[2] - 1, tokens.shape[3] - 1)):
        (g,) = torch.autograd.grad(tokens[0, :, r, c].sum(), x, retain_graph=True)
        inside = g[..., r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        assert inside.count_nonzero() == g.count_nonzero() > 0


def test_stem_wants_a_power_of_two():
    fails("power of two", B.PatchStem, 64, 14)


def test_short_tokenizer():
    short, full = T.ShortTokenizer(4096), open_clip.SimpleTokenizer()
    assert (
        short.encoder.items() >= {w: i for w, i in full.encoder.items() if i < 4094}.items()
        and max(short.decoder) == 4095
    )
    long = " ".join(["an extraordinarily burgundy coat"] * 60)
    ids = short([long, "", "naïve 外套 🧥"])
    assert ids.shape == (3, 77) and ids.max() == 4095 and ids[0, -1] == ids[1, 1] == 4095
    assert short.decode(short.encode("naïve 外套 🧥")).strip().replace(" ", "") == "naïve外套🧥"
    fails("between 515", T.ShortTokenizer, 514)


def test_words_kept_whole():
    full, words = open_clip.SimpleTokenizer(), T.clothing_words()
    ours = T.make_tokenizer(B.arch_config("tipr-tiny"))
    assert len(words) == len(set(words)) and all(w == w.lower() and w.isalpha() for w in words)
    cut = [w for w in words if len(ours.encode(w)) > len(full.encode(w))]
    assert not cut and ours.vocab_size == 4096 == max(ours.decoder) + 1
    for text in CAPTIONS:
        assert ours.decode(ours.encode(text)) == full.decode(full.encode(text))
    ranks = full.bpe_ranks
    kept = T.choose_merges(ranks, ["sneakers", "knee"], 50)
    assert len(kept) == len(set(kept)) == 50 and kept == sorted(kept, key=ranks.get)
    assert (
        len(T.choose_merges(ranks, words, 10)) == 10
    )  # fewer merges than the words need: the most frequent of them
    for w in ("sneakers", "a", "zzz"):
        assert len(full.bpe("".join(w)).split()) == len(w) - len(T.merges_of(w, ranks))


@pytest.mark.parametrize("whole", [(), ("sneakers", "burgundy")])
def test_hugging_face_tokenizer_agrees(whole):
    from transformers import CLIPTokenizer

    short = T.ShortTokenizer(1024, whole=whole)
    vocab, merges = T.vocab_and_merges(short)
    hf = CLIPTokenizer(vocab=vocab, merges=merges)
    for text in CAPTIONS + ["Knee-length, grey-green t-shirt; she's 25 (approx.)"]:
        ids = hf(text)["input_ids"]
        assert short([text])[0, : len(ids)].tolist() == ids


# --- attention


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_multihead(causal):
    torch.manual_seed(0)
    plain, x = (
        nn.MultiheadAttention(32, 2, batch_first=True),
        torch.randn(3, 9, 32, requires_grad=True),
    )
    mask = torch.full((9, 9), -torch.inf).triu(1) if causal else None
    want = plain(x, x, x, need_weights=False, attn_mask=mask)[0]
    want_grad = torch.autograd.grad(want.square().sum(), [x, *plain.parameters()])
    plain.__class__, plain.causal = SelfAttention, causal
    for keep in (False, True):
        plain.keep_weights = keep
        got = plain(x, x, x, need_weights=False, attn_mask=mask)[0]
        assert (got - want).abs().max() < 1e-6
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), [x, *plain.parameters()]), want_grad
        ):
            assert torch.allclose(a, b, atol=1e-5)
    plain.keep_weights = False
    with torch.autocast("cpu", torch.bfloat16):
        low = plain(x, x, x, need_weights=False, attn_mask=mask)[0]
    assert (low - want).abs().max() < 0.02


def test_self_attention_falls_back_to_its_parent():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 2, batch_first=True)
    x, y, pad = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.zeros(2, 5, dtype=torch.bool)
    pad[0, 3:] = True
    want = (
        plain(x, y, y, need_weights=False)[0],
        plain(x, x, x, key_padding_mask=pad, need_weights=False)[0],
        plain(x, x, x)[1],
    )
    plain.__class__ = SelfAttention
    got = (
        plain(x, y, y, need_weights=False)[0],
        plain(x, x, x, key_padding_mask=pad, need_weights=False)[0],
        plain(x, x, x)[1],
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_every_block_takes_the_lean_path(nano):
    blocks = [m for m in nano.modules() if isinstance(m, nn.MultiheadAttention)]
    assert (
        len(blocks) == 4
        and all(type(m) is SelfAttention for m in blocks)
        and [m.causal for m in blocks].count(True) == 2
    )


# --- towers against open_clip's own forward


@pytest.mark.parametrize(
    "cfg",
    [
        small(),
        small(custom_text=True),
        small(quick_gelu=True),
        small(vision_cfg=dict(pool_type="avg")),
        small(vision_cfg=dict(pool_type="avg", final_ln_after_pool=True)),
        small(
            custom_text=True, text_cfg=dict(proj_bias=True, no_causal_mask=True, pool_type="last")
        ),
        small(vision_cfg=dict(no_ln_pre=True), text_cfg=dict(pool_type="eos", eos_id=1023)),
        small(vision_cfg=dict(qk_norm=True, scale_attn=True)),
        small(vision_cfg=dict(layers=[1, 1, 1, 1], width=8)),
    ],
    ids=[
        "plain",
        "custom-text",
        "quickgelu",
        "avg",
        "avg-ln-after",
        "bidirectional-last",
        "no-ln-pre-eos",
        "custom-blocks",
        "resnet",
    ],
)
def test_features_equal_open_clip(cfg):
    torch.manual_seed(0)
    m = PersonCLIP("other", (96, 32), cfg).eval()
    x, full = images(), m.tokenizer(CAPTIONS)
    raw, tokens = m.image_features(x)
    assert (
        torch.allclose(raw, m.clip.encode_image(x), atol=1e-5)
        and tokens.shape == (3, 1 + m.grid[0] * m.grid[1], 24)
        and m.has_tokens
    )
    raw, tokens, mask = m.text_features(full)
    assert (
        torch.allclose(raw, m.clip.encode_text(full), atol=1e-5)
        and tokens.shape == (3, 77, 24)
        and mask.any(1).all()
    )


def test_captions_padded_only_to_the_longest(nano):
    for m in (nano, PersonCLIP("other", (96, 32), small(custom_text=True)).eval()):
        short, full = m.tokenize(CAPTIONS), m.tokenizer(CAPTIONS)
        assert short.shape[1] < 40 and full.shape[1] == 77
        a, ta, mask = m.text_features(short)
        b, tb, _ = m.text_features(full)
        assert (unit(a) - unit(b)).abs().max() < 1e-6 and (
            unit(a) - unit(m.clip.encode_text(full))
        ).abs().max() < 1e-6
        assert (ta - tb[:, : short.shape[1]])[mask].abs().max() < 1e-5


def test_large_batches_are_sorted_by_length(nano):
    "On a CPU, 64 and more captions run in groups of like length; nothing real may change, forwards or backwards."
    texts = [" ".join(["red coat"] * (1 + i * 7 % 30)) for i in range(70)]
    tokens = nano.tokenize(texts)
    raw, states, mask = nano.text_features(tokens)
    one = [nano.text_features(tokens[i : i + 1]) for i in range(70)]
    assert (unit(raw) - unit(torch.cat([o[0] for o in one]))).abs().max() < 1e-6
    assert (states - torch.cat([o[1] for o in one]))[mask].abs().max() < 1e-5 and torch.equal(
        mask, torch.cat([o[2] for o in one])
    )
    params = list(nano.clip.transformer.parameters())
    a, b = (
        torch.autograd.grad(x.square().sum(), params) for x in (raw, torch.cat([o[0] for o in one]))
    )
    assert all(torch.allclose(x, y, atol=1e-4, rtol=1e-4) for x, y in zip(a, b))


def test_mask_knows_exclamation_marks_from_padding(nano):
    tokens = nano.tokenize(["!", "hat !!", ""])
    assert nano.token_mask(tokens).sum(1).tolist() == [
        (row == 1023).nonzero()[0].item() + 1 for row in tokens
    ]


def test_bidirectional_text_is_never_cut():
    m = PersonCLIP(
        "other",
        (96, 32),
        small(custom_text=True, text_cfg=dict(no_causal_mask=True, pool_type="last")),
    )
    assert m.tokenize(CAPTIONS).shape == (3, 77)


def word_tokenizer(folder, pad="[PAD]", **special):
    "A Hugging Face tokenizer of a few words; [PAD] has id 1."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0, "[PAD]": 1, "a": 2, "red": 3, "blue": 4, "coat": 5, "and": 6, "hat": 7},
            unk_token="[UNK]",
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A [PAD]", special_tokens=[("[PAD]", 1)]
    )  # SigLIP's end of text is its padding
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]", unk_token="[UNK]", **special
    ).save_pretrained(folder)
    return str(folder)


TEXT_TOWERS = {  # name -> text_cfg, and whether captions may be padded to the longest
    "clip": (dict(), True),
    "clip-eos": (dict(pool_type="eos", eos_id=1023), True),
    "siglip": (
        dict(
            no_causal_mask=True,
            pool_type="last",
            proj_bias=True,
            context_length=16,
            vocab_size=16,
            hf_tokenizer_name="WORDS",
        ),
        False,
    ),
    "clipa": (dict(no_causal_mask=True, pool_type="last", context_length=32), False),
    "mobileclip-s": (dict(no_causal_mask=True), False),
    "causal-last": (dict(pool_type="last"), False),
    "first": (dict(no_causal_mask=True, pool_type="first"), False),
    "cls": (dict(embed_cls=True, context_length=76), False),
}


@pytest.mark.parametrize("kind", list(TEXT_TOWERS))
def test_training_sees_the_text_that_evaluation_sees(kind, tmp_path):
    "The loader's tokens, a cut of them, the captions themselves and open_clip's own forward give one feature."
    from tipr_nb.data import Split, make_loader

    text_cfg, trims = TEXT_TOWERS[kind]
    if "hf_tokenizer_name" in text_cfg:
        text_cfg = text_cfg | dict(hf_tokenizer_name=word_tokenizer(tmp_path / "words"))
    torch.manual_seed(0)
    m = PersonCLIP("other", (96, 32), small(custom_text=True, text_cfg=text_cfg)).eval()
    nn.init.normal_(m.clip.text.positional_embedding)  # places differ, as they do in trained towers
    captions = ["a red coat", "a blue coat and a red hat and a blue hat", "a hat"]
    for i in range(3):
        Image.new("RGB", (32, 96), (40 * i, 90, 20)).save(tmp_path / f"{i}.png")
    split = Split(
        "train",
        [tmp_path / f"{i}.png" for i in range(3)],
        np.arange(3),
        captions,
        np.arange(3),
        np.arange(3),
    )
    want, at_evaluation = unit(m.clip.encode_text(m.tokenizer(captions))), m.encode_text(captions)
    assert (at_evaluation - want).abs().max() < 1e-5 and m.trims is trims
    for size in (1, 2):
        for batch in make_loader(split, m.tokenize, (96, 32), size, train=False, cache=False):
            assert (
                unit(m.text_features(batch.tokens)[0]) - want[batch.caption_index]
            ).abs().max() < 1e-5
            assert (
                m.text_features(batch.tokens)[2].shape == batch.tokens.shape
                and m.token_mask(batch.tokens).any(1).all()
            )
    cut = m.tokenizer(captions[:1])[:, :8]  # whoever cuts, and however short
    assert (unit(m.text_features(cut)[0]) - want[:1]).abs().max() < 1e-5
    features = m.train()(SimpleNamespace(images=images(1), tokens=cut, ids=torch.zeros(1)))
    assert (
        features.text_tokens is None or features.text_tokens.shape[1] == features.text_mask.shape[1]
    )
    assert (features.text.detach() - want[:1]).abs().max() < 1e-5


def test_padding_that_is_not_zero_is_kept_by_the_loader(tmp_path):
    "A Hugging Face text model pads with 1 here; batches of unequal captions give what each gives alone."
    from transformers import BertConfig
    from tipr_nb.data import Split, make_loader

    BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=77,
        pad_token_id=1,
    ).save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    torch.manual_seed(0)
    m = PersonCLIP(
        "bert-small",
        (96, 32),
        small(
            text_cfg=dict(
                hf_model_name=str(tmp_path),
                hf_tokenizer_name=str(tmp_path),
                hf_proj_type="linear",
                hf_pooler_type="mean_pooler",
                context_length=16,
            )
        ),
    ).eval()
    captions = ["a red coat", "a blue coat and a red hat"]
    for i in range(2):
        Image.new("RGB", (32, 96)).save(tmp_path / f"{i}.png")
    split = Split(
        "train",
        [tmp_path / f"{i}.png" for i in range(2)],
        np.arange(2),
        captions,
        np.arange(2),
        np.arange(2),
    )
    (batch,) = make_loader(split, m.tokenize, (96, 32), 2, train=False, cache=False)
    assert (
        m.pad_id == 1
        and batch.tokens[0].tolist() == [2, 3, 5, 1, 1, 1, 1]
        or batch.tokens[0, 3:].eq(1).all()
    )
    alone = torch.cat([m.encode_text([c]) for c in captions])
    assert (unit(m.text_features(batch.tokens)[0]) - alone).abs().max() < 1e-5


def test_stretched_context(tmp_path):
    torch.manual_seed(0)
    m = PersonCLIP("tipr-nano").eval()
    nn.init.normal_(m.clip.positional_embedding)
    long = "a man in a grey coat " + "with a striped scarf " * 20 + "and {} shoes"
    before, short = m.encode_text([long.format("red")]), m.encode_text(["a red hat"])
    assert torch.equal(before, m.encode_text([long.format("blue")])) and m.context_length == 77
    positions = m.clip.positional_embedding.detach().clone()
    assert (
        m.resize_context(200) is m
        and m.context_length == 200
        and m.tokenize([long]).shape == (1, len(m.tokenizer.encode(long)) + 2)
    )
    assert (
        torch.allclose(m.encode_text(["a red hat"]), short, atol=1e-6)
        and torch.equal(m.clip.positional_embedding[:20], positions[:20])
        and torch.allclose(m.clip.positional_embedding[-1], positions[-1])
    )
    assert (
        m.encode_text([long.format("red")]) - m.encode_text([long.format("blue")])
    ).abs().max() > 1e-6
    m.save_pretrained(tmp_path / "m")
    again = PersonCLIP.from_pretrained(tmp_path / "m")
    assert again.context_length == 200 and torch.equal(
        again.encode_text([long.format("red")]), m.encode_text([long.format("red")])
    )
    back = PersonCLIP.from_pretrained(tmp_path / "m", context_length=40)
    assert back.context_length == 40 and torch.allclose(
        back.encode_text(["a hat"]), m.encode_text(["a hat"]), atol=1e-6
    )
    f = again.train()(batch(again))
    itc_loss(f.image, f.text).backward()
    assert again.clip.positional_embedding.grad[:5].abs().sum() > 0
    fails(
        "reads its padding",
        PersonCLIP(
            "other",
            (96, 32),
            small(custom_text=True, text_cfg=dict(no_causal_mask=True, pool_type="last")),
        ).resize_context,
        128,
    )
    fails("3 tokens or more", m.resize_context, 2)


@pytest.mark.parametrize("positions", ["bicubic", "bilinear"])
def test_customs_of_resizing_positions(tmp_path, positions):
    "bicubic as open_clip, bilinear as IRRA's code (an independent sum over the four neighbours)."
    from safetensors.torch import save_file

    torch.manual_seed(0)
    square = B.CLIP(**small())
    save_file(
        {k: v.contiguous() for k, v in square.state_dict().items()}, tmp_path / "w.safetensors"
    )
    m = PersonCLIP("other", (96, 32), small()).load_open_clip(tmp_path / "w.safetensors", positions)
    got, grid = (
        m.clip.visual.positional_embedding.detach(),
        square.visual.positional_embedding.detach()[1:].view(4, 4, -1),
    )
    assert torch.equal(got[0], square.visual.positional_embedding[0])
    if positions == "bicubic":
        assert torch.equal(
            got, B.resize_positions(square.visual.positional_embedding.detach(), (4, 4), (6, 2))
        )
        return
    for r in range(6):
        for c in range(2):
            y, x = (
                min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
                for i, old, new in ((r, 4, 6), (c, 4, 2))
            )
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 3), min(x0 + 1, 3)
            want = (1 - y + y0) * ((1 - x + x0) * grid[y0, x0] + (x - x0) * grid[y0, x1]) + (
                y - y0
            ) * ((1 - x + x0) * grid[y1, x0] + (x - x0) * grid[y1, x1])
            assert torch.allclose(got[1 + 2 * r + c], want, atol=1e-5)
    assert not torch.allclose(
        got,
        B.resize_positions(square.visual.positional_embedding.detach(), (4, 4), (6, 2)),
        atol=1e-3,
    )
    fails("filter of positions", m.resize, (64, 64), "bilinaer")
    assert torch.equal(
        m.resize((64, 64), positions).clip.visual.positional_embedding.detach(),
        B.resize_positions(got, (6, 2), (4, 4), positions),
    )


def siglip_cfg(words):
    "SigLIP in small: a timm tower with a map head, a text tower that reads both ways, a tokenizer of Hugging Face's."
    cfg = small(
        custom_text=True,
        init_logit_bias=-10,
        text_cfg=TEXT_TOWERS["siglip"][0]
        | dict(hf_tokenizer_name=words, width=24, heads=2, proj_bias=True),
    )
    cfg["embed_dim"], cfg["vision_cfg"] = (
        192,
        dict(
            timm_model_name="vit_tiny_patch16_224",
            timm_pool="token",
            timm_proj="none",
            image_size=64,
        ),
    )
    return cfg


def test_a_folder_of_open_clips_with_siglips_towers(tmp_path, monkeypatch):
    "Loaded tall with its own tokenizer and pixel statistics, saved, and loaded again without the first folder."
    from safetensors.torch import save_file

    cfg = siglip_cfg(word_tokenizer(tmp_path / "hub"))
    torch.manual_seed(0)
    square = B.build_clip("square", (64, 64), cfg)
    save_file(
        {k: v.contiguous() for k, v in square.state_dict().items()},
        tmp_path / "hub/open_clip_model.safetensors",
    )
    written = dict(
        model_cfg=cfg
        | dict(text_cfg=cfg["text_cfg"] | dict(hf_tokenizer_name="someone/only-on-the-hub")),
        preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3),
    )
    (tmp_path / "hub/open_clip_config.json").write_text(json.dumps(written))
    m = PersonCLIP.from_open_clip(str(tmp_path / "hub"), image_size=(96, 32)).eval()
    captions = ["a red coat", "a blue hat"]
    assert (m.mean, m.arch, m.image_size) == ((0.5,) * 3, "hub", (96, 32)) and m.tokenize(
        captions
    ).shape == (
        2,
        16,
    )
    assert torch.allclose(
        m.encode_text(captions), unit(square.eval().encode_text(m.tokenizer(captions))), atol=1e-5
    )
    trunk = m.clip.visual.trunk
    assert trunk.pos_embed.shape == (1, 1 + 6 * 2, 192) and torch.equal(
        trunk.pos_embed[0].detach(),
        B.resize_positions(square.visual.trunk.pos_embed[0].detach(), (4, 4), (6, 2)),
    )
    bilinear = PersonCLIP.from_open_clip(
        str(tmp_path / "hub"), image_size=(96, 32), positions="bilinear"
    ).clip.visual.trunk.pos_embed[0]
    assert torch.equal(
        bilinear.detach(),
        B.resize_positions(square.visual.trunk.pos_embed[0].detach(), (4, 4), (6, 2), "bilinear"),
    )
    m.save_pretrained(tmp_path / "ours")
    os.rename(tmp_path / "hub", tmp_path / "gone")
    again = PersonCLIP.from_pretrained(tmp_path / "ours")
    assert (
        torch.equal(again.encode_text(captions), m.encode_text(captions))
        and str(tmp_path) not in (tmp_path / "ours/config.json").read_text()
    )
    by_path = PersonCLIP(
        "by-path",
        (96, 32),
        cfg | dict(text_cfg=cfg["text_cfg"] | dict(hf_tokenizer_name=str(tmp_path / "gone"))),
    ).eval()
    by_path.save_pretrained(tmp_path / "moved")
    os.rename(tmp_path / "gone", tmp_path / "away")
    assert (
        torch.equal(
            PersonCLIP.from_pretrained(tmp_path / "moved").encode_text(captions),
            by_path.encode_text(captions),
        )
        and str(tmp_path) not in (tmp_path / "moved/config.json").read_text()
    )
    nobody = PersonCLIP(
        "none", (96, 32), cfg | dict(text_cfg=cfg["text_cfg"] | dict(hf_tokenizer_name=""))
    )
    assert nobody.encode_image(images()).shape == (3, 192)
    fails("without its tokenizer", nobody.encode_text, "a man")
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(
        PersonCLIP.from_pretrained(tmp_path / "twice").encode_text(captions),
        m.encode_text(captions),
    )


def test_folders_of_open_clip_that_are_odd(tmp_path):
    for text, says in (
        ("[]", "no model_cfg"),
        ("{", "not complete JSON"),
        ('{"model_cfg": {"embed_dim": 3}}', "no model_cfg"),
    ):
        (tmp_path / "open_clip_config.json").write_text(text)
        fails(says, PersonCLIP.from_open_clip, str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=small())))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    fails("pickle and is refused", PersonCLIP.from_open_clip, str(tmp_path), image_size=(96, 32))


@pytest.mark.parametrize(
    "change",
    [
        dict(arch=3),
        dict(image_size="96x32"),
        dict(image_size=[96]),
        dict(image_size=[96, None]),
        dict(model_cfg=[]),
        dict(model_cfg={"embed_dim": 3}),
        dict(preprocessing=[]),
        dict(preprocessing={"mean": 1}),
        dict(preprocessing={"std": ["a"] * 3}),
    ],
)
def test_odd_model_configs(nano, tmp_path, change):
    nano.save_pretrained(tmp_path)
    cfg = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(cfg | change))
    fails(f"config.json: {next(iter(change))} = ", PersonCLIP.from_pretrained, tmp_path)
    for text in ("[]", "3", "null"):
        (tmp_path / "config.json").write_text(text)
        fails("not a PersonCLIP", PersonCLIP.from_pretrained, tmp_path)


def test_odd_rows_of_a_history(tmp_path):
    from tipr_nb.models import History

    (tmp_path / "h.jsonl").write_text(
        '{"step": 1, "loss": 2}\n[1]\n3\nnull\n{"loss": 1}\n{"step": "x"}\n{"step": 2, "lo'
    )
    h = History(tmp_path / "h.jsonl")
    h.rewind(5, 5, False)
    assert h.rows == [{"step": 1, "loss": 2}]
    h.add({"step": 2, "loss": 1.0})
    h.load()
    assert len(h.rows) == 2


def test_rewinding_a_history(tmp_path):
    "What was written after a checkpoint goes, on the disk too: losses after its step, scores after its last validation."
    from tipr_nb.models import History

    rows = [{"step": s, "loss": 1.0} for s in (2, 4, 6)] + [{"step": s, "mAP": 9.0} for s in (3, 6)]
    for open_window, kept in ((False, [2, 4]), (True, [2])):
        h = History(tmp_path / f"{open_window}.jsonl")
        for row in rows:
            h.add(row)
        h.rewind(4, 3, open_window)
        for _ in range(2):
            assert [r["step"] for r in h.rows if "loss" in r] == kept
            assert [r["step"] for r in h.rows if "mAP" in r] == [3]
            h.load()


def test_overlay_takes_pictures_and_arrays():
    heat = np.zeros((3, 2))
    heat[0] = 1
    picture = Image.new("RGB", (32, 96), (90, 120, 60))
    out = overlay(picture, heat)
    assert (
        out.shape == (192, 64, 3)
        and out.dtype == np.uint8
        and np.array_equal(out, overlay(np.asarray(picture), heat))
        and out[:40].mean(axis=(0, 1))[0] > out[-40:].mean(axis=(0, 1))[0]
    )
    fails("two axes", overlay, picture, np.zeros(3))


def test_text_tower_of_hugging_face(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=77,
        pad_token_id=1,
    ).save_pretrained(tmp_path)
    words = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0, "[PAD]": 1, "red": 2, "coat": 3, "blue": 4}, unk_token="[UNK]"
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    m = PersonCLIP(
        "bert-small",
        (96, 32),
        small(
            text_cfg=dict(
                hf_model_name=str(tmp_path),
                hf_tokenizer_name=str(tmp_path),
                hf_proj_type="linear",
                hf_pooler_type="mean_pooler",
                context_length=16,
            )
        ),
    ).eval()
    texts = ["red coat", "a blue coat on red"]
    short = m.tokenize(texts)
    raw, tokens, mask = m.text_features(short)
    assert (
        short.shape == (2, 5)
        and mask.sum(1).tolist() == [2, 5]
        and tokens.shape == (2, 5, 24)
        and m.has_tokens
    )
    assert (raw - m.clip.encode_text(m.tokenizer(texts))).abs().max() < 1e-5


def test_timm_tower_has_global_features_and_says_what_it_lacks():
    cfg = small(custom_text=True)
    cfg["vision_cfg"] = dict(
        timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear", image_size=64
    )
    torch.manual_seed(0)
    m = PersonCLIP("timm-tiny", (96, 32), cfg).eval()
    raw, tokens = m.image_features(images())
    assert raw.shape == (3, 24) and tokens is None and not m.has_tokens
    fails("cannot leave patches out", m.encode_kept, images(), torch.zeros(3, 1, dtype=torch.long))
    fails("attention maps", m.attention, images())


def test_other_pixel_statistics():
    cfg = small()
    torch.manual_seed(0)
    m = PersonCLIP("other", (96, 32), cfg).eval()
    half = PersonCLIP("other", (96, 32), cfg, (0.5,) * 3, (0.5,) * 3).eval()
    half.load_state_dict(m.state_dict())
    rgb = torch.rand(2, 3, 96, 32)
    ours = (rgb - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    assert torch.allclose(
        half.image_features(ours)[0], m.image_features((rgb - 0.5) / 0.5)[0], atol=1e-5
    )
    assert half.config()["preprocessing"]["mean"] == [0.5] * 3


@pytest.mark.parametrize(
    "arch, size, grid",
    [
        ("ViT-B-16-quickgelu", (384, 128), (24, 8)),
        ("ViT-L-14-quickgelu", (378, 126), (27, 9)),
        ("RN50-quickgelu", (384, 128), (12, 4)),
    ],
)
def test_papers_backbones_have_tall_positions(arch, size, grid):
    with torch.device("meta"):
        m = PersonCLIP(arch, size)
    positions = (
        m.clip.visual.attnpool.positional_embedding
        if "RN" in arch
        else m.clip.visual.positional_embedding
    )
    assert m.grid == grid and len(positions) == 1 + grid[0] * grid[1]


@pytest.mark.parametrize(
    "size, match",
    [((384, 128), "use 378x126"), ((380,), "height and width"), ((0, 128), "height and width")],
)
def test_image_sizes_that_do_not_fit(size, match):
    fails(match, PersonCLIP, "ViT-L-14-quickgelu", size)


def test_unknown_architecture():
    fails("did you mean ViT-B-16", PersonCLIP, "ViT-B16")


def test_captioning_models_are_refused():
    fails("not supported", PersonCLIP, "coca_ViT-B-32", (224, 224))


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 3, 32, 96),
        torch.zeros(2, 1, 96, 32),
        torch.zeros(3, 96, 32),
        torch.zeros(2, 3, 96, 32, dtype=torch.uint8),
    ],
)
def test_images_of_the_wrong_kind(nano, bad):
    fails("normalised floats", nano.image_features, bad)


# --- leaving patches out


def test_encode_kept(nano):
    x = images()
    every = torch.arange(12).expand(3, 12)
    assert torch.allclose(nano.encode_kept(x, every), nano.image_features(x)[1], atol=1e-5)
    keep = torch.tensor([[0, 3, 11], [1, 2, 3], [4, 8, 10]])
    x.requires_grad_()
    (g,) = torch.autograd.grad(nano.encode_kept(x, keep).square().sum(), x)
    seen = F.unfold(g.abs(), 16, stride=16).sum(1) > 0
    assert [row.nonzero().flatten().tolist() for row in seen] == keep.tolist()
    assert not torch.allclose(
        nano.encode_kept(x, keep)[:, 0], nano.encode_kept(x, keep.flip(0))[:, 0]
    )


def test_encode_kept_of_a_plain_vit_equals_dropping_after_the_stem():
    torch.manual_seed(0)
    m = PersonCLIP("other", (96, 32), small()).eval()
    x, keep = images(), torch.tensor([[0, 5, 7]] * 3)
    v = m.clip.visual
    h = (
        torch.cat([v.class_embedding.expand(3, 1, -1), v.conv1(x).flatten(2).transpose(1, 2)], 1)
        + v.positional_embedding
    )
    h = h[:, [0, 1, 6, 8]]
    want = v.ln_post(v.transformer(v.ln_pre(h))) @ v.proj
    assert torch.allclose(m.encode_kept(x, keep), want, atol=1e-5)


def test_patch_dropout_only_in_training():
    m = PersonCLIP("tipr-nano")
    m.patch_dropout = 0.5
    assert (
        m.train()(batch(m)).image_tokens.shape[1] == 7
        and m.eval()(batch(m)).image_tokens.shape[1] == 13
    )
    a, b = (m.random_keep(5, 0.25, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (5, 9) and (a.diff(dim=1) > 0).all()
    assert m.random_keep(2, 0.999).shape == (2, 1)


def test_attention_maps(nano):
    w = nano.attention(images(2))
    assert w.shape == (2, 2, 2, 13, 13) and (w.sum(-1) - 1).abs().max() < 1e-5
    assert all(
        m.weights is None and not m.keep_weights
        for m in nano.modules()
        if isinstance(m, SelfAttention)
    )


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    m, grads = PersonCLIP("tipr-nano").train(), []
    for on in (False, True):
        m.set_grad_checkpointing(on)
        m.zero_grad()
        f = m(batch(m))
        itc_loss(f.image, f.text, scale=f.scale).backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


class _Tower(nn.Module):
    def __init__(self, encode):
        super().__init__()
        self.encode, self.held = encode, encode.__self__

    def forward(self, x):
        return self.encode(x)


def test_both_towers_export_for_any_batch_and_length(nano):
    auto = torch.export.Dim.DYNAMIC
    picture = torch.export.export(
        _Tower(nano.encode_image), (images(4),), dynamic_shapes=({0: auto},)
    ).module()
    assert torch.allclose(picture(images(5)), nano.encode_image(images(5)), atol=1e-6)
    words = torch.export.export(
        _Tower(nano.encode_text),
        (nano.tokenize([*CAPTIONS, "a hat"]),),
        dynamic_shapes=({0: auto, 1: auto},),
    ).module()
    longer = nano.tokenize([CAPTIONS[0] * 2, "hat"])
    assert torch.allclose(words(longer), nano.encode_text(longer), atol=1e-6)


# --- encoding


def test_encoding_lists_tensors_and_precision(nano, tmp_path):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 255, (120, 50, 3), dtype=np.uint8)) for _ in range(3)]
    for i, p in enumerate(photos):
        p.save(tmp_path / f"{i}.png")
    a, b = (
        nano.encode_image(photos),
        nano.encode_image([tmp_path / f"{i}.png" for i in range(3)], batch_size=2),
    )
    assert (
        torch.allclose(a, b, atol=1e-6)
        and a.dtype == torch.float32
        and not a.requires_grad
        and (a.norm(dim=1) - 1).abs().max() < 1e-6
    )
    assert (
        nano.encode_image(images()).requires_grad
        and nano.encode_text(nano.tokenize(CAPTIONS)).requires_grad
    )
    assert torch.equal(nano.encode_text("a coat"), nano.encode_text(["a coat"]))
    assert nano.encode_image([]).shape == nano.encode_text([]).shape == (0, 32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            low, words = nano.encode_image(photos), nano.encode_text(CAPTIONS)
        assert (
            low.dtype == words.dtype == torch.float32 and F.cosine_similarity(low, a).min() > 0.999
        )
    fails("no such image", nano.encode_image, [tmp_path / "none.png"])
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    fails("not a readable image", nano.encode_image, [tmp_path / "cut.png"])


def test_autocast_step_is_close_to_full_precision():
    torch.manual_seed(0)
    m = PersonCLIP("tipr-nano").train()
    b, losses = batch(m), {}
    objectives = [build_objective(n, m, 2) for n in ("ITC", "SDM", "ID", "TAL")]
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            f = m(b)
            losses[dtype] = [o(f, b, m) for o in objectives]
        assert f.image.dtype == f.text_raw.dtype == f.scale.dtype == torch.float32 and all(
            x.dtype == torch.float32 for x in losses[dtype]
        )
    assert all(abs(a - b) < 0.05 * abs(a) + 0.05 for a, b in zip(*losses.values()))
    m.zero_grad()
    sum(losses[torch.bfloat16]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_logit_scale_is_held_at_100_and_can_come_back(nano):
    m = PersonCLIP("tipr-nano")
    assert abs(m.scale.item() - 1 / 0.07) < 1e-3
    nn.init.constant_(m.clip.logit_scale, 9.0)
    assert abs(m.scale.item() - 100) < 1e-3
    m.scale.backward()
    assert m.clip.logit_scale.grad > 0


# --- checkpoints


def test_save_and_load(nano, tmp_path):
    nano.save_pretrained(tmp_path / "m")
    cfg = json.loads((tmp_path / "m/config.json").read_text())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (
        cfg["arch"] == "tipr-nano"
        and cfg["image_size"] == [96, 32]
        and cfg["preprocessing"]["mean"] == list(CLIP_MEAN)
        and "addons" not in cfg
    )
    again = PersonCLIP.from_pretrained(tmp_path / "m", arch="tipr-nano")
    assert (
        not again.training
        and torch.equal(again.encode_text(CAPTIONS), nano.encode_text(CAPTIONS))
        and torch.equal(again.encode_image(images()), nano.encode_image(images()))
    )
    (tmp_path / "m/README.md").write_text("mine")
    again.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m/README.md").read_text() == "mine"


def test_custom_configuration_travels_with_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    m = PersonCLIP("mine", (64, 32), small(quick_gelu=True), (0.5,) * 3, (0.5,) * 3).eval()
    m.save_pretrained(tmp_path)
    again = PersonCLIP.from_pretrained(tmp_path)
    assert again.mean == (0.5,) * 3 and torch.equal(
        again.encode_image(images(2, (64, 32))), m.encode_image(images(2, (64, 32)))
    )


def test_another_image_size_on_loading(nano, tmp_path):
    nano.save_pretrained(tmp_path)
    m = PersonCLIP.from_pretrained(tmp_path, image_size=(128, 64))
    want = B.resize_positions(nano.clip.visual.positional_embedding, (6, 2), (8, 4))
    assert (
        m.grid == (8, 4)
        and torch.equal(m.clip.visual.positional_embedding, want)
        and m.encode_image(images(1, (128, 64))).shape == (1, 32)
    )
    m.save_pretrained(tmp_path / "b")
    assert PersonCLIP.from_pretrained(tmp_path / "b").image_size == (128, 64)
    fails("use 96x32", PersonCLIP.from_pretrained, tmp_path, image_size=(100, 32))


def test_addons_travel_and_nobody_has_to_know_them(tmp_path):
    m = PersonCLIP("tipr-nano")
    gate = m.attach("gate", nn.Linear(32, 1))
    assert any(p is gate.weight for p in m.parameters())
    m.save_pretrained(tmp_path / "a")
    plain = PersonCLIP.from_pretrained(tmp_path / "a")
    assert set(plain.unclaimed_addons) == {"gate.weight", "gate.bias"} and not plain.addons
    plain.save_pretrained(tmp_path / "b")
    late = PersonCLIP.from_pretrained(tmp_path / "b")
    assert (
        torch.equal(late.attach("gate", nn.Linear(32, 1)).weight, gate.weight)
        and not late.unclaimed_addons
    )
    late.load_weights(tmp_path / "a/model.safetensors")
    assert "gate" in late.addons and json.loads((tmp_path / "b/config.json").read_text())[
        "addons"
    ] == ["gate"]
    fails(
        "add-on 'gate'", PersonCLIP.from_pretrained(tmp_path / "a").attach, "gate", nn.Linear(32, 2)
    )


def test_checkpoints_that_do_not_fit(nano, tmp_path):
    nano.save_pretrained(tmp_path / "nano")
    PersonCLIP("tipr-tiny").save_pretrained(tmp_path / "tiny")
    fails(
        "holds tipr-nano, not tipr-tiny",
        PersonCLIP.from_pretrained,
        tmp_path / "nano",
        arch="tipr-tiny",
    )
    good = (tmp_path / "nano/model.safetensors").read_bytes()
    (tmp_path / "nano/model.safetensors").write_bytes(
        (tmp_path / "tiny/model.safetensors").read_bytes()
    )
    fails("not the weights of tipr-nano", PersonCLIP.from_pretrained, tmp_path / "nano")
    for cut in (good[:-1000], good[:40], b""):
        (tmp_path / "nano/model.safetensors").write_bytes(cut)
        fails("not a complete safetensors file", PersonCLIP.from_pretrained, tmp_path / "nano")
    (tmp_path / "nano/model.safetensors").unlink()
    fails("save the model again", PersonCLIP.from_pretrained, tmp_path / "nano")
    (tmp_path / "tiny/config.json").write_text('{"arch": "tipr')
    fails("not complete JSON", PersonCLIP.from_pretrained, tmp_path / "tiny")
    (tmp_path / "tiny/config.json").write_text('{"model_type": "clip"}')
    fails("load_peer", PersonCLIP.from_pretrained, tmp_path / "tiny")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_pickles_are_refused(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nano.save_pretrained("m")
    os.remove("m/model.safetensors")
    torch.save({"x": Evil()}, "m/pytorch_model.bin")
    fails("pickle and is refused", PersonCLIP.from_pretrained, "m")
    fails("only safetensors", PersonCLIP.from_open_clip, "tipr-nano", "m/pytorch_model.bin")
    assert not os.path.exists("owned")


def test_names_that_lead_nowhere_fail_at_once(tmp_path):
    start = time.time()
    fails("no such folder", PersonCLIP.from_pretrained, tmp_path / "none")
    fails("HF_HUB_OFFLINE|cannot be reached", PersonCLIP.from_pretrained, "someone/some-model")
    fails("cannot be reached", PersonCLIP.from_open_clip, "ViT-B-16-quickgelu", "openai")
    fails("no tag of", PersonCLIP.from_open_clip, "ViT-B-16", "openia")
    fails("no published weights", PersonCLIP.from_open_clip, "tipr-tiny", "openai")
    fails("cannot be reached", PersonCLIP, "roberta-ViT-B-32", (224, 224))
    assert time.time() - start < 10


def test_openai_weights_move_to_quickgelu():
    with pytest.warns(UserWarning, match="ViT-B-16-quickgelu"):
        assert W.match_activation("ViT-B-16", "openai")[0] == "ViT-B-16-quickgelu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert W.match_activation("ViT-B-16-quickgelu", "openai")[0] == "ViT-B-16-quickgelu"
        assert W.match_activation("ViT-B-16", "laion2b_s34b_b88k")[0] == "ViT-B-16"


def test_open_clip_weights_at_a_tall_size(tmp_path, monkeypatch):
    "Against open_clip's own loader with force_image_size, through a folder in its layout."
    from safetensors.torch import save_file

    cfg = small(custom_text=True)
    torch.manual_seed(0)
    square = B.CustomTextCLIP(**{k: v for k, v in cfg.items() if k != "custom_text"})
    save_file(
        {k: v.contiguous() for k, v in square.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=cfg, preprocess_cfg={}))
    )
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=(96, 32)).eval()
    ours = (
        PersonCLIP("other", (96, 32), cfg)
        .load_open_clip(tmp_path / "open_clip_model.safetensors")
        .eval()
    )
    x, full = images(), ours.tokenizer(CAPTIONS)
    assert torch.allclose(
        ours.image_features(x)[0], theirs.encode_image(x), atol=1e-5
    ) and torch.allclose(ours.text_features(full)[0], theirs.encode_text(full), atol=1e-5)
    old_layout = {k.removeprefix("text."): v for k, v in square.state_dict().items()} | {
        "logit_scale": torch.tensor([2.0])
    }
    save_file({k: v.contiguous() for k, v in old_layout.items()}, tmp_path / "old.safetensors")
    again = PersonCLIP("other", (96, 32), cfg).load_open_clip(tmp_path / "old.safetensors").eval()
    assert (
        torch.equal(again.text_features(full)[0], ours.text_features(full)[0])
        and again.clip.logit_scale == 2
    )
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "other", cfg)
    by_name = PersonCLIP.from_open_clip(
        "other", tmp_path / "open_clip_model.safetensors", image_size=(96, 32)
    ).eval()
    assert torch.equal(by_name.image_features(x)[0], ours.image_features(x)[0])
    fails(
        "not the weights of other",
        PersonCLIP("other", (96, 32), small(custom_text=True, embed_dim=16)).load_open_clip,
        tmp_path / "open_clip_model.safetensors",
    )


def test_resnet_weights_at_a_tall_size(tmp_path):
    from safetensors.torch import save_file

    cfg = small(vision_cfg=dict(layers=[1, 1, 1, 1], width=8))
    torch.manual_seed(0)
    square = B.CLIP(**cfg)
    save_file(
        {k: v.contiguous() for k, v in square.state_dict().items()}, tmp_path / "rn.safetensors"
    )
    m = PersonCLIP("rn", (96, 32), cfg).load_open_clip(tmp_path / "rn.safetensors")
    assert m.grid == (3, 1) and torch.equal(
        m.clip.visual.attnpool.positional_embedding,
        B.resize_positions(square.visual.attnpool.positional_embedding, (2, 2), (3, 1)),
    )
    assert m.resize((64, 64)).eval().encode_image(images(1, (64, 64))).shape == (1, 24)


def test_full_disk_keeps_the_old_weights(nano, tmp_path, monkeypatch):
    import safetensors, safetensors.torch

    nano.save_pretrained(tmp_path / "m")
    old = (tmp_path / "m/model.safetensors").read_bytes()

    def full(state, file, metadata=None):
        open(file, "wb").write(b"half")
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    fails("no space left", PersonCLIP("tipr-nano").save_pretrained, tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == old and not list(
        (tmp_path / "m").glob(".*")
    )


def test_read_only_output(nano, tmp_path):
    (tmp_path / "file").write_text("x")
    fails(
        "a part of this path is a file|File exists|not a folder",
        nano.save_pretrained,
        tmp_path / "file/run",
    )


def test_inference_imports_no_objective():
    code = """
import sys, tipr_nb.models.clip
methods = ("tir", "cmt", "gif", "tgte", "training")
bad = [m for m in sys.modules if m.startswith("tipr_nb") and m.split(".")[-1] in methods]
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lora_through_peft():
    peft = pytest.importorskip("peft")
    m = PersonCLIP("tipr-nano").train()
    lora = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["c_fc", "c_proj"]))
    f = lora(batch(m))
    itc_loss(f.image, f.text).backward()
    trained = [
        n for n, p in lora.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert trained and all("lora_" in n for n in trained)


# --- losses


def pairs(b=7, d=6, n_ids=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, t = (unit(torch.randn(b, d, generator=g, dtype=torch.float64)) for _ in range(2))
    return v, t, torch.arange(b) % n_ids


def itc_loop(v, t, ids, scale):
    total = 0.0
    for a, b in ((v, t), (t, v)):
        for i in range(len(a)):
            s = [scale * float(a[i] @ b[j]) for j in range(len(b))]
            z = math.log(sum(map(math.exp, s)))
            own = [j for j in range(len(b)) if (j == i if ids is None else ids[j] == ids[i])]
            total -= sum(s[j] - z for j in own) / len(own)
    return total / (2 * len(v))


def sdm_loop(v, t, ids, tau, eps):
    total = 0.0
    for a, b in ((v, t), (t, v)):
        for i in range(len(a)):
            s = [math.exp(float(a[i] @ b[j]) / tau) for j in range(len(b))]
            n = sum(int(ids[j] == ids[i]) for j in range(len(b)))
            total += sum(
                x / sum(s) * (math.log(x / sum(s)) - math.log(int(ids[j] == ids[i]) / n + eps))
                for j, x in enumerate(s)
            ) / len(a)
    return total


def tal_loop(v, t, ids, tau, m):
    total = 0.0
    for a, b in ((v, t), (t, v)):
        for i in range(len(a)):
            s = [float(a[i] @ b[j]) for j in range(len(b))]
            pos, neg = (
                [x for j, x in enumerate(s) if (ids[j] == ids[i]) == own] for own in (True, False)
            )
            z = sum(math.exp(x / tau) for x in pos)
            total += max(
                0.0,
                m
                - sum(math.exp(x / tau) / z * x for x in pos)
                + tau * math.log(sum(math.exp(x / tau) for x in neg)),
            )
    return total


@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_their_loops(seed):
    v, t, ids = pairs(seed=seed)
    W = torch.randn(3, 6, dtype=torch.float64)
    ce = lambda f, i: math.log(sum(math.exp(float(w @ f)) for w in W)) - float(W[i] @ f)
    assert abs(itc_loss(v, t, scale=14.0) - itc_loop(v, t, None, 14.0)) < 1e-10
    assert abs(itc_loss(v, t, ids, scale=14.0) - itc_loop(v, t, ids, 14.0)) < 1e-10
    assert abs(sdm_loss(v, t, ids) - sdm_loop(v, t, ids, 0.02, 1e-8)) < 1e-10
    assert abs(tal_loss(v, t, ids) - tal_loop(v, t, ids, 0.015, 0.1)) < 1e-10
    assert abs(tal_loss(v, t, ids, 0.05, 0.3, "mean") * 7 - tal_loop(v, t, ids, 0.05, 0.3)) < 1e-10
    assert (
        abs(
            id_loss(2 * v, 3 * t, ids, lambda x: x @ W.T)
            - sum(ce(2 * v[i], ids[i]) + ce(3 * t[i], ids[i]) for i in range(7)) / 14
        )
        < 1e-10
    )


def test_losses_by_identities():
    v, t, ids = pairs()
    eye, same = torch.eye(7, dtype=torch.float64), (ids[:, None] == ids).double()
    assert (
        abs(itc_loss(eye * 0, eye) - math.log(7)) < 1e-12
        and itc_loss(eye, eye, scale=100.0) < 1e-12
    )
    assert abs(sdm_loss(same, eye, ids)) < 1e-6 and tal_loss(2 * same - 1, eye, ids) == 0
    for f in (
        lambda a, b: itc_loss(a, b),
        lambda a, b: sdm_loss(a, b, ids),
        lambda a, b: tal_loss(a, b, ids),
    ):
        assert abs(f(v, t) - f(t, v)) < 1e-12  # the two directions change places
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert (
        abs(sdm_loss(v[order], t[order], ids[order]) - sdm_loss(v, t, ids)) < 1e-12
        and abs(tal_loss(v[order], t[order], ids[order]) - tal_loss(v, t, ids)) < 1e-12
    )
    pair = torch.arange(7)
    hardest = (
        (torch.stack([v @ t.T, t @ v.T]) - 2 * eye).amax(2).sum() - 2 * (v * t).sum() + 14 * 0.1
    )  # tau -> 0 with single positives: the hardest-negative hinge
    assert abs(tal_loss(v, t, pair, temperature=1e-4, margin=5.0) - (hardest + 14 * 4.9)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", ["one pair", "one identity", "all different", "identical features", "opposite"]
)
def test_losses_and_gradients_stay_finite(case, dtype):
    v, t, ids = pairs(1 if case == "one pair" else 6)
    if case == "one identity":
        ids = ids * 0
    if case == "all different":
        ids = torch.arange(6)
    if case == "identical features":
        v, t = v[:1].expand(6, -1), v[:1].expand(6, -1)
    if case == "opposite":
        t = -v
    v, t = v.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()
    W = nn.Linear(6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            itc_loss(v, t, scale=100.0),
            itc_loss(v, t, ids),
            sdm_loss(v, t, ids),
            sdm_loss(v, t, ids, temperature=0.001),
            tal_loss(v, t, ids),
            tal_loss(v, t, ids, temperature=1e-3),
            id_loss(v, t, ids % 3, W),
        ]
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses)
    for x in losses:
        assert all(
            g is None or g.isfinite().all()
            for g in torch.autograd.grad(x, [v, t], retain_graph=True, allow_unused=True)
        )
    if case in ("one pair", "one identity"):
        assert losses[4] == 0


def test_losses_ignore_autocast():
    v, t, ids = (x.float() if x.is_floating_point() else x for x in pairs())
    with torch.autocast("cpu", torch.bfloat16):
        low = sdm_loss(v, t, ids)
    assert torch.equal(low, sdm_loss(v, t, ids))


# --- objectives


def test_objectives_by_name(nano):
    for name, kw in (
        ("ITC", {}),
        ("ITC", dict(temperature=0.05, use_ids=True)),
        ("SDM", dict(temperature=0.1)),
        ("ID", {}),
        ("TAL", dict(margin=0.2, reduction="mean")),
    ):
        o, b = build_objective(name, nano, 5, **kw), batch(nano)
        assert o(nano(b), b, nano).isfinite() and isinstance(o, OBJECTIVES[name]) and o.logs == {}
    clf = build_objective("ID", nano, 500)
    assert (
        clf.lr_scale == 5
        and clf.classifier.weight.shape == (500, 32)
        and abs(clf.classifier.weight.std() - 0.001) < 1e-4
        and clf.classifier.bias.eq(0).all()
    )
    f = nano(batch(nano))
    assert torch.equal(
        build_objective("ITC", nano, 5)(f, None, nano), itc_loss(f.image, f.text, scale=f.scale)
    )
    fails("did you mean 'SDM'", build_objective, "sdn", nano, 5)
    fails("no argument 'tau'", build_objective, "TAL", nano, 5, tau=1)


def test_objectives_that_need_tokens_say_so(nano, monkeypatch):
    class Needy(Objective):
        needs_tokens = True

    monkeypatch.setitem(OBJECTIVES, "NEEDY", register_objective("NEEDY")(Needy))
    assert isinstance(build_objective("NEEDY", nano, 3), Needy)
    fails(
        "needs token features",
        build_objective,
        "NEEDY",
        SimpleNamespace(has_tokens=False, arch="swin"),
        3,
    )


# --- two processes equal one


def _worker(rank, world, meeting, out):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
    torch.manual_seed(0)
    m = PersonCLIP("tipr-nano").train()
    objectives = [build_objective(n, m, 3) for n in ("ITC", "SDM", "ID", "TAL")]
    whole = batch(m, 6)
    mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
    f = gather_features(
        m(
            SimpleNamespace(
                images=whole.images[mine], tokens=whole.tokens[mine], ids=whole.ids[mine]
            )
        )
    )
    assert (
        f.ids.tolist() == whole.ids.tolist()
        and f.local == mine
        and len(f.text_tokens) == 6 // world
    )
    loss = sum(o(f, None, m) for o in objectives)
    loss.backward()
    params = [*m.parameters(), *objectives[2].parameters()]
    for p in params:
        if world > 1:
            torch.distributed.all_reduce(p.grad)
        p.grad /= world  # what data parallelism does
    if rank == 0:
        torch.save([loss.detach(), *(p.grad for p in params)], out)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    import torch.multiprocessing as mp

    _worker(0, 1, None, tmp_path / "1.pt")
    mp.spawn(_worker, (2, tmp_path / "meeting-point", tmp_path / "2.pt"), nprocs=2)
    one, two = (torch.load(tmp_path / f"{w}.pt") for w in (1, 2))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(one, two)), max(
        (a - b).abs().max() for a, b in zip(one, two)
    )


def test_gather_is_nothing_alone():
    f = Features(*(torch.randn(2, 3) for _ in range(4)), torch.arange(2), torch.tensor(1.0))
    assert gather_features(f) is f and f.local == slice(0, 2)


def test_interaction_maps():
    torch.manual_seed(0)
    nano = PersonCLIP("tipr-nano").eval()
    x = torch.randn(3, *nano.image_size)
    maps = interaction_maps(nano, x, "a man in a red coat", ["red coat", "man"], window=(1, 1))
    assert maps.shape == (2, *nano.grid)
    t = nano.encode_text(["a man in a red coat", "a man in a clothes"])
    keep = torch.tensor([[k for k in range(nano.grid[0] * nano.grid[1]) if k != 5]])
    unit = lambda v: torch.nn.functional.normalize(v.float(), dim=-1)
    with torch.no_grad():
        v, less = unit(nano.image_features(x[None])[0]), unit(nano.image_features(x[None], keep)[0])
    assert maps[0].flatten()[5].item() == pytest.approx(
        ((t[0] - t[1]) @ (v - less)[0]).item(), abs=1e-5
    )
    rows, columns = nano.grid
    near = interaction_maps(nano, x, "a man in a red coat", ["red coat"], window=(2, 1))[0]

    def of(y, z):
        "What hangs on the window whose upper left patch is (y, z)."
        keep = torch.tensor(
            [
                [
                    k
                    for k in range(rows * columns)
                    if not (y <= k // columns < y + 2 and z <= k % columns < z + 1)
                ]
            ]
        )
        with torch.no_grad():
            return ((t[0] - t[1]) @ (v - unit(nano.image_features(x[None], keep)[0]))[0]).item()

    assert near[0, 0].item() == pytest.approx(of(0, 0), abs=1e-5) and near[
        1, 1
    ].item() == pytest.approx((of(0, 1) + of(1, 1)) / 2, abs=1e-5)
    assert torch.equal(
        interaction_maps(nano, x, "a man", ["man"]),
        interaction_maps(nano, x, "a man", ["man"], window=(rows // 3, columns // 2)),
    )
    for bad in ((0, 1), (rows, columns), (rows + 1, 1)):
        with pytest.raises(TiprError, match="window"):
            interaction_maps(nano, x, "a man", ["man"], window=bad)
    with pytest.raises(TiprError, match="no part of the caption"):
        interaction_maps(nano, x, "a man", ["coat"])


@pytest.mark.parametrize("trims", [True, False])
def test_a_model_tokenises_by_the_one_call(nano, monkeypatch, trims):
    monkeypatch.setattr(type(nano), "trims", trims)
    captions = ["a man in a red coat", "a woman"]
    mask = nano.token_mask if trims else None
    ids = nano.tokenize(captions)
    assert torch.equal(ids, T.tokenize_captions(captions, nano.tokenizer, mask))
    assert (ids.shape[1] < nano.tokenizer.context_length) == trims
    whole = nano.tokenizer(captions)
    assert torch.equal(whole[:, : ids.shape[1]], ids) and not whole[:, ids.shape[1] :].any()
    assert nano.tokenize("a woman").shape[0] == 1 and len(nano.tokenize([])) == 0


def test_names_too_long_for_a_path():
    long = "a" * 300
    recipe = RECIPES["tal-tiny"]
    calls = (
        lambda: PersonCLIP.from_pretrained(long),
        lambda: PersonCLIP.from_open_clip(long),
        lambda: PersonCLIP.from_open_clip("tipr-nano", long),
        lambda: build_encoder(recipe.replace(pretrained=long)),
    )
    for call in calls:
        with pytest.raises(TiprError) as e:
            call()
        assert "\n" not in str(e.value)
    manifest = dict(model=long, fingerprint="f")
    assert hit_probabilities("nowhere", manifest) is None
