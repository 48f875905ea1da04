"""`fdbroker sandbox`."""

from __future__ import annotations

import click

from fdbroker.cli.checks import MISSING, OK, WEAKER, Check
from fdbroker.cli.doctor import write_check
from fdbroker.cli.failure import Failure
from fdbroker.cli.group import SuggestingGroup
from fdbroker.cli.output import write_json, write_line
from fdbroker.config.names import printable
from fdbroker.sandbox import Confinement, Layer, Profile, SandboxError
from fdbroker.sandbox.machine import report_of

_NEWER = "a newer kernel"

# What a layer is for, and what helps where it is missing.
_LAYERS = {
    Layer.NAMESPACES: (
        "no network, and no mounts, queues or host name to share",
        "let user namespaces be made (user.max_user_namespaces, AppArmor), or start it as root",
    ),
    Layer.PID_NAMESPACE: (
        "no other process can be named, and all workers end with what started them",
        "as for namespaces",
    ),
    Layer.EMPTY_ROOT: ("there is no path to open or to look at", "as for namespaces"),
    Layer.ENVIRONMENT: ("no variable of whoever started it is in its memory", _NEWER),
    Layer.NO_NEW_PRIVS: ("no set-user-id program gives it anything", _NEWER),
    Layer.IDS: (
        "it is another user than who started it, so file modes and signals keep them apart",
        "start it as root; the other layers hold without",
    ),
    Layer.PARENT_DEATH: ("no worker is left behind", _NEWER),
    Layer.DESCRIPTORS: ("nothing is open in it but its channel", "Linux 5.9"),
    Layer.CAPABILITIES: ("it has no right of root's", _NEWER),
    Layer.LANDLOCK: (
        "nothing can be opened outside its own directory, whatever the filter lets through",
        "Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and landlock in the kernel's list lsm=",
    ),
    Layer.LIMITS: (
        "it can't use up memory, CPU time, descriptors or processes",
        "raise the limits of who starts it",
    ),
    Layer.WRITE_EXECUTE: ("no memory becomes code", "Linux 6.3"),
    Layer.NOT_DUMPABLE: ("its memory is in no core dump, and nobody of its user traces it", _NEWER),
    Layer.SECCOMP: ("it makes no system call but those that it needs", "a kernel with CONFIG_SECCOMP_FILTER"),
}


@click.group("sandbox", cls=SuggestingGroup, short_help="Show what confines the processes that read files.")
def command() -> None:
    """Show what confines the processes that read hostile files.

    docs/sandbox.md says what each layer is.
    """


@command.command("report", short_help="Try each layer of confinement on this machine.")
@click.option(
    "--profile",
    type=click.Choice([profile.value for profile in Profile]),
    default=Profile.SEALED.value,
    show_default=True,
    help="What a worker may open: nothing; files in a directory of its own; a program with its libraries.",
)
@click.option(
    "--landlock-abi",
    type=click.IntRange(min=0, max=64),
    metavar="N",
    help="Pretend that the kernel has an older Landlock; 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object (see docs/cli.md).")
@click.option("-v", "--verbose", is_flag=True, help="Say of what is in force, too, what it means.")
def report(profile: str, landlock_abi: int | None, *, as_json: bool, verbose: bool) -> int:
    """Start a worker that does nothing, and say of each layer what this machine gives.

    "ok": in force, and how far it goes. "weaker": not in force; a worker starts
    without it. "missing": not in force, and no worker of this profile starts
    without it. Below what is not ok is what it is for and what helps. What is tried
    is what you would get: as root there is more.

    \b
    Exit status: 0  workers of this profile start
                 1  they do not
                 2  it could not be tried, wrong use, or the output could not be written

    \b
    Examples:  fdbroker sandbox report
               fdbroker sandbox report --profile scratch --json | jq '.layers[] | select(.state != "ok")'
    """  # noqa: D301 - \b is click's mark for a paragraph that keeps its lines
    wanted = _confinement(Profile(profile), landlock_abi)
    try:
        found = report_of(wanted)
    except (SandboxError, OSError) as error:
        raise Failure(printable(f"no worker could be started, whatever it lacks: {error}")) from error
    strict = wanted.must_hold() - {Layer.IDS}
    states = {
        state.layer: OK if state.enforced else MISSING if state.layer in strict else WEAKER
        for state in found.states
    }
    status = 1 if MISSING in states.values() else 0
    if as_json:
        layers = [
            {
                "name": state.layer.value,
                "state": states[state.layer],
                "strict": state.layer in strict,
                "found": state.note,
                "meaning": _LAYERS[state.layer][0],
            }
            for state in found.states
        ]
        write_json({"profile": profile, "layers": layers, "exit_status": status})
        return status
    width = max(len(layer.value) for layer in Layer)
    for state in found.states:
        meaning, cure = _LAYERS[state.layer]
        shown = states[state.layer]
        check = Check(state.layer.value, shown, state.note, meaning, "" if shown == OK else cure)
        write_check(check, width, verbose=verbose)
    starts = "start" if status == 0 else "do not start"
    write_line(f"Workers of the profile {profile} {starts} here.")
    return status


def _confinement(profile: Profile, landlock_abi: int | None) -> Confinement:
    return Confinement(
        profile=profile,
        landlock_abi=landlock_abi,
        program=b"/bin/true" if profile is Profile.PROGRAM else None,
    )
