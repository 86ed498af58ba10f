"""A network as C."""

from .program import main_program
from .source import DENSE_ABOVE, SEPARATE, Source, c_source

__all__ = ['DENSE_ABOVE', 'SEPARATE', 'Source', 'c_source', 'main_program']
