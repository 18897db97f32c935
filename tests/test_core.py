import errno, os, subprocess, sys, time
import pytest
from tipr_nb.core import (
    FORMER_NAMES,
    TiprError,
    atomic_path,
    cache_dir,
    check_output,
    current_name,
    ensure_torchvision,
    load_object,
    locked,
    os_errors,
    read_json,
    recorded_name,
    resolve_model,
    shipped_weights,
    write_json,
    write_text,
)


def test_import_is_light():
    code = "import sys, tipr_nb, tipr_nb.core; assert not {'torch', 'numpy', 'pandas', 'matplotlib', 'PIL', 'fastcore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_are_listed():
    import tipr_nb

    assert "load_dataset" in dir(tipr_nb)
    with pytest.raises(AttributeError, match="no_such_name"):
        tipr_nb.no_such_name


def test_atomic_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError):
        with atomic_path(tmp_path / "a.txt") as p:
            p.write_text("half")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder_replaces_a_full_one(tmp_path):
    for text in ("one", "two"):
        with atomic_path(tmp_path / "f", folder=True) as p:
            (p / "x").write_text(text)
    assert (tmp_path / "f/x").read_text() == "two" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "code, word",
    [(errno.ENOSPC, "no space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_os_errors_are_one_line(code, word):
    with pytest.raises(TiprError, match=word) as e:
        with os_errors("out.bin"):
            raise OSError(code, "x")
    assert "\n" not in str(e.value) and str(e.value).startswith("out.bin")


def test_write_under_a_file_is_an_error(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(TiprError):
        write_json(tmp_path / "file" / "run.json", {})


def test_json_missing_and_cut(tmp_path):
    with pytest.raises(TiprError, match="no such file"):
        read_json(tmp_path / "no.json")
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(TiprError, match="not complete JSON"):
        read_json(tmp_path / "cut.json")


def test_lock_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" and cache_dir().is_dir()
    with locked(tmp_path / "thing"):
        pass


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./nor/here", "no-alias-of-ours", "owner/not-here"]
)
def test_missing_models_fail_at_once(source):
    with pytest.raises(TiprError) as e:
        resolve_model(source)
    assert source in str(e.value) and "\n" not in str(e.value)


def test_model_folder_with_a_file_missing(tmp_path):
    with pytest.raises(TiprError, match="config.json is missing"):
        resolve_model(tmp_path)


def test_torchvision_schemas_twice():
    ensure_torchvision()
    ensure_torchvision()
    import torchvision  # noqa: F401

    code = "from tipr_nb.core import ensure_torchvision as e; e(); e(); import torchvision; from torchvision.transforms import v2"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capfd):
    import time
    import tipr_nb.core.machine as core

    monkeypatch.delenv("TIPR_QUIET", raising=False)
    for _ in core.progress(range(3), "quick work"):
        pass
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(core, "_LOG_SECONDS", 0.05)
    for _ in core.progress(range(4), "slow work"):
        time.sleep(0.06)
    for _ in core.progress(iter(range(3)), "no total"):
        time.sleep(0.06)
    bar = core.progress(None, "by hand", total=10, initial=4)
    for _ in range(6):
        time.sleep(0.06)
        bar.update(1)
    bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert (
        lines[0].startswith("slow work: ")
        and " of 4, 00:00 gone, about " in lines[0]
        and "\r" not in "".join(lines)
    )
    assert any(
        line.startswith("no total: ") and "of" not in line and "left" not in line for line in lines
    )
    assert lines[-1].startswith("by hand: 10 of 10")
    for _ in core.progress(range(3), "off", disable=True):
        time.sleep(0.06)
    monkeypatch.setenv("TIPR_QUIET", "1")
    for disable in (None, False):
        for _ in core.progress(range(3), "quiet", disable=disable):
            time.sleep(0.06)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "features, native",
    [
        ({"avx2": True}, False),
        ({"avx512_bf16": False, "amx_tile": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True, "neon": True}, True),
    ],
)
def test_bf16_where_the_processor_has_it(monkeypatch, features, native):
    import torch
    from tipr_nb.core import native_bf16, usable_precision

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert native_bf16("cpu") is native and usable_precision("bf16", "cpu") == (
        "bf16" if native else "no"
    )
    assert usable_precision("no", "cpu") == "no" and usable_precision("fp16", "cpu") == "fp16"


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    "limit, native",
    [
        ("AVX2", False),
        ("avx512_core", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("ALL", True),
        ("", True),
    ],
)
def test_bf16_that_onednn_may_not_use(monkeypatch, name, limit, native):
    "The processor has it, and it would be emulated all the same."
    import torch
    from tipr_nb.core import native_bf16

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(name, limit)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert native_bf16("cpu") is native


