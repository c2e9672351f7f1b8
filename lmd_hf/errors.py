"""What can go wrong, said as what, where and remedy in one line."""


class LmdError(Exception):
    """Base of every error that lmd_hf raises on purpose; its text is one line for the user."""


class SourceError(LmdError):
    """The model cannot be found or opened, or holds no weights that may be read."""


class FormatError(LmdError):
    """A weight file is truncated, inconsistent or of an unknown kind."""


class NoDataError(LmdError):
    """One tensor of a live model has no data (it is on the meta device); the others may."""


class SettingsError(LmdError):
    """A setting has a value outside its range; the text lists the known ones."""


class OutputError(LmdError):
    """The result cannot be written where it was asked for; what was there before is untouched."""


class ProcessError(LmdError):
    """Another process of this run cannot be reached, or has ended; what is finished is kept."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
