"""How Sphinx builds these pages: every code cell runs, and whatever is amiss stops the build (`dev.py docs`)."""

import tape_engine

project = "tape_engine"
author = "The tape engine authors"
copyright = author
version = release = tape_engine.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings name things in single backticks

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"tape_engine {release}"
html_show_sphinx = False
