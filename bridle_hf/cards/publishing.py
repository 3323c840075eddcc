"""Publishing of a run's models on the Hub: what would fail in the end, seen before the run begins; and the push.

    bridle push OUT --hub_model_id ORG/NAME --license mit

The token is that of `hf auth login` or of HF_TOKEN.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token

from bridle_hf.cards.arguments import PushArguments, check_publishing
from bridle_hf.cards.card import readdress_card
from bridle_hf.common.errors import ArgumentError, RunError, one_line
from bridle_hf.common.files import read_json
from bridle_hf.common.output_folder import FINETUNING, MODEL_FILES, PRETRAINING, RunKind


logger = logging.getLogger(__name__)

# By kind of run, the folders of its models, and how the names of their repositories end.
FOLDERS = {PRETRAINING.name: {"encoder": "", "tokenizer": "-tokenizer"}, FINETUNING.name: {"": ""}}


def open_repositories(kind: RunKind, model_id: str, license: str, private: bool) -> dict[str, str]:
    """Make the repositories that a run will push to, and see that it may; those that are there are taken.

    Args:
        kind: of the run.
        model_id: name of the repository, the user's own, or with its owner before it.
        license: of the weights.
        private: whether they must be private.

    Returns:
        Their full ids, by the model's folder below the output folder.

    Raises:
        ValueError: there is no login; or the Hub refuses the licence, the repository, or to be written to.
    """
    if get_token() is None:
        raise ValueError("--push_to_hub: not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    _asking(f"--license {license}", ModelCard(f"---\nlicense: {license}\n---\n").validate)
    found = {}
    for folder, ending in FOLDERS[kind.name].items():
        named = f"--hub_model_id {model_id}{ending}"
        repo_id = _asking(named, HfApi().create_repo, f"{model_id}{ending}", private=private or None, exist_ok=True)
        found[folder] = repo_id.repo_id
        _asking(named, HfApi().auth_check, found[folder], write=True)
        if private and not _asking(named, HfApi().model_info, found[folder]).private:
            raise ValueError(f"--hub_private: {found[folder]} is there and public: make it private, or take another")
    return found


def _asking(what: str, ask: Any, *args: Any, **options: Any) -> Any:
    """An answer of the Hub; whatever goes wrong as one ValueError: its client raises errors of several libraries."""
    try:
        return ask(*args, **options)
    except Exception as error:
        raise ValueError(f"{what}: the Hub cannot take it: {one_line(error)}") from error


def push(out: Path, repositories: Mapping[str, str], license: str) -> list[str]:
    """Push the models of a finished run, each with its processor, its code and its card, which then says where it is.

    Args:
        out: the run's output folder.
        repositories: what [`open_repositories`] has returned.
        license: of the weights.

    Returns:
        The addresses of what was pushed.

    Raises:
        RunError: a push failed: says how to do it again. Nothing in `out` is lost.
    """
    urls = []
    for folder, repo_id in repositories.items():
        try:
            path = out / folder / "README.md"
            readdress_card(path, repo_id, license)
            ModelCard.load(path).validate()
            # No star of a pattern stops at a slash: checkpoints hold such files, too.
            options = {"allow_patterns": list(MODEL_FILES), "ignore_patterns": ["*/*"]}
            HfApi().upload_folder(repo_id=repo_id, folder_path=path.parent, **options)
        except Exception as error:  # as in `_asking`
            raise RunError(
                f"{out} is whole, but was not pushed to {repo_id} ({one_line(error)}): "
                f"`bridle push {out}` does it again"
            ) from error
        urls.append(f"{HfApi().endpoint}/{repo_id}")
        logger.info("pushed %s to %s", out / folder, urls[-1])
    return urls


def run_pushing(args: PushArguments) -> list[str]:
    """What `bridle push` does; returns the addresses.

    Raises:
        ArgumentError: the folder holds no finished run of one model, or the Hub cannot take it.
        RunError: see [`push`].
    """
    out = Path(args.output_dir)
    try:
        run = read_json(out / "run.json")
        kinds = {kind.name: kind for kind in (PRETRAINING, FINETUNING)}
        kind = kinds.get(run.get("kind")) if isinstance(run, dict) else None
        if kind is None:
            raise ValueError(f"{out} holds no run of {' or '.join(kinds)}")
        if not all((out / folder / "README.md").is_file() for folder in FOLDERS[kind.name]):
            raise ValueError(f"{out} holds a run that has not come to its end: finish it with --resume")
        asked = {name: getattr(args, name) or run["arguments"].get(name)
                 for name in ("hub_model_id", "hub_private", "license")}  # fmt: skip
        check_publishing(True, **asked)
        repositories = open_repositories(kind, asked["hub_model_id"], asked["license"], bool(asked["hub_private"]))
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    return push(out, repositories, asked["license"])
