import importlib.util
import sys
from pathlib import Path

import pytest
from absl import app

from robustprune_jax.attacks import NORMS
from robustprune_jax.config import default, fields, with_argument
from robustprune_jax.rules import check
from robustprune_jax.runtime.files import differences

ROOT = Path(__file__).parents[2]


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
        ('prun.epochs=3', "unknown config field 'prun.epochs': did you mean 'prune.epochs'"),
        ('prune.epochs.last=3', "unknown config field .*: did you mean 'prune.epochs'"),
        ('attack=3', "unknown config field 'attack': did you mean 'attack.eps'"),
        ('prune.epochs=many', 'prune.epochs=many: expected int, such as 10'),
        ('prune.epochs={[1]:2}', 'expected int, such as 10'),
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
        ('attack.steps', None, 'config.attack.steps is None: expected a whole number'),
        ('prune.epochs', 0, 'config.prune.epochs'),
        ('densities', (0.1, 0.1), 'no density twice'),
        ('prune.momentum', 1.0, 'below 1'),
        ('finetune.warmup_epochs', 20.0, 'below epochs'),
        ('evaluate.attack', 'apgd', "unknown config.evaluate.attack 'apgd': did you mean 'pgd'"),
        ('evaluate.pgd.norm', 'l_2', "unknown config.evaluate.pgd.norm 'l_2': did you mean 'l2'"),
        ('prune.objective', 'nat', "unknown config.prune.objective 'nat': did you mean 'natural'"),
        ('evaluate.certified.methods', 'ibp,crwn', "certified.methods 'crwn': did you mean 'crown"),
        ('evaluate.certified.methods', 'ibp, ibp', 'no name twice'),
        ('evaluate.certified.methods', 'complete,ibp', 'complete last'),
        ('evaluate.certified.timeout', -1.0, 'at least 0'),
        ('seed', 2**32, r'below 2\*\*32'),  # jax's key of it is that of 0
        ('objectiv', 'pgd', "unknown config field 'objectiv': did you mean 'objective'"),
        ('attack', {'eps': 0.1}, 'config.attack.norm is missing'),
    ],
)
def test_values_that_no_part_could_work_with(field, value, message):
    config = default()
    *sections, name = field.split('.')
    section = config
    for key in sections:
        section = section[key]
    section[name] = value
    with pytest.raises(ValueError, match=message):
        check(config)


# By the type of a field. A number below 0 has no meaning in any of them.
NONSENSE = {
    bool: [None],
    int: [None, True, -1],
    float: [None, -1.0, float('nan'), float('inf'), float('-inf')],
    str: [None, 'no such name'],
    tuple: [None, (), ('0.1',), (True,), (-1.0,), (float('nan'),)],
}
FREE_TEXT = {'source', 'dataset.name', 'dataset.dir', 'dataset.pseudo_labelled'}


def test_nonsense_in_any_field_is_one_line_that_names_it():
    accepted = []
    for field, usual in fields(default()).items():
        for value in NONSENSE[type(usual)]:
            if value and field in FREE_TEXT:
                continue
            config = default()
            config.update_from_flattened_dict({field: value})
            try:
                check(config)
                accepted.append((field, value))
            except ValueError as error:
                assert f'config.{field} ' in str(error) and '\n' not in str(error)
    assert accepted == []


def test_the_original_cosine_needs_two_epochs():
    config = default()
    config.prune.update(schedule='original_cosine', epochs=1)
    with pytest.raises(ValueError, match=r'prune.epochs.*rate 0'):
        check(config)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('attack', 'standard', 'standard has no other'),
        ('certified.methods', 'ibp', 'bounds have no'),
    ],
)
def test_a_norm_that_pgd_alone_knows_is_refused_before_training(field, value, message, monkeypatch):
    monkeypatch.setitem(NORMS, 'l3', NORMS['l2'])
    config = default()
    config.evaluate.pgd.norm = 'l3'
    check(config)
    config.update_from_flattened_dict({f'evaluate.{field}': value})
    with pytest.raises(ValueError, match=f"config.evaluate.pgd.norm is 'l3': .*{message}"):
        check(config)


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS = {path: module_of(path) for path in sorted((ROOT / 'configs').glob('*.py'))}


def variants(module):
    """Its variants but for smoke, as it tells them to who names none of them."""
    with pytest.raises(ValueError, match='unknown config variant') as error:
        module.get_config('?')
    return str(error.value).split('one of ')[1].split(', ')[1:]


@pytest.mark.parametrize(
    ('path', 'argument'),
    [
        pytest.param(path, argument, id=f'{path.stem}:{argument}')
        for path, module in CONFIGS.items()
        for variant in ['', *variants(module)]
        for argument in (variant, f'{variant},smoke', f'smoke,{variant}')
    ],
)
def test_every_config_runs_with_every_variant_and_shrinks(path, argument):
    module = CONFIGS[path]
    config = module.get_config(argument)
    check(config)
    if 'smoke' in argument:
        assert config.dataset.train_examples <= 256 and config.pretrain.batch_size <= 64
        assert config.pretrain.epochs <= 2 * config.free.n_repeats
    assert f'--config=configs/{path.name}' in module.__doc__


def test_smoke_knows_of_the_repeats_of_a_single_field():
    config = CONFIGS[ROOT / 'configs/cifar10.py'].get_config('smoke,objective=free,prune.epochs=7')
    check(config)
    assert config.pretrain.epochs == 2 * config.free.n_repeats
    assert config.prune.epochs == 7


def test_differences_name_the_leaf():
    one, other = {'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'c': 3}, 'd': 0}
    assert list(differences(one, other)) == ['a.c: 2, 3', 'd: None, 0']


@pytest.fixture(scope='module')
def main():
    return module_of(ROOT / 'main.py')  # once: it defines flags


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.phase=prune'], 'the config has no field \'phase\' Did you mean "phases"'),
        (['--config.pretrain.epochs=x'], "invalid literal for int() with base 10: 'x'"),
        (['--config=configs/digits.py:smok'], "did you mean 'smoke'"),
        (['prune'], "unexpected argument 'prune'"),
    ],
)
def test_the_command_line_answers_in_one_line(main, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ['main.py', '--config=configs/digits.py', f'--workdir={tmp_path}', *flags]
    monkeypatch.setattr(sys, 'argv', command)  # where ml_collections looks too
    with pytest.raises(SystemExit) as stop:
        app.run(main.main, flags_parser=main.parse_flags)
    said = f'{stop.value.code}{capsys.readouterr().err}'
    assert stop.value.code != 0
    assert message in said
    assert 'Traceback' not in said
