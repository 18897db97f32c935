"Pipelines, images from captions, folders of them, and the small generator's training, on tiny random pipelines."

import errno, json, os, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

import tipr_nb.generation.generator as generator_module
from tipr_nb.core import TiprError, read_json, write_json
from tipr_nb.models import PersonCLIP
from tipr_nb.generation import (
    GeneratorRecipe,
    GeneratorRun,
    Pairs,
    colour_accuracy,
    colour_hits,
    diffusion_loss,
    noise_steps,
    region_colour,
    small_pipeline,
    states_of,
    train_generator,
    world_portraits,
)
from tipr_nb.generation import (
    PersonGenerator,
    Pictures,
    add_pictures,
    caption_seed,
    check_caption,
    generate_split,
    open_pictures,
    pictures_for,
    words_lost,
)
from tipr_nb.generation import (
    PatchCodec,
    check_pipeline,
    fit_codec,
    hf_text_tower,
    load_pipeline,
    toy_pipeline,
)

CAPTIONS = [
    "a woman in a red coat",
    "a man with a blue backpack",
    "somebody in white trousers",
    "a tall man",
    "a girl in green",
]
split = lambda captions: SimpleNamespace(captions=list(captions))
one_line = lambda e: "\n" not in str(e.value)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("pipe") / "toy")


@pytest.fixture(scope="module")
def generator(toy):
    return PersonGenerator.from_pretrained(toy, device="cpu", steps=2, guidance=2.0, batch_size=2)


@pytest.fixture(scope="module")
def held():
    return world_portraits(40, seed=1, regions=True)


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).rglob("*.png")}


# pipelines
def test_codec_there_and_back(held):
    x = np.asarray(held.pictures).transpose(0, 2, 3, 1)
    codec = fit_codec(x[:40], 8, 40)
    y = torch.from_numpy(np.asarray(held.pictures[40:])).float() / 127.5 - 1
    with torch.no_grad():
        z = codec.encode(y).latent_dist.mode()
        back = codec.decode(z).sample
    assert z.shape[1:] == (40, 12, 4) and abs(z.std() - 1) < 0.3
    assert -10 * ((back - y) / 2).square().mean().log10() > 22


def test_text_tower_gives_the_same_features():
    clip = PersonCLIP("tipr-nano")
    tower, tokenizer = hf_text_tower(clip)
    tokens = clip.tokenize(CAPTIONS)
    with torch.no_grad():
        states = (
            tower(
                tokenizer(CAPTIONS, padding=True, return_tensors="pt").input_ids
            ).last_hidden_state
            @ clip.clip.text_projection
        )
        _, ours, mask = clip.text_features(tokens)
    assert torch.allclose(states[mask], ours[mask], atol=1e-5)


@pytest.mark.parametrize("kind", ["patch", "kl"])
def test_loads_stable_diffusion_layout(kind, toy, tmp_path):
    folder = toy if kind == "patch" else toy_pipeline(tmp_path / "kl", codec="kl")
    assert set(check_pipeline(folder)) >= {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    g = PersonGenerator.from_pretrained(folder, device="cpu", steps=1)
    assert type(g.pipeline).__name__ == "StableDiffusionPipeline" and g.generate("a man")[
        0
    ].size == (32, 96)


def broken(toy, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(toy, folder)
    change(folder)
    with pytest.raises(TiprError) as e:
        load_pipeline(folder, device="cpu")
    assert one_line(e)
    return str(e.value)


def edit(folder, **changes):
    write_json(
        folder / "model_index.json",
        {
            k: v
            for k, v in (json.loads((folder / "model_index.json").read_text()) | changes).items()
            if v is not None
        },
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: shutil.rmtree(d / "unet"), "unet"),
        (
            lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            "no .safetensors",
        ),
        (
            lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").rename(
                d / "unet" / "diffusion_pytorch_model.bin"
            ),
            "pickle",
        ),
        (
            lambda d: write_json(
                d / "unet" / "diffusion_pytorch_model.safetensors.index.json",
                dict(weight_map={"a": "part-2.safetensors"}),
            ),
            "part-2.safetensors is missing",
        ),
        (lambda d: (d / "model_index.json").write_text('{"_class'), "not complete JSON"),
        (lambda d: edit(d, tokenizer=None), "names no tokenizer"),
        (lambda d: edit(d, unet=["diffusers", "AutoencoderKL"]), "cannot load"),
        (lambda d: edit(d, vae=["somewhere.else", "Codec"]), "cannot load"),
        (
            lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
                (d / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:1000]
            ),
            "cannot load",
        ),
    ],
)
def test_broken_folders_are_named(toy, tmp_path, change, says):
    assert says in broken(toy, tmp_path, change)


