import io

import pytest

from hmoe_megatron.checkpoint.saving import write_or_raise


def test_a_failed_write_holds_no_buffer():
    """CPython 3.12.1 dies by SIGSEGV when it collects the buffer of a BytesIO in a cycle, as an error and its frames
    are one."""
    data = io.BytesIO(b"state")

    def write():
        view = data.getbuffer()
        try:
            raise OSError(28, "No space left on device", len(view))
        except OSError as error:
            return 0, error

    with pytest.raises(OSError, match="No space left on device"):
        write_or_raise(write)
    data.truncate(0)  # BufferError while a buffer is held


def test_a_full_disk_is_named_and_not_what_it_broke():
    def write():
        try:
            try:
                raise OSError(28, "No space left on device")
            finally:
                raise RuntimeError("unexpected pos 704 vs 598")
        except RuntimeError as error:
            return 0, error

    with pytest.raises(OSError, match="No space left on device"):
        write_or_raise(write)
    with pytest.raises(RuntimeError, match="another"):
        write_or_raise(lambda: (0, RuntimeError("another")))


@pytest.mark.parametrize("output", [None, (0, ["written"])])
def test_what_was_written_is_returned(output):
    assert write_or_raise(lambda: output) == output
