"""Sharing key-value heads: measure, choose groups, merge, refit, refine, put in place."""
