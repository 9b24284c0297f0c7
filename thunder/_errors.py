"""Exceptions and warnings of the public surface."""

from __future__ import annotations

import logging

from thunder import _C


class _QuietCapture(logging.Filter):
    """torch logs what its fake kernels refuse, and raises it then, which is what the user gets."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether nothing is captured."""
        return not _C.is_capturing()


logging.getLogger("torch._subclasses.fake_tensor").addFilter(_QuietCapture())


class ThunderError(RuntimeError):
    """Base class of errors that thunder itself raises."""


class CaptureError(ThunderError):
    """A callable, or one construct in it, cannot be captured soundly.

    Attributes:
        file, line, function: the user's source place, when it is known.
        construct: what could not be captured, for example ``torch.Tensor.item``.
        reason: why.
        fix: what to do instead.
    """

    def __init__(
        self,
        file: str | None = None,
        line: int = 0,
        function: str | None = None,
        construct: str = "",
        reason: str = "",
        fix: str = "",
    ) -> None:
        self.file, self.line, self.function = file, line, function
        self.construct, self.reason, self.fix = construct, reason, fix
        if not construct:
            super().__init__(file or "")
            return
        place = f"{file}:{line}" + (f", in {function}" if function else "") if file else "unknown place"
        super().__init__(f"{place}: thunder cannot capture {construct}: {reason}. What to do: {fix}.")

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.line, self.function, self.construct, self.reason, self.fix)


class TransformError(ThunderError):
    """A hook of a transform failed; the text names the transform, the cause is its exception."""


class ThunderWarning(UserWarning):
    """A compiled callable did something other than run its compiled code, and says what and where."""


class KernelCompileError(ThunderError):
    """A GPU kernel's source does not compile.

    Attributes:
        kernel: its name.
        log: what the compiler said, in full.
        line: of the first error in the source, counted from 1; 0 when the log names none.
    """

    def __init__(self, kernel: str, log: str = "", line: int = 0, source: str = "") -> None:
        self.kernel, self.log, self.line, self.source = kernel, log, line, source
        lines = source.splitlines()
        guilty = f", line {line}:\n    {lines[line - 1].strip()}" if 0 < line <= len(lines) else ":"
        super().__init__(f"kernel {kernel!r} does not compile{guilty}\n{log.strip()}")

    def __reduce__(self) -> tuple:
        return type(self), (self.kernel, self.log, self.line, self.source)
