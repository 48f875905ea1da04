"""What ClamAV's own clients and those of PyPI do with whoever listens, as a user who is not root.

`/T` stands for a tree of files of two users, Ann, who asks, and Bob. Each scenario finds it as it was.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import clamd
import pyclamd

from tests.processes import in_child
from tests.scan import samples
from tests.scan.clamav import BAD
from tests.scan.running_scand import ANN, BOB, own

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LIMIT = 100_000  # bytes; of MaxFileSize, and of max_file_size


class Outcome(NamedTuple):
    """What came of a scenario, as text: exit status and lines, or what a function returned."""

    text: str


class Scenario(NamedTuple):
    """`ask` is given the socket and the tree. `why`: what is better about another outcome than clamd's."""

    client: str
    asks: str
    ask: Callable[[Path, Path], str]
    why: str = ""


def fill(tree: Path) -> None:
    """Make what is below the tree anew; the tree itself stays."""
    for path in tree.iterdir():
        shutil.rmtree(path)
    for user, uid, mode in (("ann", ANN, 0o755), ("bob", BOB, 0o700)):
        home = tree / user
        contents = {
            "clean": b"nothing bad",
            "bad": BAD,
            "sub/worse": BAD,
            "sub/fine": b"fine",
            "fine/one": b"one",
            "large": bytes(LIMIT + 1),
        }
        if user == "ann":
            contents["locked"] = samples.encrypted_in_name_only(b"x" * 1000)
            contents |= {"mixed/clean": b"fine", "mixed/large": bytes(LIMIT + 1), "shared/of Bob": b"fine"}
        for name, content in contents.items():
            (home / name).parent.mkdir(exist_ok=True, parents=True)
            (home / name).write_bytes(content)
            own(home / name, uid)
        (home / "moved").mkdir()
        (home / "list").write_text(f"{home}/clean\n{home}/bad\n")
        own(home / "list", uid, 0o644)
        for name in (".", "sub", "fine", "moved"):
            own(home / name, uid, mode)
    for name in ("mixed", "shared"):
        own(tree / "ann" / name, ANN, 0o755)
    own(tree / "ann/shared/of Bob", BOB)


