"""Measured cost against eager and torch.compile."""
