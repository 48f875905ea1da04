"""What a process shall be confined to: profiles, limits, and which layers must be there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from fdbroker.sandbox.report import STRICT, Layer

if TYPE_CHECKING:
    from collections.abc import Mapping

MEBIBYTE = 1 << 20
SCRATCH = b"/scratch"  # where a worker of that profile finds its directory

# Whom root's workers become if nobody says. Users, services and dynamic users get other numbers:
# systemd's list of uids ("Users, Groups, UIDs and GIDs on systemd Systems") has these as unused.
UNUSED_UIDS = tuple(range(60800, 60864))

_LAST_ID = 0xFFFFFFFE  # (uid_t) -1 means "unchanged" to setresuid(2)
_OVERFLOW_ID = 65534


class Profile(Enum):
    """What a confined process can open by a name."""

    SEALED = "sealed"  # nothing
    SCRATCH = "scratch"  # what is in a directory of its own, on a tmpfs of limited size
    PROGRAM = "program"  # one program, its loader and libraries, for reading


# Landlock and an empty root can each be lacking where the filter allows nothing to be opened. Where it does,
# what is reached by that must be bounded.
_STRICT_OF = {
    Profile.SEALED: STRICT,
    Profile.SCRATCH: STRICT | {Layer.EMPTY_ROOT, Layer.LANDLOCK},
    Profile.PROGRAM: STRICT | {Layer.LANDLOCK},
}


@dataclass(frozen=True)
class Limits:
    """Resource limits, each soft and hard at once.

    `descriptors`: how many may be open, the channel and two for /dev/null included.
    `extra_memory`: bytes of address space beyond what the zygote has mapped.
    `cpu_seconds`: after which the kernel kills it; None: no limit. `file_size`:
    bytes of one file in its scratch directory.
    """

    descriptors: int = 16
    extra_memory: int = 256 * MEBIBYTE
    cpu_seconds: int | None = None
    file_size: int = 64 * MEBIBYTE


@dataclass(frozen=True)
class Confinement:
    """How the workers of a zygote are confined.

    Args:
        profile: what can be opened.
        jit: memory may be made executable, for engines that compile when they
            run (a scanned file still can't be mapped so).
        limits: of each worker.
        scratch_size: bytes of a worker's tmpfs; what is in it is memory, and goes with the worker.
        uids: who the workers are that root starts: if there are several, each worker that lives has
            one for itself. None named: `UNUSED_UIDS`. Who is not root can name none.
        gid: of all workers; None: the same number as the uid.
        strict: layers without which no worker is started, besides those that the profile needs.
        program: profile PROGRAM: the absolute path of what is executed.
        readable: profile PROGRAM: absolute paths of files and directories that it may read besides.
        landlock_abi: pretend to be on an older kernel.
        unsafe_without: layers to leave out, for looking at what the others do. Not for hostile bytes.
        report_only: a worker starts whatever it lacks, to tell that. It must be given nothing.
        gently: a refused system call fails with EPERM and does not kill. For tests, and for PROGRAM always.

    Raises:
        ValueError: a value that means nothing.

    """

    profile: Profile = Profile.SEALED
    jit: bool = False
    limits: Limits = field(default_factory=Limits)
    scratch_size: int = 64 * MEBIBYTE
    uids: tuple[int, ...] = ()
    gid: int | None = None
    strict: frozenset[Layer] = frozenset()
    program: bytes | None = None
    readable: tuple[bytes, ...] = ()
    landlock_abi: int | None = None
    unsafe_without: frozenset[Layer] = frozenset()
    gently: bool = False
    report_only: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for number in (*self.uids, *(() if self.gid is None else (self.gid,))):
            if not 0 < number <= _LAST_ID or number == _OVERFLOW_ID:
                raise ValueError(
                    f"a worker can't have the id {number}: neither root's nor the overflow id {_OVERFLOW_ID}"
                )
        if len(set(self.uids)) != len(self.uids):
            raise ValueError("uids: one is named twice")
        if self.scratch_size <= 0:
            raise ValueError("scratch_size: a directory of its own without room")
        if (self.profile is Profile.PROGRAM) != (self.program is not None):
            raise ValueError("program: the profile `program` needs one, the others can have none")
        for path in (*self.readable, *(() if self.program is None else (self.program,))):
            if not path.startswith(b"/") or 0 in path or b".." in path.split(b"/"):
                raise ValueError(f"{path!r} is no absolute path")

    def must_hold(self) -> frozenset[Layer]:
        """Return the layers without which there is no worker."""
        if self.report_only:
            return frozenset()
        return (_STRICT_OF[self.profile] | self.strict) - self.unsafe_without

    def insists_on(self, layer: Layer) -> bool:
        """Return whether there is no worker without this layer.

        Ids that nobody may change are no gap, unless whoever starts the worker says that they are.
        """
        return layer in self.must_hold() and (layer is not Layer.IDS or layer in self.strict)

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` makes it of again."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "profile": self.profile.value,
            "limits": vars(self.limits),
            "strict": [layer.name for layer in self.strict],
            "program": None if self.program is None else self.program.hex(),
            "readable": [path.hex() for path in self.readable],
            "unsafe_without": [layer.name for layer in self.unsafe_without],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Confinement:
        """Return what `to_json` told of."""
        return cls(
            **{
                **values,
                "profile": Profile(values["profile"]),
                "limits": Limits(**values["limits"]),
                "uids": tuple(values["uids"]),
                "strict": frozenset(Layer[name] for name in values["strict"]),
                "program": None if values["program"] is None else bytes.fromhex(values["program"]),
                "readable": tuple(map(bytes.fromhex, values["readable"])),
                "unsafe_without": frozenset(Layer[name] for name in values["unsafe_without"]),
            }
        )
