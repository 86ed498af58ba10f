import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import pgd

SHAPE = (16, 6, 6, 2)
WEIGHTS = jax.random.normal(jax.random.key(0), (72, 3))
IMAGES = jax.random.uniform(jax.random.key(1), SHAPE, minval=0.3, maxval=0.7)
LABELS = jnp.arange(16) % 2  # of the linear network below: classes 0 and 1 of two
DIRECTION = WEIGHTS[:, 0] - WEIGHTS[:, 1]


def linear(weights, images):
    """Two classes whose margin is linear: the strongest attack is known."""
    return images.reshape(len(images), -1) @ weights[:, :2]


def deep(weights, images):
    return jnp.tanh(3 * images.reshape(len(images), -1) @ weights)


def away_from_label(labels):
    sign = jnp.where(labels == 0, -1, 1)
    return sign[:, None] * DIRECTION[None]


def test_linf_reaches_the_optimum_of_a_linear_network():
    adversarial = pgd(
        Partial(linear, WEIGHTS),
        jax.random.key(2),
        IMAGES,
        LABELS,
        eps=0.1,
        step_size=0.03,
        steps=10,
    )
    best = IMAGES + 0.1 * jnp.sign(away_from_label(LABELS)).reshape(SHAPE)
    np.testing.assert_allclose(adversarial, best, atol=1e-6)


def test_l2_reaches_the_optimum_of_a_linear_network():
    adversarial = pgd(
        Partial(linear, WEIGHTS),
        jax.random.key(2),
        IMAGES,
        LABELS,
        eps=0.5,
        step_size=0.2,
        steps=40,
        norm='l2',
    )
    direction = away_from_label(LABELS)
    direction /= jnp.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(adversarial, IMAGES + 0.5 * direction.reshape(SHAPE), atol=1e-3)


@pytest.mark.parametrize(('norm', 'eps'), [('linf', 0.4), ('l2', 2.0)])
@pytest.mark.parametrize('steps', [0, 5])
def test_stays_in_the_ball_and_the_box(norm, eps, steps):
    images = jnp.round(IMAGES)  # on the corners of the box
    adversarial = pgd(
        Partial(deep, WEIGHTS),
        jax.random.key(3),
        images,
        LABELS,
        eps=eps,
        step_size=eps / 3,
        steps=steps,
        norm=norm,
        restarts=2,
    )
    delta = np.asarray(adversarial - images).reshape(len(images), -1)
    size = np.abs(delta).max(axis=1) if norm == 'linf' else np.linalg.norm(delta, axis=1)
    assert size.max() <= eps + 1e-6
    assert size.min() > 0
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_a_restart_never_weakens_the_attack():
    network = Partial(deep, WEIGHTS)
    labels = jnp.argmax(network(IMAGES), axis=-1)

    def robust(restarts):
        adversarial = pgd(
            network,
            jax.random.key(4),
            IMAGES,
            labels,
            eps=0.06,
            step_size=0.03,
            steps=2,
            restarts=restarts,
        )
        return np.asarray(jnp.argmax(network(adversarial), axis=-1) == labels)

    one, five = robust(1), robust(5)
    assert one.sum() > 0
    assert not np.any(five & ~one)  # what one restart breaks stays broken


def test_start_and_loss_can_be_given():
    """Without steps the start comes back; a loss for a target class is ascended."""
    network = Partial(deep, WEIGHTS)
    settings = {'eps': 0.3, 'step_size': 0.1}
    start = IMAGES + 0.05
    same = pgd(network, jax.random.key(0), IMAGES, LABELS, start=start, steps=0, **settings)
    np.testing.assert_array_equal(same, start)
    targeted = pgd(
        network,
        jax.random.key(0),
        IMAGES,
        LABELS,
        steps=10,
        loss=lambda logits, labels: logits[:, 2],
        **settings,
    )
    assert jnp.all(network(targeted)[:, 2] >= network(IMAGES)[:, 2])


def test_new_weights_do_not_retrace():
    traces = []

    def network(weights, images):
        traces.append(1)
        return linear(weights, images)

    def attack(scale):
        settings = {'eps': 0.1, 'step_size': 0.1, 'steps': 3}
        pgd(Partial(network, scale * WEIGHTS), jax.random.key(0), IMAGES, LABELS, **settings)
        return len(traces)

    assert attack(1.0) == attack(2.0)


def test_bad_names_are_refused():
    settings = {'eps': 0.1, 'step_size': 0.1, 'steps': 1}
    for wrong, nearest in (({'norm': 'linfty'}, 'linf'), ({'loss': 'cee'}, 'ce')):
        with pytest.raises(ValueError, match=f'unknown .*did you mean {nearest!r}'):
            pgd(Partial(linear, WEIGHTS), jax.random.key(0), IMAGES, LABELS, **settings, **wrong)
