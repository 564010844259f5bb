"""How Sphinx builds the pages: ``sphinx-build -W docs docs/_build``, without any network."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.abspath(".."))

from lightning_otrt import __version__

project = "lightning_otrt"
author = "lightning_otrt contributors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning_otrt"
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Every name of this package that a page refers to has to be there; those of others are shown without a link, since an
# inventory of them would be a download.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|torch|torchmetrics)\..*|MisconfigurationException"),
    (r"py:class", r"lightning_otrt\..*\.Alignment"),  # the type of a field that users need not read
]
