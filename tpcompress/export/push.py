"""`push`: checks an exported folder against its manifest and uploads exactly the files that the manifest names.

Large files are uploaded by their content before the commit: the same command continues after an interruption, and
skips what the repository has already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tpcompress.errors import counted, first_line
from tpcompress.export.contents import DENSE, FORMAT, MANIFEST, damaged_files, read_json
from tpcompress.hub import reachable

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Pushed:
    """An upload.

    Attributes:
        url: address of the commit, or of the pull request.
        repo: id of the repository, with its owner.
        files: number of files.
        bytes: their size.
    """

    url: str
    repo: str
    files: int
    bytes: int


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, create_pr: bool = False,
    message: str | None = None,
) -> Pushed:  # fmt: skip
    """Upload an export, or a stock checkpoint of tpcompress, to a repository of the hub; it is created if missing.

    Args:
        folder: exported folder.
        repo: OWNER/NAME, or a NAME of your own.
        private: create a private repository; an existing one must be private.
        revision: branch; it is created if missing.
        create_pr: open a pull request instead of a commit.
        message: of the commit.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, files that differ from the manifest, a repository id that is none, a revision and a
            pull request together, or a public repository where a private one is asked for.
        PermissionError: no token, or none that may write there.
        ConnectionError: the hub cannot be reached.
    """
    folder = Path(folder).expanduser()
    names = files_to_push(folder)
    if create_pr and revision not in (None, "main"):
        raise ValueError("A pull request starts from main; leave out either --revision or --create-pr.")
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.")
    if get_token() is None:
        raise PermissionError(f"There is no token of the hub; {LOGIN}.")
    if not reachable(constants.ENDPOINT):
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached; check the network, or HF_ENDPOINT.")
    api = HfApi(endpoint=constants.ENDPOINT)
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    try:
        full = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(full).private:
            raise ValueError(f"{full} exists and is public; make it private on the hub first, or leave out --private.")
        if revision not in (None, "main"):
            api.create_branch(full, branch=str(revision), exist_ok=True)
        done = api.create_commit(
            full, operations, commit_message=message or f"Upload {folder.resolve().name}", revision=revision,
            create_pr=create_pr,
        )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"'{repo}' is no id of a repository ({first_line(error)}); give OWNER/NAME.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _readable(error, repo, constants.ENDPOINT) from error
    size = sum((folder / name).stat().st_size for name in names)
    return Pushed(str(done.pr_url or done.commit_url), full, len(names), size)


def files_to_push(folder: Path) -> list[str]:
    """The files that the manifest of a folder names, and the manifest itself, after a check of their hashes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not of tpcompress, or a file that is missing, differs, or lies outside of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}; give one that tpcompress export wrote.")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}, so it is no export of tpcompress; export it first.")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") not in (FORMAT, DENSE) or not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / MANIFEST} is not of a tpcompress export; export the model again.")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(
                f"{folder / MANIFEST} names '{name}', which is outside of the folder; nothing was uploaded."
            )
    damaged = damaged_files(folder, manifest, hashes=True)
    if damaged:
        name, what = next(iter(damaged.items()))
        more = f" (and {counted(len(damaged) - 1, 'other file')})" if len(damaged) > 1 else ""
        raise ValueError(f"{folder / name} {what}{more}; nothing was uploaded. Copy or export the folder again.")
    return [*sorted(files), MANIFEST]


def _readable(error: Exception, repo: str, endpoint: str) -> Exception:
    """An error of the hub client in one line, with what to do."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return PermissionError(f"The hub does not accept the token; {LOGIN}.")
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo} ({_reason(error)}); use one with write access to that owner."
        )
    if status is not None:
        return ValueError(f"The hub refused the upload to {repo}: {_reason(error)} (status {status}).")
    if type(error).__module__.startswith(("httpx", "httpcore", "requests")) or isinstance(error, OSError):
        return ConnectionError(
            f"The connection to {endpoint} broke off ({first_line(error)}); the same command continues the upload."
        )
    return error


def _reason(error: Exception) -> str:
    """What the server said, or the last line of the client's message."""
    said = getattr(error, "server_message", None)
    if not said:
        try:
            said = json.loads(getattr(error, "response").text).get("error")  # noqa: B009
        except (AttributeError, ValueError):
            said = None
    lines = str(said or error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(".")