def test_bf16_without_torchs_probe(monkeypatch):
    "An older PyTorch: the kernel's flags, or nothing."
    import tipr_nb.core.machine as core, torch

    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for text, native in (
        ("flags\t\t: fpu avx2 avx512_bf16\n", True),
        ("flags\t\t: fpu avx2\nmodel name\t: bf16\n", False),
        ("Features\t: asimd bf16\n", True),
    ):
        monkeypatch.setattr(core.Path, "read_text", lambda self, text=text, **kw: text)
        assert core.native_bf16() is native


def test_bf16_on_gpus_before_ampere(monkeypatch):
    import torch
    from tipr_nb.core import native_bf16

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, native in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device, major=major: type("Card", (), dict(major=major)),
        )
        assert native_bf16("cuda") is native


class _Clocks:
    "Clocks set by hand: seconds, idle seconds of two processors, own seconds."

    def __init__(self, monkeypatch):
        import psutil, tipr_nb.core.machine as core

        self.now, self.idle, self.own = 0.0, 0.0, 0.0
        monkeypatch.setattr(core.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(psutil, "cpu_times", lambda: type("T", (), dict(idle=self.idle)))
        monkeypatch.setattr(
            psutil.Process,
            "cpu_times",
            lambda process: type("T", (), dict(user=self.own, system=0.0)),
        )
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def pass_by(self, seconds, idle, own):
        self.now += seconds
        self.idle += idle
        self.own += own


def test_threads_follow_what_is_free(monkeypatch):
    import torch
    from tipr_nb.core import fit_threads, free_threads

    clocks, before, seen = _Clocks(monkeypatch), torch.get_num_threads(), []
    with free_threads(2):
        for seconds, idle, own in (
            (10, 0, 20),
            (10, 0, 10),
            (1, 1, 1),
            (10, 0, 5),
            (10, 10, 10),
        ):  # alone; beside one process, or two; too soon to look again; alone again
            clocks.pass_by(seconds, idle, own)
            fit_threads()
            seen.append(torch.get_num_threads())
    assert seen == [2, 1, 1, 1, 2] and torch.get_num_threads() == before


def test_threads_of_somebody_elses_choice_stay(monkeypatch):
    import torch
    from tipr_nb.core import fit_threads, free_threads

    clocks, before = _Clocks(monkeypatch), torch.get_num_threads()
    clocks.pass_by(10, 20, 0)
    fit_threads()  # no block around it
    assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with free_threads(2):
        clocks.pass_by(10, 20, 0)
        fit_threads()
        assert torch.get_num_threads() == before


# names


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Somebody's installed package that offers a transform, a dataset, a broken one, and a name that is ours."
    (tmp_path / "their_words.py").write_text(
        "class Shout:\n    def __init__(self, mark='!'): self.mark = mark\n    def __call__(self, caption, rng): return caption + self.mark\n"
        "def load(root, **kwargs): return (root, sorted(kwargs))\n"
    )
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('no\\n licence')\n")
    info = tmp_path / "their_words-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-words\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tipr_nb.caption_transforms]\nshout = their_words:Shout\nprune = their_words:Shout\nbroken = their_broken:X\n"
        "lost = no_such_module_of_theirs:X\n[tipr_nb.datasets]\ntheirs = their_words:load\n[tipr_nb.thin_things]\na = their_words:Shout\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("their_words", "their_broken"):
        sys.modules.pop(name, None)


def test_names_of_three_kinds(package):
    from tipr_nb.core import find_registered

    ours = {"here": dict, "by path": "collections:OrderedDict"}
    assert find_registered("here", ours, "thin thing") is dict
    assert find_registered("by path", ours, "thin thing").__name__ == "OrderedDict"
    assert find_registered("a", ours, "thin thing").__name__ == "Shout"
    assert find_registered("their_words:Shout", ours, "thin thing").__name__ == "Shout"
    assert find_registered("os:path.join", ours, "thin thing") is os.path.join
    assert (
        find_registered("a", {"a": list}, "thin thing") is list
    )  # ours goes before what is offered


@pytest.mark.parametrize(
    "name, words",
    [
        ("her", "did you mean 'here'? Known: here, a"),
        ("their_words:Shut", "has no Shut"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        (":X", "package.module:Name"),
        ("their_words:", "package.module:Name"),
        ("their_broken:X", "could not be imported (RuntimeError: no licence)"),
        (3, "give the name as text"),
        (["a"], "give the name as text"),
        ("..rel:X", "could not be imported"),
    ],
)
def test_names_that_are_wrong(package, name, words):
    from tipr_nb.core import find_registered

    with pytest.raises(TiprError) as e:
        find_registered(name, {"here": dict}, "thin thing")
    assert words in str(e.value) and "\n" not in str(e.value)


def test_module_of_the_current_folder(tmp_path, monkeypatch):
    from tipr_nb.core import load_object

    (tmp_path / "a_loss_of_mine.py").write_text("class Mine: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    before = list(sys.path)
    assert load_object("a_loss_of_mine:Mine", "objective").__name__ == "Mine" and sys.path == before
    with pytest.raises(TiprError, match="no_such_of_mine"):
        load_object("no_such_of_mine:Mine", "objective")


def test_caption_transforms_and_datasets_from_a_package(package, tmp_path):
    import random
    from tipr_nb.data import build_caption_transform, load_dataset

    assert build_caption_transform(("shout", {"mark": "?"}))("a man", random.Random(0)) == "a man?"
    assert build_caption_transform("prune").__class__.__name__ == "CaptionPruner"
    for name, words in (
        ("broken", "of their-words"),
        ("lost", "no_such_module_of_theirs"),
        ("shut", "did you mean 'shout'"),
    ):
        with pytest.raises(TiprError, match=words):
            build_caption_transform(name)
    root, arguments = load_dataset("theirs", tmp_path)
    assert root == tmp_path and "skip" in arguments


# writes


def test_rights_of_what_is_written(tmp_path):
    mask = os.umask(0o022)
    try:
        for private, file, folder in ((False, 0o644, 0o755), (True, 0o600, 0o700)):
            write_text(tmp_path / f"f{private}", "x", private=private)
            with atomic_path(tmp_path / f"d{private}", folder=True, private=private) as p:
                (p / "x").write_text("x")
            assert (tmp_path / f"f{private}").stat().st_mode & 0o777 == file and (
                tmp_path / f"d{private}"
            ).stat().st_mode & 0o777 == folder
    finally:
        os.umask(mask)


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    "The order of a write that a power cut cannot spoil: content, rename, folder."
    from tipr_nb.core import files

    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b))[1])
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    write_text(tmp_path / "a", "1")
    names = [os.path.basename(s) for s in seen]
    assert names == ["a", "rename", tmp_path.name] and seen[-1] == str(tmp_path)
    for _ in range(2):
        seen.clear()
        with atomic_path(tmp_path / "f", folder=True) as p:
            (p / "in").mkdir()
            (p / "in/x").write_text("x")
    names = [os.path.basename(s) for s in seen]
    assert sorted(names[:3]) == ["f", "in", "x"] and names[3:] == [
        "rename",
        "rename",
        tmp_path.name,
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("folder", [False, True])
def test_killed_writes_are_swept(tmp_path, folder):
    import signal

    path = tmp_path / "run.json"
    for old in (True, False):
        if old:
            write_text(path, "old") if not folder else path.mkdir()
        for _ in range(2):
            if not (pid := os.fork()):
                with atomic_path(path, folder=folder) as p:
                    (p / "x" if folder else p).write_text("half")
                    os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(pid, 0)
        (tmp_path / ".run.json.x8dk2abc").mkdir()  # as older versions left them
        (tmp_path / ".run.json.x8dk2abc/run.json").write_text("half")
        (tmp_path / ".run.json.other").write_text("a file of somebody else")
        (tmp_path / ".run.jsonl.0").mkdir(exist_ok=True)
        assert len(list(tmp_path.iterdir())) == 5
        with atomic_path(path, folder=folder) as p:
            (p / "x" if folder else p).write_text("new")
        assert sorted(f.name for f in tmp_path.iterdir()) == [
            ".run.json.other",
            ".run.jsonl.0",
            "run.json",
        ]
        assert ((path / "x") if folder else path).read_text() == "new"


def test_a_living_write_is_left_alone(tmp_path):
    with atomic_path(tmp_path / "a") as first:
        first.write_text("1")
        with atomic_path(tmp_path / "a") as second:
            second.write_text("2")
        assert (tmp_path / "a").read_text() == "2" and first.read_text() == "1"
    assert (tmp_path / "a").read_text() == "1" and os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_that_had_stepped_aside_comes_back(tmp_path, monkeypatch):
    "Killed between the two renames, on a system that cannot exchange names."
    from tipr_nb.core import files

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path, replace = tmp_path / "f", os.replace
    with atomic_path(path, folder=True) as p:
        (p / "x").write_text("old")
    if not os.fork():
        monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), os._exit(1)))
        with atomic_path(path, folder=True) as p:
            (p / "x").write_text("new")
    os.wait()
    assert not path.exists()
    with pytest.raises(RuntimeError):
        with atomic_path(path, folder=True):
            raise RuntimeError
    assert (path / "x").read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_replacing_a_folder_leaves_no_gap(tmp_path):
    "On Linux the name leads to a whole folder at every moment."
    import threading
    from tipr_nb.core.files import _exchange

    path, missing, stop = tmp_path / "f", [], threading.Event()
    with atomic_path(path, folder=True) as p:
        (p / "x").write_text("0")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    if not _exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")

    def look():
        while not stop.is_set():
            if not path.is_dir():
                missing.append(1)

    watcher = threading.Thread(target=look)
    watcher.start()
    for i in range(50):
        with atomic_path(path, folder=True) as p:
            (p / "x").write_text(str(i))
    stop.set()
    watcher.join()
    assert not missing and (path / "x").read_text() == "49"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 200 + ".json"])