def test_hub_id_offline():
    with pytest.raises(TiprError, match="owner/no-such") as e:
        PersonGenerator.from_pretrained("owner/no-such")
    assert one_line(e) and "HF_HUB_OFFLINE" in str(e.value)


def test_without_shipped_weights(monkeypatch):
    monkeypatch.setattr(generator_module, "shipped_weights", dict)
    with pytest.raises(TiprError, match="embedded generator") as e:
        PersonGenerator.from_pretrained()
    assert one_line(e)


def test_safety_checker_is_explicit(toy, generator):
    assert generator.settings()["safety_checker"] is False
    with pytest.raises(TiprError, match="no safety checker"):
        PersonGenerator.from_pretrained(toy, safety_checker=True, device="cpu")


def test_blacked_out_pictures_are_told(generator, monkeypatch):
    real = generator.pipeline

    class Checked:
        def __call__(self, *args, **kwargs):
            out = real(*args, **kwargs)
            out.nsfw_content_detected = [True] * len(out.images)
            return out

    monkeypatch.setattr(generator, "pipeline", Checked())
    with pytest.warns(UserWarning, match="blacked out 1 of 1"):
        generator.draw(["a man"], [0])


def test_bad_lora(toy, tmp_path):
    for bad in (toy / "unet", tmp_path / "nothing"):
        with pytest.raises(TiprError) as e:
            load_pipeline(toy, lora=bad, device="cpu")
        assert one_line(e)


def test_peft_lora_changes_pictures_and_settings(toy, generator, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_pipeline(toy, device="cpu")[0].unet, LoraConfig(r=2, target_modules=["to_q", "to_v"])
    )
    for n, p in model.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(tmp_path / "lora")
    g = PersonGenerator.from_pretrained(
        toy, lora=tmp_path / "lora", device="cpu", steps=2, guidance=2.0, batch_size=2
    )
    assert g.settings()["weights"] != generator.settings()["weights"]
    assert (
        np.abs(
            np.asarray(g.generate("a man")[0]).astype(int)
            - np.asarray(generator.generate("a man")[0])
        ).max()
        > 3
    )


# pictures from captions
def test_seeds():
    assert (
        caption_seed("a", 1, 2) == caption_seed(" a ", 1, 2)
        and len(
            {caption_seed("a"), caption_seed("b"), caption_seed("a", 1), caption_seed("a", 0, 1)}
        )
        == 4
    )
    assert (
        caption_seed("a woman in a red coat") == 8712508275663707426
    )  # the same on any machine, for ever


def test_same_caption_same_picture_whatever_the_batch(generator):
    all_at_once, alone = generator.generate(CAPTIONS), [generator.generate(c)[0] for c in CAPTIONS]
    for a, b in zip(all_at_once, alone):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert np.abs(np.asarray(all_at_once[0]).astype(int) - np.asarray(all_at_once[1])).max() > 10


@pytest.mark.parametrize("bad", ["", "  ", None, 3])
def test_empty_captions(generator, bad):
    with pytest.raises(TiprError, match=r"captions\[1\]: empty"):
        generator.generate(["a man", bad])


