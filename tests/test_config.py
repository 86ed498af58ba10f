import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from robustprune_jax.config import check, default, differences, with_argument

ROOT = Path(__file__).parents[1]


def test_an_argument_changes_fields_and_variants():
    def small(config):
        config.prune.epochs = 3

    config = with_argument(
        default(), 'prune.epochs=7,density=0.01,objective=pgd,small,attack.eps=1', {'small': small}
    )
    assert config.densities == (0.01,)
    assert config.objective == 'pgd'
    assert config.prune.epochs == 7  # a field corrects a variant, wherever it stands
    assert config.attack.eps == 1.0 and isinstance(config.attack.eps, float)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('smok', "unknown config variant 'smok': did you mean 'smoke'"),
        ('objectiv=pgd', "unknown config field 'objectiv': did you mean 'objective'"),
        ('prun.epochs=3', "unknown config section 'prun': did you mean 'prune'"),
        ('prune.epochs=many', 'prune.epochs=many: expected int, such as 10'),
        ('densities=0.1', 'expected tuple'),
    ],
)
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        with_argument(default(), argument)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('attack.steps', 0, 'config.attack.steps is 0: expected at least 1'),
        ('prune.epochs', 0, 'config.prune.epochs'),
        ('densities', (0.1, 0.1), 'no density twice'),
        ('prune.momentum', 1.0, 'below 1'),
        ('lwm.warmup_epochs', 20.0, 'below epochs'),
        ('evaluate.attack', 'apgd', "'apgd': expected pgd or standard"),
    ],
)
def test_values_that_no_part_could_work_with(field, value, message):
    config = default()
    check(config)
    *sections, name = field.split('.')
    section = config
    for key in sections:
        section = section[key]
    section[name] = value
    with pytest.raises(ValueError, match=message):
        check(config)


def test_the_original_cosine_needs_two_epochs():
    config = default()
    config.prune.update(schedule='original_cosine', epochs=1)
    with pytest.raises(ValueError, match=r'prune.epochs.*rate 0'):
        check(config)


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_fits_the_schema_and_shrinks(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check(module.get_config())
    config = module.get_config('smoke')
    check(config)
    assert config.dataset.train_examples <= 256 and config.pretrain.epochs <= 2
    assert set(config) == set(default())
    assert f'--config=configs/{path.name}' in module.__doc__


def test_differences_name_the_leaf():
    one, other = {'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'c': 3}, 'd': 0}
    assert list(differences(one, other)) == ['a.c: 2, 3', 'd: None, 0']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.phase=prune'], 'the config has no field \'phase\' Did you mean "phases"'),
        (['--config.pretrain.epochs=x'], "invalid literal for int() with base 10: 'x'"),
        (['--config=configs/digits.py:smok'], "did you mean 'smoke'"),
        (['prune'], "unexpected argument 'prune'"),
    ],
)
def test_the_command_line_answers_in_one_line(flags, message, tmp_path):
    run = subprocess.run(
        [sys.executable, 'main.py', '--config=configs/digits.py', f'--workdir={tmp_path}', *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert message in run.stderr
    assert 'Traceback' not in run.stderr
