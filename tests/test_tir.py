"TIR: pieces against references, what the loss may see, any image size, and bad input."

import copy, subprocess, sys
from types import SimpleNamespace

import pytest, torch, torch.nn as nn

from tipr_nb.core import TiprError
from tipr_nb.data import Batch, TrainTransform, normalise
from tipr_nb.methods import OBJECTIVES, build_objective
from tipr_nb.models import Features, PersonCLIP
from tipr_nb.models import CrossAttention
from tipr_nb.methods import (
    TIR,
    Decoder,
    colour_error,
    grey,
    patch_targets,
    patchify,
    restoration_loss,
    restore,
    sincos_positions,
    split_patches,
    unpatchify,
)

CAPTIONS = [
    "a man in a blue coat",
    "a woman in a red dress with a white bag and long hair",
    "a boy",
    "a girl in green",
]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return PersonCLIP("tipr-nano").eval()


def make_batch(encoder, b=4, seed=0):
    raw = torch.randint(
        0,
        256,
        (b, 3, *encoder.image_size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    images, pixels = TrainTransform(encoder.image_size, erase=1.0)(raw, seed=seed)
    captions = [CAPTIONS[i % 4] for i in range(b)]
    return Batch(images, encoder.tokenize(captions), torch.arange(b), captions, pixels=pixels)


def small_vit(image_size, patch):
    cfg = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=image_size, patch_size=patch, width=32, head_width=16, layers=2),
        text_cfg=dict(context_length=77, vocab_size=1024, width=32, heads=2, layers=2),
    )
    return PersonCLIP("small-vit", image_size, cfg)


# pieces


def test_grey_is_luma():
    x = torch.rand(2, 3, 4, 5)
    assert (
        torch.allclose(grey(x)[:, 1], 0.2989 * x[:, 0] + 0.5870 * x[:, 1] + 0.1140 * x[:, 2])
        and grey(x).shape == x.shape
        and grey(x[0]).shape == x[0].shape
    )


@pytest.mark.parametrize(
    "size, patch",
    [
        ((96, 32), (8, 8)),
        ((384, 128), (16, 16)),
        ((378, 126), (14, 14)),
        ((12, 30), (3, 5)),
        ((8, 8), (8, 8)),
    ],
)
def test_patches_round_trip(size, patch):
    x = torch.rand(2, 3, *size)
    cut, grid = patchify(x, patch), (size[0] // patch[0], size[1] // patch[1])
    assert cut.shape == (2, grid[0] * grid[1], 3 * patch[0] * patch[1]) and torch.equal(
        unpatchify(cut, grid, patch), x
    )
    unfolded = nn.functional.unfold(x, patch, stride=patch).transpose(
        1, 2
    )  # torch's own order: channel, row, column
    assert torch.equal(
        cut.unflatten(2, (patch[0] * patch[1], 3)).transpose(2, 3).flatten(2), unfolded
    )


@pytest.mark.parametrize(
    "size, patch", [((384, 128), (14, 14)), ((95, 32), (8, 8)), ((4, 4), (8, 8))]
)
def test_indivisible_size(size, patch):
    with pytest.raises(TiprError, match="not divisible") as e:
        patchify(torch.rand(1, 3, *size), patch)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 1.1, float("nan")])
def test_mask_ratio_outside(ratio, encoder):
    with pytest.raises(TiprError, match="mask_ratio"):
        split_patches(2, 12, ratio)
    with pytest.raises(TiprError, match="mask_ratio"):
        TIR(encoder, 4, mask_ratio=ratio)


@pytest.mark.parametrize(
    "n, ratio, kept", [(48, 0.7, 14), (192, 0.7, 58), (12, 0.001, 11), (12, 0.999, 1), (2, 0.5, 1)]
)
def test_split_is_a_partition(n, ratio, kept):
    keep, drop = split_patches(5, n, ratio, torch.Generator().manual_seed(0))
    assert keep.shape == (5, kept) and torch.equal(
        torch.cat([keep, drop], 1).sort(1).values, torch.arange(n).expand(5, -1)
    )
    assert n == 2 or len({tuple(k.tolist()) for k in keep}) > 1


