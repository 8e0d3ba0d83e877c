"""The few exceptions a user can meet. Each message says what happened and what to do about it."""


class EstimateError(Exception):
    """Anything that stops an estimate for a reason the user can understand and mend."""


class PromptSyntaxError(EstimateError):
    """A prompt, or the name of an embedding, that cannot be read."""


class RequestError(EstimateError):
    """A request that cannot be carried out as it stands: a value out of range, two fields that contradict.

    field: the one that is wrong, where that can be said.
    """

    def __init__(self, sentence: str, field: str = "") -> None:
        super().__init__(sentence)
        self.field = field


class ModelError(EstimateError):
    """A checkpoint that cannot be read or is of a kind that does not work."""


class EmbeddingFileError(EstimateError):
    """A name, folder or file of an embedding that cannot be used, read or written."""


class OutOfMemory(EstimateError):
    """The device has no room for what is left to do, however little of it at once."""


class ReportFailed(EstimateError):
    """The vectors are learnt and saved, but could not be measured; the cause is what went wrong there."""
