"""Trained networks: those that come with the package, and any that a run left.

    module, variables = zoo.load('digits_crown_ibp_0.1')

Beside each network lies its card, JSON in the shape of RobustBench's model_info files.
"""

import json
from pathlib import Path

from flax import linen

from conversion.from_torch import import_checkpoint
from robustprune_jax.evaluation.card import card
from robustprune_jax.models import create_model
from robustprune_jax.pruning import effective_params
from robustprune_jax.runtime.registry import lookup
from robustprune_jax.training import checkpoint

__all__ = ['card', 'cards', 'load', 'read']

FOLDER = Path(__file__).parent / 'networks'


def load(path_or_name: str | Path) -> tuple[linen.Module, dict]:
    """Returns the module and its variables (numpy arrays) of what `read` finds; weights that were
    pruned are exact zeros."""
    variables, meta = read(path_or_name)
    module = create_model(meta['arch'], meta['num_classes'])
    return module, {**variables, 'params': effective_params(variables)}


def read(path_or_name: str | Path, which: str | int = 'latest') -> tuple[dict, dict]:
    """Returns (variables, meta) of a network.

    path_or_name: the folder of a phase, a PyTorch or safetensors file, or a name of `cards`. which:
    of a folder's checkpoints, see training.checkpoint.load. meta: at least arch, num_classes,
    image_shape [H, W, C], density (None: not pruned). variables hold the masks of a network that
    was pruned, and its weights as they were saved. Raises ValueError on an unknown name, with the
    nearest one, and on a card that says no density, FileNotFoundError on a folder without a
    checkpoint.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return checkpoint.load(path, which)
    if not path.is_file():
        names = {name: FOLDER / f'{name}.safetensors' for name in cards()}
        path = lookup(names, str(path_or_name), 'network, neither a file nor in the zoo')
    card = path.with_name(path.name.removesuffix('.tar').rpartition('.')[0] + '.json')
    density = _density(card) if card.is_file() else 1
    variables, meta, _ = import_checkpoint(path, density=density if density < 1 else None)
    return variables, meta


def _density(card: Path) -> float:
    try:
        density = json.loads(card.read_text())['density']
        if 0 < density <= 1:
            return density
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{card} is no card: its field 'density' must be above 0 and at most 1")


def cards() -> dict[str, dict]:
    """Returns the cards of the networks that come with the package, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob('*.json'))}
