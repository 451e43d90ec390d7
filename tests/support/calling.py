"""Calls a command in this process, with the errors that the command line would show raised."""

from __future__ import annotations

from click.testing import CliRunner, Result

from sae.cli.main import cli


def call(*arguments: object) -> Result:
    """`sae --quiet` with arguments, in a terminal of 200 columns."""
    result = CliRunner().invoke(cli, ["--quiet", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
