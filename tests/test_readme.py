"The front page: made from its notebook, with a line for every notebook, links that lead somewhere, and no HTML that a code host would garble."

import re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)


def test_in_step():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/make_readme.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", PROSE) if not re.match(r"[a-z]+:|#", t)]
    assert len(targets) > 30
    assert not [t for t in targets if not (ROOT / t).exists()]
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", PROSE, re.M)
    }
    assert {t for t in re.findall(r"\]\(#([^)\s]+)\)", PROSE)} <= headings


def test_every_notebook_is_listed():
    nbs = [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(q.startswith((".", "_")) for q in p.relative_to(ROOT).parts)
        and p.name != "index.ipynb"
    ]
    assert not [n for n in nbs if f"]({n})" not in PROSE], (
        "run nbs/index.ipynb again, then `make readme`"
    )


def test_renders_on_a_code_host():
    assert not re.findall(r"<(?:table|div|style|script|img)\b", PROSE)
    assert not re.findall(r"^#\|", TEXT, re.M) and not re.findall(
        r"^```$\s^\S", re.sub(r"^```\w+$.*?^```$", "", TEXT, flags=re.M | re.S), re.M
    )
    for address in re.findall(r"https?://[^\s)>\]]+", TEXT):
        assert re.match(r"https://(arxiv\.org|download\.pytorch\.org)/", address), address
