"""What the fields of a config must be: tables, read from top to bottom before anything runs."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from conversion.export import FORMATS
from robustprune_jax.attacks import ENSEMBLES, NORMS
from robustprune_jax.attacks.fmn import BALLS as BALLS_OF_FMN
from robustprune_jax.attacks.fmn import LOSSES as LOSSES_OF_FMN
from robustprune_jax.attacks.standard import BALLS
from robustprune_jax.bounds import METHODS as BOUNDS
from robustprune_jax.bounds import NORMS as BOUNDED
from robustprune_jax.config import (
    PHASES,
    TRAINED,
    default,
    fields,
    for_method,
    methods,
    names,
    objective_name,
    overrides,
    pseudo_per_batch,
    repeats,
)
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.models import MODELS, create_model
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.objectives.ramps import RAMPS
from robustprune_jax.objectives.smooth import SMOOTHINGS
from robustprune_jax.pruning import ALLOCATIONS, CRITERIA, METHODS, STRUCTURES, configured
from robustprune_jax.pruning.dynamic import GROWTHS
from robustprune_jax.pruning.perturb import SPACES
from robustprune_jax.pruning.rates import GRADIENTS
from robustprune_jax.runtime import sharding
from robustprune_jax.runtime.registry import lookup
from robustprune_jax.training.optim import OPTIMIZERS, SCHEDULES

# (field, value) -> None; raises ValueError, naming the field.
Rule = Callable[[str, Any], None]


def _require(field, value, holds, expected):
    if not holds:
        raise ValueError(f'config.{field} is {value!r}: expected {expected}')


def _must(holds: Callable[[Any], bool], expected: str) -> Rule:
    return lambda field, value: _require(field, value, holds(value), expected)


def _named(registry: Iterable[str]) -> Rule:
    return lambda field, value: lookup(dict.fromkeys(registry), value, f'config.{field}')


def _each_named(registry: Iterable[str]) -> Rule:
    """A comma-separated list."""

    def rule(field, value):
        found = names(value)
        for name in found:
            _named(registry)(field, name)
        _require(field, value, len(set(found)) == len(found), 'no name twice')

    return rule


def _is_range(value):
    first, _, last = value.partition(':')
    return not value or (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last))


def _is_number(value):
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and -float('inf') < value < float('inf')  # false for NaN


# By the type of a field's default. None, which ml_collections takes anywhere, is none of them.
TYPES: dict[type, Rule] = {
    bool: _must(lambda value: isinstance(value, bool), 'True or False'),
    int: _must(lambda value: isinstance(value, int) and _is_number(value), 'a whole number'),
    float: _must(_is_number, 'a finite number'),
    str: _must(lambda value: isinstance(value, str), 'text'),
    tuple: _must(
        lambda value: isinstance(value, tuple) and all(map(_is_number, value)),
        'a tuple of finite numbers',
    ),
}


def _architecture(field, value):
    """A name, or what can be imported."""
    if ':' not in value:
        _named(MODELS)(field, value)
        return
    try:
        create_model(value)
    except ValueError as error:
        raise ValueError(f'config.{field} is {value!r}: {error}') from None


_at_least_0 = _must(lambda value: value >= 0, 'at least 0')
_at_least_1 = _must(lambda value: value >= 1, 'at least 1')
_above_0 = _must(lambda value: value > 0, 'more than 0')
_pixels = _must(lambda value: value > 0, 'more than 0, in pixel units')
_part = _must(lambda value: 0 <= value <= 1, 'a part, in [0, 1]')
_radii = _must(lambda value: value and min(value) >= 0, 'radii of at least 0, one or more')
_below_1 = _must(lambda value: 0 <= value < 1, 'at least 0 and below 1')
_between = _must(lambda value: 0 < value < 1, 'between 0 and 1')

_PHASE_FIELDS: dict[str, Rule] = {
    'epochs': _at_least_1,
    'batch_size': _at_least_1,
    'optimizer': _named(OPTIMIZERS),
    'learning_rate': _above_0,
    'momentum': _below_1,
    'weight_decay': _at_least_0,
    'l1': _at_least_0,
    'schedule': _named(SCHEDULES),
    'milestones': _must(
        lambda value: value and value[0] > 0 and sorted(set(value)) == list(value),
        'epochs above 0, each later than the one before',
    ),
    'decay': _must(lambda value: 0 < value <= 1, 'above 0, at most 1'),
    'warmup_epochs': _at_least_0,
    'ramp_epochs': _at_least_0,
    'nrs': _at_least_0,
    'l_tight': _at_least_0,
    'l_relu': _at_least_0,
    'perturbation.gamma': _below_1,
    'perturbation.warmup_epochs': _at_least_0,
    'perturbation.space': _named(SPACES),
}

# Fields by themselves. dataset.name is looked up where its data are read.
FIELDS: dict[str, Rule] = {
    'arch': _architecture,
    'seed': _must(lambda value: 0 <= value < 2**32, 'at least 0 and below 2**32'),  # jax's keys
    'phases': _each_named(PHASES),
    'densities': _must(
        lambda value: all(0 < density <= 1 for density in value),
        'kept fractions above 0 and at most 1',
    ),
    'dataset.num_classes': _must(lambda value: value >= 2, 'at least 2'),
    'dataset.train_examples': _at_least_0,
    'dataset.validation': _at_least_0,
    'dataset.augment': _named(AUGMENTATIONS),
    'dataset.pseudo_ratio': _between,
    'dataset.image_size': _at_least_1,
    'dataset.corrupt': _named(('stop', 'skip')),
    'workers': _at_least_0,
    'batch_norm': _named(('global', 'per_device')),
    'accumulate': _at_least_1,
    'compute_dtype': _named(('float32', 'bfloat16')),
    'matmul_precision': _named(('', 'default', 'high', 'highest')),
    'objective': _named(OBJECTIVES),
    'label_smoothing': _below_1,
    'attack.eps': _pixels,
    'attack.step_size': _pixels,
    'attack.steps': _at_least_1,
    'attack.norm': _named(NORMS),
    'trades.beta': _at_least_0,
    'trades.bn_updates': _named(('clean_attacked', 'original')),
    'free.n_repeats': _at_least_1,
    'smooth.method': _named(SMOOTHINGS),
    'smooth.sigma': _pixels,
    'smooth.beta': _at_least_0,
    'smooth.eta': _at_least_0,
    'smooth.samples': _at_least_1,
    'certified.eps': _must(lambda value: 0 < value <= 1, 'above 0 and at most 1, a pixel range'),
    'certified.ramp': _named(RAMPS),
    'certified.factor_a': _above_0,
    'certified.factor_t': _above_0,
    'certified.steps': _at_least_1,
    'certified.step_size': _above_0,
    'certified.validate_by': _named(BOUNDS),
    'mtl_ibp.alpha': _part,
    'cc_ibp.alpha': _part,
    'exp_ibp.alpha': _part,
    'sabr.part': _part,
    'ibp.kappa_start': _part,
    'ibp.kappa_end': _part,
    'crown_ibp.kappa_start': _part,
    'crown_ibp.kappa_end': _part,
    'crown_ibp.final_beta': _part,
    'mixtrain.images': _at_least_1,
    'mixtrain.probability': _must(lambda value: 0 < value <= 1, 'above 0, at most 1'),
    'mixtrain.weight': _at_least_0,
    'mixtrain.memory_gb': _above_0,
    **{f'{phase}.{field}': rule for phase in TRAINED for field, rule in _PHASE_FIELDS.items()},
    'finetune.distillation': _at_least_0,
    'pretrain.epochs': _at_least_0,  # 0: the random network
    'average.decay': _below_1,
    'average.start': _below_1,
    'pruning.criterion': _named(('', *CRITERIA)),
    'pruning.allocation': _named(('', *ALLOCATIONS, 'learned')),
    'pruning.structure': _named(('', *STRUCTURES)),
    'pruning.power': _part,
    'pruning.per_class': _at_least_0,
    'pruning.minimum': _part,
    'pruning.n': _at_least_1,
    'pruning.m': _at_least_1,
    'pruning.undivided': _named(('stop', 'dense')),
    'pruning.counts': _named(('weights', 'multiply_adds')),
    'pruning.rates.learning_rate': _above_0,
    'pruning.rates.momentum': _part,
    'pruning.rates.gamma': _at_least_0,
    'pruning.rates.gradient': _named(GRADIENTS),
    'pruning.rates.start': _named(('uniform', 'erk', 'igq', 'power')),
    'pruning.dynamic.grow': _named(('', *GROWTHS)),
    'pruning.dynamic.interval': _at_least_0,
    'pruning.dynamic.fraction': _part,
    'pruning.dynamic.until': _part,
    'evaluate.checkpoint': _named(('latest', 'best', 'average')),
    'evaluate.batch_size': _at_least_1,
    'evaluate.examples': _at_least_0,
    'evaluate.attack': _named(('pgd', *ENSEMBLES)),
    'evaluate.pgd.eps': _pixels,
    'evaluate.pgd.step_size': _pixels,
    'evaluate.pgd.steps': _at_least_1,
    'evaluate.pgd.norm': _named(NORMS),
    'evaluate.pgd.restarts': _at_least_1,
    'evaluate.distances.examples': _at_least_0,
    'evaluate.distances.norm': _named(BALLS_OF_FMN),
    'evaluate.distances.steps': _at_least_1,
    'evaluate.distances.loss': _named(LOSSES_OF_FMN),
    'evaluate.distances.radii': _radii,
    'evaluate.certified.methods': _each_named((*BOUNDS, 'complete')),
    'evaluate.certified.timeout': _at_least_0,
    'evaluate.certified.memory_gb': _above_0,
    'evaluate.smooth.examples': _at_least_0,
    'evaluate.smooth.sigma': _pixels,
    'evaluate.smooth.n0': _at_least_1,
    'evaluate.smooth.n': _at_least_1,
    'evaluate.smooth.alpha': _between,
    'evaluate.smooth.batch_size': _at_least_1,
    'evaluate.smooth.radii': _radii,
    'export': _each_named(FORMATS),
    'log_every': _at_least_1,
    'validate_every': _at_least_1,
    'checkpoint_every': _at_least_1,
    'profile': _must(_is_range, "steps 'FROM:TO', such as 100:110, or ''"),
}


def _relations(config: ConfigDict) -> Iterator[tuple[str, bool, str]]:
    """Yields what must hold of fields beside others: a field, whether it does, what is expected."""
    densities = config.densities
    yield 'phases', bool(names(config.phases)), f'at least one of {", ".join(PHASES)}'
    trains_none = not methods(config) and set(names(config.phases)) & {'prune', 'finetune'}
    yield 'methods', not trains_none, f'at least one of {", ".join(METHODS)}'
    yield 'densities', len(densities) > 0, 'at least one kept fraction'
    yield 'densities', len(set(densities)) == len(densities), 'no density twice'
    for field, attack in (('attack', config.attack), ('evaluate.pgd', config.evaluate.pgd)):
        in_range = attack.norm != 'linf' or attack.eps <= 1
        yield f'{field}.eps', in_range, 'at most 1: pixels lie in [0, 1]'
    is_there = config.evaluate.checkpoint != 'average' or config.average.decay > 0
    yield 'evaluate.checkpoint', is_there, 'latest or best, where average.decay is 0'
    objectives = {objective_name(config, phase) for phase in TRAINED}
    of_bounds = bool(config.label_smoothing) and objectives & {'cc_ibp', 'sabr'}
    yield 'label_smoothing', not of_bounds, '0: cc_ibp and sabr have no cross-entropy of an image'
    free = 'free' in objectives
    yield 'attack.norm', not free or config.attack.norm == 'linf', 'linf: free has no other'
    attack = config.evaluate.attack
    enough = attack == 'pgd' or config.dataset.num_classes >= 4
    yield 'evaluate.attack', enough, f'pgd: {attack} needs at least 4 classes'
    enough = config.evaluate.distances.loss != 'dlr' or config.dataset.num_classes >= 3
    yield 'evaluate.distances.loss', enough, 'margin or ce: dlr needs at least 3 classes'
    norm, proves = config.evaluate.pgd.norm, names(config.evaluate.certified.methods)
    known = attack == 'pgd' or norm in BALLS
    yield 'evaluate.pgd.norm', known, f'{" or ".join(BALLS)}: {attack} has no other'
    last = 'complete' not in proves[:-1]
    yield 'evaluate.certified.methods', last, 'complete last: it decides what bounds leave'
    known = not proves or norm in BOUNDED
    yield 'evaluate.pgd.norm', known, f'{", ".join(BOUNDED)}: bounds have no other'
    pruning = config.pruning
    yield 'pruning.n', pruning.n <= pruning.m, 'at most pruning.m'
    chosen = [configured(method, pruning) for method in methods(config)]
    if any(method.structure == 'n_of_m' for method in chosen):
        yield 'densities', densities == (pruning.n / pruning.m,), 'n / m, alone, for n_of_m'
    whole = pruning.counts == 'weights' or all(x.structure == 'channels' for x in chosen)
    yield 'pruning.counts', whole, 'weights, unless the structure is channels'
    learned = [method for method in chosen if method.allocation == 'learned']
    alone = all(method.structure == 'weights' for method in learned)
    yield 'pruning.structure', alone, 'weights, where the allocation is learned'
    yield 'pruning.allocation', all(x.learned for x in learned), 'learned only where scores are'
    alone = all(method.structure == 'weights' for method in chosen if method.dynamic)
    yield 'pruning.structure', alone, 'weights, where masks move'
    for phase in TRAINED:
        section = config[phase]
        if not section.epochs:
            continue
        mixed = pseudo_per_batch(config, section.batch_size)
        both = not config.dataset.pseudo_labelled or 0 < mixed < section.batch_size
        yield f'{phase}.batch_size', both, 'room for labelled and for pseudo-labelled images'
        warmup, epochs = section.warmup_epochs, section.epochs
        yield f'{phase}.warmup_epochs', warmup < epochs, 'below epochs'
        yield f'{phase}.ramp_epochs', section.ramp_epochs <= epochs, 'within epochs'
        perturbation = section.perturbation
        late = bool(perturbation.gamma) and perturbation.warmup_epochs >= epochs
        yield f'{phase}.perturbation.warmup_epochs', not late, 'below epochs'
        trains = phase == 'prune' or perturbation.space == 'weights'
        yield f'{phase}.perturbation.space', trains, 'weights: scores train in prune'
        moves = section.schedule != 'original_cosine' or epochs - warmup > repeats(config, phase)
        yield (
            f'{phase}.epochs',
            moves,
            'more than 1 pass over the data after the warm-up: its formula gives rate 0',
        )


def check(config: ConfigDict) -> None:
    """Raises ValueError on a config that no run could work with: the field, and what it expects,
    or of a name that does not exist the nearest that does.
    """
    values, standard = fields(config), fields(default())
    for field in values:
        lookup(standard, field, 'config field')
    for field, usual in standard.items():
        if field not in values:
            raise ValueError(f'config.{field} is missing: start from config.default()')
        TYPES[type(usual)](field, values[field])
    _each_named(METHODS)('methods', config.methods)
    for method in overrides(config.overrides):
        lookup(METHODS, method, 'method in config.overrides')
    for method in (None, *methods(config)):
        _check_values(for_method(config, method))


def _check_values(config):
    values = fields(config)
    for field, rule in FIELDS.items():
        rule(field, values[field])
    for phase in TRAINED:
        _named(OBJECTIVES)(f'{phase}.objective', objective_name(config, phase))
    for field, holds, expected in _relations(config):
        _require(field, values[field], holds, expected)
    parts = dict.fromkeys([f'{phase}.batch_size' for phase in TRAINED], config.accumulate)
    for field in (*parts, 'evaluate.batch_size', 'evaluate.smooth.batch_size'):
        sharding.check_batch_size(values[field], f'config.{field}', parts.get(field, 1))
