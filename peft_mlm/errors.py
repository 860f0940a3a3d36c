"""The errors that a user can cause, and can mend.

PeftMlmError                 every error below: the command line prints its message and exits with code 2
├── ArgumentsError           an argument is unknown, of the wrong type, or does not go with another (ValueError)
├── DataError                text that is missing, empty, unreadable or too short (ValueError)
├── ModelError               a base model or tokenizer that cannot serve (ValueError)
├── AdapterError             an adapter, or adapter options, that do not fit the base (ValueError)
├── DamagedFileError         a file that is not what its name says: cut off, altered, or made to harm (ValueError)
├── HubError                 the hub is not reached, refuses, or must not get what lies there (OSError)
├── MergeError               a merged model that does not equal base + adapter (RuntimeError)
├── ExportError              a model that cannot be written in another format, or is another one there (RuntimeError)
├── RunFolderError           a folder that is in the way, or is not what it should be (OSError)
└── DeviceMemoryError        a step that the memory does not hold (MemoryError)

A message says what is wrong, what was given, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class PeftMlmError(Exception):
    """Base of all errors that peft_mlm raises for a user's mistake."""


class ArgumentsError(PeftMlmError, ValueError):
    """One or more arguments cannot be used.

    Args:
        faults: One sentence per fault; all of them are reported together.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(PeftMlmError, ValueError):
    """The text is missing, empty, unreadable or too short."""


class ModelError(PeftMlmError, ValueError):
    """The base model or its tokenizer cannot serve."""


class AdapterError(PeftMlmError, ValueError):
    """The adapter, or its options, do not fit the base model."""


class DamagedFileError(PeftMlmError, ValueError):
    """A file is not what its name says: cut off, altered, or made to harm."""


class HubError(PeftMlmError, OSError):
    """The hub is not reached, or refuses; or something that lies there must not go up."""


class MergeError(PeftMlmError, RuntimeError):
    """The merged model does not equal base + adapter."""


class ExportError(PeftMlmError, RuntimeError):
    """The model cannot be written in another format, or is another one there."""


class RunFolderError(PeftMlmError, OSError):
    """A folder is in the way, or is not what it should be."""


class DeviceMemoryError(PeftMlmError, MemoryError):
    """The memory of the device does not hold a step."""