def test_one_patch_cannot_be_split():
    with pytest.raises(TiprError, match="smaller patch"):
        split_patches(1, 1, 0.5)


def test_sincos_against_loops():
    grid, dim = (5, 3), 16
    P = sincos_positions(dim, grid)
    for r in range(5):
        for c in range(3):
            for half, place in ((0, r), (1, c)):
                for k in range(4):
                    angle = torch.tensor(place / 10000 ** (k / 4))
                    assert torch.isclose(
                        P[3 * r + c, 8 * half + k], angle.sin(), atol=1e-6
                    ) and torch.isclose(P[3 * r + c, 8 * half + 4 + k], angle.cos(), atol=1e-6)
    with pytest.raises(TiprError, match="multiple of 4"):
        sincos_positions(30, grid)


@pytest.mark.parametrize("context", [32, 20])
def test_cross_attention_is_pytorchs(context):
    torch.manual_seed(0)
    cross, x, text = (
        CrossAttention(32, 4, context),
        torch.randn(3, 5, 32),
        torch.randn(3, 7, context),
    )
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    theirs = nn.MultiheadAttention(32, 4, kdim=context, vdim=context, batch_first=True)
    names = (
        ["in_proj_weight"] if context == 32 else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    )
    k, v = cross.key_value.weight.chunk(2)
    values = (
        [torch.cat([cross.query.weight, k, v])] if context == 32 else [cross.query.weight, k, v]
    )
    theirs.load_state_dict(
        dict(zip(names, values))
        | {
            "in_proj_bias": torch.cat([cross.query.bias, cross.key_value.bias]),
            "out_proj.weight": cross.out.weight,
            "out_proj.bias": cross.out.bias,
        }
    )
    cross.keep_weights = True
    out, weights = theirs(x, text, text, key_padding_mask=~mask, average_attn_weights=False)
    assert torch.allclose(cross(x, text, mask), out, atol=1e-6) and torch.allclose(
        cross.weights, weights, atol=1e-6
    )


# the decoder


def decoded(encoder, residual=False, **kw):
    torch.manual_seed(1)
    decoder, batch = (
        Decoder(encoder.dim, encoder.grid, encoder.patch_size, residual=residual, **kw),
        make_batch(encoder),
    )
    keep, drop = split_patches(4, 12, 0.7)
    _, text, mask = encoder.text_features(batch.tokens)
    return (
        decoder,
        encoder.encode_kept(normalise(grey(batch.pixels)), keep).detach(),
        keep,
        drop,
        text.detach(),
        mask,
    )


def test_decoder_shapes_and_selection(encoder):
    decoder, tokens, keep, drop, text, mask = decoded(encoder)
    out = decoder(tokens, keep, text, mask)
    assert out.shape == (4, 12, 768) and torch.allclose(
        decoder(tokens, keep, text, mask, drop),
        out.gather(1, drop[..., None].expand(-1, -1, 768)),
        atol=1e-5,
    )


def test_padding_is_ignored_exactly(encoder):
    decoder, tokens, keep, drop, text, mask = decoded(encoder)
    assert not mask.all()
    assert torch.equal(
        decoder(tokens, keep, text.masked_fill(~mask[..., None], 50.0), mask),
        decoder(tokens, keep, text, mask),
    )
    longer = (
        torch.cat([text, torch.randn(4, 9, text.shape[-1])], 1),
        torch.cat([mask, torch.zeros(4, 9, dtype=torch.bool)], 1),
    )
    assert torch.allclose(
        decoder(tokens, keep, *longer), decoder(tokens, keep, text, mask), atol=1e-5
    )


