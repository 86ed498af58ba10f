"""Properties and networks of VNN-COMP: written, read and decided."""

import re
from fractions import Fraction

import numpy as np
import pytest
from networks import drawn
from own_network import Net

from conversion import read_onnx, read_vnnlib, to_vnncomp, to_vnnlib
from conversion.evaluate import logits_fn
from robustprune_jax import network
from robustprune_jax.bounds import __main__ as command
from robustprune_jax.bounds import decide, verify
from robustprune_jax.training import checkpoint

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def bounds_of(text):
    """The numbers of a property's inputs as they are written: lower and upper."""
    return [re.findall(rf'\(assert \({op} X_\d+ (\S+?)\)\)', text) for op in ('>=', '<=')]


@pytest.mark.parametrize('eps', [Fraction(2, 255), 0.1, 0.0, 1e-9])
def test_the_box_that_is_written_contains_the_ball_and_is_as_small(eps):
    images = np.random.default_rng(0).random((3, 4, 2), np.float32)
    images.ravel()[:4] = 0, 1, 1e-30, 1 / 255
    text = to_vnnlib(images, 1, eps=eps, num_classes=3)
    pixels = images.transpose(2, 0, 1).ravel()  # as in the ONNX file
    lower, upper = bounds_of(text)
    for x, low, high in zip(pixels.tolist(), lower, upper, strict=True):
        least, most = max(Fraction(x) - Fraction(eps), 0), min(Fraction(x) + Fraction(eps), 1)
        for read in (Fraction, lambda number: Fraction(float(np.float32(number)))):
            assert read(low) <= least and most <= read(high)
        step = 2 * np.spacing(np.float32([least, most]))
        assert least - Fraction(low) <= step[0] and Fraction(high) - most <= step[1]
    assert text.count('declare-const X') == 24 and text.count('declare-const Y') == 3
    assert text.endswith('(assert (or\n    (and (>= Y_0 Y_1))\n    (and (>= Y_2 Y_1))\n))\n')


def test_a_property_is_read_as_it_was_written(tmp_path):
    text = to_vnnlib(np.full((2, 2, 1), 0.25, np.float32), 1, eps=0.5, num_classes=3)
    (tmp_path / 'a.vnnlib').write_text(text)
    (region,) = read_vnnlib(tmp_path / 'a.vnnlib')
    np.testing.assert_array_equal([region.lower, region.upper], [[0] * 4, [0.75] * 4])
    rows, limits = zip(*region.unsafe, strict=True)
    np.testing.assert_array_equal(rows, [[[-1, 1, 0]], [[0, 1, -1]]])
    np.testing.assert_array_equal(limits, [[0], [0]])


@pytest.fixture(scope='module')
def benchmark(tmp_path_factory):
    """A network, images and labels that it gives them, and the folder of the benchmark of them."""
    folder, shape, module = tmp_path_factory.mktemp('benchmark'), (6, 6, 2), Net(3)
    pixels = np.random.default_rng(1).integers(256, size=(6, *shape), dtype=np.uint8)
    images = pixels.astype(np.float32) / 255
    variables = drawn(module, shape)
    logits = np.asarray(network.logits_fn(module, variables)(images))
    variables['params']['head']['bias'] -= np.median(logits, axis=0)  # else all have one label
    ours = network.logits_fn(module, variables)
    labels = np.asarray(ours(images)).argmax(axis=1)
    meta = {'arch': 'own_network:Net', 'num_classes': 3, 'image_shape': [*shape]}
    checkpoint.save_network(folder / 'run', variables, meta | {'phase': 'pretrain'})
    arrays = {'images': pixels, 'labels': labels}
    splits = {f'{part}_{k}': array for part in ('train', 'test') for k, array in arrays.items()}
    np.savez(folder / 'data.npz', **splits)
    given = f'--checkpoint {folder}/run --dataset npz --dir {folder}/data.npz --eps 1/20'
    to_vnncomp.main([*given.split(), '--timeout', '60', '--out', f'{folder}/out'])
    return ours, images, labels, folder / 'out'


