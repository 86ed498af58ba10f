r"""SVHN under TRADES, wrn_28_4, pruned to 0.1, 0.05 and 0.01: the original's recipe.

One GPU, or all of one machine (the batch is split over them):
    python main.py --config=configs/svhn.py --workdir=runs/svhn
Eight processes of one GPU each, under SLURM, in a folder that all hosts share:
    srun --nodes=1 --ntasks=8 --gpus-per-node=8 python main.py --config=configs/svhn.py \
        --workdir=/shared/runs/svhn
A TPU pod slice:
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command='cd robustprune_jax && \
        python main.py --config=configs/svhn.py --distributed --workdir=/shared/runs/svhn'

`:arch=vgg16_bn` is its other network, `:objective=pgd` or `:objective=natural` another objective,
`:smooth` and `:certified` train for randomized smoothing and for interval bounds, `:free` with free
adversarial training.

Robust accuracy in the paper's repository, in %, at densities 1, 0.1, 0.05 and 0.01:
    wrn_28_4   60.1, 62.8, 59.8, 52.4   (LWM 59.4, 53.4, 45.3)
    vgg16_bn   53.5, 52.4, 51.7, 46.8   (LWM 51.5, 50.4, 29.0)
and under `:smooth`, certified at the radius it calls vra-s, which is not in its repository:
    wrn_28_4   62.2, 62.3, 62.0, 59.6   (LWM 62.2, 61.4, 45.0)
    vgg16_bn   60.1, 59.9, 59.3, 58.6   (LWM 59.9, 59.8, 51.9)
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    recipes.original_trades(config, 'svhn_cropped')
    return with_argument(config, arg, recipes.OBJECTIVES)
