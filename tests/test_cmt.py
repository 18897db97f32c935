"CMT against loops and the released behaviour, and batches that triplet losses stumble over."

import os
from types import SimpleNamespace

import pytest, torch, torch.nn.functional as F

from tipr_nb.core import TiprError
from tipr_nb.methods import OBJECTIVES, build_objective
from tipr_nb.models import sdm_loss
from tipr_nb.methods import (
    CMT,
    cmt_loss,
    cmt_terms,
    cosine_matrix,
    gradient_share,
    hinge,
    positive_mask,
)


def pairs(b=24, n_ids=9, d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(n_ids, (b,), generator=g)
    photo = ids * 3 + torch.randint(
        3, (b,), generator=g
    )  # up to three photos an identity, some with several captions here
    person = torch.randn(n_ids, d, generator=g, dtype=dtype)[ids]
    image = person + 0.7 * torch.randn(3 * n_ids, d, generator=g, dtype=dtype)[photo]
    return image, person + 0.7 * torch.randn(b, d, generator=g, dtype=dtype), ids, photo


def loops(image, text, ids, margin, hard_positive, photo, same_photo):
    total, b = 0.0, len(ids)
    d = lambda x, y: 1 - (x @ y / (x.norm() * y.norm())).item()
    for anchors, others in ((text, image), (image, text)):
        for i in range(b):
            positive = [
                j
                for j in range(b)
                if j == i
                or hard_positive
                and ids[j] == ids[i]
                and (photo is None or same_photo or photo[j] != photo[i])
            ]
            negative = [j for j in range(b) if ids[j] != ids[i]]
            if negative:
                total += (
                    max(
                        0.0,
                        margin
                        + max(d(anchors[i], others[j]) for j in positive)
                        - min(d(anchors[i], others[j]) for j in negative),
                    )
                    / b
                )
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.6])
@pytest.mark.parametrize(
    "hard_positive, with_photo, same_photo",
    [(False, True, False), (True, True, False), (True, True, True), (True, False, False)],
)
def test_equals_loops(seed, margin, hard_positive, with_photo, same_photo):
    image, text, ids, photo = pairs(seed=seed)
    photo = photo if with_photo else None
    assert (
        abs(
            cmt_loss(image, text, ids, margin, hard_positive, photo, same_photo).item()
            - loops(image, text, ids, margin, hard_positive, photo, same_photo)
        )
        < 1e-12
    )


def test_the_four_positives_differ():
    image, text, ids, photo = pairs()
    values = [
        cmt_loss(image, text, ids, 0.6, *c).item()
        for c in ((False, photo), (True, photo), (True, photo, True))
    ]
    assert values[0] < values[1] < values[2] and values[2] == cmt_loss(image, text, ids, 0.6).item()


def test_released_behaviour():
    image, text, ids, _ = pairs()
    score = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    score[ids[:, None] == ids[None]] = -torch.inf
    triplet = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b), margin=0.05
    )
    assert torch.isclose(
        cmt_loss(image, text, ids, hard_positive=False),
        triplet(text, image, image[score.argmax(1)]) + triplet(image, text, text[score.argmax(0)]),
    )


def test_gradients():
    image, text, ids, photo = pairs(b=7, n_ids=3)
    free = image.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, t: cmt_loss(v, t, ids, 0.4, True, photo), free)


def test_zero_when_the_gap_is_there():
    eye = torch.eye(5)
    assert cmt_loss(eye, eye, torch.arange(5), margin=0.99) == 0 and cmt_loss(
        eye, eye, torch.arange(5), margin=1.25
    ) == pytest.approx(0.5)


def test_invariant_to_order_and_length():
    image, text, ids, photo = pairs()
    shuffle = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    assert torch.isclose(
        cmt_loss(image, text, ids, image_index=photo),
        cmt_loss(
            5 * image[shuffle],
            0.01 * text[shuffle],
            ids[shuffle] + 1000,
            image_index=photo[shuffle],
        ),
    )


def test_both_directions_count():
    image, text, ids, _ = pairs(b=12, n_ids=12)
    t2i, i2t = cmt_terms(image, text, ids)
    assert (
        torch.isclose(cmt_loss(image, text, ids), t2i.mean() + i2t.mean())
        and torch.equal(cmt_terms(text, image, ids)[0], i2t)
        and not torch.allclose(t2i, i2t)
    )


@pytest.mark.parametrize("hard_positive", [True, False])
@pytest.mark.parametrize("b", [1, 2, 6])
def test_single_identity_is_zero_with_zero_gradients(b, hard_positive):
    image, text = (
        torch.randn(b, 4, generator=torch.Generator().manual_seed(s)).requires_grad_()
        for s in (0, 1)
    )
    for photo in (None, torch.arange(b), torch.zeros(b, dtype=torch.long)):
        loss = cmt_loss(
            image, text, torch.full((b,), 3), hard_positive=hard_positive, image_index=photo
        )
        grads = torch.autograd.grad(loss, (image, text))
        assert loss == 0 and all((g == 0).all() for g in grads)


def test_singletons_fall_back_to_the_pair():
    image, text, *_ = pairs(b=10, n_ids=10)
    assert cmt_loss(image, text, torch.arange(10), 0.6, True) == cmt_loss(
        image, text, torch.arange(10), 0.6, False
    )


