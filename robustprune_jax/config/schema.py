"""The schema of an experiment: every field with its meaning and unit; `rules` checks them.

A config file returns `default()` with its own values, passed through `with_argument`:

    def get_config(arg=''):
        config = default()
        config.arch = 'mnist_model'
        return with_argument(config, arg)
"""

import json

from ml_collections import ConfigDict

from robustprune_jax.config.parts import PHASES

# What may differ between two launches into one workdir: it changes no trained weight.
NOT_IDENTITY = (
    'phases',
    'methods',
    'densities',
    'source',
    'evaluate',
    'export',
    'report',
    'workers',
    'log_every',
    'validate_every',
    'checkpoint_every',
    'profile',
)


def _training(**fields):
    """A phase's own settings: each phase starts a new optimizer."""
    section = {
        'objective': '',  # a name of OBJECTIVES; '' is config.objective
        'epochs': 20,  # one epoch is ceil(training examples / batch_size) optimizer steps
        'batch_size': 128,  # global: over all devices and processes
        'optimizer': 'sgd',  # sgd | adam | rmsprop
        'learning_rate': 0.1,  # the schedule's peak
        'momentum': 0.9,  # of sgd and rmsprop
        'weight_decay': 1e-4,  # L2, added to the gradient, on every tensor that trains
        'l1': 0.0,  # weight in the loss of the sum of the kernels' absolute values, masks applied
        'schedule': 'cosine',  # cosine | original_cosine | step | milestones | constant
        'milestones': (50.0, 60.0),  # of the schedule so named: epochs from which on the rate is
        'decay': 0.2,  # so many times as large
        'warmup_epochs': 0.0,  # linear warm-up, before the schedule; within `epochs`
        'ramp_epochs': 0.0,  # certified objectives: over how many first epochs eps rises
        # Weights in the loss of any objective, of interval bounds in the ball of certified.eps.
        'nrs': 0.0,  # that few ReLUs be unstable; 1e-3 to 1e-2 in the paper, in prune and finetune
        'l_tight': 0.0,  # while eps rises: that bounds not widen from layer to layer; 0.5
        'l_relu': 0.0,  # while eps rises: that as many ReLUs be active as inactive; 0.5
        # Gradients are taken at weights (AWP) or, in prune, scores (S2AP) that one step uphill has
        # moved by so much of each layer's norm; 0: at the weights themselves.
        'perturbation': {
            'gamma': 0.0,  # AWP's: 0.005 for trades, 0.01 for pgd
            'warmup_epochs': 0.0,  # first epochs without; below `epochs`
            'space': 'weights',  # weights | scores, the default of prune
        },
    }
    return ConfigDict({**section, **fields})


