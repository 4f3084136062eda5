"""The errors that a user can cause, each with the exit code that docs/errors.md documents."""


class VirError(Exception):
    """An error with a way out in its message; entry points print it without a traceback."""

    exit_code = 1


class SettingsError(VirError, ValueError):
    """A flag, a config file or a combination of them that cannot work."""

    exit_code = 2


class DataError(VirError):
    """A folder, shard, index or image that is missing or not what it should be."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint that is missing, incomplete or damaged, or that could not be written."""


class NotFiniteError(VirError):
    """Loss or gradients were not finite for too many steps in a row."""

    exit_code = 4


class LossScaleError(VirError):
    """fp16 gradients were not finite although the loss scale is at its floor."""

    exit_code = 6


EXIT_RANK_LOST = 5
"""Another rank of the run has failed or was lost."""

EXIT_STOPPED_BY_SIGNAL = 75
"""A signal asked the program to stop; what was done is saved and the same command continues it."""
