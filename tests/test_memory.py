"""Gradient caching against the plain step, checkpointing, low-rank updates, frozen towers: gradients, memory, checkpoints, bad input; one process and two."""

import copy, json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tipr_nb.methods import OBJECTIVES, Objective, build_objective, register_objective
from tipr_nb.models import PersonCLIP
from tipr_nb.core import TiprError
from tipr_nb.data import Batch
from tipr_nb.training import (
    RandomState,
    add_lora,
    average_gradients,
    batch_rows,
    cached_backward,
    check_cacheable,
    chunks_of,
    lora_layers,
    merge_lora,
    merged,
    peak_bytes,
)
from tipr_nb.training import RECIPES, Recipe
from tipr_nb.models import Checkpoints
from test_training import NANO, Trip, free_port, go, launch, last_weights, same, wait
import tipr_nb.methods.cmt, tipr_nb.methods.gif, tipr_nb.methods.tgte, tipr_nb.methods.tir  # noqa: F401, E401  (register their objectives)

WORDS = [
    "a man in red",
    "the same man with a bag",
    "a woman in blue jeans",
    "a woman",
    "a boy with a cap",
    "a boy",
    "someone tall",
    "someone in white with a scarf",
    "a girl",
    "a girl in green shoes",
]
SEN = ("SDM", "ID", "TIR", "CMT")


@pytest.fixture(scope="module")
def nano():
    return RECIPES["clip-tiny"].replace(name="nano", **NANO)


