r"""CIFAR-10 under TRADES, wrn_28_4, pruned to 0.1, 0.05 and 0.01: the original's recipe.

One GPU, or all of one machine (the batch is split over them):
    python main.py --config=configs/cifar10.py --workdir=runs/cifar10
Eight processes of one GPU each, under SLURM, in a folder that all hosts share:
    srun --nodes=1 --ntasks=8 --gpus-per-node=8 python main.py --config=configs/cifar10.py \
        --workdir=/shared/runs/cifar10
A TPU pod slice:
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command='cd robustprune_jax && \
        python main.py --config=configs/cifar10.py --distributed --workdir=/shared/runs/cifar10'

`:arch=vgg16_bn` is its other network, `:objective=pgd` or `:objective=natural` another objective,
`:smooth` and `:certified` train for randomized smoothing and for interval bounds, `:free` with free
adversarial training.

Robust accuracy in the paper's repository, in %, at densities 1, 0.1, 0.05 and 0.01, where half of
each batch of 256 is pseudo-labelled (`:semisup`, from data/ti_500K_pseudo_labeled.pickle), without
which a user of the original reached 51.5 in place of 57.2:
    wrn_28_4   57.2, 55.2, 54.2, 47.3   (LWM 53.8, 49.2, 37.3)
    vgg16_bn   51.9, 49.5, 48.7, 41.7   (LWM 48.8, 45.2, 34.3)
and under `:smooth`, certified at the radius it calls vra-s, which is not in its repository:
    wrn_28_4   63.3, 63.0, 62.5, 56.0   (LWM 61.0, 59.9, 49.1)
    vgg16_bn   61.1, 60.7, 59.9, 54.4   (LWM 59.6, 56.8, 44.1)
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.original_trades(config, 'cifar10')
    return with_argument(config, arg, {'semisup': recipes.semisup, **recipes.OBJECTIVES})
