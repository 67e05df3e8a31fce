import sys
from pathlib import Path

import pytest
import torch

for folder in ("rules", "posterior"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
