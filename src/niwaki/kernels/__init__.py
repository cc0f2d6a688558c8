"""Fast products and their slow references, on CPU (`cpu/`) and GPU (`triton/`). No model and no file is known here."""
