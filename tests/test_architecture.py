"""The floors of the house: what each room of skode may import, read from the syntax trees."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# An import goes to a lower floor or stays inside its own room: a folder or a file directly in skode.
FLOORS = {
    "exceptions": 0,
    "runtime": 0,
    "solver": 1,
    "fields": 2,
    "panel": 2,
    "models": 3,
    "training": 4,
    "estimators": 5,
    "metrics": 5,
    "model_selection": 5,
    "callbacks": 6,
    "displays": 6,
    "parallel": 6,
}
# Looks into one room beside it on the same floor.
SIDEWAYS = {("runtime", "exceptions"), ("metrics", "estimators")}
# Side rooms: the rooms they may import. No other room imports them.
SIDE_ROOMS: dict[str, set[str]] = {"datasets": {"exceptions"}}
ROOMS = FLOORS.keys() | SIDE_ROOMS.keys()

# What `import skode` may need. All other libraries are imported where they are used.
REQUIRED_LIBRARIES = {"joblib", "numpy", "pandas", "sklearn", "torch"}
# Libraries that only these rooms may name, inside functions too.
ROOMS_THAT_MAY_NAME = {
    "sklearn": {"exceptions", "runtime", "estimators", "metrics", "model_selection", "callbacks", "displays"},
    "pandas": {"runtime", "panel", "estimators", "metrics", "model_selection", "displays"},
}
# Rooms that name only these libraries.
LIBRARIES_OF = {"panel": {"numpy", "pandas"}, "datasets": {"numpy"}}

# What skode/__init__.py may assign.
PUBLIC_ASSIGNMENTS = {"__all__", "__version__"}

PACKAGE = Path(__file__).resolve().parents[1] / "skode"


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands, what it names, and whether `import skode` runs it."""

    place: str
    room: str
    target: tuple[str, ...]
    runs_on_import: bool

    @property
    def is_internal(self) -> bool:
        return self.target[0] == "skode"

    @property
    def library(self) -> str:
        return self.target[0]

    @property
    def target_room(self) -> str | None:
        """The room that is imported; None for a public name of skode/__init__.py, the roof."""
        room = self.target[1] if len(self.target) > 1 else None
        return room if room in ROOMS else None


def source_files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def room_of(file: Path, package: Path) -> str:
    return Path(file.relative_to(package).parts[0]).stem


