"""How good a network is while it trains, on images held out of training."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax.bounds import margins, verified
from robustprune_jax.data import Splits
from robustprune_jax.data.augment import to_float
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.evaluation.predictions import predictions
from robustprune_jax.objectives import Objective
from robustprune_jax.runtime import distributed, sharding
from robustprune_jax.smoothing import soft_radii


def validate(
    config: ConfigDict,
    objective: Objective,
    network: Partial,
    key: jax.Array,
    splits: Splits,
    mesh: Mesh,
) -> dict[str, float]:
    """Returns means over splits.validation: of right predictions, and of what `objective` trains
    for, the harder last.

    network: images -> logits. key: each batch has one of its own.
    """

    def is_right(attack, key, images, labels):
        return predictions(network, key, images, labels, attack) == labels

    def is_verified(key, images, labels):
        return verified(margins(network, to_float(images), labels, **objective.certificate))

    def radii(key, images, labels):
        return soft_radii(network, key, to_float(images), labels, **objective.smoothing)

    measures = {'validation_accuracy': partial(is_right, None)}
    if objective.attack:
        measures['validation_robust_accuracy'] = partial(is_right, objective.attack)
    if objective.certificate:
        measures['validation_verified_accuracy'] = is_verified
    if objective.smoothing:
        measures['validation_radius'] = radii

    totals = dict.fromkeys(measures, 0.0)
    for number, batch in enumerate(eval_batches(*splits.validation, config.evaluate.batch_size)):
        placed = sharding.put(batch, sharding.sharded(mesh))
        batch_key = jax.random.fold_in(key, number)
        for metric, measure in measures.items():
            values = distributed.gather(measure(batch_key, placed['image'], placed['label']))
            totals[metric] += np.sum(values[batch['mask']])
    count = len(splits.validation.labels)
    return {metric: float(total / count) for metric, total in totals.items()}