def test_long_names(tmp_path, name):
    write_text(tmp_path / name, "x")
    with locked(tmp_path / name):
        pass
    assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize(
    "name, words", [("n" * 256, "longer than"), ("a\0b", "no file can have that name")]
)
def test_names_no_system_takes(tmp_path, name, words):
    for write in (
        lambda p: write_text(p, "x"),
        lambda p: write_json(p / "x.json", {}),
        lambda p: locked(p / "x").__enter__(),
    ):
        with pytest.raises(TiprError, match=words) as e:
            write(tmp_path / name)
        assert "\n" not in str(e.value)
    with pytest.raises(TiprError) as e:
        read_json(tmp_path / name)
    assert "\n" not in str(e.value)


def test_half_a_character(tmp_path):
    with pytest.raises(TiprError, match="half a character"):
        write_json(tmp_path / "a.json", {"name": "\ud83d"})
    assert not list(tmp_path.iterdir())


# readers


def odd(name: str, data: bytes, words: str, read: str, **kwargs):
    return pytest.param(data, words, read, kwargs, id=name)


ODD = [
    odd("cut", b'{"a": [1', "not complete JSON", "read_json"),
    odd("deep", b"[" * 200_000, "nested too deeply", "read_json"),
    odd("deep objects", b'{"a":' * 100_000, "nested too deeply", "read_json"),
    odd("digits", b"[" + b"7" * 5000 + b"]", "not JSON that can be read", "read_json"),
    odd("list", b"[]", "expected an object, found list", "read_json", expect=dict),
    odd("text", b'"a"', "expected a list, found str", "read_json", expect=list),
    odd("empty", b"", "not complete JSON", "read_json"),
    odd("utf-16", '{"a": 1}'.encode("utf-16"), "UTF-16.*save it as UTF-8", "read_json"),
    odd("utf-16 bare", '{"a": 1}'.encode("utf-16-le"), "zero bytes.*UTF-8", "read_json"),
    odd(
        "latin-1",
        '{"a": "Köln"}'.encode("latin-1"),
        "not UTF-8 text.*save it as UTF-8",
        "read_json",
    ),
    odd("gbk", '{"a": "北门"}'.encode("gbk"), "not UTF-8", "read_json"),
    odd("binary", bytes(range(256)), "zero bytes|UTF-8", "read_json"),
    odd("jsonl", b'{"a": 1}\n{"a"\n', "line 2: not complete JSON", "read_jsonl"),
    odd("jsonl deep", b"1\n" + b"[" * 200_000, "line 2: JSON nested too deeply", "read_jsonl"),
    odd("jsonl digits", b"9" * 5000, "line 1", "read_jsonl"),
    odd("jsonl gbk", '{"a": "北门"}'.encode("gbk"), "not UTF-8", "read_jsonl"),
    odd("toml", b"a = [1", "not a TOML file", "read_toml"),
    odd("toml deep", b"a = " + b"[" * 50_000, "nested too deeply|not a TOML", "read_toml"),
    odd("toml digits", b"a = " + b"7" * 5000, "not a TOML file", "read_toml"),
    odd("toml utf-16", "a = 1".encode("utf-16"), "UTF-16", "read_toml"),
    odd("csv twice", b"a,b,a\n1,2,3\n", "two columns are named 'a'", "read_csv"),
    odd("csv field", b"a,b\n1," + b"x" * 200_000, "not a CSV file", "read_csv"),
    odd("csv utf-16", "a\tb\n1\t2\n".encode("utf-16"), "UTF-16", "read_csv"),
    odd("csv latin-1", "ort\nKöln\n".encode("latin-1"), "UTF-8", "read_csv"),
    odd("csv zeros", b"a,b\n1,\0\n", "zero bytes", "read_csv"),
    odd("parquet", b"PAR1junk", "not a Parquet file|cannot be read", "read_parquet"),
    odd("parquet empty", b"", "Parquet|cannot be read", "read_parquet"),
    odd("npy empty", b"", "not a NumPy array", "read_npy"),
    odd("npy text", b"hello", "not a NumPy array", "read_npy"),
    odd("npy mmap", b"\x93NUMPY\x01\x00", "not a NumPy array", "read_npy", mmap=True),
]


