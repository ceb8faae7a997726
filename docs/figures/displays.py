"""The pictures of docs/displays.md, by the page's own code: ``python docs/figures/displays.py`` (under a minute)."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "_ext"))

import run_pages  # noqa: E402

NAMES = {
    "training": "training",
    "tolerance": "tolerance",
    "paths": "paths",
    "field": "field",
    "here": "density",
    "flow": "flow",
    "series": "series",
}

if __name__ == "__main__":
    run_pages.run_page(HERE.parent / "displays.md")
    page = sys.modules["page_displays"]
    for variable, name in NAMES.items():
        getattr(page, variable).figure_.savefig(HERE / f"display_{name}.png", dpi=90)
    html = page.panel[:4]._repr_html_()
    (HERE / "panel.html").write_text(html + "\n", encoding="utf-8")
