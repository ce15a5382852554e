"""The book: every page of the repository, and the notebooks as stored; `make book` builds it and runs nothing.

The theme of Jupyter Book 2 is fetched while it builds; Sphinx with MyST-NB makes the same pages from packages alone.
Where GitHub builds it, pages of notebooks lead to Binder and Colab, and `colab/` has the notebooks that Colab opens.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
REPOSITORY, COMMIT = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get("GITHUB_SHA", "HEAD")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

project = html_title = "OmniForcing you can step through"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "data/README.md", "notebooks/*.ipynb", "reports/REPORT.md"]
exclude_patterns = [".*", "build", "reports/runs", "omniforcing_lib", "tests", "*.egg-info"]
html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = html_css_files = ["book.css"]
html_copy_source = html_domain_indices = False
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "text/markdown", 1)]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
default_role = "code"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

PARTS = {
    "The series": [f"notebooks/{path.stem}" for path in NOTEBOOKS],
    "What was found": ["docs/results", "reports/REPORT", "LOG", "docs/promises"],
    "Use it": ["docs/commands", "docs/gpu", "data/README"],
    "Look it up": ["docs/specification", "docs/glossary", "docs/api", "ARCHITECTURE", "CONTRIBUTING"],
}
CONTENTS = "\n```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
ELSEWHERE = """<p>Open this notebook in
<a href="https://mybinder.org/v2/gh/{0}/{1}?labpath=notebooks/{2}.ipynb">Binder</a> or
<a href="https://colab.research.google.com/github/{0}/blob/pages/colab/{2}.ipynb">Colab</a>.</p>"""
ON_COLAB = """# On Colab alone: this repository at the commit that the page shows, and the packages that Colab lacks.
import sys

if "google.colab" in sys.modules:
    !git clone -q https://github.com/{0} /content/omniforcing
    !git -C /content/omniforcing checkout -q {1}
    %pip install -q {2}
    sys.path[:0] = ["/content/omniforcing", "/content/omniforcing/notebooks"]"""


def _complete(app, docname, source):
    """Give README the table of contents, and in place of its diagram, which a script would draw, the words for it."""
    if docname == root_doc:
        said = re.sub(r"```mermaid.*?accDescr: (.*?)\n.*?```", r"\1", source[0], flags=re.DOTALL)
        source[0] = said + "".join(CONTENTS.format(part, "\n".join(pages)) for part, pages in PARTS.items())


def _formula(self, node):
    """Write a formula as MathML, which browsers draw by themselves: no script and no fonts to fetch."""
    kind, display = ("div", "block") if isinstance(node, nodes.math_block) else ("span", "inline")
    self.body.append(self.starttag(node, kind, "", CLASS="math"))
    self.body.append(f"{convert(node.astext(), display=display)}</{kind}>")
    raise nodes.SkipNode


def _elsewhere(app, pagename, templatename, context, doctree):
    if REPOSITORY and pagename.startswith("notebooks/"):
        context["body"] = ELSEWHERE.format(REPOSITORY, COMMIT, Path(pagename).name) + context["body"]


def _no_field_numbers(app, what, name, obj, skip, options):
    return skip or (getattr(obj, "__doc__", "") or "").startswith("Alias for field number")


def _finish(app, error):
    if error:
        return
    shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))
    pins = re.findall(r"^(?:anywidget|av|einops)==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for path in NOTEBOOKS if REPOSITORY else ():
        node = nbformat.read(path, as_version=4)
        node.cells.insert(0, nbformat.v4.new_code_cell(ON_COLAB.format(REPOSITORY, COMMIT, " ".join(pins)), id="colab"))
        Path(app.outdir, "colab").mkdir(exist_ok=True)
        nbformat.write(node, Path(app.outdir, "colab", path.name))


def setup(app):
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", inline_renderers=(_formula, None), block_renderers=(_formula, None))
    app.connect("source-read", _complete)
    app.connect("autodoc-skip-member", _no_field_numbers)
    app.connect("html-page-context", _elsewhere)
    app.connect("build-finished", _finish)
