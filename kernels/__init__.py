"""Ground floor: plain tensors in, plain tensors out; imports nothing else of the project.

``prepare_codes`` puts codes into the layout of the backend that serves their device, ``lut_linear``
multiplies by them, ``explain`` says which backend that is and why.
"""

from spallm_serve.kernels.choice import Explanation, explain, prepare_codes
from spallm_serve.kernels.dispatch import lut_linear

__all__ = ["Explanation", "explain", "lut_linear", "prepare_codes"]