@pytest.mark.parametrize("data, words, read, kwargs", ODD)
def test_files_that_cannot_be_read(tmp_path, data, words, read, kwargs):
    import tipr_nb.core as core
    from tipr_nb.data import DatasetError

    path = tmp_path / "f"
    path.write_bytes(data)

    def go(**more):
        found = getattr(core, read)(path, **kwargs, **more)
        if read in ("read_jsonl", "read_csv"):
            list(found)

    with pytest.raises(TiprError, match=words) as e:
        go()
    assert (
        str(e.value).startswith(str(path))
        and "\n" not in str(e.value)
        and ";" in str(e.value)
        and len(str(e.value)) < 400
    )
    with pytest.raises(DatasetError):
        go(error=DatasetError)


@pytest.mark.parametrize(
    "read",
    [
        "read_text",
        "read_json",
        "read_jsonl",
        "read_toml",
        "read_csv",
        "read_parquet",
        "read_npy",
        "read_rows",
    ],
)
def test_no_such_file_folder_or_permission(tmp_path, read):
    import tipr_nb.core as core

    def go(path):
        found = getattr(core, read)(path)
        if hasattr(found, "__next__"):
            list(found)

    cases = [
        (tmp_path / "none.x", "no such file"),
        (tmp_path, "folder|cannot be read"),
        (tmp_path / "n" / ("n" * 300), "cannot be read|no such file"),
        (tmp_path / "a\0b", "null|NUL"),
    ]
    (tmp_path / "file").write_text("x")
    cases.append((tmp_path / "file" / "x", "part of this path is a file|no such file"))
    for path, words in cases:
        with pytest.raises(TiprError, match=words) as e:
            go(path)
        assert "\n" not in str(e.value) and ";" in str(e.value)


