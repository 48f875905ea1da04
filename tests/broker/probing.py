"""Start a broker by the launcher with tests/broker/probing_entry.py in the place of its entry."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdbroker.launcher.start import Start, start_broker
from tests.broker.speaking import Speaker
from tests.running_broker import BROKER_UID

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROBING_ENTRY = Path(__file__).with_name("probing_entry.py")
OUT = 1  # the broker's standard output, which is nobody's where the audit is elsewhere


def probe(
    directory: Path,
    compiled: dict[str, Any],
    *,
    tries: Sequence[str] = (),
    deadly: Sequence[str] = (),
    use: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Start a probing broker, use it, stop it, and return what it told.

    The launcher runs `Start.python` with a fixed command line; a two-line
    script there exchanges the entry and keeps all else.
    """
    wrapper, told, errors = directory / "python", directory / "told", directory / "errors"
    instructions = directory / "instructions"
    instructions.write_text(json.dumps({"tries": tries, "deadly": deadly, "out": OUT}))
    wrapper.write_text(
        "#!/bin/sh\n"
        f'exec {sys.executable} "$1" "$2" "$3" {PROBING_ENTRY} "$(cat {instructions})" "$4" "$5" "$6"\n'
    )
    for file in (wrapper, instructions):
        file.chmod(0o755)
    socket_path = directory / "probing.seqpacket"
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        _become_broker(wrapper, compiled, socket_path, told, errors, write_end)
    os.close(write_end)
    try:
        with open(read_end, "rb") as ready:
            assert ready.read() == b"ready\n", errors.read_text()
        if use is not None:
            use(socket_path)
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        pid = 0
        assert status == 0, errors.read_text()
    finally:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        socket_path.unlink(missing_ok=True)
    answer: dict[str, Any] = json.loads(told.read_text())
    return answer


def _become_broker(
    wrapper: Path, compiled: dict[str, Any], socket_path: Path, told: Path, errors: Path, ready: int
) -> None:
    """In the child: what `python -m fdbroker.launcher` does, with another interpreter."""
    try:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(socket_path))
        listener.listen(16)
        start_broker(
            Start(
                uid=BROKER_UID,
                gid=BROKER_UID,
                policy=compiled,
                listeners=[(listener.fileno(), "probing", None)],
                ready=ready,
                dev=True,
                python=str(wrapper),
            )
        )
    except BaseException as error:  # noqa: BLE001 - the parent reads it
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(3)


def use_everything(tree: Path) -> Callable[[Path], None]:
    """Return a use of all that can be asked for, good and bad."""

    def use(socket_path: Path) -> None:
        with Speaker.connect(socket_path) as speaker:
            speaker.open(bytes(tree / "file"), b"", b"/etc/passwd", b"\xff", bytes(tree / "link"))
            speaker.stat(bytes(tree / "file"), bytes(tree / "missing"))
            speaker.list_all(bytes(tree))
            speaker.status()
        with Speaker.connect(socket_path, hello=False) as speaker:
            speaker.error(b"\xff")
        with Speaker.connect(socket_path) as speaker:
            speaker.sock.send(b"")
            assert speaker.is_closed()

    return use
