"""Smaller graphs of the same logits, and the C code of them."""

import subprocess
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from networks import drawn

from conversion import to_c
from conversion.compiled import compiled
from conversion.evaluate import evaluate, shapes
from conversion.graph import Graph
from conversion.passes import compact, fold
from conversion.torch_module import torch_module
from conversion.trace import trace
from robustprune_jax.models import create_model
from robustprune_jax.network import logits_fn
from robustprune_jax.pruning import init_scores, topk_masks
from robustprune_jax.training import checkpoint


def in_float64(graph: Graph) -> Graph:
    arrays = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in graph.initialisers.items()
    }
    return Graph(graph.image_shape, dict(graph.nodes), arrays)


def logits(graph, images):
    floats = {k: a for k, a in graph.initialisers.items() if a.dtype.kind == 'f'}
    others = {k: a for k, a in graph.initialisers.items() if a.dtype.kind != 'f'}

    @jax.jit
    def run(floats, images):  # as arguments: XLA would fold constants
        return evaluate(Graph(graph.image_shape, graph.nodes, floats | others), images)['logits']

    return np.asarray(run(floats, images))


def assert_near(found, expected, atol):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=atol)


STRICT = ['-std=c99', '-Wall', '-Wextra', '-pedantic', '-Werror', '-O1']
SANITIZED = ['-fsanitize=address,undefined', '-fno-sanitize-recover']


def in_c(graph, images):
    """By a program that stops at the first access beyond an array and at undefined behaviour."""
    with tempfile.TemporaryDirectory() as folder:
        to_c.write_c(graph, f'{folder}/net.c', program=True)
        command = ['cc', *STRICT, *SANITIZED, f'{folder}/net.c', '-o', f'{folder}/net', '-lm']
        subprocess.run(command, check=True)
        return printed(f'{folder}/net', images)


def printed(program, images):
    """The logits that a program prints of images [B, C, H, W]."""
    done = subprocess.run(
        program, input=np.float32(images).tobytes(), check=True, capture_output=True
    )
    return np.array([line.split() for line in done.stdout.decode().splitlines()], np.float32)


def in_torch(graph, images):
    torch = pytest.importorskip('torch')
    text, state_dict = torch_module(graph)
    exec(text, names := {})
    network = names['Network']().eval()
    network.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    return network(torch.tensor(images, dtype=torch.float32)).detach().numpy()


def assert_smaller_and_equal(graph, network=None):
    """Folded and compacted, in float64, at two sizes of image where it is not tied to one; the C
    code and the torch module, in float32. Returns the compacted graph."""
    smaller = compact(fold(graph))
    images = np.random.default_rng(0).random((3, *graph.image_shape))
    expected = logits(graph, images.astype(np.float32))
    if network is not None:
        assert_near(expected, network(images.astype(np.float32).transpose(0, 2, 3, 1)), 1e-5)
    assert_near(in_c(smaller, images), expected, 1e-5)
    assert_near(in_torch(smaller, images), expected, 1e-5)
    with jax.enable_x64(True):
        graph = in_float64(graph)
        assert_near(logits(compact(fold(graph)), images), logits(graph, images), 1e-12)
    return smaller


