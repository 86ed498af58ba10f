"""A network as C."""

from .source import c_source, main_program

__all__ = ['c_source', 'main_program']
