"""A machine that is thrown away: fdbroker is installed there, and what documents talk about is in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.documentation.blocks import ROOT
from tests.for_other_users import copy_package

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MARK = "--- command"
# All that documents write to. The rest of the machine is as it is; it has no network.
_STAGE = """\
set -eu
ip link set lo up
mount -t tmpfs -o mode=755 stage /run
for place in /etc /home /opt /root /srv /usr/local/bin /var/lib /var/log /var/mail; do
    mkdir -p "/run/.stage$place"
    case $place in
        /etc) cp -a /etc/. /run/.stage/etc ;;
        /opt) mkdir /run/.stage/opt/fdbroker; mount --bind "$INSTALLED" /run/.stage/opt/fdbroker ;;
    esac
done
for place in /etc /home /opt /root /srv /usr/local/bin /var/lib /var/log /var/mail; do
    mount --rbind "/run/.stage$place" "$place"
done
rm -rf /etc/fdbroker /etc/letsencrypt
mkdir -p /etc/fdbroker /var/log/fdbroker /etc/systemd/system /run/home
ln -s /opt/fdbroker/bin/fdbroker* /usr/local/bin/
chgrp mail /var/mail; chmod 2775 /var/mail  # as Debian has it
groupadd --system fdbroker-clients
useradd --system --user-group --no-create-home --shell /usr/sbin/nologin fdbroker
set +eu
"""


class Ran(NamedTuple):
    """What became of a command: its exit status, and the lines that it wrote to either output."""

    status: int
    output: list[str]


@contextlib.contextmanager
def installed() -> Iterator[Path]:
    """Install fdbroker, as the demonstration does, in a directory that is removed afterwards."""
    demo = runpy.run_path(str(ROOT / "scripts" / "demo.py"))
    with tempfile.TemporaryDirectory(prefix="fdbroker-test-", dir="/var/lib") as name:
        prefix = Path(name) / "fdbroker"
        os.chmod(name, 0o755)
        demo["install"](prefix)
        script = (prefix / "bin" / "fdbroker").read_text()
        scand = prefix / "bin" / "fdbroker-scand"
        scand.write_text(script.replace("fdbroker.cli.__main__", "fdbroker.scan.service.main"))
        scand.chmod(0o755)
        # What a wheel has besides the package ...
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
        for source, target in wheel["shared-data"].items():
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, prefix / target)
        # ... and what metrics need.
        spec = importlib.util.find_spec("prometheus_client")
        assert spec is not None
        assert spec.origin is not None
        [site] = prefix.glob("lib/python3*/site-packages")
        copy_package(Path(spec.origin).parent, site / "prometheus_client")
        subprocess.run(["chmod", "-R", "a+rX", prefix], check=True)
        yield prefix


def play(prefix: Path, preparation: str, commands: Sequence[str]) -> list[Ran]:
    """Run commands on the stage, without a network, with fdbroker installed by `installed`.

    `preparation` is a script that must succeed. As `run_in_one_shell` otherwise.
    """
    environment = {
        "HOME": "/run/home",
        "INSTALLED": str(prefix),
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TZ": "UTC",
    }
    script = f"{_STAGE}set -e\n{preparation}\nset +e"
    return run_in_one_shell(script, commands, environment, "--net")


def run_in_one_shell(
    preparation: str, commands: Sequence[str], environment: Mapping[str, str], *namespaces: str
) -> list[Ran]:
    """Run commands in one shell, as root, in the checkout; return what became of each.

    It has namespaces of its own for mounts and processes, and those that are named as options of unshare(1).
    All ends with the last command, whatever it has started.
    """
    script = [preparation, f"printf '\\n{_MARK} 0\\n'"]
    # What a command leaves in $? is there for the next one.
    script += [f"{command}\nsaid=$?; printf '\\n{_MARK} %s\\n' $said; (exit $said)" for command in commands]
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *namespaces]
    done = subprocess.run(
        [*unshare, "bash", "-c", "\n".join(script)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        umask=0o022,
        timeout=120,  # for a command that does not end
    )
    parts = re.split(rf"\n{_MARK} (\d+)\n", done.stdout)
    assert len(parts) == 2 * len(commands) + 3, done.stdout
    del parts[:2]  # of the preparation
    return [
        Ran(int(status), output.splitlines()) for output, status in zip(parts[::2], parts[1::2], strict=False)
    ]
