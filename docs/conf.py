"""Sphinx: these pages as HTML, by `make docs`."""

import liger_compile

project = "liger_compile"
version = release = liger_compile.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "contents"
exclude_patterns = ["_build", "requirements.txt"]
html_theme = "furo"
html_title = f"liger_compile {release}"
myst_heading_anchors = 3
default_role = "code"  # as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what the types mean
