r"""Robust subnetworks of a network that is not robust: masks alone, no weight is trained for it.

apt-get install dataset-fashion-mnist
python main.py --config=configs/robust_subnetworks.py --workdir=runs/robust_subnetworks
python main.py --config=configs/robust_subnetworks.py:random --workdir=runs/random_subnetworks

The first pretrains naturally, then lets the robust objective choose which weights stay; the table
has the masked networks as they are after that, `pruned_0.5` and so on. `:random` does the same with
the weights as they are drawn. `:prune.objective=smooth`, `ibp`, `crown_ibp` or `mixtrain` looks for
another robustness, and `:arch=wrn_28_4,dataset.name=cifar10,dataset.dir=data` in another network.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument


def random(config: ConfigDict) -> None:
    config.pretrain.epochs = 0


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.fashion_mnist(config)
    config.dataset.train_examples = 20_000
    config.dataset.validation = 1_000
    config.phases, config.methods = 'pretrain,prune,evaluate', 'hydra'
    config.densities = (0.8, 0.5, 0.2)
    recipes.original_fractions(config)
    config.pretrain.update(objective='natural', epochs=10, learning_rate=0.05)
    config.prune.epochs = 10
    config.evaluate.pruned = True
    return with_argument(config, arg, {'random': random})
