"""The client of the scan service, and a service that does not answer as it should."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from fdbroker.scan.client import ServiceGoneError, connect

if TYPE_CHECKING:
    from pathlib import Path

_WELCOME = b'{"type":"welcome","version":1,"service":"x","engines":[]}'
_END = (
    b'{"type":"end","id":1,"files":%d,"bytes":0,"infected":0,"errors":0,"skipped":0,"missing":%s,'
    b'"complete":%s}'
)
_CLEAN = b'{"verdict":"clean","size":1}'
_RESULTS = b'{"type":"results","id":1,"results":[%s]}'


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([_END % (0, b"[]", b"true")], "0 answers for one file"),
        ([_END % (0, b'["failed"]', b"false")], "the scan was cut off: failed"),
        ([_RESULTS % _CLEAN, _END % (1, b'["failed"]', b"false")], "the scan was cut off: failed"),
        ([_RESULTS % (_CLEAN + b"," + _CLEAN), _END % (2, b"[]", b"true")], "2 answers for one file"),
        ([_RESULTS % b'{"skipped":"fifo"}', _END % (0, b"[]", b"true")], "1 answers for one file"),
        ([_RESULTS % _CLEAN], "closed the connection"),
    ],
)
def test_one_file_has_one_verdict_or_none(answers: list[bytes], said: str, tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                for each in ([_WELCOME], answers):
                    sock.recv(70_000)
                    for message in each:
                        sock.send(message)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                open("/dev/null", "rb") as file,
                connect(path, timeout=20) as service,
                pytest.raises(ServiceGoneError, match=said),
            ):
                service.scan_descriptor(file.fileno())
        finally:
            thread.join()
