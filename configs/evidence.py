"""The same experiment under four objectives, for means over seeds: Fashion-MNIST, mnist_model.

apt-get install dataset-fashion-mnist
python main.py --config=configs/evidence.py:trades --config.seed=0 --workdir=runs/trades_0

`:trades`, `:smooth`, `:crown_ibp`, `:mixtrain`, with the same epochs. LWM fine-tunes for as many
epochs as the learned mask is pruned and fine-tuned together, at the same learning rate.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def trades(config: ConfigDict) -> None:
    config.objective = 'trades'
    config.pretrain.learning_rate = 0.05


def smooth(config: ConfigDict) -> None:
    config.pretrain.learning_rate = 0.05
    recipes.smooth(config)
    config.evaluate.examples = 2_000


def crown_ibp(config: ConfigDict) -> None:
    config.objective = 'crown_ibp'
    config.pretrain.update(learning_rate=1e-3, ramp_epochs=6.0)
    config.prune.learning_rate = 1e-3
    config.finetune.learning_rate = 5e-4
    for phase in TRAINED:
        config[phase].update(optimizer='adam', schedule='original_cosine')
    config.evaluate.certified.methods = 'ibp,crown_ibp'


def mixtrain(config: ConfigDict) -> None:
    crown_ibp(config)
    config.objective = 'mixtrain'
    config.certified.ramp = 'staircase'
    config.mixtrain.images = 2
    # Its symbolic bounds take most of a step.
    config.dataset.train_examples = 10_000
    config.dataset.validation = 500
    config.evaluate.examples = 1_000
    config.evaluate.certified.methods = 'ibp,crown_ibp,symbolic'


OBJECTIVES = {'trades': trades, 'smooth': smooth, 'crown_ibp': crown_ibp, 'mixtrain': mixtrain}


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.fashion_mnist(config)
    config.dataset.train_examples = 20_000
    config.dataset.validation = 1_000
    config.densities = (0.1, 0.05, 0.01)
    config.pretrain.epochs = 10
    config.prune.epochs = 4
    config.finetune.epochs = 8
    config.overrides = f'lwm.finetune.epochs={config.prune.epochs + config.finetune.epochs}'
    return with_argument(config, arg, OBJECTIVES)