def default() -> ConfigDict:
    """Returns a config with every field: mnist_model on the embedded digits, under TRADES."""
    config = ConfigDict()
    # A name of models.MODELS, or 'package.module:Name' of a Flax Linen module of your own.
    config.arch = 'mnist_model'
    config.seed = 0  # of initial weights, batch order, augmentation, attacks
    # Comma-separated, of pretrain, prune, finetune, evaluate; what is done is not redone.
    config.phases = ','.join(PHASES)
    # Comma-separated names of pruning.METHODS; one pretrained network serves all.
    config.methods = 'hydra,lwm'
    # Fractions of the prunable weights that stay, in (0, 1].
    config.densities = (0.1,)
    # Settings of prune, finetune or pruning that one method has to itself, comma-separated:
    # METHOD.FIELD=VALUE, such as lwm.finetune.epochs=12.
    config.overrides = ''
    # A checkpoint directory that stands in for the network that `phases` start from: a pretrained
    # one for prune, and for finetune where a method has no prune, else a pruned one; any for
    # evaluate alone.
    config.source = ''

    config.dataset = ConfigDict()
    # A name of data.SOURCES, or of TensorFlow Datasets: cifar10, svhn_cropped, imagenet2012, ...
    config.dataset.name = 'digits'
    # idx: the folder of the IDX files; npz: the file; image_folder: the folder of train and val;
    # of TensorFlow Datasets: its data_dir, ~/tensorflow_datasets if empty.
    config.dataset.dir = ''
    config.dataset.num_classes = 10
    config.dataset.train_examples = 0  # use the first N training examples; 0: all
    config.dataset.validation = 144  # of these, held out to choose the best checkpoint
    config.dataset.augment = 'none'  # none | flip | crop | crop_flip
    # A pickle or .npz of pseudo-labelled images to mix into every batch, and the part of a batch
    # that they are; an epoch is once through the others.
    config.dataset.pseudo_labelled = ''
    config.dataset.pseudo_ratio = 0.5
    # Images of many sizes (image_folder, imagenet2012): training sees a random-resized crop of so
    # many pixels each way, evaluation the central square.
    config.dataset.image_size = 224
    # stop | skip: a training image that cannot be decoded ends the run, or is reported and another
    # training image stands in. In evaluation it always ends the run.
    config.dataset.corrupt = 'stop'
    config.workers = 0  # processes that decode such images; 0: threads of this one

    config.batch_norm = 'global'  # statistics of the whole batch | per_device: as under jax.pmap
    config.accumulate = 1  # parts of a batch whose gradients are computed one after the other
    config.compute_dtype = 'float32'  # | bfloat16: training's networks; parameters stay float32
    # How exact training's products are: default | high | highest, '' for jax's own setting.
    # Evaluation, bounds and certificates have 'highest'.
    config.matmul_precision = ''

    # natural | pgd | trades | free | smooth | ibp | crown_ibp | mixtrain | mtl_ibp | cc_ibp |
    # exp_ibp | sabr
    config.objective = 'trades'
    # How much of each label is all classes alike, in the cross-entropy of images, not of bounds, in
    # training; the attack and all that is measured have the labels themselves.
    config.label_smoothing = 0.0
    config.attack = ConfigDict()  # the attack of training and validation
    config.attack.eps = 0.1  # radius of the ball, in pixel units ([0, 1])
    config.attack.step_size = 0.02  # pixel units; TRADES l_2 of the original: 2 * eps / steps
    config.attack.steps = 10
    config.attack.norm = 'linf'  # linf | l2
    config.trades = ConfigDict()
    config.trades.beta = 6.0  # weight of the KL term
    config.trades.detach_target = False  # True: no gradient through the clean side of the KL
    # clean_attacked: the clean pass, then the attacked one, move the BatchNorm statistics;
    # original: its four passes (clean, clean, attacked, clean), the attack after the first.
    config.trades.bn_updates = 'clean_attacked'
    config.free = ConfigDict()
    # Updates on each batch. A phase makes epochs / n_repeats passes over the data, as many updates
    # as with another objective; validate_every and checkpoint_every count passes.
    config.free.n_repeats = 4
    config.smooth = ConfigDict()
    config.smooth.method = 'stability'  # stability | gaussian | adversarial | consistency
    config.smooth.sigma = 0.25  # standard deviation of the noise, in pixel units
    config.smooth.beta = 6.0  # stability, consistency (its paper: 10 to 20): the KL term's weight
    config.smooth.eta = 0.5  # consistency: the weight of the mean prediction's entropy
    # adversarial, consistency: noises per image; adversarial's attack is config.attack.
    config.smooth.samples = 2
    config.certified = ConfigDict()  # objectives with bounds, and the weights l_tight, l_relu, nrs
    config.certified.eps = 0.1  # of l_inf, in pixel units; reached after a phase's ramp_epochs
    config.certified.ramp = 'linear'  # linear | smoothed | staircase
    # mtl_ibp, cc_ibp, exp_ibp, sabr: in parts of eps, the radii that are attacked and bounded; the
    # attack's steps, and their size in parts of its radius.
    config.certified.factor_a = 1.0
    config.certified.factor_t = 1.0
    config.certified.steps = 1
    config.certified.step_size = 10.0
    # The bounds by which their validation measures, for evaluate.checkpoint=best: intervals do not
    # foretell what complete verification proves; crown does best, and takes longest.
    config.certified.validate_by = 'crown_ibp'
    # alpha: what the bounds weigh against the attack.
    config.mtl_ibp = ConfigDict({'alpha': 0.1})
    config.cc_ibp = ConfigDict({'alpha': 0.1})
    config.exp_ibp = ConfigDict({'alpha': 0.1})
    config.sabr = ConfigDict({'part': 0.4})  # lambda: the small box's radius, in the bounds' radius
    # kappa: the weight of the clean loss against the worst case's, as eps rises from 0 to eps.
    config.ibp = ConfigDict({'kappa_start': 1.0, 'kappa_end': 0.5})
    config.crown_ibp = ConfigDict({'kappa_start': 0.0, 'kappa_end': 0.0})
    config.crown_ibp.final_beta = 0.0  # the part of CROWN-IBP at full eps; 0: intervals only
    config.crown_ibp.loss_fusion = True  # False: a backward pass per class, as the original
    config.mixtrain = ConfigDict()
    config.mixtrain.images = 5  # of each batch, whose symbolic bounds are trained
    config.mixtrain.probability = 0.8  # of a batch to have them
    config.mixtrain.weight = 0.1  # of their loss, until eps is reached; then it grows, up to 50
    config.mixtrain.memory_gb = 1.0  # for their bounds, about

    # A running average of every phase's network, for evaluate.checkpoint=average; 0: none.
    config.average = ConfigDict()
    config.average.decay = 0.0  # of an update: what is left of the average; 0.995 to 0.999
    config.average.start = 0.0  # the part of a phase before which it is the network itself

    config.pretrain = _training()  # 0 epochs: the network stays as it is drawn
    config.pruning = ConfigDict()  # '': as the method has it
    config.pruning.criterion = ''  # where the scores start: a name of pruning.CRITERIA
    config.pruning.allocation = ''  # how many weights each layer keeps: of pruning.ALLOCATIONS
    config.pruning.structure = ''  # what is kept as one: of pruning.STRUCTURES
    config.pruning.power = 0.5  # of the allocation power: a layer keeps size ** power, scaled
    # The last layer keeps so many weights of each class, or as many as it has for each; 0: none is
    # sure to be reached, as in the original.
    config.pruning.per_class = 1
    # What every layer keeps at least, as a part of its equal share: one threshold over all layers
    # can leave a large one a single weight.
    config.pruning.minimum = 0.1
    # Of the structure n_of_m: 2:4 and the like, along the inputs; the density is n / m.
    config.pruning.n = 2
    config.pruning.m = 4
    config.pruning.undivided = 'stop'  # | dense: layers whose inputs m does not divide stay whole
    config.pruning.counts = 'weights'  # | multiply_adds: what channels' densities are fractions of
    config.pruning.rates = ConfigDict()  # of the allocation learned: HARP's kept fractions
    config.pruning.rates.learning_rate = 0.1  # of SGD, constant
    config.pruning.rates.momentum = 0.9
    config.pruning.rates.gamma = 0.2  # the budget's weight in the loss; grows by so much an epoch
    config.pruning.rates.gradient = 'threshold'  # | sum, the paper's
    config.pruning.rates.start = 'uniform'  # the allocation to start from: | erk | igq | power
    # Of the methods whose masks move in finetune (flyingbird, rigl, set); '' or 0: as they have it.
    config.pruning.dynamic = ConfigDict()
    config.pruning.dynamic.grow = ''  # what of the other weights: gradient (the largest) | random
    config.pruning.dynamic.interval = 0.0  # epochs between two moves
    config.pruning.dynamic.fraction = 0.0  # of a layer's weights that the first moves drop and grow
    config.pruning.dynamic.until = 0.0  # the part of finetune after which masks stay
    # True: where no mask is learned, weights times 1 / sqrt(density), for untrained networks.
    config.pruning.rescale = False
    config.prune = _training(epochs=10)  # of the methods that learn the mask
    config.prune.perturbation.space = 'scores'
    config.prune.freeze_bn = False  # True: BatchNorm's scale and bias do not train in prune
    config.finetune = _training(learning_rate=0.01)
    # Weight in the loss of the KL divergence from the dense pretrained network, on clean images and
    # as much on attacked ones; 0: none.
    config.finetune.distillation = 0.0

    config.evaluate = ConfigDict()
    config.evaluate.checkpoint = 'latest'  # latest | best (on the validation part) | average
    config.evaluate.pruned = False  # also evaluate the networks between prune and finetune
    config.evaluate.batch_size = 256
    config.evaluate.examples = 0  # the first N test images; 0: all
    # pgd; standard: after PGD, also AutoAttack's ensemble, in the ball of evaluate.pgd, which
    # takes as long as thousands of forward passes of every image that stands; fast: the same with a
    # tenth of its budget, to choose by.
    config.evaluate.attack = 'pgd'
    config.evaluate.pgd = ConfigDict()
    config.evaluate.pgd.eps = 0.1  # pixel units
    config.evaluate.pgd.step_size = 0.01
    config.evaluate.pgd.steps = 20
    config.evaluate.pgd.norm = 'linf'
    config.evaluate.pgd.restarts = 1  # random starts; the worst counts
    # How far the nearest misclassified image is, by the minimum-norm attack FMN.
    config.evaluate.distances = ConfigDict()
    config.evaluate.distances.examples = 0  # the first N test images; 0: none
    config.evaluate.distances.norm = 'linf'  # linf | l2 | l1 | l0, the values that change
    config.evaluate.distances.steps = 100
    config.evaluate.distances.loss = 'margin'  # margin | ce | dlr
    config.evaluate.distances.radii = (0.05, 0.1)  # for the table, beside pgd.eps in its norm
    config.evaluate.certified = ConfigDict()
    # Comma-separated, cheap first, of ibp, crown_ibp, crown, symbolic, alpha_crown: bounds over
    # pgd's ball; last, complete: branch and bound.
    config.evaluate.certified.methods = ''
    config.evaluate.certified.memory_gb = 2.0  # for crown and symbolic, about
    config.evaluate.certified.timeout = 120.0  # seconds an image, of complete; 0: no branching
    config.evaluate.smooth = ConfigDict()  # certification by randomized smoothing
    config.evaluate.smooth.examples = 0  # the first N test images; 0: none
    config.evaluate.smooth.sigma = 0.25  # pixel units
    config.evaluate.smooth.n0 = 100  # noisy copies of an image that choose its class
    config.evaluate.smooth.n = 100_000  # others, that bound the class's probability
    # True: an image's draws end when all of `radii` are decided, n being the most; larger radii,
    # and so the mean radius, come out lower.
    config.evaluate.smooth.anytime = False
    config.evaluate.smooth.alpha = 0.001  # a certificate's probability to be wrong
    config.evaluate.smooth.batch_size = 1_000  # noisy images
    config.evaluate.smooth.radii = (0.0, 0.25, 0.5, 0.75, 1.0)  # of l_2, for the table

    # Comma-separated: what of each network lies in export/. torch: dense, .pth.tar; sparse: the
    # weights that are not 0, .safetensors; onnx and c: without what has no effect.
    config.export = 'torch,sparse'
    # Whether report/ is written at the end; `python -m robustprune_jax.report DIR` makes it later.
    config.report = True

    config.log_every = 50  # steps between two lines of metrics.jsonl
    config.validate_every = 1  # epochs
    # Epochs; also after the last, and on SIGTERM. The best checkpoint is the best of those that
    # were saved at a validation.
    config.checkpoint_every = 1
    config.profile = ''  # FROM:TO, steps of each phase to trace into its folder, for xprof
    return config


