"""Figures: what is drawn, what is refused, and that nothing leaks out of them."""

import io
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tipr_nb import figures as F
from tipr_nb.core import TiprError


def person(i=0, size=(96, 32)):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture
def table():
    return pd.DataFrame(
        dict(r1=[60.0, 20.0], r1_lo=[55.0, 15.0], r1_hi=[65.0, 25.0], queries=[100, 50]),
        index=["complete", "incomplete"],
    )


def test_style_is_undone():
    before = dict(matplotlib.rcParams)
    with F.style():
        assert not matplotlib.rcParams["axes.spines.top"]
    assert dict(matplotlib.rcParams) == before


def test_no_figure_stays_alive():
    import matplotlib.pyplot as plt

    others = plt.get_fignums()
    F.contact_sheet([person()])
    F.score_curve(pd.DataFrame(dict(w=[0, 1], r1=[1.0, 2.0])), "w")
    assert plt.get_fignums() == others


@pytest.mark.parametrize("form", ["pil", "array", "float", "uint8 chw", "grey", "path", "tensor"])
def test_as_picture(form, tmp_path):
    a = np.asarray(person())
    x = dict(pil=person(), array=a, float=a.transpose(2, 0, 1) / 255.0, grey=a[..., 0]).get(form)
    if form == "uint8 chw":
        x = a.transpose(2, 0, 1)
    if form == "path":
        x = tmp_path / "a.png"
        person().save(x)
    if form == "tensor":
        x = pytest.importorskip("torch").tensor(a.transpose(2, 0, 1) / 255.0)
    got = F.as_picture(x)
    assert got.shape == (96, 32, 3) and got.dtype == np.uint8
    if form != "grey":
        assert np.abs(got.astype(int) - a).max() <= 1


@pytest.mark.parametrize("bad", [np.zeros((4, 5, 6, 3)), np.zeros((96, 32, 2)), np.zeros(3)])
def test_as_picture_refuses(bad):
    with pytest.raises(TiprError, match="a picture has shape"):
        F.as_picture(bad)


