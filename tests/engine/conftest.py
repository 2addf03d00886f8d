"""Two test processes share two cores: torch in each takes one thread, or its barriers cost more than the arithmetic."""

import torch

torch.set_num_threads(1)
