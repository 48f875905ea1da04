"""Write the completions of bash, zsh and fish: `python3 -m scripts.completions DIRECTORY`, in the top one.

They are made of what the programs say of themselves, once, and run none of them: a key in a shell starts no
interpreter, and no environment can lead root's shell to other code.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from scripts.programs import Command, Option, programs, write_files

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = "# Written by `make completions`, of what the program says of itself. Runs nothing.\n"
# What may follow an option or be an argument, by its name in the help. Of all others nothing is known.
_KINDS = {
    "FILE": "file",
    "PATH": "file",
    "OLD": "file",
    "TABLE": "file",
    "DIR": "directory",
    "USER": "user",
    "GROUP": "group",
}
# PATHs in trees of their own.
_NO_FILES = frozenset({"--cgroup"})
_EXEC = ("fdbroker", "exec")


def _kind(option: Option) -> str:
    """Return what may follow an option: a kind, `choice`, or "" where anything may."""
    if option.choices:
        return "choice"
    return "" if _NO_FILES & {*option.names} else _KINDS.get(option.value, "")


def _takes_files(command: Command) -> bool:
    return any(_KINDS.get(re.sub(r"[^A-Z].*", "", each.strip("[]"))) == "file" for each in command.arguments)


def _whole(command: Command) -> Command:
    """Return a command with what is taken without the name of the one below it that is meant then."""
    below = tuple(_whole(each) for each in command.commands)
    meant = [each for each in below if each.words[-1] == command.default]
    options = {option.names: option for each in (*meant, command) for option in each.options}
    arguments = tuple(argument for each in (command, *meant) for argument in each.arguments)
    return command._replace(commands=below, options=tuple(options.values()), arguments=arguments)


def _in_short(text: str) -> str:
    """Return the first sentence, without its end."""
    return re.split(r"\.(?: |$)| \[| \((?:see|default|with --daemon)|; ", text)[0]


def _valued(commands: list[Command]) -> list[str]:
    """Return the names of options behind which there is a value, whichever commands they are of."""
    options = [option for each in commands for option in each.options]
    valued = {name: None for option in options if option.value for name in option.names}
    alone = {name for option in options if not option.value for name in option.names}
    if both := alone & valued.keys():
        raise SystemExit(
            f"completions: {', '.join(sorted(both))}: with a value in one command, without in another"
        )
    return list(valued)


def _quoted(text: str) -> str:
    """Return a word of a shell: of bash and zsh, and of fish where there is no backslash in it."""
    return "'" + text.replace("'", "'\\''") + "'"


def _function(words: tuple[str, ...]) -> str:
    return "_" + re.sub(r"\W", "_", "_".join(words))


# bash


def bash(program: Command) -> str:
    """Return the completion of a program for bash."""
    name = program.words[0]
    commands = [_whole(each) for each in program.all_commands()]
    lines = [
        f"# bash completion for {name}",
        _HEADER,
        f"{_function(program.words)}() {{",
        f"    local command={_quoted(name)} option= rest= first=yes word i",
        "    local current=${COMP_WORDS[COMP_CWORD]}",
        "    # bash splits --option=value into three words.",
        "    [[ $current != = ]] || current=",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        "        if [[ $rest ]]; then",
        "            rest+=.",
        "        elif [[ $option && $word == = ]]; then",
        "            continue",
        "        elif [[ $option ]]; then",
        "            option=",
        "        elif [[ $word == -- ]]; then",
        "            rest=.",
        "        elif [[ $word == -* ]]; then",
        "            case $word in",
        *_wrapped(_valued(commands), "            ", ") option=$word ;;"),
        "            esac",
        "        elif [[ $first ]]; then",
        '            case "$command $word" in',
        *_wrapped(
            [f'"{" ".join(each.words)}"' for each in commands[1:]], "            ", ') command+=" $word" ;;'
        ),
        "            *) first= ;;",
        "            esac",
        "        fi",
        "    done",
        "    COMPREPLY=()",
        "    if [[ $option ]]; then",
        '        case "$command $option" in',
        *_bash_values(commands),
        "        esac",
        "    elif [[ $current == -* && ! $rest ]]; then",
        "        case $command in",
        *[
            f"        {_quoted(' '.join(each.words))}) "
            f'mapfile -t COMPREPLY < <(compgen -W {_quoted(" ".join(_names(each)))} -- "$current") ;;'
            for each in commands
        ],
        "        esac",
        "    else",
        "        case $command in",
    ]
    for each in commands:
        if each.words == _EXEC:
            lines.append(
                f"        {_quoted(' '.join(each.words))})"
                ' if [[ $rest == . ]]; then mapfile -t COMPREPLY < <(compgen -c -- "$current");'
                " else compopt -o default; fi ;;"
            )
            continue
        does = []
        if each.commands:
            words = _quoted(" ".join(below.words[-1] for below in each.commands))
            does.append(f'[[ ! $first ]] || mapfile -t COMPREPLY < <(compgen -W {words} -- "$current")')
        if _takes_files(each):
            does.append("compopt -o default")
        if does:
            lines.append(f"        {_quoted(' '.join(each.words))}) {'; '.join(does)} ;;")
    lines += ["        esac", "    fi", "}", "", f"complete -F {_function(program.words)} {name}", ""]
    return "\n".join(lines)


def _names(command: Command) -> list[str]:
    return [name for option in command.options for name in option.names]


def _wrapped(patterns: list[str], indent: str, end: str) -> Iterator[str]:
    """Yield alternatives of `case`, one a line; nothing if there are none."""
    for pattern in patterns[:-1]:
        yield f"{indent}{pattern} | \\"
    if patterns:
        yield f"{indent}{patterns[-1]}{end}"


def _bash_values(commands: list[Command]) -> Iterator[str]:
    does = {
        "file": "compopt -o default",
        "directory": "compopt -o dirnames",
        "user": 'mapfile -t COMPREPLY < <(compgen -u -- "$current")',
        "group": 'mapfile -t COMPREPLY < <(compgen -g -- "$current")',
    }
    for each in commands:
        for option in each.options:
            kind = _kind(option)
            if not option.value or not kind:
                continue
            patterns = " | ".join(f'"{" ".join(each.words)} {name}"' for name in option.names)
            choices = _quoted(" ".join(option.choices))
            done = does.get(kind) or f'mapfile -t COMPREPLY < <(compgen -W {choices} -- "$current")'
            yield f"        {patterns}) {done} ;;"


# zsh


def zsh(program: Command) -> str:
    """Return the completion of a program for zsh."""
    name = program.words[0]
    lines = [f"#compdef {name}", _HEADER]
    for command in program.all_commands():
        lines += _zsh_function(_whole(command))
    return "\n".join([*lines, f'{_function(program.words)} "$@"', ""])


def _zsh_function(command: Command) -> list[str]:
    """Return the function that completes a command; its words begin with the command's name."""
    specifications = [each for option in command.options for each in _zsh_options(option)]
    if command.commands:
        specifications += ["'1: :->command'", "'*:: :->argument'"]
    elif command.words == _EXEC:
        specifications += ["'1:PATH:_files'", "'*:::PROGRAM:_normal'"]
    elif _takes_files(command):
        specifications.append(f"'*:{command.arguments[0].strip('[].')}:_files'")
    begins = f"{_function(command.words)}() {{"
    call = ["    _arguments -s -S -C \\", *[f"        {each} \\" for each in specifications[:-1]]]
    if not command.commands:
        return [begins, *call, f"        {specifications[-1]}", "}", ""]
    described = ["            " + _quoted(f"{each.words[-1]}:{each.summary}") for each in command.commands]
    does = "_describe -t commands command below"
    if _takes_files(command):
        does = '_alternative "commands:command:(($below))" files:file:_files'
        described = [
            "            " + _quoted(f"{each.words[-1]}\\:" + re.sub(r"(\W)", r"\\\1", each.summary))
            for each in command.commands
        ]
    return [
        begins,
        "    local curcontext=$curcontext state line",
        "    local -a below",
        "    typeset -A opt_args",
        *call,
        f"        {specifications[-1]} && return",
        "    case $state in",
        "    command)",
        "        below=(",
        *described,
        "        )",
        f"        {does}",
        "        ;;",
        "    argument)",
        "        case $line[1] in",
        *[f"        {each.words[-1]}) {_function(each.words)} ;;" for each in command.commands],
        *(["        *) _files ;;"] if _takes_files(command) else []),
        "        esac",
        "        ;;",
        "    esac",
        "}",
        "",
    ]


