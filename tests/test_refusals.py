"""What ends a run in one line, before anything is trained."""

import json
import shutil

import pytest
from runs import weights

from robustprune_jax import pipeline, rules
from robustprune_jax.training import checkpoint


def test_an_unfinished_source_is_refused(finished, tiny_config, tmp_path):
    source = shutil.copytree(finished[0] / 'pretrain', tmp_path / 'pretrain')
    shutil.rmtree(source / 'checkpoints/24')
    config = tiny_config()
    config.phases, config.source = 'prune', str(source)
    with pytest.raises(ValueError, match=r'pretrain is unfinished, at step 21 of 24: finish it'):
        pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'arch': 'mnist_modell'}, "'mnist_modell'.*mnist_model"),
        ({'objective': 'trade'}, "unknown config.objective 'trade': did you mean 'trades'"),
        ({'prune.objective': 'nat'}, 'unknown config.prune.objective'),
        ({'trades.beta': float('nan')}, 'config.trades.beta is nan: expected a finite number'),
        ({'densities': (0.1, 1.5)}, 'config.densities'),
        ({'densities': (0.0,)}, 'config.densities'),
        ({'phases': 'pretrain,prun'}, "'prun': did you mean 'prune'"),
        ({'dataset.num_classes': 2}, 'label'),
        ({'dataset.dir': 'nowhere.npz'}, 'nowhere.npz'),
        ({'pretrain.schedule': 'cos'}, 'unknown config.pretrain.schedule'),
        ({'evaluate.pgd.eps': 2.0}, 'config.evaluate.pgd.eps is 2.0: expected at most 1'),
        ({'phases': 'prune', 'source': 'nowhere'}, 'no checkpoint in nowhere'),
        ({'phases': 'prune'}, 'no checkpoint in .*pretrain'),
        ({'phases': 'prune', 'source': 'PRETRAIN', 'arch': 'cifar_model'}, 'arch'),
        ({'phases': 'prune', 'source': 'PRETRAIN', 'dataset.num_classes': 4}, 'num_classes: 3, 4'),
        ({'phases': 'prune', 'source': 'PRUNED'}, "phase: 'prune', 'pretrain'"),
        ({'phases': 'finetune', 'source': 'PRUNED'}, 'does not fit lwm'),
        ({'phases': 'finetune', 'source': 'PRUNED', 'densities': (0.2,)}, 'density: 0.5, 0.2'),
        ({'overrides': 'lwm.finetune.epoch=3'}, "'finetune.epoch': did you mean 'finetune.epochs'"),
        ({'overrides': 'lwn.finetune.epochs=3'}, "method in config.overrides 'lwn'"),
        ({'overrides': 'lwm.finetune.epochs=0'}, 'finetune.epochs is 0'),
        ({'overrides': 'lwm'}, 'expected METHOD.FIELD=VALUE'),
        ({'methods': 'hydra,lvm'}, "config.methods 'lvm': did you mean 'lwm'"),
        ({'source': 'PRETRAIN'}, 'starts from scratch'),
        ({'pruning.structure': 'n_of_m'}, r'densities is \(0.5, 0.1\): expected n / m'),
        ({'pruning.allocation': 'learned'}, 'learned only where scores are'),
        ({'pruning.allocation': 'erk', 'densities': (0.0001,)}, 'density 0.0001 keeps'),
        ({'pruning.structure': 'n_of_m', 'densities': (0.5,)}, 'conv1/kernel has 1 inputs'),
        ({'pruning.counts': 'multiply_adds'}, 'weights, unless the structure is channels'),
        ({'pruning.structure': 'channels', 'densities': (1e-4,)}, 'one channel of each layer'),
        ({'methods': 'set', 'pruning.structure': 'channels'}, 'weights, where masks move'),
        ({'methods': 'rigl', 'pruning.dynamic.grow': 'momentum'}, 'config.pruning.dynamic.grow'),
        (
            {'methods': 'flyingbird', 'finetune.epochs': 2},
            'finetune.epochs is 2: the masks of flyingbird 0.5 finetune would not move',
        ),
        ({'finetune.warmup_epochs': 3.9}, 'is 3.9: it takes all 12 steps of hydra 0.5 finetune'),
    ],
)
def test_errors_before_training(finished, tiny_config, tmp_path, change, message):
    config = tiny_config()
    places = {'PRETRAIN': 'pretrain', 'PRUNED': 'density_0.5/hydra/prune'}
    for field, value in change.items():
        if value in places:
            value = str(finished[0] / places[value])
        *sections, name = field.split('.')
        section = config
        for key in sections:
            section = section[key]
        section[name] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        pipeline.run(config, tmp_path)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())  # so that the corrected command is not refused


def test_another_experiments_workdir_is_refused(finished, tiny_config):
    config = tiny_config()
    config.prune.learning_rate = 0.07
    with pytest.raises(ValueError, match=r'another experiment.*prune.learning_rate: 0.1, 0.07'):
        pipeline.run(config, finished[0])


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('config.json', '{"arch": "mnist_mo'),
        ('config.json', '{}'),
        ('config.json', '[1]'),
        ('config.json', '{"pretrain": 5}'),
        ('result.json', ''),
        ('result.json', '[]'),
        ('result.json', '{"networks": [3]}'),
    ],
)
def test_a_damaged_file_of_the_run_is_named_before_training(tiny_config, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f'{name} is damaged .*: move it away') as error:
        pipeline.run(tiny_config(), tmp_path)
    assert '\n' not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_version_0_1_left_ends_in_one_line(finished, tiny_config, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / 'copy')
    saved = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps({**saved, 'lwm': saved['finetune']}))
    with pytest.raises(ValueError, match=r'a run of robustprune_jax 0.1.*choose a new --workdir'):
        pipeline.run(tiny_config(), copy)
    meta = {**checkpoint.load_meta(copy / 'pretrain'), 'score_init': None}
    del meta['method']
    with checkpoint.Checkpoints(tmp_path / 'old') as checkpoints:
        checkpoints.save_items(1, {'variables': weights(copy / 'pretrain'), 'meta': meta})
    with pytest.raises(ValueError, match=r'was saved by robustprune_jax 0.1: its conversion'):
        checkpoint.load(tmp_path / 'old')


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('own_network:Nett', r"config.arch is 'own_network:Nett': .*cannot be imported"),
        ('no_such.package:Net', 'cannot be imported .*PYTHONPATH'),
        ('own_network:WithoutTrain', 'no Flax module with __call__'),
        ('json:loads', 'no Flax module'),
    ],
)
def test_what_is_no_network_is_refused(tiny_config, arch, message):
    config = tiny_config()
    config.arch = arch
    with pytest.raises(ValueError, match=message) as error:
        rules.check(config)
    assert '\n' not in str(error.value)
