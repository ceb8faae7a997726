"""What a bug report should tell."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch

import skode


def test_versions_devices_and_threads_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    skode.show_versions()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if ":" in line]
    shown = {name.removesuffix(":"): value for name, value in lines}
    assert shown["skode"] == skode.__version__
    assert shown["numpy"] == np.__version__
    assert shown["torch"] == importlib.metadata.version("torch")
    assert shown.keys() >= {"python", "machine", "scikit-learn", "pandas", "joblib", "MPS", "matplotlib"}
    assert shown["threads"] == str(torch.get_num_threads())


def test_a_missing_package_is_said_to_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("skode.runtime.show_versions.version", version)
    skode.show_versions()
    assert "onnx:                    not installed" in capsys.readouterr().out