def phases(config: ConfigDict) -> list[str]:
    """Returns the phases to run, in the order in which they follow each other."""
    return [name for name in PHASES if name in names(config.phases)]


def methods(config: ConfigDict) -> list[str]:
    """Returns the names of the pruning methods to run, in their order."""
    return names(config.methods)


def certificates(config: ConfigDict) -> list[str]:
    """Returns the methods of bounds to evaluate with, in their order."""
    return names(config.evaluate.certified.methods)


def names(text: str) -> list[str]:
    """Returns the names of a comma-separated list."""
    return [name.strip() for name in text.split(',') if name.strip()]


def fields(config: ConfigDict, prefix: str = '') -> dict:
    """Returns every field's value by its whole name, such as 'prune.epochs'."""
    found = {}
    for name, value in config.items():
        whole = f'{prefix}{name}'
        found |= fields(value, f'{whole}.') if isinstance(value, ConfigDict) else {whole: value}
    return found


def pseudo_per_batch(config: ConfigDict, batch_size: int) -> int:
    """Returns how many images of a batch are pseudo-labelled."""
    ratio = config.dataset.pseudo_ratio if config.dataset.pseudo_labelled else 0.0
    return round(ratio * batch_size)


def objective_name(config: ConfigDict, phase: str) -> str:
    """Returns the objective that `phase` trains with."""
    return config[phase].objective or config.objective


def repeats(config: ConfigDict, phase: str) -> int:
    """Returns how many updates `phase` makes on each batch."""
    return config.free.n_repeats if objective_name(config, phase) == 'free' else 1


def identity(config: ConfigDict) -> dict:
    """Returns the part of `config` that a workdir belongs to, as plain JSON data."""
    fields = json.loads(config.to_json())
    return {name: value for name, value in fields.items() if name not in NOT_IDENTITY}


def completed(saved: dict, defaults: dict) -> dict:
    """Returns `saved` with the fields of `defaults`: those that it has not, at their default."""
    return {
        name: completed(saved.get(name, {}), value)
        if isinstance(value, dict)
        else saved.get(name, value)
        for name, value in defaults.items()
    }
