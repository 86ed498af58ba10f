"""The programs of every backend, on CPU: what is computed how exactly, and how often compiled."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from robustprune_jax.attacks import pgd, standard
from robustprune_jax.bounds import METHODS, margins
from robustprune_jax.evaluation.predictions import predictions
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.runtime import compiler
from robustprune_jax.smoothing import certify, predict, soft_radii

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
LABELS = np.arange(4) % 3


@pytest.fixture(scope='module')
def network():
    module = create_model('mnist_model', 3)
    return logits_fn(module, jax.jit(module.init)(jax.random.key(1), IMAGES))


def products(jaxpr):
    """The precision of every dot and convolution of a program and those nested in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
            yield eqn.params['precision']
        for param in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(param, 'eqns'):
                yield from products(param)


def asked_precisions(run, network):
    """The default precision at every trace of the network that `run` makes."""
    seen = set()

    def asked(images):
        seen.add(jax.config.jax_default_matmul_precision)
        return network(images)

    run(asked)
    return seen


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_every_product_of_a_proof_is_float32_s(network, method, platform):
    """Else a recent GPU would prove in TF32 and a TPU in bfloat16, off by 1e-3."""
    with compiler.platform(platform), jax.default_matmul_precision('bfloat16'):
        program = jax.make_jaxpr(
            lambda images: margins(network, images, LABELS, eps=0.1, method=method)
        )(IMAGES)
    found = set(products(program.jaxpr))
    assert found == {(jax.lax.Precision.HIGHEST,) * 2}


def test_every_product_of_an_evaluation_is_float32_s(network):
    attack = {'eps': 0.1, 'step_size': 0.1, 'steps': 1}
    pixels = (IMAGES * 255).astype(np.uint8)
    for settings in (None, attack):
        program = jax.make_jaxpr(lambda x, a=settings: predictions(network, KEY, x, LABELS, a))
        found = set(products(program(pixels).jaxpr))
        assert found == {(jax.lax.Precision.HIGHEST,) * 2}
    noise = {'sigma': 0.1, 'batch_size': 8, 'num_classes': 3, 'n': 8}
    for run in (
        lambda f: certify(f, KEY, IMAGES, n0=8, **noise),
        lambda f: predict(f, KEY, IMAGES, **noise),
        lambda f: soft_radii(f, KEY, IMAGES, LABELS, sigma=0.1, samples=1),
        lambda f: standard(f, KEY, IMAGES, LABELS, eps=0.1, attacks=('apgd-ce',)),
    ):
        assert asked_precisions(lambda f, run=run: run(Partial(f)), network) == {'highest'}


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_an_attack_outside_jit_compiles_once_per_shape(network, platform, caplog):
    """A new lambda in every call made GPUs and TPUs compile for every batch."""

    def compiled(key, images):
        caplog.clear()
        with compiler.platform(platform), jax.log_compiles():
            pgd(network, key, images, LABELS[: len(images)], eps=0.1, step_size=0.01, steps=3)
        return [r.message for r in caplog.records if 'Compiling' in r.getMessage()]

    caplog.set_level(logging.WARNING, 'jax')
    first, again, other = (
        compiled(jax.random.key(i), images)
        for i, images in enumerate((IMAGES, IMAGES + 0 * 1, IMAGES[:2]))
    )
    assert first and other and not again


def test_the_looped_attacks_of_gpus_find_what_the_unrolled_ones_do(network):
    labels = np.asarray(jnp.argmax(network(IMAGES), -1))

    def attacked():
        settings = {'eps': 0.1, 'step_size': 0.03, 'steps': 5, 'restarts': 2}
        found, accuracy = standard(network, KEY, IMAGES, labels, eps=0.1, attacks=('apgd-ce',))
        return pgd(network, KEY, IMAGES, labels, **settings), found, accuracy

    unrolled = attacked()
    with compiler.platform('gpu'):
        looped = attacked()
    for one, other in zip(unrolled[:2], looped[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert unrolled[2] == looped[2]


@pytest.mark.parametrize('method', ['crown', 'symbolic'])
def test_bounds_of_all_images_at_once_are_those_of_one_by_one(network, method):
    one_by_one = margins(network, IMAGES, LABELS, eps=0.05, method=method)
    with compiler.platform('gpu'):
        together = margins(network, IMAGES, LABELS, eps=0.05, method=method)
    np.testing.assert_allclose(one_by_one, together, rtol=1e-4, atol=1e-5)


def test_an_attack_evaluates_each_image_as_often_as_it_has_steps():
    """Groups of steps made 105 evaluations of 101; the first is of the start."""
    evaluated = []

    def count(images):
        jax.debug.callback(lambda: evaluated.append(1))
        return jnp.stack([images.sum((1, 2, 3)) + 100, jnp.zeros(len(images))], 1)

    standard(count, KEY, IMAGES, 0 * LABELS, eps=0.1, attacks=())
    before = len(evaluated)
    standard(count, KEY, IMAGES, 0 * LABELS, eps=0.1, attacks=('apgd-ce',))
    looked_for_zero_gradients = 1
    assert len(evaluated) - 2 * before - looked_for_zero_gradients == 101


def test_an_option_that_xla_does_not_know_ends_no_run(monkeypatch):
    known = compiler.options()
    monkeypatch.setitem(compiler.CPU_OPTIONS, 'xla_cpu_of_another_version', 'true')
    assert compiler.options() == known
    assert compiler.jit(lambda x: x + 1)(1) == 2
