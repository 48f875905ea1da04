"""One policy in force, with all that belongs to it; and what a later one has to fit into.

Roots are opened, Landlock is entered and the mounts are looked at when the
broker starts. A policy that is loaded later is served by what is held since
then, or not at all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from fdbroker.broker.audit import now_text
from fdbroker.broker.identity import HIGHEST_LEVEL, ControlGroups
from fdbroker.broker.opening import FollowingOpener, Opener
from fdbroker.broker.watchdog import nothing
from fdbroker.policy.decide import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fdbroker.broker.roots import HeldRoot
    from fdbroker.policy.rules import Root, RuleSet, Settings


class Held(NamedTuple):
    """What the process got at its start, and gets no more of.

    `roots` by `key_of`; `cgroup_root` None: control groups can't be looked at. `launcher_fingerprint` is
    of the launcher's part of the policy, for those who ask whether a file still says the same; None: there
    was none. `services`: the names of the listeners whose clients are handed to services. `ping` tells the
    loop's watchdog, in the middle of a long request, that it goes on. `identity_level` and `labels`: what
    the kernel tells of peers.
    """

    roots: Mapping[tuple[str, bytes, bool, bool], HeldRoot]
    proc_self_fd: int
    cgroup_root: str | None
    read_only_view: bool
    launcher_fingerprint: str | None = None
    services: frozenset[bytes] = frozenset()
    ping: Callable[[], None] = nothing
    identity_level: int = 0
    labels: bool = False


class Generation(NamedTuple):
    """A policy as it is served. Exchanged whole, so that no request meets parts of two."""

    number: int
    policy: Policy
    settings: Settings
    opener: Opener
    cgroups: ControlGroups
    loaded: str


def key_of(root: Root) -> tuple[str, bytes, bool, bool]:
    """Return what a root of a later policy must agree in."""
    return root.name, root.path, root.cross_mounts, root.helpers


def problem_with(rule_set: RuleSet, held: Held) -> str | None:
    """Return why this policy can't be served by what is held, with the cure; None if it can."""
    for root in rule_set.roots:
        if key_of(root) not in held.roots:
            return (
                f"root {root.name!r} ({os.fsdecode(root.path)!r}) is not among those that the broker opened"
                " when it started, or its cross_mounts or opens was another: restart the broker"
            )
    if rule_set.settings.read_only_view_required != held.read_only_view:
        was = "required" if held.read_only_view else "off"
        return f"read_only_view was {was!r} when the broker started, and can't change: restart the broker"
    if rule_set.cgroups and held.cgroup_root is None:
        return (
            "it has rules for units or control groups, and the policy that the broker started with had none:"
            " restart the broker"
        )
    problem = problem_with_identity(rule_set, held.identity_level, "", labels=held.labels)
    if problem is not None:
        return problem
    if rule_set.services.keys() != held.services:
        was, wanted = (_listed(names) for names in (held.services, rule_set.services))
        return (
            f"its listeners of services are {wanted}, and were {was} when the broker started:"
            " restart the broker"
        )
    return None


def problem_with_identity(rule_set: RuleSet, level: int, why: str, *, labels: bool) -> str | None:
    """Return what the policy asks of identities that this kernel does not tell, with the cure, or None.

    `why`: what the kernel lacks for the next level, where that was asked.
    """
    if rule_set.settings.identity_strict and level < HIGHEST_LEVEL:
        reason = why or "PIDFD_GET_INFO needs Linux 6.13"
        return (
            f"the policy says 'identity: strict', for which level {HIGHEST_LEVEL} is needed, but this kernel"
            f" has level {level}: {reason}; use a newer kernel, or remove 'identity'"
        )
    if rule_set.names_labels and not labels:
        return (
            "the policy has rules for labels, but no security module of this kernel says which label a client"
            " has (SO_PEERSEC): load one (SELinux, Smack; AppArmor where it labels Unix sockets), or"
            " write the rules without 'label'"
        )
    return None


def _listed(names: Iterable[bytes]) -> str:
    return ", ".join(repr(os.fsdecode(name)) for name in sorted(names)) or "none"


def make_generation(number: int, rule_set: RuleSet, held: Held) -> Generation:
    """Return a policy, to which `problem_with` found nothing, as it is served."""
    # A policy numbers its roots itself.
    roots = [held.roots[key_of(root)] for root in rule_set.roots]
    opener = FollowingOpener if any(rule.follows_links for rule in rule_set.rules) else Opener
    return Generation(
        number,
        Policy(rule_set, held.ping),
        rule_set.settings,
        opener(roots, held.proc_self_fd, held.ping),
        ControlGroups(held.cgroup_root, rule_set.cgroups, held.ping),
        now_text(),
    )
