"""Answers: what a plan needs, as typed immutable values that know how to become plain data."""