def test_the_network_that_is_read_has_the_same_logits(benchmark):
    ours, images, _, folder = benchmark
    chw = images.transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(folder / 'network.onnx')
    (expected,) = session.run(['logits'], {'images': chw})
    found = logits_fn(read_onnx(folder / 'network.onnx'))(chw)
    for logits in (found, ours(images)):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_we_write_is_decided_as_we_verify_it(benchmark):
    ours, images, labels, folder = benchmark
    graph = read_onnx(folder / 'network.onnx')
    session = onnxruntime.InferenceSession(folder / 'network.onnx')
    theirs, answers = logits_fn(graph), set()
    verdicts = verify(ours, images, labels, eps=0.05, timeout=60)
    lines = (folder / 'instances.csv').read_text().splitlines()
    for i, (line, verdict) in enumerate(zip(lines, verdicts, strict=True)):
        name = f'vnnlib/image_{i}.vnnlib'
        assert line == f'network.onnx,{name},60'
        answer = decide(theirs, read_vnnlib(folder / name), image_shape=graph.image_shape)
        assert answer.status == {'verified': 'unsat', 'falsified': 'sat'}[verdict.status]
        answers.add(answer.status)
        if answer.status == 'sat':
            x = answer.inputs.reshape(1, 2, 6, 6)
            assert np.abs(x - images[i].transpose(2, 0, 1)).max() <= 0.05 + 1e-6
            (logits,) = session.run(['logits'], {'images': x})
            assert logits.argmax() != labels[i]
    assert answers == {'sat', 'unsat'}


def save(path, inputs, outputs, nodes, **weights):
    """An ONNX file in onnx's own notation: x, float of these sizes -> y, of these, and weights."""
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[{inputs}] x) => (float[{outputs}] y) '
    model = onnx.parser.parse_model(f'{text} {{ {nodes} }}')
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array), name))
    onnx.save(model, path)
    return path


# The sizes of y, the nodes, the shapes of their weights.
OPERATIONS = {
    'conv': (
        'a, b, c, d',
        """y = Conv <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 0, 1], group = 2,
        dilations = [1, 2]> (x, w, b)""",
        {'w': (6, 2, 3, 2), 'b': 6},
    ),
    'bare conv': ('a, b, c, d', 'y = Conv (x, w)', {'w': (2, 4, 3, 3)}),
    'max pool': ('a, b, c, d', 'y = MaxPool <kernel_shape = [3, 2], pads = [1, 0, 0, 1]> (x)', {}),
    'average pool': (
        'a, b, c, d',
        """h = AveragePool <kernel_shape = [2, 2], strides = [2, 1]> (x)
        y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (h)""",
        {},
    ),
    'global': ('a, b, c, d', 'h = GlobalAveragePool (x) y = Identity (h)', {}),
    'norm': (
        'a, b, c, d',
        'y = BatchNormalization <epsilon = 0.1> (x, w, b, m, v)',
        dict.fromkeys('wbmv', 4),
    ),
    'gemm': (
        'a, b',
        'h = Flatten (x) y = Gemm <alpha = 0.5, beta = 2.0> (h, w, b)',
        {'w': (120, 3), 'b': 3},
    ),
    'gemm of the transpose': (
        'a, b',
        'h = Flatten (x) y = Gemm <transB = 1> (h, w)',
        {'w': (3, 120)},
    ),
    'product': ('a, b, c, d', 'h = MatMul (x, w) y = Add (b, h)', {'w': (5, 7), 'b': 7}),
    'curves': (
        'a, b, c, d',
        """c = Sigmoid (x) d = Sqrt (c) e = Log (d) f = Tanh (e) g = Exp (f) h = Reciprocal (g)
        y = Erf (h)""",
        {},
    ),
    'arithmetic': (
        'a, b, c, d',
        'c = Sub (w, x) d = Neg (c) e = Abs (d) f = Div (e, w) g = Mul (f, x) y = Max (g, w, c)',
        {'w': (4, 1, 5)},
    ),
    'relus': (
        'a, b, c, d',
        """c = Relu (x) d = LeakyRelu <alpha = 0.2> (x) e = LeakyRelu (d)
        y = Concat <axis = -2> (c, e)""",
        {},
    ),
    'moves': (
        'a, b',
        'c = Transpose (x) d = Transpose <perm = [3, 1, 0, 2]> (c) y = Flatten <axis = 3> (d)',
        {},
    ),
    'means': (
        'a, b, c',
        'c = ReduceMean <axes = [2]> (x) y = ReduceMax <axes = [-1], keepdims = 0> (c)',
        {},
    ),
    'shapes': (
        'a, b, c, d',
        """s = Constant <value = int64[3] {0, -1, 2}> () i = Constant <value_ints = [0]> ()
        j = Constant <value = int64[4] {2, 1, 1, 1}> ()
        c = Reshape (x, s) d = Unsqueeze (c, i) e = Squeeze (d, i) y = Expand (e, j)""",
        {},
    ),
}


