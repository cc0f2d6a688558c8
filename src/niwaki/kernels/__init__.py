"""Fast products on CPU (`cpu/`) and GPU (`triton/`), and their torch references. Kernels know no model and no file."""
