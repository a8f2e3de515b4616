"""How Sphinx makes the site of what `build.py` has put together; nothing on it asks another host."""

import json
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

settings = ConfigParser()
settings.read(Path(__file__).resolve().parents[2] / "settings.ini")
project, author, version = "asyproxy", settings["DEFAULT"]["author"], settings["DEFAULT"]["version"]
project_copyright = settings["DEFAULT"]["copyright"]

extensions = ["myst_nb"]
nb_execution_mode = "off"  # outputs are shown as committed
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
toc_object_entries = False
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "asyproxy"
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "book-nav.html"]}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["asyproxy.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False, "use_fullscreen_button": False, "show_navbar_depth": 1, "show_toc_level": 2,
    "collapse_navigation": True, "navigation_with_keys": False, "navbar_persistent": []}


def mathml(node, display: str) -> str:
    "LaTeX as MathML, which browsers and screen readers read without a script."
    text = re.sub(r"(\\(?:log|ln|exp))\s*(?=\\mathrm)", r"\1\\,", node.astext())  # the converter leaves no gap
    return convert(text, display=display).replace("<math ", f'<math alttext="{escape(node.astext())}" ', 1)


def visit_inline(self, node):
    self.body.append(mathml(node, "inline"))
    raise SkipNode


def visit_block(self, node):
    self.body.append(f'<div class="equation" tabindex="0">{mathml(node, "block")}</div>\n')
    raise SkipNode


def add_navigation(app, pagename, templatename, context, doctree):
    context["book_parts"] = json.loads(app.config.book_navigation)


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    navigation = (Path(app.srcdir) / "navigation.json").read_text()
    app.add_config_value("book_navigation", navigation, "html")  # where it changes, all pages do
    app.connect("html-page-context", add_navigation)
