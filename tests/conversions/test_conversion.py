import golden
import jax
import numpy as np
import pytest
from flax import linen as nn

from conversion import export_state_dict, import_state_dict
from conversion.names import conv, dense, flat_dense, norm
from conversion.scores import top_mask
from robustprune_jax.models import create_model
from robustprune_jax.pruning import effective_params, kept_count, topk_masks

MASKED = [arch for arch, record in golden.ARCHITECTURES.items() if 'kept' in record]


def assert_recorded(logits, recorded):
    recorded = np.array(recorded).reshape(len(logits), -1)
    tolerance = 1e-4 * np.abs(recorded).max()
    np.testing.assert_allclose(logits[:, : recorded.shape[1]], recorded, rtol=0, atol=tolerance)


@pytest.mark.parametrize('arch', golden.ARCHITECTURES)
def test_tables_have_every_variable_and_every_tensor(arch):
    state_dict = {
        name: np.zeros(shape, np.int64 if name.endswith('num_batches_tracked') else np.float32)
        for name, shape in golden.recorded_shapes(arch).items()
    }
    variables = import_state_dict(state_dict, arch)
    images = golden.formula_images(tuple(golden.ARCHITECTURES[arch]['input']))
    module = create_model(arch, len(list(state_dict.values())[-1]))
    expected = jax.eval_shape(module.init, jax.random.key(0), images)
    shapes = {name: jax.tree.map(np.shape, variables[name]) for name in expected}
    assert shapes == jax.tree.map(np.shape, expected)
    golden.assert_same_state_dict(export_state_dict(variables, arch), state_dict)


@pytest.mark.parametrize('arch', golden.BY_FAMILY)
def test_imported_networks_give_the_recorded_logits(arch):
    record = golden.ARCHITECTURES[arch]
    images = golden.formula_images(tuple(record['input']))
    variables = import_state_dict(golden.formula_state_dict(arch), arch)
    assert_recorded(golden.logits(arch, variables, images), record['logits'])
    if arch not in MASKED:
        return
    masked = golden.formula_state_dict(arch, 'subnet')
    for density, logits in record['masked_logits'].items():
        variables = import_state_dict(masked, arch, density=float(density))
        assert_recorded(golden.logits(arch, variables, images), logits)


@pytest.mark.parametrize('bn', [False, True])
def test_cnn5_is_a_sequential_of_torch(bn):
    torch = pytest.importorskip('torch')
    arch, images = 'cnn5_bn' if bn else 'cnn5', golden.formula_images((2, 1, 12, 12))
    module = create_model(arch)
    variables = dict(jax.jit(module.init)(jax.random.key(0), images))
    layers, channels = [], 1
    for features, size, stride in ((64, 3, 1), (64, 4, 2), (128, 4, 2)):
        layers.append(torch.nn.Conv2d(channels, features, size, stride, 1))
        layers += [torch.nn.BatchNorm2d(features)] * bn + [torch.nn.ReLU()]
        channels = features
    layers += [torch.nn.Flatten(), torch.nn.Linear(1152, 512)]
    layers += [torch.nn.BatchNorm1d(512)] * bn + [torch.nn.ReLU(), torch.nn.Linear(512, 10)]
    network = torch.nn.Sequential(*layers).eval()
    state_dict = export_state_dict(variables, arch)
    network.load_state_dict({k: torch.tensor(np.asarray(x)) for k, x in state_dict.items()})
    logits = network(torch.tensor(images.transpose(0, 3, 1, 2))).detach()
    np.testing.assert_allclose(logits, module.apply(variables, images), rtol=0, atol=1e-6)
    again = import_state_dict(state_dict, arch)
    jax.tree.map(np.testing.assert_array_equal, again['params'], variables['params'])


def distinct_state_dict(arch, layout):
    """A state dict of the recorded names and shapes, every element another; quicker to make."""
    state_dict, start = {}, 1
    for name, shape in golden.recorded_shapes(arch, layout).items():
        size = int(np.prod(shape))
        dtype = np.int64 if name.endswith('num_batches_tracked') else np.float32
        state_dict[name] = np.arange(start, start + size, dtype=np.int64).astype(dtype)
        state_dict[name] = state_dict[name].reshape(shape)
        start += size
    return state_dict


