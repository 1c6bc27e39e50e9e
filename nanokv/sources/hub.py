"""Models from the hub: what is needed of a repository, downloaded once into the hub's own cache."""

from pathlib import Path

from nanokv.sources import PICKLE_REFUSED, LoadError, first_pickle
from nanokv.sources.folder import parse_config, read_json, weight_files

SMALL = ["config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"]
SMALL += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"]


def hub_folder(name: str, revision: str | None = None, progress=True) -> Path:
    """Download what is needed of a hub repository, or find it in the hub's cache; return its folder.

    The config is read before the weights are asked for. Raises LoadError.
    """
    import huggingface_hub.utils as hub_utils  # slow to import, and needed here only
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    reasons = {  # a gated repository is also one not found: the order matters
        errors.GatedRepoError: f"{name} is gated: accept its terms on its hub page, then run `hf auth login`",
        errors.RevisionNotFoundError: f"{name} has no revision {revision}",
        errors.RepositoryNotFoundError: f"{name} is neither a local folder nor on the hub (private? `hf auth login`)",
        errors.LocalEntryNotFoundError: f"{at} is not in the cache and the hub cannot be reached (offline?)",
        errors.OfflineModeIsEnabled: f"{at} is not in the cache and the hub is switched off (HF_HUB_OFFLINE)",
    }
    quiet = not progress and not hub_utils.are_progress_bars_disabled()
    if quiet:
        hub_utils.disable_progress_bars()
    try:
        return _download(name, revision)
    except LoadError as e:
        raise LoadError(f"{at}: {e}") from e
    except Exception as e:  # http libraries, disks and proxies fail in their own ways
        other = f"cannot download {at}: {type(e).__name__}: {e}"
        raise LoadError(next((why for kind, why in reasons.items() if isinstance(e, kind)), other)) from e
    finally:
        if quiet:
            hub_utils.enable_progress_bars()


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub as hub

    folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=SMALL))
    parse_config(read_json(folder / "config.json"))  # better now than after gigabytes
    files = weight_files(folder)
    folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=files))
    if not any((folder / f).exists() for f in files):
        pickle = first_pickle(hub.list_repo_files(name, revision=revision))
        raise LoadError(f"the weights are only in {pickle}: {PICKLE_REFUSED}" if pickle else f"no {files[0]}")
    return folder