def test_what_tables_may_look_like(tmp_path):
    from tipr_nb.core import read_rows, read_toml

    def rows(name, data):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return list(read_rows(tmp_path / name))

    want = [{"image": "a.jpg", "caption": "a man, red", "id": "007"}]
    for name, text in (
        ("a.csv", 'image,caption,id\na.jpg,"a man, red",007\n'),
        ("b.csv", "\ufeffimage;caption;id\r\na.jpg;a man, red;007\r\n\r\n"),
        ("c.tsv", "image\tcaption\tid\na.jpg\ta man, red\t007\n"),
        ("d.csv", "image\tcaption\tid\na.jpg\ta man, red\t007\n"),
        ("e.jsonl", '\ufeff{"image": "a.jpg", "caption": "a man, red", "id": "007"}\n\n'),
        ("f.json", '\ufeff[{"image": "a.jpg", "caption": "a man, red", "id": "007"}]'),
    ):
        assert [r for _, r in rows(name, text)] == want, name
    assert rows("g.csv", 'image,caption\na.jpg,"two\nlines\u2028 here"\nb.jpg,x\n') == [
        ("g.csv line 3", {"image": "a.jpg", "caption": "two\nlines\u2028 here"}),
        ("g.csv line 4", {"image": "b.jpg", "caption": "x"}),
    ]
    assert [r for _, r in rows("h.jsonl", '{"a": "x\u2028y"}\n{"a": 1}')] == [
        {"a": "x\u2028y"},
        {"a": 1},
    ]
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"image": ["a.jpg"], "id": [7]}), tmp_path / "i.parquet")
    assert list(read_rows(tmp_path / "i.parquet")) == [
        ("i.parquet row 0", {"image": "a.jpg", "id": 7})
    ]
    (tmp_path / "r.toml").write_bytes("\ufeffname = 'ä'".encode())
    assert read_toml(tmp_path / "r.toml") == {"name": "ä"}


