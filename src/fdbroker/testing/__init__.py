"""For tests: a broker to talk to, without privilege or policy, and what every scan engine must keep."""

from __future__ import annotations

from fdbroker.testing.engines import Samples, check_engine
from fdbroker.testing.fake_broker import FakeBroker

__all__ = ["FakeBroker", "Samples", "check_engine"]