def test_one_photo_with_two_captions_falls_back_to_the_pair():
    image, text, *_ = pairs(b=4)
    ids, photo = torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 6, 6])
    assert cmt_loss(image, text, ids, 0.6, True, photo) == cmt_loss(image, text, ids, 0.6, False)


@pytest.mark.parametrize("feature", [torch.zeros(4, 8), torch.ones(4, 8), 1e4 * torch.ones(4, 8)])
def test_degenerate_features_stay_finite(feature):
    image, text = feature.clone().requires_grad_(), feature.clone().requires_grad_()
    loss = cmt_loss(image, text, torch.tensor([0, 0, 1, 2]))
    loss.backward()
    assert (
        loss.isfinite()
        and loss.item() == pytest.approx(0.1)
        and image.grad.isfinite().all()
        and text.grad.isfinite().all()
    )


def test_bf16_and_autocast_compute_in_float32():
    image, text, ids, _ = pairs(dtype=torch.float32)
    plain = cosine_matrix(image, text), cmt_loss(image, text, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = cosine_matrix(image, text), cmt_loss(image, text, ids)
    assert all(
        p.dtype == c.dtype == torch.float32 and torch.equal(p, c) for p, c in zip(plain, cast)
    )
    assert abs(cmt_loss(image.bfloat16(), text.bfloat16(), ids) - cmt_loss(image, text, ids)) < 0.02


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(text=torch.zeros(3, 8)), "both be"),
        (dict(image=torch.zeros(24)), "both be"),
        (dict(ids=torch.zeros(5)), "ids has shape"),
        (dict(image_index=torch.zeros(5)), "image_index"),
        (dict(margin=-0.1), "margin"),
        (dict(margin=2.0), "margin"),
        (dict(margin=float("nan")), "margin"),
    ],
)
def test_bad_input(change, says):
    image, text, ids, photo = pairs()
    with pytest.raises(TiprError, match=says) as e:
        cmt_loss(**(dict(image=image, text=text, ids=ids, image_index=photo) | change))
    assert "\n" not in str(e.value)


def test_positive_mask():
    ids, photo = torch.tensor([0, 0, 0, 1]), torch.tensor([4, 4, 5, 6])
    assert positive_mask(ids, photo).int().tolist() == [
        [1, 0, 1, 0],
        [0, 1, 1, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 1],
    ]
    assert positive_mask(ids, photo, same_photo=True).equal(positive_mask(ids))


def test_hinge_without_rivals_is_zero():
    assert hinge(
        torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool)
    ).tolist() == [0, 0, 0]


def test_gradient_share_is_what_autograd_says():
    image, text, ids, _ = pairs(dtype=torch.float32)

    def norm(f):
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        return torch.cat(torch.autograd.grad(f(*leaves), leaves)).norm()

    cmt, sdm = norm(lambda v, t: 10 * cmt_loss(v, t, ids)), norm(lambda v, t: sdm_loss(v, t, ids))
    assert gradient_share(image, text, ids) == pytest.approx((cmt / (cmt + sdm)).item(), rel=1e-5)
    with torch.no_grad():
        assert gradient_share(image, text, ids) > 0
    assert gradient_share(image, text, torch.zeros(24)) == 0


def test_objective_logs_and_has_no_weights():
    image, text, ids, photo = pairs(dtype=torch.float32)
    features, batch = (
        SimpleNamespace(image=image.requires_grad_(), text=text, ids=ids),
        SimpleNamespace(image_index=photo),
    )
    objective = build_objective("CMT", None, 9, log_every=2)
    assert OBJECTIVES["CMT"] is CMT and not list(objective.parameters())
    loss = objective(features, batch, None)
    assert (
        loss.item() == cmt_loss(image, text, ids, image_index=photo).item() and loss.requires_grad
    )
    assert (
        0 < objective.logs["active"] <= 1
        and 0 < objective.logs["gradient_share"] < 1
        and not any(v.requires_grad for v in objective.logs.values())
    )
    objective.logs.pop("gradient_share")
    objective(features, batch, None)
    assert "gradient_share" not in objective.logs
    objective(features, batch, None)
    assert "gradient_share" in objective.logs
    assert (
        build_objective("CMT", None, 9)(features, SimpleNamespace(image_index=None), None).item()
        == cmt_loss(image, text, ids).item()
    )


@pytest.mark.parametrize("kw", [dict(margin=-1), dict(margin=3), dict(margni=0.1)])
def test_objective_bad_arguments(kw):
    with pytest.raises(TiprError):
        build_objective("CMT", None, 9, **kw)


def _rank(rank, folder, answers):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    image, text, ids, photo = pairs(b=8, dtype=torch.float32)
    mine = slice(4 * rank, 4 * rank + 4)
    loss = CMT(None, 9, log_every=0)(
        SimpleNamespace(image=image, text=text, ids=ids),
        SimpleNamespace(image_index=photo[mine]),
        None,
    )
    answers[rank] = loss.item()
    dist.destroy_process_group()


def test_two_processes_know_all_photos(tmp_path):
    import torch.multiprocessing as mp

    with mp.Manager() as manager:
        answers = manager.dict()
        mp.spawn(_rank, (str(tmp_path), answers), nprocs=2)
        got = dict(answers)
    image, text, ids, photo = pairs(b=8, dtype=torch.float32)
    assert got[0] == got[1] == pytest.approx(cmt_loss(image, text, ids, image_index=photo).item())
