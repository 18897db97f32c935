"""The commands of the ecosystem: convert, card, push, data export. Their work is tested in test_interop and test_hub; here only that the words reach it."""

import pytest

typer = pytest.importorskip("typer")
from typer.testing import CliRunner

from tipr_nb.cli import app


def tipr(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def one_line(result, words):
    assert (
        result.exit_code == 2
        and result.stderr.count("\n") == 1
        and words in result.stderr
        and "Traceback" not in result.stderr
    ), result.output


def test_convert(tmp_path):
    import torch
    from tipr_nb.models import (
        PersonCLIP,
    )  # before open_clip: torchvision may need its operators declared
    from open_clip.model import CLIP

    torch.manual_seed(0)
    clip = CLIP(
        embed_dim=64,
        vision_cfg=dict(image_size=(96, 32), patch_size=16, width=64, layers=1),
        text_cfg=dict(context_length=16, vocab_size=600, width=64, heads=1, layers=1),
        quick_gelu=True,
    )
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    one_line(tipr("convert", tmp_path / "clip.pt", tmp_path / "out"), "quick_gelu=True")
    done = tipr(
        "convert", tmp_path / "clip.pt", tmp_path / "out", "--quick-gelu", "--size", "64x32"
    )
    assert (
        done.exit_code == 0
        and "positions resampled from a grid of 6x2 to 4x2" in done.stdout
        and "model.safetensors" in done.stdout
    )
    assert PersonCLIP.from_pretrained(tmp_path / "out").image_size == (64, 32)
    again = tipr("convert", tmp_path / "out", tmp_path / "oc", "--to", "open_clip")
    assert again.exit_code == 0 and (tmp_path / "oc" / "open_clip_config.json").exists()
    one_line(tipr("convert", tmp_path / "clip.pt", tmp_path / "out", "--gelu"), "something in it")
    one_line(tipr("convert", tmp_path / "none.pt", tmp_path / "x"), "no such file")
    one_line(
        tipr("convert", tmp_path / "clip.pt", tmp_path / "x", "--to", "keras"),
        "choose tipr, open_clip, hf, onnx",
    )
    one_line(tipr("convert", tmp_path / "clip.pt", tmp_path / "x", "--size", "wide"), "--size")
    one_line(
        tipr("convert", tmp_path / "clip.pt", tmp_path / "x", "--to", "hf", "--quick-gelu"),
        "square",
    )
    assert not (tmp_path / "x").exists()


def test_export_card_and_push(tmp_path, monkeypatch):
    from tipr_nb.data import toy_people

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toy = toy_people(tmp_path / "toy", 6, 4)
    done = tipr("data", "export", "cuhk-pedes", tmp_path / "out", "--root", toy, "--split", "test")
    assert (
        done.exit_code == 0
        and "test-00000-of-00001.parquet" in done.stdout
        and not list((tmp_path / "out").rglob("train-*"))
    )
    one_line(
        tipr("data", "export", "cuhk-pedes", tmp_path / "out", "--root", toy), "something in it"
    )
    one_line(
        tipr("data", "export", "cuhk-pedes", tmp_path / "x", "--root", toy, "--split", "dev"),
        "no split 'dev'",
    )
    one_line(tipr("push", tmp_path / "out", "me/toy"), "cannot be reached")
    one_line(tipr("push", tmp_path / "out", "toy"), "owner/name")
    one_line(tipr("card", tmp_path), "no run.json")
