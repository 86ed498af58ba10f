"""Per-example files: what was measured of each test image, under which settings, resumable."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from robustprune_jax.data import Split
from robustprune_jax.data.batches import eval_batches
from robustprune_jax.runtime import distributed
from robustprune_jax.runtime.files import differences, naming, read_jsonl, write_atomically


def recorded(
    path: Path,
    header: dict,
    measure: Callable[[dict, int], dict[str, jax.Array]],
    test: Split,
    wanted: np.ndarray,
    size: int,
) -> list[dict]:
    """Returns path's lines for the wanted examples, after adding those that are missing.

    header: the first line, all that decides over the others; a file with another raises ValueError.
    measure(batch of `size` images, place of its first in `wanted`) -> {field: [B]}.
    """
    writes = jax.process_index() == 0
    (lines, *_) = distributed.exchange(read_jsonl(path) if writes else None)
    if lines and lines[0] != header:
        found = '; '.join(differences(lines[0], header))
        raise ValueError(
            f'{path} holds an evaluation with other settings ({found}): move it away to redo it'
        )
    done = {line['index']: line for line in lines[1:] if 'index' in line}
    # Whole batches are kept, so that an interrupted evaluation draws the same starts.
    batches = {first: wanted[first : first + size] for first in range(0, len(wanted), size)}
    missing = {first: rows for first, rows in batches.items() if not set(rows) <= done.keys()}
    if not missing:
        return [done[index] for index in wanted]
    rows = np.concatenate(list(missing.values()))
    for index in rows.tolist():
        done.pop(index, None)
    if writes:
        kept = [header, *done.values()]
        write_atomically(path, ''.join(json.dumps(line) + '\n' for line in kept))
    with (
        (path if writes else Path(os.devnull)).open('a') as file,
        tqdm(
            desc=path.stem,
            total=len(wanted),
            initial=len(wanted) - len(rows),
            unit='image',
            disable=None if writes else True,  # None: shown on a terminal only
        ) as bar,
    ):
        todo = eval_batches(test.images[rows], test.labels[rows], size)
        for (first, indices), batch in zip(missing.items(), todo, strict=True):
            fields = distributed.gather(measure(batch, first))
            for i, index in enumerate(indices.tolist()):
                line = {'index': index, 'label': int(batch['label'][i])}
                done[index] = line | {field: value[i].item() for field, value in fields.items()}
            with naming(path):
                file.writelines(json.dumps(done[index]) + '\n' for index in indices.tolist())
                file.flush()
            bar.update(len(indices))
            if distributed.preempted():
                sys.exit(0)
    return [done[index] for index in wanted]
