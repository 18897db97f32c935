"""What all tests share: no network, quiet progress, a cache of their own, and small data made once."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TIPR_QUIET"] = "1"


@pytest.fixture(scope="module")
def home(tmp_path_factory, request):
    "A folder of the module's own, and in it the package's cache."
    home = tmp_path_factory.mktemp(request.module.__name__.removeprefix("test_"))
    old, os.environ["TIPR_CACHE"] = os.environ.get("TIPR_CACHE"), str(home / "cache")
    yield home
    os.environ.pop("TIPR_CACHE") if old is None else os.environ.update(TIPR_CACHE=old)


@pytest.fixture(scope="module")
def people(home):
    "A benchmark small enough to train on in a test."
    from tipr_nb.data import load_dataset
    from tipr_nb.synth import make_synth_pedes

    make_synth_pedes(home / "people", n_ids=(24, 6, 5), seed=1, workers=1)
    return load_dataset("synth-pedes", home / "people")


def pytest_terminal_summary(terminalreporter):
    "How many crash points were tried, by job (see `crash_points.py`)."
    counts, wrong = {}, 0
    for report in (
        r
        for reports in terminalreporter.stats.values()
        for r in reports
        if hasattr(r, "user_properties")
    ):
        if getattr(report, "when", "") != "call":
            continue
        for name, value in report.user_properties:
            if name == "crash_points":
                counts[value[0]] = counts.get(value[0], 0) + value[1]
        if report.failed and "test_crashes" in report.nodeid:
            wrong += 1
    if not counts and not wrong:
        return
    jobs = ", ".join(f"{job} {n}" for job, n in counts.items())
    terminalreporter.write_line(
        f"crash points: {jobs}; {sum(counts.values())} in all, wrong states in {wrong} jobs"
    )
