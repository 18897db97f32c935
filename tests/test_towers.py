"""The text tower without PyTorch says what the model says."""

import subprocess, sys, threading

import numpy as np
import pytest
from PIL import Image

from tipr_nb.core import TiprError
from tipr_nb.search import (
    TextTower,
    as_numpy,
    clean_text,
    export_text_tower,
    model_fingerprint,
    tokenizer_json,
)


@pytest.fixture(scope="module")
def model():
    import torch
    from tipr_nb.models import PersonCLIP

    torch.manual_seed(0)
    return PersonCLIP("tipr-nano").eval()


@pytest.fixture(scope="module")
def tower(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    import os

    old = os.environ.get("TIPR_CACHE")
    os.environ["TIPR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        assert export_text_tower(model, folder) == folder
    finally:
        os.environ.pop("TIPR_CACHE") if old is None else os.environ.update(TIPR_CACHE=old)
    return folder


TEXTS = [
    "A man in a red coat and blue trousers, carrying a backpack.",
    "",
    "she's 7'2\" & can't; £40 – “naïve” façade",
    "穿红色外套的男人",
    "emoji 🧥!!",
    "tab\tnew\nline",
    "x" * 500,
    "word " * 200,
    "schÃ¶n &lt;b&gt;",
    "\0",
    "İſΣ ΣΑΣ",
]


def test_tokens_equal_open_clips_for_the_full_vocabulary(model):
    import open_clip
    from tipr_nb.search import TextTokens

    reference = open_clip.tokenizer.SimpleTokenizer()
    tokens = TextTokens(
        tokenizer_json(reference), reference.sot_token_id, reference.eot_token_id, full=True
    )
    for text in TEXTS:
        assert tokens([text]).tolist() == reference([text]).tolist(), text


def test_features_equal_the_models(model, tower):
    run = TextTower(tower, model_fingerprint(model))
    for text in TEXTS:
        assert np.abs(run.encode_text([text]) - as_numpy(model.encode_text([text]))).max() < 1e-4
    assert np.abs(run.encode_text(TEXTS) - as_numpy(model.encode_text(TEXTS))).max() < 1e-4
    assert run.encode_text("one").shape == (1, model.dim) and np.allclose(
        np.linalg.norm(run.encode_text(TEXTS), axis=1), 1, atol=1e-5
    )


def test_no_torch_in_the_process(tower):
    code = f"from tipr_nb.search import TextTower; import sys; TextTower({str(tower)!r}).encode_text('a man'); print([m for m in ('torch', 'open_clip', 'transformers', 'torchvision') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_fingerprint_knows_weights_size_and_nothing_else(model, tmp_path):
    from tipr_nb.models import PersonCLIP
    import torch

    model.save_pretrained(tmp_path)
    again = PersonCLIP.from_pretrained(tmp_path)
    assert model_fingerprint(again) == model_fingerprint(model)
    again.attach("extra", torch.nn.Linear(2, 2))
    assert model_fingerprint(again) == model_fingerprint(model)  # add-ons do not decide features
    assert model_fingerprint(
        PersonCLIP.from_pretrained(tmp_path, image_size=(192, 64))
    ) != model_fingerprint(model)

    class Plain:
        pass

    with pytest.raises(TiprError, match="fingerprint"):
        model_fingerprint(Plain())


def test_damaged_towers(tower, model, tmp_path):
    import shutil

    def copy(name):
        return shutil.copytree(tower, tmp_path / name)

    broken = copy("a")
    (broken / "text.onnx").write_bytes((broken / "text.onnx").read_bytes()[:100])
    with pytest.raises(TiprError, match="100 bytes instead of"):
        TextTower(broken)
    broken = copy("b")
    (broken / "text.json").write_text("{")
    with pytest.raises(TiprError, match="not complete JSON"):
        TextTower(broken)
    broken = copy("c")
    data = (broken / "text.onnx").read_bytes()
    (broken / "text.onnx").write_bytes(b"\0" * len(data))
    with pytest.raises(TiprError, match="ONNX Runtime cannot read it"):
        TextTower(broken)
    broken = copy("d")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(TiprError, match="tokenizer.json"):
        TextTower(broken)
    with pytest.raises(TiprError, match="another model's"):
        TextTower(tower, "0" * 32)


def test_training_mode_is_restored_and_threads_agree(model, tower, tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    model.train()
    export_text_tower(model, tmp_path / "t")
    assert model.training
    model.eval()
    run, out = TextTower(tmp_path / "t"), [None] * 6

    def ask(i):
        out[i] = run.encode_text([f"a person with {i} bags"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(
        np.allclose(o, run.encode_text([f"a person with {i} bags"]), atol=1e-6)
        for i, o in enumerate(out)
    )


def test_other_encoders_have_no_tower(tmp_path):
    from tipr_nb.search import ColourModel

    assert (
        export_text_tower(ColourModel(), tmp_path / "t") is None and not (tmp_path / "t").exists()
    )


def test_cleaning():
    assert (
        clean_text("  A man&amp;woman\nin “Red” ") == 'a man&woman in "red"'
        and clean_text("") == ""
    )


def test_a_cached_tower_with_another_tokenizer_is_made_anew(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    export_text_tower(model, tmp_path / "a")
    kept = next((tmp_path / "cache" / "text-towers").glob("*/tokenizer.json"))
    kept.write_text(kept.read_text().replace("coat", "coot"), encoding="utf-8")
    export_text_tower(model, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json(
        model.tokenizer
    )


def test_image_tower_without_torch_says_what_the_model_says(model, tmp_path, monkeypatch):
    from PIL import Image
    from tipr_nb.search import export_image_tower, image_tower

    monkeypatch.setenv("TIPR_CACHE", str(tmp_path))
    fingerprint = model_fingerprint(model)
    assert image_tower(fingerprint) is None
    folder = export_image_tower(model)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
        for h, w in ((200, 90), (40, 60), model.image_size)
    ] + [Image.new("L", (9, 30))]
    for batch in (pictures, pictures[:1]):
        assert (
            np.abs(
                image_tower(fingerprint).encode_image(batch) - as_numpy(model.encode_image(batch))
            ).max()
            < 1e-4
        )
    code = f"from tipr_nb.search import image_tower; from PIL import Image; import sys; image_tower({fingerprint!r}).encode_image([Image.new('RGB', (9, 9))]); print([m for m in ('torch', 'open_clip', 'torchvision') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr
    (folder / "image.onnx").write_bytes(b"half")
    assert image_tower(fingerprint) is None and not folder.exists()
    assert export_image_tower(object()) is None


def test_a_tower_that_must_not_be_cut_keeps_its_padding(tmp_path, monkeypatch):
    "Towers without a causal mask see the padding: their export takes sentences at full length."
    from types import SimpleNamespace
    from tipr_nb.search import towers

    seen = []
    monkeypatch.setattr(
        towers,
        "trace_onnx",
        lambda encoder, forward, example, path, name, dynamic: seen.append(sorted(dynamic)),
    )
    for trims in (True, False):
        towers.export_onnx(
            SimpleNamespace(
                trims=trims,
                tokenize=lambda texts: SimpleNamespace(to=lambda device: None),
                device="cpu",
            ),
            tmp_path / "x",
        )
    assert seen == [[0, 1], [0]]


def test_token_selection_is_part_of_exported_towers(tmp_path, monkeypatch):
    "A model that searches by two features has both in its towers, and another fingerprint than without."
    import torch
    from tipr_nb.methods import attach_selection
    from tipr_nb.models import PersonCLIP
    from tipr_nb.search.towers import (
        TextTower,
        export_image_tower,
        export_text_tower,
        image_tower,
        model_fingerprint,
    )

    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = PersonCLIP("tipr-nano").eval()
    before = model_fingerprint(model)
    attach_selection(model).eval()
    after = model_fingerprint(model)
    assert before != after
    export_text_tower(model, tmp_path / "text")
    tower = TextTower(tmp_path / "text")
    words = [
        "a man in red",
        "a tall woman with a black bag, a long blue coat, white shoes and an umbrella",
        "hat",
    ] * 25
    want = model.encode_text(words).detach().numpy()
    assert tower.dim == model.feature_dim and np.abs(tower.encode_text(words) - want).max() < 1e-5
    assert export_image_tower(model) is not None
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (*model.image_size, 3), dtype=np.uint8))
        for _ in range(3)
    ]
    want = model.encode_image(pictures).detach().numpy()
    assert np.abs(image_tower(after).encode_image(pictures) - want).max() < 1e-5
