"""The CUDA kernels run without a GPU: simt.h emulates them, the tests here try the emulator."""
