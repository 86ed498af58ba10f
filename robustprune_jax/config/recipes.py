"""What several of the configs share: functions that change a config in place."""

from ml_collections import ConfigDict

from robustprune_jax.config.parts import TRAINED


def fashion_mnist(config: ConfigDict) -> None:
    """mnist_model on Fashion-MNIST, where the Debian package puts it."""
    config.arch = 'mnist_model'
    config.dataset.name = 'idx'
    config.dataset.dir = '/usr/share/datasets/fashion-mnist'
    config.dataset.augment = 'none'


def original_fractions(config: ConfigDict) -> None:
    """The same fraction of every layer."""
    config.pruning.allocation, config.pruning.per_class = 'uniform', 0


def colour_images(config: ConfigDict, name: str) -> None:
    """A data set of 32 x 32 images by its registered name, and the original's densities, which are
    those of every layer, though they may cut off a class."""
    config.dataset.name = name
    config.dataset.augment = 'crop_flip'
    config.dataset.validation = 2_000
    config.densities = (0.1, 0.05, 0.01)
    original_fractions(config)


def original_sgd(config: ConfigDict) -> None:
    """The original's epochs and learning rates under SGD."""
    for phase, epochs, learning_rate in (
        ('pretrain', 100, 0.1),
        ('prune', 20, 0.1),
        ('finetune', 100, 0.01),
    ):
        config[phase].update(epochs=epochs, learning_rate=learning_rate, schedule='original_cosine')


def original_trades(config: ConfigDict, name: str) -> None:
    """The original's adversarial training of wrn_28_4."""
    config.arch = 'wrn_28_4'
    colour_images(config, name)
    original_sgd(config)
    config.attack.update(eps=0.031, step_size=0.0078, steps=10)
    config.evaluate.pgd.update(eps=0.031, step_size=0.0078, steps=50)


def semisup(config: ConfigDict) -> None:
    config.dataset.pseudo_labelled = 'data/ti_500K_pseudo_labeled.pickle'
    for phase in TRAINED:
        config[phase].batch_size *= 2


def smooth(config: ConfigDict) -> None:
    config.objective = 'smooth'
    config.evaluate.pgd.update(eps=0.25, step_size=0.05, norm='l2')
    config.evaluate.smooth.update(examples=500, n=10_000)


def certified(config: ConfigDict) -> None:
    config.objective = 'ibp'
    config.certified.eps = config.evaluate.pgd.eps = 2 / 255
    config.evaluate.pgd.step_size = 0.2 / 255
    config.evaluate.certified.methods = 'ibp,crown_ibp'
    config.pretrain.ramp_epochs = 60.0


def free(config: ConfigDict) -> None:
    config.objective = 'free'


# Other objectives than TRADES, for the same images.
OBJECTIVES = {'smooth': smooth, 'certified': certified, 'free': free}