def test_long_captions_say_what_is_cut(generator):
    long = "very " * 100 + "blue umbrella"
    assert (
        words_lost(generator.pipeline.tokenizer, long).endswith("blue umbrella")
        and words_lost(generator.pipeline.tokenizer, "a man") == ""
    )
    with pytest.warns(UserWarning, match="1 of 2 captions are longer.*blue umbrella"):
        generator.generate([long, "a man"])


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(prompt="x"), "caption"),
        (dict(steps=0), "steps"),
        (dict(image_size=(95, 32)), "multiples of 4"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_bad_settings(generator, bad, says):
    with pytest.raises(TiprError, match=says):
        PersonGenerator(generator.pipeline, **bad)


def test_save_and_load(generator, tmp_path):
    before = generator.settings()["weights"]
    generator.save_pretrained(tmp_path / "saved")
    assert (
        generator.pipeline.unet.dtype == torch.float32 and generator.settings()["weights"] == before
    )
    again = PersonGenerator.from_pretrained(tmp_path / "saved", device="cpu", batch_size=2)
    assert (again.steps, again.guidance) == (2, 2.0)
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as f:
        assert f.get_tensor(next(iter(f.keys()))).dtype == torch.float16


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("a {caption} {", "stray brace"),
        ("} {caption}", "stray brace"),
        ("{caption} {place}", "place"),
        ("{caption} {}", "means nothing"),
        ("{caption!r:>{n}}", "n"),
        ("none", "no {caption}"),
    ],
)
def test_stray_braces_in_a_prompt(toy, generator, prompt, says):
    for make in (
        lambda: PersonGenerator(generator.pipeline, prompt=prompt),
        lambda: PersonGenerator.from_pretrained(toy, device="cpu", prompt=prompt),
    ):
        with pytest.raises(TiprError, match="prompt=") as e:
            make()
        assert one_line(e) and says in str(e.value)
    assert (
        PersonGenerator(generator.pipeline, prompt="{{sharp}} {caption}").prompt.format(caption="x")
        == "{sharp} x"
    )


def test_nan_stops_with_one_line_and_leaves_the_folder_free(toy, generator, tmp_path):
    damaged = PersonGenerator.from_pretrained(toy, device="cpu", steps=1, batch_size=2)
    with torch.no_grad():
        damaged.pipeline.unet.conv_in.weight[0] = float("nan")
    with pytest.raises(TiprError, match="NaN.*float32") as e:
        damaged.generate("a man")
    assert one_line(e)
    with pytest.raises(TiprError, match="NaN"):
        generate_split(damaged, split(CAPTIONS), tmp_path / "p", report=lambda _: None)
    assert not files(tmp_path / "p")
    pics = generate_split(
        generator, split(CAPTIONS), tmp_path / "p", report=lambda _: None
    )  # other settings may have the folder
    assert (
        len(files(pics.folder)) == 5
        and read_json(pics.folder / "manifest.json")["settings"] == generator.settings()
    )
    with pytest.raises(TiprError, match="were made with"):
        generate_split(damaged, split(CAPTIONS), tmp_path / "p", report=lambda _: None)
    assert read_json(pics.folder / "manifest.json")["settings"] == generator.settings()


def test_a_folder_taken_meanwhile_is_not_mixed(generator, tmp_path, monkeypatch):
    "Two generators start on one empty folder; the one whose first picture comes later is refused."
    other = PersonGenerator(generator.pipeline, steps=1, guidance=2.0, batch_size=2)
    real = PersonGenerator.draw

    def late(self, captions, seeds):
        monkeypatch.setattr(PersonGenerator, "draw", real)
        generate_split(other, split(CAPTIONS), tmp_path / "p", report=lambda _: None)
        return real(self, captions, seeds)

    monkeypatch.setattr(PersonGenerator, "draw", late)
    with pytest.raises(TiprError, match="steps=1"):
        generate_split(generator, split(CAPTIONS), tmp_path / "p", report=lambda _: None)
    assert files(tmp_path / "p") == files(
        generate_split(other, split(CAPTIONS), tmp_path / "q", report=lambda _: None).folder
    )


def test_black_pictures_never_count(generator, tmp_path, monkeypatch):
    from PIL import Image

    real, told = PersonGenerator.draw, []

    def some_black(self, captions, seeds):
        return [
            Image.new("RGB", im.size) if c == CAPTIONS[0] else im
            for c, im in zip(captions, real(self, captions, seeds))
        ]

    monkeypatch.setattr(PersonGenerator, "draw", some_black)
    pics = generate_split(generator, split(CAPTIONS), tmp_path / "p", report=told.append)
    assert (
        len(files(pics.folder)) == 4
        and not pics.has(CAPTIONS[0])
        and any("1 pictures came out black" in line for line in told)
    )
    pics.path(CAPTIONS[0]).parent.mkdir(exist_ok=True)
    Image.new("RGB", (32, 96)).save(pics.path(CAPTIONS[0]))  # as an older version kept them
    assert not pics.has(CAPTIONS[0])
    monkeypatch.setattr(
        PersonGenerator,
        "draw",
        lambda self, captions, seeds: [Image.new("RGB", (32, 96)) for _ in captions],
    )
    with pytest.raises(TiprError, match="came out black") as e:
        generate_split(generator, split(["nobody"]), tmp_path / "q", report=told.append)
    assert one_line(e)
    monkeypatch.setattr(PersonGenerator, "draw", real)
    assert (
        len(
            files(
                generate_split(
                    generator, split(CAPTIONS), tmp_path / "p", report=told.append
                ).folder
            )
        )
        == 5
    )


