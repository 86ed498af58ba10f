"""Data sets: `load` returns the train, validation and test images of a config."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from robustprune_jax.config import default
from robustprune_jax.data import idx, image_folder, pseudo, registered
from robustprune_jax.data.augment import to_float
from robustprune_jax.data.encoded import EncodedImages
from robustprune_jax.runtime.registry import lookup


class Split(NamedTuple):
    """Images uint8 [N, H, W, C], or what stands for them, and labels int32 [N]."""

    images: np.ndarray | EncodedImages
    labels: np.ndarray

    def take(self, indices) -> 'Split':
        return Split(self.images[indices], self.labels[indices])


class Splits(NamedTuple):
    """What training sees, what chooses the best checkpoint, what is reported; what is mixed into
    training, if anything.
    """

    train: Split
    validation: Split
    test: Split
    pseudo: Split | None = None


def load(dataset) -> Splits:
    """Returns the three disjoint splits of the data set that a config section describes.

    dataset: `name` (a key of SOURCES, or a data set of TensorFlow Datasets), `dir` (where the files
    are), `num_classes`, `train_examples` (the first so many training images; 0 is all of them) and
    `validation` (how many of those to hold out of training, stratified by class). The cuts depend
    on these fields only, never on the seed of a run, so runs with other seeds can be compared.

    With dataset.pseudo_labelled, a file, its images are the fourth split.

    Warns, on process 0, of classes that training or test has no image of.

    Raises ValueError or FileNotFoundError, in one line, for data that does not fit the config.
    """
    where = f'{dataset.name} data' + (f' in {dataset.dir}' if dataset.dir else '')
    arrays = _source(dataset)(dataset)
    train, test = (
        checked(*arrays[part], dataset.num_classes, f'{part} split of {where}')
        for part in ('train', 'test')
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f'{where}: training images are {train.images.shape[1:]}, test images '
            f'{test.images.shape[1:]}; both must have one shape'
        )
    train = _first(train, dataset.train_examples)
    if not 0 <= dataset.validation < len(train.labels):
        raise ValueError(
            f'dataset.validation={dataset.validation} must be at least 0 and leave training '
            f'images: there are {len(train.labels)}'
        )
    held_out = stratified(train.labels, dataset.validation)
    rest = np.delete(np.arange(len(train.labels)), held_out)
    mixed = _pseudo(dataset, train.images) if dataset.pseudo_labelled else None
    splits = Splits(train.take(rest), train.take(held_out), test, mixed)
    if jax.process_index() == 0:
        _warn_of_missing_classes(splits, dataset.num_classes, where)
    return splits


def first_test_images(
    name: str, directory: str, image_shape: Sequence[int], num_classes: int, examples: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first so many test images of a data set, float32 in [0, 1], and their labels.

    examples: 0 is all of them. Raises as `load`, and ValueError where the images are not of
    image_shape.
    """
    config = default()
    config.dataset.update(name=name, dir=directory, num_classes=num_classes, validation=0)
    images, labels = load(config.dataset).test
    if list(images.shape[1:]) != list(image_shape):
        raise ValueError(
            f'images of {name} are {list(images.shape[1:])}: the network takes {list(image_shape)}'
        )
    count = examples or len(labels)
    return np.asarray(to_float(np.asarray(images[:count]))), labels[:count]


def _source(dataset):
    if dataset.name not in SOURCES and registered.is_known(dataset):
        return registered.read
    names = {**SOURCES, **dict.fromkeys(registered.PREPARED)}
    return lookup(names, dataset.name, 'data set')


