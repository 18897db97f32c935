"""Photos encoded by workers of a Ray cluster: the gallery of one process, whatever happens to a worker or an address."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from galleries import grown_archive, same_gallery
from typer.testing import CliRunner

from tipr_nb.core import TiprError
from tipr_nb.search import ColourModel, Gallery, RayCluster, colour_archive
from tipr_nb.search.ray import WorkerTask, keep_first, photo_chunks, ray_reason

ray = pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    "One Ray of this machine for all tests; `RayCluster` uses what is there."
    os.environ |= dict(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{os.path.dirname(__file__)}:{before}"  # for the models below
    with RayCluster("local", workers=3).connected():
        os.environ["PYTHONPATH"] = before
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive") / "photos"
    colour_archive(folder, 5)
    (folder / "torn.png").write_bytes(b"no picture")
    shutil.copy(sorted(folder.rglob("*.png"))[3], folder / "copy.png")
    return folder


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    return Gallery.build(photos, ColourModel(), tmp_path_factory.mktemp("alone") / "g")


class EndsOnce(ColourModel):
    "Ends the process that uses it when a flag can be set; always with flags to spare."

    def __init__(self, folder, times=1):
        super().__init__()
        self.folder = folder
        self.times = times

    def encode_image(self, pictures):
        for i in range(self.times):
            try:
                os.close(os.open(f"{self.folder}/{i}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_image(pictures)


class Refuses(ColourModel):
    "Gives features that are not finite."

    def encode_image(self, pictures):
        return np.full((len(pictures), self.dim), np.nan, np.float32)


def left_half(picture):
    "A detector of the user's."
    return [(0, 0, picture.width // 2, picture.height)]


def test_two_workers_make_the_gallery_of_one_process(photos, alone, tmp_path):
    shared = Gallery.build(
        photos, ColourModel(), tmp_path / "g", cluster=RayCluster(workers=2), batch_size=16
    )
    same_gallery(shared, alone)
    assert shared.report.encoded == alone.report.encoded
    assert not (tmp_path / "g" / ".work").exists()


def test_what_the_gallery_or_the_journal_holds_goes_to_no_worker(photos, tmp_path, monkeypatch):
    some, first, late = grown_archive(photos, tmp_path)
    sent = []
    chunks = RayCluster._arrivals

    def noted(self, ray, todo, *args):
        sent.append(len(todo))
        for i, one in enumerate(chunks(self, ray, todo, *args)):
            yield one
            if len(sent) == 1 and i == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(RayCluster, "_arrivals", noted)
    build = dict(cluster=RayCluster(workers=1), batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        Gallery.build(some, ColourModel(), tmp_path / "g", **build)
    assert len(Gallery(tmp_path / "g")) == len(first)
    second = Gallery.build(some, ColourModel(), tmp_path / "g", **build)
    assert sent[0] <= late + 1 and 16 <= second.report.resumed <= 32
    assert sent[1] == sent[0] - second.report.resumed
    same_gallery(second, Gallery.build(some, ColourModel(), tmp_path / "anew"))
    Gallery.build(some, ColourModel(), tmp_path / "g", **build)
    assert len(sent) == 2 or sent[2] == 1  # the torn file is tried again


def test_a_killed_worker_loses_nothing_and_nothing_is_there_twice(photos, alone, tmp_path):
    model = EndsOnce(str(tmp_path))
    done = Gallery.build(photos, model, tmp_path / "g", cluster=RayCluster(workers=2), batch_size=8)
    assert (tmp_path / "0").exists()
    same_gallery(done, alone)
    # whether a note says so depends on who returned a chunk before the kill: a lost worker is known by its chunks


def test_a_worker_that_dies_each_time_is_one_line_and_the_next_run_goes_on(photos, alone, tmp_path):
    model = EndsOnce(str(tmp_path), times=3)
    cluster = RayCluster(workers=1, retries=1)
    with pytest.raises(TiprError, match="a worker died and was started again 1 times") as e:
        Gallery.build(photos, model, tmp_path / "g", cluster=cluster, batch_size=64)
    assert "\n" not in str(e.value)
    with pytest.raises(TiprError, match="not finished"):
        Gallery(tmp_path / "g")
    for i in range(3):
        (tmp_path / str(i)).touch()
    same_gallery(Gallery.build(photos, model, tmp_path / "g", cluster=cluster), alone)


def test_an_error_of_a_worker_is_its_own_line(photos, tmp_path):
    with pytest.raises(TiprError, match="local: the model gave no usable features") as e:
        Gallery.build(photos, Refuses(), tmp_path / "g", cluster=RayCluster(workers=1))
    assert "\n" not in str(e.value)


def test_detection_and_boxes_in_workers(photos, tmp_path):
    table = tmp_path / "boxes.csv"
    few = photos / "c1"
    names = sorted(p.relative_to(few) for p in few.rglob("*-*.png"))[:30]
    lines = [f"{name},{i % 5},0,{20 + i % 7},90" for i, name in enumerate(names)]
    table.write_text("path,x0,y0,x1,y1\n" + "\n".join(lines))
    for i, cut in enumerate((dict(detector=left_half), dict(boxes=table), dict(detector="hog"))):
        made = [
            Gallery.build(few, ColourModel(), tmp_path / f"{kind}{i}", **cut, **more)
            for kind, more in (
                ("ray", dict(cluster=RayCluster(workers=2), batch_size=8)),
                ("alone", {}),
            )
            if cut.get("detector") != "hog"
        ]
        if made:
            same_gallery(*made)
    from tipr_nb.search import find_detector

    hog = find_detector("hog", score=0.7)
    sent = WorkerTask(None, WorkerTask.portable(hog))
    assert sent.made_detector().name == hog.name and isinstance(sent.detector, dict)


def test_chunks_and_first_features():
    from tipr_nb.search.photos import Photo

    for n, batch, workers in ((0, 4, 2), (1, 4, 2), (9, 4, 1), (1000, 7, 3)):
        items = [Photo("/p", str(i)) for i in range(n)]
        chunks = photo_chunks(items, batch, workers)
        assert sum(chunks, []) == items
        assert all(len(c) % batch == 0 for c in chunks[:-1])
    rows = [dict(sha256="a", feature=0), dict(sha256="a", feature=1, x0=0, y0=0, x1=1, y1=1)]
    rows += [dict(sha256="a", feature=2), dict(sha256="b", feature=-1)]
    assert keep_first(rows, set()) == [0, 1]
    assert [row["feature"] for row in rows] == [0, 1, -1, -1]


@pytest.mark.parametrize(
    "call,why",
    [
        (lambda: RayCluster("somewhere"), "give local, auto"),
        (lambda: RayCluster("http://head:8265"), "give local, auto"),
        (lambda: RayCluster(workers=0), "one worker or more"),
        (lambda: RayCluster(cpus=0), "what one worker uses"),
        (lambda: RayCluster(gpus=1.5), "a fraction of one GPU, or whole ones"),
        (lambda: RayCluster(cpus=64).room(ray), "one worker needs 64"),
        (lambda: RayCluster(gpus=1).room(ray), "0 GPUs"),
    ],
)
def test_bad_options_are_one_line(call, why):
    with pytest.raises(TiprError, match=why):
        call()


def test_another_version_of_this_package_in_a_worker(photos, tmp_path, monkeypatch):
    import tipr_nb

    monkeypatch.setattr(tipr_nb, "__version__", "9.9.9")
    with pytest.raises(TiprError, match="9.9.9 on the machine that indexes; install the same") as e:
        Gallery.build(photos, ColourModel(), tmp_path / "g", cluster=RayCluster(workers=1))
    assert "\n" not in str(e.value)


def test_errors_of_ray_are_one_line():
    mismatch = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.58.0\n    Python: 3.12.1\n"
        "This process on node 10.0.0.7 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    for error, why in (
        (RuntimeError(mismatch), "Ray 2.58.0 with Python 3.12.1 there, Ray 2.60.0 with"),
        (ConnectionError("ray client connection timeout"), "no Ray cluster answers there"),
        (ray.exceptions.OutOfMemoryError("killed"), "needed more memory"),
        (ray.exceptions.ActorDiedError(), "a worker died"),
        (ModuleNotFoundError("No module named 'mine.models'"), "cannot import mine.models"),
        (ValueError("a\nb"), r"Ray failed \(ValueError: a\)"),
    ):
        line = ray_reason(error, "auto")
        assert "\n" not in line and line.startswith("auto: ")
        import re

        assert re.search(why, line), line


def test_the_version_of_a_cluster_is_compared(monkeypatch):
    from ray._private import utils

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuses(**options):
        here = dict(ray_version="2.60.0", python_version="3.11.7", ray_commit="x")
        utils.check_version_info(here | dict(ray_version="2.1.0"), "this process")

    monkeypatch.setattr(ray, "init", refuses)
    with pytest.raises(TiprError, match="Ray 2.1.0 with Python .* install the same on all"):
        with RayCluster("auto").connected():
            pass


def test_the_command_line(photos, alone, tmp_path, monkeypatch):
    from tipr_nb import cli
    from tipr_nb.cli import search as commands

    monkeypatch.setattr(commands, "threaded_loader", lambda stack: lambda name: ColourModel())
    base = ["index", str(photos), "--gallery", str(tmp_path / "g")]
    out = CliRunner().invoke(cli.app, [*base, "--ray", "local", "--ray-workers", "2", "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.output)["encoded"] == alone.report.encoded
    same_gallery(Gallery(tmp_path / "g", ColourModel()), alone)
    for more, why in (
        (["--ray", "nowhere"], "give local, auto"),
        (["--ray-workers", "2"], "goes with --ray"),
        (["--ray", "local", "--part", "1/2"], "--ray divides the photos itself"),
    ):
        out = CliRunner().invoke(cli.app, base + more)
        assert out.exit_code and why in out.output + str(out.exception)


def test_without_ray_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TiprError, match=r"--ray needs ray.*tipr_nb\[ray\]"):
        with RayCluster("local").connected():
            pass