def _zsh_options(option: Option) -> Iterator[str]:
    told = re.sub(r"([\[\]:\\])", r"\\\1", _in_short(option.help))
    does = {"file": "_files", "directory": "_files -/", "user": "_users", "group": "_groups"}
    action = does.get(_kind(option)) or (f"({' '.join(option.choices)})" if option.choices else " ")
    value = re.sub(r"[\[\]:\\]", "", option.value.partition("[")[0] or "VALUE")
    others = "*" if option.again else f"({' '.join(option.names)})"
    for name in option.names:
        after = ("=" if name.startswith("--") else "+") if option.value else ""
        yield _quoted(f"{others}{name}{after}[{told}]" + (f":{value}:{action}" if option.value else ""))


# fish


def fish(program: Command) -> str:
    """Return the completion of a program for fish."""
    name = program.words[0]
    commands = [_whole(each) for each in program.all_commands()]
    function = f"_{_function(program.words)}_is"
    lines = [f"# fish completion for {name}", _HEADER]
    if program.commands:
        lines += _fish_function(function, commands)
    lines.append(f"complete -c {name} -f")
    for each in commands:
        asked = f'{function} "{" ".join(each.words)}"'
        condition = f"complete -c {name}" + (f" -n {_fish_word(asked)}" if program.commands else "")
        lines += [f"{condition} -a {one.words[-1]} -d {_fish_word(one.summary)}" for one in each.commands]
        if _takes_files(each) or each.words == _EXEC:
            lines.append(f"{condition} -F")
        if each.words == _EXEC:
            program_next = f"{asked}; and test (commandline -opc)[-1] = --"
            lines.append(
                f"complete -c {name} -n {_fish_word(program_next)} -x -a '(__fish_complete_command)'"
            )
        lines += [f"{condition} {_fish_option(option)}" for option in each.options]
    return "\n".join([*lines, ""])


