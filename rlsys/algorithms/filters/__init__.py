"""Filters of whole groups, applied by the driver as soon as a group is scored: one rule per file.

A dropped group is replaced by the next prompt, so batches stay full. To add one, add a file with a dataclass that
extends `GroupFilter` and sets `name` and `paper`; its fields are its options.
"""

from __future__ import annotations

from rlsys.registry import Part
from rlsys.types import GroupInfo


class GroupFilter(Part):
    def drop_reason(self, info: GroupInfo) -> str | None:
        """Why the scored group is to be dropped, a few words for the ledger; None to keep it."""
        raise NotImplementedError
