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
        return block.kind in {"console", "sh"} or any(block.text.startswith(begin) for begin in self.others)


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

# A broker that lets root and alice read what the pages on the command are about.
BROKER = (
    HOMES
    + """\
usermod --append --groups fdbroker-clients alice
mkdir -p /srv/upload/private /srv/demo/bob /etc/mail
echo 'a note' > /srv/upload/notes.txt
echo 'a key' > /srv/upload/key.pem
echo passphrase > /etc/mail/key.txt
echo 'a letter' | openssl enc -aes-256-cbc -pbkdf2 -pass file:/etc/mail/key.txt -out /srv/upload/m.enc
chmod 600 /etc/mail/key.txt /srv/upload/key.pem /srv/upload/notes.txt
tar -cf /home/alice/archive.tar -C /home alice/notes
truncate -s 4G /srv/demo/bob/huge.iso
chown bob:bob /srv/demo/bob/huge.iso
chmod 600 /srv/demo/bob/huge.iso
add --system scanner
cat > /etc/fdbroker/policy.yaml <<'END'
version: 1
roots:
  demo: {path: /srv/demo}
  home: {path: /home}
  mail: {path: /etc/mail}
  upload: {path: /srv/upload}
rules:
  - {name: never-keys, deny: [open, stat, list], in: demo, paths: "*/.ssh/**"}
  - name: the-scanner-reads-the-rest
    allow: [open, stat, list]
    client: {user: scanner}
    in: demo
    paths: "**"
    where: {size: {max: 2GiB}}
  - {name: home, allow: [open, stat, list], client: {user: [root, alice]}, in: home, paths: "**"}
  - {name: mail, allow: open, client: {user: alice}, in: mail, paths: key.txt}
  - name: upload
    allow: [open, stat, list]
    client: {user: [root, alice]}
    in: upload
    paths: "**"
    except: "*.pem"
audit: {to: /var/log/fdbroker/audit.jsonl}
END
fdbrokerd --daemon
"""
)

SESSIONS = {
    "docs/audit.md": Session(BROKER, ("mv /var/log", "fdbroker audit")),
    "docs/cli.md": Session(BROKER),
    "docs/fdbrokerd.md": Session(
        "userdel fdbroker; groupdel fdbroker-clients",
        ("useradd --system", "fdbrokerd --daemon", "fdbrokerd --stop"),
    ),
    "docs/metrics.md": Session(
        BROKER + "mkdir -p /var/lib/prometheus/node-exporter\n", ("fdbroker status --textfile",)
    ),
    "docs/policy-tools.md": Session(
        HOMES
        + """\
cp config/examples/malware-scanner.yaml /etc/fdbroker/policy.yaml
truncate -s 2M /home/alice/film.mkv /home/bob/photos.tar
mkdir /root/ci
cp -r config/examples/expectations config/examples/*.yaml /root/ci
cp config/examples/malware-scanner.yaml /root/ci/policy.yaml
cd /root/ci
"""
    ),
    "docs/scand.md": Session("", ("useradd --system", "install -m 644")),
    "docs/scanning.md": Session(
        BROKER
        + f"""\
rm -r /srv/upload/*
echo mine > /srv/upload/private.pem
echo clean > /srv/upload/clean
printf %s '{EICAR}' > /srv/upload/$'invoice\n.exe'
mkdir /etc/fdbroker/policy.d
cat > /etc/fdbroker/policy.d/names.yaml <<'END'
version: 1
rules:
  - {{name: names, allow: list, client: any, in: upload, paths: "**"}}
END
echo 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9 bad > /etc/bad.sha256
fdbroker reload
"""
    ),
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
NOT_RUN = {
    "fdbroker top": "it does not end",
    "fdbrokerd": "it does not end",
    "fdbrokerd --inherited 0 --audit /var/log/fdbroker/audit.jsonl": "it needs a connection",
    "fdbroker audit --follow --uid scanner --path '/home/**'": "it does not end",
    """fdbroker audit --journal --json | jq -c 'select(.event == "reloaded")'""": "there is no journal",
    "fdbroker audit verify --journal": "there is no journal",
    "pip install 'fdbroker[daemon,cli]'": "there is no network; the quick start installs the checkout",
    r"clamdscan --config-file=/dev/stdin --ping 1 <<< $'TCPSocket 3310\nTCPAddr 127.0.0.1'": (
        "there is no systemd to pass the port"
    ),
    "setpriv --reuid=fdbroker-scand --regid=fdbroker-scand --init-groups /opt/fdbroker/bin/fdbroker-scand": (
        "it does not end; tests/scan/running_scand.py starts it so"
    ),
}

# What these print depends on what others do meanwhile; a test elsewhere compares what is shown.
COMPARED_ELSEWHERE = {"fdbroker top --count 1 --sort denied": "tests/cli/test_top.py"}
