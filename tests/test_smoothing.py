"""Certificates by randomized smoothing, and training for them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.stats import binomtest, norm

from robustprune_jax import pipeline
from robustprune_jax.config import default
from robustprune_jax.objectives import OBJECTIVES, Progress
from robustprune_jax.runtime.files import read_jsonl
from robustprune_jax.smoothing import (
    ABSTAIN,
    _until_decided,
    anytime_bound,
    anytime_evidence,
    certify,
    certify_anytime,
    log_soft_vote,
    lower_confidence_bound,
    predict,
    soft_radii,
)

SIGMA = 0.5
WEIGHTS = jax.random.normal(jax.random.key(0), (12,))
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (200, 2, 2, 3)))
# The two classes of a linear network are split by a plane at known distances from the images.
DISTANCES = (IMAGES.reshape(200, -1) - 0.5) @ np.asarray(WEIGHTS) / np.linalg.norm(WEIGHTS)


def _linear(weights, images):
    margin = (images - 0.5).reshape(len(images), -1) @ weights
    return jnp.stack([margin, -margin], axis=1)


LINEAR = Partial(_linear, WEIGHTS)


def test_confidence_bounds_are_scipys():
    for k, n, alpha in ((0, 100, 0.001), (60, 100, 0.001), (99_990, 100_000, 0.01), (7, 7, 0.05)):
        exact = binomtest(k, n, alternative='greater').proportion_ci(1 - alpha, 'exact').low
        assert lower_confidence_bound(np.array([k]), n, alpha)[0] == pytest.approx(exact, abs=1e-12)


def test_radii_of_a_linear_network():
    """Its exact radius is the distance to the plane: certified radii stay below, and come near."""
    n, alpha = 2_000, 0.01
    labels, radii = certify(
        LINEAR, jax.random.key(2), IMAGES, sigma=SIGMA, n0=50, n=n, alpha=alpha,
        batch_size=4096, num_classes=2,
    )  # fmt: skip
    exact = np.abs(DISTANCES)
    certain = labels != ABSTAIN
    right = labels == (DISTANCES < 0)
    above = (radii > exact) | (certain & ~right)
    # At most alpha of them on average; 8 of 200 has a chance below 1 in 1,000.
    assert above.sum() < 8
    assert (radii[~certain] == 0).all()
    # What a count at its expectation, less four standard deviations, would certify.
    p = norm.cdf(exact / SIGMA)
    few = np.floor(n * p - 4 * np.sqrt(n * p * (1 - p)) - 1)
    least = SIGMA * norm.ppf(np.maximum(lower_confidence_bound(few, n, alpha), 0.5))
    assert (radii >= least - 1e-9)[right].all()


def test_counts_do_not_depend_on_how_images_are_batched():
    def radii(images, batch_size, first=0):
        return certify(
            LINEAR, jax.random.key(3), images, sigma=SIGMA, n0=10, n=90,
            batch_size=batch_size, num_classes=2, first=first,
        )[1]  # fmt: skip

    together = radii(IMAGES[:5], 64)
    np.testing.assert_array_equal(together, radii(IMAGES[:5], 1000))
    np.testing.assert_array_equal(together[3:], radii(IMAGES[3:5], 32, first=3))


def test_anytime_bounds_hold_at_every_number_of_draws():
    """Twice 10,000 sequences of 400 draws: the bound ever exceeds p in at most alpha of them. One
    for a fixed number of draws, looked at as often, does in more."""
    alpha, draws = 0.05, np.arange(1, 401)
    rng = np.random.default_rng(0)
    for p in (0.55, 0.9):
        hits = np.cumsum(rng.random((10_000, 400)) < p, axis=1)
        above = (anytime_evidence(p, hits, draws) >= -np.log(alpha)) & (hits > p * draws)
        wrong = above.any(axis=1)
        assert alpha / 50 < wrong.mean() <= alpha
        # Where there is evidence, and only there, the bound is above p.
        some = hits[:50, 19::20], draws[19::20]
        bound = anytime_bound(*some, alpha)
        np.testing.assert_array_equal(bound > p, above[:50, 19::20])
        assert (bound < some[0] / some[1]).all()
    fixed = lower_confidence_bound(hits[:2_000, 19::20], draws[19::20], alpha)
    assert (fixed > 0.9).any(axis=1).mean() > 2 * alpha


def test_anytime_bounds_by_hand():
    """After 3 hits of 3 the mixture's likelihood is B(3.5, 0.5) / B(0.5, 0.5) = 5 / 16."""
    assert anytime_bound(np.array([3]), np.array([3]), 0.1)[0] == pytest.approx(
        (5 / 16 * 0.1) ** (1 / 3), rel=1e-9
    )
    assert anytime_bound(np.array([0]), np.array([3]), 0.1)[0] == 0


