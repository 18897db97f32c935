"""A job that is killed before the n-th change of the file system, for every n: `for n in crashes(job, folder): ...` looks at what each death left.

`job` runs in a forked child with a process group of its own. Folders made, files opened for writing, renamed, linked, removed, cut or given rights under `folder` are counted, as Python's audit
events tell; what libraries write without such an event (safetensors, Arrow) is announced by the harness. Changes of worker processes and of threads count too: one counter is shared, and at the
n-th change the whole group gets SIGKILL, so nothing is cleaned up. The parent may hold files of the folder open all the while.
"""

import contextlib
import importlib
import mmap
import os
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
UNSEEN = (
    "safetensors.torch:save_file:1",
    "safetensors.numpy:save_file:1",
    "pyarrow.parquet:write_table:1",
)  # function, place of its path


def full_path(path: object, folder_handle: object) -> str:
    "A path of an audit event as text; relative to an open folder where `shutil.rmtree` works in one."
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path)
    if os.path.isabs(text):
        return text
    if isinstance(folder_handle, int) and folder_handle >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder_handle}"), text)
    return os.path.abspath(text)


def is_change(event: str, args: tuple, folder: str) -> bool:
    "Whether an audit event changes something under `folder`."
    if event == "open":
        path, _, flags = args
        if not isinstance(flags, int) or not flags & WRITING:
            return False
        paths = [(path, None)]
    elif event in ("os.rename", "os.link"):
        paths = [(args[0], args[2]), (args[1], args[3])]
    elif event == "os.symlink":
        paths = [(args[1], args[2])]
    elif event in CHANGES:
        paths = [
            (
                args[0],
                args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod") else None,
            )
        ]
    else:
        return False
    for path, handle in paths:
        with contextlib.suppress(TypeError, OSError):
            if full_path(path, handle).startswith(folder):
                return True
    return False


def announce(name: str):
    "Let a function that writes a file unseen tell so first."
    module, function, place = name.split(":")
    with contextlib.suppress(ImportError):
        home = importlib.import_module(module)
        real = getattr(home, function)

        def telling(*args, **kwargs):
            if len(args) > int(place):
                sys.audit("open", os.fspath(args[int(place)]), "wb", os.O_WRONLY | os.O_CREAT)
            return real(*args, **kwargs)

        setattr(home, function, telling)


def wait_for_group(leader: int, seconds: float = 2.0):
    "Until no process of a killed group is left (or only ones that nobody waits for)."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(leader, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.002)


def end_with(job: Callable[[], object]) -> NoReturn:
    "All that a child does: `job`, in a group of its own, and the end."
    code = 1
    try:
        os.setsid()
        job()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_until(job: Callable[[], object], folder: Path, n: int | None) -> int | None:
    "Run `job` in a child that is killed before change number `n` (None: never); how many changes it made if it came to its end."
    shared = mmap.mmap(-1, 8)
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        wait_for_group(child)
        if status == -signal.SIGKILL:
            return None
        assert status == 0, f"the job failed by itself before change {n} (its traceback is above)"
        return struct.unpack("q", shared[:8])[0]

    def watched():
        for name in UNSEEN:
            announce(name)

        def watch(event, args):
            if not is_change(event, args, str(folder)):
                return
            (made,) = struct.unpack("q", shared[:8])
            if n is not None and made >= n:
                os.killpg(0, signal.SIGKILL)
            shared[:8] = struct.pack("q", made + 1)

        sys.addaudithook(watch)
        job()

    end_with(watched)


def count_changes(job: Callable[[], object], folder: Path) -> int:
    "Changes of the file system that a run of `job` makes under `folder`; the folder keeps them."
    made = run_until(job, folder, None)
    assert made is not None
    return made


def crashes(
    job: Callable[[], object], folder: Path, every: int = 1, first: int = 0, most: int = 2000
) -> Iterator[int]:
    "After each death of `job` its number, with the folder as it was left; before each run the folder is as it was. `every` takes a selection."
    before = folder.with_name(folder.name + ".before")
    shutil.copytree(folder, before, symlinks=True)
    try:
        for n in range(first, most, every):
            shutil.rmtree(folder)
            shutil.copytree(before, folder, symlinks=True)
            if run_until(job, folder, n) is not None:
                return
            yield n
        raise AssertionError(f"more than {most} changes")
    finally:
        shutil.rmtree(before, ignore_errors=True)


def kill_after(job: Callable[[], object], seconds: float) -> bool:
    "Run `job` in a child that is killed after some seconds; True if it came to its end before."
    if child := os.fork():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, "the job failed by itself"
                return True
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wait_for_group(child)
        return False
    end_with(job)
