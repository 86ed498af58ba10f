"""alpha-CROWN (Xu et al. 2021): the lower lines of undecided relus, chosen to raise each bound.

Any slope in [negative_slope, 1] is a lower line of a relu, so every choice gives a sound bound; the
best is found by gradient ascent. The bounds inside the network stay as they are.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from robustprune_jax.bounds import linear
from robustprune_jax.bounds.nodes import Array, Graph
from robustprune_jax.bounds.relu import Relu, crown_slope

RATE, DECAY = 0.1, 0.98  # of Adam


def lower_bounds(
    graph: Graph, rows: Array, bounds: linear.Bounds, ball: linear.Ball, iterations: int
) -> Array:
    """Returns lower bounds [S] of rows [S, K] of the output, each with slopes of its own.

    The slopes start at CROWN's and climb by projected Adam; each row keeps its best, so none is
    below CROWN. Differentiable in the network, the slopes held.
    """
    last = len(graph.nodes) - 1
    relus = [i for i, node in enumerate(graph.nodes) if isinstance(node, Relu)]

    def bound(alpha, ball):
        return linear.lower_bounds(graph, rows, last, bounds, ball, alpha)

    plain = partial(bound, ball=ball.replace(sound=False))

    def ascend(carry, _):
        alpha, state, best, best_alpha = carry
        (_, lower), gradient = jax.value_and_grad(_total(plain), has_aux=True)(alpha)
        better = lower > best
        best_alpha = {
            i: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, best_alpha[i])
            for i, a in alpha.items()
        }
        updates, state = adam.update(gradient, state)
        alpha = {
            i: jnp.clip(a + updates[i], graph.nodes[i].negative_slope, 1) for i, a in alpha.items()
        }
        return (alpha, state, jnp.maximum(lower, best), best_alpha), None

    adam = optax.adam(optax.exponential_decay(-RATE, 1, DECAY))
    start = {i: _start(graph.nodes[i], bounds, len(rows)) for i in relus}
    worst = jnp.full(len(rows), -jnp.inf, rows.dtype)
    carry = (start, adam.init(start), worst, start)
    (_, _, _, best_alpha), _ = jax.lax.scan(ascend, carry, length=iterations + 1)
    return bound(jax.lax.stop_gradient(best_alpha), ball)


def _total(bound):
    """The sum of the rows' bounds: each row's gradient is that of its own bound."""

    def total(alpha):
        lower = bound(alpha)
        return jnp.sum(lower), lower

    return total


def _start(node, bounds, rows):
    """CROWN's slopes, for every row."""
    _, _, below = node.lines(*bounds[node.inputs[0]], crown_slope)
    return jnp.broadcast_to(below, (rows, *below.shape))