ANYTIME = {'sigma': SIGMA, 'n0': 50, 'alpha': 0.01, 'num_classes': 2}


def test_anytime_certificates_of_a_linear_network():
    wanted = (0.4, 0.1, 2.5)  # the last is out of reach of 2,000 draws
    labels, radii, draws = certify_anytime(
        LINEAR, jax.random.key(2), IMAGES, wanted=wanted, n=2_000, batch_size=4096, **ANYTIME
    )
    exact, right = np.abs(DISTANCES), labels == (DISTANCES < 0)
    assert ((radii > exact) | ((labels != ABSTAIN) & ~right)).sum() < 8  # as for a fixed n
    assert (radii[labels == ABSTAIN] == 0).all()
    for radius in wanted[:2]:
        clear = np.abs(exact - radius) > 0.15
        np.testing.assert_array_equal((right & (radii >= radius))[clear], (exact > radius)[clear])
    assert (draws[np.minimum(abs(exact - 0.1), abs(exact - 0.4)) > 0.2] < 800).all()
    assert draws.max() == 2_000


def test_anytime_certificates_do_not_depend_on_how_images_are_batched():
    def certificates(images, batch_size, first=0):
        return certify_anytime(
            LINEAR, jax.random.key(3), images, wanted=(0.0, 0.3), n=1_050,
            batch_size=batch_size, first=first, **ANYTIME,
        )  # fmt: skip

    together = certificates(IMAGES[:5], 64)
    assert len(set(together[2])) > 1
    for found in (certificates(IMAGES[:5], 1000), certificates(IMAGES[:5], 4096)):
        np.testing.assert_array_equal(together, found)
    np.testing.assert_array_equal(np.array(together)[:, 3:], certificates(IMAGES[3:5], 32, first=3))


def test_a_decided_radius_stays_so_though_the_evidence_shrinks():
    """200 hits of 200 certify p = 0.95; 50 misses among the fourth hundred exclude 0.99, at which
    the draws end, and leave a bound below 0.95."""

    def is_hit(image, copy):
        return (copy < 300) | (copy % 2 == 0)

    p = np.array([0.5, 0.95, 0.99])
    hits, draws, certified = _until_decided(is_hit, 1, p, 2_000, 0.001, 100)
    assert (hits[0], draws[0]) == (350, 400)
    assert anytime_bound(hits, draws, 0.001)[0] < 0.95
    np.testing.assert_array_equal(certified, [[True, True, False]])


def test_predict_abstains_at_the_plane():
    near = 0.5 + 0.5 * (IMAGES[:20] - 0.5)  # so that on the plane they are still in [0, 1]
    to_plane = 0.5 * DISTANCES[:20, None] * WEIGHTS / np.linalg.norm(WEIGHTS)
    on_plane = near - to_plane.reshape(20, 2, 2, 3)
    kw = {'sigma': SIGMA, 'n': 500, 'alpha': 0.001, 'batch_size': 2048, 'num_classes': 2}
    assert (predict(LINEAR, jax.random.key(4), on_plane, **kw) == ABSTAIN).sum() >= 18
    far = np.abs(DISTANCES) > 0.5 * SIGMA
    found = predict(LINEAR, jax.random.key(4), IMAGES[far], **kw)
    np.testing.assert_array_equal(found, DISTANCES[far] < 0)


