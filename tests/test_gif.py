"GIF: cross-attention against torch's, masks, what the fused feature relies on, the objective and its checkpoint."

import re
import pytest, torch
from torch import nn

from tipr_nb.core import TiprError
from tipr_nb.methods import build_objective
from tipr_nb.models import PersonCLIP, tal_loss, write_safetensors
from tipr_nb.data import Batch, normalise
from tipr_nb.models import CrossAttention
from tipr_nb.methods import GIF, Fusion, QueryEnricher, fusion_of, reliance


@pytest.fixture()
def nano():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano")


def batch_of(model, n=6, extra=("generated", "other")):
    raw = torch.randint(
        0,
        256,
        (1 + len(extra), n, 3, *model.image_size),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.uint8,
    )
    words = [f"person number {i} in {'red blue green'.split()[i % 3]}" for i in range(n)]
    return Batch(
        normalise(raw[0]),
        model.tokenize(words),
        torch.arange(n) // 2,
        words,
        extra={k: normalise(r) for k, r in zip(extra, raw[1:])},
    )


def parts(b=5, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(b, 4, d, generator=g),
        torch.randn(b, 6, d, generator=g),
        torch.randn(b, 7, d, generator=g),
        torch.arange(7) < torch.randint(2, 8, (b, 1), generator=g),
    )


def test_cross_attention_equals_torchs():
    ca, mha = CrossAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([ca.query.weight, ca.key_value.weight]))
        mha.in_proj_bias.copy_(torch.cat([ca.query.bias, ca.key_value.bias]))
        mha.out_proj.load_state_dict(ca.out.state_dict())
    x, _, y, mask = parts()
    want, weights = mha(x, y, y, key_padding_mask=~mask, average_attn_weights=False)
    assert torch.allclose(ca(x, y, mask), want, atol=1e-6) and torch.allclose(
        ca.attention(x, y, mask), weights, atol=1e-6
    )
    with pytest.raises(TiprError, match="heads=3"):
        CrossAttention(16, 3)


def older_names(state):
    "A fusion's tensors under the names of GIF's first checkpoints."
    return {
        re.sub(
            r"(ask_\w+)\.(query|key_value|out)\.",
            lambda m: f"{m[1]}.{dict(query='q_proj', key_value='kv_proj', out='out_proj')[m[2]]}.",
            k,
        ): v
        for k, v in state.items()
    }


def test_state_with_the_older_names_loads():
    fusion, again = Fusion(16, layers=1), Fusion(16, layers=1)
    older = older_names(fusion.state_dict())
    assert sum("_proj." in k and k.startswith("ask_") for k in older) == 12
    again.load_state_dict(older)
    assert torch.equal(fusion(*parts()), again(*parts())) and "ask_text.q_proj.weight" in older


def test_padding_is_not_heard_and_output_is_unit():
    fusion, (d, v, t, mask) = Fusion(16, layers=1), parts()
    u = fusion(d, v, t, mask)
    other = torch.where(mask[..., None], t, torch.randn_like(t))
    assert (
        torch.allclose(u, fusion(d, v, other, mask), atol=1e-6)
        and torch.allclose(u.norm(dim=1), torch.ones(5))
        and u.dtype == torch.float32
    )


def test_without_residual_the_answers_alone_count():
    fusion, (d, v, t, mask) = Fusion(16, layers=1), parts()
    for ask in (fusion.ask_photo, fusion.ask_text):
        nn.init.zeros_(ask.out.weight)
    assert torch.allclose(fusion(d, v, t, mask), fusion(torch.randn_like(d), v, t, mask), atol=1e-5)
    fusion.residual = True
    assert not torch.allclose(
        fusion(d, v, t, mask), fusion(torch.randn_like(d), v, t, mask), atol=1e-3
    )


def test_reliance_finds_a_pass_through():
    fusion, p = Fusion(16, layers=1), parts()
    nn.init.zeros_(fusion.ask_text.out.weight)  # listens to the photo only
    r = reliance(fusion, *p)
    assert r["photo"] > 0.01 and abs(r["caption"]) < 1e-5
    with pytest.raises(TiprError, match="two samples"):
        reliance(fusion, *(x[:1] for x in p))


