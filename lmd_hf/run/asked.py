"""What a user named, checked before anything is done with it: one clear line for what is not what it should be."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lmd_hf.errors import SourceError


def hub_id(text: str) -> str:
    """The id of a repository as it is; `SourceError` for what can be none."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise SourceError(f"{text}: not the id of a repository on the Hub; write org/name") from None
    return text
