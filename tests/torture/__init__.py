"""Faults on purpose, at random places and with random values, for as long as is wanted.

``make torture`` runs it; docs/reliability.md says what holds. Every kind of trial is a module of
``kinds/`` with a function ``trial(place, random)``, which raises
``BrokenError`` if something did not hold that should have.
"""
