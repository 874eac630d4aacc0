"""Bit-exact integer arithmetic of MAC arrays: accumulate, shift, round, saturate.

Import what you need from the submodules (`mac_array`, `gemm`, `requantize`, `reference`): this
package file stays empty so that describing a MAC array does not load the compiled kernels.
"""
