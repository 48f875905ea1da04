"""The `fdbroker` command."""
