"""Walk the built site as a reader would: `python scripts/walk_site.py [_docs]` opens every page in Chromium, on a phone and on a desk, in both themes, and lists what is too wide, lacks an alternative text or has too little contrast; dead links, heavy pages and figures that no page shows; and searches that miss."""

import argparse
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
RULES = ["color-contrast", "image-alt", "link-name", "html-has-lang", "document-title"]
LIGHT, DARK = "quarto-light", "quarto-dark"
HEAVY = 1.5e6
PATIENCE = 180_000  # milliseconds that one step of the browser may take on a busy machine
# What is typed into the search box, and the page (and place) that must come first.
SEARCHES = {
    "train on CUHK-PEDES": "datasets/cuhk-pedes.html",
    "evaluate": "06_evaluation/protocol.html#evaluate",
    "train": "07_training/loop.html#train",
}
# Where a name in back-ticks leads: to the function, not to the command of the same name.
FUNCTIONS = {"evaluate": "protocol.html#evaluate", "train": "loop.html#train"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    "A server of the folder on this machine alone, and its address."
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


class Marks(html.parser.HTMLParser):
    "Ids, links and pictures of a page."

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(found["id"])
        if tag == "a" and found.get("name"):
            self.ids.add(found["name"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "source") and found.get("src"):
            self.pictures.append(found["src"])


def is_remote(link: str) -> bool:
    return bool(re.match(r"(https?:)?//|(mailto|data|javascript):", link))


def all_pages(folder: Path) -> list[str]:
    "Every page of the site, as a path from its root."
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*.html")
        if "site_libs" not in p.parts
    )


def static_findings(folder: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    "What needs no browser: page -> dead links and weight; and page -> bytes with its pictures."
    marks = {name: Marks((folder / name).read_text(encoding="utf-8")) for name in all_pages(folder)}
    found: dict[str, list[str]] = {}
    weights: dict[str, int] = {}
    shown: set[Path] = set()
    for name, mine in marks.items():
        lines = []
        here = folder / name
        pictures = {
            (here.parent / unquote(s.split("?")[0])).resolve()
            for s in mine.pictures
            if not is_remote(s)
        }
        shown |= pictures
        lines += [
            f"no such picture: {os.path.relpath(p, folder)}"
            for p in sorted(pictures)
            if not p.exists()
        ]
        for link in dict.fromkeys(mine.links):
            if is_remote(link):
                continue
            target, _, anchor = link.partition("#")
            target = unquote(target.split("?")[0])
            there = (here.parent / target).resolve() if target else here.resolve()
            if there.is_dir():
                there = there / "index.html"
            if not there.exists():
                lines.append(f"dead link: {link}")
                continue
            other = marks.get(os.path.relpath(there, folder.resolve()))
            if anchor and other and unquote(anchor) not in other.ids:
                lines.append(f"dead anchor: {link}")
        weights[name] = here.stat().st_size + sum(p.stat().st_size for p in pictures if p.exists())
        if weights[name] > HEAVY:
            lines.append(
                f"{weights[name] / 1e6:.2f} MB with its pictures; keep a page under {HEAVY / 1e6} MB"
            )
        if lines:
            found[name] = lines
    figures = [
        p.resolve() for p in folder.rglob("*.png") if re.search(r"_files/figure-", p.as_posix())
    ]
    spare = [os.path.relpath(p, folder.resolve()) for p in figures if p not in shown]
    if spare:
        found["(site)"] = [f"{len(spare)} figures that no page shows, such as {spare[0]}"]
    return found, weights


def widest(page) -> tuple[int, list[str]]:
    "The page's width, and elements that reach beyond the right edge and do not scroll by themselves."
    return page.evaluate("""() => {
        const wide = innerWidth + 1, whole = document.documentElement.scrollWidth;
        if (whole <= wide) return [whole, []];
        const scrolls = e => { for (; e; e = e.parentElement) { const o = getComputedStyle(e).overflowX; if (o !== 'visible' && e !== document.body && e !== document.documentElement) return true; } return false; };
        const found = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > wide && !scrolls(e.parentElement));
        return [whole, found.slice(0, 3).map(e => e.tagName + '.' + [...e.classList].join('.') + ': ' + e.textContent.trim().slice(0, 40))];
    }""")


def violations(page, axe) -> list[str]:
    "What axe-core finds of RULES on the page as it is shown now."
    found = axe.run(
        page, options={"runOnly": {"type": "rule", "values": RULES}, "resultTypes": ["violations"]}
    ).response["violations"]
    out = []
    for rule in found:
        for node in rule["nodes"][:4]:
            reason = node["any"][0]["message"] if node["any"] else rule["help"]
            out.append(f"{rule['id']}: {node['html'][:90]} ({reason[:160]})")
        if len(rule["nodes"]) > 4:
            out.append(f"{rule['id']}: {len(rule['nodes']) - 4} more")
    return out


CONTRAST = """() => {
    const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
    const light = ([r, g, b]) => { const f = x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
    const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
    const behind = e => { const layers = []; for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3]) layers.push(c); if (c[3] === 1) break; } return layers.reverse().reduce((under, c) => over(c, under), [255, 255, 255, 1]); };
    const out = [];
    for (const e of document.querySelectorAll('body *')) {
        if (e.closest('svg, mjx-assistive-mml, [aria-hidden=true]') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const style = getComputedStyle(e), box = e.getBoundingClientRect();
        if (!e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) || !box.width || !box.height) continue;
        const back = behind(e), a = light(over(parse(style.color), back)), b = light(back);
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), size = parseFloat(style.fontSize), bold = +style.fontWeight >= 700;
        if (ratio < (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5)) out.push(`contrast ${ratio.toFixed(2)}: ${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 40)} (${style.color})`);
    }
    for (const i of document.images) if (!i.hasAttribute('alt') && i.getAttribute('role') !== 'presentation') out.push('no alternative text: ' + i.src.slice(-60));
    return out;
}"""


def quick_violations(page) -> list[str]:
    "Contrast and alternative texts by a computation of our own: seconds a page where axe-core takes minutes."
    found = page.evaluate(CONTRAST)
    return found[:6] + ([f"{len(found) - 6} more"] if len(found) > 6 else [])


def set_theme(page, dark: bool):
    "Switch as the button of the page does, and wait until the new style sheet is in place."
    wanted = DARK if dark else LIGHT
    if not page.evaluate("name => document.body.classList.contains(name)", wanted):
        page.evaluate("window.quartoToggleColorScheme && window.quartoToggleColorScheme()")
        page.wait_for_function("name => document.body.classList.contains(name)", arg=wanted)
        page.wait_for_timeout(250)


def answer(route, address: str, mathjax: Path | None):
    "Serve the site and, where it is on this machine, MathJax; nothing else is fetched."
    url = route.request.url
    if url.startswith((address, "data:", "blob:")):
        return route.continue_()
    if mathjax and "/mathjax@" in url:
        return route.fulfill(path=mathjax / url.split("/", 5)[-1].split("?")[0])
    return route.abort()


def settle(page, mathjax: Path | None):
    "Wait until formulas are set and pictures have their sizes; open what is folded."
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    if mathjax and page.query_selector("span.math"):
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("MathJax.startup.promise")
    page.wait_for_function("[...document.images].every(i => i.complete)")


def open_page(context, url: str, mathjax: Path | None):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function(
        "document.body && (document.body.classList.contains('quarto-light') || document.body.classList.contains('quarto-dark'))"
    )
    settle(page, mathjax)
    return page


def wrong_functions(page) -> list[str]:
    "Links on names in back-ticks that lead to a command instead of the function."
    found = page.evaluate(
        "() => [...document.querySelectorAll('main a')].filter(a => a.querySelector('code')).map(a => [a.textContent.trim().replace(/\\(\\)$/, ''), a.href])"
    )
    return [
        f"`{name}` leads to {href}"
        for name, href in found
        if name in FUNCTIONS and not href.endswith(FUNCTIONS[name])
    ]


def answers(context, address: str, words: str) -> list[str]:
    "Links that the site's own search offers for words typed into its box, best first, each once."
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size(DESK)
    page.goto(address + "benchmarks.html", wait_until="domcontentloaded")
    page.wait_for_selector("#quarto-search button", state="attached")
    page.evaluate("document.querySelector('#quarto-search button').click()")
    page.wait_for_selector(".aa-Input")
    page.fill(".aa-Input", words)
    page.wait_for_selector(".aa-List a[href], .aa-SourceNoResults", state="attached")
    page.wait_for_timeout(1000)
    links = page.evaluate(
        "() => [...document.querySelectorAll('.aa-List a[href]')].map(a => a.href.replace(/[?]q=[^#]*/, ''))"
    )
    page.close()
    return [link.removeprefix(address) for link in dict.fromkeys(links)]


def missed_searches(context, address: str) -> list[str]:
    "Searches that do not lead, first of all, to the page that a reader looks for, or not to the place on it."
    lines = []
    for words, wanted in SEARCHES.items():
        found = answers(context, address, words)
        first = found[0] if found else ""
        if first.partition("#")[0] != wanted.partition("#")[0]:
            lines.append(f"the search for {words!r} finds {first or 'nothing'} before {wanted}")
        elif "#" in wanted and wanted not in found[:5]:
            lines.append(
                f"the search for {words!r} lacks {wanted} among its first: {', '.join(found[:5])}"
            )
    return lines


def walk(
    folder: Path,
    only: list[str] | None = None,
    mathjax: Path | None = None,
    shots: Path | None = None,
    quick: bool = False,
) -> dict[str, dict]:
    "Page -> its width on a phone, its weight and findings."
    from playwright.sync_api import sync_playwright

    look = quick_violations
    if not quick:
        from axe_playwright_python.sync_playwright import Axe

        look = functools.partial(violations, axe=Axe())
    found, weights = static_findings(folder)
    pages = [p for p in all_pages(folder) if not only or any(o in p for o in only)]
    server, address = serve(folder)
    report: dict[str, dict] = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context(viewport=PHONE, color_scheme="light", service_workers="block")
        context.route("**/*", lambda route: answer(route, address, mathjax))
        for name in pages:
            page = open_page(context, address + name, mathjax)
            width, beyond = widest(page)
            lines = [
                *found.get(name, []),
                *(
                    [f"{width} px wide at {PHONE['width']}: {'; '.join(beyond)}"]
                    if width > PHONE["width"] + 1
                    else []
                ),
            ]
            lines += wrong_functions(page)
            counts = {}
            for dark in (False, True):
                set_theme(page, dark)
                theme = "dark" if dark else "light"
                if shots:
                    photograph(page, shots, name, theme)
                broken = []
                for size in (PHONE, DESK):
                    page.set_viewport_size(size)
                    broken += [v for v in look(page) if v not in broken]
                counts[theme] = len(broken)
                lines += [f"{theme} {v}" for v in broken]
            report[name] = {"width": width, "weight": weights[name], **counts, "findings": lines}
            print(
                f"{name:<46} {width:>4} px {weights[name] / 1e3:>6.0f} kB  findings: {len(lines)}",
                flush=True,
            )
            for line in lines:
                print(f"   {line}", flush=True)
            page.close()
        if not only:
            lines = found.get("(site)", []) + missed_searches(context, address)
            report["(site)"] = {"findings": lines}
            print("\n".join(["(site)", *(f"   {line}" for line in lines)]))
        browser.close()
    server.shutdown()
    return report


def photograph(page, shots: Path, name: str, theme: str):
    "Pictures of the whole page on a phone and of its top on a desk."
    stem = name.replace("/", "-").removesuffix(".html")
    shots.mkdir(parents=True, exist_ok=True)
    for size in (PHONE, DESK):
        page.set_viewport_size(size)
        page.wait_for_timeout(200)
        page.screenshot(
            path=shots / f"{stem}-{size['width']}-{theme}.png", full_page=True, timeout=PATIENCE
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=ROOT / "_docs", type=Path)
    parser.add_argument("--only", nargs="*", help="pages whose path contains one of these")
    parser.add_argument(
        "--mathjax",
        type=Path,
        help="folder of MathJax (npm's `mathjax@3`), for machines without a network: formulas are then set as readers see them",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="contrast and alternative texts without axe-core, in seconds a page",
    )
    parser.add_argument("--json", type=Path, help="write the findings here")
    parser.add_argument("--shots", type=Path, help="write pictures of the pages into this folder")
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"{args.folder}: no such folder; build the site with `make docs` first")
    report = walk(args.folder, args.only, args.mathjax, args.shots, args.quick)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    bad = sum(bool(r["findings"]) for r in report.values())
    if bad:
        sys.exit(f"{bad} of {len(report)} pages have findings")
    print(
        f"{len(report)} pages fit a phone, have alternative texts, enough contrast in both themes and no dead link"
    )


if __name__ == "__main__":
    main()
