import errno, os, subprocess, sys
import pytest
from tipr_nb.core import (TiprError, atomic_path, cache_dir, ensure_torchvision, locked, os_errors, read_json, resolve_model, write_json,
    write_text)


def test_import_is_light():
    code = "import sys, tipr_nb, tipr_nb.core; assert not {'torch', 'numpy', 'pandas', 'matplotlib', 'PIL', 'fastcore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_are_listed():
    import tipr_nb
    assert "load_dataset" in dir(tipr_nb)
    with pytest.raises(AttributeError, match="no_such_name"): tipr_nb.no_such_name


def test_atomic_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError):
        with atomic_path(tmp_path / "a.txt") as p:
            p.write_text("half")
            raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder_replaces_a_full_one(tmp_path):
    for text in ("one", "two"):
        with atomic_path(tmp_path / "f", folder=True) as p: (p / "x").write_text(text)
    assert (tmp_path / "f/x").read_text() == "two" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("code, word", [(errno.ENOSPC, "no space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")])
def test_os_errors_are_one_line(code, word):
    with pytest.raises(TiprError, match=word) as e:
        with os_errors("out.bin"): raise OSError(code, "x")
    assert "\n" not in str(e.value) and str(e.value).startswith("out.bin")


def test_write_under_a_file_is_an_error(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(TiprError): write_json(tmp_path / "file" / "run.json", {})


def test_json_missing_and_cut(tmp_path):
    with pytest.raises(TiprError, match="no such file"): read_json(tmp_path / "no.json")
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(TiprError, match="not complete JSON"): read_json(tmp_path / "cut.json")


def test_lock_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIPR_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" and cache_dir().is_dir()
    with locked(tmp_path / "thing"): pass


@pytest.mark.parametrize("source", ["/no/such/folder", "./nor/here", "no-alias-of-ours", "owner/not-here"])
def test_missing_models_fail_at_once(source):
    with pytest.raises(TiprError) as e: resolve_model(source)
    assert source in str(e.value) and "\n" not in str(e.value)


def test_model_folder_with_a_file_missing(tmp_path):
    with pytest.raises(TiprError, match="config.json is missing"): resolve_model(tmp_path)


def test_torchvision_schemas_twice():
    ensure_torchvision(); ensure_torchvision()
    import torchvision  # noqa: F401
    code = "from tipr_nb.core import ensure_torchvision as e; e(); e(); import torchvision; from torchvision.transforms import v2"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capfd):
    import time
    import tipr_nb.core as core
    monkeypatch.delenv("TIPR_QUIET", raising=False)
    for _ in core.progress(range(3), "quick work"): pass
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(core, "_LOG_SECONDS", .05)
    for _ in core.progress(range(4), "slow work"): time.sleep(.06)
    for _ in core.progress(iter(range(3)), "no total"): time.sleep(.06)
    bar = core.progress(None, "by hand", total=10, initial=4)
    for _ in range(6): time.sleep(.06); bar.update(1)
    bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("slow work: ") and " of 4, 00:00 gone, about " in lines[0] and "\r" not in "".join(lines)
    assert any(line.startswith("no total: ") and "of" not in line and "left" not in line for line in lines)
    assert lines[-1].startswith("by hand: 10 of 10")
    for _ in core.progress(range(3), "off", disable=True): time.sleep(.06)
    monkeypatch.setenv("TIPR_QUIET", "1")
    for disable in (None, False):
        for _ in core.progress(range(3), "quiet", disable=disable): time.sleep(.06)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("features, native", [({"avx2": True}, False), ({"avx512_bf16": False, "amx_tile": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True, "neon": True}, True)])
def test_bf16_where_the_processor_has_it(monkeypatch, features, native):
    import torch
    from tipr_nb.core import native_bf16, usable_precision
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert native_bf16("cpu") is native and usable_precision("bf16", "cpu") == ("bf16" if native else "no")
    assert usable_precision("no", "cpu") == "no" and usable_precision("fp16", "cpu") == "fp16"


def test_bf16_without_torchs_probe(monkeypatch):
    "An older PyTorch: the kernel's flags, or nothing."
    import tipr_nb.core as core, torch
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for text, native in (("flags\t\t: fpu avx2 avx512_bf16\n", True), ("flags\t\t: fpu avx2\nmodel name\t: bf16\n", False), ("Features\t: asimd bf16\n", True)):
        monkeypatch.setattr(core.Path, "read_text", lambda self, text=text, **kw: text)
        assert core.native_bf16() is native


def test_bf16_on_gpus_before_ampere(monkeypatch):
    import torch
    from tipr_nb.core import native_bf16
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, native in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: type("Card", (), dict(major=major)))
        assert native_bf16("cuda") is native


class _Clocks:
    "Clocks set by hand: seconds, idle seconds of two processors, own seconds."
    def __init__(self, monkeypatch):
        import psutil, tipr_nb.core as core
        self.now, self.idle, self.own = 0., 0., 0.
        monkeypatch.setattr(core.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(psutil, "cpu_times", lambda: type("T", (), dict(idle=self.idle)))
        monkeypatch.setattr(psutil.Process, "cpu_times", lambda process: type("T", (), dict(user=self.own, system=0.)))
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def pass_by(self, seconds, idle, own): self.now += seconds; self.idle += idle; self.own += own


def test_threads_follow_what_is_free(monkeypatch):
    import torch
    from tipr_nb.core import fit_threads, free_threads
    clocks, before, seen = _Clocks(monkeypatch), torch.get_num_threads(), []
    with free_threads(2):
        for seconds, idle, own in ((10, 0, 20), (10, 0, 10), (1, 1, 1), (10, 0, 5), (10, 10, 10)):     # alone; beside one process, or two; too soon to look again; alone again
            clocks.pass_by(seconds, idle, own)
            fit_threads()
            seen.append(torch.get_num_threads())
    assert seen == [2, 1, 1, 1, 2] and torch.get_num_threads() == before


def test_threads_of_somebody_elses_choice_stay(monkeypatch):
    import torch
    from tipr_nb.core import fit_threads, free_threads
    clocks, before = _Clocks(monkeypatch), torch.get_num_threads()
    clocks.pass_by(10, 20, 0)
    fit_threads()                                    # no block around it
    assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with free_threads(2):
        clocks.pass_by(10, 20, 0)
        fit_threads()
        assert torch.get_num_threads() == before