def test_leftovers_are_swept(generator, tmp_path):
    pics = generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    place = pics.path(CAPTIONS[0]).parent
    for name, age in ((".a_0.1.tmp", 7200), (".b_0.2.tmp", 0)):
        (place / name).write_bytes(b"half")
        os.utime(place / name, (os.path.getmtime(place / name) - age,) * 2)
    generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    assert [p.name for p in place.glob(".*.tmp")] == [
        ".b_0.2.tmp"
    ]  # another process may be writing that one


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"settings": 3, "per_caption": 1}',
        '{"settings": {}, "per_caption": "2"}',
        '{"settings": {}, "per_caption": 0}',
    ],
)
def test_odd_manifests(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(TiprError, match="manifest.json") as e:
        open_pictures(tmp_path)
    assert one_line(e)


@pytest.mark.parametrize("table", [b"", b"\xff\xfe", b"a,b\n1,2\n", b'"never closed'])
def test_a_damaged_table_of_captions_is_made_anew(generator, tmp_path, table):
    generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    want = (tmp_path / "captions.csv").read_bytes()
    (tmp_path / "captions.csv").write_bytes(table)
    generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    assert (tmp_path / "captions.csv").read_bytes() == want


def test_a_fresh_picture_each_epoch(generator, tmp_path):
    pics = generate_split(
        generator, split(CAPTIONS[:2]), tmp_path, per_caption=3, report=lambda _: None
    )
    field, seen = pics.field(split(CAPTIONS[:2]), (96, 32), choose="epoch"), []
    for epoch in (0, 1, 2, 3):
        field.set_epoch(epoch)
        seen.append(field(np.array([0, 1])))
        assert torch.equal(seen[-1], field(np.array([0, 1])))  # no dice
    assert torch.equal(seen[0], seen[3]) and all(
        (seen[a][i] != seen[b][i]).any() for a, b in ((0, 1), (1, 2), (0, 2)) for i in (0, 1)
    )
    with pytest.raises(TiprError, match="epoch"):
        pics.field(split(CAPTIONS), (96, 32), choose="epok")
    short = generate_split(generator, split(["a woman"]), tmp_path / "short", report=lambda _: None)
    first = short.field(split(CAPTIONS[:1]), (96, 32), wording=lambda c: " ".join(c.split()[:2]))(
        np.array([0])
    )
    assert (first[0].permute(1, 2, 0).numpy() == np.asarray(short.open("a woman"))).all()


@pytest.mark.parametrize(
    "identities, ids", [("person", [0, 0, 1]), ("own", [2, 2, 3]), ("caption", [2, 3, 4])]
)
def test_pictures_as_further_pairs(generator, tmp_path, identities, ids):
    from tipr_nb.data import Split

    pixels = np.arange(2 * 96 * 32 * 3, dtype=np.uint8).reshape(2, 96, 32, 3)
    people = Split(
        "train",
        [Path("a.jpg"), Path("b.jpg")],
        [0, 1],
        CAPTIONS[:3],
        [0, 0, 1],
        [0, 0, 1],
        dict(family=np.array([7, 9]), pixels=pixels, box=np.ones((2, 4))),
        dict(kind=np.array(["x", "y", "z"])),
    )
    pics = generate_split(generator, people, tmp_path, report=lambda _: None)
    grown = add_pictures(people, pics, identities)
    assert (
        grown.captions == CAPTIONS[:3] * 2
        and grown.caption_ids.tolist() == [0, 0, 1, *ids]
        and grown.images[2:] == [pics.path(c) for c in CAPTIONS[:3]]
    )
    assert sorted(set(grown.image_ids.tolist())) == list(
        range(grown.n_ids)
    ) and grown.caption_image.tolist() == [0, 0, 1, 2, 3, 4]
    assert grown.image_columns["family"].tolist() == [7, 9, 7, 7, 9] and grown.caption_columns[
        "kind"
    ].tolist() == list("xyzxyz")
    assert (
        np.isnan(grown.image_columns["box"][2:]).all()
        and (grown.image_columns["pixels"][2] == np.asarray(pics.open(CAPTIONS[0]))).all()
    )
    with pytest.raises(TiprError, match="own"):
        add_pictures(people, pics, "nobody")
    pics.path(CAPTIONS[0]).unlink()
    with pytest.raises(TiprError, match="1 of the captions"):
        add_pictures(people, pics)


# folders of pictures
def test_split_is_drawn_once_and_resumed(generator, tmp_path, monkeypatch):
    told = []
    pics = generate_split(
        generator, split(CAPTIONS + CAPTIONS[:2]), tmp_path / "a", report=told.append
    )
    want = files(pics.folder)
    assert (
        len(want) == 5
        and "5 different captions" in told[0]
        and "pictures/s" in told[-1]
        and any("about" in line for line in told)
    )
    assert read_json(tmp_path / "a" / "manifest.json")["settings"] == generator.settings()
    real, calls = PersonGenerator.draw, []

    def killed(self, captions, seeds):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(captions)
        return real(self, captions, seeds)

    monkeypatch.setattr(PersonGenerator, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_split(generator, split(CAPTIONS), tmp_path / "b", report=told.append)
    monkeypatch.setattr(PersonGenerator, "draw", real)
    some = next((tmp_path / "b").rglob("*.png"))
    some.write_bytes(some.read_bytes()[:150])  # cut short by a power failure
    generate_split(generator, split(CAPTIONS), tmp_path / "b", report=told.append)
    assert files(tmp_path / "b") == want and not list((tmp_path / "b").rglob("*.tmp"))
    monkeypatch.setattr(PersonGenerator, "draw", None)  # nothing left to draw
    generate_split(generator, split(CAPTIONS), tmp_path / "b", report=told.append)


def test_processes_share_without_overlap(generator, tmp_path):
    want = files(
        generate_split(
            generator, split(CAPTIONS), tmp_path / "one", per_caption=2, report=lambda _: None
        ).folder
    )
    parts = []
    for rank in range(3):
        generate_split(
            generator,
            split(CAPTIONS),
            tmp_path / "many",
            per_caption=2,
            rank=rank,
            world_size=3,
            report=lambda _: None,
        )
        parts.append(
            set(files(tmp_path / "many")) - set().union(*parts)
            if parts
            else set(files(tmp_path / "many"))
        )
    assert files(tmp_path / "many") == want and sum(map(len, parts)) == 10 and all(parts)


@pytest.mark.parametrize(
    "change",
    [
        dict(steps=3),
        dict(seed=1),
        dict(guidance=3.0),
        dict(prompt="photo of {caption}"),
        dict(negative_prompt="blur"),
    ],
)
def test_settings_never_mix(generator, tmp_path, change):
    generate_split(generator, split(CAPTIONS[:1]), tmp_path, report=lambda _: None)
    other = PersonGenerator(
        generator.pipeline, **(dict(steps=2, guidance=2.0, batch_size=2) | change)
    )
    before = files(tmp_path)
    with pytest.raises(TiprError, match=next(iter(change))) as e:
        generate_split(other, split(CAPTIONS), tmp_path, report=lambda _: None)
    assert one_line(e) and files(tmp_path) == before


def test_other_weights_and_number_never_mix(generator, tmp_path):
    generate_split(generator, split(CAPTIONS[:1]), tmp_path / "p", report=lambda _: None)
    with pytest.raises(TiprError, match="per_caption=1"):
        generate_split(
            generator, split(CAPTIONS), tmp_path / "p", per_caption=2, report=lambda _: None
        )
    other = PersonGenerator.from_pretrained(
        toy_pipeline(tmp_path / "toy2", seed=1), device="cpu", steps=2, guidance=2.0, batch_size=2
    )
    with pytest.raises(TiprError, match="weights="):
        generate_split(other, split(CAPTIONS), tmp_path / "p", report=lambda _: None)


def test_disk_full_in_the_middle(generator, tmp_path, monkeypatch):
    from PIL import Image

    real, n = Image.Image.save, []

    def full(self, *args, **kwargs):
        n.append(1)
        if len(n) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(TiprError, match="no space left") as e:
        generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    assert one_line(e) and len(files(tmp_path)) == 2 and not list(tmp_path.rglob("*.tmp"))
    generate_split(generator, split(CAPTIONS), tmp_path, report=lambda _: None)
    assert len(files(tmp_path)) == 5


def test_pictures_of_a_dataset(generator, tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "cache"))
    data = SimpleNamespace(
        name="toy",
        splits=dict(
            train=SimpleNamespace(captions=["a man", "a woman", "a man "]),
            val=SimpleNamespace(captions=["a woman", "a child"]),
        ),
    )
    said = []
    first = pictures_for(data, ["train"], generator, report=said.append)
    assert (
        first.folder.is_relative_to(tmp_path / "cache")
        and first.has("a man")
        and not first.has("a child")
        and "2 different captions" in said[0]
    )
    both = pictures_for(data, ["train", "val"], generator, report=said.append)
    assert (
        both.folder == first.folder
        and "2 for this process" in said[-2]
        and len(list(both.folder.rglob("*.png"))) == 3
    )
    n = len(said)
    assert (
        pictures_for(data, ["val"], generator, report=said.append).folder == first.folder
        and len(said) == n
    )  # nothing left to say
    other = PersonGenerator(
        generator.pipeline,
        image_size=generator.image_size,
        steps=generator.steps + 1,
        guidance=generator.guidance,
    )
    assert pictures_for(data, ["val"], other, report=said.append).folder != first.folder
    with pytest.raises(TiprError, match="tset"):
        pictures_for(data, ["tset"], generator)
    with pytest.raises(TiprError, match="steps"):
        pictures_for(data, ["val"], other, first.folder)


def test_reading_pictures(generator, tmp_path):
    pics = generate_split(
        generator, split(CAPTIONS), tmp_path / "p", per_caption=2, report=lambda _: None
    )
    assert open_pictures(tmp_path / "p").per_caption == 2
    field = pics.field(split(CAPTIONS), (96, 32))
    assert (
        field(np.array([0, 3])).shape == (2, 3, 96, 32)
        and field(np.array([0])).dtype == torch.uint8
    )
    one = Pictures(pics.folder, 1)
    own, other = (
        one.field(split(CAPTIONS), (96, 32))(np.arange(5)),
        one.field(split(CAPTIONS), (96, 32), shuffle=0)(np.arange(5)),
    )
    assert all((a != b).any() for a, b in zip(own, other))
    path = pics.path(CAPTIONS[0])
    path.write_bytes(path.read_bytes()[:200])
    assert not pics.has(CAPTIONS[0])
    for caption, says in ((CAPTIONS[0], "damaged"), ("nobody drew this", "no picture of")):
        with pytest.raises(TiprError, match=says) as e:
            pics.open(caption)
        assert one_line(e)
    with pytest.raises(TiprError, match="manifest.json"):
        open_pictures(tmp_path)
    with pytest.raises(TiprError, match="caption 1: empty"):
        generate_split(generator, split(["a", " "]), tmp_path / "q")
    with pytest.raises(TiprError, match="no captions"):
        generate_split(generator, split([]), tmp_path / "q")


@pytest.mark.full
def test_two_real_processes(toy, generator, tmp_path):
    want = files(
        generate_split(generator, split(CAPTIONS), tmp_path / "one", report=lambda _: None).folder
    )
    code = """
import sys
from types import SimpleNamespace
from tipr_nb.generation import PersonGenerator, generate_split
generator = PersonGenerator.from_pretrained(sys.argv[1], device="cpu", steps=2, guidance=2., batch_size=2)
generate_split(generator, SimpleNamespace(captions=eval(sys.argv[3])), sys.argv[2])
"""
    env = dict(
        os.environ,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29617",
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(toy), str(tmp_path / "two"), repr(CAPTIONS)],
            env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
        )
        for r in range(2)
    ]
    assert all(j.wait(300) == 0 for j in jobs) and files(tmp_path / "two") == want


