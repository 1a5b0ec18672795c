"""Rewards: rules, classifiers, judges, likelihood ratios, and reward models in models/. They know no request, no guide.

README.md says how each is served, and what a reward of a plugin is.
"""
