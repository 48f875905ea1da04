"""Which pages have commands that are run, what is there before, and which commands are not run, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.documentation.blocks import Block


class Session(NamedTuple):
    """What is run of a page: its console blocks, and the others that are named by their beginnings."""

    preparation: str
    others: tuple[str, ...] = ()

    def has(self, block: Block) -> bool:
        """Return whether the commands of a block are run."""
        return block.kind == "console" or any(block.text.startswith(begin) for begin in self.others)


# In two halves, or every scanner would find it here.
EICAR = r"X5O!P%@AP[4\PZX54(P^)7CC)7}$" + "EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"

HOMES = """\
add() { useradd --user-group --no-create-home --shell /usr/sbin/nologin "$@"; }
id clamav >/dev/null 2>&1 || add --system clamav
add alice; add bob
mkdir -p /home/alice/.ssh /home/alice/notes /home/alice/private /home/bob/downloads
echo 'a private key' > /home/alice/.ssh/id_ed25519
echo 'the bridge is to be painted' > /home/alice/notes/bridge.txt
echo 'nobody knows' > /home/alice/private/diary.txt
chown -R alice:alice /home/alice
chown -R bob:bob /home/bob
touch -d '1 hour ago' /home/alice/*/*.txt
chmod -R go= /home/*
"""

SESSIONS = {
    "docs/cookbook/clamav.md": Session(
        HOMES
        + f"""\
printf %s '{EICAR}' > /home/bob/downloads/invoice.exe
chown bob:bob /home/bob/downloads/invoice.exe
chmod 600 /home/bob/downloads/invoice.exe
mkdir /var/lib/clamav
echo 44d88612fea8a8f36de82e1278abb02f:68:Eicar-Test-Signature > /var/lib/clamav/test.hdb
"""
    ),
    "docs/cookbook/backup-agent.md": Session(
        HOMES
        + """\
groupadd projects
add --system app
mkdir -p /srv/projects/bridge /var/lib/app
echo 'paint it blue.' > /srv/projects/bridge/plan.odt
echo 'so tired...' > /srv/projects/bridge/diary.odt
echo 1 > /var/lib/app/state
chown -R alice:projects /srv/projects
chown alice:alice /srv/projects/bridge/diary.odt
chmod 640 /srv/projects/bridge/plan.odt
chmod 600 /srv/projects/bridge/diary.odt
chown -R app:app /var/lib/app
chmod 600 /var/lib/app/state
"""
    ),
    "docs/cookbook/log-shipper.md": Session(
        """\
mkdir -p /var/lib/containers /var/log/nginx
echo 'GET /index.html 200' > /var/log/nginx/access.log
echo 'somebody came' > /var/log/auth.log
chmod 600 /var/log/auth.log /var/log/nginx/access.log
"""
    ),
    "docs/cookbook/tls-keys.md": Session(""),
    "docs/cookbook/indexer.md": Session(HOMES),
}

# Commands that are not run, and why. They are looked at all the same: the shell reads them, and programs of
# fdbroker's know their options.
NOT_RUN: dict[str, str] = {}
