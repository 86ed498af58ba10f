"""Runs of version 0.1, which told methods apart by names only, in today's shape."""

from pathlib import PurePosixPath

from robustprune_jax.config.parts import Part, exact

# what the name of a network began with -> its method, phase and title
KINDS = {
    'pretrain': (None, 'pretrain', 'pretrained'),
    'pruned': ('hydra', 'prune', 'HYDRA'),
    'hydra': ('hydra', 'finetune', 'HYDRA'),
    'lwm': ('lwm', 'finetune', 'LWM'),
    'snip': ('snip', 'finetune', 'SNIP'),
    'random': ('random', 'finetune', 'random mask'),
}
# config.lwm.score_init -> the method of the phase lwm; any other was a random mask
BASELINES = {'scaled': 'lwm', 'snip': 'snip'}


class EarlierPart(Part):
    """A part of a run of 0.1: equal to today's, but in another folder, with another name."""

    @property
    def folder(self) -> str:
        return f'density_{exact(self.density)}/{self.phase if self.method == "hydra" else "lwm"}'

    @property
    def network(self) -> str:
        kind = 'pruned' if self.phase == 'prune' else self.method
        return f'{kind}_{exact(self.density)}'


def config(saved: dict) -> dict:
    """Returns what config.json holds, with what 0.1 did where today's defaults are others."""
    return {'pruning': {'per_class': 0, 'minimum': 0.0}, **saved}


def part(recipe: dict | None, folder: str) -> Part:
    """Returns the part after pretraining whose folder, such as 'density_0.1/lwm', that is; raises
    ValueError where it is none's. recipe: with the section lwm, which says what lwm stood for."""
    density, phase = PurePosixPath(folder).parts
    if phase not in ('prune', 'finetune', 'lwm'):
        raise ValueError(f'{folder} is no folder of a phase')
    density = float(density.removeprefix('density_'))
    if phase != 'lwm':
        return EarlierPart(phase, 'hydra', density)
    scores = (recipe or {}).get('lwm', {}).get('score_init', 'scaled')
    return EarlierPart('finetune', BASELINES.get(scores, 'random'), density)


def entry(network: dict) -> dict:
    """Returns an entry of result.json with method, phase and title; today's as it is."""
    if 'phase' in network:
        return network
    named = KINDS[network['name'].partition('_')[0]]
    return network | dict(zip(('method', 'phase', 'title'), named, strict=True))