# training the generator
def test_oracle_on_true_portraits(held):
    index = np.arange(len(held))
    true = held.batch(index)[0].permute(0, 2, 3, 1).numpy()
    t = colour_accuracy(true, held, index)
    assert (t.accuracy > 75).all() and (t.shuffled < 50).all() and (t.n > 10).all()
    red = np.zeros((96, 32, 3), np.uint8) + np.array([192, 32, 38], np.uint8)
    assert (
        region_colour(red, np.ones((96, 32), bool)) == "red"
        and region_colour(red, np.zeros((96, 32), bool)) == ""
    )
    with pytest.raises(TiprError, match="2 pictures for 1"):
        colour_hits(true[:2], held, [0])


def test_portraits_are_kept(tmp_path):
    a, b = (world_portraits(6, seed=2, path=tmp_path / "w") for _ in range(2))
    assert (
        a.captions == b.captions
        and len(a) == 18
        and np.array_equal(a.pictures, world_portraits(6, seed=2).pictures)
    )
    with pytest.raises(TiprError, match="other settings"):
        world_portraits(8, seed=2, path=tmp_path / "w")


def tiny(held, seed=0):
    torch.manual_seed(0)
    return small_pipeline(
        held.pictures[:40], clip=PersonCLIP("tipr-nano"), width=32, latent_channels=16, seed=seed
    )


