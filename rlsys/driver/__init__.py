"""The driver: pure state machines (gate, buffer, router, leases) and the loops that act on what they decide."""
