import pytest
from written_runs import a_result, a_run


@pytest.fixture
def workdir(tmp_path):
    """A finished run at two densities, as the files of a run have it."""
    return a_run(tmp_path / 'run', a_result())
