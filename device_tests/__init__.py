"""Devices: deployment, benchmark, memory, temperature, report. Not built yet; imports no torch."""
