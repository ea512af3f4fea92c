"""Devices: deployment, benchmark, memory, temperature, report. Imports no torch."""
