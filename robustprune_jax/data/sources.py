"""Data sets: `load` returns the train, validation and test images of a config."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustprune_jax.config import lookup
from robustprune_jax.data import idx, image_folder, pseudo, registered
from robustprune_jax.data.encoded import EncodedImages


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

    Raises ValueError or FileNotFoundError, in one line, for data that does not fit the config.
    """
    where = f'{dataset.name} data' + (f' in {dataset.dir}' if dataset.dir else '')
    arrays = _source(dataset)(dataset)
    train, test = (
        _checked(*arrays[part], dataset.num_classes, f'{part} split of {where}')
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
    return Splits(train.take(rest), train.take(held_out), test, mixed)


def _source(dataset):
    if dataset.name not in SOURCES and registered.is_known(dataset):
        return registered.read
    names = {**SOURCES, **dict.fromkeys(registered.PREPARED)}
    return lookup(names, dataset.name, 'data set')


def _pseudo(dataset, images):
    where = f'pseudo-labelled images in {dataset.pseudo_labelled}'
    if not isinstance(images, np.ndarray):
        raise ValueError(f'{where} cannot be mixed with images that are decoded on demand')
    mixed = _checked(*pseudo.read(dataset.pseudo_labelled), dataset.num_classes, where)
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
            f'npz data: dataset.dir={dataset.dir!r} must be the path of an .npz file'
        )
    keys = [f'{part}_{kind}' for part in ('train', 'test') for kind in ('images', 'labels')]
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise ValueError(f'no {", ".join(missing)} in it; it has {", ".join(file) or "-"}')
            arrays = {key: file[key] for key in keys}
        return {
            part: (
                _npz_images(arrays[f'{part}_images'], f'{part}_images'),
                _npz_labels(arrays[f'{part}_labels'], f'{part}_labels'),
            )
            for part in ('train', 'test')
        }
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'{path}: {error}') from error


def _npz_images(images: np.ndarray, key: str) -> np.ndarray:
    if images.dtype != np.uint8:
        floats = np.issubdtype(images.dtype, np.floating)
        hint = '; for floats in [0, 1]: (images * 255).round().astype(np.uint8)' if floats else ''
        raise ValueError(f'{key} is {images.dtype}, must be uint8 with values 0 to 255{hint}')
    if images.ndim not in (3, 4):
        raise ValueError(f'{key} has shape {images.shape}, must be [N, H, W] or [N, H, W, C]')
    return images if images.ndim == 4 else images[..., None]


def _npz_labels(labels: np.ndarray, key: str) -> np.ndarray:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f'{key} is {labels.dtype} {labels.shape}, must be integers of shape [N]')
    return labels


def _first(split: Split, count: int) -> Split:
    """Returns the first `count` examples, all of them for 0."""
    if not 0 <= count <= len(split.labels):
        raise ValueError(
            f'dataset.train_examples={count} must be between 0 (all) and the '
            f'{len(split.labels)} training images there are'
        )
    return split.take(slice(count or None))


def _checked(images: np.ndarray, labels: np.ndarray, num_classes: int, where: str) -> Split:
    """Returns the split if every image has a label in 0..num_classes-1."""
    if len(images) != len(labels):
        raise ValueError(f'{where}: {len(images)} images but {len(labels)} labels')
    if not len(images):
        raise ValueError(f'{where}: no images')
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f'{where}: label {labels[wrong[0]]} at index {wrong[0]} is outside 0..{num_classes - 1}'
            f' (dataset.num_classes={num_classes})'
        )
    return Split(images, labels.astype(np.int32))


SOURCES = {
    'digits': digits,
    'idx': idx.read_folder,
    'npz': npz,
    'image_folder': image_folder.read,
}
