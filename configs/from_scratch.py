r"""Sparse networks trained from the start, under TRADES, with a mask that is not learned or moves.

apt-get install dataset-fashion-mnist
python main.py --config=configs/from_scratch.py --workdir=runs/snip
python main.py --config=configs/from_scratch.py:random --workdir=runs/random_masks
python main.py --config=configs/from_scratch.py:dynamic --workdir=runs/dynamic

The mask is SNIP's (weights times gradients on one batch of the random network), or with `:random`
drawn; the weights grow by 1 / sqrt(density), so that the variance of a sparse layer's outputs is
that of a dense one. With `:dynamic` masks are drawn and then move (FlyingBird, RigL, SET), and the
weights do not grow, as layers differ in density. The table's networks are `snip_0.1` or
`random_0.1`, and so on; `pretrain` is the random network itself.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument


def random(config: ConfigDict) -> None:
    config.methods = 'random'


def dynamic(config: ConfigDict) -> None:
    config.methods = 'flyingbird,rigl,set'
    config.pruning.rescale = False


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.fashion_mnist(config)
    config.dataset.train_examples = 20_000
    config.dataset.validation = 1_000
    config.phases = 'pretrain,finetune,evaluate'
    config.methods = 'snip'
    config.densities = (0.1, 0.05, 0.01)
    config.pretrain.epochs = 0
    config.pruning.rescale = True
    config.finetune.update(epochs=20, learning_rate=0.05)
    return with_argument(config, arg, {'random': random, 'dynamic': dynamic})
