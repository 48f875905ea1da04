"""The scan service fdbroker-scand: its clients come by the broker, and so do their files."""
