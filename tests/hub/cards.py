"""The Hub's rules for the metadata of a model card, as far as they concern quantized models.

The identifiers of licences are those that the Hub lists when it refuses another one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MODEL_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def read_metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card; empty where it has none. Raises ValueError for bad YAML."""
    match = _FRONT_MATTER.search(card)
    if match is None:
        return {}
    try:
        metadata = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"YAML is malformed: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("YAML metadata must be a mapping")
    return metadata


def find_card_errors(card: str) -> list[str]:
    """Return what the Hub would refuse in a card's metadata."""
    try:
        metadata = read_metadata(card)
    except ValueError as error:
        return [str(error)]
    return [
        *_license_errors(metadata),
        *_base_model_errors(metadata),
        *(
            f'"{key}" must be an array of strings'
            for key in ("tags",)
            if not _is_list_of_strings(metadata.get(key, []))
        ),
        *(
            f'"{key}" must be a string'
            for key in ("library_name", "pipeline_tag", "license_name", "license_link")
            if not isinstance(metadata.get(key, ""), str)
        ),
    ]


def _license_errors(metadata: dict[str, Any]) -> list[str]:
    given = metadata.get("license")
    names = given if isinstance(given, list) else [] if given is None else [given]
    if all(name in LICENSES for name in names):
        return []
    return [f'"license" must be one of [{", ".join(sorted(LICENSES))}]']


def _base_model_errors(metadata: dict[str, Any]) -> list[str]:
    given = metadata.get("base_model")
    names = given if isinstance(given, list) else [] if given is None else [given]
    errors = [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in names
        if not (isinstance(name, str) and _MODEL_ID.fullmatch(name) and ".." not in name)
    ]
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return errors


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
