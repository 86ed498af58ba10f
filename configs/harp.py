r"""HARP (Zhao & Wressnegger, ICLR 2023) beside HYDRA and LWM: kept fractions that train, CIFAR-10.

python -m robustprune_jax.data.prepare cifar10 --data_dir=data
python main.py --config=configs/harp.py --config.dataset.dir=data --workdir=runs/harp

The paper's settings: adversarial training by PGD-10, eps 0.031; 100 epochs of pretraining, 20 of
pruning, 100 of fine-tuning; its gradient of a fraction, and its penalty, 0.01 an epoch. The public
benchmark of adversarial pruning has, for its networks, clean / AutoAttack accuracy in % at
densities 0.1, 0.05 and 0.01:
    resnet18 HARP 83.4 / 45.4, 83.4 / 45.7, 83.1 / 45.5  HYDRA 76.7 / 43.3, 76.2 / 42.5, 72.2 / 38.8
    vgg16_bn HARP 80.7 / 42.8, 80.3 / 41.2, 79.4 / 42.0  HYDRA 78.3 / 43.8, 76.6 / 42.6, 70.6 / 35.6
Here every layer's fraction starts at the density, there at 0.1.

`:short` is for few epochs: another gradient of the fractions, and a steeper penalty (the defaults).
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def short(config: ConfigDict) -> None:
    config.pruning.rates = default().pruning.rates
    config.pretrain.epochs, config.prune.epochs, config.finetune.epochs = 20, 8, 20


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.original_trades(config, 'cifar10')
    config.arch, config.objective, config.methods = 'resnet18', 'pgd', 'harp,hydra,lwm'
    for phase in TRAINED:
        config[phase].update(weight_decay=5e-4, schedule='cosine')
    config.pruning.allocation = ''
    config.overrides = 'hydra.pruning.allocation=uniform,lwm.pruning.allocation=uniform'
    config.pruning.rates.update(gamma=0.01, gradient='sum')
    return with_argument(config, arg, {'short': short})
