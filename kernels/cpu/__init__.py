"""The native CPU backend: C++ for AVX-512 with and without bfloat16, AVX2 and plain processors."""
