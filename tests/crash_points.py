"""A process that dies before the n-th change of the file system, for every n: `for state in crashes(job, folder): ...` looks at what is left after each death.

`job` runs in a forked child; folders made, files opened for writing, renamed, removed or given rights under `folder` are counted, as Python's audit events tell.
"""
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DIED = 77


def is_change(event: str, args: tuple, folder: str) -> bool:
    "Whether an audit event changes something under `folder`."
    if event == "open":
        path, _, flags = args
        if not isinstance(flags, int) or not flags & WRITING: return False
    elif event in CHANGES: path = args[0]
    else: return False
    try: return os.fspath(path).startswith(folder) if not isinstance(path, (int, bytes)) else isinstance(path, int)
    except TypeError: return False


def run_until(job: Callable[[], object], folder: Path, n: int) -> bool:
    "Run `job` in a child that dies before change number `n`; whether it came to its end before that."
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != DIED
    left = [n]

    def watch(event, args):
        if is_change(event, args, str(folder)):
            left[0] -= 1
            if left[0] < 0: os._exit(DIED)

    code = 1
    try:
        sys.addaudithook(watch)
        job()
        code = 0
    finally: os._exit(code)


def crashes(job: Callable[[], object], folder: Path, most: int = 400) -> Iterator[int]:
    "After each death of `job` its number, with the folder as it was left; before each run the folder is as it was."
    before = folder.with_name(folder.name + ".before")
    shutil.copytree(folder, before, symlinks=True)
    for n in range(most):
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)
        ended = run_until(job, folder, n)
        if ended: return
        yield n
    raise AssertionError(f"more than {most} changes")
