"""Sphinx's settings: ``python -m sphinx -W -b html docs docs/_build`` builds the pages without a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Small networks on a busy machine train many times slower with torch's threads than without; torch reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

import api_pages  # noqa: E402

# sphinx-gallery imports what examples import, before they run.
from sklearn.experimental import enable_halving_search_cv  # noqa: E402, F401

import skode  # noqa: E402

project = "skode"
copyright = "The skode developers"
author = "The skode developers"
release = version = skode.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext", "figures"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# The API reference: one page an object of each public module's ``__all__``.
autosummary_generate = True
autosummary_imported_members = False
autodoc_typehints = "none"  # numpydoc's sections state the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"/benchmarks/|__init__\.py",
    "within_subsection_order": "api_pages.gallery_order",
    "backreferences_dir": "api/generated/backreferences",
    "doc_module": ("skode",),
    "reference_url": {"skode": None},
    "abort_on_example_error": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "download_all_examples": False,
    "matplotlib_animations": False,
    "thumbnail_size": (400, 280),
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "skode"
html_static_path = ["_static"]
html_css_files = ["skode.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "skode"},
    "header_links_before_dropdown": 6,
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "getting_started": [], "changelog": []}


def setup(app: Any) -> None:
    """Write the list of public objects and keep foreign members out of their pages."""
    api_pages.write_index(HERE / "api" / "index.rst")
    app.connect("autodoc-skip-member", api_pages.skip_foreign)
