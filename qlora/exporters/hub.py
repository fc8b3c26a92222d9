"""To the hub, when a user says so: one commit into their repository, private unless asked.  Door: huggingface_hub.

The token is the library's own business (HF_TOKEN, `hf auth login`): it is never an argument, and never in a message.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from qlora.errors import InputError, QloraError

NOT_LOGGED_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def commit(repository: str, files: Mapping[str, Path | bytes], public: bool, message: str) -> str:
    """Create the repository if there is none, and put all files into it in one commit; returns the commit's address.

    InputError for a name that is none, no token, no right to write, or a repository that is public without being asked
    for; QloraError if the hub does not answer.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise InputError(
                f"push: {repository} is there already, and everybody can read it; nothing was sent. Say --public, or "
                "name another repository."
            )
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repository, added, commit_message=message).commit_url)
    except HFValidationError as error:
        raise InputError(
            f"push: {repository!r} is no name of a repository ({_first(error)}). Write USER/NAME."
        ) from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"push: there is no token. {NOT_LOGGED_IN}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise InputError(f"push: the hub refused ({status}) for {repository}. {NOT_LOGGED_IN} there.") from error
        raise QloraError(f"push: the hub answered {status}: {_first(error)}. Nothing was committed.") from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise QloraError(f"push: the hub can't be reached ({type(error).__name__}); nothing was committed.") from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
