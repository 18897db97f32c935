import errno, os, subprocess, sys
import pytest
from tipr_nb.core import TiprError, atomic_path, cache_dir, ensure_torchvision, locked, os_errors, read_json, resolve_model, write_json, write_text


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
