"""The recipe of docs/results.md and what it imports from its folder, as modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'configs'))

import paper
import reproduction

__all__ = ['paper', 'reproduction']
