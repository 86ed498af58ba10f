r"""Stability training for randomized smoothing on CIFAR-10, wrn_28_4: the original's recipe.

python -m robustprune_jax.data.prepare cifar10 --data_dir=data
python main.py --config=configs/compact_smoothing.py:semisup --config.dataset.dir=data \
    --workdir=runs/smoothing

`:semisup` mixes in as many pseudo-labelled images, as the original does, from
data/ti_500K_pseudo_labeled.pickle. `:arch=vgg16_bn` is its other network. `:fashion_mnist` trains
mnist_model on 20,000 images.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument


def fashion_mnist(config: ConfigDict) -> None:
    recipes.fashion_mnist(config)
    config.dataset.train_examples = 20_000
    config.dataset.validation = 1_000
    config.evaluate.pgd.steps = 10
    config.evaluate.examples = 2_000
    config.pretrain.update(epochs=10, learning_rate=0.05)
    config.prune.epochs = 4
    config.finetune.epochs = 6


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    config.arch = 'wrn_28_4'
    recipes.colour_images(config, 'cifar10')
    config.smooth.update(sigma=0.25, beta=6.0)
    recipes.original_sgd(config)
    recipes.smooth(config)
    return with_argument(config, arg, {'fashion_mnist': fashion_mnist, 'semisup': recipes.semisup})
