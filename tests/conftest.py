import pytest
import torch

torch.set_num_threads(1)  # tiny operations wait longer for a second thread than they compute


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
