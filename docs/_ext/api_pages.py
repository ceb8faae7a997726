"""The API reference, written from the ``__all__`` of every public module, so that no name can be forgotten."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

# Modules a user imports, in the order of the page. Rooms that are not named here are skode's own business.
MODULES = {
    "skode": "Estimators and data",
    "skode.displays": "Pictures",
    "skode.metrics": "Scores",
    "skode.model_selection": "Splitters",
    "skode.callbacks": "Callbacks",
    "skode.parallel": "Several processes",
    "skode.datasets": "Toy data",
    "skode.solver": "Solver",
    "skode.fields": "Vector fields",
    "skode.exceptions": "Errors and warnings",
}


def public_modules() -> list[str]:
    """The modules of the list that exist."""
    return [name for name in MODULES if importlib.util.find_spec(name) is not None]


def public_names(module: str) -> list[str]:
    """What a module offers, its submodules aside."""
    home = importlib.import_module(module)
    return [name for name in home.__all__ if not inspect.ismodule(getattr(home, name))]


def write_index(file: Path) -> None:
    """Write the page with a table of each module's objects, unless it is as it should be."""
    lines = ["API reference", "=============", ""]
    lines += ["What can be imported from skode. Methods that scikit-learn gives every estimator, such as"]
    lines += ["``get_params``, ``set_params`` and ``set_fit_request``, are left out of the pages.", ""]
    for module in public_modules():
        title = f"{MODULES[module]}: ``{module}``"
        about = inspect.getdoc(importlib.import_module(module)) or ""
        lines += [title, "-" * len(title), "", about, "", f".. currentmodule:: {module}", ""]
        lines += [".. autosummary::", "   :toctree: generated/", "   :nosignatures:", ""]
        lines += [*(f"   {name}" for name in public_names(module)), ""]
    text = "\n".join(lines)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def skip_foreign(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn and torch give by inheritance: only members written in skode are shown."""
    if what != "class" or skip:
        return None
    inner = member.fget if isinstance(member, property) else inspect.unwrap(member) if callable(member) else member
    written_in = getattr(inner, "__module__", None) or ""
    return None if written_in.split(".")[0] == "skode" and not name.startswith("_") else True


def gallery_order(filename: str) -> tuple[bool, str]:
    """Sort key of the gallery: the quickstart, then by name."""
    name = Path(filename).name
    return name != "plot_quickstart.py", name
