import os
from collections import Counter
from collections.abc import Callable

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import export_state_dict, import_state_dict, to_onnx
from conversion.names import leaves
from conversion.to_onnx import export_onnx
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.training import checkpoint

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

UNOPTIMISED = {'xla_backend_optimization_level': 0}  # compiles faster


def exported(variables, module, image_shape, path):
    """Returns (the graph, the summary), once onnxruntime computes the same logits as we do."""
    summary = export_onnx(variables, module, image_shape, path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    network = logits_fn(module, variables)
    run = jax.jit(network.func, compiler_options=UNOPTIMISED)
    for batch in (1, 5):
        images = np.random.default_rng(batch).random((batch, *image_shape), np.float32)
        expected = np.asarray(run(network.args[0], images))
        (found,) = session.run(['logits'], {'images': images.transpose(0, 3, 1, 2)})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return onnx.load(path).graph, summary


def pruned(arch, density=0.1):
    return import_state_dict(golden.formula_state_dict(arch, 'subnet'), arch, density=density)


@pytest.mark.parametrize(
    ('arch', 'image_shape'),
    [
        ('mnist_model', (28, 28, 1)),
        ('lin_2', (32, 32, 3)),
        ('vgg4_bn', (32, 32, 3)),
        ('wrn_28_1', (16, 24, 3)),
        ('ResNet18', (32, 32, 3)),
    ],
)
def test_onnxruntime_computes_the_same_logits(tmp_path, arch, image_shape):
    variables = pruned(arch)
    state_dict = export_state_dict(variables, arch)
    module = create_model(arch, len(list(state_dict.values())[-1]))
    graph, summary = exported(variables, module, image_shape, tmp_path / 'a.onnx')
    assert summary['arch'] == graph.name == arch and summary['density'] < 0.11
    assert 'Transpose' not in {node.op_type for node in graph.node}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for leaf in leaves(arch):  # pruned ones are exact zeros there
        if leaf.kernel and leaf.path:
            assert tensors[leaf.path].shape == state_dict[leaf.torch].shape
            assert tensors[leaf.path].tobytes() == state_dict[leaf.torch].tobytes()


def test_the_operators_are_those_that_verifiers_read(tmp_path):
    export_onnx(pruned('vgg2_bn'), create_model('vgg2_bn'), (32, 32, 3), tmp_path / 'a.onnx')
    graph = onnx.load(tmp_path / 'a.onnx').graph
    dims = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ['batch', 3, 32, 32]
    convolution = 'Conv Sub Mul Add Relu MaxPool'
    expected = f'{convolution} {convolution} AveragePool Flatten Gemm Relu Gemm Relu Gemm'
    assert ' '.join(node.op_type for node in graph.node) == expected


def init(module, image_shape):
    images = np.zeros((1, *image_shape), np.float32)
    return jax.jit(module.init, compiler_options=UNOPTIMISED)(jax.random.key(0), images)


class Branches(nn.Module):
    """Two kinds of pooling, joined; channels weighted by a small network."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.leaky_relu(nn.Conv(4, (3, 3), strides=(2, 2))(x), 0.1)
        pooled = nn.max_pool(x, (3, 3), (2, 2), 'SAME'), nn.avg_pool(x, (3, 3), (2, 2), 'SAME')
        x = nn.Dropout(0.5, deterministic=not train)(jnp.concatenate(pooled, -1))
        x = nn.Conv(8, (3, 3), feature_group_count=4, kernel_dilation=(2, 2), use_bias=False)(x)
        weights = nn.sigmoid(nn.Dense(8)(x.mean((1, 2))))
        return nn.Dense(5)((x * weights[:, None, None, :]).reshape(x.shape[0], -1))


class Detours(nn.Module):
    """What needs the channels last, the flattened entries in our order, or the batch's size."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.gelu(nn.remat(nn.Dense)(6)(x))
        x = nn.GroupNorm(2)(nn.LayerNorm()(x))
        x = nn.avg_pool(x, (2, 2), padding='SAME', count_include_pad=False).transpose(0, 2, 1, 3)
        x = nn.Dense(12)(nn.relu6(x.reshape(x.shape[0], -1))).reshape(-1, 2, 3, 2)
        x = nn.silu(nn.Conv(3, (1, 2))(nn.max_pool(x, (2, 1)))) + jnp.ones((x.shape[0], 1, 1, 1))
        return nn.log_softmax(jnp.where(x > 0.3, x, -x).sum((1, 2)))


def test_modules_of_ones_own(tmp_path):
    shape, path = (8, 9, 3), tmp_path / 'a.onnx'
    graph, _ = exported(init(Branches(), shape), Branches(), shape, path)
    found = Counter(node.op_type for node in graph.node)
    assert found['LeakyRelu'] == found['AveragePool'] == found['ReduceMean'] == 1
    assert found['Transpose'] == 1 and found['Where'] == 0  # the weights, [B, 1, 1, C]
    exported(init(Detours(), shape), Detours(), shape, path)


class Sorted(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(jnp.sort(x.mean((1, 2))))


class OfTheBatch(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(x.mean((1, 2))) - jnp.ones(x.shape).sum()


class Constant(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(jnp.ones((1, 2)))


class Odd(nn.Module):
    head: Callable

    @nn.compact
    def __call__(self, x, train=False):
        return self.head(x)


def mean(x):
    return x.mean((1, 2))


def conv(x, **options):
    return nn.Conv(2, (1, 1), use_bias=False, **options)(x)


CONV = {'params': {'Conv_0': {'kernel': np.ones((1, 1, 2, 2), np.float32)}}}


def test_random_numbers_of_a_fixed_key_are_constants(tmp_path):
    module = Odd(lambda x: mean(conv(x)) + jax.random.normal(jax.random.key(0), (2,)))
    exported(CONV, module, (4, 4, 2), tmp_path / 'a.onnx')


@pytest.mark.parametrize(
    ('head', 'error', 'message'),
    [
        (lambda x: {'logits': mean(x)}, ValueError, 'must return logits, .* not {'),
        (lambda x: x, ValueError, r'must return logits, .*shape=\(batch, 4, 4, 2\)'),
        (lambda x: mean(x) > 0, ValueError, 'must return logits, .* dtype=bool'),
        (lambda x: mean(conv(x, dtype=jnp.bfloat16)), ValueError, 'must .* dtype=bfloat16'),
        (
            lambda x: mean(conv(x, dtype=jnp.bfloat16)).astype(jnp.float32),
            NotImplementedError,
            "this use of the primitive 'convert_element_type', as Odd/Conv_0 .*test_onnx.py:",
        ),
        (
            lambda x: mean(conv(x, padding=((-1, 0), (0, 0)))),
            NotImplementedError,
            "this use of the primitive 'conv_general_dilated', as Odd/Conv_0 .*test_onnx.py:",
        ),
        (
            lambda x: mean(nn.max_pool(x, (2, 2), padding=((0, 2), (0, 0)))),
            NotImplementedError,
            "this use of the primitive 'reduce_window_max', as Odd uses it at .*test_onnx.py:",
        ),
        (
            lambda x: x.reshape(len(x), -1),
            NotImplementedError,
            'cannot be traced .* as an integer at .*test_onnx.py:',
        ),
        (
            lambda x: mean(x) if x.shape[0] > 1 else mean(-x),
            NotImplementedError,
            "cannot be traced .* 'batch' > '1' is inconclusive. at .*test_onnx.py:",
        ),
    ],
)
def test_odd_modules_are_refused_in_one_line(tmp_path, head, error, message):
    with pytest.raises(error, match=message) as raised:
        export_onnx(CONV, Odd(head), (4, 4, 2), tmp_path / 'a.onnx')
    assert '\n' not in str(raised.value) and not os.listdir(tmp_path)


def test_a_network_without_kernels_is_refused_before_any_file(tmp_path):
    with pytest.raises(ValueError, match='no kernels'):
        export_onnx({}, Odd(mean), (4, 4, 2), tmp_path / 'a.onnx')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ('module', 'error', 'message'),
    [
        (Sorted(), NotImplementedError, "primitive 'sort', as Sorted uses it at .*test_onnx.py:"),
        (OfTheBatch(), NotImplementedError, "primitive 'reduce_sum', as OfTheBatch uses it at "),
        (Constant(), ValueError, 'must return logits'),
    ],
)
def test_what_is_not_translated_is_said(tmp_path, module, error, message):
    with pytest.raises(error, match=message):
        export_onnx(init(module, (4, 4, 2)), module, (4, 4, 2), tmp_path / 'a.onnx')
    assert not os.listdir(tmp_path)


def test_to_onnx_writes_a_checkpoint_and_says_what(tmp_path, capsys):
    meta = {'arch': 'mnist_model', 'num_classes': 10, 'image_shape': [28, 28, 1]}
    meta |= {'phase': 'finetune', 'density': 0.1}
    checkpoint.save_network(tmp_path / 'run', pruned('mnist_model'), meta)
    out = tmp_path / 'a.onnx'
    to_onnx.main(['--checkpoint', f'{tmp_path / "run"}', '--out', f'{out}'])
    printed = capsys.readouterr().out
    assert 'mnist_model, 8 tensors, 166,406 parameters, density 0.1 (16,626 of 166,248' in printed
    assert f'{out.stat().st_size:,} bytes, images [batch, 1, 28, 28]' in printed
    assert sorted(os.listdir(tmp_path)) == ['a.onnx', 'run']
    smaller = tmp_path / 'b.onnx'
    to_onnx.main(['--checkpoint', f'{tmp_path / "run"}', '--out', f'{smaller}', '--compact'])
    assert smaller.stat().st_size < out.stat().st_size
    images = np.random.default_rng(0).random((2, 1, 28, 28), np.float32)
    one, other = (
        onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(
            ['logits'], {'images': images}
        )[0]
        for path in (out, smaller)
    )
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
    with pytest.raises(SystemExit, match='to_onnx: unknown network, neither'):
        to_onnx.main(['--checkpoint', f'{tmp_path / "none"}', '--out', f'{out}'])
