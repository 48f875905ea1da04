"""A broker in the process of the tests, one round at a time: no capability, no Landlock, no seccomp."""

from __future__ import annotations

import gc
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fdbroker.broker import server
from fdbroker.broker.audit import Audit
from fdbroker.broker.dispatch import Parts
from fdbroker.broker.generation import Held, key_of, make_generation, problem_with
from fdbroker.broker.identity import probe_level
from fdbroker.broker.notify import Notifier
from fdbroker.broker.roots import hold_roots
from fdbroker.broker.server import Broker
from fdbroker.broker.watchdog import Watchdog
from fdbroker.kernel.files import open_proc_self_fd
from fdbroker.policy.rules import read_policy
from tests.audit_records import check_lines
from tests.broker.speaking import Speaker, read_audit
from tests.running_broker import policy

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from fdbroker.broker.opening import Opener

_S = TypeVar("_S", bound=Speaker)

# After a reload a broker looks through all that it has. This process has pytest and all
# tests, which stay frozen.
vars(server)["gc"] = SimpleNamespace(
    unfreeze=lambda: None,
    collect=gc.collect,
    freeze=lambda: gc.freeze(),  # noqa: PLW0108 - a test may have replaced it
)


class SteppedBroker:
    """Owns a broker, what it is made of, and its clients."""

    def __init__(
        self,
        tree: Path,
        compiled: dict[str, Any] | None = None,
        *,
        audit: Path | None = None,
        level: int | None = None,
        cgroup_root: str | None = None,
        notifier: Notifier | None = None,
        labels: bool = False,
    ) -> None:
        self.tree = tree
        rule_set = read_policy(compiled or policy(tree))
        self.roots = hold_roots(rule_set.roots, read_only_required=False)
        self.proc_self_fd = open_proc_self_fd()
        self.audit_file = audit
        self.audit_descriptor = (
            None
            if audit is None
            else os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )
        self.audit = Audit(self.audit_descriptor, deny_on_failure=rule_set.settings.deny_when_audit_fails)
        self._held = held = Held(
            {key_of(root): kept for root, kept in zip(rule_set.roots, self.roots, strict=True)},
            self.proc_self_fd,
            cgroup_root,
            rule_set.settings.read_only_view_required,
            services=frozenset(rule_set.services),
            identity_level=probe_level().level if level is None else level,
            labels=labels,
        )
        self.broker = Broker(
            Parts(
                make_generation(1, rule_set, held),
                held,
                self.audit,
                notifier or Notifier(),
                {},
                "of the tests",
                Watchdog(None),
            )
        )
        self._speakers: list[Speaker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close everything."""
        for speaker in self._speakers:
            speaker.discard()
        self.broker.close()
        for root in self.roots:
            os.close(root.descriptor)
        os.close(self.proc_self_fd)
        if self.audit_descriptor is not None:
            os.close(self.audit_descriptor)
        if self.audit_file is not None and self.audit_file.is_file():
            check_lines(self.audit_file.read_bytes().splitlines())

    def serve(self) -> None:
        """Serve until nothing is left to do."""
        for _ in range(8):
            self.broker.step(0)

    @overload
    def join(self, *, hello: bool = True) -> Speaker: ...

    @overload
    def join(self, kind: type[_S], *, hello: bool = True) -> _S: ...

    def join(self, kind: type[Speaker] = Speaker, *, hello: bool = True) -> Speaker:
        """Return a new client on a socket pair, a connection there already; its peer is this process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind.kind)
        speaker = kind(theirs, self.serve)
        self._speakers.append(speaker)
        self.broker.adopt(ours, "pair")
        if hello:
            speaker.greet()
        return speaker

    def listen(
        self, directory: Path, *, control: bool = False, kind: type[Speaker] = Speaker, name: str = "listener"
    ) -> Path:
        """Serve a listening socket, or one for datagrams, as well; return its path."""
        path = directory / ("control" if control else name)
        listener = socket.socket(socket.AF_UNIX, kind.kind)
        listener.bind(str(path))
        path.chmod(0o666)
        if kind.kind != socket.SOCK_DGRAM:
            listener.listen(128)
        self.broker.add_listener(listener, path.name, control=control)
        return path

    def listen_for(self, directory: Path, service: str, kind: int = socket.SOCK_STREAM) -> Path:
        """Listen for the clients of a service; return the path."""
        path = directory / service
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(2048)
        self.broker.add_listener(listener, service, service=service)
        return path

    def switch(self, compiled: dict[str, Any]) -> None:
        """Serve by another policy from now on."""
        rule_set = read_policy(compiled)
        problem = problem_with(rule_set, self._held)
        assert problem is None, problem
        dispatch = self.broker._dispatch
        dispatch.generation = make_generation(dispatch.generation.number + 1, rule_set, self._held)
        self.broker._switched()

    @overload
    def call(self, path: Path, *, hello: bool = True) -> Speaker: ...

    @overload
    def call(self, path: Path, kind: type[_S], *, hello: bool = True) -> _S: ...

    def call(self, path: Path, kind: type[Speaker] = Speaker, *, hello: bool = True) -> Speaker:
        """Return a new client that connects to a listener."""
        speaker = kind(socket.socket(socket.AF_UNIX, kind.kind), self.serve)
        self._speakers.append(speaker)
        speaker.reach(path)
        self.serve()
        if hello:
            speaker.greet()
        return speaker

    @property
    def opener(self) -> Opener:
        """What opens by the policy of now."""
        return self.broker._dispatch.generation.opener

    @property
    def connections(self) -> int:
        """How many connections the broker has."""
        return len(self.broker._connections)

    @property
    def in_flight(self) -> int:
        """How many descriptors the broker takes to be under way."""
        return self.broker._flight.total

    @property
    def malformed(self) -> int:
        """How many messages it counted that break the protocol."""
        return self.broker._totals()["malformed"]

    def records(self) -> list[dict[str, Any]]:
        """Return the audit so far."""
        assert self.audit_file is not None
        return read_audit(self.audit_file.read_bytes())

    def reasons(self) -> list[str]:
        """Return the reasons of the decisions so far."""
        return [record["reason"] for record in self.records() if "decision" in record]

    def events(self) -> list[str]:
        """Return the names of the events so far."""
        return [record["event"] for record in self.records() if "decision" not in record]
