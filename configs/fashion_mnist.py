"""Fashion-MNIST, mnist_model under TRADES, pruned to 0.1, 0.05 and 0.01, PGD-20 on all test images.

apt-get install dataset-fashion-mnist
python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

`:small` is the experiment that was also run with the original: the first 10,000 training images,
its schedule, densities 0.05 and 0.01, the first 2,000 test images.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def small(config: ConfigDict) -> None:
    config.dataset.train_examples = 10_000
    config.dataset.validation = 0
    config.densities = (0.05, 0.01)
    config.evaluate.examples = 2_000
    config.evaluate.pruned = True
    recipes.original_fractions(config)
    config.pretrain.epochs = 8
    config.prune.epochs = 4
    config.finetune.epochs = 6
    for phase in TRAINED:
        config[phase].schedule = 'original_cosine'


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.fashion_mnist(config)
    config.dataset.validation = 2_000
    config.densities = (0.1, 0.05, 0.01)
    config.attack.update(eps=0.1, step_size=0.04, steps=5)
    config.pretrain.update(epochs=12, learning_rate=0.05)
    config.prune.update(epochs=5)
    config.finetune.update(epochs=8)
    return with_argument(config, arg, {'small': small})
