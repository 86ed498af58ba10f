"""CROWN-IBP (Zhang et al. 2020), with loss fusion (Xu et al. 2020)."""

import jax
import jax.numpy as jnp

from robustprune_jax.bounds import label_spec, linear, problem
from robustprune_jax.bounds.relu import crown_slope
from robustprune_jax.objectives.objective import Objective, accuracy, eval_logits, label_loss
from robustprune_jax.objectives.ramps import between, fraction


def crown_ibp(config) -> Objective:
    """Returns the objective kappa * CE(f(x), y) + (1 - kappa) * worst-case CE.

    The worst case mixes CROWN-IBP with interval bounds by beta, which goes from 1 to final_beta as
    eps rises, so that early training has the tighter bounds and late training the cheaper ones.
    With loss_fusion one backward pass bounds the cross-entropy itself (an upper bound of each
    exponential by its chord); without, there is one pass per class and CE is of the mixed margins,
    as in the original. Bounds are in eval mode, clipped to [0, 1].

    Reads config.certified (eps, ramp) and config.crown_ibp: kappa_start, kappa_end, final_beta,
    loss_fusion.
    """
    eps, ramp, settings = config.certified.eps, config.certified.ramp, dict(config.crown_ibp)
    label_cost = label_loss(config)

    def loss(logits_of, carry, batch, key, progress):
        images, labels = batch['image'], batch['label']
        risen = fraction(ramp, progress)
        kappa = between(settings['kappa_start'], settings['kappa_end'], risen)
        beta = 1 - risen * (1 - settings['final_beta'])
        if not progress.ramp_epochs and not settings['final_beta']:
            beta = None  # known to be 0: intervals only, and no CROWN in the program
        clean, batch_stats = logits_of(images, train=True)
        network = eval_logits(logits_of)
        robust, is_verified = jax.vmap(
            lambda x, y: worst_case_loss(
                network, x, y, risen * eps, beta, clean.shape[-1], settings['loss_fusion']
            )
        )(images, labels)
        metrics = {
            'accuracy': accuracy(clean, labels),
            'verified_accuracy': jnp.mean(is_verified),
            'eps': risen * eps,
        }
        total = jnp.mean(robust)
        if settings['kappa_start'] or settings['kappa_end']:  # otherwise no clean gradient either
            total = kappa * jnp.mean(label_cost(clean, labels)) + (1 - kappa) * total
        return total, (carry, batch_stats, metrics)

    return Objective(loss, certificate={'method': 'ibp', 'eps': eps})


def worst_case_loss(network, image, label, eps, beta, num_classes, loss_fusion):
    """Returns an upper bound of one image's cross-entropy, and whether intervals verify it.

    beta: the part of CROWN-IBP in it, in [0, 1]; None: 0.
    """
    graph, ball = problem(network, image, eps)
    bounds, last = linear.intervals(graph, ball), len(graph.nodes) - 1
    spec = label_spec(label, num_classes, num_classes)

    def crown(rows):
        return linear.lower_bounds(graph, rows, last, bounds, ball, crown_slope)

    lower = linear.lower_bounds(graph, spec, last, bounds, ball, None)
    by_intervals, is_verified = _cross_entropy(lower), jnp.all(lower > 0)
    if beta is None:
        return by_intervals, is_verified

    def mixed():
        if not loss_fusion:
            return _cross_entropy(beta * crown(spec) + (1 - beta) * lower)
        upper = -linear.lower_bounds(graph, -spec, last, bounds, ball, None)
        return beta * _fused_cross_entropy(crown, spec, lower, upper) + (1 - beta) * by_intervals

    return jax.lax.cond(beta > 0, mixed, lambda: by_intervals), is_verified


def _cross_entropy(margins):
    """Of the worst case, from the margins [K - 1] to the other classes."""
    return jax.nn.logsumexp(jnp.append(-margins, 0.0))


def _fused_cross_entropy(crown, spec, lower, upper):
    """CE = log(1 + sum_j exp(-margin_j)); below the chord over [lower, upper] each exponential is
    a linear function of the margin, and so is their sum: one row."""
    least, most = -upper, -lower
    shift = jnp.maximum(jnp.max(most), 0)
    width = most - least
    is_wide = width > 1e-3
    top = jnp.exp(most - shift)
    # The chord's slope is top * (1 - exp(-width)) / width, and the line less steep when narrow.
    wide = -jnp.expm1(-width) / jnp.where(is_wide, width, 1)
    slope = top * jnp.where(is_wide, wide, 1 - width / 2)
    intercept = jnp.sum(top - slope * most)
    exponentials = intercept - crown((slope @ spec)[None])[0]
    # Rounding must not bring the sum, which is positive, to 0.
    return jnp.log(jnp.exp(-shift) + jnp.maximum(exponentials, 1e-6)) + shift
