"""One thread in the test process: a thread pool of OpenMP does not survive the fork that starts ranks and workers."""

import torch

torch.set_num_threads(1)