@pytest.mark.parametrize('arch', golden.BY_FAMILY)
def test_export_undoes_import_bit_for_bit(arch):
    """Names, their order, shapes and values; with scores and without."""
    state_dict = distinct_state_dict(arch, 'dense')
    variables = import_state_dict(state_dict, arch)
    golden.assert_same_state_dict(export_state_dict(variables, arch), state_dict)
    if arch in MASKED:
        state_dict = distinct_state_dict(arch, 'subnet')
        variables = import_state_dict(state_dict, arch, density=1.0)
        exported = export_state_dict(variables, arch, layout='subnet')
        golden.assert_same_state_dict(exported, state_dict)


@pytest.mark.parametrize('arch', MASKED)
def test_kept_counts_are_the_recorded_ones(arch):
    shapes = golden.recorded_shapes(arch)
    for density, kept in golden.ARCHITECTURES[arch]['kept'].items():
        counts = {
            layer: kept_count(np.prod(shapes[f'{layer}.weight']), float(density)) for layer in kept
        }
        assert counts == kept, density


@pytest.mark.parametrize('arch', ['mnist_model', 'vgg4_bn', 'wrn_28_1'])
def test_dense_export_keeps_the_recorded_counts(arch):
    state_dict = golden.formula_state_dict(arch, 'subnet')
    for density, kept in golden.ARCHITECTURES[arch]['kept'].items():
        variables = import_state_dict(state_dict, arch, density=float(density))
        exported = export_state_dict(variables, arch)
        counts = {layer: np.count_nonzero(exported[f'{layer}.weight']) for layer in kept}
        assert counts == kept, density


def test_masks_are_those_of_topk_masks_with_ties():
    scores = np.random.default_rng(0).integers(-3, 4, (40, 30)).astype(np.float32)
    for density in (0.01, 0.3, 0.9, 1.0):
        expected = topk_masks({'kernel': scores}, density)['kernel']
        found = top_mask(scores, int(expected.sum()))
        np.testing.assert_array_equal(found, expected)


def test_networks_born_here_get_what_torch_registers():
    """sub_block1 as a new network has it, the same at every export, pruned as far as block1."""
    variables = import_state_dict(golden.formula_state_dict('wrn_28_1'), 'wrn_28_1')
    del variables['unused']
    exported = export_state_dict(variables, 'wrn_28_1')
    assert list(exported) == list(golden.recorded_shapes('wrn_28_1'))
    golden.assert_same_state_dict(export_state_dict(variables, 'wrn_28_1'), exported)
    dead = exported['sub_block1.layer.0.conv2.weight']
    assert abs(dead.std() / np.sqrt(2 / (9 * 16)) - 1) < 0.1
    assert (exported['sub_block1.layer.3.bn1.running_var'] == 1).all()
    count = exported['bn1.num_batches_tracked']
    assert (count.dtype, count.shape, count) == (np.int64, (), 0)

    kernel = variables['params']['block1_layer0']['conv2']['kernel']
    masks = {'block1_layer0': {'conv2': {'kernel': top_mask(kernel, 231)}}}
    exported = export_state_dict({**variables, 'masks': masks}, 'wrn_28_1')
    for block in ('block1', 'sub_block1'):
        assert np.count_nonzero(exported[f'{block}.layer.0.conv2.weight']) == 231
    again = import_state_dict(exported, 'wrn_28_1', num_classes=10)
    golden.assert_same_state_dict(export_state_dict(again, 'wrn_28_1'), exported)