@pytest.mark.full
@pytest.mark.parametrize(
    "read", ["read_json", "read_jsonl", "read_toml", "read_csv", "read_npy", "read_parquet"]
)
def test_mutated_files_never_raise_anything_else(tmp_path, read):
    "A small fuzzer with a fixed seed: bytes changed, dropped, doubled."
    import io, random
    import numpy as np
    import tipr_nb.core as core

    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(20.0))
    parquet.write_table(arrow.table({"image": ["a.jpg", "b.jpg"], "id": [7, 8]}), table)
    good = {
        "read_json": b'{"a": [1, 2.5, "x"], "b": {"c": null}}',
        "read_jsonl": b'{"a": 1}\n{"a": "b"}\n',
        "read_toml": b'a = 1\n[b]\nc = "x"\nd = 2020-01-01\n',
        "read_csv": b'a,b\n1,"x, y"\n',
        "read_npy": array.getvalue(),
        "read_parquet": table.getvalue(),
    }[read]
    rng, path = random.Random(0), tmp_path / "f"
    for _ in range(500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 3)] = bytes(
                rng.randrange(256) for _ in range(rng.randint(0, 3))
            ) * rng.choice([1, 1, 1, 200])
        path.write_bytes(bytes(data))
        try:
            found = getattr(core, read)(path)
            if hasattr(found, "__next__"):
                list(found)
        except TiprError as e:
            assert "\n" not in str(e)


def test_the_hub_through_a_proxy(monkeypatch):
    "As huggingface_hub does, the proxy of the environment is asked."
    import socket, threading
    from tipr_nb.core import hub_answers

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert hub_answers()
    server.close()
    assert not hub_answers(0.5)
    for strange in ("http://127.0.0.1:port", "nonsense", "http://"):
        monkeypatch.setenv("https_proxy", strange)
        assert not hub_answers(0.5)


def test_messages_have_one_line():
    from tipr_nb.data import DatasetError

    assert (
        str(TiprError("a\nb\r\nc\u2028d")) == "a b c d"
        and str(DatasetError("x\ny")) == "x y"
        and str(TiprError()) == ""
    )
    import pickle

    assert str(pickle.loads(pickle.dumps(DatasetError("x\ny")))) == "x y"


# a death before every change of the file system

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.parametrize(
    "kind", ["new file", "file", "new folder", "folder", "folder, no exchange"]
)
def test_dying_at_every_point_of_a_write(tmp_path, kind, monkeypatch):
    from crash_points import crashes
    from tipr_nb.core import files

    if "no exchange" in kind:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    home, folder = tmp_path / "home", "folder" in kind
    home.mkdir()
    path = home / "thing"

    def write(text):
        with atomic_path(path, folder=folder) as p:
            if folder:
                (p / "a").write_text(text), (p / "b").write_text(text)
            else:
                p.write_text(text)

    def read():
        if not path.exists():
            return None
        return {f.read_text() for f in path.iterdir()} if folder else {path.read_text()}

    if not kind.startswith("new"):
        write("old")
    points = 0
    for points, _ in enumerate(crashes(lambda: write("new"), home), 1):
        whole = [{"old"}, {"new"}] if not kind.startswith("new") else [None, {"new"}]
        if "no exchange" in kind:
            whole.append(None)  # between the two renames: the next write puts it right
        assert read() in whole
        with pytest.raises(RuntimeError):
            with atomic_path(path, folder=folder):
                raise RuntimeError  # the next write fails, and still sweeps
        assert read() in whole[:2] and os.listdir(home) in (["thing"], [])
    assert points >= 4


