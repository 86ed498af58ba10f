r"""ImageNet by free adversarial training, ResNet50, eps 4/255, pruned to 0.05 and 0.01.

One GPU (a batch of 256 in four parts: docs/scaling.md has the memory), or all of one machine:
    python main.py --config=configs/imagenet_free.py --config.accumulate=4 --workdir=runs/imagenet
    python main.py --config=configs/imagenet_free.py --workdir=runs/imagenet
Four hosts of eight GPUs, under SLURM, in a folder that all hosts share:
    srun --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 python main.py \
        --config=configs/imagenet_free.py:pod --workdir=/shared/runs/imagenet
A TPU pod slice:
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command='cd robustprune_jax && \
        python main.py --config=configs/imagenet_free.py:pod --config.compute_dtype=bfloat16 \
        --distributed --workdir=/shared/runs/imagenet'

The original's settings (90 epochs with 4 updates on each batch: 23 passes over the images); it
gives no recipe for prune and finetune. `:pod` has a batch of 2,048 and learning rates eight times
as large, after a warm-up. No numbers are expected: the original's repository has none for ImageNet.
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, recipes, with_argument

PHASES = {'pretrain': (90, 0.1), 'prune': (20, 0.1), 'finetune': (90, 0.01)}


def pod(config: ConfigDict) -> None:
    for phase, (_, learning_rate) in PHASES.items():
        config[phase].update(batch_size=2048, learning_rate=8 * learning_rate, warmup_epochs=5.0)


def get_config(arg: str = '') -> ConfigDict:
    config = default()
    config.arch = 'ResNet50'
    config.dataset.name = 'imagenet2012'
    config.dataset.num_classes = 1000
    config.dataset.augment = 'flip'
    config.dataset.validation = 10_000
    config.objective = 'free'
    config.free.n_repeats = 4
    config.densities = (0.05, 0.01)
    recipes.original_fractions(config)
    config.attack.update(eps=4 / 255, step_size=1 / 255, steps=10)
    for phase, (epochs, learning_rate) in PHASES.items():
        config[phase].update(epochs=epochs, learning_rate=learning_rate, batch_size=256)
    config.evaluate.pgd.update(eps=4 / 255, step_size=1 / 255, steps=50)
    return with_argument(config, arg, {'pod': pod})
