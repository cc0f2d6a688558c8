"""A decoder, block by block: its checkpoint, its anatomy and its device. No method and no statistics live here."""
