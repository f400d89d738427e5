"""Thin Ray shells around the roles, and the cluster they run on. Nothing else of rlsys imports Ray."""
