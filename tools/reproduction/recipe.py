"""The recipes of docs/results.md and what they import from their folder, as modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'configs'))

import budgets
import paper
import reproduction

__all__ = ['budgets', 'paper', 'reproduction']
