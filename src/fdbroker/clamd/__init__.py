"""clamd's protocol, for clients of ClamAV that know no other, and what is needed to leave clamd.

Runs without privilege, in the scan service.
"""
