"""Stop a run before the n-th change of the file system, as a kill or a power failure would: nothing after it happens, no clean-up either."""
import os
import sys
import threading
from contextlib import contextmanager

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


class Killed(BaseException):
    "The process is gone; no handler of ours catches this."


class Counter:
    "Counts changes of the file system below a folder, and allows no more from the n-th on."
    def __init__(self):
        self.active, self.root, self.left, self.count, self.thread = False, "", -1, 0, None

    def hook(self, event, args):
        if not self.active or threading.get_ident() != self.thread: return
        if event == "open":
            path, flags = args[0], args[2]
            if not isinstance(flags, int) or not flags & WRITING: return
        elif event in CHANGES: path = args[0]
        else: return
        if not isinstance(path, (str, bytes)): return
        if not os.fsdecode(path).startswith(self.root): return
        self.count += 1
        if self.left >= 0 and self.count > self.left: raise Killed


_counter = Counter()
_installed = []


@contextmanager
def stopped_after(root, changes: int = -1):
    "Inside the block the `changes`-th change below `root` is the last one; -1 counts only. Yields the counter."
    if not _installed:
        sys.addaudithook(_counter.hook)
        _installed.append(True)
    _counter.root, _counter.left, _counter.count = str(root), changes, 0
    _counter.thread, _counter.active = threading.get_ident(), True
    try: yield _counter
    finally: _counter.active = False
