"""Four devices against one: the same update, whatever the number of devices."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType
sys.path.insert(0, 'tests')
import golden
from robustprune_jax import sharding
from robustprune_jax.config import default
from robustprune_jax.data.augment import AUGMENTATIONS
from robustprune_jax.masks import init_scores
from robustprune_jax.models import create_model
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.optim import optimizer, phase_labels
from robustprune_jax.step import create_state, train_step

config = default()
config.attack.update(steps=2)
module = create_model('vgg2_bn')
variables = dict(module.init(jax.random.key(0), np.zeros((1, 16, 16, 3))))
variables['scores'] = init_scores(variables['params'])
variables = jax.tree.map(lambda x: x.astype(np.float64), variables)
objective = OBJECTIVES['trades'](config)
batch = {
    'image': golden.formula_images((16, 3, 16, 16)).astype(np.float64),
    'label': golden.formula_labels(16).astype(np.int32),
}
results = []
for count in (1, 4):
    mesh = jax.make_mesh(
        (count,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )
    tx = optimizer(config.prune, phase_labels(variables, 'prune'), 1)
    update = train_step(
        module, objective, tx, AUGMENTATIONS['crop_flip'], mesh,
        steps_per_epoch=10, total_steps=10, density=0.1,
    )
    state = create_state(variables, tx, objective, batch['image'].shape)
    state = jax.device_put(state, sharding.replicated(mesh))
    for step in range(3):
        state, metrics = update(state, sharding.shard_batch(mesh, batch), jax.random.key(1))
    results.append(jax.device_get((state.variables, metrics)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)
print('devices', len(jax.devices()), 'loss', results[1][1]['loss'])
"""


@pytest.mark.parametrize('devices', [4])
def test_an_update_does_not_depend_on_the_number_of_devices(devices):
    """Prune under TRADES with BatchNorm and augmentation, in float64: rounding is not amplified."""
    environment = {
        **os.environ,
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_ENABLE_X64': '1',
        'JAX_PLATFORMS': 'cpu',
    }
    run = subprocess.run(
        [sys.executable, '-c', PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith(f'devices {devices} ')