def test_states_are_the_pipelines_own(held):
    pipe = tiny(held)
    with torch.no_grad():
        theirs = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0]
    assert torch.allclose(states_of(pipe, CAPTIONS), theirs, atol=1e-5)


def test_targets(held):
    pipe = tiny(held)
    z, noise = torch.randn(2, 16, 12, 4), torch.randn(2, 16, 12, 4)

    class Perfect(torch.nn.Module):
        def forward(self, x, t, text):
            return SimpleNamespace(sample=-z)

    assert (
        diffusion_loss(
            Perfect(), pipe.scheduler, z, torch.zeros(2, 3, 4), torch.full((2,), 999), noise
        ).max()
        < 1e-4
    )  # all noise: velocity is minus the picture
    t = noise_steps(1000, generator=torch.Generator().manual_seed(0))
    assert 0 <= t.min() and t.max() <= 999 and t.float().mean() > 550


def test_learns_and_resumes_exactly(held, tmp_path):
    r = GeneratorRecipe(updates=8, batch_size=8, lr=2e-3, warmup=2, decay_from=0.5)
    whole = train_generator(tiny(held), held, tmp_path / "a", r, log_every=1)
    train_generator(tiny(held), held, tmp_path / "b", r, log_every=1, max_seconds=0.0)
    assert open_state(tmp_path / "b")["step"] < 8
    again = train_generator(tiny(held, seed=5), held, tmp_path / "b", r, log_every=1)
    for (k, a), b in zip(whole.average.items(), again.average.values()):
        assert torch.allclose(a, b, atol=1e-6), k
    losses = [row["loss"] for row in again.history.rows]
    assert len(losses) == 8 and np.allclose(
        losses, [row["loss"] for row in whole.history.rows], atol=1e-5
    )
    assert (
        whole.history.rows[-1]["loss"] < whole.history.rows[0]["loss"]
        and not whole.pipeline.unet.training
    )


