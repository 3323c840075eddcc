"""Options of publishing: those of `bridle push`, and what --push_to_hub needs."""

import re
from dataclasses import dataclass, field


LICENSE_HELP = "licence of the weights, by the Hub's name, as apache-2.0; stands on the card"
MODEL_ID_HELP = "repository to push to, as NAME or ORG/NAME; a tokenizer's gets -tokenizer behind it"
PRIVATE_HELP = "make the repository a private one"


@dataclass
class PushArguments:
    """Arguments of `bridle push`; what is not given is what the run was given."""

    output_dir: str = field(metadata={"help": "output folder of a finished run of pretraining or fine-tuning"})
    hub_model_id: str | None = field(default=None, metadata={"help": f"{MODEL_ID_HELP} (default: the run's)"})
    license: str | None = field(default=None, metadata={"help": f"{LICENSE_HELP} (default: the run's)"})
    hub_private: bool = field(default=False, metadata={"help": PRIVATE_HELP})


def check_publishing(push_to_hub: bool, hub_model_id: str | None, hub_private: bool, license: str | None) -> None:
    """Refuse what no Hub would take, without asking one.

    Raises:
        ValueError: naming the option.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"--license is {license!r}: expected the Hub's name of a licence, as mit or apache-2.0")
    if not push_to_hub:
        if hub_model_id is not None or hub_private:
            raise ValueError(f"--{'hub_private' if hub_private else 'hub_model_id'} is for --push_to_hub: give it too")
        return
    if hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id: the repository to push to, as NAME or ORG/NAME")
    if license is None:
        raise ValueError("--push_to_hub needs --license: that of the weights, as mit, apache-2.0 or cc-by-4.0")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(f"{hub_model_id}-tokenizer")
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id is {hub_model_id!r}: {error}") from error
