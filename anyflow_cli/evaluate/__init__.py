"""Scores of generated videos: suites, the protocol they are run under, and the reports made of them."""
