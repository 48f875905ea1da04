"""What runs before the broker and is gone by execve: sockets, mount view, ids, capabilities, filter."""
