"""The accuracies that results hold, a column for each way of measuring."""

from typing import NamedTuple

NORMS = {'linf': 'l_inf', 'l2': 'l_2'}
TITLES = {
    'standard': 'standard attack',
    'fast': 'fast attack',
    'ibp': 'IBP',
    'crown_ibp': 'CROWN-IBP',
    'crown': 'CROWN',
    'symbolic': 'symbolic',
    'alpha_crown': 'alpha-CROWN',
    'complete': 'branch and bound',
}


class Column(NamedTuple):
    """An accuracy: its title, how it was measured, and by network name the accuracy in [0, 1] of
    each result (by its place in the list) and the number of images, where the result says it."""

    title: str
    settings: str
    values: dict[str, dict[int, float]]
    examples: dict[str, int]


def columns(results: list[dict], steps: bool = False) -> list[Column]:
    """Returns the clean accuracy and every robust one that some network of some result has."""
    found: dict[tuple, Column] = {}
    for place, result in enumerate(results):
        for network in result['networks']:
            measured = {'clean': {**network, 'accuracy': network.get('clean_accuracy')}}
            measured |= network.get('robust') or {}
            for evaluation, entry in measured.items():
                settings = _settings(entry)
                for title, accuracy in (_steps if steps else _accuracies)(evaluation, entry):
                    new = Column(title, settings, {}, {})
                    column = found.setdefault((title, settings), new)
                    column.values.setdefault(network['name'], {})[place] = accuracy
                    if entry.get('examples'):
                        column.examples[network['name']] = entry['examples']
    return list(found.values())


def above_zero(column: Column) -> bool:
    """Returns whether any network has an accuracy above 0, as none has beyond the last radius."""
    return any(accuracy for values in column.values.values() for accuracy in values.values())


def _accuracies(evaluation: str, entry: dict) -> list[tuple[str, float]]:
    """Returns (title, accuracy) of an evaluation; smoothing has one for each radius."""
    if evaluation == 'pgd':
        title = f'PGD-{entry["steps"]}' if 'steps' in entry else 'PGD'
    else:
        title = TITLES.get(evaluation, evaluation)
    if entry.get('accuracy') is not None:
        accuracies = [(title, entry['accuracy'])]
        if evaluation == 'complete' and 'undecided' in entry:
            accuracies.append((f'{title}: undecided', entry['undecided']))
        return accuracies
    if evaluation == 'distances':
        title = f'FMN-{entry["steps"]}'
        return [(f'{title} eps={eps}', x) for eps, x in entry['accuracy_at'].items()]
    certified = entry.get('certified_accuracy') or {}
    return [(f'{title} r={radius}', accuracy) for radius, accuracy in certified.items()]


def _steps(evaluation: str, entry: dict) -> list[tuple[str, float]]:
    """Returns (title, accuracy) after each attack of an ensemble, [] for other evaluations."""
    after = entry.get('after') or {}
    return [(name if name == 'clean' else f'+ {name}', after[name]) for name in after]


def _settings(entry: dict) -> str:
    """Returns an evaluation's settings in words, without the number of images."""
    restarts = entry.get('restarts')
    words = [
        NORMS.get(entry.get('norm'), entry.get('norm')),
        *(f'{key} {entry[key]:g}' for key in ('eps', 'sigma', 'alpha') if key in entry),
        f'{entry["n"]:,} samples' if 'n' in entry else None,
        f'loss {entry["loss"]}' if 'loss' in entry else None,
        restarts and f'{restarts} restart{"s" if restarts > 1 else ""}',
    ]
    return ', '.join(word for word in words if word)
