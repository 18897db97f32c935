"""Walk the built site as a reader would: `python scripts/walk_site.py [_docs]` opens every page in Chromium, on a phone and in both themes, and lists what is too wide, lacks an alternative text or has too little contrast."""
import argparse
import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
RULES = ["color-contrast", "image-alt", "link-name", "html-has-lang", "document-title"]
LIGHT, DARK = "quarto-light", "quarto-dark"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    "A server of the folder on this machine alone, and its address."
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def widest(page) -> list[str]:
    "Elements that reach beyond the right edge and do not scroll by themselves."
    return page.evaluate("""() => {
        const wide = innerWidth + 1;
        if (document.documentElement.scrollWidth <= wide) return [];
        const scrolls = e => { for (; e; e = e.parentElement) { const o = getComputedStyle(e).overflowX; if (o !== 'visible' && e !== document.body && e !== document.documentElement) return true; } return false; };
        const found = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > wide && !scrolls(e.parentElement));
        return [`${document.documentElement.scrollWidth} px`, ...found.slice(0, 3).map(e => e.tagName + '.' + [...e.classList].join('.') + ': ' + e.textContent.trim().slice(0, 40))];
    }""")


def violations(page, axe) -> list[str]:
    "What axe-core finds of RULES on the page as it is shown now."
    found = axe.run(page, options={"runOnly": {"type": "rule", "values": RULES}}).response["violations"]
    out = []
    for rule in found:
        for node in rule["nodes"][:4]:
            reason = node["any"][0]["message"] if node["any"] else rule["help"]
            out.append(f"{rule['id']}: {node['html'][:90]} ({reason[:110]})")
        if len(rule["nodes"]) > 4:
            out.append(f"{rule['id']}: {len(rule['nodes']) - 4} more")
    return out


def set_theme(page, dark: bool):
    "Switch as the button of the page does."
    wanted = DARK if dark else LIGHT
    if not page.evaluate("name => document.body.classList.contains(name)", wanted):
        page.evaluate("window.quartoToggleColorScheme && window.quartoToggleColorScheme()")
        page.wait_for_timeout(150)


def answer(route, address: str, mathjax: Path | None):
    "Serve the site and, where it is on this machine, MathJax; nothing else is fetched."
    url = route.request.url
    if url.startswith(address):
        return route.continue_()
    if mathjax and "/mathjax@" in url:
        return route.fulfill(path=mathjax / url.split("/", 5)[-1].split("?")[0])
    return route.abort()


def walk(folder: Path, only: list[str] | None = None, dark: bool = True, mathjax: Path | None = None) -> dict[str, list[str]]:
    "Page -> findings."
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright
    axe = Axe()
    pages = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html") if "site_libs" not in p.parts)
    pages = [p for p in pages if not only or any(o in p for o in only)]
    server, address = serve(folder)
    found: dict[str, list[str]] = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in pages:
            page = browser.new_page(viewport=PHONE)
            page.route("**/*", lambda route: answer(route, address, mathjax))
            page.goto(address + name, wait_until="load")
            page.wait_for_timeout(300)
            mine = [f"wider than {PHONE['width']} px: {'; '.join(w)}"] if (w := widest(page)) else []
            page.set_viewport_size(DESK)
            for shown in ([False, True] if dark else [False]):
                set_theme(page, shown)
                mine += [f"{'dark' if shown else 'light'} {v}" for v in violations(page, axe)]
            size = (folder / name).stat().st_size
            if size > 1.5e6:
                mine.append(f"{size / 1e6:.1f} MB; keep a page under 1.5 MB")
            if mine:
                found[name] = mine
            page.close()
        browser.close()
    server.shutdown()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=ROOT / "_docs", type=Path)
    parser.add_argument("--only", nargs="*", help="pages whose path contains one of these")
    parser.add_argument("--mathjax", type=Path, help="folder of MathJax (npm's `mathjax@3`), for machines without a network: formulas are then set as readers see them")
    parser.add_argument("--json", type=Path, help="write the findings here")
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"{args.folder}: no such folder; build the site with `make docs` first")
    found = walk(args.folder, args.only, mathjax=args.mathjax)
    for name, lines in found.items():
        print(name)
        for line in lines:
            print(f"   {line}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if found:
        sys.exit(1)
    print("every page fits a phone, has alternative texts and enough contrast in both themes")


if __name__ == "__main__":
    main()
