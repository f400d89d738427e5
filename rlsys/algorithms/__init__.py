"""Algorithms as compositions: a preset per published method, over the parts of `advantages`, `losses` and `filters`.

To add a method that the parts can express, add a YAML file here; its stem is the preset's name. A method that needs a
new rule adds one file for that rule as well. `Algorithm.from_config` builds the composition, `catalog` and `describe`
explain what there is.
"""

from rlsys.algorithms.catalog import AlgorithmInfo, PartInfo, catalog, describe, parts
from rlsys.algorithms.compose import Algorithm, Needs

__all__ = ["Algorithm", "AlgorithmInfo", "Needs", "PartInfo", "catalog", "describe", "parts"]