def make_batch(repeat=1):
    n = len(WORDS) * repeat
    encoder = PersonCLIP("tipr-nano")
    raw = torch.randint(
        0,
        255,
        (n, 3, *encoder.image_size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    return Batch(
        None,
        encoder.tokenize(WORDS).repeat(repeat, 1),
        torch.arange(n) // 2,
        WORDS * repeat,
        torch.arange(n),
        torch.arange(n),
        raw=raw,
    )


def gradients(names, size=None, dropout=0.0, prepare=lambda e: e, double=False):
    "Loss, parts, logs and gradients of one step on ten pairs, plain or in chunks."
    torch.manual_seed(0)
    encoder = prepare(PersonCLIP("tipr-nano")).train()
    objectives = nn.ModuleDict({n: build_objective(n, encoder, 5) for n in names})
    encoder.patch_dropout, batch, weights = (
        dropout,
        make_batch(),
        {n: 10.0 if n in ("TIR", "CMT") else 0.7 for n in names},
    )
    torch.manual_seed(1)
    if size:
        total, losses, logs = cached_backward(encoder, objectives, weights, batch, size)
    else:
        features = encoder(batch)
        losses = {n: o(features, batch, encoder) for n, o in objectives.items()}
        total = sum(weights[n] * v for n, v in losses.items())
        total.backward()
        logs = {f"{n}/{k}": v for n, o in objectives.items() for k, v in o.logs.items()}
    return (
        total.item(),
        {n: v.item() for n, v in losses.items()},
        logs,
        {
            n: p.grad
            for n, p in [*encoder.named_parameters(), *objectives.named_parameters()]
            if p.grad is not None
        },
    )


def nearly(a, b, within=1e-5):
    assert a.keys() == b.keys() and a
    for n in a:
        assert (a[n] - b[n]).abs().max() <= within * a[n].abs().max().clamp(min=1e-2), n


class TestGradientCaching:
    @pytest.mark.parametrize(
        "names",
        [
            ("ITC",),
            ("SDM",),
            ("TAL",),
            ("ID",),
            ("CMT",),
            ("TIR",),
            SEN,
            ("ITC", "SDM", "TAL", "ID", "CMT", "TIR"),
        ],
        ids="+".join,
    )
    @pytest.mark.parametrize("size", [1, 3, 5])
    def test_equals_the_plain_step(self, names, size):
        (a, parts_a, logs_a, grads_a), (b, parts_b, logs_b, grads_b) = (
            gradients(names),
            gradients(names, size),
        )
        assert (
            b == pytest.approx(a, rel=1e-5)
            and parts_b == pytest.approx(parts_a, rel=1e-5)
            and logs_a.keys() == logs_b.keys()
        )
        nearly(grads_a, grads_b)

    def test_patch_dropout_falls_alike(self):
        (a, _, _, want), (b, _, _, got) = (
            gradients(SEN, dropout=0.5),
            gradients(SEN, 3, dropout=0.5),
        )
        assert b == pytest.approx(a, rel=1e-5)
        nearly(want, got)

    def test_dropout_in_a_tower_is_replayed(self):
        seen = []

        class Noisy(nn.Dropout):
            def forward(self, x):
                y = super().forward(x)
                seen.append((y == 0).detach().clone())
                return y

        def noisy(encoder):
            encoder.clip.visual.ln_pre = nn.Sequential(encoder.clip.visual.ln_pre, Noisy(0.3))
            return encoder

        gradients(("ITC",), 4, prepare=noisy)
        first, second = seen[:3], seen[3:]
        assert (
            len(second) == 3
            and all(torch.equal(x, y) for x, y in zip(first, second))
            and not torch.equal(first[0], first[1])
        )

    def test_with_checkpointing_low_rank_and_frozen(self):
        def checkpointed(e):
            e.set_grad_checkpointing(True)
            return e

        def low_rank(e):
            return add_lora(e, 2)

        def frozen(e):
            e.clip.visual.requires_grad_(False)
            return e

        for prepare in (checkpointed, low_rank, frozen):
            (a, _, _, want), (b, _, _, got) = (
                gradients(SEN, prepare=prepare),
                gradients(SEN, 3, prepare=prepare),
            )
            assert b == pytest.approx(a, rel=1e-5)
            nearly(want, got)

    def test_all_frozen_but_a_classifier(self):
        def frozen(e):
            return e.requires_grad_(False)

        (_, _, _, want), (_, _, _, got) = (
            gradients(("ID",), prepare=frozen),
            gradients(("ID",), 3, prepare=frozen),
        )
        assert set(got) == {"ID.classifier.weight", "ID.classifier.bias"}
        nearly(want, got)

    def test_memory_falls(self):
        big = make_batch(8)

        def used(size):
            torch.manual_seed(0)
            encoder, big._images = PersonCLIP("tipr-nano").train(), None
            objective = nn.ModuleDict({"ITC": build_objective("ITC", encoder, 40)})
            if size:
                return peak_bytes(
                    lambda: cached_backward(encoder, objective, {"ITC": 1.0}, big, size)
                )
            return peak_bytes(lambda: objective["ITC"](encoder(big), big, encoder).backward())

        plain, chunked = used(0), used(8)
        assert chunked < 0.25 * plain

    def test_bf16(self):
        torch.manual_seed(0)
        encoder, batch = PersonCLIP("tipr-nano").train(), make_batch()
        objectives, other = (
            nn.ModuleDict({"SDM": build_objective("SDM", encoder, 5)}),
            copy.deepcopy(encoder),
        )
        context = lambda: torch.autocast("cpu", torch.bfloat16)
        cached_backward(encoder, objectives, {"SDM": 1.0}, batch, 5, context=context)
        with context():
            loss = objectives["SDM"](other(batch), batch, other)
        loss.backward()
        a, b = (
            torch.cat([p.grad.flatten() for p in e.parameters() if p.grad is not None])
            for e in (encoder, other)
        )
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99

    @pytest.mark.parametrize("name", ["GIF", "TGTE"])
    def test_what_cannot_be_split(self, name):
        with pytest.raises(TiprError, match="grad_checkpoint=True") as e:
            check_cacheable({name: build_objective(name, PersonCLIP("tipr-nano"), 4)})
        assert "\n" not in str(e.value) and name in str(e.value)

    def test_in_a_recipe(self, people, nano, tmp_path):
        r = nano.replace(objectives=["GIF"], extra_fields=("generated", "other"), grad_cache=4)
        with pytest.raises(TiprError, match="nano: grad_cache 4: GIF"):
            go(
                r,
                people,
                tmp_path / "a",
                extra={"generated": lambda i: torch.zeros(len(i), 3, 96, 32)},
            )

        @register_objective("Odd")
        class Odd(Objective):
            chunked = "sometimes"

        try:
            with pytest.raises(TiprError, match="Odd.chunked = 'sometimes'"):
                go(nano.replace(objectives=["Odd"], grad_cache=4), people, tmp_path / "b")
        finally:
            OBJECTIVES.pop("Odd")

    @pytest.mark.parametrize(
        "settings",
        [
            dict(),
            dict(patch_dropout=0.25, clip_grad=0.5, ema=0.9),
            dict(accumulate=2, batch_size=8),
        ],
    )
    def test_training_is_the_same(self, people, nano, tmp_path, settings):
        r = nano.replace(
            objectives=[
                ("SDM", {}),
                ("ID", {}),
                ("TIR", {"weight": 10.0}),
                ("CMT", {"weight": 10.0}),
            ],
            sampler="identity",
            eps=1e-3,
            epochs=1,
            log_every=1,
            **settings,
        )
        a, b = go(r, people, tmp_path / "a"), go(r.replace(grad_cache=3), people, tmp_path / "b")
        for k in ("loss", "loss/SDM", "loss/TIR"):
            assert b.history[k].dropna().tolist() == pytest.approx(
                a.history[k].dropna().tolist(), rel=1e-4
            )
        x, y = last_weights(a.path), last_weights(b.path)
        assert (
            max(
                (x["model.safetensors"][k] - y["model.safetensors"][k]).abs().max()
                for k in x["model.safetensors"]
            )
            < 1e-5
        )
        assert a.recipe.hash() == b.recipe.hash()

    def test_resume_is_exact(self, people, nano, tmp_path):
        r = nano.replace(grad_cache=3, objectives=["ITC", "TIR"], patch_dropout=0.25)
        for at in (3, 5):
            with pytest.raises(InterruptedError):
                go(r, people, tmp_path / "a", save_steps=2, callbacks=[Trip(at)])
        same(
            last_weights(go(r, people, tmp_path / "a").path),
            last_weights(go(r, people, tmp_path / "b").path),
        )

    def test_two_processes(self, home, people):
        names = [["SDM", {}], ["ID", {}], ["TIR", {"weight": 10.0}], ["CMT", {"weight": 10.0}]]
        settings = dict(eps=1e-3)
        runs = [
            launch(home, home / "plain", names, 1, settings=settings),
            launch(
                home,
                home / "chunks",
                names,
                1,
                2,
                port=free_port(),
                settings=settings | dict(grad_cache=3),
            ),
        ]
        wait([p for r in runs for p in r])
        a, b = last_weights(home / "plain"), last_weights(home / "chunks")
        for f in ("model.safetensors", "objectives.safetensors"):
            assert max((a[f][k] - b[f][k]).abs().max() for k in a[f]) < 1e-5
        one, two = (json.loads((home / n / "losses.json").read_text()) for n in ("plain", "chunks"))
        for x, y in zip(one, two):
            for k in ("loss/SDM", "loss/ID", "loss/CMT"):
                assert y[k] == pytest.approx(x[k], rel=1e-5, abs=1e-6)


class TestPieces:
    def test_chunks(self):
        assert chunks_of(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)] and chunks_of(2, 5) == [
            slice(0, 2)
        ]
        part = batch_rows(make_batch(), slice(2, 4))
        assert (
            part.captions == WORDS[2:4] and part.raw.shape[0] == 2 and part.ids.tolist() == [1, 1]
        )

    def test_random_state(self):
        state = RandomState(torch.device("cpu"))
        a = torch.rand(3)
        state.restore()
        assert torch.equal(a, torch.rand(3))

    def test_alone_nothing_is_averaged(self):
        p = nn.Parameter(torch.ones(2))
        average_gradients([p])
        assert p.grad is None

    def test_peak(self):
        assert peak_bytes(lambda: torch.zeros(250_000)) >= 1_000_000
        assert peak_bytes(lambda: [torch.zeros(250_000).sum() for _ in range(5)]) < 1_200_000


class TestCheckpointing:
    def test_same_gradient_less_memory(self):
        def on(e):
            e.set_grad_checkpointing(True)
            return e

        (a, _, _, want), (b, _, _, got) = gradients(SEN), gradients(SEN, prepare=on)
        assert a == b and all(torch.equal(want[n], got[n]) for n in want)
        big = make_batch(8)

        def used(prepare):
            torch.manual_seed(0)
            encoder, big._images = prepare(PersonCLIP("tipr-tiny").train()), None
            big.raw = torch.zeros(len(big), 3, *encoder.image_size, dtype=torch.uint8)
            return peak_bytes(lambda: encoder.image_features(big.images)[0].sum().backward())

        assert used(on) < 0.5 * used(lambda e: e)


class TestLowRank:
    def test_only_updates_learn_and_nothing_else_moves(self, people, nano, tmp_path):
        torch.manual_seed(0)
        encoder = PersonCLIP("tipr-nano")
        before = copy.deepcopy(encoder.state_dict())
        run = go(
            nano.replace(lora=4, objectives=["ITC", "ID"], lr=1e-2),
            people,
            tmp_path / "a",
            encoder=encoder,
        )
        after = run.model.state_dict()
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert before.keys() == after.keys() and not lora_layers(run.model)
        assert (
            all(
                any(
                    w in k
                    for w in ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
                )
                for k in moved
            )
            and len(moved) == 4 * 4
        )
        assert all(torch.linalg.matrix_rank(after[k] - before[k], rtol=1e-3) <= 4 for k in moved)

    def test_checkpoints_are_plain(self, people, nano, tmp_path):
        run = go(nano.replace(lora=2, lr=1e-2), people, tmp_path / "a")
        for folder in (tmp_path / "a" / "best", Checkpoints(tmp_path / "a").newest()):
            model = PersonCLIP.from_pretrained(folder)
            assert not any("lora" in k for k in load_file(folder / "model.safetensors"))
        assert torch.equal(
            PersonCLIP.from_pretrained(tmp_path / "a" / "best").encode_text(["a red coat"]),
            run.model.encode_text(["a red coat"]),
        )
        adapted = load_file(Checkpoints(tmp_path / "a").newest() / "adapted.safetensors")
        assert any("lora_A" in k for k in adapted) and model.arch == "tipr-nano"

    @pytest.mark.parametrize(
        "settings",
        [dict(), dict(ema=0.9, grad_cache=4), dict(grad_checkpoint=True, precision="bf16")],
    )
    def test_resume_is_exact(self, people, nano, tmp_path, settings):
        r = nano.replace(lora=2, lr=1e-2, objectives=["SDM", "ID"], **settings)
        for at in (3, 5):
            with pytest.raises(InterruptedError):
                go(r, people, tmp_path / "a", save_steps=2, callbacks=[Trip(at)])
        tripped, calm = go(r, people, tmp_path / "a"), go(r, people, tmp_path / "b")
        same(last_weights(tripped.path), last_weights(calm.path))
        assert calm.best == tripped.best

    def test_learns(self, people, nano, tmp_path):
        run = go(
            nano.replace(lora=8, lr=2e-2, epochs=6, augment=dict(erase=0.0, flip=0.0)),
            people,
            tmp_path / "a",
        )
        loss = run.history["loss"].dropna()
        assert loss.iloc[-3:].mean() < loss.iloc[:3].mean()

    def test_merging(self):
        torch.manual_seed(0)
        encoder = add_lora(PersonCLIP("tipr-nano").eval(), 3)
        for n, p in encoder.named_parameters():
            if "lora_B" in n:
                nn.init.normal_(p, std=0.1)
        want = encoder.encode_text(WORDS)
        plain = merged(encoder)
        assert (
            lora_layers(encoder)
            and not lora_layers(plain)
            and torch.allclose(plain.encode_text(WORDS), want, atol=1e-5)
            and all(p.requires_grad for p in plain.parameters())
        )
        assert (
            merge_lora(encoder) is encoder
            and torch.allclose(encoder.encode_text(WORDS), want, atol=1e-5)
            and merged(encoder) is encoder
        )
        assert add_lora(encoder, 2) is encoder

    @pytest.mark.full
    def test_two_processes(self, home, people):
        settings = dict(lora=4, lr=5e-3, eps=1e-3)
        wait(
            launch(home, home / "lora1", [["ITC", {}], ["ID", {}]], 1, settings=settings)
            + launch(
                home,
                home / "lora2",
                [["ITC", {}], ["ID", {}]],
                1,
                2,
                port=free_port(),
                settings=settings,
            )
        )
        a, b = (last_weights(home / n)["model.safetensors"] for n in ("lora1", "lora2"))
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5

    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: add_lora(PersonCLIP("tipr-nano"), 0), "rank"),
            (lambda: add_lora(add_lora(PersonCLIP("tipr-nano"), 2), 2), "merge_lora"),
            (lambda: add_lora(PersonCLIP("RN50"), 2), "use a ViT"),
            (lambda: Recipe("x", lora=-1), "lora = -1"),
            (lambda: Recipe("x", lora=0.5), "lora = 0.5"),
            (lambda: Recipe("x", grad_cache=-2), "grad_cache = -2"),
        ],
    )
    def test_slips(self, make, words):
        with pytest.raises(TiprError, match=words) as e:
            make()
        assert "\n" not in str(e.value)

    def test_without_peft(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(TiprError, match="pip install"):
            add_lora(PersonCLIP("tipr-nano"), 2)


class TestFrozen:
    def test_frozen_weights_stay(self, people, nano, tmp_path):
        torch.manual_seed(0)
        encoder = PersonCLIP("tipr-nano")
        before = copy.deepcopy(encoder.state_dict())
        after = go(
            nano.replace(freeze=["clip.visual"], lr=1e-2, weight_decay=0.1),
            people,
            tmp_path / "a",
            encoder=encoder,
        ).model.state_dict()
        assert {k for k in before if not torch.equal(before[k], after[k])} == {
            k for k in before if "visual" not in k and k in dict(encoder.named_parameters())
        }

    @pytest.mark.parametrize(
        "freeze, words",
        [
            (["clip.visaul"], "fits no weight"),
            (["("], "not a regular expression"),
            (["."], "nothing to learn"),
        ],
    )
    def test_slips(self, people, nano, tmp_path, freeze, words):
        with pytest.raises(TiprError, match=words) as e:
            go(nano.replace(freeze=freeze), people, tmp_path / "a")
        assert "\n" not in str(e.value)


def test_new_settings_change_no_hash():
    assert (
        Recipe("a", [("SDM", {}), ("ID", {"weight": 2})], epochs=10, warmup_epochs=1).hash()
        == "e0ccee239921"
    )
    assert (
        Recipe().hash()
        == Recipe(grad_cache=8, grad_checkpoint=True).hash()
        != Recipe(lora=4).hash()
    )


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_spread_weights_are_refused_at_the_start(people, nano, tmp_path, monkeypatch, kind):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(
        Accelerator, "distributed_type", property(lambda self: DistributedType[kind])
    )
    with pytest.raises(TiprError, match=f"ask for {kind}.*--multi_gpu") as e:
        go(nano, people, tmp_path / "a")
    assert "\n" not in str(e.value)
