"""The parts of a run: where each lies in the workdir, and what its network is called."""

from pathlib import PurePosixPath
from typing import NamedTuple

# In the order in which they follow each other; prune only where a method learns its mask.
TRAINED = ('pretrain', 'prune', 'finetune')
PHASES = (*TRAINED, 'evaluate')


class Part(NamedTuple):
    """One phase of training: pretrain, or prune or finetune of a method at a density."""

    phase: str
    method: str | None = None
    density: float | None = None

    @property
    def folder(self) -> str:
        """Its folder in the workdir, such as 'density_0.1/hydra/prune'."""
        if self.method is None:
            return self.phase
        return f'density_{exact(self.density)}/{self.method}/{self.phase}'

    @property
    def network(self) -> str:
        """The name of the network that it ends with, such as 'hydra_0.1'."""
        if self.method is None:
            return self.phase
        return f'{self.method}_{exact(self.density)}' + '_pruned' * (self.phase == 'prune')

    def __str__(self) -> str:
        if self.method is None:
            return self.phase
        return f'{self.method} {exact(self.density)} {self.phase}'

    @classmethod
    def at(cls, folder: str) -> 'Part':
        """Returns the part whose folder that is; raises ValueError where it is none's."""
        names = PurePosixPath(folder).parts
        if names == ('pretrain',):
            return cls('pretrain')
        if len(names) != 3 or not names[0].startswith('density_') or names[2] not in TRAINED[1:]:
            raise ValueError(f'{folder} is no folder of a phase')
        return cls(names[2], names[1], float(names[0].removeprefix('density_')))


def exact(density: float) -> str:
    """Returns a density as names spell it: in few digits where those are the whole number."""
    return f'{density:g}' if float(f'{density:g}') == density else repr(density)