def test_without_residual_a_wordless_caption_paints_every_picture_alike(encoder):
    for residual, alike in ((False, True), (True, False)):
        decoder, tokens, keep, drop, text, mask = decoded(encoder, residual)
        one = torch.zeros_like(mask)
        one[:, 0] = True  # a single token: attention has nothing to choose from
        out = decoder(tokens, keep, text[:1].expand(4, -1, -1), one)
        assert torch.allclose(out[0], out[1], atol=1e-4) == alike


@pytest.mark.parametrize("residual", [False, True])
def test_gradient_reaches_text_only_through_the_attention(encoder, residual):
    decoder, tokens, keep, drop, text, mask = decoded(encoder, residual)
    leaf = text.clone().requires_grad_()

    def grad():
        return (
            torch.autograd.grad(decoder(tokens, keep, leaf, mask, drop).square().mean(), leaf)[0]
            .abs()
            .sum(-1)
        )

    assert (grad()[mask] > 0).all() and (grad()[~mask] == 0).all()
    nn.init.zeros_(decoder.cross_attention.out.weight)
    assert (grad() == 0).all()


def test_dropped_patches_are_never_seen(encoder):
    x = torch.rand(2, 3, *encoder.image_size)
    keep, drop = split_patches(2, 12, 0.7)
    cut = patchify(x, encoder.patch_size)
    other = unpatchify(
        cut.scatter(
            1,
            drop[..., None].expand(-1, -1, cut.shape[-1]),
            torch.rand(2, drop.shape[1], cut.shape[-1]),
        ),
        encoder.grid,
        encoder.patch_size,
    )
    assert torch.equal(encoder.encode_kept(x, keep), encoder.encode_kept(other, keep))


@pytest.mark.parametrize(
    "kw, says", [(dict(width=30), "multiple of 4"), (dict(width=36, heads=5), "divisor")]
)
def test_bad_decoder(encoder, kw, says):
    with pytest.raises(TiprError, match=says):
        build_objective("TIR", encoder, 4, **kw)


# the loss


def test_loss_against_loops():
    g = torch.Generator().manual_seed(0)
    painted, targets, (_, drop) = (
        torch.rand(2, 4, 12, generator=g),
        torch.rand(2, 6, 12, generator=g),
        split_patches(2, 6, 0.7, g),
    )
    total = [
        (painted[i, k, c] - targets[i, d, c]).item() ** 2
        for i in range(2)
        for k, d in enumerate(drop[i].tolist())
        for c in range(12)
    ]
    assert restoration_loss(painted, targets, drop).item() == pytest.approx(sum(total) / len(total))
    assert (
        restoration_loss(targets.gather(1, drop[..., None].expand(-1, -1, 12)), targets, drop) == 0
    )


def test_targets():
    x = torch.rand(2, 3, 32, 16)
    assert torch.equal(patch_targets(x, (8, 8)), patchify(normalise(x), (8, 8)))
    own = patch_targets(x, (8, 8), per_patch=True)
    assert torch.allclose(own.mean(-1), torch.zeros(2, 8), atol=1e-5) and torch.allclose(
        own.std(-1), torch.ones(2, 8), atol=1e-3
    )
    assert (patch_targets(torch.full((1, 3, 8, 8), 0.5), (8, 8), per_patch=True).isfinite()).all()


def test_objective_is_the_sum_of_its_parts(encoder):
    batch, tir = make_batch(encoder), TIR(encoder, 4)
    features = encoder(batch)
    torch.manual_seed(5)
    loss = tir(features, batch, encoder)
    torch.manual_seed(5)
    keep, drop = split_patches(4, 12, 0.7)
    painted = tir.decoder(
        encoder.encode_kept(normalise(grey(batch.pixels)), keep),
        keep,
        features.text_tokens,
        features.text_mask,
        drop,
    )
    assert torch.isclose(
        loss,
        (
            painted
            - patchify(normalise(batch.pixels), (16, 16)).gather(
                1, drop[..., None].expand(-1, -1, 768)
            )
        )
        .square()
        .mean(),
    )
    assert (
        OBJECTIVES["TIR"] is TIR
        and not tir.logs["restored"].requires_grad
        and tir.logs["restored"] < 1
    )


