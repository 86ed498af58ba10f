"""Words that change a config: a config file's argument, and what one method has to itself."""

import ast
from collections.abc import Callable

from ml_collections import ConfigDict

from robustprune_jax.config.parts import TRAINED
from robustprune_jax.config.schema import fields, names, repeats
from robustprune_jax.runtime.registry import lookup

# The sections that `overrides` may set for one method.
OWN = ('prune.', 'finetune.', 'pruning.')


def smoke(config: ConfigDict) -> None:
    """Shrinks any config, in place, to a run of seconds that exercises every part."""
    config.dataset.train_examples = 256
    config.dataset.validation = 64
    config.evaluate.examples = 64
    config.evaluate.batch_size = 64
    config.evaluate.smooth.examples = min(config.evaluate.smooth.examples, 8)
    config.evaluate.smooth.n = 200
    config.evaluate.distances.examples = min(config.evaluate.distances.examples, 8)
    for steps in (config.attack, config.evaluate.pgd, config.evaluate.distances):
        steps.steps = 2
    for phase in TRAINED:
        section = config[phase]
        section.update(
            epochs=min(section.epochs, 2 * repeats(config, phase)),  # two passes over the data
            batch_size=64,
            warmup_epochs=0.0,
            ramp_epochs=min(section.ramp_epochs, 1.0),
        )
        section.perturbation.warmup_epochs = min(section.perturbation.warmup_epochs, 1.0)
    config.pruning.dynamic.interval = 0.5
    own = names(config.overrides)
    config.overrides = ','.join(word for word in own if '.pruning.' in word)


def with_argument(
    config: ConfigDict, arg: str, variants: dict[str, Callable[[ConfigDict], None]] | None = None
) -> ConfigDict:
    """Returns `config` changed, in place, by a config file's argument string.

    arg: comma-separated; `smoke` or a name of `variants` changes the config as that function does,
    `density=0.01` sets the one density, `FIELD=VALUE` any other field (`prune.epochs=5`). Wherever
    they stand, single fields correct variants, and `smoke` shrinks what all of them have made.
    METHOD.FIELD=VALUE is added to `overrides`.
    Raises ValueError on an unknown word, with the nearest name.
    """
    variants = {'smoke': smoke, **(variants or {})}
    words = [word for word in arg.split(',') if word]
    singles = [word for word in words if '=' in word]
    chosen = [word for word in words if '=' not in word and word != 'smoke']
    # smoke reads what single fields set, and they correct it.
    last = ['smoke', *singles] if 'smoke' in words else []
    for word in (*chosen, *singles, *last):
        if '=' in word:
            _set(config, *word.split('=', 1))
        else:
            lookup(variants, word, 'config variant')(config)
    return config


def _set(config, field, text):
    if field == 'density':
        field, text = 'densities', f'({text},)'
    if field.partition('.')[0] in names(config.methods):
        field, text = 'overrides', ','.join([*names(config.overrides), f'{field}={text}'])
    old = lookup(fields(config), field, 'config field')
    value = text if isinstance(old, str) else _literal(field, text, old)
    config.update_from_flattened_dict({field: value})


def _literal(field, text, old):
    try:
        value = float(text) if isinstance(old, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if type(value) is not type(old):
        raise ValueError(f'{field}={text}: expected {type(old).__name__}, such as {old!r}')
    return value


def overrides(text: str) -> dict[str, dict[str, str]]:
    """Returns {method: {field: value}} of a config's `overrides`.

    Raises ValueError on a word that is not METHOD.FIELD=VALUE.
    """
    found: dict[str, dict[str, str]] = {}
    for word in names(text):
        method, dot, assignment = word.partition('.')
        field, equals, value = assignment.partition('=')
        if not (dot and equals):
            raise ValueError(
                f'config.overrides is {text!r}: expected METHOD.FIELD=VALUE, comma-separated'
            )
        found.setdefault(method, {})[field] = value
    return found


def for_method(config: ConfigDict, method: str | None) -> ConfigDict:
    """Returns the config that a method's phases have: a copy, with its `overrides` in it.

    Raises ValueError on one whose field is none of prune, finetune and pruning.
    """
    config = config.copy_and_resolve_references()
    own = {field: None for field in fields(config) if field.startswith(OWN)}
    for field, value in overrides(config.overrides).get(method, {}).items():
        lookup(own, field, 'field in config.overrides')
        _set(config, field, value)
    return config