def test_objective(nano):
    batch = batch_of(nano)
    objective = build_objective("GIF", nano, 3, layers=1)
    f = nano(batch)
    loss = objective(f, batch, nano)
    with torch.no_grad():
        u = objective.fusion(
            nano.image_features(batch.extra["generated"])[1],
            nano.image_features(batch.extra["other"])[1],
            f.text_tokens,
            f.text_mask,
        )
    assert torch.allclose(loss, tal_loss(u, f.text, f.ids) + tal_loss(f.image, u, f.ids), rtol=1e-4)
    assert {
        "u_text",
        "u_image",
        "relies_on_photo",
        "relies_on_caption",
        "relies_on_picture",
    } == set(objective.logs)
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert "relies_on_photo" in objective.logs


def test_paired_photo_is_a_switch(nano):
    batch = batch_of(nano, extra=("generated",))
    assert GIF(nano, 3, layers=1, paired=True)(nano(batch), batch, nano).isfinite()
    with pytest.raises(TiprError, match="paired=True") as e:
        GIF(nano, 3, layers=1)(nano(batch), batch, nano)
    assert "\n" not in str(e.value)
    with pytest.raises(TiprError, match="no drawn pictures"):
        GIF(nano, 3, layers=1)(nano(batch), batch_of(nano, extra=("other",)), nano)


def test_fusion_travels_if_asked(nano, tmp_path):
    objective = GIF(nano, 3, layers=1, keep=True)
    assert not list(objective.parameters())
    nano.save_pretrained(tmp_path)
    back = PersonCLIP.from_pretrained(tmp_path)
    assert not back.addons
    for a, b in zip(fusion_of(back, layers=1).parameters(), nano.addons["gif_fusion"].parameters()):
        assert torch.equal(a, b)
    write_safetensors(tmp_path / "model.safetensors", older_names(nano.state_dict()))
    older = PersonCLIP.from_pretrained(tmp_path)
    for a, b in zip(
        fusion_of(older, layers=1).parameters(), nano.addons["gif_fusion"].parameters()
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trains_and_evaluates_end_to_end(precision, tmp_path):
    from tipr_nb.data import load_dataset
    from tipr_nb.evaluation import evaluate
    from tipr_nb.generation import PersonGenerator, generate_split
    from tipr_nb.generation import toy_pipeline
    from tipr_nb.synth import make_synth_pedes
    from tipr_nb.training import RECIPES, train

    data = load_dataset(
        "synth-pedes", make_synth_pedes(tmp_path / "data", n_ids=(10, 4, 5), workers=1)
    )
    generator = PersonGenerator.from_pretrained(
        toy_pipeline(tmp_path / "toy"), device="cpu", steps=1, guidance=1.0, batch_size=16
    )
    for split in (data.train, data.val):
        pics = generate_split(generator, split, tmp_path / "pics", report=lambda _: None)
    recipe = RECIPES["gea-tiny"].replace(
        arch="tipr-nano",
        pretrained=None,
        precision=precision,
        batch_size=8,
        epochs=1,
        objectives=[("TGTE", dict(gate=True, share=0.5)), ("GIF", dict(layers=1, weight=0.5))],
    )
    run = train(
        recipe,
        data,
        tmp_path / "run",
        extra={"generated": pics.field(data.train, recipe.image_size)},
        device="cpu",
        verbose=False,
    )
    assert {"loss/TGTE", "loss/GIF", "TGTE/w", "GIF/relies_on_photo"} <= set(
        run.history.columns
    ) and run.history.loss.dropna().gt(0).all()
    back = PersonCLIP.from_pretrained(tmp_path / "run" / "best")
    plain, enriched = (
        evaluate(QueryEnricher(back, pics, weight=w), data.val, n_boot=0) for w in (0.0, 0.3)
    )
    assert plain.n_queries == enriched.n_queries > 0
    assert (
        QueryEnricher(back, pics).gate is not None
        and evaluate(QueryEnricher(back, pics), data.val, n_boot=0).n_queries == plain.n_queries
    )
