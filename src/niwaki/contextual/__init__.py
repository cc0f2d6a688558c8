"""Which heads and neurons one input needs: their importance, who predicts it, and which of them run."""
