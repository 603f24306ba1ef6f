"""The run that all others are compared with."""
import pytest
from rich.console import Console

from fira.stages.pretrain import pretrain


@pytest.fixture(scope="session")
def undisturbed(preset, data_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(str(preset), [f"data.folder={data_folder}"], run, "cpu", False, Console(quiet=True))
    return run
