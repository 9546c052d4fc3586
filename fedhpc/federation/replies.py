"""Flower's replies out of responses: what came over the links, and what lies in files."""

from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message, RecordDict

from fedhpc import files
from fedhpc.errors import PlatformError, Superseded
from fedhpc.federation import compat, grid_pb2
from fedhpc.federation.payload import Blob, Encodings, unpack
from fedhpc.federation.transport import Response
from fedhpc.paths import RunPaths


@dataclass(frozen=True)
class Reply:
    """What a response says.

    Attributes
    ----------
    message : Message
        With content, or an error.
    failure : Failure or None
        Why there is an error.
    is_whole : bool
        Whether the app has answered, be it with an error.
    state : RecordDict or None
        The client's state, if it has one and `is_whole`.
    """

    message: Message
    failure: grid_pb2.Failure | None = None
    is_whole: bool = False
    state: RecordDict | None = None


class Replies:
    """Reads responses; the data of their arrays stay where they are until somebody wants them.

    Parameters
    ----------
    paths : RunPaths
        Of the run.

    Attributes
    ----------
    keep : bool
        Whether the arrays of what is read from now on will be sent on: their files stay.
    kept : Encodings
        The blobs of these arrays.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self.keep = False
        self.kept = Encodings()
        self._files: set[Path] = set()

    def read(self, response: Response, question: Message) -> Reply:
        """Return the reply to a message."""
        failure = response.failure
        if failure is None and response.payload is None:
            failure = grid_pb2.Failure(reason="no reply")
        elif response.payload is not None:
            try:
                message, state = unpack(
                    response.payload, lambda digest: self._open_blob(response, digest)
                )
            except Superseded:
                raise
            except (OSError, PlatformError) as error:
                failure = grid_pb2.Failure(reason=f"its arrays could not be read: {error}")
            else:
                if message.has_error():  # the app itself says so
                    failure = grid_pb2.Failure(reason=message.error.reason, raised=True)
                elif self.keep:
                    self._note_blobs(response, response.payload, message)
                has_state = response.payload.HasField("state")
                return Reply(message, failure, True, state if has_state else None)
        assert failure is not None  # noqa: S101
        return Reply(
            compat.make_error_reply(question, failure.reason, raised=failure.raised), failure
        )

    def remove(self, response: Response) -> None:
        """Remove the files of a response that nobody reads."""
        for digest in response.files:
            files.remove(self._paths.result_blob(response.message_id, digest))

    def forget_kept(self) -> None:
        """Forget what was kept, and remove those of its files that have not been sent on."""
        for path in self._files:
            files.remove(path)
        self.kept, self._files = Encodings(), set()

    def _open_blob(self, response: Response, digest: str) -> memoryview:
        if digest in response.blobs:
            return response.blobs[digest]
        path = self._paths.result_blob(response.message_id, digest)
        data = response.blobs[digest] = files.map_whole(path, response.files[digest])
        if self.keep:
            self._files.add(path)
        else:
            files.remove(path)  # the mapping keeps the bytes
        return data

    def _note_blobs(self, response: Response, payload: grid_pb2.Payload, message: Message) -> None:
        for entry in payload.arrays:
            if entry.of_state:
                continue
            path = None
            if entry.digest in response.files:
                path = self._paths.result_blob(response.message_id, entry.digest)
            data = response.blobs[entry.digest]
            blob = Blob(entry.digest, len(data), [data], path)
            self.kept.know(message.content.array_records[entry.record], blob)
