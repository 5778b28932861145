"""Runs of a cut model before it is handed out: its shapes without data, its numbers against the whole model."""
