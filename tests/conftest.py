"""Set before anything imports Triton."""

import os

import torch

# Without a GPU its programs run in the interpreter, which has to be known when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
