"""What a phase starts from: the network of the phase before, with scores or masks."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.config import Part, objective_name
from robustprune_jax.data import Splits
from robustprune_jax.data.augment import to_float
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.graph.coupling import coupled_units
from robustprune_jax.graph.order import kernels_in_order
from robustprune_jax.network import with_masks
from robustprune_jax.pruning import (
    CRITERIA,
    Budget,
    Choice,
    Method,
    Rates,
    configured,
    init_scores,
    is_kernel,
    training_masks,
)
from robustprune_jax.pruning.rates import init_rates


def phase_key(seed: int, phase: str, use: str) -> jax.Array:
    """Returns the key of one use in one phase: no two of them share random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f'{phase}/{use}'.encode()))


def start_variables(
    config: ConfigDict, part: Part, source: dict, module: linen.Module, splits: Splits
) -> dict:
    """Returns the variables that a part starts from, given those of its source.

    A method's first phase takes a pretrained network and gives it scores. Where that is finetune it
    gets the masks too, and its weights are 1 / sqrt(density) times as large where
    config.pruning.rescale says so. finetune after prune takes the pruned network as it is.
    """
    method = configured(part.method, config.pruning)
    if part.phase == 'finetune' and method.learned:
        return source
    names = ('params', 'batch_stats', 'unused')
    variables = {name: source[name] for name in names if name in source}
    key, loss = phase_key(config.seed, stream(part, method), 'scores'), None
    if CRITERIA[method.criterion].needs == 'loss':
        loss = _batch_loss(config[part.phase].batch_size, key, variables, module, splits.train)
    variables['scores'] = init_scores(variables['params'], method.criterion, key, loss=loss)
    chosen = choice(config, part, module, variables['scores'], splits.train.images.shape[1:])
    if chosen.rates:
        variables |= init_rates(variables['scores'], chosen.budget, chosen.rates)
    if part.phase == 'prune':
        return variables
    if config.pruning.rescale:
        scale = np.float32(part.density**-0.5)
        kernels = flatten_dict(variables['scores'])
        variables['params'] = unflatten_dict(
            {
                path: scale * leaf if path in kernels else leaf
                for path, leaf in flatten_dict(variables['params']).items()
            }
        )
    return with_masks(variables, chosen)


def choice(
    config: ConfigDict, part: Part, module: linen.Module, scores: dict, image_shape: tuple
) -> Choice:
    """Returns how a part's masks follow from its scores (or what has their paths)."""
    method, pruning = configured(part.method, config.pruning), config.pruning
    head, coupling = None, None
    if pruning.per_class:
        order, prunable = kernels_in_order(module, image_shape), flatten_dict(scores)
        head = next((path for path in reversed(order) if path in prunable), None)
    if method.structure == 'channels':
        coupling = coupled_units(module, image_shape)
    fields = ('power', 'per_class', 'minimum', 'n', 'm', 'undivided', 'counts')
    settings = {name: pruning[name] for name in fields}
    budget = Budget(part.density, head=head, coupling=coupling, **settings)
    rates = None
    if method.allocation == 'learned':
        rates = Rates(**{name: pruning.rates[name] for name in Rates._fields})
    return Choice(budget, method.allocation, method.structure, rates, method.dynamic)


def check_masks(
    config: ConfigDict, part: Part, module: linen.Module, shapes: dict, image_shape: tuple
) -> None:
    """Raises ValueError where a part's method cannot choose masks at its density, or is to move
    them and the part is too short for it.

    shapes: of the network's variables.
    """
    kernels = {path: x for path, x in flatten_dict(shapes['params']).items() if is_kernel(path, x)}
    variables = {**shapes, 'scores': unflatten_dict(kernels)}
    chosen = choice(config, part, module, variables['scores'], image_shape)
    if chosen.rates:
        variables |= init_rates(variables['scores'], chosen.budget, chosen.rates)
    jax.eval_shape(partial(training_masks, chosen), variables)
    if part.phase == 'finetune' and chosen.dynamic:
        first, epochs = chosen.dynamic.interval / chosen.dynamic.until, config.finetune.epochs
        if epochs <= first:
            raise ValueError(
                f'config.finetune.epochs is {epochs}: the masks of {part} would not move; expected '
                f'more than {first:g}, or a lower pruning.dynamic.interval'
            )


def stream(part: Part, method: Method | None) -> str:
    """Returns the name of a part's random numbers: the same for methods that do the same, so that
    they are compared on the same batches."""
    return 'lwm' if method and not method.learned else part.phase


def _batch_loss(batch_size, key, variables, module, train):
    """The loss on one batch of training images, as a function of the parameters."""
    rows = np.asarray(jax.random.permutation(key, len(train.labels))[:batch_size])
    batch = next(eval_batches(train.images[rows], train.labels[rows], len(rows)))
    statistics = {name: value for name, value in variables.items() if name == 'batch_stats'}

    def loss(statistics, images, labels, params):
        # As the original: an untrained network's running statistics are not its images'.
        variables = {**statistics, 'params': params}
        logits, _ = module.apply(variables, images, train=True, mutable=['batch_stats'])
        return jnp.mean(cross_entropy(logits, labels))

    return Partial(loss, statistics, to_float(batch['image']), batch['label'])


def checkpoint_meta(config: ConfigDict, part: Part, method: Method | None, splits: Splits) -> dict:
    """Returns what a checkpoint says of its network, but for the steps."""
    return {
        'arch': config.arch,
        'num_classes': config.dataset.num_classes,
        'image_shape': list(splits.train.images.shape[1:]),
        **part._asdict(),
        'objective': objective_name(config, part.phase),
        'criterion': method and method.criterion,
        'allocation': method and method.allocation,
        'structure': method and method.structure,
        'seed': config.seed,
    }
