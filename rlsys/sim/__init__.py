"""Roles that only take time and honour the same protocols, kills and weight updates included; see `rlsys.sim.drive`."""