class Wide(nn.Module):
    """A depthwise convolution of stride 2, two branches side by side, a gate of each entry."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name='conv')((images - 0.5) / 0.2))
        x = nn.Conv(6, (3, 3), (2, 2), feature_group_count=6, name='depthwise')(x)
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        y = nn.Conv(5, (1, 1), name='one')(nn.leaky_relu(x, 0.1))
        y = jnp.concatenate([y, nn.max_pool(x, (2, 2), (1, 1), 'SAME')], axis=-1)
        gate = nn.sigmoid(nn.Conv(11, (1, 1), name='gate')(y))
        return nn.Dense(4, name='head')((y * gate).mean(axis=(1, 2)))


@pytest.mark.parametrize(
    ('arch', 'size', 'density'),
    [
        ('mnist_model', 28, 0.01),
        ('wrn_28_1', 32, 0.005),
        ('vgg4_bn', 32, 0.5),
        ('lin_2', 32, 0.01),
        (None, 8, 0.1),
        pytest.param('resnet18', 32, 0.002, marks=pytest.mark.nightly),
        pytest.param('cifar_model_resnet', 32, 0.02, marks=pytest.mark.nightly),
    ],
)
def test_smaller_graphs_and_c_have_the_network_s_logits(arch, size, density):
    module = create_model(arch) if arch else Wide()
    image_shape = (size, size, 1 if arch == 'mnist_model' else 3)
    variables = drawn(module, image_shape)
    scores = init_scores(variables['params'], 'kaiming_normal', jax.random.key(1))
    variables['masks'] = topk_masks(scores, density)
    graph = trace(module, variables, image_shape)
    network = jax.jit(logits_fn(module, variables))
    smaller = assert_smaller_and_equal(graph, network)
    sizes = [sum(array.size for array in g.initialisers.values()) for g in (graph, smaller)]
    assert sizes[1] < sizes[0]
    if density < 0.1:
        assert sum(np.count_nonzero(a) for a in smaller.initialisers.values()) <= sum(
            np.count_nonzero(a) for a in graph.initialisers.values()
        )


class Two(nn.Module):
    """Two padded convolutions, a stream around the second, and the mean."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name='first')(images))
        y = nn.Conv(4, (3, 3), name='second')(x)
        y = nn.relu(nn.Conv(4, (3, 3), name='third')(nn.relu(y)) + x)
        return nn.Dense(3, name='head')(y.mean(axis=(1, 2)))


def two(**changes):
    """The graph of Two with some of its parameters set: first_kernel=function of the array."""
    variables = drawn(Two(), (6, 6, 2))
    params = flatten_dict(variables['params'])
    for name, change in changes.items():
        path = tuple(name.split('_'))
        params[path] = change(np.array(params[path]))
    return trace(Two(), {'params': unflatten_dict(params)}, (6, 6, 2))


def without(*indices):
    """Sets these outputs to 0."""

    def change(array):
        array[..., list(indices)] = 0
        return array

    return change


def unread(*indices):
    """Sets these inputs to 0."""

    def change(array):
        array[..., list(indices), :] = 0
        return array

    return change


def widths(graph):
    return [graph.initialisers[node.inputs[1]].shape[:2] for node in graph.layers()]


def test_a_unit_without_readers_goes():
    smaller = assert_smaller_and_equal(two(third_kernel=unread(1)))
    assert widths(smaller) == [(4, 2), (3, 4), (4, 3), (3, 4)]


def test_constant_channels_at_a_padded_border_become_one():
    """Units 0, 1 and 2 of the second layer are their biases; the third pads with 0 around them."""
    smaller = assert_smaller_and_equal(two(second_kernel=without(0, 1, 2)))
    assert widths(smaller) == [(4, 2), (2, 4), (4, 2), (3, 4)]


def test_a_constant_of_0_goes_whole():
    """A bias below 0 is 0 after relu."""
    smaller = assert_smaller_and_equal(
        two(second_kernel=without(0, 1), second_bias=lambda bias: -bias)
    )
    assert widths(smaller)[1:3] == [(2, 4), (4, 2)]


def test_units_that_read_only_constants_become_one():
    """The third layer is not constant: its borders read less of the second."""
    smaller = assert_smaller_and_equal(
        two(first_kernel=without(0, 1, 2, 3), first_bias=lambda bias: -bias)
    )
    assert widths(smaller) == [(4, 2), (1, 4), (4, 1), (3, 4)]
    assert not smaller.initialisers['second/kernel_1'].any()


def test_a_channel_of_a_stream_goes_when_it_is_dead_in_all_members():
    kept = two(third_kernel=without(2), second_kernel=unread(2))
    assert widths(assert_smaller_and_equal(kept))[0] == (4, 2)  # the head reads what first makes
    gone = two(second_kernel=unread(2), head_kernel=unread(2))
    assert widths(assert_smaller_and_equal(gone)) == [(3, 2), (4, 3), (3, 4), (3, 3)]


