"""The trained model that the repository brings along."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parents[2] / "scripts" / "demo_model"
