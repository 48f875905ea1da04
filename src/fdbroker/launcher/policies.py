"""The policy, compiled: by a child that ends, or beforehand. This process never parses YAML."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NamedTuple, NoReturn

from fdbroker.config.compiled import MAX_FILE
from fdbroker.config.errors import ConfigError
from fdbroker.config.sources import read_policy_file
from fdbroker.launcher.errors import EXIT_NOT_STARTED, LaunchError
from fdbroker.policy.rules import PolicyError, read_policy
from fdbroker.wire.client import for_broker

_EXIT_BUG = 1


class CompileError(Exception):
    """The child said on standard error what is wrong with the policy; `status` is how it ended."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Policies(NamedTuple):
    """`broker`: what goes to the broker. `daemon`: what the launcher reads; may be empty."""

    broker: dict[str, Any]
    daemon: dict[str, Any]


class PendingPolicy:
    """A policy that is being read. Ask for it when it is needed: until then there is other work to do."""

    def __init__(self, path: str, *, dev: bool) -> None:
        """Begin.

        Raises:
            LaunchError: it is not for this user to compile.

        """
        self._path = path
        self._dev = dev
        self._child: int | None = None
        if path.endswith(".json"):
            return
        if os.geteuid() != 0:
            raise LaunchError(
                f"{path} is for root to compile; let systemd do so before the start (ExecStartPre=+fdbroker"
                " policy compile FILE --output FILE.json), and start with --policy FILE.json"
            )
        self._output, write_end = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.close(self._output)
            _compile_and_exit(path, write_end, dev=dev)
        os.close(write_end)

    def abandon(self) -> None:
        """End the child, if there still is one: the start has failed."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = None

    def finish(self) -> Policies:
        """Return the policy.

        Raises:
            CompileError: the policy file has problems, which have been said.
            LaunchError: the compiled policy can't be used.

        """
        text = self._read_compiled() if self._child is None else self._wait_for(self._child)
        try:
            document = json.loads(text)
        except ValueError as error:
            raise LaunchError(f"{self._path} is no JSON: {error}; compile the policy anew") from error
        daemon: dict[str, Any] = {}
        if isinstance(document, dict):
            daemon = document.get("daemon", daemon)
            document = for_broker(document)
        try:
            read_policy(document)
        except PolicyError as error:
            raise LaunchError(f"{self._path} is not a compiled policy: {error}; compile it anew") from error
        return Policies(document, daemon)

    def _read_compiled(self) -> bytes:
        try:
            return read_policy_file(self._path, dev=self._dev, most_bytes=MAX_FILE)
        except ConfigError as error:
            raise LaunchError(str(error)) from error

    def _wait_for(self, child: int) -> bytes:
        with open(self._output, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        self._child = None
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            raise LaunchError(f"compiling {self._path} was ended by signal {-code}; try again")
        if code:
            raise CompileError(code)
        return text


def _compile_and_exit(path: str, output: int, *, dev: bool) -> NoReturn:
    """Compile the policy, write it to `output` and end, whatever happens. Runs in the child."""
    status = _EXIT_BUG
    try:
        from fdbroker.config.compile import load_policy_file  # noqa: PLC0415 - YAML is for the child alone

        with open(output, "wb") as pipe:
            pipe.write(json.dumps(load_policy_file(path, dev=dev)).encode())
        status = 0
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        status = EXIT_NOT_STARTED
    except ImportError as error:
        sys.stderr.write(
            f"fdbroker: to compile a policy the Python package {error.name} is needed;"
            " install fdbroker[daemon], or give a compiled policy\n"
        )
        status = EXIT_NOT_STARTED
    except BaseException:  # noqa: BLE001 - nothing may leave the child but by its status
        import traceback  # noqa: PLC0415 - takes long, and is for bugs alone

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
