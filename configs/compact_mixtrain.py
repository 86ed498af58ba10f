r"""MixTrain on SVHN, cifar_model, pruned to 0.1, 0.05 and 0.01: the original's recipe.

python -m robustprune_jax.data.prepare svhn_cropped --data_dir=data
python main.py --config=configs/compact_mixtrain.py --config.dataset.dir=data \
    --workdir=runs/mixtrain

`:large` is its other network, cifar_model_large, with one bounded image in a batch.
`:fashion_mnist` trains mnist_model at eps 0.1, for fewer epochs and pruned to 0.1 only.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def large(config: ConfigDict) -> None:
    config.arch = 'cifar_model_large'
    config.mixtrain.images = 1


def fashion_mnist(config: ConfigDict) -> None:
    recipes.fashion_mnist(config)
    config.dataset.train_examples = 10_000
    config.dataset.validation = 500
    config.densities = (0.1,)
    config.certified.eps = config.evaluate.pgd.eps = 0.1
    config.evaluate.pgd.step_size = 0.01
    config.evaluate.examples = 1_000
    config.mixtrain.images = 2
    config.pretrain.update(epochs=12, ramp_epochs=5.0)
    config.prune.update(epochs=3, learning_rate=1e-3)
    config.finetune.update(epochs=5)


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    config.arch = 'cifar_model'
    recipes.colour_images(config, 'svhn_cropped')
    config.objective = 'mixtrain'
    config.certified.update(eps=0.007, ramp='staircase')
    config.mixtrain.images = 5
    for phase in TRAINED:
        config[phase].update(batch_size=50, optimizer='adam', schedule='original_cosine')
    config.pretrain.update(epochs=60, learning_rate=1e-3, ramp_epochs=15.0)
    config.prune.update(epochs=20, learning_rate=1e-5)
    config.finetune.update(epochs=60, learning_rate=5e-4)
    config.evaluate.pgd.update(eps=0.007, step_size=0.0007)
    config.evaluate.certified.methods = 'ibp,crown_ibp,symbolic'
    return with_argument(config, arg, {'large': large, 'fashion_mnist': fashion_mnist})
