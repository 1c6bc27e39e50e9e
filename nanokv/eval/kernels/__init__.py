"""What the Triton kernels cost: compiled for GPUs that are not there (aot, report), or timed on one that is (bench)."""
