"""Run the Python blocks of the Markdown pages: ``python docs/_ext/run_pages.py [page ...]``.

The blocks of a page share one namespace and run in order, in a folder of their own, so that what a page shows works as
it stands there. A block that a page introduces by the comment ``<!-- not run -->`` is left out, and so is a page with
the comment ``<!-- needs NAME -->`` where that package is not installed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import time
import traceback
import types
import warnings
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
# Scripts for torchrun run as its only process would, at a port that is free.
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
NEEDS = re.compile(r"^<!-- needs (\w+) -->$", re.MULTILINE)
BLOCK = re.compile(r"(?P<mark><!-- not run -->\s*)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Line numbers and code of the blocks that are to run."""
    found = [match for match in BLOCK.finditer(text) if not match["mark"]]
    return [(text.count("\n", 0, match.start("code")), match["code"]) for match in found]


def missing(page: Path) -> str:
    """The packages that a page needs and that are not installed."""
    needed = NEEDS.findall(page.read_text(encoding="utf-8"))
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


def run_page(page: Path) -> None:
    """Run a page's blocks; an error's traceback names the page's own lines."""
    name = f"page_{page.stem}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # classes of the page can then be pickled
    for line, code in blocks(page.read_text(encoding="utf-8")):
        tree = ast.increment_lineno(ast.parse(code, str(page)), line)
        exec(compile(tree, str(page), "exec"), module.__dict__)


def main(names: list[str]) -> int:
    """Run pages; the number of those that failed."""
    pages = [Path(name).resolve() for name in names] or sorted(DOCS.glob("*.md"))
    os.environ.update(TORCHRUN)
    failed = 0
    for page in pages:
        if without := missing(page):
            print(f"{page.name:<28}left out: no {without}")
            continue
        start, said = time.perf_counter(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(said):
                    run_page(page)
                result = "ok"
            except Exception:
                traceback.print_exc()
                failed, result = failed + 1, "FAILED"
            finally:
                os.chdir(DOCS)
        print(f"{page.name:<28}{result:<8}{time.perf_counter() - start:6.1f} s")
        if result != "ok" or "VERBOSE" in os.environ:
            print(said.getvalue())
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
