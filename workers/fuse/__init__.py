"""Fusion: several adapters of one base become one, in factor space, from files alone and without the base.

The way through: `normal` brings adapters to one form, module by module; a rule from the table in `rules`
fuses the shares of one module; `fusion` runs the plan and writes the folder; `report` says what was lost.
A new rule is one small file and one line in the table.
"""

from workers.fuse.fusion import fuse, fuse_folders
from workers.fuse.rules import RULES

__all__ = ["RULES", "fuse", "fuse_folders"]
