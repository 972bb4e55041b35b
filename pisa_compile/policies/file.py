"""Policies as a file: JSON with a version, readable and editable by hand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .policy import POLICY_FIELDS, Policy

SCHEMA = "pisa_compile/policy"
VERSION = 1


def save_policy(
    path: str | os.PathLike[str],
    policies: Mapping[str, Policy],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write policies by module name or pattern, as `set_policy` takes them.

    `about` is kept beside them for readers and has no effect.
    """
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "about": dict(about or {}),
        "policies": {name: _fields(policy) for name, policy in policies.items()},
    }
    Path(path).write_text(_text(content))


def load_policy(path: str | os.PathLike[str]) -> dict[str, Policy]:
    """Read a file of policies, for `pisa.set_policy(model, pisa.load_policy(path))`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a policy file, of another version, or says something impossible.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a policy file: it is not text ({error})") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is not a policy file: it is a folder") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a policy file: it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a policy file: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is not a policy file: its schema is {found!r}, not {SCHEMA!r}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the policy file; this release reads "
            f"version {VERSION}"
        )
    policies = content.get("policies")
    if not isinstance(policies, dict):
        raise ValueError(f"{path}: 'policies' must map module names to policies")
    return {name: _policy(path, name, fields) for name, fields in policies.items()}


def _policy(path: Path, name: str, fields: Any) -> Policy:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: the policy for {name!r} must be an object, got {fields!r}")
    if unknown := sorted(set(fields) - set(POLICY_FIELDS)):
        raise ValueError(
            f"{path}: the policy for {name!r} has unknown fields {unknown}; known are "
            f"{', '.join(POLICY_FIELDS)}"
        )
    try:
        return Policy(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the policy for {name!r}: {error}") from error


def _fields(policy: Policy) -> dict[str, Any]:
    fields = policy.given()
    if policy.schedule is not None:
        fields["schedule"] = policy.schedule.fields()
    return fields


def _text(content: dict[str, Any]) -> str:
    """Indented, with lists of numbers on one line."""
    text = json.dumps(content, indent=1)
    numbers = re.compile(r"\[[-+.,\deE\s]+\]")
    return numbers.sub(lambda match: " ".join(match[0].split()), text) + "\n"
