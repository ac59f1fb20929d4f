"""The site: ``sphinx-build -W -n docs build/docs``."""

import os
import re
import sys
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, os.path.abspath(".."))
import reweight

project, author = "reweight", "The reweight authors"
copyright = f"2026, {author}, Apache License 2.0"
version = release = reweight.__version__
html_title = f"{project} {version}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # so that GitHub shows the equations too
myst_heading_anchors = 3

# The tutorials are run, and the site is not built if a cell of theirs fails or warns.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_output_stderr = "remove-warn"

autodoc_mock_imports = ["lightning", "matplotlib", "transformers"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types of others, and those of our own that no page describes: there is no index of them here.
nitpick_ignore_regex = [("py:(class|obj|data)", r"(?!reweight\.).*"), ("py:class", "reweight.*")]
nitpick_ignore = [("py:func", "reweight.objectives.allot")]  # named by BudgetedObjective, private


def mathml(self: Any, node: nodes.Element) -> None:
    """An equation as the browser's own, without a script to be loaded from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    markup = tex2mathml(node.astext(), as_block=is_block)
    self.body.append(f'<div class="math">{markup}</div>' if is_block else markup)
    raise nodes.SkipNode


html_math_renderer = "mathml"


def keep_figures_whole(app: Any, doctree: nodes.document, name: str) -> None:
    """No line ends within "95 %" or "± 0.1"."""
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.FixedTextElement | nodes.literal):
            whole = re.sub(r"(?<=\d) (?=%)|(?<=±) ", "\N{NO-BREAK SPACE}", text)
            text.parent.replace(text, nodes.Text(whole))


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("doctree-resolved", keep_figures_whole)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
