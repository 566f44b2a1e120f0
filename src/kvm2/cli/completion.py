"""`kvm2 completion`: the script that makes a shell complete kvm2's commands, options and hosts."""

from __future__ import annotations

import click

from kvm2.cli.options import json_option
from kvm2.cli.render import emit

WHERE = {
    "bash": 'eval "$(kvm2 completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(kvm2 completion zsh)"    # in ~/.zshrc',
    "fish": "kvm2 completion fish > ~/.config/fish/completions/kvm2.fish",
}


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(list(WHERE)))
@json_option
def command(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell (bash 4.4 or later, zsh, fish).

    \b
    bash: eval "$(kvm2 completion bash)"    # in ~/.bashrc
    zsh:  eval "$(kvm2 completion zsh)"     # in ~/.zshrc
    fish: kvm2 completion fish > ~/.config/fish/completions/kvm2.fish
    """
    from click.shell_completion import get_completion_class

    from kvm2.cli.main import cli

    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"this version of click has no completion for {shell}")
    script = made(cli, {}, "kvm2", "_KVM2_COMPLETE")
    text = made.source_template % script.source_vars()
    if as_json:
        emit("completion", {"shell": shell, "script": text, "install": WHERE[shell]})
    else:
        print(text)
