"""Tests in a process of their own: fake tensors start autograd threads, after which a process cannot fork stages."""

import functools
import os
import traceback
from collections.abc import Callable
from typing import Any


def forked(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a forked process; its traceback is printed, and pytest shows it if the test fails."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                test(*args, **kwargs)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    return wrapper