def clamdscan(*arguments: str, uid: int = ANN) -> Callable[[Path, Path], str]:
    """Return what runs clamdscan as a user; its lines are sorted, for they come in any order."""

    def ask(socket_path: Path, tree: Path) -> str:
        configuration = tree.parent / "client.conf"
        configuration.write_text(f"LocalSocket {socket_path}\n")
        done = subprocess.run(
            [
                "clamdscan",
                f"--config-file={configuration}",
                *(["--no-summary"] if not {"--ping", "--version", "--reload"} & set(arguments) else []),
                *(one.replace("/T", str(tree)) for one in arguments),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd="/",
            user=uid,
            group=uid,
            extra_groups=[],
        )
        lines = sorted((done.stdout + done.stderr).splitlines())
        moved = sorted(path.name for path in (tree / "ann" / "moved").iterdir())
        missing = [name for name in ("bad",) if not (tree / "ann" / name).exists()]
        after = [f"in moved: {name}" for name in moved] + [f"removed: {name}" for name in missing]
        return "; ".join([*lines, *after, f"status {done.returncode}"])

    return ask


def python(function: Callable[[str, str], object]) -> Callable[[Path, Path], str]:
    """Return what calls a function as Ann, with socket and tree; what it raises is its outcome too."""

    def ask(socket_path: Path, tree: Path) -> str:
        def call() -> str:
            try:
                made = function(str(socket_path), str(tree))
            except (clamd.ClamdError, pyclamd.ConnectionError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            except OSError:
                return "OSError"  # ECONNRESET or EPIPE, as it happens
            if isinstance(made, dict):
                return "; ".join(f"{name}: {' '.join(filter(None, made[name]))}" for name in sorted(made))
            return str(made)

        return in_child(call, uid=ANN)

    return ask


def _of_clamd(function: Callable[[clamd.ClamdUnixSocket, str], object]) -> Callable[[Path, Path], str]:
    return python(lambda socket_path, tree: function(clamd.ClamdUnixSocket(socket_path), tree))


def _of_pyclamd(function: Callable[[pyclamd.ClamdUnixSocket, str], object]) -> Callable[[Path, Path], str]:
    return python(lambda socket_path, tree: function(pyclamd.ClamdUnixSocket(socket_path), tree))


def _pyclamd_all(found: dict[str, object] | None) -> object:
    """Return what pyclamd's ALLMATCHSCAN returns, a list of findings for each name, without its lists."""
    return found and {name: tuple(*one) if isinstance(one, list) else one for name, one in found.items()}


_NOT_OK = "what was not looked at as a whole is not OK"
_ONCE = "each name of a file is said once"
_NOT_ALLOWED = "who may not have a file learns nothing of it"
_NOT_ROOT = "who may have the databases loaded anew is configured"
SCENARIOS = [
    Scenario("clamdscan", "`/T/ann/clean`", clamdscan("/T/ann/clean")),
    Scenario("clamdscan", "`/T/ann/bad`", clamdscan("/T/ann/bad")),
    Scenario("clamdscan", "`/T/ann/none`", clamdscan("/T/ann/none")),
    Scenario("clamdscan", "`/T/ann/sub`", clamdscan("/T/ann/sub")),
    Scenario("clamdscan", "`/T/ann/fine /T/ann/sub`", clamdscan("/T/ann/fine", "/T/ann/sub")),
    Scenario("clamdscan", "`--multiscan /T/ann/sub`", clamdscan("--multiscan", "/T/ann/sub")),
    Scenario("clamdscan", "`--fdpass /T/ann/sub`", clamdscan("--fdpass", "/T/ann/sub")),
    Scenario(
        "clamdscan", "`--fdpass --multiscan /T/ann/sub`", clamdscan("--fdpass", "--multiscan", "/T/ann/sub")
    ),
    Scenario("clamdscan", "`--stream /T/ann/sub`", clamdscan("--stream", "/T/ann/sub")),
    Scenario("clamdscan", "`--allmatch /T/ann/sub`", clamdscan("--allmatch", "/T/ann/sub"), _ONCE),
    Scenario("clamdscan", "`--infected /T/ann/fine`", clamdscan("--infected", "/T/ann/fine")),
    Scenario("clamdscan", "`--infected /T/ann/sub`", clamdscan("--infected", "/T/ann/sub")),
    Scenario("clamdscan", "`--file-list=/T/ann/list`", clamdscan("--file-list=/T/ann/list")),
    Scenario("clamdscan", "`--move=/T/ann/moved /T/ann/bad`", clamdscan("--move=/T/ann/moved", "/T/ann/bad")),
    Scenario("clamdscan", "`--copy=/T/ann/moved /T/ann/bad`", clamdscan("--copy=/T/ann/moved", "/T/ann/bad")),
    Scenario("clamdscan", "`--remove /T/ann/bad`", clamdscan("--remove", "/T/ann/bad")),
    Scenario("clamdscan", "`--ping 1`", clamdscan("--ping", "1")),
    Scenario("clamdscan", "`--version`", clamdscan("--version")),
    Scenario("clamdscan, as root", "`--reload`", clamdscan("--reload", uid=0)),
    Scenario("clamdscan", "`--reload`", clamdscan("--reload"), _NOT_ROOT),
    Scenario("clamdscan", "`/T/ann/large`", clamdscan("/T/ann/large"), _NOT_OK),
    Scenario("clamdscan", "`--fdpass /T/ann/large`", clamdscan("--fdpass", "/T/ann/large"), _NOT_OK),
    Scenario("clamdscan", "`--stream /T/ann/locked`", clamdscan("--stream", "/T/ann/locked"), _NOT_OK),
    Scenario("clamdscan", "`/T/ann/mixed`", clamdscan("/T/ann/mixed"), _NOT_OK),
    Scenario(
        "clamdscan", "`/T/ann/shared`, where one file is Bob's", clamdscan("/T/ann/shared"), _NOT_ALLOWED
    ),
    Scenario("clamd of PyPI", "`ping()`", _of_clamd(lambda one, _: one.ping())),
    Scenario("clamd of PyPI", "`version()`", _of_clamd(lambda one, _: one.version())),
    Scenario(
        "clamd of PyPI", "`scan('/T/ann/bad')`", _of_clamd(lambda one, tree: one.scan(tree + "/ann/bad"))
    ),
    Scenario(
        "clamd of PyPI",
        "`contscan('/T/ann/sub')`",
        _of_clamd(lambda one, tree: one.contscan(tree + "/ann/sub")),
    ),
    Scenario(
        "clamd of PyPI",
        "`multiscan('/T/ann/sub')`",
        _of_clamd(lambda one, tree: one.multiscan(f"{tree}/ann/sub")),
    ),
    Scenario("clamd of PyPI", "`instream(...)`", _of_clamd(lambda one, _: one.instream(io.BytesIO(BAD)))),
    Scenario(
        "clamd of PyPI",
        "`instream(...)`, too long",
        _of_clamd(lambda one, _: one.instream(io.BytesIO(bytes(3 * LIMIT)))),
        "who said too much is told so before the connection ends",
    ),
    Scenario(
        "clamd of PyPI",
        "`stats()`",
        _of_clamd(lambda one, _: "POOLS: 1" in one.stats() and one.stats().endswith("END\n")),
    ),
    Scenario(
        "clamd of PyPI",
        "`scan('/T/bob/bad')`",
        _of_clamd(lambda one, tree: one.scan(f"{tree}/bob/bad")),
        _NOT_ALLOWED,
    ),
    Scenario(
        "clamd of PyPI",
        "`scan('/T/bob/none')`",
        _of_clamd(lambda one, tree: one.scan(f"{tree}/bob/none")),
        _NOT_ALLOWED,
    ),
    Scenario(
        "clamd of PyPI",
        "`contscan('/T/bob/sub')`",
        _of_clamd(lambda one, tree: one.contscan(f"{tree}/bob/sub")),
        _NOT_ALLOWED,
    ),
    Scenario("pyClamd", "`ping()`", _of_pyclamd(lambda one, _: one.ping())),
    Scenario("pyClamd", "`version()`", _of_pyclamd(lambda one, _: one.version())),
    Scenario(
        "pyClamd",
        "`scan_file('/T/ann/bad')`",
        _of_pyclamd(lambda one, tree: one.scan_file(f"{tree}/ann/bad")),
    ),
    Scenario(
        "pyClamd",
        "`scan_file('/T/ann/clean')`",
        _of_pyclamd(lambda one, tree: one.scan_file(f"{tree}/ann/clean")),
    ),
    Scenario(
        "pyClamd",
        "`contscan_file('/T/ann/sub')`",
        _of_pyclamd(lambda one, tree: one.contscan_file(f"{tree}/ann/sub")),
    ),
    Scenario(
        "pyClamd",
        "`multiscan_file('/T/ann/sub')`",
        _of_pyclamd(lambda one, tree: one.multiscan_file(f"{tree}/ann/sub")),
    ),
    Scenario(
        "pyClamd",
        "`allmatchscan('/T/ann/clean')`",
        _of_pyclamd(lambda one, tree: _pyclamd_all(one.allmatchscan(f"{tree}/ann/clean"))),
    ),
    Scenario("pyClamd", "`scan_stream(...)`", _of_pyclamd(lambda one, _: one.scan_stream(BAD))),
    Scenario("pyClamd", "`reload()`", _of_pyclamd(lambda one, _: one.reload()), _NOT_ROOT),
]


# What asks for this finds another tree than it leaves.
_CHANGING = ("--move", "--copy", "--remove")


def outcome(scenario: Scenario, socket_path: Path, tree: Path) -> str:
    """Return what came of a scenario, with what differs from run to run taken out; the tree is as before."""
    text = scenario.ask(socket_path, tree).replace(str(tree), "/T")
    if any(word in scenario.asks for word in _CHANGING):
        fill(tree)
    return re.sub(r"\d+\.\d{6}", "N", text)


def rows(clamd_socket: Path, our_socket: Path, tree: Path) -> list[str]:
    """Return the table of outcomes, as it stands in the documentation."""
    made = []
    for one in SCENARIOS:
        theirs, ours = outcome(one, clamd_socket, tree), outcome(one, our_socket, tree)
        what = f"| {one.client} | {one.asks} |"
        if theirs == ours:
            made.append(f"{what} {_told(ours)} | the same | |")
        else:
            made.append(f"{what} {_told(theirs)} | {_told(ours)} | {one.why} |")
    return made


def _told(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`" if os.fsencode(shown).strip() else "nothing"
