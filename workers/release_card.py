"""The card of a release: that of the version, made to say what lies in this very folder and how it is served.

Owns the sections that a version's own card could not know, and the front matter's words for a merged model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from workers.servers import BASE_VARIABLE, Obstacle

CARD = "README.md"
FRONT_MATTER = "---\n"
LOADING = "## Loading\n"
VERIFYING = """
## Verifying

`manifest.json` holds the SHA-256 of every file; `chorus verify .` checks them all. Where `model.sig`
lies here, `chorus verify . --key PUBLIC.pem` checks the signature too; so does OpenSSF's own tool
(`pip install model-signing`): `model_signing verify key . --signature model.sig --public_key PUBLIC.pem`.
"""


def release_card(
    text: str,
    commands: Mapping[str, str],
    found: Sequence[Obstacle],
    merged_dtype: str | None = None,
) -> str:
    """The version's card `text` for a release; `merged_dtype` is the precision of a merged model.

    `commands` are server -> what serves it, `found` what keeps a server from it.
    """
    if merged_dtype is not None:
        text = _of_full_model(_of_transformers(text), merged_dtype)
    return text + _serving(commands, found) + VERIFYING


def _of_transformers(text: str) -> str:
    """The front matter of a model that Transformers loads, where it is one of an adapter."""
    if not text.startswith(FRONT_MATTER):
        return text
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    card.data.library_name = "transformers"
    if getattr(card.data, "base_model_relation", None) == "adapter":
        card.data.base_model_relation = "finetune"
    return str(card)


def _of_full_model(text: str, dtype: str) -> str:
    """The section on loading loads the model; without such a section it is added."""
    section = f"""{LOADING}
This folder holds the whole model: the adapter is merged into its base, in {dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
    before, heading, rest = text.partition(LOADING)
    if not heading:
        return f"{text}\n{section}"
    following = re.search(r"^## ", rest, re.MULTILINE)
    return f"{before}{section}\n{rest[following.start() :]}" if following else before + section


def _serving(commands: Mapping[str, str], found: Sequence[Obstacle]) -> str:
    lines = ["", "## Serving", "", "From within this folder:", ""]
    for server, command in commands.items():
        against = [obstacle.words for obstacle in found if obstacle.server == server]
        lines += [f"- {server} would not serve it as it was scored: {'; '.join(against)}"] if against else []
        lines += [] if against else [f"- {server}: `{command}`"]
    if any(BASE_VARIABLE in command for command in commands.values()):
        lines += ["", "`BASE` is the folder of the base, the one whose digest is given above."]
    return "\n".join(lines) + "\n"
