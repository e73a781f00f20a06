"""Processes: settings, command line, HTTP servers, and the loops started as services."""
