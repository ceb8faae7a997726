"""The documentation keeps up with the code: names, examples, messages, and the scripts that figures come from."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from skode import exceptions

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
sys.path.insert(0, str(DOCS / "_ext"))

import api_pages  # noqa: E402

PUBLIC = [
    (module, name)
    for module in api_pages.public_modules()
    for name in api_pages.public_names(module)
    if name != "ConvergenceWarning"  # scikit-learn's own, with scikit-learn's own example
]
READERS = {"train.py", "prepare.py", "fit.py"}  # scripts that readers of the pages write themselves
INTERNAL = {"skode.estimators", "skode.models", "skode.panel", "skode.runtime", "skode.training"}


def docstring(module: str, name: str) -> str:
    """An object's own, or, for data, its module's."""
    home = importlib.import_module(module)
    thing: Any = getattr(home, name)
    return inspect.getdoc(thing) or "" if callable(thing) else (inspect.getdoc(home) or "")


def messages() -> str:
    """All texts in the source, a line each; what an f-string fills in is left out."""
    texts = []
    for file in sorted((ROOT / "skode").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(texts)


def test_every_room_with_public_names_is_in_the_reference_or_internal() -> None:
    rooms = {f"skode.{path.stem}" for path in (ROOT / "skode").glob("*.py") if not path.stem.startswith("_")}
    rooms |= {f"skode.{path.parent.name}" for path in (ROOT / "skode").glob("*/__init__.py")}
    assert rooms - INTERNAL == set(api_pages.public_modules()) - {"skode"}


def test_the_reference_lists_every_public_name(tmp_path: Path) -> None:
    api_pages.write_index(tmp_path / "index.rst")
    listed = (tmp_path / "index.rst").read_text(encoding="utf-8").splitlines()
    for module in ["skode", "skode.solver", "skode.fields", "skode.exceptions"]:
        names = importlib.import_module(module).__all__
        assert {f"   {name}" for name in names if not inspect.ismodule(getattr(sys.modules[module], name))} <= set(
            listed
        )


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_public_object_has_an_example(module: str, name: str) -> None:
    assert ">>> " in docstring(module, name)


def test_troubleshooting_names_every_error_class() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [name for name in exceptions.__all__ if f"`{name}`" not in page] == []


def test_the_messages_of_troubleshooting_are_those_of_the_source() -> None:
    known, page = messages(), (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    _, _, tables = page.partition("## Training")
    told = re.findall(r"^\| `(.+?)` \| ", tables, re.MULTILINE)
    assert len(told) > 40
    pieces = [piece for message in told for piece in message.split("…")]
    assert [piece for piece in pieces if piece not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:\S*/)?(\w+\.py)", page.read_text(encoding="utf-8")))
    kept = {file.name for folder in ("examples", "docs", "tests", "skode") for file in (ROOT / folder).rglob("*.py")}
    assert named - kept - READERS - {"latent_ode.py"} == set()  # the last is torchdiffeq's
