"""Everything this package raises on purpose, as one tree.

    ValueError
    └── MythosError             something the caller can mend; the message says how
        ├── ConfigError         a configuration that cannot be built
        ├── InputError          token ids, masks or loops that a call cannot take
        ├── CacheError          a cache that does not fit the model or the call
        ├── DataError           text that is missing, empty, unreadable or too short
        ├── TokenizerError      a tokenizer that is missing or does not fit
        ├── CheckpointError     a checkpoint that is missing, damaged or of another model
        └── EngineError         a request that the engine cannot take now
            ├── QueueFull       as many wait as may: try again later
            └── EngineStopped   it takes no requests any more

All are `ValueError`s, so callers may catch either. The command line prints the sentence and
exits with 2. Messages follow one form: name=value, what must hold, what to do.
"""


class MythosError(ValueError):
    """What a user can cause and mend."""


class ConfigError(MythosError):
    """A configuration that cannot be built."""


class InputError(MythosError):
    """Token ids, masks, loops or a halting rule that a call cannot take."""


class CacheError(MythosError):
    """A cache that does not fit the model or the call."""


class DataError(MythosError):
    """Text that is missing, empty, unreadable or too short."""


class TokenizerError(MythosError):
    """A tokenizer that is missing or does not fit the model or the run."""


class CheckpointError(MythosError):
    """A checkpoint that is missing, damaged or of another model."""


class EngineError(MythosError):
    """A request that the engine cannot take now, though nothing is wrong with it."""


class QueueFull(EngineError):  # noqa: N818
    """As many requests wait as may: try again later."""


class EngineStopped(EngineError):  # noqa: N818
    """The engine takes no requests any more."""
