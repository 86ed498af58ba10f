r"""CROWN-IBP on SVHN, cifar_model, pruned to 0.1, 0.05 and 0.01: the original's recipe.

python -m robustprune_jax.data.prepare svhn_cropped --data_dir=data
python main.py --config=configs/compact_crown_ibp.py --config.dataset.dir=data \
    --workdir=runs/crown_ibp

`:arch=cifar_model_large` is its other network, `:classes` its loss, with a backward pass for every
class in place of one for the loss. `:fashion_mnist` trains mnist_model at eps 0.1 in about an
hour on two cores.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import TRAINED, default, recipes, with_argument


def classes(config: ConfigDict) -> None:
    config.crown_ibp.loss_fusion = False


def fashion_mnist(config: ConfigDict) -> None:
    recipes.fashion_mnist(config)
    config.certified.eps = config.evaluate.pgd.eps = 0.1
    config.evaluate.pgd.step_size = 0.01
    config.pretrain.update(epochs=20, ramp_epochs=10.0)
    config.prune.update(epochs=5, learning_rate=1e-3)
    config.finetune.update(epochs=8, learning_rate=5e-4)


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    config.arch = 'cifar_model'
    recipes.colour_images(config, 'svhn_cropped')
    config.objective = 'crown_ibp'
    config.certified.eps = 0.007
    for phase in TRAINED:
        config[phase].update(optimizer='adam', schedule='original_cosine')
    # Its schedule length of 120 epochs ends, as here, after 119. prune and what follows start at
    # full eps, where the loss is that of intervals alone.
    config.pretrain.update(epochs=200, learning_rate=1e-3, ramp_epochs=119.0)
    config.prune.update(epochs=20, learning_rate=1e-5)
    config.finetune.update(epochs=100, learning_rate=1e-5)
    config.overrides = 'lwm.finetune.learning_rate=5e-4'
    config.evaluate.pgd.update(eps=0.007, step_size=0.0007)
    config.evaluate.certified.methods = 'ibp,crown_ibp'
    return with_argument(config, arg, {'classes': classes, 'fashion_mnist': fashion_mnist})
