"""`tpcompress push`: uploads an exported folder to the hub."""

from __future__ import annotations

from rich.markup import escape

from tpcompress.cli.console import console


def push(folder: str, repo: str, private: bool = False, revision: str | None = None, create_pr: bool = False) -> int:
    """Upload an exported folder to the hub: exactly the files of its manifest, after a check of their hashes.

    Example:
        tpcompress push exported USER/NAME --private

    Args:
        folder: exported folder, or a stock checkpoint that `export --stock` wrote.
        repo: OWNER/NAME of the repository, which is created if it is missing; large files go first, so the same command
            continues after an interruption.
        private: create a private repository.
        revision: branch, which is created if it is missing.
        create_pr: open a pull request instead of a commit.
    """
    from tpcompress.export.push import push as upload

    console.print(escape(f"Checking {folder} and uploading it to {repo} ..."), soft_wrap=True, highlight=False)
    done = upload(folder, repo, private=private, revision=revision, create_pr=create_pr)
    size = f"{done.bytes / 1e9:.2f} GB" if done.bytes >= 1e8 else f"{done.bytes / 1e6:.2f} MB"
    console.print(
        escape(f"Uploaded {done.files} files, {size}, to {done.repo}: {done.url}"), soft_wrap=True, highlight=False
    )
    return 0