def import_statements(node: ast.AST, runs_on_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, runs_on_import
        else:
            yield from import_statements(child, runs_on_import and not is_run_later(child))


def is_run_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def targets(statement: ast.Import | ast.ImportFrom, folder: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted names that a statement in a file of `folder` imports, relative ones made absolute."""
    if isinstance(statement, ast.Import):
        yield from (tuple(alias.name.split(".")) for alias in statement.names)
        return
    base = folder[: len(folder) - statement.level + 1] if statement.level else ()
    module = tuple(statement.module.split(".")) if statement.module else ()
    yield from ((*base, *module, alias.name) for alias in statement.names)


def imports_of(package: Path) -> list[Import]:
    """All imports of the rooms; skode/__init__.py stands above them and has a rule of its own."""
    return [
        Import(f"{file.relative_to(package.parent)}:{statement.lineno}", room_of(file, package), target, runs)
        for file in source_files(package)
        if file != package / "__init__.py"
        for statement, runs in import_statements(ast.parse(file.read_text(encoding="utf-8")))
        for target in targets(statement, file.parent.relative_to(package.parent).parts)
    ]


def may_import(room: str, target: str | None) -> bool:
    if target == room or (room, target) in SIDEWAYS:
        return True
    if room in SIDE_ROOMS:
        return target in SIDE_ROOMS[room]
    return target in FLOORS and FLOORS[target] < FLOORS[room]


def rooms_without_a_floor(package: Path) -> list[str]:
    rooms = {room_of(file, package) for file in source_files(package)} - {"__init__"}
    return [
        f"skode/{room} has no floor: give it one in FLOORS or SIDE_ROOMS of tests/test_architecture.py"
        for room in sorted(rooms - ROOMS)
    ]


def imports_up_a_floor(package: Path) -> list[str]:
    return [
        f"{found.place}: `{found.room}` must not import `{'.'.join(found.target)}`, which is not on a floor below it"
        for found in imports_of(package)
        if found.room in ROOMS and found.is_internal and not may_import(found.room, found.target_room)
    ]


def optional_libraries_imported_at_once(package: Path) -> list[str]:
    allowed = REQUIRED_LIBRARIES | sys.stdlib_module_names
    return [
        f"{found.place}: import `{found.library}` inside the function that uses it: skode does not require it"
        for found in imports_of(package)
        if found.runs_on_import and not found.is_internal and found.library not in allowed
    ]


def libraries_in_the_wrong_room(package: Path) -> list[str]:
    return [
        f"{found.place}: `{found.room}` must not name `{found.library}`"
        for found in imports_of(package)
        if not found.is_internal and not may_name(found.room, found.library)
    ]


def may_name(room: str, library: str) -> bool:
    if room in LIBRARIES_OF and library not in LIBRARIES_OF[room] | sys.stdlib_module_names:
        return False
    return library not in ROOMS_THAT_MAY_NAME or room in ROOMS_THAT_MAY_NAME[library]


def statements_that_are_not_public_names(package: Path) -> list[str]:
    module = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    body = module.body[1:] if ast.get_docstring(module) is not None else module.body
    return [
        f"skode/__init__.py:{statement.lineno}: only imports, __all__ and __version__ belong here"
        for statement in body
        if not declares_public_names(statement)
    ]


def declares_public_names(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        return {ast.unparse(target) for target in statement.targets} <= PUBLIC_ASSIGNMENTS
    if isinstance(statement, ast.AnnAssign):
        return ast.unparse(statement.target) in PUBLIC_ASSIGNMENTS
    return isinstance(statement, ast.Import | ast.ImportFrom)


def listed(complaints: list[str]) -> str:
    return "\n" + "\n".join(complaints)


# skode itself


def test_the_checker_sees_the_package() -> None:
    assert any(found.is_internal for found in imports_of(PACKAGE))


def test_every_room_has_a_floor() -> None:
    complaints = rooms_without_a_floor(PACKAGE)
    assert not complaints, listed(complaints)


def test_no_import_goes_up_a_floor() -> None:
    complaints = imports_up_a_floor(PACKAGE)
    assert not complaints, listed(complaints)


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    complaints = optional_libraries_imported_at_once(PACKAGE)
    assert not complaints, listed(complaints)


def test_libraries_are_named_only_in_their_rooms() -> None:
    complaints = libraries_in_the_wrong_room(PACKAGE)
    assert not complaints, listed(complaints)


def test_the_top_file_holds_public_names_only() -> None:
    complaints = statements_that_are_not_public_names(PACKAGE)
    assert not complaints, listed(complaints)


# The checker, on made-up packages


def made_up(parent: Path, **sources: str) -> Path:
    """A package `skode`; a keyword such as `solver__step` is the file skode/solver/step.py."""
    package = parent / "skode"
    for name, source in {"__init__": "", **sources}.items():
        stem = name if name == "__init__" else name.replace("__", "/", 1)
        file = package / f"{stem}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    "source",
    [
        "import skode.fields",
        "import numpy, skode.fields.mlp as mlp",
        "from skode import fields",
        "from skode import MLPField",
        "from skode import *",
        "from skode.fields import MLPField",
        "from .. import fields",
        "from ..fields import MLPField",
        "from ..fields.mlp import MLPField",
        "import skode",
        "def late():\n    from ..fields import MLPField",
        "class Step:\n    async def late(self):\n        import skode.fields",
        "try:\n    from skode.fields import MLPField\nexcept ImportError:\n    pass",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..fields import MLPField",
    ],
)
def test_an_import_up_a_floor_is_found(tmp_path: Path, source: str) -> None:
    package = made_up(tmp_path, solver__step=source, fields__mlp="")
    (complaint,) = imports_up_a_floor(package)
    line = source.count("\n", 0, source.index("fields" if "fields" in source else "skode")) + 1
    assert complaint.startswith(str(Path("skode", "solver", f"step.py:{line}:")))


@pytest.mark.parametrize(
    "source",
    [
        "from .control import accept",
        "from . import control",
        "import skode.solver.control",
        "from skode.solver import control",
        "from ..runtime import device",
        "from .. import exceptions, runtime",
        "import math\nimport torch\nfrom torch import nn",
    ],
)
def test_an_import_down_or_inside_its_room_is_allowed(tmp_path: Path, source: str) -> None:
    package = made_up(tmp_path, solver__step=source, solver__control="", runtime__device="", exceptions="")
    assert imports_up_a_floor(package) == []


def test_relative_imports_of_nested_folders_and_of_init_files_are_resolved(tmp_path: Path) -> None:
    package = made_up(tmp_path)
    nested = package / "solver" / "gradients"
    nested.mkdir(parents=True)
    (package / "solver" / "__init__.py").write_text("from .gradients import discrete\nfrom ..models import block")
    (nested / "__init__.py").write_text("from ..step import step\nfrom ...fields import MLPField")
    assert [complaint.split(":")[:2] for complaint in imports_up_a_floor(package)] == [
        [str(Path("skode", "solver", "__init__.py")), "2"],
        [str(Path("skode", "solver", "gradients", "__init__.py")), "2"],
    ]


def test_rooms_on_one_floor_do_not_see_each_other(tmp_path: Path) -> None:
    package = made_up(tmp_path, fields__mlp="from ..panel import Panel", panel__panel="import skode.fields")
    assert len(imports_up_a_floor(package)) == 2


def test_metrics_look_at_estimators_and_never_back(tmp_path: Path) -> None:
    package = made_up(tmp_path, metrics="from .estimators import ODENetClassifier", estimators__base="")
    assert imports_up_a_floor(package) == []
    package = made_up(tmp_path, metrics="", estimators__base="from ..metrics import n_evals_scorer")
    assert len(imports_up_a_floor(package)) == 1


def test_a_side_room_is_entered_by_nobody(tmp_path: Path) -> None:
    package = made_up(
        tmp_path, displays="from .datasets import make_spirals", datasets="from . import exceptions, runtime"
    )
    into_it, out_of_it = imports_up_a_floor(package)[::-1]
    assert "skode.datasets.make_spirals" in into_it
    assert "skode.runtime" in out_of_it


@pytest.mark.parametrize("sources", [{"gadgets": ""}, {"gadgets__gadget": "from ..solver import solve"}])
def test_a_room_without_a_floor_is_told_to_get_one(tmp_path: Path, sources: dict[str, str]) -> None:
    package = made_up(tmp_path, solver__step="", **sources)
    (complaint,) = rooms_without_a_floor(package)
    assert complaint.startswith("skode/gadgets has no floor: give it one in FLOORS")
    assert imports_up_a_floor(package) == []


@pytest.mark.parametrize(
    "source",
    [
        "import matplotlib.pyplot as plt",
        "from rich.table import Table",
        "try:\n    import matplotlib\nexcept ImportError:\n    matplotlib = None",
        "class Display:\n    import scipy",
    ],
)
def test_an_optional_library_at_module_level_is_found(tmp_path: Path, source: str) -> None:
    assert len(optional_libraries_imported_at_once(made_up(tmp_path, displays=source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def plot():\n    import matplotlib.pyplot as plt",
        "class Display:\n    def plot(self):\n        from matplotlib import pyplot",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.axes import Axes",
        "import os\nimport numpy, sklearn, torch, pandas, joblib\nfrom .solver import solve",
    ],
)
def test_an_optional_library_inside_a_function_is_allowed(tmp_path: Path, source: str) -> None:
    assert optional_libraries_imported_at_once(made_up(tmp_path, displays=source)) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("solver__step", "from sklearn.base import BaseEstimator"),
        ("models__block", "def late():\n    import sklearn.utils"),
        ("training__loop", "import pandas as pd"),
        ("fields__mlp", "def late():\n    from pandas import DataFrame"),
        ("panel__panel", "import torch"),
        ("panel__panel", "def late():\n    from sklearn.utils import check_array"),
        ("datasets", "import pandas"),
    ],
)
def test_a_library_in_the_wrong_room_is_found(tmp_path: Path, room: str, source: str) -> None:
    assert len(libraries_in_the_wrong_room(made_up(tmp_path, **{room: source}))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("estimators__base", "from sklearn.base import BaseEstimator\nimport pandas as pd"),
        ("exceptions", "from sklearn.exceptions import ConvergenceWarning"),
        ("runtime__convert", "import pandas as pd\nfrom sklearn.utils import check_random_state"),
        ("panel__panel", "import datetime\nimport numpy as np\nimport pandas as pd"),
        ("datasets", "import math\nimport numpy as np"),
        ("solver__step", "import torch"),
    ],
)
def test_a_library_in_its_room_is_allowed(tmp_path: Path, room: str, source: str) -> None:
    assert libraries_in_the_wrong_room(made_up(tmp_path, **{room: source})) == []


@pytest.mark.parametrize(
    "source",
    [
        "def helper():\n    pass",
        "DEFAULT = 1",
        "__all__ = default = []",
        "import warnings\nwarnings.warn('hello')",
        "from .solver import solve\nif solve:\n    pass",
    ],
)
def test_code_in_the_top_file_is_found(tmp_path: Path, source: str) -> None:
    assert len(statements_that_are_not_public_names(made_up(tmp_path, __init__=source))) == 1


def test_public_names_in_the_top_file_are_allowed(tmp_path: Path) -> None:
    source = (
        '"""Neural ODEs."""\nfrom importlib.metadata import version\nfrom .solver import solve\n'
        '__all__ = ["solve"]\n__version__: str = version("skode")'
    )
    assert statements_that_are_not_public_names(made_up(tmp_path, __init__=source)) == []
