"""Networks by path and by name, and what their cards say of them."""

import json

import numpy as np
import pytest

from robustprune_jax import zoo
from robustprune_jax.config import default
from robustprune_jax.data import load
from robustprune_jax.pruning import sparsity


@pytest.mark.parametrize('path', ['export/hydra_0.1.pth.tar', 'density_0.1/hydra/finetune'])
def test_a_run_s_network_by_path(finished, path):
    workdir, result = finished
    entry = next(network for network in result['networks'] if network['name'] == 'hydra_0.1')
    module, variables = zoo.load(workdir / path)
    assert sparsity(variables)['total']['kept'] == entry['kept']
    test = np.load(json.loads((workdir / 'config.json').read_text())['dataset']['dir'])
    logits = module.apply(variables, test['test_images'] / np.float32(255))
    accuracy = np.mean(np.argmax(logits, -1) == test['test_labels'])
    assert accuracy == pytest.approx(entry['clean_accuracy'])


def test_the_card_of_an_export(finished):
    workdir, result = finished
    for entry in result['networks']:
        card = json.loads((workdir / 'export' / f'{entry["name"]}.json').read_text())
        assert float(card['clean_acc']) == pytest.approx(100 * entry['clean_accuracy'], abs=0.01)
        assert float(card['reported']) == pytest.approx(
            100 * entry['robust']['pgd']['accuracy'], abs=0.01
        )
        assert card['autoattack_acc'] is None
        assert (card['threat'], card['density']) == ('Linf', entry['density'])
        assert card['config']['arch'] == card['architecture'] == result['arch']


def test_the_card_says_that_pseudo_labels_were_trained_on(finished, tiny_config):
    config = tiny_config()
    entry = finished[1]['networks'][0]
    assert not zoo.card(config, entry)['additional_data']
    config.dataset.pseudo_labelled = 'pseudo.npz'
    assert zoo.card(config, entry)['additional_data']


@pytest.mark.parametrize('name', zoo.cards())
def test_a_network_of_the_zoo_is_what_its_card_says(name):
    card = zoo.cards()[name]
    module, variables = zoo.load(name)
    assert sparsity(variables)['total']['kept'] == card['kept']
    config = default()
    if card['dataset'] == config.dataset.name:  # the one data set that is always here
        test = load(config.dataset).test
        logits = module.apply(variables, test.images / np.float32(255))
        accuracy = 100 * np.mean(np.argmax(logits, -1) == test.labels)
        assert accuracy == pytest.approx(float(card['clean_acc']), abs=0.01)


@pytest.mark.parametrize(
    'text',
    ['{}', '[]', '{"density": null}', '{"density": NaN}', '{"density": "0.1"}', '{', '[' * 9999],
)
def test_a_card_that_is_none_ends_in_one_line(tmp_path, text):
    (tmp_path / 'a.pth.tar').touch()
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(
        ValueError, match=r"a\.json is no card: its field 'density' must be above 0"
    ):
        zoo.load(tmp_path / 'a.pth.tar')


def test_an_unknown_name_brings_the_nearest():
    with pytest.raises(ValueError, match=r"unknown network.*'digits_trades_0.11': did you mean"):
        zoo.load('digits_trades_0.11')
    with pytest.raises(FileNotFoundError, match='no checkpoint'):
        zoo.load('tests')
