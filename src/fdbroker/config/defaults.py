"""What holds where the policy names nothing else: for its compiler and, without YAML, for the launcher."""

from __future__ import annotations

DEFAULT_USER = "fdbroker"
DEFAULT_GROUP_OF_CLIENTS = "fdbroker-clients"
PATHS = {"seqpacket": "/run/fdbroker/broker.seqpacket", "control": "/run/fdbroker/control"}
MODES = {"seqpacket": 0o660, "control": 0o666}
MAX_SOCKET_PATH = 107  # bytes: sun_path without its NUL; unix(7)
ALL_PERMISSIONS = 0o777
