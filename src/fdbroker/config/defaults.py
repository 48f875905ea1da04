"""What holds where the policy names nothing else: for its compiler and, without YAML, for the launcher."""

from __future__ import annotations

from typing import Final

DEFAULT_USER = "fdbroker"
DEFAULT_GROUP_OF_CLIENTS = "fdbroker-clients"
# How root adds a user whom something runs as and who does nothing else.
ADD_USER = "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin"
DIRECTORY = "/run/fdbroker"
PATHS = {
    "seqpacket": f"{DIRECTORY}/broker.seqpacket",
    "stream": f"{DIRECTORY}/broker.stream",
    "dgram": f"{DIRECTORY}/broker.dgram",
    "control": f"{DIRECTORY}/control",
}
# What the unit of systemd starts the broker with: compiled by root before each start.
COMPILED_POLICY = f"{DIRECTORY}/policy.json"
MODES = {"seqpacket": 0o660, "stream": 0o660, "dgram": 0o660, "control": 0o666}
SERVICE_MODE = 0o666  # whoever may connect to a service; what is then done for whom the policy says
SERVICE_KIND: Final = "stream"  # what its clients connect to, unless the policy says another type
# By which requests come; what a socket's name says of its type.
FOR_REQUESTS = ("seqpacket", "stream", "dgram")
# What systemd calls sockets that have no FileDescriptorName=, or were stored or accepted; sd_listen_fds(3).
NAMES_OF_SYSTEMD = frozenset({"connection", "stored", "unknown"})
MAX_SOCKET_PATH = 107  # bytes: sun_path without its NUL; unix(7)
ALL_PERMISSIONS = 0o777

# Exit statuses of checking and compiling.
EXIT_OK, EXIT_WARNED, EXIT_REFUSED = 0, 1, 2
