"""The order of the house: what a module may import, and the names at its door."""

import ast
import subprocess
import sys
from pathlib import Path

import robustprune_jax

ROOT = Path(__file__).parents[1]
# From the top down; a storey's packages may import each other.
STOREYS = [
    ['pipeline', 'rules', 'report', 'zoo'],
    ['training'],
    ['evaluation'],
    ['objectives'],
    ['attacks', 'bounds', 'smoothing'],
    ['network'],
    ['pruning', 'graph'],
    ['models', 'data'],
    ['config'],
    ['runtime'],
]
LEVEL = {name: level for level, names in enumerate(STOREYS) for name in names}
# What conversion may take, and who may take conversion.
BELOW_CONVERSION = {
    'training.checkpoint',
    'network',
    'pruning',
    'graph',
    'models',
    'data',
    'config',
    'runtime',
}
# The commands' --checkpoint takes names of the zoo, which stands above.
COMMANDS = ('checkpoint_flag.py', 'compiled.py')
ABOVE_CONVERSION = {'pipeline', 'rules', 'zoo', 'report'}


def imported(path):
    """The modules that a file imports, relative ones by their whole names."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[: len(package) + 1 - node.level]) if node.level else ''
            module = '.'.join(filter(None, [base, node.module]))
            yield from (f'{module}.{alias.name}' for alias in node.names)


def test_imports_go_only_downwards():
    """Commands (__main__) stand above all storeys."""
    upwards = []
    for path in sorted(ROOT.glob('robustprune_jax/**/*.py')):
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts[1:])
        storey = name.split('.')[0]
        if storey not in LEVEL or path.name == '__main__.py':
            continue
        for module in imported(path):
            first, _, rest = module.partition('.')
            taken = rest.split('.')[0]
            wrong = taken in LEVEL and LEVEL[taken] < LEVEL[storey]
            if (first == 'robustprune_jax' and wrong) or (
                first == 'conversion' and storey not in ABOVE_CONVERSION
            ):
                upwards.append(f'{name} imports {module}')
    assert not upwards


def test_conversion_takes_no_training():
    found = [
        f'{path.name} imports {module}'
        for path in sorted(ROOT.glob('conversion/**/*.py'))
        for module in imported(path)
        if module.startswith('robustprune_jax.')
        and not (path.name in COMMANDS and module == 'robustprune_jax.zoo')
        and not any(f'{module}.'.startswith(f'robustprune_jax.{b}.') for b in BELOW_CONVERSION)
    ]
    assert not found


def test_a_file_is_read_without_what_trains():
    """Objectives, attacks and optax take seconds to import."""
    program = (
        'import sys, conversion; from conversion import from_torch; '
        'print([m for m in ("optax", "robustprune_jax.objectives", "robustprune_jax.attacks") '
        'if m in sys.modules])'
    )
    output = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout == '[]\n'


def test_public_names_are_at_the_door():
    for name in robustprune_jax.__all__:
        assert getattr(robustprune_jax, name)
    assert {'pgd', 'margins', 'run', 'topk_masks'} <= set(dir(robustprune_jax))