def _pseudo(dataset, images):
    where = f'pseudo-labelled images in {dataset.pseudo_labelled}'
    if not isinstance(images, np.ndarray):
        raise ValueError(f'{where} cannot be mixed with images that are decoded on demand')
    mixed = checked(*pseudo.read(dataset.pseudo_labelled), dataset.num_classes, where)
    if mixed.images.shape[1:] != images.shape[1:]:
        raise ValueError(f'{where} are {mixed.images.shape[1:]}, must be {images.shape[1:]}')
    return mixed


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` indices (sorted) whose classes are as frequent as in labels [N].

    Every N/count-th example in the order of the classes: a class gets its share within one
    example, and the choice needs no random generator that might change between versions.
    """
    by_class = np.argsort(labels, kind='stable')
    return np.sort(by_class[(2 * np.arange(count) + 1) * len(labels) // (2 * max(count, 1))])


def digits(dataset) -> dict:
    """Returns scikit-learn's 1,797 handwritten digits at 28x28: 1,437 for training, 360 for test.

    The originals are 8x8 with values 0 to 16. Needs no files; `dataset.dir` is not read.
    """
    # Both are needed for this source only, and scikit-learn takes a second to import.
    from PIL import Image
    from sklearn.datasets import load_digits

    small = load_digits()
    resized = [
        np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC))
        for image in (small.images * (255 / 16)).astype(np.float32)
    ]
    images = np.clip(np.rint(resized), 0, 255).astype(np.uint8)[..., None]  # bicubic overshoots
    every = Split(images, small.target.astype(np.int32))
    test = stratified(every.labels, 360)
    train = np.delete(np.arange(len(every.labels)), test)
    return {'train': every.take(train), 'test': every.take(test)}


def npz(dataset) -> dict:
    """Returns the arrays of the .npz file `dataset.dir`.

    The file holds train_images, train_labels, test_images and test_labels: images uint8
    [N, H, W] or [N, H, W, C], labels integers [N].
    """
    path = Path(dataset.dir)
    if not zipfile.is_zipfile(path):
        raise FileNotFoundError(
            f'npz data: dataset.dir={dataset.dir!r} must be the path of a whole .npz file'
        )
    keys = [f'{part}_{kind}' for part in ('train', 'test') for kind in ('images', 'labels')]
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise ValueError(f'no {", ".join(missing)} in it; it has {", ".join(file) or "-"}')
            arrays = {key: np.asarray(file[key]) for key in keys}
    except Exception as error:  # a broken member may raise almost anything
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from error
    images = {part: arrays[f'{part}_images'] for part in ('train', 'test')}
    return {
        part: (x[..., None] if x.ndim == 3 else x, arrays[f'{part}_labels'])
        for part, x in images.items()
    }


def _first(split: Split, count: int) -> Split:
    """Returns the first `count` examples, all of them for 0."""
    if not 0 <= count <= len(split.labels):
        raise ValueError(
            f'dataset.train_examples={count} must be between 0 (all) and the '
            f'{len(split.labels)} training images there are'
        )
    return split.take(slice(count or None))


def checked(
    images: np.ndarray | EncodedImages, labels: np.ndarray, num_classes: int, where: str
) -> Split:
    """Returns the split if its images are uint8 [N, H, W, C] and each has a label in
    0..num_classes-1; raises ValueError, with `where`, otherwise.
    """
    if isinstance(images, np.ndarray):
        _check_images(images, where)
    if not len(images):
        raise ValueError(f'{where}: no images')
    if labels.ndim != 1 or labels.dtype.kind not in 'iu':
        raise ValueError(f'{where}: labels are {labels.dtype} {labels.shape}, must be integers [N]')
    if len(images) != len(labels):
        raise ValueError(f'{where}: {len(images)} images but {len(labels)} labels')
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f'{where}: label {labels[wrong[0]]} at index {wrong[0]} is outside 0..{num_classes - 1}'
            f' (num_classes={num_classes})'
        )
    return Split(images, labels.astype(np.int32))


def _check_images(images, where):
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in shape[1:]:
        floats = images.dtype.kind == 'f'
        hint = '; for floats in [0, 1]: (images * 255).round().astype(np.uint8)' if floats else ''
        raise ValueError(
            f'{where}: images are {images.dtype} {shape}, must be uint8 [N, H, W, C], H, W and C '
            f'at least 1{hint}'
        )


def _warn_of_missing_classes(splits, num_classes, where):
    parts = []
    for part in ('train', 'test'):
        there = np.bincount(getattr(splits, part).labels, minlength=num_classes)
        missing = np.flatnonzero(there == 0)
        if len(missing):
            names = ', '.join(map(str, missing[:10])) + ', ...' * (len(missing) > 10)
            parts.append(f'{part} has none of {len(missing)} classes: {names}')
    if parts:
        of = f'{where} with dataset.num_classes={num_classes}'
        warnings.warn(f'{of}: {"; ".join(parts)}', stacklevel=3)


SOURCES = {
    'digits': digits,
    'idx': idx.read_folder,
    'npz': npz,
    'image_folder': image_folder.read,
}
