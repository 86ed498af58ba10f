"""The files of a network that a run leaves, and what it says of their size."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from conversion.compiled import compiled
from conversion.export import FORMATS, check_formats, export
from conversion.files import read_checkpoint
from robustprune_jax.network import logits_fn


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(3, (2, 2), strides=2, name='conv')(images))
        return nn.Dense(2, name='head')(x.reshape((x.shape[0], -1)))


META = {'arch': 'small', 'num_classes': 2, 'image_shape': [4, 4, 1]}


@pytest.fixture(scope='module')
def network():
    """Of the convolution's three channels one has no weight and a bias of 0, and of the head's 24
    weights 3 are left, which read the second channel."""
    module = Small()
    variables = jax.device_get(module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))
    conv = np.ones((2, 2, 1, 3), np.float32)
    conv[..., 0] = 0
    head = np.zeros((4, 3, 2), np.float32)
    head[:3, 1, 0] = 1
    masks = {'conv': {'kernel': conv}, 'head': {'kernel': head.reshape(12, 2)}}
    return module, {**variables, 'masks': masks}


def test_every_format_has_the_network_s_logits(network, tmp_path):
    module, variables = network
    export(variables, module, META, tmp_path, 'net', list(FORMATS))
    images = np.random.default_rng(0).random((5, 4, 4, 1), np.float32)
    expected = logits_fn(module, variables)(images)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ['net.c', 'net.onnx', 'net.pth.tar', 'net.safetensors']
    dense, sparse = (read_checkpoint(tmp_path / f'net.{x}')[0] for x in ('pth.tar', 'safetensors'))
    assert dense.keys() == sparse.keys()
    assert all(np.array_equal(dense[name], sparse[name]) for name in dense)
    assert np.count_nonzero(dense['head/kernel']) == 3
    session = onnxruntime.InferenceSession(tmp_path / 'net.onnx')
    found = session.run(['logits'], {'images': images.transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sizes_by_hand(network, tmp_path):
    module, variables = network
    size = export(variables, module, META, tmp_path, 'net', [])
    assert not list(tmp_path.iterdir())
    assert size['units'] == {'conv': [1, 3], 'head': [2, 2]}
    # 12 + 3 + 24 + 2 floats; 8 and 3 values and gaps are left, and no bias
    assert (size['dense_bytes'], size['sparse_bytes']) == (4 * 41, 5 * 11)
    # four places of the convolution
    assert (size['macs'], size['compact_macs'], size['sparse_macs']) == (72, 24, 19)
    assert size['compact_bytes'] == 4 * (4 + 1 + 8 + 2)


class Sorting(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(2, name='head')(jnp.sort(images.reshape((images.shape[0], -1))))


def test_a_module_that_is_not_translated_still_has_its_files(tmp_path):
    module = Sorting()
    variables = jax.device_get(module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))
    size = export(variables, module, META, tmp_path, 'net', ['torch', 'sparse'])
    assert size == {'dense_bytes': 4 * 34, 'sparse_bytes': 4 * 32}  # its biases are 0
    shapes = jax.eval_shape(lambda: variables)
    check_formats(module, shapes, META, ['torch', 'sparse'])
    with pytest.raises(ValueError, match=r"config\.export: onnx is not for .* primitive 'sort'"):
        check_formats(module, shapes, META, ['torch', 'onnx'])


def test_the_compiled_file_is_the_evaluated_network(finished):
    """Image by image, over the run's test images."""
    workdir, result = finished

    entry = next(x for x in result['networks'] if x['name'] == 'hydra_0.1')
    lines = (workdir / 'examples' / 'hydra_0.1.clean.jsonl').read_text().splitlines()[1:]
    test = np.load(json.loads((workdir / 'config.json').read_text())['dataset']['dir'])
    images = np.float32(test['test_images'] / np.float32(255)).transpose(0, 3, 1, 2)
    logits = compiled(workdir / entry['checkpoint'])(images)
    recorded = [json.loads(line)['prediction'] for line in lines]
    assert np.argmax(logits, -1).tolist() == recorded
