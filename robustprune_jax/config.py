"""The schema of an experiment: every field with its meaning and unit, and what must agree.

A config file returns `default()` with its own values, passed through `with_argument`:

    def get_config(arg=''):
        config = default()
        config.arch = 'mnist_model'
        return with_argument(config, arg)
"""

import ast
import difflib
import json
from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

PHASES = ('pretrain', 'prune', 'finetune', 'lwm', 'evaluate')

# What may differ between two launches into one workdir: it changes no trained weight.
NOT_IDENTITY = (
    'phases',
    'densities',
    'source',
    'evaluate',
    'workers',
    'log_every',
    'validate_every',
    'checkpoint_every',
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
        'schedule': 'cosine',  # cosine | original_cosine | step | constant
        'warmup_epochs': 0.0,  # linear warm-up, before the schedule; within `epochs`
        'ramp_epochs': 0.0,  # certified objectives: over how many first epochs eps rises
    }
    return ConfigDict({**section, **fields})


def default() -> ConfigDict:
    """Returns a config with every field: mnist_model on the embedded digits, under TRADES."""
    config = ConfigDict()
    config.arch = 'mnist_model'  # a name of models.MODELS
    config.seed = 0  # of initial weights, batch order, augmentation, attacks
    # Comma-separated, of pretrain, prune, finetune, lwm, evaluate; what is done is not redone.
    config.phases = ','.join(PHASES)
    # Fractions of each layer's weights that stay, in (0, 1]; one pretrained network serves all.
    config.densities = (0.1,)
    # A checkpoint directory that stands in for the phase before the first of `phases`:
    # a pretrained network for prune and lwm, a pruned one for finetune, any for evaluate alone.
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
    # of its batch stands in. In evaluation it always ends the run.
    config.dataset.corrupt = 'stop'
    config.workers = 0  # processes that decode such images; 0: threads of this one

    config.batch_norm = 'global'  # statistics of the whole batch | per_device: as under jax.pmap
    config.accumulate = 1  # parts of a batch whose gradients are computed one after the other
    config.compute_dtype = 'float32'  # | bfloat16: training's networks; parameters stay float32
    # How exact training's products are: default | high | highest, '' for jax's own setting.
    # Evaluation, bounds and certificates have 'highest'.
    config.matmul_precision = ''

    # natural | pgd | trades | free | smooth | ibp | crown_ibp | mixtrain
    config.objective = 'trades'
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
    config.smooth.method = 'stability'  # stability | gaussian | adversarial
    config.smooth.sigma = 0.25  # standard deviation of the noise, in pixel units
    config.smooth.beta = 6.0  # stability: weight of the KL term
    config.smooth.samples = 2  # adversarial: noises per image; the attack is config.attack
    config.certified = ConfigDict()  # ibp, crown_ibp, mixtrain
    config.certified.eps = 0.1  # of l_inf, in pixel units; reached after a phase's ramp_epochs
    config.certified.ramp = 'linear'  # linear | smoothed | staircase
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

    config.pretrain = _training()  # 0 epochs: the network stays as it is drawn
    config.prune = _training(epochs=10)
    # Where the scores start: a name of masks.SCORE_INITS, or snip (|W * gradient| on one batch).
    config.prune.score_init = 'scaled'
    config.prune.freeze_bn = False  # True: BatchNorm's scale and bias do not train in prune
    config.finetune = _training(learning_rate=0.01)
    config.lwm = _training(learning_rate=0.01)  # the baseline: finetune under a mask not learned
    config.lwm.score_init = 'scaled'  # which keeps the largest weights; others as prune.score_init
    config.lwm.rescale = False  # True: weights times 1 / sqrt(density), for untrained networks

    config.evaluate = ConfigDict()
    config.evaluate.checkpoint = 'latest'  # latest | best (on the validation part)
    config.evaluate.pruned = False  # also evaluate the networks between prune and finetune
    config.evaluate.batch_size = 256
    config.evaluate.examples = 0  # the first N test images; 0: all
    # pgd; standard: after PGD, also AutoAttack's ensemble, in the ball of evaluate.pgd, which
    # takes as long as thousands of forward passes of every image that stands.
    config.evaluate.attack = 'pgd'
    config.evaluate.pgd = ConfigDict()
    config.evaluate.pgd.eps = 0.1  # pixel units
    config.evaluate.pgd.step_size = 0.01
    config.evaluate.pgd.steps = 20
    config.evaluate.pgd.norm = 'linf'
    config.evaluate.pgd.restarts = 1  # random starts; the worst counts
    config.evaluate.certified = ConfigDict()
    # Comma-separated, cheap first, of ibp, crown_ibp, crown, symbolic: bounds over pgd's ball.
    config.evaluate.certified.methods = ''
    config.evaluate.certified.memory_gb = 2.0  # for crown and symbolic, about
    config.evaluate.smooth = ConfigDict()  # certification by randomized smoothing
    config.evaluate.smooth.examples = 0  # the first N test images; 0: none
    config.evaluate.smooth.sigma = 0.25  # pixel units
    config.evaluate.smooth.n0 = 100  # noisy copies of an image that choose its class
    config.evaluate.smooth.n = 100_000  # others, that bound the class's probability
    config.evaluate.smooth.alpha = 0.001  # a certificate's probability to be wrong
    config.evaluate.smooth.batch_size = 1_000  # noisy images
    config.evaluate.smooth.radii = (0.0, 0.25, 0.5, 0.75, 1.0)  # of l_2, for the table

    config.log_every = 50  # steps between two lines of metrics.jsonl
    config.validate_every = 1  # epochs
    config.checkpoint_every = 1  # epochs; also after the last, and on SIGTERM
    return config


