"""Passes over a network's graph: each takes a graph and returns one with the same logits."""

from .compact import compact
from .fold import fold

__all__ = ['compact', 'fold']
