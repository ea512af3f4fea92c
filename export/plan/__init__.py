"""What a model will need on a device and how fast it can be, told from config.json alone.

Nothing here imports torch: shapes, budget, roofline and break-even are arithmetic on numbers.
"""
