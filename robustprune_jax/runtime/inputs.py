"""What the library's functions ask of their arguments: one check, in the same words everywhere.

Nothing is looked at where a value is traced, or another process holds a part of it: a check costs
nothing inside jit.
"""

import math
import warnings

import jax
import numpy as np
from jax.tree_util import Partial


def are_here(*values) -> bool:
    """Returns whether all values can be looked at: none is traced or partly another process's."""
    return all(
        not isinstance(value, jax.core.Tracer)
        and (not isinstance(value, jax.Array) or value.is_fully_addressable)
        for value in values
    )


def check(
    images: jax.Array,
    labels: jax.Array | None = None,
    *,
    eps: float | jax.Array = 0.0,
    norm: str = 'linf',
    box: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """Raises ValueError unless images are floats [B, H, W, C] in `box`, labels ints [B], and eps a
    radius within it, in pixel units: one, or one for each image.
    """
    if not are_here(images, labels, eps):
        return
    _check_images(images, box)
    if labels is not None:
        _check_labels(np.asarray(labels), len(images))
    eps, width = np.asarray(eps), math.inf if box is None else box[1] - box[0]
    pixels = math.prod(images.shape[1:])
    largest = width * {'linf': 1, 'l2': math.sqrt(pixels), 'l1': pixels}.get(norm, math.inf)
    if not ((eps >= 0) & (eps <= largest)).all():
        hint = f' ({eps.max():g}/255?)' if norm == 'linf' and eps.max() >= 1 else ''
        raise ValueError(
            f'eps is {eps}: expected a radius from 0 to {largest:g} in {norm}, in pixel units{hint}'
        )


def check_network(logits_fn: Partial, images: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless the network gives logits [B, K] of images, K at least 2, and labels
    are of its classes. Warns (UserWarning) where they are a softmax's: attacks need logits.
    """
    if not are_here(images, labels):
        return
    program = _forward.trace(logits_fn, images)
    shape = program.out_info.shape
    if len(shape) != 2 or shape[0] != len(images) or shape[1] < 2:
        raise ValueError(
            f'the network gives {list(shape)} for {len(images)} images: expected logits '
            f'[{len(images)}, K], K at least 2'
        )
    check_classes(labels, shape[1])
    if _ends_in_softmax(program.jaxpr.jaxpr):
        warnings.warn('the network ends in a softmax: its loss needs logits', stacklevel=3)


def check_classes(labels: jax.Array, classes: int) -> None:
    """Raises ValueError on a label outside 0..classes - 1."""
    if not are_here(labels):
        return
    labels = np.asarray(labels)
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f'the label of image {wrong.argmax()} is {labels[wrong.argmax()]}: the network has '
            f'classes 0 to {classes - 1}'
        )


def _check_images(images, box):
    if not hasattr(images, 'dtype'):
        raise ValueError(f'images are a {type(images).__name__}: expected an array [B, H, W, C]')
    shape = list(images.shape)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f'images have shape {shape}: expected [B, H, W, C], none of them 0')
    if shape[1] in (1, 3) and min(shape[2:]) > 4:
        raise ValueError(
            f'images have shape {shape}, which looks NCHW: expected [B, H, W, C], '
            'images.transpose(0, 2, 3, 1)'
        )
    if not jax.dtypes.issubdtype(images.dtype, np.floating):
        raise ValueError(f'images are {images.dtype}: expected floats in [0, 1] (images / 255?)')
    if box is None:
        return
    with jax.ensure_compile_time_eval():  # a jit around a constant's check would stage it
        least, most = jax.device_get((images.min(), images.max()))
    if not (box[0] <= least and most <= box[1]):  # NaN is outside
        hint = ' (0..255? images / 255)' if 1 < most <= 255 and least >= 0 else ''
        raise ValueError(
            f'images have values from {least:g} to {most:g}: '
            f'expected [{box[0]:g}, {box[1]:g}]{hint}'
        )


def _check_labels(labels, count):
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        hint = ' (one-hot? labels.argmax(-1))' if labels.ndim == 2 else ''
        raise ValueError(
            f'labels are {labels.dtype} {list(labels.shape)}: expected ints [{count}]{hint}'
        )


@jax.jit
def _forward(logits_fn, images):
    return logits_fn(images)


def _ends_in_softmax(jaxpr):
    """Whether the last that a program does is to divide exponentials by their sum."""
    last = next((e for e in reversed(jaxpr.eqns) if jaxpr.outvars[0] in e.outvars), None)
    if last is None:  # a constant, or the image itself
        return False
    inner = last.params.get('jaxpr') or last.params.get('call_jaxpr')
    if inner is not None:
        return _ends_in_softmax(getattr(inner, 'jaxpr', inner))
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return last.primitive.name == 'div' and {'exp', 'reduce_sum'} <= names
