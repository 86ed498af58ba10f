r"""Networks without some of their channels, or with 2 of every 4 weights: CIFAR-10, HYDRA and LWM.

python -m robustprune_jax.data.prepare cifar10 --data_dir=data
python main.py --config=configs/structured.py --config.dataset.dir=data --workdir=runs/channels

The densities are fractions of the multiply-adds. Channels go with all that is coupled to them, the
widths of a residual stream together, and one threshold over the network says how many each layer
keeps. For comparison, resnet18 with 10 % of the channels of every layer was published at 10.0 %
accuracy, of a share that fits the layers at 67.5 / 40.3, clean / under PGD-20; peers count
differently.

`:two_of_four` keeps 2 of every 4 inputs of an output, but in the first layer, which has 3.
On Fashion-MNIST, in an hour on two cores:

python main.py --config=configs/evidence.py:trades --workdir=runs/fashion_channels \
    --config.densities=0.5,0.25,0.1 --config.pruning.structure=channels \
    --config.pruning.allocation=global --config.pruning.counts=multiply_adds
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def two_of_four(config: ConfigDict) -> None:
    config.densities = (0.5,)
    config.pruning.update(structure='n_of_m', allocation='', undivided='dense', counts='weights')


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.original_trades(config, 'cifar10')
    config.arch = 'resnet18'
    for phase in TRAINED:
        config[phase].update(weight_decay=5e-4, schedule='cosine')
    config.densities = (0.5, 0.25, 0.1)
    config.pruning.update(structure='channels', allocation='global', counts='multiply_adds')
    return with_argument(config, arg, {'two_of_four': two_of_four})