def test_erased_rectangles_and_kept_colours_do_not_matter(encoder):
    batch, tir = make_batch(encoder), TIR(encoder, 4)
    features = encoder(batch)
    assert not torch.allclose(batch.images, normalise(batch.pixels))

    def loss(pixels):
        torch.manual_seed(5)
        return tir(
            features,
            SimpleNamespace(pixels=pixels, images=torch.full_like(pixels, float("nan"))),
            encoder,
        )

    torch.manual_seed(5)
    keep, _ = split_patches(4, 12, 0.7)
    cut = patchify(batch.pixels, (16, 16))
    swapped = cut.gather(1, keep[..., None].expand(-1, -1, 768)).unflatten(2, (256, 3))
    luma = (
        (swapped * torch.tensor([0.2989, 0.5870, 0.1140]))
        .sum(-1, keepdim=True)
        .expand_as(swapped)
        .flatten(2)
    )  # same grey, other colour
    recoloured = unpatchify(
        cut.scatter(1, keep[..., None].expand(-1, -1, 768), luma), encoder.grid, (16, 16)
    )
    assert (
        torch.isclose(loss(recoloured), loss(batch.pixels), atol=1e-3)
        and loss(batch.pixels).isfinite()
    )


def test_every_part_learns(encoder):
    encoder, batch = copy.deepcopy(encoder).train(), make_batch(encoder)
    tir = TIR(encoder, 4)
    tir(encoder(batch), batch, encoder).backward()
    idle = [n for n, p in tir.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
    assert (
        encoder.clip.token_embedding.weight.grad.abs().sum() > 0
        and encoder.clip.visual.proj.grad.abs().sum() > 0
    )


@pytest.mark.parametrize(
    "image_size, patch", [((48, 80), 16), ((42, 14), 14), ((56, 28), 14), ((24, 8), 4)]
)
def test_any_image_and_patch_size(image_size, patch):
    encoder = small_vit(image_size, patch)
    batch, tir = make_batch(encoder), TIR(encoder, 4)
    assert tir(encoder(batch), batch, encoder).isfinite()
    assert restore(tir, encoder, batch.pixels, CAPTIONS)[1].shape == (4, 3, *image_size)


def test_bf16(encoder):
    batch, tir = make_batch(encoder), TIR(encoder, 4)

    def loss():
        torch.manual_seed(5)
        return tir(encoder(batch), batch, encoder)

    with torch.autocast("cpu", torch.bfloat16):
        half = loss()
    half.backward()
    assert (
        half.dtype == torch.float32
        and abs(half - loss()) < 0.03
        and all(p.grad.isfinite().all() for p in tir.parameters())
    )


def test_it_learns_one_batch(encoder):
    torch.manual_seed(0)
    encoder, batch = copy.deepcopy(encoder).train(), make_batch(encoder)
    batch.pixels = (
        torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 0]])[:, :, None, None]
        .expand(-1, -1, *encoder.image_size)
        .contiguous()
    )  # one flat colour per caption
    tir = TIR(encoder, 4, depth=1)
    weights = [*encoder.parameters(), *tir.parameters()]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(80):
        loss = tir(encoder(batch), batch, encoder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 and tir.logs["restored"] > 0.8
    region, other = (
        torch.ones(4, *encoder.image_size, dtype=torch.bool),
        [CAPTIONS[i] for i in (1, 0, 3, 2)],
    )
    right, wrong = (
        colour_error(restore(tir, encoder, batch.pixels, c, 8)[1], batch.pixels, region).mean()
        for c in (CAPTIONS, other)
    )
    assert wrong > 2 * right
    assert (
        colour_error(
            restore(tir, encoder, batch.pixels, other, 8)[1], batch.pixels[[1, 0, 3, 2]], region
        ).mean()
        < wrong
    )


@pytest.mark.parametrize("per_patch", [False, True])
def test_restore(encoder, per_patch):
    batch, tir = make_batch(encoder), TIR(encoder, 4, per_patch=per_patch)
    holes, shown = restore(
        tir, encoder, batch.pixels, CAPTIONS, generator=torch.Generator().manual_seed(0)
    )
    keep, drop = split_patches(4, 12, 0.7, torch.Generator().manual_seed(0))
    pick = lambda x, which: patchify(x, (16, 16)).gather(1, which[..., None].expand(-1, -1, 768))
    assert (
        torch.allclose(pick(shown, keep), pick(grey(batch.pixels), keep), atol=1e-6)
        and (pick(holes, drop) == 1).all()
    )
    assert 0 <= shown.min() and shown.max() <= 1 and not shown.requires_grad
    assert torch.equal(
        restore(
            tir, encoder, batch.pixels, batch.tokens, generator=torch.Generator().manual_seed(0)
        )[1],
        shown,
    )
    assert restore(tir, encoder, batch.pixels, [""] * 4, masks=3)[1].isfinite().all()


# bad input


def test_missing_pixels_tokens_or_grid(encoder):
    batch, tir = make_batch(encoder), TIR(encoder, 4)
    features = encoder(batch)
    with pytest.raises(TiprError, match="batch.pixels"):
        tir(features, Batch(batch.images, batch.tokens, batch.ids, batch.captions), encoder)
    features.text_tokens = None
    with pytest.raises(TiprError, match="gives no tokens"):
        tir(features, batch, encoder)
    resized = copy.deepcopy(encoder).resize((128, 48))
    with pytest.raises(TiprError, match="after resizing"):
        tir(resized(make_batch(resized)), make_batch(resized), resized)
    with pytest.raises(TiprError, match="one caption per picture"):
        restore(tir, encoder, batch.pixels, ["a"])


def test_tower_that_cannot_drop():
    with pytest.raises(TiprError, match="use a ViT"):
        TIR(SimpleNamespace(arch="RN50", clip=SimpleNamespace(visual=nn.Identity())), 4)


def test_colour_error():
    black, white = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[0, 1:3] = True
    e = colour_error(black, white, region)
    assert e[0] == pytest.approx(255 * 3**0.5) and e[1].isnan()
    half = white.clone()
    half[0, :, 0] = 0
    assert colour_error(half, white, region)[0] == 0


def test_two_processes_drop_what_one_would(encoder):
    batch, tir = make_batch(encoder, 4), TIR(encoder, 4)
    whole = encoder(batch)
    torch.manual_seed(5)
    loss = tir(whole, batch, encoder)
    parts = []
    for rank in (0, 1):
        rows = slice(2 * rank, 2 * rank + 2)
        mine = Features(
            whole.image,
            whole.text,
            whole.image_raw,
            whole.text_raw,
            whole.ids,
            whole.scale,
            whole.image_tokens[rows],
            whole.text_tokens[rows],
            whole.text_mask[rows],
            offset=2 * rank,
        )
        torch.manual_seed(5)
        parts.append(tir(mine, batch[rows], encoder))
    assert torch.isclose(sum(parts) / 2, loss)


def test_inference_imports_no_objective():
    code = "import sys, tipr_nb.models.clip, tipr_nb.evaluation, tipr_nb.data; print([m for m in ('tir', 'cmt', 'gif', 'tgte') if f'tipr_nb.{m}' in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_inference_is_the_baselines(encoder, tmp_path):
    batch, trained = make_batch(encoder), copy.deepcopy(encoder)
    TIR(trained, 4)  # building an objective leaves the encoder as it was
    trained.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path / "base")
    assert sum(p.numel() for p in trained.parameters()) == sum(
        p.numel() for p in encoder.parameters()
    )
    assert torch.equal(
        PersonCLIP.from_pretrained(tmp_path).encode_image(batch.images),
        encoder.encode_image(batch.images),
    )
