"""What an objective is: a pure loss on the masked network, run inside the jitted step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from ml_collections import ConfigDict

from robustprune_jax.attacks import cross_entropy

# logits_of(images, train=False, batch_stats=None) -> logits [B, K], batch_stats
#
# A pytree (jax.tree_util.Partial) over the masked variables. In training mode the network
# normalises by the batch and returns moved statistics; in eval mode it returns them as they were.
# batch_stats: the statistics to start from, those of the step's beginning when None.
LogitsOf = Callable[..., tuple[jax.Array, Any]]


class Progress(NamedTuple):
    """Where a phase stands. ramp_epochs: over how many of its first epochs eps rises."""

    step: jax.Array
    steps_per_epoch: int
    total_steps: int
    ramp_epochs: float

    @property
    def epoch(self) -> jax.Array:
        """Fractional."""
        return self.step / self.steps_per_epoch


def as_given(logits_of: LogitsOf, batch: dict, key: jax.Array, progress: Progress) -> dict:
    """Returns the batch: an objective that attacks nothing, or has it attacked already."""
    return batch


class Objective(NamedTuple):
    """loss(logits_of, carry, batch, key, progress) -> loss, (carry, batch_stats, metrics).

    inner(logits_of, batch, key, progress) -> batch: the inner maximisation, whose result the loss
    finds in its batch, as arrays [B, ...] such as 'adversarial'. It is outside of what is
    differentiated, and made once where the loss is taken twice, at perturbed weights too.
    batch: 'image' float32 [B, H, W, C] in [0, 1] and 'label' [B]; 'noise' [B, H, W, C], standard
    normal, replaces what the objective would draw from `key`. carry: the objective's own state,
    made by init_carry(batch_shape) and checkpointed: arrays [B, ...], split over the devices like
    the batch. After the loss's gradient to the carry, which comes with that to the weights, it is
    ascend(carry, gradient). repeats: optimizer updates on each batch. metrics: scalars, averages
    over the batch.
    attack, certificate, smoothing: settings of attacks.pgd, bounds.margins or smoothing.soft_radii,
    by which validation measures the quality of a checkpoint; without any: clean accuracy.
    """

    loss: Callable[..., tuple[jax.Array, tuple[Any, Any, dict[str, jax.Array]]]]
    init_carry: Callable[[tuple[int, ...]], Any] = lambda batch_shape: ()
    ascend: Callable[[Any, Any], Any] = lambda carry, gradient: carry
    repeats: int = 1
    attack: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    smoothing: dict[str, Any] | None = None
    inner: Callable[[LogitsOf, dict, jax.Array, Progress], dict] = as_given


def eval_logits(logits_of: LogitsOf, batch_stats: Any = None) -> Partial:
    """Returns the eval-mode network, images -> logits."""
    return Partial(_eval_logits, logits_of, batch_stats)


def frozen_logits(logits_of: LogitsOf, batch_stats: Any = None) -> Partial:
    """Returns the eval-mode network, images -> logits, without a gradient to its weights.

    For attacks: stopping the gradient at the weights keeps the attack out of the loss's
    differentiation altogether.
    """
    return eval_logits(jax.lax.stop_gradient(logits_of), batch_stats)


def _eval_logits(logits_of, batch_stats, images):
    return logits_of(images, batch_stats=batch_stats)[0]


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the fraction of examples whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def normal_noise(batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Returns the batch's given noise, or standard normal noise of the images' shape."""
    if 'noise' in batch:
        return batch['noise']
    return jax.random.normal(key, batch['image'].shape, batch['image'].dtype)


def label_loss(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (logits, labels) -> [B], what objectives write as CE(f(x), y): the cross-entropy to
    labels of which config.label_smoothing is every class alike (Szegedy et al. 2016, section 7).
    """
    alpha = config.label_smoothing
    if not alpha:
        return cross_entropy

    def loss(logits, labels):
        to_all = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        return (1 - alpha) * cross_entropy(logits, labels) + alpha * to_all

    return loss


def kl_divergence(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Returns KL(softmax(target_logits) || softmax(logits)) of each example, [B]."""
    target = jax.nn.log_softmax(target_logits)
    return jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)), axis=-1)
