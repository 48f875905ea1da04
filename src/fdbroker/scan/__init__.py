"""Scanning: files come open from the broker, a confined worker reads them, a verdict comes back."""
