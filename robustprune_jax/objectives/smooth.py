"""Training for randomized smoothing: stability, Gaussian augmentation, adversarial, consistency."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from robustprune_jax import attacks
from robustprune_jax.objectives.objective import (
    Objective,
    accuracy,
    frozen_logits,
    kl_divergence,
    label_loss,
    normal_noise,
)
from robustprune_jax.runtime.registry import lookup
from robustprune_jax.smoothing import log_soft_vote


def _stability(config):
    """CE(f(x), y) + beta * KL(f(x) || f(x + sigma * noise)), a gradient through both sides (Li et
    al. 2019; the original's)."""
    sigma, beta, label_cost = config.smooth.sigma, config.smooth.beta, label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        clean, batch_stats = logits_of(images, train=True)
        noisy_images = images + sigma * normal_noise(batch, key)
        noisy, batch_stats = logits_of(noisy_images, train=True, batch_stats=batch_stats)
        stability = jnp.mean(kl_divergence(noisy, clean))
        metrics = {
            'accuracy': accuracy(clean, labels),
            'noisy_accuracy': accuracy(noisy, labels),
        }
        total = jnp.mean(label_cost(clean, labels)) + beta * stability
        return total, (carry, batch_stats, metrics)

    return Objective(loss)


def _gaussian(config):
    """CE(f(x + sigma * noise), y) (Cohen et al. 2019)."""
    sigma, label_cost = config.smooth.sigma, label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        noisy_images = batch['image'] + sigma * normal_noise(batch, key)
        noisy, batch_stats = logits_of(noisy_images, train=True)
        metrics = {'noisy_accuracy': accuracy(noisy, batch['label'])}
        return jnp.mean(label_cost(noisy, batch['label'])), (carry, batch_stats, metrics)

    return Objective(loss)


def _adversarial(config):
    """The mean over `samples` noises of CE(f(x_adv + sigma * noise), y): SmoothAdv (Salman et al.
    2019). x_adv, by PGD with config.attack, maximises the cross-entropy of the softmax averaged
    over the same noises.
    """
    sigma, samples, attack = config.smooth.sigma, config.smooth.samples, dict(config.attack)
    label_cost = label_loss(config)

    def drawn(images, key):
        noise_key, attack_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (samples, *images.shape), images.dtype)
        return sigma * noise, attack_key

    def inner(logits_of, batch, key, progress):
        noise, attack_key = drawn(batch['image'], key)
        vote = Partial(log_soft_vote, frozen_logits(logits_of), noise)
        adversarial = attacks.pgd(vote, attack_key, batch['image'], batch['label'], **attack)
        return {**batch, 'adversarial': adversarial}

    def loss(logits_of, carry, batch, key, progress):
        images, repeated = batch['image'], jnp.tile(batch['label'], samples)
        noise, _ = drawn(images, key)
        noisy_images = (batch['adversarial'] + noise).reshape(-1, *images.shape[1:])
        noisy, batch_stats = logits_of(noisy_images, train=True)
        metrics = {'noisy_accuracy': accuracy(noisy, repeated)}
        return jnp.mean(label_cost(noisy, repeated)), (carry, batch_stats, metrics)

    return Objective(loss, inner=inner)


def _consistency(config):
    """The mean over `samples` noises of CE(F_i, y) + beta * KL(F || F_i), plus eta * the entropy of
    F, their mean softmax: the network is to say the same, and be sure, under all noises (Jeong &
    Shin 2020; their lambda is beta).
    """
    sigma, samples = config.smooth.sigma, config.smooth.samples
    beta, eta, label_cost = config.smooth.beta, config.smooth.eta, label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        images, repeated = batch['image'], jnp.tile(batch['label'], samples)
        noise = sigma * jax.random.normal(key, (samples, *images.shape), images.dtype)
        noisy, batch_stats = logits_of((images + noise).reshape(-1, *images.shape[1:]), train=True)
        votes = jax.nn.log_softmax(noisy).reshape(samples, len(images), -1)
        mean = jax.nn.logsumexp(votes, axis=0) - jnp.log(samples)
        unlike = jnp.mean(kl_divergence(votes, mean))
        entropy = -jnp.mean(jnp.sum(jnp.exp(mean) * mean, axis=-1))
        metrics = {'noisy_accuracy': accuracy(noisy, repeated), 'entropy': entropy}
        total = jnp.mean(label_cost(noisy, repeated)) + beta * unlike + eta * entropy
        return total, (carry, batch_stats, metrics)

    return Objective(loss)


SMOOTHINGS = {
    'stability': _stability,
    'gaussian': _gaussian,
    'adversarial': _adversarial,
    'consistency': _consistency,
}


def smooth(config) -> Objective:
    """Returns the objective of config.smooth.method, in training mode and with unclipped noise.

    Reads config.smooth: method, sigma (in pixel units), beta (of stability and consistency), eta
    (of consistency), samples (noises of adversarial, which also reads config.attack, and of
    consistency). Validation estimates certified radii.
    """
    method = lookup(SMOOTHINGS, config.smooth.method, 'smoothing method')
    return method(config)._replace(smoothing={'sigma': config.smooth.sigma})