def test_a_class_that_is_cut_off_keeps_its_bias():
    graph = two(head_kernel=without(1))
    smaller = assert_smaller_and_equal(graph)
    assert widths(smaller)[-1] == (3, 4)


def test_nothing_is_left():
    graph = two(head_kernel=without(0, 1, 2))
    assert widths(assert_smaller_and_equal(graph))[-1] == (3, 1)


def test_batch_norm_goes_into_the_layer_before_it():
    module = create_model('vgg4_bn')
    graph = fold(trace(module, drawn(module, (32, 32, 3)), (32, 32, 3)))
    assert not {'Add', 'Div', 'Mul', 'Sub'} & {node.op for node in graph.nodes.values()}


def test_shapes_are_those_of_one_image():
    graph = two()
    assert shapes(graph)['logits'] == (1, 3)


class Gated(nn.Module):
    """Squeeze and excitation, and a value chosen by another."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name='first')(images))
        gate = nn.Dense(4, name='gate')(nn.relu(nn.Dense(3, name='squeeze')(x.mean(axis=(1, 2)))))
        x = x * nn.sigmoid(gate)[:, None, None]
        x = jnp.where(x > 0.5, x - 0.5, jnp.sign(x))
        return nn.Dense(3, name='head')(x.transpose(0, 2, 1, 3).reshape((x.shape[0], -1)))


def test_c_of_gates_and_choices():
    assert_smaller_and_equal(trace(Gated(), drawn(Gated(), (6, 5, 2)), (6, 5, 2)))


def test_c_says_what_it_does_not_take():
    with pytest.raises(ValueError, match=r'images are \(1, 2, 5, 5\): expected'):
        compiled(two())(np.zeros((1, 2, 5, 5), np.float32))


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv('CC', 'no-such-compiler')
    with pytest.raises(FileNotFoundError, match='no C compiler: install gcc or clang'):
        compiled(two())


def test_to_c_writes_a_program_that_prints_the_logits(tmp_path, capsys):
    module, variables = create_model('mnist_model'), drawn(create_model('mnist_model'), (28, 28, 1))
    variables['masks'] = topk_masks(init_scores(variables['params']), 0.1)
    meta = {'arch': 'mnist_model', 'num_classes': 10, 'image_shape': [28, 28, 1]}
    meta |= {'phase': 'finetune', 'density': 0.1}
    checkpoint.save_network(tmp_path / 'run', variables, meta)
    out = tmp_path / 'mine.c'
    arguments = ['--checkpoint', f'{tmp_path / "run"}', '--out', f'{out}', '--name', 'mine']
    to_c.main([*arguments, '--main'])
    assert f'{out}: mnist_model, ' in capsys.readouterr().out
    program = tmp_path / 'mine'
    command = ['cc', *STRICT, *SANITIZED, f'{out}', '-o', f'{program}', '-lm']
    subprocess.run(command, check=True)
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    expected = np.asarray(logits_fn(module, variables)(images))
    images = images.transpose(0, 3, 1, 2)
    assert_near(printed([program], images), expected, 1e-5)
    timed = subprocess.run([program, '2'], check=True, capture_output=True, text=True).stdout
    assert timed.endswith(' ms\n')
    to_c.main([*arguments, '--main', '--weights', f'{tmp_path / "mine.bin"}'])
    subprocess.run(command, check=True)
    assert_near(printed([program, tmp_path / 'mine.bin'], images), expected, 1e-5)
    assert subprocess.run([program, out], capture_output=True).returncode == 1
    with pytest.raises(SystemExit, match="to_c: --name is 'my net': expected letters"):
        to_c.main([*arguments[:-1], 'my net'])
    with pytest.raises(SystemExit, match='to_c: unknown network, neither'):
        to_c.main(['--checkpoint', f'{tmp_path / "none"}', '--out', f'{out}'])
