"""`recoup completion`: the script that makes a shell complete commands and options."""

from enum import StrEnum
from typing import Annotated

import typer
from typer._completion_shared import get_completion_script


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"
    POWERSHELL = "powershell"


def completion(shell: Annotated[Shell, typer.Argument(help="For which shell.")]) -> None:
    """Print the completion script of a shell; for bash: eval "$(recoup completion bash)"."""
    script = get_completion_script(prog_name="recoup", complete_var="_RECOUP_COMPLETE", shell=shell.value)
    typer.echo(script)
