"""Policy files as arguments. What reads YAML is another extra, loaded when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdbroker.cli.failure import Failure

if TYPE_CHECKING:
    from fdbroker.config import CompiledPolicy

DEFAULT_POLICY = "/etc/fdbroker/policy.yaml"


def load(path: str, *, dev: bool = False) -> CompiledPolicy:
    """Read a policy file that can be trusted, and compile it for this machine.

    Raises:
        Failure: it can't be trusted or read, or it has problems, each with its place.

    """
    from fdbroker.config import ConfigError, load_policy_file  # noqa: PLC0415 - see above

    try:
        return load_policy_file(path, dev=dev)
    except ConfigError as error:
        raise Failure(str(error)) from error  # printable as it is
