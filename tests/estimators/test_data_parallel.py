"""Two processes, each with a part of the rows, fit what one process with all of them fits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skode import ODENetClassifier
from skode.exceptions import PeerError
from skode.parallel import data_parallel
from tests.estimators.ranks import BAD_FITS, CUT, FITS, N_ROWS, fits, whole

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes together, and this one with all rows, leave what they find."""
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "tests.estimators.ranks"]
    both = [subprocess.Popen([*start, str(rank), str(folder)], cwd=ROOT, env=env) for rank in (0, 1)]
    try:
        alone = {"fits": fits(contextlib.nullcontext, whole(), folder, "alone")}
        (folder / "alone.json").write_text(json.dumps(alone), encoding="utf-8")
        assert [process.wait(timeout=300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    return folder


def _told(folder, who):
    return json.loads((folder / f"{who}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FITS)
def test_two_processes_find_what_one_finds_with_all_rows(folder, name):
    one, first, second = (np.load(folder / f"{name} {who}.npz") for who in ("alone", 0, 1))
    for key in ("outputs", "curve", "scores"):
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_allclose(first[key], one[key], rtol=1e-9, atol=1e-9)
    assert np.ptp(one["outputs"], axis=0).min() > 0.01


@pytest.mark.parametrize("name", FITS)
def test_each_process_evaluates_the_rows_that_it_holds(folder, name):
    alone = _told(folder, "alone")["fits"][name]
    own = [_told(folder, rank)["fits"][name] for rank in (0, 1)]
    assert [facts["n_rows"] for facts in own] == [CUT, N_ROWS - CUT]
    assert all(facts["largest"] <= facts["n_rows"] for facts in own)
    shares = [facts["n_evals"] / alone["n_evals"] for facts in own]
    # Members with orders of their own have batches of different sizes here, which are filled up.
    assert shares == pytest.approx([CUT / N_ROWS, 1 - CUT / N_ROWS], abs=0.08)


@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("columns", ("ValueError", "ValueError"), ("number of columns", "process 0 has 4", "process 1 has 3")),
        ("arguments", ("ValueError", "ValueError"), ("alpha", "process 0 has '0.0'", "process 1 has '0.1'")),
        ("invalid arguments", ("PeerError", "InvalidParameterError"), ("alpha",)),
        ("no rows", ("PeerError", "ValueError"), ("0 sample(s)",)),
        ("in training", ("PeerError", "OSError"), ("the disk is full",)),
        ("only one fits", ("PeerError", "PeerError"), ("different places",)),
        ("a density", ("NotImplementedError",) * 2, ("ContinuousFlowDensity", "ODENetClassifier and ODENetRegressor")),
    ],
)
def test_a_failure_anywhere_is_an_error_everywhere(folder, name, kinds, words):
    assert name in BAD_FITS
    for rank, kind in enumerate(kinds):
        found, text = _told(folder, rank)["failures"][name]
        assert found == kind
        assert all(word in text for word in words)
        assert kind != "PeerError" or "process 1" in text or name == "only one fits"


def test_after_failures_the_processes_fit_together_again_from_one_seed(folder):
    first, second = (_told(folder, rank)["failures"]["a good one"] for rank in (0, 1))
    assert first == second and len(first) == 3


def test_without_a_process_group_the_block_says_what_to_call():
    with pytest.raises(PeerError, match=r"init_process_group\('gloo'\)"), data_parallel():
        ODENetClassifier().fit(np.eye(4), [0, 1, 0, 1])