def open_state(folder):
    return read_json(max(Path(folder).glob("last-*")) / "state.json")


def test_refuses_another_run(held, tmp_path):
    train_generator(tiny(held), held, tmp_path, GeneratorRecipe(updates=1, batch_size=4, warmup=1))
    with pytest.raises(TiprError, match="lr=0.001") as e:
        train_generator(
            tiny(held), held, tmp_path, GeneratorRecipe(updates=2, batch_size=4, warmup=1, lr=1.0)
        )
    assert one_line(e)
    few = Pairs(held.pictures, held.captions[:9], held.caption_picture[:9])
    with pytest.raises(TiprError, match="120 captions, not 9"):
        train_generator(
            tiny(held), few, tmp_path, GeneratorRecipe(updates=2, batch_size=4, warmup=1)
        )
    with pytest.raises(TiprError, match="no captions"):
        train_generator(tiny(held), Pairs(held.pictures, [], np.zeros(0, int)), tmp_path / "x")
    with pytest.raises(TiprError, match="precision"):
        GeneratorRecipe(precision="fp8")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"steps": 0}',
        '{"steps": "ten"}',
        '{"colour": 1}',
        '{"image_size": 96}',
        '{"image_size": ["a", 2]}',
        '{"prompt": "x"}',
        '{"prompt": 3}',
        '{"guidance": "much"}',
        "{",
    ],
)
def test_odd_settings_of_a_folder(generator, tmp_path, text):
    generator.save_pretrained(tmp_path / "g")
    (tmp_path / "g/tipr.json").write_text(text)
    with pytest.raises(TiprError) as e:
        PersonGenerator.from_pretrained(tmp_path / "g", device="cpu")
    assert one_line(e)


