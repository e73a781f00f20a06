"""Objectives as sentences: pure pieces over one record, chosen by recipes."""
