"""What a phase starts from: the network of the phase before, with scores or masks."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from robustprune_jax.attacks import cross_entropy
from robustprune_jax.config import objective_name
from robustprune_jax.data import Splits
from robustprune_jax.data.augment import to_float
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.network import with_masks
from robustprune_jax.pruning.masks import init_scores, snip_scores


def phase_key(seed: int, phase: str, use: str) -> jax.Array:
    """Returns the key of one use in one phase: no two of them share random numbers."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f'{phase}/{use}'.encode()))


def start_variables(
    config: ConfigDict,
    phase: str,
    density: float | None,
    source: dict,
    module: linen.Module,
    splits: Splits,
) -> dict:
    """Returns the variables that `phase` starts from, given those of its source.

    prune and lwm take a pretrained network and give it scores (config.prune.score_init,
    config.lwm.score_init), lwm also the masks that they choose, and its weights 1 / sqrt(density)
    times as large where config.lwm.rescale says so; finetune takes a pruned network, with its
    scores and masks.
    """
    if phase == 'finetune':
        return source
    names = ('params', 'batch_stats', 'unused')
    variables = {name: source[name] for name in names if name in source}
    how, key = config[phase].score_init, phase_key(config.seed, phase, 'scores')
    if how == 'snip':
        variables['scores'] = _snip(config[phase].batch_size, key, variables, module, splits.train)
    else:
        variables['scores'] = init_scores(variables['params'], how, key)
    if phase == 'prune':
        return variables
    if config.lwm.rescale:
        scale = np.float32(density**-0.5)
        kernels = flatten_dict(variables['scores'])
        variables['params'] = unflatten_dict(
            {
                path: scale * leaf if path in kernels else leaf
                for path, leaf in flatten_dict(variables['params']).items()
            }
        )
    return with_masks(variables, density)


def _snip(batch_size, key, variables, module, train):
    """SNIP's scores, on one batch of training images."""
    rows = np.asarray(jax.random.permutation(key, len(train.labels))[:batch_size])
    batch = next(eval_batches(train.images[rows], train.labels[rows], len(rows)))

    @jax.jit
    def scores(params, images, labels):
        def loss(params):
            # As the original: an untrained network's running statistics are not its images'.
            logits, _ = module.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return jnp.mean(cross_entropy(logits, labels))

        return snip_scores(loss, params)

    return scores(variables['params'], to_float(batch['image']), batch['label'])


def checkpoint_meta(config: ConfigDict, phase: str, density: float | None, splits: Splits) -> dict:
    """Returns what a checkpoint says of its network, but for the steps."""
    return {
        'arch': config.arch,
        'num_classes': config.dataset.num_classes,
        'image_shape': list(splits.train.images.shape[1:]),
        'phase': phase,
        'density': density,
        'objective': objective_name(config, phase),
        'score_init': config[phase].get('score_init'),
        'seed': config.seed,
    }
