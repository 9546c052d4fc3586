"""Certificates of one run: whoever has none of them gets no word with any of its sockets.

The server makes them, with `fedhpc.federation.issuer`: array tasks need not load what that needs.
"""

import os
import shutil
from pathlib import Path

import grpc

from fedhpc.errors import PlatformError

SERVER_NAME = "fedhpc-server"  # what clients check; addresses change from attempt to attempt


def exist(folder: Path) -> bool:
    """Return whether the folder holds complete certificates."""
    return (folder / "ca.crt").is_file()


def remove(folder: Path) -> None:
    """Delete all of them."""
    shutil.rmtree(folder, ignore_errors=True)


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Return credentials that demand a certificate of this run from every peer."""
    ca, certificate, key = _read(folder, "server")
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=ca, require_client_auth=True
    )


def client_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Return credentials that accept this run's server alone."""
    ca, certificate, key = _read(folder, "client")
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _read(folder: Path, role: str) -> tuple[bytes, bytes, bytes]:
    try:
        ca, certificate, key = (
            (folder / name).read_bytes() for name in ("ca.crt", f"{role}.crt", f"{role}.key")
        )
    except OSError as error:
        raise PlatformError(
            f"could not read the run's certificates in {folder}: {error.strerror}",
            "the folder is deleted at the end of a run, and must be readable by its owner's jobs"
            f" (uid {os.getuid()} here)",
        ) from error
    return ca, certificate, key
