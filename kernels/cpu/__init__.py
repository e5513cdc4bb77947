"""The native CPU backend: C++ for AVX-512, AVX2 and plain processors, called through ctypes."""
