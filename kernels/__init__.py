"""Ground floor: plain tensors in, plain tensors out; imports nothing else of the project.

``prepare_codes`` puts codes into the layout of the backend that serves their device, ``lut_linear``
multiplies by them, ``explain`` says which backend that is and why.
"""

# transformers looks for a package of Hugging Face's called "kernels", and finds this folder when
# Python was started beside it; under that name it is empty.
if __name__ != "kernels":
    from spallm_serve.kernels.choice import Explanation, explain, prepare_codes
    from spallm_serve.kernels.dispatch import lut_linear

    __all__ = ["Explanation", "explain", "lut_linear", "prepare_codes"]