def smoke(config: ConfigDict) -> None:
    """Shrinks any config, in place, to a run of seconds that exercises every part."""
    config.dataset.train_examples = 256
    config.dataset.validation = 64
    config.evaluate.examples = 64
    config.evaluate.batch_size = 64
    config.evaluate.smooth.examples = min(config.evaluate.smooth.examples, 8)
    config.evaluate.smooth.n = 200
    for steps in (config.attack, config.evaluate.pgd):
        steps.steps = 2
    for phase in ('pretrain', 'prune', 'finetune', 'lwm'):
        section = config[phase]
        section.update(
            epochs=min(section.epochs, 2),
            batch_size=64,
            warmup_epochs=0.0,
            ramp_epochs=min(section.ramp_epochs, 1.0),
        )


def with_argument(
    config: ConfigDict, arg: str, variants: dict[str, Callable[[ConfigDict], None]] | None = None
) -> ConfigDict:
    """Returns `config` changed, in place, by a config file's argument string.

    arg: comma-separated; `smoke` or a name of `variants` changes the config as that function does,
    `density=0.01` sets the one density, `FIELD=VALUE` any other field (`prune.epochs=5`).
    Raises ValueError on an unknown word, with the nearest name.
    """
    variants = {'smoke': smoke, **(variants or {})}
    words = [word for word in arg.split(',') if word]
    # Variants first, so that single fields can correct them wherever they stand.
    for word in sorted(words, key=lambda word: '=' in word):
        if '=' not in word:
            lookup(variants, word, 'config variant')(config)
            continue
        field, text = word.split('=', 1)
        if field == 'density':
            field, text = 'densities', f'({text},)'
        *sections, name = field.split('.')
        section = config
        for key in sections:
            section = lookup(section, key, 'config section')
        old = lookup(section, name, 'config field')
        section[name] = text if isinstance(old, str) else _literal(field, text, old)
    return config


def _literal(field, text, old):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        raise ValueError(f'{field}={text}: expected {type(old).__name__}, such as {old!r}')
    return value


def lookup(registry, name: str, what: str):
    """Returns registry[name]; raises ValueError with the nearest name, or all, if it is absent."""
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, list(registry), n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else f'one of {", ".join(registry)}'
    raise ValueError(f'unknown {what} {name!r}: {hint}')


def phases(config: ConfigDict) -> list[str]:
    """Returns the phases to run, in the order in which they follow each other."""
    wanted = _names(config.phases)
    for name in wanted:
        lookup(dict.fromkeys(PHASES), name, 'phase')
    return [name for name in PHASES if name in wanted]


def certificates(config: ConfigDict) -> list[str]:
    """Returns the methods of bounds to evaluate with, in their order."""
    return _names(config.evaluate.certified.methods)


