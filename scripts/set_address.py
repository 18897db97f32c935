"""Fill in the repository's address everywhere, from settings.ini: `python scripts/set_address.py --git https://github.com/OWNER/NAME --docs https://OWNER.github.io/NAME`.

Without options the addresses in settings.ini are applied again (to notebooks that came since); `--clear` takes them out everywhere. Written are: settings.ini, pyproject.toml, CITATION.cff, _quarto.yml,
nbs/llms.txt, README.md, and an "Open in Colab" badge with a hidden line that installs the package, in each notebook that runs there.
"""

import argparse, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

NOT_ON_COLAB = (
    "datasets/",
    "papers/grids/",
    "13_app",
    "tutorials/many_machines",
    "index",
)  # other people's data, pages that stay on this machine, more than one machine
BADGE, INSTALL = "cell-colab", "cell-install"  # ids of the two cells


def settings(root: Path) -> dict[str, str]:
    config = ConfigParser()
    config.read(root / "settings.ini")
    return {k: v.strip() for k, v in config["DEFAULT"].items()}


def check(git: str, docs: str):
    if not re.fullmatch(r"https://[\w.-]+/[\w.-]+/[\w.-]+", git):
        sys.exit(f"--git {git}: write it like https://github.com/OWNER/NAME")
    if docs and not re.fullmatch(r"https://[\w.-]+(/[\w./-]*)?", docs):
        sys.exit(f"--docs {docs}: write it like https://OWNER.github.io/NAME")


def put_settings(root: Path, git: str, docs: str):
    "The one place where the address is kept."
    host, base = re.match(r"(https://[^/]+)?(/.*)?", docs).groups()
    new = dict(
        user=git.split("/")[-2] if git else "",
        git_url=git,
        doc_host=host or "",
        doc_baseurl=base or "",
    )
    path = root / "settings.ini"
    text = path.read_text(encoding="utf-8")
    for k, v in new.items():
        text = re.sub(rf"(?m)^{k} =.*$", f"{k} = {v}".rstrip(), text)
    path.write_text(text, encoding="utf-8")


def site(s: dict[str, str]) -> str:
    return (
        f"{s['doc_host'].rstrip('/')}/{s['doc_baseurl'].strip('/')}".rstrip("/")
        if s["doc_host"]
        else ""
    )


def put_pyproject(text: str, s: dict[str, str]) -> str:
    text = re.sub(r"\n\[project\.urls\]\n(?:[A-Za-z]+ = .*\n)*", "", text)
    urls = dict(
        Source=s["git_url"], Documentation=site(s), Issues=s["git_url"] and s["git_url"] + "/issues"
    )
    lines = "".join(f'{k} = "{v}"\n' for k, v in urls.items() if v)
    return (
        text.replace("\n[project.scripts]", f"\n[project.urls]\n{lines}\n[project.scripts]", 1)
        if lines
        else text
    )


def put_citation(text: str, s: dict[str, str]) -> str:
    text = re.sub(r"(?m)^(repository-code|url): .*\n", "", text)
    lines = "".join(
        f'{k}: "{v}"\n' for k, v in {"repository-code": s["git_url"], "url": site(s)}.items() if v
    )
    return text.replace("type: software\n", f"type: software\n{lines}", 1)


def put_quarto(text: str, s: dict[str, str]) -> str:
    text = re.sub(
        r"(?m)^  (repo-url|repo-branch|repo-subdir|repo-actions|site-url|issue-url): .*\n", "", text
    )
    lines = {"site-url": site(s), "repo-url": s["git_url"]} | (
        {"repo-branch": s["branch"], "repo-subdir": "nbs", "repo-actions": "[source, issue]"}
        if s["git_url"]
        else {}
    )
    return text.replace(
        "\nwebsite:\n", "\nwebsite:\n" + "".join(f"  {k}: {v}\n" for k, v in lines.items() if v), 1
    )


def badge(name: str, s: dict[str, str]) -> list[dict]:
    "The two cells that Colab needs, for an address on GitHub."
    repo = s["git_url"].removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{repo}/blob/{s['branch']}/nbs/{name}.ipynb"
    return [
        dict(
            cell_type="markdown",
            id=BADGE,
            metadata={},
            source=[
                f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
            ],
        ),
        dict(
            cell_type="code",
            id=INSTALL,
            metadata={},
            execution_count=None,
            outputs=[],
            source=[
                "#| hide\n",
                "#| eval: false\n",
                f"! [ -e /content ] && pip install -Uqq '{s['lib_name']}[search,app,onnx,hub] @ git+{s['git_url']}'",
            ],
        ),
    ]


def put_badges(root: Path, s: dict[str, str]) -> int:
    "Badges after the title cells; how many notebooks changed."
    nbs, changed = root / "nbs", 0
    for path in sorted(nbs.rglob("*.ipynb")):
        name = str(path.relative_to(nbs).with_suffix(""))
        if any(p.startswith((".", "_")) for p in Path(name).parts):
            continue
        old = path.read_text(encoding="utf-8")
        nb = json.loads(old)
        nb["cells"] = [
            c
            for c in nb["cells"]
            if "colab-badge.svg" not in "".join(c["source"])
            and "[ -e /content ]" not in "".join(c["source"])
        ]
        if s["git_url"].startswith("https://github.com/") and not name.startswith(NOT_ON_COLAB):
            at = (
                next(
                    (
                        i
                        for i, c in enumerate(nb["cells"])
                        if c["cell_type"] == "markdown" and "".join(c["source"]).startswith("# ")
                    ),
                    -1,
                )
                + 1
            )
            nb["cells"][at:at] = badge(name, s)
        new = json.dumps(nb, indent=1, ensure_ascii=False) + "\n"
        if json.loads(new) == json.loads(old):
            continue
        path.write_text(new, encoding="utf-8")
        changed += 1
    return changed


def apply(root: Path) -> list[str]:
    "Everything that repeats the address, from settings.ini; what was changed."
    s, done = settings(root), []
    for name, put in {
        "pyproject.toml": put_pyproject,
        "CITATION.cff": put_citation,
        "_quarto.yml": put_quarto,
    }.items():
        path = root / name
        old = path.read_text(encoding="utf-8")
        if (new := put(old, s)) != old:
            path.write_text(new, encoding="utf-8")
            done.append(name)
    if n := put_badges(root, s):
        done.append(f"{n} notebooks")
    for script in ("make_llms.py", "make_readme.py"):
        subprocess.run([sys.executable, str(root / "scripts" / script)], check=True)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--git", help="address of the repository, https://github.com/OWNER/NAME")
    parser.add_argument(
        "--docs", default="", help="address of the site, https://OWNER.github.io/NAME"
    )
    parser.add_argument("--clear", action="store_true", help="take the address out everywhere")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parent.parent,
        help="the checkout to change",
    )
    a = parser.parse_args()
    if a.clear:
        put_settings(a.root, "", "")
    elif a.git:
        check(a.git.rstrip("/"), a.docs.rstrip("/"))
        put_settings(a.root, a.git.rstrip("/"), a.docs.rstrip("/"))
    done = apply(a.root)
    print(f"settings.ini applied; changed: {', '.join(done) or 'nothing'}")


if __name__ == "__main__":
    main()
