"""The documentation site, built by `scripts/docs`: Sphinx, MyST for Markdown, myst-nb for notebooks, furo."""

from __future__ import annotations

from pathlib import Path

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search import languages
from sphinx.search.en import SearchEnglish
from sphinx.util.docutils import SphinxDirective

import sae
from sae.cli.main import cli
from sae.config.base import Settings, described
from sae.config.settings import RunConfig

project = "sae"
author = "the authors of sae"
copyright = author
version = release = sae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]
default_role = "code"

myst_heading_anchors = 4
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"sae {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "scorer.js")


class SearchQuestions(SearchEnglish):
    """English search that ignores the small words of questions, since Sphinx finds only pages with all other words."""

    stopwords = SearchEnglish.stopwords | set(
        """
        an any big can could did do does from get good has have how i its long make many me much my need our out see
        should so some what when where which who why would you your
        """.split()
    )


languages["en"] = SearchQuestions


class CommandHelp(SphinxDirective):
    """What `sae COMMAND --help` prints, without the list of settings, which has a page of its own."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = cli.commands[self.arguments[0]]
        context = click.Context(command, info_name=f"sae {command.name}", terminal_width=100)
        text = context.get_help().partition("\nSettings, in CONFIG")[0].rstrip()
        return [nodes.literal_block(text, text, language="text")]


class SettingsTable(SphinxDirective):
    """A table of a group of settings: key, default, description. Without an argument: those outside any group."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        group = self.arguments[0] if self.arguments else ""
        field = RunConfig.model_fields[group].annotation if group else RunConfig
        assert isinstance(field, type) and issubclass(field, Settings)
        rows = [row for row in described(field, f"{group}." if group else "") if group or "." not in row[0]]
        table = nodes.table()
        columns = nodes.tgroup(cols=3)
        columns += [nodes.colspec(colwidth=width) for width in (25, 15, 60)]
        head, body = nodes.thead(), nodes.tbody()
        head += _row([nodes.Text(heading) for heading in ("setting", "default", "meaning")])
        for key, default, text in rows:
            parts = text.split("`")
            description = [nodes.literal("", part) if at % 2 else nodes.Text(part) for at, part in enumerate(parts)]
            body += _row([nodes.literal("", key), nodes.literal("", default), *description])
        columns += [head, body]
        table += columns
        return [table]


def _row(cells: list[nodes.Node]) -> nodes.row:
    """A row of three cells; the last holds all remaining nodes."""
    row = nodes.row()
    for content in (cells[:1], cells[1:2], cells[2:]):
        row += nodes.entry("", nodes.paragraph("", "", *content))
    return row


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.add_directive("settings", SettingsTable)