def _names(text):
    return [name.strip() for name in text.split(',') if name.strip()]


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, on a value that no part could work with."""

    def require(field, ok, expected):
        if not ok:
            value = config
            for key in field.split('.'):
                value = value[key]
            raise ValueError(f'config.{field} is {value!r}: expected {expected}')

    require('phases', phases(config), f'at least one of {", ".join(PHASES)}')
    require('densities', len(config.densities) > 0, 'at least one kept fraction')
    for density in config.densities:
        require('densities', 0 < density <= 1, 'kept fractions above 0 and at most 1')
    require('densities', len(set(config.densities)) == len(config.densities), 'no density twice')
    for attack in ('attack', 'evaluate.pgd'):
        require(f'{attack}.steps', config[attack].steps >= 1, 'at least 1')
        for field in ('eps', 'step_size'):
            require(f'{attack}.{field}', config[attack][field] > 0, 'more than 0, in pixel units')
        if config[attack].norm == 'linf':
            require(f'{attack}.eps', config[attack].eps <= 1, 'at most 1: pixels lie in [0, 1]')
    require('dataset.image_size', config.dataset.image_size >= 1, 'at least 1 pixel')
    require('dataset.pseudo_ratio', 0 < config.dataset.pseudo_ratio < 1, 'between 0 and 1')
    require('dataset.corrupt', config.dataset.corrupt in ('stop', 'skip'), 'stop or skip')
    require('workers', config.workers >= 0, 'a count of processes, or 0')
    require('evaluate.certified.memory_gb', config.evaluate.certified.memory_gb > 0, 'more than 0')
    require('evaluate.pgd.restarts', config.evaluate.pgd.restarts >= 1, 'at least 1')
    require(
        'evaluate.checkpoint', config.evaluate.checkpoint in ('latest', 'best'), 'latest or best'
    )
    require('evaluate.attack', config.evaluate.attack in ('pgd', 'standard'), 'pgd or standard')
    require(
        'evaluate.attack',
        config.evaluate.attack == 'pgd' or config.dataset.num_classes >= 4,
        'pgd: standard needs at least 4 classes',
    )
    require('evaluate.batch_size', config.evaluate.batch_size >= 1, 'at least 1')
    require('evaluate.examples', config.evaluate.examples >= 0, 'a count, or 0 for all')
    require(
        'trades.bn_updates',
        config.trades.bn_updates in ('clean_attacked', 'original'),
        'clean_attacked or original',
    )
    require('batch_norm', config.batch_norm in ('global', 'per_device'), 'global or per_device')
    require('accumulate', config.accumulate >= 1, 'at least 1')
    dtypes = ('float32', 'bfloat16')
    require('compute_dtype', config.compute_dtype in dtypes, ' or '.join(dtypes))
    precisions = ('', 'default', 'high', 'highest')
    require('matmul_precision', config.matmul_precision in precisions, 'default, high or highest')
    require('free.n_repeats', config.free.n_repeats >= 1, 'at least 1')
    for field in ('smooth', 'evaluate.smooth'):
        section = config.evaluate.smooth if '.' in field else config.smooth
        require(f'{field}.sigma', section.sigma > 0, 'more than 0, in pixel units')
    require('smooth.samples', config.smooth.samples >= 1, 'at least 1')
    for field in ('n0', 'n', 'batch_size'):
        require(f'evaluate.smooth.{field}', config.evaluate.smooth[field] >= 1, 'at least 1')
    require('evaluate.smooth.examples', config.evaluate.smooth.examples >= 0, 'at least 0')
    require('evaluate.smooth.alpha', 0 < config.evaluate.smooth.alpha < 1, 'between 0 and 1')
    require('certified.eps', 0 < config.certified.eps <= 1, 'above 0 and at most 1, a pixel range')
    for field in ('ibp.kappa_start', 'ibp.kappa_end', 'crown_ibp.kappa_start',
                  'crown_ibp.kappa_end', 'crown_ibp.final_beta'):  # fmt: skip
        section, name = field.split('.')
        require(field, 0 <= config[section][name] <= 1, 'a part, in [0, 1]')
    require('mixtrain.images', config.mixtrain.images >= 1, 'at least 1')
    require('mixtrain.probability', 0 < config.mixtrain.probability <= 1, 'above 0, at most 1')
    require('mixtrain.memory_gb', config.mixtrain.memory_gb > 0, 'more than 0')
    for field in ('log_every', 'validate_every', 'checkpoint_every'):
        require(field, config[field] >= 1, 'at least 1')
    for phase in ('pretrain', 'prune', 'finetune', 'lwm'):
        section = config[phase]
        free = objective_name(config, phase) == 'free'
        require('attack.norm', not free or config.attack.norm == 'linf', 'linf: free has no other')
        require(f'{phase}.batch_size', section.batch_size >= 1, 'at least 1')
        if phase == 'pretrain' and section.epochs == 0:
            continue  # the random network
        require(f'{phase}.epochs', section.epochs >= 1, 'at least 1')
        if config.dataset.pseudo_labelled:
            mixed = pseudo_per_batch(config, section.batch_size)
            require(f'{phase}.batch_size', mixed < section.batch_size, 'room for labelled images')
        require(f'{phase}.learning_rate', section.learning_rate > 0, 'more than 0')
        require(f'{phase}.weight_decay', section.weight_decay >= 0, 'at least 0')
        require(f'{phase}.momentum', 0 <= section.momentum < 1, 'at least 0 and below 1')
        require(
            f'{phase}.warmup_epochs', 0 <= section.warmup_epochs < section.epochs, 'below epochs'
        )
        require(f'{phase}.ramp_epochs', 0 <= section.ramp_epochs <= section.epochs, 'within epochs')
        if section.schedule == 'original_cosine':
            repeats = config.free.n_repeats if free else 1
            require(
                f'{phase}.epochs',
                section.epochs > repeats,
                'more than 1 pass over the data: its formula gives rate 0',
            )


def pseudo_per_batch(config: ConfigDict, batch_size: int) -> int:
    """Returns how many images of a batch are pseudo-labelled."""
    ratio = config.dataset.pseudo_ratio if config.dataset.pseudo_labelled else 0.0
    return round(ratio * batch_size)


def objective_name(config: ConfigDict, phase: str) -> str:
    """Returns the objective that `phase` trains with."""
    return config[phase].objective or config.objective


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


def differences(one: dict, other: dict, prefix: str = '') -> Iterable[str]:
    """Yields 'field: value in one, value in other' for every leaf in which two dicts differ."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f'{prefix}{key}.')
        elif a != b:
            yield f'{prefix}{key}: {a!r}, {b!r}'