def test_unreadable_picture(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with pytest.raises(TiprError, match="cut.jpg: not a readable image"):
        F.as_picture(tmp_path / "cut.jpg")
    with pytest.raises(TiprError, match="none.jpg"):
        F.as_picture(tmp_path / "none.jpg")


def test_wrap_fits_and_loses_nothing():
    text = "A woman in a red coat, blue trousers and " + "x" * 90 + " shoes; $5 is no formula"
    lines = F.wrap(text, 1.5, 9)
    assert all(F.text_width(line, 9) <= 1.5 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert F.wrap("", 1.0, 9) == [] and F.wrap(text, 1.5, 9, max_lines=2)[-1].endswith("…")


def test_svg_stands_in_a_page(table):
    svg = F.interval_bars(table, title="Rank-1 <by> kind").svg("a", 'label "quoted"')
    assert (
        svg.startswith("<svg ")
        and "width=" not in svg.split(">")[0]
        and "viewBox" in svg.split(">")[0]
        and 'aria-label="label &quot;quoted&quot;"' in svg
    )
    assert (
        "var(--ink)" in svg
        and "var(--c0)" in svg
        and not re.search("|".join([F.INK, F.MUTED, *F.COLORS]), svg, re.I)
    )
    assert "<metadata" not in svg and "<style" not in svg and "DejaVu" not in svg
    ids = lambda s: set(re.findall(r' id="([^"]+)"', s))
    other = F.interval_bars(table).svg("b")
    assert not {i for i in ids(svg) & ids(other) if i.startswith("p")}, (
        "clip paths of two plots on one page must not share ids"
    )


def test_png(table):
    assert F.interval_bars(table).png().startswith(b"\x89PNG")


def test_retrieval_grid():
    pics = [person(i) for i in range(4)]
    fig = F.retrieval_grid(
        ["a $5 man & a <b>"] * 2,
        [pics, pics[:3]],
        [[True, False, False, True], [False] * 3],
        extras={"described": pics[:2], "imagined": pics[:2]},
        scores=[[0.5] * 4, [0.1] * 3],
        notes=["one", "two"],
        title="t",
    )
    assert len(fig.axes[0].images) == 4 + 3 + 4
    frames = [
        p.get_edgecolor()
        for p in fig.axes[0].patches
        if isinstance(p, matplotlib.patches.Rectangle)
    ]
    to = matplotlib.colors.to_rgba
    assert frames.count(to(F.HIT)) == 2 and frames.count(to(F.MISS)) == 5
    fig.png()


@pytest.mark.parametrize("args", [([], [], []), (["a"], [], []), (["a"], [[0]], [[]])])
def test_retrieval_grid_refuses(args):
    with pytest.raises(TiprError, match="retrieval_grid"):
        F.retrieval_grid(*args)


def test_difference_plot():
    d = pd.DataFrame(
        dict(difference=[0.5, -0.2], lo=[0.1, -0.6], hi=[0.9, 0.2]),
        index=["better", ("worse", "caption")],
    )
    fig = F.difference_plot({"r1": d, "mAP": d.iloc[:1]}, title="gains")
    ax = fig.axes[0]
    assert [x.get_text() for x in ax.get_yticklabels()] == ["better", "worse, caption"] and len(
        ax.get_legend().texts
    ) == 2
    lone = pd.DataFrame(dict(difference=[1.0], lo=[np.nan], hi=[np.nan]), index=["one seed"])
    assert "one seed" in F.difference_plot(lone).svg("d", "differences")
    with pytest.raises(TiprError, match="grid_differences"):
        F.difference_plot(d[["lo"]])


def test_learning_curve():
    rows = [
        dict(step=s, loss=3.0 - s / 100, **{"loss/ITC": 3.0 - s / 100}) for s in range(0, 100, 10)
    ] + [{"step": 90, "val/r1": 40.0, "val/mAP": 30.0}]
    fig = F.learning_curve(rows, best=90)
    assert (
        len(fig.axes) == 2 and len(fig.axes[0].lines) == 2
    )  # one objective: one curve, and the mark of the chosen step
    assert len(F.learning_curve(rows, scores=()).axes) == 1
    for bad in ([], [dict(a=1)], [dict(step=1, speed=2)]):
        with pytest.raises(TiprError, match="learning_curve"):
            F.learning_curve(bad)


def test_learning_curve_of_a_run():
    "A run gives its history, the metric that its recipe selects by, and its best step."
    rows = [
        {"step": s, "loss": 3 - s / 100, "val/r1": s / 2.0, "val/mAP": s / 3.0}
        for s in (10, 20, 30)
    ]
    run = SimpleNamespace(
        history=pd.DataFrame(rows), recipe=SimpleNamespace(select="mAP"), best=dict(step=20)
    )
    left, right = F.learning_curve(run).axes
    assert [t.get_text() for t in right.texts if t.get_text() not in ("●", "chosen")] == ["mAP"]
    assert list(right.lines[-1].get_xdata()) == [20, 20]
    assert len(F.learning_curve(run, scores=["val/r1", "val/mAP"], best=10).axes[1].lines) == 3


def contrast(a: str, b: str) -> float:
    "WCAG contrast of two colours."

    def luminance(color):
        c = np.array(matplotlib.colors.to_rgb(color))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_all_text_has_contrast(table):
    rows = [{"step": s, **{f"loss/{i}": 1.0 + i + s for i in range(7)}} for s in (1, 2, 3)]
    rows += [{"step": 3, "val/r1": 40.0}]
    figures = [
        F.learning_curve(rows, best=3),
        F.interval_bars({"a": table, "b": table}, chance=1.0),
    ]
    figures.append(F.word_weights([["red", "coat"]], [[1.0, -1.0]], title="t"))
    for fig in figures:
        words = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text() not in ("", "●")]
        assert words and min(contrast(t.get_color(), F.PAPER) for t in words) >= 4.5


def test_png_has_a_palette_unless_it_shows_pictures(table):
    def mode(fig):
        return Image.open(io.BytesIO(fig.png())).mode

    bars = F.interval_bars(table)
    assert mode(bars) == "P" and len(bars.png()) < len(bars._saved(format="png", dpi=110))
    assert mode(F.contact_sheet([person()])) == "RGBA"


def test_interval_bars(table):
    two = F.interval_bars({"baseline": table, "method": table + 1}, chance=0.3, upto=80)
    assert len(two.axes[0].patches) == 4 and two.axes[0].get_xlim()[1] == pytest.approx(80 * 1.16)
    F.interval_bars(table.drop(columns=["r1_lo", "r1_hi", "queries"])).png()
    F.interval_bars(table.assign(r1_hi=np.nan)).png()
    for bad in (table[:0], table.drop(columns="r1"), {"a": table[:0]}):
        with pytest.raises(TiprError, match="interval_bars"):
            F.interval_bars(bad)


def test_curves_and_dots(table):
    sweep = pd.DataFrame(
        [dict(weight=w, seed=s, r1=50 + s, mAP=40 + s) for w in (0, 0.5, 1) for s in (0, 1)]
    )
    assert len(F.weight_sweep(sweep, chosen=0.5).axes) == 2
    assert F.score_curve(sweep, "weight", log=False).axes[0].get_ylabel() == "Rank-1, %"
    with pytest.raises(TiprError, match="score_curve.*'share'"):
        F.score_curve(sweep, "share")
    runs = pd.DataFrame(
        [dict(row=r, seed=s, r1=50.0 + s) for r in ("baseline", "method") for s in range(3)]
    )
    F.seed_dots(runs, baseline="baseline").png()
    with pytest.raises(TiprError, match="seed_dots"):
        F.seed_dots(runs, y="mAP")


def test_caption_lengths():
    fig = F.caption_lengths({"train": [10, 20, 80], "test": [30]})
    assert "33.3 %" in "".join(t.get_text() for t in fig.axes[0].texts)
    with pytest.raises(TiprError, match="no captions"):
        F.caption_lengths({"train": []})


def test_tsne_is_joint_and_seeded():
    g = np.random.default_rng(0)
    f = dict(text=g.normal(size=(10, 8)), image=g.normal(size=(10, 8)))
    a, b = F.joint_tsne(f, seed=1), F.joint_tsne(f, seed=1)
    assert set(a) == set(f) and a["text"].shape == (10, 2) and np.allclose(a["image"], b["image"])
    assert len(F.tsne_map(f, labels=list("ab") * 5).axes[0].lines) == 10
    with pytest.raises(TiprError, match="one row per sample"):
        F.tsne_map(dict(a=np.zeros((3, 4)), b=np.zeros((4, 4))))
    with pytest.raises(TiprError, match="too few"):
        F.joint_tsne(dict(a=np.zeros((2, 4))))
    with pytest.raises(TiprError, match="different widths"):
        F.joint_tsne(dict(a=np.zeros((6, 4)), b=np.zeros((6, 5))))


def test_word_patch_maps_against_a_loop():
    g = np.random.default_rng(0)
    p, w = g.normal(size=(12, 5)), g.normal(size=(3, 5))
    maps = F.word_patch_maps(p, w, (4, 3), centre=False)
    for l in range(3):
        for r in range(4):
            for c in range(3):
                assert maps[l, r, c] == pytest.approx(
                    w[l] @ p[3 * r + c] / np.linalg.norm(w[l]) / np.linalg.norm(p[3 * r + c]),
                    abs=1e-5,
                )
    assert np.abs(F.word_patch_maps(p, w, (4, 3)).sum(0)).max() < 1e-5
    with pytest.raises(TiprError, match="class token"):
        F.word_patch_maps(np.zeros((13, 5)), w, (4, 3))


def test_overlay_is_hot_where_the_map_is():
    flat, heat = np.full((96, 32, 3), 128, np.uint8), np.zeros((12, 4))
    heat[:3] = 1
    out = F.overlay(flat, heat).astype(int)
    top, bottom = out[:30].mean((0, 1)), out[-60:].mean((0, 1))
    assert top[0] - top[2] > 100 > 20 > abs(bottom[0] - bottom[2])
    assert (
        F.overlay(flat, np.zeros((12, 4))).shape == out.shape
        and np.isfinite(F.overlay(flat, np.full((12, 4), np.nan))).all()
    )
    with pytest.raises(TiprError, match="two axes"):
        F.overlay(flat, np.zeros((2, 12, 4)))
    with pytest.raises(TiprError, match="one map per picture"):
        F.heatmap_grid([flat], {"a": []})


def test_words_and_boxes():
    with pytest.raises(TiprError, match="one weight per word"):
        F.word_weights([["a", "b"]], [[1.0]])
    F.word_weights([["a", "b"] * 30], [[0.0, 0.0] * 30]).png()
    with pytest.raises(TiprError, match="'c'"):
        F.diagram({"a": (1, 1, "x"), "b": (2, 1, "y")}, [("a", "c")], 3, 2)
    with pytest.raises(TiprError, match="no pictures"):
        F.contact_sheet([])


def test_data_uri():
    import base64

    uri = F.data_uri(person(), height=48)
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (16, 48)
