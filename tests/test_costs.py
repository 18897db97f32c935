"""Costs: a step is counted with its objectives, against a plain count; bad input."""

import pytest

torch = pytest.importorskip("torch")

from tipr_nb import costs
from tipr_nb.core import TiprError
from tipr_nb.models import PersonCLIP
from tipr_nb.training import get_recipe


def test_a_linear_layer_is_counted_exactly():
    layer = torch.nn.Linear(8, 16)
    x = torch.ones(4, 8, requires_grad=True)
    assert costs.count_flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    # The gradients of input and weight cost one product each.
    assert costs.count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_bytes_of_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    with costs.counted_bytes() as kept:
        x.exp().exp()
    assert sum(kept.values()) == 2 * 4000


@pytest.mark.parametrize("name", ["clip-tiny", "sdm-id-tiny", "tal-tiny", "sen-tiny", "gea-tiny"])
def test_objectives_are_part_of_the_cost(name):
    recipe = get_recipe(name)
    cost = costs.step_cost(recipe, 20, 50)
    encoder = PersonCLIP(recipe.arch, recipe.image_size).train()
    batch = costs.made_up_batch(encoder, 4, 20)

    def towers():
        features = encoder(batch)
        (features.image.sum() + features.text.sum()).backward()

    alone = costs.count_flops(towers) / 4
    assert cost.flops >= 0.99 * alone
    own_networks = name in ("sen-tiny", "gea-tiny")
    assert (cost.flops > 1.1 * alone) == own_networks
    assert cost.weights > sum(p.numel() for p in encoder.parameters()) * 0.99 and cost.bytes > 0


def test_identities_and_batch_cost_memory():
    recipe = get_recipe("sdm-id-tiny")
    few, many = (costs.step_cost(recipe, 20, n) for n in (100, 1100))
    width = PersonCLIP("tipr-tiny").dim
    assert (
        0 <= many.weights - few.weights - 1000 * width <= 1000
    )  # the classifier, with or without bias
    assert many.bytes > few.bytes  # and its logits
    small = costs.Gpu("small", 1, 0.01)
    assert costs.training_cost("sdm-id-tiny", 1000, 20)["fits"]
    assert not costs.training_cost("sdm-id-tiny", 1000, 20, small)["fits"]


def test_hours_follow_captions_epochs_and_card():
    one, two = (costs.training_cost("clip-tiny", n, 20) for n in (1000, 2000))
    assert two["hours"] == pytest.approx(2 * one["hours"])
    assert one["hours_low"] < one["hours"] < one["hours_high"]
    half = costs.Gpu("half", costs.GPUS["A100"].tflops / 2, 80)
    assert costs.training_cost("clip-tiny", 1000, 20, half)["hours"] == pytest.approx(
        2 * one["hours"]
    )


def test_unknown_card():
    with pytest.raises(TiprError, match="RTX 3090") as e:
        costs.training_cost("clip-tiny", 100, gpu="abacus")
    assert "\n" not in str(e.value)


def test_sizes_of_the_real_sets():
    for name in costs.TOKENS:
        size = costs.real_set(name)
        assert size["captions"] > 30_000 and size["n_ids"] > 3000 and size["tokens"] <= 77
