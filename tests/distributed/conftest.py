"""What every test here needs: to be asked for, and one thread for torch."""

import pytest
import torch


@pytest.fixture(autouse=True)
def only_when_asked(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--distributed"):
        pytest.skip("starts torchrun: make test-distributed")
    torch.set_num_threads(1)