def test_bad_settings():
    settings = {'sigma': SIGMA, 'n0': 10, 'n': 10, 'batch_size': 10, 'num_classes': 2}
    for name, value in (('sigma', 0.0), ('n', 0), ('alpha', 1.5), ('num_classes', 3)):
        with pytest.raises(ValueError, match=name):
            certify(LINEAR, jax.random.key(0), IMAGES[:1], **{**settings, name: value})
    with pytest.raises(ValueError, match=r'wanted is \[-0.5\]'):
        certify_anytime(LINEAR, jax.random.key(0), IMAGES[:1], wanted=(-0.5,), **settings)


def test_soft_radii_are_numbers():
    sure = Partial(lambda x: jnp.array([1e4, 0.0]) + 0 * x.reshape(len(x), -1)[:, :2])
    labels = jnp.array([0, 1, 0])
    radii = soft_radii(sure, jax.random.key(0), IMAGES[:3], labels, sigma=SIGMA)
    assert np.isfinite(radii).all()
    assert radii[1] == 0
    assert (radii[jnp.array([0, 2])] > 4 * SIGMA).all()


def objective_loss(**settings):
    config = default()
    config.smooth.update(sigma=SIGMA, **settings)
    config.attack.update(eps=0.25, step_size=0.1, steps=4, norm='l2')
    batch = {'image': jnp.asarray(IMAGES[:8]), 'label': jnp.asarray(DISTANCES[:8] < 0).astype(int)}
    objective = OBJECTIVES['smooth'](config)

    def logits_of(images, train=False, batch_stats=None):
        return LINEAR(images), None

    @jax.jit
    def loss(batch, key):
        network, progress = Partial(logits_of), Progress(0, 1, 1, 0.0)
        batch = objective.inner(network, batch, key, progress)
        return objective.loss(network, (), batch, key, progress)

    return loss, batch


def test_gaussian_augmentation_is_cross_entropy_under_the_noise():
    loss, batch = objective_loss(method='gaussian')
    noise = jax.random.normal(jax.random.key(5), batch['image'].shape)
    value, (_, _, metrics) = loss({**batch, 'noise': noise}, jax.random.key(0))
    logits = LINEAR(batch['image'] + SIGMA * noise)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(8), batch['label']]
    assert float(value) == pytest.approx(float(expected.mean()), rel=1e-5)
    right = logits.argmax(1) == batch['label']
    assert float(metrics['noisy_accuracy']) == pytest.approx(float(right.mean()))


def test_consistency_is_cross_entropy_divergence_and_entropy_of_the_votes():
    settings = {'method': 'consistency', 'samples': 3}
    found = {}
    for beta, eta in ((0.0, 0.0), (2.0, 0.0), (0.0, 1.0)):
        loss, batch = objective_loss(beta=beta, eta=eta, **settings)
        found[beta, eta] = float(loss(batch, jax.random.key(6))[0])
    noise = jax.random.normal(jax.random.key(6), (3, *batch['image'].shape))
    votes = np.stack([jax.nn.softmax(LINEAR(batch['image'] + SIGMA * z)) for z in noise])
    mean = votes.mean(axis=0)
    natural = -np.log(votes[:, np.arange(8), batch['label']]).mean()
    divergence = (mean * np.log(mean / votes)).sum(axis=-1).mean()
    entropy = -(mean * np.log(mean)).sum(axis=-1).mean()
    assert found[0.0, 0.0] == pytest.approx(natural, rel=1e-4)
    assert found[2.0, 0.0] == pytest.approx(natural + 2 * divergence, rel=1e-4)
    assert found[0.0, 1.0] == pytest.approx(natural + entropy, rel=1e-4)


def test_soft_votes_stay_finite_where_a_class_has_none():
    """The mean softmax of such logits is 0 in float32, and its logarithm made training NaN."""
    certain = Partial(lambda x: jnp.full((len(x), 3), jnp.array([135.0, 1.5, 3.0])))
    images = IMAGES[:2]
    votes = log_soft_vote(certain, jnp.zeros((4, *images.shape)), images)
    np.testing.assert_allclose(votes, [[0, -133.5, -132]] * 2, rtol=1e-6)


def test_smoothadv_is_harder_than_noise_alone():
    loss, batch = objective_loss(method='adversarial', samples=64)
    attacked = loss(batch, jax.random.key(0))[0]
    plain, _ = objective_loss(method='gaussian')
    alone = np.mean([plain(batch, jax.random.key(i))[0] for i in range(30)])
    # A linear network's loss under the strongest l_2 perturbation of 0.25, by the same noises.
    shift = (
        0.25
        * np.where(DISTANCES[:8] < 0, 1, -1)[:, None]
        * np.asarray(WEIGHTS / jnp.linalg.norm(WEIGHTS))
    )
    worst = {**batch, 'image': batch['image'] + shift.reshape(8, 2, 2, 3)}
    strongest = np.mean([plain(worst, jax.random.key(i))[0] for i in range(30)])
    assert alone + 0.5 * (strongest - alone) < attacked < strongest + 0.1 * (strongest - alone)


@pytest.fixture(scope='module')
def smooth_run(tiny_config, tmp_path_factory):
    config = tiny_config()
    config.objective, config.report = 'smooth', True
    config.smooth.sigma = config.evaluate.smooth.sigma = 0.1
    config.phases = 'pretrain,evaluate'
    config.evaluate.smooth.update(examples=12, n0=20, n=180, batch_size=400)
    workdir = tmp_path_factory.mktemp('smooth') / 'run'
    return config, workdir, pipeline.run(config, workdir)


def test_certified_accuracies_of_a_run(smooth_run):
    _, workdir, result = smooth_run
    entry = result['networks'][0]['robust']['smooth']
    header, *lines = read_jsonl(workdir / 'examples' / 'pretrain.smooth.jsonl')
    assert (header['sigma'], header['n'], len(lines)) == (0.1, 180, 12)
    radius = np.array([line['radius'] * (line['label'] == line['prediction']) for line in lines])
    assert entry['acr'] == pytest.approx(radius.mean())
    assert entry['certified_accuracy']['0.25'] == np.mean(radius >= 0.25)
    curve = list(entry['certified_accuracy'].values())
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0.5
    assert 'validation_radius' in read_jsonl(workdir / 'pretrain' / 'metrics.jsonl')[-1]
    assert (workdir / 'report' / 'certified.png').exists()


def test_an_anytime_certification_of_a_run(smooth_run, tmp_path):
    config, finished, fixed = smooth_run
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    config = config.copy_and_resolve_references()
    config.evaluate.smooth.update(anytime=True, radii=(0.0, 0.05), n=500)
    with pytest.raises(ValueError, match='wanted'):
        pipeline.run(config, workdir)
    (workdir / 'examples' / 'pretrain.smooth.jsonl').unlink()
    entry = pipeline.run(config, workdir)['networks'][0]['robust']['smooth']
    header, *lines = read_jsonl(workdir / 'examples' / 'pretrain.smooth.jsonl')
    assert header['wanted'] == entry['wanted'] == [0.0, 0.05]
    assert entry['draws'] == np.mean([line['draws'] for line in lines]) < 400
    before = fixed['networks'][0]['robust']['smooth']['certified_accuracy']
    assert entry['certified_accuracy']['0'] >= before['0'] - 1 / 12


def test_certification_goes_on_where_it_was_interrupted(smooth_run, tmp_path):
    config, finished, result = smooth_run
    workdir = tmp_path / 'run'
    shutil.copytree(finished, workdir)
    path = workdir / 'examples' / 'pretrain.smooth.jsonl'
    whole = path.read_text()
    path.write_text(''.join(whole.splitlines(keepends=True)[:6]) + '{"index": 5, "la')
    again = pipeline.run(config, workdir)
    assert path.read_text() == whole
    assert again['networks'] == result['networks']

    header, *rest = whole.splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(header), 'sigma': 0.2}) + '\n' + ''.join(rest))
    with pytest.raises(ValueError, match=r'sigma: 0\.2, 0\.1'):
        pipeline.run(config, workdir)
