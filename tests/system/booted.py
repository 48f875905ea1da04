"""Commands that run in a real systemd, which boot.sh starts for them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def run_booted(
    command: Sequence[object],
    *,
    environment: Mapping[str, str],
    files: Sequence[Path] = (),
    shared: Sequence[Path] = (REPOSITORY,),
) -> str:
    """Boot, run a command there from the top of the checkout, and return what it wrote to either output.

    `files`: directories whose contents are put below /, as those of a package. `shared`: directories that
    are the same inside.

    Raises:
        AssertionError: it failed; the text is what it wrote.

    """
    places = (":".join(map(str, each)) for each in (files, shared))
    done = subprocess.run(
        [HERE / "boot.sh", *places, *map(str, command)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
