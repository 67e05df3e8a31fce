import pytest
import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
torch.set_num_threads(1)  # tiny operations wait longer for a second thread than they compute


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
