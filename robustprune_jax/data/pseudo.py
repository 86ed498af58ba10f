"""Unlabelled images with the labels that another network gave them (Carmon et al., 2019)."""

import zipfile
from pathlib import Path

import numpy as np

from robustprune_jax.runtime.array_pickle import load_arrays

# Carmon et al.'s ti_500K_pseudo_labeled.pickle; the generated images of Gowal et al. (2021).
KEYS = (('data', 'extrapolated_targets'), ('image', 'label'))


def read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a pickle or an .npz file, as it has them.

    Raises FileNotFoundError or ValueError, in one line, for a file that has no such arrays or, a
    pickle, asks for anything but arrays.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'dataset.pseudo_labelled={path!r} is not a file')
    try:
        content = _npz(path) if zipfile.is_zipfile(path) else _pickle(path)
        for images, labels in KEYS:
            if images in content and labels in content:
                return np.asarray(content[images]), np.asarray(content[labels])
        names = ', '.join(map(str, content)) or '-'
        raise ValueError(f'no data and extrapolated_targets in it; it has {names}')
    except Exception as error:  # a broken file may raise almost anything
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from error


def _npz(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file if any(key in pair for pair in KEYS)}


def _pickle(path):
    with open(path, 'rb') as file:
        content = load_arrays(file)
    if not isinstance(content, dict):
        raise ValueError(f'holds a {type(content).__name__}, must hold a dict')
    return content
