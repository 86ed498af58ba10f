"""The report as a command and a module."""

import shutil
import subprocess
import sys

from written_runs import a_run, seed_of

from robustprune_jax.report import __main__ as command


def test_command(workdir, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp('empty')
    assert command.main([str(empty), str(workdir)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith('error: no run in') and str(empty) in err
    assert 'hydra - lwm' in out and str(workdir / 'report' / 'index.html') in out


def test_command_with_one_page(workdir, tmp_path, capsys):
    other = a_run(tmp_path / 'other', seed_of(4), objective='pgd')
    for folder in (workdir, other):
        shutil.rmtree(folder / 'export')
    assert command.main([str(workdir), str(other), '--out', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert "  objective: 'trades' | 'pgd'" in out
    assert out.splitlines()[-1] == str(tmp_path / 'out' / 'index.html')
    assert not (workdir / 'report').exists()


def test_importing_the_report_does_not_import_jax():
    code = 'import sys, robustprune_jax.report; sys.exit("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
