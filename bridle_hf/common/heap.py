"""The heap of glibc's malloc, kept free of large tensors: what they leave there is seldom given back."""

import ctypes
import platform


LARGE_BYTES = 4 * 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h


def keep_large_tensors_out_of_the_heap() -> None:
    """Have this process map tensors of 4 MiB and more one by one from now on: freed, their memory is given back.

    By itself, glibc takes from its heap what is smaller than the largest block that was freed so far (up to 32 MiB).
    There, gradients and optimizer states are laid among activations, and keep the holes that these leave: a quarter of
    the memory that a step of a ViT-B takes on a CPU. Elsewhere than on glibc there is nothing to do.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