@pytest.mark.parametrize('name', OPERATIONS)
def test_onnxruntime_computes_what_is_read(tmp_path, name):
    outputs, nodes, shapes = OPERATIONS[name]
    rng = np.random.default_rng(3)
    weights = {key: rng.uniform(0.3, 1, shape).astype('f') for key, shape in shapes.items()}
    path = save(tmp_path / 'a.onnx', '1, 4, 6, 5', outputs, nodes, **weights)
    x = rng.normal(size=(1, 4, 6, 5)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {'x': x})
    (found,) = logits_fn(read_onnx(path))(x)
    np.testing.assert_allclose(found, expected.ravel(), rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """|x_0 - x_1| in two halves, one of which is 0."""
    return save(
        tmp_path_factory.mktemp('halves') / 'a.onnx', '1, 2', '1, 2',
        'c = MatMul (x, w) h = Add (c, b) r = Relu (h) y = Gemm <transB = 1> (r, i)',
        w=np.float32([[1, -1], [-1, 1]]), b=np.zeros(2, 'f'), i=np.eye(2, dtype='f'),
    )  # fmt: skip


@pytest.fixture(scope='module')
def halves_read(halves):
    return logits_fn(read_onnx(halves))


DECLARED = """; as VNN-COMP's mnist_fc
(declare-const X_0 Real)
(declare-const X_1 Real)

(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = """(assert (<= X_0 0.5))
(assert (>= X_0 -1))
(assert (<= X_1 0.75))
(assert (>= X_1 .25))
"""


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ('asserted', 'status'),
    [
        ('(assert (<= Y_0 -0.01))', 'unsat'),
        ('(assert (>= Y_0 0.26))', 'unsat'),
        ('(assert (>= Y_0 0.24))', 'sat'),  # at (0.5, 0.25) only
        ('(assert (or (and (>= Y_0 0.26)) (and (>= Y_1 1.76))))', 'unsat'),
        ('(assert (or (and (>= Y_0 0.26)) (and (>= Y_1 1.74))))', 'sat'),
        ('(assert (>= Y_0 0.05)) (assert (>= Y_1 0.05))', 'unsat'),  # by splitting
        ('(assert (or (and (>= Y_0 0.05) (>= Y_1 0.05)) (and (<= Y_1 0.01) (<= Y_0 0.1))))', 'sat'),
        ('(assert (>= (+ Y_0 (* 2.0 Y_1)) 3.51))', 'unsat'),
        ('(assert (>= (- (* Y_0 2) (- Y_1) 1e-2) 3.4))', 'unsat'),
        ('(assert (or (and (<= X_0 0.2) (>= Y_0 0.01)) (and (>= X_1 0.7) (>= Y_1 1.71))))', 'sat'),
        (
            '(assert (or (and (<= X_0 0.2) (>= Y_0 0.01)) (and (<= X_1 0.7) (>= Y_1 1.71))))',
            'unsat',
        ),
    ],
)
def test_properties_of_a_network_by_hand(halves_read, tmp_path, asserted, status):
    regions = read_vnnlib(written(tmp_path / 'a.vnnlib', DECLARED + BOX + asserted))
    answer = decide(halves_read, regions, image_shape=(2,), timeout=60)
    assert answer.status == status
    if status == 'sat':
        (x0, x1), outputs = answer.inputs, answer.outputs
        assert -1 <= x0 <= 0.5 and 0.25 <= x1 <= 0.75
        assert outputs == pytest.approx((max(x0 - x1, 0), max(x1 - x0, 0)), abs=1e-6)


def test_bounds_that_float32_has_not_are_rounded_outward(halves_read, tmp_path):
    assert float(np.float32(0.7)) < 0.7  # so the box as float32 reads it does not reach the point
    box = BOX.replace('0.5', '0.7').replace('0.75', '0').replace('.25', '0')
    (region,) = read_vnnlib(
        written(tmp_path / 'a.vnnlib', DECLARED + box + '(assert (>= Y_0 0.7))')
    )
    assert decide(halves_read, [region], image_shape=(2,)).status != 'unsat'
    assert decide(halves_read, [region], image_shape=(2,), timeout=0).status == 'timeout'


def decided(network, path, text, capsys):
    command.main(['--onnx', f'{network}', '--vnnlib', f'{written(path, text)}'])
    return capsys.readouterr()


def test_the_command_answers_in_the_words_of_vnncomp(halves, tmp_path, capsys):
    path = tmp_path / 'a.vnnlib'
    assert decided(halves, path, DECLARED + BOX + '(assert (>= Y_1 1.8))', capsys).out == 'unsat\n'
    point = BOX.replace('-1', '0.5').replace('0.75', '0.25')
    printed = decided(halves, path, DECLARED + point + '(assert (<= Y_1 0.1))', capsys)
    assert printed.out == 'sat\n((X_0 0.5)\n(X_1 0.25)\n(Y_0 0.25)\n(Y_1 0))\n'
    pooled = save(
        tmp_path / 'b.onnx',
        '1, 1, 2',
        '1, 1, 2',
        'y = MaxPool <kernel_shape = [2], pads = [1, 0]> (x)',
    )
    printed = decided(pooled, path, DECLARED + BOX + '(assert (<= (- Y_1 Y_0) -0.01))', capsys)
    assert printed.out == 'unknown\n' and printed.err == 'bounds: no branching on MaxPool\n'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('(assert (<= X_0 1)', r'line 5: a \( that is not closed'),
        ('(assert (<= X_0 1)))', r'line 5: a \) that closes nothing'),
        ('(assert (< X_0 1))', r'line 5: expected \(and \(...\) ...\), .* or \(>= a b\)'),
        ('(assert (<= X_0 one))', 'line 5: one is no number or linear term'),
        ('(assert (<= (* X_0 X_1) 1))', 'line 5: this is no number or linear term'),
        ('(assert (<= X_2 1))', 'line 5: X_2 is not declared'),
        (
            '(assert (<= X_0 Y_0))',
            'line 5: expected the bound of one input, or a constraint of out',
        ),
        (
            '(declare-const X_3 Real)',
            r'line 5: expected \(declare-const X_0 Real\), X_1 ... in order',
        ),
        ('(check-sat)', 'line 5: expected .declare-const X_0 Real'),
        ('unsafe', "'unsafe' is outside of all"),
        ('(assert (<= X_0 1))', 'X_0 has no upper or no lower bound'),
        (BOX, 'nothing is asserted of the outputs'),
    ],
)
def test_malformed_properties_end_in_one_line(tmp_path, text, message):
    declared = DECLARED.replace('\n\n', '\n').partition('\n')[2]  # four lines
    path = written(tmp_path / 'a.vnnlib', declared + text)
    with pytest.raises(ValueError, match=message) as raised:
        read_vnnlib(path)
    assert '\n' not in str(raised.value) and str(raised.value).startswith(f'{path}: ')


@pytest.mark.parametrize(
    ('nodes', 'message'),
    [
        ('y = Sign (x)', "node 'y': Sign is not read; there is Abs, Add"),
        ('[last] y = Softmax (x)', "node 'last': Softmax is not read"),
        ('y = Gemm <transA = 1> (x, w)', r"node 'y': this use of Gemm \(transA\) is not read"),
        (
            'y = AveragePool <kernel_shape = [2], pads = [1, 0]> (x)',
            r'this use of AveragePool \(kernel_shape, pads\)',
        ),
        ('y = Relu (', 'is no ONNX file, or damaged'),
    ],
)
def test_networks_that_are_not_read_end_in_one_line(tmp_path, nodes, message, capsys):
    path = tmp_path / 'a.onnx'
    if nodes.endswith('('):
        path.write_text(nodes)
    else:
        sizes = '1, 1, 2' if 'Pool' in nodes else '1, 2'
        save(path, sizes, sizes, nodes, w=np.eye(1, 2, dtype='f'))
    with pytest.raises(SystemExit, match=message) as raised:
        command.main(['--onnx', f'{path}', '--vnnlib', 'none'])
    assert '\n' not in str(raised.value)


def test_a_property_of_another_network_is_refused(halves_read):
    region = np.zeros(3), np.ones(3), [(np.ones((1, 2)), np.zeros(1))]
    with pytest.raises(ValueError, match='3 inputs and 2 outputs: the network has 2 and 2'):
        decide(halves_read, [region], image_shape=(2,))
