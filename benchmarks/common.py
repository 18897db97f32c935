"""What every benchmark here shares: facts about the machine, interleaved timing, peak memory, one JSON per benchmark."""

from __future__ import annotations

import contextlib, datetime, os, platform, sys, time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from tipr_nb.core import TiprError, read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def set_threads(n: int):
    "Use `n` threads for PyTorch's operations and for NumPy's linear algebra."
    import torch, numpy  # noqa: F401  (its library must be loaded to be told)
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(n)
    threadpool_limits(n, user_api="blas")


def _first(path: str, key: str, default: str = "") -> str:
    "The value of the first `key: value` line of a file under /proc."
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return default
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), default)


def _kb(path: str, key: str) -> int:
    return int(_first(path, key, "0 kB").split()[0])


def free_memory_gb() -> float:
    "Memory a new allocation could have, in GiB (0 where the system does not say)."
    return _kb("/proc/meminfo", "MemAvailable") / 2**20


def machine() -> dict:
    "Processor, memory, load, GPU, versions and date: what a number is worthless without."
    import torch

    def v(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return dict(
        date=datetime.date.today().isoformat(),
        cpu=_first("/proc/cpuinfo", "model name", platform.processor()),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(_kb("/proc/meminfo", "MemTotal") / 2**20, 1),
        load=[round(x, 2) for x in os.getloadavg()],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        versions={
            p: v(p)
            for p in ("torch", "numpy", "numba", "open_clip_torch", "diffusers", "faiss-cpu")
        },
    )


def seconds(f: Callable) -> float:
    "Wall-clock time of one call; a GPU is waited for."
    import torch

    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    sync()
    start = time.perf_counter()
    f()
    sync()
    return time.perf_counter() - start


def interleave(
    cases: Mapping[str, Callable], repeats: int | Mapping[str, int] = 3, warmup: int = 0
) -> dict[str, list[float]]:
    "Seconds of every case, round after round, so that what else runs on the machine disturbs all of them alike; `repeats` may differ by case."
    count = {k: repeats[k] if isinstance(repeats, Mapping) else repeats for k in cases}
    for _ in range(warmup):
        for f in cases.values():
            f()
    out = {k: [] for k in cases}
    for i in range(max(count.values())):
        for k, f in cases.items():
            if i < count[k]:
                out[k].append(seconds(f))
    return out


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {k: median(v) for k, v in times.items()}


@contextlib.contextmanager
def peak_memory() -> Iterator[dict]:
    "Yield a dict whose 'gb' is, after the block, the memory of this process at its highest beyond what it held before (Linux)."
    out = {"gb": float("nan")}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except OSError:
        yield out
        return
    before = _kb("/proc/self/status", "VmRSS")
    yield out
    out["gb"] = max(0, _kb("/proc/self/status", "VmHWM") - before) / 2**20


def show(rows: list[dict], title: str = ""):
    "Print rows as a table."
    import pandas as pd

    if title:
        print(f"\n{title}")
    print(pd.DataFrame(rows).fillna("").to_string(index=False, float_format=lambda x: f"{x:.3g}"))


def write_result(
    name: str, rows: list[dict], key: str | None = None, module: str | None = None, **more
) -> Path:
    "Write `results/<name>.json`: the rows, the machine, the command (of `module` where it is called otherwise). With `key`, rows of an earlier run that are not measured again stay."
    path = RESULTS / f"{name}.json"
    if key and path.is_file():
        new = {r[key] for r in rows}
        rows = [r for r in read_json(path)["rows"] if r[key] not in new] + rows
    write_json(
        path,
        dict(
            benchmark=name,
            command=" ".join([f"python -m benchmarks.{module or name}", *_shown(sys.argv[1:])]),
            machine=machine(),
            **more,
            rows=rows,
        ),
    )
    return path


def _shown(args: list[str]) -> list[str]:
    "Arguments without the folders of this machine."
    return [Path(a).name if os.path.isabs(a) else a for a in args]


def run(main: Callable[[], object]):
    "What a benchmark's command does: an error that its user can mend is one line."
    try:
        main()
    except TiprError as e:
        raise SystemExit(str(e)) from None
