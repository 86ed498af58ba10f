r"""Stability training for randomized smoothing on CIFAR-10, wrn_28_4: the original's recipe.

python -m robustprune_jax.data.prepare cifar10 --data_dir=data
python main.py --config=configs/compact_smoothing.py:semisup --config.dataset.dir=data \
    --workdir=runs/smoothing

`:semisup` mixes in as many pseudo-labelled images, as the original does, from
data/ti_500K_pseudo_labeled.pickle. `:arch=vgg16_bn` is its other network. `:fashion_mnist` trains
mnist_model on 20,000 images.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, with_argument


def semisup(config: ConfigDict) -> None:
    config.dataset.pseudo_labelled = 'data/ti_500K_pseudo_labeled.pickle'
    for phase in ('pretrain', 'prune', 'finetune', 'lwm'):
        config[phase].batch_size *= 2


def fashion_mnist(config: ConfigDict) -> None:
    config.arch = 'mnist_model'
    config.dataset.name = 'idx'
    config.dataset.dir = '/usr/share/datasets/fashion-mnist'
    config.dataset.augment = 'none'
    config.dataset.train_examples = 20_000
    config.dataset.validation = 1_000
    config.evaluate.pgd.steps = 10
    config.evaluate.examples = 2_000
    config.pretrain.update(epochs=10, learning_rate=0.05)
    config.prune.epochs = 4
    config.finetune.epochs = config.lwm.epochs = 6


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    config.arch = 'wrn_28_4'
    config.dataset.name = 'cifar10'
    config.dataset.augment = 'crop_flip'
    config.dataset.validation = 2_000
    config.objective = 'smooth'
    config.densities = (0.1, 0.05, 0.01)
    config.smooth.update(sigma=0.25, beta=6.0)
    for phase, epochs, learning_rate in (
        ('pretrain', 100, 0.1),
        ('prune', 20, 0.1),
        ('finetune', 100, 0.01),
        ('lwm', 100, 0.01),
    ):
        config[phase].update(epochs=epochs, learning_rate=learning_rate, schedule='original_cosine')
    config.evaluate.pgd.update(eps=0.25, step_size=0.05, norm='l2')
    config.evaluate.smooth.update(examples=500, n=10_000)
    return with_argument(config, arg, {'fashion_mnist': fashion_mnist, 'semisup': semisup})
