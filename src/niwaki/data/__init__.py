"""Inputs of methods: token windows, hidden states and statistics over them. Nothing here changes a weight."""
