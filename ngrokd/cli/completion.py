"""`ngrokd completion`: what the tab key offers, in bash, zsh and fish.

The shell calls the program with `_NGROKD_COMPLETE` set, and click answers from the commands themselves. Nobody waits
at a tab, and nobody wants to read an error there: whoever asks the daemon here has half a second, and no daemon, or one
that is closed to this user, means that nothing is offered.
"""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import print_lines

SHELLS: Final = ("bash", "zsh", "fish")

# click's own asks for the version of bash whenever a terminal is opened, and fails on one before 4.4, which macOS has.
_BASH: Final = """\
%(function)s() {
    local IFS=$'\\n' kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case "$kind" in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default 2>/dev/null ;;
            dir) compopt -o dirnames 2>/dev/null ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(variable)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(function)s %(program)s 2>/dev/null || complete -F %(function)s %(program)s"""

_WHERE: Final = (
    'In ~/.bashrc: eval "$(ngrokd completion bash)"; in ~/.zshrc, after compinit: eval "$(ngrokd completion zsh)"; '
    "for fish: ngrokd completion fish > ~/.config/fish/completions/ngrokd.fish"
)


@command("completion", epilog=_WHERE)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(context: Context, shell: str) -> None:
    """Print what makes the tab key complete commands, options and names of endpoints.

    Names are asked of the running daemon; without one none are offered.
    """
    script = script_of(shell, context.program)
    if context.as_json:
        context.print_document({"shell": shell, "script": script})
    else:
        print_lines([script])


def script_of(shell: str, program: str) -> str:
    """The lines for one of `SHELLS`, and for `ngrokd` or `ngrokctl`."""
    variable = variable_of(program)
    if shell == "bash":
        return _BASH % {"function": f"_{program}_completion", "program": program, "variable": variable}
    made = get_completion_class(shell)
    assert made is not None, "click knows these"
    root = click.get_current_context().find_root().command
    return made(root, {}, program, variable).source().strip("\n")


def variable_of(program: str) -> str:
    """The variable by which a shell asks."""
    return f"_{program.upper()}_COMPLETE"
