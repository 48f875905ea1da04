"""What is installed here and fdbroker needs, and wheels of it: so that nothing has to be fetched."""

from __future__ import annotations

import re
import runpy
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parent.parent


def requirements(*also: str) -> list[metadata.Distribution]:
    """Return what fdbroker needs with its extras `daemon` and `cli`; and `also`, with what these need."""
    demo = runpy.run_path(str(CHECKOUT / "scripts" / "demo.py"))
    available = {demo["canonical"](each.metadata["Name"]): each for each in metadata.distributions()}
    needed: dict[str, metadata.Distribution] = {}
    demo["requirements_of"]("fdbroker", {"daemon", "cli"}, available, needed)
    for name in also:
        demo["requirements_of"](name, set(), available, needed)
    del needed["fdbroker"]
    return list(needed.values())


def files_of(distribution: metadata.Distribution) -> Iterator[tuple[Path, str]]:
    """Yield its files, each with its name below site-packages; no programs, and nothing that was compiled."""
    for file in distribution.files or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and source.suffix != ".pyc" and source.is_file():
            yield source, str(file)


def make_wheels(directory: Path) -> None:
    """Make wheels of what fdbroker needs or is built by: pip needs no network then."""
    for distribution in requirements("hatchling"):
        tag = re.findall(r"^Tag: (.*)$", distribution.read_text("WHEEL") or "", re.MULTILINE)[-1]
        name = distribution.metadata["Name"].replace("-", "_")
        with zipfile.ZipFile(directory / f"{name}-{distribution.version}-{tag}.whl", "w") as archive:
            for source, place in files_of(distribution):
                archive.write(source, place)
