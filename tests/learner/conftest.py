"""One model for the session, and one thread for torch."""

from pathlib import Path

import pytest
import torch

from tests.learner.builders import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See save_tiny_model."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory
