"""The snippets of the docs run, and docs/results.md shows what the report makes of the results."""

import contextlib
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from conversion import to_torch
from robustprune_jax import zoo
from robustprune_jax.attacks import NORMS
from robustprune_jax.bounds.rules import RULES
from robustprune_jax.data import SOURCES
from robustprune_jax.models import MODELS
from robustprune_jax.network import logits_fn
from robustprune_jax.objectives import OBJECTIVES
from robustprune_jax.pruning import CRITERIA, METHODS
from robustprune_jax.report import __main__ as command

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / 'docs' / 'results.md').read_text()
# A command on committed results, and the block after it.
SHOWN = re.compile(
    r'```\npython -m robustprune_jax\.report (docs/results/[^\n]+) --out [^\n]+\n```\n\n'
    r'```\n(.+?)\n```\n',
    re.DOTALL,
)


BLOCKS = SHOWN.findall(RESULTS)


def test_every_report_is_shown():
    assert len(BLOCKS) == RESULTS.count('\npython -m robustprune_jax.report docs/results/') > 0


@pytest.mark.parametrize(('patterns', 'block'), BLOCKS)
def test_tables_are_those_of_the_results(patterns, block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdirs = [str(path) for x in patterns.split() for path in sorted(Path().glob(x))]
    assert command.main([*workdirs, '--out', str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f'{block}\n')


def snippets(path: str) -> list[str]:
    found = re.findall(r'```python\n(.*?)```', (ROOT / path).read_text(), re.DOTALL)
    return [code for code in found if 'import torch' not in code]


def test_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own, zoo = snippets('docs/guide.md')
    names = {}
    exec(zoo, names)
    stand, proved = map(float, capsys.readouterr().out.split())
    assert (stand, proved) == pytest.approx((0.86, 0.81), abs=0.005)  # as the comments say
    for code in (own, *snippets('docs/certificates.md'), *snippets('README.md')):
        exec(code, dict(names))


def test_the_shipped_network_is_the_evaluated_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_torch.main(['--checkpoint', 'fashion_trades_0.01', '--out', 'small.safetensors', '--sparse'])
    names = {'image_shape': (28, 28, 1)}
    names['module'], names['variables'] = zoo.load('fashion_trades_0.01')
    images = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    names['images'] = images.transpose(0, 3, 1, 2)
    for code in snippets('docs/deployment.md'):
        exec(code, names)
    expected = logits_fn(names['module'], names['variables'])(images)
    np.testing.assert_allclose(names['logits'], expected, rtol=0, atol=1e-4)
    kernel = names['variables']['params']['dense2']['kernel']
    np.testing.assert_array_equal(names['arrays']['7.weight'].T, kernel)


def test_extensions_run_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with contextlib.ExitStack() as restored:
        for registry in (CRITERIA, METHODS, NORMS, OBJECTIVES, RULES, MODELS, SOURCES):
            restored.enter_context(mock.patch.dict(registry))
        for code in snippets('docs/extending.md'):
            exec(code, names)
    pretrained, network = names['result']['networks']
    assert network['title'] == 'lottery' and network['density'] == 0.5
    assert network['robust']['pgd']['norm'] == 'l1'
    assert pretrained['robust']['crown']['accuracy'] > 0.5