def _fish_function(function: str, commands: list[Command]) -> list[str]:
    below = [_fish_word(" ".join(each.words)) for each in commands[1:]]
    return [
        "# Whether the words before the cursor lead to this command.",
        f"function {function}",
        f"    set -l command {commands[0].words[0]}",
        "    set -l option",
        "    for word in (commandline -opc)[2..]",
        '        if test -n "$option"',
        "            set option",
        f"        else if contains -- $word {' '.join(_valued(commands))}",
        "            set option $word",
        f'        else if contains -- "$command $word" {" ".join(below)}',
        '            set command "$command $word"',
        "        else if not string match -q -- '-*' $word",
        "            break",
        "        end",
        "    end",
        '    test "$command" = "$argv[1]"',
        "end",
        "",
    ]


def _fish_word(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_option(option: Option) -> str:
    does = {
        "": "-x",
        "file": "-r -F",
        "directory": "-x -a '(__fish_complete_directories)'",
        "user": "-x -a '(__fish_complete_users)'",
        "group": "-x -a '(__fish_complete_groups)'",
        "choice": f"-x -a {_fish_word(' '.join(option.choices))}",
    }
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    value = [does[_kind(option)]] if option.value else []
    return " ".join([*names, *value, "-d", _fish_word(_in_short(option.help))])


def completions() -> dict[str, str]:
    """Return all files, by their names below a directory: those that the shells look for."""
    found = {}
    for program in programs():
        name = program.words[0]
        found[f"bash/{name}"] = bash(program)
        found[f"zsh/_{name}"] = zsh(program)
        found[f"fish/{name}.fish"] = fish(program)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and its argument
        sys.exit("usage: python3 -m scripts.completions DIRECTORY")
    write_files(completions(), sys.argv[1])