def test_data_parallel_prefixes_and_absent_counterparts():
    state_dict = golden.formula_state_dict('wrn_28_1')
    stripped = {
        f'module.{name}': array
        for name, array in state_dict.items()
        if 'sub_block1' not in name and 'num_batches' not in name
    }
    variables = import_state_dict(stripped, 'wrn_28_1')
    assert 'unused' not in variables
    assert list(export_state_dict(variables, 'wrn_28_1')) == list(state_dict)


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        (lambda s: s.pop('0.bias'), {}, 'missing 0.bias'),
        (lambda s: s.update({'9.weight': s['7.weight']}), {}, 'unexpected 9.weight'),
        (lambda s: s.update({'2.weight': np.zeros((32, 16, 3, 3))}), {}, r'2.weight \(has shape'),
        (lambda s: s.update({'5.weight': np.zeros((100, 2049))}), {}, r'expected \(100, 2048\)'),
        (lambda s: s['2.bias'].fill(np.nan), {}, 'NaN or infinity in 2.bias'),
        (lambda s: None, {'num_classes': 100}, 'has 10 classes, not 100'),
        (lambda s: None, {'density': 0.1}, 'weights are not 0, and density 0.1 keeps'),
        (lambda s: s.update({'normalize.mean': np.zeros((1, 3, 1, 1))}), {}, 'here it is None'),
        (lambda s: s.update({5: np.zeros(3)}), {}, 'no state dict: 5'),
        (lambda s: s.update({'0.weight': np.ones(())}), {}, r'no weights in 0.weight \(float64 of'),
        (lambda s: s.update({'7.weight': np.ones(10)}), {}, r'no weights in .* shape \(10,\)\)'),
        (lambda s: s.update({'0.weight': np.ones((16, 0, 4, 4))}), {}, 'no weights in 0.weight'),
        (lambda s: s.update({'7.weight': np.ones((0, 100))}), {}, 'no weights in 7.weight'),
        (lambda s: s.update({'0.bias': np.ones(16, int)}), {}, r'no weights in 0.bias \(int64 of'),
        (lambda s: s.update({'module.0.bias': np.ones(16)}), {}, 'same name but for module'),
    ],
)
def test_bad_state_dicts_are_named(change, options, message):
    state_dict = golden.formula_state_dict('cifar_model')
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        import_state_dict(state_dict, 'cifar_model', **options)


def test_layers_that_only_torch_has_are_checked_too():
    """They are written back, and torch would not load them."""
    state_dict = golden.formula_state_dict('wrn_28_1')
    for name in ('sub_block1.layer.0.conv1.weight', 'bn1.num_batches_tracked'):
        with pytest.raises(ValueError, match=rf'misshapen {name} \(has shape \(3,\)'):
            import_state_dict({**state_dict, name: np.ones(3)}, 'wrn_28_1')


def test_a_variance_below_0_is_refused():
    state_dict = golden.formula_state_dict('vgg2_bn')
    name = next(name for name in state_dict if name.endswith('running_var'))
    state_dict[name] = -state_dict[name]
    with pytest.raises(ValueError, match=f'a variance below 0 in {name}'):
        import_state_dict(state_dict, 'vgg2_bn')


def test_masked_checkpoints_need_a_density_and_others_name_their_architecture():
    state_dict = golden.formula_state_dict('cifar_model', 'subnet')
    with pytest.raises(ValueError, match='does not say its density'):
        import_state_dict(state_dict, 'cifar_model')
    with pytest.raises(ValueError, match=r'those of wrn_28_1$'):
        import_state_dict(golden.formula_state_dict('wrn_28_1'), 'wrn_28_4')
    with pytest.raises(ValueError, match=r'missing.*unexpected.*those of vgg4_bn$'):
        import_state_dict(golden.formula_state_dict('vgg4_bn'), 'wrn_28_4')


def test_variables_of_another_network_are_refused():
    variables = import_state_dict(golden.formula_state_dict('cifar_model'), 'cifar_model')
    with pytest.raises(ValueError, match='not the variables of cifar_model_large: missing'):
        export_state_dict(variables, 'cifar_model_large')
    with pytest.raises(ValueError, match='have none'):
        export_state_dict(variables, 'cifar_model', layout='subnet')


@pytest.mark.parametrize('value', [0.0, 0.25])
def test_subnet_export_separates_ties(value):
    """Whatever order a sort leaves equal scores in, it finds the mask that we have."""
    state_dict = golden.formula_state_dict('mnist_model', 'subnet')
    scores = state_dict['5.popup_scores']
    scores[np.abs(scores) < 0.25] = value
    scores[::2] *= -1
    variables = import_state_dict(state_dict, 'mnist_model', density=0.9)
    with pytest.warns(UserWarning, match=r'scores tie with .* \(dense1/kernel\)'):
        exported = export_state_dict(variables, 'mnist_model', layout='subnet')
    moved = exported['5.popup_scores']
    np.testing.assert_allclose(moved, scores, rtol=1e-6, atol=1e-37)
    mask = export_state_dict(variables, 'mnist_model')['5.weight'] != 0
    pruned = int((1 - 0.9) * mask.size)
    for order in (1, -1):
        ranked = np.argsort(np.abs(moved).ravel()[::order], kind='stable')
        found = np.ones(mask.size, bool)
        found[ranked[:pruned]] = False
        np.testing.assert_array_equal(found[::order].reshape(mask.shape), mask)


