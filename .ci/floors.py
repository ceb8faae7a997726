"""Print pyproject.toml's lowest versions of what skode requires, torch excepted, and of pytest: one a line."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
required = [*project["dependencies"], *project["optional-dependencies"]["test"]]
for requirement in required:
    name, _, version = requirement.partition(">=")
    if name in ("scikit-learn", "numpy", "pandas", "joblib", "pytest"):
        print(f"{name}=={version}")
