"""Networks from outside JAX under attack, and the files that attacks leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from conversion.to_torch import export_checkpoint
from robustprune_jax.attacks import from_callable, from_torch, standard
from robustprune_jax.attacks.__main__ import main
from robustprune_jax.config import default
from robustprune_jax.data import load
from robustprune_jax.models import create_model
from robustprune_jax.training import checkpoint

IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (16, 4, 4, 2), minval=0.3, maxval=0.7))
WEIGHTS = np.asarray(jax.random.normal(jax.random.key(0), (32, 5)))


def native(weights, images):
    return images.reshape(len(images), -1) @ weights


LABELS = np.argmax(native(WEIGHTS, IMAGES), -1)


def test_a_torch_module_is_attacked_as_its_jax_twin():
    torch = pytest.importorskip('torch')
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32, 5, bias=False)).eval()
    by_channel = WEIGHTS.reshape(4, 4, 2, 5).transpose(3, 2, 0, 1).reshape(5, 32)
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor(by_channel))
    settings = {'eps': 0.03, 'attacks': ('apgd-ce', 'fab-t'), 'batch_size': 8}
    adversarial, accuracy = standard(
        from_torch(module), jax.random.key(0), IMAGES, LABELS, **settings
    )
    expected = standard(Partial(native, WEIGHTS), jax.random.key(0), IMAGES, LABELS, **settings)
    assert accuracy == expected[1]
    assert 0 < accuracy['fab-t'] < 1
    np.testing.assert_allclose(adversarial, expected[0], atol=1e-5)


def test_a_callable_without_gradients_takes_square_only():
    network = from_callable(lambda images: native(WEIGHTS, images))
    settings = {'eps': 0.03, 'batch_size': 16}
    adversarial, accuracy = standard(
        network, jax.random.key(0), IMAGES, LABELS, attacks=('square',), **settings
    )
    assert accuracy['square'] < 1
    assert accuracy['square'] == np.mean(native(WEIGHTS, adversarial).argmax(-1) == LABELS)
    with pytest.raises(ValueError, match=r"no gradient: choose attacks=\('square',\)"):
        standard(network, jax.random.key(0), IMAGES, LABELS, **settings)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A network on the digits, in a checkpoint and in a PyTorch file, and its variables."""
    folder = tmp_path_factory.mktemp('network')
    module = create_model('mnist_model')
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    meta = {
        'arch': 'mnist_model',
        'num_classes': 10,
        'image_shape': [28, 28, 1],
        'phase': 'pretrain',
        'density': None,
    }
    checkpoint.save_network(folder / 'checkpoint', jax.device_get(variables), meta)
    export_checkpoint(jax.device_get(variables), {**meta, 'epoch': 0}, folder / 'network.pth.tar')
    return folder, variables


@pytest.mark.parametrize('source', ['checkpoint', 'network.pth.tar'])
def test_adversarial_images_are_saved_for_other_tools(saved, source, tmp_path, capsys):
    folder, variables = saved
    out = tmp_path / 'adversarial.npz'
    main(
        f'--checkpoint {folder / source} --eps 8/255 --examples 40 --attacks apgd-ce '
        f'--batch_size 40 --out {out}'.split()
    )
    arrays = np.load(out, allow_pickle=False)
    test = load(default().dataset).test
    np.testing.assert_array_equal(arrays['images'], test.images[:40] / np.float32(255))
    np.testing.assert_array_equal(arrays['labels'], test.labels[:40])
    assert np.abs(arrays['adversarial'] - arrays['images']).max() <= 8 / 255 + 1e-6
    logits = create_model('mnist_model').apply(variables, arrays['adversarial'])
    right = np.argmax(logits, -1) == arrays['labels']
    np.testing.assert_array_equal(right, arrays['broken_by'] == '')
    assert f'{100 * right.mean():.1f} %  after apgd-ce' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('--out adversarial.pt', 'expected a name that ends in .npz'),
        ('--attacks pgd', "unknown attack 'pgd'"),
        ('--eps 8', 'eps is 8.0: expected a radius from 0 to 1 in linf'),
        ('--checkpoint nowhere', "unknown network, neither a file nor in the zoo 'nowhere'"),
    ],
)
def test_a_wrong_command_ends_in_one_line(saved, change, message):
    with pytest.raises(SystemExit) as stop:
        main(f'--checkpoint {saved[0] / "checkpoint"} --eps 0.1 --examples 8 {change}'.split())
    assert message in str(stop.value) and '\n' not in str(stop.value)
