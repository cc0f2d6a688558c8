"""The job: from a recipe and a checkpoint to a result folder and its record. No method is named here."""
