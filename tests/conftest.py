"""Settings of the test process."""

from __future__ import annotations

import torch

# The nets of the tests are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)
