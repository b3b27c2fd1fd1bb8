"""Settings of Sphinx, for `make docs`. The pages are plain Markdown; what only Sphinx needs is here."""

import re

import liger_compile

project = "liger_compile"
release = version = liger_compile.__version__
html_title = f"{project} {release}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3

default_role = "code"  # what docstrings have in single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
smartquotes = False

PAGES = """
```{toctree}
:hidden:

matched
options
debugging
patterns
coverage
loss
how_it_works
limits
faq
reference
```
"""


def setup(app):
    app.connect("source-read", for_sphinx)


def for_sphinx(app, name, source):
    """What GitHub shows as it is: the first page has no contents, and links lead to Markdown outside of docs/ too."""
    text = re.sub(r"\[([^]]+)\]\((\.\./\w+\.md)\)", r"{download}`\1 <\2>`", source[0])
    source[0] = text + PAGES if name == "index" else text
