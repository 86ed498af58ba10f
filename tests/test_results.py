"""docs/results.md shows what the report makes of the committed results."""

import re
from pathlib import Path

import pytest

from robustprune_jax.report import __main__ as command

ROOT = Path(__file__).parents[1]
# A command on committed results, and the block after it.
SHOWN = re.compile(
    r'```\npython -m robustprune_jax\.report (docs/results/.+) --out .+\n```\n\n```\n(.+?)\n```\n',
    re.DOTALL,
)


@pytest.mark.parametrize(
    ('patterns', 'block'), SHOWN.findall((ROOT / 'docs' / 'results.md').read_text())
)
def test_tables_are_those_of_the_results(patterns, block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdirs = [str(path) for x in patterns.split() for path in sorted(Path().glob(x))]
    assert command.main([*workdirs, '--out', str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f'{block}\n')