def test_masks_that_scores_cannot_express_are_refused():
    state_dict = golden.formula_state_dict('mnist_model', 'subnet')
    variables = import_state_dict(state_dict, 'mnist_model', density=0.1)
    variables['masks']['dense2']['kernel'] = 1 - variables['masks']['dense2']['kernel']
    with pytest.raises(ValueError, match='mask of dense2/kernel is not that of its largest'):
        export_state_dict(variables, 'mnist_model', layout='subnet')


def test_dense_checkpoints_bring_the_masks_of_their_zeros():
    state_dict = golden.formula_state_dict('vgg2_bn', 'subnet')
    masked = import_state_dict(state_dict, 'vgg2_bn', density=0.1)
    variables = import_state_dict(export_state_dict(masked, 'vgg2_bn'), 'vgg2_bn', density=0.1)
    assert 'scores' not in variables
    same = jax.tree.map(np.array_equal, variables['masks'], masked['masks'])
    assert all(jax.tree.leaves(same))


# ---- targets ----


def test_targets_take_their_own_architectures():
    variables = import_state_dict(golden.formula_state_dict('vgg2'), 'vgg2')
    with pytest.raises(ValueError, match='takes resnet18, vgg16_bn, not vgg2'):
        export_state_dict(variables, 'vgg2', target='benchmark')
    variables = import_state_dict(golden.formula_state_dict('ResNet18'), 'ResNet18')
    with pytest.raises(ValueError, match='takes layout dense, not subnet'):
        export_state_dict(variables, 'ResNet18', target='torchvision', layout='subnet')


def test_robustbench_normalises_in_a_wrapper():
    state_dict = golden.formula_state_dict('ResNet18')
    exported = export_state_dict(
        import_state_dict(state_dict, 'ResNet18'), 'ResNet18', target='robustbench'
    )
    assert list(exported)[:3] == ['normalize.mean', 'normalize.std', 'model.conv1.weight']
    assert exported['normalize.std'].shape == (1, 3, 1, 1)
    parallel = {f'module.{name}': array for name, array in exported.items()}
    again = import_state_dict(parallel, 'ResNet18')
    golden.assert_same_state_dict(export_state_dict(again, 'ResNet18'), state_dict)
    for mean in (exported['normalize.mean'] + 0.1, np.zeros(5)):
        with pytest.raises(ValueError, match='the file normalises images by mean'):
            import_state_dict({**exported, 'normalize.mean': mean}, 'ResNet18')


# ---- a network of one's own ----


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name='c')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name='n')(x))
        x = nn.Dense(16, name='d')(x.reshape(len(x), -1))
        return nn.Dense(5, name='e')(nn.relu(x))


OWN_TABLE = [
    conv('0', 'c', bias=True),
    norm('1', 'n'),
    flat_dense('4', 'd', channels=8),
    dense('6', 'e'),
]


def own_variables():
    images = np.random.default_rng(0).random((2, 6, 6, 3), np.float32)
    variables = jax.jit(Own().init)(jax.random.key(0, impl='rbg'), images)
    scores = {name: {'kernel': variables['params'][name]['kernel']} for name in 'cde'}
    masks = jax.tree.map(lambda array: top_mask(array, array.size // 2), scores)
    return images, {**variables, 'scores': scores, 'masks': masks}


def test_own_network_with_a_name_table():
    torch = pytest.importorskip('torch')
    images, variables = own_variables()
    state_dict = export_state_dict(variables, OWN_TABLE)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(288, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5),
    )  # fmt: skip
    tensors = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in state_dict.items()}
    network.load_state_dict(tensors, strict=True)
    network.eval()
    found = network(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    expected = Own().apply({**variables, 'params': effective_params(variables)}, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    again = import_state_dict(state_dict, OWN_TABLE, density=0.5)
    golden.assert_same_state_dict(export_state_dict(again, OWN_TABLE), state_dict)
    with pytest.raises(ValueError, match=r'not a state dict of the name table: missing 6\.weight'):
        import_state_dict({k: a for k, a in state_dict.items() if k != '6.weight'}, OWN_TABLE)


def test_own_network_without_a_name_table():
    _, variables = own_variables()
    exported = export_state_dict(variables, None, layout='subnet')
    shapes = {name: array.shape for name, array in exported.items()}
    assert shapes['c/kernel'] == shapes['c/popup_scores'] == (8, 3, 3, 3)
    assert shapes['d/kernel'] == (16, 288) and shapes['n/mean'] == (8,)
    dense_kernel = export_state_dict(variables, None)['e/kernel']
    assert np.count_nonzero(dense_kernel) == 40
