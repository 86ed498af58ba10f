"""The files of a trained network, by what config.export calls them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from . import passes
from .graph import Graph
from .size import bytes_of, costs
from .state_dict import export_state_dict
from .to_c import is_large, write_c
from .to_onnx import write_onnx
from .to_torch import export_checkpoint, table_of
from .trace import trace


class Format(NamedTuple):
    """A file's suffix, and how it is written: of (variables, meta, path), or of the smaller graph
    that `compact` leaves, of (graph, path)."""

    suffix: str
    of_checkpoint: Callable | None = None
    of_graph: Callable[[Graph, Path], None] | None = None


def _sparse(variables, meta, path):
    return export_checkpoint(variables, meta, path, sparse='float32')


def _c(graph, path):
    write_c(graph, path, constants=path.with_suffix('.bin') if is_large(graph) else None)


FORMATS: dict[str, Format] = {
    'torch': Format('.pth.tar', export_checkpoint),
    'sparse': Format('.safetensors', _sparse),
    'onnx': Format('.onnx', of_graph=write_onnx),
    'c': Format('.c', of_graph=_c),
}


def export(
    variables: dict, module: nn.Module, meta: dict, folder: Path, name: str, formats: Sequence[str]
) -> dict:
    """Writes the network as folder/name.SUFFIX in each format, and returns its size: that of
    conversion.size, without what needs the network's graph where that is not translated.

    meta: as checkpoint.load returns it. Raises NotImplementedError where a format needs the graph
    of a module that is not translated.
    """
    wanted = [FORMATS[x] for x in formats]
    for form in wanted:
        if form.of_checkpoint:
            form.of_checkpoint(variables, meta, folder / f'{name}{form.suffix}')
    size = bytes_of(export_state_dict(variables, table_of(meta['arch'])))
    try:
        dense = passes.fold(trace(module, variables, meta['image_shape']))
    except NotImplementedError:
        if any(form.of_graph for form in wanted):
            raise
        return size
    smaller = passes.compact(dense)
    for form in wanted:
        if form.of_graph:
            form.of_graph(smaller, folder / f'{name}{form.suffix}')
    return size | costs(dense, smaller)


def check_formats(module: nn.Module, shapes: dict, meta: dict, formats: Sequence[str]) -> None:
    """Raises ValueError where a network of such variables cannot be written in a format, as trying
    it with zeros shows. shapes: of its variables; meta: its arch and image_shape."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for form in formats:
        if FORMATS[form].of_checkpoint:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                export(zeros, module, meta, Path(folder), 'zeros', [form])
        except (NotImplementedError, ImportError, ValueError) as error:
            raise ValueError(f'config.export: {form} is not for this network: {error}') from None
