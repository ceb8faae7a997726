"""The built wheel: what is in it, and that it works away from the repository."""

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a Python of its own prints; its error output is in the failure otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run_python("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_its_licence_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top_level = {name.split("/")[0] for name in names}
    assert {name.removesuffix(".dist-info").split("-")[0] for name in top_level} == {"skode"}
    assert len(top_level) == 2
    assert "skode/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    in_source = {file.relative_to(ROOT).as_posix() for file in (ROOT / "skode").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_source


def test_the_wheel_states_licence_python_and_its_five_requirements(wheel: Path) -> None:
    stated = metadata(wheel)
    requirements = [line for line in stated.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert stated["License-Expression"] == "BSD-3-Clause"
    assert stated["Requires-Python"] == ">=3.11"
    assert {line.split(">=")[0] for line in requirements} == {
        "joblib",
        "numpy",
        "pandas",
        "scikit-learn",
        "torch",
    }


def test_the_installed_wheel_imports_without_warnings_away_from_the_repository(
    installed: Path, wheel: Path, tmp_path: Path
) -> None:
    script = "import skode; print(skode.__file__); print(skode.__version__)"
    file, version = run_python("-W", "error", "-c", script, cwd=tmp_path, path=installed).splitlines()
    assert Path(file).resolve().is_relative_to(installed.resolve())
    assert version == metadata(wheel)["Version"]


def test_every_public_name_of_the_installed_wheel_exists(installed: Path, tmp_path: Path) -> None:
    script = "import skode; print(*(name for name in skode.__all__ if not hasattr(skode, name)))"
    assert run_python("-c", script, cwd=tmp_path, path=installed).split() == []


def test_import_skode_loads_no_matplotlib_and_works_without_rich(installed: Path, tmp_path: Path) -> None:
    # scikit-learn's callbacks load rich where it is installed.
    script = "import sys; sys.modules['rich'] = None; import skode; print(*(sys.modules.keys() & {'matplotlib'}))"
    assert run_python("-c", script, cwd=tmp_path, path=installed).split() == []