@needs_fork
def test_dying_at_every_point_of_a_locked_json(tmp_path):
    from crash_points import crashes

    home = tmp_path / "home"
    home.mkdir()
    write_json(home / "run.json", {"step": 1})

    def job():
        with locked(home / "run.json"):
            write_json(home / "run.json", {"step": 2})

    for _ in crashes(job, home):
        assert read_json(home / "run.json")["step"] in (1, 2)
        job()
        assert read_json(home / "run.json")["step"] == 2 and sorted(os.listdir(home)) == [
            ".run.json.lock",
            "run.json",
        ]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a forked process's parent")
def test_a_worker_ends_though_its_parent_was_gone_first():
    "The parent may be killed before its worker has got as far as to look for it."
    code = """
import multiprocessing, time
from tipr_nb.core import exit_with_parent

def work():
    time.sleep(1)
    exit_with_parent()
    time.sleep(60)

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
print(worker.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    start = time.time()
    parent.stdout.read()  # until nobody holds the pipe open
    assert time.time() - start < 4


class TestFormerNames:
    def test_both_directions(self):
        for kind, names in FORMER_NAMES.items():
            for former, today in names.items():
                assert current_name(kind, former) == today == current_name(kind, today)
                assert recorded_name(kind, today) == former == recorded_name(kind, former)

    def test_a_suffix_stays_and_folders_are_left_alone(self):
        assert current_name("weights", "synth-world+predicted") == "clip-synth-world+predicted"
        assert current_name("weights", "runs/synth-world") == "runs/synth-world"

    @pytest.mark.parametrize("name", ["synth-world", "synth-pedes"])
    def test_the_name_of_a_dataset_is_no_weights(self, name):
        with pytest.raises(TiprError, match=f"its weights are called clip-{name}") as said:
            resolve_model(name)
        assert "\n" not in str(said.value)

    def test_todays_names_are_there(self):
        assert set(FORMER_NAMES["weights"].values()) <= set(shipped_weights())
        for hook in FORMER_NAMES["hook"].values():
            assert callable(load_object(hook, "hook"))


# outputs


@pytest.mark.parametrize(
    "path, folder, says",
    [
        ("x" * 300, True, "longer than this file system allows"),
        ("new/" + "x" * 300, False, "longer than this file system allows"),
        ("new/" + "x" * 300 + "/metrics.json", False, "longer than this file system allows"),
        ("/".join(["x" * 100] * 50), True, "longer than this file system allows"),
        ("é" * 200, True, "longer than this file system allows"),  # two bytes each
        ("file.txt/run", True, "a part of this path is a file"),
        ("file.txt/new/metrics.json", False, "a part of this path is a file"),
        ("file.txt", True, "a file of that name is in the way"),
        ("folder", False, "a folder of that name is in the way"),
        ("a\0b", False, "no file can have that name"),
        ("k\udcf6ln", True, "UTF-8"),
        ("circle/run", True, "links lead round in a circle"),
        ("nowhere/run", True, "a part of this path is a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path, path, folder, says):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(TiprError, match=says):
        check_output(tmp_path / path, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "path, folder",
    [
        ("new", True),
        ("new/deep/metrics.json", False),
        ("folder", True),
        ("folder/metrics.json", False),
        ("file.txt", False),
        ("linked/new", True),
        ("nowhere", False),  # a link to nothing is replaced
        ("x" * 255, True),
    ],
)
def test_an_output_that_can_be_written_leaves_no_trace(tmp_path, path, folder):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    check_output(tmp_path / path, folder)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "code, says", [(errno.EROFS, "read-only"), (errno.EACCES, "no permission")]
)
def test_an_output_on_a_disk_that_takes_nothing(tmp_path, monkeypatch, code, says):
    import tipr_nb.core.outputs as outputs

    def refuse(dir):
        raise OSError(code, "no")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refuse)
    with pytest.raises(TiprError, match=says):
        check_output(tmp_path / "new" / "run", folder=True)


# names that no file can have, where a file or folder is asked for


@pytest.mark.parametrize(
    "name", ["x" * 300, "a/" + "x" * 300, "a\0b"], ids=["long", "deep", "zero"]
)
def test_names_that_nothing_can_have_are_one_line(tmp_path, monkeypatch, name):
    from tipr_nb.interop import (
        convert_file,
        import_dataset,
        model_card,
        open_weights,
        read_checkpoint,
    )
    from tipr_nb.search import Gallery, find_photos
    from tipr_nb.search.probabilities import hit_probabilities
    from tipr_nb.training import RECIPES
    from tipr_nb.training.runs import weights_hash

    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for read in (
        open_weights,
        read_checkpoint,
        model_card,
        Gallery,
        lambda n: import_dataset(n, tmp_path / "pictures"),
        lambda n: convert_file("clip-synth-world", n, say=None),
        lambda n: find_photos(tmp_path / "photos", metadata=n),
        lambda n: find_photos(tmp_path / "photos", boxes=n),
    ):
        with pytest.raises(TiprError) as e:
            read(name)
        assert "\n" not in str(e.value)
    # a name that stands in a file
    assert hit_probabilities(tmp_path, dict(model=name, fingerprint="x")) is None
    assert weights_hash(RECIPES["clip-tiny"].replace(pretrained=name)) == name


def test_a_checksum_is_of_all_bytes(tmp_path):
    import hashlib
    from tipr_nb.core import file_sha256

    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_two_people_of_one_photo_have_keys_of_their_own():
    from tipr_nb.search.storage import person_key

    box = dict(x0=1, y0=2, x1=30, y1=60)
    whole = dict.fromkeys(box)
    keys = [
        person_key(dict(sha256="a" * 64, **corners))
        for corners in (box, box | dict(x0=2), box | dict(y1=61), whole)
    ]
    assert len(set(keys)) == 4 and keys[0] == "a" * 24 + "-1-2-30-60"


@pytest.mark.parametrize("spoiled", ["camera", "north"], ids=["name", "value"])
def test_text_of_parquet_that_is_no_utf8(tmp_path, spoiled):
    import pyarrow, pyarrow.parquet
    from tipr_nb.core import read_parquet

    path = tmp_path / "facts.parquet"
    table = pyarrow.table({"file": ["a.jpg"], "camera": ["north"]})
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, store_schema=False
    )
    assert read_parquet(path).to_pylist() == [{"file": "a.jpg", "camera": "north"}]
    broken = b"\xff" + spoiled.encode()[1:]
    path.write_bytes(path.read_bytes().replace(spoiled.encode(), broken))
    with pytest.raises(TiprError, match="not a Parquet file that can be read"):
        read_parquet(path)


def test_what_killed_writes_left_is_swept(tmp_path):
    from tipr_nb.core import sweep_leftovers
    from tipr_nb.core.files import _own_folder

    path = tmp_path / "t.csv"
    path.write_text("a\n")
    dead, handle = _own_folder(path)
    if handle is None:
        pytest.skip("no locks of files on this system")
    sweep_leftovers(path)
    assert dead.is_dir()  # its writer lives
    os.close(handle)
    sweep_leftovers(path)
    assert not dead.exists() and path.read_text() == "a\n"


def test_folders_that_appear_in_one_step_are_empty_before(tmp_path):
    from tipr_nb.core import check_output

    check_output(tmp_path / "new", empty=True)
    (tmp_path / "old").mkdir()
    check_output(tmp_path / "old", empty=True)
    (tmp_path / "old" / "a").write_text("")
    check_output(tmp_path / "old", folder=True)
    with pytest.raises(TiprError, match="something in it already"):
        check_output(tmp_path / "old", empty=True)
    with pytest.raises(TiprError, match="in the way"):
        check_output(tmp_path / "old" / "a", empty=True)


def test_the_home_of_nobody_is_one_line():
    from tipr_nb.interop import open_weights, read_checkpoint

    for read in (open_weights, read_checkpoint):
        with pytest.raises(TiprError):
            read("~nobody-of-that-name/weights.pt")
