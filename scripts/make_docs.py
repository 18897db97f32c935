"""Build the site from the notebooks' stored outputs. Without Quarto on the PATH only nbdev's own processing runs, so that broken notebooks are still found."""
import shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def notebooks() -> list[Path]:
    nbs = ROOT / "nbs"
    return [p for p in sorted(nbs.rglob("*.ipynb")) if not any(q.startswith((".", "_")) for q in p.relative_to(nbs).parts)]


def process() -> int:
    "nbdev's processing of every notebook into _proc; returns how many came out."
    from nbdev.serve import proc_nbs
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    proc_nbs(force=True, n_workers=2)
    done = list((ROOT / "_proc").rglob("*.ipynb"))
    if len(done) != len(notebooks()): sys.exit(f"nbdev processed {len(done)} of {len(notebooks())} notebooks; is the checkout inside a folder whose name starts with a dot?")
    return len(done)


def main():
    link = ROOT / "nbs" / "_quarto.yml"
    if not link.exists(): link.symlink_to("../_quarto.yml")
    if shutil.which("quarto"): sys.exit(subprocess.run([str(Path(sys.executable).parent / "nbdev_docs")], cwd=ROOT).returncode)
    print(f"{process()} notebooks processed into _proc; no site: Quarto is not on the PATH (get it from https://quarto.org/docs/get-started, then `make docs` again)")


if __name__ == "__main__": main()
