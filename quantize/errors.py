"""Errors that a user can cause; the command line prints them as one sentence and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """Base of every error a user can cause: the message says what, the value seen, what to do."""


class CheckpointError(UserError):
    """A checkpoint folder that cannot be used."""


class RecipeError(UserError):
    """A quantization recipe that cannot be applied."""


class BundleError(UserError):
    """A bundle that is missing, damaged, or not understood."""


class InputError(UserError):
    """A prompt, token or option that the model cannot take."""


class LoweringError(UserError):
    """A model that cannot be lowered to the chosen backend as asked."""


class OutputError(UserError):
    """A file or folder that cannot be written."""


class DeviceError(UserError):
    """A device that cannot be reached, or did not do what was asked of it."""
