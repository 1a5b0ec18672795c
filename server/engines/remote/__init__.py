"""Policies that run on other servers."""
