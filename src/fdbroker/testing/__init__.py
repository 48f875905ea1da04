"""For the tests of programs that use fdbroker: a broker to talk to, without privilege or policy."""

from __future__ import annotations

from fdbroker.testing.fake_broker import FakeBroker

__all__ = ["FakeBroker"]
