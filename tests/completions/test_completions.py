"""Completions, asked for in the shells themselves, by the key."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts.completions import completions
from scripts.programs import programs

if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = Path(__file__).resolve().parents[2] / "packaging" / "completions"
# A line, and all that its last word can become.
CASES = {
    "fdbroker pol": {"policy"},
    "fdbroker --socket /x policy ch": {"check"},
    "fdbroker --socket=/x policy ch": {"check"},
    "fdbroker policy ": {"check", "compile", "diff", "explain", "schema", "test"},
    "fdbroker top --sort ": {"requests", "given", "denied", "in-flight", "user", "pid"},
    "fdbroker top --sort=in": {"in-flight"},
    "fdbroker policy explain --action l": {"list"},
    "fdbroker audit ver": {"verify"},
    "fdbroker audit --deni": {"--denied"},
    "fdbroker audit read --decision a": {"allow"},
    "fdbroker cat /etc/hostn": {"/etc/hostname"},
    "fdbroker cat policy /etc/hostn": {"/etc/hostname"},
    "fdbroker scan --worker-uid roo": {"root"},
    "fdbroker exec /etc/hostname -- unsha": {"unshare"},
    "fdbrokerd --user=roo": {"root"},
    "fdbrokerd --socket-group daemo": {"daemon"},
    "fdbrokerd --audit /etc/hostn": {"/etc/hostname"},
    "fdbroker-scand import": {"import-clamd-conf"},
    "fdbroker-scand --config /etc/hostn": {"/etc/hostname"},
}
# And of each command all its options.
CASES |= {
    f"{' '.join(command.words)} --": {
        name for option in command.options for name in option.names if name.startswith("--")
    }
    for program in programs()
    for command in program.all_commands()
    if command.default is None
}
# The key that is sent inserts all that the word can become; then the line is shown in angle brackets.
BASH = r"""
PS1=; bind 'set enable-bracketed-paste off'
for file in "$COMPLETIONS"/bash/*; do . "$file"; done
show() { printf '\n<%s>\n' "$READLINE_LINE"; READLINE_LINE=; }
bind -x '"\C-g": show'
stty -echo; echo READ""Y
"""
ZSH = r"""
PS1=; fpath=("$COMPLETIONS"/zsh $fpath); autoload -Uz compinit; compinit -u -D
zstyle ':completion:*' completer _all_matches _complete; zstyle ':completion:*' insert true
show() { print -r; print -r -- "<$BUFFER>"; BUFFER= }
zle -N show; bindkey '^G' show
stty -echo; print READ""Y
"""
FISH = (
    "set fish_complete_path $COMPLETIONS/fish $fish_complete_path;"
    " while read -l line; complete -C $line; echo; end"
)


def test_completions_are_those_of_the_programs() -> None:
    files = {str(path.relative_to(DIRECTORY)): path.read_text() for path in DIRECTORY.glob("*/*")}
    assert files == completions(), "run `make completions`"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Programs that leave a mark if they are run: completing runs none."""
    path = tmp_path_factory.mktemp("bin")
    for name in ("fdbroker", "fdbrokerd", "fdbroker-scand", "python3"):
        (path / name).write_text(f"#!/bin/sh\necho {name} >>{path}/run\n")
        (path / name).chmod(0o755)
    return {
        "COMPLETIONS": str(DIRECTORY),
        "HOME": str(path),
        "LANG": "C.UTF-8",
        "PATH": f"{path}:/usr/bin:/bin",
        "TERM": "dumb",
    }


def at_a_terminal(
    command: list[str], script: str, key: bytes, environment: dict[str, str]
) -> dict[str, set[str]]:
    """Type all lines in a shell at a terminal, each with the key; return what the last words became."""
    terminal, end = pty.openpty()
    shell = subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True, cwd="/"
    )
    os.close(end)
    try:
        os.write(terminal, script.encode())
        read_until(terminal, b"READY\r\n")
        became = {}
        for line in CASES:
            os.write(terminal, line.encode() + key)
            shown = read_until(terminal, b">\r\n").decode().rpartition("<")[2].partition(">")[0]
            # What stands before the last word is there as it was typed.
            before = line[: line.rfind(" ") + 1]
            assert shown.startswith(before)
            option, equals, _ = line.rpartition(" ")[2].partition("=")
            words = [word.rstrip("=") for word in shown[len(before) :].split()]
            became[line] = {word.removeprefix(option + equals) if equals else word for word in words}
        return became
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def read_until(terminal: int, end: bytes) -> bytes:
    read = b""
    while end not in read:
        assert select.select([terminal], [], [], 60)[0], read
        read += os.read(terminal, 65536)
    return read


def in_bash(environment: dict[str, str]) -> dict[str, set[str]]:
    command = ["bash", "--norc", "--noprofile", "-i"]
    return at_a_terminal(command, BASH.lstrip(), b"\x1b*\x07", environment)


def in_zsh(environment: dict[str, str]) -> dict[str, set[str]]:
    return at_a_terminal(["zsh", "-f", "-i"], ZSH.lstrip(), b"\t\x07", environment)


def in_fish(environment: dict[str, str]) -> dict[str, set[str]]:
    done = subprocess.run(
        ["fish", "--no-config", "-c", FISH],
        input="".join(f"{line}\n" for line in CASES),
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    answers = done.stdout.split("\n\n")
    became = {}
    for line, answer in zip(CASES, answers, strict=False):
        option, equals, _ = line.rpartition(" ")[2].partition("=")
        words = [word.partition("\t")[0] for word in answer.splitlines()]
        became[line] = {word.removeprefix(option + equals) if equals else word for word in words}
    return became


@pytest.mark.parametrize("ask", [in_bash, in_zsh, in_fish])
def test_words_become_what_they_can(
    ask: Callable[[dict[str, str]], dict[str, set[str]]], environment: dict[str, str]
) -> None:
    shell = ask.__name__.removeprefix("in_")
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    assert ask(environment) == CASES
    assert not Path(environment["HOME"], "run").exists()
