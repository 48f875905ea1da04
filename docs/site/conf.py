"""How `make docs` builds the site: of the pages as they lie in the checkout, so that links hold in both.

Nothing is fetched: fonts are the reader's, and the search runs in the browser on an index that comes with it.
"""

from __future__ import annotations

import enum
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util import logging

import fdbroker

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "fdbroker"
author = "fdbroker maintainers"
version = release = fdbroker.__version__
html_title = f"fdbroker {version}"
# No date of the day: what is built of the same sources is the same.
html_last_updated_fmt = None
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The sources' directory is the checkout, and the first page its README.
root_doc = "README"
include_patterns = [
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "packaging/README.md",
    "docs/**",
]
exclude_patterns = ["docs/site/**"]

html_theme = "furo"
html_static_path = ["static"]
html_extra_path = ["extra"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
highlight_language = "text"  # where nothing is said
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Headings are linked to by the names that forges give them; a link to none is a warning, and so an error.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = [
    # Vectors of the protocol are of kinds of their own, and some policies are wrong on purpose.
    "misc.highlighting_failure",
    "ref.python",  # two classes are called Reason
]

# What comes from a base of fdbroker's own is described where it is used; what comes from Python's is not.
autodoc_default_options = {
    "inherited-members": "BaseException, Enum, OSError, int, object, str, tuple",
    "members": True,
    "show-inheritance": True,
}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
add_module_names = False
default_role = "code"  # docstrings write `so` what is code

# What programs may use.
PUBLIC = ("fdbroker", "fdbroker.aio", "fdbroker.sandbox", "fdbroker.scan", "fdbroker.testing")
NAVIGATION = Path(__file__).with_name("navigation.md")


def _add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the table of contents to the first page; in the checkout it would be of no use."""
    if name == root_doc:
        app.env.note_dependency(str(NAVIGATION))
        source[0] += "\n" + NAVIGATION.read_text()


def _miss_no_public_name(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name that the reference of the API does not have."""
    del app
    described = env.domains.python_domain.objects
    for name in PUBLIC:
        for member in importlib.import_module(name).__all__:
            if f"{name}.{member}" not in described and not member.startswith("__"):
                logging.getLogger(__name__).warning("docs/api does not have %s.%s", name, member)


def _skip(_app: Sphinx, _what: str, _name: str, member: object, _skip: bool, _options: object) -> bool | None:  # noqa: FBT001 - Sphinx's signature
    """Return whether a member is left out: constants of enums are not, numbers of fields are."""
    if isinstance(member, enum.Enum) and not _name.startswith("_"):
        return False
    return True if (getattr(member, "__doc__", "") or "").startswith("Alias for field number") else None


def _mark_examples(
    _app: Sphinx, _what: str, _name: str, _of: object, _options: object, lines: list[str]
) -> None:
    """Say that what is indented below a paragraph is an example, and not what is said of an argument."""
    for at in range(len(lines) - 1, 1, -1):
        if lines[at].startswith("    ") and not lines[at - 1] and lines[at - 2][:1] not in {"", " ", ":"}:
            lines[at:at] = [".. code-block:: python", ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx what else is to be done."""
    app.connect("source-read", _add_navigation)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _mark_examples)
    app.connect("env-check-consistency", _miss_no_public_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
