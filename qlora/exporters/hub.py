"""Upload to the Hugging Face hub: one commit, to a repository that is private by default.  Door: huggingface_hub.

The token is read by the library (HF_TOKEN, `hf auth login`): it is never an argument, and never in a message.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from qlora.errors import InputError, QloraError, first_line

NOT_LOGGED_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def commit(repository: str, files: Mapping[str, Path | bytes], public: bool, message: str) -> str:
    """Create the repository if it does not exist, and add all files in one commit; returns the commit's URL.

    InputError for an invalid name, a missing token, no write access, or an existing public repository without `public`;
    QloraError if the hub does not respond.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise InputError(
                f"push: {repository} exists and is public; nothing was sent. Use --public, or name another repository."
            )
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except HFValidationError as error:
        raise InputError(
            f"push: {repository!r} is not a valid repository name ({first_line(error)}). Use USER/NAME."
        ) from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"push: no token was found. {NOT_LOGGED_IN}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise InputError(f"push: the hub refused ({status}) for {repository}. {NOT_LOGGED_IN} there.") from error
        raise QloraError(
            f"push: the hub answered {status}: {first_line(error)}. Nothing was committed; run it again."
        ) from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise QloraError(
            f"push: the hub can't be reached ({type(error).__name__}); nothing was committed. Check the network and "
            "HF_HUB_OFFLINE, and run it again."
        ) from error
