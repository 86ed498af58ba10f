"""Whether a state dict is one of an architecture's, and if not, why and whose it may be."""

from collections.abc import Sequence
from itertools import product

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from robustprune_jax.models import create_model

from .layout import flat_channels, flat_width, torch_shape
from .names import TABLES, Layer, Leaf, leaves
from .unused import twin

IMAGE_SIZES = 32, 28, 64, 224  # pixels, as image data sets have them


def is_masked(state_dict: dict[str, np.ndarray]) -> bool:
    """Returns whether the state dict holds scores."""
    return any(name.endswith(('.popup_scores', '/popup_scores')) for name in state_dict)


def is_named_by_paths(state_dict: dict[str, np.ndarray]) -> bool:
    """Returns whether the names are a Flax network's own paths, such as 'conv1/kernel'."""
    return any('/' in name for name in state_dict)


def likely_architectures(state_dict: dict[str, np.ndarray]) -> list[str]:
    """Returns the architectures that the state dict fits."""
    return [arch for arch in TABLES if not mismatch(state_dict, arch)]


def mismatch(
    state_dict: dict[str, np.ndarray],
    arch: str | Sequence[Layer],
    num_classes: int | None = None,
) -> str | None:
    """Returns in what a state dict differs from `arch`, None where it is one of its networks.

    Tensors that have no counterpart here may be missing. Where the image's size or channels decide
    a layer's input width, any width will do. Of a name table, only the names are compared, and
    whether they are weights at all.
    """
    expected = leaves(arch, scores=is_masked(state_dict))
    missing = [leaf.torch for leaf in expected if leaf.path and leaf.torch not in state_dict]
    known = {leaf.torch for leaf in expected}
    unexpected = [name for name in state_dict if name not in known]
    if missing or unexpected:
        return missing_and_unexpected(missing, unexpected)
    if bad := unusable(state_dict, expected):
        return f'no weights in {few(bad)}'
    classes = count_classes(state_dict, arch)
    if num_classes not in (None, classes):
        return f'it has {classes} classes, not {num_classes}'
    if not isinstance(arch, str):
        return None
    shapes = _expected_shapes(arch, classes, count_channels(state_dict, arch))
    wrong = []
    for leaf in expected:
        if leaf.torch in state_dict:
            found, wanted = state_dict[leaf.torch].shape, shapes.get(twin(leaf.torch), ())
            if leaf.kernel and leaf.kernel.kind == 'flatten' and len(found) == 2:
                wanted = (wanted[0], flat_width(found[1], leaf.kernel))
            if found != wanted:
                wrong.append(f'{leaf.torch} (has shape {found}, expected {wanted})')
    return f'misshapen {few(wrong)}' if wrong else None


def unusable(state_dict: dict[str, np.ndarray], expected: list[Leaf]) -> list[str]:
    """Returns the tensors that cannot be weights, as they are."""
    return [
        f'{leaf.torch} ({array.dtype} of shape {array.shape})'
        for leaf in expected
        if leaf.path and not _is_usable(array := state_dict[leaf.torch], leaf)
    ]


def own_inputs(
    variables: dict, arch: str, num_classes: int | None, image_size: int | None
) -> tuple[int, list[int]]:
    """Returns (classes, image shape [H, W, C]) at which a network of one's own has such variables.

    arch: 'package.module:Name'. image_size: pixels; default: what fits of IMAGE_SIZES. Raises
    ValueError where the network never has them: the fewest differences.
    """
    kept = {name: variables[name] for name in ('params', 'batch_stats') if name in variables}
    found = {path: np.shape(leaf) for path, leaf in flatten_dict(kept, sep='/').items()}
    kernels = [shape for path, shape in found.items() if path.endswith('kernel')]
    channels = dict.fromkeys([3, 1, *(shape[-2] for shape in kernels if len(shape) == 4)])
    widths = dict.fromkeys(shape[-1] for shape in sorted(kernels, key=len))
    sizes, classes = [image_size] if image_size else IMAGE_SIZES, [num_classes or w for w in widths]
    problems = []
    for size, depth, width in product(sizes, channels, dict.fromkeys(classes)):
        module = create_model(arch, width)
        images = jax.ShapeDtypeStruct((1, size, size, depth), np.float32)
        try:
            logits, shapes = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
        except Exception as error:  # a module may raise anything on images that are not its own
            problems.append((len(found), str(error).partition('\n')[0]))
            continue
        expected = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep='/').items()}
        wrong = [
            f'{path} (has shape {found.get(path)}, expected {expected.get(path)})'
            for path in dict.fromkeys([*found, *expected])
            if found.get(path) != expected.get(path)
        ]
        if num_classes not in (None, logits.shape[-1]):
            wrong.append(f'logits (of {logits.shape[-1]} classes, not {num_classes})')
        if not wrong:
            return logits.shape[-1], [size, size, depth]
        problems.append((len(wrong), few(wrong)))
    tried = ', '.join(map(str, sizes))
    raise ValueError(
        f'the tensors are not those of {arch} for images of {tried} pixels: {min(problems)[1]}'
    )


def not_tensors(state_dict: dict) -> list:
    """Returns the keys of a dict that are no names, or whose values are no arrays."""
    return [
        name
        for name, value in state_dict.items()
        if not (isinstance(name, str) and isinstance(value, np.ndarray))
    ]


def count_classes(state_dict: dict[str, np.ndarray], arch: str | Sequence[Layer]) -> int:
    """Returns the width of the last layer."""
    return len(state_dict[_kernels(arch)[-1].torch])


def count_channels(state_dict: dict[str, np.ndarray], arch: str | Sequence[Layer]) -> int:
    """Returns the channels of the images that the first layer takes."""
    first = _kernels(arch)[0]
    shape = state_dict[first.torch].shape
    return flat_channels(shape[-1], first.kernel) if first.kernel.kind == 'flatten' else shape[1]


def missing_and_unexpected(missing: list[str], unexpected: list[str]) -> str:
    parts = [('missing', missing), ('unexpected', unexpected)]
    return ', '.join(f'{what} {few(names)}' for what, names in parts if names)


def few(names: list) -> str:
    """Returns the first three names, short, and how many more there are."""
    shown = ', '.join(f'{name!s:.99}' for name in names[:3])
    return shown + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _is_usable(array, leaf):
    floating = jax.numpy.issubdtype(array.dtype, np.floating)
    return floating and array.size and (leaf.kernel is None or array.ndim > 1)


def _kernels(arch):
    return [leaf for leaf in leaves(arch) if leaf.kernel and leaf.path]


def _expected_shapes(arch, num_classes, channels):
    """{torch name: torch shape} of all tensors that have a counterpart, for 32x32 images."""
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), np.float32)
    module = create_model(arch, num_classes, mean=None, std=None)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    flat = flatten_dict({**shapes, 'scores': shapes['params']}, sep='/')
    return {
        leaf.torch: torch_shape(flat[f'{leaf.collection}/{leaf.path}'].shape, leaf)
        for leaf in leaves(arch, scores=True)
        if leaf.path
    }