@pytest.mark.skipif(os.name == "nt", reason="no parents to follow there")
@pytest.mark.parametrize("how", [9, 15])
def test_processes_of_a_launcher_end_with_it(toy, tmp_path, how):
    "kill -9 and SIGTERM of what started the ranks: none is left after two seconds."
    import signal, time
    import psutil

    child = """
import sys
from types import SimpleNamespace
from tipr_nb.generation import PersonGenerator, generate_split
generator = PersonGenerator.from_pretrained(sys.argv[1], device="cpu", steps=2, batch_size=2)
generate_split(generator, SimpleNamespace(captions=[f"person {i}" for i in range(100000)]), sys.argv[2])
"""
    parent = f"""
import os, subprocess, sys, time
for rank in range(2):
    command = [sys.executable, "-c", {child!r}, {str(toy)!r}, {str(tmp_path / "p")!r}]
    subprocess.Popen(command, env=os.environ | dict(RANK=str(rank)))
time.sleep(600)
"""
    env = os.environ | dict(
        WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test",
        OMP_NUM_THREADS="1",
        TIPR_QUIET="1",
        PYTHONPATH=str(Path(__file__).resolve().parent.parent),
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", parent],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ranks = []
    try:
        for _ in range(600):
            ranks = psutil.Process(launcher.pid).children(recursive=True)
            if len(ranks) == 2 and len(list((tmp_path / "p").rglob("*.png"))) > 4:
                break
            time.sleep(0.1)
        assert len(ranks) == 2
        launcher.send_signal(how)
        launcher.wait(10)
        gone, alive = psutil.wait_procs(ranks, timeout=2)
        assert all(
            p.status() == psutil.STATUS_ZOMBIE for p in alive
        )  # dead, and not yet buried by this machine
    finally:
        for p in [launcher, *ranks]:
            try:
                p.kill()
            except psutil.NoSuchProcess:
                pass


def test_what_a_kill_left_is_swept(held, tmp_path):
    r = GeneratorRecipe(updates=1, batch_size=4, warmup=1)
    train_generator(tiny(held), held, tmp_path, r)
    for name in (".last-00000009.xy1", ".run.json.ab2", ".history.jsonl.q"):
        (tmp_path / name).mkdir()
    (tmp_path / ".keep.me").mkdir()
    train_generator(tiny(held), held, tmp_path, r)
    assert [p.name for p in tmp_path.glob(".*")] == [".keep.me"]
    last = max(tmp_path.glob("last-*"))
    for text in ("[]", "{}", "{"):
        (last / "state.json").write_text(text)
        with pytest.raises(TiprError, match="to start again") as e:
            train_generator(tiny(held), held, tmp_path, r)
        assert one_line(e)


def test_finetunes_real_layout_with_lora(tmp_path, held):
    pipe, _ = load_pipeline(toy_pipeline(tmp_path / "kl", codec="kl"), device="cpu")
    run = train_generator(
        pipe,
        held,
        tmp_path / "run",
        GeneratorRecipe(updates=2, batch_size=2, warmup=1, lora=2, ema=None),
    )
    assert run.step == 2 and all("lora" in k for k in run.weights) and len(run.weights) > 0
    assert GeneratorRun(
        load_pipeline(tmp_path / "kl", device="cpu")[0], held, tmp_path / "run", run.r
    ).resume()


# the generator that ships


def test_shipped_generator_follows_captions(held):
    generator = PersonGenerator.from_pretrained()
    index = [i for i, s in enumerate(held.said) if {"upper_colour", "lower_colour"} <= s.keys()][
        :40
    ]
    pictures = generator.generate([held.captions[i] for i in index])
    found = colour_accuracy(pictures, held, index)
    assert (found.accuracy >= 70).all() and (found.accuracy - found.shuffled >= 40).all(), found
    kept = generator_module.shipped_weights()["generator-synth-world"]
    table = [
        line.split("|")[1:5]
        for line in (kept / "README.md").read_text().splitlines()
        if " colour |" in line
    ]
    assert [float(a) for _, _, a, _ in table] >= [70.0, 70.0] and {
        p.suffix for p in kept.rglob("*") if p.stat().st_size > 1e6
    } == {".safetensors"}
    assert (
        sum(p.stat().st_size for p in kept.rglob("*") if p.is_file()) < 10e6
        and generator.steps == 10
    )
